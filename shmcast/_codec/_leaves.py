"""Leaves: the tensors, arrays, long lists and large bytes of the raw inputs, in an order that all ranks share.

Where every rank holds the same raw inputs, a part of the result that is a leaf, or a view of one, travels as the
leaf's index and signature. The walk goes through dicts, lists, tuples, dataclasses and Structs, in insertion or field
order, never through sets; it visits a container once, and a leaf is counted where it is met first.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from shmcast.errors import LayoutError

from ._geometry import MAX_DIMS, TORCH_NAMES, Shape, contiguous_strides, extent, refuse_numpy_dtype
from ._pieces import array_owner, piece_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LONG_LIST = 64
LARGE_BYTES = 1024

TENSOR, ARRAY, LIST, BYTES, OPAQUE = range(1, 6)


class Signature(NamedTuple):
    """What must be equal on both ends: kind, dtype's name, shape, strides (elements for tensors, bytes for arrays)."""

    kind: int
    dtype: str
    shape: Shape
    strides: Shape


class Place(NamedTuple):
    """Where a leaf's elements lay when it was walked: storage, addresses `[low, high)`, version if tracked."""

    storage: Any
    owner: int
    low: int
    high: int
    version: int | None


_OPAQUE = Signature(OPAQUE, "", (), ())


class Leaves:
    """The leaves of one raw object, each kept alive until this is dropped."""

    __slots__ = ("_arrays", "_by_id", "_by_owner", "_places", "_signatures", "objects")

    def __init__(self, objects: list[Any]) -> None:
        self.objects = objects
        self._by_id = {id(leaf): index for index, leaf in enumerate(objects)}
        self._places = [_place(leaf) for leaf in objects]
        self._signatures: dict[int, Signature] = {}
        self._arrays = [index for index, leaf in enumerate(objects) if type(leaf) is np.ndarray]
        self._by_owner: dict[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and arrays among the leaves."""
        return sum(map(_nbytes, self.objects))

    @classmethod
    def walk(cls, raw: object) -> Leaves:
        """Collect the leaves of `raw`; done before `fn` may change anything. Runs on every rank that holds `raw`."""
        return cls(list(_find(raw)))

    def signature(self, index: int) -> Signature:
        """The signature of a leaf of this rank's walk; raises `LayoutError` where there is no such leaf."""
        if not 0 <= index < len(self.objects):
            raise LayoutError(f"leaf {index} of {len(self.objects)}")
        found = self._signatures.get(index)
        if found is None:
            found = self._signatures[index] = _signature(self.objects[index])
        return found

    def same(self, value: object) -> int | None:
        """The index of the leaf that `value` is, a list or bytes, by identity."""
        return self._by_id.get(id(value))

    def holding(self, value: Any, owner: int, low: int, high: int, keeps_leaves: bool) -> int | None:
        """The index of an untouched leaf that is `value`, or holds the addresses `[low, high)` in the same storage."""
        if self._by_owner is None:
            self._by_owner = {}
            for index, place in enumerate(self._places):
                if place is not None:
                    self._by_owner.setdefault(place.owner, []).append(index)
        # A tensor made over a numpy leaf has a storage of its own; the leaf lives, so its addresses are its own.
        candidates = self._by_owner.get(owner) or (self._arrays if keeps_leaves else [])
        same = self._by_id.get(id(value))
        if same is not None and same in candidates and self._untouched(same, keeps_leaves):
            return same
        for index in candidates:
            place = self._places[index]
            if place is not None and place.low <= low and high <= place.high and self._untouched(index, keeps_leaves):
                return index
        return None

    def low(self, index: int) -> int:
        """The address of the first byte that the leaf reaches."""
        place = self._places[index]
        if place is None:
            raise LayoutError(f"leaf {index} has no bytes")
        return place.low

    def bytes_of(self, index: int) -> torch.Tensor:
        """1-D uint8 tensor over all bytes that a tensor or array leaf reaches, and no others; raises `LayoutError`."""
        leaf, place = self.objects[index], self._places[index]
        if place is None or not self._untouched(index, keeps_leaves=True):
            raise LayoutError(f"leaf {index} has no bytes, or others than when it was walked")
        if isinstance(leaf, np.ndarray):
            return piece_of(place.low, place.high, leaf).source
        count = (place.high - place.low) // leaf.itemsize
        flat: torch.Tensor = leaf.as_strided((count,), (1,), leaf.storage_offset())
        return flat.view(torch.uint8)

    def _untouched(self, index: int, keeps_leaves: bool) -> bool:
        leaf, place = self.objects[index], self._places[index]
        if place is None:
            return False
        if isinstance(leaf, np.ndarray):
            return keeps_leaves and bool(leaf.__array_interface__["data"][0] == place.storage)
        # The storage object is held, so its address names nobody else; it may have been swapped or resized though.
        if leaf.untyped_storage()._cdata != place.owner or not _covers(place.storage, place):
            return False
        if not keeps_leaves and (place.version is None or leaf._version != place.version):
            return False
        return leaf.layout is torch.strided and leaf.data_ptr() == place.low


def nbytes_of(raw: object) -> int:
    """Bytes of the tensors and arrays among the leaves of `raw`, from their shapes; much cheaper than a walk."""
    total = 0
    seen: set[int] = set()
    pending = [raw]
    while pending:
        value = pending.pop()
        kind = type(value)
        if kind in ATOMS or id(value) in seen:
            continue
        seen.add(id(value))
        if kind is torch.Tensor or kind is np.ndarray:
            total += value.nbytes  # type: ignore[attr-defined]
        elif kind is dict:
            pending += cast("dict[Any, Any]", value).values()
        elif kind is list:
            if not _is_leaf(value):
                pending += cast("list[Any]", value)
        elif kind is not bytes:
            pending += _inside(value) or ()
    return total


def _find(raw: object) -> Iterator[Any]:
    seen: set[int] = set()
    pending: list[Iterator[Any]] = [iter((raw,))]
    while pending:
        for value in pending[-1]:
            if type(value) in ATOMS or id(value) in seen:
                continue
            if _is_leaf(value):
                seen.add(id(value))
                yield value
                continue
            inner = _inside(value)
            if inner is not None:
                seen.add(id(value))
                pending.append(iter(inner))
                break
        else:
            pending.pop()


def _nbytes(leaf: Any) -> int:
    if type(leaf) is np.ndarray or (type(leaf) is torch.Tensor and is_plain(leaf)):
        return int(leaf.nbytes)
    return 0


ATOMS = frozenset((type(None), bool, int, float, str, complex))


def _is_leaf(value: Any) -> bool:
    kind = type(value)
    if kind is torch.Tensor or kind is np.ndarray:
        return True
    if kind is list:
        # Looking at two ends is enough: a leaf that is no list of ints is only ever compared by identity.
        return len(value) >= LONG_LIST and type(value[0]) is int and type(value[-1]) is int
    return kind is bytes and len(value) >= LARGE_BYTES


def _inside(value: Any) -> Iterable[Any] | None:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, collections.UserDict):
        return list(value.data.values())
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return _attributes(value, [field.name for field in dataclasses.fields(value)])
    msgspec = sys.modules.get("msgspec")
    if msgspec is not None and isinstance(value, msgspec.Struct):
        return _attributes(value, value.__struct_fields__)
    return None


def _attributes(value: Any, names: Iterable[str]) -> list[Any]:
    held: dict[str, Any] = getattr(value, "__dict__", {})
    fields = list(names)
    known = set(fields)
    found = [held[name] if name in held else getattr(value, name, None) for name in fields]
    return found + [extra for name, extra in held.items() if name not in known]


def is_plain(tensor: torch.Tensor) -> bool:
    """A dense CPU tensor of a dtype that travels, whose bytes are its values."""
    return not (
        tensor.requires_grad
        or not tensor.is_cpu
        or tensor.layout is not torch.strided
        or tensor.dtype not in TORCH_NAMES
        or tensor.is_conj()
        or tensor.is_neg()
        or tensor.is_nested
    )


def _signature(leaf: Any) -> Signature:
    if type(leaf) is torch.Tensor and is_plain(leaf):
        return Signature(TENSOR, TORCH_NAMES[leaf.dtype], tuple(leaf.shape), leaf.stride())
    if type(leaf) is np.ndarray and refuse_numpy_dtype(leaf.dtype) is None:
        return Signature(ARRAY, leaf.dtype.str, leaf.shape, leaf.strides)
    if type(leaf) is list:
        return Signature(LIST, "", (len(leaf),), ())
    if type(leaf) is bytes:
        return Signature(BYTES, "", (len(leaf),), ())
    return _OPAQUE


def _place(leaf: Any) -> Place | None:
    """Where the bytes of a tensor or array are; None where they cannot be pointed at."""
    if type(leaf) is np.ndarray:
        if not leaf.size or refuse_numpy_dtype(leaf.dtype) is not None:
            return None
        address = leaf.__array_interface__["data"][0]
        low, high = extent(leaf.shape, leaf.strides)
        return Place(address, array_owner(leaf), address + low, address + high + leaf.itemsize, None)
    if type(leaf) is not torch.Tensor or not is_plain(leaf) or not leaf.numel() or leaf.dim() > MAX_DIMS:
        return None
    storage = leaf.untyped_storage()
    address, itemsize, shape, strides = leaf.data_ptr(), leaf.itemsize, tuple(leaf.shape), leaf.stride()
    if strides == contiguous_strides(shape):
        high = address + leaf.nbytes
    else:
        high = address + (extent(shape, strides)[1] + 1) * itemsize
    version = None if leaf.is_inference() else leaf._version
    place = Place(storage, storage._cdata, address, high, version)
    return place if _covers(storage, place) else None


def _covers(storage: torch.UntypedStorage, place: Place) -> bool:
    start = storage.data_ptr()
    return start <= place.low and place.high <= start + storage.nbytes()
