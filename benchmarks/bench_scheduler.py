"""What a scheduler on each rank gets done under load, and what it costs it: shmcast, and every way people have tried.

python benchmarks/bench_scheduler.py --help
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import _load, _shmcast_ways, bench_scheduler_targets
from benchmarks._load import Load, Plan
from benchmarks._ranks import RanksFailed, Settings, run_ranks
from benchmarks.baselines import BASELINE, BASELINES
from benchmarks.bench_broadcast import clock, machine, parse_sizes, shown, write
from shmcast import Route

if TYPE_CHECKING:
    from benchmarks._load import Figures
    from benchmarks.baselines import Contender
    from benchmarks.bench_targets import Line

VERSION = 1
MEASURED = (
    "requests a second until the last rank has taken the last; latency in seconds from arrival until the last rank has "
    "taken it; CPU seconds over all ranks without what ticks launch; stalls in seconds of any rank's tick; share of "
    "time in which a thread of the worst rank waited for the GIL; bytes received over TCP by all ranks, a request"
)
TICK_MS = 1.0
GPU_MS = 5.0
MANY = 100_000  # requests, more than any `--duration` has use for
WIDTH = 150  # of the table where no terminal says
MODES = {"warm": "warm", "cold": "cold: the first requests of a new setup", "quiet": "no requests, others use the CPU"}
PLOTTED = (
    ("rate", 1.0, "requests a second"),
    ("p99_s", 1e3, "p99 latency, ms"),
    ("cpu_each_s", 1e3, "CPU time a request, all ranks, ms"),
    ("stall_p99_s", 1e3, "p99 stall of the scheduler's thread, ms"),
)


def parse_only(text: str, control: str) -> tuple[Contender, ...]:
    """Ways by key, in their own order; empty means all. `key:route` pins the route of one that chooses."""
    known = (*BASELINES, *_shmcast_ways.contenders(Route.AUTO.value, control))
    routes = [route.value for route in Route if route is not Route.AUTO]
    pinned = [way for route in routes for way in _shmcast_ways.contenders(route, control)]
    asked = {part.strip() for part in text.split(",")} if text else {way.key for way in known}
    if unknown := asked - {way.key for way in (*known, *pinned)}:
        there = ", ".join(way.key for way in known)
        raise click.BadParameter(
            f"{', '.join(sorted(unknown))}: there are {there}; with a route, {', '.join(way.key for way in pinned)}"
        )
    return tuple(way for way in (*known, *pinned) if way.key in asked)


def parse_counts(text: str) -> tuple[int, ...]:
    """`1,10,100` as numbers, 1 or more each."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise click.BadParameter(f"{text!r}: numbers, 1 or more each")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def check(load: Load, plan: Plan) -> None:
    """Raise for what contradicts itself."""
    if load.cost_cpu and load.cost_wait:
        raise click.UsageError("--cost-cpu-ms and --cost-wait-ms: one of them.")
    if not load.waits:
        return
    for given, name in ((load.rate, "--rate"), (load.duration, "--duration"), (load.text, "--text")):
        if given:
            raise click.UsageError(f"{name} needs ticks: not with --waits.")
    if plan.quiet:
        raise click.UsageError("--quiet needs ticks: not with --waits.")
    if load.batch > load.concurrency:
        raise click.UsageError(f"--batch {load.batch} is more than --concurrency {load.concurrency}.")


def rows_of(plan: Plan, ways: Sequence[Contender], per_rank: Sequence[list[_load.Part]]) -> list[dict[str, Any]]:
    """One row of the result for each load, mode and way."""
    found = _load.summarise(per_rank, plan.loads)
    rows = []
    for index, load in enumerate(plan.loads):
        for mode in MODES:
            cases = {way: found[index, way.key, mode] for way in ways if (index, way.key, mode) in found}
            # Where nothing is done, nothing compares.
            baseline = next((f for way, f in cases.items() if way.key == BASELINE and mode != "quiet"), None)
            where = {**dataclasses.asdict(load), "ranks": plan.ranks, "mode": mode}
            rows += [_row(where, way, figures, baseline) for way, figures in cases.items()]
    return rows


def _row(where: dict[str, Any], way: Contender, figures: Figures, baseline: Figures | None) -> dict[str, Any]:
    return {
        "load": where,
        "contender": way.key,
        "label": way.label,
        "requests": figures.requests,
        "rate": figures.rate,
        "p50_s": figures.p50,
        "p99_s": figures.p99,
        "text_p50_s": figures.text_p50,
        "text_p99_s": figures.text_p99,
        "cpu_s": figures.cpu,
        "cpu_each_s": figures.cpu_each,
        "stall_p99_s": figures.stall_p99,
        "stall_max_s": figures.stall_max,
        "no_gil": figures.no_gil,
        "socket_bytes": figures.received,
        "fn_runs": figures.runs,
        "verified": figures.verified,
        **{name: figures.counts.get(name, {}) for name in ("routes", "fallbacks")},
        "rate_ratio": ratio(figures.rate, baseline.rate if baseline else None),
        "p99_ratio": ratio(figures.p99, baseline.p99 if baseline else None),
        "cpu_ratio": ratio(figures.cpu_each, baseline.cpu_each if baseline else None),
    }


def ratio(own: float | None, baseline: float | None) -> float | None:
    """None where there is nothing to compare."""
    return own / baseline if own is not None and baseline else None


def _clock(seconds: float | None) -> str:
    return "" if seconds is None else clock(max(0.0, seconds))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def _bytes(size: float) -> str:
    for unit, factor in (("M", 1 << 20), ("K", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.3g}{unit}"
    return f"{size:.0f}"


Column: TypeAlias = tuple[str, Callable[[dict[str, Any]], str]]

DONE: tuple[Column, ...] = (
    ("requests\n/s", lambda row: f"{row['rate']:.3g}" if row["rate"] < 1000 else f"{row['rate']:.0f}"),
    ("to\nalone", lambda row: _times(row["rate_ratio"])),
    ("p50\nms", lambda row: _clock(row["p50_s"])),
    ("p99\nms", lambda row: _clock(row["p99_s"])),
    ("to\nalone", lambda row: _times(row["p99_ratio"])),
    ("text p50\nms", lambda row: _clock(row["text_p50_s"])),
    ("text p99\nms", lambda row: _clock(row["text_p99_s"])),
    ("requests\ndone", lambda row: str(row["requests"])),
)
COST: tuple[Column, ...] = (
    ("CPU\ns", lambda row: f"{row['cpu_s']:.2g}"),
    ("to\nalone", lambda row: _times(row["cpu_ratio"])),
    ("stall\np99 ms", lambda row: _clock(row["stall_p99_s"])),
    ("stall\nmax ms", lambda row: _clock(row["stall_max_s"])),
    ("no\nGIL", lambda row: f"{row['no_gil']:.1%}"),
    ("sockets\na request", lambda row: _bytes(row["socket_bytes"])),
    ("fn runs\na request", lambda row: f"{row['fn_runs']:.3g}"),
)


def tables_of(rows: Sequence[dict[str, Any]], title: str, console: Console) -> list[Table]:
    """The rows of one load and one mode: what was done and what it cost, in one table if there is room."""
    done = [column for column in DONE if any(column[1](row) for row in rows)]
    whole = _table(rows, title, [*done, *COST])
    if Measurement.get(console, console.options.update(max_width=1000), whole).maximum <= console.width:
        return [whole]
    return [_table(rows, title, done), _table(rows, "", COST)]


def _table(rows: Sequence[dict[str, Any]], title: str, columns: Sequence[Column]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("way", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["label"], *(cell(row) for _, cell in columns))
    return table


def title_of(load: dict[str, Any]) -> str:
    """A load, for a person."""
    cost = "hashing"
    if load["hashed"]:
        cost = "the hash is there"
    if load["cost_cpu"] or load["cost_wait"]:
        cost = (
            f"{clock(load['cost_cpu'])} ms of CPU" if load["cost_cpu"] else f"{clock(load['cost_wait'])} ms of waiting"
        )
    arrival = f"{load['rate']:g} a second" if load["rate"] else f"{load['concurrency']} at once"
    ticks = "waits" if load["waits"] else f"ticks of {clock(load['tick'])} + {clock(load['gpu'])} ms"
    text = f", {load['text']} text-only for each" if load["text"] else ""
    return (
        f"{load['ranks']} ranks, {shown(load['size'])}, {cost}, {arrival}, batches of {load['batch']}{text}, {ticks}; "
        f"{MODES[load['mode']]}"
    )


def print_tables(rows: list[dict[str, Any]], console: Console) -> None:
    """A table for each load and mode, and which messages did not go by the way that was asked for."""
    for title in dict.fromkeys(title_of(row["load"]) for row in rows):
        chosen = [row for row in rows if title_of(row["load"]) == title]
        for table in tables_of(chosen, title, console):
            console.print(table)
        for row in chosen:
            if row["fallbacks"]:
                console.print(f"{row['label']}: fell back, {row['fallbacks']}", style="yellow")


def plot(rows: list[dict[str, Any]], target: str) -> None:
    """Bars of the warm figures, a column of them for each load, as PNG."""
    from matplotlib.figure import Figure

    warm = [row for row in rows if row["load"]["mode"] == "warm"]
    titles = list(dict.fromkeys(title_of(row["load"]) for row in warm))
    figure = Figure(figsize=(6.0 * len(titles), 3.0 * len(PLOTTED)), layout="constrained")
    grid = figure.subplots(len(PLOTTED), len(titles), squeeze=False)
    for column, title in enumerate(titles):
        chosen = [row for row in reversed(warm) if title_of(row["load"]) == title]
        for line, (name, factor, label) in enumerate(PLOTTED):
            axes = grid[line][column]
            colors = ["tab:green" if row["label"].startswith("shmcast") else "tab:gray" for row in chosen]
            values = [max(0.0, row[name] or 0.0) * factor for row in chosen]
            bars = axes.barh([row["label"] for row in chosen], values, color=colors)
            axes.bar_label(bars, [clock(value / 1e3) for value in values], padding=2)
            axes.margins(x=0.2)
            axes.set_xlabel(label)
        grid[0][column].set_title(textwrap.fill(title.removesuffix("; warm"), 60), fontsize=9)
    figure.savefig(target, format="png", dpi=120)


def report_of(
    plan: Plan, ways: Sequence[Contender], rows: list[dict[str, Any]], targets: list[dict[str, Any]]
) -> dict[str, Any]:
    """All of it, for machines."""
    return {
        "version": VERSION,
        "measured": MEASURED,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
        "plan": dataclasses.asdict(plan),
        "contenders": [{"key": way.key, "label": way.label, "stands_for": way.stands_for} for way in ways],
        "results": rows,
        "targets": targets,
    }


def run(plan: Plan, ways: tuple[Contender, ...], console: Console) -> list[dict[str, Any]]:
    """All loads, with a bar while they run; the rows."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{plan.ranks} ranks: starting", total=len(plan.loads) * plan.rounds * len(ways))
        steps = 0

        def tell(text: str) -> None:
            nonlocal steps
            bar.update(task, description=text, completed=steps)
            steps += 1

        per_rank = run_ranks(plan.ranks, _load.run_plan, plan, ways, settings=plan.settings, tell=tell)
    rows = rows_of(plan, ways, per_rank)
    print_tables(rows, console)
    return rows


@click.command(help=__doc__.partition("\n")[0])
@click.option("--size", "sizes", default="2M", show_default=True, help="Bytes of a request's feature; several: 4K,2M.")
@click.option("--concurrency", default="16", show_default=True, help="Requests in flight; several: 1,10,100.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Or so many arrive a second, at random.")
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Handed in at once, at most.")
@click.option("--ranks", default=4, show_default=True, type=click.IntRange(2, 64), help="How many.")
@click.option("--hashed", is_flag=True, help="The raw inputs carry their hash.")
@click.option("--cost-cpu-ms", default=0.0, type=click.FloatRange(0), help="CPU time of fn, in place of hashing.")
@click.option("--cost-wait-ms", default=0.0, type=click.FloatRange(0), help="Waiting of fn, in place of hashing.")
@click.option("--text", default=0, type=click.IntRange(0), help="Text-only requests for each that is not.")
@click.option("--tick-ms", type=click.FloatRange(0), help=f"CPU time of each tick.  [default: {TICK_MS:g}]")
@click.option("--gpu-ms", type=click.FloatRange(0), help=f"What it then waits for.  [default: {GPU_MS:g}]")
@click.option("--waits", is_flag=True, help="No ticks: the scheduler waits for the oldest batch when no more fit.")
@click.option("--only", default="", help="Of these ways only: alone,async,spread; async:shm pins a route.")
@click.option("--control", default="ring", show_default=True, type=click.Choice(["ring", "group"]), help="Of async.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Of all ways in turn.")
@click.option("--requests", default=64, show_default=True, type=click.IntRange(1), help="Of each way in a round.")
@click.option("--duration", type=click.FloatRange(0, min_open=True), help="Or seconds of each; the requests are many.")
@click.option("--cold/--no-cold", default=True, help="The first requests of a new setup, reported apart.")
@click.option("--quiet", is_flag=True, help="Then the loop without requests, while others burn as much CPU time.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of torch in each rank.")
@click.option("--pin", is_flag=True, help="Keep each rank on one CPU.")
@click.option("--seed", default=1, show_default=True, help="What bytes and arrivals are made from.")
@click.option("--targets", is_flag=True, help="Measure what the library promises instead, passed or missed.")
@click.option("--json", "json_file", metavar="FILE", help="All figures as JSON; - is standard output.")
@click.option("--plot", "plot_file", metavar="FILE", help="The warm figures as PNG; needs matplotlib.")
def main(
    sizes: str,
    concurrency: str,
    rate: float | None,
    batch: int,
    ranks: int,
    hashed: bool,
    cost_cpu_ms: float,
    cost_wait_ms: float,
    text: int,
    tick_ms: float | None,
    gpu_ms: float | None,
    waits: bool,
    only: str,
    control: str,
    rounds: int,
    requests: int,
    duration: float | None,
    cold: bool,
    quiet: bool,
    threads: int,
    pin: bool,
    seed: int,
    targets: bool,
    json_file: str | None,
    plot_file: str | None,
) -> None:
    ways = parse_only(only, control)
    loads = tuple(
        Load(
            size,
            at_once,
            rate,
            batch,
            hashed,
            cost_cpu_ms / 1e3,
            cost_wait_ms / 1e3,
            text,
            tick=_default(tick_ms, 0.0 if waits else TICK_MS) / 1e3,
            gpu=_default(gpu_ms, 0.0 if waits else GPU_MS) / 1e3,
            waits=waits,
            requests=requests if duration is None else MANY,
            duration=duration,
        )
        for size in parse_sizes(sizes)
        for at_once in parse_counts(concurrency)
    )
    plan = Plan(ranks, loads, rounds, cold, quiet=quiet, seed=seed, settings=Settings(threads, pin))
    for load in loads:
        check(load, plan)
    if plot_file is not None:
        if targets:
            raise click.UsageError("--plot draws what is compared: not with --targets.")
        require_matplotlib()
    console = Console(stderr=json_file == "-")
    if not console.is_terminal:
        console.width = WIDTH
    rows: list[dict[str, Any]] = []
    lines: list[Line] = []
    try:
        if targets:
            lines = bench_scheduler_targets.run(plan.settings, console)
        else:
            rows = run(plan, ways, console)
    except RanksFailed as error:
        raise click.ClickException(str(error)) from None
    if json_file is not None:
        report = report_of(plan, ways, rows, [dataclasses.asdict(line) for line in lines])
        write(json.dumps(report, indent=1), json_file)
    if plot_file is not None:
        plot(rows, plot_file)


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def require_matplotlib() -> None:
    """Say how to get it, before the measuring."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install 'shmcast[bench]'") from None


if __name__ == "__main__":
    main()
