"""Helpers of the codec's tests: carry pieces as a transport would, compare two objects down to the bits."""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shmcast._codec import Allow, Encoded, Leaves, decode, encode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LINE = 64


def carry(encoded: Encoded) -> list[torch.Tensor]:
    """What a transport hands to `decode`: each piece `lead` bytes into 64-byte aligned memory of its own."""
    carried = []
    for piece in encoded.pieces:
        length = piece.lead + piece.source.numel()
        room = torch.full((length + LINE,), 0xAA, dtype=torch.uint8)
        start = -room.data_ptr() % LINE
        # A storage of exactly the bytes, as an exporter over the mapping gives.
        carried.append(torch.from_numpy(np.frombuffer(memoryview(room.numpy().data)[start : start + length], np.uint8)))
        carried[-1][piece.lead :] = piece.source
    return carried


def round_trip(obj: Any, allow: Sequence[type | str] = (), **how: Any) -> Any:
    """Encode, carry, decode; with `leaves=` and `theirs=`, as a peer with its own raw inputs would."""
    rules = Allow(allow)
    theirs: Leaves | None = how.pop("theirs", None)
    encoded = encode(obj, rules, **how)
    return decode(encoded.stream, carry(encoded), Allow(allow), theirs)


def same(left: Any, right: Any) -> bool:
    """Equal in type, structure and bits, also where `==` is not the identity (NaN, tensors, -0.0)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return same_tensor(left, right)
    if isinstance(left, np.ndarray):
        return bool(left.dtype == right.dtype) and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, np.generic):
        return bool(left.dtype == right.dtype) and left.tobytes() == right.tobytes()
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, enum.Enum):
        return left is right
    if isinstance(left, (set, frozenset)):
        return len(left) == len(right) and all(any(same(one, other) for other in right) for one in left)
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(one, other) and same(left[one], right[other]) for one, other in zip(left, right, strict=True)
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right)) and same(held(left), held(right))
    inner = held(left)
    if inner or type(left).__module__.startswith("tests."):
        return same(inner, held(right))
    return bool(left == right)


def same_tensor(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Dtype, shape, strides and bits."""
    return (
        left.dtype is right.dtype
        and left.shape == right.shape
        and left.stride() == right.stride()
        and bits(left) == bits(right)
    )


def bits(tensor: torch.Tensor) -> bytes:
    """The elements' bytes in row-major order, through torch, for any dtype."""
    if not tensor.numel():
        return b""
    size = tensor.itemsize
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    first = tensor.storage_offset() * size
    strides = [stride * size for stride in tensor.stride()]
    return flat.as_strided((*tensor.shape, size), (*strides, 1), first).contiguous().numpy().tobytes()


def held(obj: Any) -> dict[str, Any]:
    """The attributes in `__dict__` and in slots."""
    found = dict(getattr(obj, "__dict__", None) or {})
    for base in type(obj).__mro__:
        for name in vars(base).get("__slots__", ()) or ():
            if name not in ("__dict__", "__weakref__") and hasattr(obj, name):
                found[name] = getattr(obj, name)
    return found


def tensors_in(obj: Any) -> Iterator[torch.Tensor | np.ndarray[Any, Any]]:
    """Every tensor and array that a decoded object holds, also where a container holds itself."""
    seen: set[int] = set()
    pending = [obj]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, (torch.Tensor, np.ndarray)):
            yield value
        elif isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += [*value, *held(value).values()]
        elif not isinstance(value, (type, enum.Enum)):
            pending += held(value).values()


def span_of(value: torch.Tensor | np.ndarray[Any, Any]) -> tuple[int, int]:
    """The addresses `[low, high)` that a tensor or array reaches; equal ends where it has no elements."""
    if isinstance(value, torch.Tensor):
        address, size = value.data_ptr(), value.itemsize
        strides = [stride * size for stride in value.stride()]
        count = value.numel()
    else:
        address, size, strides, count = value.ctypes.data, value.itemsize, list(value.strides), value.size
    if not count:
        return address, address
    reaches = [(length - 1) * stride for length, stride in zip(value.shape, strides, strict=True)]
    low = address + sum(reach for reach in reaches if reach < 0)
    return low, address + sum(reach for reach in reaches if reach > 0) + size


def within(value: torch.Tensor | np.ndarray[Any, Any], regions: Sequence[torch.Tensor]) -> bool:
    """Every byte that `value` reaches lies inside one of the uint8 tensors `regions`."""
    low, high = span_of(value)
    return low == high or any(
        region.data_ptr() <= low and high <= region.data_ptr() + region.numel() for region in regions
    )
