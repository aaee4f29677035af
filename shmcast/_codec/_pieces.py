"""Pieces: the runs of bytes that travel beside the skeleton, each a stretch of one storage, none copied.

Every tensor and array is an interval of addresses. Intervals that overlap, or that touch within one storage, merge: a
parent cut into 64 views is one piece, and a numpy alias of a tensor shares its piece. A slice of a huge storage is
the slice.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

LINE = 64
MANY_BYTES = 8 << 20

Memory = np.ndarray[tuple[int], np.dtype[np.uint8]]


class Piece(NamedTuple):
    """One run of bytes to send.

    `source`: 1-D uint8 CPU tensor over the bytes where they are; it keeps them alive.
    `lead`: 0 to 63, how far into a 64-byte line the first byte sits. The piece is stored that far into a line too, and
    `decode` gets a uint8 tensor of `lead + source.numel()` bytes, so that every element keeps its alignment.
    `tensors`: those tensors of the object that lie in `source`, in the order of their addresses.
    """

    source: torch.Tensor
    lead: int
    tensors: tuple[torch.Tensor, ...] = ()

    def copy_to(self, memory: Memory) -> None:
        """Copy the bytes of `source` into as many bytes of memory."""
        # numpy's copy is memcpy. torch's is slower with one thread, and with several, which have to be woken, pays for
        # large pieces only: on a busy machine small ones would wait for a processor.
        if torch.get_num_threads() > 1 and len(memory) >= MANY_BYTES:
            torch.from_numpy(memory).copy_(self.source)
        else:
            np.copyto(memory, self.source.numpy())


class Span(NamedTuple):
    """The bytes that one tensor, array or list reaches: addresses `[low, high)`; `used` bytes of it are elements."""

    low: int
    high: int
    used: int
    owner: int  # the same for all spans over one storage, else unique
    keep: Any  # keeps the bytes alive


class Run(NamedTuple):
    """Spans that merged: addresses `[low, high)`, and who is in it, as indices of spans."""

    low: int
    high: int
    members: list[int]


class _Memory:
    """Bytes at an address, for numpy; `keep` holds their owners."""

    __slots__ = ("__array_interface__", "keep")

    def __init__(self, address: int, length: int, keep: object) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (length,), "typestr": "|u1", "version": 3}
        self.keep = keep


def merge(spans: list[Span]) -> list[Run]:
    """The runs of bytes that cover the spans, each span in one run, in the order of their addresses."""
    order = sorted(range(len(spans)), key=lambda index: spans[index].low)
    runs: list[Run] = []
    low = high = owner = -1
    members: list[int] = []
    for index in order:
        span = spans[index]
        if members and (span.low < high or (span.low == high and span.owner == owner)):
            members.append(index)
            if span.high > high:
                high, owner = span.high, span.owner
            continue
        if members:
            runs.append(Run(low, high, members))
        low, high, owner, members = span.low, span.high, span.owner, [index]
    if members:
        runs.append(Run(low, high, members))
    return runs


def is_sparse(run: Run, spans: list[Span]) -> bool:
    """A lone strided view that reaches over more than twice its elements' bytes: cheaper sent as a copy."""
    return len(run.members) == 1 and run.high - run.low > 2 * spans[run.members[0]].used


def piece_of(low: int, high: int, keep: object, tensors: tuple[torch.Tensor, ...] = ()) -> Piece:
    """The piece over the addresses `[low, high)`, which `keep` keeps alive."""
    source = torch.from_numpy(np.asarray(_Memory(low, high - low, keep)))
    return Piece(source, low % LINE, tensors)


def array_owner(array: np.ndarray[Any, Any]) -> int:
    """A number that arrays and tensors over the same storage share."""
    base: Any = array
    while type(base) is np.ndarray and base.base is not None:
        base = base.base
    if isinstance(base, torch.Tensor):
        return int(base.untyped_storage()._cdata)
    return id(base)
