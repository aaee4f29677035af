"""Functions run in processes of their own, with or without a gloo group over them.

`run_ranks(4, function, *args)` calls `function(rank, *args)` in four new processes that share a process group and
returns the four results in the order of the ranks. `Ranks` does the same with processes that stay for the next call:
importing torch is what costs. Each call makes a group of its own, so what one leaves broken is gone with it.

Functions and arguments travel by plain pickle: define the function at the top level of a module.
"""

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support import _rank
from tests.support.leaks import keep_process, keeping_fds

TIMEOUT = 60.0
START_SECONDS = 90.0
# When one rank has failed, the others may be waiting for it in vain.
GRACE_SECONDS = 3.0
END_SECONDS = 15.0
LOG_LINES = 60
PRELOAD = ("torch", "torch.distributed", "shmcast.scheduler", "shmcast.admission")


class RanksFailed(AssertionError):
    """At least one rank raised, died, hung or left something behind; the message has each one's story."""


@dataclass(frozen=True)
class Died:
    """Stands for the result of a rank that was expected to die; `exitcode` is negative for a signal."""

    exitcode: int


@dataclass(frozen=True)
class _Failure:
    reason: str


class Ranks:
    """Processes that are ready to be ranks, started when first needed and replaced after they died or failed.

    Not for several threads at once. With `kept` the look for leftovers takes these processes for granted. With `forked`
    they are forks of a process that has imported `preload`, which takes milliseconds: for tests that kill many.
    """

    def __init__(self, *, kept: bool = False, forked: bool = False, preload: Sequence[str] = PRELOAD) -> None:
        self._kept = kept
        self._forked = forked
        if forked:
            _start_forkserver(preload)
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self._started = 0
        self._rounds = 0
        self._processes: list[_Process] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(check=kind is None)

    def run(
        self,
        n: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = TIMEOUT,
        dies: Collection[int] = (),
        check: bool = True,
    ) -> list[Any]:
        """Call `function(rank, *args)` on `n` ranks of a new gloo group; return their results.

        Ranks in `dies` are expected to die in it (their result is a `Died`). After `timeout` seconds every rank's
        stack is collected and the round fails. With `check` a rank fails too when the function leaves a mapping,
        a shared-memory fd, a thread or a child process behind.
        """
        return self.start(n, function, *args, dies=dies, check=check).results(timeout)

    def start(
        self,
        n: int,
        function: Callable[..., Any],
        *args: Any,
        dies: Collection[int] = (),
        may_die: Collection[int] = (),
        check: bool = True,
    ) -> "Round":
        """As `run`, without waiting: the test goes on, say to kill a rank, and asks for `results` later."""
        self._rounds += 1
        store = str(self._folder / f"store-{self._rounds}")
        return self._start(function, [(rank, *args) for rank in range(n)], store, dies, check, may_die)

    def start_each(
        self, function: Callable[..., Any], argslist: Sequence[tuple[Any, ...]], *, check: bool = True
    ) -> "Round":
        """Call `function(*args)` for each of `argslist`, each in a process of its own, without a process group."""
        return self._start(function, argslist, None, (), check)

    def _start(
        self,
        function: Callable[..., Any],
        argslist: Sequence[tuple[Any, ...]],
        store: str | None,
        dies: Collection[int],
        check: bool,
        may_die: Collection[int] = (),
    ) -> "Round":
        n = len(argslist)
        tasks = [
            pickle.dumps(_rank.Task(function, tuple(args), rank, n, store, check)) for rank, args in enumerate(argslist)
        ]
        for process in self._processes:
            if not process.usable():
                process.kill()
        self._processes = [process for process in self._processes if process.usable()]
        while len(self._processes) < n:
            self._started += 1
            self._processes.append(_Process(self._folder / f"{self._started}.log", self._kept, self._forked))
        taken = self._processes[:n]
        for process, task in zip(taken, tasks, strict=True):
            process.give(task)
        return Round(taken, dies, may_die)

    def close(self, *, check: bool = True) -> None:
        """End all processes. With `check` one that does not end well on its own is a failure."""
        stories = []
        alive = [process for process in self._processes if process.exitcode is None]
        for process in alive:
            process.ask_to_end()
        for process in alive:
            code = process.end()
            if code != 0:
                stories.append(f"a rank ended with exit code {code}\n{process.log()}")
        self._processes = []
        shutil.rmtree(self._folder, ignore_errors=True)
        if check and stories:
            raise RanksFailed("\n".join(stories))


class Round:
    """One call on several ranks that has been started."""

    def __init__(self, processes: "list[_Process]", dies: Collection[int], may_die: Collection[int] = ()) -> None:
        self._processes = processes
        self._dies = frozenset(dies)
        self._may_die = frozenset(may_die)

    @property
    def pids(self) -> list[int]:
        """The processes' ids, in the order of the ranks."""
        return [process.pid for process in self._processes]

    def kill(self, rank: int) -> None:
        """SIGKILL that rank, now; its result is a `Died`."""
        self._dies |= {rank}
        os.kill(self._processes[rank].pid, signal.SIGKILL)

    def results(self, timeout: float = TIMEOUT) -> list[Any]:
        """Wait for all ranks; return what they returned or raise `RanksFailed`."""
        outcomes = self._gather(time.monotonic() + START_SECONDS, timeout)
        stories = [
            f"rank {rank}: {outcome.reason}"
            for rank, outcome in sorted(outcomes.items())
            if isinstance(outcome, _Failure)
        ]
        if stories:
            for process in self._processes:
                process.kill()
            raise RanksFailed("\n".join(stories))
        return [outcomes[rank] for rank in range(len(self._processes))]

    def _gather(self, start_deadline: float, timeout: float) -> dict[int, Any]:
        waiting = dict(enumerate(self._processes))
        outcomes: dict[int, Any] = {}
        deadline: float | None = None
        while waiting:
            if deadline is None and all(process.ready for process in waiting.values()):
                deadline = time.monotonic() + timeout
            until = start_deadline if deadline is None else deadline
            ready = connection.wait([p.pipe for p in waiting.values()], max(0.0, until - time.monotonic()))
            if not ready:
                self._give_up(waiting, outcomes)
                break
            for rank, process in list(waiting.items()):
                if process.pipe in ready and (outcome := self._receive(rank, process)) is not None:
                    outcomes[rank] = outcome.value
                    del waiting[rank]
            if any(isinstance(outcome, _Failure) for outcome in outcomes.values()):
                deadline = min(until, time.monotonic() + GRACE_SECONDS)
        return outcomes

    def _receive(self, rank: int, process: "_Process") -> "_Outcome | None":
        """What the rank has sent: None while it only says that it is ready."""
        try:
            reply = pickle.loads(process.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            code = process.end()
            if rank in self._dies | self._may_die:
                return _Outcome(Died(code))
            return _Outcome(_Failure(f"died with exit code {code}\n{process.log()}"))
        if isinstance(reply, _rank.Ready):
            process.ready = True
            return None
        process.busy = False
        if isinstance(reply, _rank.Raised):
            return _Outcome(_Failure(f"{reply.text}\n{process.log()}"))
        value = pickle.loads(reply.value)
        return _Outcome(_Failure(f"was expected to die and returned {value!r}") if rank in self._dies else value)

    def _give_up(self, waiting: "dict[int, _Process]", outcomes: dict[int, Any]) -> None:
        failed_already = bool(outcomes) and any(isinstance(outcome, _Failure) for outcome in outcomes.values())
        for process in waiting.values():
            process.ask_for_stacks()
        for rank, process in waiting.items():
            process.await_stacks()
            why = "still busy when another rank had failed" if failed_already else "not done at the deadline"
            outcomes[rank] = _Failure(f"{why}; its stacks:\n{process.log()}")


@dataclass(frozen=True)
class _Outcome:
    value: Any


class _Process:
    """One child process, the pipe to it, and the file that takes its stdout and stderr."""

    def __init__(self, log: Path, kept: bool, forked: bool) -> None:
        context = multiprocessing.get_context("forkserver") if forked else multiprocessing.get_context("spawn")
        parent = None if forked else os.getpid()
        self._log = log
        with keeping_fds() if kept else contextlib.nullcontext():
            self.pipe, theirs = context.Pipe()
            self._process = context.Process(target=_rank.serve, args=(theirs, str(log), parent), name="rank")
            self._process.start()
            theirs.close()
        self.pid = self._process.pid or 0
        self.exitcode: int | None = None
        self.ready = self.busy = False
        self._log_seen = 0
        if kept:
            keep_process(self.pid)

    def usable(self) -> bool:
        """Whether it lives and can take a task."""
        return self.exitcode is None and self._process.is_alive() and not self.busy

    def give(self, task: bytes) -> None:
        """Send a pickled task; the log starts anew."""
        self._log_seen = self._log_size()
        self.ready, self.busy = False, True
        with contextlib.suppress(BrokenPipeError):  # it died: the reader of the results says so
            self.pipe.send_bytes(task)

    def log(self) -> str:
        """The last lines that it wrote during this task."""
        with contextlib.suppress(OSError), self._log.open("rb") as file:
            file.seek(self._log_seen)
            lines = file.read().decode(errors="replace").splitlines()
            return "\n".join(f"    | {line}" for line in lines[-LOG_LINES:])
        return ""

    def ask_for_stacks(self) -> None:
        """Have it write the stack of every thread to its log."""
        self._size_before = self._log_size()
        if self._process.is_alive():
            os.kill(self.pid, signal.SIGUSR1)

    def await_stacks(self) -> None:
        """Wait, for a bounded time, until the log has grown and grows no more."""
        never = threading.Event()
        size = -1
        for _ in range(40):
            now = self._log_size()
            if now > self._size_before and now == size:
                return
            size = now
            never.wait(0.05)

    def kill(self) -> None:
        """End it at once and for good."""
        if self.exitcode is None:
            self._process.kill()
            self.end()

    def ask_to_end(self) -> None:
        """Tell it that no more tasks come."""
        self.pipe.close()

    def end(self) -> int:
        """Wait until it has ended, kill it when it does not; return its exit code."""
        if self.exitcode is None:
            self.pipe.close()
            self._process.join(END_SECONDS)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self.exitcode = self._process.exitcode or 0
            self._process.close()
        return self.exitcode

    def _log_size(self) -> int:
        return self._log.stat().st_size if self._log.exists() else 0


def _start_forkserver(preload: Sequence[str]) -> None:
    """The process that `forked` ranks are forks of; it ends with this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with keeping_fds():
        forkserver.ensure_running()
    keep_process(forkserver._forkserver._forkserver_pid)  # type: ignore[attr-defined]


def run_ranks(
    n: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    dies: Collection[int] = (),
    check: bool = True,
) -> list[Any]:
    """`Ranks.run` in processes that are new and end with the call, so that the interpreter's exit is part of it."""
    with Ranks() as ranks:
        return ranks.run(n, function, *args, timeout=timeout, dies=dies, check=check)


def run_processes(
    function: Callable[..., Any], argslist: Sequence[tuple[Any, ...]], *, timeout: float = TIMEOUT, check: bool = True
) -> list[Any]:
    """Call `function(*args)` for each of `argslist`, each in a new process without a process group."""
    with Ranks() as ranks:
        return ranks.start_each(function, argslist, check=check).results(timeout)
