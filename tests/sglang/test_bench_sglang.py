"""The benchmark of SGLang does what it says: every way gives every rank the right inputs, and the figures add up."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from benchmarks import _sglang_ranks, bench_sglang
from benchmarks._ranks import Place
from benchmarks._sglang_rounds import WAYS, Case, Plan, Sample, summarise
from benchmarks._sglang_targets import judge
from benchmarks._sglang_tokenizer import Pixels
from tests.sglang import requests

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from tests.support.ranks import Ranks

MIB = 1 << 20
TAKES = 120.0


def measure(rank: int, plan: Plan) -> tuple[str, list[Sample]]:
    return _sglang_ranks.measure(Place(rank, plan.ranks, lambda text: None), plan)


def test_the_command_measures_every_way_warm_and_cold(
    engines: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(plan: Plan, console: Console) -> tuple[str, Any]:
        per_rank = engines.run(plan.ranks, measure, plan, timeout=TAKES)
        return per_rank[0][0], summarise([samples for _, samples in per_rank])

    monkeypatch.setattr(bench_sglang, "run", run)
    options = ["--sizes", "1M", "--ranks", "2", "--rounds", "1", "--warmup", "0", "--cold-rounds", "1"]
    result = CliRunner().invoke(bench_sglang.main, [*options, "--json", str(tmp_path / "result.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "result.json").read_text())
    measured = {(row["part"], row["way"], row["hashed"], row["mode"]) for row in report["results"]}
    assert measured == {
        (part, way, hashed, mode)
        for part, ways in WAYS.items()
        for way in ways
        for hashed in (False, True)
        for mode in ("warm", "cold")
    }
    for row in report["results"]:
        assert 0 < row["minimum_s"] <= row["median_s"] <= row["p99_s"]
        assert len(row["busy_cpu_s"]) == (1 if row["way"] == "maker" else 2)
        assert row["from_made_s"] >= (row["median_s"] if row["part"] == "request" else 0)
    assert "shmcast: admission" in result.output


def test_without_sglang_it_says_so_and_ends_with_a_status_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(bench_sglang.main, [])
    assert result.exit_code == 69
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("size", [MIB, 18 * MIB, 90 * MIB])
def test_a_request_has_about_the_size_asked_for(size: int) -> None:
    items = requests.items_of(Pixels(size).raw())
    assert abs(sum(item.feature.nbytes for item in items) - size) < MIB
    assert len({item.modality for item in items}) == (3 if size >= 64 * MIB else 1)
    assert all(item.hash is None for item in items)
    assert len({item.feature.untyped_storage().data_ptr() for item in items if item.is_image()}) == 1


def test_the_last_rank_and_the_busiest_count() -> None:
    case = Case("request", "admission", MIB, False)
    first = Sample(case, 0, False, made=0, start=1_000_000, sent=2_000_000, ready=5_000_000, cpu=0.001, wall=0.002)
    other = Sample(case, 0, False, made=0, start=1_000_000, sent=2_000_000, ready=7_000_000, cpu=0.003, wall=0.004)
    (own,) = summarise([[first], [other]]).values()
    assert (own.median, own.from_made, own.send) == (0.006, 0.007, 0.001)
    assert (own.busy_cpu, own.busy_wall) == ((0.001, 0.003), (0.002, 0.004))


@pytest.mark.parametrize(("stock", "passes"), [(2.0, True), (0.001, False)])
def test_each_target_is_judged_by_its_ratio(stock: float, passes: bool) -> None:
    def took(way: str) -> float:
        return stock if way in ("alone", "flag") else 0.01

    found = {
        case: summarise([[Sample(case, 0, False, 0, 0, 1, int(took(case.way) * 1e9), took(case.way), took(case.way))]])[
            case, False
        ]
        for case in Plan(4, (18 * MIB, 90 * MIB)).cases
    }
    lines = judge(found)
    assert [line.passed for line in lines] == [passes] * len(lines)
    assert len({line.target for line in lines}) == len(lines) == 17
