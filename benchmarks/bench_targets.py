"""What the library promises, measured: one line each, passed or missed, with the figure.

    python benchmarks/bench_targets.py

The times are ratios within one run, contenders and sizes taking turns, on 4 ranks.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import torch.distributed as dist
from rich.console import Console

from benchmarks import _loop
from benchmarks._contenders import BASELINE, BY_KEY
from benchmarks._loop import Case, Figures, Sample
from benchmarks._ranks import Place, RanksFailed, Settings, run_ranks
from shmcast import Broadcaster, Modality, MultimodalDataItem, MultimodalInputs, Policy
from shmcast._codec import Allow, Leaves, encode
from shmcast._layout import plan_message
from shmcast._wire import HEADER

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1 << 20
RANKS = 4
MANY_RANKS = 8
IMPORTS = 5
MESSAGES = 1000
WARM_MESSAGES = 100
MESSAGE_BYTES = 4 * MIB
ARENA_BYTES = 64 * MIB
HELD = 4  # messages that a reader still holds when it takes the next
PATIENCE = 10.0
WIDTH = 1176  # of one row of pixel values: 3 x 2 x 14 x 14


@dataclasses.dataclass(frozen=True)
class Line:
    """One promise: what it says, what was measured, and whether that keeps it."""

    target: str
    measured: str
    passed: bool


CASES = (
    *(Case(BY_KEY[key], 64 * MIB) for key in ("copied", "empty", BASELINE, "plain-copy")),
    Case(BY_KEY["empty"], 1 * MIB),
    Case(BY_KEY["empty"], 200 * MIB),
)


def run(settings: Settings, rounds: int, console: Console) -> list[Line]:
    """All lines, each printed as soon as it is there."""
    lines = []
    measures: tuple[tuple[str, Callable[[], list[Line]]], ...] = (
        ("times", lambda: times(settings, rounds)),
        ("a request whose leaves all ranks hold", lambda: references(settings)),
        ("private memory", lambda: memory(settings)),
        ("a thousand messages", lambda: thousand(settings)),
        ("imports", imports),
    )
    for name, measure in measures:
        with console.status(f"targets: {name}"):
            found = measure()
        for line in found:
            verdict = "[green]passed[/]" if line.passed else "[red]missed[/]"
            console.print(f"{verdict}  {line.target}: [bold]{line.measured}[/]", highlight=False)
        lines += found
    return lines


# Times.


def times(settings: Settings, rounds: int) -> list[Line]:
    per_rank = run_ranks(RANKS, _times, rounds, settings=settings)
    found = _loop.summarise(per_rank, CASES)
    return judge_times(dict(zip([(case.contender.key, case.size // MIB) for case in CASES], found, strict=True)))


def judge_times(found: dict[tuple[str, int], Figures]) -> list[Line]:
    """The lines from the figures by contender and MiB."""
    copied, empty = found["copied", 64].median, found["empty", 64].median
    objects, plain = found[BASELINE, 64].median, found["plain-copy", 64].median
    small, large = found["empty", 1].median, found["empty", 200].median
    least = {case: figures.minimum * 1e3 for case, figures in found.items()}
    bound = 2.5 * plain + 1e-3
    return [
        Line(
            "64 MiB copied once, at least 50 times sooner than broadcast_object_list",
            f"{objects / copied:.0f} times ({copied * 1e3:.2f} ms to {objects * 1e3:.0f} ms; "
            f"at best {least['copied', 64]:.2f} to {least[BASELINE, 64]:.0f})",
            objects >= 50 * copied,
        ),
        Line(
            "64 MiB copied once, within 2.5 plain copies and 1 ms",
            f"{copied * 1e3:.2f} ms, bound {bound * 1e3:.2f} ms (plain copy {plain * 1e3:.2f} ms; "
            f"at best {least['copied', 64]:.2f} and {least['plain-copy', 64]:.2f})",
            copied <= bound,
        ),
        Line(
            "64 MiB from empty(), at least 250 times sooner than broadcast_object_list",
            f"{objects / empty:.0f} times ({empty * 1e3:.3f} ms; at best {least['empty', 64]:.3f})",
            objects >= 250 * empty,
        ),
        Line(
            "from empty(), 200 MiB take at most 1.25 times as long as 1 MiB",
            f"{large / small:.2f} times ({large * 1e3:.3f} ms to {small * 1e3:.3f} ms; "
            f"at best {least['empty', 200]:.3f} to {least['empty', 1]:.3f})",
            large <= 1.25 * small,
        ),
    ]


def _times(place: Place, rounds: int) -> list[Sample]:
    return _loop.run_warm(place, CASES, rounds, 3, 1)


# References.


def request(seed: int = 1) -> dict[str, Any]:
    """95 MiB as Qwen2-VL and Qwen-Omni make it: two pictures cut from one parent, a video, 30 s of sound."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.tensor([(1, 80, 80), (1, 50, 34)])
    rows = [int(grid.prod()) for grid in grids]
    parent = torch.randn(sum(rows), WIDTH, generator=generator)
    video = torch.randn(8 * 40 * 40, WIDTH, generator=generator)
    sound = torch.randn(1, 128, 3000, generator=generator)
    items, at = [], 0

    def add(modality: Modality, tokens: int, feature: torch.Tensor, **extras: torch.Tensor) -> None:
        nonlocal at
        at += 3  # of text
        offsets = [(at, at + tokens - 1)]
        items.append(MultimodalDataItem(modality, offsets=offsets, feature=feature, model_specific_data=dict(extras)))
        at += tokens

    low = 0
    for index, count in enumerate(rows):
        add(Modality.IMAGE, count // 4, parent[low : low + count], image_grid_thw=grids[index : index + 1])
        low += count
    grid, seconds = torch.tensor([(8, 40, 40)]), torch.tensor([1.0])
    add(Modality.VIDEO, len(video) // 4, video, video_grid_thw=grid, second_per_grid_ts=seconds)
    lens, mask = torch.tensor([3000]), torch.ones(1, 3000, dtype=torch.int32)
    add(Modality.AUDIO, 750, sound, audio_feature_lens=lens, feature_attention_mask=mask)
    ids = {"im_start_id": 151652, "im_end_id": 151653, "im_token_id": 151655, "video_token_id": 151656}
    ids |= {"audio_start_id": 151647, "audio_end_id": 151648, "audio_token_id": 151646}
    positions = torch.arange(at).expand(3, -1).contiguous()
    return {"mm_items": items, **ids, "mrope_positions": positions, "mrope_position_delta": torch.tensor([[0]])}


def references(settings: Settings, ranks: int = RANKS) -> list[Line]:
    found = run_ranks(ranks, _references, settings=settings)
    published, copied = found[0][0], max(bytes_ for _, bytes_, _ in found)
    size = found[0][2]
    return [
        Line(
            f"a request of {size / MIB:.0f} MiB whose leaves all ranks hold: under 2 KiB published, no payload copied",
            f"{published} bytes with header and block, {copied} bytes of payload",
            published < 2048 and copied == 0,
        )
    ]


def _references(place: Place) -> tuple[int, int, int]:
    """Bytes that were published, bytes of payload that travelled, bytes of features."""
    raw = request()
    with Broadcaster() as broadcaster:
        got: MultimodalInputs = broadcaster.materialize(raw)
        stats = broadcaster.stats()
        if set(stats.routes) != {"shm"} or stats.fallbacks:
            raise RuntimeError(f"not by shared memory: {dict(stats.routes)}, fallbacks {dict(stats.fallbacks)}")
        for item, own in zip(got.mm_items, raw["mm_items"], strict=True):
            if item.feature is not own.feature or item.hash is None:
                raise RuntimeError("a feature is not the one that this rank holds")
        dist.barrier()
    stream = encode(got, Allow(), Leaves.walk(raw)).stream
    size = sum(own.feature.nbytes for own in raw["mm_items"])
    return plan_message(len(stream), 0, []).length + HEADER.size, stats.bytes, size


# Memory.


def memory(settings: Settings) -> list[Line]:
    found = run_ranks(MANY_RANKS, _memory, settings=settings)
    grown = max(private for private, _, _ in found[1:])
    mapped, arena = sum(mapped for _, mapped, _ in found), found[0][2]
    size = 64 * MIB
    return [
        Line(
            "a reader that reads all of 64 MiB: its private memory grows by less than 1 %",
            f"{grown / size:.3%} ({grown / 1024:.0f} KiB), the most of {MANY_RANKS - 1} readers",
            grown < size // 100,
        ),
        Line(
            f"{MANY_RANKS} ranks hold one copy",
            f"what they map sums to {mapped / MIB:.1f} MiB, the arena has {arena / MIB:.1f} MiB",
            mapped <= 1.01 * arena,
        ),
    ]


def _memory(place: Place) -> tuple[int, int, int]:
    """Growth of private bytes, this rank's share of the segments it maps, bytes of the arena."""
    with Broadcaster(policy=Policy(peers_hold_raw=False, wait=PATIENCE)) as broadcaster:
        tensor = torch.arange(8 * MIB) if place.leads else None
        # The first message pays for what is mapped, imported and allocated once.
        first = broadcaster.broadcast(tensor)
        _read(first)
        del first
        dist.barrier()
        while broadcaster.stats().live_blocks:
            os.sched_yield()
        dist.barrier()
        before = private_bytes()
        got = broadcaster.broadcast(tensor)
        if _read(got) != 4 * MIB * (8 * MIB - 1):
            raise RuntimeError(f"rank {place.rank} read other numbers")
        grown = private_bytes() - before
        dist.barrier()
        mapped = mapped_share()
        arena = broadcaster.stats().segment_bytes
        del got
        dist.barrier()
    return grown, mapped, arena


def _read(tensor: torch.Tensor | None) -> int:
    if tensor is None:
        raise RuntimeError("nothing came")
    return int(tensor.sum())


def private_bytes() -> int:
    """This process's own pages, clean and dirty."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def mapped_share() -> int:
    """This process's share of every arena segment that it maps: a page that n processes map counts 1/n to each."""
    share, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):
            ours = is_arena(line)
        elif ours and word == "Pss:":
            share += int(line.split()[1])
    return share * 1024


def is_arena(line: str) -> bool:
    """Whether a line of /proc/self/maps is an arena segment: /shmcast-<token>-<rank>-<number>."""
    name = line.removesuffix(" (deleted)").rpartition("/dev/shm/")[2]
    return name.startswith("shmcast-") and name.rpartition("-")[2].isdecimal()


# A thousand messages.


@dataclasses.dataclass(frozen=True)
class Endurance:
    """What a thousand messages changed in one rank: bytes of segments, open fds, faults a message, names left."""

    grown: int
    fds: int
    faults: float
    names: tuple[str, ...]


def thousand(settings: Settings) -> list[Line]:
    found = run_ranks(RANKS, _thousand, settings=settings)
    readers = max(each.faults for each in found[1:])
    names = [name for each in found for name in each.names if Path(f"/dev/shm/{name}").exists()]
    pages = MESSAGE_BYTES // resource.getpagesize()
    return [
        Line(
            f"{MESSAGES} messages of {MESSAGE_BYTES // MIB} MiB through {ARENA_BYTES // MIB} MiB of arena: no growth",
            f"{found[0].grown} bytes, {max(each.fds for each in found)} fds, {len(names)} names left in /dev/shm",
            found[0].grown == 0 and all(each.fds == 0 for each in found) and not names,
        ),
        Line(
            f"no page faults from the payload, {pages} pages a message",
            f"{found[0].faults:.2f} faults a message in the writer, at most {readers:.2f} in a reader",
            max(readers, found[0].faults) < pages / 100,
        ),
    ]


def _thousand(place: Place) -> Endurance:
    payload = torch.arange(MESSAGE_BYTES // 8)
    held: deque[Any] = deque(maxlen=HELD)
    policy = Policy(peers_hold_raw=False, wait=PATIENCE)
    with Broadcaster(capacity=ARENA_BYTES, policy=policy) as broadcaster:

        def send(count: int) -> None:
            for number in range(count):
                payload[0] = number
                held.append(broadcaster.broadcast(payload if place.leads else None))
                if int(held[-1].sum()) != int(payload.sum()):
                    raise RuntimeError(f"rank {place.rank} read other numbers in message {number}")

        send(WARM_MESSAGES)
        dist.barrier()
        before = broadcaster.stats().segment_bytes, open_fds(), minor_faults()
        send(MESSAGES)
        after = broadcaster.stats().segment_bytes, open_fds(), minor_faults()
        names = tuple(sorted(segment_names()))
        held.clear()
        dist.barrier()
    return Endurance(after[0] - before[0], after[1] - before[1], (after[2] - before[2]) / MESSAGES, names)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def minor_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def segment_names() -> set[str]:
    """The names that this process's mappings have or had in /dev/shm, the library's semaphores too."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = {line.removesuffix(" (deleted)").rpartition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}
    return {name for name in names if name.startswith(("shmcast-", "sem.shmcast-"))}


# Imports.


def imports() -> list[Line]:
    """Each in processes of their own, in turn."""
    took: dict[str, list[float]] = {"shmcast": [], "torch": []}
    for _ in range(IMPORTS):
        for module, seconds in took.items():
            seconds.append(_import(module)[0])
    light, heavy = statistics.median(took["shmcast"]), statistics.median(took["torch"])
    brought = _import("shmcast")[1]
    return [
        Line(
            "import shmcast: neither torch nor numpy, at most a tenth of import torch",
            f"{light / heavy:.2%} ({light * 1e3:.1f} ms to {heavy * 1e3:.0f} ms), brings {brought or 'neither'}",
            light <= heavy / 10 and not brought,
        )
    ]


def _import(module: str) -> tuple[float, str]:
    """Seconds, and which of torch and numpy came with it."""
    code = (
        f"import sys, time; t = time.perf_counter(); import {module}; t = time.perf_counter() - t; "
        "print(t, *({'torch', 'numpy'} & set(sys.modules)))"
    )
    seconds, *brought = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    return float(seconds), " and ".join(sorted(brought))


@click.command(help=__doc__.partition("\n")[0])
@click.option(
    "--rounds", default=30, show_default=True, type=click.IntRange(1), help="Messages of each, for the times."
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads of torch in each rank.")
@click.option("--pin", is_flag=True, help="Keep each rank on one CPU.")
def main(rounds: int, threads: int, pin: bool) -> None:
    began = time.monotonic()
    console = Console()
    try:
        lines = run(Settings(threads, pin), rounds, console)
    except RanksFailed as error:
        raise click.ClickException(str(error)) from None
    console.print(f"{sum(line.passed for line in lines)} of {len(lines)} passed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
