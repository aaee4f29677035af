"""Digests of features: SGLang's hash of the same bytes in the same order, or a faster one by name.

What is hashed (the rules of SGLang releases that have `MultimodalInputs.from_dict`):

    tensor          its elements in row-major order; bfloat16 widened to float32, as `memoryview` knows no bfloat16
    list            nested lists count as flat; tensors promoted to their common dtype first, as one concatenation would
    ndarray         its elements in C order, in its own dtype and byte order
    bytes-like      as it is

Releases since 0.5.10 hash bfloat16 as it is and promote nothing: same numbers but for those. Where SGLang has no number
(float8, lists of arrays, lists that begin with a list) it is that of the same bytes, joined in order.

Shape and dtype are not part of a digest. Contiguous memory is hashed where it lies, without a copy and with the GIL
released; anything else is gathered or widened a few MiB at a time.

Digests of single tensors are remembered while their storage lives, and hold for one version of one extent of it. What
torch does not count cannot be seen: a write through a numpy alias, through `.data`, or from another process leaves
`_version` as it was, and the old digest is returned. Write through the tensor, or not at all. Inference tensors have no
version and are hashed each time, and so are arrays and lists.
"""

from __future__ import annotations

import hashlib
import importlib
import weakref
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DEFAULT = "sha256"
NAMES = ("sha256", "blake3")

_STEP = 4 << 20
"""Bytes that are gathered or widened at a time."""
_EXTENTS = 256
"""Extents of one storage that are remembered."""


class _Hasher(Protocol):
    def update(self, data: memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


class _Place(NamedTuple):
    """One extent of a storage, read in one way. Conjugate and negative views share all but the last two."""

    name: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    conj: bool
    neg: bool


class _Remembered(NamedTuple):
    root: weakref.ref[torch.Tensor]
    version: int
    digest: bytes


# No lock: each use is a single operation of a dict, atomic in itself, so a finalizer that hashes while the interpreter
# collects inside one, or a fork in the middle of one, finds nothing held. Two threads that miss at once both hash.
_remembered: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[_Place, _Remembered]] = weakref.WeakKeyDictionary()


def digest(data: Any, name: str = DEFAULT) -> int:
    """The first 8 bytes of the digest, big endian: with "sha256", SGLang's `hash` of the same feature.

    Tensors may lie on any device; their bytes are hashed on the CPU. Raises what `digest_bytes` raises.
    """
    return int.from_bytes(digest_bytes(data, name)[:8], "big")


def digest_bytes(data: Any, name: str = DEFAULT) -> bytes:
    """The whole digest, 32 bytes, of a tensor, an array, a bytes-like object, or a nested list of tensors and arrays.

    `name` is "sha256", or "blake3" from the extra `digest`: several times faster, and as hard to collide, which counts
    where a digest decides whose cached embedding a request gets. Raises TypeError for data that has no fixed bytes
    (numbers in lists, object arrays, sparse tensors), ValueError for an empty list or an unknown name, ImportError
    where the extra is missing.
    """
    if not isinstance(data, torch.Tensor) or not _is_tracked(data):
        return _hash(data, name)
    place, root, storage, version = _place(data, name), _root(data), data.untyped_storage(), data._version
    value = _recall(data, place)
    if value is None:
        value = _hash(data, name)
        if data._version == version:
            _remember(storage, place, _Remembered(weakref.ref(root), version, value))
    return value


class Known(NamedTuple):
    """A digest, by its name, of `length` bytes; or of their bfloat16 elements, widened to float32."""

    name: str
    digest: bytes
    length: int
    widened: bool


def known(tensors: Iterable[torch.Tensor], start: int, length: int) -> tuple[Known, ...]:
    """What is remembered of the bytes at addresses `[start, start + length)`: the digests of the parts that tile them.

    Equal answers mean equal bytes. `tensors`: whose digests to look for, in the order of their addresses. Computes
    nothing; where a byte is in no part whose digest was computed and still holds, the answer is empty.
    """
    parts: list[Known] = []
    at = start
    for tensor in tensors:
        # A digest is over elements in row-major order: of memory only where that is their order in memory.
        if tensor.data_ptr() == at and tensor.is_contiguous() and (part := _known(tensor)) is not None:
            parts.append(part)
            at += part.length
    return tuple(parts) if at == start + length else ()


def _known(tensor: torch.Tensor) -> Known | None:
    if not _is_tracked(tensor) or tensor.is_conj() or tensor.is_neg():
        return None
    for name in NAMES:
        value = _recall(tensor, _place(tensor, name))
        if value is not None:
            return Known(name, value, tensor.nbytes, tensor.dtype is torch.bfloat16)
    return None


def require(name: str) -> None:
    """Raise now what `digest` would raise for this name: ValueError if unknown, ImportError if not installed."""
    _hasher(name)


def _is_tracked(data: torch.Tensor) -> bool:
    """Whether torch counts the writes to it."""
    return data.layout is torch.strided and not data.is_inference()


def _place(data: torch.Tensor, name: str) -> _Place:
    offset, shape, stride = int(data.storage_offset()), tuple(data.shape), data.stride()
    return _Place(name, data.dtype, offset, shape, stride, data.is_conj(), data.is_neg())


def _root(data: torch.Tensor) -> torch.Tensor:
    # Counters belong to a tensor and its views. Two roots over one storage (`.data`, `set_`) count apart, so the same
    # number under another root says nothing about these bytes.
    return data if data._base is None else data._base


def _recall(data: torch.Tensor, place: _Place) -> bytes | None:
    """The digest that is remembered for `place` and holds for what is there now."""
    extents = _remembered.get(data.untyped_storage())
    found = None if extents is None else extents.get(place)
    return found.digest if found and found.version == data._version and found.root() is _root(data) else None


def _remember(storage: torch.UntypedStorage, place: _Place, known: _Remembered) -> None:
    extents = _remembered.setdefault(storage, {})
    if len(extents) >= _EXTENTS and place not in extents:
        extents.clear()
    extents[place] = known


def _hasher(name: str) -> _Hasher:
    if name == "sha256":
        return hashlib.sha256()
    if name == "blake3":
        try:
            module = importlib.import_module("blake3")
        except ImportError as error:
            raise ImportError(
                "the digest 'blake3' needs the package blake3: pip install 'shmcast[digest]'", name="blake3"
            ) from error
        hasher: _Hasher = module.blake3()
        return hasher
    raise ValueError(f"no digest is named {name!r}; there are {', '.join(map(repr, NAMES))}")


def _hash(data: Any, name: str) -> bytes:
    hasher = _hasher(name)
    for run in _runs(data):
        hasher.update(run)
    return hasher.digest()


def _runs(data: Any) -> Iterator[memoryview]:
    """The bytes to hash, in order, as memory that is contiguous."""
    if isinstance(data, torch.Tensor):
        yield from _tensor_runs(data, data.dtype)
    elif isinstance(data, np.ndarray):
        yield from _array_runs(data)
    elif isinstance(data, list):
        yield from _list_runs(list(_flat(data)))
    else:
        try:
            run = memoryview(data)
        except TypeError:
            raise _refused(data, "") from None
        yield run


def _list_runs(leaves: list[Any]) -> Iterator[memoryview]:
    if not leaves:
        raise ValueError("an empty list has no bytes to hash")
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor | np.ndarray):
            raise _refused(leaf, " in a list")
    common = _common_dtype(leaf.dtype for leaf in leaves if isinstance(leaf, torch.Tensor))
    for leaf in leaves:
        yield from _array_runs(leaf) if isinstance(leaf, np.ndarray) else _tensor_runs(leaf, common)


def _flat(nested: list[Any]) -> Iterator[Any]:
    for inner in nested:
        if isinstance(inner, list):
            yield from _flat(inner)
        else:
            yield inner


def _refused(data: Any, where: str) -> TypeError:
    return TypeError(
        f"cannot hash {type(data).__module__}.{type(data).__qualname__}{where}: "
        "features are tensors, arrays, bytes, or lists of tensors and arrays"
    )


def _common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    distinct = set(dtypes)
    return reduce(torch.promote_types, distinct) if distinct else torch.uint8


def _tensor_runs(tensor: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of `tensor` as `dtype`, in row-major order; bfloat16 goes on to float32."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "quantised" if tensor.is_quantized else str(tensor.layout)
        raise TypeError(f"cannot hash a {kind} tensor: it has no plain bytes")
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    final = torch.float32 if dtype is torch.bfloat16 else dtype
    for part in _contiguous_parts(plain):
        flat = part.reshape(-1)
        if flat.dtype is final:
            yield _bytes_of(flat)
        else:
            step = _STEP // final.itemsize
            for start in range(0, len(flat), step):
                yield _bytes_of(flat[start : start + step].to(dtype).to(final))


def _contiguous_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor itself, or else copies of some rows at a time (of a whole row, however long)."""
    if tensor.is_contiguous():
        yield tensor
        return
    rows = max(1, _STEP // (tensor.nbytes // len(tensor)))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows].contiguous()


def _bytes_of(flat: torch.Tensor) -> memoryview:
    # One element, or none, is contiguous whatever its stride; `view` asks for a stride of 1.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def _array_runs(array: np.ndarray[Any, Any]) -> Iterator[memoryview]:
    if array.dtype.hasobject:
        raise TypeError(f"cannot hash an array of {array.dtype}: its bytes are addresses")
    if not array.nbytes:
        return
    plain = np.asarray(array)
    if plain.flags.c_contiguous:
        yield plain.reshape(-1).view(np.uint8).data
        return
    rows = max(1, _STEP // (plain.nbytes // len(plain)))
    for start in range(0, len(plain), rows):
        part = np.ascontiguousarray(plain[start : start + rows])
        yield part.reshape(-1).view(np.uint8).data
