"""How long until the last rank has a tensor: shmcast, and the ways that people use today.

python benchmarks/bench_broadcast.py --help
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks import _loop, bench_targets
from benchmarks._contenders import BASELINE, BY_KEY, CONTENDERS
from benchmarks._ranks import RanksFailed, Settings, run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks._loop import Case, Figures, Sample
    from benchmarks._ranks import Place

VERSION = 1
MEASURED = (
    "seconds from the latest start to the end on the last rank, sizes in bytes, CPU seconds summed over all ranks"
)
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
WIDTH = 100  # of the table where no terminal says
DEFAULT_SIZES = "4K,64K,1M,16M,64M,200M"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run."""

    ranks: tuple[int, ...]
    sizes: tuple[int, ...]
    contenders: tuple[str, ...]
    rounds: int
    warmup: int
    cold_rounds: int
    seed: int
    settings: Settings


def parse_sizes(text: str) -> tuple[int, ...]:
    """`4K,1M` as bytes, each rounded up to whole 8-byte words."""
    sizes = []
    for part in text.upper().replace("IB", "").split(","):
        number, unit = part.strip().rstrip("KMG"), part.strip().lstrip("0123456789")
        if not number.isdecimal() or unit not in UNITS or not int(number):
            raise click.BadParameter(f"{part!r}: a number of bytes, or one with K, M or G")
        sizes.append(-(-int(number) * UNITS[unit] // _loop.WORD) * _loop.WORD)
    return tuple(dict.fromkeys(sizes))


def parse_ranks(text: str) -> tuple[int, ...]:
    """`2,4` as numbers of ranks."""
    if not all(part.strip().isdecimal() and int(part) > 1 for part in text.split(",")):
        raise click.BadParameter(f"{text!r}: numbers of ranks, 2 or more each")
    return tuple(dict.fromkeys(int(part) for part in text.split(",")))


def parse_only(text: str) -> tuple[str, ...]:
    """Keys of contenders, in their own order; empty means all."""
    asked = {part.strip() for part in text.split(",")} if text else set(BY_KEY)
    if unknown := asked - BY_KEY.keys():
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(BY_KEY)}")
    return tuple(key for key in BY_KEY if key in asked)


def measure(place: Place, plan: Plan, size: int, mode: str) -> list[Sample]:
    """On every rank: one size of a plan, all its contenders in turn."""
    cases = cases_of(plan, size)
    if mode == "cold":
        return _loop.run_cold(place, cases, plan.cold_rounds, plan.seed)
    return _loop.run_warm(place, cases, plan.rounds, plan.warmup, plan.seed)


def measure_all(place: Place, plan: Plan) -> list[list[Sample]]:
    """On every rank: everything in `parts_of(plan)`, in the same processes."""
    results = []
    for size, mode in parts_of(plan):

        def tell(text: str, size: int = size) -> None:
            place.tell(f"{shown(size)}, {text}")

        results.append(measure(dataclasses.replace(place, tell=tell), plan, size, mode))
    return results


def parts_of(plan: Plan) -> list[tuple[int, str]]:
    """Size and mode of each table's section."""
    modes = [mode for mode, rounds in (("warm", plan.rounds), ("cold", plan.cold_rounds)) if rounds]
    return [(size, mode) for mode in modes for size in plan.sizes]


def cases_of(plan: Plan, size: int) -> list[Case]:
    return [_loop.Case(BY_KEY[key], size) for key in plan.contenders]


def rows_of(plan: Plan, ranks: int, per_rank: Sequence[list[list[Sample]]]) -> list[dict[str, Any]]:
    """One row of the result for each contender, size and mode."""
    rows = []
    for part, (size, mode) in enumerate(parts_of(plan)):
        cases = cases_of(plan, size)
        figures = dict(zip(plan.contenders, _loop.summarise([r[part] for r in per_rank], cases), strict=True))
        where = {"ranks": ranks, "size": size, "mode": mode}
        rows += [_row(figures, key, where) for key in plan.contenders]
    return rows


def _row(figures: dict[str, Figures], key: str, where: dict[str, Any]) -> dict[str, Any]:
    own, baseline = figures[key], figures.get(BASELINE)
    sooner = None if baseline is None else baseline.median / own.median
    return {
        **where,
        "contender": key,
        "label": BY_KEY[key].label,
        "rounds": own.rounds,
        "median_s": own.median,
        "p99_s": own.p99,
        "min_s": own.minimum,
        "cpu_s": own.cpu,
        "faults": own.faults,
        "sooner": sooner,
        "verified": own.verified,
    }


def shown(size: int) -> str:
    """A size for a person."""
    for unit, factor in reversed(UNITS.items()):
        if size >= factor and not size % factor:
            return f"{size // factor} {unit}{'iB' if unit else 'B'}"
    return f"{size} B"


def clock(seconds: float) -> str:
    """A time for a person: three digits in ms."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def table_of(rows: Iterable[dict[str, Any]], title: str) -> Table:
    """The rows of one number of ranks and one mode."""
    table = Table(title=title, title_justify="left")
    for name, justify in (("size", "right"), ("way", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("median ms", "p99 ms", "times sooner", "CPU ms"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row["size"]):
            table.add_section()
        sooner = "" if row["sooner"] is None else f"{row['sooner']:.3g}"
        size = "" if row["size"] == last else shown(row["size"])
        table.add_row(size, row["label"], clock(row["median_s"]), clock(row["p99_s"]), sooner, clock(row["cpu_s"]))
        last = row["size"]
    return table


def machine() -> dict[str, Any]:
    """What a reader of the figures has to know."""
    versions = {}
    for name in ("torch", "numpy", "posix_ipc", "shmcast"):
        with suppress(importlib.metadata.PackageNotFoundError):  # in use, and not installed
            versions[name] = importlib.metadata.version(name)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def run_of_today() -> dict[str, Any]:
    """When, how and where figures were measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine(),
    }


def report_of(plan: Plan, rows: list[dict[str, Any]], targets: list[dict[str, Any]]) -> dict[str, Any]:
    """All of it, for machines."""
    return {
        "version": VERSION,
        "measured": MEASURED,
        **run_of_today(),
        "plan": dataclasses.asdict(plan),
        "contenders": [{"key": c.key, "label": c.label, "stands_for": c.stands_for} for c in CONTENDERS],
        "results": rows,
        "targets": targets,
    }


def run(plan: Plan, console: Console) -> list[dict[str, Any]]:
    """Every number of ranks in turn; a table of each as soon as it is there."""
    rows = []
    for ranks in plan.ranks:
        with console.status(f"{ranks} ranks: starting") as status:

            def tell(text: str, ranks: int = ranks, status: Any = status) -> None:
                status.update(f"{ranks} ranks, {text}")

            new = rows_of(plan, ranks, run_ranks(ranks, measure_all, plan, settings=plan.settings, tell=tell))
        for mode, rounds in (("warm", plan.rounds), ("cold: first message of a new setup", plan.cold_rounds)):
            chosen = [row for row in new if mode.startswith(row["mode"])]
            if chosen:
                console.print(table_of(chosen, f"{ranks} ranks, {mode}, {rounds} rounds; until the last rank is ready"))
        rows += new
    return rows


@click.command(help=__doc__.partition("\n")[0])
@click.option("--sizes", default=DEFAULT_SIZES, show_default=True, help="Bytes of the tensor, with K, M or G.")
@click.option("--ranks", default="4", show_default=True, help="How many ranks; several after each other: 2,4,8.")
@click.option("--only", default="", help=f"Of these only: {','.join(BY_KEY)}.")
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="Warm messages of each.")
@click.option("--warmup", default=3, show_default=True, type=click.IntRange(0), help="Messages before them, not timed.")
@click.option("--warm/--no-warm", default=True, help="Messages after a warm-up.")
@click.option("--cold/--no-cold", default=True, help="The first message of a new setup, reported apart.")
@click.option("--cold-rounds", default=5, show_default=True, type=click.IntRange(1), help="New setups of each.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of torch in each rank.")
@click.option("--pin", is_flag=True, help="Keep each rank on one CPU.")
@click.option("--seed", default=1, show_default=True, help="What the bytes are made from.")
@click.option("--targets/--no-targets", default=False, help="Then measure what the library promises, passed or missed.")
@click.option("--json", "target", metavar="FILE", help="All figures as JSON; - is standard output.")
def main(
    sizes: str,
    ranks: str,
    only: str,
    rounds: int,
    warmup: int,
    warm: bool,
    cold: bool,
    cold_rounds: int,
    threads: int,
    pin: bool,
    seed: int,
    targets: bool,
    target: str | None,
) -> None:
    plan = Plan(
        parse_ranks(ranks),
        parse_sizes(sizes),
        parse_only(only),
        rounds if warm else 0,
        warmup,
        cold_rounds if cold else 0,
        seed,
        Settings(threads, pin),
    )
    console = Console(stderr=target == "-")
    if not console.is_terminal:
        console.width = WIDTH
    try:
        rows = run(plan, console)
        lines = bench_targets.run(plan.settings, rounds, console) if targets else []
    except RanksFailed as error:
        raise click.ClickException(str(error)) from None
    if target is not None:
        write(json.dumps(report_of(plan, rows, [dataclasses.asdict(line) for line in lines]), indent=1), target)


def write(text: str, target: str) -> None:
    """To a file, or to standard output for `-`."""
    if target == "-":
        click.echo(text)
    else:
        Path(target).write_text(text + "\n")


if __name__ == "__main__":
    main()
