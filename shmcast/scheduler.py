"""For engines that run one scheduler a rank: a batch is handed in, the scheduler goes on, `take` gives one's inputs.

    submit -> who materializes what -> each rank's maker thread: fn, publish, one header -> followers: map -> take

Every rank submits the same batches in the same order, and computes alike who materializes which request. A rank that
materializes has a plane of its own: a `Writer` with the other ranks as readers, one thread that makes and sends, and on
each other rank one thread that follows. No two planes wait for each other, and no thread waits for the scheduler.
"""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakSet

import torch.distributed as dist

from shmcast._control import GroupControl, cpu_group
from shmcast._crew import Crew
from shmcast._joining import Settings, check_ring, patience
from shmcast._points import nowhere
from shmcast._requests import NOTHING, Request, Requests, State
from shmcast._room import default_capacity
from shmcast._sent import size_of, weigh
from shmcast._turn import Turn
from shmcast._workers import Batch, Work, run_fn
from shmcast.errors import ShmcastError, closed_error
from shmcast.metrics import Counters, Stats, merge
from shmcast.multimodal import MultimodalInputs
from shmcast.policy import Policy, Route

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from torch.distributed import ProcessGroup

    from shmcast._points import Reached
    from shmcast._segment import Isolation

DEFAULT_TIMEOUT = 300.0
EXIT_PATIENCE = 5.0
MONTH = 30 * 86400.0
SLICE = 0.5
CHEAP = 200e-6

_backends: WeakSet[SchedulerBackend] = WeakSet()


class SchedulerBackend:
    """One rank's part of a group of schedulers that hold the same raw inputs. Every rank makes one, alike. Collective.

    Every rank submits the same batches in the same order; everything else is one rank's own business and may come from
    any thread. `fn` runs in a thread of the backend, once for each request over all ranks, unless a fallback or the
    route `auto` has every rank run it; it must not call the backend, and may add plain values to `raw` (a hash), but no
    tensors, arrays or long lists.

    Args:
        group: a process group; default the default one. Only the constructor uses it. A group of one, or no
            torch.distributed: `fn` runs here, in a thread.
        fn: makes a request's inputs out of its raw inputs; deterministic, and can be run again on the same `raw`.
        src: the rank of the group that materializes, with `placement="entry"`.
        placement: `entry`: one rank materializes all. `spread`: the requests of a batch are materialized by different
            ranks, largest first onto the one that was given the fewest bytes so far; each maps what the others made.
        control: `ring`: headers go through shared memory. `group`: through a gloo group that the constructor makes over
            the same ranks, by one thread.
        capacity: the most bytes of shared memory of each rank that materializes; default `SHMCAST_CAPACITY`, else a
            quarter of what is free, at most 2 GiB, divided among them.
        isolation, pin: as for `Reader`; may differ between ranks. They mean nothing for what this rank makes itself.
        policy: how messages travel. Needs `peers_hold_raw`, and no `agree`: `fn` is run again on any rank. The routes
            `inline` and `pickle`, and `inline_max`, need `control="group"` and `placement="entry"`.
        allow: classes, or names of packages, whose instances may travel; `shmcast.multimodal` always may.
        timeout: seconds that a rank waits for another one's header: more than the longest batch takes. After it `fn`
            runs here.
        max_pending: requests that may be pending or ready at once. Beyond it the oldest ready one is evicted: its
            memory goes back, and `take` runs `fn`.
        max_pending_bytes: shared memory that ready requests may pin; default half of what the ranks may use.
        reached: as for `Writer`.

    Raises:
        ValueError, TypeError: this rank's arguments or environment are wrong.
        ShmcastError: those of another rank are, which the message names; or the group's collectives fail.
        OSError: there is no thread to be had on this rank; the others then run `fn` themselves.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        fn: Callable[[Any], Any] = MultimodalInputs.from_dict,
        *,
        src: int = 0,
        placement: Literal["entry", "spread"] = "entry",
        control: Literal["ring", "group"] = "ring",
        capacity: int | None = None,
        isolation: Isolation | None = None,
        pin: bool = False,
        policy: Policy | None = None,
        allow: Iterable[type | str] = (),
        timeout: float = DEFAULT_TIMEOUT,
        max_pending: int = 1000,
        max_pending_bytes: int | None = None,
        reached: Reached = nowhere,
    ) -> None:
        self._fn = fn
        self._placement = placement
        self._counters = Counters()
        self._turn = Turn()
        self._closed = False
        self._pid = os.getpid()
        self._left = False
        self._batches = 0
        # Seconds that fn takes on inputs that carry their hashes, a running mean.
        self._hashed = math.inf
        self._timeout = patience(timeout, DEFAULT_TIMEOUT)
        self._crew = Crew(self._counters)
        settings: Settings | Exception
        cpu = cpu_group(group)
        size = 1 if cpu is None else dist.get_world_size(cpu)
        try:
            settings = Settings(src, capacity, isolation, control, policy or Policy(), allow, timeout, reached, pin=pin)
            settings = self._check(settings, size, max_pending, max_pending_bytes)
        except Exception as error:
            settings = error
        try:
            if cpu is not None:
                self._crew.join(GroupControl(cpu, self._timeout), settings, spread=placement == "spread")
            if isinstance(settings, Exception):
                raise settings
        except BaseException:
            self._leave(0.0)
            raise
        writers = size if placement == "spread" else 1
        self._local_below = settings.policy.local_below if settings.policy.route is Route.AUTO else 0
        self._loads = [0] * writers
        if max_pending_bytes is None:
            max_pending_bytes = writers * (settings.capacity or default_capacity(writers)) // 2
        self._requests = Requests(max_pending, max_pending_bytes, self._counters.evicted)
        self._work = Work(fn, self._requests, self._counters)
        try:
            self._crew.start(self._work)
        except BaseException:
            self._leave(0.0)
            raise
        _backends.add(self)

    # What a scheduler calls.

    def submit(self, batch: Iterable[tuple[Hashable, Any]]) -> None:
        """Hand in a batch of (key, raw inputs), and go on. Every rank submits the same one, in the same order.

        A key that was submitted before and not taken queues behind itself. Raises `ValueError` for a key that is in the
        batch twice, `ClosedError`.
        """
        self._check_open()
        pairs = list(batch)
        if len({key for key, _ in pairs}) != len(pairs):
            twice = next(key for number, (key, _) in enumerate(pairs) if key in [other for other, _ in pairs[:number]])
            raise ValueError(f"a key is in the batch twice: {twice!r}; submit it in two batches")
        sizes = [size_of(raw) for _, raw in pairs]
        small = sum(sizes) < self._local_below
        if small:
            pairs = [(key, raw) for key, raw in pairs if not self._requests.keep(key, raw)]
            if not pairs:
                return
        requests = [
            Request(key, raw, None if small else weigh(raw, size))
            for (key, raw), size in zip(pairs, sizes[: len(pairs)], strict=True)
        ]
        with self._turn.free():
            if small or not requests:
                self._requests.add(requests)
                return
            made, loads = self._plan(requests)
            try:
                self._hand_in(made, loads, requests)
            except BaseException:
                # Ctrl-C in the middle: the other ranks have this batch, and wait for this one's share.
                self._hand_in(made, loads, requests)
                raise

    def take(self, key: Hashable, timeout: float | None = None) -> Any:
        """The inputs of one request, which is gone then; waits for that request only.

        Raises what `fn` raised, `UnknownRequest` for a key that is not there (any more), `TimeoutError` after `timeout`
        seconds, with the request as it was, `ClosedError`.
        """
        self._check_open()
        if threading.get_ident() in self._crew.threads:
            raise ShmcastError(f"fn called take({key!r}): it would wait for itself")
        kept = self._requests.pop(key)
        if kept is not NOTHING:
            return self._run(kept)
        request = self._requests.find(key)
        hashed = request.weight is not None and request.weight.hashed
        if request.state is State.PENDING:
            # Whatever the header says, this is done before it would have come. It comes all the same, and is heard.
            if hashed and request.settler is not None and self._hashed < CHEAP:
                self._requests.leave(request)
            else:
                with self._counters.timed("take_wait"):
                    self._wait(request, timeout)
        state, result = self._requests.take(request)
        if state is State.HERE:
            return self._run(request.raw, hashed=hashed)
        if isinstance(result, Exception):
            try:
                raise result
            finally:
                # No cycle of the error and this frame, in which the raw inputs would stay.
                del result, request
        return result

    def abort(self, key: Hashable) -> bool:
        """Drop every request of this key on this rank, and give its memory back; whether there was one."""
        self._check_open()
        return self._requests.abort(key)

    @property
    def route(self) -> Route:
        """What the ranks agreed on in the constructor: `shm`, or what the group does without shared memory."""
        return self._crew.route

    def stats(self) -> Stats:
        """This rank's counters, and memory and leases of its own arena."""
        self._check_open()
        pending, pending_bytes = self._requests.counts()
        own = self._counters.stats(pending=pending, pending_bytes=pending_bytes)
        mine = [self._crew.writer.stats()] if self._crew.writer else []
        return merge(own, *mine, *(reader.stats() for reader in self._crew.readers))

    def close(self) -> None:
        """End this rank's part; no collective. Whoever waits in `take` gets `ClosedError`.

        Waits for a running `fn`, at most `timeout` seconds. Of batches in flight the other ranks run `fn` themselves.
        Objects that were taken stay valid.
        """
        if not self._left:
            self._leave(self._timeout)

    def __enter__(self) -> SchedulerBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait(self, request: Request, timeout: float | None) -> None:
        """Until a request is settled: by this thread, if its header is about to come, else by another."""
        end = time.monotonic() + (MONTH if timeout is None else timeout)
        while request.state is State.PENDING:
            if request.settler is not None:
                request.settler.help(request, end - time.monotonic())
            left = end - time.monotonic()
            if not request.wait(max(0.0, min(left, SLICE))) and left <= 0:
                raise TimeoutError(
                    f"request {request.key!r}: its inputs were not there within {timeout:g} s; take it again, or abort "
                    "it, and look at the rank that makes it"
                )

    def _run(self, raw: Any, *, hashed: bool = False) -> Any:
        self._counters.message("local", 0)
        started = time.perf_counter()
        try:
            return run_fn(self._fn, raw)
        finally:
            took = time.perf_counter() - started
            self._counters.observe("materialize", took)
            if hashed:
                self._hashed = took if self._hashed == math.inf else (7 * self._hashed + took) / 8

    def _leave(self, wait: float) -> None:
        self._closed = True
        if hasattr(self, "_work"):
            self._work.ending = True
            self._requests.close()
        self._crew.close(wait)
        self._left = True

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error("this SchedulerBackend", self._pid)

    def _check(self, settings: Settings, size: int, max_pending: int, max_pending_bytes: int | None) -> Settings:
        if self._placement not in ("entry", "spread"):
            raise ValueError(f"placement={self._placement!r}: 'entry' or 'spread'")
        for name, bound in (("max_pending", max_pending), ("max_pending_bytes", max_pending_bytes)):
            if bound is not None and bound < 1:
                raise ValueError(f"{name}={bound}: at least 1")
        if not callable(self._fn):
            raise TypeError(f"fn={self._fn!r}: something to call")
        settings = settings.check(size)
        if not settings.policy.peers_hold_raw:
            raise ValueError("Policy(peers_hold_raw=False): a SchedulerBackend needs raw inputs on every rank")
        if settings.policy.agree:
            raise ValueError("Policy(agree=True): a SchedulerBackend runs fn again on any rank; use a Broadcaster")
        if self._placement == "spread":
            check_ring(settings.policy)
        return settings

    def _plan(self, requests: list[Request]) -> tuple[Batch, list[int]]:
        """The batch, and what each rank was given then: from order and shapes alone, so alike on all ranks."""
        number, loads = self._batches + 1, list(self._loads)
        shares: dict[int, list[Request]] = {}
        if self._placement == "entry":
            shares[self._crew.src] = requests
        else:
            for request in sorted(requests, key=lambda request: -_nbytes(request)):
                owner = loads.index(min(loads))
                loads[owner] += max(1, _nbytes(request))
                shares.setdefault(owner, []).append(request)
        return Batch(number, _digest(number, shares), shares), loads

    def _hand_in(self, batch: Batch, loads: list[int], requests: list[Request]) -> None:
        """Can be done again where it was interrupted."""
        self._batches, self._loads = batch.number, loads
        self._requests.add(requests)
        self._crew.put(batch)


def _nbytes(request: Request) -> int:
    return request.weight.nbytes if request.weight else 0


def _told(key: object) -> object:
    """What of a key reads the same in every process."""
    if isinstance(key, (tuple, frozenset)):
        return sorted(map(repr, map(_told, key))) if isinstance(key, frozenset) else tuple(map(_told, key))
    return key if type(key) in (str, int, bytes, float, bool, type(None)) else type(key).__qualname__


def _digest(number: int, shares: dict[int, list[Request]]) -> int:
    """Of what all ranks must have handed in alike: keys that read the same everywhere, sizes, and who makes what."""
    told = [(owner, _nbytes(request), _told(request.key)) for owner, share in shares.items() for request in share]
    return int.from_bytes(blake2b(repr((number, told)).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _forget() -> None:
    for backend in list(_backends):
        backend._closed = backend._left = True


def _close_all() -> None:
    """At exit, so that no thread runs into a dying interpreter; a `fn` that hangs does not keep it."""
    for backend in list(_backends):
        if not backend._left:
            backend._leave(EXIT_PATIENCE)


os.register_at_fork(after_in_child=_forget)
atexit.register(_close_all)
