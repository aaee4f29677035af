"""Every end, killed at every point of its life: the others end with what is right or with a named error, and all is
taken back.

A case is a scene, who dies, and where. A scene is what each rank does; it tells for each request what came of it:
`right`, or the error. Wrong bytes fail the case. `MATRIX_ROUNDS=20` runs every case that often; without it each point
has one turn, not several.
"""

import gc
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shmcast import Admission, Broadcaster, Policy, Reader, SchedulerBackend, Writer, _arena, _reclaim
from shmcast._points import Point
from shmcast.errors import PeerDied, ShmcastError
from tests.support.fates import LEFT, Fate, How, end
from tests.support.ranks import Died, Ranks
from tests.test_broadcaster import warned

pytestmark = [pytest.mark.multiprocess, pytest.mark.faults]

RANKS = 3
ROUNDS = int(os.environ.get("MATRIX_ROUNDS", "0"))
STEP = 1 << 20
SMALL, BIG = 200 << 10, 5 * STEP // 2
REQUESTS = 12
GROWING = (3, 4, 5)
BATCH = 4
TIMEOUT, BRIEF = 3.0, 1.0
DEADLINE_SECONDS = 45.0
POLICY = Policy(route="shm", wait=TIMEOUT, local_below=0)
RIGHT = "right"
# How long ranks of a group wait for each other: of this process, set for each case.
SECONDS = [TIMEOUT]

Fates = dict[int, Fate]
Scene = Callable[[int, Any, Path], list[str]]


@pytest.fixture(scope="module")
def forked() -> Iterator[Ranks]:
    with Ranks(kept=True, forked=True) as pool:
        yield pool


def until(condition: Callable[[], bool]) -> None:
    deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "only a bug makes the deadline pass"
        never.wait(0.001)


# What ranks do.


def make(seed: int) -> dict[str, Any]:
    """What `fn` makes of a request: the raw inputs are its number."""
    return {"seed": seed, "tensor": torch.full((BIG if seed in GROWING else SMALL,), seed + 1, dtype=torch.uint8)}


def judge(got: Any, seed: int) -> str:
    made = make(seed)
    assert got["seed"] == seed
    assert torch.equal(got["tensor"], made["tensor"]), f"wrong bytes in request {seed}"
    return RIGHT


def attempt(run: Callable[[], str]) -> str:
    """What came of a request; only errors of ours have a name."""
    try:
        return run()
    except ShmcastError as error:
        return type(error).__name__


def given_back(end: Broadcaster | SchedulerBackend | Writer) -> bool:
    return not any(lease.held for lease in end.stats().leases if lease.alive is False)


def collective(rank: int, reached: Any, control: str) -> list[str]:
    """A `Broadcaster`; the last two results are held."""
    try:
        group = Broadcaster(control=control, capacity=24 * STEP, policy=POLICY, timeout=SECONDS[0], reached=reached)
    except ShmcastError as error:
        return [type(error).__name__]
    held: deque[tuple[int, Any]] = deque(maxlen=2)

    def materialize(seed: int) -> str:
        held.append((seed, group.materialize(seed, make)))
        return judge(held[-1][1], seed)

    with group:
        told = [attempt(partial(materialize, seed)) for seed in range(REQUESTS)]
        until(lambda: given_back(group))
    assert all(judge(got, seed) for seed, got in held)
    return told


def group(rank: int, reached: Any, folder: Path) -> list[str]:
    return collective(rank, reached, "group")


def ring(rank: int, reached: Any, folder: Path) -> list[str]:
    return collective(rank, reached, "ring")


def scheduled(reached: Any, placement: Any, control: Any) -> list[str]:
    """A `SchedulerBackend`, batches of four."""
    try:
        backend = SchedulerBackend(
            fn=make,
            placement=placement,
            control=control,
            capacity=24 * STEP,
            policy=POLICY,
            timeout=SECONDS[0],
            reached=reached,
        )
    except ShmcastError as error:
        return [type(error).__name__]
    told = []
    with backend:
        for first in range(0, REQUESTS, BATCH):
            seeds = range(first, first + BATCH)
            backend.submit([(seed, seed) for seed in seeds])
            held = [(seed, backend.take(seed)) for seed in seeds]
            told += [judge(got, seed) for seed, got in held]
        until(lambda: given_back(backend))
    assert all(judge(got, seed) for seed, got in held)
    return told


def entry(rank: int, reached: Any, folder: Path) -> list[str]:
    return scheduled(reached, "entry", "ring")


def spread(rank: int, reached: Any, folder: Path) -> list[str]:
    return scheduled(reached, "spread", "ring")


def gathered(rank: int, reached: Any, folder: Path) -> list[str]:
    return scheduled(reached, "spread", "group")


def state_of(pid: int) -> str:
    """One letter of the kernel's: T for stopped, Z for dead."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def is_gone(folder: Path, rank: int) -> bool:
    """Whether a reader has done its part, or is dead."""
    if (folder / f"done-{rank}").exists():
        return True
    if not (folder / f"pid-{rank}").exists():
        return False
    try:
        return state_of(int((folder / f"pid-{rank}").read_text())) in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def say(folder: Path, name: str, what: bytes = b"") -> None:
    """Whole or not at all: whoever says it may be killed in the middle."""
    (folder / f".{name}").write_bytes(what)
    (folder / f".{name}").rename(folder / name)


def hear(folder: Path, name: str) -> bytes | None:
    """What rank 0 says; None where it is gone."""
    until(lambda: (folder / name).exists() or is_gone(folder, 0))
    return (folder / name).read_bytes() if (folder / name).exists() else None


def ends(rank: int, reached: Any, folder: Path, write: Any) -> list[str]:
    """A writer, and readers that hear of messages by its header ring; no process group."""
    say(folder, f"pid-{rank}", str(os.getpid()).encode())
    if rank == 0:
        with Writer(RANKS - 1, capacity=24 * STEP, policy=POLICY, slots=64, reached=reached) as writer:
            say(folder, "address", pickle.dumps(writer.address))
            told: list[str] = write(writer)
            until(lambda: all(is_gone(folder, other) for other in range(1, RANKS)) and given_back(writer))
        return told
    address = hear(folder, "address")
    told = [] if address is None else read(pickle.loads(address), rank - 1, reached)
    say(folder, f"done-{rank}")
    return told


def read(address: Any, index: int, reached: Any) -> list[str]:
    try:
        reader = Reader(address, index, reached=reached)
    except PeerDied:
        return ["PeerDied"]
    held: deque[tuple[int, Any]] = deque(maxlen=2)
    told: list[str] = []

    def take() -> str:
        header = reader.next_header(TIMEOUT)
        if header is None:
            return "skipped"
        seed, handle = pickle.loads(header)
        held.append((seed, reader.open(handle)))
        return judge(held[-1][1], seed)

    with reader:
        while len(told) < REQUESTS and "PeerDied" not in told:
            told.append(attempt(take))
    assert all(judge(got, seed) for seed, got in held)
    return told


def alone(rank: int, reached: Any, folder: Path) -> list[str]:
    """`publish` and `announce`."""

    def write(writer: Writer) -> list[str]:
        told = []
        for seed in range(REQUESTS):
            handle = writer.publish(make(seed))
            writer.announce(pickle.dumps((seed, handle)).ljust(256, b"\0"))
            told.append(RIGHT)
        return told

    return ends(rank, reached, folder, write)


def admission(rank: int, reached: Any, folder: Path) -> list[str]:
    """`Admission` makes and publishes; what is ready goes on."""

    def write(writer: Writer) -> list[str]:
        told = 0
        with Admission(writer, make, workers=1) as admitted:
            for seed in range(REQUESTS):
                admitted.hold(seed, seed)
            while told < REQUESTS:
                for seed, handle in admitted.ready(TIMEOUT):
                    assert handle is not None
                    writer.announce(pickle.dumps((seed, handle)).ljust(256, b"\0"))
                    told += 1
        return [RIGHT] * told

    return ends(rank, reached, folder, write)


def play(rank: int, scene: Scene, fates: Fates, folder: str, timeout: float = TIMEOUT) -> list[str]:
    setattr(_arena, "STEP", STEP)  # noqa: B010
    SECONDS[:] = [timeout]
    mine, here = fates.get(rank), os.getpid()
    # Nobody dies while others still connect: that is gloo's to bear.
    say(Path(folder), f"in-{rank}")
    until(lambda: all((Path(folder) / f"in-{other}").exists() for other in range(RANKS)))
    if mine:
        mine.prepare()
    try:
        with warned() as lines:
            told = scene(rank, mine or (lambda _: None), Path(folder))
    except SystemExit as left:
        end(left.code if isinstance(left.code, int) else 1)
    finally:
        if os.getpid() != here:
            traceback.print_exc()
            os._exit(1)
    if any(fate.how == "fork" for fate in fates.values()):
        assert not lines, f"nobody falls back for a fork: {lines}"
        assert not (mine and mine.child), "a forked child ended badly"
    gc.collect()
    say(Path(folder), f"over-{rank}")
    return told


# Who dies, and where.

IN_GROUPS = (group, ring, entry, spread, gathered)
SCENES = (*IN_GROUPS, alone, admission)
BY_RING = (ring, entry, spread, alone, admission)
WRITERS = (
    *(Fate(Point.CREATED, nth) for nth in (1, 2)),
    *(Fate(Point.GROWN, nth) for nth in (1, 2)),
    *(Fate(point, nth) for point in (Point.RESERVED, Point.COPYING, Point.WRITTEN, Point.GRANTED) for nth in (1, 3)),
    *(Fate(Point.UNLINKING, nth) for nth in (1, 2)),
    Fate(Point.SENT, 2),
    Fate(Point.POSTING, 2),
    Fate(Point.JOINING),
)
READERS = (
    Fate(Point.SEATED),
    *(Fate(Point.MAPPED, nth) for nth in (1, 2)),
    *(Fate(Point.RECEIVED, nth) for nth in (1, 3)),
    *(Fate(Point.TAKEN, nth) for nth in (1, 3)),
    *(Fate(Point.TELLING, nth) for nth in (1, 2, 5)),
    *(Fate(Point.RELEASING, nth) for nth in (1, 2)),
    Fate(Point.LEAVING),
    Fate(Point.JOINING),
)


# How else a process may end, and its exit code then.
OTHER_ENDS: dict[How, int] = {
    "term": -signal.SIGTERM,
    "leave": LEFT,
    "fork": 0,
    "orphan": -signal.SIGKILL,
}

# What may be in a constructor still.
EARLY = {
    *(Point.CREATED, Point.GROWN, Point.UNLINKING),
    *(Point.SEATED, Point.MAPPED, Point.TELLING, Point.JOINING),
}


def happens(scene: Scene, fate: Fate) -> bool:
    """Whether a scene comes to that point at all."""
    if fate.point in (Point.SENT, Point.RECEIVED, Point.JOINING):
        return scene in IN_GROUPS
    return fate.point is not Point.POSTING or scene in BY_RING


def tried(fates: tuple[Fate, ...]) -> tuple[Fate, ...]:
    return fates if ROUNDS else tuple({fate.point: fate for fate in fates}.values())


def cases() -> Iterator[Any]:
    """Without rounds, each point of each role in every third scene: those that lie side by side share most of it."""
    every = list(every_case())
    yield from every if ROUNDS else every[::3]


def every_case() -> Iterator[Any]:
    writers, readers = tried(WRITERS), tried(READERS)
    for scene in SCENES:
        for victim, fates in ((0, writers), (RANKS - 1, readers)):
            for fate in fates:
                if happens(scene, fate):
                    role = "reader" if victim else "writer"
                    yield pytest.param(scene, {victim: fate}, id=f"{scene.__name__}-{role}-{fate}")
        for number, fate in enumerate(writers):
            other = readers[number % len(readers)]
            if happens(scene, fate) and happens(scene, other):
                fates_of_all = {0: fate, **dict.fromkeys(range(1, RANKS), other)}
                yield pytest.param(scene, fates_of_all, id=f"{scene.__name__}-all-{fate}-{other}")


def names() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if "shmcast-" in name]


@pytest.mark.parametrize("lap", range(max(1, ROUNDS)))
@pytest.mark.parametrize(("scene", "fates"), list(cases()))
def test_whoever_dies_wherever_the_others_end_well(
    forked: Ranks, tmp_path: Path, scene: Scene, fates: Fates, lap: int
) -> None:
    everyone = len(fates) == RANKS
    # Where all are to die, some may not come so far.
    dies, may_die = ((), fates) if everyone else (fates, ())
    round = forked.start(RANKS, play, scene, fates, str(tmp_path), dies=dies, may_die=may_die)
    try:
        results = round.results(DEADLINE_SECONDS)
    finally:
        left = names()
        _reclaim.sweep()
    for rank, told in enumerate(results):
        if isinstance(told, Died):
            assert rank in fates
            assert told.exitcode == -signal.SIGKILL
        else:
            check_survivor(scene, fates, rank, told)
    if not any(rank in fates for rank in (range(RANKS) if scene in (spread, gathered) else [0])):
        assert not left, "a writer that lives leaves nothing to sweep"


def check_survivor(scene: Scene, fates: Fates, rank: int, told: list[str]) -> None:
    early = any(fate.point in EARLY and fate.nth <= 2 for fate in fates.values())
    # Its own group is connected rank by rank: one may be at work, and die, before another one is through.
    early = early or scene is gathered
    if scene in (group, ring) and 0 in fates and fates[0].how == "leave" and "MaterializeError" in told:
        # The call in the middle of which the entry rank left ends with that for all.
        told[told.index("MaterializeError")] = RIGHT
    if scene in IN_GROUPS:
        # All hold raw: once there is a group, every request is there, whatever happens to others.
        assert told == [RIGHT] * REQUESTS or (early and told in (["ShmcastError"], ["ControlBroken"])), told
    elif 0 in fates:
        assert told in ([], [RIGHT] * REQUESTS, *([RIGHT] * n + ["PeerDied"] for n in range(REQUESTS))), told
    else:
        assert told == [RIGHT] * REQUESTS


def other_ends() -> Iterator[Any]:
    """As `cases`, for one that does not die of SIGKILL; without rounds, at each point of one scene only."""
    for how in OTHER_ENDS:
        for victim, fates in ((0, tried(WRITERS)), (RANKS - 1, tried(READERS))):
            for number, fate in enumerate(fates if ROUNDS or how != "term" else fates[::4]):
                scenes = [scene for scene in (SCENES if ROUNDS else (group, spread)) if happens(scene, fate)]
                for scene in scenes if ROUNDS else [scenes[number % len(scenes)]]:
                    role = "reader" if victim else "writer"
                    name = f"{how}-{scene.__name__}-{role}-{fate}"
                    yield pytest.param(scene, victim, replace(fate, how=how), id=name)


@contextmanager
def orphanage(fifo: Path) -> Iterator[Callable[[], bool]]:
    """Orphans live as long as this does. What it gives tells whether there is any."""
    os.mkfifo(fifo)
    early = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    holder = os.open(fifo, os.O_WRONLY)
    os.close(early)

    def inhabited() -> bool:
        try:
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    try:
        yield inhabited
    finally:
        os.close(holder)
        until(lambda: not inhabited())


@pytest.mark.parametrize("lap", range(max(1, ROUNDS)))
@pytest.mark.parametrize(("scene", "victim", "fate"), list(other_ends()))
def test_who_leaves_or_forks_anywhere_leaves_others_and_names_in_order(
    forked: Ranks, tmp_path: Path, scene: Scene, victim: int, fate: Fate, lap: int
) -> None:
    fates = {} if fate.how == "fork" else {victim: fate}
    dies, may_die = (fates, ()) if fate.how in ("term", "orphan") else ((), fates)
    with orphanage(tmp_path / "lives") as inhabited:
        mine = {victim: replace(fate, lives=str(tmp_path / "lives"))}
        # Python ignores what a handler raises in a finalizer: the process stays, and what that was to give back.
        check = fate.how != "leave"
        # A child takes its time on a busy machine, and nobody is to fall back for it.
        timeout = DEADLINE_SECONDS if fate.how == "fork" else TIMEOUT
        round = forked.start(RANKS, play, scene, mine, str(tmp_path), timeout, dies=dies, may_die=may_die, check=check)
        try:
            results = round.results(DEADLINE_SECONDS)
        finally:
            left = names()
            _reclaim.sweep()
        assert not names(), "a child that lives keeps no name from being swept"
        assert inhabited() == (fate.how == "orphan")
    for rank, told in enumerate(results):
        if isinstance(told, Died):
            assert told.exitcode == OTHER_ENDS[fate.how]
        else:
            check_survivor(scene, fates, rank, told)
    if fate.how in ("fork", "leave"):
        assert not left, "nobody was killed"


STOPPED = [
    (0, Fate(Point.GRANTED, 2, "stop")),
    (RANKS - 1, Fate(Point.TAKEN, 2, "stop")),
    (RANKS - 1, Fate(Point.RECEIVED, 2, "stop")),
]


def stops() -> Iterator[Any]:
    """Without rounds, each scene once."""
    for number, scene in enumerate(IN_GROUPS):
        for victim, fate in STOPPED if ROUNDS else [STOPPED[number % len(STOPPED)]]:
            yield pytest.param(scene, victim, fate, id=f"{scene.__name__}-{victim}-{fate}")


@pytest.mark.parametrize(("scene", "victim", "fate"), list(stops()))
def test_who_is_stopped_for_longer_than_any_timeout_is_not_dead(
    forked: Ranks, tmp_path: Path, scene: Scene, victim: int, fate: Fate
) -> None:
    round = forked.start(RANKS, play, scene, {victim: fate}, str(tmp_path), BRIEF)
    others = [rank for rank in range(RANKS) if rank != victim]
    try:
        until(lambda: all((tmp_path / f"over-{rank}").exists() for rank in others))
        assert state_of(round.pids[victim]) == "T"
    finally:
        os.kill(round.pids[victim], signal.SIGCONT)
    assert round.results(DEADLINE_SECONDS) == [[RIGHT] * REQUESTS] * RANKS
    assert not names()
