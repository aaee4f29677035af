"""The load benchmark does what it says: every way gives every rank the right objects, and the figures add up."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner

from benchmarks import _gauges, _load, _shmcast_ways, bench_scheduler, bench_scheduler_targets
from benchmarks._load import Feed, Figures, Load, Part, Requests
from benchmarks._ranks import run_ranks
from benchmarks.baselines import BASELINE, BASELINES, bytes_of
from benchmarks.bench_scheduler_targets import Instants
from benchmarks.bench_targets import Line
from shmcast import MultimodalInputs
from shmcast.cli import _local_below, command_line
from shmcast.cli._local_below import Cost
from tests.support.ranks import Ranks

ROOT = Path(__file__).parent.parent
WAYS = {way.key: way for way in (*BASELINES, *_shmcast_ways.contenders("auto", "ring"))}
SIZES = (64, 1 << 16, 2 << 20)
BAD = "1"
TOOK = 30.0


# Every way.


def raws() -> list[tuple[str, dict[str, Any]]]:
    """A small one, a bad one, a large one."""
    loads = [Load(size) for size in SIZES]
    pool = _load.pool_of(loads, 1)
    batch = [(str(number), Requests(load, pool).raw(number)) for number, load in enumerate(loads)]
    batch[int(BAD)][1]["mm_items"][0]["modality"] = "SMELL"
    return batch


def take_all(rank: int, key: str, waits: bool) -> list[tuple[bool, int | None] | str]:
    """Hand in a batch in two parts, take all; whether the bytes are right and the hash, or the error."""
    batch = raws()
    way = WAYS[key].make(MultimodalInputs.from_dict)
    found: dict[str, tuple[bool, int | None] | str] = {}

    def take(key: str) -> None:
        try:
            (item,) = way.take(key).mm_items
        except Exception as error:
            found[key] = f"{type(error).__name__}: {error}"
        else:
            raw = dict(batch)[key]["mm_items"][0]
            assert isinstance(item.feature, torch.Tensor)
            found[key] = (torch.equal(item.feature, raw["feature"]), item.hash)

    way.submit(batch[:1])
    way.submit(batch[1:])
    deadline = time.monotonic() + TOOK
    while len(found) < len(batch) and time.monotonic() < deadline:
        offered = None if waits else _load.share(([], True, way.offer()) if way.leads else None)[2]
        for key_, _ in batch if waits else [(key, None) for key in way.admit(offered)]:
            take(key_)
    way.close()
    return [found[key] for key, _ in batch]


@pytest.mark.multiprocess
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("key", list(WAYS))
def test_every_rank_gets_the_same_objects_and_the_same_error(ranks: Ranks, key: str, waits: bool) -> None:
    small, _, large = (raw for _, raw in raws())
    first, *others = ranks.run(2, take_all, key, waits)
    hashes = [MultimodalInputs.from_dict(raw).mm_items[0].hash for raw in (small, large)]
    assert [first[0], first[2]] == [(True, hashes[0]), (True, hashes[1])]
    assert first[1].startswith("ValueError: mm_items[0]: no modality is named 'SMELL'")
    assert others == [first]


def take_twice(rank: int, key: str) -> str:
    batch = raws()[:1]
    way = WAYS[key].make(MultimodalInputs.from_dict)
    way.submit(batch)
    way.take("0")
    try:
        way.take("0")
    except Exception as error:
        return type(error).__name__
    finally:
        way.close()
    return "nothing"


@pytest.mark.multiprocess
def test_a_baseline_gives_a_request_once(ranks: Ranks) -> None:
    assert ranks.run(2, take_twice, BASELINE) == ["KeyError", "KeyError"]


def test_bytes_are_those_of_the_features() -> None:
    assert [bytes_of(raw) for _, raw in raws()] == list(SIZES)


# What arrives.


def test_no_two_requests_are_alike_and_a_wrong_one_is_noticed() -> None:
    load = Load(4096)
    requests = Requests(load, _load.pool_of([load], 1))
    first, second = (MultimodalInputs.from_dict(requests.raw(number)) for number in (0, 1))
    requests.check(0, first)
    requests.check(1, second)
    assert first.mm_items[0].hash != second.mm_items[0].hash
    with pytest.raises(RuntimeError, match="other bytes came for request 0"):
        requests.check(0, second)
    with pytest.raises(RuntimeError, match="the hash 1 came for request 0"):
        requests.check_hash(0, 1)


@pytest.mark.parametrize("load", [Load(4096, hashed=True), Load(4096, cost_cpu=1e-3), Load(4096, cost_wait=1e-3)])
def test_where_hashing_is_not_the_cost_the_hash_is_there(load: Load) -> None:
    raw = Requests(load, _load.pool_of([load], 1)).raw(6)
    assert raw["mm_items"][0]["hash"] == 7
    work = _load.Work(load)
    assert work(raw).mm_items[0].hash == 7
    assert work.runs == 1


def test_so_many_are_in_flight_and_no_more() -> None:
    feed = Feed(Load(8, 3), range(5), 1)
    assert (feed.due(0), feed.over) == ([0, 1, 2], False)
    assert (feed.due(3), feed.over) == ([], False)
    assert (feed.due(1), feed.over) == ([3, 4], True)
    assert list(feed.arrived) == [0, 1, 2, 3, 4]


def test_arrivals_at_a_rate_are_alike_for_a_seed() -> None:
    def gaps(seed: int) -> list[int]:
        feed = Feed(Load(8, rate=1e6), range(50), seed)
        deadline = time.monotonic() + TOOK
        while not feed.over and time.monotonic() < deadline:
            feed.due(0)
        first = feed.arrived[0]
        return [at - first for at in feed.arrived.values()]

    one, again, other = gaps(1), gaps(1), gaps(2)
    assert one == again != other
    assert one == sorted(one)


def test_text_only_requests_arrive_alone_where_the_others_are_left_out() -> None:
    feed = Feed(Load(8, 100, text=2, silent=True), range(6), 1)
    assert feed.due(0) == [1, 2, 4, 5]


def test_the_quiet_loop_has_its_ticks_and_no_requests() -> None:
    ticks = _load.Ticks(2)
    assert (ticks.due(0), ticks.over, ticks.due(0), ticks.over) == ([], False, [], True)


# Figures.


def part(taken: dict[int, int], arrived: dict[int, int] | None = None, **fields: Any) -> Part:
    return Part(0, "way", 0, "warm", 0, 10, arrived or {}, taken, dict.fromkeys(taken, 0), [0.0], **fields)


def test_figures_are_of_the_last_rank_and_over_all_of_them() -> None:
    second = 10**9
    arrived = {number: 0 for number in range(100)}
    taken = {number: (number + 1) * second for number in range(100)}
    late = {number: at + second // 2 for number, at in taken.items()}
    ranks = [[part(taken, arrived, cpu=1.0, no_gil=0.1, received=300, runs=100)], [part(late, cpu=2.0, no_gil=0.3)]]
    found = _load.summarise(ranks, [Load(8)])[0, "way", "warm"]
    assert (found.p50, found.p99, found.text_p99) == (50.5, 99.5, None)
    assert found.requests == 100
    assert found.rate == pytest.approx(100 / 100.5)
    assert (found.cpu, found.cpu_each, found.no_gil, found.received, found.runs) == (3.0, 0.03, 0.3, 3.0, 1.0)


def test_text_only_requests_have_figures_of_their_own() -> None:
    arrived, taken = dict.fromkeys(range(4), 0), {0: 4 * 10**9, 1: 10**9, 2: 2 * 10**9, 3: 3 * 10**9}
    found = _load.summarise([[part(taken, arrived)]], [Load(8, text=3)])[0, "way", "warm"]
    assert (found.p50, found.p99, found.text_p50, found.text_p99) == (4.0, 4.0, 2.0, 3.0)


def test_ranks_that_took_other_requests_or_on_other_ticks_are_noticed() -> None:
    other_tick = part({0: 1, 1: 1})
    other_tick.ticks[1] = 5
    for other in (part({0: 1}), other_tick):
        with pytest.raises(RuntimeError, match="different requests, or on different ticks"):
            _load.check_alike([part({0: 1, 1: 1}), other])


@pytest.mark.parametrize(("own", "baseline", "wanted"), [(2.0, 4.0, 0.5), (2.0, None, None), (None, 1.0, None)])
def test_ratios_need_both(own: float | None, baseline: float | None, wanted: float | None) -> None:
    assert bench_scheduler.ratio(own, baseline) == wanted


# Gauges.


def test_launching_and_burning_take_the_cpu_time_that_they_say() -> None:
    for work in (_gauges.launch, _gauges.burn):
        before = time.thread_time()
        work(0.003)
        assert time.thread_time() - before >= 0.003


def test_a_process_burns_until_it_is_told_to_end() -> None:
    with _gauges.burning(1.5):
        burners = [child for child in psutil.Process().children() if _gauges.BURNER in child.cmdline()]
        assert len(burners) == 2
    assert not any(burner.is_running() for burner in burners)
    with _gauges.burning(0.0):
        pass


def test_bytes_are_counted_where_they_arrive() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        with theirs:
            before = _gauges.socket_bytes()
            ours.sendall(bytes(1000))
            assert len(theirs.recv(1000, socket.MSG_WAITALL)) == 1000
            assert _gauges.socket_bytes() - before == 1000


def test_the_heartbeat_waits_for_a_share_of_the_time() -> None:
    with _gauges.Heartbeat() as beat:
        _gauges.launch(0.02)
    assert 0 <= beat.share < 1


# The program.


def run_bench(*args: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_scheduler.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SMALL = ("--ranks", "2", "--size", "4K", "--rounds", "1", "--requests", "6", "--concurrency", "3", "--batch", "2")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_json_table_and_png_come_out(tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    asked = ("--only", "alone,object,sync:shm", "--quiet", "--text", "1", "--tick-ms", "0.2", "--gpu-ms", "0")
    done = run_bench(*SMALL, *asked, "--json", str(figures), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    assert {"measured", "date", "command", "machine", "plan", "contenders"} < report.keys()
    rows = report["results"]
    assert [(row["load"]["mode"], row["contender"]) for row in rows] == [
        (mode, key) for mode in ("warm", "cold", "quiet") for key in ("alone", "object", "sync:shm")
    ]
    for row in rows:
        assert row["requests"] == {"warm": 6, "cold": 3, "quiet": 0}[row["load"]["mode"]]
        if row["load"]["mode"] != "quiet":
            assert 0 < row["p50_s"] <= row["p99_s"]
            assert row["text_p99_s"] > 0
            assert row["rate"] > 0
            assert row["cpu_s"] > 0
            assert row["fn_runs"] == (2 if row["contender"] == "alone" else 1)
            assert row["verified"] > 0
            assert row["rate_ratio"] > 0
    assert all(word in done.stdout for word in ("every rank alone", "shmcast sync", "stall", "4 KiB", "cold"))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_scheduler_that_waits_needs_no_ticks() -> None:
    done = run_bench(*SMALL, "--only", "alone,sync:shm", "--waits", "--no-cold", "--cost-wait-ms", "1", "--json", "-")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["results"]
    found = [(row["contender"], row["requests"], row["fn_runs"]) for row in rows]
    assert found == [("alone", 6, 2), ("sync:shm", 6, 1)]
    assert "waits" in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--size", "4Q"), "4Q"),
        (("--only", "alone,warp"), "warp"),
        (("--only", "async:warp"), "async:warp"),
        (("--only", "alone:shm"), "alone:shm"),
        (("--ranks", "1"), "--ranks"),
        (("--concurrency", "0"), "'0'"),
        (("--rate", "0"), "--rate"),
        (("--waits", "--rate", "5"), "--rate needs ticks"),
        (("--waits", "--duration", "5"), "--duration needs ticks"),
        (("--waits", "--text", "5"), "--text needs ticks"),
        (("--waits", "--quiet"), "--quiet needs ticks"),
        (("--waits", "--batch", "8", "--concurrency", "4"), "--batch 8 is more than --concurrency 4"),
        (("--cost-cpu-ms", "1", "--cost-wait-ms", "1"), "one of them"),
        (("--targets", "--plot", "x.png"), "--plot"),
    ],
)
def test_what_is_wrong_is_named(args: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(bench_scheduler.main, list(args))
    assert result.exit_code == 2
    assert said in result.output


def test_ways_keep_their_order_and_take_a_route() -> None:
    def keys(text: str) -> list[str]:
        return [way.key for way in bench_scheduler.parse_only(text, "ring")]

    assert keys("spread,alone") == ["alone", "spread"]
    assert keys("") == list(WAYS)
    assert keys("async:local,spread:shm,alone") == ["alone", "spread:shm", "async:local"]


# The targets.


def figures(rate: float = 1.0, **fields: Any) -> Figures:
    every = dict.fromkeys(("p50", "p99", "text_p50", "text_p99", "cpu", "cpu_each", "stall_p99", "stall_max"), 1.0)
    rest = {"no_gil": 0.0, "received": 0.0, "runs": 1.0, "verified": 1, "counts": {}}
    return Figures(requests=1, rate=rate, **{**every, **rest, **fields})


def passed(lines: list[Line]) -> list[bool]:
    return [line.passed for line in lines]


def warm(**rates: Figures) -> Mapping[tuple[str, str], Figures]:
    return {(key, "warm"): each for key, each in rates.items()}


@pytest.mark.parametrize(
    ("spread", "entry", "runs", "wanted"),
    [(1.59, 5.09, 1.0, [True, True]), (1.61, 5.11, 1.0, [False, False]), (1.5, 5.0, 1.1, [False, False])],
)
def test_the_table_from_practice_is_judged(spread: float, entry: float, runs: float, wanted: list[bool]) -> None:
    found = warm(spread=figures(10 / spread, runs=runs), **{"async": figures(10 / entry, runs=runs)})
    others = warm(alone=figures(2.0), object=figures(1.8))
    assert passed(bench_scheduler_targets.judge_practice({10: found}, others)) == wanted


@pytest.mark.parametrize(("rate", "cpu", "wanted"), [(3.0, 0.3, [True, True]), (2.9, 0.31, [False, False])])
def test_cpu_bound_work_is_judged(rate: float, cpu: float, wanted: list[bool]) -> None:
    found = warm(alone=figures(), spread=figures(rate, cpu_each=cpu))
    assert passed(bench_scheduler_targets.judge_cpu_bound(found)) == wanted


@pytest.mark.parametrize(("entry", "wanted"), [(0.9, [True]), (0.89, [False])])
def test_auto_is_judged_by_its_worst(entry: float, wanted: list[bool]) -> None:
    found = warm(alone=figures(), spread=figures(2.0), **{"async": figures(entry)})
    assert passed(bench_scheduler_targets.judge_auto({4096: found}, hashed=False, least=0.9)) == wanted


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        (figures(8.0, p99=0.125, stall_p99=0.015, no_gil=0.19), [True] * 5),
        (figures(7.9, p99=0.126, stall_p99=0.016, no_gil=0.2), [False, False, False, True, False]),
        (figures(8.0, p99=0.125, stall_p99=0.11, no_gil=0.19), [True, True, False, False, True]),
    ],
)
def test_stalls_are_judged(own: Figures, wanted: list[bool]) -> None:
    found = {("object", "warm"): figures()}
    for key in ("async", "spread"):
        found |= {(key, "warm"): own, (key, "quiet"): figures(stall_p99=0.01)}
    assert passed(bench_scheduler_targets.judge_stalls(found)) == wanted * 2


@pytest.mark.parametrize(("p99", "wanted"), [(1.2, [True]), (1.21, [False])])
def test_admission_is_judged_by_text_only_requests(p99: float, wanted: list[bool]) -> None:
    found = bench_scheduler_targets.judge_admission(warm(admission=figures(text_p99=p99)), warm(admission=figures()))
    assert passed(found) == wanted


@pytest.mark.parametrize(("ring", "wanted"), [(25, [True]), (26, [False])])
def test_headers_are_judged_by_the_last_reader(ring: int, wanted: list[bool]) -> None:
    def rank(ring: int, group: int) -> dict[str, list[Instants]]:
        return {"ring": [Instants(ring, 200)] * 3, "group": [Instants(group, 200)] * 3}

    assert passed(bench_scheduler_targets.judge_header([rank(0, 0), rank(1, 1), rank(ring, 100)])) == wanted


@pytest.mark.multiprocess
def test_instants_of_headers_are_in_order() -> None:
    entry, other = run_ranks(2, bench_scheduler_targets._headers, 2)
    for control in ("ring", "group"):
        for posted, came in zip(entry[control], other[control], strict=True):
            assert posted.header < came.header < came.ready


def test_targets_are_chosen_by_name() -> None:
    assert bench_scheduler_targets.parse_only("header,stalls") == ("header", "stalls")
    result = CliRunner().invoke(bench_scheduler_targets.main, ["--only", "warp"])
    assert result.exit_code == 2
    assert "warp" in result.output


# The command line.


def test_the_command_passes_its_arguments_on() -> None:
    result = CliRunner().invoke(command_line, ["bench", "scheduler", "--only", "warp"])
    assert result.exit_code == 2
    assert "warp: there are alone" in " ".join(result.output.split())


def test_without_a_checkout_the_command_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["shmcast.cli.bench"], "_ROOT", tmp_path)
    result = CliRunner().invoke(command_line, ["bench", "scheduler", "--help"])
    assert result.exit_code == 1
    assert "make setup" in result.output


def costs(*ratios: float) -> list[Cost]:
    """Of an exchange, to running locally, by size."""
    return [Cost(4096 << at, 1.0, ratio, 1.0, 1.0) for at, ratio in enumerate(ratios)]


@pytest.mark.parametrize(
    ("ratios", "wanted"),
    [
        ((4.0, 2.0, 0.5, 0.2), 4096 << 2),
        ((4.0, 0.9, 2.0, 0.2), 4096 << 3),  # one that is out of line does not decide
        ((0.5, 0.4, 0.3, 0.2), 0),
        ((4.0, 3.0, 2.0, 1.5), 4096 << 4),
    ],
)
def test_the_proposed_value_is_where_an_exchange_begins_to_pay(ratios: tuple[float, ...], wanted: int) -> None:
    assert _local_below.propose(costs(*ratios)) == wanted


@pytest.mark.multiprocess
@pytest.mark.slow
def test_local_below_is_measured_here() -> None:
    args = ["bench", "local-below", "--ranks", "2", "--rounds", "1", "--largest", "4", "--json"]
    done = subprocess.run([sys.executable, "-m", "shmcast", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [cost["size"] for cost in found["costs"]] == [4096 << at for at in range(11)]
    assert all(min(cost.values()) > 0 for cost in found["costs"])
    assert found["local_below"] in {0, *(4096 << at for at in range(12))}
