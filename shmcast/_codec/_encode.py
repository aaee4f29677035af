"""An object to a skeleton and its pieces: pickle protocol 5 with everything but plain data taken out."""

from __future__ import annotations

import io
import pickle
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from shmcast.errors import EncodeError, NotAllowed

from . import _leaves, _table
from ._classes import Unfit, Values
from ._geometry import MAX_DIMS, TORCH_NAMES, contiguous_strides, extent, refuse_numpy_dtype
from ._leaves import LARGE_BYTES, LONG_LIST, Leaves, is_plain
from ._parts import BUILTINS, Refusal, numpy_parts, refuse_tensor, refuse_type, tensor_span
from ._paths import cycle_in, path_to
from ._pieces import Piece, Span, array_owner, is_sparse, merge, piece_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._allow import Allow


class Encoded(NamedTuple):
    """A flattened object: the skeleton, and the bytes that travel beside it, in the order `decode` wants them."""

    stream: bytes
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the pieces, with what aligns them."""
        return sum(piece.lead + piece.source.numel() for piece in self.pieces)


class _Marker:
    """What the pickle applies to the parts of an instance; travels as a persistent id, never as a name."""

    def __call__(self, *parts: object) -> None:
        raise TypeError("a marker")


_MARKER = _Marker()


def encode(obj: object, allow: Allow, leaves: Leaves | None = None, keeps_leaves: bool = False) -> Encoded:
    """Flatten `obj` without copying its tensors.

    Tensors, arrays, lists of 64 ints and more, and bytes of 1 KiB and more go as pieces; what is a leaf of `leaves`, or
    a view of one, goes as a reference. `keeps_leaves` promises that nobody wrote into the leaves since the walk;
    without it only tensors whose version is tracked and did not move are references (bytes, which cannot change, too);
    a write through a numpy alias moves no version.
    A lone strided view that reaches over more than twice its bytes, and a tensor that is not aligned to its element,
    arrive contiguous; everything else keeps dtype, shape, strides, and shares memory as it did.

    Raises `EncodeError` with the path and the reason, `NotAllowed` for a class that `allow` does not admit.
    """
    flattener = _Flattener(io.BytesIO(), allow, leaves, keeps_leaves)
    try:
        return flattener.flatten(obj)
    except Refusal as refusal:
        found = f"{path_to(obj, refusal.culprit)}: {refusal.reason}"
        raise refusal.error(found) from refusal.__cause__
    except RecursionError:
        raise EncodeError(_too_deep(obj)) from None
    except EncodeError:
        raise
    except Exception as error:
        raise EncodeError(f"the object cannot be flattened: {error!r}") from error


def _too_deep(obj: object) -> str:
    cycle = cycle_in(obj)
    return f"{cycle[:200]}: a cycle" if cycle is not None else "nested too deeply"


class _Flattener(pickle.Pickler):
    def __init__(self, file: io.BytesIO, allow: Allow, leaves: Leaves | None, keeps_leaves: bool) -> None:
        super().__init__(file, protocol=5)
        self.file = file
        self.allow = allow
        self.leaves = leaves
        self.keeps_leaves = keeps_leaves
        self.names: dict[str, int] = {}  # of dtypes
        self.class_codes: dict[type, tuple[int, Callable[[Any], Values]]] = {}
        self.class_labels: list[str] = []
        self.entries: list[list[int]] = []
        self.ids: dict[int, int] = {}
        self.kept: list[object] = []  # what `ids` names must live as long
        self.spans: list[Span] = []
        self.placed: list[tuple[int, Any]] = []  # for each span: its entry, and the tensor or array
        self.containers: set[int] = set()
        self.instances: set[int] = set()
        self.repeated: list[object] = []

    def flatten(self, obj: object) -> Encoded:
        self.dump(obj)
        # A container that holds itself was met twice; most that are met twice are only shared.
        if self.repeated and cycle_in(self.repeated) is not None:
            raise EncodeError(_too_deep(obj))
        pieces = self.place()
        table = [len(self.class_labels), len(pieces)]
        table += [piece.lead + len(piece.source) for piece in pieces]
        for entry in self.entries:
            table += entry
        stream = _table.join([*self.class_labels, *self.names], table, self.file.getvalue())
        return Encoded(stream, pieces)

    # What the pickler asks for every object that it meets.

    def persistent_id(self, obj: Any) -> int | None:
        handler = _BY_TYPE.get(type(obj))
        return None if handler is None else handler(self, obj)

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        code = self.class_codes.get(cls)
        if code is None:
            parts = BUILTINS.get(cls)
            if parts is not None:
                return _MARKER, parts(obj)
            if isinstance(obj, (np.generic, np.dtype)):
                return _MARKER, numpy_parts(obj)
            code = self.admit(obj)
        if id(obj) in self.instances:
            # The pickler remembers what it is done with, so this one is still open.
            raise RecursionError
        self.instances.add(id(obj))
        try:
            return _MARKER, (code[0], *code[1](obj))
        except Unfit as error:
            raise Refusal(obj, str(error)) from None

    def admit(self, obj: Any) -> tuple[int, Callable[[Any], Values]]:
        cls = type(obj)
        reason = refuse_type(obj)
        if reason:
            raise Refusal(obj, reason)
        try:
            record = self.allow.by_class(cls)
        except NotAllowed as error:
            raise Refusal(obj, str(error), NotAllowed) from error.__cause__
        except Unfit as error:
            raise Refusal(obj, str(error)) from None
        code = (_table.FIRST_CLASS + len(self.class_labels), record.take)
        self.class_codes[cls] = code
        self.class_labels.append(record.label)
        return code

    # Out of band: each gives the persistent id, or None for what stays in the pickle.

    def on_marker(self, marker: _Marker) -> int:
        return _table.MARKER

    def on_stranger(self, obj: object) -> int:
        raise Refusal(obj, f"a {type(obj).__name__} cannot be sent")

    def on_container(self, obj: object) -> None:
        key = id(obj)
        if key in self.containers:
            self.repeated.append(obj)
        else:
            self.containers.add(key)

    def on_list(self, obj: list[Any]) -> int | None:
        if len(obj) < LONG_LIST or type(obj[0]) is not int:
            self.on_container(obj)
            return None
        known = self.ids.get(id(obj))
        if known is not None:
            return known
        if self.keeps_leaves and (leaf := self.add_same_leaf(obj)) is not None:
            return leaf
        try:
            if set(map(type, obj)) == {int}:
                return self.add_copied(obj, _table.INTS, struct.pack(f"{len(obj)}q", *obj))
        except struct.error:  # one of them needs more than 64 bits
            pass
        self.on_container(obj)
        return None

    def on_bytes(self, obj: bytes | bytearray) -> int | None:
        if len(obj) < LARGE_BYTES:
            return None
        known = self.ids.get(id(obj))
        if known is not None:
            return known
        if type(obj) is bytes:
            leaf = self.add_same_leaf(obj)
            if leaf is not None:
                return leaf
            return self.add_copied(obj, _table.BYTES, obj)
        return self.add_copied(obj, _table.BYTEARRAY, obj)

    def on_tensor(self, tensor: torch.Tensor) -> int:
        known = self.ids.get(id(tensor))
        if known is not None:
            return known
        if not is_plain(tensor) or tensor.dim() > MAX_DIMS:
            raise Refusal(tensor, refuse_tensor(tensor))
        if not tensor.numel():
            entry = [_table.EMPTY]
            self.put_tensor(entry, tensor, ())
            return self.add(tensor, entry)
        span = tensor_span(tensor)
        if self.leaves is not None:
            leaf = self.add_leaf_view(self.leaves, tensor, span.low, span)
            if leaf is not None:
                return leaf
        if span.low % tensor.itemsize:
            aligned = tensor.clone(memory_format=torch.contiguous_format)
            return self.add_placed(tensor, aligned, tensor_span(aligned))
        return self.add_placed(tensor, tensor, span)

    def on_array(self, array: np.ndarray[Any, Any]) -> int:
        known = self.ids.get(id(array))
        if known is not None:
            return known
        reason = refuse_numpy_dtype(array.dtype)
        if reason:
            raise Refusal(array, reason)
        if not array.size:
            entry = [_table.EMPTY_ARRAY, self.name(array.dtype.str)]
            _table.put_form(entry, array.shape, contiguous_strides(array.shape), 1, not array.flags.writeable)
            return self.add(array, entry)
        span = _array_span(array)
        if self.leaves is not None and self.keeps_leaves:
            leaf = self.add_leaf_view(self.leaves, array, array.__array_interface__["data"][0], span)
            if leaf is not None:
                return leaf
        return self.add_placed(array, array, span)

    # The table.

    def name(self, text: str) -> int:
        index = self.names.get(text)
        if index is None:
            index = self.names[text] = len(self.names)
        return index

    def add(self, obj: object, entry: list[int]) -> int:
        self.kept.append(obj)
        self.entries.append(entry)
        known = self.ids[id(obj)] = len(self.entries) - 1 + _table.FIRST_ENTRY
        return known

    def add_placed(self, obj: Any, value: Any, span: Span) -> int:
        """`value` is what goes over, `obj` what it is known by: not the same where a copy had to be made."""
        self.placed.append((len(self.entries), value))
        self.spans.append(span)
        return self.add(obj, [])

    def add_copied(self, obj: object, kind: int, source: bytes | bytearray) -> int:
        array = np.frombuffer(source, np.uint8)
        low = array.__array_interface__["data"][0]
        self.placed.append((len(self.entries), None))
        self.spans.append(Span(low, low + array.nbytes, array.nbytes, id(array), array))
        return self.add(obj, [kind])

    def add_same_leaf(self, obj: object) -> int | None:
        """A reference to the leaf that `obj` is, if it is one."""
        index = None if self.leaves is None else self.leaves.same(obj)
        if index is None:
            return None
        entry = [_table.LEAF]
        self.put_leaf(entry, index)
        return self.add(obj, entry)

    def add_leaf_view(self, leaves: Leaves, obj: Any, address: int, span: Span) -> int | None:
        """A reference to the leaf that `obj` is or lies in, if there is one that nobody wrote to."""
        index = leaves.holding(obj, span.owner, span.low, span.high, self.keeps_leaves)
        if index is None:
            return None
        if leaves.objects[index] is obj:
            return self.add_same_leaf(obj)
        offset = address - leaves.low(index)
        if isinstance(obj, torch.Tensor):
            if offset % obj.itemsize:
                return None
            entry = [_table.LEAF_TENSOR]
            self.put_leaf(entry, index)
            self.put_tensor(entry, obj, (offset,))
        else:
            entry = [_table.LEAF_ARRAY]
            self.put_leaf(entry, index)
            self.put_array(entry, obj, (offset,))
        return self.add(obj, entry)

    def put_leaf(self, entry: list[int], index: int) -> None:
        leaves = cast("Leaves", self.leaves)
        kind, dtype, shape, strides = leaves.signature(index)
        entry += (index, kind)
        if kind in (_leaves.TENSOR, _leaves.ARRAY):
            entry.append(self.name(dtype))
            _table.put_form(entry, shape, strides, 1 if kind == _leaves.TENSOR else leaves.objects[index].itemsize)
        else:
            entry += shape

    def put_tensor(self, entry: list[int], tensor: torch.Tensor, place: tuple[int, ...]) -> None:
        entry.append(self.name(TORCH_NAMES[tensor.dtype]))
        entry += place
        _table.put_form(entry, tuple(tensor.shape), tensor.stride(), 1)

    def put_array(self, entry: list[int], array: np.ndarray[Any, Any], place: tuple[int, ...]) -> None:
        entry.append(self.name(array.dtype.str))
        entry += place
        _table.put_form(entry, array.shape, array.strides, array.itemsize, not array.flags.writeable)

    def place(self) -> tuple[Piece, ...]:
        """Merge the spans into pieces, and write the entries of what lies in them."""
        pieces: list[Piece] = []
        for run in merge(self.spans):
            index = len(pieces)
            if is_sparse(run, self.spans):
                pieces.append(self.place_copy(run.members[0], index))
                continue
            low, members = run.low, run.members
            values = (self.placed[member][1] for member in members)
            tensors = tuple(value for value in values if isinstance(value, torch.Tensor))
            piece = piece_of(low, run.high, [self.spans[member].keep for member in members], tensors)
            for member in members:
                self.put_placed(member, index, low - piece.lead)
            pieces.append(piece)
        return tuple(pieces)

    def place_copy(self, member: int, index: int) -> Piece:
        entry, value = self.placed[member]
        if isinstance(value, torch.Tensor):
            value = value.clone(memory_format=torch.contiguous_format)
            low, high = value.data_ptr(), value.data_ptr() + value.nbytes
        else:
            value = np.ascontiguousarray(value)
            low = value.__array_interface__["data"][0]
            high = low + value.nbytes
        piece = piece_of(low, high, value)
        self.placed[member] = (entry, value)
        self.put_placed(member, index, low - piece.lead)
        return piece

    def put_placed(self, member: int, index: int, origin: int) -> None:
        number, value = self.placed[member]
        entry = self.entries[number]
        if value is None:
            span = self.spans[member]
            entry += (index, span.low - origin, span.used)
        elif isinstance(value, torch.Tensor):
            entry.append(_table.TENSOR)
            self.put_tensor(entry, value, (index, value.data_ptr() - origin))
        else:
            entry.append(_table.ARRAY)
            self.put_array(entry, value, (index, value.__array_interface__["data"][0] - origin))


_BY_TYPE: dict[type, Callable[[_Flattener, Any], int | None]] = {
    torch.Tensor: _Flattener.on_tensor,
    np.ndarray: _Flattener.on_array,
    list: _Flattener.on_list,
    dict: _Flattener.on_container,
    bytes: _Flattener.on_bytes,
    bytearray: _Flattener.on_bytes,
    _Marker: _Flattener.on_marker,
    type(...): _Flattener.on_stranger,
    type(NotImplemented): _Flattener.on_stranger,
    pickle.PickleBuffer: _Flattener.on_stranger,
}


def _array_span(array: np.ndarray[Any, Any]) -> Span:
    address = array.__array_interface__["data"][0]
    low, high = extent(array.shape, array.strides)
    return Span(address + low, address + high + array.itemsize, array.nbytes, array_owner(array), array)
