"""Admission: what is held, when it is ready and in which order, what comes of it; nothing is left behind by any end."""

from __future__ import annotations

import contextlib
import dis
import errno
import gc
import json
import logging
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import shmcast
from shmcast import admission as module
from shmcast._wire import Handle
from shmcast.admission import Admission
from shmcast.errors import ArenaFull, ClosedError, MaterializeError, NotAllowed, StaleHandle
from shmcast.multimodal import MultimodalInputs
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.test_lifetime import in_child
from tests.test_transport_processes import Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType, TracebackType

    from tests.support.ranks import Ranks

MIB = 1 << 20
BIG = 1 << 17  # bytes of a tensor that is mapped, not copied, at open
SMALL = 1000  # and of one that is copied
DEADLINE_SECONDS = 30.0
AT_ONCE = Policy(wait=0)


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition()` holds; only a bug makes the deadline pass."""
    deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {DEADLINE_SECONDS:g} s: {what}")
        never.wait(0.001)


def settled(writer: Writer, blocks: int = 0) -> None:
    """Wait until just `blocks` blocks are live."""
    gc.collect()
    until(lambda: writer.stats().live_blocks == blocks, f"{blocks} live blocks")


def image(key: object, value: int = 1, size: int = BIG) -> dict[str, Any]:
    """Raw inputs: the key, for the gate, and `size` bytes, each of them `value`."""
    return {"key": key, "pixels": torch.full((size,), value, dtype=torch.uint8)}


class Gate:
    """An `fn` that ends when the test says so, request by request; from the end of the `with` block on, at once.

    It gives the pixels of the raw request, plus one, or raises what it was told to.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open = False
        self._ends: dict[object, object] = {}
        self.running: list[object] = []
        self.ran: list[object] = []

    def __call__(self, raw: dict[str, Any]) -> object:
        key = raw["key"]
        with self._changed:
            self.ran.append(key)
            self.running.append(key)
            self._changed.wait_for(lambda: self._open or key in self._ends, DEADLINE_SECONDS)
            self.running.remove(key)
            end = self._ends.pop(key, None)
        if isinstance(end, BaseException):
            raise end
        return raw["pixels"] + 1 if end is None else end

    def end(self, *keys: object, by: object = None) -> None:
        """Let these end now, or as soon as they run; `by`: an error that it raises, or what it returns."""
        with self._changed:
            self._ends.update(dict.fromkeys(keys, by))
            self._changed.notify_all()

    def until_running(self, *keys: object) -> None:
        until(lambda: set(self.running) == set(keys), f"{keys} run, and nothing else")

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._open = True
            self._changed.notify_all()


def states(admission: Admission) -> dict[object, str]:
    """What each request waits for."""
    with admission._lock:
        return {key: request.state.name for key, request in admission._held.items()}


def until_done(admission: Admission, *keys: object) -> None:
    until(lambda: all(states(admission)[key] == "DONE" for key in keys), f"{keys} are done")


def until_waiting(admission: Admission, threads: int) -> None:
    """A worker without work waits as well."""
    waiting: Any = admission._changed
    until(lambda: len(waiting._waiters) == threads, f"{threads} threads wait")


def kinds(ready: list[tuple[Any, Any]]) -> list[tuple[object, str]]:
    """What came out, each as its key and the name of its outcome's class."""
    return [(key, type(outcome).__name__) for key, outcome in ready]


def handle_of(ready: list[tuple[Any, Any]]) -> Handle:
    """The only handle that came out."""
    [(_, outcome)] = ready
    assert isinstance(outcome, Handle)
    return outcome


def one(admission: Admission) -> tuple[Any, Any]:
    """The next that is ready; it must be alone."""
    [only] = admission.ready(DEADLINE_SECONDS)
    return only


def values(obj: object) -> set[int]:
    assert isinstance(obj, torch.Tensor)
    return set(obj.tolist())


def double(raw: Any) -> Any:
    """A plain `fn`."""
    return raw["pixels"] * 2


def error_of(use: Callable[[], object]) -> type[BaseException] | None:
    """What `use()` raises. A failure keeps no memory mapped."""
    try:
        use()
    except BaseException as error:
        return type(error)
    return None


# pytest holds what a fixture gives until after the look for leftovers; a closed end keeps its control segment mapped.


@pytest.fixture
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    with Writer(2, capacity=8 * MIB, policy=AT_ONCE) as writer:
        yield writer
    request.node.funcargs.clear()


@pytest.fixture
def reader(writer: Writer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 0) as reader:
        yield reader
    request.node.funcargs.clear()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def admission(writer: Writer, gate: Gate, request: pytest.FixtureRequest) -> Iterator[Admission]:
    with Admission(writer, gate) as admission, gate:
        yield admission
    request.node.funcargs.clear()


# What comes out, and in which order.


def test_a_request_comes_out_with_a_handle_that_each_reader_opens_once(writer: Writer, reader: Reader) -> None:
    with Admission(writer, double) as admission, Reader(writer.address, 1) as other:
        assert admission.hold("a", image("a", 21)) is None  # type: ignore[func-returns-value]
        key, handle = one(admission)
        assert key == "a"
        assert (handle.readers, handle.opens) == (0b11, 1)
        assert values(reader.open(handle)) == values(other.open(handle)) == {42}
        with pytest.raises(StaleHandle):
            reader.open(handle)
        assert (admission.ready(), admission.held) == ([], [])
    settled(writer)


def test_a_handle_for_some_readers_only(writer: Writer) -> None:
    with Admission(writer, double, readers=[1]) as admission:
        admission.hold("a", image("a"))
        _, handle = one(admission)
        assert handle.readers == 0b10
        writer.withdraw(handle)
    settled(writer)


def test_multimodal_inputs_are_materialized_once_and_open_alike_everywhere() -> None:
    pixels = torch.arange(BIG, dtype=torch.float32)
    raw = {"mm_items": [{"modality": "IMAGE", "feature": pixels, "offsets": [(0, 3)]}], "im_token_id": 7}
    with (
        Writer(2, capacity=8 * MIB, allow=["shmcast"]) as writer,
        Reader(writer.address, 0, allow=["shmcast"]) as mine,
        Reader(writer.address, 1, allow=["shmcast"]) as other,
        Admission(writer, MultimodalInputs.from_dict) as admission,
    ):
        admission.hold("a", raw)
        _, handle = one(admission)
        expected = MultimodalInputs.from_dict(raw).mm_items[0]
        for reader in (mine, other):
            opened = reader.open(handle)
            assert isinstance(opened, MultimodalInputs)
            [item] = opened.mm_items
            assert (item.hash, item.pad_value, opened.im_token_id) == (expected.hash, expected.pad_value, 7)
            assert isinstance(item.feature, torch.Tensor)
            assert torch.equal(item.feature, pixels)
            del opened, item
        settled(writer)


def test_text_overtakes(admission: Admission, gate: Gate) -> None:
    admission.hold("image", image("image"))
    gate.until_running("image")
    admission.hold("text", None)
    assert admission.ready() == [("text", None)]
    assert admission.held == ["image"]
    gate.end("image")
    assert kinds(admission.ready(DEADLINE_SECONDS)) == [("image", "Handle")]


def test_text_keeps_its_place_in_its_session_and_overtakes_others(admission: Admission, gate: Gate) -> None:
    admission.hold("image", image("image"), session=1)
    admission.hold("its text", None, session=1)
    admission.hold("another text", None, session=2)
    admission.hold("lone text", None)
    assert admission.ready() == [("another text", None), ("lone text", None)]
    gate.end("image")
    assert kinds(admission.ready(DEADLINE_SECONDS)) == [("image", "Handle"), ("its text", "NoneType")]


def test_without_a_session_requests_come_out_as_they_finish(admission: Admission, gate: Gate) -> None:
    for key in "abc":
        admission.hold(key, image(key))
    gate.until_running("a", "b")
    gate.end("b")
    assert kinds(admission.ready(DEADLINE_SECONDS)) == [("b", "Handle")]
    gate.until_running("a", "c")
    gate.end("c")
    assert kinds(admission.ready(DEADLINE_SECONDS)) == [("c", "Handle")]
    gate.end("a")
    assert kinds(admission.ready(DEADLINE_SECONDS)) == [("a", "Handle")]


def test_within_a_session_what_finishes_early_waits_for_what_was_held_before(admission: Admission, gate: Gate) -> None:
    for key in "ab":
        admission.hold(key, image(key), session="s")
    gate.end("b", by=ValueError("bad"))
    until_done(admission, "b")
    assert admission.ready() == []
    gate.end("a")
    assert kinds(admission.ready(DEADLINE_SECONDS)) == [("a", "Handle"), ("b", "ValueError")]


def test_what_is_ready_together_comes_out_in_the_order_of_hold(admission: Admission, gate: Gate) -> None:
    for key in "abc":
        admission.hold(key, image(key))
    for key in "cba":
        gate.end(key)
    until_done(admission, *"abc")
    assert [key for key, _ in admission.ready()] == ["a", "b", "c"]


def test_a_session_key_may_be_anything_that_has_a_hash(admission: Admission) -> None:
    admission.hold(1, image(1), session=0)
    admission.hold((2, "b"), None, session=0)
    admission.hold(b"3", None, session=False)  # equal to 0
    assert admission.ready() == []
    assert admission.held == [1, (2, "b"), b"3"]


def test_held_tells_the_oldest_first(admission: Admission, gate: Gate) -> None:
    for key in "cab":
        admission.hold(key, image(key))
    assert admission.held == ["c", "a", "b"]
    gate.end("a")
    admission.ready(DEADLINE_SECONDS)
    assert admission.held == ["c", "b"]


def test_a_key_is_held_once_at_a_time(admission: Admission) -> None:
    admission.hold("a", image("a"))
    with pytest.raises(ValueError, match="request 'a' is held already"):
        admission.hold("a", None)
    assert admission.held == ["a"]
    admission.abort("a")
    admission.hold("a", None)
    assert admission.ready() == [("a", None)]
    admission.hold("a", None)
    assert admission.ready() == [("a", None)]


def test_a_key_held_again_while_its_aborted_run_still_goes_on(admission: Admission, gate: Gate, reader: Reader) -> None:
    """The result of the first run is nobody's, least of all the second's."""
    admission.hold("a", image("first", 1))
    gate.until_running("first")
    admission.abort("a")
    admission.hold("a", image("second", 2))
    gate.until_running("first", "second")
    gate.end("first")
    gate.until_running("second")
    gate.end("second")
    assert values(reader.open(handle_of(admission.ready(DEADLINE_SECONDS)))) == {3}
    assert admission.stats().messages == 1


def test_ready_waits_for_at_least_one(admission: Admission, gate: Gate) -> None:
    admission.hold("a", image("a"))
    gate.until_running("a")
    waiting = threading.Thread(target=lambda: came.extend(admission.ready(float("inf"))))
    came: list[tuple[Any, Any]] = []
    waiting.start()
    until_waiting(admission, 2)
    gate.end("a")
    waiting.join(DEADLINE_SECONDS)
    assert kinds(came) == [("a", "Handle")]


@pytest.mark.parametrize("timeout", [0.0, -1.0, 0.01])
def test_ready_comes_back_with_nothing(admission: Admission, timeout: float) -> None:
    admission.hold("a", image("a"))
    assert admission.ready(timeout) == []


def test_ready_may_wait_for_ever(admission: Admission) -> None:
    admission.hold("a", None)
    assert admission.ready(float("inf")) == [("a", None)]


def test_only_its_workers_run_fn_and_oldest_first(writer: Writer) -> None:
    with Gate() as gate, Admission(writer, gate, workers=1) as admission, gate:
        for key in "abc":
            admission.hold(key, image(key))
        gate.until_running("a")
        names = {t.name: t.daemon for t in threading.enumerate() if t.name.startswith("shmcast-admission")}
        assert names == {"shmcast-admission-0": True}
        for key in "abc":
            gate.until_running(key)
            gate.end(key)
        until_done(admission, *"abc")
        assert gate.ran == ["a", "b", "c"]


def test_what_it_counts(writer: Writer) -> None:
    with Admission(writer, double) as admission:
        admission.hold("a", image("a"))
        one(admission)
        admission.hold("b", None)
        assert admission.ready() == [("b", None)]
        admission.hold("c", {})
        assert kinds([one(admission)]) == [("c", "KeyError")]
        stats = admission.stats()
        assert stats.routes == {"shm": (1, BIG)}
        assert stats.fallbacks == {}
        counts = {name: times.count for name, times in stats.times.items() if times.count}
        assert counts == {"hold": 3, "materialize": 2, "publish": 1}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"workers": 0}, "workers=0"),
        ({"max_held_bytes": -1}, "max_held_bytes=-1"),
        ({"readers": [0, 2]}, r"readers=\(0, 2\): this writer has readers 0 to 1"),
        ({"readers": [-1]}, r"readers=\(-1,\)"),
    ],
)
def test_wrong_arguments(writer: Writer, wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Admission(writer, double, **wrong)


def test_where_no_thread_can_be_had_none_stays(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def fail_second(thread: threading.Thread) -> None:
        if thread.name == "shmcast-admission-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail_second)
        assert error_of(lambda: Admission(writer, double)) is BlockingIOError
    assert [t for t in threading.enumerate() if t.name.startswith("shmcast-admission")] == []


# Errors of requests, and troubles that are not theirs.


def test_an_error_comes_out_with_its_key_and_the_others_go_on(admission: Admission, gate: Gate) -> None:
    error = ValueError("not an image")
    for key in "abc":
        admission.hold(key, image(key))
    gate.end("a", "c")
    gate.end("b", by=error)
    until_done(admission, *"abc")
    ready = admission.ready()
    assert kinds(ready) == [("a", "Handle"), ("b", "ValueError"), ("c", "Handle")]
    assert ready[1][1] is error
    assert admission.stats().fallbacks == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt("x"), SystemExit("x"), GeneratorExit("x")], ids=repr)
def test_whatever_fn_raises_no_worker_dies_and_no_key_is_lost(writer: Writer, error: BaseException) -> None:
    with Gate() as gate, Admission(writer, gate, workers=1) as admission, gate:
        admission.hold("a", image("a"))
        gate.end("a", by=error)
        key, outcome = one(admission)
        assert (key, type(outcome), outcome.__cause__) == ("a", MaterializeError, error)
        assert str(outcome) == f"fn raised {type(error).__name__}: x"
        gate.end("b")
        admission.hold("b", image("b"))
        assert kinds([one(admission)]) == [("b", "Handle")]


class Strange:
    """Of a class that is not allowed."""


def test_what_cannot_travel_goes_raw(admission: Admission, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "shmcast"):
        for number in range(3):
            gate.end(number, by=[Strange()])
            admission.hold(number, image(number))
            assert one(admission) == (number, None)
    assert admission.stats().fallbacks == {"encode": 3}
    [said] = caplog.messages
    assert "fallback (encode)" in said
    assert "NotAllowed: object[0]" in said or "Strange" in said


def test_where_fn_gives_nothing_the_request_goes_as_it_came(writer: Writer) -> None:
    with Admission(writer, lambda raw: None) as admission:
        admission.hold("a", image("a"))
        assert admission.ready(DEADLINE_SECONDS) == [("a", None)]
        assert writer.stats().live_blocks == 0
        assert not admission.stats().fallbacks


def test_a_full_arena_is_no_error_of_a_request(
    admission: Admission, gate: Gate, writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "shmcast"):
        for number in range(2):
            gate.end(number, by=torch.zeros(9 * MIB, dtype=torch.uint8))
            admission.hold(number, image(number))
            assert one(admission) == (number, None)
    assert admission.stats().fallbacks == {"full": 2}
    [said] = caplog.messages
    assert "fallback (full)" in said
    assert "ArenaFull: no block of" in said
    gate.end("fits")
    admission.hold("fits", image("fits"))
    assert kinds([one(admission)]) == [("fits", "Handle")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ArenaFull("no room"), "full"),
        (OSError(errno.ENOSPC, "no room"), "full"),
        (NotAllowed("a class"), "encode"),
        (ClosedError("closed"), "writer"),
        (MemoryError(), "writer"),
        (SystemExit(), "writer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_whatever_the_transport_has_the_request_goes_raw(
    admission: Admission, gate: Gate, monkeypatch: pytest.MonkeyPatch, error: BaseException, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", fail)
        gate.end(1, 2)
        for number in (1, 2):
            admission.hold(number, image(number))
            assert one(admission) == (number, None)
    assert admission.stats().fallbacks == {reason: 2}
    assert admission.stats().messages == 0


def test_when_the_writer_was_closed_first_requests_go_raw() -> None:
    with Writer(1, capacity=MIB) as writer, Admission(writer, double) as admission:
        admission.hold("a", image("a"))
        until_done(admission, "a")
        writer.close()
        admission.hold("b", image("b"))
        until_done(admission, "b")
        assert kinds(admission.ready()) == [("a", "Handle"), ("b", "NoneType")]
        assert admission.stats().fallbacks == {"writer": 1}
        admission.hold("c", image("c"))


# Bounds.


def test_what_is_beyond_the_bound_goes_raw(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING, "shmcast"),
        Gate() as gate,
        Admission(writer, gate, max_held_bytes=2 * BIG) as admission,
        gate,
    ):
        admission.hold("a", image("a"))
        admission.hold("b", image("b"))
        gate.until_running("a", "b")
        admission.hold("c", image("c", size=1))
        admission.hold("d", image("d", size=1))
        admission.hold("empty", image("empty", size=0))
        assert admission.ready() == [("c", None), ("d", None)]
        assert admission.stats().fallbacks == {"held": 2}
        gate.end("a", "empty")
        assert "a" in [key for key, _ in admission.ready(DEADLINE_SECONDS)]
        admission.hold("e", image("e"))  # in the room of a
        admission.abort("b")
        admission.hold("f", image("f"))  # in that of b
        gate.end("b", "e", "f")
        until_done(admission, "e", "f")
        assert "c" not in gate.ran
        assert set(kinds(admission.ready())) >= {("e", "Handle"), ("f", "Handle")}
        admission.hold("g", image("g", size=2 * BIG + 1))
        assert admission.ready() == [("g", None)]
        assert admission.stats().fallbacks == {"held": 3}
    [said] = caplog.messages
    assert f"fallback (held), said once, then only counted: the request goes on raw: {2 * BIG} of" in said


def test_what_was_published_counts_until_it_is_given_out(writer: Writer) -> None:
    with Admission(writer, double, max_held_bytes=BIG) as admission:
        admission.hold("a", image("a"))
        until_done(admission, "a")
        admission.hold("b", image("b"))
        assert kinds(admission.ready()) == [("a", "Handle"), ("b", "NoneType")]
        admission.hold("c", image("c"))
        assert kinds([one(admission)]) == [("c", "Handle")]


def test_beyond_the_bound_a_session_keeps_its_order(writer: Writer) -> None:
    with Gate() as gate, Admission(writer, gate, max_held_bytes=BIG) as admission, gate:
        admission.hold("a", image("a"), session="s")
        admission.hold("b", image("b"), session="s")
        admission.hold("c", image("c"))
        assert admission.ready() == [("c", None)]
        gate.end("a")
        assert kinds(admission.ready(DEADLINE_SECONDS)) == [("a", "Handle"), ("b", "NoneType")]


def test_a_bound_of_nothing_holds_nothing(writer: Writer) -> None:
    with Admission(writer, double, max_held_bytes=0) as admission:
        admission.hold("a", image("a", size=1))
        admission.hold("b", None)
        assert admission.ready() == [("a", None), ("b", None)]
        assert admission.stats().fallbacks == {"held": 1}


def test_tensors_and_arrays_count_wherever_they_are(writer: Writer) -> None:
    raw = {"key": 1, "items": [(torch.zeros(10),), {"array": np.zeros(3, np.int64)}], "text": "x" * 1000, "n": 5}
    with Gate() as gate, Admission(writer, gate, max_held_bytes=64) as admission, gate:
        admission.hold(1, raw)
        admission.hold(2, image(2, size=1))
        assert admission.ready() == [(2, None)]
        admission.abort(1)
        admission.hold(1, {**raw, "more": torch.zeros(1, dtype=torch.bool)})
        assert admission.ready() == [(1, None)]


# Dropping.


def test_abort_of_what_is_queued_never_runs(admission: Admission, gate: Gate, writer: Writer) -> None:
    for key in "abc":
        admission.hold(key, image(key))
    gate.until_running("a", "b")
    assert admission.abort("c") is True
    assert admission.abort("c") is False
    gate.end("a", "b")
    until_done(admission, "a", "b")
    assert kinds(admission.ready()) == [("a", "Handle"), ("b", "Handle")]
    assert gate.ran == ["a", "b"]


@pytest.mark.parametrize("by", [None, ValueError("bad"), SystemExit()], ids=repr)
def test_abort_of_what_runs_throws_its_result_away(
    admission: Admission, gate: Gate, writer: Writer, by: object
) -> None:
    admission.hold("a", image("a"))
    gate.until_running("a")
    assert admission.abort("a") is True
    assert admission.held == []
    gate.end("a", by=by)
    until(lambda: admission.stats().times["materialize"].count == 1, "it has ended")
    gate.end("b")
    admission.hold("b", image("b"))
    writer.withdraw(handle_of([one(admission)]))
    settled(writer)
    assert admission.stats().messages == 1
    assert admission.stats().fallbacks == {}


@pytest.mark.parametrize("drop", ["abort", "close"])
def test_what_is_dropped_while_it_is_being_published_is_withdrawn(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, drop: str
) -> None:
    publishing, enough = threading.Event(), threading.Event()
    put = Writer.put

    def slow_put(self: Writer, *args: Any, **kwargs: Any) -> Handle:
        handle = put(self, *args, **kwargs)
        publishing.set()
        enough.wait(DEADLINE_SECONDS)
        return handle

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "put", slow_put)
        with Admission(writer, double) as admission:
            admission.hold("a", image("a"))
            assert publishing.wait(DEADLINE_SECONDS)
            closing = threading.Thread(target=admission.close)
            if drop == "abort":
                assert admission.abort("a") is True
            else:
                closing.start()
                until(lambda: admission._closed, "it closes")
            assert writer.stats().live_blocks == 1
            enough.set()
            settled(writer)
            if drop == "close":
                closing.join()


def test_abort_of_what_is_published_withdraws_it(admission: Admission, gate: Gate, writer: Writer) -> None:
    gate.end("a")
    admission.hold("a", image("a"))
    until_done(admission, "a")
    assert writer.stats().live_blocks == 1
    assert admission.abort("a") is True
    assert admission.ready() == []
    assert writer.stats().live_blocks == 0


def test_abort_of_what_was_given_out_or_never_held_does_nothing(
    admission: Admission, gate: Gate, writer: Writer, reader: Reader
) -> None:
    gate.end("a")
    admission.hold("a", image("a"))
    handle = handle_of(admission.ready(DEADLINE_SECONDS))
    assert admission.abort("a") is False
    assert admission.abort("never") is False
    assert values(reader.open(handle)) == {2}


def test_what_the_engine_drops_it_withdraws(admission: Admission, gate: Gate, writer: Writer, reader: Reader) -> None:
    gate.end("a", "b")
    for key in "ab":
        admission.hold(key, image(key))
    until_done(admission, "a", "b")
    (_, a), (_, b) = admission.ready()
    assert isinstance(a, Handle)
    assert isinstance(b, Handle)
    assert writer.stats().live_blocks == 2
    kept = reader.open(a)
    for handle in (a, b):
        writer.withdraw(handle)
    settled(writer, 1)
    with pytest.raises(StaleHandle):
        reader.open(b)
    assert values(kept) == {2}
    del kept
    settled(writer)


@pytest.mark.parametrize("state", ["queued", "running", "done"])
def test_after_an_abort_the_session_goes_on(writer: Writer, state: str) -> None:
    with Gate() as gate, Admission(writer, gate, workers=1) as admission, gate:
        if state == "queued":
            admission.hold("first", image("first"))
        admission.hold("a", image("a"), session="s")
        admission.hold("b", None, session="s")
        gate.until_running("first" if state == "queued" else "a")
        if state == "done":
            # What is done and stays needs somebody before it.
            admission.abort("a")
            admission.hold("c", image("c"), session="s")
            assert admission.ready() == [("b", None)]
            admission.hold("d", None, session="s")
            assert (states(admission)["d"], admission.ready()) == ("DONE", [])
            assert admission.abort("c") is True
            assert admission.ready() == [("d", None)]
        else:
            assert admission.ready() == []
            assert admission.abort("a") is True
            assert admission.ready() == [("b", None)]


def test_an_abort_wakes_a_ready_that_waits(admission: Admission, gate: Gate) -> None:
    admission.hold("a", image("a"), session="s")
    gate.until_running("a")
    admission.hold("b", None, session="s")
    came: list[tuple[Any, Any]] = []
    waiting = threading.Thread(target=lambda: came.extend(admission.ready(float("inf"))))
    waiting.start()
    until_waiting(admission, 2)
    admission.abort("a")
    waiting.join(DEADLINE_SECONDS)
    assert came == [("b", None)]


# Closing.


def test_close_withdraws_what_is_done_runs_no_more_and_waits_for_what_runs(writer: Writer) -> None:
    with Gate() as gate:
        log: list[str] = []

        def fn(raw: Any) -> object:
            made = gate(raw)
            log.append("fn ended")
            return made

        admission = Admission(writer, fn)

        def close() -> None:
            admission.close()
            log.append("closed")

        gate.end("done", "behind", "given")
        admission.hold("given", image("given"))
        given = handle_of([one(admission)])
        admission.hold("one", image("one"), session="s")
        admission.hold("behind", image("behind"), session="s")
        admission.hold("done", image("done"))
        until_done(admission, "done", "behind")
        for key in ("two", "queued"):
            admission.hold(key, image(key))
        admission.hold("text", None)
        gate.until_running("one", "two")
        assert writer.stats().live_blocks == 3
        closing = threading.Thread(target=close)
        log.clear()
        closing.start()
        settled(writer, 1)
    closing.join()
    assert log == ["fn ended", "fn ended", "closed"]
    assert "queued" not in gate.ran
    assert [t for t in threading.enumerate() if t.name.startswith("shmcast-admission")] == []
    assert writer.stats().live_blocks == 1
    writer.withdraw(given)
    assert writer.stats().live_blocks == 0


def test_close_wakes_a_ready_that_waits(writer: Writer) -> None:
    admission = Admission(writer, double)
    came: list[object] = []
    waiting = threading.Thread(target=lambda: came.append(admission.ready(float("inf"))))
    waiting.start()
    until_waiting(admission, 3)
    admission.close()
    waiting.join()
    assert came == [[]]


def test_a_ready_that_finds_it_closed_when_it_wakes_takes_nothing(writer: Writer) -> None:
    """`close` withdraws what is held then: nobody may have it as well."""
    admission = Admission(writer, double)
    came: list[object] = []
    waiting = threading.Thread(target=lambda: came.append(admission.ready(DEADLINE_SECONDS)))
    waiting.start()
    until_waiting(admission, 3)
    with admission._lock:
        admission.hold("a", None)
        admission._closed = True  # what close does first; the rest takes other threads
    waiting.join()
    admission.close()
    assert came == [[]]


def test_after_close_everything_is_an_error_but_close(writer: Writer) -> None:
    with Admission(writer, double) as admission:
        admission.hold("a", image("a"))
    admission.close()
    uses: list[Callable[[], object]] = [
        lambda: admission.hold("b", None),
        admission.ready,
        lambda: admission.ready(1),
        lambda: admission.abort("a"),
        lambda: admission.held,
        admission.stats,
    ]
    assert [error_of(use) for use in uses] == [ClosedError] * len(uses)
    settled(writer)


def test_two_threads_may_close_at_once(writer: Writer) -> None:
    with Gate() as gate:
        admission = Admission(writer, gate)
        for key in "abc":
            admission.hold(key, image(key))
        gate.until_running("a", "b")
        threads = [threading.Thread(target=admission.close) for _ in range(3)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    settled(writer)


def test_what_ends_while_it_closes_is_not_published(writer: Writer) -> None:
    """`close` may have been at that request already."""
    with Gate() as gate:
        admission = Admission(writer, gate, workers=1)
        admission.hold("a", image("a"))
        gate.until_running("a")
        with admission._lock:
            admission._closed = True  # what close does first
        gate.end("a")
        for thread in admission._threads:
            thread.join()
        assert writer.stats().live_blocks == 0
    admission.close()


# What is kept alive, and for how long.


def test_after_close_nothing_is_kept(writer: Writer) -> None:
    with Gate() as gate:
        admission = Admission(writer, gate, workers=1)
        raws = [image(key) for key in "abc"]
        watched = [weakref.ref(raw["pixels"]) for raw in raws]
        for raw in raws:
            admission.hold(raw["key"], raw)
        gate.until_running("a")
        gate.end("a")
        until_done(admission, "a")
        gate.until_running("b")
        closing = threading.Thread(target=admission.close)
        closing.start()
        until(lambda: admission._closed, "it closes")
    closing.join()
    del raws, raw
    assert [ref() for ref in watched] == [None] * 3
    settled(writer)


def test_what_is_done_keeps_no_raw_inputs(writer: Writer) -> None:
    with Admission(writer, lambda raw: torch.ones(BIG)) as admission:
        raw = image("a")
        watched = weakref.ref(raw["pixels"])
        admission.hold("a", raw)
        del raw
        until_done(admission, "a")
        until(lambda: watched() is None, "they are gone")


def test_a_worker_that_waits_keeps_nothing_alive(admission: Admission, gate: Gate, writer: Writer) -> None:
    raw, made = image("a"), torch.ones(BIG)
    watched = [weakref.ref(raw["pixels"]), weakref.ref(made)]
    gate.end("a", by=made)
    admission.hold("a", raw)
    del raw, made
    writer.withdraw(handle_of(admission.ready(DEADLINE_SECONDS)))
    gate._ends.clear()
    until(lambda: [ref() for ref in watched] == [None, None], "both are gone")


def test_an_error_keeps_its_raw_inputs_only_as_long_as_it_lives(writer: Writer) -> None:
    def fail(raw: Any) -> object:
        raise ValueError("bad")

    gc.disable()
    try:
        with Admission(writer, fail) as admission:
            raw = image("a")
            watched = weakref.ref(raw["pixels"])
            admission.hold("a", raw)
            del raw
            ready = admission.ready(DEADLINE_SECONDS)
            assert kinds(ready) == [("a", "ValueError")]
            assert watched() is not None
            ready.clear()
            until(lambda: watched() is None, "no cycle keeps it")
    finally:
        gc.enable()


def test_what_is_held_beyond_the_bound_is_not_kept(writer: Writer) -> None:
    with Admission(writer, double, max_held_bytes=1) as admission:
        raw = image("a")
        watched = weakref.ref(raw["pixels"])
        admission.hold("a", raw)
        del raw
        assert watched() is None
        assert admission.ready() == [("a", None)]


# Threads and Ctrl-C.


def test_many_threads_hold_and_take(writer: Writer) -> None:
    """Each request comes out once, to one of them, and those of a session in their order."""
    sessions, each = 4, 40
    came: list[list[tuple[Any, Any]]] = [[], []]
    with Admission(writer, double, workers=3) as admission:

        def hold(session: int) -> None:
            for number in range(each):
                raw = None if number % 3 == 0 else {} if number % 7 == 0 else image(number, number % 100, SMALL)
                admission.hold((session, number), raw, session=session)

        def take(mine: list[tuple[Any, Any]]) -> None:
            while sum(map(len, came)) < sessions * each:
                for key, outcome in admission.ready(0.01):
                    mine.append((key, outcome))
                    if isinstance(outcome, Handle):
                        writer.withdraw(outcome)

        threads = [threading.Thread(target=hold, args=(session,)) for session in range(sessions)]
        threads += [threading.Thread(target=take, args=(mine,)) for mine in came]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert admission.held == []
    keys = [key for mine in came for key, _ in mine]
    assert sorted(keys) == [(session, number) for session in range(sessions) for number in range(each)]
    for mine in came:
        for session in range(sessions):
            numbers = [number for (its, number), _ in mine if its == session]
            assert numbers == sorted(numbers)
    for (_, number), outcome in came[0] + came[1]:
        expected = "NoneType" if number % 3 == 0 else "KeyError" if number % 7 == 0 else "Handle"
        assert type(outcome).__name__ == expected
    settled(writer)


class CtrlC:
    """Raises KeyboardInterrupt in a `with` block, where Python may: at the `at`-th place in `admission.py` and below.

    Signals are looked at when a function begins, when a call has returned and when a loop goes round.
    """

    FILES = (module.__file__, threading.__file__)

    def __init__(self, at: int) -> None:
        self.left = at
        self._before: dict[FrameType, str] = {}

    def __enter__(self) -> None:
        self._old = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        sys.settrace(self._old)
        self._before.clear()
        return kind is KeyboardInterrupt

    @property
    def pressed(self) -> bool:
        return self.left < 0

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in self.FILES or self.pressed:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before = self._before.get(frame, "")
            self._before[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before.startswith(("CALL", "RESUME", "JUMP")):
                self.left -= 1
                if self.pressed:
                    raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize("timeout", [0.0, DEADLINE_SECONDS])
def test_ctrl_c_in_ready_loses_nothing(admission: Admission, timeout: float) -> None:
    places = 0
    while True:
        for key in "abc":
            admission.hold(key, None, session="s")
        ready: list[tuple[Any, Any]] = []
        ctrl_c = CtrlC(places)
        with ctrl_c:
            ready = admission.ready(timeout)
        assert (ready == []) is ctrl_c.pressed
        assert (ready or admission.ready()) == [("a", None), ("b", None), ("c", None)]
        assert admission.held == []
        if not ctrl_c.pressed:
            break
        places += 1
    assert places > 10


def test_ctrl_c_in_hold_leaves_all_or_nothing(admission: Admission, gate: Gate, writer: Writer) -> None:
    places = held = 0
    while True:
        gate.end(places)
        ctrl_c = CtrlC(places)
        with ctrl_c:
            admission.hold(places, image(places))
        if admission.held:
            held += 1
            writer.withdraw(handle_of(admission.ready(DEADLINE_SECONDS)))
        if not ctrl_c.pressed:
            break
        places += 1
    assert 0 < held < places
    settled(writer)


def test_ctrl_c_between_ready_and_close_leaks_nothing(writer: Writer) -> None:
    """What an interrupted `ready` puts back after `close` is withdrawn, as if it had never been taken."""
    admission = Admission(writer, double)
    admission.hold("a", image("a"))
    until_done(admission, "a")

    def close_and_press(name: str, value: float) -> None:
        admission.close()
        raise KeyboardInterrupt

    admission._counters.observe = close_and_press  # type: ignore[method-assign]
    assert error_of(admission.ready) is KeyboardInterrupt
    assert error_of(admission.ready) is ClosedError
    settled(writer)


def test_ctrl_c_while_ready_waits(admission: Admission, gate: Gate) -> None:
    admission.hold("a", image("a"))
    gate.until_running("a")
    main = threading.main_thread().ident
    assert main is not None

    def press() -> None:
        until_waiting(admission, 2)
        signal.pthread_kill(main, signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        admission.ready(DEADLINE_SECONDS)
    pressing.join()
    gate.end("a")
    assert kinds(admission.ready(DEADLINE_SECONDS)) == [("a", "Handle")]


# Fork and exit.


def test_in_a_forked_child_it_is_closed(admission: Admission, gate: Gate, writer: Writer, reader: Reader) -> None:
    """Also where the lock was held by a thread that the child has not."""
    gate.end("a")
    admission.hold("a", image("a"))
    admission.hold("b", image("b"))
    until_done(admission, "a")
    gate.until_running("b")
    raw = image("a")

    def use_it() -> list[object]:
        uses: list[Callable[[], object]] = [
            lambda: admission.hold("c", None),
            admission.ready,
            lambda: admission.abort("a"),
            lambda: admission.held,
            admission.stats,
            admission.close,
            admission.close,
        ]
        # torch's own threads are not in the child either: no arithmetic.
        with Writer(1, capacity=MIB) as mine, Admission(mine, lambda raw: raw["pixels"]) as own:
            own.hold("a", raw)
            return [*map(error_of, uses), kinds([one(own)])]

    locked, enough = threading.Event(), threading.Event()

    def lock() -> None:
        with admission._lock:
            locked.set()
            enough.wait()

    holder = threading.Thread(target=lock)
    holder.start()
    locked.wait()
    try:
        outcome = in_child(use_it)
    finally:
        enough.set()
        holder.join()
    assert outcome == repr([*[ClosedError] * 5, None, None, [("a", "Handle")]])
    gate.end("b")
    until_done(admission, "b")
    assert [values(reader.open(outcome)) for _, outcome in admission.ready() if isinstance(outcome, Handle)] == [
        {2}
    ] * 2


# The states in which an interpreter ends, each in a child of one that has imported torch.
EXITS = {
    "nothing held": "",
    "closed": "admission.close()",
    "the writer closed first": "hold('a'); done('a'); writer.close()",
    "queued and running": "[hold(key) for key in 'abcd']; running.wait()",
    "published": "hold('a'); done('a')",
    "given out": "hold('a'); print(len(admission.ready(60)))",
    "a thread in ready": "threading.Thread(target=admission.ready, args=(60,), daemon=True).start()",
    "a thread that goes on": "threading.Thread(target=go_on, daemon=True).start(); going.wait()",
    "an exception": "hold('a'); done('a'); raise SystemExit(3)",
    "a forked child": "hold('a'); done('a'); fork()",
}

EXIT = """
import atexit, contextlib, json, os, sys, tempfile, threading, warnings
import torch
from shmcast import Admission, Writer
from shmcast.errors import ClosedError

torch.set_num_threads(1)
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
running, going, exiting = (threading.Event() for _ in range(3))
atexit.register(exiting.set)

def fn(raw):
    running.set()
    if raw[0] in "bcd":
        exiting.wait()
    return raw[1]

def hold(key):
    admission.hold(key, (key, torch.ones(100_000)))

def done(key):
    while admission._held[key].outcome is None:
        exiting.wait(0.001)

def go_on():
    with contextlib.suppress(ClosedError):
        for number in range(10**9):
            hold(f"a{number}")
            for _, handle in admission.ready():
                writer.withdraw(handle)
            if number > 20:
                going.set()

def fork():
    pid = os.fork()
    if not pid:
        sys.exit(0)
    if os.waitpid(pid, 0)[1]:
        print("the child failed")

outcomes = []
for name, how in json.loads(sys.argv[1]).items():
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            writer = Writer(1, capacity=16 << 20)
            admission = Admission(writer, fn)
            exec(how)
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
        outcomes.append((name, code, *texts))
print(json.dumps(outcomes))
"""


def test_an_interpreter_that_exits_is_quiet() -> None:
    """And leaves no name in /dev/shm, which is looked for after every test."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXIT, json.dumps(EXITS)], capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stderr) == (0, "")
    special = {"given out": (0, "1\n"), "an exception": (3, "")}
    assert json.loads(done.stdout) == [[name, *special.get(name, (0, "")), ""] for name in EXITS]


# Readers in other processes.


@pytest.mark.multiprocess
def test_processes_open_what_is_ready(ranks: Ranks) -> None:
    with (
        Writer(2, capacity=8 * MIB, policy=AT_ONCE) as writer,
        Stage(ranks, 2) as puppets,
        Admission(writer, double) as admission,
    ):
        for puppet in puppets:
            puppet("read", writer.address, puppet.number)
        for number in range(60):
            admission.hold(number, image(number, number), session=number % 3)
            if number % 10 < 9:
                continue
            while admission.held:
                for key, outcome in admission.ready(DEADLINE_SECONDS):
                    assert [puppet("open", key, outcome) for puppet in puppets] == [{2 * key}] * 2
                    for puppet in puppets:
                        puppet("drop", key)
        settled(writer)


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_reader_that_is_killed_and_never_opens_holds_nothing(ranks: Ranks) -> None:
    with (
        Writer(2, capacity=2 * MIB, policy=Policy(wait=DEADLINE_SECONDS)) as writer,
        Stage(ranks, 2) as (killed, lives),
        Admission(writer, double) as admission,
    ):
        for puppet in (killed, lives):
            puppet("read", writer.address, puppet.number)
        for key in range(5):
            admission.hold(key, image(key, key))
        until_done(admission, *range(5))
        ready = admission.ready()
        killed.kill()
        for key, outcome in ready:
            assert lives("open", key, outcome) == {2 * key}
            lives("drop", key)
        settled(writer)
        for key in range(40):  # more than the arena has room for
            admission.hold(key, image(key, key))
            _, outcome = one(admission)
            assert lives("open", key, outcome) == {2 * key}
            lives("drop", key)
        settled(writer)
        assert admission.stats().fallbacks == {}


LAST = 12


def ticks(rank: int) -> list[tuple[int, object, object]]:
    """An engine's loop on one rank: what it admits, when, and the sum of its pixels. Rank 0 receives and broadcasts."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        admitted: list[tuple[int, object, object]] = []
        admission, gate = None, Gate()
        address: list[Any] = [None]
        if rank == 0:
            writer = stack.enter_context(Writer(dist.get_world_size(), capacity=8 * MIB, policy=AT_ONCE))
            admission = stack.enter_context(Admission(writer, gate))
            stack.enter_context(gate)
            address = [writer.address]
        dist.broadcast_object_list(address, src=0)
        reader = stack.enter_context(Reader(address[0], rank))
        for tick in range(LAST + 1):
            going: list[Any] = [[]]
            if admission is not None:
                receive(admission, gate, tick)
                if tick == LAST:
                    until(lambda: "QUEUED" not in states(admission).values(), "all run")
                    until_done(admission, *admission.held)
                going = [admission.ready()]
            dist.broadcast_object_list(going, src=0)
            for key, outcome in going[0]:
                if isinstance(outcome, Handle):
                    pixels = reader.open(outcome)
                    assert isinstance(pixels, torch.Tensor)
                    outcome = int(pixels.sum())
                    del pixels
                admitted.append((tick, key, outcome))
        return admitted


def receive(admission: Admission, gate: Gate, tick: int) -> None:
    """What arrives in a tick: two large requests at first, which end in ticks 5 and 9; a text request in each."""
    if tick == 0:
        admission.hold("image", image("image", 1))
        admission.hold("video", image("video", 2), session="s")
        admission.hold("its text", None, session="s")
    ends = {5: "image", 9: "video"}
    if tick in ends:
        gate.end(ends[tick])
        until_done(admission, ends[tick])
    admission.hold(f"text {tick}", None)


@pytest.mark.multiprocess
def test_all_ranks_admit_each_request_on_the_same_tick_and_text_overtakes(ranks: Ranks) -> None:
    first, second = ranks.run(2, ticks)
    assert first == second
    expected: list[tuple[int, object, object]] = [(tick, f"text {tick}", None) for tick in range(LAST + 1)]
    expected += [(5, "image", 2 * BIG), (9, "video", 3 * BIG), (9, "its text", None)]
    assert sorted(first, key=str) == sorted(expected, key=str)
    assert [key for tick, key, _ in first if tick == 9] == ["video", "its text", "text 9"]


# A model of it: who is held, in which state, and what comes out.

WORKERS = 2
SESSIONS = st.sampled_from([None, None, "s", "t"])
numbers = st.integers(0, 1 << 16)


@dataclass(eq=False)
class Modelled:
    """A request as the model sees it. `end`: what `fn` will come to."""

    key: int
    session: str | None
    size: int
    state: str
    end: str = "NoneType"


@dataclass
class Model:
    """What is held, oldest first; which runs of `fn` go on, aborted ones too; what was published and lives."""

    held: list[Modelled] = field(default_factory=list)
    running: list[Modelled] = field(default_factory=list)
    given: list[Handle] = field(default_factory=list)

    def find(self, key: int) -> Modelled | None:
        return next((request for request in self.held if request.key == key), None)

    def settle(self) -> None:
        for request in self.held:
            if request.state == "QUEUED" and len(self.running) < WORKERS:
                request.state = "RUNNING"
                self.running.append(request)

    def due(self) -> list[Modelled]:
        return [
            request
            for number, request in enumerate(self.held)
            if request.state == "DONE"
            and not any(
                before.session == request.session is not None and before.state != "DONE"
                for before in self.held[:number]
            )
        ]

    @property
    def blocks(self) -> int:
        return len(self.given) + sum(r.state == "DONE" and r.end == "Handle" for r in self.held)


class Holding(RuleBasedStateMachine):
    MOST = 4 * SMALL

    def __init__(self) -> None:
        super().__init__()
        self.writer = Writer(1, capacity=MIB, policy=AT_ONCE)
        self.reader = Reader(self.writer.address, 0)
        self.gate = Gate()
        self.admission = Admission(self.writer, self.gate, workers=WORKERS, max_held_bytes=self.MOST)
        self.model = Model()
        self.keys = 0
        self.beyond = 0

    # What an engine does.

    @rule(session=SESSIONS)
    def hold_text(self, session: str | None) -> None:
        self.keys += 1
        self.admission.hold(self.keys, None, session=session)
        self.model.held.append(Modelled(self.keys, session, 0, "DONE"))

    @rule(session=SESSIONS, size=st.sampled_from([SMALL, SMALL, 3 * SMALL]))
    def hold(self, session: str | None, size: int) -> None:
        self.keys += 1
        self.admission.hold(self.keys, image(self.keys, 1, size), session=session)
        if sum(request.size for request in self.model.held) + size > self.MOST:
            self.beyond += 1
            self.model.held.append(Modelled(self.keys, session, 0, "DONE"))
        else:
            self.model.held.append(Modelled(self.keys, session, size, "QUEUED"))

    @precondition(lambda self: self.model.held)
    @rule(which=numbers)
    def hold_twice(self, which: int) -> None:
        key = self.model.held[which % len(self.model.held)].key
        with pytest.raises(ValueError, match="held already"):
            self.admission.hold(key, None)

    @precondition(lambda self: self.model.running)
    @rule(which=numbers, end=st.sampled_from(["Handle", "Handle", "ValueError", "NoneType"]))
    def finish(self, which: int, end: str) -> None:
        request = self.model.running.pop(which % len(self.model.running))
        request.state, request.end = "DONE", end
        by: dict[str, object] = {"Handle": None, "ValueError": ValueError("bad"), "NoneType": [Strange()]}
        self.gate.end(request.key, by=by[end])

    @precondition(lambda self: self.keys)
    @rule(which=numbers)
    def abort(self, which: int) -> None:
        key = 1 + which % (self.keys + 1)
        request = self.model.find(key)
        assert self.admission.abort(key) is (request is not None)
        if request is not None:
            self.model.held.remove(request)

    @rule(waits=st.booleans())
    def ready(self, waits: bool) -> None:
        due = self.model.due()
        ready = self.admission.ready(DEADLINE_SECONDS if waits and due else 0)
        assert kinds(ready) == [(request.key, request.end) for request in due]
        self.model.given += [outcome for _, outcome in ready if isinstance(outcome, Handle)]
        self.model.held = [request for request in self.model.held if request not in due]

    @precondition(lambda self: self.model.given)
    @rule(which=numbers, opens=st.booleans())
    def end(self, which: int, opens: bool) -> None:
        handle = self.model.given.pop(which % len(self.model.given))
        if opens:
            assert values(self.reader.open(handle)) == {2}
        else:
            self.writer.withdraw(handle)

    # What must hold.

    @invariant()
    def it_is_as_the_model(self) -> None:
        self.model.settle()
        expected = {request.key: request.state for request in self.model.held}
        until(lambda: states(self.admission) == expected, f"the states are {expected}")
        self.gate.until_running(*(request.key for request in self.model.running))
        assert self.admission.held == [request.key for request in self.model.held]
        assert self.admission.stats().fallbacks.get("held", 0) == self.beyond
        until(lambda: self.writer.stats().live_blocks == self.model.blocks, "just what was published lives")

    def teardown(self) -> None:
        try:
            with self.gate:
                pass
            self.admission.close()
            for handle in self.model.given:
                self.writer.withdraw(handle)
            until(lambda: self.writer.stats().live_blocks == 0, "all memory came back")
        finally:
            self.reader.close()
            self.writer.close()


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=25, stateful_step_count=40)


def test_it_is_exported() -> None:
    assert shmcast.Admission is Admission
