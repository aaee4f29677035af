"""The benchmark of copies to a device: what it says without one; with `FakeCuda`, that it runs and checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import bench_h2d
from tests.support.cuda import FakeCuda, installed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

ROOT = Path(__file__).parent.parent
SIZES = (1 << 18, 1 << 19)
FIELDS = {
    *("size", "contender", "label", "rounds", "median_s", "p99_s", "min_s", "call_s", "bandwidth"),
    *("to_pinned", "to_pageable", "verified"),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(bench_h2d, "TARGETS_FROM", SIZES[1])
    with installed() as cuda:
        yield cuda


def bench(*args: str) -> Result:
    sizes = ",".join(map(str, SIZES))
    return CliRunner().invoke(bench_h2d.main, ["--sizes", sizes, "--rounds", "3", "--registered", "1M", *args])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("more", [(), ("--json", "-")])
def test_without_a_gpu_it_says_so_in_one_line(more: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_h2d.py"), *more], capture_output=True, text=True, check=False
    )
    assert done.returncode == bench_h2d.NO_GPU == 3
    assert done.stdout == ""
    assert done.stderr == "no GPU here, or a torch without CUDA: nothing was measured\n"


def test_a_wrong_option_is_named_without_a_gpu_too() -> None:
    assert "warp" in bench("--only", "warp").output


def test_every_contender_is_there_at_every_size(cuda: FakeCuda, tmp_path: Path) -> None:
    done = bench("--json", str(tmp_path / "figures.json"))
    assert done.exit_code in (0, 1), done.output  # how fast this machine is, is not tested
    report: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    rows = report["results"]
    assert [(row["size"], row["contender"]) for row in rows] == [(s, key) for s in SIZES for key in bench_h2d.BY_KEY]
    for row in rows:
        assert row.keys() == FIELDS
        assert row["rounds"] == row["verified"] == 3
        assert 0 < row["min_s"] <= row["median_s"] <= row["p99_s"]
        assert row["bandwidth"] == pytest.approx(row["size"] / row["median_s"])
    medians = {(row["size"], row["contender"]): row["median_s"] for row in rows}
    for row in rows:
        assert row["to_pinned"] == pytest.approx(medians[row["size"], bench_h2d.PINNED] / row["median_s"])
        assert row["to_pageable"] == pytest.approx(medians[row["size"], bench_h2d.PAGEABLE] / row["median_s"])
    assert [cost["size"] for cost in report["registering"]] == [1 << 20]
    assert report["private_map"] == {"pages": 256, "before": 256, "code": 0, "after": 256}
    assert [(line["size"], line["bound"]) for line in report["targets"]] == [(SIZES[1], 0.95), (SIZES[1], 1.5)]
    assert done.exit_code == (not all(line["passed"] for line in report["targets"]))
    assert {"date", "command", "measured", "version"} < report.keys()
    assert {"device", "cuda", "cpus"} < report["machine"].keys()


def test_the_table_is_for_a_person(cuda: FakeCuda) -> None:
    output = bench().output
    assert "pinned, mapped " in output
    assert "the same, to_device " in output
    assert "registering 1 MiB once: " in output
    assert "shows 256 of 256 pages that its writer changes, registered 256" in output
    assert "times the bandwidth of pinned, private" in output


def test_memory_that_is_not_pinned_ends_it(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_h2d, "PATIENCE", 0.0)
    cuda.refuse = 2
    done = bench("--only", bench_h2d.MAPPED)
    assert done.exit_code == 1
    assert "the memory is not pinned" in done.output


def test_wrong_bytes_end_it(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = cuda.finish

    def damage() -> None:
        queued = [tensor for tensor, _ in cuda._queue]
        finish()
        for tensor in queued:
            tensor[100] += 1

    monkeypatch.setattr(torch.cuda, "synchronize", damage)
    done = bench("--only", bench_h2d.PAGEABLE)
    assert done.exit_code == 1
    assert "the device has other bytes" in done.output


@pytest.mark.parametrize(
    ("to_pinned", "to_pageable", "passed"),
    [(0.95, 1.5, [True, True]), (0.94, 9.0, [False, True]), (1.0, 1.49, [True, False])],
)
def test_the_bounds_are_passed_or_missed(
    monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda, to_pinned: float, to_pageable: float, passed: list[bool]
) -> None:
    def rows_of(*args: object) -> Iterator[dict[str, Any]]:
        for row in measured(*args):
            yield {**row, "to_pinned": to_pinned, "to_pageable": to_pageable}

    measured: Any = bench_h2d.rows_of
    monkeypatch.setattr(bench_h2d, "rows_of", rows_of)
    done = bench()
    verdicts = [line.split()[0] for line in done.output.splitlines() if "times the bandwidth" in line]
    assert verdicts == ["passed" if one else "missed" for one in passed]
    assert done.exit_code == (not all(passed))
