"""What the ranks measured, as a table for a person and as one object for a machine."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shmcast.cli._rank import ENTRY, WAYS, Call, Memory, Report, Way

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shmcast.cli._inputs import Request

BASE: Final = "object_list"

_REASONS: Final = {
    "full": "there is no room for it; is --capacity, or /dev/shm, too small?",
    "disabled": "this group does without; is SHMCAST_DISABLE set, or /dev/shm too small?",
}


@dataclass(frozen=True)
class Row:
    """One way: medians over the rounds, the warm-up not counted. Seconds, bytes.

    `ready` is from the moment when the last rank began until the last rank had the inputs; `after_fn` what of it is
    left when the entry rank's `fn` has returned, None where every rank runs it; `cpu` the sum over all ranks; `others`
    the largest of the ranks that are not the entry rank; `sooner` how many times sooner than `broadcast_object_list`.
    """

    way: Way
    rounds: tuple[float, ...]
    ready: float
    fn: float
    after_fn: float | None
    cpu: float
    entry: Memory
    others: Memory
    sooner: float


@dataclass(frozen=True)
class Outcome:
    """The rows, and what else is to be said: whether all bytes were equal, and each way that fell back."""

    rows: tuple[Row, ...]
    equal: bool
    shared: int
    fallbacks: tuple[str, ...]


def outcome_of(reports: list[Report], expected: str) -> Outcome:
    """What came of the run; `expected` is the fingerprint of the inputs as `fn` makes them here."""
    by_way = {way.key: _row(way, reports) for way in WAYS}
    base = by_way[BASE].ready
    return Outcome(
        rows=tuple(_with_base(row, base) for row in by_way.values()),
        equal={call.fingerprint for report in reports for call in report.calls} == {expected},
        shared=reports[ENTRY].shared,
        fallbacks=tuple(_fallbacks(reports)),
    )


def _row(way: Way, reports: list[Report]) -> Row:
    calls = [[call for call in report.calls if call.way == way.key and call.whole is not None] for report in reports]
    rounds = [_Round.of(each) for each in zip(*calls, strict=True)]
    beyond = [each.after_fn for each in rounds if each.after_fn is not None]
    memory = [_memory(way, report) for report in reports]
    others = [each for rank, each in enumerate(memory) if rank != ENTRY]
    return Row(
        way,
        rounds=tuple(each.ready for each in rounds),
        ready=median(each.ready for each in rounds),
        fn=median(each.fn for each in rounds),
        after_fn=median(beyond) if beyond else None,
        cpu=median(each.cpu for each in rounds),
        entry=memory[ENTRY],
        others=Memory(max(each.raw for each in others), max(each.added for each in others)),
        sooner=1.0,
    )


class _Round(NamedTuple):
    """One way in one round, over all ranks."""

    ready: float
    fn: float
    after_fn: float | None
    cpu: float

    @classmethod
    def of(cls, calls: tuple[Call, ...]) -> _Round:
        wholes = [call.whole for call in calls if call.whole is not None]
        begun, ready = max(whole.start for whole in wholes), max(whole.end for whole in wholes)
        fn, entry = calls[ENTRY].fn, wholes[ENTRY]
        after_fn = None
        if fn is not None and any(call.fn is None for call in calls):
            # A rank that comes late, when fn is done, is not the transport's doing.
            after_fn = fn.start - entry.start + ready - max(fn.end, begun)
        return cls(ready - begun, fn.seconds if fn else 0.0, after_fn, sum(call.cpu for call in calls))


def _with_base(row: Row, base: float) -> Row:
    return Row(**{**vars(row), "sooner": base / row.ready})


def _memory(way: Way, report: Report) -> Memory:
    looks = [call.memory for call in report.calls if call.way == way.key and call.memory is not None]
    return looks[-1]


def _fallbacks(reports: list[Report]) -> Iterable[str]:
    """A sentence for each way whose messages did not all go through shared memory on every rank."""
    for way in WAYS:
        routes = {route for report in reports for route in report.routes.get(way.key, ())} - {"shm"}
        reasons = {reason for report in reports for reason in report.fallbacks.get(way.key, ())}
        if routes or reasons:
            took = f" (it went {' and '.join(sorted(routes))})" if routes else ""
            why = "; ".join(_REASONS.get(reason, reason) for reason in sorted(reasons))
            yield f"{way.title}, not always through shared memory{took}: {why or 'as the policy says'}"


def what_it_is(request: Request) -> str:
    """The request in one line: files, patches, size."""
    kinds = Counter(request.parts)
    files = ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in kinds.items())
    patches = f"{request.patches} patches, " if request.patches else ""
    return f"{files}: {patches}{_megabytes(request.nbytes)} MB"


def as_object(request: Request, outcome: Outcome, ranks: int) -> dict[str, Any]:
    """Everything, in plain types, for `--json`. Seconds and bytes."""
    return {
        "request": {
            "files": dict(Counter(request.parts)),
            "patches": request.patches,
            "bytes": request.nbytes,
            "processor": request.processor,
        },
        "refused": refused_as_objects(request.refused),
        "ranks": ranks,
        "processors": len(os.sched_getaffinity(0)),
        "equal": outcome.equal,
        "shared_bytes": outcome.shared,
        "fallbacks": list(outcome.fallbacks),
        "ways": [_row_as_object(row) for row in outcome.rows],
    }


def refused_as_objects(refused: Iterable[Any]) -> list[dict[str, str]]:
    """The files that were left out."""
    return [{"file": each.file, "reason": each.reason} for each in refused]


def _row_as_object(row: Row) -> dict[str, Any]:
    return {
        "way": row.way.key,
        "raw_everywhere": row.way.everywhere,
        "ready_seconds": row.ready,
        "ready_seconds_by_round": list(row.rounds),
        "fn_seconds": row.fn,
        "after_fn_seconds": row.after_fn,
        "cpu_seconds": row.cpu,
        "private_bytes": {"entry": row.entry._asdict(), "others": row.others._asdict()},
        "times_sooner_than_object_list": row.sooner,
    }


def as_table(request: Request, outcome: Outcome, ranks: int) -> RenderableType:
    """The table, what the request is, and how to read it."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(f"to {ranks} ranks by", no_wrap=True)
    for header in (
        "last rank\nready",
        "after fn",
        "CPU, all\nranks",
        "memory a rank:\nraw + received",
        "times\nsooner",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for row in outcome.rows:
        style = "bold" if row.way.key in ("bytes", "references") else ""
        table.add_row(
            row.way.title,
            _time(row.ready),
            "-" if row.after_fn is None else _time(row.after_fn),
            _time(row.cpu),
            f"{_megabytes(row.others.raw)} + {_megabytes(row.others.added)} MB",
            f"{row.sooner:.1f}x",
            style=style,
        )
    heading = Text(f"{what_it_is(request)} (through {request.processor})")
    return Group(heading, table, *_verdict(outcome), _legend(outcome, ranks))


def _verdict(outcome: Outcome) -> Iterable[RenderableType]:
    if outcome.equal:
        yield Text("Every rank had equal bytes and hashes after every call.\n", style="green")
    else:
        yield Text("NOT EVERY RANK HAD EQUAL BYTES: do not trust these numbers.\n", style="bold red")
    for sentence in outcome.fallbacks:
        yield Text(f"{sentence}\n", style="yellow")


def _legend(outcome: Outcome, ranks: int) -> RenderableType:
    rows = {row.way.key: row for row in outcome.rows}
    base, copied, referred = rows[BASE], rows["bytes"], rows["references"]
    processors = len(os.sched_getaffinity(0))
    legend = Table.grid(padding=(0, 2, 0, 0))
    legend.add_column(no_wrap=True)
    legend.add_column()
    for line in (
        (
            "last rank ready",
            f"from when all {ranks} ranks stand ready until the last one has the inputs; the ways in turn, median of "
            f"{len(base.rounds)}, processors: {processors}",
        ),
        (
            "after fn",
            f"the part of it after fn on the entry rank (MultimodalInputs.from_dict, {_time(base.fn)}, nearly all of "
            f"it SHA-256): shmcast is {_compared(base, copied)} sooner with bytes, {_compared(base, referred)} with "
            "references",
        ),
        (
            "memory a rank",
            "private memory of a rank other than the entry rank: raw inputs that must be there before (where 0, only "
            f"the entry rank has them), and what receiving adds; {_megabytes(outcome.shared)} MB of shared memory hold "
            "the bytes once for all",
        ),
        (
            "broadcast_object_list",
            "gets each picture as a tensor of its own; views of one tensor, as engines cut them and as shmcast gets "
            "them, it would send as the whole tensor each",
        ),
    ):
        legend.add_row(*line, style="dim")
    return legend


def _compared(base: Row, row: Row) -> str:
    if not base.after_fn or not row.after_fn:
        return "much"
    return f"{base.after_fn / row.after_fn:.0f}x"


def _time(seconds: float) -> str:
    milliseconds = seconds * 1e3
    if milliseconds >= 10_000:
        return f"{seconds:.1f} s"
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def _megabytes(size: float) -> str:
    megabytes = size / 1e6
    return "0" if abs(megabytes) < 0.05 else f"{megabytes:.1f}" if abs(megabytes) < 100 else f"{megabytes:.0f}"
