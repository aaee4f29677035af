"""`shmcast bench`: the load benchmark, where its source is, and a value for `Policy.local_below` on this machine."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from shmcast.cli._local_below import Cost

_ROOT: Final = Path(__file__).resolve().parents[2]
_BENCHMARK: Final = Path("benchmarks", "bench_scheduler.py")


@click.group()
def bench() -> None:
    """Measure on this machine."""


@bench.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def scheduler(arguments: tuple[str, ...]) -> None:
    """A scheduler's loop on each rank, under load, in every way; needs a source checkout. --help lists the options."""
    if not (_ROOT / _BENCHMARK).is_file():
        raise click.ClickException(
            f"the load benchmark comes with the source, not with the installed package: there is no {_BENCHMARK} "
            "beside it. In a checkout of shmcast run `make setup`, then `.venv/bin/shmcast bench scheduler`."
        )
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
    module = importlib.import_module(".".join(_BENCHMARK.with_suffix("").parts))
    module.main.main(list(arguments), prog_name="shmcast bench scheduler")


@bench.command("local-below")
@click.option("--ranks", type=click.IntRange(2, 64), default=4, show_default=True, help="How many processes.")
@click.option("--batch", type=click.IntRange(1, 64), default=1, show_default=True, help="Requests in a batch.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=10, show_default=True, help="Of all sizes.")
@click.option("--largest", type=click.IntRange(4, 1024), default=16, show_default=True, help="MiB of a batch, at most.")
@click.option("--digest", type=click.Choice(["sha256", "blake3"]), default="sha256", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One object on standard output, nothing else there.")
def local_below(ranks: int, batch: int, rounds: int, largest: int, digest: str, as_json: bool) -> None:
    """Where running fn on every rank stops being cheaper than an exchange: a value for Policy.local_below.

    Cheaper is what takes less CPU time over all ranks, fn being MultimodalInputs.from_dict, which hashes.
    """
    from rich.console import Console

    from shmcast.cli import _local_below

    with Console(stderr=True).status(f"{ranks} ranks measure"):
        try:
            costs = _local_below.measure(_local_below.Plan(ranks, batch, rounds, largest << 20, digest))
        except _local_below.RunFailed as error:
            raise click.ClickException(str(error)) from None
    value = _local_below.propose(costs)
    if as_json:
        found = {"local_below": value, "ranks": ranks, "batch": batch, "digest": digest}
        click.echo(json.dumps({**found, "costs": [cost._asdict() for cost in costs]}))
        return
    Console(highlight=False).print(_local_below.as_table(costs))
    click.echo(_say(value, costs, ranks))


def _say(value: int, costs: list[Cost], ranks: int) -> str:
    if not value:
        return f"With {ranks} ranks an exchange is cheaper at every size: Policy(local_below=0)"
    if value > costs[-1].size:
        return (
            f"With {ranks} ranks an exchange is dearer at every size up to {costs[-1].size} bytes: "
            f"Policy(local_below={value}), or more; --largest measures further"
        )
    return f"With {ranks} ranks an exchange is cheaper from about {value} bytes on: Policy(local_below={value})"
