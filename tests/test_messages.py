"""What a person reads when something fails: what happened, where, how much, what to do. All is provoked for real."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import posix_ipc
import pytest
import torch

from shmcast import Admission, Broadcaster, Policy, Reader, SchedulerBackend, Writer
from shmcast._layout import MAX_TICKETS
from shmcast._segment import STEP
from shmcast.errors import (
    ArenaFull,
    ClosedError,
    LayoutError,
    MaterializeError,
    PeerDied,
    ShmcastError,
    StaleHandle,
    UnknownRequest,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.ranks import Ranks

SHM = Path("/dev/shm")
ROOT = Path(__file__).parent.parent
MIB = 1 << 20
RANK = 3
DEADLINE_SECONDS = 30.0


class Stage:
    """A writer of rank 3 for two readers, and reader 0 of it; names that end with the test."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.writer = self.make()
        self.reader = stack.enter_context(Reader(self.writer.address, 0))

    def make(self, capacity: int = 4 * MIB, readers: int = 2) -> Writer:
        return self.stack.enter_context(Writer(readers, capacity=capacity, policy=Policy(wait=0), rank=RANK))

    def path(self, end: str) -> Path:
        return SHM / f"{self.writer.address.stem[1:]}{end}"


@pytest.fixture
def stage() -> Iterator[list[Stage]]:
    """In a list, which is emptied before the look for leftovers: pytest keeps what a fixture gives."""
    with contextlib.ExitStack() as stack:
        stages = [Stage(stack)]
        yield stages
        stages.clear()
    gc.collect()


def big(size: int = MIB) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


# Memory.


def held(stage: Stage) -> None:
    kept = [stage.reader.open(stage.writer.publish(big(), readers=[0])) for _ in range(3)]
    stage.writer.publish(big())
    del kept


def not_mapped(stage: Stage) -> None:
    writer = stage.make(2 * STEP, readers=1)
    with Reader(writer.address, 0) as reader, reader._leases._lock:
        first = writer.empty((STEP // 2,), torch.uint8)
        try:
            writer.empty((STEP // 2,), torch.uint8)
        finally:
            del first


def too_many(stage: Stage) -> None:
    stage.writer.publish(1, readers=[0], opens=MAX_TICKETS)
    stage.writer.publish(2)


def larger_than_all(stage: Stage) -> None:
    stage.writer.empty((5 * MIB,), torch.uint8)


# Ends that are over.


def closed_writer(stage: Stage) -> None:
    stage.writer.close()
    stage.writer.publish(1)


def closed_reader(stage: Stage) -> None:
    handle = stage.writer.publish(1)
    stage.reader.close()
    stage.reader.open(handle)


def closed_broadcaster(stage: Stage) -> None:
    broadcaster = Broadcaster()
    broadcaster.close()
    broadcaster.broadcast(1)


def closed_backend(stage: Stage) -> None:
    backend = SchedulerBackend(fn=len)
    backend.close()
    backend.submit([])


def closed_admission(stage: Stage) -> None:
    admission = Admission(stage.writer, len)
    admission.close()
    admission.hold("x", [])


# Handles and indices.


def withdrawn(stage: Stage) -> None:
    handle = stage.writer.publish(1)
    stage.writer.withdraw(handle)
    stage.reader.open(handle)


def in_another_use(stage: Stage) -> None:
    handle = stage.writer.publish(1, readers=[0])
    stage.reader.discard(handle)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while stage.writer.stats().live_blocks and time.monotonic() < deadline:
        threading.Event().wait(0.001)
    stage.writer.publish(2)
    stage.reader.open(handle)


def for_others(stage: Stage) -> None:
    stage.reader.open(stage.writer.publish(1, readers=[1]))


def too_often(stage: Stage) -> None:
    handle = stage.writer.publish(1)
    stage.reader.open(handle)
    stage.reader.open(handle)


def of_another(stage: Stage) -> None:
    stage.reader.open(stage.make().publish(1))


def withdrawn_elsewhere(stage: Stage) -> None:
    stage.writer.withdraw(stage.make().publish(1))


def index_taken(stage: Stage) -> None:
    Reader(stage.writer.address, 0)


def index_used(stage: Stage) -> None:
    stage.reader.close()
    deadline, last = time.monotonic() + DEADLINE_SECONDS, StaleHandle("none")
    while time.monotonic() < deadline and "was there before" not in str(last):
        try:
            Reader(stage.writer.address, 0)
        except StaleHandle as error:  # until its thread has ended, it is alive
            last = error
    raise last


def no_such_index(stage: Stage) -> None:
    Reader(stage.writer.address, 2)


# Segments and semaphores.


def gone(stage: Stage) -> None:
    stage.writer.close()
    Reader(stage.writer.address, 1)


def no_semaphore(stage: Stage) -> None:
    posix_ipc.unlink_semaphore(stage.writer.address.posted(1))
    Reader(stage.writer.address, 1)


def wide_open(stage: Stage) -> None:
    stage.path("-c").chmod(0o644)
    Reader(stage.writer.address, 1)


def cut(stage: Stage) -> None:
    os.truncate(stage.path("-0"), 8192)
    Reader(stage.writer.address, 1)


def no_file(stage: Stage) -> None:
    stage.path("-c").unlink()
    os.mkfifo(stage.path("-c"), 0o600)
    try:
        Reader(stage.writer.address, 1)
    finally:
        stage.path("-c").unlink()


def taken_name(stage: Stage) -> None:
    token = os.urandom(16)
    path = SHM / f"shmcast-{token.hex()}-{RANK}-c"
    path.touch()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("secrets.token_bytes", lambda _: token)
            stage.make()
    finally:
        path.unlink()


# Requests.


def key_twice(stage: Stage) -> None:
    with SchedulerBackend(fn=len) as backend:
        backend.submit([("a", []), ("b", []), ("a", [])])


def taken_twice(stage: Stage) -> None:
    with SchedulerBackend(fn=len) as backend:
        backend.submit([("a", [])])
        backend.take("a")
        backend.take("a")


def never_submitted(stage: Stage) -> None:
    with SchedulerBackend(fn=len) as backend:
        backend.take("a")


def not_in_time(stage: Stage) -> None:
    going = threading.Event()
    with SchedulerBackend(fn=lambda raw: going.wait(DEADLINE_SECONDS), policy=Policy(local_below=0)) as backend:
        backend.submit([("a", big())])
        try:
            backend.take("a", timeout=0)
        finally:
            going.set()


def held_already(stage: Stage) -> None:
    with Admission(stage.writer, lambda raw: raw) as admission:
        admission.hold("a", [1])
        admission.hold("a", [1])


def no_slots(stage: Stage) -> None:
    stage.writer.announce(bytes(256))


WRITER = f"the writer of rank {RANK}"
READER = f"reader 0 of {WRITER}"
AGAIN = "an index is used once, so take another, or a new writer"
# How it is provoked, what is raised, and what must be in the message: what, where, how much, and what to do.
CASES: list[tuple[Callable[[Stage], None], type[Exception], list[str]]] = [
    (held, ArenaFull, ["no block of 1048768 bytes", f"rank {RANK}", "bytes free", "reader 0 holds 3", "raise it"]),
    (larger_than_all, ArenaFull, ["no block of 5242944 bytes", "no lease is held", "capacity of 4194304", "raise it"]),
    (not_mapped, ArenaFull, ["no block of", "segment 1 waits for readers [0]", "look whether they are stopped"]),
    (too_many, ArenaFull, [f"reader 0 holds {MAX_TICKETS} leases", "are the most", "drop or discard"]),
    (closed_writer, ClosedError, [f"{WRITER} was closed: make a new one"]),
    (closed_reader, ClosedError, [f"{READER} was closed: make a new one"]),
    (closed_broadcaster, ClosedError, ["this Broadcaster was closed: make a new one"]),
    (closed_backend, ClosedError, ["this SchedulerBackend was closed: make a new one"]),
    (closed_admission, ClosedError, ["this Admission was closed: make a new one"]),
    (withdrawn, StaleHandle, [READER, "in segment 0", "was withdrawn by its writer", "published again"]),
    (in_another_use, StaleHandle, [READER, "in segment 0", "in another use", "published again"]),
    (for_others, StaleHandle, [READER, "not for reader 0", "readers=[0, ...]"]),
    (too_often, StaleHandle, [READER, "used up its 1 leases", "in segment 0", "more opens"]),
    (of_another, LayoutError, ["a handle of another writer", f"rank {RANK}, token", "open or discard it with"]),
    (withdrawn_elsewhere, LayoutError, ["a handle of another writer", f"rank {RANK}, token", "withdraw it with"]),
    (index_taken, StaleHandle, [READER, "is alive", AGAIN]),
    (index_used, StaleHandle, [READER, "closed or has died", AGAIN]),
    (no_such_index, ValueError, ["index=2", "readers 0 to 1"]),
    (gone, PeerDied, ["no segment /shmcast-", f"rank {RANK}, its writer", "--ipc", "make a new writer"]),
    (no_semaphore, PeerDied, ["no semaphore /shmcast-", "-p1", "make a new one"]),
    (wide_open, LayoutError, ["-c belongs to uid", "mode 644", f"uid {os.geteuid()} and mode 600", "as one user"]),
    (cut, LayoutError, ["-0 has 8192 bytes", "says 4194304", "damaged, make a new writer"]),
    (no_file, LayoutError, ["-c is not a regular file", f"uid {os.geteuid()}", "remove it"]),
    (taken_name, FileExistsError, [f"-{RANK}-c'", "somebody took it", "make a new writer"]),
    (key_twice, ValueError, ["in the batch twice", "'a'", "two batches"]),
    (taken_twice, UnknownRequest, ["'a' was taken already"]),
    (never_submitted, UnknownRequest, ["no request 'a' was submitted"]),
    (not_in_time, TimeoutError, ["'a'", "within 0 s", "take it again, or abort it"]),
    (held_already, ValueError, ["'a' is held already", "abort it first"]),
    (no_slots, ShmcastError, [WRITER, "no slots", "slots=1024"]),
]


@pytest.mark.faults
@pytest.mark.parametrize(("provoke", "kind", "pieces"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_message_says_what_where_and_what_to_do(
    stage: list[Stage], provoke: Callable[[Stage], None], kind: type[Exception], pieces: list[str]
) -> None:
    said = ""
    try:
        provoke(stage[0])
    except kind as error:
        said = str(error)
        error.__traceback__ = None
    assert [piece for piece in pieces if piece not in said] == [], said
    same = [other for name, _, other in CASES if name is not provoke and all(piece in said for piece in other)]
    same = [other for other in same if not all(any(piece in mine for mine in pieces) for piece in other)]
    assert same == [], f"another cause reads the same: {said}"


def log_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.faults
def test_a_segment_that_cannot_be_mapped_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with (
        Writer(1, capacity=2 * STEP, policy=Policy(wait=0), rank=RANK) as writer,
        Reader(writer.address, 0) as reader,
    ):
        with reader._leases._lock:
            first = writer.empty((STEP // 2,), torch.uint8)
            with pytest.raises(ArenaFull):
                writer.empty((STEP // 2,), torch.uint8)
            (SHM / f"{writer.address.stem[1:]}-1").unlink()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not caplog.records and time.monotonic() < deadline:
            threading.Event().wait(0.001)
        del first
    said = log_of(caplog)
    for piece in (READER, "cannot map segment 1", "used no more", f"-{RANK}-1", "make a new writer"):
        assert piece in said, said


@pytest.mark.multiprocess
def test_a_forked_child_is_told_whose_the_ends_are() -> None:
    program = """
    import os, sys, warnings
    warnings.simplefilter("ignore")
    from shmcast import Admission, Broadcaster, ClosedError, Reader, SchedulerBackend, Writer
    writer = Writer(1, capacity=1 << 20, rank=3)
    reader = Reader(writer.address, 0)
    handle = writer.publish(1)
    ends = [Broadcaster(), SchedulerBackend(fn=len), Admission(writer, len)]
    uses = [lambda: writer.publish(1), lambda: reader.open(handle), lambda: ends[0].broadcast(1),
            lambda: ends[1].submit([]), lambda: ends[2].hold(1, None)]
    print(os.getpid(), flush=True)
    pid = os.fork()
    if not pid:
        for use in uses:
            try:
                use()
            except ClosedError as error:
                print(error)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
    print(pid)
    for end in (*ends, reader, writer):
        end.close()
    """
    pid, *said, child = run(program).splitlines()
    whose = f"belongs to process {pid}, from which this one, {child}, was forked: make one after the fork"
    ends = [WRITER, READER, "this Broadcaster", "this SchedulerBackend", "this Admission"]
    assert said == [f"{end} {whose}" for end in ends]


def run(program: str, *prefix: str) -> str:
    command = [*prefix, sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.faults
def test_a_full_machine_says_what_is_full_and_how_to_make_it_larger() -> None:
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    mount = 'mount -t tmpfs -o size=80m,mode=1777 tmpfs /dev/shm && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix[:4], mount.replace('"$@"', "true")], capture_output=True).returncode:
        pytest.skip("no mount namespace")
    program = """
    import json
    import torch
    from shmcast import ArenaFull, Policy, Writer
    said = []
    with Writer(1, capacity=256 << 20, policy=Policy(wait=0), rank=3) as writer:
        for make in (lambda: writer.empty((70 << 20,), torch.uint8), lambda: Writer(1, capacity=64 << 20)):
            try:
                make()
            except ArenaFull as error:
                said.append(str(error))
    print(json.dumps(said))
    """
    growing, making = json.loads(run(program, *prefix))
    for piece in ("no block of 73400384 bytes", "rank 3", "-3-1: ", "/dev/shm leaves", "--shm-size", "lower capacity"):
        assert piece in growing, growing
    for piece in ("-0-0: ", "of 67108864 bytes more are wanted", "/dev/shm leaves", "--shm-size", "lower capacity"):
        assert piece in making, making


# Groups.


class Said(logging.Handler):
    """What the logger of the library says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def raises(raw: object) -> object:
    raise KeyError("this one")


def troubles(rank: int) -> dict[str, str]:
    """What this rank is told in groups where something is wrong with rank 1, or with a request."""
    handler, told = Said(), {}
    log = logging.getLogger("shmcast")
    log.addHandler(handler)
    try:
        for name, policy, environment in (
            ("disabled", Policy(), {"SHMCAST_DISABLE": "1"} if rank == 1 else {}),
            ("differs", Policy(threshold=rank), {}),
        ):
            with pytest.MonkeyPatch.context() as patch:
                for key, value in environment.items():
                    patch.setenv(key, value)
                Broadcaster(policy=policy).close()
            told[name] = " ".join(handler.lines)
            handler.lines.clear()
        try:
            Broadcaster(src=rank * 7)
        except (ShmcastError, ValueError) as error:
            told["wrong"] = str(error)
        with Broadcaster(policy=Policy(peers_hold_raw=False)) as bc:
            try:
                bc.materialize(1, fn=raises)
            except (MaterializeError, KeyError) as error:
                told["raised"] = str(error)
        with Broadcaster(policy=Policy(wait=0), capacity=4 * MIB) as bc:
            bc.materialize({"x": big(8 * MIB)}, fn=lambda raw: raw["x"] + 1)
            told["full"] = " ".join(handler.lines)
    finally:
        log.removeHandler(handler)
    return told


DISABLED = ["SHMCAST_DISABLE is set on rank 1", "unset it there"]
DIFFERS = ["rank 1 was made with other settings than rank 0", "pass the same"]
GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "disabled": (DISABLED, DISABLED),
    "differs": (DIFFERS, DIFFERS),
    "wrong": (["rank 1 was made with wrong arguments", "src=7"], ["src=7", "0 to 1"]),
    "raised": (["this one"], ["fn raised on rank 0, the entry rank", "KeyError", "this one"]),
    "full": (
        ["fallback (full)", "no block of 8388", "rank 0", "capacity of 4194304", "raise it"],
        ["fallback (full)", "the entry rank, rank 0, says", "no block of 8388"],
    ),
}


@pytest.mark.multiprocess
def test_what_is_wrong_in_a_group_is_said_on_every_rank(ranks: Ranks) -> None:
    told: list[dict[str, Any]] = ranks.run(2, troubles)
    for name, wanted in GROUPS.items():
        for rank, pieces in enumerate(wanted):
            assert [piece for piece in pieces if piece not in told[rank][name]] == [], f"{rank}: {told[rank][name]}"
