"""How fast a message's tensors reach a GPU: from private and from mapped memory, pageable and pinned.

python benchmarks/bench_h2d.py
python benchmarks/bench_h2d.py --sizes 1M,64M --rounds 100 --json figures.json

Needs a GPU; without one it says so and exits with status 3. Status 1: a bound was missed.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import mmap
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks._loop import percentile
from benchmarks.bench_broadcast import WIDTH, clock, machine, parse_sizes, shown, write
from shmcast import Policy, Reader, Writer, to_device
from shmcast._pages import MADV_POPULATE_WRITE, address_of, populate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

VERSION = 1
MEASURED = "seconds from the call until the device has the bytes; bandwidth in bytes a second, of the median"
NO_GPU = 3
PAGE = 4096
MIB = 1 << 20
PATIENCE = 60.0
PORTABLE = 1
CHECKED_PAGES = 256
TARGETS_FROM = 16 * MIB  # below, what a launch costs is in the way
PINNED_SHARE = 0.95
PAGEABLE_RATIO = 1.5


class Sources:
    """The same `size` bytes in each kind of memory, uint8 tensors of shape [size]; and room for them on the device."""

    def __init__(self, size: int, writer: Writer, plain: Reader, pinning: Reader, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self.payload = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        self.private = torch.empty(size, dtype=torch.uint8)
        self.pinned_private = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.target = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.mapped = self.pinned_mapped = self.private
        self._writer, self._plain, self._pinning = writer, plain, pinning

    def stamp(self, token: int) -> None:
        """Have all show new bytes, other ones in each page than ever before."""
        self.payload[::PAGE] = token % 251
        self.payload[1::PAGE] = token // 251 % 251
        self.private.copy_(self.payload)
        self.pinned_private.copy_(self.payload)
        self.mapped = self.pinned_mapped = self.private
        handle = self._writer.publish(self.payload)
        self.mapped = opened(self._plain, handle)
        self.pinned_mapped = opened(self._pinning, handle)
        # The segments that come with the first messages of a size are registered a moment after they are mapped.
        deadline = time.monotonic() + PATIENCE
        while not self.pinned_mapped.is_pinned() and time.monotonic() < deadline:
            os.sched_yield()


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to the device.

    Attributes:
        key: its name in `--only` and in JSON.
        label: its name in the table.
        pinned: whether its memory has to be pinned, which is checked.
        source: where its bytes lie.
        send: queues the copy, and gives what the device will have.
    """

    key: str
    label: str
    pinned: bool
    source: Callable[[Sources], torch.Tensor]
    send: Callable[[Sources, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One copy: seconds until the call returned, and until the device had the bytes."""

    call: float
    done: float


def opened(reader: Reader, handle: Any) -> torch.Tensor:
    found = reader.open(handle)
    if not isinstance(found, torch.Tensor):
        raise TypeError(f"a {type(found).__name__} was opened")
    return found


def send_copy(sources: Sources, tensor: torch.Tensor) -> torch.Tensor:
    return sources.target.copy_(tensor, non_blocking=True)


def send_message(sources: Sources, tensor: torch.Tensor) -> torch.Tensor:
    return to_device(tensor, "cuda")


PAGEABLE, PINNED, MAPPED = "pageable-private", "pinned-private", "pinned-mapped"
CONTENDERS = (
    Contender(PAGEABLE, "pageable, private", False, lambda s: s.private, send_copy),
    Contender("pageable-mapped", "pageable, mapped", False, lambda s: s.mapped, send_copy),
    Contender(PINNED, "pinned, private", True, lambda s: s.pinned_private, send_copy),
    Contender(MAPPED, "pinned, mapped", True, lambda s: s.pinned_mapped, send_copy),
    Contender("to-device", "the same, to_device", True, lambda s: s.pinned_mapped, send_message),
)
BY_KEY = {contender.key: contender for contender in CONTENDERS}


def measure(
    sizes: Sequence[int], contenders: Sequence[Contender], rounds: int, warmup: int, seed: int
) -> list[dict[str, Any]]:
    """The rows of the result; all contenders in turn in each round, in an order that rotates."""
    rows: list[dict[str, Any]] = []
    with (
        Writer(2, capacity=4 * (max(sizes) + MIB), policy=Policy(wait=PATIENCE)) as writer,
        Reader(writer.address, 0) as plain,
        Reader(writer.address, 1, pin=True) as pinning,
    ):
        for size in sizes:
            sources = Sources(size, writer, plain, pinning, seed)
            samples = dict[str, list[Sample]]((contender.key, []) for contender in contenders)
            for number in range(warmup + rounds):
                sources.stamp(number)
                for turn in range(len(contenders)):
                    contender = contenders[(turn + number) % len(contenders)]
                    sample = once(contender, sources)
                    if number >= warmup:
                        samples[contender.key].append(sample)
            rows += rows_of(size, contenders, samples)
    return rows


def once(contender: Contender, sources: Sources) -> Sample:
    """One copy that is timed, after one that is not, its bytes compared."""
    tensor = contender.source(sources)
    if tensor.is_pinned() is not contender.pinned:
        wanted = "pinned" if contender.pinned else "pageable"
        raise click.ClickException(f"{contender.label}, {sources.size} bytes: the memory is not {wanted}")
    contender.send(sources, tensor)
    sources.target.zero_()
    torch.cuda.synchronize()
    began = time.perf_counter()
    got = contender.send(sources, tensor)
    called = time.perf_counter()
    torch.cuda.synchronize()
    done = time.perf_counter()
    if not torch.equal(got.cpu(), sources.payload):
        raise click.ClickException(f"{contender.label}, {sources.size} bytes: the device has other bytes")
    return Sample(called - began, done - began)


def rows_of(size: int, contenders: Sequence[Contender], samples: dict[str, list[Sample]]) -> Iterator[dict[str, Any]]:
    medians = {key: statistics.median(sample.done for sample in found) for key, found in samples.items()}
    for contender in contenders:
        done = [sample.done for sample in samples[contender.key]]
        own = medians[contender.key]
        yield {
            "size": size,
            "contender": contender.key,
            "label": contender.label,
            "rounds": len(done),
            "median_s": own,
            "p99_s": percentile(done, 99),
            "min_s": min(done),
            "call_s": statistics.median(sample.call for sample in samples[contender.key]),
            "bandwidth": size / own,
            "to_pinned": medians[PINNED] / own if PINNED in medians else None,
            "to_pageable": medians[PAGEABLE] / own if PAGEABLE in medians else None,
            "verified": len(done),
        }


def registering(size: int, rounds: int = 5) -> dict[str, float | int]:
    """What registering `size` bytes of shared memory costs whose pages are there already, and undoing it."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
    times: list[tuple[float, float]] = []
    with mmap.mmap(-1, size) as mapping:
        address = address_of(mapping)
        populate(mapping, MADV_POPULATE_WRITE)
        for _ in range(rounds):
            began = time.perf_counter()
            torch.cuda.check_error(int(cudart.cudaHostRegister(address, size, PORTABLE)))
            registered = time.perf_counter()
            torch.cuda.check_error(int(cudart.cudaHostUnregister(address)))
            times.append((registered - began, time.perf_counter() - registered))
    register, unregister = (statistics.median(column) for column in zip(*times, strict=True))
    return {"size": size, "rounds": rounds, "register_s": register, "unregister_s": unregister}


def private_map() -> dict[str, int]:
    """What a copy-on-write map shows of what is written through another map: pages of it, before and once registered.

    `code`: of cudaHostRegister. Where it is 0 and `after` is under `pages`, registering took a private copy, which is
    why `pin=True` is refused with `isolation="cow"`.
    """
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
    size = CHECKED_PAGES * PAGE
    fd = os.memfd_create("bench_h2d")
    try:
        os.ftruncate(fd, size)
        with mmap.mmap(fd, size) as written, mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE) as private:
            before = pages_that_show(1, written, private)
            code = int(cudart.cudaHostRegister(address_of(private), size, PORTABLE))
            after = pages_that_show(2, written, private)
            if not code:
                torch.cuda.check_error(int(cudart.cudaHostUnregister(address_of(private))))
    finally:
        os.close(fd)
    return {"pages": CHECKED_PAGES, "before": before, "code": code, "after": after}


def pages_that_show(value: int, written: mmap.mmap, private: mmap.mmap) -> int:
    for offset in range(0, len(written), PAGE):
        written[offset] = value
    return sum(private[offset] == value for offset in range(0, len(private), PAGE))


def targets_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The promises, passed or missed, at each size that is large enough."""
    bounds = (("to_pinned", PINNED_SHARE, "pinned, private"), ("to_pageable", PAGEABLE_RATIO, "pageable, private"))
    return [
        {"size": row["size"], "against": against, "bound": bound, "found": row[ratio], "passed": row[ratio] >= bound}
        for row in rows
        if row["contender"] == MAPPED and row["size"] >= TARGETS_FROM
        for ratio, bound, against in bounds
        if row[ratio] is not None
    ]


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("from", no_wrap=True)
    for name in ("median ms", "p99 ms", "call ms", "GB/s", "× pinned", "× pageable"):
        table.add_column(name, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row["size"]):
            table.add_section()
        times = [clock(row[name]) for name in ("median_s", "p99_s", "call_s")]
        ratios = ["" if row[name] is None else f"{row[name]:.3g}" for name in ("to_pinned", "to_pageable")]
        size = "" if row["size"] == last else shown(row["size"])
        table.add_row(size, row["label"], *times, f"{row['bandwidth'] / 1e9:.3g}", *ratios)
        last = row["size"]
    return table


def told(report: dict[str, Any]) -> Iterator[str]:
    """What is below the table."""
    for cost in report["registering"]:
        yield (
            f"registering {shown(cost['size'])} once: {clock(cost['register_s'])} ms, "
            f"undoing it {clock(cost['unregister_s'])} ms"
        )
    check = report["private_map"]
    if check["code"]:
        yield f"a copy-on-write map cannot be registered: error {check['code']}"
    else:
        yield (
            f"a copy-on-write map shows {check['before']} of {check['pages']} pages that its writer changes, "
            f"registered {check['after']}"
        )
    for target in report["targets"]:
        verdict = "[green]passed[/]" if target["passed"] else "[red]missed[/]"
        yield (
            f"{verdict}  {shown(target['size'])}: pin=True at least {target['bound']:g} times the bandwidth of "
            f"{target['against']}: [bold]{target['found']:.3g}[/]"
        )


@click.command(help=__doc__.partition("\n")[0])
@click.option("--sizes", default="1M,4M,16M,64M,200M", show_default=True, help="Bytes of the tensor, with K, M or G.")
@click.option("--only", default="", help=f"Of these only: {','.join(BY_KEY)}.")
@click.option("--rounds", default=50, show_default=True, type=click.IntRange(1), help="Copies of each.")
@click.option("--warmup", default=3, show_default=True, type=click.IntRange(0), help="Rounds before, not timed.")
@click.option("--registered", default="64M,1G", show_default=True, help="Bytes to register, to say what that costs.")
@click.option("--seed", default=1, show_default=True, help="What the bytes are made from.")
@click.option("--json", "target", metavar="FILE", help="All figures as JSON; - is standard output.")
def main(sizes: str, only: str, rounds: int, warmup: int, registered: str, seed: int, target: str | None) -> None:
    asked = {part.strip() for part in only.split(",")} if only else set(BY_KEY)
    if unknown := asked - BY_KEY.keys():
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(BY_KEY)}")
    parsed, costs = parse_sizes(sizes), parse_sizes(registered)
    if not torch.cuda.is_available():
        click.echo("no GPU here, or a torch without CUDA: nothing was measured", err=True)
        raise SystemExit(NO_GPU)
    torch.set_num_threads(1)
    rows = measure(parsed, [BY_KEY[key] for key in BY_KEY if key in asked], rounds, warmup, seed)
    report: dict[str, Any] = {
        "version": VERSION,
        "measured": MEASURED,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": {**machine(), "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "results": rows,
        "registering": [registering(size) for size in costs],
        "private_map": private_map(),
        "targets": targets_of(rows),
    }
    console = Console(stderr=target == "-")
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table_of(rows, f"to one device, {rounds} rounds; until it has the bytes"))
    for line in told(report):
        console.print(line, highlight=False, soft_wrap=True)
    if target is not None:
        write(json.dumps(report, indent=1), target)
    raise SystemExit(not all(line["passed"] for line in report["targets"]))


if __name__ == "__main__":
    main()
