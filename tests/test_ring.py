"""Release rings: every entry once and in order, whatever interrupts a post, and no word of an enemy believed."""

import errno
import os
import secrets
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import posix_ipc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcast import _ring, _segment
from shmcast._layout import RING_HEAD, Entry, EntryKind, Kind, SegmentHeader, control_size, ring_offset, write_entry
from shmcast._ring import Inbox, Outbox, acquire_all, fence, wait
from shmcast._wire import Address

RELEASED = EntryKind.RELEASED
BASE = 128
ENTRIES = 8


class Interrupted(BaseException):
    """What a signal handler raises."""


class Semaphore:
    """A semaphore of this process whose `release` and `acquire` can be interrupted, before or after they count."""

    def __init__(self, value: int = 0) -> None:
        self.value = value
        self.interrupt: str | None = None
        self.closed = False

    def release(self) -> None:
        when, self.interrupt = self.interrupt, None
        if when == "before":
            raise Interrupted
        self.value += 1
        if when == "after":
            raise Interrupted

    def acquire(self, timeout: float | None = None) -> None:
        when, self.interrupt = self.interrupt, None
        if not self.value:
            assert timeout == 0, "would wait for ever"
            raise posix_ipc.BusyError
        self.value -= 1
        if when == "after":
            raise Interrupted

    def close(self) -> None:
        self.closed = True


class Pair:
    """Both ends of one ring, at `BASE` of a control segment."""

    def __init__(self, entries: int = ENTRIES) -> None:
        size = RING_HEAD.size + 16 * entries
        self.memory = bytearray(BASE + size)
        self.posted = Semaphore()
        ring: Any = memoryview(self.memory)[BASE:]
        control: Any = self.memory
        self.outbox = Outbox(ring, entries, self.posted)
        self.inbox = Inbox(control, BASE, entries, self.posted)

    def post(self, value: int) -> bool:
        return self.outbox.post(RELEASED, value)

    def drain(self) -> list[int]:
        entries = list(self.inbox.drain())
        assert all(kind == RELEASED for kind, _ in entries)
        return [value for _, value in entries]


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_nothing_posted_nothing_drained(pair: Pair) -> None:
    assert pair.drain() == []
    assert pair.inbox.bad == 0


def test_entries_arrive_once_and_in_order(pair: Pair) -> None:
    assert all(pair.post(value) for value in (5, 3, 2**64 - 1))
    assert pair.drain() == [5, 3, 2**64 - 1]
    assert pair.drain() == []


@pytest.mark.parametrize("kind", EntryKind)
def test_every_kind_arrives(pair: Pair, kind: EntryKind) -> None:
    pair.outbox.post(kind, 7)
    assert list(pair.inbox.drain()) == [Entry(kind, 7)]


def test_the_ring_is_used_again_and_again(pair: Pair) -> None:
    for first in range(0, 60, 3):
        assert all(pair.post(first + i) for i in range(3))
        assert pair.drain() == [first, first + 1, first + 2]


def test_the_number_of_an_entry_wraps(pair: Pair) -> None:
    pair.outbox._seq = pair.outbox._tokens = pair.inbox._seq = 2**32 - 2
    assert all(pair.post(value) for value in range(5))
    assert pair.drain() == list(range(5))


def test_L7_a_full_ring_refuses_and_loses_nothing(pair: Pair) -> None:
    assert [pair.post(value) for value in range(ENTRIES + 1)] == [True] * (ENTRIES - 1) + [False] * 2
    assert pair.drain() == list(range(ENTRIES - 1))
    assert pair.post(99)
    assert pair.drain() == [99]
    assert pair.inbox.bad == 0


def test_an_entry_taken_but_not_yet_read_is_not_overwritten(pair: Pair) -> None:
    for value in range(ENTRIES - 1):
        pair.post(value)
    drained = pair.inbox.drain()
    assert next(drained).value == 0
    # One token is gone, so one more fits; the next entry has not been read.
    assert pair.post(100)
    assert not pair.post(101)
    assert [entry.value for entry in drained] == list(range(1, ENTRIES - 1))
    assert pair.drain() == [100]


def test_says_whether_a_reader_came(pair: Pair) -> None:
    assert not pair.inbox.taken()
    pair.memory[BASE] = 1
    assert pair.inbox.taken()


def test_close_closes_the_semaphore(pair: Pair) -> None:
    pair.inbox.close()
    assert pair.posted.closed


@given(st.lists(st.one_of(st.integers(1, ENTRIES + 2), st.none()), max_size=40))
def test_any_mix_of_posts_and_drains_keeps_every_entry(steps: list[int | None]) -> None:
    pair, accepted, got, value = Pair(), list[int](), list[int](), 0
    for step in steps:
        if step is None:
            got += pair.drain()
            assert got == accepted
        for _ in range(step or 0):
            value += 1
            fits = len(accepted) - len(got) < ENTRIES - 1
            assert pair.post(value) is fits
            accepted += [value] * fits
    assert got + pair.drain() == accepted
    assert pair.inbox.bad == 0


# --- a signal handler that raises in the middle of a post


def interrupt_post(pair: Pair, value: int, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A post that a signal ends before or after the token, or right after the entry was written."""

    def written(*args: Any) -> None:
        write_entry(*args)
        raise Interrupted

    with monkeypatch.context() as patch:
        if when == "written":
            patch.setattr(_ring, "write_entry", written)
        else:
            pair.posted.interrupt = when
        with pytest.raises(Interrupted):
            pair.post(value)


def test_a_missing_token_is_made_up_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_post(pair, 1, "before", monkeypatch)
    assert pair.drain() == []
    pair.post(2)
    assert pair.drain() == [1, 2]
    assert pair.inbox.bad == 0


def test_a_token_too_many_finds_no_entry(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_post(pair, 1, "after", monkeypatch)
    assert pair.drain() == [1]
    pair.post(2)
    assert pair.drain() == [2]
    assert pair.inbox.bad == 1
    pair.post(3)
    assert pair.drain() == [3]


def test_an_entry_that_was_written_and_not_counted_counts(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_post(pair, 1, "written", monkeypatch)
    assert pair.drain() == []
    pair.post(2)
    assert pair.drain() == [1, 2]
    assert pair.inbox.bad == 0


@pytest.mark.parametrize("when", ["before", "after", "written"])
def test_an_interrupt_leaves_the_lock_free(pair: Pair, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_post(pair, 1, when, monkeypatch)
    assert not pair.outbox._lock.locked()


@given(st.lists(st.sampled_from(["post", "before", "after", "written", "drain", "interrupted drain"]), max_size=60))
def test_interrupts_never_put_the_ring_out_of_step(steps: list[str]) -> None:
    pair, written, got = Pair(128), list[int](), list[int]()
    for value, step in enumerate(steps):
        if step in ("drain", "interrupted drain"):
            pair.posted.interrupt = "after" if step == "interrupted drain" else None
            try:
                for entry in pair.inbox.drain():
                    got.append(entry.value)
            except Interrupted:
                assert step == "interrupted drain"
            pair.posted.interrupt = None
            assert got == written[: len(got)]
            continue
        written.append(value)
        if step == "post":
            assert pair.post(value)
        else:
            with pytest.MonkeyPatch.context() as patch:
                interrupt_post(pair, value, step, patch)
    assert pair.post(2**64 - 1)
    assert got + pair.drain() == [*written, 2**64 - 1]


def test_an_entry_whose_handling_was_interrupted_comes_again(pair: Pair) -> None:
    for value in (1, 2, 3):
        pair.post(value)
    drained = pair.inbox.drain()
    assert [next(drained).value, next(drained).value] == [1, 2]
    with pytest.raises(Interrupted):
        drained.throw(Interrupted())  # type: ignore[attr-defined]
    assert pair.drain() == [2, 3]
    assert pair.inbox.bad == 0


def test_two_interrupted_posts_lose_no_later_entry(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_post(pair, 1, "after", monkeypatch)
    pair.post(2)
    interrupt_post(pair, 3, "written", monkeypatch)
    assert pair.drain() == [1, 2, 3]
    assert pair.post(4)
    assert pair.post(5)
    assert pair.drain() == [4, 5]


def test_an_interrupted_drain_leaves_no_entry_behind(pair: Pair) -> None:
    for value in (1, 2):
        pair.post(value)
    pair.posted.interrupt = "after"
    with pytest.raises(Interrupted):
        pair.drain()
    assert pair.drain() == [1, 2]


# --- what an enemy, or a damaged reader, writes


def forge(pair: Pair, seq: int, number: int, kind: int, value: int = 1) -> None:
    """An entry at the place of number `seq`, with a token."""
    at = BASE + RING_HEAD.size + seq % ENTRIES * 16
    pair.memory[at : at + 16] = value.to_bytes(8, "little") + number.to_bytes(4, "little") + kind.to_bytes(4, "little")
    pair.posted.value += 1


@pytest.mark.parametrize(("number", "kind"), [(1, 4), (2**32 - 1, 4), (8, 4), (0, 0), (0, 6), (0, 2**32 - 1)], ids=str)
def test_a_hostile_entry_is_counted_and_ignored(pair: Pair, number: int, kind: int) -> None:
    forge(pair, 0, number, kind)
    assert pair.drain() == []
    assert pair.inbox.bad == 1


def test_a_right_entry_is_read_after_wrong_ones(pair: Pair) -> None:
    for number in (5, 9, 77):
        forge(pair, 0, number, RELEASED)
        assert pair.drain() == []
    forge(pair, 0, 0, RELEASED, value=6)
    assert pair.drain() == [6]
    assert pair.inbox.bad == 3


def test_tokens_without_entries_are_used_up(pair: Pair) -> None:
    pair.posted.value += ENTRIES
    assert pair.drain() == []
    assert (pair.inbox.bad, pair.posted.value) == (ENTRIES, 0)
    pair.post(1)
    assert pair.drain() == [1]


@given(st.binary(min_size=16 * ENTRIES, max_size=16 * ENTRIES), st.integers(0, ENTRIES))
def test_any_bytes_in_the_ring_give_at_most_one_entry_a_token(ring: bytes, tokens: int) -> None:
    pair = Pair()
    pair.memory[BASE + RING_HEAD.size :] = ring
    pair.posted.value = tokens
    entries = list(pair.inbox.drain())
    assert len(entries) + pair.inbox.bad == tokens


class Flooded(Semaphore):
    """As full as a semaphore can be; counts how often it was acquired, and stops what would take minutes."""

    def __init__(self) -> None:
        super().__init__(2**31 - 1)
        self.acquired = 0

    def acquire(self, timeout: float | None = None) -> None:
        self.acquired += 1
        if self.acquired > 100 * ENTRIES:
            raise Interrupted
        super().acquire(timeout)


def test_a_flooded_semaphore_does_not_keep_the_writer(pair: Pair) -> None:
    control: Any = pair.memory
    inbox = Inbox(control, BASE, ENTRIES, Flooded())
    assert list(inbox.drain()) == []
    assert inbox.bad <= ENTRIES


def test_a_token_that_another_process_took_is_no_error_and_no_entry(pair: Pair) -> None:
    class Robbed(Semaphore):
        def acquire(self, timeout: float | None = None) -> None:
            raise posix_ipc.BusyError("nothing left")

    assert pair.post(5)
    control: Any = pair.memory
    robbed = Robbed(1)
    inbox = Inbox(control, BASE, ENTRIES, robbed)
    assert list(inbox.drain()) == []
    inbox._posted = Semaphore(1)
    assert [value for _, value in inbox.drain()] == [5]
    assert inbox.bad == 0


# --- semaphores


def test_acquire_all_takes_what_is_there() -> None:
    semaphore = Semaphore(5)
    assert acquire_all(semaphore) == 5
    assert semaphore.value == 0
    assert acquire_all(semaphore) == 0


def test_acquire_all_does_not_mind_another_taker() -> None:
    class Shared(Semaphore):
        def acquire(self, timeout: float | None = None) -> None:
            self.value = max(0, self.value - 2)
            super().acquire(timeout)

    assert acquire_all(Shared(5)) == 1


def test_a_signal_does_not_end_the_wait() -> None:
    class Disturbed(Semaphore):
        disturbances = 3

        def acquire(self, timeout: float | None = None) -> None:
            assert timeout is None
            if self.disturbances:
                self.disturbances -= 1
                raise posix_ipc.SignalError
            super().acquire(0)

    semaphore = Disturbed(1)
    wait(semaphore)
    assert (semaphore.disturbances, semaphore.value) == (0, 0)


def test_a_fence_does_not_wait() -> None:
    for _ in range(100):
        fence()


# --- two processes

POSTS = """
import posix_ipc, sys
from shmcast import _segment
from shmcast._layout import EntryKind, Kind, SegmentHeader
from shmcast._ring import Outbox
from shmcast._wire import Address

address = Address.parse(bytes.fromhex(sys.argv[1]))
expected = SegmentHeader(Kind.CONTROL, address.token, address.rank, 0, 0, address.readers)
ring = _segment.attach_ring(address.control, expected, 1)
posted = posix_ipc.Semaphore(address.posted(1))
outbox = Outbox(ring.map, ring.header.entries, posted)
print("ready", flush=True)
value = 0
while True:
    value += outbox.post(EntryKind.RELEASED, value)
"""


class Control:
    """A control segment for two readers, and the semaphore of the second."""

    def __init__(self) -> None:
        self.address = Address(secrets.token_bytes(16), 0, 2)
        header = SegmentHeader(Kind.CONTROL, self.address.token, 0, 0, control_size(2, 256), readers=2, entries=256)
        self.segment = _segment.create(self.address.control, header)
        self.posted = posix_ipc.Semaphore(self.address.posted(1), posix_ipc.O_CREX, mode=0o600, initial_value=0)

    def close(self) -> None:
        self.posted.close()
        posix_ipc.unlink_semaphore(self.address.posted(1))
        self.segment.unlink()
        self.segment.drop()
        del self.segment


@pytest.fixture
def control() -> Iterator[Control]:
    made = Control()
    yield made
    made.close()


@pytest.mark.faults
def test_a_reader_killed_in_the_middle_of_posting_leaves_no_wrong_entry(
    control: Control,
) -> None:
    posted = control.posted
    inbox = Inbox(control.segment.map, ring_offset(1, 256), 256, posted)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(POSTS), bytes(control.address).hex()], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        values: list[int] = []
        while len(values) < 5000:
            values += [value for _, value in inbox.drain()]
        process.kill()
    assert process.returncode == -signal.SIGKILL
    values += [value for _, value in inbox.drain()]
    assert values == list(range(len(values)))
    assert inbox.bad == 0
    assert posted.value == 0


def test_a_semaphore_that_a_peer_filled_up_refuses_the_post(
    control: Control,
) -> None:
    name = control.address.wake(1)
    full = posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600, initial_value=posix_ipc.SEMAPHORE_VALUE_MAX)
    posix_ipc.unlink_semaphore(name)
    with pytest.raises(OSError, match=os.strerror(errno.EOVERFLOW)):
        full.release()
    ring: Any = memoryview(control.segment.map)[ring_offset(1, 256) :]
    assert not Outbox(ring, 256, full).post(RELEASED, 1)
    full.close()
    ring.release()
