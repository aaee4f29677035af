"""Removes what dead writers left: a SIGKILL of all ranks before every reader had mapped leaves names in /dev/shm.

Each name of ours gets a verdict. A segment is dead only if it is a regular file of our own uid, shows our magic under
the name that its header gives, and nobody alive holds its shared `flock`; a semaphore only if its control segment is,
or if that is gone and no process has the semaphore mapped. Whatever is in doubt stays. Needs neither torch nor numpy.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
import struct
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Final

from shmcast._layout import SEGMENT, SEGMENT_MAGIC, Kind, parse_segment
from shmcast._room import SHM
from shmcast._wire import Address
from shmcast.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SEGMENT_NAME: Final = re.compile(r"shmcast-[0-9a-f]{32}-\d+-(c|\d+)")
SEMAPHORE_NAME: Final = re.compile(r"sem\.(shmcast-[0-9a-f]{32}-\d+)-[pwh]\d+")
MODE: Final = 0o600
SEMAPHORE_BYTES: Final = 4 * struct.calcsize("l")


class Verdict(str, Enum):
    """What a name turned out to be, and what was done about it."""

    DEAD = "dead"
    REMOVED = "removed"
    FAILED = "failed"
    IN_USE = "in use"
    OTHER_OWNER = "other owner"
    NOT_A_FILE = "not a regular file"
    NO_MAGIC = "no magic"
    OTHER_HEADER = "other header"
    UNCLEAR = "unclear"


LEFT_OVER: Final = frozenset((Verdict.DEAD, Verdict.FAILED))
"""What dead processes left and is still there."""


@dataclass(frozen=True)
class Found:
    """One name of ours in /dev/shm: the bytes that its file takes, the verdict, and why."""

    name: str
    nbytes: int
    verdict: Verdict
    why: str


class _Kept(Exception):
    """The name at hand is not known to be dead."""

    def __init__(self, verdict: Verdict, why: str) -> None:
        super().__init__(why)
        self.verdict = verdict
        self.why = why


def examine(folder: str = SHM) -> list[Found]:
    """A verdict on every name of ours; removes nothing. Empty where there is no such folder."""
    return list(_visit(folder, lambda found: found))


def sweep(folder: str = SHM) -> list[Found]:
    """Remove every name of ours whose verdict is dead; what was met, in the order in which it was dealt with."""
    return list(_visit(folder, lambda found: _unlink(folder, found)))


def _visit(folder: str, end: Callable[[Found], Found | None]) -> Iterator[Found]:
    """Judge each name, and `end` it while what proves its verdict still holds."""
    segments, semaphores = _names(folder)
    for name in segments:
        stem, _, tail = name.rpartition("-")
        yield from _visit_segment(folder, name, semaphores.pop(stem, []) if tail == "c" else [], end)
    for stem, names in semaphores.items():
        for name in names:
            yield from _visit_orphan(folder, name, f"{stem}-c", end)


def _visit_segment(
    folder: str, name: str, semaphores: Iterable[str], end: Callable[[Found], Found | None]
) -> Iterator[Found]:
    """A segment, and before it the semaphores of a control segment: only its name tells whose they are."""
    with ExitStack() as lock:
        segment = _judge(lock, folder, name, _check_file, lambda fd, status: _prove_segment(fd, status, name))
        if segment is None:
            return
        if segment.verdict is Verdict.DEAD and name.endswith("-c"):
            # Looked for again under the lock: before it, their creator may have been alive and making more.
            semaphores = _names(folder)[1].get(name[:-2], [])
        for semaphore in semaphores:
            ended = _end_semaphore(folder, semaphore, segment, end)
            if ended and ended.verdict is Verdict.FAILED:
                segment = replace(segment, verdict=Verdict.FAILED, why="stays as long as its semaphores do")
            yield from [ended] if ended else []
        if last := end(segment):
            yield last


def _end_semaphore(folder: str, name: str, control: Found, end: Callable[[Found], Found | None]) -> Found | None:
    """A semaphore shares the fate of its control segment, which is locked if it is dead."""

    def check(status: os.stat_result) -> None:
        _check_semaphore(status)
        if control.verdict is Verdict.IN_USE:
            raise _Kept(Verdict.IN_USE, "its control segment is in use")
        if control.verdict not in LEFT_OVER:
            text = f"its control segment, which tells whose it is, is kept: {control.verdict.value}"
            raise _Kept(Verdict.UNCLEAR, text)

    with ExitStack() as stack:
        found = _judge(stack, folder, name, check, lambda fd, status: "its control segment is dead")
        return end(found) if found else None


def _visit_orphan(folder: str, name: str, control: str, end: Callable[[Found], Found | None]) -> Iterator[Found]:
    path = os.path.join(folder, control)
    with ExitStack() as stack:
        found = _judge(stack, folder, name, _check_semaphore, lambda fd, status: _prove_orphan(fd, path))
        if found and (ended := end(found)):
            yield ended


def _judge(
    stack: ExitStack,
    folder: str,
    name: str,
    check: Callable[[os.stat_result], None],
    prove: Callable[[int, os.stat_result], str],
) -> Found | None:
    """The verdict on one name; None where it is gone. What `prove` locks stays locked as long as `stack` lasts."""
    path = os.path.join(folder, name)
    nbytes = 0
    try:
        status = os.lstat(path)
        nbytes = status.st_blocks * 512
        check(status)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        stack.callback(os.close, fd)
        status = os.fstat(fd)
        check(status)
        why = prove(fd, status)
        if os.path.samestat(os.lstat(path), status):
            return Found(name, nbytes, Verdict.DEAD, why)
        return Found(name, nbytes, Verdict.UNCLEAR, "its name was taken over while it was looked at")
    except FileNotFoundError:
        return None
    except _Kept as kept:
        return Found(name, nbytes, kept.verdict, kept.why)
    except OSError as error:
        return Found(name, nbytes, Verdict.UNCLEAR, f"cannot be looked at: {error.strerror}")


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _Kept(Verdict.NOT_A_FILE, "shmcast makes only regular files")
    if status.st_uid != os.geteuid():
        raise _Kept(Verdict.OTHER_OWNER, f"belongs to uid {status.st_uid}, who can remove it")


def _check_mode(status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~MODE:
        raise _Kept(Verdict.UNCLEAR, f"its mode is {mode:o}, shmcast gives {MODE:o}")


def _prove_segment(fd: int, status: os.stat_result, name: str) -> str:
    """Lock a dead segment; raise `_Kept` for any other."""
    raw = os.pread(fd, SEGMENT.size, 0)
    if raw[: len(SEGMENT_MAGIC)] != SEGMENT_MAGIC:
        raise _Kept(Verdict.NO_MAGIC, "none of shmcast's making, or damaged: may be anybody's")
    _check_mode(status)
    try:
        header = parse_segment(raw)
    except LayoutError as error:
        raise _Kept(Verdict.UNCLEAR, str(error)) from None
    address = Address(header.token, header.rank, header.readers)
    told = address.control if header.kind == Kind.CONTROL else address.segment(header.number)
    if f"/{name}" != told:
        raise _Kept(Verdict.OTHER_HEADER, f"its header is that of {told[1:]}")
    if header.size != status.st_size:
        raise _Kept(Verdict.OTHER_HEADER, f"has {status.st_size} bytes, its header says {header.size}")
    # A creator locks before it gives the name, a reader before it reads the header: whoever uses it holds a lock.
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _Kept(Verdict.IN_USE, "a living process holds its lock") from None
    return "nobody alive holds its lock"


def _prove_orphan(fd: int, control: str) -> str:
    """A semaphore whose control segment has no name.

    A writer makes its semaphores after that name and unlinks them before it, so that nobody who comes now can attach.
    Somebody else may have removed the name under living processes: they have the semaphore mapped, writable, and the
    kernel grants no read lease on what anybody has open for writing, in whichever namespaces that is.
    """
    if os.path.lexists(control):
        raise _Kept(Verdict.UNCLEAR, "a writer is just making it")
    try:
        # Whoever opens it meanwhile breaks the lease; the signal for that would by default end this process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        raise _Kept(Verdict.IN_USE, "its control segment is gone, but a living process has it mapped") from None
    except OSError as error:
        text = f"its control segment is gone, and the kernel does not say who has it mapped: {error.strerror}"
        raise _Kept(Verdict.UNCLEAR, text) from None
    return "its control segment is gone, and nobody has it mapped"


def _check_semaphore(status: os.stat_result) -> None:
    _check_file(status)
    _check_mode(status)
    if status.st_size != SEMAPHORE_BYTES:
        raise _Kept(Verdict.UNCLEAR, f"has {status.st_size} bytes, a semaphore {SEMAPHORE_BYTES}")


def _unlink(folder: str, found: Found) -> Found | None:
    """Remove what is dead; None where another sweep was faster."""
    if found.verdict is not Verdict.DEAD:
        return found
    try:
        os.unlink(os.path.join(folder, found.name))
    except FileNotFoundError:
        return None
    except OSError as error:
        return replace(found, verdict=Verdict.FAILED, why=f"cannot be removed: {error.strerror}")
    return replace(found, verdict=Verdict.REMOVED)


def _names(folder: str) -> tuple[list[str], dict[str, list[str]]]:
    """Our names: those of segments, and by the writer's stem those of semaphores."""
    segments: list[str] = []
    semaphores: dict[str, list[str]] = {}
    with suppress(OSError):
        for name in sorted(os.listdir(folder)):
            if SEGMENT_NAME.fullmatch(name):
                segments.append(name)
            elif match := SEMAPHORE_NAME.fullmatch(name):
                semaphores.setdefault(match[1], []).append(name)
    return segments, semaphores
