"""What a scrape says of real sources, and that the dashboard asks for nothing else."""

from __future__ import annotations

import gc
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from shmcast import Broadcaster, Reader, Stats, Writer
from shmcast.integrations.prometheus import LABELS, Collector
from shmcast.metrics import BATCH, TIMES, Counters, ReaderLeases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "docs" / "grafana.json").read_text())
MIB = 1 << 20


class Fixed:
    """A source that has counted one of everything."""

    def __init__(self, times: int = 1) -> None:
        counters = Counters()
        for _ in range(times):
            for name in TIMES:
                counters.observe(name, 0.003)
            counters.observe(BATCH, 7)
            counters.message("shm", 100)
            counters.message("inline", 7)
            counters.fallback("full")
            counters.cache(True, 40)
            counters.cache(False, 50)
            counters.evicted()
        leases = (ReaderLeases(0, True, 3, 2, 1.5), ReaderLeases(1, None, 0, 0, None))
        self._stats = counters.stats(usage=(1, 20, 15, 40), leases=leases, leases_held=2, pending=4, pending_bytes=900)

    def stats(self) -> Stats:
        return self._stats


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def collector(registry: CollectorRegistry) -> Collector:
    made = Collector(rank=3)
    registry.register(made)
    return made


def families(registry: CollectorRegistry) -> list[Metric]:
    return list(text_string_to_metric_families(generate_latest(registry).decode()))


def samples(registry: CollectorRegistry, source: str) -> dict[str, float]:
    """What a scrape says of one source: by name, or `name{label}` where it has labels of its own."""
    found = {}
    for family in families(registry):
        for sample in family.samples:
            labels = dict(sample.labels)
            if labels.pop("source") != source:
                continue
            assert labels.pop("rank") == "3"
            own = ",".join(labels.values())
            key = f"{sample.name}{{{own}}}" if own else sample.name
            assert key not in found, f"{key} comes twice"
            found[key] = sample.value
    return found


def sources(registry: CollectorRegistry) -> set[str]:
    return {sample.labels["source"] for family in families(registry) for sample in family.samples}


# Values.


def test_each_count_is_exported_under_its_name(registry: CollectorRegistry, collector: Collector) -> None:
    fixed = Fixed()
    collector.watch("one", fixed)
    found = samples(registry, "one")
    plain = {key: value for key, value in found.items() if not re.search(r"_(bucket|count|sum)\b", key)}
    assert plain == {
        "shmcast_messages_total{shm}": 1,
        "shmcast_messages_total{inline}": 1,
        "shmcast_message_bytes_total{shm}": 100,
        "shmcast_message_bytes_total{inline}": 7,
        "shmcast_fallbacks_total{full}": 1,
        "shmcast_cache_hits_total": 1,
        "shmcast_cache_misses_total": 1,
        "shmcast_cache_saved_bytes_total": 40,
        "shmcast_evicted_requests_total": 1,
        "shmcast_pending_requests": 4,
        "shmcast_pending_bytes": 900,
        "shmcast_leases_held": 2,
        "shmcast_reader_leases{0}": 3,
        "shmcast_reader_leases{1}": 0,
        "shmcast_reader_oldest_lease_age_seconds{0}": 1.5,
        "shmcast_reader_oldest_lease_age_seconds{1}": 0,
        "shmcast_arena_live_blocks": 1,
        "shmcast_arena_free_bytes": 20,
        "shmcast_arena_largest_free_block_bytes": 15,
        "shmcast_arena_segment_bytes": 40,
    }


@pytest.mark.parametrize(
    ("name", "value"), [*((f"shmcast_{name}_seconds", 0.003) for name in TIMES), ("shmcast_batch_requests", 7.0)]
)
def test_a_histogram_arrives_with_its_buckets(
    name: str, value: float, registry: CollectorRegistry, collector: Collector
) -> None:
    fixed = Fixed(times=4)
    collector.watch("one", fixed)
    found = samples(registry, "one")
    assert found[f"{name}_count"] == 4
    assert math.isclose(found[f"{name}_sum"], 4 * value)
    (family,) = [family for family in families(registry) if family.name == name]
    assert family.type == "histogram"
    buckets = {float(s.labels["le"]): s.value for s in family.samples if s.name == f"{name}_bucket"}
    stats = fixed.stats()
    seen = stats.batches if name == "shmcast_batch_requests" else stats.times[name[len("shmcast_") : -len("_seconds")]]
    assert buckets == dict(seen.buckets)
    assert buckets[math.inf] == 4


def test_the_other_text_format_can_carry_it_too(registry: CollectorRegistry, collector: Collector) -> None:
    fixed = Fixed()
    collector.watch("one", fixed)
    text = generate_openmetrics(registry).decode()  # type: ignore[no-untyped-call]
    parsed = list(parse_openmetrics(text))  # type: ignore[no-untyped-call]
    assert len(parsed) == len(list(collector.describe()))


def test_a_writer_and_a_reader_as_they_are(registry: CollectorRegistry, collector: Collector) -> None:
    with Writer(2, capacity=8 * MIB) as writer, Reader(writer.address, 1) as reader:
        collector.watch("writer", writer)
        collector.watch("reader", reader)
        handle = writer.publish(torch.zeros(MIB, dtype=torch.uint8))
        kept = reader.open(handle)

        at_writer, at_reader = samples(registry, "writer"), samples(registry, "reader")
        stats = writer.stats()
        for found in (at_writer, at_reader):
            assert found["shmcast_messages_total{shm}"] == 1
            assert found["shmcast_message_bytes_total{shm}"] == MIB
        assert at_writer["shmcast_publish_seconds_count"] == at_reader["shmcast_map_seconds_count"] == 1
        assert at_writer["shmcast_publish_seconds_sum"] == stats.times["publish"].sum > 0
        assert at_writer["shmcast_map_seconds_count"] == at_reader["shmcast_publish_seconds_count"] == 0
        assert at_writer["shmcast_reader_leases{0}"] == at_writer["shmcast_reader_leases{1}"] == 1
        assert 0 < at_writer["shmcast_reader_oldest_lease_age_seconds{1}"] <= (stats.leases[1].oldest or 0)
        assert at_writer["shmcast_arena_free_bytes"] == stats.free_bytes > 0
        assert at_writer["shmcast_arena_largest_free_block_bytes"] == stats.largest_free_block > 0
        assert at_writer["shmcast_arena_segment_bytes"] == stats.segment_bytes >= MIB
        assert at_writer["shmcast_arena_live_blocks"] == stats.live_blocks == 1
        assert (at_writer["shmcast_leases_held"], at_reader["shmcast_leases_held"]) == (0, 1)
        # A reader owns no memory, which is not the same as having none left.
        assert [key for key in at_reader if "arena" in key or "reader_" in key] == []
        del kept


# Sources that come and go.


def test_nothing_watched_is_nothing_exported(registry: CollectorRegistry, collector: Collector) -> None:
    assert sources(registry) == set()
    assert [family.name for family in families(registry)]


def test_a_closed_source_is_left_out(registry: CollectorRegistry, collector: Collector) -> None:
    with Broadcaster() as open_one, Broadcaster() as closed, Writer(1, capacity=MIB) as writer:
        collector.watch("open", open_one)
        collector.watch("closed", closed)
        collector.watch("writer", writer)
        assert sources(registry) == {"open", "closed", "writer"}
        closed.close()
        writer.close()
        assert sources(registry) == {"open"}


def test_a_closed_reader_still_tells_what_its_tensors_hold(registry: CollectorRegistry, collector: Collector) -> None:
    with Writer(1, capacity=8 * MIB) as writer, Reader(writer.address, 0) as reader:
        kept = reader.open(writer.publish(torch.zeros(MIB, dtype=torch.uint8)))
        collector.watch("reader", reader)
        reader.close()
        assert samples(registry, "reader")["shmcast_leases_held"] == 1
        del kept


def test_a_source_is_not_kept_alive(registry: CollectorRegistry, collector: Collector) -> None:
    kept, dropped = Fixed(), Fixed()
    collector.watch("kept", kept)
    collector.watch("dropped", dropped)
    assert sources(registry) == {"kept", "dropped"}
    del dropped
    gc.collect()
    assert sources(registry) == {"kept"}


def test_two_sources_do_not_mix(registry: CollectorRegistry, collector: Collector) -> None:
    one, two = Fixed(times=1), Fixed(times=2)
    collector.watch("one", one)
    collector.watch("two", two)
    assert samples(registry, "one")["shmcast_messages_total{shm}"] == 1
    assert samples(registry, "two")["shmcast_messages_total{shm}"] == 2
    assert samples(registry, "two")["shmcast_map_seconds_count"] == 2
    assert set(samples(registry, "one")) == set(samples(registry, "two"))


def test_a_name_given_again_means_the_new_source(registry: CollectorRegistry, collector: Collector) -> None:
    old, new = Fixed(times=1), Fixed(times=2)
    collector.watch("one", old)
    collector.watch("one", new)
    assert samples(registry, "one")["shmcast_evicted_requests_total"] == 2


def test_an_error_of_a_source_is_not_hidden(registry: CollectorRegistry, collector: Collector) -> None:
    class Broken:
        def stats(self) -> Stats:
            raise OSError("no such segment")

    broken = Broken()
    collector.watch("broken", broken)
    with pytest.raises(OSError, match="no such segment"):
        generate_latest(registry)


def test_one_collector_a_registry(registry: CollectorRegistry, collector: Collector) -> None:
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(Collector())


def test_the_package_does_not_load_it() -> None:
    script = "import sys, shmcast, shmcast.metrics; print('prometheus_client' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# Names.


def test_the_page_lists_every_metric_and_no_other() -> None:
    page = (ROOT / "docs" / "api.md").read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    named = [name for row in page.splitlines() if row.startswith("|") for name in re.findall(r"`(shmcast_\w+)`", row)]
    families = list(Collector().describe())
    assert sorted(named) == sorted(f"{f.name}_total" if f.type == "counter" else f.name for f in families)


@pytest.mark.parametrize("family", list(Collector().describe()), ids=lambda family: family.name)
def test_names_follow_the_conventions(family: Metric) -> None:
    assert re.fullmatch(r"shmcast_[a-z_]+[a-z]", family.name)
    assert not re.search(r"_(ms|us|kb|mib|milliseconds|total|count|sum|bucket)$", family.name)
    assert family.documentation.endswith(".")
    assert family.type in ("counter", "gauge", "histogram")


def exported() -> dict[str, str]:
    """Each sample's name, with the metric that it belongs to."""
    collector, fixed = Collector(), Fixed()
    collector.watch("one", fixed)
    return {sample.name: family.name for family in collector.collect() for sample in family.samples}


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def test_the_dashboard_asks_for_what_there_is_and_for_all_of_it() -> None:
    known = exported()
    asked = {name for expression in expressions() for name in re.findall(r"\bshmcast_\w+", expression)}
    assert asked <= set(known)
    assert {known[name] for name in asked} == set(known.values()) == {family.name for family in Collector().describe()}


def test_every_time_has_its_median_and_its_99th_percentile() -> None:
    for name in (*(f"{name}_seconds" for name in TIMES), "batch_requests"):
        quantiles = [
            re.findall(rf"histogram_quantile\((0\.\d+), .*\ble\b.*shmcast_{name}_bucket", expression)
            for expression in expressions()
        ]
        assert sorted(quantile for found in quantiles for quantile in found) == ["0.5", "0.99"]


def test_the_dashboard_names_only_labels_that_there_are() -> None:
    given = {*LABELS, "le", "route", "reason", "reader"} | {"instance"}  # which Prometheus adds
    legends = {
        label
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"])
    }
    kept = {
        label
        for expression in expressions()
        for labels in re.findall(r"by \(([^)]*)\)", expression)
        for label in labels.split(", ")
    }
    matched = {label for expression in expressions() for label in re.findall(r"(\w+)=~", expression)}
    assert legends | kept | matched <= given
    assert {"route", "reason", "reader"} <= legends
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == matched | {"datasource"}


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert all(x < 24 for x, _ in cells)
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert panel["description"]
