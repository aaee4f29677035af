"""What a scheduler has handed in and not taken: each request's state on this rank, and the bounds on all of them.

A request is handed in once and leaves once, by `take`, `abort` or `close`. Between the two it is

    pending   its result is not there yet
    ready     it is; its tensors may pin shared memory
    here      `take` runs `fn` on the raw inputs: it was small from the start, or was ready and evicted

Nothing of this is known to the other ranks, and nothing of it decides what a rank exchanges with them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from contextlib import suppress
from enum import Enum
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from shmcast._turn import Turn
from shmcast.errors import ClosedError, UnknownRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from shmcast._costs import Weight

REMEMBERED = 1000

NOTHING = object()
_ALL = object()


class State(Enum):
    """Where a request is."""

    PENDING = "pending"
    READY = "ready"
    HERE = "here"
    GONE = "gone"


class Request:
    """One request. `result`: what `fn` made of it, or raised; `size`: bytes of shared memory that pins.

    `weight` is None for one that is `here` from the start. `settler`: what may settle it on the caller's thread.
    """

    __slots__ = ("_unsettled", "key", "listed", "raw", "result", "settler", "size", "state", "weight")

    def __init__(self, key: Hashable, raw: Any, weight: Weight | None) -> None:
        self.key = key
        self.raw = raw
        self.weight = weight
        self.state = State.HERE if weight is None else State.PENDING
        self.result: Any = None
        self.size = 0
        self.settler: Settler | None = None
        self.listed = False
        # Held while the request is pending: a lock costs a tenth of an Event, and nothing else is asked of it.
        self._unsettled = threading.Lock()
        if weight is not None:
            self._unsettled.acquire()

    def announce(self) -> None:
        """It is pending no more."""
        with suppress(RuntimeError):
            self._unsettled.release()

    def wait(self, timeout: float) -> bool:
        """Until it is pending no more, at most `timeout` seconds; whether it is."""
        if self.state is State.PENDING and self._unsettled.acquire(timeout=timeout):
            # For others that wait; `announce` may come in between.
            self.announce()
        return self.state is not State.PENDING


class Settler(Protocol):
    """What can settle requests on the thread of one who waits for them."""

    def help(self, request: Request, timeout: float) -> None:
        """Do what there is to do within `timeout` seconds, until `request` is settled."""


class Requests:
    """The requests of one rank, oldest first. Safe to use from any thread.

    Args:
        most: how many may be pending or ready; beyond it the oldest ready one is evicted.
        most_bytes: how much shared memory the ready ones may pin.
        evicted: called for each eviction, without a lock.
    """

    def __init__(self, most: int, most_bytes: int, evicted: Callable[[], None]) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._evicted = evicted
        # A signal handler or a finalizer may call in the middle of another call of its own thread: what it wants done
        # is noted, and done when that call is over.
        self._turn = Turn()
        self._noted: SimpleQueue[Hashable] = SimpleQueue()
        self._by_key: dict[Hashable, deque[Request]] = {}
        self._here: dict[Hashable, Any] = {}
        self._ready: dict[Request, None] = {}
        self._gone: OrderedDict[Hashable, str] = OrderedDict()
        self._counted = 0
        self._bytes = 0
        self._closed = False
        self._dropped: list[Any] = []
        self._untold = 0

    def add(self, requests: Iterable[Request]) -> None:
        """Take these on, each once. A key that is there already queues: refusing it would be one rank's decision."""
        with self._turn.free():
            self._check_open()
            for request in requests:
                if request.listed:
                    continue
                request.listed = True
                self._by_key.setdefault(request.key, deque()).append(request)
                self._counted += request.state is State.PENDING
            self._evict()
        self._tidy()

    def settle(self, request: Request, result: object, size: int) -> None:
        """The result of a pending request is there; it is dropped where nobody waits for it any more."""
        with self._turn.free():
            if request.state is State.PENDING:
                request.state, request.result, request.size = State.READY, result, size
                self._ready[request] = None
                self._bytes += size
                self._evict()
                request.announce()
        del result
        self._tidy()

    def leave(self, request: Request) -> None:
        """No result will come: `take` runs `fn`."""
        with self._turn.free():
            if request.state is State.PENDING:
                request.state = State.HERE
                self._counted -= 1
                request.announce()

    def find(self, key: Hashable) -> Request:
        """The oldest request of this key; raises `UnknownRequest`, which says what became of it."""
        with self._turn.free():
            self._check_open()
            found = self._by_key.get(key)
            if not found:
                raise self._unknown(key)
            return found[0]

    def take(self, request: Request) -> tuple[State, Any]:
        """Let a settled request go: its state and result. Raises `UnknownRequest` where another thread was first."""
        with self._turn.free():
            self._check_open()
            if request.state is State.GONE:
                raise self._unknown(request.key)
            state, result = request.state, request.result
            self._remove(request, "taken")
        self._tidy()
        return state, result

    def keep(self, key: Hashable, raw: Any) -> bool:
        """Take on a request that is `here` from the start, without a lock; False where its key is there already."""
        free = key not in self._by_key and key not in self._here
        if free:
            self._check_open()
            self._here[key] = raw
        return free

    def pop(self, key: Hashable) -> Any:
        """The raw inputs of a request that was kept, which is gone then; `NOTHING` where there is none."""
        if key not in self._here:
            return NOTHING
        self._check_open()
        raw = self._here.pop(key, NOTHING)
        if raw is not NOTHING:
            self._went(key, "taken")
        return raw

    def abort(self, key: Hashable) -> bool:
        """Drop every request of this key; whether there was any. Whoever waits for one gets `UnknownRequest`."""
        if self._turn.is_mine:
            self._noted.put(key)
            return key in self._by_key or key in self._here
        with self._turn.free():
            was = self._abort(key)
        self._tidy()
        return was

    def close(self) -> None:
        """Drop all; whoever waits gets `ClosedError`."""
        self._closed = True
        if self._turn.is_mine:
            self._noted.put(_ALL)
            return
        with self._turn.free():
            self._abort(_ALL)
        self._tidy()

    def _abort(self, key: Hashable) -> bool:
        kept = list(self._here) if key is _ALL else [key]
        dropped = [each for each in kept if self._here.pop(each, NOTHING) is not NOTHING]
        for each in dropped:
            self._went(each, "aborted")
        queues = list(self._by_key.values()) if key is _ALL else [self._by_key.get(key, ())]
        found = [request for queue in queues for request in queue]
        self._dropped += [request.result for request in found]
        for request in found:
            self._remove(request, "aborted")
        return bool(found or dropped)

    def counts(self) -> tuple[int, int]:
        """How many requests were not taken, evicted ones too, and the bytes of shared memory that they pin."""
        # No lock, so that a signal handler may ask too: one dict is copied whole.
        return len(self._here) + sum(map(len, list(self._by_key.values()))), self._bytes

    def _tidy(self) -> None:
        """After each call: do what was noted meanwhile, then, without a lock, drop results and tell of evictions."""
        if self._noted.empty() and not self._dropped and not self._untold:
            return
        with self._turn.free():
            while not self._noted.empty():
                self._abort(self._noted.get_nowait())
            dropped, self._dropped = self._dropped, []
            untold, self._untold = self._untold, 0
        dropped.clear()
        for _ in range(untold):
            self._evicted()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this SchedulerBackend was closed")

    def _remove(self, request: Request, became: str) -> None:
        queue = self._by_key[request.key]
        queue.remove(request)
        if not queue:
            del self._by_key[request.key]
        if request.state is not State.HERE:
            self._counted -= 1
            self._ready.pop(request, None)
            self._bytes -= request.size
        request.state, request.result, request.size = State.GONE, None, 0
        self._went(request.key, became)
        request.announce()

    def _went(self, key: Hashable, became: str) -> None:
        self._gone.pop(key, None)
        self._gone[key] = became
        if len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)

    def _evict(self) -> None:
        """Oldest first, in the order in which they became ready."""
        while self._ready and (self._counted > self._most or self._bytes > self._most_bytes):
            request = next(iter(self._ready))
            del self._ready[request]
            self._dropped.append(request.result)
            self._counted -= 1
            self._bytes -= request.size
            request.state, request.result, request.size = State.HERE, None, 0
            self._untold += 1

    def _unknown(self, key: Hashable) -> UnknownRequest:
        became = self._gone.get(key)
        return UnknownRequest(
            f"request {key!r} was {became} already"
            if became
            else f"no request {key!r} was submitted, or it is long gone"
        )
