"""The threads behind a `SchedulerBackend`, and what each of them works through: planes, one for each rank that makes.

A thread takes batches in the order in which they were handed in and outlives whatever goes wrong in one. A maker ends
after it has said of every batch left that the others are to run `fn`, a follower at once.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from shmcast import _threads
from shmcast._entry import UNKNOWN, Entry
from shmcast._follower import Follower
from shmcast._planes import RingControl
from shmcast._requests import State
from shmcast._sent import HERE, attempt, describe
from shmcast._wire import Call
from shmcast.errors import ClosedError, MaterializeError
from shmcast.policy import Policy, Route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmcast._control import Control
    from shmcast._requests import Request, Requests
    from shmcast.metrics import Counters

DELAY = 0.01

log = logging.getLogger("shmcast")


@dataclass(frozen=True, eq=False)
class Batch:
    """What was handed in at once. `shares`: for each rank that materializes any of it, its requests."""

    number: int
    digest: int
    shares: dict[int, list[Request]]


def run_fn(fn: Callable[[Any], Any], raw: Any) -> Any:
    """`fn(raw)`, such that what it raises is the request's error, and never ends a thread or the scheduler."""
    try:
        return fn(raw)
    except Exception:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        raise MaterializeError(f"fn raised {describe(error)}") from error


def _forget_frames(error: BaseException) -> None:
    """The frames of an error hold its whole batch, in a cycle: the log keeps the traceback, the error does not."""
    log.debug("fn raised", exc_info=error)
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            each.__traceback__ = None
            pending += (each.__cause__, each.__context__)


class Work:
    """What planes need of a rank: to run `fn`, and to say what came of requests."""

    def __init__(self, fn: Callable[[Any], Any], requests: Requests, counters: Counters) -> None:
        self._fn = fn
        self._requests = requests
        self.counters = counters
        self.ending = False

    def run(self, raw: Any) -> Any:
        """`fn`, such that a thread outlives whatever it raises."""
        if self.ending:
            raise ClosedError("this SchedulerBackend was closed")
        return run_fn(self._fn, raw)

    def deliver(self, request: Request, result: object, size: int) -> None:
        """The result of one request, and the bytes of shared memory it pins."""
        if result is HERE:
            self._requests.leave(request)
            return
        if isinstance(result, Exception):
            _forget_frames(result)
        self._requests.settle(request, result, size)

    def leave(self, share: Sequence[Request]) -> None:
        """Of those that have no result none will come: `take` runs `fn`."""
        for request in share:
            self._requests.leave(request)


class Plane(ABC):
    """What one rank materializes, as this rank sees it."""

    @abstractmethod
    def share(self, batch: Batch) -> list[Request]:
        """The requests of a batch that come through this plane."""

    def takes(self, batch: Batch) -> bool:
        """Whether there is anything to do for a batch."""
        return bool(self.share(batch))

    @abstractmethod
    def run(self, batch: Batch, work: Work) -> None:
        """Materialize this plane's share of a batch, or receive it, and deliver each result."""

    def dispatch(self, batch: Batch, work: Work) -> bool:
        """`run`, where that takes no time, and nothing of this plane is under way; else False, and nothing was done."""
        return False


class Alone(Plane):
    """The plane of a rank that shares nothing with others: it makes everything itself."""

    def share(self, batch: Batch) -> list[Request]:
        return [request for share in batch.shares.values() for request in share]

    def run(self, batch: Batch, work: Work) -> None:
        share = self.share(batch)
        work.counters.observe("batch", len(share))
        fn = work.counters.timed("materialize")(work.run)
        for request in share:
            work.counters.message("local", 0)
            work.deliver(request, attempt(fn, request.raw), 0)


class Shared(Plane):
    """What the rank `control.src` makes for all. `always`: takes part in a collective, also with nothing to say."""

    def __init__(self, control: Control, end: Entry | Follower, policy: Policy, *, always: bool) -> None:
        self._control = control
        self._end = end
        # With the route raw it is what was received that fn has to run on.
        self._lazy = policy.route is not Route.RAW
        self._always = always

    @property
    def can_help(self) -> bool:
        """Whether `receive` is of any use: a thread that waits may take a header from the ring itself."""
        return isinstance(self._end, Follower) and isinstance(self._control, RingControl)

    def share(self, batch: Batch) -> list[Request]:
        return batch.shares.get(self._control.src, [])

    def takes(self, batch: Batch) -> bool:
        return self._always or bool(self.share(batch))

    def dispatch(self, batch: Batch, work: Work) -> bool:
        if not isinstance(self._end, Entry) or not isinstance(self._control, RingControl):
            return False
        share = self.share(batch)
        with self._control.turn(Call.BATCH, batch.number, batch.digest):
            if not self._end.leave_batch([request.weight or UNKNOWN for request in share]):
                return False
        work.leave(share)
        return True

    def receive(self, batch: Batch, work: Work, timeout: float) -> bool:
        """`run` on the thread of one who waits, where the header comes within `timeout` seconds; it runs no `fn`."""
        if not isinstance(self._control, RingControl) or not self._control.ready(batch.number, timeout):
            return False
        self._run(batch, work, lazy=self._lazy)
        return True

    def run(self, batch: Batch, work: Work) -> None:
        self._run(batch, work, lazy=False)

    def _run(self, batch: Batch, work: Work, *, lazy: bool) -> None:
        share = self.share(batch)
        # No fn for those that did not wait for this.
        lazy = lazy or all(request.state is not State.PENDING for request in share)
        with self._control.turn(Call.BATCH, batch.number, batch.digest):
            results = self._materialize(share, work, lazy=lazy)
        for request, result in zip(share, results, strict=True):
            work.deliver(request, result, 0)

    def _materialize(self, share: list[Request], work: Work, *, lazy: bool) -> list[Any]:
        raws = [request.raw for request in share]

        def deliver(number: int, result: object, size: int) -> None:
            work.deliver(share[number], result, size)

        if isinstance(self._end, Follower):
            return self._end.materialize_batch(raws, work.run, deliver=deliver, lazy=lazy)
        if work.ending:
            self._end.skip_batch()
            return [ClosedError("this SchedulerBackend was closed")] * len(share)
        weights = [request.weight or UNKNOWN for request in share]
        return self._end.materialize_batch(raws, work.run, weights=weights, deliver=deliver)


class _Served(ABC):
    """What one thread works for, from `_start` on."""

    def _start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        _threads.start(self._thread)

    @property
    def thread(self) -> int | None:
        """What `threading.get_ident` is in the thread."""
        return self._thread.ident

    def join(self, deadline: float) -> None:
        """Wait for the thread to end, until `deadline` of the monotonic clock."""
        if threading.get_ident() != self.thread:
            self._thread.join(max(0.0, deadline - time.monotonic()))

    @abstractmethod
    def _serve(self) -> None:
        """What the thread runs."""


class Worker(_Served):
    """One thread, and the planes through which it takes each batch."""

    def __init__(self, planes: Sequence[Plane], name: str, work: Work) -> None:
        self._planes = planes
        self._work = work
        self._batches: SimpleQueue[Batch | None] = SimpleQueue()
        self._owed = 0
        self._counting = threading.Lock()
        self._last = 0
        self._start(name)

    def put(self, batch: Batch) -> None:
        """Have a batch taken, on this thread where that takes no time; one that it was given before does nothing."""
        if not any(plane.takes(batch) for plane in self._planes):
            return
        if self._owed == 0 and len(self._planes) == 1 and self._planes[0].dispatch(batch, self._work):
            return
        with self._counting:
            self._owed += 1
        self._batches.put(batch)

    def end(self) -> None:
        """No batch comes after those that were put."""
        self._batches.put(None)

    def _serve(self) -> None:
        while (batch := self._batches.get()) is not None:
            for plane in self._planes:
                if batch.number > self._last:
                    take(plane, batch, self._work)
                self._work.leave(plane.share(batch))
            self._last = max(self._last, batch.number)
            # Nothing of it may stay while the thread waits for the next one.
            del batch
            with self._counting:
                self._owed -= 1


class Steward(_Served):
    """Follows one plane: who waits for a request takes its header himself; a thread sees to it that somebody does.

    Waking a thread for each header would cost more than most headers do. The thread sleeps while nothing is expected,
    looks in every `DELAY` seconds while something is, and takes over what came that long ago, or is that late.
    """

    def __init__(self, plane: Shared, name: str, work: Work) -> None:
        self._plane = plane
        self._work = work
        self._batches: deque[Batch] = deque()
        # Of a thread: if Ctrl-C keeps one from giving it up, it can still take it again.
        self._turn = threading.RLock()
        self._rouse: SimpleQueue[None] = SimpleQueue()
        self._asleep = False
        self._ending = False
        self._last = 0
        self._start(name)

    def put(self, batch: Batch) -> None:
        """Expect a batch; one that it was given before does nothing."""
        if self._plane.takes(batch):
            for request in self._plane.share(batch):
                request.settler = self
            self._batches.append(batch)
            # The thread says that it sleeps, and then looks for batches; we do it the other way round.
            if self._asleep:
                self._rouse.put(None)

    def help(self, request: Request, timeout: float) -> None:
        """Take headers until `request` is settled, for at most `timeout` seconds and `DELAY`."""
        if not self._turn.acquire(blocking=False):
            return
        try:
            end = time.monotonic() + min(timeout, DELAY)
            while self._batches and request.state is State.PENDING:
                batch = self._batches[0]
                if batch.number > self._last:
                    if not self._plane.receive(batch, self._work, max(0.0, end - time.monotonic())):
                        return
                    self._last = batch.number
                self._finish(batch)
        finally:
            self._turn.release()

    def end(self) -> None:
        """No batch comes after those that were put."""
        self._ending = True
        self._rouse.put(None)

    def _serve(self) -> None:
        while not self._ending:
            self._asleep = True
            if not self._batches:
                self._rouse.get()
            self._asleep = False
            self._look_in()

    def _look_in(self) -> None:
        """Take over the batches that were expected a `DELAY` ago already."""
        expected = list(self._batches)
        with suppress(Empty):
            self._rouse.get(timeout=DELAY)
        for batch in expected:
            with self._turn:
                if self._ending:
                    return
                if self._batches and self._batches[0] is batch:
                    if batch.number > self._last:
                        take(self._plane, batch, self._work)
                        self._last = batch.number
                    self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        self._work.leave(self._plane.share(batch))
        if self._batches and self._batches[0] is batch:
            self._batches.popleft()


def take(plane: Plane, batch: Batch, work: Work) -> None:
    """Take a batch through a plane, whatever happens: what has no result after it is left to `take`."""
    try:
        if plane.takes(batch):
            plane.run(batch, work)
    except BaseException:
        if not work.ending:
            log.exception("a batch failed in a thread of the SchedulerBackend: its requests run fn when taken")
