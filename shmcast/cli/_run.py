"""Starts the ranks of the demonstration, watches them, and ends them, whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from shmcast import _reclaim
from shmcast.cli._rank import SECONDS, Failed, Plan, Report, Step, output_of, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcast.cli._inputs import Raw

_GRACE: Final = 1.0
"""Seconds for the ranks that fail because one has failed: the first to be heard need not be the first that failed."""
_OUTPUT_LINES: Final = 3


class RunFailed(Exception):
    """A rank failed; the message says which, and why."""


def run_ranks(raw: Raw, ranks: int, rounds: int, capacity: int | None, on_step: Callable[[str], None]) -> list[Report]:
    """Send the request around in every way, on new processes; what each rank measured.

    No process and no name in /dev/shm is left, also after an error or Ctrl-C. Raises `RunFailed`.
    """
    with tempfile.TemporaryDirectory(prefix="shmcast-demo-") as folder:
        plan = Plan(ranks, rounds, capacity, folder)
        torch.save(raw, Path(folder, "request.pt"))
        group = _Group(plan)
        with _ended_by_sigterm():
            try:
                group.start()
                return group.reports(on_step)
            finally:
                group.end()
                _reclaim.sweep()


class _Group:
    """The processes, and the pipes from them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []

    def start(self) -> None:
        """Start all; returns at once."""
        spawn = multiprocessing.get_context("spawn")
        with _children_deaf_to_ctrl_c():
            for rank in range(self._plan.ranks):
                ours, theirs = spawn.Pipe(duplex=False)
                arguments = (rank, self._plan, theirs, os.getpid())
                process = spawn.Process(target=serve, args=arguments, name=f"demo-rank-{rank}", daemon=True)
                self._pipes.append(ours)
                self._processes.append(process)
                process.start()
                theirs.close()

    def reports(self, on_step: Callable[[str], None]) -> list[Report]:
        """Wait for every rank's, or for the first failure."""
        done: dict[int, Report] = {}
        while len(done) < self._plan.ranks:
            waiting = {self._pipes[rank]: rank for rank in range(self._plan.ranks) if rank not in done}
            ready = connection.wait(list(waiting), SECONDS)
            if not ready:
                raise RunFailed(f"no rank has been heard of for {SECONDS:.0f} seconds")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                said = self._hear(rank)
                if isinstance(said, Report):
                    done[rank] = said
                elif isinstance(said, Step):
                    on_step(said.text)
                else:
                    raise RunFailed(self._cause(rank, said, done))
        return [done[rank] for rank in range(self._plan.ranks)]

    def _hear(self, rank: int) -> Report | Step | Failed | None:
        """What the rank says next; None if it has ended instead."""
        try:
            said: Report | Step | Failed = self._pipes[rank].recv()
        except (EOFError, OSError):
            return None
        return said

    def _cause(self, rank: int, said: Failed | None, done: dict[int, Report]) -> str:
        """Why: of the ranks that fail now, one that died tells more than those that miss it."""
        deadline = time.monotonic() + _GRACE
        failures = {rank: said}
        while (left := deadline - time.monotonic()) > 0 and None not in failures.values():
            others = {pipe: r for r, pipe in enumerate(self._pipes) if r not in failures and r not in done}
            ready = connection.wait(list(others), left) if others else []
            if not ready:
                break
            for pipe in ready:
                heard = self._hear(others[pipe])  # type: ignore[index]
                if heard is None or isinstance(heard, Failed):
                    failures[others[pipe]] = heard  # type: ignore[index]
        for which, failure in failures.items():
            if failure is None:
                return f"rank {which} {self._death(which)}"
        return f"rank {rank}: {said.text if said else ''}"

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(_GRACE)
        code = process.exitcode
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL): this machine may have run out of memory"
        story = f"ended with exit status {code}"
        if code is not None and code < 0:
            story = f"was killed by {signal.Signals(-code).name}"
        path = output_of(rank, self._plan)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "; ".join([story, *lines[-_OUTPUT_LINES:]])

    def end(self) -> None:
        """Kill what still runs. A rank that has reported has nothing left to do but to end."""
        started = [process for process in self._processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()


@contextmanager
def _children_deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started in here never hear Ctrl-C: all of a terminal's get it, and only this one is to act on it.

    They inherit that the signal is blocked. Here it is put off, not lost: a thread of some library may take it, and a
    start that is cut in two leaves a child that nobody knows.
    """
    # Starting this process of multiprocessing's own, which the first child needs, would unblock the signal.
    resource_tracker.ensure_running()
    heard: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM unwind the stack like Ctrl-C, in place of ending the process on the spot."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
