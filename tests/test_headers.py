"""The ring of headers: each reader gets every header once and in order, or knows that it missed it, and nobody waits.

Behind a header stands a message; whoever stays a whole ring behind loses what it has not opened, and nothing else.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch.distributed as dist

from shmcast import _arena, _headers, _lease
from shmcast._layout import HEADER_SLOTS
from shmcast._wire import HEADER, Address, Handle
from shmcast.errors import ArenaFull, ClosedError, LayoutError, PeerDied, ShmcastError, StaleHandle
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.support.ranks import Died
from tests.support.reuse import overwrite_what_is_free, released
from tests.test_lifetime import AT_ONCE, big, tensor_of, until, values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.ranks import Ranks

MIB = 1 << 20
ROOM = 4 * MIB
SIZE = 70_000
SLOTS = 8
LONG = 60.0
MISSED = None


def header(number: int, handle: Handle | None = None) -> bytes:
    """256 bytes that say which header this is, and which message it speaks of."""
    return (number.to_bytes(8, "little") + (bytes(handle) if handle else b"")).ljust(HEADER.size, b"\xee")


def number_of(raw: bytes | None) -> int | None:
    """Which header this is; None for one that was missed."""
    if raw is None:
        return MISSED
    number = int.from_bytes(raw[:8], "little")
    assert raw in (header(number), header(number, handle_of(raw)))
    return number


def handle_of(raw: bytes) -> Handle | None:
    """The message that a header speaks of."""
    return Handle.parse(raw[8:88]) if raw[8:9] != b"\xee" else None


def everything(reader: Reader) -> list[int | None]:
    """What a reader has to take, until there is nothing left."""
    got = []
    while True:
        try:
            got.append(number_of(reader.next_header(0)))
        except TimeoutError:
            return got


def post(writer: Writer, numbers: range) -> list[tuple[int, ...]]:
    """Announce each; whom each skipped."""
    return [writer.announce(header(number)) for number in numbers]


def waiting(reader: Reader) -> threading.Event:
    """Set once the reader is about to sleep until a header comes."""
    event = threading.Event()
    headers = reader._leases.headers()
    take = headers._take

    def about_to(timeout: float, *, sure: bool) -> Any:
        if not sure:
            event.set()
        return take(timeout, sure=sure)

    headers._take = about_to  # type: ignore[method-assign]
    return event


@pytest.fixture
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    with Writer(2, capacity=ROOM, policy=AT_ONCE, slots=SLOTS) as writer:
        yield writer
    request.node.funcargs.clear()


@contextmanager
def one_of_each(**how: Any) -> Iterator[tuple[Writer, Reader]]:
    """A writer and its only reader."""
    how = {"capacity": ROOM, "policy": AT_ONCE, "slots": SLOTS, **how}
    with Writer(1, **how) as writer, Reader(writer.address, 0) as reader:
        yield writer, reader


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


# Every header, once, in order.


@pytest.mark.parametrize("pace", [1, 2, SLOTS // 2 - 1])
def test_headers_arrive_once_and_in_order(writer: Writer, reader: Reader, other: Reader, pace: int) -> None:
    got: list[int | None] = []
    for number in range(10 * SLOTS):
        assert writer.announce(header(number)) == ()
        if number % pace == 0:
            got += everything(reader)
        assert everything(other) == [number]
    assert got + everything(reader) == [*range(10 * SLOTS)]
    assert everything(reader) == everything(other) == []


def test_a_ring_takes_as_many_headers_as_it_has_slots_from_the_start(writer: Writer, reader: Reader) -> None:
    assert post(writer, range(SLOTS)) == [()] * SLOTS
    assert everything(reader) == [*range(SLOTS)]


def test_a_reader_that_comes_late_gets_them_all(writer: Writer, other: Reader) -> None:
    post(writer, range(5))
    with Reader(writer.address, 0) as late:
        assert everything(late) == [*range(5)]
    assert everything(other) == [*range(5)]


def test_a_reader_that_waits_is_woken(writer: Writer, reader: Reader) -> None:
    got: list[bytes | None] = []
    thread = threading.Thread(target=lambda: got.append(reader.next_header(LONG)))
    at_wait = waiting(reader)
    thread.start()
    assert at_wait.wait(LONG)
    writer.announce(header(0))
    thread.join()
    assert got == [header(0)]


def test_no_header_in_time(writer: Writer, reader: Reader) -> None:
    for timeout in (0.0, 1e-3, -1.0):
        with pytest.raises(TimeoutError):
            reader.next_header(timeout)
    writer.announce(header(0))
    assert everything(reader) == [0]


def test_without_a_ring() -> None:
    with Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        with pytest.raises(ShmcastError, match="no slots for headers"):
            writer.announce(header(0))
        with pytest.raises(LayoutError, match="no headers"):
            reader.next_header(0)


def read_all(address: Address, index: int, count: int) -> list[int | None]:
    with Reader(address, index) as reader:
        return [number_of(reader.next_header(LONG)) for _ in range(count)]


@pytest.mark.multiprocess
@pytest.mark.parametrize("slots", [2, SLOTS, HEADER_SLOTS])
def test_between_processes_a_writer_that_waits_loses_nothing(ranks: Ranks, slots: int) -> None:
    with Writer(3, capacity=MIB, policy=Policy(wait=LONG), slots=slots) as writer:
        reading = ranks.start_each(read_all, [(writer.address, index, 200) for index in range(3)])
        until(lambda: all(held.alive for held in writer.stats().leases), "all readers are there")
        assert set(post(writer, range(200))) == {()}
        assert reading.results() == [[*range(200)]] * 3


# One that stays a whole ring behind.


@pytest.mark.parametrize("count", [SLOTS + 1, SLOTS + 3, 2 * SLOTS, 10 * SLOTS + 5])
def test_L10_who_is_overrun_sees_what_it_missed_and_then_the_newest(
    writer: Writer, reader: Reader, other: Reader, count: int
) -> None:
    for number in range(count):
        assert writer.announce(header(number)) == ((0,) if number >= SLOTS else ())
        assert everything(other) == [number]
    assert everything(reader) == [MISSED] * (count - SLOTS) + [*range(count - SLOTS, count)]
    assert post(writer, range(count, count + 3)) == [()] * 3
    assert everything(reader) == [*range(count, count + 3)]


def test_what_the_skipped_had_not_opened_is_taken_back(writer: Writer, reader: Reader, other: Reader) -> None:
    handles = []
    for number in range(SLOTS + 4):
        handles.append(writer.publish(big(number, SIZE)))
        writer.announce(header(number, handles[-1]))
        assert everything(other) == [number]
        other.discard(handles[-1])
    until(lambda: not writer.stats().leases[1].held, "the other reader has given everything back")
    stats = writer.stats()
    assert stats.leases[0].held == stats.live_blocks == SLOTS
    overwrite_what_is_free(writer, 0xAB, ROOM)
    for number, handle in enumerate(handles):
        if number < 4:
            with pytest.raises(StaleHandle):
                reader.open(handle)
        else:
            assert values(reader.open(handle)) == {number}
    released(reader)
    until(lambda: not writer.stats().live_blocks, "all memory is back")
    assert writer.stats().leases[0].held == 0


def test_what_the_skipped_had_opened_it_keeps() -> None:
    with one_of_each() as (writer, reader):
        handle = writer.publish(big(0x5A, SIZE), opens=2)
        kept = tensor_of(reader.open(handle))
        assert [each for number in range(3 * SLOTS) for each in writer.announce(header(number))] == [0] * 2 * SLOTS
        assert writer.stats().leases[0].held == 1
        overwrite_what_is_free(writer, 0xAB, ROOM)
        assert values(kept) == {0x5A}
        with pytest.raises(StaleHandle):
            reader.open(handle)
        del kept
        released(reader)
        until(lambda: not writer.stats().live_blocks, "the block is back")


def test_a_stale_message_is_no_reason_to_report_its_segment() -> None:
    with one_of_each() as (writer, reader):
        first = writer.publish(big(1))
        post(writer, range(2 * SLOTS))
        with pytest.raises(StaleHandle):
            reader.fetch(first, from_header=True)
        last = writer.publish(2)
        assert reader.open(last) == 2
        until(lambda: not writer.stats().leases[0].held, "the writer has heard what the reader said before that")
        assert values(reader.open(writer.publish(big(3)))) == {3}


def test_L9_a_reader_that_opens_while_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its OPENED is there before the writer looks for it, the floor before it looks at the floor: it opens nothing."""
    with one_of_each() as (writer, reader):
        handle = writer.publish(big(1))
        post(writer, range(SLOTS))

        def between() -> None:
            assert writer.announce(header(SLOTS)) == (0,)
            assert writer.stats().leases[0].opened == 1, "the writer does not take back what it sees opened"

        with monkeypatch.context() as patch:
            patch.setattr(_lease, "fence", between)
            with pytest.raises(StaleHandle, match="taken it back"):
                reader.open(handle)
        until(lambda: not writer.stats().live_blocks, "the reader gives back what it may not read")


def test_L9_a_writer_that_skips_while_a_reader_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor is stored, and the writer has not looked yet: who opens now sees the floor."""
    with one_of_each() as (writer, reader):
        handle = writer.publish(big(1))
        post(writer, range(SLOTS))
        told: list[str] = []

        def between() -> None:
            with pytest.raises(StaleHandle, match="taken it back"):
                reader.open(handle)
            told.append("stale")

        with monkeypatch.context() as patch:
            patch.setattr(_arena, "fence", between)
            assert writer.announce(header(SLOTS)) == (0,)
        assert told == ["stale"]
        until(lambda: not writer.stats().live_blocks, "the block is back")


def race(address: Address, wanted: int) -> Counter[str]:
    """Open what headers speak of, some of it late, until each outcome was seen often."""
    seen: Counter[str] = Counter()
    with Reader(address, 0) as reader:
        while min(seen["opened"], seen["stale"]) < wanted:
            # So that some are overrun between their header and their open.
            taken = [reader.next_header(LONG) for _ in range(1 + seen.total() % 4)]
            for raw in taken:
                seen[outcome_of(reader, raw)] += 1
    return seen


def outcome_of(reader: Reader, raw: bytes | None) -> str:
    if raw is None:
        return "missed"
    try:
        opened = tensor_of(reader.open(handle_of(raw)))  # type: ignore[arg-type]
    except StaleHandle:
        return "stale"
    value = int.from_bytes(raw[:8], "little") % 251
    return "opened" if all((opened == value).all() for _ in range(3)) else "wrong"


@pytest.mark.multiprocess
@pytest.mark.parametrize("slots", [2])
def test_a_revoked_message_is_never_another_ones_bytes(ranks: Ranks, slots: int) -> None:
    with Writer(1, capacity=4 * MIB, policy=AT_ONCE, slots=slots) as writer:
        racing = ranks.start_each(race, [(writer.address, 40)])
        until(lambda: writer.stats().leases[0].alive is True, "the reader is there")
        number = 0
        while writer.stats().leases[0].alive:
            with suppress(ArenaFull):
                writer.announce(header(number, writer.publish(big(number % 251, SIZE))))
                number += 1
        (seen,) = racing.results()
    assert seen["wrong"] == 0


# Whom the writer waits for.


class Clock:
    """Time that only sleeping lets pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps = 0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps += 1


def test_one_wait_and_none_again_before_the_reader_has_caught_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(_headers, "time", clock)
    with (
        Writer(2, capacity=MIB, policy=Policy(wait=5.0), slots=SLOTS) as writer,
        Reader(writer.address, 0) as slow,
        Reader(writer.address, 1) as other,
    ):
        slept = []
        for number in range(3 * SLOTS):
            before = clock.now
            assert writer.announce(header(number)) == ((0,) if number >= SLOTS else ())
            slept.append(clock.now - before)
            other._leases.headers()._ready.acquire(0)  # type: ignore[union-attr]
        assert [number for number, seconds in enumerate(slept) if seconds] == [SLOTS]
        assert slept[SLOTS] == pytest.approx(5.0, abs=2 * _headers.LONGEST_PAUSE)
        monkeypatch.undo()
        assert everything(slow)[-1] == 3 * SLOTS - 1
        monkeypatch.setattr(_headers, "time", clock)
        before = clock.now
        post(writer, range(3 * SLOTS, 4 * SLOTS))
        assert clock.now - before == pytest.approx(5.0, abs=2 * _headers.LONGEST_PAUSE), "it had caught up"


def test_a_reader_that_left_or_died_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(2, capacity=MIB, policy=Policy(wait=LONG), slots=SLOTS) as writer:
        with Reader(writer.address, 0), Reader(writer.address, 1) as dead:
            post(writer, range(SLOTS))
            dead._leases._seat.release()
        until(lambda: not any(held.alive for held in writer.stats().leases), "the writer knows")
        monkeypatch.setattr("shmcast._headers.time.sleep", lambda seconds: pytest.fail("it waited"))
        assert set(post(writer, range(SLOTS, 5 * SLOTS))) == {()}


def test_a_reader_that_dies_while_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_of_each(policy=Policy(wait=LONG)) as (writer, reader):
        post(writer, range(SLOTS))
        sleeps: list[float] = []

        def sleep(seconds: float) -> None:
            sleeps.append(seconds)
            assert len(sleeps) == 1, "it waited for the dead"
            reader._leases._seat.release()

        with monkeypatch.context() as patch:
            patch.setattr("shmcast._headers.time.sleep", sleep)
            post(writer, range(SLOTS, 2 * SLOTS))
        assert len(sleeps) == 1


def read_to(address: Address, last: int) -> list[int | None]:
    got: list[int | None] = []
    with Reader(address, 0) as reader:
        while last not in got:
            got.append(number_of(reader.next_header(LONG)))
    return got


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_stopped_reader_is_skipped_and_goes_on(ranks: Ranks) -> None:
    with Writer(1, capacity=MIB, policy=Policy(wait=0.01), slots=SLOTS) as writer:
        reading = ranks.start_each(read_to, [(writer.address, 20)])
        (pid,) = reading.pids
        until(lambda: writer.stats().leases[0].alive is True, "the reader is there")
        os.kill(pid, signal.SIGSTOP)
        until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "the reader is stopped")
        assert post(writer, range(21)) == [()] * SLOTS + [(0,)] * (21 - SLOTS)
        assert writer.stats().leases[0].alive is True, "a stopped process is not dead"
        os.kill(pid, signal.SIGCONT)
        assert reading.results() == [[MISSED] * (21 - SLOTS) + [*range(21 - SLOTS, 21)]]


# The end.


def lose_the_writer(rank: int, count: int) -> list[Any]:
    told: list[Any] = [None]
    if rank == 0:
        writer = Writer(1, capacity=ROOM, slots=SLOTS)
        dist.broadcast_object_list([writer.address])
        dist.barrier()
        until(lambda: not writer.settle() and not writer._arena.named, "all names are unlinked")
        for number in range(count):
            writer.announce(header(number, writer.publish(big(number, SIZE))))
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.broadcast_object_list(told)
    with Reader(told[0], 0) as reader:
        dist.barrier()
        dist.barrier()
        until(lambda: not reader.writer_lives, "the writer is gone")
        got: list[Any] = []
        while True:
            try:
                raw = reader.next_header(LONG)
            except PeerDied:
                break
            assert raw is not None
            got.append((number_of(raw), values(reader.open(handle_of(raw)))))  # type: ignore[arg-type]
        return got


@pytest.mark.multiprocess
@pytest.mark.faults
@pytest.mark.parametrize("count", [0, 1, SLOTS])
def test_what_a_dead_writer_has_posted_is_delivered(ranks: Ranks, count: int) -> None:
    dead, got = ranks.run(2, lose_the_writer, count, dies={0})
    assert dead == Died(-signal.SIGKILL)
    assert got == [(number, {number}) for number in range(count)]


def test_a_closed_writer_is_a_gone_one(writer: Writer, reader: Reader) -> None:
    post(writer, range(3))
    writer.close()
    assert [number_of(reader.next_header(LONG)) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(PeerDied):
        reader.next_header(LONG)
    with pytest.raises(ClosedError):
        writer.announce(header(3))
