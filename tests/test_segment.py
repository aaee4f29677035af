"""Segments: whole or not there, mapped only after every check, unlinked by inode, not a forked child's."""

import errno
import fcntl
import gc
import os
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmcast import _reclaim, _segment
from shmcast._layout import PAGE, Kind, SegmentHeader, control_size, ring_offset, ring_size
from shmcast._room import Room
from shmcast._segment import Isolation, Segment, attach, attach_ring, create, open_checked
from shmcast.errors import ArenaFull, LayoutError, PeerDied

SHM = Path("/dev/shm")
SIZE = 8 * PAGE


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a segment; whatever has it in the end is removed."""
    chosen = f"/shmcast-{secrets.token_hex(16)}-0-0"
    yield chosen
    path = path_of(chosen)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)


def path_of(name: str) -> Path:
    return SHM / name[1:]


def header_of(name: str, **changes: Any) -> SegmentHeader:
    token = bytes.fromhex(name.split("-")[1])
    return SegmentHeader(**{"kind": Kind.ARENA, "token": token, "rank": 0, "number": 0, "size": SIZE, **changes})


def control_of(name: str, readers: int = 2) -> SegmentHeader:
    return header_of(name, kind=Kind.CONTROL, size=control_size(readers, 256), readers=readers, entries=256)


@pytest.fixture
def made(name: str) -> Iterator[list[Segment]]:
    """A list with one new segment called `name`; all that is in the list at the end is dropped."""
    segments = [create(name, header_of(name))]
    yield segments
    for segment in segments:
        segment.unlink()
        segment.drop()
    segments.clear()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def in_use(path: Path) -> bool:
    """Whether anybody holds the shared lock: what a reaper asks."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


# --- creating


def test_a_new_segment_is_private_reserved_and_initialised(name: str, made: list[Segment]) -> None:
    status = path_of(name).stat()
    assert (status.st_mode & 0o7777, status.st_uid, status.st_size) == (0o600, os.geteuid(), SIZE)
    assert status.st_blocks * 512 == SIZE
    page = bytearray(64)
    header_of(name).write(page)
    assert path_of(name).read_bytes() == bytes(page).ljust(SIZE, b"\0")


def test_the_mode_does_not_depend_on_the_umask(name: str) -> None:
    before = os.umask(0o777)
    try:
        segment = create(name, header_of(name))
    finally:
        os.umask(before)
    assert path_of(name).stat().st_mode & 0o7777 == 0o600
    segment.unlink()
    segment.drop()


def squat(path: Path, how: str) -> None:
    if how == "file":
        path.write_bytes(b"foreign")
    elif how == "folder":
        path.mkdir()
    elif how == "symlink":
        path.symlink_to("/nowhere/at/all")
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("how", ["file", "folder", "symlink", "fifo"])
def test_a_squatted_name_is_refused_and_left_alone(name: str, how: str) -> None:
    squat(path_of(name), how)
    before, open_before = path_of(name).lstat(), descriptors()
    with pytest.raises(FileExistsError):
        create(name, header_of(name))
    after = path_of(name).lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)
    assert descriptors() == open_before


def test_memory_is_reserved_in_steps_each_after_a_look_at_the_room(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(_segment, "STEP", 3 * PAGE)
    monkeypatch.setattr(_segment, "room", lambda: calls.append(("room", 0, 0)) or Room(3 * PAGE, "test"))  # type: ignore[func-returns-value]
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, at, size: calls.append(("reserve", at, size)))
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        create(name, header_of(name))
    look = ("room", 0, 0)
    assert calls == [
        *(look, ("reserve", 0, 3 * PAGE)),
        *(look, ("reserve", 3 * PAGE, 3 * PAGE)),
        *(look, ("reserve", 6 * PAGE, 2 * PAGE)),
    ]
    assert not path_of(name).exists()


def test_without_room_nothing_is_reserved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_segment, "room", lambda: Room(SIZE - 1, "a limit of the test"))
    monkeypatch.setattr(os, "posix_fallocate", pytest.fail)
    with pytest.raises(
        ArenaFull,
        match=f"{SIZE} of {SIZE} bytes more are wanted, a limit of the test leaves {SIZE - 1}; raise that limit",
    ):
        create(name, header_of(name))
    assert not path_of(name).exists()


def test_room_that_runs_out_on_the_way_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = iter([Room(SIZE, "test"), Room(SIZE, "test"), Room(0, "test")])
    monkeypatch.setattr(_segment, "STEP", 3 * PAGE)
    monkeypatch.setattr(_segment, "room", lambda: next(rooms))
    with pytest.raises(ArenaFull, match=f"{2 * PAGE} of {SIZE} bytes"):
        create(name, header_of(name))
    assert not path_of(name).exists()


STEPS: list[tuple[Any, str]] = [
    (os, "fchmod"),
    (fcntl, "flock"),
    (_segment, "room"),
    (os, "posix_fallocate"),
    (_segment, "_map"),
    (_segment, "populate"),
    (SegmentHeader, "write"),
]


@pytest.mark.faults
@pytest.mark.parametrize("error", [OSError(errno.EIO, "a fault"), KeyboardInterrupt()], ids=["OSError", "Ctrl-C"])
@pytest.mark.parametrize(("owner", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_creation_that_fails_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, owner: Any, step: str, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    open_before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        expected = ArenaFull if step == "posix_fallocate" and isinstance(error, OSError) else type(error)
        with pytest.raises(expected):
            create(name, header_of(name))
    error.__traceback__ = None
    gc.collect()
    assert not path_of(name).exists()
    assert descriptors() == open_before


def test_no_name_is_made_where_the_system_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="shmcast-xxx"):
        create("/shmcast-" + "x" * 300, header_of(f"/x-{'00' * 16}-0"))


# --- a tmpfs that is really full, in a mount namespace of its own


def small_tmpfs(code: str, size: str = "1m") -> None:
    """Runs `code` with a /dev/shm of `size`."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    mount = f'mount -t tmpfs -o size={size},mode=1777 tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", textwrap.dedent(code)]
    probe = subprocess.run([*command[:5], "exec true"], capture_output=True, timeout=60)
    if probe.returncode:
        pytest.skip("no mount namespace")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "mount:" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.faults
def test_a_full_tmpfs_is_an_error_and_no_crash() -> None:
    small_tmpfs(
        """
        import os
        from shmcast import _reclaim, _segment
        from shmcast._layout import Kind, SegmentHeader
        from shmcast._room import Room
        from shmcast.errors import ArenaFull

        def header(size):
            return SegmentHeader(Kind.ARENA, bytes(16), 0, 0, size)

        def full(size, says):
            try:
                _segment.create("/shmcast-full", header(size))
            except ArenaFull as error:
                assert says in str(error), error
            else:
                raise SystemExit("created")
            assert os.listdir("/dev/shm") == []
            assert os.statvfs("/dev/shm").f_bavail * 4096 == 1 << 20

        full(2 << 20, "/dev/shm leaves 1048576")
        # A tmpfs that fills up after the look at it: the reservation fails, not a store.
        _segment.room = lambda: Room(1 << 40, "the test")
        full(2 << 20, "cannot reserve 2097152 bytes of shared memory: No space left on device")
        _segment.STEP = 256 << 10
        full(2 << 20, "cannot reserve 2097152 bytes")
        segment = _segment.create("/shmcast-full", header(1 << 20))
        segment.map[4096:] = b"x" * ((1 << 20) - 4096)
        """
    )


@pytest.mark.faults
@pytest.mark.parametrize("size", ["64k", "600k", "1m"])
def test_an_arena_that_does_not_fit_leaves_nothing(size: str) -> None:
    """Too small for the control segment, for the semaphores, for the first arena segment."""
    small_tmpfs(
        """
        import os, gc
        from shmcast import _arena, _segment
        from shmcast._room import Room
        from shmcast.errors import ArenaFull
        _segment.room = lambda: Room(1 << 40, "the test")
        try:
            _arena.Arena(2, 8 << 20, 0)
        except (ArenaFull, OSError):
            pass
        else:
            raise SystemExit("created")
        assert os.listdir("/dev/shm") == [], os.listdir("/dev/shm")
        """,
        size,
    )


# --- attaching


@pytest.mark.parametrize("isolation", ["cow", "guard", "shared"])
def test_an_attached_segment_shows_what_the_creator_writes(
    name: str, made: list[Segment], isolation: Isolation
) -> None:
    reader = attach(name, header_of(name, size=0), isolation)
    made.append(reader)
    assert reader.header == header_of(name)
    made[0].map[PAGE : PAGE + 3] = b"new"
    assert reader.map[PAGE : PAGE + 3] == b"new"
    assert reader.address != made[0].address


@pytest.mark.parametrize(("isolation", "seen"), [("cow", b"old"), ("shared", b"new")])
def test_what_a_reader_writes(name: str, made: list[Segment], isolation: Isolation, seen: bytes) -> None:
    made[0].map[PAGE : PAGE + 3] = b"old"
    reader = attach(name, header_of(name), isolation)
    made.append(reader)
    reader.map[PAGE : PAGE + 3] = b"new"
    assert reader.map[PAGE : PAGE + 3] == b"new"
    assert made[0].map[PAGE : PAGE + 3] == seen


def test_a_block_mapped_alone_is_private_pages_of_its_own(name: str, made: list[Segment]) -> None:
    reader = attach(name, header_of(name), "cow")
    made.append(reader)
    made[0].map[2 * PAGE : 2 * PAGE + 3] = b"old"
    alone = reader.map_block(2 * PAGE, 2 * PAGE)
    assert len(alone) == 2 * PAGE
    assert alone[:3] == b"old"
    reader.map[2 * PAGE : 2 * PAGE + 3] = b"one"
    assert alone[:3] == b"old"
    alone[:3] = b"two"
    assert (reader.map[2 * PAGE : 2 * PAGE + 3], made[0].map[2 * PAGE : 2 * PAGE + 3]) == (b"one", b"old")


def test_a_reader_maps_its_own_ring_and_nothing_else(name: str) -> None:
    control = create(name, control_of(name))
    ring = attach_ring(name, control_of(name), 1)
    assert len(ring.map) == ring_size(256)
    ring.map[:4] = b"mine"
    at = ring_offset(1, 256)
    assert control.map[at : at + 4] == b"mine"
    assert control.map[:at].count(b"mine") == 0
    for segment in (control, ring):
        segment.unlink()
        segment.drop()


def test_no_such_name_is_a_dead_writer(name: str) -> None:
    with pytest.raises(PeerDied, match=f"no segment {name}: rank 5, its writer, is gone"):
        open_checked(name, header_of(name, rank=5))


def write_header(path: Path, header: SegmentHeader) -> None:
    page = bytearray(64)
    header.write(page)
    with path.open("r+b") as file:
        file.write(page)


def patched(at: int, value: bytes) -> Callable[[Path], None]:
    def patch(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(value)

    return patch


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: os.truncate(path, 0), "0 bytes cannot hold a segment header"),
    "cut in the header": (lambda path: os.truncate(path, 40), "40 bytes cannot hold"),
    "cut": (lambda path: os.truncate(path, SIZE - PAGE), "bytes, its header says"),
    "grown": (lambda path: os.truncate(path, SIZE + PAGE), "bytes, its header says"),
    "mode": (lambda path: path.chmod(0o640), "mode 640: not ours"),
    "setuid": (lambda path: path.chmod(0o4600), "mode 4600: not ours"),
    "no magic": (patched(0, bytes(8)), "not a shmcast segment"),
    "foreign": (lambda path: path.write_bytes(bytes(range(256)) * (SIZE // 256)), "not a shmcast segment"),
    "version": (patched(8, b"\x02"), "segment format 2"),
    "token": (lambda path: write_header(path, header_of(f"/x-{'ab' * 16}-0")), "another segment than its name says"),
    "rank": (patched(32, b"\x01"), "another segment than its name says"),
    "number": (patched(36, b"\x01"), "another segment than its name says"),
    "kind": (
        lambda path: write_header(path, control_of(f"/x-{path.name.split('-')[1]}-0")),
        "its header says",
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_not_the_segment_is_not_mapped(name: str, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    segment = create(name, header_of(name))
    hurt, says = DAMAGE[damage]
    hurt(path_of(name))
    before, open_before = path_of(name).read_bytes(), descriptors()
    monkeypatch.setattr(_segment, "_map", pytest.fail)
    with pytest.raises(LayoutError, match=says):
        attach(name, header_of(name), "cow")
    # Nothing was truncated, changed or kept open.
    assert path_of(name).read_bytes() == before
    assert descriptors() == open_before
    segment.unlink()
    segment.drop()


@pytest.mark.faults
def test_a_control_segment_is_not_an_arena_segment_of_the_same_size(name: str) -> None:
    control = create(name, control_of(name))
    with pytest.raises(LayoutError, match="another segment than its name says"):
        attach(name, header_of(name), "cow")
    control.unlink()
    control.drop()


@pytest.mark.faults
def test_a_control_segment_for_another_number_of_readers(name: str) -> None:
    control = create(name, control_of(name, readers=3))
    with pytest.raises(LayoutError, match="serves 3 readers, not 2"):
        attach_ring(name, control_of(name), 0)
    control.unlink()
    control.drop()


@pytest.mark.faults
def test_the_segment_of_another_user(name: str, made: list[Segment], monkeypatch: pytest.MonkeyPatch) -> None:
    open_before = descriptors()
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(LayoutError, match=f"belongs to uid {uid} with mode 600: not ours"):
        attach(name, header_of(name), "cow")
    assert descriptors() == open_before


@pytest.mark.faults
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_segment_that_was_given_away(name: str, made: list[Segment]) -> None:
    os.chown(path_of(name), 12345, 12345)
    with pytest.raises(LayoutError, match="belongs to uid 12345"):
        attach(name, header_of(name), "cow")


@pytest.mark.faults
def test_a_symlink_is_not_followed(name: str, made: list[Segment]) -> None:
    target = f"{name}9"
    path_of(name).rename(path_of(target))
    path_of(name).symlink_to(path_of(target))
    open_before = descriptors()
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        attach(name, header_of(name), "cow")
    assert descriptors() == open_before
    path_of(target).replace(path_of(name))


@pytest.mark.faults
def test_a_fifo_neither_blocks_nor_passes(name: str) -> None:
    squat(path_of(name), "fifo")
    path_of(name).chmod(0o600)
    open_before = descriptors()
    with pytest.raises(LayoutError, match="is not a regular file"):
        attach(name, header_of(name), "cow")
    assert descriptors() == open_before


@pytest.mark.faults
def test_a_folder_is_an_error_that_a_caller_expects(name: str) -> None:
    squat(path_of(name), "folder")
    open_before = descriptors()
    with pytest.raises(OSError, match=name):
        attach(name, header_of(name), "cow")
    assert descriptors() == open_before


@pytest.mark.faults
@pytest.mark.parametrize("step", ["_map", "protect"])
def test_a_failed_attach_keeps_nothing_open(
    name: str, made: list[Segment], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "a fault")

    open_before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(_segment, step, fail)
        with pytest.raises(OSError, match="a fault"):
            attach(name, header_of(name), "guard")
    gc.collect()
    assert descriptors() == open_before


def test_a_guarded_mapping_is_read_only_to_the_processor(name: str, made: list[Segment]) -> None:
    made += [attach(name, header_of(name), isolation) for isolation in ("cow", "guard", "shared")]
    rights = {int(line.split("-")[0], 16): line.split()[1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert [rights[segment.address] for segment in made[1:]] == ["rw-p", "r--s", "rw-s"]
    assert not memoryview(made[2].map).readonly


# --- unlinking


def test_unlink_removes_the_name_and_leaves_the_memory(name: str, made: list[Segment]) -> None:
    reader = attach(name, header_of(name), "shared")
    made.append(reader)
    made[0].unlink()
    assert not path_of(name).exists()
    reader.map[PAGE] = 7
    assert made[0].map[PAGE] == 7
    made[0].unlink()


def test_unlink_spares_whatever_took_the_name(name: str, made: list[Segment]) -> None:
    path_of(name).unlink()
    path_of(name).write_bytes(b"somebody else's")
    open_before = descriptors()
    made[0].unlink()
    assert path_of(name).read_bytes() == b"somebody else's"
    assert descriptors() == open_before


@pytest.mark.faults
@pytest.mark.parametrize("how", ["folder", "symlink"])
def test_unlink_does_not_mind_what_took_the_name(name: str, how: str) -> None:
    segment = create(name, header_of(name))
    path_of(name).unlink()
    squat(path_of(name), how)
    raised = ""
    try:
        segment.unlink()
    except Exception as error:
        raised = repr(error)
    segment.drop()
    del segment
    assert raised == ""


# --- who uses it: the shared lock


def test_a_segment_is_in_use_as_long_as_its_mapping_lives(name: str) -> None:
    segment = create(name, header_of(name))
    assert in_use(path_of(name))
    mapping = segment.map
    segment.drop()
    assert segment.fd == -1
    segment.drop()
    del segment
    gc.collect()
    assert in_use(path_of(name))
    view = memoryview(mapping)[PAGE : PAGE + 1]
    del mapping
    assert in_use(path_of(name))
    view.release()
    del view
    gc.collect()
    assert not in_use(path_of(name))


def test_each_reader_and_each_block_mapping_keeps_it_in_use(name: str) -> None:
    held: list[Any] = [create(name, header_of(name)), attach(name, header_of(name), "cow")]
    held.append(held[1].map_block(PAGE, PAGE))
    for segment in held[:2]:
        segment.drop()
    while held:
        assert in_use(path_of(name))
        del held[0]
        segment = None
        gc.collect()
    assert not in_use(path_of(name))


@pytest.mark.faults
def test_a_killed_process_uses_nothing(name: str, made: list[Segment]) -> None:
    code = """
    import signal, sys
    from shmcast import _reclaim, _segment
    from shmcast._layout import Kind, SegmentHeader
    name = sys.argv[1]
    segment = _segment.attach(name, SegmentHeader(Kind.ARENA, bytes.fromhex(name.split("-")[1]), 0, 0, 0), "cow")
    print("attached", flush=True)
    signal.pause()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), name], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "attached\n"
        made.pop().drop()
        gc.collect()
        assert in_use(path_of(name))
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not in_use(path_of(name))


# --- fork


def forked(child: str) -> None:
    """Runs `child` in a child that was forked while its parent had a segment; both must end well.

    `segment`, `reader`, `block` (mappings of it) and `foreign` (a descriptor of another file) are there.
    """
    code = f"""
import ctypes, gc, mmap, os, sys
from shmcast import _reclaim, _segment
from shmcast._layout import PAGE, Kind, SegmentHeader

name = "/shmcast-{secrets.token_hex(16)}-0-0"
header = SegmentHeader(Kind.ARENA, bytes.fromhex(name.split("-")[1]), 0, 0, 8 * PAGE)
segment = _segment.create(name, header)
reader = _segment.attach(name, header, "cow")
block = reader.map_block(PAGE, PAGE)
segment.unlink()
foreign = os.open("/dev/null", os.O_RDWR)

def links():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink("/proc/self/fd/" + fd))
        except OSError:
            pass
    return [link for link in found if name in link]

assert len(links()) == 5, links()
pid = os.fork()
if pid == 0:
    try:
{textwrap.indent(textwrap.dedent(child), " " * 8)}
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert len(links()) == 5, links()
segment.map[PAGE:PAGE + 2] = b"ok"
assert block[:2] == b"ok"
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_child_has_neither_descriptor_nor_mapping() -> None:
    forked(
        """
        assert links() == [], links()
        os.fstat(foreign)
        assert segment.fd == reader.fd == -1
        assert name not in open("/proc/self/maps").read()
        """
    )


AMID = """
import fcntl, os, secrets, sys
from shmcast import _segment
from shmcast._layout import PAGE, Kind, SegmentHeader

told = []

def links():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink("/proc/self/fd/" + fd))
        except OSError:
            pass
    return [link for link in found if link.startswith("/dev/shm/")]

def forking(owner, name):
    real = getattr(owner, name)

    def call(*args, **kwargs):
        done = real(*args, **kwargs)
        pid = os.fork()
        if pid == 0:
            os._exit(len(links()))
        told.append((name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        return done

    setattr(owner, name, call)

for owner, name in ((os, "posix_fallocate"), (os, "link"), (os, "pread"), (fcntl, "flock"), (_segment, "populate")):
    forking(owner, name)
token = secrets.token_bytes(16)
header = SegmentHeader(Kind.ARENA, token, 0, 0, 8 * PAGE)
name = f"/shmcast-{token.hex()}-0-0"
segment = _segment.create(name, header)
try:
    _segment.attach(name, header, "cow")
finally:
    segment.unlink()
for amid, links in told:
    print(amid, links)
"""


def test_a_child_that_is_forked_while_a_segment_is_made_or_attached_has_no_descriptor_of_it() -> None:
    """One that it kept would keep the memory, and the lock of a dead process."""
    done = subprocess.run([sys.executable, "-c", AMID], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    amid = ["flock", "posix_fallocate", "link", "flock", "populate", "flock", "pread"]
    assert done.stdout.splitlines() == [f"{name} 0" for name in amid]


def test_a_child_that_frees_the_objects_unmaps_nothing_and_closes_nothing() -> None:
    forked(
        """
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
        fixed = 0x10 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        spots = [(segment.address, 8), (reader.address, 8), (_segment.address_of(block), 1)]
        for address, pages in spots:
            assert libc.mmap(address, pages * PAGE, 3, fixed, -1, 0) == address
            ctypes.memset(address, 7, pages * PAGE)
        # The numbers of the closed descriptors, in use for something else.
        files = [os.open("/dev/zero", os.O_RDONLY) for _ in range(12)]
        segment.drop()
        reader.drop()
        del segment, reader, block
        gc.collect()
        for address, pages in spots:
            assert ctypes.string_at(address, pages * PAGE) == bytes([7]) * pages * PAGE
        for fd in files:
            assert os.read(fd, 1) == bytes(1)
        """
    )


def test_a_child_can_have_a_segment_of_its_own_and_children() -> None:
    forked(
        """
        other = _segment.create(name[:-1] + "1", SegmentHeader(Kind.ARENA, bytes(16), 0, 1, 2 * PAGE))
        other.map[PAGE] = 1
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(len(links()) + (other.fd != -1))
        assert os.waitpid(grandchild, 0)[1] == 0
        assert other.map[PAGE] == 1
        os.fstat(other.fd)
        other.unlink()
        """
    )


def test_a_program_that_a_process_starts_inherits_nothing(name: str, made: list[Segment]) -> None:
    listing = """
    import os
    from contextlib import suppress
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            print(os.readlink(f"/proc/self/fd/{fd}"))
    """
    command = [sys.executable, "-c", textwrap.dedent(listing)]
    done = subprocess.run(command, capture_output=True, text=True, close_fds=False, timeout=60)
    assert done.returncode == 0
    assert name not in done.stdout


def test_dead_mappings_are_forgotten(name: str) -> None:
    segment = create(name, header_of(name))
    mapping = segment.map
    assert _segment._maps[mapping] == (path_of(name).stat().st_dev, path_of(name).stat().st_ino)
    segment.unlink()
    segment.drop()
    before = len(_segment._maps)
    del segment, mapping
    gc.collect()
    assert len(_segment._maps) == before - 1


def test_a_mapping_refuses_to_be_closed_under_a_view(name: str, made: list[Segment]) -> None:
    view = memoryview(made[0].map)[:1]
    with pytest.raises(BufferError):
        made[0].map.close()
    view.release()


@pytest.mark.parametrize(("dies_in", "left"), [("_reserve", 0), ("_link", 0), ("_open_new", 1)])
def test_a_creator_that_dies_leaves_nothing_or_what_can_be_swept(name: str, dies_in: str, left: int) -> None:
    code = f"""
    import os, signal
    from shmcast import _reclaim, _segment
    from tests.test_segment import header_of
    _segment.{dies_in} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    _segment.create({name!r}, header_of({name!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len([each for each in os.listdir("/dev/shm") if each == name[1:]]) == left
    removed = [found.name for found in _reclaim.sweep() if found.verdict is _reclaim.Verdict.REMOVED]
    assert removed == [name[1:]] * left
    assert not path_of(name).exists()
