"""The large tensors of raw inputs, copied once into a writer's memory: each message that has them lists them there.

Parallel sampling sends a request once and then once a sample, with new objects around the same tensors.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import ref

import numpy as np
import torch

from shmcast import _threads
from shmcast.integrations.sglang._leaves import leaves_of, nbytes_of, replace

if TYPE_CHECKING:
    from shmcast.integrations.sglang._release import Release
    from shmcast.transport import Writer

STAGED_FROM: Final = 64 << 10
"""Bytes. What is smaller goes into each message, and readers copy it out."""

LINE: Final = 64

SHARE: Final = 4 << 20
"""Bytes that one thread copies at once."""


class _Staged(NamedTuple):
    """A copy in the writer's memory, what it was copied from, and that one's version then."""

    origin: ref[Any]
    version: int
    copy: Any


class Staging:
    """What is staged stays so until its origin is gone, or `clear`. For one thread, until `close`."""

    def __init__(self, writer: Writer, release: Release) -> None:
        self._writer = writer
        self._release = release
        self._staged: dict[int, _Staged] = {}
        self._pool = _threads.few("shmcast-staging")

    def stage(self, raw: Any) -> Any:
        """The same raw inputs, in new objects, with the large tensors of their items in the writer's memory.

        Raises:
            ArenaFull: there is no room for them.
        """
        items = self._release.items(raw)
        large = {id(leaf): leaf for item in items for leaf in leaves_of(item) if self._is_new(leaf)}
        if large:
            self._copy(list(large.values()))
        return self._release.with_items(raw, [replace(copy.copy(item), self._staged_or_own) for item in items])

    def clear(self) -> bool:
        """Forget all; whether there was anything."""
        held = bool(self._staged)
        self._staged.clear()
        return held

    def close(self) -> None:
        """Forget all, and stage nothing more."""
        self.clear()
        self._pool.shutdown()

    def _is_new(self, leaf: Any) -> bool:
        return nbytes_of(leaf) >= STAGED_FROM and self._found(leaf) is None

    def _found(self, leaf: Any) -> Any:
        staged = self._staged.get(id(leaf))
        if staged is None or staged.origin() is not leaf or staged.version != _version(leaf):
            return None
        return staged.copy

    def _copy(self, leaves: list[Any]) -> None:
        """Into one block."""
        starts = [0]
        for leaf in leaves:
            starts.append(starts[-1] + -(-nbytes_of(leaf) // LINE) * LINE)
        memory = self._writer.empty((starts[-1],), torch.uint8)
        places = [memory[start : start + nbytes_of(leaf)] for leaf, start in zip(leaves, starts, strict=False)]
        self._copy_all([place.numpy() for place in places], [_bytes_of(leaf) for leaf in leaves])
        for leaf, place in zip(leaves, places, strict=True):
            staged = (
                place.numpy().view(leaf.dtype).reshape(leaf.shape)
                if isinstance(leaf, np.ndarray)
                else place.view(leaf.dtype).view(leaf.shape)
            )
            number = id(leaf)
            self._staged[number] = _Staged(ref(leaf, partial(self._forget, number)), _version(leaf), staged)

    def _copy_all(self, places: list[Any], sources: list[Any]) -> None:
        """In shares, side by side: one thread copies far slower than memory does, and meanwhile serves nobody."""
        shares = [
            (place[at : at + SHARE], source[at : at + SHARE])
            for place, source in zip(places, sources, strict=True)
            for at in range(0, len(place), SHARE)
        ]
        # Each holds both its ends: after Ctrl-C here, what a thread still writes to is not yet free.
        for done in [self._pool.submit(np.copyto, *share) for share in shares]:
            done.result()

    def _forget(self, number: int, origin: ref[Any]) -> None:
        """Runs in finalizers, the last ones when this module has no names left; another object may have the number."""
        staged = self._staged.get(number)
        if staged is not None and staged.origin is origin:
            self._staged.pop(number, None)

    def _staged_or_own(self, leaf: Any) -> Any:
        staged = self._found(leaf) if nbytes_of(leaf) >= STAGED_FROM else None
        return leaf if staged is None else staged


def _bytes_of(leaf: Any) -> Any:
    """An array of its bytes in order; a copy where they are not so in memory."""
    if isinstance(leaf, np.ndarray):
        return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return leaf.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _version(leaf: Any) -> int:
    """Moves when torch writes into a tensor; arrays have none."""
    return leaf._version if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0
