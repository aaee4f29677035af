"""`shmcast doctor`: whether this machine has what the library needs, a line for each thing, and what to do."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections import Counter
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from shmcast.cli import _checks, _probes

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import RenderableType

    from shmcast.cli._checks import Line

CHECKS: Final[dict[str, Callable[[], Line]]] = {
    "/dev/shm": _checks.shared_memory,
    "default Writer": _checks.writer,
    "memory cgroup": _checks.memory_limit,
    "SHMCAST_*": _checks.environment,
    "RLIMIT_NOFILE": _checks.open_files,
    "RLIMIT_AS": _checks.address_space,
    "RLIMIT_MEMLOCK": _checks.locked_memory,
    "huge pages": _checks.huge_pages,
    "posix_fallocate": _probes.fallocate,
    "MADV_POPULATE_READ": _probes.populate_read,
    "MADV_POPULATE_WRITE": _probes.populate_write,
    "private pages": _probes.private_pages,
    "OFD locks": _probes.locks,
    "pidfd_open": _probes.pidfd,
    "semaphores": _probes.semaphores,
    "RemoveIPC": _checks.remove_ipc,
    "posix_ipc": partial(_checks.package, "posix_ipc", below=2),
    "numpy": partial(_checks.package, "numpy"),
    "torch": partial(_checks.package, "torch"),
    "leftovers": _checks.leftovers,
}
_STYLES: Final = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@click.command()
@click.option("--ranks", type=click.IntRange(1, 64), help="Start so many processes, and see whether each can map.")
@click.option("--queue", type=click.IntRange(1), help="See whether so many requests that wait with their inputs fit.")
@click.option(
    "--request-mib",
    type=click.FloatRange(0, min_open=True),
    default=90.0,
    show_default=True,
    help="Of one, for --queue.",
)
@click.option("--json", "as_json", is_flag=True, help="One object on standard output, nothing else there.")
def doctor(ranks: int | None, queue: int | None, request_mib: float, as_json: bool) -> None:
    """Look at what shmcast needs of this machine: /dev/shm, limits, the kernel, packages, leftovers.

    Everything is tried on a scratch segment that is removed again. Run it where the ranks run: in their container, as
    their user, with their limits. Needs neither torch nor numpy.

    Exit status: 0 if nothing fails, whatever the warnings; 1 if anything does.
    """
    checks = dict(CHECKS)
    if ranks is not None:
        checks["ranks"] = partial(_probes.ranks, ranks)
    if queue is not None:
        checks["queue"] = partial(_checks.queue, queue, int(request_mib * (1 << 20)))
    lines = _checks.run(checks)
    if as_json:
        click.echo(json.dumps(as_object(lines)))
    else:
        from rich.console import Console

        Console(highlight=False).print(as_table(lines))
    if _worst(lines) == "fail":
        raise click.exceptions.Exit(1)


def as_object(lines: dict[str, Line]) -> dict[str, Any]:
    """Everything, in plain types, for `--json`."""
    return {
        "shmcast": importlib.metadata.version("shmcast"),
        "kernel": platform.release(),
        "status": _worst(lines),
        "checks": [{"check": name, **asdict(line)} for name, line in lines.items()],
    }


def as_table(lines: dict[str, Line]) -> RenderableType:
    """Everything, for a person."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, line in lines.items():
        story = Text(f"{line.found}\n").append(line.means, style="dim")
        if line.todo:
            story.append(f"\ndo: {line.todo}", style="" if line.status == "ok" else _STYLES[line.status])
        table.add_row(Text(line.status, style=_STYLES[line.status]), name, story)
    count = Counter(line.status for line in lines.values())
    end = Text(f"{count['ok']} ok, {count['warn']} to look at, {count['fail']} failed", style=_STYLES[_worst(lines)])
    return Group(table, end)


def _worst(lines: dict[str, Line]) -> str:
    return max((line.status for line in lines.values()), key=list(_STYLES).index)
