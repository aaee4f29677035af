"""A SchedulerBackend whose ranks die, stop, fill memory or differ: everybody has every object, and nobody hangs."""

import gc
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from shmcast import Policy, _arena, _entry, transport
from shmcast._wire import Reason
from shmcast.errors import ArenaFull, LayoutError
from shmcast.scheduler import SchedulerBackend
from tests.support.codec import same
from tests.support.ranks import Died, Ranks, Round
from tests.test_broadcaster import until
from tests.test_scheduler import LONG, MIB, SIZE, backend, every_way, gate, made, raw, settled, twice

pytestmark = [pytest.mark.multiprocess, pytest.mark.faults]

TIMEOUT = 4.0

# Ranks tell the test process by files, and it them: there is no other channel that survives what is done to them.


def say(folder: str, name: str) -> None:
    os.close(os.open(f"{folder}/{name}", os.O_CREAT))


def hear(folder: str, *names: str) -> None:
    until(lambda: all(os.path.exists(f"{folder}/{name}") for name in names))


def take_all(group: SchedulerBackend, keys: range) -> bool:
    return all([same(group.take(key, LONG), made(key)) for key in keys])


# Deaths.


def lose_one(rank: int, placement: str, control: str, victim: int) -> tuple[bool, dict[str, int]]:
    """The victim dies in its `fn`, or while it follows, with batches behind and before it."""

    def fn(raw: Any) -> Any:
        if rank == victim and raw["seed"] >= 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return twice(raw)

    with backend(placement, control, fn=fn, timeout=TIMEOUT) as group:
        group.submit([(key, raw(key)) for key in range(4)])
        kept = [group.take(key) for key in range(4)]
        dist.barrier()
        for first in range(4, 16, 4):
            group.submit([(key, raw(key)) for key in range(first, first + 4)])
        if rank == victim:
            threading.Event().wait(LONG if group.stats().segment_bytes else 0)
            os.kill(os.getpid(), signal.SIGKILL)
        told = take_all(group, range(4, 16))
        group.submit([(key, raw(key)) for key in range(16, 20)])
        told = take_all(group, range(16, 20)) and told
        told = told and all(same(got, made(key)) for key, got in enumerate(kept))
        kept.clear()
        fallbacks = dict(group.stats().fallbacks)

        def given_back() -> bool:
            gc.collect()
            stats = group.stats()
            return not stats.leases[victim - (victim > rank)].held if stats.leases else True

        until(given_back)
        return told, fallbacks


@every_way
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_dies_with_batches_in_flight(ranks: Ranks, placement: str, control: str, victim: int) -> None:
    told = ranks.run(3, lose_one, placement, control, victim, dies={victim})
    assert isinstance(told.pop(victim), Died)
    for whole, fallbacks in told:
        assert whole
        if control == "ring" and (placement == "spread" or victim == 0):
            assert fallbacks["control"], "who is gone is not waited for"
            assert "late" not in fallbacks


# Stops.


def stop_one(rank: int, placement: str, folder: str, victim: int) -> tuple[bool, bool, dict[str, int]]:
    """The victim is stopped before it hands in what the others do, for longer than they wait."""
    with backend(placement, timeout=1.5, policy=Policy(route="shm", local_below=0, wait=0.02)) as group:
        group.submit([(key, raw(key)) for key in range(4)])
        assert take_all(group, range(4))
        dist.barrier()
        say(folder, f"ready{rank}")
        if rank == victim:
            hear(folder, "continued")
        for first in (4, 8):
            group.submit([(key, raw(key)) for key in range(first, first + 4)])
        during = take_all(group, range(4, 12))
        say(folder, f"done{rank}")
        dist.barrier()
        # One batch that may still find headers of those that were given up, then all is as before.
        group.submit([(key, raw(key)) for key in range(12, 16)])
        after = take_all(group, range(12, 16))
        dist.barrier()
        before = Counter(group.stats().fallbacks)
        for first in range(16, 32, 4):
            group.submit([(key, raw(key)) for key in range(first, first + 4)])
            after = take_all(group, range(first, first + 4)) and after
            dist.barrier()
        since = Counter(group.stats().fallbacks) - before
        settled(group)
        return during, after, dict(since)


@pytest.mark.parametrize("placement", ["entry", "spread"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_is_stopped_for_longer_than_the_others_wait(
    ranks: Ranks, tmp_path: Any, placement: str, victim: int
) -> None:
    folder = str(tmp_path)
    running = ranks.start(3, stop_one, placement, folder, victim)
    hear(folder, *(f"ready{rank}" for rank in range(3)))
    stop(running, victim)
    others = [rank for rank in range(3) if rank != victim]
    hear(folder, *(f"done{rank}" for rank in others))
    say(folder, "continued")
    os.kill(running.pids[victim], signal.SIGCONT)
    assert running.results() == [(True, True, {})] * 3


def stop(running: Round, rank: int) -> None:
    pid = running.pids[rank]
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


class Sleeps:
    """Stands for `time` in the arena: counts what it waits for memory, and lets time pass by sleeping alone."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 1e-6)


def fill_up(rank: int, folder: str) -> tuple[list[float], dict[str, int], dict[str, int]]:
    """Rank 1 does not look at its headers; rank 0 goes on, in less memory than it leaves."""
    clock = Sleeps()
    waited: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_arena, "time", clock)
        policy = Policy(route="shm", local_below=0, wait=1.0)
        with backend(policy=policy, capacity=2 * MIB, timeout=LONG) as group:
            dist.barrier()
            if rank == 1:
                hear(folder, "done0")
            for key in range(30):
                group.submit([(key, raw(key))])
                before = clock.now
                assert same(group.take(key, LONG), made(key))
                gc.collect()
                waited.append(clock.now - before)
            say(folder, f"done{rank}")
            dist.barrier()
            group.submit([("again", raw(1))])
            assert same(group.take("again"), made(1))
            dist.barrier()
            settled(group)
            routes = {route: n for route, (n, _) in group.stats().routes.items()}
            return waited, routes, dict(group.stats().fallbacks)


def test_a_rank_that_does_not_look_costs_one_wait(ranks: Ranks, tmp_path: Any) -> None:
    """Then what it has not opened is taken back, and nothing waits for it again."""
    (waited, routes, fallbacks), _ = ranks.run(2, fill_up, str(tmp_path))
    assert sum(seconds > 0.5 for seconds in waited) == 1, waited
    assert sum(waited) < 2.0, "patched time: nothing sleeps but for memory"
    assert (routes, fallbacks) == ({"shm": 31}, {}), "there is room for all"


# Memory and bytes.


def hold_all(rank: int, placement: str, control: str) -> dict[str, int]:
    """What ranks keep fills the arena: the rest goes without it, and all is well once they let go."""
    policy = Policy(route="shm", local_below=0, wait=0.01)
    with backend(placement, control, policy=policy, capacity=MIB, max_pending_bytes=1 << 30) as group:
        kept = []
        for key in range(20):
            group.submit([(key, raw(key))])
            kept.append(group.take(key))
            assert same(kept[-1], made(key))
        assert all(same(got, made(key)) for key, got in enumerate(kept))
        full = dict(group.stats().fallbacks)
        kept.clear()
        dist.barrier()
        settled(group)
        dist.barrier()
        for key in range(4):
            group.submit([(key, raw(key))])
            assert same(group.take(key), made(key))
            dist.barrier()
            settled(group)
        return {"full": full.get("full", 0), "again": dict(group.stats().fallbacks).get("full", 0)}


@every_way
def test_a_full_arena(ranks: Ranks, placement: str, control: str) -> None:
    for told in ranks.run(2, hold_all, placement, control):
        assert told["again"] == told["full"]
        assert told["full"] > 0


def damage(rank: int, what: str) -> tuple[bool, dict[str, int]]:
    """One rank cannot read what came, once: it makes it itself, and gives back what it did not open."""
    calls: list[int] = []

    def broken(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise LayoutError("damaged")
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, backend() as group:
        if what == "open" and rank == 1:
            patch.setattr(transport.Reader, "fetch", broken(transport.Reader.fetch))
        if what == "put" and rank == 0:
            patch.setattr(transport.Writer, "put", broken(transport.Writer.put))
        if what == "index" and rank == 0:
            patch.setattr(_entry, "index_of", lambda sents: "no index")
        group.submit([(key, raw(key)) for key in range(4)])
        told = take_all(group, range(4))
        # Rank 0 has its results before its index is made.
        dist.barrier()
        patch.undo()
        group.submit([(key, raw(key)) for key in range(4, 8)])
        told = take_all(group, range(4, 8)) and told
        dist.barrier()
        settled(group)
        return told, dict(group.stats().fallbacks)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("open", [{}, {"open": 1}]),
        ("put", [{"encode": 1}, {"encode": 1}]),
        ("index", [{}, {"open": 1}]),
    ],
)
def test_what_cannot_be_put_or_read_is_made_here(ranks: Ranks, what: str, expected: list[dict[str, int]]) -> None:
    assert ranks.run(2, damage, what) == [(True, each) for each in expected]


def no_index(rank: int, placement: str) -> tuple[bool, bool]:
    """There is room for the messages of a batch, and none for its index."""
    real = transport.Writer.put

    def put(self: transport.Writer, encoded: Any, **how: Any) -> Any:
        if not encoded.pieces:
            raise ArenaFull("this test")
        return real(self, encoded, **how)

    with pytest.MonkeyPatch.context() as patch, backend(placement) as group:
        patch.setattr(transport.Writer, "put", put)
        group.submit([(key, raw(key)) for key in range(6)])
        told = take_all(group, range(6))
        dist.barrier()
        settled(group)
        return told, Reason.FULL.name.lower() in group.stats().fallbacks


@pytest.mark.parametrize("placement", ["entry", "spread"])
def test_no_room_for_the_index_of_a_batch(ranks: Ranks, placement: str) -> None:
    assert all(told for told, _ in ranks.run(2, no_index, placement))


# Ranks that hand in something else.


def hand_in_another(rank: int, placement: str, control: str, what: str) -> tuple[bool, bool]:
    """One batch differs on one rank: no rank gives one key the object of another, and the next batch is as before."""
    with backend(placement, control, timeout=2.0) as group:
        keys: list[Any] = [0, 1, 2, 3]
        raws = {key: raw(key) for key in keys}
        if rank == 1 and what == "order":
            keys = [1, 0, 2, 3]
        elif rank == 1 and what == "keys":
            keys, raws = [5, 6, 7, 8], {key: raw(key) for key in (5, 6, 7, 8)}
        elif rank == 1 and what == "sizes":
            raws = {key: raw(key, SIZE + 100) for key in keys}
        size = SIZE + 100 if rank == 1 and what == "sizes" else SIZE
        group.submit([(key, raws[key]) for key in keys])
        own = all([same(group.take(key, LONG), made(key, size)) for key in keys])
        dist.barrier()
        group.submit([(key, raw(key)) for key in range(10, 14)])
        after = take_all(group, range(10, 14))
        dist.barrier()
        if control == "ring":
            settled(group)
        return own, after


@every_way
@pytest.mark.parametrize("what", ["order", "keys", "sizes"])
def test_a_batch_that_differs_is_nobody_elses(ranks: Ranks, placement: str, control: str, what: str) -> None:
    assert ranks.run(2, hand_in_another, placement, control, what) == [(True, True)] * 2


def late_header(rank: int) -> tuple[Any, bool]:
    """A header that comes when its batch was given up, and another one that takes its time."""
    with gate() as (fn, go), backend(fn=fn, timeout=1.0) as group:
        group.submit([("first", raw(100))])
        if rank == 1:
            go.set()
            assert same(group.take("first", LONG), made(100)), "it gives up, and runs fn"
            go.clear()
        dist.barrier()
        go.set()
        assert rank == 1 or same(group.take("first"), made(100))
        dist.barrier()
        for key in range(3):
            group.submit([(key, raw(key))])
            assert same(group.take(key), made(key))
            dist.barrier()
        late = group.stats().fallbacks.get("late", 0)
        settled(group)
        return late, "late" in group.stats().fallbacks


def test_a_rank_that_was_late_once_is_in_step_again(ranks: Ranks) -> None:
    assert ranks.run(2, late_header) == [(0, False), (1, True)]
