"""How soon the schedulers of a SGLang server have a request's multimodal inputs, stock and with shmcast.

    python benchmarks/bench_sglang.py
    python benchmarks/bench_sglang.py --rounds 50 --json result.json

SGLang's own classes and its scheduler's own methods, over real groups and sockets, without a model. Needs SGLang in
this environment; where it is not, ends with status 69. Figures compare within one run.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import _sglang_targets
from benchmarks._ranks import RanksFailed, Settings, run_ranks
from benchmarks._sglang_rounds import LABELS, WAYS, Case, Plan, measure, summarise
from benchmarks.bench_broadcast import WIDTH, clock, parse_sizes, run_of_today, shown, write

if TYPE_CHECKING:
    from benchmarks._sglang_rounds import Figures

    Found = dict[tuple[Case, bool], Figures]

TITLES = {
    "method": "all ranks hold the raw inputs, and begin at one instant",
    "request": "from the tokenizer's send, SGLang's receiving included",
}


def run(plan: Plan, console: Console) -> tuple[str, Found]:
    """SGLang's version, and the figures of every case."""
    with console.status("starting") as status:
        per_rank = run_ranks(plan.ranks, measure, plan, settings=plan.settings, tell=status.update)
    return per_rank[0][0], summarise([samples for _, samples in per_rank])


def table_of(found: Found, part: str, size: int, *, cold: bool) -> Table:
    """One part at one size; the ratios are to every rank alone with the same hashes."""
    title = f"{shown(size)}, {'the first of a new setup' if cold else 'warm'}: {TITLES[part]}"
    table = Table(title=title, title_justify="left")
    table.add_column("way", no_wrap=True)
    columns = ["hashes", "median ms", "p99 ms", "times sooner"]
    if part == "request":
        columns += ["thread: CPU ms", "wall ms"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for hashed in (False, True):
        for way in WAYS[part]:
            own = found[Case(part, way, size, hashed), cold]
            alone = found[Case(part, "alone", size, hashed), cold]
            cells = [
                LABELS[way],
                "there" if hashed else "to make",
                clock(own.median),
                clock(own.p99),
                f"{alone.median / own.median:.3g}",
            ]
            if part == "request":
                cells += [clock(max(own.busy_cpu)), clock(max(own.busy_wall))]
            table.add_row(*cells)
        table.add_section()
    return table


def rows_of(found: Found) -> list[dict[str, Any]]:
    """One row of the result for each case, warm and cold."""
    rows = []
    for (case, cold), own in found.items():
        alone = found[case._replace(way="alone"), cold]
        rows.append(
            {
                **case._asdict(),
                "mode": "cold" if cold else "warm",
                **{f"{name}_s" if name != "rounds" else name: value for name, value in vars(own).items()},
                "sooner": alone.median / own.median,
            }
        )
    return rows


@click.command(help=__doc__.partition("\n")[0])
@click.option("--sizes", default="18M,90M", show_default=True, help="About so many bytes a request, with K, M or G.")
@click.option("--ranks", default=4, show_default=True, type=click.IntRange(2), help="Schedulers of one replica.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="Warm requests of each kind.")
@click.option("--warmup", default=2, show_default=True, type=click.IntRange(0), help="Requests before, not timed.")
@click.option("--cold-rounds", default=3, show_default=True, type=click.IntRange(0), help="New setups of each.")
@click.option("--tick", default=1.0, show_default=True, help="ms that a scheduler sleeps before it looks again.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of torch in each rank.")
@click.option("--pin", is_flag=True, help="Keep each rank on one CPU.")
@click.option("--json", "target", metavar="FILE", help="All figures as JSON; - is standard output.")
def main(
    sizes: str,
    ranks: int,
    rounds: int,
    warmup: int,
    cold_rounds: int,
    tick: float,
    threads: int,
    pin: bool,
    target: str | None,
) -> None:
    if importlib.util.find_spec("sglang") is None:
        click.echo("SGLang is not in this environment: nothing to measure", err=True)
        raise SystemExit(os.EX_UNAVAILABLE)
    plan = Plan(ranks, parse_sizes(sizes), rounds, warmup, cold_rounds, tick / 1e3, Settings(threads, pin))
    console = Console(stderr=target == "-")
    if not console.is_terminal:
        console.width = WIDTH
    try:
        version, found = run(plan, console)
    except RanksFailed as error:
        raise click.ClickException(str(error)) from None
    console.print(f"SGLang {version}, {ranks} ranks, {rounds} rounds; until the last rank is ready", highlight=False)
    for size in plan.sizes:
        for cold in (False, True)[: 1 + bool(cold_rounds)]:
            for part in WAYS:
                console.print(table_of(found, part, size, cold=cold))
    lines = _sglang_targets.judge({case: own for (case, cold), own in found.items() if not cold})
    for line in lines:
        verdict = "[green]passed[/]" if line.passed else "[red]MISSED[/]"
        console.print(f"{verdict}  {line.target}: [bold]{line.measured}[/]", highlight=False, soft_wrap=True)
    if target is not None:
        report = run_of_today() | {
            "sglang": version,
            "plan": dataclasses.asdict(plan),
            "results": rows_of(found),
            "targets": [dataclasses.asdict(line) for line in lines],
        }
        write(json.dumps(report, indent=1), target)


if __name__ == "__main__":
    main()
