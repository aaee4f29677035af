"""The content cache: bytes that were published before are not copied again, and never others are sent for them."""

from __future__ import annotations

import gc
import hashlib
import random
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shmcast import _arena
from shmcast._blocks import Block
from shmcast._cache import CACHE_FROM, Cache
from shmcast._codec import Piece
from shmcast._layout import BLOCK, MAX_TICKETS, PAGE, round_up
from shmcast.broadcaster import Broadcaster
from shmcast.digest import digest, digest_bytes, known
from shmcast.errors import ArenaFull, ClosedError, StaleHandle
from shmcast.multimodal import MultimodalInputs
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.support.codec import same
from tests.test_transport_processes import Stage, names_of, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcast._wire import Handle
    from tests.support.ranks import Ranks

MIB = 1 << 20
IMAGE = 1 << 17  # bytes of a tensor that is large enough for the cache
PAGES = round_up(BLOCK.size + IMAGE, PAGE)  # bytes of a block with one
DEADLINE_SECONDS = 30.0
CACHED = Policy(wait=0, cache_bytes=MIB)


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition()` holds; only a bug makes the deadline pass."""
    deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {DEADLINE_SECONDS:g} s: {what}")
        never.wait(0.001)


def settled(writer: Writer, blocks: int) -> None:
    """Wait until the writer knows of no more than `blocks` live blocks, and check that it is just as many."""
    gc.collect()
    until(lambda: writer.stats().live_blocks <= blocks, f"{blocks} live blocks")
    assert writer.stats().live_blocks == blocks


def image(seed: int, size: int = IMAGE) -> torch.Tensor:
    """`size` random bytes, the same ones for the same seed."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).clone()


def hashed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, its digest computed."""
    digest(tensor)
    return tensor


def counts(writer: Writer) -> tuple[int, int]:
    """Hits and misses."""
    stats = writer.stats()
    return stats.cache_hits, stats.cache_misses


def opened(reader: Reader, handle: Handle) -> Any:
    return reader.open(handle)


def arrives(writer: Writer, reader: Reader, obj: object) -> bool:
    """Whether the first reader gets `obj` as it is; then it drops it, and the writer has heard of that."""
    before = writer.stats().leases[0].held
    right = same(reader.open(writer.publish(obj)), obj)
    until(lambda: writer.stats().leases[0].held == before, "it has been given back")
    return right


@pytest.fixture
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    with Writer(2, capacity=4 * MIB, policy=CACHED) as writer:
        yield writer
    request.node.funcargs.clear()


@pytest.fixture
def reader(writer: Writer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 0) as reader, Reader(writer.address, 1) as other:
        other.close()
        yield reader
    request.node.funcargs.clear()


# The bookkeeping alone.


def block(number: int, pages: int = 1) -> Block:
    return Block(0, number * PAGE, pages * PAGE, number)


def test_the_least_recently_used_goes_first() -> None:
    cache = Cache(3 * PAGE)
    blocks = [block(number) for number in range(5)]
    assert [cache.add(number, blocks[number]) for number in range(3)] == [[], [], []]
    assert cache.find(0) is blocks[0]
    assert cache.add(3, blocks[3]) == [blocks[1]]
    assert cache.find(1) is None
    assert cache.add(4, block(4, pages=2)) == [blocks[2], blocks[0]]


def test_a_block_over_the_budget_is_not_kept() -> None:
    cache = Cache(2 * PAGE)
    small, large = block(1), block(2, pages=3)
    assert cache.add("small", small) == []
    assert cache.add("large", large) == [large]
    assert cache.find("small") is small


def test_what_is_kept_again_takes_the_place_of_the_old() -> None:
    cache = Cache(2 * PAGE)
    first, second, other = block(1), block(2), block(3)
    cache.add("key", first)
    assert cache.add("key", second) == [first]
    assert cache.add("other", other) == []
    assert cache.find("key") is second
    assert cache.drop("key") == [second]
    assert cache.drop("key") == []


def test_what_is_claimed_elsewhere_is_not_evicted() -> None:
    cache = Cache(9 * PAGE)
    blocks = [block(number) for number in range(3)]
    for number, each in enumerate(blocks):
        cache.add(number, each)
    blocks[0].claims = 2
    assert cache.evict() == [blocks[1]]
    assert cache.evict() == [blocks[2]]
    assert cache.evict() == []
    blocks[0].claims = 1
    assert cache.evict() == [blocks[0]]


class Bookkeeping(RuleBasedStateMachine):
    """A cache against an ordered dict that is looked through from the start each time."""

    BUDGET = 6

    def __init__(self) -> None:
        super().__init__()
        self.cache = Cache(self.BUDGET * PAGE)
        self.model: OrderedDict[int, Block] = OrderedDict()
        self.given = 0

    def gave_up(self, *keys: int) -> list[Block]:
        return [self.model.pop(key) for key in keys]

    @rule(key=st.integers(0, 6))
    def find(self, key: int) -> None:
        assert self.cache.find(key) is self.model.get(key)
        if key in self.model:
            self.model.move_to_end(key)

    @rule(key=st.integers(0, 6), pages=st.integers(1, 8))
    def add(self, key: int, pages: int) -> None:
        self.given += 1
        new = block(self.given, pages)
        if pages > self.BUDGET:
            assert self.cache.add(key, new) == [new]
            return
        expected = self.gave_up(key) if key in self.model else []
        self.model[key] = new
        while sum(each.size for each in self.model.values()) > self.BUDGET * PAGE:
            expected += self.gave_up(next(iter(self.model)))
        assert self.cache.add(key, new) == expected

    @rule(key=st.integers(0, 6))
    def drop(self, key: int) -> None:
        assert self.cache.drop(key) == (self.gave_up(key) if key in self.model else [])

    @rule(key=st.integers(0, 6), claims=st.integers(1, 3))
    def claim(self, key: int, claims: int) -> None:
        if key in self.model:
            self.model[key].claims = claims

    @rule()
    def evict(self) -> None:
        idle = [key for key, each in self.model.items() if each.claims == 1][:1]
        assert self.cache.evict() == self.gave_up(*idle)


TestBookkeeping = Bookkeeping.TestCase


# What is known of bytes without a look at them.


def known_of(*tensors: torch.Tensor, of: torch.Tensor | None = None) -> tuple[Any, ...]:
    whole = tensors[0] if of is None else of
    return known(tensors, whole.data_ptr(), whole.nbytes)


def test_only_what_was_computed_is_known() -> None:
    tensor = image(1)
    assert known_of(tensor) == ()
    value = digest_bytes(tensor)
    assert [(part.name, part.digest, part.length) for part in known_of(tensor)] == [("sha256", value, IMAGE)]
    assert known_of(image(1)) == ()


def test_nothing_is_known_of_what_was_written_to() -> None:
    tensor = hashed(image(1))
    before = known_of(tensor)
    tensor[5] += 1
    assert known_of(tensor) == ()
    tensor[5] -= 1
    assert known_of(hashed(tensor)) == before


def test_a_write_through_a_view_counts() -> None:
    tensor = hashed(image(1))
    tensor[100:200].detach().zero_()
    assert known_of(tensor) == ()


def test_another_counter_over_the_same_memory_is_not_believed() -> None:
    tensor = hashed(image(1))
    other = tensor.data
    assert known_of(other) == ()
    del tensor
    assert known_of(other) == ()


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.view(256, 512).T,
        lambda t: t.view(256, 512)[:, :511],
        lambda t: t[::2],
        lambda t: t[:1].expand(IMAGE),
        lambda t: t.flip(0)[:0],
    ],
)
def test_elements_in_another_order_than_in_memory_are_not_known(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = image(1)
    assert known_of(hashed(view(tensor)), of=tensor) == ()


def test_conjugates_and_negatives_and_inference_tensors_are_not_known() -> None:
    tensor = torch.view_as_complex(image(1).view(torch.float32).nan_to_num().view(-1, 2))
    assert known_of(hashed(tensor.conj())) == ()
    assert tensor.conj()[:1].imag.is_neg()
    assert known_of(hashed(tensor.conj()[:1].imag)) == ()
    with torch.inference_mode():
        assert known_of(hashed(image(1).clone())) == ()


def test_a_digest_of_widened_elements_is_another_one_than_of_the_same_bytes() -> None:
    half = torch.arange(IMAGE // 2).to(torch.bfloat16)
    wide = half.float()
    assert digest_bytes(half) == digest_bytes(wide)
    assert known_of(half) != known_of(wide)
    # Nor do the bytes of one pass for those of the other where they are as long.
    assert known_of(half) != known_of(hashed(wide[: IMAGE // 4]))


def test_no_two_bfloat16_widen_to_one_float32() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    was = torch.set_flush_denormal(True)
    try:
        wide = every.float().view(torch.int32)
    finally:
        torch.set_flush_denormal(False)
    assert was is not None
    assert len(set(wide.tolist())) == 1 << 16
    assert torch.equal(wide, every.view(torch.int16).to(torch.int32) << 16)


def test_equal_bytes_are_known_alike_whatever_their_dtype_and_shape() -> None:
    tensor = image(1)
    one, other = hashed(tensor.view(torch.float64)), hashed(tensor.clone().view(128, -1))
    assert known_of(one) == known_of(other) != ()


def test_blake3_and_sha256_are_told_apart() -> None:
    pytest.importorskip("blake3")
    one, other = image(1), image(1)
    digest(one)
    digest(other, "blake3")
    assert known_of(other)[0].name == "blake3"
    assert known_of(one) != known_of(other)


def test_parts_are_known_where_they_tile_the_bytes() -> None:
    parent = image(1)
    left, right = parent[: IMAGE // 2], parent[IMAGE // 2 :]
    hashed(left)
    assert known_of(left, right, of=parent) == ()
    hashed(right)
    assert len(known_of(left, right, of=parent)) == 2
    assert known_of(right, of=parent) == known_of(left, of=parent) == ()
    assert known_of(left, parent[IMAGE // 2 + 1 :], of=parent) == ()
    assert len(known_of(left, left[:], right, right[5:], of=parent)) == 2
    assert known_of(left, right, of=parent[1:]) == ()
    parent[-1] += 1
    assert known_of(left, right, of=parent) == ()


cuts = st.tuples(st.integers(0, 40), st.integers(0, 40), st.sampled_from([1, 1, 1, 2]), st.booleans())


@given(
    views=st.lists(cuts, max_size=8), writes=st.lists(st.integers(0, 39), max_size=3), whole=cuts, half=st.booleans()
)
def test_what_is_known_is_true(
    views: list[tuple[int, int, int, bool]], writes: list[int], whole: tuple[int, int, int, bool], half: bool
) -> None:
    parent = torch.arange(40).to(torch.bfloat16 if half else torch.int16)
    tensors = [(parent[min(a, b) : max(a, b) : step], is_hashed) for a, b, step, is_hashed in views]
    for tensor, is_hashed in tensors:
        if is_hashed:
            hashed(tensor)
    for at in writes:
        parent[at] += 1
        if at % 2:
            hashed(parent[at:])
    of = parent[min(whole[:2]) : max(whole[:2])]
    ordered = sorted((tensor for tensor, _ in tensors if tensor.numel()), key=torch.Tensor.data_ptr)
    at = 0
    for part in known_of(*ordered, of=of):
        elements = of[at // 2 : (at + part.length) // 2]
        assert part.widened is half
        assert part.digest == hashlib.sha256((elements.float() if half else elements).numpy().tobytes()).digest()
        at += part.length
    assert at in (0, of.nbytes)


# One writer, one reader.


def test_the_second_time_nothing_is_copied(writer: Writer, reader: Reader) -> None:
    first = writer.publish({"image": hashed(image(1)), "number": 1})
    second = writer.publish({"image": hashed(image(1)), "number": 2})
    assert counts(writer) == (1, 1)
    assert writer.stats().cache_bytes_saved == IMAGE
    assert max(first.where.length, second.where.length) < PAGE
    assert writer.stats().live_blocks == 3
    assert writer.stats().bytes == 2 * IMAGE
    one, two = opened(reader, first), opened(reader, second)
    assert same(one, {"image": image(1), "number": 1})
    assert same(two, {"image": image(1), "number": 2})


def test_copies_that_are_held_at_once_do_not_see_each_others_writes(writer: Writer, reader: Reader) -> None:
    handles = [writer.publish(hashed(image(1))) for _ in range(4)]
    one, two, three = (opened(reader, handle) for handle in handles[:3])
    one.zero_()
    two[7:] = 255
    assert same(three, image(1))
    assert not one.any()
    assert two[7:].eq(255).all()
    assert same(two[:7].clone(), image(1)[:7])
    del one
    settled(writer, 1 + 3)
    assert same(opened(reader, handles[3]), image(1))
    del two, three
    settled(writer, 1)
    assert same(opened(reader, writer.publish(hashed(image(1)))), image(1))
    assert counts(writer) == (4, 1)


def test_off_by_default(reader: Reader) -> None:
    with Writer(1, capacity=MIB, policy=Policy(wait=0)) as plain:
        for _ in range(2):
            plain.publish(hashed(image(1)), readers=[])
        assert counts(plain) == (0, 0)
        assert plain.stats().live_blocks == 0


def test_what_nobody_hashed_here_is_copied(writer: Writer, reader: Reader) -> None:
    raw = {"mm_items": [{"modality": "IMAGE", "feature": image(1), "hash": digest(image(1)), "pad_value": 7}]}
    for _ in range(2):
        inputs = MultimodalInputs.from_dict(raw)
        assert inputs.mm_items[0].hash == digest(image(1))
        writer.publish([item.feature for item in inputs.mm_items])
    assert counts(writer) == (0, 0)


def test_what_from_dict_hashed_is_found(writer: Writer, reader: Reader) -> None:
    for _ in range(2):
        inputs = MultimodalInputs.from_dict({"mm_items": [{"modality": "IMAGE", "feature": image(1)}]})
        handle = writer.publish([item.feature for item in inputs.mm_items])
    assert counts(writer) == (1, 1)
    assert same(opened(reader, handle), [image(1)])


def test_a_tensor_that_was_written_to_is_copied(writer: Writer, reader: Reader) -> None:
    tensor = hashed(image(1))
    writer.publish(tensor)
    tensor[100] += 1
    changed = tensor.clone()
    assert same(opened(reader, writer.publish(tensor)), changed)
    assert counts(writer) == (0, 1)
    hashed(tensor)
    assert same(opened(reader, writer.publish(tensor)), changed)
    assert same(opened(reader, writer.publish(tensor)), changed)
    assert same(opened(reader, writer.publish(hashed(image(1)))), image(1))
    assert counts(writer) == (2, 2)


def test_the_tensor_may_change_once_it_is_published(writer: Writer, reader: Reader) -> None:
    tensor = hashed(image(1))
    handle = writer.publish(tensor)
    tensor.zero_()
    again = writer.publish(hashed(image(1)))
    assert counts(writer) == (1, 1)
    assert same(opened(reader, handle), image(1))
    assert same(opened(reader, again), image(1))


def test_a_tensor_that_numpy_filled_anew_is_copied(writer: Writer, reader: Reader) -> None:
    array = np.asarray(image(1).numpy())
    tensor = hashed(torch.from_numpy(array))
    writer.publish(tensor)
    array[:] = image(2).numpy()
    assert digest_bytes(tensor) == digest_bytes(image(1))  # what torch does not count
    for _ in range(2):
        assert same(opened(reader, writer.publish(tensor)), image(2))
    settled(writer, 2 + 1)


def test_what_is_written_to_while_it_is_copied_is_not_kept(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = hashed(image(1))
    copy_to = Piece.copy_to

    def write_and_copy(piece: Piece, memory: Any) -> None:
        tensor[::2] = 0
        copy_to(piece, memory)

    with monkeypatch.context() as patch:
        patch.setattr(Piece, "copy_to", write_and_copy)
        writer.publish(tensor, readers=[])
    assert writer.stats().live_blocks == 0
    assert same(opened(reader, writer.publish(hashed(image(1)))), image(1))
    assert counts(writer) == (0, 2)


def test_equal_digests_of_other_bytes_are_told_apart(writer: Writer, reader: Reader) -> None:
    half = torch.arange(IMAGE).to(torch.bfloat16)
    wide = half.float()
    assert digest_bytes(half) == digest_bytes(wide)
    handles = [writer.publish(hashed(tensor.clone())) for tensor in (half, wide, half, wide)]
    assert counts(writer) == (2, 2)
    for handle, tensor in zip(handles, (half, wide, half, wide), strict=True):
        assert same(opened(reader, handle), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.complex64])
def test_dtype_and_shape_are_those_of_the_message(writer: Writer, reader: Reader, dtype: torch.dtype) -> None:
    # Digests of bfloat16 are over other bytes, so that these are kept twice.
    writer.publish(hashed(image(1)))
    for shape in ((-1,), (64, -1), (4, 8, 1, -1)):
        tensor = image(1).view(dtype).view(shape)
        assert same(opened(reader, writer.publish(hashed(tensor))), tensor)
    assert counts(writer) == ((2, 2) if dtype is torch.bfloat16 else (3, 1))


def test_equal_tensors_of_one_message_stay_two(writer: Writer, reader: Reader) -> None:
    for _ in range(2):
        one, two = opened(reader, writer.publish([hashed(image(1)), hashed(image(1))]))
        one.zero_()
        assert same(two, image(1))
    assert counts(writer) == (1, 1)


def test_one_tensor_twice_in_a_message_stays_one(writer: Writer, reader: Reader) -> None:
    for _ in range(2):
        tensor = hashed(image(1))
        one, two = opened(reader, writer.publish([tensor, tensor[5:]]))
        one[10] = one[10] + 1
        assert two[5] == one[10]
    assert counts(writer) == (1, 1)


def test_views_of_one_parent_are_found_together(writer: Writer, reader: Reader) -> None:
    for _ in range(2):
        parent = image(1, 8 * IMAGE)[:IMAGE].clone()
        views = [hashed(view) for view in torch.split(parent, 10_000)]
        got = opened(reader, writer.publish({"views": views, "whole": parent}))
        assert same(got, {"views": list(torch.split(image(1, 8 * IMAGE)[:IMAGE], 10_000)), "whole": parent})
        got["views"][3][0] = got["whole"][30_000] + 1
        assert got["whole"][30_000] == got["views"][3][0]
    assert counts(writer) == (1, 1)


def test_views_in_another_order_are_other_bytes(writer: Writer, reader: Reader) -> None:
    for order in ([0, 1, 2], [2, 1, 0], [0, 1, 2], [0, 1], [1, 2]):
        parent = torch.cat([image(each) for each in order])
        views = [hashed(view) for view in torch.split(parent, IMAGE)]
        assert same(opened(reader, writer.publish(views)), [image(each) for each in order])
    assert counts(writer) == (1, 4)


@pytest.mark.parametrize("offset", [1, 16, 64, 100, 4096])
def test_slices_keep_their_place_in_a_line(writer: Writer, reader: Reader, offset: int) -> None:
    for start in (offset, 0, offset, 0):
        huge = torch.zeros(2 * IMAGE, dtype=torch.uint8)
        part = huge[start : start + IMAGE].copy_(image(1))
        got = opened(reader, writer.publish(hashed(part)))
        assert same(got, image(1))
        assert got.data_ptr() % 64 == start % 64
    assert counts(writer) == ((3, 1) if offset % 64 == 0 else (2, 2))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.view(256, 512).T,
        lambda t: t.view(256, 512)[:, 1:],
        lambda t: t[::3],
        lambda t: t.view(256, 512)[:, ::2].expand(2, 256, 256),
        lambda t: t.numpy(),
        lambda t: [t.numpy().tobytes(), t.tolist()],
    ],
)
def test_what_does_not_lie_as_it_was_hashed_is_copied(
    writer: Writer, reader: Reader, view: Callable[[torch.Tensor], Any]
) -> None:
    for _ in range(2):
        value = view(hashed(image(1)))
        if isinstance(value, torch.Tensor):
            assert torch.equal(opened(reader, writer.publish(hashed(value))), value)
        else:
            assert same(opened(reader, writer.publish(value)), value)
    assert counts(writer) == (0, 0)


def test_a_contiguous_copy_of_a_strided_view_has_not_its_digest(writer: Writer, reader: Reader) -> None:
    parent = image(1, 4 * IMAGE)
    view = parent[::4]
    assert same(opened(reader, writer.publish(hashed(view))), view.contiguous())
    assert same(opened(reader, writer.publish(hashed(view.contiguous()))), view.contiguous())
    assert counts(writer) == (0, 1)


def test_small_tensors_are_copied(writer: Writer, reader: Reader) -> None:
    for _ in range(2):
        writer.publish([hashed(image(1, CACHE_FROM - 1)), hashed(image(2, CACHE_FROM))])
    assert counts(writer) == (1, 1)


def test_tensors_of_empty_are_listed_as_they_are(writer: Writer, reader: Reader) -> None:
    mine = writer.empty((IMAGE,), torch.uint8).copy_(image(1))
    for _ in range(2):
        assert same(opened(reader, writer.publish(hashed(mine))), image(1))
    assert counts(writer) == (0, 0)
    settled(writer, 1)


# The budget, and memory that runs out.


def test_no_more_than_the_budget_is_kept() -> None:
    with Writer(1, capacity=4 * MIB, policy=Policy(wait=0, cache_bytes=3 * PAGES)) as writer:
        for seed in (1, 2, 3, 1, 4):
            writer.publish(hashed(image(seed)), readers=[])
        assert writer.stats().live_blocks == 3
        for seed in (1, 3, 4):
            writer.publish(hashed(image(seed)), readers=[])
        assert counts(writer) == (1 + 3, 4)
        writer.publish(hashed(image(2)), readers=[])
        assert counts(writer) == (4, 5)
        writer.publish(hashed(image(5, 4 * IMAGE)), readers=[])
        writer.publish(hashed(image(4)), readers=[])
        assert counts(writer) == (5, 6)
        assert writer.stats().live_blocks == 3


def test_a_held_block_that_leaves_the_cache_stays_as_it_is() -> None:
    policy = Policy(wait=0, cache_bytes=PAGES)
    with Writer(1, capacity=4 * MIB, policy=policy) as writer, Reader(writer.address, 0) as reader:
        held = opened(reader, writer.publish(hashed(image(1))))
        for seed in range(2, 20):
            assert arrives(writer, reader, hashed(image(seed)))
        assert same(held, image(1))
        assert arrives(writer, reader, hashed(image(1)))
        assert counts(writer)[0] == 0
        del held
        settled(writer, 1)


def room(images: int) -> int:
    """Bytes of an arena that holds so many images, and the small blocks of their messages."""
    return PAGE + images * (PAGES + PAGE)


def test_pressure_takes_what_only_the_cache_holds_first() -> None:
    with Writer(1, capacity=room(4), policy=CACHED) as writer, Reader(writer.address, 0) as reader:
        held = [opened(reader, writer.publish(hashed(image(0))))]
        for seed in (1, 2, 3, 1):
            assert arrives(writer, reader, hashed(image(seed)))
        settled(writer, 4 + 1)
        held.append(opened(reader, writer.publish(image(9))))
        assert counts(writer) == (1, 4)
        for seed in (3, 1, 0):
            assert arrives(writer, reader, hashed(image(seed)))
        assert counts(writer) == (4, 4)  # of the four that there were, 2 had to go
        held += [opened(reader, writer.publish(image(seed))) for seed in (8, 7)]
        with pytest.raises(ArenaFull):
            writer.publish(image(6))
        assert [same(one, image(seed)) for one, seed in zip(held, (0, 9, 8, 7), strict=True)] == [True] * 4
        assert arrives(writer, reader, hashed(image(0)))  # it is held, so it is there
        assert counts(writer) == (5, 4)
        held.clear()


def test_a_new_image_takes_the_place_of_the_oldest_when_the_arena_is_full() -> None:
    with Writer(1, capacity=room(3), policy=CACHED) as writer, Reader(writer.address, 0) as reader:
        for seed in (*range(10), 9, 8):
            assert arrives(writer, reader, hashed(image(seed)))
        assert counts(writer) == (2, 10)


def test_cached_blocks_in_the_way_of_a_message_are_given_up() -> None:
    """Memory for all of it is there, but not in one place as long as a cached block lies in the middle."""
    with Writer(1, capacity=room(4), policy=CACHED) as writer, Reader(writer.address, 0) as reader:
        first = writer.publish(image(0))
        second = writer.publish(hashed(image(1)))
        for handle, seed in ((first, 0), (second, 1)):
            assert same(opened(reader, handle), image(seed))
        settled(writer, 1)
        objs = [hashed(image(1)), image(2, 3 * IMAGE)]
        assert same(opened(reader, writer.publish(objs)), objs)
        assert not writer._arena._cache._blocks


def test_what_can_never_fit_takes_nothing_from_the_cache(writer: Writer, reader: Reader) -> None:
    writer.publish(hashed(image(1)), readers=[])
    with pytest.raises(ArenaFull):
        writer.publish(image(2, 5 * MIB))
    writer.publish(hashed(image(1)), readers=[])
    assert counts(writer) == (1, 1)


def test_a_reader_with_too_many_leases_takes_nothing_from_the_cache(writer: Writer, reader: Reader) -> None:
    writer.publish(hashed(image(1)), readers=[])
    handle = writer.publish(1, readers=[0], opens=MAX_TICKETS)
    with pytest.raises(ArenaFull, match=f"{MAX_TICKETS} are the most"):
        writer.publish(2, readers=[0])
    writer.publish(hashed(image(1)), readers=[])
    assert counts(writer) == (1, 1)
    writer.withdraw(handle)


def test_the_arena_grows_before_the_cache_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "STEP", MIB)
    with (
        Writer(1, capacity=8 * MIB, policy=Policy(wait=0, cache_bytes=4 * MIB)) as writer,
        Reader(writer.address, 0) as reader,
    ):
        for seed in range(24):
            assert arrives(writer, reader, hashed(image(seed)))
            # In between, a new segment may wait for the reader to map it.
            until(
                lambda: len(writer._arena._segments) == reader_segments(reader), "the reader has mapped what there is"
            )
            until(lambda: all(map(writer._arena._blocks.usable, range(reader_segments(reader)))), "it has said so")
            writer.settle()
        assert writer.stats().segment_bytes > 4 * MIB
        before = counts(writer)[0]
        for seed in range(24):
            assert arrives(writer, reader, hashed(image(seed)))
        assert counts(writer)[0] - before >= 20


def reader_segments(reader: Reader) -> int:
    return len(reader._leases._segments)


# What goes wrong.


def failing(patch: pytest.MonkeyPatch, owner: Any, name: str, nth: int, error: type[BaseException]) -> None:
    """Have the `nth` call of a method raise."""
    calls, real = 0, getattr(owner, name)

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise error("on purpose")
        return real(*args)

    patch.setattr(owner, name, fail)


@pytest.mark.faults
@pytest.mark.parametrize("error", [MemoryError, ArenaFull, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["find", "reserve", "mapping", "keep", "grant", "copy_to"])
def test_whatever_fails_no_claim_is_lost(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch, name: str, error: type[BaseException]
) -> None:
    writer.publish(hashed(image(0)), readers=[])
    failed = True
    for nth in range(1, 20):
        objs = [hashed(image(0)), hashed(image(nth)), hashed(image(100 + nth)), image(nth)]
        with monkeypatch.context() as patch:
            failing(patch, Piece if name == "copy_to" else writer._arena, name, nth, error)
            try:
                handle = writer.publish(objs)
                failed = False
            except error:
                pass
        if not failed:
            break
        kept = len(writer._arena._cache._blocks)
        settled(writer, kept)
    assert not failed
    assert same(opened(reader, handle), objs)
    settled(writer, len(writer._arena._cache._blocks))
    for seed in range(30):
        assert arrives(writer, reader, hashed(image(seed)))


def test_withdrawing_a_message_leaves_the_cached_block_alone(writer: Writer, reader: Reader) -> None:
    first, second = (writer.publish(hashed(image(1))) for _ in range(2))
    writer.withdraw(first)
    with pytest.raises(StaleHandle):
        reader.open(first)
    assert same(opened(reader, second), image(1))
    writer.withdraw(writer.publish(hashed(image(1))))
    settled(writer, 1)
    assert same(opened(reader, writer.publish(hashed(image(1)))), image(1))
    assert counts(writer) == (3, 1)


@pytest.mark.faults
@pytest.mark.parametrize("at", [0, 8, 16, 24, 32, 60])
def test_a_damaged_block_is_not_listed_again(writer: Writer, reader: Reader, at: int) -> None:
    writer.publish(hashed(image(1)), readers=[])
    (kept,) = writer._arena._cache._blocks.values()
    writer._arena._segments[kept.segment].map[kept.offset + at] ^= 0x5A
    for _ in range(2):
        assert same(opened(reader, writer.publish(hashed(image(1)))), image(1))
    settled(writer, 1)


@pytest.mark.faults
def test_a_damaged_image_is_found_out_by_a_look_at_some_bytes(writer: Writer, reader: Reader) -> None:
    writer.publish(hashed(image(1)), readers=[])
    (kept,) = writer._arena._cache._blocks.values()
    start = kept.offset + BLOCK.size
    writer._arena._segments[kept.segment].map[start : start + IMAGE] = bytes(IMAGE)
    for _ in range(3):
        assert same(opened(reader, writer.publish(hashed(image(1)))), image(1))
    assert counts(writer) == (1, 3)


def test_a_segment_that_a_reader_refuses_is_not_listed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "STEP", MIB)
    with (
        Writer(1, capacity=8 * MIB, policy=Policy(wait=DEADLINE_SECONDS, cache_bytes=MIB)) as writer,
        Reader(writer.address, 0) as reader,
    ):
        writer.publish(hashed(image(1)), readers=[])
        reader._leases.report(0)
        until(lambda: writer.settle() == () and not writer._arena._blocks.usable(0), "the writer has heard of it")
        # The first may have to wait for a new segment, and is not kept then.
        for _ in range(3):
            handle = writer.publish(hashed(image(1)))
            assert handle.where.segment == 1
            assert same(opened(reader, handle), image(1))
        assert counts(writer)[0] in (1, 2)
        settled(writer, 1)


def test_closing_leaves_nothing_and_tensors_stay(reader: Reader) -> None:
    with Writer(1, capacity=MIB, policy=CACHED) as writer, Reader(writer.address, 0) as reader:
        held = opened(reader, writer.publish(hashed(image(1))))
        late = writer.publish(hashed(image(1)))
        writer.close()
        assert not names_of(writer.address)
        with pytest.raises(ClosedError):
            writer.publish(hashed(image(1)))
        assert same(held, image(1))
        assert same(opened(reader, late), image(1))
        del held


def test_a_block_is_given_up_by_the_cache_while_it_is_listed(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look-up and the grant, another thread's publish drives the block out of the cache."""
    writer.publish(hashed(image(0)), readers=[])
    grant = writer._arena.grant
    crowd = [hashed(image(seed)) for seed in range(1, 20)]

    def crowded(*args: Any) -> Any:
        monkeypatch.undo()
        for each in crowd:
            writer.publish(each, readers=[])
        return grant(*args)

    monkeypatch.setattr(writer._arena, "grant", crowded)
    handle = writer.publish(hashed(image(0)))
    assert counts(writer)[0] == 1
    for each in crowd:
        writer.publish(each, readers=[])
    assert same(opened(reader, handle), image(0))


# Many threads.


def test_two_threads_that_miss_at_once_both_publish(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    copy_to = Piece.copy_to

    def meet_and_copy(piece: Piece, memory: Any) -> None:
        both.wait(DEADLINE_SECONDS)
        copy_to(piece, memory)
        both.wait(DEADLINE_SECONDS)

    handles: list[Handle] = []
    with monkeypatch.context() as patch:
        patch.setattr(Piece, "copy_to", meet_and_copy)
        threads = [threading.Thread(target=lambda: handles.append(writer.publish(hashed(image(1))))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [same(opened(reader, handle), image(1)) for handle in handles] == [True, True]
    assert counts(writer) == (0, 2)
    settled(writer, 1)
    writer.publish(hashed(image(1)), readers=[])
    assert counts(writer) == (1, 2)


@pytest.mark.slow
def test_threads_that_publish_from_a_small_arena_never_send_another_image() -> None:
    policy = Policy(wait=DEADLINE_SECONDS, cache_bytes=3 * PAGES)
    images = [image(seed) for seed in range(6)]
    failures: list[BaseException] = []

    def work(writer: Writer, reader: Reader, seed: int) -> None:
        dice = random.Random(seed)
        held: list[tuple[Any, list[int]]] = []
        try:
            for _ in range(150):
                seeds = dice.sample(range(6), dice.randrange(1, 3))
                tensors = [images[each].clone() for each in seeds]
                for tensor in tensors:
                    if dice.random() < 0.8:
                        digest(tensor)
                got = opened(reader, writer.publish(tensors, readers=[seed]))
                assert all(same(one, images[each]) for one, each in zip(got, seeds, strict=True))
                if dice.random() < 0.3:
                    got[0].fill_(seed)
                elif dice.random() < 0.5:
                    held.append((got, seeds))
                while len(held) > 1:
                    kept, seeds = held.pop(0)
                    assert all(same(one, images[each]) for one, each in zip(kept, seeds, strict=True))
                    del kept
                del got
        except BaseException as error:
            failures.append(error)

    with Writer(3, capacity=room(14), policy=policy) as writer:
        readers = [Reader(writer.address, index) for index in range(3)]
        threads = [threading.Thread(target=partial(work, writer, each, seed)) for seed, each in enumerate(readers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert counts(writer)[0] > 50
        settled(writer, 3)
        for each in readers:
            each.close()


# Other processes.


@pytest.mark.multiprocess
def test_readers_in_other_processes_share_what_is_cached_and_not_their_writes(ranks: Ranks) -> None:
    with Writer(2, capacity=4 * MIB, policy=CACHED) as writer, Stage(ranks, 2) as (left, right):
        for puppet in (left, right):
            puppet("read", writer.address, puppet.number)
        value = partial(torch.full, (IMAGE,), dtype=torch.uint8)
        handles = [writer.publish(hashed(value(fill_value=7))) for _ in range(3)]
        assert counts(writer) == (2, 1)
        assert [left("open", key, handle) for key, handle in enumerate(handles)] == [{7}] * 3
        left("fill", 0, 1)
        left("fill", 2, 2)
        assert [left("check", key) for key in range(3)] == [{1}, {7}, {2}]
        assert [right("open", key, handle) for key, handle in enumerate(handles)] == [{7}] * 3
        for puppet in (left, right):
            for key in range(3):
                puppet("drop", key)
        settled(writer, 1)
        handle = writer.publish(hashed(value(fill_value=7)))
        assert left("open", 0, handle) == right("open", 0, handle) == {7}


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_reader_that_is_killed_leaves_the_cached_block_to_the_others(ranks: Ranks) -> None:
    policy = Policy(wait=DEADLINE_SECONDS, cache_bytes=MIB)
    with Writer(2, capacity=room(3), policy=policy) as writer, Stage(ranks, 2) as (killed, lives):
        for index, puppet in enumerate((killed, lives)):
            puppet("read", writer.address, index)
        value = partial(torch.full, (IMAGE,), dtype=torch.uint8)
        handles = [writer.publish(hashed(value(fill_value=7))) for _ in range(2)]
        assert [killed("open", key, handle) for key, handle in enumerate(handles)] == [{7}] * 2
        killed("fill", 0, 9)
        killed.kill()
        assert [lives("open", key, handle) for key, handle in enumerate(handles)] == [{7}] * 2
        for key in range(2):
            lives("drop", key)
        settled(writer, 1)
        assert lives("open", 0, writer.publish(hashed(value(fill_value=7)))) == {7}
        assert counts(writer) == (2, 1)
        for seed in range(5):
            assert lives("open", 1, writer.publish(hashed(value(fill_value=100 + seed)))) == {100 + seed}
        assert lives("check", 0) == {7}


@pytest.mark.multiprocess
@pytest.mark.slow
def test_readers_hold_and_write_while_images_come_again(ranks: Ranks) -> None:
    policy = Policy(wait=DEADLINE_SECONDS, cache_bytes=2 * MIB)
    with Writer(3, capacity=8 * MIB, policy=policy) as writer, Stage(ranks, 3) as puppets:
        for puppet in puppets:
            puppet("read", writer.address, puppet.number)
            puppet.pipe.send(("follow", puppet.number))
        dice, table = random.Random(11), pattern(0, 1 << 17)
        for _ in range(300):
            number = dice.randrange(1, 8)
            size = 20_000 * number
            message = {"number": number, "payload": hashed(pattern(number, size)), "table": hashed(table.clone())}
            handle = writer.publish(message)
            for puppet in puppets:
                puppet.pipe.send((number, size, handle))
        for puppet in puppets:
            puppet.pipe.send(None)
        assert [puppet.answer() for puppet in puppets] == [300] * 3
        assert counts(writer)[0] > 300


def _materialize_twice(rank: int) -> tuple[int, int, int]:
    policy = Policy(peers_hold_raw=False, cache_bytes=8 * MIB)
    with Broadcaster(policy=policy, capacity=32 * MIB) as group:
        for number in range(3):
            raw = {"mm_items": [{"modality": "IMAGE", "feature": image(1)}], "im_token_id": number}
            inputs = group.materialize(raw if rank == 0 else {}, MultimodalInputs.from_dict)
            assert inputs.im_token_id == number
            assert same(inputs.mm_items[0].feature, image(1))
            assert isinstance(inputs.mm_items[0].feature, torch.Tensor)
            inputs.mm_items[0].feature.zero_()
        stats = group.stats()
        return stats.cache_hits, stats.cache_misses, stats.bytes


@pytest.mark.multiprocess
def test_a_broadcaster_passes_its_policy_on(ranks: Ranks) -> None:
    first, second = ranks.run(2, _materialize_twice)
    assert first[:2] == (2, 1)
    assert second[:2] == (0, 0)
    assert first[2] >= 3 * IMAGE


# Everything at once, against a model.


@dataclass(eq=False)
class Held:
    """A tensor that a reader holds, under which of all opens, and what it must show."""

    reader: int
    lease: object
    tensor: torch.Tensor
    mirror: np.ndarray[Any, Any]


class Reused(RuleBasedStateMachine):
    """Few images, few places: what is published, held, written to, given up and published again is what it was.

    Blocks are placed in the order of the tensors' addresses, so that the same steps may find room or none: no rule has
    a precondition.
    """

    CAPACITY = 1 << 20
    BUDGET = 1 << 19
    SIZES = (70_000, IMAGE, 3 * 70_000)

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        gc.freeze()
        self.writer = Writer(2, capacity=self.CAPACITY, policy=Policy(wait=0, cache_bytes=self.BUDGET))
        self.readers = [Reader(self.writer.address, index) for index in range(2)]
        self.tensors: list[torch.Tensor] = []  # of the publisher, to be written to and published again
        self.sent: list[tuple[Handle, list[np.ndarray[Any, Any]], set[int]]] = []
        self.held: list[Held] = []

    @rule(
        picks=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.booleans()), min_size=1, max_size=3),
        again=st.lists(st.integers(0, 9), max_size=2),
    )
    def publish(self, picks: list[tuple[int, int, bool]], again: list[int]) -> None:
        tensors = [image(seed, self.SIZES[size]) for seed, size, _ in picks]
        for tensor, (_, _, is_hashed) in zip(tensors, picks, strict=True):
            if is_hashed:
                digest(tensor)
        self.tensors = (self.tensors + tensors)[-10:]
        tensors += [self.tensors[at % len(self.tensors)] for at in again]
        expected = [tensor.numpy().copy() for tensor in tensors]
        self.settle()
        try:
            self.sent.append((self.writer.publish(tensors), expected, {0, 1}))
        except ArenaFull:
            # Where nothing is leased, what the cache holds keeps nobody out.
            assert self.sent or self.held or sum(map(len, expected)) > self.CAPACITY - 4 * PAGE

    def settle(self) -> None:
        """Wait until the writer has heard of all that was given back."""
        gc.collect()
        expected = [
            sum(index in left for _, _, left in self.sent)
            + len({id(each.lease) for each in self.held if each.reader == index})
            for index in range(2)
        ]
        until(lambda: [each.held for each in self.writer.stats().leases] == expected, "all releases have arrived")

    @rule(which=st.integers(0, 9), at=st.integers(0, 69_999), rehash=st.booleans(), every=st.booleans())
    def rewrite(self, which: int, at: int, rehash: bool, every: bool) -> None:
        if not self.tensors:
            return
        tensor = self.tensors[which % len(self.tensors)]
        tensor[at : None if every else at + 1] += 1
        if rehash:
            digest(tensor)

    @rule(which=st.integers(0, 9), index=st.integers(0, 1), keep=st.integers(0, 3))
    def open(self, which: int, index: int, keep: int) -> None:
        if not self.sent:
            return
        handle, expected, left = self.sent[which % len(self.sent)]
        if index not in left:
            return
        left.discard(index)
        got, lease = opened(self.readers[index], handle), object()
        assert len(got) == len(expected)
        for number, (tensor, mirror) in enumerate(zip(got, expected, strict=True)):
            assert np.array_equal(tensor.numpy(), mirror)
            if keep >> number & 1:
                self.held.append(Held(index, lease, tensor, mirror.copy()))

    @rule(which=st.integers(0, 9), at=st.integers(0, 69_999), value=st.integers(0, 255))
    def write(self, which: int, at: int, value: int) -> None:
        if not self.held:
            return
        tensor = self.held[which % len(self.held)].tensor
        for each in self.held:
            if each.tensor is tensor:  # one tensor twice in a message
                each.mirror[at:] = value
        tensor[at:] = value

    @rule(which=st.integers(0, 9))
    def drop(self, which: int) -> None:
        if not self.held:
            return
        del self.held[which % len(self.held)]

    @rule(which=st.integers(0, 9))
    def withdraw(self, which: int) -> None:
        if not self.sent:
            return
        self.writer.withdraw(self.sent.pop(which % len(self.sent))[0])

    @invariant()
    def what_is_held_is_what_it_was(self) -> None:
        for each in self.held:
            assert np.array_equal(each.tensor.numpy(), each.mirror)

    @invariant()
    def the_cache_keeps_its_budget_and_its_claims(self) -> None:
        arena = self.writer._arena
        with arena._lock.free():
            blocks = list(arena._cache._blocks.values())
            assert sum(each.size for each in blocks) == arena._cache._size <= self.BUDGET
            for each in blocks:
                assert each.claims >= 1
                assert arena._blocks.at(each.segment, each.offset) is each

    def teardown(self) -> None:
        try:
            self.held.clear()
            for handle, _, _ in self.sent:
                self.writer.withdraw(handle)
            settled(self.writer, len(self.writer._arena._cache._blocks))
            # Nothing is held: the cache gives way to whatever fits the arena at all.
            handle = self.writer.publish(image(9, self.CAPACITY - 4 * PAGE))
            assert not self.writer._arena._cache._blocks
            self.writer.withdraw(handle)
            settled(self.writer, 0)
        finally:
            gc.unfreeze()
            for reader in self.readers:
                reader.close()
            self.writer.close()


TestReused = Reused.TestCase
TestReused.settings = settings(max_examples=30, stateful_step_count=40)
