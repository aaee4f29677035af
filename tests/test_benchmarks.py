"""The benchmarks run, compare every byte, and say what they say they say. How long things take is not tested."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from benchmarks import _loop, bench_broadcast, bench_targets
from benchmarks._contenders import BASELINE, BY_KEY, CONTENDERS
from benchmarks._loop import Case, Contender, Figures, Sample
from benchmarks._ranks import Place, RanksFailed, Settings, run_ranks

ROOT = Path(__file__).parent.parent
ROW: dict[str, type | tuple[type, ...]] = {
    "ranks": int,
    "size": int,
    "mode": str,
    "contender": str,
    "label": str,
    "rounds": int,
    "median_s": float,
    "p99_s": float,
    "min_s": float,
    "cpu_s": float,
    "faults": (int, float),
    "sooner": float,
    "verified": int,
}


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_broadcast.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = bench(
        *("--sizes", "4K,100000", "--ranks", "2", "--rounds", "2", "--warmup", "1", "--cold"),
        *("--cold-rounds", "1", "--json", "-"),
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.multiprocess
@pytest.mark.slow
def test_every_contender_is_there_at_every_size_warm_and_cold(report: dict[str, Any]) -> None:
    found = [(row["mode"], row["size"], row["contender"]) for row in report["results"]]
    wanted = [(mode, size, key) for mode in ("warm", "cold") for size in (4096, 100000) for key in BY_KEY]
    assert found == wanted


@pytest.mark.multiprocess
@pytest.mark.slow
def test_rows_have_every_figure_and_each_is_positive(report: dict[str, Any]) -> None:
    for row in report["results"]:
        assert row.keys() == ROW.keys()
        for name, kind in ROW.items():
            assert isinstance(row[name], kind), f"{name}: {row[name]!r}"
        assert row["label"] == BY_KEY[row["contender"]].label
        assert 0 < row["min_s"] <= row["median_s"] <= row["p99_s"]
        assert row["cpu_s"] > 0
        assert row["ranks"] == 2


@pytest.mark.multiprocess
@pytest.mark.slow
def test_bytes_are_compared_on_every_rank_in_every_round(report: dict[str, Any]) -> None:
    for row in report["results"]:
        assert row["rounds"] == (2 if row["mode"] == "warm" else 1)
        takers = 1 if BY_KEY[row["contender"]].alone else row["ranks"]
        assert row["verified"] == row["rounds"] * takers


@pytest.mark.multiprocess
@pytest.mark.slow
def test_ratios_are_to_the_baseline_of_the_same_size_and_mode(report: dict[str, Any]) -> None:
    baseline = {(r["mode"], r["size"]): r["median_s"] for r in report["results"] if r["contender"] == BASELINE}
    for row in report["results"]:
        assert row["sooner"] == pytest.approx(baseline[row["mode"], row["size"]] / row["median_s"])


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_report_says_what_when_where_and_how(report: dict[str, Any]) -> None:
    assert report["version"] == bench_broadcast.VERSION
    assert report["targets"] == []
    assert {"measured", "date", "command", "machine", "plan", "contenders"} < report.keys()
    assert {"cpus", "memory", "system", "python", "versions"} == report["machine"].keys()
    assert [c["key"] for c in report["contenders"]] == list(BY_KEY)
    assert report["plan"]["ranks"] == [2]
    assert report["plan"]["sizes"] == [4096, 100000]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_table_is_for_a_person_and_only_chooses() -> None:
    done = bench("--sizes", "4K", "--ranks", "2", "--rounds", "1", "--warmup", "0", "--only", "copied", "--no-cold")
    assert done.returncode == 0, done.stderr
    assert "4 KiB" in done.stdout
    assert "shmcast, copied once" in done.stdout
    assert "gloo" not in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("--sizes", "4Q", "4Q"), ("--ranks", "1", "2 or more"), ("--only", "copied,warp", "warp"), ("--rounds", "0", "0")],
)
def test_a_wrong_option_is_named(option: str, value: str, said: str) -> None:
    from click.testing import CliRunner

    result = CliRunner().invoke(bench_broadcast.main, [option, value])
    assert result.exit_code == 2
    assert said in result.output


def test_sizes_are_whole_words() -> None:
    assert bench_broadcast.parse_sizes("1, 4k,1MiB,9,9") == (8, 4096, 1 << 20, 16)
    with pytest.raises(click.BadParameter):
        bench_broadcast.parse_sizes("0")


# The loop.


def wrong_on_rank_1(site: _loop.Site) -> torch.Tensor:
    got = site.expected.clone()
    got[-1] += site.place.rank
    return got


def run_wrong(place: Place) -> list[Sample]:
    contender = Contender(
        key="wrong",
        label="a wrong one",
        stands_for="",
        setup=lambda site: site,
        call=wrong_on_rank_1,
        check=lambda site, got: torch.equal(got, site.expected),
    )
    return _loop.run_warm(place, [Case(contender, 4096)], 1, 0, 1)


@pytest.mark.multiprocess
def test_one_wrong_byte_on_one_rank_ends_the_run() -> None:
    with pytest.raises(RanksFailed, match="rank 1 got other bytes"):
        run_ranks(2, run_wrong)


def place_of(place: Place, text: str) -> tuple[int, int, bool, str]:
    place.tell(f"{text} from {place.rank}")
    return place.rank, place.ranks, place.leads, text


@pytest.mark.multiprocess
def test_ranks_answer_in_order_and_the_entry_rank_is_heard() -> None:
    heard: list[str] = []
    assert run_ranks(2, place_of, "news", tell=heard.append) == [(0, 2, True, "news"), (1, 2, False, "news")]
    assert heard == ["news from 0"]


def leave(place: Place) -> None:
    if place.rank == 1:
        os._exit(3)
    import torch.distributed as dist

    dist.barrier()


@pytest.mark.multiprocess
def test_a_rank_that_dies_ends_the_run() -> None:
    with pytest.raises(RanksFailed, match="rank 1: died"):
        run_ranks(2, leave)


def test_the_last_rank_counts_from_the_latest_start() -> None:
    parts = [
        Sample(0, 0, start=1_000, end=9_000, cpu=0, faults=0),
        Sample(0, 0, start=3_000, end=8_000, cpu=0, faults=0),
    ]
    assert _loop.last_rank_ready(parts) == 6e-6


def test_figures_sum_cpu_over_ranks_and_take_the_middle_over_rounds() -> None:
    def rank(cpu: float) -> list[Sample]:
        return [Sample(0, round, 0, 1_000 * (round + 1), cpu, 2) for round in range(3)]

    shared, alone = (Case(dataclasses.replace(CONTENDERS[0], alone=alone), 8) for alone in (False, True))
    assert _loop.summarise([rank(1.0), rank(2.0)], [shared]) == [Figures(3, 2e-6, 3e-6, 1e-6, 3.0, 4, 6)]
    assert _loop.summarise([rank(1.0), rank(2.0)], [alone]) == [Figures(3, 2e-6, 3e-6, 1e-6, 1.0, 2, 3)]


def test_every_case_goes_first_in_turn() -> None:
    assert [_loop.rotated(3, round) for round in range(-1, 3)] == [[2, 0, 1], [0, 1, 2], [1, 2, 0], [2, 0, 1]]


@pytest.mark.parametrize(("percent", "wanted"), [(1, 1.0), (50, 5.0), (99, 10.0), (100, 10.0)])
def test_percentiles_are_values_that_occurred(percent: int, wanted: float) -> None:
    assert _loop.percentile([float(n) for n in range(10, 0, -1)], percent) == wanted


# The targets.


def figures(median: float) -> Figures:
    return Figures(1, median, median, median, 0.0, 0, 1)


@pytest.mark.parametrize(
    ("copied", "empty", "large", "passed"),
    [
        (8.0, 1.6, 2.0, [True, True, True, True]),
        (8.1, 1.61, 2.1, [False, True, False, False]),
        (13.6, 1.0, 1.0, [False, False, True, True]),
    ],
)
def test_targets_pass_and_miss(copied: float, empty: float, large: float, passed: list[bool]) -> None:
    milliseconds = {
        ("copied", 64): copied,
        ("empty", 64): empty,
        (BASELINE, 64): 400.0,
        ("plain-copy", 64): 5.0,
        ("empty", 1): 1.6,
        ("empty", 200): large,
    }
    lines = bench_targets.judge_times({case: figures(ms / 1e3) for case, ms in milliseconds.items()})
    assert [line.passed for line in lines] == passed


@pytest.mark.multiprocess
@pytest.mark.slow
def test_references_publish_next_to_nothing() -> None:
    (line,) = bench_targets.references(Settings(), ranks=2)
    assert line.passed, line


@pytest.mark.parametrize(
    ("line", "arena"),
    [
        ("7f-80 rw-p 0 00:1 5      /dev/shm/shmcast-00ff-0-0 (deleted)", True),
        ("7f-80 rw-p 0 00:1 5      /dev/shm/shmcast-00ff-0-12", True),
        ("7f-80 rw-p 0 00:1 5      /dev/shm/shmcast-00ff-0-c", False),
        ("7f-80 rw-p 0 00:1 5      /dev/shm/sem.shmcast-00ff-0-items-0", False),
        ("7f-80 rw-p 0 00:1 5      /usr/lib/libtorch.so", False),
    ],
)
def test_arena_mappings_are_told_from_others(line: str, arena: bool) -> None:
    assert bench_targets.is_arena(line) is arena


def test_imports_know_what_came_with_a_module() -> None:
    assert bench_targets._import("numpy")[1] == "numpy"
    assert bench_targets._import("shmcast")[1] == ""
