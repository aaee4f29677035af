"""What dead writers left is removed, and nothing else is, whatever it looks like."""

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shmcast import _reclaim
from shmcast._arena import Arena
from shmcast._layout import PAGE, Kind, SegmentHeader, control_size
from shmcast._reclaim import sweep

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
    path.write_bytes(page)
    return path


def segment(folder: Path, number: int | None, rank: int = 1, token: str = TOKEN) -> Path:
    tail = "c" if number is None else str(number)
    return lay(folder / f"shmcast-{token}-{rank}-{tail}", header_of(number, rank, token))


def left(folder: Path) -> set[str]:
    return set(os.listdir(folder))


# --- files in a folder


def test_removes_the_segments_of_a_dead_writer(tmp_path: Path) -> None:
    paths = [segment(tmp_path, number) for number in (0, 1, 1023, None)]
    assert sweep(str(tmp_path)) == sorted(path.name for path in paths)
    assert left(tmp_path) == set()
    assert sweep(str(tmp_path)) == []


def test_semaphores_go_with_the_control_segment_and_before_it(tmp_path: Path) -> None:
    control = segment(tmp_path, None)
    semaphores = [f"sem.shmcast-{TOKEN}-1-{tail}" for tail in ("p0", "p1", "w0", "w1")]
    for semaphore in semaphores:
        (tmp_path / semaphore).write_bytes(bytes(32))
    assert sweep(str(tmp_path)) == [*semaphores, control.name]
    assert left(tmp_path) == set()


def test_semaphores_without_their_control_segment_stay(tmp_path: Path) -> None:
    gone = segment(tmp_path, 0)
    spared = {f"sem.shmcast-{TOKEN}-1-p0", f"sem.shmcast-{TOKEN}-1-w0"}
    for name in spared:
        (tmp_path / name).write_bytes(bytes(32))
    assert sweep(str(tmp_path)) == [gone.name]
    assert left(tmp_path) == spared


def test_semaphores_of_other_writers_stay(tmp_path: Path) -> None:
    segment(tmp_path, None)
    spared = {f"sem.shmcast-{TOKEN}-11-p0", f"sem.shmcast-{'f' * 32}-1-p0", f"sem.other-{TOKEN}-1-p0", "sem.shmcast-"}
    for name in spared:
        (tmp_path / name).write_bytes(bytes(32))
    sweep(str(tmp_path))
    assert left(tmp_path) == spared


@pytest.mark.parametrize("number", [0, None])
def test_what_somebody_holds_stays(tmp_path: Path, number: int | None) -> None:
    path = segment(tmp_path, number)
    (tmp_path / f"sem.shmcast-{TOKEN}-1-p0").write_bytes(bytes(32))
    before = left(tmp_path)
    with path.open("rb") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
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


SPARED: dict[str, Callable[[Path], object]] = {
    "no prefix": other_name(f"x{NAME}"),
    "a suffix": other_name(f"{NAME}.bak"),
    "a new line": other_name(f"{NAME}\n"),
    "upper case": other_name(NAME.upper()),
    "a short token": other_name(f"shmcast-{TOKEN[:-1]}-1-0"),
    "another token": other_name(f"shmcast-{'f' * 32}-1-0"),
    "another rank": other_name(f"shmcast-{TOKEN}-2-0"),
    "another number": other_name(f"shmcast-{TOKEN}-1-7"),
    "a leading zero": other_name(f"shmcast-{TOKEN}-1-00"),
    "an arena segment called control": other_name(f"shmcast-{TOKEN}-1-c"),
    "a control segment called arena": lambda folder: lay(folder / NAME, header_of(None)),
    "empty": lambda folder: (folder / NAME).write_bytes(b""),
    "cut": lambda folder: (folder / NAME).write_bytes(segment(folder, 0).read_bytes()[:63]),
    "no magic yet": changed(0, bytes(8)),
    "another version": changed(8, b"\2"),
    "an unknown kind": changed(12, b"\7"),
    "foreign bytes": lambda folder: (folder / NAME).write_bytes(bytes(range(256)) * (2 * PAGE // 256)),
    "a folder": lambda folder: (folder / NAME).mkdir(),
    "a fifo": lambda folder: os.mkfifo(folder / NAME),
    "a dangling symlink": lambda folder: (folder / NAME).symlink_to("/nowhere/at/all"),
}


@pytest.mark.parametrize("what", SPARED)
def test_whatever_is_in_doubt_stays(tmp_path: Path, what: str) -> None:
    SPARED[what](tmp_path)
    before = left(tmp_path)
    open_before = len(os.listdir("/proc/self/fd"))
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
    assert sweep(str(tmp_path)) == []
    assert path.read_bytes() == b"new"


def test_what_another_sweep_removed_first_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control = segment(tmp_path, None)
    semaphore = tmp_path / f"sem.shmcast-{TOKEN}-1-p0"
    semaphore.write_bytes(bytes(32))
    unlink = os.unlink

    def raced(path: Any) -> None:
        if str(path) == str(semaphore):
            unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", raced)
    assert sweep(str(tmp_path)) == [control.name]
    assert left(tmp_path) == set()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert sweep(str(tmp_path / "none")) == []


# --- real writers in /dev/shm

WRITER = """
import os, signal, sys
from shmcast import _arena
from shmcast._layout import PAGE
_arena.STEP = 8 * PAGE
arena = _arena.Arena(2, 32 * PAGE, 3)
arena.reserve(7 * PAGE, 0.0)
arena.reserve(PAGE, 0.0)
if "fork" in sys.argv:
    if os.fork() == 0:
        print("child", flush=True)
        sys.stdin.read()
        os._exit(0)
print(arena.address.stem[1:], flush=True)
signal.pause()
"""


def start(*words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(WRITER), *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(stem: str) -> list[str]:
    return sorted(name for name in os.listdir(SHM) if stem in name)


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate(timeout=60)


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
