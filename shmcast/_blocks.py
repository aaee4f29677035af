"""Where blocks lie in the segments of an arena: pure bookkeeping in the writer's own memory.

The lowest place that fits is taken, so that the same pages are used again and again: they are mapped already, in the
writer and in every reader, and a steady state takes no page fault.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shmcast._layout import PAGE, Descriptor, round_up

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(eq=False)
class Block:
    """Whole pages of a segment. Free when nothing claims it: no ticket, no storage of `empty`, no publish under way."""

    segment: int
    offset: int
    length: int
    generation: int
    claims: int = 1

    @property
    def size(self) -> int:
        return round_up(self.length, PAGE)

    @property
    def where(self) -> Descriptor:
        return Descriptor(self.segment, self.offset, self.length, self.generation)


@dataclass(eq=False)
class _Space:
    """One segment: its holes by offset, each (offset, size), no two touching."""

    size: int
    usable: bool
    holes: list[tuple[int, int]] = field(default_factory=list)


class Blocks:
    """The blocks and the holes of an arena. Together they tile every segment past its header page."""

    def __init__(self) -> None:
        self._spaces: dict[int, _Space] = {}
        self._live: dict[tuple[int, int], Block] = {}
        self._generation = 0

    def add(self, segment: int, size: int, *, usable: bool) -> None:
        """A new segment of `size` bytes, its header page included."""
        self._spaces[segment] = _Space(size, usable, [(PAGE, size - PAGE)])

    def set_usable(self, segment: int, usable: bool) -> None:
        """Whether new blocks may be placed in `segment`."""
        self._spaces[segment].usable = usable

    def allocate(self, length: int, spare: Callable[[], list[Block]] = list) -> Block | None:
        """A block with one claim for `length` bytes, of a new generation; None where no hole fits.

        `spare` gives up claims, on a block or more a call, until a hole fits, or none is left to give up.
        """
        block = self._take_hole(length)
        while block is None and self._may_hold(length) and (spared := spare()):
            for each in spared:
                self.unclaim(each)
            block = self._take_hole(length)
        return block

    def unclaim(self, block: Block) -> None:
        """One claim less; the last one frees the block."""
        block.claims -= 1
        if not block.claims:
            del self._live[block.segment, block.offset]
            self._fill(self._spaces[block.segment].holes, block.offset, block.size)

    def at(self, segment: int, offset: int) -> Block | None:
        """The live block that starts there."""
        return self._live.get((segment, offset))

    def usable(self, segment: int) -> bool:
        """Whether new blocks may be placed in `segment`."""
        return self._spaces[segment].usable

    @property
    def live(self) -> int:
        """How many blocks are live."""
        return len(self._live)

    @property
    def free(self) -> int:
        """Bytes in holes of usable segments."""
        return sum(size for space in self._spaces.values() if space.usable for _, size in space.holes)

    @property
    def largest(self) -> int:
        """The largest block that would fit now, in bytes."""
        return max((size for space in self._spaces.values() if space.usable for _, size in space.holes), default=0)

    @property
    def total(self) -> int:
        """Bytes of all segments."""
        return sum(space.size for space in self._spaces.values())

    @property
    def usage(self) -> tuple[int, int, int, int]:
        """Live blocks, free bytes, the largest hole, bytes of all segments."""
        return self.live, self.free, self.largest, self.total

    def _take_hole(self, length: int) -> Block | None:
        size = round_up(length, PAGE)
        for number, space in self._spaces.items():
            if not space.usable:
                continue
            for i, (offset, hole) in enumerate(space.holes):
                if hole >= size:
                    space.holes[i : i + 1] = [(offset + size, hole - size)] if hole > size else []
                    self._generation += 1
                    block = Block(number, offset, length, self._generation)
                    self._live[number, offset] = block
                    return block
        return None

    def _may_hold(self, length: int) -> bool:
        """Whether a usable segment is large enough, whatever lies in it now."""
        size = PAGE + round_up(length, PAGE)
        return any(space.usable and space.size >= size for space in self._spaces.values())

    @staticmethod
    def _fill(holes: list[tuple[int, int]], offset: int, size: int) -> None:
        """Put a hole back, joined with those that it touches."""
        i = bisect_left(holes, (offset, 0))
        if i < len(holes) and holes[i][0] == offset + size:
            size += holes.pop(i)[1]
        if i and sum(holes[i - 1]) == offset:
            offset, before = holes.pop(i - 1)
            size += before
        insort(holes, (offset, size))
