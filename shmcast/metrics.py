"""Counters of what travelled and how, and the frozen record that a user sees of them."""

from __future__ import annotations

import math
import os
import threading
import weakref
from bisect import bisect_left
from collections import Counter
from contextlib import ContextDecorator
from dataclasses import dataclass, field
from itertools import accumulate
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

TIMES: Final = ("hold", "materialize", "publish", "header", "map", "take_wait")
BATCH: Final = "batch"

# Upper bounds of buckets: seconds, and requests.
_SECONDS: Final = (
    *(10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6),
    *(1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, math.inf),
)
_REQUESTS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, math.inf)


class Traffic(NamedTuple):
    """What travelled: messages, and the bytes of their tensors that were copied, mapped or sent."""

    messages: int
    bytes: int


@dataclass(frozen=True)
class Histogram:
    """How often which values were seen.

    Attributes:
        count: how many values.
        sum: all of them added up.
        buckets: upper bounds, rising, the last one infinite, each with how many values were at most that.
    """

    count: int
    sum: float
    buckets: tuple[tuple[float, int], ...]


class _Tally:
    """A histogram that still counts. `counts`: values by bucket, each above the bound before, at most its own."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * len(bounds)
        self.sum = 0.0

    def freeze(self) -> Histogram:
        buckets = tuple(zip(self.bounds, accumulate(self.counts), strict=True))
        return Histogram(buckets[-1][1], self.sum, buckets)


_NO_TIMES: Final = MappingProxyType({name: _Tally(_SECONDS).freeze() for name in TIMES})
_NO_BATCHES: Final = _Tally(_REQUESTS).freeze()


@dataclass(frozen=True)
class ReaderLeases:
    """What one reader holds of a writer's arena.

    Attributes:
        reader: its index.
        alive: None while it has not come, False once it has died or left.
        held: leases that it was given and has not given back.
        opened: those of them that it has opened.
        oldest: seconds since the oldest of them was given, None where there is none.
    """

    reader: int
    alive: bool | None
    held: int
    opened: int
    oldest: float | None


@dataclass(frozen=True)
class Stats:
    """A snapshot; all counts are since the object was made.

    Attributes:
        messages: messages published (writer, entry rank) or received (reader, other ranks).
        bytes: bytes of their tensors that travelled; a reference leaf counts nothing.
        routes: the same by route.
        fallbacks: how often a route was not the first choice, by reason.
        live_blocks: blocks that somebody claims (writer only, like the next four).
        free_bytes: bytes in holes of the segments made so far.
        largest_free_block: bytes of the largest hole.
        segment_bytes: bytes of all arena segments.
        leases: what each reader holds.
        leases_held: leases that this reader holds (reader only).
        times: seconds that each of these took, by name, all names always there:
            `hold`: a request in `Admission`, from `hold` until `ready` gave it out;
            `materialize`: one run of `fn`, also one that raised;
            `publish`: to encode one object and to put it into shared memory;
            `header`: to send one header, or to wait for one (which begins when this rank is there, not the entry rank);
            `map`: to open one message and to rebuild its object;
            `take_wait`: in `take` of a `SchedulerBackend`.
        batches: how many requests each batch had; with spread work, each share of one.
        cache_hits: tensors that the content cache had, so that they were not copied again.
        cache_misses: tensors that it had not.
        cache_bytes_saved: bytes of its hits.
        evicted: requests that were dropped before they were taken, to stay within `max_pending` or `max_pending_bytes`.
        pending: requests of a `SchedulerBackend` that were submitted and neither taken nor aborted.
        pending_bytes: bytes of them that are held.
    """

    messages: int = 0
    bytes: int = 0
    routes: Mapping[str, Traffic] = field(default_factory=dict)
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    live_blocks: int = 0
    free_bytes: int = 0
    largest_free_block: int = 0
    segment_bytes: int = 0
    leases: tuple[ReaderLeases, ...] = ()
    leases_held: int = 0
    times: Mapping[str, Histogram] = field(default_factory=lambda: _NO_TIMES)
    batches: Histogram = _NO_BATCHES
    cache_hits: int = 0
    cache_misses: int = 0
    cache_bytes_saved: int = 0
    evicted: int = 0
    pending: int = 0
    pending_bytes: int = 0


def merge(*parts: Stats) -> Stats:
    """One record of what several objects counted, each something else: all of it added up."""
    messages: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    for part in parts:
        fallbacks.update(part.fallbacks)
        for route, traffic in part.routes.items():
            messages[route] += traffic.messages
            sizes[route] += traffic.bytes
    return Stats(
        messages=sum(part.messages for part in parts),
        bytes=sum(part.bytes for part in parts),
        routes=MappingProxyType({route: Traffic(n, sizes[route]) for route, n in sorted(messages.items())}),
        fallbacks=MappingProxyType(dict(sorted(fallbacks.items()))),
        live_blocks=sum(part.live_blocks for part in parts),
        free_bytes=sum(part.free_bytes for part in parts),
        largest_free_block=max((part.largest_free_block for part in parts), default=0),
        segment_bytes=sum(part.segment_bytes for part in parts),
        leases=tuple(held for part in parts for held in part.leases),
        leases_held=sum(part.leases_held for part in parts),
        times=MappingProxyType(
            {name: _add((_NO_TIMES[name], *(part.times[name] for part in parts))) for name in TIMES}
        ),
        batches=_add((_NO_BATCHES, *(part.batches for part in parts))),
        cache_hits=sum(part.cache_hits for part in parts),
        cache_misses=sum(part.cache_misses for part in parts),
        cache_bytes_saved=sum(part.cache_bytes_saved for part in parts),
        evicted=sum(part.evicted for part in parts),
        pending=sum(part.pending for part in parts),
        pending_bytes=sum(part.pending_bytes for part in parts),
    )


def _add(parts: Iterable[Histogram]) -> Histogram:
    """Of histograms with the same bounds."""
    parts = tuple(parts)
    buckets = tuple(
        (same[0][0], sum(count for _, count in same)) for same in zip(*(part.buckets for part in parts), strict=True)
    )
    return Histogram(sum(part.count for part in parts), sum(part.sum for part in parts), buckets)


class Counters:
    """Counts from any thread, from a signal handler in the middle of a count, and in a forked child."""

    def __init__(self) -> None:
        _live.add(self)
        self._lock = threading.RLock()
        self._messages: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._watching: list[Callable[[str, int], None]] = []
        self._tallies = {**{name: _Tally(_SECONDS) for name in TIMES}, BATCH: _Tally(_REQUESTS)}
        self._hits = self._misses = self._saved = self._evicted = 0

    def message(self, route: str, size: int) -> None:
        """One message of `size` bytes travelled by `route`."""
        with self._lock:
            self._messages[route] += 1
            self._bytes[route] += size

    def fallback(self, reason: str) -> bool:
        """A route was not the first choice; True the first time for this reason."""
        with self._lock:
            self._fallbacks[reason] += 1
            count = self._fallbacks[reason]
        for tell in self._watching:
            tell(reason, count)
        return count == 1

    def watch(self, tell: Callable[[str, int], None]) -> None:
        """Have `tell` called with the reason of each fallback, and how many it was one of; with those so far at once.

        It takes no lock and never raises.
        """
        with self._lock:
            self._watching.append(tell)
            so_far = dict(self._fallbacks)
        for reason, count in so_far.items():
            tell(reason, count)

    def totals(self) -> tuple[int, int, Mapping[str, int]]:
        """Messages, bytes of their tensors, fallbacks by reason."""
        with self._lock:
            return self._messages.total(), self._bytes.total(), dict(self._fallbacks)

    def observe(self, name: str, value: float) -> None:
        """Something took `value` seconds, `name` of `TIMES`; or a `BATCH` had `value` requests. `KeyError` else."""
        tally = self._tallies[name]
        bucket = bisect_left(tally.bounds, value)
        with self._lock:
            tally.counts[bucket] += 1
            tally.sum += value

    def timed(self, name: str) -> Timed:
        """Observe how long a `with` block takes, or each call of the function that this decorates; also if it raises.

        `name` as for `observe`.
        """
        self._tallies[name]
        return Timed(self, name)

    def cache(self, hit: bool, nbytes: int) -> None:
        """The content cache had, or had not, a tensor of `nbytes`."""
        with self._lock:
            if hit:
                self._hits += 1
                self._saved += nbytes
            else:
                self._misses += 1

    def evicted(self) -> None:
        """A request was dropped before it was taken."""
        with self._lock:
            self._evicted += 1

    def stats(
        self,
        *,
        usage: tuple[int, int, int, int] = (0, 0, 0, 0),
        leases: tuple[ReaderLeases, ...] = (),
        leases_held: int = 0,
        pending: int = 0,
        pending_bytes: int = 0,
    ) -> Stats:
        """A frozen copy. `usage`: live blocks, free bytes, largest hole, bytes of segments."""
        live_blocks, free_bytes, largest_free_block, segment_bytes = usage
        with self._lock:
            routes = {route: Traffic(n, self._bytes[route]) for route, n in sorted(self._messages.items())}
            fallbacks = dict(sorted(self._fallbacks.items()))
            seen = {name: tally.freeze() for name, tally in self._tallies.items()}
            hits, misses, saved, evicted = self._hits, self._misses, self._saved, self._evicted
        batches = seen.pop(BATCH)
        return Stats(
            messages=sum(traffic.messages for traffic in routes.values()),
            bytes=sum(traffic.bytes for traffic in routes.values()),
            routes=MappingProxyType(routes),
            fallbacks=MappingProxyType(fallbacks),
            live_blocks=live_blocks,
            free_bytes=free_bytes,
            largest_free_block=largest_free_block,
            segment_bytes=segment_bytes,
            leases=leases,
            leases_held=leases_held,
            times=MappingProxyType(seen),
            batches=batches,
            cache_hits=hits,
            cache_misses=misses,
            cache_bytes_saved=saved,
            evicted=evicted,
            pending=pending,
            pending_bytes=pending_bytes,
        )


class Timed(ContextDecorator):
    """One use of `Counters.timed`."""

    __slots__ = ("_counters", "_name", "_started")

    def __init__(self, counters: Counters, name: str) -> None:
        self._counters = counters
        self._name = name

    def __enter__(self) -> None:
        self._started = perf_counter()

    def __exit__(self, *exc: object) -> None:
        self._counters.observe(self._name, perf_counter() - self._started)

    def _recreate_cm(self) -> Timed:
        # What ContextDecorator asks for: calls of one function may overlap.
        return Timed(self._counters, self._name)


_live: weakref.WeakSet[Counters] = weakref.WeakSet()


def _forget() -> None:
    """In a forked child: a thread that is not here may have held the lock."""
    for counters in list(_live):
        counters._lock = threading.RLock()


os.register_at_fork(after_in_child=_forget)
