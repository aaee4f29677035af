"""The groups of this user that live on this machine, as anybody can see them: needs neither torch nor numpy.

What is seen comes from three places: /proc (who has which segment open, who holds which lock), the kernel's answer to
who lives, and the control segment itself (header, board, rings), read through a descriptor, never mapped. Everything
read is of other processes: they may vanish, or lie, at any moment.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from shmcast._board import Board, Introduction, Torn, claim_of, parse_board, parse_introduction
from shmcast._layout import (
    PAGE,
    RING_ENTRIES,
    RING_HEAD,
    SEGMENT,
    Kind,
    SegmentHeader,
    board_offset,
    parse_entry,
    parse_segment,
    ring_offset,
    ring_size,
)
from shmcast._peers import WRITER_BYTE, is_taken
from shmcast._room import SHM
from shmcast._wire import LAST_REASON, Reason
from shmcast.cli._processes import OpenFile, Process, open_files, processes
from shmcast.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from shmcast._layout import Entry

NAME: Final = re.compile(r"shmcast-([0-9a-f]{32})-(\d{1,10})-(c|\d{1,4})")
MODE: Final = 0o600
TRIES: Final = 20
PAUSE: Final = 1e-3


@dataclass(frozen=True)
class SegmentSeen:
    """A segment. `number`: None for the control segment. `resident`: bytes that are there. `pids`: who has it open."""

    number: int | None
    bytes: int
    resident: int
    named: bool
    pids: tuple[int, ...]


@dataclass(frozen=True)
class ReaderSeen:
    """A reader of a group.

    Attributes:
        index: its number.
        state: `absent` while it has not come, `alive`, `stopped`, `gone` once it died or was closed.
        process: that holds its lock; None where there is none that can be seen.
        pid_hint: as it says itself, in its own pid namespace; 0 if it said nothing.
        held: leases that it has; None without a board.
        opened: those that it has opened.
        oldest: seconds since the oldest was given, None where there is none; where not `settled`, at most that.
        settled: whether the writer has heard all that it said.
        fallbacks: of its rank, by reason.
    """

    index: int
    state: str
    process: Process | None
    pid_hint: int
    held: int | None
    opened: int | None
    oldest: float | None
    settled: bool
    fallbacks: Mapping[str, int]


@dataclass(frozen=True)
class GroupSeen:
    """A writer, its segments and its readers.

    Attributes:
        token, rank: which one it is.
        state: `open`, `stopped`, `closed`, `dead`; `unknown` where no board says so.
        process, pid_hint: as for a reader.
        age: seconds since it was made.
        board_age: seconds since the board was written; this and all that it says is None where there is none.
        capacity: the most bytes of shared memory that it will use.
        segment_bytes, free_bytes, largest_free_block, live_blocks: of its arena.
        messages, bytes: that its rank has sent, by whatever route.
        fallbacks: of its rank, by reason.
        segments: the control segment first.
        readers: by index.
        trouble: what could not be read, and why; empty where all could.
    """

    token: str
    rank: int
    state: str = "unknown"
    process: Process | None = None
    pid_hint: int = 0
    age: float | None = None
    board_age: float | None = None
    capacity: int | None = None
    segment_bytes: int | None = None
    free_bytes: int | None = None
    largest_free_block: int | None = None
    live_blocks: int | None = None
    messages: int | None = None
    bytes: int | None = None
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    segments: tuple[SegmentSeen, ...] = ()
    readers: tuple[ReaderSeen, ...] = ()
    trouble: str = ""


@dataclass(frozen=True)
class Sight:
    """Everything at one moment.

    Attributes:
        groups: by the age of the writer, oldest first.
        orphans: names in /dev/shm of segments that no process of this user has open.
        hidden: processes of this user whose descriptors may not be looked at.
    """

    groups: tuple[GroupSeen, ...]
    orphans: tuple[str, ...]
    hidden: tuple[int, ...]


@dataclass
class _Found:
    """A segment while the look lasts: open for reading, and who has it."""

    fd: int
    status: os.stat_result
    name: tuple[str, int, int | None]
    pids: set[int] = field(default_factory=set)
    locks: dict[int, int] = field(default_factory=dict)


def look() -> Sight:
    """What there is now."""
    seen: dict[int, Process] = {}
    hidden: list[int] = []
    with ExitStack() as undo:
        found: dict[tuple[int, int], _Found] = {}
        for process in processes():
            try:
                for file in open_files(process, _matches):
                    _note(found, undo, process, file)
            except PermissionError:
                hidden.append(process.pid)
            except OSError:
                continue  # it has ended
            seen[process.pid] = process
        groups = _by_group(found.values())
        sights = [_group(token, rank, group, seen) for (token, rank), group in groups.items()]
        orphans = _orphans(found)
    sights.sort(key=lambda group: (-(group.age or 0.0), group.token, group.rank))
    return Sight(tuple(sights), orphans, tuple(sorted(hidden)))


def _matches(link: str) -> bool:
    return bool(NAME.fullmatch(_base(link)))


def _base(link: str) -> str:
    return link.removesuffix(" (deleted)").rpartition("/")[2]


def _note(found: dict[tuple[int, int], _Found], undo: ExitStack, process: Process, file: OpenFile) -> None:
    status = os.fstat(file.path_fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != MODE:
        return
    key = status.st_dev, status.st_ino
    if key not in found:
        match = NAME.fullmatch(_base(file.link))
        if match is None:
            return
        # Only now: to open a file of another kind may have effects of its own.
        fd = os.open(f"/proc/self/fd/{file.path_fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        undo.callback(os.close, fd)
        number = None if match[3] == "c" else int(match[3])
        found[key] = _Found(fd, status, (match[1], int(match[2]), number))
    found[key].pids.add(process.pid)
    for byte in file.locks:
        # A child that was forked this moment still has its parent's descriptors.
        found[key].locks.setdefault(byte, process.pid)


def _by_group(found: Iterable[_Found]) -> dict[tuple[str, int], list[_Found]]:
    groups: dict[tuple[str, int], list[_Found]] = {}
    for each in found:
        groups.setdefault(each.name[:2], []).append(each)
    return groups


def _orphans(found: Mapping[tuple[int, int], _Found]) -> tuple[str, ...]:
    names = []
    with suppress(OSError):
        for name in sorted(os.listdir(SHM)):
            if NAME.fullmatch(name):
                with suppress(OSError):
                    status = os.lstat(os.path.join(SHM, name))
                    if status.st_uid == os.geteuid() and (status.st_dev, status.st_ino) not in found:
                        names.append(name)
    return tuple(names)


# One group.


def _group(token: str, rank: int, found: list[_Found], seen: Mapping[int, Process]) -> GroupSeen:
    found.sort(key=lambda each: -1 if each.name[2] is None else each.name[2])
    group = GroupSeen(token, rank, segments=tuple(_segment(each) for each in found))
    controls = [each for each in found if each.name[2] is None]
    if not controls:
        return replace(group, trouble="nobody has its control segment open: what is left lives as long as its tensors")
    control = controls[0]
    group = replace(group, process=seen.get(control.locks.get(WRITER_BYTE, -1)))
    try:
        header = _header(control)
        return _with_ends(group, control, header, seen)
    except (LayoutError, OSError) as error:
        return replace(group, trouble=f"its control segment cannot be read: {error}")


def _segment(found: _Found) -> SegmentSeen:
    status = found.status
    pids = tuple(sorted(found.pids))
    return SegmentSeen(found.name[2], status.st_size, status.st_blocks * 512, status.st_nlink > 0, pids)


def _header(control: _Found) -> SegmentHeader:
    header = parse_segment(os.pread(control.fd, SEGMENT.size, 0))
    size = os.fstat(control.fd).st_size
    if header.kind != Kind.CONTROL or (header.token.hex(), header.rank) != control.name[:2]:
        raise LayoutError(f"another segment than its name says: {header}")
    if header.size != size:
        raise LayoutError(f"it has {size} bytes, its header says {header.size}")
    if header.entries > RING_ENTRIES:
        raise LayoutError(f"rings of {header.entries} entries")
    return header


def _with_ends(group: GroupSeen, control: _Found, header: SegmentHeader, seen: Mapping[int, Process]) -> GroupSeen:
    board, trouble = None, ""
    try:
        board = _read_board(control.fd, header)
    except LayoutError as error:
        trouble = str(error)
    if is_taken(control.fd, WRITER_BYTE):
        state = "stopped" if group.process and group.process.stopped else "open"
    else:
        state = "unknown" if board is None else "closed" if board.closed else "dead"
    readers = tuple(_reader(control, header, index, board, seen) for index in range(header.readers))
    group = replace(group, state=state, readers=readers, trouble=trouble)
    if board is None:
        return group
    return replace(
        group,
        pid_hint=board.pid,
        age=_age(board.made),
        board_age=_age(board.written),
        capacity=board.capacity,
        segment_bytes=board.total,
        free_bytes=board.free,
        largest_free_block=board.largest,
        live_blocks=board.live,
        messages=board.messages,
        bytes=board.bytes,
        fallbacks=board.fallbacks,
    )


def _read_board(fd: int, header: SegmentHeader) -> Board | None:
    """The board; one that is being written is read again. Raises as `parse_board`, `Torn` if that takes too long."""
    at = board_offset(header.readers, header.entries, header.slots)
    for _ in range(TRIES - 1):
        with suppress(Torn):
            return parse_board(os.pread(fd, PAGE, at), header.readers)
        time.sleep(PAUSE)
    return parse_board(os.pread(fd, PAGE, at), header.readers)


def _reader(
    control: _Found, header: SegmentHeader, index: int, board: Board | None, seen: Mapping[int, Process]
) -> ReaderSeen:
    at = ring_offset(index, header.entries)
    head = parse_introduction(os.pread(control.fd, RING_HEAD.size, at))
    alive = is_taken(control.fd, index)
    process = seen.get(control.locks.get(index, -1))
    claim = None
    if board is not None:
        row = board.readers[index]
        claim = claim_of(board, row, _said(control.fd, at, header.entries, row.heard))
    return ReaderSeen(
        index,
        _state(head, alive, process),
        process,
        head.pid,
        None if claim is None else claim.held,
        None if claim is None else claim.opened,
        None if claim is None else _age(claim.since),
        claim is not None and claim.settled,
        {_reason(number): count for number, count in enumerate(head.fallbacks) if count},
    )


def _state(head: Introduction, alive: bool, process: Process | None) -> str:
    if alive:
        return "stopped" if process is not None and process.stopped else "alive"
    return "gone" if head.taken else "absent"


def _said(fd: int, at: int, entries: int, heard: int) -> Iterator[Entry]:
    """What a reader has said since its writer last listened. A writer that listens meanwhile changes nothing here."""
    ring = os.pread(fd, ring_size(entries), at)
    with suppress(LayoutError, struct.error):
        for seq in range(heard, heard + entries):
            yield parse_entry(ring, entries, seq)


def _age(then: int) -> float | None:
    """Seconds since a time of the monotonic clock; None for none, and for one of another time namespace."""
    now = time.monotonic_ns()
    return (now - then) / 1e9 if 0 < then <= now else None


def _reason(number: int) -> str:
    return Reason(number).name.lower() if number <= LAST_REASON else f"reason {number}"
