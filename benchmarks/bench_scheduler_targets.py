"""What the library promises to a scheduler, measured: one line each, passed or missed, with the figure.

    python benchmarks/bench_scheduler_targets.py
    python benchmarks/bench_scheduler_targets.py --only stalls,header

All are ratios within one run, loads and contenders taking turns.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch
import torch.distributed as dist
from rich.console import Console

from benchmarks import _load, _shmcast_ways
from benchmarks._load import Load, Plan
from benchmarks._ranks import Place, RanksFailed, Settings, run_ranks
from benchmarks.baselines import BASELINE, BASELINES
from benchmarks.bench_broadcast import shown
from benchmarks.bench_targets import MIB, Line
from shmcast import Broadcaster, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks._load import Figures

    Found = Mapping[tuple[str, str], Figures]  # by contender and mode

KIB = 1 << 10
RANKS = 4
WAIT = 0.5
BATCHES = (1, 5, 10, 20, 50)
SIZES = tuple(4 * KIB << shift for shift in range(0, 15, 2))
TICK, GPU = 1e-3, 5e-3
TEXT_TO_ONE = 49
MOST = 2048  # requests of one part
HEADERS = 300
BLOCKED = 2e-3
CONTROLS = ("ring", "group")
PATIENCE = 10.0
WAYS = {way.key: way for way in (*BASELINES, *_shmcast_ways.contenders("auto", "ring"))}


def run(settings: Settings, console: Console, only: Sequence[str] = ()) -> list[Line]:
    """All lines, or those of the targets named, each printed as soon as it is there."""
    lines = []
    for name in only or TARGETS:
        with console.status(f"targets: {name}") as status:

            def tell(text: str, name: str = name, status: Any = status) -> None:
                status.update(f"targets: {name}, {text}")

            try:
                found = TARGETS[name](settings, tell)
            except RanksFailed as error:
                found = [Line(name, f"failed: {str(error).strip().splitlines()[-1]}", False)]
        for line in found:
            verdict = "[green]passed[/]" if line.passed else "[red]missed[/]"
            console.print(f"{verdict}  {line.target}: [bold]{line.measured}[/]", highlight=False, soft_wrap=True)
        lines += found
    return lines


def measure(
    settings: Settings, tell: Callable[[str], None], loads: Sequence[Load], keys: Sequence[str], **plan: Any
) -> list[Found]:
    """The figures of each load."""
    whole = Plan(plan.pop("ranks", RANKS), tuple(loads), settings=settings, cold=False, **plan)
    ways = tuple(WAYS[key] for key in keys)
    found = _load.summarise(run_ranks(whole.ranks, _load.run_plan, whole, ways, settings=settings, tell=tell), loads)
    for (_, key, _), each in found.items():
        if each.counts.get("fallbacks"):
            click.echo(f"{key} fell back: {each.counts['fallbacks']}", err=True)
    return [{case[1:]: each for case, each in found.items() if case[0] == index} for index in range(len(loads))]


# The table from practice.


def practice(settings: Settings, tell: Callable[[str], None]) -> list[Line]:
    """10 requests of half a second, and other batches."""

    def load(count: int) -> Load:
        return Load(MIB, count, batch=count, cost_wait=WAIT, waits=True, requests=count)

    several = ("async", "spread")
    found = measure(settings, tell, [load(n) for n in BATCHES], several, **ONCE)
    (others,) = measure(settings, tell, [load(10)], (BASELINE, "object"), **ONCE)
    return judge_practice(dict(zip(BATCHES, found, strict=True)), others)


ONCE: dict[str, Any] = {"rounds": 1, "warmup": False}


def judge_practice(found: Mapping[int, Found], others: Found) -> list[Line]:
    """The lines from the figures of each batch, and those of the others in batches of 10."""
    lines = []
    for count, each in found.items():
        floor, whole = -(-count // RANKS) * WAIT, count * WAIT
        spread, entry = each["spread", "warm"], each["async", "warm"]
        took, entry_took = count / spread.rate, count / entry.rate
        said = f"{took:.2f} s, {spread.runs:.2f} runs a request"
        if count == 10:
            alone, objects = (count / others[key, "warm"].rate for key in (BASELINE, "object"))
            said += f" (every rank alone {alone:.1f} s, broadcast_object_list a request {objects:.1f} s)"
        bound = floor * 1.6 / 1.5
        lines += [
            Line(
                f"{count} requests of {WAIT:g} s, {RANKS} ranks, spread: under {bound:.2f} s, done once",
                said,
                took < bound and spread.runs == 1,
            ),
            Line(
                f"{count} requests of {WAIT:g} s, {RANKS} ranks, the entry rank alone: under {whole * 1.02:.2f} s",
                f"{entry_took:.2f} s, {entry.runs:.2f} runs a request",
                entry_took < whole * 1.02 and entry.runs == 1,
            ),
        ]
    return lines


# Throughput.


def cpu_bound(settings: Settings, tell: Callable[[str], None]) -> list[Line]:
    """Hashing 16 MiB a request."""
    load = Load(16 * MIB, 8, batch=4, waits=True, requests=32)
    (found,) = measure(settings, tell, [load], (BASELINE, "spread"))
    return judge_cpu_bound(found)


def judge_cpu_bound(found: Found) -> list[Line]:
    alone, spread = found[BASELINE, "warm"], found["spread", "warm"]
    times, cpu = spread.rate / alone.rate, spread.cpu_each / alone.cpu_each
    return [
        Line(
            "hashing 16 MiB a request, spread: at least 3 times the requests/s of every rank alone",
            f"{times:.2f} times ({spread.rate:.1f} to {alone.rate:.1f})",
            times >= 3,
        ),
        Line(
            "hashing 16 MiB a request, spread: at most 30 % of the CPU time",
            f"{cpu:.0%} ({spread.cpu_each * 1e3:.1f} to {alone.cpu_each * 1e3:.1f} ms a request)",
            cpu <= 0.3,
        ),
    ]


def auto(settings: Settings, tell: Callable[[str], None]) -> list[Line]:
    """Every size, with and without the hash."""
    lines = []
    for hashed, least in ((False, 0.9), (True, 0.8)):
        loads = [
            Load(size, 16, batch=8, hashed=hashed, waits=True, requests=MOST if hashed else _many(size))
            for size in SIZES
        ]
        found = measure(settings, tell, loads, (BASELINE, "async", "spread"), rounds=5)
        lines += judge_auto(dict(zip(SIZES, found, strict=True)), hashed=hashed, least=least)
    return lines


def _many(size: int) -> int:
    """So many requests that hashing them takes a while; whole batches."""
    return min(MOST, max(32, 512 * MIB // size))


def judge_auto(found: Mapping[int, Found], *, hashed: bool, least: float) -> list[Line]:
    lines = []
    for size, each in found.items():
        alone = each[BASELINE, "warm"].rate
        ratios = {key: each[key, "warm"].rate / alone for key in ("async", "spread")}
        what = "the hash is there, batches of 8" if hashed else "hashing"
        lines.append(
            Line(
                f"{shown(size)}, {what}: auto at least {least} of the requests/s of every rank alone",
                ", ".join(f"{key} {ratio:.2f}" for key, ratio in ratios.items()) + f" of {alone:.0f}",
                min(ratios.values()) >= least,
            )
        )
    return lines


# What the scheduler's thread feels.


def stalls(settings: Settings, tell: Callable[[str], None]) -> list[Line]:
    """100 at once, 2 MiB each: throughput, latency, stalls, the GIL."""
    load = Load(2 * MIB, 100, batch=100, tick=TICK, gpu=GPU, requests=300)
    (found,) = measure(settings, tell, [load], ("object", "async", "spread"), quiet=True)
    return judge_stalls(found)


def judge_stalls(found: Found) -> list[Line]:
    lines = []
    objects = found["object", "warm"]
    for key in ("async", "spread"):
        own, quiet = found[key, "warm"], found[key, "quiet"]
        times = own.rate / objects.rate
        if own.p99 is None or objects.p99 is None:
            raise ValueError("nothing was taken")
        lines += [
            Line(
                f"100 at once, 2 MiB, {key}: at least 8 times the requests/s of broadcast_object_list a request",
                f"{times:.1f} times ({own.rate:.0f} to {objects.rate:.0f})",
                times >= 8,
            ),
            Line(
                f"100 at once, 2 MiB, {key}: at most one eighth of its p99",
                f"1/{objects.p99 / own.p99:.1f} ({own.p99 * 1e3:.0f} to {objects.p99 * 1e3:.0f} ms)",
                own.p99 <= objects.p99 / 8,
            ),
            Line(
                f"the same, {key}: p99 of the stalls at most 1.5 times that where others burn the CPU time",
                f"{own.stall_p99 / quiet.stall_p99:.2f} times ({own.stall_p99 * 1e3:.2f} to "
                f"{quiet.stall_p99 * 1e3:.2f} ms; longest {own.stall_max * 1e3:.1f} to {quiet.stall_max * 1e3:.1f} ms)",
                own.stall_p99 <= 1.5 * quiet.stall_p99,
            ),
            Line(
                f"the same, {key}: p99 of the stalls at most a tenth of that of broadcast_object_list",
                f"1/{objects.stall_p99 / own.stall_p99:.0f} ({objects.stall_p99 * 1e3:.0f} ms)",
                own.stall_p99 <= objects.stall_p99 / 10,
            ),
            Line(f"the same, {key}: under 20 % of the time without the GIL", f"{own.no_gil:.1%}", own.no_gil < 0.2),
        ]
    return lines


def admission(settings: Settings, tell: Callable[[str], None]) -> list[Line]:
    """One request of 90 MiB a second among text-only ones."""
    mixed = Load(90 * MIB, rate=TEXT_TO_ONE + 1.0, text=TEXT_TO_ONE, tick=TICK, gpu=GPU, requests=500)
    silent = Load(90 * MIB, rate=TEXT_TO_ONE + 1.0, text=TEXT_TO_ONE, tick=TICK, gpu=GPU, requests=500, silent=True)
    return judge_admission(*measure(settings, tell, [mixed, silent], ("admission",), ranks=2))


def judge_admission(mixed: Found, silent: Found) -> list[Line]:
    with_, without = mixed["admission", "warm"].text_p99, silent["admission", "warm"].text_p99
    if with_ is None or without is None:
        raise ValueError("no text-only request was taken")
    return [
        Line(
            "admission, 2 ranks, 90 MiB requests among text-only ones: p99 of these at most 1.2 times that without",
            f"{with_ / without:.2f} times ({with_ * 1e3:.2f} to {without * 1e3:.2f} ms), "
            "each admitted on the same tick by all ranks",
            with_ <= 1.2 * without,
        )
    ]


# Headers.


class Instants(NamedTuple):
    """Of one message, in ns: the entry rank posts its header (elsewhere: it is there), and the object is there."""

    header: int
    ready: int


def header(settings: Settings, tell: Callable[[str], None]) -> list[Line]:
    """4 KiB to 3 readers that wait for it, through each control plane."""
    tell(f"{HEADERS} of each")
    return judge_header(run_ranks(RANKS, _headers, HEADERS, settings=settings))


def judge_header(per_rank: Sequence[Mapping[str, Sequence[Instants]]]) -> list[Line]:
    """From the instants of all ranks by control plane, the entry rank's first."""

    def took(control: str, field: int) -> float:
        rounds = zip(*(each[control] for each in per_rank), strict=True)
        return float(statistics.median(max(r[field] for r in others) - posted.header for posted, *others in rounds))

    ring, group = (took(control, 0) for control in CONTROLS)
    ready = [took(control, 1) / 1e3 for control in CONTROLS]
    return [
        Line(
            "header of 4 KiB to 3 blocked readers, the ring: at most a quarter of the time through the group",
            f"{ring / group:.2f} ({ring / 1e3:.0f} to {group / 1e3:.0f} µs until the last reader has the header, "
            f"{ready[0]:.0f} to {ready[1]:.0f} µs until it has opened the object)",
            ring <= group / 4,
        )
    ]


def _headers(place: Place, count: int) -> dict[str, list[Instants]]:
    payload = torch.arange(4 * KIB // 8)
    policy = Policy(peers_hold_raw=False, wait=PATIENCE)
    instants: dict[str, list[Instants]] = {control: [] for control in CONTROLS}
    ends = {control: Broadcaster(control=control, policy=policy) for control in CONTROLS}
    headers = {control: _watch(end, leads=place.leads) for control, end in ends.items()}
    for number in range(-10, count):
        for control, end in ends.items():
            payload[0] = number
            dist.barrier()
            if place.leads:
                time.sleep(BLOCKED)  # until the others wait
            got = end.broadcast(payload if place.leads else None)
            ready = time.monotonic_ns()
            if got is None or int(got[0]) != number or len(got) != len(payload):
                raise RuntimeError(f"something else came through the {control}")
            if number >= 0:
                instants[control].append(Instants(headers[control][-1], ready))
    for end in ends.values():
        end.close()
    return instants


def _watch(end: Broadcaster, *, leads: bool) -> list[int]:
    """The instants, in ns, before each of its headers is posted or after it has come; they grow with every message."""
    control: Any = end._control
    instants: list[int] = []
    send, receive = control.send, control.receive

    def sending(header: object) -> None:
        instants.append(time.monotonic_ns())
        send(header)

    def receiving() -> object:
        header = receive()
        instants.append(time.monotonic_ns())
        return header

    if leads:
        control.send = sending
    else:
        control.receive = receiving
    return instants


TARGETS: dict[str, Callable[[Settings, Callable[[str], None]], list[Line]]] = {
    "practice": practice,
    "cpu-bound": cpu_bound,
    "auto": auto,
    "stalls": stalls,
    "admission": admission,
    "header": header,
}


def parse_only(text: str) -> tuple[str, ...]:
    """Names of targets; empty means all."""
    names = tuple(part.strip() for part in text.split(",")) if text else tuple(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(TARGETS)}")
    return names


@click.command(help=__doc__.partition("\n")[0])
@click.option("--only", default="", help=f"Of these only: {','.join(TARGETS)}.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of torch in each rank.")
@click.option("--pin", is_flag=True, help="Keep each rank on one CPU.")
def main(only: str, threads: int, pin: bool) -> None:
    began = time.monotonic()
    console = Console()
    lines = run(Settings(threads, pin), console, parse_only(only))
    console.print(f"{sum(line.passed for line in lines)} of {len(lines)} passed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
