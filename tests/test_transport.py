"""Writer and Reader in one process: what is published, opened, given back, refused; memory of `empty`; growth."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import math
import os
import pickle
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from shmcast import _segment, transport
from shmcast._layout import MAX_TICKETS, PAGE, Descriptor, round_up
from shmcast._segment import STEP
from shmcast._wire import Address, Handle
from shmcast.errors import ArenaFull, ClosedError, EncodeError, LayoutError, NotAllowed, ShmcastError, StaleHandle
from shmcast.metrics import ReaderLeases
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.support.codec import same
from tests.support.codec_types import Item, Kind, Pair
from tests.support.reuse import released

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
DEADLINE_SECONDS = 30.0
# A publish that finds no memory says so at once; tests that mean to wait pass a policy of their own.
AT_ONCE = Policy(wait=0)
PATIENT = Policy(wait=DEADLINE_SECONDS)
BIG = 1 << 17  # bytes of a tensor that is mapped, not copied, at open


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition()` holds; only a bug makes the deadline pass."""
    deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {DEADLINE_SECONDS:g} s: {what}")
        never.wait(0.001)


def settled(writer: Writer, blocks: int = 0) -> None:
    """Wait until the writer knows of no more than `blocks` live blocks, and check that it is just as many."""
    gc.collect()
    until(lambda: writer.stats().live_blocks <= blocks, f"{blocks} live blocks")
    assert writer.stats().live_blocks == blocks


def names_of(writer: Writer) -> list[str]:
    """What the writer has in /dev/shm."""
    return [name for name in os.listdir("/dev/shm") if writer.address.token.hex() in name]


def tensors_of(obj: object) -> list[torch.Tensor]:
    """`obj`, which is a list of tensors."""
    assert isinstance(obj, list)
    return obj


def error_of(use: Callable[[], object]) -> type[BaseException] | None:
    """What `use()` raises. Where an end is closed and gone before the assertion, a failure keeps no memory mapped."""
    try:
        use()
    except Exception as error:
        return type(error)
    return None


def big(value: int, size: int = BIG) -> torch.Tensor:
    """`size` bytes, each of them `value`."""
    return torch.full((size,), value, dtype=torch.uint8)


# pytest holds what a fixture gives until after the look for leftovers; a closed end keeps its control segment mapped.


@pytest.fixture
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    with Writer(2, capacity=4 * MIB, policy=AT_ONCE) as writer:
        yield writer
    request.node.funcargs.clear()


@pytest.fixture
def reader(writer: Writer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 0) as reader:
        yield reader
    request.node.funcargs.clear()


@pytest.fixture
def other(writer: Writer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 1) as reader:
        yield reader
    request.node.funcargs.clear()


# Publishing and opening.


def test_an_object_opens_as_it_was_published(writer: Writer, reader: Reader, other: Reader) -> None:
    obj = {
        "pixels": torch.randn(200, 300),
        "half": torch.randn(64, 1024).to(torch.bfloat16),
        "mask": torch.rand(7, 9) > 0.5,
        "strided": torch.arange(80_000).view(200, 400).T,
        "array": np.asfortranarray(np.arange(30_000, dtype=np.int16).reshape(100, 300)),
        "ids": list(range(20_000)),
        "blob": bytes(range(256)) * 400,
        "rest": [None, True, 1, 2.5, "text", (1, {2}), torch.empty(0, 3), torch.tensor(4.0)],
    }
    handle = writer.publish(obj)
    assert same(reader.open(handle), obj)
    assert same(other.open(handle), obj)


def test_tensors_that_share_memory_share_it_in_the_reader(writer: Writer, reader: Reader) -> None:
    parent = torch.arange(100_000)
    left, right = tensors_of(reader.open(writer.publish([parent[:60_000], parent[40_000:]])))
    left[50_000] = -1
    assert right[10_000] == -1


def test_the_published_tensor_may_change_at_once(writer: Writer, reader: Reader) -> None:
    tensor, array = big(1), np.ones(BIG)
    handle = writer.publish([tensor, array])
    tensor.fill_(2)
    array.fill(2)
    assert same(reader.open(handle), [big(1), np.ones(BIG)])


def test_an_address_and_a_handle_are_small_and_travel_by_pickle(writer: Writer, reader: Reader) -> None:
    sent = pickle.dumps(writer.publish(big(3), opens=65_535 // 32, readers=[0]))
    assert len(sent) <= 256
    handle = pickle.loads(sent)
    assert isinstance(handle, Handle)
    assert same(reader.open(handle), big(3))
    address = pickle.dumps(writer.address)
    assert len(address) <= 128
    assert pickle.loads(address) == writer.address


def test_a_handle_travels_as_bytes(writer: Writer, reader: Reader) -> None:
    assert same(reader.open(Handle.parse(bytes(writer.publish(big(3))))), big(3))


def test_only_the_readers_that_were_named_may_open(writer: Writer, reader: Reader, other: Reader) -> None:
    handle = writer.publish(big(4), readers=[1, 1])
    with pytest.raises(StaleHandle, match="not for reader 0"):
        reader.open(handle)
    assert same(other.open(handle), big(4))
    with pytest.raises(StaleHandle):  # named twice is named once
        other.open(handle)
    settled(writer)


def test_a_message_for_nobody_takes_no_memory(writer: Writer, reader: Reader) -> None:
    handle = writer.publish(big(4), readers=[])
    assert writer.stats().live_blocks == 0
    with pytest.raises(StaleHandle):
        reader.open(handle)


@pytest.mark.parametrize("readers", [[2], [-1], [0, 64]])
def test_a_reader_that_there_is_not_is_refused(writer: Writer, readers: list[int]) -> None:
    with pytest.raises(ValueError, match="readers 0 to 1"):
        writer.publish(1, readers=readers)
    assert writer.stats().live_blocks == 0


@pytest.mark.parametrize("opens", [0, -1, 65_536])
def test_a_count_of_opens_that_cannot_be_is_refused(writer: Writer, opens: int) -> None:
    with pytest.raises(ValueError, match="opens"):
        writer.publish(1, opens=opens)
    assert writer.stats().live_blocks == 0


def test_each_reader_opens_as_often_as_it_may(writer: Writer, reader: Reader, other: Reader) -> None:
    handle = writer.publish(big(5), opens=3)
    kept = [one.open(handle) for _ in range(3) for one in (reader, other)]
    assert all(same(tensor, big(5)) for tensor in kept)
    for one in (reader, other):
        with pytest.raises(StaleHandle, match="used up its 3 leases"):
            one.open(handle)
    assert [held.held for held in writer.stats().leases] == [3, 3]
    kept.clear()
    settled(writer)


def test_classes_go_through_only_where_both_ends_allow_them() -> None:
    item = Item(Kind.IMAGE, feature=big(1))
    with (
        Writer(2, capacity=4 * MIB, allow=[Item, Kind]) as writer,
        Reader(writer.address, 0, allow=["tests"]) as knows,
        Reader(writer.address, 1) as ignorant,
    ):
        handle = writer.publish(item)
        opened = knows.open(handle)
        assert isinstance(opened, Item)
        assert opened.modality is Kind.IMAGE
        assert same(opened.feature, big(1))
        with pytest.raises(NotAllowed, match="Item"):
            ignorant.open(handle)
        released(ignorant)  # what could not be decoded is not held
        with pytest.raises(NotAllowed, match="Pair"):
            writer.publish(Pair(1))
        del opened
        settled(writer)


@pytest.mark.parametrize("obj", [lambda: 0, [torch.ones(3, requires_grad=True)], {"a": threading.Lock()}])
def test_what_cannot_be_flattened_takes_no_memory(writer: Writer, obj: object) -> None:
    with pytest.raises(EncodeError):
        writer.publish([big(1), obj])
    assert writer.stats() == dataclasses.replace(writer.stats(), messages=0, live_blocks=0)


@pytest.mark.parametrize("readers", [0, -1, 65])
def test_a_writer_serves_1_to_64_readers(readers: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        Writer(readers)


def test_a_writer_of_64_readers(request: pytest.FixtureRequest) -> None:
    with Writer(64, capacity=MIB) as writer:
        handle = writer.publish(big(9))
        with Reader(writer.address, 63) as last:
            assert same(last.open(handle), big(9))


def test_a_capacity_that_holds_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity"):
        Writer(1, capacity=PAGE)


@pytest.mark.parametrize("index", [-1, 2, 64])
def test_an_index_that_there_is_not_is_refused(writer: Writer, index: int) -> None:
    with pytest.raises(ValueError, match="readers 0 to 1"):
        Reader(writer.address, index)


def test_an_isolation_that_there_is_not_is_refused(writer: Writer) -> None:
    with pytest.raises(ValueError, match="isolation"):
        Reader(writer.address, 0, isolation="none")  # type: ignore[arg-type]


def test_an_index_is_used_once_ever(writer: Writer, reader: Reader) -> None:
    with pytest.raises(StaleHandle, match="index is used once"):
        Reader(writer.address, 0)
    reader.close()
    until(lambda: writer.stats().leases[0].alive is False, "the writer knows that its reader left")
    with pytest.raises(StaleHandle, match="index is used once"):
        Reader(writer.address, 0)
    assert Address.parse(bytes(writer.address)) == writer.address


# Handles that are stale.


def test_withdrawn_before_it_was_opened(writer: Writer, reader: Reader, other: Reader) -> None:
    handle = writer.publish(big(1), opens=2)
    writer.withdraw(handle)
    assert writer.stats().live_blocks == 0
    for one in (reader, other):
        with pytest.raises(StaleHandle):
            one.open(handle)
    writer.withdraw(handle)


def test_withdrawn_after_it_was_opened(writer: Writer, reader: Reader, other: Reader) -> None:
    handle = writer.publish(big(1), opens=2)
    kept = reader.open(handle)
    writer.withdraw(handle)
    for one in (reader, other):
        with pytest.raises(StaleHandle, match="withdrawn"):
            one.open(handle)
    assert [held.held for held in writer.stats().leases] == [1, 0]
    for _ in range(8):
        writer.withdraw(writer.publish(big(2)))
    assert same(kept, big(1))
    del kept
    settled(writer)


def test_a_withdrawn_message_of_another_use_is_left_alone(writer: Writer, reader: Reader) -> None:
    first = writer.publish(big(1), readers=[0])
    writer.withdraw(first)
    second = writer.publish(big(2), readers=[0])
    assert second.where.offset == first.where.offset
    writer.withdraw(first)
    assert same(reader.open(second), big(2))


def test_a_message_of_another_writer_cannot_be_withdrawn() -> None:
    with Writer(1, capacity=MIB) as writer, Writer(1, capacity=MIB) as foreign, Reader(writer.address, 0) as reader:
        mine, theirs = writer.publish(big(1)), foreign.publish(big(2))
        assert (mine.where, mine.ticket) == (theirs.where, theirs.ticket)
        with pytest.raises(LayoutError, match="another writer"):
            writer.withdraw(theirs)
        assert same(reader.open(mine), big(1))


def test_discarded(writer: Writer, reader: Reader, other: Reader) -> None:
    handle = writer.publish(big(1), opens=3)
    kept = reader.open(handle)
    reader.discard(handle)
    with pytest.raises(StaleHandle):
        reader.open(handle)
    reader.discard(handle)
    until(lambda: [held.held for held in writer.stats().leases] == [1, 3], "two leases came back")
    other.discard(handle)
    settled(writer, 1)
    assert same(kept, big(1))
    del kept
    settled(writer)
    reader.discard(handle)  # of a block that is gone


def test_discarded_below(writer: Writer, reader: Reader) -> None:
    old, opened, last = (writer.publish(big(i), readers=[0]) for i in range(3))
    kept = reader.open(opened)
    new = writer.publish(big(3), readers=[0])
    reader.discard_below(last)
    for handle in (old, last):
        with pytest.raises(StaleHandle):
            reader.open(handle)
    settled(writer, 2)
    assert same(reader.open(new), big(3))
    assert same(kept, big(1))


def test_released_and_in_another_use(writer: Writer, reader: Reader) -> None:
    first = writer.publish(big(1), readers=[0], opens=2)
    assert same(reader.open(first), big(1))
    reader.discard(first)
    settled(writer)
    second = writer.publish(big(2), readers=[0])
    assert second.where.offset == first.where.offset
    for handle in (first, replace(first, ticket=second.ticket)):
        with pytest.raises(StaleHandle):
            reader.open(handle)
    assert same(reader.open(second), big(2))


def test_released_and_free(writer: Writer, reader: Reader) -> None:
    handle = writer.publish(big(1), readers=[0])
    assert same(reader.open(handle), big(1))
    settled(writer)
    with pytest.raises(StaleHandle):
        reader.open(handle)


def test_withdrawn_and_in_the_middle_of_another_message_now(writer: Writer, reader: Reader) -> None:
    handles = [writer.publish(big(1), readers=[0]) for _ in range(4)]
    for handle in handles:
        writer.withdraw(handle)
    covers = writer.publish(big(2, MIB), readers=[0])
    assert covers.where.offset == handles[0].where.offset
    for handle in handles:
        with pytest.raises(StaleHandle):
            reader.open(handle)
        reader.discard(handle)
    assert same(reader.open(covers), big(2, MIB))
    settled(writer)
    assert writer.stats().free_bytes == 4 * MIB - PAGE  # no reader has called the segment bad
    assert same(reader.open(writer.publish(big(3), readers=[0])), big(3))


def test_of_another_writer() -> None:
    with (
        Writer(1, capacity=MIB) as writer,
        Writer(1, capacity=MIB) as foreign,
        Reader(writer.address, 0) as reader,
        Reader(foreign.address, 0) as theirs,
    ):
        mine, handle = writer.publish(big(1)), foreign.publish(big(2))
        assert mine.where == handle.where
        with pytest.raises(LayoutError, match="another writer"):
            reader.open(handle)
        with pytest.raises(LayoutError, match="another writer"):
            reader.discard(handle)
        assert same(reader.open(mine), big(1))
        assert same(theirs.open(handle), big(2))


def _forged(**changes: Any) -> Callable[[Handle], Handle]:
    return lambda handle: replace(handle, **changes)


def _moved(**changes: Callable[[int], int]) -> Callable[[Handle], Handle]:
    def forge(handle: Handle) -> Handle:
        where = {name: change(getattr(handle.where, name)) for name, change in changes.items()}
        return replace(handle, where=handle.where._replace(**where))

    return forge


HOSTILE = {
    "segment that is not there": _moved(segment=lambda n: n + 1),
    "segment that cannot be": _moved(segment=lambda n: 2**32 - 1),
    "offset of the segment's header": _moved(offset=lambda n: 0),
    "offset of no block": _moved(offset=lambda n: n + PAGE),
    "offset off a page": _moved(offset=lambda n: n + 64),
    "offset past the segment": _moved(offset=lambda n: n + (1 << 40)),
    "offset past everything": _moved(offset=lambda n: 2**64 - PAGE),
    "length of nothing": _moved(length=lambda n: 0),
    "length of a header": _moved(length=lambda n: 64),
    "length one less": _moved(length=lambda n: n - 1),
    "length one more": _moved(length=lambda n: n + 1),
    "length past the segment": _moved(length=lambda n: 1 << 40),
    "length past everything": _moved(length=lambda n: 2**64 - 1),
    "generation before": _moved(generation=lambda n: n - 1),
    "generation to come": _moved(generation=lambda n: n + 1),
    "nobody's": _forged(readers=0),
    "never to be opened": _forged(opens=0),
    "foreign token": _forged(token=bytes(16)),
    "foreign rank": _forged(rank=7),
}


@pytest.mark.parametrize("forge", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_handle_is_refused_and_harms_nothing(
    writer: Writer, reader: Reader, forge: Callable[[Handle], Handle]
) -> None:
    handle = writer.publish(big(1), readers=[0], opens=2)
    with pytest.raises((StaleHandle, LayoutError)):
        reader.open(forge(handle))
    released(reader)
    assert same(reader.open(handle), big(1))
    reader.discard(handle)
    settled(writer)
    assert same(reader.open(writer.publish(big(2), readers=[0])), big(2))


@pytest.mark.parametrize("ticket", [0, 2**63])
def test_a_forged_ticket_harms_nobody_else(writer: Writer, reader: Reader, other: Reader, ticket: int) -> None:
    handle = writer.publish(big(1))
    assert same(reader.open(replace(handle, ticket=ticket)), big(1))
    released(reader)
    assert same(other.open(handle), big(1))
    for i in range(4):
        assert same(other.open(writer.publish(big(i), readers=[1])), big(i))


def test_a_forged_ticket_past_64_bits_is_no_handle(writer: Writer) -> None:
    with pytest.raises(LayoutError, match="ticket"):
        replace(writer.publish(big(1)), ticket=2**64 - 1)


def test_a_forged_ticket_past_64_bits_does_not_end_the_readers_thread(writer: Writer, other: Reader) -> None:
    handle = writer.publish(big(1))
    with contextlib.suppress(StaleHandle, LayoutError):
        other.discard(replace(handle, ticket=2**64 - 1))
    until(lambda: not other._leases._unsent or not _threads("shmcast-reader-1"), "the thread has seen it")
    assert _threads("shmcast-reader-1")


def test_a_forged_length_does_not_undo_writes_to_a_neighbour() -> None:
    with Writer(1, capacity=2 * MIB) as writer, Reader(writer.address, 0) as reader:
        handle, neighbour = writer.publish(big(1)), writer.publish(big(2))
        mine = reader.open(neighbour)
        assert isinstance(mine, torch.Tensor)
        mine.fill_(3)
        error = error_of(partial(reader.open, _moved(length=lambda n: MIB)(handle)))
        until(lambda: reader.stats().leases_held == 1, "the refused lease is over")
        values = set(mine.tolist())
    assert error in (StaleHandle, LayoutError)
    assert values == {3}


@pytest.mark.parametrize("at", [0, 4, 8, 24, 30, 41, 50, 60, 70, 77])
def test_a_damaged_handle_is_no_handle(writer: Writer, at: int) -> None:
    raw = bytearray(bytes(writer.publish(1)))
    raw[at] ^= 0x10
    with pytest.raises(LayoutError):
        Handle.parse(bytes(raw))


# Closing.


def test_a_closed_writer(writer: Writer, reader: Reader) -> None:
    handle = writer.publish(big(1))
    lived = reader.writer_lives
    writer.close()
    writer.close()
    uses = (lambda: writer.publish(1), lambda: writer.empty((2,)), writer.stats, writer.settle)
    assert [error_of(use) for use in uses] == [ClosedError] * 4
    writer.withdraw(handle)
    assert (lived, reader.writer_lives) == (True, False)
    assert names_of(writer) == []


def test_a_closed_reader(writer: Writer, reader: Reader) -> None:
    handle = writer.publish(big(1))
    reader.close()
    for _ in range(2):  # at once, and when its thread has gone
        with pytest.raises(ClosedError):
            reader.open(handle)
        with pytest.raises(ClosedError):
            reader.discard(handle)
        assert reader.stats().leases_held == 0
        reader.close()
        until(lambda: not _threads("shmcast-reader-0"), "its thread has ended")
    assert not reader.writer_lives


def test_a_closed_reader_discards_nothing_below() -> None:
    with Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        handle = writer.publish(big(1))
    until(lambda: not _threads("shmcast-reader-0"), "its thread has ended")
    error = error_of(partial(reader.discard_below, handle))
    del writer, reader
    assert error is ClosedError


def test_a_reader_that_closes_gives_back_what_it_has_not_opened(writer: Writer, reader: Reader, other: Reader) -> None:
    handles = [writer.publish(big(i), opens=2) for i in range(3)]
    opened = other.open(handles[1])
    reader.close()
    until(lambda: writer.stats().leases[0].held == 0, "all leases of the closed reader came back")
    assert writer.stats().leases[0].alive is False
    assert writer.stats().leases[1].held == 6
    assert writer.publish(big(9)).readers == 0b10  # no more leases for who has left
    assert same(opened, big(1))


def test_the_ends_close_when_their_block_is_left_by_an_error() -> None:
    with pytest.raises(KeyError), Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        raise KeyError
    with pytest.raises(ClosedError):
        writer.publish(1)
    with pytest.raises(ClosedError):
        reader.open(Handle(writer.address.token, 0, Descriptor(0, PAGE, 64, 1), 1, 1, 1))


def test_closed_by_another_thread_during_a_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = transport.copy_pieces

    def during_copy(use: Callable[[], object]) -> None:
        def copy_and_use(*args: Any) -> None:
            copy(*args)
            thread = threading.Thread(target=use)
            thread.start()
            thread.join()

        monkeypatch.setattr(transport, "copy_pieces", copy_and_use)

    writer = Writer(1, capacity=MIB)
    during_copy(writer.close)
    error = error_of(partial(writer.publish, big(1)))
    monkeypatch.undo()
    del writer
    assert error is ClosedError


def test_closed_ends_keep_nothing_mapped() -> None:
    with Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        token = writer.address.token.hex()
    until(lambda: not _threads("shmcast-reader-0"), "the reader's thread has ended")
    mapped = Path("/proc/self/maps").read_text()
    del writer, reader
    assert token not in mapped


def _threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


# No memory.


def test_a_full_arena_says_who_holds_it(writer: Writer, reader: Reader) -> None:
    kept = [reader.open(writer.publish(big(i, MIB), readers=[0])) for i in range(3)]
    before = writer.stats()
    with pytest.raises(ArenaFull) as info:
        writer.publish(big(9, MIB))
    text = str(info.value)
    assert f"{before.free_bytes} of {before.segment_bytes} bytes free" in text
    assert f"the largest hole has {before.largest_free_block}" in text
    assert "within 0 s in the arena of rank 0: 3 blocks live" in text
    assert "reader 0 holds 3" in text
    assert "reader 1" not in text
    assert f"the capacity of {4 * MIB} bytes is used up" in text
    after = writer.stats()
    assert (after.live_blocks, after.free_bytes, after.messages) == (3, before.free_bytes, 3)
    for i, tensor in enumerate(kept):
        assert same(tensor, big(i, MIB))


def test_a_full_arena_where_nobody_holds_a_lease(writer: Writer) -> None:
    with pytest.raises(ArenaFull, match="no lease is held"):
        writer.publish(big(1, 5 * MIB))
    with pytest.raises(ArenaFull, match="no lease is held"):
        writer.empty((5 * MIB,), torch.uint8)
    assert writer.stats().live_blocks == 0


def test_memory_that_came_back_is_used_again(writer: Writer, reader: Reader) -> None:
    kept = [reader.open(writer.publish(big(i, MIB), readers=[0])) for i in range(3)]
    with pytest.raises(ArenaFull):
        writer.publish(big(9, MIB))
    del kept[1]
    released_one = lambda: reader.stats().leases_held == 2  # noqa: E731
    until(released_one, "one lease came back")
    again = reader.open(writer.publish(big(7, MIB), readers=[0]))
    assert [int(tensor[0]) for tensor in (*kept, again)] == [0, 2, 7]  # type: ignore[index]


def test_the_whole_capacity_can_be_used() -> None:
    with Writer(1, capacity=MIB, policy=AT_ONCE) as writer:
        assert writer.stats().segment_bytes == MIB
        assert writer.stats().free_bytes == writer.stats().largest_free_block == MIB - PAGE
        tensor = writer.empty((MIB - PAGE - 64,), torch.uint8)
        tensor.fill_(1)
        assert writer.stats().free_bytes == writer.stats().largest_free_block == 0
        with pytest.raises(ArenaFull):
            writer.publish(0)


def test_a_publish_waits_as_long_as_its_policy_says() -> None:
    with Writer(1, capacity=MIB, policy=PATIENT) as writer, Reader(writer.address, 0) as reader:
        kept = [reader.open(writer.publish(big(1, 600 << 10)))]
        got: list[object] = []
        thread = threading.Thread(target=lambda: got.append(reader.open(writer.publish(big(2, 600 << 10)))))
        thread.start()
        until(lambda: writer.stats().messages == 1 and thread.is_alive(), "the publish is on its way")
        assert same(kept.pop(), big(1, 600 << 10))
        thread.join()
        assert same(got.pop(), big(2, 600 << 10))


def test_a_reader_holds_a_bounded_number_of_leases(writer: Writer, reader: Reader) -> None:
    """L7: undrained entries never exceed the ring, so no reader is given more tickets than that allows."""
    handle = writer.publish(1, readers=[0], opens=MAX_TICKETS)
    with pytest.raises(ArenaFull, match=f"holds {MAX_TICKETS} leases, {MAX_TICKETS} are the most"):
        writer.publish(1, readers=[0])
    writer.publish(1, readers=[1])
    writer.withdraw(handle)
    writer.publish(1, readers=[0])


# Memory of empty().


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (7,), (3, 40_000), (2, 0, 5)])
def test_a_tensor_of_empty_is_like_one_of_torch(
    writer: Writer, reader: Reader, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = writer.empty(shape, dtype)
    assert (tensor.shape, tensor.dtype, tensor.stride()) == (shape, dtype, torch.empty(shape).stride())
    assert tensor.data_ptr() % 64 == 0
    tensor.copy_(torch.arange(math.prod(shape)).view(shape).to(dtype))
    assert same(reader.open(writer.publish(tensor, readers=[0])), tensor)


def test_a_tensor_of_empty_is_listed_not_copied(writer: Writer, reader: Reader) -> None:
    tensor = writer.empty((MIB,), torch.uint8).fill_(1)
    before = writer.stats()
    opened = reader.open(writer.publish(tensor, readers=[0]))
    assert isinstance(opened, torch.Tensor)
    after = writer.stats()
    assert (before.live_blocks, after.live_blocks) == (1, 2)
    assert before.free_bytes - after.free_bytes == PAGE  # the skeleton's
    # A write past the contract, by a road that no version counts, shows that it is the same memory.
    tensor.numpy()[[0, -1]] = 9
    assert opened[0] == opened[-1] == 9
    assert opened[1] == 1


def test_views_of_a_tensor_of_empty_are_not_copied(writer: Writer, reader: Reader) -> None:
    tensor = writer.empty((500, 1000), torch.int16)
    tensor.copy_(torch.arange(500_000).view(500, 1000))
    free = writer.stats().free_bytes
    views = [tensor[3:400, 7:], tensor.T, tensor[100].view(torch.int8), tensor.numpy()[::2], tensor.view(-1)[1:]]
    for view in views:
        handle = writer.publish(view, readers=[0])
        assert free - writer.stats().free_bytes <= 2 * PAGE
        assert same(reader.open(handle), view)
        released(reader)
    left, right = tensors_of(reader.open(writer.publish([tensor[:300], tensor[200:]], readers=[0])))
    left[250] = 0
    assert not right[50].any()


def test_a_tensor_of_empty_is_published_again(writer: Writer, reader: Reader, other: Reader) -> None:
    tensor = writer.empty((MIB,), torch.uint8).fill_(1)
    handles = [writer.publish([tensor, i]) for i in range(3)]
    kept = [one.open(handle) for handle in handles for one in (reader, other)]
    assert all(same(obj[0], tensor) for obj in kept)  # type: ignore[index]
    assert writer.stats().live_blocks == 4
    del kept[1:]
    settled(writer, 2)
    assert same(kept, [[tensor, 0]])


def test_memory_of_empty_comes_back_with_the_last_that_holds_it(writer: Writer, reader: Reader) -> None:
    tensor = writer.empty((MIB,), torch.uint8).fill_(1)
    view = tensor[5:100]
    del tensor
    settled(writer, 1)
    opened = reader.open(writer.publish(view.view(5, 19), readers=[0]))
    assert same(opened, torch.ones(5, 19, dtype=torch.uint8))
    settled(writer, 1)
    del view
    settled(writer)


def test_memory_of_empty_lives_while_a_reader_holds_it(writer: Writer, reader: Reader) -> None:
    tensor = writer.empty((MIB,), torch.uint8).fill_(1)
    handle = writer.publish(tensor, readers=[0])
    del tensor
    settled(writer, 2)
    kept = reader.open(handle)
    for i in range(2, 10):
        writer.withdraw(writer.publish(big(i, MIB), readers=[0]))
    assert same(kept, big(1, MIB))
    del kept
    settled(writer)


def test_memory_of_empty_that_was_never_published(writer: Writer) -> None:
    for _ in range(10):
        tensor = writer.empty((3 * MIB,), torch.uint8)
        assert writer.stats().live_blocks == 1
        del tensor
    settled(writer)


def test_empty_and_copied_tensors_in_one_message(writer: Writer, reader: Reader) -> None:
    one, two = writer.empty((100_000,)).fill_(1), writer.empty((50_000,), torch.int64).fill_(2)
    obj = {"one": one, "copied": torch.randn(40_000), "two": two, "small": torch.arange(3), "part": one[5:9]}
    before = writer.stats()
    opened = reader.open(writer.publish(obj, readers=[0]))
    assert same(opened, obj)
    after = writer.stats()
    assert after.live_blocks - before.live_blocks == 1
    assert before.free_bytes - after.free_bytes == round_up(4 * 40_000, PAGE)
    kept = opened["copied"]  # type: ignore[index]
    del opened
    assert writer.stats().leases[0].held == 1
    del one, two, obj
    settled(writer, 3)  # one lease for all that the message lies in
    del kept
    settled(writer)


def test_memory_of_another_writers_empty_is_copied(writer: Writer, reader: Reader) -> None:
    with Writer(1, capacity=MIB) as foreign:
        tensor = foreign.empty((BIG,), torch.uint8).fill_(1)
        handle = writer.publish(tensor, readers=[0])
        tensor.fill_(2)
        assert same(reader.open(handle), big(1))


def test_a_write_while_readers_hold_it_is_refused_at_the_next_publish(writer: Writer, reader: Reader) -> None:
    tensor = writer.empty((MIB,), torch.uint8).fill_(1)
    writer.publish(tensor, readers=[0])
    writer.publish(tensor, readers=[0])  # not written to: fine
    tensor[7] = 2
    with pytest.raises(EncodeError, match="was written to after it was published"):
        writer.publish([tensor[:5]], readers=[0])
    assert writer.stats().live_blocks == 3


def test_a_write_when_no_reader_holds_it_is_allowed(writer: Writer, reader: Reader) -> None:
    tensor = writer.empty((MIB,), torch.uint8).fill_(1)
    for value in range(2, 6):
        handle = writer.publish(tensor, readers=[0])
        opened = reader.open(handle)
        opened.add_(1)  # type: ignore[attr-defined]
        del opened
        settled(writer, 1)
        tensor.fill_(value)
    assert same(reader.open(writer.publish(tensor, readers=[0])), big(5, MIB))
    settled(writer, 1)
    writer.withdraw(writer.publish(tensor, readers=[0]))
    tensor.fill_(8)
    writer.publish(tensor, readers=[0])


def test_a_write_right_after_the_last_release_is_allowed() -> None:
    with Writer(1, capacity=4 * MIB, policy=AT_ONCE) as writer, Reader(writer.address, 0) as reader:
        until(lambda: not names_of(writer), "no name is left: from here on the writer looks only when it is called")
        tensor = writer.empty((MIB,), torch.uint8).fill_(1)
        assert same(reader.open(writer.publish(tensor)), big(1, MIB))
        released(reader)
        tensor.fill_(2)
        assert same(reader.open(writer.publish(tensor)), big(2, MIB))


def test_tensors_of_empty_made_in_inference_mode(writer: Writer, reader: Reader) -> None:
    with torch.inference_mode():
        tensor = writer.empty((MIB,), torch.uint8).fill_(1)
        handle = writer.publish(tensor, readers=[0])
        kept = reader.open(handle)
    assert same(kept, big(1, MIB))
    writer.publish(tensor, readers=[0])
    del tensor
    settled(writer, 3)


@pytest.mark.parametrize("shape", [(-1,), (-2, -3), (4, -1), (0, -1)])
def test_a_negative_size_is_refused(writer: Writer, shape: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        writer.empty(shape, torch.uint8)
    settled(writer)


def test_a_tensor_of_empty_outlives_its_writer() -> None:
    with Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        tensor = writer.empty((BIG,), torch.uint8).fill_(1)
        opened = reader.open(writer.publish(tensor))
    assert same(tensor.add_(1), big(2))
    assert isinstance(opened, torch.Tensor)


def test_a_publish_that_fails_leaves_the_tensor_of_empty_as_it_was(writer: Writer, reader: Reader) -> None:
    tensor = writer.empty((MIB,), torch.uint8).fill_(1)
    with pytest.raises(ArenaFull):
        writer.publish([tensor, big(2, 4 * MIB)])
    with pytest.raises(EncodeError):
        writer.publish([tensor, threading.Lock()])
    assert writer.stats().live_blocks == 1
    tensor.fill_(3)
    assert same(reader.open(writer.publish(tensor)), big(3, MIB))
    del tensor
    writer.withdraw(writer.publish(0))


# Segments.


def _fill_first_segment(writer: Writer) -> torch.Tensor:
    return writer.empty((writer.stats().largest_free_block - 64,), torch.uint8)


def test_names_go_when_every_reader_has_come(writer: Writer, reader: Reader) -> None:
    assert len(names_of(writer)) == 2 + 2 * 2  # segments, and two semaphores a reader
    with Reader(writer.address, 1):
        until(lambda: not names_of(writer), "no name is left, without any call of the writer")


def test_names_go_with_a_writer_whose_readers_never_came() -> None:
    with Writer(3, capacity=MIB) as writer:
        assert len(names_of(writer)) == 2 + 2 * 3
    assert names_of(writer) == []


def test_the_arena_grows_by_segments_and_unlinks_them() -> None:
    with Writer(1, capacity=STEP + 2 * MIB, policy=PATIENT) as writer, Reader(writer.address, 0) as reader:
        until(lambda: not names_of(writer), "the first segments have no name")
        filled = _fill_first_segment(writer)
        handles = [writer.publish(big(i, 500 << 10)) for i in range(3)]
        assert [handle.where.segment for handle in handles] == [1, 1, 1]
        assert writer.stats().segment_bytes == STEP + 2 * MIB
        until(lambda: not names_of(writer), "the new segment has no name")
        assert all(same(reader.open(handle), big(i, 500 << 10)) for i, handle in enumerate(handles))
        del filled
        assert writer.publish(0).where.segment == 0


def test_growth_ends_at_the_capacity() -> None:
    with Writer(1, capacity=STEP + MIB, policy=AT_ONCE) as writer:
        filled = _fill_first_segment(writer)
        until_here = writer.publish(big(1, 500 << 10))
        with pytest.raises(ArenaFull, match=f"capacity of {STEP + MIB} bytes is used up"):
            writer.publish(big(2, 600 << 10))
        assert writer.stats().segment_bytes == STEP + MIB
        with Reader(writer.address, 0) as late:  # maps both
            assert same(late.open(until_here), big(1, 500 << 10))
        assert filled.numel() < STEP


def test_growth_does_not_wait_for_who_has_left() -> None:
    with Writer(2, capacity=STEP + MIB, policy=PATIENT) as writer, Reader(writer.address, 1) as stays:
        with Reader(writer.address, 0):
            pass
        filled = _fill_first_segment(writer)
        assert same(stays.open(writer.publish(big(1))), big(1))
        assert filled.numel() < STEP


def test_a_segment_that_a_reader_cannot_map_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError("no mapping today")

    with Writer(1, capacity=STEP + MIB, policy=AT_ONCE) as writer, Reader(writer.address, 0) as reader:
        until(lambda: not names_of(writer), "the first segments have no name")
        filled = _fill_first_segment(writer)
        monkeypatch.setattr(_segment, "attach", refuse)
        with caplog.at_level(logging.WARNING, "shmcast"), pytest.raises(ArenaFull):
            writer.publish(big(1))
        until(lambda: "no mapping today" in caplog.text, "the reader says why")
        until(lambda: writer.settle() == () and not names_of(writer), "a segment that nobody will use has no name")
        with pytest.raises(ArenaFull):
            writer.publish(big(1))
        del filled
        assert same(reader.open(writer.publish(big(2))), big(2))
    caplog.clear()  # a record holds the exception, and that the reader


def test_a_segment_that_a_reader_has_mapped_and_reported_is_not_used(writer: Writer, reader: Reader) -> None:
    handle = writer.publish(big(1), readers=[0])
    reader._leases.report(0)
    until(lambda: writer.stats().free_bytes == 0, "the writer has heard it")
    with pytest.raises(ArenaFull):
        writer.publish(big(2), readers=[0])
    assert same(reader.open(handle), big(1))
    settled(writer)
    assert writer.stats().free_bytes == 0


def test_an_idle_writer_unlinks_a_new_segment_too() -> None:
    def somebody_looks(writer: Writer, reader: Reader) -> bool:
        until(lambda: not names_of(writer) and not _threads("shmcast-unlink"), "the first segments have no name")
        filled = _fill_first_segment(writer)
        with reader._leases._lock, pytest.raises(ArenaFull, match=r"segment 1 waits for readers \[0\] to map it"):
            writer.publish(big(1))
        assert filled.numel() < STEP
        return not names_of(writer) or bool(_threads("shmcast-unlink"))

    with Writer(1, capacity=STEP + MIB, policy=AT_ONCE) as writer, Reader(writer.address, 0) as reader:
        looks = somebody_looks(writer, reader)
    del writer, reader
    assert looks


# Counters.


def test_the_writers_stats(writer: Writer, reader: Reader) -> None:
    assert [held.alive for held in writer.stats().leases] == [True, None]
    assert writer.stats().leases[1] == ReaderLeases(1, None, 0, 0, None)
    handles = [writer.publish([big(1), 0], opens=opens) for opens in (1, 2)]
    kept = reader.open(handles[1])
    stats = writer.stats()
    assert (stats.messages, stats.bytes) == (2, 2 * BIG)
    assert dict(stats.routes) == {"shm": (2, 2 * BIG)}
    assert dict(stats.fallbacks) == {}
    assert stats.live_blocks == 2
    assert stats.segment_bytes == 4 * MIB
    assert stats.free_bytes == 4 * MIB - PAGE - 2 * (BIG + PAGE)
    assert [(held.held, held.opened) for held in stats.leases] == [(3, 1), (3, 0)]
    oldest = stats.leases[0].oldest
    assert oldest is not None
    assert oldest >= 0
    assert stats.leases_held == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.messages = 0  # type: ignore[misc]
    with pytest.raises(TypeError):
        stats.routes["shm"] = None  # type: ignore[index]
    del kept


def test_the_readers_stats(writer: Writer, reader: Reader) -> None:
    assert reader.stats().messages == 0
    handle = writer.publish([big(1), 0], opens=3)
    first, second = reader.open(handle), reader.open(handle)
    stats = reader.stats()
    assert (stats.messages, stats.bytes, stats.leases_held) == (2, 2 * BIG, 2)
    with pytest.raises(StaleHandle):
        reader.open(replace(handle, readers=2))
    assert reader.stats().messages == 2
    del first, second
    released(reader)


def test_both_ends_count_the_same_bytes() -> None:
    with Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        reader.open(writer.publish(torch.ones(BIG + 64, dtype=torch.uint8)[1:]))
        counts = reader.stats().bytes, writer.stats().bytes
    del writer, reader
    # With the byte before the piece, which keeps it where it was in its line.
    assert counts == (BIG + 64, BIG + 64)


def test_what_is_raised_is_ours() -> None:
    for error in (ArenaFull, ClosedError, EncodeError, LayoutError, NotAllowed, StaleHandle):
        assert issubclass(error, ShmcastError)
