"""Blocks and holes tile each segment, the lowest place that fits is taken, and no generation comes twice."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from shmcast._blocks import Block, Blocks
from shmcast._layout import PAGE, Descriptor


def arena(*pages: int) -> Blocks:
    """Usable segments of so many pages each, header page not counted."""
    blocks = Blocks()
    for number, count in enumerate(pages):
        blocks.add(number, (count + 1) * PAGE, usable=True)
    return blocks


def place(block: Block | None) -> tuple[int, int]:
    """Segment and page of a block that was given."""
    assert block is not None
    return block.segment, block.offset // PAGE


def fill(blocks: Blocks, pages: int) -> list[Block]:
    taken = [blocks.allocate(PAGE) for _ in range(pages)]
    assert blocks.allocate(1) is None
    return [block for block in taken if block is not None]


def test_an_empty_arena_has_nothing() -> None:
    blocks = Blocks()
    assert blocks.allocate(1) is None
    assert (blocks.live, blocks.free, blocks.largest, blocks.total) == (0, 0, 0, 0)


def test_the_header_page_is_never_given_out() -> None:
    blocks = arena(3)
    assert (blocks.free, blocks.total) == (3 * PAGE, 4 * PAGE)
    assert [place(block) for block in fill(blocks, 3)] == [(0, 1), (0, 2), (0, 3)]
    assert blocks.free == 0


@pytest.mark.parametrize(("length", "pages"), [(1, 1), (PAGE - 1, 1), (PAGE, 1), (PAGE + 1, 2), (5 * PAGE, 5)])
def test_L2_a_block_has_whole_pages(length: int, pages: int) -> None:
    blocks = arena(8)
    block = blocks.allocate(length)
    assert block is not None
    assert (block.length, block.size) == (length, pages * PAGE)
    assert block.where == Descriptor(0, PAGE, length, 1)
    assert place(blocks.allocate(1)) == (0, 1 + pages)


def test_the_lowest_hole_that_fits_is_taken() -> None:
    blocks = arena(8, 4)
    taken = fill(blocks, 12)
    for i in (1, 3, 4, 6, 7):  # holes at pages 2, 4..5, 7..8 of segment 0
        blocks.unclaim(taken[i])
    blocks.unclaim(taken[9])
    assert place(blocks.allocate(2 * PAGE)) == (0, 4)
    assert place(blocks.allocate(2 * PAGE)) == (0, 7)
    assert blocks.allocate(2 * PAGE) is None
    assert place(blocks.allocate(PAGE)) == (0, 2)
    assert place(blocks.allocate(PAGE)) == (1, 2)


def test_a_larger_hole_keeps_its_rest() -> None:
    blocks = arena(8)
    assert place(blocks.allocate(3 * PAGE)) == (0, 1)
    assert (blocks.free, blocks.largest) == (5 * PAGE, 5 * PAGE)
    assert blocks.allocate(5 * PAGE + 1) is None
    assert place(blocks.allocate(5 * PAGE)) == (0, 4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_holes_that_touch_become_one(order: tuple[int, ...]) -> None:
    blocks = arena(3)
    taken = fill(blocks, 3)
    for i in order:
        blocks.unclaim(taken[i])
    assert (blocks.live, blocks.free, blocks.largest) == (0, 3 * PAGE, 3 * PAGE)
    assert place(blocks.allocate(3 * PAGE)) == (0, 1)


def test_holes_of_two_segments_never_become_one() -> None:
    blocks = arena(2, 2)
    for block in fill(blocks, 4):
        blocks.unclaim(block)
    assert (blocks.free, blocks.largest) == (4 * PAGE, 2 * PAGE)
    assert blocks.allocate(3 * PAGE) is None


def test_L3_a_place_used_again_has_a_new_generation() -> None:
    blocks = arena(1)
    generations = []
    for _ in range(5):
        block = blocks.allocate(1)
        assert block is not None
        generations.append(block.generation)
        blocks.unclaim(block)
    assert generations == [1, 2, 3, 4, 5]


def test_only_the_last_claim_frees_a_block() -> None:
    blocks = arena(1)
    block = blocks.allocate(1)
    assert block is not None
    block.claims += 2
    for _ in range(2):
        blocks.unclaim(block)
        assert (blocks.at(0, PAGE), blocks.free) == (block, 0)
    blocks.unclaim(block)
    assert (blocks.at(0, PAGE), blocks.free) == (None, PAGE)


def test_a_segment_that_is_not_usable_gives_no_block_and_counts_as_no_room() -> None:
    blocks = arena(1)
    blocks.add(1, 4 * PAGE, usable=False)
    assert not blocks.usable(1)
    assert (blocks.allocate(2 * PAGE), blocks.free, blocks.total) == (None, PAGE, 6 * PAGE)
    blocks.set_usable(1, True)
    assert blocks.usable(1)
    block = blocks.allocate(2 * PAGE)
    assert place(block) == (1, 1)
    assert block is not None
    blocks.set_usable(1, False)
    assert (blocks.free, blocks.largest, blocks.live) == (PAGE, PAGE, 1)
    blocks.unclaim(block)
    assert (blocks.free, blocks.live) == (PAGE, 0)
    blocks.set_usable(1, True)
    assert (blocks.free, blocks.largest) == (4 * PAGE, 3 * PAGE)


def test_finds_the_block_that_starts_at_an_offset() -> None:
    blocks = arena(4, 4)
    one, two = blocks.allocate(PAGE + 1), blocks.allocate(PAGE)
    assert (blocks.at(0, PAGE), blocks.at(0, 3 * PAGE)) == (one, two)
    assert (blocks.at(0, 2 * PAGE), blocks.at(0, PAGE + 1), blocks.at(1, PAGE)) == (None, None, None)


class BlocksMachine(RuleBasedStateMachine):
    """Against a model with one word a page: who owns it."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks()
        self.owners: list[list[Block | None]] = []
        self.usable: list[bool] = []
        self.last = 0
        self.live: dict[Block, int] = {}

    @precondition(lambda self: len(self.owners) < 4)
    @rule(pages=st.integers(1, 12), usable=st.booleans())
    def add(self, pages: int, usable: bool) -> None:
        self.blocks.add(len(self.owners), (pages + 1) * PAGE, usable=usable)
        self.owners.append([None] * pages)
        self.usable.append(usable)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), usable=st.booleans())
    def set_usable(self, data: st.DataObject, usable: bool) -> None:
        segment = data.draw(st.integers(0, len(self.owners) - 1))
        self.blocks.set_usable(segment, usable)
        self.usable[segment] = usable

    @rule(target=held, pages=st.integers(1, 6), short=st.integers(0, PAGE - 1))
    def allocate(self, pages: int, short: int) -> Block | None:
        block = self.blocks.allocate(pages * PAGE - short)
        expected = self.lowest(pages)
        if block is None:
            assert expected is None
            return None
        assert (block.segment, block.offset // PAGE - 1) == expected
        assert (block.length, block.claims) == (pages * PAGE - short, 1)
        assert block.generation > self.last
        self.last = block.generation
        owners = self.owners[block.segment]
        start = block.offset // PAGE - 1
        assert owners[start : start + pages] == [None] * pages
        owners[start : start + pages] = [block] * pages
        self.live[block] = 1
        return block

    @rule(block=held)
    def claim(self, block: Block | None) -> None:
        if block in self.live:
            block.claims += 1
            self.live[block] += 1

    @rule(block=held)
    def unclaim(self, block: Block | None) -> None:
        if block in self.live:
            self.give_back(block)

    @rule(block=consumes(held))
    def unclaim_all(self, block: Block | None) -> None:
        while block in self.live:
            self.give_back(block)

    def give_back(self, block: Block) -> None:
        self.blocks.unclaim(block)
        self.live[block] -= 1
        if not self.live[block]:
            del self.live[block]
            owners = self.owners[block.segment]
            owners[:] = [None if owner is block else owner for owner in owners]

    def lowest(self, pages: int) -> tuple[int, int] | None:
        """Segment and page of the first run of `pages` free ones."""
        for segment, owners in enumerate(self.owners):
            for start in range(len(owners) - pages + 1):
                if self.usable[segment] and owners[start : start + pages] == [None] * pages:
                    return segment, start
        return None

    @invariant()
    def counts_agree(self) -> None:
        free = [owners.count(None) * PAGE for owners in self.owners]
        assert self.blocks.free == sum(size for size, usable in zip(free, self.usable, strict=True) if usable)
        assert self.blocks.total == sum((len(owners) + 1) * PAGE for owners in self.owners)
        assert self.blocks.live == len(self.live)
        used = sum(block.size for block in self.live)
        assert used + sum(free) + len(self.owners) * PAGE == self.blocks.total
        pages = self.blocks.largest // PAGE
        assert pages == 0 or self.lowest(pages) is not None
        assert self.lowest(pages + 1) is None

    @invariant()
    def holes_and_blocks_tile_every_segment(self) -> None:
        for number, space in self.blocks._spaces.items():
            tiles = [(offset, size, None) for offset, size in space.holes]
            tiles += [(block.offset, block.size, block) for block in self.live if block.segment == number]  # type: ignore[misc]
            at, before_was_hole = PAGE, False
            for offset, size, block in sorted(tiles, key=lambda tile: tile[:2]):
                assert offset == at
                assert size > 0
                assert not (block is None and before_was_hole)
                at, before_was_hole = offset + size, block is None
            assert at == space.size

    @invariant()
    def every_block_is_found(self) -> None:
        for block in self.live:
            assert self.blocks.at(block.segment, block.offset) is block


BlocksMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestBlocksMachine = BlocksMachine.TestCase
