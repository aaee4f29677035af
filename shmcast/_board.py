"""The board: what a writer tells whoever looks on, without being asked; part of format version 1.

Pure functions over bytes: no I/O, no clock. Whatever is wrong with them is a `LayoutError`. All times are nanoseconds
of the machine's monotonic clock, 0 for none.

Board: the last page of the control segment (L11).

    offset  size  field      written by
    ------  ----  ---------  ----------------------------------------------------------
         0     8  before     writer: number of this state of the board, first of all; 0: none was written yet
         8     8  written    writer: when
        16     8  made       writer: when the writer was made
        24     4  pid        writer: of its process, in its own pid namespace; a hint
        28     4  state      writer: 1 open, 2 closed
        32     8  capacity   writer: the most bytes of shared memory that it will use
        40     8  granted    writer: the first ticket that it has not granted
        48     8  live       writer: live blocks
        56     8  free       writer: bytes in holes
        64     8  largest    writer: bytes of the largest hole
        72     8  total      writer: bytes of all arena segments
        80     8  messages   writer: messages that its rank has sent, by whatever route
        88     8  bytes      writer: bytes of their tensors
        96   256  fallbacks  writer: 16 entries, zeros where there are fewer
       352  1536  readers    writer: 64 entries, one for each reader there can be
      1888     4  reserved
      1892     4  checksum   writer: CRC-32 of bytes 0 to 1891
      1896     8  after      writer: the same number, last of all

Board fallback.

         0    12  reason     writer: lower case letters, zero padded
        12     4  count      writer: how often on its rank

Board reader.

         0     4  held       writer: leases that the reader was given and has not given back
         4     4  opened     writer: those of them that it has opened
         8     8  since      writer: when the oldest of them was given; 0: none is held
        16     8  heard      writer: entries of the reader's ring that this state has seen
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

from shmcast._layout import LONG, MAX_READERS, MAX_TICKETS, NEVER, RING_HEAD, WORD, Bytes, EntryKind
from shmcast.errors import LayoutError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterable, Mapping

    from shmcast._layout import Entry

MAX_FALLBACKS: Final = 16
MOST: Final = 2**32 - 1
REASON: Final = re.compile(rb"([a-z_]{1,12})\0*")

BOARD: Final = struct.Struct("<QQQIIQQQQQQQQ256s1536s4xIQ")
FALLBACK: Final = struct.Struct("<12sI")
READER: Final = struct.Struct("<IIQQ")
CHECKED: Final = BOARD.size - LONG.size - WORD.size

OPEN: Final = 1
CLOSED: Final = 2


class Torn(LayoutError):
    """A board that is being written, or whose writer died while it wrote."""


class Row(NamedTuple):
    """What one reader holds. `since`: when the oldest lease was given, 0 for none. `heard`: entries of its ring."""

    held: int
    opened: int
    since: int
    heard: int


class Board(NamedTuple):
    """One state of the board; the fields are those of the table."""

    written: int
    made: int
    pid: int
    closed: bool
    capacity: int
    granted: int
    live: int
    free: int
    largest: int
    total: int
    messages: int
    bytes: int
    fallbacks: Mapping[str, int]
    readers: tuple[Row, ...]


def nanoseconds(seconds: float) -> int:
    """A time of the monotonic clock as the board has it."""
    return max(0, min(int(seconds * 1e9), NEVER))


def pack_board(number: int, board: Board) -> bytes:
    """State `number` of the board, from 1 on."""
    fallbacks = list(board.fallbacks.items())[:MAX_FALLBACKS]
    raw = BOARD.pack(
        number,
        *board[:3],
        CLOSED if board.closed else OPEN,
        *board[4:12],
        b"".join(FALLBACK.pack(reason.encode("ascii")[:12], min(count, MOST)) for reason, count in fallbacks),
        b"".join(READER.pack(*row) for row in board.readers),
        0,
        number,
    )
    return raw[:CHECKED] + WORD.pack(zlib.crc32(raw[:CHECKED])) + LONG.pack(number)


def store_board(memory: mmap.mmap | bytearray | memoryview, offset: int, number: int, board: Board) -> None:
    """Write state `number` over the one before."""
    raw = pack_board(number, board)
    # Who reads meanwhile sees two numbers, or, where a processor reorders these stores, bytes that do not fit the
    # checksum. Three slices: one memcpy has no order.
    memory[offset : offset + LONG.size] = raw[: LONG.size]
    memory[offset + LONG.size : offset + BOARD.size - LONG.size] = raw[LONG.size : -LONG.size]
    memory[offset + BOARD.size - LONG.size : offset + BOARD.size] = raw[-LONG.size :]


def parse_board(raw: Bytes, readers: int) -> Board | None:
    """The board of a writer with `readers` readers; None where nothing was written yet.

    Raises `Torn` for one that is being written, `LayoutError` for what is none.
    """
    if len(raw) < BOARD.size or not 0 < readers <= MAX_READERS:
        raise LayoutError(f"{len(raw)} bytes cannot hold a board of {BOARD.size}, or one for {readers} readers")
    before, *numbers, told, rows, crc, after = BOARD.unpack_from(raw)
    if before != after:
        raise Torn(f"the board is being written: it shows the numbers {before} and {after}")
    if not before and not any(raw[: BOARD.size]):
        return None
    if crc != zlib.crc32(raw[:CHECKED]):
        raise Torn("the board is being written, or damaged: its checksum does not fit")
    written, made, pid, state, *counts = numbers
    parsed = tuple(_parse_row(row) for row in list(READER.iter_unpack(rows))[:readers])
    board = Board._make((written, made, pid, state == CLOSED, *counts, _parse_fallbacks(told), parsed))
    if state not in (OPEN, CLOSED) or not board.largest <= board.free <= board.total or made > written:
        raise LayoutError(f"a board that contradicts itself: {board}")
    return board


def _parse_fallbacks(raw: bytes) -> dict[str, int]:
    found = {}
    for name, count in FALLBACK.iter_unpack(raw):
        match = REASON.fullmatch(name)
        if match:
            found[match[1].decode("ascii")] = count
        elif any(name) or count:
            raise LayoutError(f"a board with a fallback called {name!r}")
    return found


def _parse_row(row: tuple[int, int, int, int]) -> Row:
    parsed = Row(*row)
    if not parsed.opened <= parsed.held <= MAX_TICKETS or bool(parsed.since) != bool(parsed.held):
        raise LayoutError(f"a board with {parsed}")
    return parsed


class Claim(NamedTuple):
    """What a reader holds by all that is known: the board, and what it has said in its ring since.

    `since` is exact where `settled`; else the oldest lease may have been given back, and none is older than that.
    """

    held: int
    opened: int
    since: int
    settled: bool
    left: bool


def claim_of(board: Board, row: Row, said: Iterable[Entry]) -> Claim:
    """Count what a reader has `said` after the writer last listened: an idle writer hears nothing.

    A lease that was given after the board was written, and not opened, is not seen.
    """
    held, opened, settled, left = row.held, row.opened, True, False
    fresh: set[int] = set()
    for kind, value in said:
        if kind == EntryKind.OPENED:
            opened += 1
            held += value >= board.granted
            fresh.add(value)
        elif kind == EntryKind.RELEASED and (value < board.granted or value in fresh):
            held -= 1
            # A discarded one was never opened; which of the board's were is not known.
            opened -= value in fresh or opened > len(fresh)
            fresh.discard(value)
            settled = False
        elif kind == EntryKind.DISCARDED:
            # Under a lower ticket: some of those that are not opened, it is not known which.
            held = opened if value >= board.granted else held
            left, settled = left or value == NEVER, False
        held = max(held, 0)
        opened = max(0, min(opened, held))
    return Claim(held, opened, row.since if held else 0, settled, left)


class Introduction(NamedTuple):
    """The head of a reader's ring: whether the index was taken, a hint at the pid, fallbacks by the reason's number."""

    taken: bool
    pid: int
    fallbacks: tuple[int, ...]


def parse_introduction(raw: Bytes) -> Introduction:
    """The head of a ring, or `LayoutError`."""
    if len(raw) < RING_HEAD.size:
        raise LayoutError(f"{len(raw)} bytes cannot hold the head of a ring")
    taken, pid, words = RING_HEAD.unpack_from(raw)
    return Introduction(bool(taken), pid, tuple(count for (count,) in WORD.iter_unpack(words)))
