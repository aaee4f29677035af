"""`shmcast top`: who shares memory on this machine, and who holds it. Needs neither torch nor numpy."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from shmcast.cli import _groups

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Group, RenderableType
    from rich.table import Table

    from shmcast.cli._groups import GroupSeen, ReaderSeen, SegmentSeen, Sight
    from shmcast.cli._processes import Process

SCHEMA: Final = 1
MIB: Final = 1 << 20


@click.command()
@click.option("--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Draw one table and end; also where the output is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output, nothing else there.")
def top(interval: float, once: bool, as_json: bool) -> None:
    """The live groups of this user: processes, segments, leases and who holds them, fallbacks.

    It attaches to no process and disturbs none. Ctrl-C ends it.
    """
    if as_json:
        click.echo(json.dumps({"schema": SCHEMA, **asdict(_groups.look())}, indent=2))
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if once or not sys.stdout.isatty():
        console.print(draw(_groups.look()))
        return
    with suppress(KeyboardInterrupt), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(draw(_groups.look(), time.strftime("%H:%M:%S")), refresh=True)
            time.sleep(interval)


def draw(sight: Sight, now: str = "") -> Group:
    """What `look` found, for a person."""
    from rich.console import Group
    from rich.text import Text

    segments = [segment for group in sight.groups for segment in group.segments]
    pids = {pid for segment in segments for pid in segment.pids}
    resident = _size(sum(segment.resident for segment in segments))
    head = f"{_count(len(sight.groups), 'group')}, {_count(len(pids), 'process', 'es')}, {resident} resident"
    lines = [Text(f"shmcast top  {now}  {head}" if now else head, style="bold", no_wrap=True)]
    if not sight.groups:
        lines.append(Text("No process of this user has a segment open."))
    notes = []
    if sight.orphans:
        names = ", ".join(sight.orphans[:3]) + (", ..." if len(sight.orphans) > 3 else "")
        notes.append(Text(f"{_count(len(sight.orphans), 'name')} in /dev/shm that nobody has open: {names}"))
    if sight.hidden:
        notes.append(Text(f"not allowed to look at {_count(len(sight.hidden), 'process', 'es')} of this user"))
    return Group(*lines, *(part for group in sight.groups for part in _draw_group(group)), *notes)


def _draw_group(group: GroupSeen) -> tuple[RenderableType, ...]:
    from rich.text import Text

    title = Text("\n").append(f"{group.token[:8]} rank {group.rank}", style="bold")
    title.append(f" · {_count(len(group.readers), 'reader')}")
    if group.board_age is not None or group.age is not None:
        title.append(f" · {_count(group.messages or 0, 'message')}, {_size(group.bytes or 0)} sent")
        title.append(f" · up {_time(group.age)} · told {_time(group.board_age)} ago")
    trouble = (Text(group.trouble, style="red"),) if group.trouble else ()
    return title, Text(_memory(group)), *trouble, _table(group)


def _table(group: GroupSeen) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("end", "pid", "state", "leases", "opened", "oldest"):
        table.add_column(name, justify="left" if name in ("end", "state") else "right", no_wrap=True)
    table.add_column("fallbacks")
    table.add_column("command")
    rows = [("writer", group.process, group.pid_hint, group.state, "", "", "", group.fallbacks)]
    rows += [
        (
            f"reader {r.index}",
            r.process,
            r.pid_hint,
            r.state,
            _number(r.held),
            _number(r.opened),
            _oldest(r),
            r.fallbacks,
        )
        for r in group.readers
    ]
    for end, process, hint, state, held, opened, oldest, fallbacks in rows:
        texts = end, _pid(process, hint), state, held, opened, oldest, _reasons(fallbacks)
        style = {"dead": "red", "gone": "dim", "absent": "dim", "closed": "dim", "stopped": "yellow"}.get(state, "")
        # As Text: in plain strings rich would find its own markup, and processes call themselves what they like.
        # Cut there, so that no other column is.
        command = Text(process.command if process else "", no_wrap=True, overflow="ellipsis")
        table.add_row(*(Text(text) for text in texts), command, style=style)
    return table


def _memory(group: GroupSeen) -> str:
    arena = [segment for segment in group.segments if segment.number is not None]
    parts = [f"{_count(len(arena), 'segment')}{_names(group.segments)}, {_size(sum(each.bytes for each in arena))}"]
    if group.capacity is not None and group.free_bytes is not None and group.largest_free_block is not None:
        parts[0] += f" of at most {_size(group.capacity)}"
        parts.append(f"{_count(group.live_blocks or 0, 'block')}, {_size(group.free_bytes)} free")
        parts.append(f"largest hole {_size(group.largest_free_block)}")
    return " · ".join(parts)


def _names(segments: tuple[SegmentSeen, ...]) -> str:
    named = sum(segment.named for segment in segments)
    return f" ({named} named)" if named else ""


def _pid(process: Process | None, hint: int) -> str:
    return str(process.pid) if process else f"({hint})" if hint else ""


def _reasons(fallbacks: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in fallbacks.items())


def _oldest(reader: ReaderSeen) -> str:
    if reader.oldest is None:
        return ""
    return _time(reader.oldest) if reader.settled else f"<= {_time(reader.oldest)}"


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _count(n: int, noun: str, plural: str = "s") -> str:
    return f"{n} {noun}{plural if n != 1 else ''}"


def _size(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB" if nbytes < 10 * 1024 * MIB else f"{nbytes / 1024 / MIB:.1f} GiB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
