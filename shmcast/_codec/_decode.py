"""A skeleton and its pieces to an object; whatever the bytes are, a value or `LayoutError` or `NotAllowed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shmcast.errors import LayoutError, NotAllowed

from . import _leaves, _table
from ._classes import MAX_UNTRACKED_DEPTH, ClassRecord
from ._geometry import Shape, check_dims, extent, is_vast, numpy_dtype, torch_dtype
from ._leaves import Leaves, Signature
from ._machine import Machine
from ._table import Cursor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._allow import Allow


def decode(stream: bytes, pieces: Sequence[torch.Tensor], allow: Allow, leaves: Leaves | None = None) -> object:
    """Rebuild what `encode` flattened.

    `stream`: a private copy of the skeleton. `pieces`: 1-D uint8 tensors, each of `lead + length` bytes, in order;
    tensors and arrays are views of them, lists, bytes and bytearrays copies. `leaves`: this rank's own walk of the raw
    inputs, needed if the stream refers to it.

    Raises `LayoutError` for bytes that are no skeleton, do not fit the pieces, or refer to other leaves, and
    `NotAllowed` for a class that `allow` does not admit. No bytes lead to anything else, nor to any code but
    `__hash__`, `__eq__` and Enum look-up of admitted classes, the `__post_init__` of a Struct that has an
    `__init_subclass__`, and the import of the modules of admitted packages.
    """
    try:
        return _Rebuilder(stream, pieces, allow, leaves).run()
    except (LayoutError, NotAllowed):
        raise
    except Exception as error:  # damaged bytes reach numpy, torch and the user's classes: whatever they raise
        raise LayoutError(f"not a skeleton: {_described(error)}") from error


class _Rebuilder:
    def __init__(self, stream: bytes, pieces: Sequence[torch.Tensor], allow: Allow, leaves: Leaves | None) -> None:
        self.parts = _table.split(stream)
        self.cursor = Cursor(self.parts.table)
        self.pieces = pieces
        self.leaves = leaves
        classes, count = self.cursor.take(2)
        self.check_pieces(self.cursor.take(count))
        if not 0 <= classes <= len(self.parts.names):
            raise LayoutError(f"{classes} classes in {len(self.parts.names)} names")
        self.records = [_record(label, allow) for label in self.parts.names[:classes]]
        self.dtypes = self.parts.names[classes:]
        self.copies_in_stream = len(stream)
        self.copies_left = sum([piece.numel() for piece in pieces])
        self.depths: dict[int, tuple[int, object]] = {}

    def run(self) -> object:
        entries: list[object] = [_MARKER]
        cursor = self.cursor
        while cursor.more():
            (kind,) = cursor.take(1)
            reader = _ENTRIES.get(kind)
            if reader is None:
                raise LayoutError(f"entry of kind {kind}")
            entries.append(reader(self))
        return Machine(self.parts.pickle, entries, self.rebuild).run()

    def check_pieces(self, lengths: Sequence[int]) -> None:
        if len(lengths) != len(self.pieces):
            raise LayoutError(f"{len(lengths)} pieces asked for, {len(self.pieces)} given")
        for length, piece in zip(lengths, self.pieces, strict=True):
            if piece.dtype is not torch.uint8 or piece.dim() != 1 or piece.numel() != length:
                raise LayoutError(f"a piece of {length} bytes asked for, {piece.numel()} x {piece.dtype} given")

    def rebuild(self, parts: tuple[Any, ...]) -> object:
        code = parts[0]
        if type(code) is not int or code < 0:
            raise LayoutError("a rebuild without a code")
        if code < _table.FIRST_CLASS:
            self.charge(len(parts[1]) if code == _table.NUMPY_TEXT else len(parts))
            return _BUILTINS[code](*parts[1:])
        record = self.records[code - _table.FIRST_CLASS]
        self.charge(len(parts))
        if len(parts) > len(record.names) + 1 and type(parts[len(record.names) + 1]) is dict:
            self.charge(len(parts[len(record.names) + 1]))
        obj = record.build(parts[1:])
        if record.untracked:
            self.check_depth(obj, parts)
        return obj

    def charge(self, copied: int) -> None:
        # What a rebuild copies is in the stream once; a stream that names it again and again would copy it each time.
        self.copies_in_stream -= copied
        if self.copies_in_stream < 0:
            raise LayoutError("more is rebuilt than the stream holds")

    def check_depth(self, obj: object, parts: tuple[Any, ...]) -> None:
        # Deallocating a Struct of gc=False recurses in C through what it holds directly.
        depth = 1 + max((self.depths[id(part)][0] for part in parts if id(part) in self.depths), default=0)
        if depth > MAX_UNTRACKED_DEPTH:
            raise LayoutError("structs nested too deeply")
        self.depths[id(obj)] = (depth, obj)

    # One entry of the table each; the cursor stands behind its kind.

    def dtype_name(self) -> str:
        (index,) = self.cursor.take(1)
        if index < 0:
            raise LayoutError(f"dtype {index}")
        return self.dtypes[index]

    def piece(self) -> tuple[torch.Tensor, int]:
        """A piece and an offset into it that is not negative."""
        index, offset = self.cursor.take(2)
        if index < 0 or offset < 0:
            raise LayoutError(f"byte {offset} of piece {index}")
        return self.pieces[index], offset

    def tensor(self) -> torch.Tensor:
        dtype = torch_dtype(self.dtype_name())
        base, offset = self.piece()
        shape, strides, _ = self.cursor.form(1)
        return tensor_over(base, dtype, offset, shape, strides)

    def array(self) -> np.ndarray[Any, Any]:
        dtype = numpy_dtype(self.dtype_name())
        base, offset = self.piece()
        return _array_over(base, dtype, offset, *self.cursor.form(dtype.itemsize))

    def copied(self) -> np.ndarray[Any, Any]:
        base, offset = self.piece()
        (length,) = self.cursor.take(1)
        # Copies overlap in no stream that was encoded: together they are no larger than the pieces.
        self.copies_left -= length
        if length < 0 or offset + length > base.numel() or self.copies_left < 0:
            raise LayoutError(f"{length} bytes at {offset} of {base.numel()}")
        return base.numpy()[offset : offset + length]

    def ints(self) -> list[int]:
        found: list[int] = self.copied().view(np.int64).tolist()
        return found

    def bytes(self) -> bytes:
        return self.copied().tobytes()

    def bytearray(self) -> bytearray:
        return bytearray(self.copied())

    def empty(self) -> torch.Tensor:
        dtype = torch_dtype(self.dtype_name())
        shape, strides, _ = self.cursor.form(1)
        if check_dims(shape, strides, dtype.itemsize) or any(stride < 0 for stride in strides):
            raise LayoutError(f"shape {shape} is not empty")
        return torch.empty(0, dtype=torch.uint8).view(dtype).as_strided(shape, strides)

    def empty_array(self) -> np.ndarray[Any, Any]:
        dtype = numpy_dtype(self.dtype_name())
        shape, strides, read_only = self.cursor.form(1)
        if check_dims(shape, strides, dtype.itemsize):
            raise LayoutError(f"shape {shape} is not empty")
        found = np.ndarray(shape, dtype, bytearray(1))
        found.flags.writeable = not read_only
        return found

    def leaf_index(self) -> int:
        """The leaf that the entry names, of which this rank must have the like."""
        index, kind = self.cursor.take(2)
        dtype, shape, strides = "", (), ()  # type: tuple[str, Shape, Shape]
        if kind == _leaves.TENSOR:
            dtype = self.dtype_name()
            shape, strides, _ = self.cursor.form(1)
        elif kind == _leaves.ARRAY:
            dtype = self.dtype_name()
            shape, strides, _ = self.cursor.form(numpy_dtype(dtype).itemsize)
        elif kind in (_leaves.LIST, _leaves.BYTES):
            shape = tuple(self.cursor.take(1))
        else:
            raise LayoutError(f"leaf of kind {kind}")
        if self.leaves is None:
            raise LayoutError("the skeleton refers to raw inputs, and this rank has none")
        wanted = Signature(kind, dtype, shape, strides)
        found = self.leaves.signature(index)
        if wanted != found:
            raise LayoutError(f"leaf {index} is {found} here and {wanted} at the writer")
        return index

    def leaf(self) -> object:
        index = self.leaf_index()
        return self.held().objects[index]

    def held(self) -> Leaves:
        if self.leaves is None:
            raise LayoutError("the skeleton refers to raw inputs, and this rank has none")
        return self.leaves

    def leaf_tensor(self) -> torch.Tensor:
        index = self.leaf_index()
        dtype = torch_dtype(self.dtype_name())
        (offset,) = self.cursor.take(1)
        shape, strides, _ = self.cursor.form(1)
        return tensor_over(self.held().bytes_of(index), dtype, offset, shape, strides)

    def leaf_array(self) -> np.ndarray[Any, Any]:
        index = self.leaf_index()
        dtype = numpy_dtype(self.dtype_name())
        (offset,) = self.cursor.take(1)
        return _array_over(self.held().bytes_of(index), dtype, offset, *self.cursor.form(dtype.itemsize))


_MARKER = object()

_ENTRIES: dict[int, Callable[[_Rebuilder], object]] = {
    _table.TENSOR: _Rebuilder.tensor,
    _table.ARRAY: _Rebuilder.array,
    _table.INTS: _Rebuilder.ints,
    _table.BYTES: _Rebuilder.bytes,
    _table.BYTEARRAY: _Rebuilder.bytearray,
    _table.EMPTY: _Rebuilder.empty,
    _table.EMPTY_ARRAY: _Rebuilder.empty_array,
    _table.LEAF: _Rebuilder.leaf,
    _table.LEAF_TENSOR: _Rebuilder.leaf_tensor,
    _table.LEAF_ARRAY: _Rebuilder.leaf_array,
}


def _described(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # the user's class may raise an error that cannot say what it is
        return type(error).__name__


def _record(label: str, allow: Allow) -> ClassRecord:
    module, name, digest = label.split(":")
    record = allow.by_name(module, name)
    if record.digest != digest:
        raise LayoutError(f"{module}.{name} has other fields here than at the writer")
    return record


def tensor_over(base: torch.Tensor, dtype: torch.dtype, offset: int, shape: Shape, strides: Shape) -> torch.Tensor:
    """A tensor of elements of `base` (1-D uint8), `offset` bytes in; never one byte outside."""
    itemsize = dtype.itemsize
    count = check_dims(shape, strides, itemsize)
    low, high = extent(shape, strides)
    start, misfit = divmod(offset, itemsize)
    if not count or low < 0 or offset < 0 or misfit or offset + (high + 1) * itemsize > base.numel():
        raise LayoutError(f"{dtype} {shape} with strides {strides} at byte {offset} of {base.numel()}")
    rest = base.numel() % itemsize
    typed = (base[: base.numel() - rest] if rest else base).view(dtype)
    return typed.as_strided(shape, strides, typed.storage_offset() + start)


def _array_over(
    base: torch.Tensor, dtype: np.dtype[np.generic], offset: int, shape: Shape, strides: Shape, read_only: bool
) -> np.ndarray[Any, Any]:
    """An array of elements of `base` (1-D uint8), `offset` bytes in; its base chain ends on `base`."""
    count = check_dims(shape, strides, dtype.itemsize)
    low, high = extent(shape, strides)
    if not count or offset + low < 0 or offset + high + dtype.itemsize > base.numel():
        raise LayoutError(f"{dtype} {shape} with strides {strides} at byte {offset} of {base.numel()}")
    found: np.ndarray[Any, Any] = np.ndarray(shape, dtype, base.numpy(), offset, strides)
    if read_only:
        found.flags.writeable = False
    return found


def _complex(real: object, imaginary: object) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise LayoutError("a complex of other things than floats")
    return complex(real, imaginary)


def _ints(*values: Any) -> Any:
    if not all(type(value) is int for value in values):
        raise LayoutError("ints expected")
    return values


def _range(start: Any, stop: Any, step: Any) -> range:
    _ints(start, stop, step)
    if is_vast(start, stop, step):
        raise LayoutError("a range of vast ints")
    return range(start, stop, step)


def _slice(start: Any, stop: Any, step: Any) -> slice:
    _ints(*[bound for bound in (start, stop, step) if bound is not None])
    return slice(start, stop, step)


def _text(value: object) -> str:
    if type(value) is not str:
        raise LayoutError("text expected")
    return value


def _numpy_scalar(name: object, data: object) -> object:
    dtype = numpy_dtype(_text(name))
    if type(data) is not bytes or len(data) != dtype.itemsize or dtype.kind in "US":
        raise LayoutError(f"a {dtype} scalar of other bytes")
    return np.frombuffer(data, dtype)[0]


def _numpy_text(value: object) -> object:
    if type(value) is bytes:
        return np.bytes_(value)
    return np.str_(_text(value))


_BUILTINS: dict[int, Callable[..., object]] = {
    _table.COMPLEX: _complex,
    _table.SLICE: _slice,
    _table.RANGE: _range,
    _table.DTYPE: lambda name: torch_dtype(_text(name)),
    _table.SIZE: lambda *sizes: torch.Size(_ints(*sizes)),
    _table.DEVICE: lambda name: torch.device(_text(name)),
    _table.NUMPY_DTYPE: lambda name: numpy_dtype(_text(name)),
    _table.NUMPY_SCALAR: _numpy_scalar,
    _table.NUMPY_TEXT: _numpy_text,
}
