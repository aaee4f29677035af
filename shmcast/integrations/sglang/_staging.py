"""The large tensors of raw inputs, copied once into a writer's memory: each message that has them lists them there.

Parallel sampling sends a request once and then once a sample, with new objects around the same tensors.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import ref

import numpy as np
import torch

from shmcast._codec import Piece

if TYPE_CHECKING:
    from shmcast.integrations.sglang._release import Release
    from shmcast.transport import Writer

STAGED_FROM: Final = 64 << 10
"""Bytes. What is smaller goes into each message, and readers copy it out."""

LINE: Final = 64


class _Staged(NamedTuple):
    """A copy in the writer's memory, what it was copied from, and that one's version then."""

    origin: ref[Any]
    version: int
    copy: Any


class Staging:
    """What is staged stays so until its origin is gone, or `clear`. For one thread."""

    def __init__(self, writer: Writer, release: Release) -> None:
        self._writer = writer
        self._release = release
        self._staged: dict[int, _Staged] = {}

    def stage(self, raw: Any) -> Any:
        """The same raw inputs, in new objects, with the large tensors of their items in the writer's memory.

        Raises:
            ArenaFull: there is no room for them.
        """
        items = self._release.items(raw)
        large = {id(leaf): leaf for item in items for leaf in _leaves(_fields(item)) if self._is_new(leaf)}
        if large:
            self._copy(list(large.values()))
        return self._release.with_items(raw, [self._rebuilt(item) for item in items])

    def clear(self) -> bool:
        """Forget all; whether there was anything."""
        held = bool(self._staged)
        self._staged.clear()
        return held

    def _is_new(self, leaf: Any) -> bool:
        return _nbytes(leaf) >= STAGED_FROM and self._found(leaf) is None

    def _found(self, leaf: Any) -> Any:
        staged = self._staged.get(id(leaf))
        if staged is None or staged.origin() is not leaf or staged.version != _version(leaf):
            return None
        return staged.copy

    def _copy(self, leaves: list[Any]) -> None:
        """Into one block."""
        starts = [0]
        for leaf in leaves:
            starts.append(starts[-1] + -(-_nbytes(leaf) // LINE) * LINE)
        memory = self._writer.empty((starts[-1],), torch.uint8)
        for leaf, start in zip(leaves, starts, strict=False):
            place = memory[start : start + _nbytes(leaf)]
            if isinstance(leaf, np.ndarray):
                staged: Any = place.numpy().view(leaf.dtype).reshape(leaf.shape)
                np.copyto(staged, leaf)
            else:
                Piece(leaf.contiguous().view(-1).view(torch.uint8), 0).copy_to(place.numpy())
                staged = place.view(leaf.dtype).view(leaf.shape)
            number = id(leaf)
            self._staged[number] = _Staged(ref(leaf, partial(self._forget, number)), _version(leaf), staged)

    def _forget(self, number: int, origin: ref[Any]) -> None:
        """Runs in finalizers; by now another object may have the number."""
        with suppress(KeyError):
            if self._staged[number].origin is origin:
                del self._staged[number]

    def _rebuilt(self, item: Any) -> Any:
        new = copy.copy(item)
        for name, value in _fields(item).items():
            setattr(new, name, self._replaced(value))
        return new

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._replaced(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([self._replaced(each) for each in value])
        staged = self._found(value) if _nbytes(value) >= STAGED_FROM else None
        return value if staged is None else staged


def _fields(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in ("feature", "precomputed_embeddings", "model_specific_data")}


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _nbytes(value: Any) -> int:
    """Of what can be staged; else 0."""
    if type(value) is torch.Tensor and value.is_cpu and value.layout is torch.strided:
        return value.numel() * value.element_size()
    if type(value) is np.ndarray and not value.dtype.hasobject:
        return value.nbytes
    return 0


def _version(leaf: Any) -> int:
    """Moves when torch writes into a tensor; arrays have none."""
    return leaf._version if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0
