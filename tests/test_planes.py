"""Planes of a scheduler: each call has its own header or none, and a rank that lost step is in step again."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from shmcast._control import Control, ControlBroken, NoHeader
from shmcast._planes import GatherControl, Gathered, RingControl
from shmcast._wire import Call, Handle, Header, HeaderRoute, Reason
from shmcast.errors import ClosedError, PeerDied, ShmcastError
from shmcast.transport import Reader, Writer
from tests.test_lifetime import AT_ONCE, big, until

if TYPE_CHECKING:
    from collections.abc import Iterator

SLOTS = 8
PLANE = 77
LONG = 60.0
ROOM = 4 << 20


class Pair:
    """Both ends of a plane over a ring."""

    def __init__(self, writer: Writer, reader: Reader, timeout: float) -> None:
        self.writer, self.reader = writer, reader
        self.entry = RingControl(0, 2, timeout, writer)
        self.follower = RingControl(1, 2, timeout, reader)
        for each in (self.entry, self.follower):
            each.settle(0, PLANE)

    def publish(self, value: int) -> Handle:
        return self.writer.publish(big(value, 70_000))

    def held(self) -> int:
        return self.writer.stats().leases[0].held


@contextmanager
def ends(timeout: float = 0.0) -> Iterator[Pair]:
    with Writer(1, capacity=ROOM, policy=AT_ONCE, slots=SLOTS) as writer, Reader(writer.address, 0) as reader:
        yield Pair(writer, reader, timeout)


def send(control: Control, number: int | None = None, handle: Handle | None = None, batch: int = 5) -> None:
    with control.turn(Call.BATCH, number, batch):
        control.send(Header(HeaderRoute.SHM if handle else HeaderRoute.LOCAL, 0, handle=handle, text="told"))


def receive(control: Control, number: int | None = None, batch: int = 5, call: Call = Call.BATCH) -> Header:
    with control.turn(call, number, batch):
        return control.receive()


def missed(control: Control, number: int | None = None, batch: int = 5, call: Call = Call.BATCH) -> Reason:
    """Why there is no header for a call."""
    with pytest.raises(NoHeader) as told:
        receive(control, number, batch, call)
    return told.value.reason


# In step.


def test_each_call_gets_its_header() -> None:
    with ends() as pair:
        for number in range(1, 3 * SLOTS):
            send(pair.entry)
            header = receive(pair.follower)
            assert (header.sequence, header.plane, header.batch, header.text) == (number, PLANE, 5, "told")


def test_calls_may_be_numbered_with_gaps() -> None:
    """Of batches in which a rank makes nothing there is no header."""
    with ends() as pair:
        for number in (2, 3, 9):
            send(pair.entry, number, batch=number)
        assert [receive(pair.follower, number, number).sequence for number in (2, 3, 9)] == [2, 3, 9]


def test_one_call_at_a_time() -> None:
    with ends() as pair, pair.follower.turn(Call.BATCH), pytest.raises(ShmcastError, match="two threads"):
        receive(pair.follower)


def test_no_tensors_and_no_votes() -> None:
    with ends() as pair:
        assert not pair.entry.carries_tensors
        with pytest.raises(NotImplementedError):
            pair.entry.any(True)


# Out of step.


def test_a_call_that_was_missed_and_those_after_it() -> None:
    with ends() as pair:
        for number in range(1, SLOTS + 5):
            send(pair.entry, number)
        assert [missed(pair.follower, number) for number in range(1, 5)] == [Reason.MISSED] * 4
        assert [receive(pair.follower, n).sequence for n in range(5, SLOTS + 5)] == [*range(5, SLOTS + 5)]
        send(pair.entry, SLOTS + 5)
        assert receive(pair.follower, SLOTS + 5).sequence == SLOTS + 5


def test_a_header_that_comes_when_its_call_was_given_up_is_given_back() -> None:
    with ends() as pair:
        assert missed(pair.follower, 1) is Reason.LATE
        handles = [pair.publish(1), pair.publish(2)]
        send(pair.entry, 1, handles[1])
        send(pair.entry, 2, pair.publish(3))
        header = receive(pair.follower, 2)
        assert header.sequence == 2
        until(lambda: pair.held() == 1, "what the first header spoke of, and what came before it, is given back")
        assert header.handle is not None
        assert pair.reader.open(header.handle) is not None


def test_in_step_again_after_it_was_late() -> None:
    """The header of this call may be a whole batch away when the late one comes: it is waited for as any other."""
    with ends(LONG) as pair:
        asked: list[float] = []
        real = pair.reader.next_header

        def next_header(timeout: float) -> bytes | None:
            asked.append(timeout)
            if len(asked) == 3:
                send(pair.entry, 2)
            return real(timeout if timeout > 1.0 and len(asked) > 1 else 0.0)

        pair.reader.next_header = next_header  # type: ignore[method-assign]
        assert missed(pair.follower, 1) is Reason.LATE
        send(pair.entry, 1)
        assert receive(pair.follower, 2).sequence == 2
        assert [seconds > 1.0 for seconds in asked] == [True, False, True]


def test_a_silent_plane_is_waited_for_once() -> None:
    with ends(LONG) as pair:
        asked: list[float] = []
        real = pair.reader.next_header

        def next_header(timeout: float) -> bytes | None:
            asked.append(timeout)
            return real(0.0)

        pair.reader.next_header = next_header  # type: ignore[method-assign]
        assert [missed(pair.follower, number) for number in (1, 2, 3)] == [Reason.LATE] * 3
        assert asked[0] == pytest.approx(LONG, rel=0.5)
        assert asked[1:] == [0.0, 0.0]
        send(pair.entry, 4)
        assert receive(pair.follower, 4).sequence == 4
        assert missed(pair.follower, 5) is Reason.LATE
        assert asked[-1] == pytest.approx(LONG, rel=0.5), "it has said something meanwhile"


@pytest.mark.parametrize(
    "what",
    [{"batch": 6}, {"call": Call.MATERIALIZE}],
    ids=["another batch", "another call"],
)
def test_a_header_of_something_else_is_given_back(what: dict[str, Any]) -> None:
    with ends() as pair:
        send(pair.entry, 1, pair.publish(1))
        send(pair.entry, 2, pair.publish(2))
        assert missed(pair.follower, 1, **what) is Reason.MISSED
        until(lambda: pair.held() == 1, "it is given back")
        assert receive(pair.follower, 2).sequence == 2


def test_looking_takes_nothing() -> None:
    with ends() as pair:
        assert not pair.follower.ready(1, 0.0)
        send(pair.entry, 1)
        send(pair.entry, 2)
        assert pair.follower.ready(1, 0.0)
        assert pair.follower.ready(1, LONG)
        assert [receive(pair.follower, number).sequence for number in (1, 2)] == [1, 2]
        assert not pair.follower.ready(3, 1e-3)


def test_that_one_has_looked_is_no_reason_to_wait_less() -> None:
    with ends(LONG) as pair:
        asked: list[float] = []

        def next_header(timeout: float) -> bytes | None:
            asked.append(timeout)
            raise TimeoutError

        pair.reader.next_header = next_header  # type: ignore[method-assign]
        assert not pair.follower.ready(1, 0.0)
        assert missed(pair.follower, 1) is Reason.LATE
        assert asked[-1] == pytest.approx(LONG, rel=0.5)


def test_who_looks_waits_no_longer_than_he_was_told() -> None:
    """A header of a call that was given up says nothing of this one, and is given back."""
    with ends(LONG) as pair:
        send(pair.entry, 1, pair.publish(1))
        assert not pair.follower.ready(2, 0.0)
        until(lambda: pair.held() == 0, "it is given back")
        send(pair.entry, 3)
        assert pair.follower.ready(2, LONG), "there is none of this call"
        assert missed(pair.follower, 2) is Reason.MISSED
        assert receive(pair.follower, 3).sequence == 3


# The end.


def test_a_writer_that_is_gone_ends_the_plane_for_good() -> None:
    with ends(LONG) as pair:
        send(pair.entry, 1)
        pair.writer.close()
        assert receive(pair.follower, 1).sequence == 1, "what it had said is heard"
        assert pair.follower.ready(2, LONG)
        for number in (2, 3):
            with pytest.raises(ControlBroken) as told:
                receive(pair.follower, number)
            assert isinstance(told.value.__cause__, PeerDied)
        assert isinstance(pair.follower.broken, PeerDied)
        with pytest.raises(ControlBroken) as closed:
            send(pair.entry, 2)
        assert isinstance(closed.value.__cause__, ClosedError)


def test_a_reader_that_was_closed_ends_its_plane_only() -> None:
    with ends(LONG) as pair:
        pair.reader.close()
        with pytest.raises(ControlBroken) as told:
            receive(pair.follower, 1)
        assert isinstance(told.value.__cause__, ClosedError)
        send(pair.entry, 1)
        assert pair.entry.broken is None


def test_bytes_that_are_no_header_of_this_plane_end_it() -> None:
    with ends() as pair:
        pair.entry.settle(0, PLANE + 1)
        send(pair.entry, 1)
        pair.entry.settle(0, PLANE)
        send(pair.entry, 2)
        for number in (1, 2):
            with pytest.raises(ControlBroken, match="another Broadcaster"):
                receive(pair.follower, number)


def test_each_end_does_its_own_part() -> None:
    with ends() as pair:
        with pytest.raises(ControlBroken, match="only the entry rank"):
            send(pair.follower, 1)
        with pytest.raises(ControlBroken, match="receives no headers"):
            receive(pair.entry, 1)


# One all-gather for the headers of all ranks.


class Group:
    """A group of three, of which this is rank 1; `said`: what the others send."""

    rank, size, timeout = 1, 3, LONG
    broken: BaseException | None = None

    def __init__(self) -> None:
        self.said: dict[int, bytes] = {}
        self.calls = 0

    def gather(self, header: bytes) -> list[bytes]:
        self.calls += 1
        if self.broken is not None:
            raise ControlBroken(str(self.broken)) from self.broken
        return [header if rank == self.rank else self.said[rank] for rank in range(self.size)]


def gathering() -> tuple[Group, list[GatherControl]]:
    """The group, and the planes of its ranks as rank 1 sees them."""
    group: Any = Group()
    gathered = Gathered(group)
    planes = [GatherControl(gathered) for _ in range(3)]
    for rank, plane in enumerate(planes):
        plane.settle(rank, PLANE + rank)
    return group, planes


def said(rank: int, number: int, batch: int = 5) -> bytes:
    return bytes(Header(HeaderRoute.LOCAL, number, Call.BATCH, PLANE + rank, batch=batch, text=f"of {rank}"))


def test_all_planes_share_one_exchange_a_call() -> None:
    group, planes = gathering()
    assert [plane.leads for plane in planes] == [False, True, False]
    for number in range(1, 5):
        group.said = {0: said(0, number), 2: said(2, number)}
        send(planes[1], number)
        assert [receive(planes[rank], number).text for rank in (0, 2)] == ["of 0", "of 2"]
        assert group.calls == number


@pytest.mark.parametrize("wrong", [said(0, 2), said(0, 1, batch=6), said(2, 1), b"x" * 256, b""])
def test_what_one_rank_says_wrong_is_missed_from_that_rank_alone(wrong: bytes) -> None:
    group, planes = gathering()
    group.said = {0: wrong, 2: said(2, 1)}
    send(planes[1], 1)
    assert missed(planes[0], 1) is Reason.MISSED
    assert receive(planes[2], 1).text == "of 2"
    group.said = {0: said(0, 2), 2: said(2, 2)}
    send(planes[1], 2)
    assert receive(planes[0], 2).text == "of 0"


def test_an_exchange_that_fails_ends_all_planes() -> None:
    group, planes = gathering()
    group.said = {0: said(0, 1), 2: said(2, 1)}
    send(planes[1], 1)
    group.broken = RuntimeError("the group is broken")
    with pytest.raises(ControlBroken):
        send(planes[1], 2)
    for plane in (planes[0], planes[2]):
        assert plane.broken is group.broken
        with pytest.raises(ControlBroken, match="the group is broken"):
            receive(plane, 1)


def test_headers_of_an_earlier_call_are_not_taken_for_those_of_this_one() -> None:
    group, planes = gathering()
    group.said = {0: said(0, 1), 2: said(2, 1)}
    send(planes[1], 1)
    group.said = {}
    with pytest.raises(KeyError):
        send(planes[1], 1)
    with pytest.raises(ControlBroken, match="no headers"):
        receive(planes[0], 1)
