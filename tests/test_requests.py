"""What was handed in and not taken: each request's state, the bounds on all, and that nothing is kept longer."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmcast._costs import Weight
from shmcast._requests import REMEMBERED, Request, Requests, State
from shmcast.errors import ClosedError, UnknownRequest
from tests.test_headers_interrupts import at_line

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = 60.0
LARGE = 1 << 40
WEIGHT = Weight(100, False)


class Result:
    """What `fn` made. `then` is called when it is dropped."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.then = then

    def __del__(self) -> None:
        if self.then is not None:
            self.then()


def pending(key: Any) -> Request:
    return Request(key, f"raw of {key}", WEIGHT)


def nothing() -> None:
    pass


def make(most: int = 1000, most_bytes: int = LARGE, evicted: Callable[[], None] = nothing) -> Requests:
    return Requests(most, most_bytes, evicted)


def add(requests: Requests, *keys: Any) -> list[Request]:
    made = [pending(key) for key in keys]
    requests.add(made)
    return made


def drop_through_another_thread(requests: Requests, told: list[str]) -> Callable[[], None]:
    """What a finalizer does: asks the requests from another thread, which would wait for ever for a lock held here."""

    def then() -> None:
        thread = threading.Thread(target=requests.counts, daemon=True)
        thread.start()
        thread.join(LONG)
        told.append("held" if thread.is_alive() else "free")

    return then


# One at a time.


def test_a_request_waits_until_it_is_settled() -> None:
    requests = make()
    (one,) = add(requests, "a")
    assert not one.wait(0)
    assert requests.find("a") is one
    requests.settle(one, "made", 10)
    assert one.wait(0)
    assert one.wait(LONG)
    assert requests.counts() == (1, 10)
    assert requests.take(one) == (State.READY, "made")
    assert requests.counts() == (0, 0)


def test_a_request_that_is_left_is_for_take_to_make() -> None:
    requests = make()
    (one,) = add(requests, "a")
    requests.leave(one)
    assert one.wait(0)
    assert requests.take(one) == (State.HERE, None)
    assert one.raw == "raw of a"


def test_a_result_comes_once() -> None:
    requests = make()
    first, second = add(requests, "a", "b")
    requests.settle(first, "made", 1)
    requests.settle(first, "again", 2)
    requests.leave(first)
    assert requests.counts() == (2, 1)
    assert requests.take(first) == (State.READY, "made")
    requests.leave(second)
    requests.settle(second, "late", 3)
    assert requests.counts() == (1, 0)
    assert requests.take(second) == (State.HERE, None)


def test_a_key_queues_behind_itself() -> None:
    requests = make()
    first, other, second = add(requests, "a", "b", "a")
    requests.settle(second, "second", 0)
    assert requests.find("a") is first
    assert not first.wait(0)
    requests.settle(first, "first", 0)
    assert requests.take(requests.find("a")) == (State.READY, "first")
    assert requests.take(requests.find("a")) == (State.READY, "second")
    assert requests.find("b") is other


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda requests: None, "no request 'b' was submitted"),
        (lambda requests: requests.take(requests.find("b")), "request 'b' was taken already"),
        (lambda requests: requests.abort("b"), "request 'b' was aborted already"),
    ],
)
def test_an_unknown_request_says_what_became_of_it(end: Callable[[Requests], object], said: str) -> None:
    requests = make()
    if "already" in said:
        (one,) = add(requests, "b")
        requests.settle(one, "made", 0)
    end(requests)
    with pytest.raises(UnknownRequest, match=said):
        requests.find("b")
    assert not requests.abort("b")
    add(requests, "b")
    requests.find("b")


def test_only_the_last_ends_are_remembered() -> None:
    requests = make()
    for number in range(REMEMBERED + 1):
        add(requests, number)
        requests.abort(number)
    with pytest.raises(UnknownRequest, match="long gone"):
        requests.find(0)
    with pytest.raises(UnknownRequest, match="request 1 was aborted"):
        requests.find(1)


def test_an_end_is_remembered_from_the_last_time_on() -> None:
    requests = make()
    for key in (0, 1, 0, *range(2, REMEMBERED)):
        add(requests, key)
        requests.abort(key)
    add(requests, REMEMBERED)
    requests.abort(REMEMBERED)
    with pytest.raises(UnknownRequest, match="request 0 was aborted"):
        requests.find(0)
    with pytest.raises(UnknownRequest, match="long gone"):
        requests.find(1)


def test_an_abort_drops_all_of_a_key_and_wakes_who_waits() -> None:
    requests = make()
    first, second, other = add(requests, "a", "a", "b")
    requests.settle(second, "made", 7)
    told: list[str] = []

    def take() -> None:
        assert first.wait(LONG)
        with pytest.raises(UnknownRequest, match="aborted"):
            requests.take(first)
        told.append("woken")

    thread = threading.Thread(target=take)
    thread.start()
    assert requests.abort("a")
    thread.join()
    assert told == ["woken"]
    assert requests.counts() == (1, 0)
    requests.settle(first, "late", 5)
    assert requests.counts() == (1, 0)
    assert requests.find("b") is other


def test_two_who_take_the_same() -> None:
    requests = make()
    (one,) = add(requests, "a")
    requests.settle(one, "made", 0)
    requests.take(one)
    with pytest.raises(UnknownRequest, match="taken"):
        requests.take(one)


def test_after_close() -> None:
    requests = make()
    waits, ready = add(requests, "a", "b")
    result = Result()
    gone = weakref.ref(result)
    requests.settle(ready, result, 9)
    del result
    requests.close()
    assert gone() is None
    assert waits.wait(0)
    for call in (lambda: requests.find("a"), lambda: requests.take(waits), lambda: add(requests, "c")):
        with pytest.raises(ClosedError):
            call()
    requests.settle(waits, "late", 1)
    assert requests.counts() == (0, 0)
    requests.close()


# Bounds.


def test_the_first_that_was_ready_is_evicted_first() -> None:
    evicted: list[int] = []
    requests = make(most=3, evicted=lambda: evicted.append(1))
    a, b, c, d = add(requests, *"abcd")
    assert evicted == [], "none is ready"
    requests.settle(c, "c", 0)
    assert (len(evicted), c.state) == (1, State.HERE)
    for each in (d, a, b):
        requests.settle(each, each.key, 0)
    assert len(evicted) == 1
    add(requests, "e", "f")
    # Of those that are left d was ready first, then a.
    assert [each.state for each in (a, b, c, d)] == [State.HERE, State.READY, State.HERE, State.HERE]
    assert len(evicted) == 3
    assert requests.counts() == (6, 0), "an evicted one is there still"
    assert requests.take(d) == (State.HERE, None)


def test_as_many_bytes_as_may_be_pinned() -> None:
    evicted: list[int] = []
    requests = make(most_bytes=100, evicted=lambda: evicted.append(1))
    a, b, c = add(requests, *"abc")
    requests.settle(a, "a", 60)
    requests.settle(b, "b", 40)
    assert evicted == []
    requests.settle(c, "c", 1)
    assert (requests.counts(), evicted) == ((3, 41), [1])
    assert a.state is State.HERE
    (huge,) = add(requests, "d")
    requests.settle(huge, "d", 101)
    assert (requests.counts(), len(evicted)) == ((4, 0), 4)
    assert huge.wait(0)
    assert requests.take(huge) == (State.HERE, None)


# What is dropped.


WAYS: dict[str, Callable[[Requests, Request], object]] = {
    "abort": lambda requests, one: requests.abort("a"),
    "close": lambda requests, one: requests.close(),
    "evicted by a result": lambda requests, one: requests.settle(add(requests, "x")[0], None, LARGE),
    "evicted by count": lambda requests, one: add(requests, *range(1000)),
    "taken and dropped": lambda requests, one: requests.take(one),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_dropped_is_dropped_without_a_lock(way: str) -> None:
    requests = make()
    told: list[str] = []
    (one,) = add(requests, "a")
    requests.settle(one, Result(drop_through_another_thread(requests, told)), LARGE)
    WAYS[way](requests, one)
    assert told == ["free"]


def test_a_result_that_nobody_waits_for_is_dropped_without_a_lock() -> None:
    requests = make()
    told: list[str] = []
    (one,) = add(requests, "a")
    requests.abort("a")
    requests.settle(one, Result(drop_through_another_thread(requests, told)), 1)
    assert told == ["free"]


def test_an_eviction_is_told_without_a_lock() -> None:
    told: list[str] = []
    requests = make(most=1, evicted=lambda: drop_through_another_thread(requests, told)())
    for one in add(requests, "a", "b"):
        requests.settle(one, "made", 0)
    assert told == ["free"]


@pytest.mark.parametrize("way", WAYS)
def test_a_finalizer_may_call_back(way: str) -> None:
    requests = make()
    told: list[object] = []

    def then() -> None:
        told.append(requests.abort("b"))
        requests.counts()

    one, other = add(requests, "a", "b")
    requests.settle(other, Result(lambda: told.append("b")), 1)
    requests.settle(one, Result(then), LARGE)
    WAYS[way](requests, one)
    assert [each for each in told if each is not False] in (["b", True], ["b"])
    if way != "close":
        with pytest.raises(UnknownRequest):
            requests.find("b")


CALLS: dict[str, Callable[[Requests, Request, Request], object]] = {
    "add": lambda requests, waits, ready: add(requests, "c", "d"),
    "settle": lambda requests, waits, ready: requests.settle(waits, "made", 2),
    "leave": lambda requests, waits, ready: requests.leave(waits),
    "find": lambda requests, waits, ready: requests.find("b"),
    "take": lambda requests, waits, ready: requests.take(ready),
    "abort": lambda requests, waits, ready: requests.abort("b"),
}
HANDLERS: dict[str, Callable[[Requests], object]] = {
    "counts": lambda requests: requests.counts(),
    "abort": lambda requests: requests.abort("b"),
    "close": lambda requests: requests.close(),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("call", CALLS)
def test_a_signal_handler_may_call_at_any_line(call: str, handler: str) -> None:
    """Nobody waits for himself, the bounds stay counted right, and all that is left can be dropped."""
    for nth in range(1, 100):
        requests = make(most=2, most_bytes=10)
        waits, ready, _ = add(requests, "a", "b", "b")
        requests.settle(ready, "made", 3)
        told, reached = at_line(
            partial(CALLS[call], requests, waits, ready), "_requests.py", nth, partial(HANDLERS[handler], requests)
        )
        assert not isinstance(told, Exception) or type(told) in (ClosedError, UnknownRequest), told
        for key in "abcde":
            requests.abort(key)
        assert requests.counts() == (0, 0)
        assert requests._counted == 0
        if not reached:
            return
    pytest.fail("the call has no end")


def test_many_threads_leave_nothing() -> None:
    requests = make(most=5, most_bytes=50)
    results: list[weakref.ref[Result]] = []

    def work(seed: int) -> None:
        for number in range(200):
            (one,) = add(requests, (number * seed) % 3)
            result = Result()
            results.append(weakref.ref(result))
            requests.settle(one, result, number % 20)
            del result
            if number % 3:
                requests.abort((number + seed) % 3)
            else:
                try:
                    requests.take(requests.find(number % 3))
                except UnknownRequest:
                    continue

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in range(3):
        requests.abort(key)
    assert requests.counts() == (0, 0)
    gc.collect()
    assert not [ref for ref in results if ref() is not None]


# Against a model.


@dataclass(eq=False)
class Entry:
    """A request that was not taken, as the model knows it."""

    request: Request
    state: State = State.PENDING
    size: int = 0
    result: weakref.ref[Result] | None = None


class Bookkeeping(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.ready: list[Entry] = []
        self.gone: list[weakref.ref[Result]] = []
        self.ended: dict[int, str] = {}
        self.evicted = self.expected = 0

    @initialize(most=st.integers(1, 8), most_bytes=st.integers(1, 300))
    def make(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.requests = Requests(most, most_bytes, self.count)

    def count(self) -> None:
        self.evicted += 1

    @rule(keys=st.lists(st.integers(0, 4), max_size=4), here=st.booleans())
    def add(self, keys: list[int], here: bool) -> None:
        made = [Request(key, None, None if here else WEIGHT) for key in keys]
        self.requests.add(made)
        self.entries += [Entry(request, State.HERE if here else State.PENDING) for request in made]
        self.evict()

    @precondition(lambda self: self.entries)
    @rule(which=st.integers(0, 1 << 16), size=st.integers(0, 120))
    def settle(self, which: int, size: int) -> None:
        entry = self.entries[which % len(self.entries)]
        result = Result()
        self.requests.settle(entry.request, result, size)
        if entry.state is not State.PENDING:
            self.gone.append(weakref.ref(result))
            return
        entry.state, entry.size, entry.result = State.READY, size, weakref.ref(result)
        self.ready.append(entry)
        del result
        self.evict()

    @precondition(lambda self: self.entries)
    @rule(which=st.integers(0, 1 << 16))
    def leave(self, which: int) -> None:
        entry = self.entries[which % len(self.entries)]
        self.requests.leave(entry.request)
        if entry.state is State.PENDING:
            entry.state = State.HERE

    @rule(key=st.integers(0, 5))
    def take(self, key: int) -> None:
        found = [entry for entry in self.entries if entry.request.key == key]
        if not found:
            with pytest.raises(UnknownRequest, match=self.ended.get(key, "no request")):
                self.requests.find(key)
            return
        assert self.requests.find(key) is found[0].request
        if found[0].state is State.PENDING:
            assert not found[0].request.wait(0)
            return
        state, result = self.requests.take(found[0].request)
        assert state is found[0].state
        assert result is (found[0].result() if found[0].result else None)
        del result
        self.remove(found[0], "taken")

    @rule(key=st.integers(0, 5))
    def abort(self, key: int) -> None:
        found = [entry for entry in self.entries if entry.request.key == key]
        assert self.requests.abort(key) is bool(found)
        for entry in found:
            self.remove(entry, "aborted")

    def remove(self, entry: Entry, became: str) -> None:
        self.entries.remove(entry)
        self.ended[entry.request.key] = became  # type: ignore[index]
        if entry in self.ready:
            self.ready.remove(entry)
        if entry.result is not None:
            self.gone.append(entry.result)
        assert entry.request.wait(0)
        with pytest.raises(UnknownRequest):
            self.requests.take(entry.request)

    def evict(self) -> None:
        while self.ready and (
            sum(entry.state is not State.HERE for entry in self.entries) > self.most
            or sum(entry.size for entry in self.entries) > self.most_bytes
        ):
            oldest = self.ready.pop(0)
            assert oldest.result is not None
            self.gone.append(oldest.result)
            oldest.state, oldest.size, oldest.result = State.HERE, 0, None
            self.expected += 1

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "requests"):
            return
        assert self.requests.counts() == (len(self.entries), sum(entry.size for entry in self.entries))
        assert self.evicted == self.expected
        assert [entry.request.state for entry in self.entries] == [entry.state for entry in self.entries]
        assert all(entry.request.wait(0) is (entry.state is not State.PENDING) for entry in self.entries)
        assert all(entry.result is None or entry.result() is not None for entry in self.entries)
        assert not [ref for ref in self.gone if ref() is not None], "no result is kept after it left"


TestBookkeeping = Bookkeeping.TestCase
TestBookkeeping.settings = settings(max_examples=60, stateful_step_count=40)
