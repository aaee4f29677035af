"""The writer's memory, its readers driven by hand: what is reserved, granted, taken back, grown, unlinked."""

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import posix_ipc
import pytest

from shmcast import _arena, _layout, _names, _room, _segment
from shmcast._arena import Arena
from shmcast._blocks import Block
from shmcast._layout import (
    MAX_TICKETS,
    NEVER,
    PAGE,
    BlockKind,
    EntryKind,
    Kind,
    Message,
    SegmentHeader,
    Stale,
    parse_block,
    parse_message,
    plan_message,
    write_block,
    write_message,
    write_word,
)
from shmcast._peers import WRITER_BYTE, Seat, is_taken
from shmcast._ring import Outbox
from shmcast._room import Room, default_capacity
from shmcast._tickets import Held
from shmcast._wire import Address, Handle
from shmcast.errors import ArenaFull, ClosedError, LayoutError, ShmcastError

SHM = Path("/dev/shm")
STEP = 8 * PAGE


class Hand:
    """A reader without threads or tensors: it says what the test tells it to."""

    def __init__(self, address: Address, index: int, *maps: int) -> None:
        expected = SegmentHeader(Kind.CONTROL, address.token, address.rank, 0, 0, address.readers)
        self.index = index
        self.ring = _segment.attach_ring(address.control, expected, index)
        self.seat = Seat(self.ring.fd, index)
        self.posted = posix_ipc.Semaphore(address.posted(index))
        self.wake = posix_ipc.Semaphore(address.wake(index))
        self.outbox = Outbox(self.ring.map, self.ring.header.entries, self.posted)
        write_word(self.ring.map, 0, 1)
        self.mapped(*maps)

    def mapped(self, *segments: int) -> None:
        for segment in segments:
            assert self.outbox.post(EntryKind.MAPPED, segment)

    def bad(self, segment: int) -> None:
        assert self.outbox.post(EntryKind.BAD, segment)

    def opened(self, handle: Handle, lease: int = 0) -> None:
        assert self.outbox.post(EntryKind.OPENED, handle.ticket_of(self.index, lease))

    def released(self, handle: Handle, lease: int = 0) -> None:
        assert self.outbox.post(EntryKind.RELEASED, handle.ticket_of(self.index, lease))

    def left(self) -> None:
        assert self.outbox.post(EntryKind.DISCARDED, NEVER)

    def woken(self) -> int:
        return int(self.wake.value)

    def die(self) -> None:
        self.seat.release()

    def close(self) -> None:
        self.seat.release()
        self.posted.close()
        self.wake.close()
        self.ring.drop()
        del self.ring, self.outbox


def idle_of(arena: Arena) -> threading.Thread:
    assert arena._names._idle is not None
    return arena._names._idle


class Stage:
    """Makes arenas of small segments and readers by hand, and clears all of them away."""

    def __init__(self) -> None:
        self.arenas: list[Arena] = []
        self.hands: list[Hand] = []

    def arena(self, readers: int = 1, capacity: int = STEP, **how: Any) -> Arena:
        self.arenas.append(Arena(readers, capacity, 0, **how))
        return self.arenas[-1]

    def hand(self, arena: Arena, index: int = 0, *maps: int) -> Hand:
        """A reader that came and mapped these segments; without any, the first."""
        self.hands.append(Hand(arena.address, index, *(maps or (0,))))
        arena.drain()
        return self.hands[-1]

    def close(self) -> None:
        for hand in self.hands:
            hand.close()
        for arena in self.arenas:
            arena.close()
            idle_of(arena).join()
        self.hands.clear()
        self.arenas.clear()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """Segments of `STEP` bytes, and no thread that drains at its own pace."""
    monkeypatch.setattr(_arena, "STEP", STEP)
    monkeypatch.setattr(_names, "IDLE_POLLS", 0)
    made = Stage()
    yield made
    made.close()


def names(arena: Arena) -> list[str]:
    """What of this arena has a name in /dev/shm."""
    stem = arena.address.stem[1:]
    return sorted(entry.split(stem)[1] for entry in os.listdir(SHM) if f"{stem}-" in entry)


def publish(arena: Arena, *readers: int, pages: int = 1, opens: int = 1, listed: tuple[Block, ...] = ()) -> Handle:
    """A message in `pages` pages, as a writer does it."""
    block = arena.reserve(pages * PAGE, 0.0, readers, opens)
    memory = arena.mapping(block)
    message = Message(b"stream", tuple(one.where for one in listed), ())
    assert plan_message(6, len(listed), []).length <= block.length
    write_message(memory, block.generation, block.length, message, block.offset)
    handle = arena.grant(block, listed, readers, opens)
    arena.free(block)
    return handle


def view(arena: Arena, handle: Handle) -> bytes:
    memory = arena._segments[handle.where.segment].map
    return memory[handle.where.offset : handle.where.offset + handle.where.length]


def live(arena: Arena) -> int:
    arena.drain()
    return arena.usage()[0]


def full(arena: Arena, length: int = PAGE, wait: float = 0.0, readers: tuple[int, ...] = (), opens: int = 0) -> str:
    """The text of the `ArenaFull` that reserving `length` bytes raises."""
    with pytest.raises(ArenaFull) as caught:
        arena.reserve(length, wait, readers, opens)
    return str(caught.value)


# --- a new arena


def test_a_new_arena_has_a_control_segment_its_semaphores_and_one_segment(stage: Stage) -> None:
    arena = stage.arena(readers=2)
    assert names(arena) == ["-0", "-c", "-p0", "-p1", "-w0", "-w1"]
    assert {entry.stat().st_mode & 0o7777 for entry in SHM.iterdir() if arena.address.stem[1:] in entry.name} == {0o600}
    assert arena.usage() == (0, STEP - PAGE, STEP - PAGE, STEP)
    assert arena.named == 2
    assert arena.alive() == (None, None)
    assert arena.held() == (Held(0, 0, None),) * 2


def test_two_arenas_share_nothing(stage: Stage) -> None:
    one, two = stage.arena(), stage.arena()
    assert one.address.token != two.address.token
    one.close()
    assert names(one) == []
    assert len(names(two)) == 4


def test_the_writer_holds_its_lock_until_it_closes(stage: Stage) -> None:
    arena = stage.arena()
    hand = stage.hand(arena)
    assert is_taken(hand.ring.fd, WRITER_BYTE)
    arena.close()
    assert not is_taken(hand.ring.fd, WRITER_BYTE)


@pytest.mark.parametrize(("capacity", "size"), [(2 * PAGE, 2 * PAGE), (3 * PAGE + 5, 3 * PAGE), (5 * STEP, STEP)])
def test_the_first_segment_is_a_step_or_the_capacity(stage: Stage, capacity: int, size: int) -> None:
    assert stage.arena(capacity=capacity).usage()[3] == size


def test_the_default_capacity_is_a_share_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, writers, expected in (
        (400 << 20, 1, 100 << 20),
        (400 << 20, 4, 25 << 20),
        (1 << 40, 1, 2 << 30),
        (0, 1, 2 * PAGE),
    ):
        monkeypatch.setattr(_room, "room", lambda free=free: Room(free, "test"))
        assert default_capacity(writers) == expected


def test_an_arena_without_a_capacity_takes_the_default(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_room, "room", lambda: Room(12 * PAGE, "test"))
    arena = Arena(1, None, 0)
    stage.arenas.append(arena)
    assert (arena.capacity, arena.usage()[3]) == (3 * PAGE, 3 * PAGE)


class Nth:
    """Fails at the n-th call."""

    def __init__(self, real: Callable[..., Any], n: int) -> None:
        self.real = real
        self.left = n

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise OSError(28, "No space left on device")
        return self.real(*args, **kwargs)


def created_with_a_fault(owner: Any, what: str, n: int) -> bool:
    """Whether an arena for two readers was created although call `n` of `what` fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, what, Nth(getattr(owner, what), n))
        try:
            arena = Arena(2, STEP, 0)
        except (OSError, ArenaFull):
            return False
    arena.close()
    idle_of(arena).join()
    return True


@pytest.mark.faults
@pytest.mark.parametrize(
    ("owner", "what", "calls"), [(_segment, "create", 2), (_arena, "Seat", 1)], ids=["segment", "seat"]
)
def test_a_creation_that_fails_anywhere_leaves_nothing(stage: Stage, owner: Any, what: str, calls: int) -> None:
    # What is left of those that fail, the look after each test finds.
    outcomes = [created_with_a_fault(owner, what, n) for n in range(1, calls + 2)]
    assert outcomes == [False] * calls + [True]


def mapped_semaphores() -> int:
    return Path("/proc/self/maps").read_text().count("/sem.")


@pytest.mark.faults
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_semaphore_that_cannot_be_made_leaves_nothing(stage: Stage, n: int) -> None:
    real = posix_ipc.Semaphore
    made: list[str] = []

    def semaphore(name: str, *args: Any, **kwargs: Any) -> posix_ipc.Semaphore:
        if len(made) + 1 == n:
            raise OSError(28, "No space left on device")
        made.append(name)
        return real(name, *args, **kwargs)

    before = mapped_semaphores()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(posix_ipc, "Semaphore", semaphore)
        with pytest.raises(OSError, match="No space left"):
            Arena(2, STEP, 0)
    assert len(made) == n - 1
    # posix_ipc does not unmap what nobody closes.
    assert mapped_semaphores() == before
    assert not any((SHM / f"sem.{name[1:]}").exists() for name in made)


# --- blocks and leases


def test_a_block_is_free_when_its_last_claim_is_given_up(stage: Stage) -> None:
    arena = stage.arena()
    block = arena.reserve(2 * PAGE, 0.0)
    assert (block.segment, block.offset, block.claims, live(arena)) == (0, PAGE, 1, 1)
    arena.free(block)
    assert live(arena) == 0


def test_a_block_that_a_finalizer_gave_up_is_free_at_the_next_reserve(stage: Stage) -> None:
    arena = stage.arena(capacity=2 * PAGE)
    arena.expire(arena.reserve(PAGE, 0.0))
    assert arena.usage()[0] == 1
    assert arena.reserve(PAGE, 0.0).generation == 2


def test_a_message_lives_until_every_lease_has_ended(stage: Stage) -> None:
    arena = stage.arena(readers=2)
    one, two = stage.hand(arena, 0), stage.hand(arena, 1)
    handle = publish(arena, 0, 1, opens=2)
    assert (handle.readers, handle.opens, live(arena)) == (0b11, 2, 1)
    for hand, lease in ((one, 0), (two, 1), (one, 1)):
        hand.opened(handle, lease)
        hand.released(handle, lease)
        assert live(arena) == 1
    two.released(handle, 0)
    assert live(arena) == 0


def test_listed_blocks_live_as_long_as_the_message(stage: Stage) -> None:
    arena = stage.arena()
    hand = stage.hand(arena)
    payload = arena.reserve(PAGE, 0.0)
    write_block(arena.mapping(payload), payload.generation, payload.length, BlockKind.PAYLOAD, base=payload.offset)
    first, second = (publish(arena, 0, listed=(payload,)) for _ in range(2))
    arena.expire(payload)
    assert live(arena) == 3
    hand.released(first)
    assert live(arena) == 2
    hand.released(second)
    assert live(arena) == 0


def test_each_message_that_lists_a_block_stamps_it(stage: Stage) -> None:
    arena = stage.arena()
    payload = arena.reserve(PAGE, 0.0)
    memory = arena.mapping(payload)
    write_block(memory, payload.generation, payload.length, BlockKind.PAYLOAD, base=payload.offset)
    for count in range(3):
        assert memory[payload.offset + 28] == count
        handle = publish(arena, 0, listed=(payload,))
        assert memory[handle.where.offset + 28] == 0


def test_a_block_is_leased_while_a_reader_holds_it(stage: Stage) -> None:
    arena = stage.arena()
    hand = stage.hand(arena)
    payload = arena.reserve(PAGE, 0.0)
    write_block(arena.mapping(payload), payload.generation, payload.length, BlockKind.PAYLOAD, base=payload.offset)
    assert not arena.is_leased(payload)
    handle = publish(arena, 0, listed=(payload,))
    assert arena.is_leased(payload)
    hand.released(handle)
    assert not arena.is_leased(payload)


def test_words_that_are_false_free_nothing(stage: Stage) -> None:
    arena = stage.arena(readers=2)
    one, two = stage.hand(arena, 0), stage.hand(arena, 1)
    first, handle = publish(arena, 0, 1), publish(arena, 0, 1)
    for hand in (one, two):
        hand.released(first)
    one.released(first)
    one.outbox.post(EntryKind.RELEASED, handle.ticket_of(1, 0))
    one.outbox.post(EntryKind.RELEASED, 2**63)
    one.outbox.post(EntryKind.MAPPED, 99)
    one.outbox.post(EntryKind.BAD, 99)
    one.outbox.post(EntryKind.DISCARDED, 0)
    assert live(arena) == 1
    assert arena.held() == (Held(1, 0, arena.held()[0].since),) * 2


def test_only_the_named_readers_get_leases(stage: Stage) -> None:
    arena = stage.arena(readers=3)
    handle = publish(arena, 2)
    assert handle.readers == 0b100
    assert [held.leases for held in arena.held()] == [0, 0, 1]


def test_the_clock_tells_since_when_a_lease_is_held(stage: Stage) -> None:
    now = [5.0]
    arena = stage.arena(clock=lambda: now[0])
    hand = stage.hand(arena)
    handle = publish(arena, 0)
    now[0] = 7.0
    publish(arena, 0)
    assert arena.held() == (Held(2, 0, 5.0),)
    hand.released(handle)
    arena.drain()
    assert arena.held() == (Held(1, 0, 7.0),)


# --- withdraw


def test_withdraw_takes_back_what_nobody_opened(stage: Stage) -> None:
    arena = stage.arena(readers=2)
    one = stage.hand(arena, 0)
    handle = publish(arena, 0, 1)
    one.opened(handle)
    arena.withdraw(handle)
    assert arena.held()[0].leases == 1
    assert arena.held()[1].leases == 0
    with pytest.raises(Stale, match="withdrawn"):
        parse_message(view(arena, handle), handle.where.generation)
    assert live(arena) == 1
    one.released(handle)
    assert live(arena) == 0


def test_withdraw_hears_an_open_that_was_posted_before_it(stage: Stage) -> None:
    arena = stage.arena()
    hand = stage.hand(arena)
    handle = publish(arena, 0)
    # Posted, and not yet drained: the fence and the drain in withdraw must find it.
    hand.opened(handle)
    arena.withdraw(handle)
    assert (arena.usage()[0], arena.held()[0].opened) == (1, 1)


def test_withdraw_marks_then_fences_then_listens(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dekker: without a full fence between the mark and the look at the rings, both sides could miss each other."""
    arena = stage.arena()
    order: list[str] = []

    def noting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*args: Any) -> Any:
            order.append(name)
            return real(*args)

        monkeypatch.setattr(owner, name, noted)

    handle = publish(arena, 0)
    for owner, name in ((_layout, "mark_withdrawn"), (_arena, "fence"), (arena, "_read_all")):
        noting(owner, name)
    arena.withdraw(handle)
    assert order == ["mark_withdrawn", "fence", "_read_all"]


def test_L4_an_open_after_the_withdrawal_finds_no_ticket(stage: Stage) -> None:
    arena = stage.arena()
    hand = stage.hand(arena)
    handle = publish(arena, 0)
    arena.withdraw(handle)
    hand.opened(handle)
    hand.released(handle)
    assert live(arena) == 0
    again = publish(arena, 0)
    assert (again.where.offset, again.where.generation) == (handle.where.offset, handle.where.generation + 1)
    with pytest.raises(Stale, match="at generation"):
        parse_message(view(arena, handle), handle.where.generation)
    assert parse_message(view(arena, again), again.where.generation).stream == b"stream"


@pytest.mark.parametrize("how", ["released", "another use", "again", "foreign", "forged"])
def test_a_late_withdrawal_hurts_nobody(stage: Stage, how: str) -> None:
    arena = stage.arena()
    hand = stage.hand(arena)
    handle = publish(arena, 0)
    if how == "again":
        hand.opened(handle)
        arena.withdraw(handle)
    elif how == "foreign":
        where = handle.where._replace(offset=handle.where.offset + PAGE)
        handle = Handle(handle.token, handle.rank, where, handle.ticket, 1, 1)
    elif how == "forged":
        where = handle.where._replace(generation=handle.where.generation + 1)
        handle = Handle(handle.token, handle.rank, where, handle.ticket, 1, 1)
    else:
        hand.released(handle)
        arena.drain()
    current = publish(arena, 0) if how == "another use" else None
    before, leases = live(arena), arena.held()
    arena.withdraw(handle)
    assert (live(arena), arena.held()) == (before, leases)
    if current:
        assert parse_message(view(arena, current), current.where.generation)


@pytest.mark.parametrize("change", [{"token": bytes(16)}, {"rank": 7}])
def test_a_handle_of_another_writer_is_an_error(stage: Stage, change: dict[str, Any]) -> None:
    arena = stage.arena()
    handle = publish(arena, 0)
    with pytest.raises(LayoutError, match="a handle of another writer"):
        arena.withdraw(dataclasses.replace(handle, **change))
    assert live(arena) == 1


def test_a_withdrawn_message_does_not_spoil_its_listed_blocks(stage: Stage) -> None:
    arena = stage.arena()
    stage.hand(arena)
    payload = arena.reserve(PAGE, 0.0)
    memory = arena.mapping(payload)
    write_block(memory, payload.generation, PAGE, BlockKind.PAYLOAD, base=payload.offset)
    arena.withdraw(publish(arena, 0, listed=(payload,)))
    assert payload.claims == 1
    whole = memory[payload.offset : payload.offset + PAGE]
    assert parse_block(whole, payload.generation, BlockKind.PAYLOAD) == b""


# --- reserve: drain, grow, reclaim, wait


def test_reserve_drains_before_it_grows(stage: Stage) -> None:
    arena = stage.arena(capacity=4 * STEP)
    hand = stage.hand(arena)
    for _ in range(50):
        handle = publish(arena, 0, pages=7)
        assert (handle.where.segment, handle.where.offset) == (0, PAGE)
        hand.released(handle)
    assert arena.usage()[3] == STEP


class Clock:
    """Stands in for `time` in the arena: sleeping passes time and calls back."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.then: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)
        self.then()


@pytest.fixture
def clock(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(_arena, "time", made)
    return made


def test_reserve_goes_drain_grow_reclaim_wait(stage: Stage, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = stage.arena(capacity=2 * PAGE)
    block, order = arena.reserve(PAGE, 0.0), list[str]()

    def noting(name: str) -> None:
        real = getattr(arena, name)

        def noted(*args: Any) -> Any:
            order.append(name.strip("_"))
            return real(*args)

        monkeypatch.setattr(arena, name, noted)

    for name in ("_try", "_grow", "reclaim"):
        noting(name)
    clock.then = lambda: order.append("sleep")
    full(arena, wait=1e-5)
    assert order[:5] == ["try", "grow", "reclaim", "try", "sleep"]
    assert set(order[5:]) <= {"reclaim", "try", "sleep"}
    order.clear()
    arena.free(block)
    arena.reserve(PAGE, 1.0)
    assert order == ["try"]


def test_reserve_waits_for_a_reader(stage: Stage, clock: Clock) -> None:
    arena = stage.arena(capacity=2 * PAGE)
    hand = stage.hand(arena)
    handle = publish(arena, 0)
    clock.then = lambda: hand.released(handle) if len(clock.pauses) == 3 else None
    assert arena.reserve(PAGE, 1.0).generation == 2
    assert len(clock.pauses) == 3


def test_the_wait_is_bounded_and_its_pauses_grow(stage: Stage, clock: Clock) -> None:
    arena = stage.arena(capacity=2 * PAGE)
    arena.reserve(PAGE, 0.0)
    full(arena, wait=0.25)
    assert sum(clock.pauses) == pytest.approx(0.25)
    assert clock.pauses[:-1] == sorted(clock.pauses[:-1])
    assert max(clock.pauses) == 2e-3


def test_without_patience_there_is_no_wait(stage: Stage, clock: Clock) -> None:
    arena = stage.arena(capacity=2 * PAGE)
    arena.reserve(PAGE, 0.0)
    full(arena)
    assert clock.pauses == []


def test_the_error_says_who_holds_what(stage: Stage) -> None:
    arena = stage.arena(readers=3, capacity=STEP)
    publish(arena, 0, 2, pages=3)
    publish(arena, 2, pages=2, opens=2)
    assert full(arena, 3 * PAGE, wait=0.0) == (
        f"no block of {3 * PAGE} bytes within 0 s in the arena of rank 0: 2 blocks live, "
        f"{2 * PAGE} of {STEP} bytes free, the largest hole has {2 * PAGE}; reader 0 holds 1, reader 2 holds 3; "
        f"the capacity of {STEP} bytes is used up: raise it, or have less held at a time"
    )


def test_the_error_says_that_nobody_holds_anything(stage: Stage) -> None:
    assert "no lease is held; the capacity of" in full(stage.arena(), STEP)


def test_the_error_says_why_the_system_gives_no_more(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = stage.arena(capacity=4 * STEP)
    monkeypatch.setattr(_segment, "room", lambda: Room(5, "a limit of the test"))
    said = full(arena, STEP)
    assert f"{3 * STEP} of {3 * STEP} bytes more are wanted, a limit of the test leaves 5; raise that limit" in said
    assert names(arena) == ["-0", "-c", "-p0", "-w0"]


def test_L7_a_reader_with_all_its_tickets_gets_no_more(stage: Stage, clock: Clock) -> None:
    arena = stage.arena(readers=2, capacity=4 * STEP)
    hand = stage.hand(arena)
    handle = publish(arena, 0, opens=MAX_TICKETS)
    assert f"; reader 0 holds {MAX_TICKETS} leases, {MAX_TICKETS} are the most: " in full(
        arena, readers=(0, 1), opens=1
    )
    assert arena.usage()[3] == STEP
    publish(arena, 1)
    clock.then = lambda: hand.released(handle) if len(clock.pauses) == 1 else None
    arena.reserve(PAGE, 1.0, (0, 1), 1)


# --- growth


def fill(arena: Arena) -> Block:
    return arena.reserve(arena.usage()[2], 0.0)


def test_a_new_segment_is_used_once_every_reader_has_mapped_it(stage: Stage) -> None:
    arena = stage.arena(readers=2, capacity=4 * STEP)
    one, two = stage.hand(arena, 0), stage.hand(arena, 1)
    fill(arena)
    assert " waits for readers [" in full(arena)
    assert (one.woken(), two.woken()) == (1, 1)
    assert names(arena) == ["-1"]
    one.mapped(1)
    assert " waits for readers [" in full(arena)
    # No second one while the first is on its way.
    assert (arena.usage()[3], one.woken()) == (2 * STEP, 1)
    two.mapped(1)
    assert arena.reserve(PAGE, 0.0).where[:2] == (1, PAGE)
    assert names(arena) == []


def test_the_count_of_segments_is_told_in_the_control_segment(stage: Stage) -> None:
    arena = stage.arena(capacity=4 * STEP)
    hand = stage.hand(arena)
    assert os.pread(hand.ring.fd, 4, 56) == b"\1\0\0\0"
    fill(arena)
    full(arena)
    assert os.pread(hand.ring.fd, 4, 56) == b"\2\0\0\0"


@pytest.mark.parametrize("how", ["left", "died"])
def test_growth_does_not_wait_for_a_reader_that_is_gone(stage: Stage, how: str) -> None:
    arena = stage.arena(readers=2, capacity=4 * STEP)
    one, two = stage.hand(arena, 0), stage.hand(arena, 1)
    fill(arena)
    full(arena)
    one.mapped(1)
    two.left() if how == "left" else two.die()
    assert arena.reserve(PAGE, 0.0).segment == 1


def test_growth_does_not_wait_for_a_reader_that_has_not_come(stage: Stage) -> None:
    arena = stage.arena(readers=2, capacity=4 * STEP)
    fill(arena)
    assert arena.reserve(PAGE, 0.0).segment == 1
    # One that is about to come must not miss it.
    assert [peer.wake.value for peer in arena._peers] == [1, 1]


def test_a_reader_that_came_and_maps_later_stops_the_use_of_a_segment(stage: Stage) -> None:
    arena = stage.arena(capacity=4 * STEP)
    fill(arena)
    arena.free(arena.reserve(PAGE, 0.0))
    hand = stage.hand(arena, 0, 0)
    assert " waits for readers [" in full(arena)
    hand.mapped(1)
    assert arena.reserve(PAGE, 0.0).segment == 1


def test_L6_a_refused_segment_is_retired(stage: Stage) -> None:
    arena = stage.arena(readers=2, capacity=3 * STEP)
    one, two = stage.hand(arena, 0), stage.hand(arena, 1)
    fill(arena)
    full(arena)
    one.mapped(1)
    two.bad(1)
    assert " waits for readers [" in full(arena)
    assert arena.usage()[3] == 3 * STEP
    # Nobody needs the name of the retired one any more.
    assert names(arena) == ["-2"]
    for hand in (one, two):
        hand.mapped(2)
    assert arena.reserve(PAGE, 0.0).segment == 2
    # Mapped after all: retired is for good.
    two.mapped(1)
    fill(arena)
    assert full(arena).endswith(f"the capacity of {3 * STEP} bytes is used up: raise it, or have less held at a time")


def test_what_lies_in_a_segment_that_is_refused_late_stays(stage: Stage) -> None:
    arena = stage.arena(capacity=2 * STEP)
    hand = stage.hand(arena)
    handle = publish(arena, 0)
    hand.bad(0)
    assert live(arena) == 1
    hand.mapped(1)
    assert " waits for readers [" in full(arena)
    hand.mapped(1)
    assert arena.reserve(PAGE, 0.0).segment == 1
    hand.released(handle)
    assert live(arena) == 1
    assert arena.usage()[1] == STEP - 2 * PAGE


@pytest.mark.parametrize(("pages", "size"), [(8, 3 * STEP), (15, 4 * STEP), (16, 5 * STEP), (30, 8 * STEP)])
def test_a_new_segment_fits_two_such_blocks_in_whole_steps(stage: Stage, pages: int, size: int) -> None:
    arena = stage.arena(capacity=100 * STEP)
    assert arena.reserve(pages * PAGE, 0.0).where[:2] == (1, PAGE)
    assert arena.usage()[3] - STEP == size


def test_segments_grow_with_the_arena(stage: Stage) -> None:
    arena = stage.arena(capacity=100 * STEP)
    sizes = []
    for _ in range(8):
        before = arena.usage()[3]
        fill(arena)
        fill_one = arena.reserve(PAGE, 0.0)
        assert fill_one.offset == PAGE
        sizes.append((arena.usage()[3] - before) // STEP)
    assert sizes == [1, 1, 2, 3, 4, 6, 9, 14]


def test_the_capacity_is_never_passed(stage: Stage) -> None:
    arena = stage.arena(capacity=2 * STEP + 3 * PAGE)
    while True:
        try:
            arena.reserve(PAGE, 0.0)
        except ArenaFull:
            break
    live_blocks, free, largest, total = arena.usage()
    assert (live_blocks, free, largest, total) == (7 + 7 + 2, 0, 0, 2 * STEP + 3 * PAGE)
    assert f"the capacity of {2 * STEP + 3 * PAGE} bytes is used up: " in full(arena)


def test_there_are_only_so_many_segments(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "MAX_SEGMENTS", 2)
    arena = stage.arena(capacity=100 * STEP)
    fill(arena)
    fill_second = arena.reserve(STEP - PAGE, 0.0)
    assert fill_second.segment == 1
    fill(arena)
    assert "is used up" in full(arena)


# --- names


def test_names_go_when_every_reader_has_mapped(stage: Stage) -> None:
    arena = stage.arena(readers=2)
    stage.hand(arena, 0)
    assert len(names(arena)) == 6
    stage.hand(arena, 1)
    assert names(arena) == []
    assert arena.named == 0


@pytest.mark.parametrize("how", ["left", "died"])
def test_names_do_not_wait_for_a_reader_that_is_gone(stage: Stage, how: str) -> None:
    arena = stage.arena(readers=2)
    stage.hand(arena, 0)
    gone = stage.hand(arena, 1, 99)
    assert len(names(arena)) == 6
    gone.left() if how == "left" else gone.die()
    arena.reclaim()
    assert names(arena) == []


def test_names_wait_for_a_reader_that_has_not_come(stage: Stage) -> None:
    arena = stage.arena(readers=2)
    stage.hand(arena, 0)
    arena.reclaim()
    assert len(names(arena)) == 6
    assert arena.alive() == (True, None)


def test_an_idle_writer_hears_its_readers() -> None:
    arena = Arena(1, 2 * PAGE, 0)
    hand = Hand(arena.address, 0, 0)
    # Nobody calls anything: the writer's own thread ends when no name is left.
    idle_of(arena).join(60)
    assert not idle_of(arena).is_alive()
    assert names(arena) == []
    hand.close()
    arena.close()


def test_an_idle_writer_hears_its_readers_again_after_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "STEP", STEP)
    arena = Arena(1, 4 * STEP, 0)
    hand = Hand(arena.address, 0, 0)
    idle_of(arena).join(60)
    first = idle_of(arena)
    fill(arena)
    full(arena)
    assert names(arena) == ["-1"]
    assert idle_of(arena) is not first
    hand.mapped(1)
    idle_of(arena).join(60)
    assert names(arena) == []
    hand.close()
    arena.close()


def test_an_idle_writer_does_not_listen_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_names, "IDLE_POLLS", 3)
    arena = Arena(1, 2 * PAGE, 0)
    idle_of(arena).join(60)
    assert not idle_of(arena).is_alive()
    assert len(names(arena)) == 4
    arena.close()


def test_a_name_that_somebody_else_took_is_spared(stage: Stage) -> None:
    arena = stage.arena()
    path = SHM / arena.address.segment(0)[1:]
    path.unlink()
    path.write_bytes(b"somebody else's")
    arena.close()
    assert path.read_bytes() == b"somebody else's"
    path.unlink()
    assert names(arena) == []


# --- calls in the middle of calls


def test_a_finalizer_in_the_middle_of_a_call_may_withdraw(stage: Stage) -> None:
    arena = stage.arena()
    handle = publish(arena, 0)
    with arena._lock.free():
        arena.withdraw(handle)
        assert arena._blocks.live == 1
    arena.drain()
    assert arena.usage()[0] == 0


@pytest.mark.parametrize("name", ["drain", "reclaim", "held", "alive", "usage"])
def test_a_call_in_the_middle_of_another_is_an_error_and_no_deadlock(stage: Stage, name: str) -> None:
    arena = stage.arena()
    call = getattr(arena, name)
    with arena._lock.free(), pytest.raises(ShmcastError, match="in the middle of another call"):
        call()
    call()
    thread = threading.Thread(target=call)
    with arena._lock.free():
        # Another thread only waits.
        thread.start()
    thread.join(60)
    assert not thread.is_alive()


# --- readers that leave or die


def test_a_reader_that_leaves_gives_back_what_it_has_not_opened(stage: Stage) -> None:
    arena = stage.arena()
    hand = stage.hand(arena)
    opened, unopened = publish(arena, 0), publish(arena, 0)
    hand.opened(opened)
    hand.left()
    arena.drain()
    assert (live(arena), arena.held()[0].leases, arena.alive()) == (1, 1, (False,))
    assert publish(arena, 0).readers == 0
    hand.released(opened)
    hand.released(unopened)
    assert live(arena) == 0


def test_the_dead_give_back_everything(stage: Stage) -> None:
    arena = stage.arena(readers=2)
    one, two = stage.hand(arena, 0), stage.hand(arena, 1)
    handle = publish(arena, 0, 1, opens=2)
    for hand in (one, two):
        hand.opened(handle)
    one.die()
    arena.reclaim()
    assert (arena.alive(), arena.held()[0].leases, arena.held()[1].leases) == ((False, True), 0, 2)
    assert publish(arena, 0, 1).readers == 0b10
    two.die()
    arena.reclaim()
    assert arena.usage()[0] == 0


def test_reserve_takes_back_from_the_dead_before_it_waits(stage: Stage, clock: Clock) -> None:
    arena = stage.arena(capacity=2 * PAGE)
    hand = stage.hand(arena)
    hand.opened(publish(arena, 0))
    hand.die()
    assert arena.reserve(PAGE, 1.0).generation == 2
    assert clock.pauses == []


def test_what_the_dead_said_last_is_heard(stage: Stage) -> None:
    arena = stage.arena(readers=2, capacity=4 * STEP)
    one = stage.hand(arena, 0)
    stage.hand(arena, 1)
    fill(arena)
    full(arena)
    one.bad(1)
    one.die()
    arena.reclaim()
    assert arena._retired == {1}


def test_what_a_reader_says_between_the_drain_and_its_death_is_heard(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = stage.arena(capacity=2 * STEP)
    hand = stage.hand(arena)
    fill(arena)
    full(arena)

    def last_words(fd: int, byte: int) -> bool:
        if hand.index == byte and not arena._retired:
            hand.bad(1)
            hand.die()
        return is_taken(fd, byte)

    monkeypatch.setattr(_arena, "is_taken", last_words)
    arena.reclaim()
    assert arena._retired == {1}


def test_a_reader_that_left_and_then_died_gives_back_what_it_had_opened(stage: Stage) -> None:
    arena = stage.arena()
    hand = stage.hand(arena)
    hand.opened(publish(arena, 0))
    hand.left()
    arena.reclaim()
    assert live(arena) == 1
    hand.die()
    arena.reclaim()
    assert live(arena) == 0


def test_a_reader_that_never_came_is_not_dead(stage: Stage) -> None:
    arena = stage.arena()
    handle = publish(arena, 0)
    arena.reclaim()
    assert (arena.alive(), live(arena)) == ((None,), 1)
    arena.withdraw(handle)
    assert live(arena) == 0


def test_death_is_asked_for_twice(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """`taken` may be seen before the lock that came before it: one more look, behind a fence."""
    arena = stage.arena()
    stage.hand(arena)
    answers, asked = iter([False, True]), list[str]()

    def taken(*_: int) -> bool:
        asked.append("lock")
        return next(answers)

    monkeypatch.setattr(_arena, "is_taken", taken)
    monkeypatch.setattr(_arena, "fence", lambda: asked.append("fence"))
    arena.reclaim()
    assert asked == ["lock", "fence", "lock"]
    assert not arena._peers[0].dead


# --- close


def test_close_leaves_no_name_and_can_be_repeated(stage: Stage) -> None:
    arena = stage.arena(readers=3, capacity=4 * STEP)
    stage.hand(arena)
    publish(arena, 1, 2)
    fill(arena)
    full(arena)
    assert names(arena) == ["-0", "-1", "-c", "-p0", "-p1", "-p2", "-w0", "-w1", "-w2"]
    for _ in range(2):
        arena.close()
        assert names(arena) == []
    assert (arena.named, arena.alive(), arena.held()) == (0, (), ())


def test_a_closed_arena_gives_nothing(stage: Stage) -> None:
    arena = stage.arena()
    handle = publish(arena, 0)
    block = arena.reserve(PAGE, 0.0)
    arena.close()
    uses: list[Callable[[], object]] = [
        lambda: arena.reserve(PAGE, 0.0),
        lambda: arena.mapping(block),
        lambda: arena.grant(block, (), (0,), 1),
    ]
    for use in uses:
        with pytest.raises(ClosedError, match="closed"):
            use()
    arena.withdraw(handle)
    arena.free(block)
    arena.drain()
    arena.reclaim()


def test_memory_outlives_the_arena(stage: Stage) -> None:
    arena = stage.arena()
    block = arena.reserve(PAGE, 0.0)
    memory = memoryview(arena.mapping(block))[block.offset : block.offset + PAGE]
    arena.close()
    memory[:4] = b"mine"
    assert bytes(memory[:4]) == b"mine"
    arena.expire(block)
    memory.release()


def test_close_ends_the_idle_thread() -> None:
    arena = Arena(1, 2 * PAGE, 0)
    arena.close()
    idle_of(arena).join(60)
    assert not idle_of(arena).is_alive()


def test_the_words_of_one_reader_never_reach_another_ring(stage: Stage) -> None:
    arena = stage.arena(readers=3)
    hands = [stage.hand(arena, i) for i in range(3)]
    handles = [publish(arena, 0, 1, 2) for _ in range(3)]
    for hand, handle in zip(hands, handles, strict=True):
        hand.released(handle)
    arena.drain()
    assert [held.leases for held in arena.held()] == [2, 2, 2]
    assert all(peer.inbox.bad == 0 for peer in arena._peers)


def test_a_peer_that_fills_a_semaphore_does_not_stop_growth(stage: Stage) -> None:
    arena = stage.arena(readers=2, capacity=4 * STEP)

    def overflow() -> None:
        raise OSError(75, "Value too large for defined data type")

    real = arena._peers[0].wake
    arena._peers[0].wake = SimpleNamespace(release=overflow, close=real.close)
    fill(arena)
    assert arena.reserve(PAGE, 0.0).segment == 1
    assert arena._peers[1].wake.value == 1
