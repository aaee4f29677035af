"""Which published bytes a live block still holds, by digest. Pure bookkeeping, like `_tickets`.

The cache has one claim on each of its blocks. What gives blocks up returns them, one claim on each to be taken back.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Hashable

    from shmcast._blocks import Block

CACHE_FROM: Final = 64 << 10
"""Bytes of the least piece that is worth a block of its own: smaller ones are copied by the readers, too."""


class Cache:
    """Blocks of at most `budget` bytes together, the least recently used first to go."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._blocks: OrderedDict[Hashable, Block] = OrderedDict()
        self._size = 0

    def find(self, key: Hashable) -> Block | None:
        """The block of these bytes; it is now the most recently used."""
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block

    def add(self, key: Hashable, block: Block) -> list[Block]:
        """Keep `block`, in place of another one under `key`; what is given up for it, itself if it is too large."""
        if block.size > self._budget:
            return [block]
        given_up = self.drop(key)
        self._blocks[key] = block
        self._size += block.size
        while self._size > self._budget:
            given_up += self.drop(next(iter(self._blocks)))
        return given_up

    def drop(self, key: Hashable) -> list[Block]:
        """Give up the block under `key`, if there is one."""
        block = self._blocks.pop(key, None)
        if block is None:
            return []
        self._size -= block.size
        return [block]

    def evict(self) -> list[Block]:
        """Give up the least recently used of the blocks that nobody else claims; none where all are claimed."""
        return next((self.drop(key) for key, block in self._blocks.items() if block.claims == 1), [])
