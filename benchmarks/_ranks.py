"""Processes that share a gloo group: `run_ranks(4, function, ...)` calls `function(place, ...)` in four of them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

GROUP_TIMEOUT = timedelta(seconds=120)
END_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


class RanksFailed(RuntimeError):
    """A rank raised or died; the message has its story."""


@dataclass(frozen=True)
class Place:
    """One rank's place: its number, how many there are, and a way to tell a person how far it is."""

    rank: int
    ranks: int
    tell: Callable[[str], None]

    @property
    def leads(self) -> bool:
        """Whether this is the entry rank, which sends."""
        return self.rank == 0


@dataclass(frozen=True)
class Settings:
    """What each rank is started with: torch's threads, and whether it stays on one CPU."""

    threads: int = 1
    pin: bool = False


def run_ranks(
    ranks: int,
    function: Callable[..., Any],
    *args: Any,
    settings: Settings | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Any]:
    """What `function(place, *args)` returned on each of `ranks` new processes; the first failure ends them all.

    `function` and `args` travel by pickle. `tell` hears what the entry rank tells.
    """
    context = multiprocessing.get_context("spawn")
    chosen = settings or Settings()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        processes: dict[Connection, SpawnProcess] = {}
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe(duplex=False)
                task = (rank, ranks, f"{folder}/store", chosen, os.getpid(), function, args)
                process = context.Process(target=_serve, args=(theirs, *task), name=f"rank-{rank}")
                processes[ours] = process
                process.start()
                theirs.close()
            return _gather(list(processes), tell)
        finally:
            _end(processes)


def _gather(pipes: list[Connection], tell: Callable[[str], None]) -> list[Any]:
    results: dict[int, Any] = {}
    stories: list[str] = []
    waiting = dict(enumerate(pipes))
    while waiting:
        # The first story is often that of a rank that waited for the one to blame: hear the others too.
        ready = wait(list(waiting.values()), END_SECONDS if stories else None)
        if not ready:
            break
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            kind, value = _hear(waiting[rank])
            if kind == "news":
                if rank == 0:
                    tell(value)
                continue
            del waiting[rank]
            if kind == "done":
                results[rank] = value
            else:
                stories.append(f"rank {rank}: {value}")
    if stories:
        raise RanksFailed("\n".join(stories))
    return [results[rank] for rank in range(len(pipes))]


def _hear(pipe: Connection) -> tuple[str, Any]:
    try:
        kind, value = pipe.recv()
    except EOFError:
        return "failed", "died"
    return kind, value


def _end(processes: dict[Connection, SpawnProcess]) -> None:
    """Those that are done end by themselves; the others are killed."""
    for pipe in processes:
        pipe.close()
    for process in processes.values():
        if process.pid is not None:
            process.join(END_SECONDS)
            process.kill()
            process.join()


def _serve(
    pipe: Connection,
    rank: int,
    ranks: int,
    store: str,
    settings: Settings,
    parent: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    if settings.pin:
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[rank % len(allowed)]})
    try:
        value = _in_group(Place(rank, ranks, lambda text: pipe.send(("news", text))), store, settings, function, args)
        reply = ("done", value)
    except BaseException:
        reply = ("failed", traceback.format_exc())
    with suppress(BrokenPipeError):
        pipe.send(reply)
    if reply[0] == "failed":
        # Peers may wait for this rank inside a collective: leave without one.
        os._exit(1)


def _in_group(
    place: Place, store: str, settings: Settings, function: Callable[..., Any], args: tuple[Any, ...]
) -> object:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(settings.threads)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=place.rank, world_size=place.ranks, timeout=GROUP_TIMEOUT
    )
    try:
        return function(place, *args)
    finally:
        dist.destroy_process_group()
