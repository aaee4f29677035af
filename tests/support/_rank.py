"""The side of `ranks` that runs in the child process."""

import ctypes
import faulthandler
import functools
import gc
import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tests.support.leaks import Snapshot, wait_until_clean

PR_SET_PDEATHSIG = 1
GROUP_SECONDS = 60


@dataclass(frozen=True)
class Task:
    """One function to call. `store` is the path of a FileStore for the group, None for no group."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    rank: int
    n: int
    store: str | None
    check: bool


@dataclass(frozen=True)
class Ready:
    """The child runs and has read its task."""


@dataclass(frozen=True)
class Returned:
    """The function came back; `value` is its result, pickled."""

    value: bytes


@dataclass(frozen=True)
class Raised:
    """The function raised, or left something behind; `text` is what to show."""

    text: str


def serve(pipe: Connection, log: str, parent: int | None) -> None:
    """Run tasks from `pipe` until its other end closes. `parent`: whose child this is, None for a fork server's."""
    _prepare(log, parent)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_perform(pipe, message))


def _prepare(log: str, parent: int | None) -> None:
    """Write to a file of our own, answer SIGUSR1 with all stacks, and do not outlive the parent."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _perform(pipe: Connection, message: bytes) -> bytes:
    """Do one task; the reply is pickled here, so that a result that cannot travel is a failure with a traceback."""
    try:
        task: Task = pickle.loads(message)
        if task.store is not None:
            _import_torch()
        pipe.send_bytes(pickle.dumps(Ready()))
        return pickle.dumps(_in_group(task) if task.store is not None else _call(task))
    except BaseException:
        return pickle.dumps(Raised(traceback.format_exc()))


@functools.cache
def _import_torch() -> None:
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # they stay: no collection need look at them again


def _in_group(task: Task) -> Returned | Raised:
    from datetime import timedelta

    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{task.store}",
        rank=task.rank,
        world_size=task.n,
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    try:
        # One that is through, and leaves or dies at once, would fail others that still connect to it.
        store = dist.FileStore(f"{task.store}-met", task.n)  # type: ignore[attr-defined]  # torch does not list it
        store.set(str(task.rank), "here")
        store.wait([str(rank) for rank in range(task.n)], timedelta(seconds=GROUP_SECONDS))
        return _call(task)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _call(task: Task) -> Returned | Raised:
    before = Snapshot.take(rank=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reply = Returned(pickle.dumps(task.function(*task.args)))
    left = wait_until_clean(before, rank=True) if task.check else []
    return Raised("left behind:\n  " + "\n  ".join(left)) if left else reply
