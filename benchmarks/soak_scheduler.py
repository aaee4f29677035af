"""A scheduler backend for minutes: requests at a rate, taken at random, late, or aborted. Memory is flat, or it failed.

    python benchmarks/soak_scheduler.py --minutes 10 --rate 50

Every rank submits the same requests; when it takes one, or aborts it, is its own random choice. All bytes of what is
taken are compared. Memory, descriptors, threads, leases and blocks are sampled; the median of the last quarter is held
against that of the second (the first one warms up).
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks._ranks import Place, run_ranks
from benchmarks._soak import MIB, PRIVATE, Bound, judge, plot, require_matplotlib, span, use_of
from benchmarks.bench_broadcast import write
from shmcast import Policy, SchedulerBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

SAMPLE_SECONDS = 5.0
BOUNDS = {"private": PRIVATE, "fds": Bound(), "threads": Bound()}


class Sample(NamedTuple):
    """What one rank has at one moment; bytes, or how many."""

    at: float
    private: int
    pss: int
    fds: int
    threads: int
    pending: int
    leases: int
    blocks: int


class Outcome(NamedTuple):
    """What one rank did, and what was left of it."""

    taken: int
    aborted: int
    samples: list[Sample]
    left: dict[str, int]
    fallbacks: dict[str, int]


def make(raw: dict[str, Any]) -> dict[str, Any]:
    """Half a reference to what all ranks hold, half new bytes."""
    return {"same": raw["x"], "new": raw["x"] + 1}


@click.command(help=__doc__.partition("\n")[0])
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(0.01), help="How long.")
@click.option("--rate", default=50.0, show_default=True, type=click.FloatRange(0.1), help="Requests a second.")
@click.option("--ranks", default=4, show_default=True, type=click.IntRange(2, 16))
@click.option("--placement", default="spread", show_default=True, type=click.Choice(["entry", "spread"]))
@click.option("--control", default="ring", show_default=True, type=click.Choice(["ring", "group"]))
@click.option("--seed", default=1, show_default=True)
@click.option("--json", "json_file", metavar="FILE", help="All samples as JSON; - is standard output.")
@click.option("--plot", "plot_file", metavar="FILE", help="All samples as PNG; needs matplotlib.")
def main(
    minutes: float,
    rate: float,
    ranks: int,
    placement: str,
    control: str,
    seed: int,
    json_file: str | None,
    plot_file: str | None,
) -> None:
    if plot_file is not None:
        require_matplotlib()
    console = Console(stderr=json_file == "-")
    began = time.monotonic()
    before = set(os.listdir("/dev/shm"))
    outcomes: list[Outcome] = run_ranks(
        ranks, soak, minutes * 60, rate, placement, control, seed, tell=lambda text: console.print(text)
    )
    table = Table(
        "rank", "taken", "aborted", "private memory", "fds", "threads", "leases", "blocks", "left", "fallbacks"
    )
    reasons = []
    for rank, outcome in enumerate(outcomes):
        series = series_of(outcome.samples)
        reasons += [f"rank {rank}: {reason}" for reason in judge(series, BOUNDS)]
        left = ", ".join(f"{count} {name}" for name, count in outcome.left.items() if count)
        reasons += [f"rank {rank}: {left} are left"] if left else []
        shown = [span(name, series[name]) for name in ("private", "fds", "threads", "leases", "blocks")]
        done = [str(rank), str(outcome.taken), str(outcome.aborted)]
        table.add_row(*done, *shown, left or "nothing", str(outcome.fallbacks or "none"))
    console.print(table)
    reasons += [f"/dev/shm/{name} is left" for name in sorted(set(os.listdir("/dev/shm")) - before)]
    verdict = "FAILED" if reasons else "flat"
    console.print(f"{verdict} after {time.monotonic() - began:.0f} s", *reasons, sep="\n  ", highlight=False)
    if json_file is not None:
        found = [{**outcome._asdict(), "samples": series_of(outcome.samples)} for outcome in outcomes]
        write(json.dumps({"verdict": verdict, "reasons": reasons, "ranks": found}, indent=1), json_file)
    if plot_file is not None:
        panels = {
            name: {f"rank {rank}": series_of(outcome.samples)[name] for rank, outcome in enumerate(outcomes)}
            for name in Sample._fields[1:]
        }
        times = [sample.at for sample in outcomes[0].samples]
        plot(plot_file, f"{verdict}: {ranks} ranks, placement {placement}, seed {seed}", times, panels)
    sys.exit(bool(reasons))


def series_of(samples: Sequence[Sample]) -> dict[str, list[float]]:
    return {name: [getattr(sample, name) for sample in samples] for name in Sample._fields}


def soak(
    place: Place,
    seconds: float,
    rate: float,
    placement: Literal["entry", "spread"],
    control: Literal["ring", "group"],
    seed: int,
) -> Outcome:
    """One rank's loop."""
    alike, own = random.Random(seed), random.Random(f"{seed} {place.rank}")
    backend = SchedulerBackend(
        fn=make, placement=placement, control=control, capacity=256 * MIB, policy=Policy(route="shm")
    )
    waiting: deque[tuple[float, int, torch.Tensor | None]] = deque()
    samples: list[Sample] = []
    began = time.monotonic()
    taken = aborted = number = 0
    while (now := time.monotonic() - began) < seconds or waiting:
        due = int(now * rate) + 1 if now < seconds else number
        batch = []
        while number < due:
            number += 1
            x = torch.full((alike.choice((64, 256, 1024, 4096)) * 256,), float(number))
            batch.append((number, {"x": x}))
            kind = own.random()
            after = now + (own.uniform(0, 0.5) if kind < 0.9 else own.uniform(2, 10))
            waiting.append((after, number, None if own.random() < 0.1 else x))
        # One request a batch: how many are due at once differs between ranks, what is in a batch must not.
        for each in batch:
            backend.submit([each])
        for _ in range(len(waiting)):
            after, key, wanted = waiting.popleft()
            if after > now and now < seconds + 10:
                waiting.append((after, key, wanted))
            elif wanted is None:
                aborted += backend.abort(key)
            else:
                check(key, backend.take(key, 60), wanted)
                taken += 1
            wanted = None
        batch.clear()
        if now > len(samples) * SAMPLE_SECONDS:
            samples.append(measure(backend, now))
            if place.leads and len(samples) % 12 == 0:
                place.tell(f"{now:.0f} s: {number} requests, {samples[-1]}")
        time.sleep(1 / rate / 2)
    dist.barrier()
    left = finish(backend)
    dist.barrier()
    fallbacks = dict(backend.stats().fallbacks)
    backend.close()
    return Outcome(taken, aborted, samples, left, fallbacks)


def check(key: int, got: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    """Every byte."""
    if not (torch.equal(got["same"], x) and torch.equal(got["new"], x + 1)):
        raise RuntimeError(f"request {key}: other bytes came")


def finish(backend: SchedulerBackend) -> dict[str, int]:
    """What is still held once nothing is used any more, after the ranks had time to say so."""
    gc.collect()
    for _ in range(100):
        stats = backend.stats()
        held = sum(lease.held for lease in stats.leases)
        left = {"requests": stats.pending, "leases": stats.leases_held + held, "blocks": stats.live_blocks}
        if not any(left.values()):
            break
        time.sleep(0.05)
    return left


def measure(backend: SchedulerBackend, at: float) -> Sample:
    stats, use = backend.stats(), use_of()
    if use is None:
        raise RuntimeError("/proc does not say what this process uses")
    return Sample(at, use.private, use.pss, use.fds, use.threads, stats.pending, stats.leases_held, stats.live_blocks)


if __name__ == "__main__":
    main()
