"""What shmcast's objects count, as metrics of a `prometheus_client` registry. Needs the extra `prometheus`.

    from prometheus_client import REGISTRY

    collector = Collector(rank=0)
    REGISTRY.register(collector)
    collector.watch("vision", broadcaster)

Nothing is counted twice or kept here: a scrape asks each source for its `stats()`.
"""

from __future__ import annotations

import threading
from math import isinf
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakValueDictionary

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from shmcast.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from shmcast.metrics import Histogram, Stats

LABELS = ("source", "rank")


class Source(Protocol):
    """What can be watched: a `Writer`, `Reader`, `Broadcaster`, `Admission` or `SchedulerBackend`."""

    def stats(self) -> Stats:
        """What it has counted; `ClosedError` once it was closed."""


class Collector:
    """A collector for a registry; one a registry. Safe to use from any thread.

    Args:
        rank: the label `rank` of everything that this process exports.
    """

    def __init__(self, rank: int | str = "") -> None:
        self._rank = str(rank)
        self._lock = threading.Lock()
        self._sources: WeakValueDictionary[str, Source] = WeakValueDictionary()

    def watch(self, name: str, source: Source) -> None:
        """Export what `source` counts, under the label `source=name`, for as long as it lives and is not closed.

        It is not kept alive. A name that was given before means this source from now on.
        """
        with self._lock:
            self._sources[name] = source

    def collect(self) -> Iterator[Metric]:
        """Every metric, each with the samples of all sources."""
        with self._lock:
            sources = sorted(self._sources.items())
        seen: list[tuple[str, Stats]] = []
        for name, source in sources:
            try:
                seen.append((name, source.stats()))
            except ClosedError:
                continue
        return self._export(seen)

    def describe(self) -> Iterator[Metric]:
        """Every metric, without samples: what a registry asks for once."""
        return self._export([])

    def _export(self, seen: list[tuple[str, Stats]]) -> Iterator[Metric]:
        for kind, families in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
            for each in families:
                metric = kind(each.name, each.text, labels=(*LABELS, *each.labels))
                for name, stats in seen:
                    for labels, value in each.read(stats).items():
                        metric.add_metric((name, self._rank, *labels), value)
                yield metric
        for family in _HISTOGRAMS:
            histogram = HistogramMetricFamily(family.name, family.text, labels=LABELS)
            for name, stats in seen:
                found = family.read(stats)
                buckets = [("+Inf" if isinf(bound) else str(bound), float(count)) for bound, count in found.buckets]
                histogram.add_metric((name, self._rank), buckets, found.sum)
            yield histogram


class _Family(NamedTuple):
    """A metric of plain numbers: its value by the values of `labels`."""

    name: str
    text: str
    read: Callable[[Stats], Mapping[tuple[str, ...], float]]
    labels: tuple[str, ...] = ()


class _Distribution(NamedTuple):
    """A metric that is a histogram."""

    name: str
    text: str
    read: Callable[[Stats], Histogram]


def _number(name: str, text: str, read: Callable[[Stats], float]) -> _Family:
    return _Family(name, text, lambda stats: {(): read(stats)})


def _arena(name: str, text: str, read: Callable[[Stats], float]) -> _Family:
    """A number of a source that owns memory, and so has readers; of others a zero would look like full memory."""
    return _Family(name, text, lambda stats: {(): read(stats)} if stats.leases else {})


def _time(name: str, text: str) -> _Distribution:
    return _Distribution(f"shmcast_{name}_seconds", text, lambda stats: stats.times[name])


_COUNTERS = (
    _Family(
        "shmcast_messages_total",
        "Messages published or received, by route.",
        lambda stats: {(route,): traffic.messages for route, traffic in stats.routes.items()},
        ("route",),
    ),
    _Family(
        "shmcast_message_bytes_total",
        "Bytes of messages' tensors that were copied, mapped or sent, by route.",
        lambda stats: {(route,): traffic.bytes for route, traffic in stats.routes.items()},
        ("route",),
    ),
    _Family(
        "shmcast_fallbacks_total",
        "How often a route was not the first choice, by reason.",
        lambda stats: {(reason,): count for reason, count in stats.fallbacks.items()},
        ("reason",),
    ),
    _number(
        "shmcast_cache_hits_total",
        "Tensors that the content cache had, so that they were not copied again.",
        lambda stats: stats.cache_hits,
    ),
    _number(
        "shmcast_cache_misses_total",
        "Tensors that the content cache had not.",
        lambda stats: stats.cache_misses,
    ),
    _number(
        "shmcast_cache_saved_bytes_total",
        "Bytes that the content cache saved from being copied.",
        lambda stats: stats.cache_bytes_saved,
    ),
    _number(
        "shmcast_evicted_requests_total",
        "Requests dropped before they were taken, to stay within the bounds.",
        lambda stats: stats.evicted,
    ),
)

_GAUGES = (
    _number(
        "shmcast_pending_requests",
        "Requests that were submitted and neither taken nor aborted.",
        lambda stats: stats.pending,
    ),
    _number(
        "shmcast_pending_bytes",
        "Bytes that are held for pending requests.",
        lambda stats: stats.pending_bytes,
    ),
    _number(
        "shmcast_leases_held",
        "Leases that this reader holds.",
        lambda stats: stats.leases_held,
    ),
    _Family(
        "shmcast_reader_leases",
        "Leases that this writer gave to each of its readers and has not got back.",
        lambda stats: {(str(held.reader),): held.held for held in stats.leases},
        ("reader",),
    ),
    _Family(
        "shmcast_reader_oldest_lease_age_seconds",
        "Since when each reader has held the oldest of its leases; 0 where it holds none.",
        lambda stats: {(str(held.reader),): held.oldest or 0.0 for held in stats.leases},
        ("reader",),
    ),
    _arena(
        "shmcast_arena_free_bytes",
        "Bytes in holes of this writer's segments.",
        lambda stats: stats.free_bytes,
    ),
    _arena(
        "shmcast_arena_largest_free_block_bytes",
        "Bytes of the largest hole.",
        lambda stats: stats.largest_free_block,
    ),
    _arena(
        "shmcast_arena_segment_bytes",
        "Bytes of all of this writer's segments.",
        lambda stats: stats.segment_bytes,
    ),
    _arena(
        "shmcast_arena_live_blocks",
        "Blocks that somebody claims.",
        lambda stats: stats.live_blocks,
    ),
)

_HISTOGRAMS = (
    _time("hold", "How long Admission held a request until it was ready."),
    _time("materialize", "How long one run of fn took."),
    _time("publish", "How long it took to encode one object and to put it into shared memory."),
    _time("header", "How long it took to send one header, or to wait for one."),
    _time("map", "How long it took to open one message and to rebuild its object."),
    _time("take_wait", "How long one take waited for its request."),
    _Distribution("shmcast_batch_requests", "How many requests each batch had.", lambda stats: stats.batches),
)
