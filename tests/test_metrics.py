"""Counters from any thread, and a record of them that stays as it is."""

import dataclasses
import threading
from typing import Any

import pytest

from shmcast.metrics import Counters, ReaderLeases, Stats, Traffic


def test_a_new_object_has_counted_nothing() -> None:
    assert Counters().stats() == Stats()
    assert Stats() == Stats(0, 0, {}, {}, 0, 0, 0, 0, (), 0)


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


@pytest.mark.parametrize("field", ["routes", "fallbacks"])
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

    running = [threading.Thread(target=count) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    stats = counters.stats()
    assert stats.routes == {"shm": Traffic(threads * rounds, 3 * threads * rounds)}
    assert stats.fallbacks == {"full": threads * rounds}
    assert news.count(True) == 1
