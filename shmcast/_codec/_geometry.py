"""Dtypes by name, strides and extents: plain arithmetic on tensors and arrays, checked once.

A dtype travels as text: `str(dtype)` for torch ("torch.bfloat16"), `dtype.str` for numpy ("<f4").
"""

from __future__ import annotations

import functools
import re
import sys
from typing import TYPE_CHECKING

import numpy as np
import torch

from shmcast.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DIMS = 64
MAX_BYTES = 1 << 62  # keeps every sum below inside 64 bits

MAX_RANGE_BITS = 128

Shape = tuple[int, ...]

# A unit without a fraction, as dtypes call themselves: numpy divides by one, and a zero there is a SIGFPE.
_UNIT = r"\[([1-9][0-9]{0,9})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\]"
_NUMPY_DTYPE = re.compile(rf"[<>|=]?([biufcSU][0-9]{{0,9}}|[mM]8({_UNIT})?)")
_NATIVE = "<" if sys.byteorder == "little" else ">"


def _torch_dtypes() -> dict[str, torch.dtype]:
    found = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return {name: dtype for name, dtype in found.items() if not name.startswith("torch.q")}


TORCH_DTYPES = _torch_dtypes()
TORCH_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name; raises `LayoutError`."""
    dtype = TORCH_DTYPES.get(name)
    if dtype is None:
        raise LayoutError(f"no torch dtype {name!r}")
    return dtype


@functools.lru_cache(maxsize=256)
def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy dtype of this name, of a kind that travels; raises `LayoutError`."""
    if not _NUMPY_DTYPE.fullmatch(name):
        raise LayoutError(f"no numpy dtype {name!r}")
    dtype = np.dtype(name)
    reason = refuse_numpy_dtype(dtype)
    if reason or dtype.str != name:
        raise LayoutError(f"numpy dtype {name!r}: {reason or 'not its own name'}")
    return dtype


def refuse_numpy_dtype(dtype: np.dtype[np.generic]) -> str | None:
    """Why an array of this dtype cannot travel, or None."""
    if dtype.kind not in "biufcmMSU" or dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
        return f"numpy dtype {dtype} cannot be sent"
    if not dtype.itemsize:
        return f"numpy dtype {dtype} has elements of no bytes"
    if dtype.str[0] not in ("|", _NATIVE):
        return f"numpy dtype {dtype} has a foreign byte order"
    return None


@functools.lru_cache(maxsize=1024)
def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides, in elements, as torch gives them (a dim of size zero counts as one)."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))


def extent(shape: Shape, strides: Shape) -> tuple[int, int]:
    """First and last element reached, in units of the strides, relative to element zero; no dim is zero."""
    low = high = 0
    for size, stride in zip(shape, strides, strict=True):
        reach = (size - 1) * stride
        if reach < 0:
            low += reach
        else:
            high += reach
    return low, high


def check_dims(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """The number of elements; raises `LayoutError` for sizes that no tensor has."""
    if len(shape) != len(strides) or len(shape) > MAX_DIMS:
        raise LayoutError(f"{len(shape)} sizes and {len(strides)} strides")
    count = 1
    bound = max(1, itemsize)
    for size, stride in zip(shape, strides, strict=True):
        if size < 0 or abs(stride) * max(1, itemsize) > MAX_BYTES:
            raise LayoutError(f"shape {tuple(shape)} with strides {tuple(strides)}")
        count *= size
        bound *= max(1, size)
        if bound > MAX_BYTES:
            raise LayoutError(f"shape {tuple(shape)} is beyond any memory")
    return count


def is_vast(*bounds: int) -> bool:
    """Whether a range of these bounds cannot travel: it divides them, which takes the square of their digits."""
    return any(bound.bit_length() > MAX_RANGE_BITS for bound in bounds)
