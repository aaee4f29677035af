"""The tools themselves: a leak is seen, a rank that raises, dies or hangs is told about."""

import atexit
import gc
import mmap
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.leaks import SHM, Snapshot, wait_until_clean
from tests.support.ranks import Died, Ranks, RanksFailed, run_processes, run_ranks


@contextmanager
def a_name() -> Iterator[None]:
    path = SHM / f"shmcast-leak-{os.getpid()}"
    path.touch()
    yield
    path.unlink()


@contextmanager
def an_fd() -> Iterator[None]:
    ends = os.pipe()
    yield
    for end in ends:
        os.close(end)


@contextmanager
def a_mapping() -> Iterator[None]:
    path = SHM / f"shmcast-leak-{os.getpid()}"
    with path.open("wb+") as file:
        file.truncate(4096)
        mapped = mmap.mmap(file.fileno(), 4096)
    path.unlink()
    yield
    mapped.close()


@contextmanager
def a_thread() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="shmcast-leak", daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()


@contextmanager
def a_child() -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield
        child.communicate(b"\n")


@pytest.mark.parametrize(
    ("leak", "told"),
    [
        (a_name, "name in /dev/shm shmcast-leak"),
        (an_fd, "open fd on pipe:"),
        (a_mapping, "mapping of /dev/shm/shmcast-leak"),
        (a_thread, "thread 'shmcast-leak' (daemon)"),
        (a_child, "child process"),
    ],
)
def test_a_leak_is_named(leak: Callable[[], AbstractContextManager[None]], told: str) -> None:
    before = Snapshot.take()
    with leak():
        left = wait_until_clean(before, seconds=0)
    assert any(told in line for line in left), left
    assert wait_until_clean(before) == []


def test_what_a_stranger_holds_is_no_leak() -> None:
    path = SHM / f"shmcast-stranger-{os.getpid()}"
    before = Snapshot.take()
    # Its parent has ended, so the holder is no child of ours.
    shell = subprocess.run([sys.executable, "-c", STRANGER, str(path)], capture_output=True, text=True, check=True)
    pid = int(shell.stdout)
    try:
        assert path.exists()
        assert wait_until_clean(before, seconds=0) == []
    finally:
        os.kill(pid, 9)
        path.unlink()


STRANGER = """
import os, sys, signal
fd = os.open(sys.argv[1], os.O_CREAT)
pid = os.fork()
if pid:
    print(pid)
else:
    signal.alarm(60)
    os.closerange(0, 3)
    signal.pause()
"""


def test_garbage_is_collected_before_anyone_is_blamed() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.me = self
            self.fd = os.open("/dev/null", os.O_RDONLY)

        def __del__(self) -> None:
            os.close(self.fd)

    gc.disable()
    try:
        before = Snapshot.take()
        Cycle()
        assert Snapshot.take().new_since(before)
        assert wait_until_clean(before) == []
    finally:
        gc.enable()


def total(rank: int, start: int) -> int:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([start + rank])
    dist.all_reduce(tensor)
    return int(tensor)


def raise_on(rank: int, culprit: int) -> int:
    import torch.distributed as dist

    if rank == culprit:
        raise ValueError("as told")
    dist.barrier()
    return rank


def die_on(rank: int, culprit: int) -> int:
    if rank == culprit:
        os.kill(os.getpid(), 9)
    return rank


def hang(rank: int) -> None:
    threading.Event().wait()


def forget_a_mapping(rank: int) -> None:
    path = SHM / f"shmcast-leak-{os.getpid()}"
    with path.open("wb+") as file:
        file.truncate(4096)
        globals()["_forgotten"] = mmap.mmap(file.fileno(), 4096)
    path.unlink()


def spoil_the_exit(code: int) -> None:
    atexit.register(os._exit, code)


def write(path: str, text: str) -> str:
    Path(path).write_text(text)
    return text


@pytest.mark.multiprocess
def test_new_ranks_share_a_group() -> None:
    assert run_ranks(2, total, 10) == [21, 21]


@pytest.mark.multiprocess
def test_processes_without_a_group_get_arguments_of_their_own(tmp_path: Path) -> None:
    argslist = [(str(tmp_path / "a"), "x"), (str(tmp_path / "b"), "y")]
    assert run_processes(write, argslist) == ["x", "y"]
    assert (tmp_path / "b").read_text() == "y"


@pytest.mark.multiprocess
def test_a_pool_serves_rounds_of_different_sizes_and_survives_failures(ranks: Ranks) -> None:
    assert ranks.run(2, total, 0) == [1, 1]
    with pytest.raises(RanksFailed, match=r"(?s)rank 1: Traceback.*ValueError: as told"):
        ranks.run(2, raise_on, 1)
    assert ranks.run(3, total, 0) == [3, 3, 3]
    with pytest.raises(RanksFailed, match="rank 0: died with exit code -9"):
        ranks.run(2, die_on, 0)
    assert ranks.run(2, die_on, 1, dies={1}) == [0, Died(-9)]
    with pytest.raises(RanksFailed, match="expected to die and returned 1"):
        ranks.run(2, die_on, 0, dies={0, 1})


@pytest.mark.multiprocess
def test_an_expected_death_does_not_spoil_the_end_of_new_ranks() -> None:
    assert run_ranks(2, die_on, 1, dies={1}) == [0, Died(-9)]


@pytest.mark.multiprocess
def test_a_round_can_be_watched_and_a_rank_killed_in_it() -> None:
    with Ranks() as pool:
        round_ = pool.start_each(hang, [(0,)])
        round_.kill(0)
        assert round_.results() == [Died(-9)]


@pytest.mark.multiprocess
def test_a_hanging_rank_shows_its_stack() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 0: not done at the deadline.*in hang"):
        run_processes(hang, [(0,)], timeout=0.2)


@pytest.mark.multiprocess
def test_a_leak_inside_a_rank_fails_the_round() -> None:
    with pytest.raises(RanksFailed, match="mapping of /dev/shm/shmcast-leak"):
        run_processes(forget_a_mapping, [(0,)])
    assert run_processes(forget_a_mapping, [(0,)], check=False) == [None]


@pytest.mark.multiprocess
def test_a_crash_at_the_end_of_a_new_process_fails_the_call() -> None:
    with pytest.raises(RanksFailed, match="ended with exit code 7"):
        run_processes(spoil_the_exit, [(7,)])


@pytest.mark.multiprocess
def test_a_function_that_cannot_travel_is_refused_here(ranks: Ranks) -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
        ranks.run(1, lambda rank: rank)
