"""One rank of the demonstration: a process that receives the request in each way, and measures."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist

from shmcast.broadcaster import Broadcaster
from shmcast.cli._inputs import apart, fresh
from shmcast.multimodal import MultimodalInputs
from shmcast.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from shmcast.cli._inputs import Raw

ENTRY: Final = 0
SECONDS: Final = 300.0
"""The most that a rank waits for the others."""
_PR_SET_PDEATHSIG: Final = 1


class Plan(NamedTuple):
    """What every rank is told. `folder` has `request.pt` in it, and takes the group's store and the ranks' output."""

    ranks: int
    rounds: int
    capacity: int | None
    folder: str


class Way(NamedTuple):
    """One way for the request to reach all ranks. `everywhere`: every rank has raw inputs, not the entry rank alone."""

    key: str
    title: str
    everywhere: bool


WAYS: Final = (
    Way("alone", "every rank runs fn", True),
    Way("object_list", "broadcast_object_list", False),
    Way("bytes", "shmcast, bytes", False),
    Way("references", "shmcast, references", True),
)


class Memory(NamedTuple):
    """Private bytes of a rank: of the raw inputs that were put there, and what receiving added."""

    raw: int
    added: int


class Span(NamedTuple):
    """From when to when, in seconds of CLOCK_MONOTONIC: one clock for all processes of a machine."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.start


class Call(NamedTuple):
    """One way, once, as one rank saw it: times and no memory, or (untimed) memory and no times.

    `fn` is None where it did not run here; `cpu` the seconds of this process on all processors.
    """

    way: str
    fingerprint: str
    whole: Span | None = None
    fn: Span | None = None
    cpu: float = 0.0
    memory: Memory | None = None


class Report(NamedTuple):
    """What a rank says at the end; of its two Broadcasters, messages by route and fallbacks by reason."""

    calls: tuple[Call, ...]
    routes: dict[str, dict[str, int]]
    fallbacks: dict[str, dict[str, int]]
    shared: int


class Step(NamedTuple):
    """Rank 0 begins the next call."""

    text: str


class Failed(NamedTuple):
    """A rank raised."""

    text: str


def serve(rank: int, plan: Plan, pipe: Connection, parent: int) -> None:
    """The whole life of a rank: what it has to say goes through `pipe`, what its libraries print into a file."""
    _prepare(rank, plan, parent)
    try:
        pipe.send(_measure_all(rank, plan, pipe))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        traceback.print_exception(error)
        pipe.send(Failed(f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"))


def _prepare(rank: int, plan: Plan, parent: int) -> None:
    out = os.open(output_of(rank, plan), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    # As a launcher sets it for ranks that share a machine.
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def output_of(rank: int, plan: Plan) -> Path:
    """The file for what the rank's libraries print."""
    return Path(plan.folder, f"rank-{rank}.txt")


def _measure_all(rank: int, plan: Plan, pipe: Connection) -> Report:
    store = f"file://{plan.folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=plan.ranks, timeout=timedelta(seconds=SECONDS)
    )
    try:
        raw = torch.load(Path(plan.folder, "request.pt"), mmap=True, weights_only=True)
        return measure(rank, plan.rounds, plan.capacity, raw, lambda text: pipe.send(Step(text)))
    finally:
        dist.destroy_process_group()


def measure(rank: int, rounds: int, capacity: int | None, raw: Raw, tell: Callable[[str], None]) -> Report:
    """All ways, interleaved, `rounds` times; one round before warms up, one after looks at memory.

    Every rank of the default group calls it. `tell` is called on the entry rank, before each call.
    """

    def broadcaster(*, everywhere: bool) -> Broadcaster:
        return Broadcaster(src=ENTRY, capacity=capacity, policy=Policy(peers_hold_raw=everywhere), timeout=SECONDS)

    calls: list[Call] = []
    with broadcaster(everywhere=False) as copying, broadcaster(everywhere=True) as referring:
        ends = _Ends(copying, referring)
        for number, (phase, look) in enumerate(_phases(rounds)):
            for place in range(len(WAYS)):
                # Each way is first, second, third ... in turn.
                way = WAYS[(place + number) % len(WAYS)]
                if rank == ENTRY:
                    tell(f"{phase}: {way.title}")
                calls.append(look(way, ends, raw if way.everywhere or rank == ENTRY else None))
        stats = {"bytes": copying.stats(), "references": referring.stats()}
    return Report(
        tuple(calls),
        {way: {route: traffic.messages for route, traffic in each.routes.items()} for way, each in stats.items()},
        {way: dict(each.fallbacks) for way, each in stats.items()},
        stats["bytes"].segment_bytes,
    )


def _phases(rounds: int) -> list[tuple[str, Callable[[Way, _Ends, Raw | None], Call]]]:
    timed = [(f"round {number} of {rounds}", _timed) for number in range(1, rounds + 1)]
    return [("warming up", _weighed), *timed, ("looking at memory", _weighed)]


class _Ends:
    """The ways as functions over one group, with the same `fn`, and when that ran."""

    def __init__(self, copying: Broadcaster, referring: Broadcaster) -> None:
        self._copying, self._referring = copying, referring
        self.fn_span: Span | None = None

    def run(self, way: Way, raw: Raw | None) -> MultimodalInputs:
        """`raw` is None where this rank does not have it."""
        self.fn_span = None
        call: Callable[[Any], MultimodalInputs] = {
            "alone": self._fn,
            "object_list": self._object_list,
            "bytes": lambda mine: self._copying.materialize(mine, self._fn),
            "references": lambda mine: self._referring.materialize(mine, self._fn),
        }[way.key]
        return call(raw)

    def _fn(self, raw: Raw) -> MultimodalInputs:
        start = time.monotonic()
        made = MultimodalInputs.from_dict(raw)
        self.fn_span = Span(start, time.monotonic())
        return made

    def _object_list(self, raw: Raw | None) -> MultimodalInputs:
        box = [None if raw is None else self._fn(raw)]
        dist.broadcast_object_list(box, src=ENTRY)
        made: MultimodalInputs = box[0]  # type: ignore[assignment]
        return made


def _inputs_for(way: Way, template: Raw | None) -> Raw | None:
    """Inputs that are new each time: nothing about them, no hash say, is known from the round before."""
    if template is None:
        return None
    return apart(template) if way.key == "object_list" else fresh(template)


def _timed(way: Way, ends: _Ends, template: Raw | None) -> Call:
    raw = _inputs_for(way, template)
    dist.barrier()
    cpu, start = time.process_time(), time.monotonic()
    made = ends.run(way, raw)
    end = time.monotonic()
    # Threads may be at work for this call while it has returned here; when all ranks are through, they are too.
    dist.barrier()
    cpu = time.process_time() - cpu
    return Call(way.key, fingerprint(made), Span(start, end), ends.fn_span, cpu)


def _weighed(way: Way, ends: _Ends, template: Raw | None) -> Call:
    before = private_bytes()
    raw = _inputs_for(way, template)
    prepared = private_bytes()
    made = ends.run(way, raw)
    # This reads every byte, which may take memory too.
    seen = fingerprint(made)
    memory = Memory(prepared - before, private_bytes() - prepared)
    return Call(way.key, seen, memory=memory)


def fingerprint(made: MultimodalInputs) -> str:
    """A digest of every byte, shape, dtype and hash in `made`, read from memory here and now."""
    whole = hashlib.sha256()
    for item in made.mm_items:
        whole.update(repr((item.modality.name, item.hash, item.pad_value, item.offsets)).encode())
        for name, tensor in sorted({"feature": item.feature, **item.model_specific_data}.items()):
            plain = tensor.contiguous()
            whole.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            whole.update(plain.view(torch.uint8).numpy().data)
    return whole.hexdigest()


def private_bytes() -> int:
    """Bytes of memory that no other process can use: anonymous pages, copies that copy-on-write made among them.

    What malloc keeps of freed memory goes back first. The `Private_` lines in `smaps_rollup` would count pages of
    shared memory too while only one rank has touched them.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line 'Anonymous'")
