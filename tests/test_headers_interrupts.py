"""The ring of headers under interrupts: tokens lost or made twice, calls stopped at any line, ends closed."""

from __future__ import annotations

import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from shmcast import _headers
from shmcast.errors import ClosedError, PeerDied
from shmcast.transport import Reader, Writer
from tests.test_headers import LONG, MISSED, SLOTS, everything, header, number_of, one_of_each, post, waiting
from tests.test_lifetime import AT_ONCE, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


# Tokens that interrupts have taken, or made twice.


def take_a_token(reader: Reader) -> None:
    reader._leases.headers()._ready.acquire(0)  # type: ignore[union-attr]


@pytest.mark.parametrize("lost", [1, 2, SLOTS // 2])
@pytest.mark.parametrize("count", [SLOTS // 2, SLOTS, 2 * SLOTS + 3])
def test_L10_tokens_that_are_lost(lost: int, count: int) -> None:
    missed = max(0, count - SLOTS)
    with one_of_each() as (writer, reader):
        for number in range(count):
            writer.publish(number)
            writer.announce(header(number))
            if number < lost:
                take_a_token(reader)
        assert writer.stats().leases[0].held == count - missed, "the floor was raised for each that was overwritten"
        assert everything(reader) == [MISSED] * missed + [*range(missed, count)]
        writer.announce(header(count))
        assert everything(reader) == [count]


@pytest.mark.parametrize("surplus", [1, 3, 100])
def test_L10_tokens_too_many(surplus: int) -> None:
    with one_of_each() as (writer, reader):
        for first in (0, 3, 6):
            for _ in range(surplus):
                reader._leases.headers()._ready.release()  # type: ignore[union-attr]
            post(writer, range(first, first + 3))
            assert everything(reader) == [*range(first, first + 3)]


# The end.


def test_close_ends_a_wait_in_another_thread() -> None:
    raised: list[BaseException] = []
    with one_of_each() as (_, reader):

        def receive() -> None:
            try:
                reader.next_header(LONG)
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=receive)
        at_wait = waiting(reader)
        thread.start()
        assert at_wait.wait(LONG)
        # Without the ends of the segment, so that what is seen is what the wait makes of it.
        reader._leases.headers().close()
        thread.join()
    assert [type(error) for error in raised] == [ClosedError]
    with pytest.raises(ClosedError):
        reader.next_header(LONG)


def test_a_signal_handler_closes_the_reader_that_waits() -> None:
    with one_of_each() as (_, reader):
        before = signal.signal(signal.SIGALRM, lambda number, frame: reader._leases.headers().close())
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(ClosedError):
                reader.next_header(LONG)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_a_closed_writer_is_a_gone_one() -> None:
    with one_of_each() as (writer, reader):
        post(writer, range(3))
        writer.close()
        assert [number_of(reader.next_header(LONG)) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(PeerDied):
            reader.next_header(LONG)
        with pytest.raises(ClosedError):
            writer.announce(header(3))


# At any line.


def at_line(function: Callable[[], Any], file: str, nth: int, act: Callable[[], object]) -> tuple[Any, bool]:
    """What `function` returns or raises where `act` comes before its `nth` line in `file`; whether there was one."""
    left = [nth]

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.endswith(file):
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                act()
                return None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return function(), left[0] <= 0
    except Exception as error:
        return error, left[0] <= 0
    finally:
        sys.settrace(before)


def test_an_announce_that_meets_close_at_any_line() -> None:
    """A handler that closes the writer: the call ends as closed, or was through."""
    for nth in range(1, 200):
        with Writer(1, capacity=1 << 14, slots=2, policy=AT_ONCE) as writer, Reader(writer.address, 0):
            post(writer, range(3))
            told, reached = at_line(lambda w=writer: w.announce(header(3)), "_headers.py", nth, writer.close)  # type: ignore[misc]
        assert told == (0,) or type(told) is ClosedError
        if not reached:
            return
    pytest.fail("announce has no end")


class Stop(Exception):
    """What a signal handler raises."""


def test_an_announce_that_is_interrupted_at_any_line() -> None:
    """L10: after the next announce both headers are there, or only that one; never one twice or none."""

    def interrupt() -> None:
        raise Stop

    for nth in range(1, 200):
        with Writer(1, capacity=1 << 14, slots=SLOTS, policy=AT_ONCE) as writer, Reader(writer.address, 0) as reader:
            post(writer, range(3))
            _, reached = at_line(lambda w=writer: w.announce(header(3)), "_headers.py", nth, interrupt)  # type: ignore[misc]
            writer.announce(header(4))
            assert everything(reader) in ([0, 1, 2, 3, 4], [0, 1, 2, 4])
        if not reached:
            return
    pytest.fail("announce has no end")


def test_a_receive_that_is_interrupted_at_any_line() -> None:
    """L10: what was not returned comes again, or was lost with the call that was stopped; the order stays."""

    def interrupt() -> None:
        raise Stop

    for nth in range(1, 200):
        with one_of_each(capacity=1 << 14) as (writer, reader):
            post(writer, range(2))
            told, reached = at_line(lambda r=reader: r.next_header(0), "_headers.py", nth, interrupt)  # type: ignore[misc]
            assert told == header(0) or type(told) is Stop
            post(writer, range(2, 4))
            got = everything(reader)
            assert got in ([0, 1, 2, 3], [1, 2, 3])
            assert got[0] == 0 or nth > 1
            post(writer, range(4, 6))
            assert everything(reader) == [4, 5]
        if not reached:
            return
    pytest.fail("next_header has no end")


def test_close_while_it_looks_whether_the_writer_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that this end looks through stays open until it has looked, or it is told of the close."""
    with one_of_each() as (_, reader):
        is_taken = _headers.is_taken  # type: ignore[attr-defined]

        def close_first(fd: int, byte: int) -> bool:
            closing = threading.Thread(target=reader.close)
            closing.start()
            until(lambda: reader._leases._headers is None or reader._leases._headers._closed, "it is being closed")
            return bool(is_taken(fd, byte))

        with monkeypatch.context() as patch:
            patch.setattr(_headers, "is_taken", close_first)
            with pytest.raises(ClosedError):
                reader.next_header(LONG)


def test_a_receive_that_meets_close_at_any_line() -> None:
    """A handler that closes this end in the middle of `next_header`."""
    for nth in range(1, 200):
        with one_of_each(capacity=1 << 14) as (_, reader):
            close = reader._leases.headers().close
            told, reached = at_line(lambda r=reader: r.next_header(0.01), "_headers.py", nth, close)  # type: ignore[misc]
            assert type(told) in (ClosedError, TimeoutError)
        if not reached:
            return
    pytest.fail("next_header has no end")
