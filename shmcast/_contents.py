"""Pieces that were published before: listed in the new message, as blocks of `empty` are, not copied.

Bytes are known by digests that were computed here, over them, and that still hold (`digest.known`); a hash that came in
with the raw inputs counts for nothing. The arena keeps the blocks, and gives them up before a publish has to wait.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shmcast._cache import CACHE_FROM
from shmcast._layout import BLOCK, PAGE, BlockKind, parse_block, round_up, write_block
from shmcast.digest import Known, known
from shmcast.errors import ArenaFull, LayoutError

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from shmcast._arena import Arena
    from shmcast._blocks import Block
    from shmcast._codec import Encoded, Piece
    from shmcast.metrics import Counters

SAMPLES = 256


class Found(NamedTuple):
    """Where a piece lies in a block that its message lists: `offset` is that of its first byte."""

    block: Block
    offset: int


class Key(NamedTuple):
    """What a cached block is known by: the digests of its bytes, and how far into a line they begin."""

    digests: tuple[Known, ...]
    lead: int


class Fresh(NamedTuple):
    """A block that is to hold a piece, for this message and for later ones."""

    key: Key
    block: Block
    piece: Piece


class Cached(NamedTuple):
    """Where pieces lie, by their numbers, and which of those blocks are yet to be filled."""

    found: dict[int, Found]
    fresh: list[Fresh]


class Contents:
    """The content cache as a publish uses it, from any thread."""

    def __init__(self, arena: Arena, budget: int, counters: Counters) -> None:
        self._arena = arena
        self._budget = budget
        self._counters = counters

    @contextmanager
    def find(self, encoded: Encoded, listed: Container[int]) -> Iterator[Cached]:
        """Where the pieces lie whose digests are known, but for those in `listed`; claimed until the block is left."""
        claimed: list[Block] = []
        cached = Cached({}, [])
        keys = set()
        try:
            for number, piece in enumerate(encoded.pieces if self._budget else ()):
                key = None if number in listed else _key_of(piece)
                # Equal tensors of one message each get their bytes: a reader may write into one of them.
                if key is None or key in keys:
                    continue
                keys.add(key)
                block = self._arena.find(key)
                if block is not None:
                    claimed.append(block)
                hit = block is not None and self._holds(block, piece)
                self._counters.cache(hit, piece.source.numel())
                if block is None:
                    block = self._reserve(BLOCK.size + piece.lead + piece.source.numel())
                    if block is None:
                        continue
                    claimed.append(block)
                    cached.fresh.append(Fresh(key, block, piece))
                elif not hit:
                    # One of the two is not what its digest says, and nobody knows which: neither is used.
                    self._arena.keep(key, None)
                    continue
                cached.found[number] = Found(block, BLOCK.size + piece.lead)
            yield cached
        finally:
            if claimed:
                self._arena.free(*claimed)

    def fill(self, fresh: Iterable[Fresh]) -> None:
        """Copy what no block held yet, and keep it."""
        for key, block, piece in fresh:
            mapping = self._arena.mapping(block)
            start = block.offset + BLOCK.size + piece.lead
            piece.copy_to(np.frombuffer(mapping, np.uint8, piece.source.numel(), start))
            write_block(mapping, block.generation, block.length, BlockKind.PAYLOAD, base=block.offset)
            # Not if somebody wrote to it meanwhile: these may not be the bytes of that digest.
            if _key_of(piece) == key:
                self._arena.keep(key, block)

    def _reserve(self, length: int) -> Block | None:
        if round_up(length, PAGE) > self._budget:
            return None
        try:
            # What finds no room at once goes with its message, which alone waits.
            return self._arena.reserve(length, 0)
        except ArenaFull:
            return None

    def _holds(self, block: Block, piece: Piece) -> bool:
        """Whether a cached block is in good order and, as far as some of its bytes tell, holds this piece.

        It is and does, but for damage and for writes that torch does not count: a tensor filled anew through numpy
        still has its old digest.
        """
        mapping = self._arena.mapping(block)
        try:
            view = memoryview(mapping)[block.offset : block.offset + block.length]
            parse_block(view, block.generation, BlockKind.PAYLOAD)
        except LayoutError:
            return False
        source = piece.source.numpy()
        memory = np.frombuffer(mapping, np.uint8, len(source), block.offset + BLOCK.size + piece.lead)
        # An odd step: not the same byte of every element.
        step = len(source) // SAMPLES | 1
        return np.array_equal(source[::step], memory[::step])


def _key_of(piece: Piece) -> Key | None:
    if piece.source.numel() < CACHE_FROM:
        return None
    digests = known(piece.tensors, piece.source.data_ptr(), piece.source.numel())
    return Key(digests, piece.lead) if digests else None
