"""Every point of a writer's and a reader's life: when each comes, and what an exception there leaves behind."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch

from shmcast import Policy, _arena
from shmcast._points import Point
from shmcast.errors import ClosedError, ShmcastError
from shmcast.transport import Reader, Writer
from tests.support.fates import Fate, Path, Struck

KIB = 1 << 10
STEP = 1 << 20
DEADLINE_SECONDS = 60.0
HEADER = bytes(256)

IN_CONSTRUCTOR = (Point.CREATED, Point.GROWN)
PUBLISHING = (Point.RESERVED, Point.COPYING, Point.WRITTEN, Point.GRANTED)


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arena, "STEP", STEP)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Threads that die of a fate say so, which is no failure here."""
    before, threading.excepthook = threading.excepthook, lambda _: None
    yield
    threading.excepthook = before


def until(condition: Callable[[], bool]) -> None:
    deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "only a bug makes the deadline pass"
        never.wait(0.001)


def big(value: int, size: int = 128 * KIB) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def values(obj: object) -> set[int]:
    assert isinstance(obj, torch.Tensor)
    return set(obj.numpy().tolist())


def names_of(writer: Writer) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if writer.address.token.hex() in name]


def free_again(writer: Writer) -> bool:
    stats = writer.stats()
    return stats.live_blocks == 0 and all(lease.held == 0 for lease in stats.leases)


# When.


def test_the_points_of_a_writer_come_in_this_order() -> None:
    path = Path()
    with Writer(1, capacity=4 * STEP, slots=8, reached=path) as writer:
        assert path.points == [Point.CREATED, Point.GROWN]
        path.points.clear()
        with Reader(writer.address, 0) as reader:
            until(lambda: not names_of(writer))
            assert path.points == [Point.UNLINKING] * 2
            path.points.clear()
            reader.open(writer.publish([big(1), big(2)]))
            writer.announce(HEADER)
        assert path.points == [
            Point.RESERVED,
            Point.COPYING,
            Point.COPYING,
            Point.WRITTEN,
            Point.GRANTED,
            Point.POSTING,
        ]
        path.points.clear()
    assert path.points == []


def test_a_writer_whose_names_are_still_there_comes_to_its_close() -> None:
    path = Path()
    Writer(1, capacity=4 * STEP, reached=path).close()
    assert path.points == [Point.CREATED, Point.GROWN, Point.CLOSING, Point.CLOSING]


def test_the_points_of_a_reader_come_in_this_order() -> None:
    path = Path()
    with Writer(1, capacity=4 * STEP) as writer:
        with Reader(writer.address, 0, reached=path) as reader:
            until(lambda: not names_of(writer))
            assert path.points == [Point.SEATED, Point.MAPPED, Point.TELLING]
            path.points.clear()
            got = reader.open(writer.publish(big(1)))
            assert values(got) == {1}
            assert path.points == [Point.TELLING, Point.TAKEN]
            del got
            until(lambda: free_again(writer))
            assert path.points == [Point.TELLING, Point.TAKEN, Point.RELEASING, Point.TELLING]
            path.points.clear()
        until(lambda: path.points == [Point.LEAVING, Point.TELLING])


def test_growth_comes_to_its_points_on_both_ends() -> None:
    ours, theirs = Path(), Path()
    with (
        Writer(1, capacity=8 * STEP, reached=ours) as writer,
        Reader(writer.address, 0, reached=theirs) as reader,
    ):
        until(lambda: not names_of(writer))
        ours.points.clear()
        theirs.points.clear()
        assert values(reader.open(writer.publish(big(1, 2 * STEP)))) == {1}
        assert ours.points[0] is Point.GROWN
        assert theirs.points[0] is Point.MAPPED


# What an exception leaves.


@pytest.mark.parametrize(
    "fate",
    [
        Fate(Point.CREATED, how="raise"),
        Fate(Point.CREATED, 2, how="raise"),
        Fate(Point.GROWN, how="raise"),
    ],
    ids=str,
)
def test_a_constructor_that_fails_leaves_no_name(fate: Fate) -> None:
    with pytest.raises(Struck):
        Writer(2, capacity=4 * STEP, reached=fate)
    assert fate.seen == fate.nth


@pytest.mark.parametrize("point", [Point.SEATED, Point.MAPPED])
def test_a_reader_that_cannot_come_leaves_its_writer_at_work(point: Point) -> None:
    with Writer(2, capacity=4 * STEP) as writer:
        with pytest.raises(Struck):
            Reader(writer.address, 0, reached=Fate(point, how="raise"))
        with Reader(writer.address, 1) as other:
            assert values(other.open(writer.publish(big(3), readers=[1]))) == {3}
            until(lambda: free_again(writer))


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", PUBLISHING)
def test_a_message_that_ends_halfway_gives_all_back(point: Point, nth: int) -> None:
    fate = Fate(point, nth, how="raise")
    with Writer(1, capacity=2 * STEP, reached=fate) as writer, Reader(writer.address, 0) as reader:
        struck = 0
        for value in range(40):
            try:
                handle = writer.publish([big(value), big(value + 100)])
            except Struck:
                struck += 1
                continue
            got = reader.open(handle)
            assert isinstance(got, list)
            assert [values(tensor) for tensor in got] == [{value}, {value + 100}]
        assert struck == 1
        del got
        until(lambda: free_again(writer))


def test_growth_that_fails_leaves_no_name() -> None:
    fate = Fate(Point.GROWN, 2, how="raise")
    patient = Policy(wait=DEADLINE_SECONDS)
    with (
        Writer(1, capacity=8 * STEP, reached=fate, policy=patient) as writer,
        Reader(writer.address, 0) as reader,
    ):
        until(lambda: not names_of(writer))
        with pytest.raises(Struck):
            writer.publish(big(1, 2 * STEP))
        assert names_of(writer) == []
        assert values(reader.open(writer.publish(big(2, 2 * STEP)))) == {2}


def test_a_header_that_was_cut_off_goes_out_with_the_next() -> None:
    fate = Fate(Point.POSTING, how="raise")
    with Writer(1, capacity=STEP, slots=8, reached=fate) as writer, Reader(writer.address, 0) as reader:
        with pytest.raises(Struck):
            writer.announce(b"1" * 256)
        writer.announce(b"2" * 256)
        assert [reader.next_header(DEADLINE_SECONDS) for _ in range(2)] == [b"1" * 256, b"2" * 256]


@pytest.mark.parametrize("point", [Point.TELLING, Point.TAKEN])
def test_an_open_that_fails_gives_its_lease_back(point: Point) -> None:
    path = Path()
    with Writer(1, capacity=STEP) as writer:
        with Reader(writer.address, 0, reached=path):
            until(lambda: not names_of(writer))
        nth = path.points.count(point) + 1
    fate = Fate(point, nth, how="raise")
    with Writer(1, capacity=STEP) as writer, Reader(writer.address, 0, reached=fate) as reader:
        until(lambda: not names_of(writer))
        handle = writer.publish(big(1), opens=2)
        with pytest.raises(Struck):
            reader.open(handle)
        assert values(reader.open(handle)) == {1}
        until(lambda: free_again(writer))


def test_what_is_raised_while_a_name_goes_is_made_up_for(quiet: None) -> None:
    fate = Fate(Point.UNLINKING, how="raise")
    with Writer(1, capacity=STEP, reached=fate) as writer, Reader(writer.address, 0):
        until(lambda: fate.seen > 0)
        with suppress(Struck):
            writer.stats()
        assert names_of(writer) == []


def test_a_reader_that_fails_while_it_leaves_can_leave_again() -> None:
    with Writer(1, capacity=STEP) as writer:
        reader = Reader(writer.address, 0, reached=Fate(Point.LEAVING, how="raise"))
        handle = writer.publish(big(1))
        with pytest.raises(Struck):
            reader.close()
        reader.close()
        with pytest.raises(ClosedError):
            reader.open(handle)
        until(lambda: free_again(writer))


def test_an_end_without_a_listener_comes_to_its_points_in_silence() -> None:
    with Writer(1, capacity=STEP) as writer, Reader(writer.address, 0) as reader:
        assert values(reader.open(writer.publish(big(1)))) == {1}
    gc.collect()
    with pytest.raises(ShmcastError):
        writer.publish(1)
