"""Counters from any thread, and a record of them that stays as it is."""

import dataclasses
import math
import threading
from bisect import bisect_left
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcast import Broadcaster
from shmcast.metrics import BATCH, TIMES, Counters, Histogram, ReaderLeases, Stats, Traffic, merge
from tests.support.ranks import Ranks

BOUNDS = {name: [bound for bound, _ in seen.buckets] for name, seen in Stats().times.items()}
BOUNDS[BATCH] = [bound for bound, _ in Stats().batches.buckets]
NAMES = (*TIMES, BATCH)


def histogram(counters: Counters, name: str) -> Histogram:
    stats = counters.stats()
    return stats.batches if name == BATCH else stats.times[name]


def test_a_new_object_has_counted_nothing() -> None:
    assert Counters().stats() == Stats()
    assert Stats() == Stats(0, 0, {}, {}, 0, 0, 0, 0, (), 0)
    assert {(seen.count, seen.sum) for seen in (*Stats().times.values(), Stats().batches)} == {(0, 0)}


def test_messages_and_bytes_are_counted_by_route() -> None:
    counters = Counters()
    for route, size in (("shm", 100), ("inline", 7), ("shm", 50), ("local", 0)):
        counters.message(route, size)
    stats = counters.stats()
    assert (stats.messages, stats.bytes) == (4, 157)
    assert stats.routes == {"shm": Traffic(2, 150), "inline": Traffic(1, 7), "local": Traffic(1, 0)}
    assert list(stats.routes) == ["inline", "local", "shm"]
    assert stats.fallbacks == {}


def test_only_the_first_fallback_of_a_reason_is_news() -> None:
    counters = Counters()
    assert [counters.fallback(reason) for reason in ("full", "full", "open", "full", "open")] == [
        *(True, False, True, False, False)
    ]
    assert counters.stats().fallbacks == {"full": 3, "open": 2}
    assert counters.stats().messages == 0


def test_usage_and_leases_are_passed_on() -> None:
    leases = (ReaderLeases(0, True, 3, 2, 1.5), ReaderLeases(1, None, 0, 0, None))
    stats = Counters().stats(usage=(1, 2, 3, 4), leases=leases, leases_held=5)
    found = stats.live_blocks, stats.free_bytes, stats.largest_free_block, stats.segment_bytes
    assert found == (1, 2, 3, 4)
    assert (stats.leases, stats.leases_held) == (leases, 5)


def test_a_snapshot_does_not_change() -> None:
    counters = Counters()
    counters.message("shm", 1)
    counters.fallback("full")
    stats = counters.stats()
    counters.message("shm", 1)
    counters.message("inline", 1)
    counters.fallback("full")
    counters.fallback("open")
    assert stats == Stats(1, 1, {"shm": Traffic(1, 1)}, {"full": 1})
    assert counters.stats().messages == 3


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Stats)])
def test_nobody_can_change_a_snapshot(field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Counters().stats(), field, 1)


@pytest.mark.parametrize("field", ["routes", "fallbacks", "times"])
def test_nobody_can_change_the_mappings_of_a_snapshot(field: str) -> None:
    mapping: Any = getattr(Counters().stats(), field)
    with pytest.raises(TypeError):
        mapping["shm"] = 1


def test_no_count_is_lost_between_threads() -> None:
    counters, threads, rounds = Counters(), 8, 500
    together = threading.Barrier(threads)
    news: list[bool] = []

    def count() -> None:
        together.wait()
        for _ in range(rounds):
            counters.message("shm", 3)
            news.append(counters.fallback("full"))
            counters.observe("map", 0.5)
            counters.cache(True, 2)
            counters.cache(False, 2)
            counters.evicted()

    running = [threading.Thread(target=count) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    stats = counters.stats()
    assert stats.routes == {"shm": Traffic(threads * rounds, 3 * threads * rounds)}
    assert stats.fallbacks == {"full": threads * rounds}
    assert news.count(True) == 1
    assert (stats.times["map"].count, stats.times["map"].sum) == (threads * rounds, 0.5 * threads * rounds)
    assert stats.cache_hits == stats.cache_misses == stats.evicted == threads * rounds
    assert stats.cache_bytes_saved == 2 * threads * rounds


# Histograms.


def test_what_is_timed_has_a_name() -> None:
    assert tuple(Stats().times) == TIMES == ("hold", "materialize", "publish", "header", "map", "take_wait")
    for name in TIMES:
        assert (BOUNDS[name][0], BOUNDS[name][-2:]) == (10e-6, [60.0, math.inf])
    assert BOUNDS[BATCH][:7] == [1, 2, 5, 10, 20, 50, 100]


@pytest.mark.parametrize("name", ["Map", "fetch", "messages"])
def test_a_name_that_nobody_knows_is_an_error(name: str) -> None:
    counters = Counters()
    with pytest.raises(KeyError, match=name):
        counters.observe(name, 1.0)
    with pytest.raises(KeyError, match=name):
        counters.timed(name)
    assert counters.stats() == Stats()


@given(st.sampled_from(NAMES), st.data())
def test_a_histogram_is_what_was_observed(name: str, data: st.DataObject) -> None:
    near = st.sampled_from(BOUNDS[name][:-1]).flatmap(
        lambda bound: st.sampled_from([math.nextafter(bound, 0), bound, math.nextafter(bound, math.inf)])
    )
    values = data.draw(st.lists(near | st.floats(0, 1e6)))
    counters = Counters()
    for value in values:
        counters.observe(name, value)
    seen = histogram(counters, name)
    assert seen.count == len(values)
    assert math.isclose(seen.sum, math.fsum(values), rel_tol=1e-9)
    assert [bound for bound, _ in seen.buckets] == sorted(set(BOUNDS[name]))
    assert seen.buckets[-1] == (math.inf, seen.count)
    counts = [count for _, count in seen.buckets]
    assert counts == sorted(counts)
    assert counts == [sum(value <= bound for value in values) for bound, _ in seen.buckets]


@pytest.mark.parametrize("name", NAMES)
def test_a_value_on_a_bound_belongs_to_it(name: str) -> None:
    for bound in BOUNDS[name]:
        counters = Counters()
        counters.observe(name, bound)
        counts = [count for _, count in histogram(counters, name).buckets]
        assert counts.index(1) == bisect_left(BOUNDS[name], bound) == BOUNDS[name].index(bound)


def test_histograms_of_a_snapshot_do_not_change() -> None:
    counters = Counters()
    counters.observe("map", 1.0)
    counters.observe(BATCH, 3)
    before = counters.stats()
    counters.observe("map", 1.0)
    counters.observe(BATCH, 3)
    assert (before.times["map"].count, before.batches.count) == (1, 1)
    assert (counters.stats().times["map"].count, counters.stats().batches.count) == (2, 2)


def test_a_block_is_timed_also_when_it_raises() -> None:
    counters = Counters()
    with counters.timed("publish"):
        pass
    with pytest.raises(ZeroDivisionError), counters.timed("publish"):
        raise ZeroDivisionError
    assert counters.stats().times["publish"].count == 2
    assert 0 < counters.stats().times["publish"].sum < 60
    assert counters.stats().times["map"].count == 0


def test_calls_of_one_timed_function_may_overlap() -> None:
    counters = Counters()
    inner: list[float] = []

    @counters.timed("materialize")
    def count_down(n: int) -> int:
        if n:
            count_down(n - 1)
            inner.append(counters.stats().times["materialize"].sum)
        return n

    assert count_down(3) == 3
    seen = counters.stats().times["materialize"]
    assert seen.count == 4
    # Each call takes at least as long as the one that it made.
    assert seen.sum - inner[-1] >= inner[0] > 0


# What else is counted, and several records in one.


def test_cache_and_evictions_are_counted() -> None:
    counters = Counters()
    for hit, size in ((True, 100), (False, 50), (True, 7), (False, 3), (False, 1)):
        counters.cache(hit, size)
    counters.evicted()
    stats = counters.stats(pending=3, pending_bytes=1000)
    assert (stats.cache_hits, stats.cache_misses, stats.cache_bytes_saved) == (2, 3, 107)
    assert (stats.evicted, stats.pending, stats.pending_bytes) == (1, 3, 1000)


EVENTS = st.one_of(
    st.tuples(st.just("message"), st.sampled_from(["shm", "inline"]), st.integers(0, 1000)),
    st.tuples(st.just("fallback"), st.sampled_from(["full", "open"])),
    st.tuples(st.just("observe"), st.sampled_from(NAMES), st.integers(0, 2000)),
    st.tuples(st.just("cache"), st.booleans(), st.integers(0, 1000)),
    st.tuples(st.just("evicted")),
)


@given(st.lists(st.lists(EVENTS), max_size=4))
def test_merged_records_are_those_of_one_that_counted_all(parts: list[list[tuple[Any, ...]]]) -> None:
    one, several = Counters(), [Counters() for _ in parts]
    for counters, events in zip(several, parts, strict=True):
        for event, *arguments in events:
            getattr(counters, event)(*arguments)
            getattr(one, event)(*arguments)
    assert merge(*(counters.stats() for counters in several)) == one.stats()


def test_merging_loses_no_field() -> None:
    lease = ReaderLeases(0, True, 1, 1, 2.0)
    counters = Counters()
    for name in NAMES:
        counters.observe(name, 1)
    counters.message("shm", 1)
    counters.fallback("full")
    counters.cache(True, 1)
    counters.cache(False, 1)
    counters.evicted()
    full = counters.stats(usage=(1, 2, 3, 4), leases=(lease,), leases_held=5, pending=6, pending_bytes=7)
    for field in dataclasses.fields(Stats):
        assert getattr(full, field.name) != getattr(Stats(), field.name), field.name
    assert merge(full, Stats()) == merge(Stats(), full) == merge(full) == full
    both = merge(full, full)
    assert (both.live_blocks, both.free_bytes, both.largest_free_block, both.segment_bytes) == (2, 4, 3, 8)
    assert (both.leases, both.leases_held, both.pending, both.pending_bytes) == ((lease, lease), 10, 12, 14)


# What a Broadcaster times.


def counts(group: Broadcaster) -> dict[str, int]:
    stats = group.stats()
    return {name: seen.count for name, seen in (*stats.times.items(), (BATCH, stats.batches)) if seen.count}


def double(raw: int) -> int:
    if raw < 0:
        raise ValueError("negative")
    return 2 * raw


def every_call(rank: int) -> list[dict[str, int]]:
    seen = []
    with Broadcaster() as group:
        for call in (
            lambda: group.materialize(1, double),
            lambda: group.materialize_batch([1, -2, 3], double),
            lambda: group.broadcast(5),
        ):
            call()
            seen.append(counts(group))
    return seen


@pytest.mark.multiprocess
def test_both_ends_of_a_collective_are_timed(ranks: Ranks) -> None:
    entry, follower = ranks.run(2, every_call)
    assert entry == [
        {"materialize": 1, "publish": 1, "header": 1},
        # The one that raised runs again, as on every rank.
        {"materialize": 5, "publish": 3, "header": 2, BATCH: 1},
        {"materialize": 5, "publish": 4, "header": 3, BATCH: 1},
    ]
    assert follower == [
        {"header": 1, "map": 1},
        {"materialize": 1, "header": 2, "map": 3, BATCH: 1},
        {"materialize": 1, "header": 3, "map": 4, BATCH: 1},
    ]


def test_fn_is_timed_where_there_is_no_group() -> None:
    with Broadcaster() as group:
        assert group.materialize(2, double) == 4
        assert len(group.materialize_batch([1, -2], double)) == 2
        assert counts(group) == {"materialize": 3, BATCH: 1}


def test_a_handler_in_the_middle_of_a_count_counts_too() -> None:
    counters = Counters()
    with counters._lock:
        counters.message("shm", 1)
        counters.fallback("missed")
    assert (counters.stats().messages, counters.stats().fallbacks) == (1, {"missed": 1})
