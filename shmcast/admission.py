"""Requests that wait at the entry rank until their inputs are published: for engines that broadcast them themselves.

    received -> hold -> a worker: fn, publish -> ready -> the engine's own broadcast -> every rank opens the handle

Only the entry rank decides when a request goes on, and it does so before its broadcast: all ranks admit it on the same
tick, no collective is added, and no rank waits for another.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from dataclasses import dataclass
from enum import Enum, auto
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakSet

from shmcast import _threads
from shmcast._codec import encode
from shmcast._sent import describe, walk
from shmcast._wire import Handle
from shmcast.errors import ArenaFull, EncodeError, MaterializeError, closed_error
from shmcast.metrics import Counters, Stats
from shmcast.transport import Writer  # noqa: TC001 - at exit ours are closed before its: its hook must be older

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

DEFAULT_HELD_BYTES = 1 << 30

Outcome: TypeAlias = Handle | Exception | None

log = logging.getLogger("shmcast")

_admissions: WeakSet[Admission] = WeakSet()


class _State(Enum):
    """What a request that is held waits for: a worker, its worker, or to be given out."""

    QUEUED = auto()
    RUNNING = auto()
    DONE = auto()


@dataclass(eq=False)
class _Request:
    """One request that is held, which is: in `Admission._held`. Whoever takes it out of there ends it."""

    key: Hashable
    session: Hashable
    since: float
    raw: Any
    size: int
    state: _State = _State.QUEUED
    outcome: Outcome = None


class Admission:
    """Holds each request until `fn(raw)` is published, at the entry rank alone. Safe to use from any thread.

    A tick of the engine: `hold` what has arrived, broadcast what is `ready`. A handle opens once in each reader. An
    entry rank that opens handles as the others do is one of the writer's readers, with an index and a `Reader` of its
    own. What the engine drops after it was ready, it withdraws from the writer.

    Args:
        writer: publishes; it belongs to the caller, who closes it after this.
        fn: makes the inputs out of raw ones, on several threads at once. It must not call this object. Where it gives
            None nothing is published, and the request goes on as it came; so where it raises `ArenaFull`.
        workers: threads that run `fn` and publish.
        max_held_bytes: the most bytes of raw's tensors that may be held; a request beyond it goes on raw.
        readers: the indices of those who open; default all of the writer's.

    Raises:
        OSError: there is no thread to be had.
    """

    def __init__(
        self,
        writer: Writer,
        fn: Callable[[Any], object],
        *,
        workers: int = 2,
        max_held_bytes: int = DEFAULT_HELD_BYTES,
        readers: Iterable[int] | None = None,
    ) -> None:
        everyone = range(writer.address.readers)
        self._readers = tuple(everyone if readers is None else readers)
        if any(reader not in everyone for reader in self._readers):
            raise ValueError(f"readers={self._readers}: this writer has readers 0 to {everyone[-1]}")
        if workers < 1:
            raise ValueError(f"workers={workers}: at least one")
        if max_held_bytes < 0:
            raise ValueError(f"max_held_bytes={max_held_bytes}: 0 or more")
        self._writer = writer
        self._fn = fn
        self._max_held_bytes = max_held_bytes
        self._counters = Counters()
        writer.count(self._counters)
        self._held: dict[Hashable, _Request] = {}
        self._closed = False
        self._pid = os.getpid()
        # Entered as a lock: Ctrl-C inside Condition.__enter__ would leave it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._threads: list[threading.Thread] = []
        _admissions.add(self)
        try:
            for number in range(workers):
                thread = threading.Thread(target=self._work, name=f"shmcast-admission-{number}", daemon=True)
                _threads.start(thread)
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def hold(self, key: Hashable, raw: Any, *, session: Hashable = None, nbytes: int | None = None) -> None:
        """Keep a request back until its inputs are published; returns at once.

        Args:
            key: names the request until `ready` or `abort` let it go.
            raw: what `fn` takes; nobody may write to it meanwhile. None: a text request, which is ready at once.
            session: requests of one session are ready in the order in which they were held.
            nbytes: what the request counts for within `max_held_bytes`; default the bytes of raw's tensors.

        Raises:
            ValueError: the key is held already.
            TypeError: key or session cannot be hashed.
            ClosedError: this was closed.
        """
        hash((key, session))
        if nbytes is None:
            leaves = walk(raw)
            nbytes = 0 if leaves is None else leaves.nbytes
        request = _Request(key, session, monotonic(), raw, nbytes)
        with self._lock:
            self._check_open()
            if key in self._held:
                raise ValueError(f"request {key!r} is held already: abort it first, or give this one another key")
            held = sum(other.size for other in self._held.values())
            beyond = raw is not None and held + request.size > self._max_held_bytes
            if raw is None or beyond:
                request.raw, request.size, request.state = None, 0, _State.DONE
            # Said before it is so, which nobody can tell: Ctrl-C in between must not leave a request that no worker
            # has heard of.
            self._changed.notify_all()
            self._held[key] = request
        if beyond:
            self._fallback("held", f"{held} of {self._max_held_bytes} bytes are held already")

    def ready(self, timeout: float = 0.0) -> list[tuple[Any, Outcome]]:
        """What can go on now, each once, by key, in the order in which it was held.

        Beside the key stands a `Handle`: every reader can open it once. An exception: `fn` raised it, the request is
        bad. None: the request goes on as it came, with its raw inputs if it has any: there was no room to hold it,
        `fn` gave None, or it could not be published. `stats().fallbacks` counts all but the second.

        Args:
            timeout: seconds to wait until there is something, or until `close`; 0 never waits.

        Raises:
            ClosedError: this was closed before.
        """
        due: list[_Request] = []
        try:
            with self._lock:
                self._check_open()
                if timeout > 0:
                    self._changed.wait_for(lambda: self._closed or self._due(), min(timeout, threading.TIMEOUT_MAX))
                if not self._closed:
                    due = self._due()
                    for request in due:
                        del self._held[request.key]
            now = monotonic()
            for request in due:
                self._counters.observe("hold", now - request.since)
            given = [(request.key, request.outcome) for request in due]
            return given  # alone: Ctrl-C is noticed after a call, and behind this line it would lose them
        except BaseException:
            self._put_back(due)  # Ctrl-C
            raise

    def abort(self, key: Hashable) -> bool:
        """Drop a request that is held: it will not run, what came of it is withdrawn, its session goes on.

        Returns:
            Whether it was held. One that `ready` has given out is the caller's, and so is its handle.

        Raises:
            ClosedError: this was closed.
        """
        with self._lock:
            self._check_open()
            request = self._held.pop(key, None)
            self._changed.notify_all()
        if request is None:
            return False
        self._withdraw(request.outcome)
        return True

    @property
    def held(self) -> list[Any]:
        """The keys of the requests that are held, oldest first."""
        with self._lock:
            self._check_open()
            return list(self._held)

    def stats(self) -> Stats:
        """What was published, fallbacks by reason, and how long `hold`, `materialize` and `publish` took."""
        with self._lock:
            self._check_open()
        return self._counters.stats()

    def close(self) -> None:
        """Hold no more, run no more, withdraw what was not given out. Waits for each `fn` that is running."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
        # One by one: a `ready` that Ctrl-C ends by now puts back what it took, and closes again.
        for request in list(self._held.values()):
            self._withdraw(request.outcome)
            self._held.pop(request.key, None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # State. All of these run under the lock.

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error("this Admission", self._pid)

    def _due(self) -> list[_Request]:
        """What is done, and has nothing before it in its session that is not; oldest first."""
        due = []
        waiting = set()
        for request in self._held.values():
            if request.session in waiting:
                continue
            if request.state is _State.DONE:
                due.append(request)
            elif request.session is not None:
                waiting.add(request.session)
        return due

    def _wants(self, request: _Request) -> bool:
        """Whether nobody dropped it while it ran."""
        return not self._closed and self._held.get(request.key) is request

    # Workers.

    def _work(self) -> None:
        while (request := self._take()) is not None:
            self._finish(request, *self._materialize(request.raw))
            del request  # a worker that waits keeps nothing alive, and an error, whose traceback leads here, not itself

    def _take(self) -> _Request | None:
        """Wait for a request that is queued, the oldest; from now on it is running. None after `close`."""
        with self._lock:
            while not self._closed:
                request = next((each for each in self._held.values() if each.state is _State.QUEUED), None)
                if request is not None:
                    request.state = _State.RUNNING
                    return request
                self._changed.wait()
        return None

    def _materialize(self, raw: Any) -> tuple[object, Outcome]:
        """What `fn` gives, and why it gives nothing."""
        try:
            with self._counters.timed("materialize"):
                return self._fn(raw), None
        except ArenaFull as error:  # of memory that fn asked a writer for: not the request's error
            self._fallback("full", describe(error))
            return None, None
        except Exception as error:
            return None, error
        except BaseException as error:
            failure = MaterializeError(f"fn raised {describe(error)}")
            failure.__cause__ = error
            return None, failure

    def _finish(self, request: _Request, obj: object, outcome: Outcome) -> None:
        request.raw = None
        if outcome is None and obj is not None and self._wants(request):
            outcome = self._publish(obj)
        with self._lock:
            kept = self._wants(request)
            if kept:
                request.outcome = outcome
                request.state = _State.DONE
                self._changed.notify_all()
        if not kept:
            self._withdraw(outcome)

    def _publish(self, obj: object) -> Handle | None:
        """None: whatever the transport has, it is not the request's error."""
        try:
            with self._counters.timed("publish"):
                encoded = encode(obj, self._writer.allow)
                handle = self._writer.put(encoded, readers=self._readers, opens=1)
        except BaseException as error:
            self._fallback(_reason(error), describe(error))
            return None
        self._counters.message("shm", encoded.nbytes)
        return handle

    # What several of the above do, without the lock.

    def _withdraw(self, outcome: Outcome) -> None:
        if isinstance(outcome, Handle):
            self._writer.withdraw(outcome)

    def _put_back(self, due: list[_Request]) -> None:
        """Hold again what was not given out after all. Before all others: each was the first of its session."""
        with self._lock:
            self._changed.notify_all()
            self._held = {request.key: request for request in due} | self._held
            closed = self._closed
        if closed:
            self.close()

    def _fallback(self, reason: str, detail: str) -> None:
        if self._counters.fallback(reason):
            log.warning("fallback (%s), said once, then only counted: the request goes on raw: %s", reason, detail)

    def _forget(self) -> None:
        """In a forked child there are no workers, and the lock may have been held by a thread that is not there."""
        self._closed = True
        self._held = {}
        self._threads = []
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)


def _reason(error: BaseException) -> str:
    if isinstance(error, (ArenaFull, OSError)):
        return "full"
    return "encode" if isinstance(error, EncodeError) else "writer"


def _forget_all() -> None:
    for admission in list(_admissions):
        admission._forget()


def _close_all() -> None:
    """At exit, while the writers are still open."""
    for admission in list(_admissions):
        admission.close()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)
