"""Small and hostile worlds: the right object by a fallback, or an error that names the cause; no hang, nothing left."""

import errno
import os
import re
import resource
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast import Broadcaster, Policy, Route, _arena, _named, _room, _segment
from shmcast._peers import WRITER_BYTE, is_taken
from shmcast._wire import Address
from shmcast.admission import Admission
from shmcast.errors import ArenaFull, ShmcastError
from shmcast.scheduler import SchedulerBackend
from shmcast.transport import Reader, Writer
from tests.support.forks import ForkFailed, fork, fork_each
from tests.support.leaks import Snapshot, wait_until_clean
from tests.support.ranks import Ranks
from tests.support.worlds import SHM, NoWorld, World, address_space, few_descriptors, limited
from tests.test_broadcaster import double, payload, until, warned
from tests.test_room import group as cgroup

pytestmark = [pytest.mark.multiprocess, pytest.mark.faults]

MIB = 1 << 20
SIZE = 100_000
HURRY = Policy(wait=0.05)
TINY = World("size=1m")
SMALL = World("size=64m")
HUGE = World("size=64m,huge=always")
ABSENT = World("none")
READ_ONLY = World("size=64m", read_only=True)
STRANGER = World(nobody=True)
HERE = World()
NOFILE, FSIZE = resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE


# How a test gets there.


def live(world: World, function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns in that world, after which nothing of it may be left; or that there is no such world."""

    def inhabit() -> Any:
        torch.set_num_threads(1)
        world.enter()
        before = Snapshot.take() if world.shm != "none" else None
        told = function(*args)
        left = before and wait_until_clean(before)
        assert not left, left
        return told

    try:
        return fork(inhabit)
    except ForkFailed as error:
        refused = re.search("NoWorld: (.*)", str(error))
        if refused is None:
            raise
        return NoWorld(refused[1])


def there(ranks: Ranks, world: World, function: Callable[..., Any], *args: Any) -> Any:
    """`live`, from a process that can fork."""
    [told] = ranks.start_each(live, [(world, function, *args)], check=False).results()
    if isinstance(told, NoWorld):
        pytest.skip(f"no such world here: {told}")
    return told


def refusal(use: Callable[[], object]) -> str:
    """The class and the text of the error that `use` raises."""
    try:
        use()
    except (ShmcastError, OSError) as error:
        return f"{type(error).__name__} {getattr(error, 'errno', None)}: {error}"
    raise AssertionError("nothing was refused")


@contextmanager
def small_steps() -> Iterator[None]:
    """The arena begins with 1 MiB and grows by as much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_arena, "STEP", MIB)
        yield


def use(writer: Writer, size: int = SIZE) -> bool:
    with Reader(writer.address, 0) as reader:
        return torch.equal(reader.open(writer.publish(payload(1, size))), payload(1, size))  # type: ignore[arg-type]


# The size of /dev/shm, and what else may be wrong with it.


def fits(size: int) -> tuple[bool, str]:
    """A message that fits, and one that does not."""
    with Writer(1, policy=HURRY) as writer:
        return use(writer, size), refusal(lambda: writer.publish(payload(1, 20 * MIB)))


@pytest.mark.parametrize(
    ("world", "size"),
    [(TINY, SIZE), (SMALL, 8 * MIB), (HUGE, SIZE), (HUGE, 8 * MIB)],
    ids=["1 MiB", "64 MiB", "64 MiB of huge pages, a small message", "64 MiB of huge pages"],
)
def test_a_small_shm_takes_what_fits(ranks: Ranks, world: World, size: int) -> None:
    whole, text = there(ranks, world, fits, size)
    assert whole
    assert text.startswith("ArenaFull None: no block of 2097")
    assert "bytes free" in text
    assert "the capacity of" in text


def asks_too_much() -> str:
    return refusal(lambda: Writer(1, capacity=256 * MIB))


def test_a_capacity_beyond_a_small_shm_is_refused_with_the_figures(ranks: Ranks) -> None:
    text = there(ranks, SMALL, asks_too_much)
    assert text.startswith("ArenaFull")
    assert f"{64 * MIB} of {64 * MIB} bytes more are wanted, {SHM} leaves " in text
    assert text.endswith("or pass a lower capacity")


def grows_too_large() -> tuple[str, bool]:
    with small_steps(), Writer(1, capacity=64 * MIB, policy=HURRY) as writer:
        text = refusal(lambda: writer.publish(payload(1, 10 * MIB)))
        return text, use(writer)


def test_growth_beyond_shm_is_refused_and_the_writer_goes_on(ranks: Ranks) -> None:
    text, whole = there(ranks, World("size=8m"), grows_too_large)
    assert text.startswith("ArenaFull")
    assert f"{SHM} leaves " in text
    assert whole


def no_writer() -> str:
    return refusal(lambda: Writer(1, capacity=MIB))


@pytest.mark.parametrize(
    ("world", "says"),
    [
        (ABSENT, f"ArenaFull None: .*there is no {SHM}; [0-9]+ bytes are wanted: mount a tmpfs there"),
        (READ_ONLY, f"OSError {errno.EROFS}: .*Read-only file system: '{SHM}/shmcast-"),
        (
            World("size=16k"),
            f"ArenaFull None: .*of [0-9]+ bytes more are wanted, {SHM} leaves 16384; make {SHM} larger",
        ),
        (World("nr_inodes=1"), f"OSError {errno.ENOSPC}: .*No space left on device: '{SHM}/shmcast-"),
        (World("nr_inodes=3"), f"OSError {errno.ENOSPC}: .*No space left on device: '{SHM}/sem.shmcast-"),
        (World(limits={FSIZE: 4096}), "ArenaFull None: .*bytes are wanted, RLIMIT_FSIZE allows a file 4096: raise it"),
    ],
    ids=["none", "read-only", "16 KiB", "no name left", "two names left", "small files"],
)
def test_a_world_without_shared_memory_says_why(ranks: Ranks, world: World, says: str) -> None:
    assert re.match(says, there(ranks, world, no_writer))


def ends_by_sigxfsz() -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with limited(FSIZE, MIB):
        return refusal(lambda: Writer(1, capacity=4 * MIB))


def test_a_limit_on_files_kills_nobody(ranks: Ranks) -> None:
    assert f"{4 * MIB} bytes are wanted, RLIMIT_FSIZE allows a file {MIB}" in there(ranks, HERE, ends_by_sigxfsz)


# Descriptors, address space, locked memory, a cgroup.


def count_descriptors(world: str) -> list[str]:
    """With none to spare, then with one, two, three: what each gives, until all works."""
    told: list[str] = []
    before = Snapshot.take()
    for free in range(40):
        with few_descriptors(free):
            told.append(ENDS[world]())
        left = wait_until_clean(before)
        assert not left, (free, left)
        if told[-1] == "works":
            break
    return told


def make_writer() -> str:
    try:
        with Writer(1, capacity=MIB, slots=4):
            return "works"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except ArenaFull as error:
        return "ArenaFull" if "Too many open files" in str(error) else str(error)


def make_reader() -> str:
    with limited(NOFILE, 1000):
        writer = Writer(1, capacity=MIB, slots=4)
    try:
        with Reader(writer.address, 0):
            return "works"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        writer.close()


ENDS = {"writer": make_writer, "reader": make_reader}


@pytest.mark.parametrize("end", ENDS)
def test_with_few_descriptors_an_end_is_refused_or_works(ranks: Ranks, end: str) -> None:
    *refused, last = there(ranks, HERE, count_descriptors, end)
    assert last == "works"
    assert len(refused) > 3
    assert set(refused) <= {"EMFILE", "ArenaFull"}


def grow_without_descriptors() -> tuple[str, bool]:
    # A wait that is long enough for the reader to map the new segment.
    with small_steps(), Writer(1, capacity=64 * MIB, policy=Policy(wait=1.0)) as writer:
        with few_descriptors(0):
            text = refusal(lambda: writer.publish(payload(1, 2 * MIB)))
        return text, use(writer, 2 * MIB)


def test_growth_without_descriptors_is_refused_until_there_are_some(ranks: Ranks) -> None:
    text, whole = there(ranks, HERE, grow_without_descriptors)
    assert text.startswith("ArenaFull")
    assert "Too many open files" in text
    assert whole


def fork_without_descriptors() -> tuple[bool, bool]:
    """A child that finds no descriptor to look with still gives its parent's locks up."""
    ended, ready = os.pipe(), os.pipe()
    with Writer(1, capacity=MIB) as writer:
        control = os.open(f"/proc/self/fd/{writer._arena._control.fd}", os.O_RDWR)
        with few_descriptors(0):
            child = os.fork()
            if child == 0:
                os.write(ready[1], b".")
                os.read(ended[0], 1)
                os._exit(0)
        os.read(ready[0], 1)
        held = is_taken(control, WRITER_BYTE)
    free = not is_taken(control, WRITER_BYTE)
    os.close(control)
    os.write(ended[1], b".")
    os.waitpid(child, 0)
    for fd in (*ended, *ready):
        os.close(fd)
    return held, free


def test_a_child_forked_without_descriptors_keeps_no_lock(ranks: Ranks) -> None:
    assert there(ranks, HERE, fork_without_descriptors) == (True, True)


def short_of_memory(more: int) -> str:
    with limited(resource.RLIMIT_AS, address_space() + more):
        return refusal(lambda: Writer(1, capacity=64 * MIB))


def test_without_address_space_there_is_no_writer(ranks: Ranks) -> None:
    assert there(ranks, HERE, short_of_memory, 16 * MIB).startswith(f"OSError {errno.ENOMEM}")


def no_room_for_a_stack() -> tuple[bool, str]:
    """A writer does without its thread; a reader cannot."""
    threading.stack_size(64 * MIB)
    with limited(resource.RLIMIT_AS, address_space() + 32 * MIB), Writer(1, capacity=MIB) as writer:
        writer.publish(payload(1))
        return True, refusal(lambda: Reader(writer.address, 0))


def test_without_memory_for_a_stack_a_writer_works_and_a_reader_says_so(ranks: Ranks) -> None:
    made, text = there(ranks, HERE, no_room_for_a_stack)
    assert made
    assert text.startswith(f"BlockingIOError {errno.EAGAIN}: ")
    assert "no thread shmcast-reader-0: can't start new thread" in text


def locked() -> str:
    return refusal(lambda: Writer(1, capacity=64 * MIB))


def test_memory_that_may_not_be_locked_is_refused(ranks: Ranks) -> None:
    world = World("size=256m", nobody=True, limits={resource.RLIMIT_MEMLOCK: 4 * MIB}, locks=True)
    assert there(ranks, world, locked).startswith(f"BlockingIOError {errno.EAGAIN}: ")


def in_a_cgroup(left: int) -> tuple[str, str]:
    """A made-up tree of cgroups, for a real one that is passed kills."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        cgroup(folder / "top" / "job", 512 * MIB, 512 * MIB - left)
        (folder / "cgroup").write_text("0::/job\n")
        (folder / "mountinfo").write_text(f"30 22 0:26 / {folder}/top rw - cgroup2 cgroup2 rw\n")
        patch.setattr(_segment, "room", partial(_room.room, proc=folder))
        patch.setattr(os, "posix_fallocate", pytest.fail)
        text = refusal(lambda: Writer(1, capacity=64 * MIB))
        # Enough for the segment's own descriptor, and none to read the limit.
        with few_descriptors(1):
            return text.replace(name, ""), refusal(lambda: Writer(1, capacity=64 * MIB))


def test_a_cgroup_is_never_passed_not_even_unread(ranks: Ranks) -> None:
    known, unknown = there(ranks, HERE, in_a_cgroup, 8192)
    assert known.startswith("ArenaFull")
    assert "bytes more are wanted, the memory limit of /top/job leaves 8192; raise that limit" in known
    assert "a cgroup's limit, which cannot be read (Too many open files), leaves 0" in unknown


# Names that somebody else has.


def path_of(address: Address, what: str) -> Path:
    name = {"control": address.control, "segment": address.segment(0), "semaphore": f"/sem.{address.wake(0)[1:]}"}
    return Path(SHM + name[what])


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)


def squat(what: str, kind: str) -> tuple[str, bool]:
    """What a writer says whose name somebody else has; whether that was left alone."""
    token = secrets.token_bytes(16)
    path = path_of(Address(token, 0, 1), what)
    with tempfile.NamedTemporaryFile() as victim, pytest.MonkeyPatch.context() as patch:
        if kind == "file":
            path.write_bytes(b"foreign")
        elif kind == "symlink":
            path.symlink_to(victim.name)
        else:
            path.mkdir()
        patch.setattr(secrets, "token_bytes", lambda size: token)
        text = refusal(lambda: Writer(1, capacity=MIB))
        spared = os.path.lexists(path) and not os.path.getsize(victim.name)
    remove(path)
    return text, spared


@pytest.mark.parametrize("kind", ["file", "symlink", "folder"])
@pytest.mark.parametrize("what", ["control", "segment", "semaphore"])
def test_a_name_that_is_taken_is_refused_and_spared(ranks: Ranks, what: str, kind: str) -> None:
    text, spared = there(ranks, HERE, squat, what, kind)
    assert text.startswith(f"FileExistsError {errno.EEXIST}: ")
    assert f"'{SHM}/" in text
    assert spared


def replace(what: str, kind: str) -> str:
    """What a reader says that finds something else in the place of what its writer made."""
    with Writer(1, capacity=MIB) as writer:
        path = path_of(writer.address, what)
        kept = path.with_name("kept")
        path.rename(kept)
        made = kept.read_bytes()
        if kind == "folder":
            path.mkdir()
        elif kind == "symlink":
            path.symlink_to(kept)
        elif kind != "gone":
            path.write_bytes({"empty": b"", "cut": made[: len(made) // 2], "foreign": bytes(range(256)) * 64}[kind])
            path.chmod(_named.MODE)
        try:
            return refusal(lambda: Reader(writer.address, 0))
        finally:
            remove(path)
            kept.rename(path)


REPLACED = {
    "control": {
        "gone": "PeerDied None: no segment .*is gone, or is in another mount or IPC namespace",
        "empty": "LayoutError None: 0 bytes cannot hold a segment header",
        "cut": "LayoutError None: .* has [0-9]+ bytes, its header says",
        "foreign": "LayoutError None: not a shmcast segment",
        "symlink": f"OSError {errno.ELOOP}: .*'{SHM}/shmcast-",
        "folder": f"OSError {errno.EINVAL}: .*'{SHM}/shmcast-",
    },
    "semaphore": {
        "gone": "PeerDied None: no semaphore .*: its writer was closed or died",
        "empty": "LayoutError None: .*is an empty file, and no semaphore",
        "symlink": f"OSError {errno.ELOOP}: .*'{SHM}/sem.shmcast-",
        "folder": f"IsADirectoryError {errno.EISDIR}: .*'{SHM}/sem.shmcast-",
    },
}
REPLACED["segment"] = REPLACED["control"]


@pytest.mark.parametrize(("what", "kind"), [(what, kind) for what, kinds in REPLACED.items() for kind in kinds])
def test_what_is_not_what_the_writer_made_is_not_used(ranks: Ranks, what: str, kind: str) -> None:
    assert re.match(REPLACED[what][kind], there(ranks, HERE, replace, what, kind))


def open_from_another_world() -> str:
    with Writer(1, capacity=MIB) as writer:

        def elsewhere() -> str:
            SMALL.enter()
            return refusal(lambda: Reader(writer.address, 0))

        return str(fork(elsewhere))


def test_a_reader_in_another_mount_namespace_finds_no_writer(ranks: Ranks) -> None:
    assert re.match(REPLACED["control"]["gone"], there(ranks, HERE, open_from_another_world))


def open_as_nobody() -> str:
    with Writer(1, capacity=MIB) as writer:

        def stranger() -> str:
            STRANGER.enter()
            return refusal(lambda: Reader(writer.address, 0))

        return str(fork(stranger))


def test_another_user_cannot_open_it(ranks: Ranks) -> None:
    text = there(ranks, HERE, open_as_nobody)
    assert text.startswith(f"PermissionError {errno.EACCES}: [Errno 13] Permission denied; this process has uid ")


# Groups: the ranks in one world, or one of them in another.


def meet(rank: int, n: int, store: str, world: World, function: Callable[..., Any], *args: Any) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=n, timeout=timedelta(seconds=20)
    )
    descriptors = resource.getrlimit(NOFILE)
    try:
        world.enter()
        return function(rank, *args)
    finally:
        resource.setrlimit(NOFILE, descriptors)  # torch aborts where it cannot open its store once more
        dist.destroy_process_group()


def together(worlds: list[World], function: Callable[..., Any], *args: Any) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        return fork_each(
            *(
                partial(meet, rank, len(worlds), f"{folder}/store", world, function, *args)
                for rank, world in enumerate(worlds)
            )
        )


def share(rank: int, policy: Policy) -> tuple[str, set[str], bool, str]:
    """A small object and one of 20 MiB, by whatever way this group has."""
    with warned() as lines, Broadcaster(policy=policy, timeout=20) as group:
        held = policy.peers_hold_raw or rank == 0
        whole = True
        for size in (SIZE, 20 * MIB):
            raw = {"a": payload(1, size)}
            got = group.materialize(raw if held else None, double)
            whole = whole and torch.equal(got["a"], raw["a"] * 2)
            del got
        return Route(group.route).value, set(group.stats().fallbacks), whole, " ".join(lines)


HOLDS, SENDS = Policy(wait=0.05), Policy(wait=0.05, peers_hold_raw=False)

GROUPS: dict[str, tuple[World, list[World], str, str, str]] = {
    "1 MiB": (TINY, [HERE] * 3, "shm", "full", "no block of"),
    "64 MiB": (SMALL, [HERE] * 3, "shm", "full", "no block of"),
    "64 MiB of huge pages": (HUGE, [HERE] * 3, "shm", "full", "no block of"),
    "none": (ABSENT, [HERE] * 2, "local", "disabled", f"there is no {SHM}"),
    "read-only": (READ_ONLY, [HERE] * 2, "local", "disabled", "Read-only file system"),
    "another mount namespace": (HERE, [HERE, HERE, SMALL], "local", "disabled", "is in another mount"),
    "another user": (HERE, [HERE, STRANGER], "local", "disabled", "rank 1 cannot map: PermissionError"),
    "no descriptors here": (HERE, [World(limits={NOFILE: 0}), HERE], "local", "disabled", "Too many open files"),
    "no descriptors there": (HERE, [HERE, World(limits={NOFILE: 0})], "local", "disabled", "rank 1 cannot map"),
}


@pytest.mark.parametrize("policy", [HOLDS, SENDS], ids=["holds", "sends"])
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_has_its_objects_in_any_world(ranks: Ranks, name: str, policy: Policy) -> None:
    world, worlds, route, fallback, says = GROUPS[name]
    if route == "local" and policy is SENDS:
        route = "inline"
    for told in there(ranks, world, together, worlds, share, policy):
        assert told[:3] == (route, {fallback}, True)
        assert says in told[3]


def schedule(rank: int) -> tuple[str, bool]:
    with SchedulerBackend(fn=double, policy=HOLDS, timeout=20) as backend:
        raws = {seed: {"a": payload(seed, SIZE)} for seed in range(4)}
        backend.submit(list(raws.items()))
        whole = all(torch.equal(backend.take(seed, 20)["a"], raw["a"] * 2) for seed, raw in raws.items())
        dist.barrier()
        return Route(backend.route).value, whole


@pytest.mark.parametrize(
    ("world", "route"), [(TINY, None), (SMALL, "shm"), (ABSENT, "local")], ids=["1 MiB", "64 MiB", "none"]
)
def test_a_scheduler_has_its_inputs_in_any_world(ranks: Ranks, world: World, route: str | None) -> None:
    told = there(ranks, world, together, [HERE, HERE], schedule)
    assert all(whole for _, whole in told)
    assert told[0][0] == told[1][0]
    assert route in (None, told[0][0])


def no_threads(rank: int) -> tuple[str, bool]:
    """One rank cannot start the backend's threads, and says so; the other has its inputs all the same."""
    refused = threading.Thread.start
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            names = ("shmcast-plane",)

            def start(self: threading.Thread) -> None:
                if self.name.startswith(names):
                    raise RuntimeError("can't start new thread")
                refused(self)

            patch.setattr(threading.Thread, "start", start)
            text = refusal(lambda: SchedulerBackend(fn=double, policy=HOLDS, timeout=20))
            dist.barrier()
            return text, True
        with SchedulerBackend(fn=double, policy=HOLDS, timeout=20) as backend:
            dist.barrier()
            raw = {"a": payload(1)}
            backend.submit([(1, raw)])
            return "", torch.equal(backend.take(1, 10)["a"], raw["a"] * 2)


def test_a_scheduler_without_threads_leaves_and_the_others_go_on(ranks: Ranks) -> None:
    [(text, _), (_, whole)] = there(ranks, HERE, together, [HERE, HERE], no_threads)
    assert text.startswith(f"BlockingIOError {errno.EAGAIN}: ")
    assert whole


def admit() -> tuple[list[str], set[str]]:
    """A request that fits, and one that goes on raw."""
    with Writer(1, policy=HURRY) as writer, Admission(writer, double) as admission:
        for key, size in ((0, SIZE), (1, 3 * MIB)):
            admission.hold(key, {"a": payload(1, size)})
        told: dict[Any, Any] = {}
        until(lambda: told.update(admission.ready(0.1)) or len(told) == 2)
        return [type(told[key]).__name__ for key in range(2)], set(admission.stats().fallbacks)


def test_an_admission_in_a_small_world_lets_raw_requests_go_on(ranks: Ranks) -> None:
    assert there(ranks, TINY, admit) == (["Handle", "NoneType"], {"full"})
