"""A writer and its readers for minutes: killed, stopped, late, careless. Bytes are right, memory is flat, or it failed.

    python benchmarks/soak.py --minutes 25 --readers 4 --json soak.json --plot soak.png

Objects of all sizes, some from `empty()`, some cached, go to readers that hold them for a while, write to them, give
them back unopened, or forget them. Now and then a reader is killed and another takes a new index, or one is stopped
for some messages. Where all indices of an address are used up, a new writer follows. What happens to which message
comes from the seed; how many there are in the time does not. Every reader compares every byte that it opens, and again
when it drops it. What all processes use is sampled; the median of the last quarter is held against that of the second
(the first one warms up).
"""

from __future__ import annotations

import datetime
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parent.parent))

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks._soak import MIB, PRIVATE, Bound, Use, judge, plot, require_matplotlib, shown, span
from benchmarks._soak_writer import Failed, Plan, Soak
from benchmarks.bench_broadcast import machine, write
from shmcast._layout import MAX_READERS, RING_ENTRIES, control_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._soak_writer import Sample

VERSION = 1
# How far two times of a soak that leaks nothing may lie apart: how much is held is random.
BOUNDS = {
    "writer private": PRIVATE,
    "writer fds": Bound(1.1, 16),
    "writer threads": Bound(1.0, 2),
    "writer maps": Bound(1.1, 32),
    "reader private": Bound(1.25, 48 * MIB),
    "reader fds": Bound(1.25, 32),
    "reader threads": Bound(1.0, 1),
    "reader maps": Bound(1.25, 32),
    "named bytes": Bound(1.25, 128 * MIB),
    "names": Bound(1.1, 64),
    "leases": Bound(1.5, 64),
    "blocks": Bound(1.5, 64),
}


@click.command(help=__doc__.partition("\n")[0])
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(0.01), help="How long.")
@click.option("--seconds", type=click.FloatRange(1), help="How long, instead.")
@click.option("--seed", default=1, show_default=True)
@click.option("--readers", default=3, show_default=True, type=click.IntRange(1, 16), help="At a time.")
@click.option("--capacity", default=512, show_default=True, type=click.IntRange(16), help="Of the arena, MiB.")
@click.option(
    "--indices", default=MAX_READERS, show_default=True, type=click.IntRange(2, MAX_READERS), help="A writer."
)
@click.option("--rate", default=50.0, show_default=True, type=click.FloatRange(0.1), help="Messages a second, at most.")
@click.option("--kills", default=100, show_default=True, type=click.IntRange(2), help="Messages between two, about.")
@click.option("--plant", type=click.Choice(["memory", "fds", "leases", "bytes"]), help="Do wrong, to see it fail.")
@click.option("--json", "json_file", metavar="FILE", help="All samples as JSON; - is standard output.")
@click.option("--plot", "plot_file", metavar="FILE", help="All samples as PNG; needs matplotlib.")
def main(
    minutes: float,
    seconds: float | None,
    seed: int,
    readers: int,
    capacity: int,
    indices: int,
    rate: float,
    kills: int,
    plant: str | None,
    json_file: str | None,
    plot_file: str | None,
) -> None:
    if indices <= readers:
        raise click.UsageError(f"--indices {indices}: more than the {readers} readers that there are at a time.")
    if plot_file is not None:
        require_matplotlib()
    torch.set_num_threads(1)
    plan = Plan(seconds or minutes * 60, seed, readers, capacity * MIB, indices, rate, kills, plant or "")
    console = Console(stderr=json_file == "-")
    began = time.monotonic()
    soak = Soak(plan)
    reasons = run(soak, console)
    series = series_of(soak.samples)
    console.print(table_of(series))
    counted = ", ".join(f"{count} {what}" for what, count in sorted(soak.counts.items()))
    console.print(counted, highlight=False)
    verdict = "FAILED" if reasons else "flat"
    console.print(f"{verdict} after {time.monotonic() - began:.0f} s", *reasons, sep="\n  ", highlight=False)
    if json_file is not None:
        write(json.dumps(report_of(soak, verdict, reasons, series), indent=1), json_file)
    if plot_file is not None:
        times = [sample.at for sample in soak.samples]
        title = (
            f"{verdict}: {readers} readers, seed {seed}, {soak.counts['kills']} kills, {soak.counts['writers']} writers"
        )
        plot(plot_file, title, times, panels_of(soak.samples, series))
    sys.exit(bool(reasons))


def run(soak: Soak, console: Console) -> list[str]:
    """Why it failed."""
    try:
        soak.run(lambda text: console.print(text, highlight=False))
        reasons = judge(series_of(soak.samples), BOUNDS)
        return reasons + beyond(soak) + soak.finish()
    except Failed as error:
        return [str(error)]
    finally:
        soak.close()


def beyond(soak: Soak) -> list[str]:
    """What must never be, not at one moment."""
    plan, reasons = soak.plan, []
    bound = plan.capacity + control_size(plan.indices, RING_ENTRIES) + (1 << 20)
    for sample in soak.samples:
        if sample.stale:
            reasons.append(f"{sample.stale} names of closed writers after {sample.at:.0f} s")
        if sample.named > bound:
            reasons.append(f"{sample.named} bytes in /dev/shm after {sample.at:.0f} s, {bound} are the most")
    return reasons[:1]


def series_of(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Everything over time: of the readers the median of those that live."""
    series: dict[str, list[float]] = {}
    for field in Use._fields:
        series[f"writer {field}"] = [getattr(sample.writer, field) for sample in samples]
        series[f"reader {field}"] = [
            statistics.median([getattr(use, field) for use in sample.readers if use is not None] or [0])
            for sample in samples
        ]
    series["named bytes"] = [sample.named for sample in samples]
    series["arena bytes"] = [sample.segments for sample in samples]
    for name in ("names", "leases", "blocks"):
        series[name] = [getattr(sample, name) for sample in samples]
    return series


def panels_of(samples: Sequence[Sample], series: dict[str, list[float]]) -> dict[str, dict[str, Sequence[float]]]:
    """What is drawn: of each process what it uses, and what all of them have together."""
    panels: dict[str, dict[str, Sequence[float]]] = {}
    for field in Use._fields:
        panels[field] = {"writer": series[f"writer {field}"]}
        for i, uses in enumerate(zip(*(sample.readers for sample in samples), strict=True)):
            panels[field][f"reader {i}"] = [float("nan") if use is None else getattr(use, field) for use in uses]
    panels["/dev/shm, bytes"] = {"with a name": series["named bytes"], "arena": series["arena bytes"]}
    panels["names"] = {"names": series["names"]}
    panels["leases and blocks"] = {name: series[name] for name in ("leases", "blocks")}
    return panels


def table_of(series: dict[str, list[float]]) -> Table:
    table = Table("what", "second to last quarter", "most")
    for name, values in series.items():
        if values:
            table.add_row(name, span(name, values), shown(name, max(values)))
    return table


def report_of(soak: Soak, verdict: str, reasons: list[str], series: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        "plan": soak.plan._asdict(),
        "verdict": verdict,
        "reasons": reasons,
        "counts": dict(sorted(soak.counts.items())),
        "at": [sample.at for sample in soak.samples],
        "series": series,
    }


if __name__ == "__main__":
    main()
