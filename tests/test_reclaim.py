"""What dead writers left is removed, and nothing else is, whatever it looks like."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import posix_ipc
import pytest

from shmcast import _reclaim
from shmcast._arena import Arena
from shmcast._layout import PAGE, Kind, SegmentHeader, control_size
from shmcast._reclaim import SEMAPHORE_BYTES, Verdict, examine
from tests.support.writers import end, names, said, start

SHM = Path("/dev/shm")
TOKEN = "0123456789abcdef" * 2


def header_of(number: int | None, rank: int = 1, token: str = TOKEN) -> SegmentHeader:
    """An arena segment's header, or with None the control segment's."""
    raw = bytes.fromhex(token)
    if number is None:
        return SegmentHeader(Kind.CONTROL, raw, rank, 0, control_size(2, 2), readers=2, entries=2)
    return SegmentHeader(Kind.ARENA, raw, rank, number, 2 * PAGE)


def lay(path: Path, header: SegmentHeader) -> Path:
    """A file as a killed writer leaves it."""
    page = bytearray(header.size)
    header.write(page)
    return put(path, bytes(page))


def put(path: Path, raw: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(raw)
    path.chmod(mode)
    return path


def semaphore(folder: Path, tail: str, stem: str = f"{TOKEN}-1") -> Path:
    """A file as `sem_open` makes it."""
    return put(folder / f"sem.shmcast-{stem}-{tail}", bytes(SEMAPHORE_BYTES))


def segment(folder: Path, number: int | None, rank: int = 1, token: str = TOKEN) -> Path:
    tail = "c" if number is None else str(number)
    return lay(folder / f"shmcast-{token}-{rank}-{tail}", header_of(number, rank, token))


def left(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def sweep(folder: str = str(SHM)) -> list[str]:
    """The names that a sweep removed."""
    return [found.name for found in _reclaim.sweep(folder) if found.verdict is Verdict.REMOVED]


def verdicts(folder: Path) -> dict[str, Verdict]:
    """What looking tells, without removing anything; the same as sweeping tells of what it keeps."""
    before = left(folder)
    found = {each.name: each.verdict for each in examine(str(folder))}
    assert left(folder) == before
    return found


# --- files in a folder


def test_removes_the_segments_of_a_dead_writer(tmp_path: Path) -> None:
    paths = [segment(tmp_path, number) for number in (0, 1, 1023, None)]
    assert sweep(str(tmp_path)) == sorted(path.name for path in paths)
    assert left(tmp_path) == set()
    assert sweep(str(tmp_path)) == []


def test_semaphores_go_with_the_control_segment_and_before_it(tmp_path: Path) -> None:
    control = segment(tmp_path, None)
    semaphores = [semaphore(tmp_path, tail).name for tail in ("h0", "p0", "p1", "w0", "w1")]
    assert verdicts(tmp_path) == dict.fromkeys([*semaphores, control.name], Verdict.DEAD)
    assert sweep(str(tmp_path)) == [*semaphores, control.name]
    assert left(tmp_path) == set()


def test_semaphores_of_living_writers_and_of_others_stay(tmp_path: Path) -> None:
    segment(tmp_path, None)
    lives = segment(tmp_path, None, 11)
    spared = {lives.name, semaphore(tmp_path, "p0", f"{TOKEN}-11").name}
    for name in (f"sem.other-{TOKEN}-1-p0", "sem.shmcast-", f"sem.shmcast-{TOKEN}-1-x0", f"sem.shmcast-{TOKEN}-1-p"):
        spared.add(put(tmp_path / name, bytes(SEMAPHORE_BYTES)).name)
    with lives.open("rb") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
        sweep(str(tmp_path))
    assert left(tmp_path) == spared


ODD_SEMAPHORES: dict[str, tuple[Callable[[Path], object], Verdict]] = {
    "foreign bytes": (lambda path: put(path, b"foreign" * 100), Verdict.UNCLEAR),
    "empty": (lambda path: put(path, b""), Verdict.UNCLEAR),
    "another mode": (lambda path: put(path, bytes(SEMAPHORE_BYTES), 0o644), Verdict.UNCLEAR),
    "a folder": (lambda path: path.mkdir(), Verdict.NOT_A_FILE),
    "a fifo": (lambda path: os.mkfifo(path), Verdict.NOT_A_FILE),
    "a symlink": (lambda path: path.symlink_to("/nowhere/at/all"), Verdict.NOT_A_FILE),
}


@pytest.mark.parametrize("what", ODD_SEMAPHORES)
@pytest.mark.parametrize("orphan", [False, True], ids=["of a dead writer", "of no writer"])
def test_what_only_has_the_name_of_a_semaphore_stays(tmp_path: Path, what: str, orphan: bool) -> None:
    make, verdict = ODD_SEMAPHORES[what]
    name = f"sem.shmcast-{TOKEN}-1-p0"
    make(tmp_path / name)
    if not orphan:
        segment(tmp_path, None)
    assert verdicts(tmp_path)[name] is verdict
    sweep(str(tmp_path))
    assert left(tmp_path) == {name}


def test_a_control_segment_in_doubt_keeps_its_semaphores(tmp_path: Path) -> None:
    control = put(tmp_path / f"shmcast-{TOKEN}-1-c", b"")
    kept = semaphore(tmp_path, "p0")
    assert verdicts(tmp_path) == {kept.name: Verdict.UNCLEAR, control.name: Verdict.NO_MAGIC}
    assert sweep(str(tmp_path)) == []


def test_a_control_segment_stays_as_long_as_a_semaphore_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, stuck, goes = segment(tmp_path, None), semaphore(tmp_path, "p0"), semaphore(tmp_path, "w0")
    unlink = os.unlink

    def refused(path: Any) -> None:
        if str(path) == str(stuck):
            raise PermissionError(1, "Operation not permitted")
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refused)
        found = {each.name: each for each in _reclaim.sweep(str(tmp_path))}
    assert {name: each.verdict for name, each in found.items()} == {
        stuck.name: Verdict.FAILED,
        goes.name: Verdict.REMOVED,
        control.name: Verdict.FAILED,
    }
    assert "Operation not permitted" in found[stuck.name].why
    assert left(tmp_path) == {stuck.name, control.name}
    assert sweep(str(tmp_path)) == [stuck.name, control.name]


@pytest.mark.parametrize("number", [0, None])
def test_what_somebody_holds_stays(tmp_path: Path, number: int | None) -> None:
    path = segment(tmp_path, number)
    if number is None:
        semaphore(tmp_path, "p0")
    before = left(tmp_path)
    with path.open("rb") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
        assert verdicts(tmp_path) == dict.fromkeys(before, Verdict.IN_USE)
        assert sweep(str(tmp_path)) == []
    assert left(tmp_path) == before
    sweep(str(tmp_path))
    assert not path.exists()


def test_one_that_is_held_does_not_save_the_others(tmp_path: Path) -> None:
    held, gone = segment(tmp_path, 0), segment(tmp_path, 1)
    with held.open("rb") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
        assert sweep(str(tmp_path)) == [gone.name]
    assert left(tmp_path) == {held.name}


NAME = f"shmcast-{TOKEN}-1-0"


def other_name(name: str) -> Callable[[Path], object]:
    return lambda folder: lay(folder / name, header_of(0))


def changed(offset: int, value: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = segment(folder, 0)
        raw = bytearray(path.read_bytes())
        raw[offset : offset + len(value)] = value
        path.write_bytes(raw)

    return make


STRANGE: dict[str, Callable[[Path], object]] = {
    "no prefix": other_name(f"x{NAME}"),
    "a suffix": other_name(f"{NAME}.bak"),
    "a new line": other_name(f"{NAME}\n"),
    "upper case": other_name(NAME.upper()),
    "a short token": other_name(f"shmcast-{TOKEN[:-1]}-1-0"),
}
"""No names of ours: nothing is said about them."""

SPARED: dict[str, tuple[Callable[[Path], object], Verdict]] = {
    "another token": (other_name(f"shmcast-{'f' * 32}-1-0"), Verdict.OTHER_HEADER),
    "another rank": (other_name(f"shmcast-{TOKEN}-2-0"), Verdict.OTHER_HEADER),
    "another number": (other_name(f"shmcast-{TOKEN}-1-7"), Verdict.OTHER_HEADER),
    "a leading zero": (other_name(f"shmcast-{TOKEN}-1-00"), Verdict.OTHER_HEADER),
    "an arena segment called control": (other_name(f"shmcast-{TOKEN}-1-c"), Verdict.OTHER_HEADER),
    "a control segment called arena": (lambda folder: lay(folder / NAME, header_of(None)), Verdict.OTHER_HEADER),
    "cut after its header": (lambda folder: os.truncate(segment(folder, 0), PAGE), Verdict.OTHER_HEADER),
    "longer than its header says": (lambda folder: os.truncate(segment(folder, 0), 3 * PAGE), Verdict.OTHER_HEADER),
    "empty": (lambda folder: put(folder / NAME, b""), Verdict.NO_MAGIC),
    "zeros": (lambda folder: put(folder / NAME, bytes(2 * PAGE)), Verdict.NO_MAGIC),
    "no magic yet": (changed(0, bytes(8)), Verdict.NO_MAGIC),
    "foreign bytes": (lambda folder: put(folder / NAME, bytes(range(256)) * (2 * PAGE // 256)), Verdict.NO_MAGIC),
    "cut in its header": (lambda folder: os.truncate(segment(folder, 0), 63), Verdict.UNCLEAR),
    "another version": (changed(8, b"\2"), Verdict.UNCLEAR),
    "an unknown kind": (changed(12, b"\7"), Verdict.UNCLEAR),
    "another mode": (lambda folder: segment(folder, 0).chmod(0o644), Verdict.UNCLEAR),
    "a folder": (lambda folder: (folder / NAME).mkdir(), Verdict.NOT_A_FILE),
    "a fifo": (lambda folder: os.mkfifo(folder / NAME), Verdict.NOT_A_FILE),
    "a dangling symlink": (lambda folder: (folder / NAME).symlink_to("/nowhere/at/all"), Verdict.NOT_A_FILE),
}


@pytest.mark.parametrize("what", STRANGE)
def test_names_that_are_not_ours_are_not_looked_at(tmp_path: Path, what: str) -> None:
    STRANGE[what](tmp_path)
    before = left(tmp_path)
    assert _reclaim.sweep(str(tmp_path)) == []
    assert left(tmp_path) == before


@pytest.mark.parametrize("what", SPARED)
def test_whatever_is_in_doubt_stays(tmp_path: Path, what: str) -> None:
    make, verdict = SPARED[what]
    make(tmp_path)
    before = left(tmp_path)
    open_before = len(os.listdir("/proc/self/fd"))
    assert verdicts(tmp_path) == dict.fromkeys(before, verdict)
    assert sweep(str(tmp_path)) == []
    assert left(tmp_path) == before
    assert len(before) == 1
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_symlink_to_a_dead_segment_is_not_followed(tmp_path: Path) -> None:
    target = lay(tmp_path / "target", header_of(0))
    (tmp_path / NAME).symlink_to(target)
    assert sweep(str(tmp_path)) == []
    assert left(tmp_path) == {"target", NAME}


def test_the_segment_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = segment(tmp_path, 0)
    uid = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: uid + 1)
        assert verdicts(tmp_path) == {path.name: Verdict.OTHER_OWNER}
        assert sweep(str(tmp_path)) == []
    assert path.exists()
    assert sweep(str(tmp_path)) == [path.name]


def test_one_that_is_in_doubt_does_not_save_the_others(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    gone = segment(tmp_path, 1)
    assert sweep(str(tmp_path)) == [gone.name]


def test_a_name_that_was_taken_over_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = segment(tmp_path, 0)
    lock = fcntl.flock

    def late(fd: int, how: int) -> None:
        # Between our look at the header and our lock, the name goes to somebody else.
        path.unlink()
        path.write_bytes(b"new")
        lock(fd, how)

    monkeypatch.setattr(_reclaim.fcntl, "flock", late)  # type: ignore[attr-defined]
    assert [found.verdict for found in _reclaim.sweep(str(tmp_path))] == [Verdict.UNCLEAR]
    assert path.read_bytes() == b"new"


def test_semaphores_made_until_the_lock_was_had_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = segment(tmp_path, None)
    lock = fcntl.flock

    def late(fd: int, how: int) -> None:
        # Its writer was alive when the names were listed, made one more semaphore, and died.
        semaphore(tmp_path, "w0")
        lock(fd, how)

    monkeypatch.setattr(_reclaim.fcntl, "flock", late)  # type: ignore[attr-defined]
    assert sweep(str(tmp_path)) == [f"sem.shmcast-{TOKEN}-1-w0", control.name]
    assert left(tmp_path) == set()


def test_what_another_sweep_removed_first_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = segment(tmp_path, None)
    other = semaphore(tmp_path, "p0")
    unlink = os.unlink

    def raced(path: Any) -> None:
        if str(path) == str(other):
            unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", raced)
    assert sweep(str(tmp_path)) == [control.name]
    assert left(tmp_path) == set()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert sweep(str(tmp_path / "none")) == []
    assert examine(str(tmp_path / "none")) == []


def test_the_bytes_are_those_that_the_file_takes(tmp_path: Path) -> None:
    path = segment(tmp_path, 0)
    (found,) = examine(str(tmp_path))
    assert found.nbytes == path.stat().st_blocks * 512 >= 2 * PAGE
    os.truncate(path, 0)
    os.truncate(path, 2 * PAGE)
    (found,) = examine(str(tmp_path))
    assert found.nbytes == 0


# --- orphans: real semaphores whose control segment has no name


class Orphan:
    """A semaphore in /dev/shm, alone, which this process has mapped until `close`."""

    def __init__(self) -> None:
        self.stem = f"shmcast-{os.urandom(16).hex()}-0"
        self.path = SHM / f"sem.{self.stem}-p0"
        self.semaphore = posix_ipc.Semaphore(f"/{self.stem}-p0", posix_ipc.O_CREX, mode=0o600)

    def close(self) -> None:
        if self.semaphore is not None:
            self.semaphore.close()
        self.semaphore = None

    def verdict(self) -> Verdict | None:
        return {found.name: found.verdict for found in examine()}.get(self.path.name)


@pytest.fixture
def orphan() -> Iterator[Orphan]:
    made = Orphan()
    yield made
    made.close()
    made.path.unlink(missing_ok=True)


def test_an_orphan_that_somebody_has_mapped_stays(orphan: Orphan) -> None:
    assert orphan.verdict() is Verdict.IN_USE
    assert orphan.path.name not in sweep()
    orphan.semaphore.release()
    other = posix_ipc.Semaphore(f"/{orphan.stem}-p0")
    other.acquire(0)
    orphan.close()
    # The other mapping is enough.
    assert orphan.verdict() is Verdict.IN_USE
    other.close()
    assert orphan.verdict() is Verdict.DEAD


def test_an_orphan_that_nobody_has_mapped_goes(orphan: Orphan) -> None:
    orphan.close()
    assert orphan.verdict() is Verdict.DEAD
    assert orphan.path.exists()
    sweep()
    assert not orphan.path.exists()


def test_an_orphan_that_a_process_had_mapped_goes_once_that_is_killed(orphan: Orphan) -> None:
    script = (
        f"import posix_ipc, signal; s = posix_ipc.Semaphore('/{orphan.stem}-p0'); print(flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    said(process)
    orphan.close()
    assert orphan.verdict() is Verdict.IN_USE
    end(process)
    assert orphan.verdict() is Verdict.DEAD


def test_an_orphan_of_which_the_kernel_says_nothing_stays(orphan: Orphan, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan.close()
    real = fcntl.fcntl

    def refused(fd: int, command: int, arg: int = 0) -> int:
        if command == fcntl.F_SETLEASE:
            raise OSError(22, "Invalid argument")
        return real(fd, command, arg)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", refused)
        assert orphan.verdict() is Verdict.UNCLEAR
        sweep()
    assert orphan.path.exists()


def test_looking_at_an_orphan_keeps_nobody_from_opening_it(orphan: Orphan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening it breaks the lease that we have for a moment; the signal for that must not end us."""
    orphan.close()
    real, opened = fcntl.fcntl, []

    def late(fd: int, command: int, arg: int = 0) -> int:
        if command == fcntl.F_SETLEASE and arg == fcntl.F_UNLCK:
            with pytest.raises(BlockingIOError):
                os.open(orphan.path, os.O_RDWR | os.O_NONBLOCK)
            opened.append(fd)
        return real(fd, command, arg)

    monkeypatch.setattr(fcntl, "fcntl", late)
    assert orphan.verdict() is Verdict.DEAD
    assert len(opened) == 1


def test_a_control_segment_that_comes_back_keeps_its_semaphores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one does that was made after the names were listed, with its semaphores."""
    path = semaphore(tmp_path, "p0")
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: [name for name in listed(folder) if name == path.name])
    segment(tmp_path, None)
    assert [found.verdict for found in _reclaim.sweep(str(tmp_path))] == [Verdict.UNCLEAR]
    assert path.exists()


# --- real writers in /dev/shm


@pytest.mark.faults
def test_a_killed_writer_is_swept_and_a_living_one_is_not() -> None:
    living = Arena(1, 2 * PAGE, 0)
    process = start()
    stem = said(process)
    expected = [f"sem.{stem}-{kind}{i}" for kind in "pw" for i in (0, 1)] + [f"{stem}-{n}" for n in (0, 1, "c")]
    assert names(stem) == sorted(expected)
    assert set(sweep()).isdisjoint(expected)
    assert names(stem) == sorted(expected)
    end(process)
    assert process.returncode == -signal.SIGKILL
    # Another process may sweep at the same time: what counts is that they are gone.
    sweep()
    assert names(stem) == []
    assert len(names(living.address.stem[1:])) == 4
    living.close()


@pytest.mark.faults
def test_a_stopped_writer_is_not_swept() -> None:
    process = start()
    stem = said(process)
    process.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    before = names(stem)
    sweep()
    assert names(stem) == before
    end(process)
    sweep()
    assert names(stem) == []


@pytest.mark.faults
def test_a_forked_child_does_not_keep_a_dead_writer_from_being_swept() -> None:
    process = start("fork")
    said_first, said_second = said(process), said(process)
    stem = said_second if said_first == "child" else said_first
    process.kill()
    process.wait(60)
    sweep()
    assert names(stem) == []
    # The child is alive until now.
    process.communicate(timeout=60)
