"""Who is alive, by locks that the kernel takes back from the dead."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from shmcast._peers import WRITER_BYTE, Seat, is_taken


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """An empty file: all that is locked lies past its end."""
    fd = os.open(tmp_path / "control", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


def test_a_seat_is_taken_until_it_is_released(file: int) -> None:
    assert not is_taken(file, 3)
    seat = Seat(file, 3)
    assert is_taken(file, 3)
    seat.release()
    assert not is_taken(file, 3)


@pytest.mark.parametrize("byte", [0, 1, 63, WRITER_BYTE])
def test_bytes_are_locked_one_by_one(file: int, byte: int) -> None:
    seat = Seat(file, byte)
    asked = {0, 1, 2, 62, 63, 64, WRITER_BYTE - 1, WRITER_BYTE, WRITER_BYTE + 1}
    assert {one for one in asked if is_taken(file, one)} == {byte}
    seat.release()


def test_the_file_does_not_grow(file: int) -> None:
    seat = Seat(file, WRITER_BYTE)
    assert os.fstat(file).st_size == 0
    seat.release()


def test_a_seat_is_taken_once_within_one_process_too(file: int) -> None:
    seat = Seat(file, 3)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BlockingIOError, match="byte 3 is locked") as caught:
        Seat(file, 3)
    assert caught.value.errno in (errno.EAGAIN, errno.EACCES)
    assert len(os.listdir("/proc/self/fd")) == open_before
    seat.release()
    Seat(file, 3).release()


def test_another_error_is_not_taken_for_a_lock(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOLCK, "no locks")

    open_before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="no locks") as caught:
        Seat(file, 3)
    assert not isinstance(caught.value, BlockingIOError)
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_closing_other_descriptors_does_not_give_the_seat_up(file: int) -> None:
    mine = os.dup(file)
    other = os.open(f"/proc/self/fd/{file}", os.O_RDWR)
    seat = Seat(mine, 3)
    os.close(mine)
    os.close(other)
    assert is_taken(file, 3)
    seat.release()


def test_a_flock_beside_it_changes_nothing(file: int) -> None:
    seat = Seat(file, 3)
    fcntl.flock(file, fcntl.LOCK_EX)
    assert is_taken(file, 3)
    fcntl.flock(file, fcntl.LOCK_UN)
    assert is_taken(file, 3)
    seat.release()


def test_a_seat_on_a_file_without_a_name(file: int, tmp_path: Path) -> None:
    (tmp_path / "control").unlink()
    seat = Seat(file, 3)
    assert is_taken(file, 3)
    with pytest.raises(BlockingIOError):
        Seat(file, 3)
    seat.release()
    assert not is_taken(file, 3)


def test_a_read_only_descriptor_can_ask(file: int) -> None:
    reading = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    assert not is_taken(reading, 3)
    seat = Seat(file, 3)
    assert is_taken(reading, 3)
    seat.release()
    os.close(reading)


def test_release_twice_closes_once(file: int) -> None:
    seat = Seat(file, 3)
    seat.release()
    unrelated = os.open("/dev/null", os.O_RDONLY)
    seat.release()
    os.fstat(unrelated)
    os.close(unrelated)


def test_a_forgotten_seat_closes_nothing(file: int) -> None:
    seat = Seat(file, 3)
    fd = seat._fd
    seat.forget()
    seat.release()
    assert is_taken(file, 3)
    os.close(fd)
    assert not is_taken(file, 3)


# --- several processes


def start(code: str, *args: object, fds: tuple[int, ...] = ()) -> "subprocess.Popen[str]":
    """Runs `code`; it starts with a line on stdout when it is ready."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=fds)


def line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()


def end(process: "subprocess.Popen[str]") -> None:
    """Closes its stdin, so that whoever reads from it ends; waits until the last one has closed stdout."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    assert process.stdout.read() == ""
    process.stdout.close()
    process.wait(60)


@pytest.mark.faults
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_the_kernel_takes_the_seat_of_the_dead(file: int, signum: signal.Signals) -> None:
    process = start(
        """
        import signal, sys
        from shmcast._peers import Seat
        seat = Seat(int(sys.argv[1]), 3)
        print("seated", flush=True)
        signal.pause()
        """,
        file,
        fds=(file,),
    )
    assert line(process.stdout) == "seated"
    assert is_taken(file, 3)
    with pytest.raises(BlockingIOError):
        Seat(file, 3)
    process.send_signal(signum)
    process.wait(60)
    assert not is_taken(file, 3)
    end(process)


@pytest.mark.faults
def test_a_stopped_process_is_not_dead(file: int) -> None:
    process = start(
        """
        import signal, sys
        from shmcast._peers import Seat
        seat = Seat(int(sys.argv[1]), 3)
        print("seated", flush=True)
        signal.pause()
        """,
        file,
        fds=(file,),
    )
    assert line(process.stdout) == "seated"
    process.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    assert is_taken(file, 3)
    process.kill()
    process.wait(60)
    assert not is_taken(file, 3)
    end(process)


FORKS = """
import os, signal, sys
from shmcast import _segment
from shmcast._layout import Kind, SegmentHeader, control_size
from shmcast._peers import Seat, is_taken

fd = int(sys.argv[1])
header = SegmentHeader(Kind.CONTROL, bytes(16), 0, 0, control_size(1, 2), readers=1, entries=2)
# A mapping of the file, as a segment has: its inode is what the child looks for.
mapping = _segment._map(fd, 4096, _segment.mmap.MAP_SHARED)
seat = Seat(fd, 3)
if os.fork() == 0:
    print("child", flush=True)
    sys.stdin.read()
    os._exit(0)
signal.pause()
"""


@pytest.mark.faults
def test_a_forked_child_does_not_keep_the_seat_of_its_dead_parent(file: int) -> None:
    os.ftruncate(file, 4096)
    process = start(FORKS, file, fds=(file,))
    assert line(process.stdout) == "child"
    assert is_taken(file, 3)
    process.kill()
    process.wait(60)
    # The child is alive: its end of stdout is open until it has read the end of stdin.
    assert not is_taken(file, 3)
    end(process)


def test_a_forked_child_gives_nothing_up_for_its_parent(file: int) -> None:
    os.ftruncate(file, 4096)
    child = """
    numbers = [os.open("/dev/zero", os.O_RDONLY) for _ in range(9)]
    seat.release()
    # None of the descriptors that have the old numbers now was closed.
    os._exit(any(os.read(number, 1) != bytes(1) for number in numbers))
"""
    code = FORKS.replace("    sys.stdin.read()\n    os._exit(0)\n", child)
    code = code.replace("signal.pause()", 'print(os.wait()[1], is_taken(os.open(f"/proc/self/fd/{fd}", 2), 3))')
    process = start(code, file, fds=(file,))
    assert (line(process.stdout), line(process.stdout)) == ("child", "0 True")
    end(process)
    assert not is_taken(file, 3)
