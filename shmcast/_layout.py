"""Byte layout of shared memory, format version 1; what goes through channels is in `_wire`.

Pure functions over buffers: no I/O, no torch, no clock. All numbers are little endian; sizes and offsets are in bytes.

Segment header: the first page of every segment, arena and control alike.

    offset  size  field     written by
    ------  ----  --------  -----------------------------------------------------------
         0     8  magic     creator, last of all (L1)
         8     4  version   creator
        12     4  kind      creator: 1 arena, 2 control
        16    16  token     creator: 128 random bits, the same in all segments of a writer
        32     4  rank      creator: the writer's rank
        36     4  number    creator: counts the segments of an arena; 0 in a control segment
        40     8  size      creator: of the whole segment, whole pages
        48     4  readers   creator: how many rings follow (control), else 0
        52     4  entries   creator: entries of each ring (control), else 0
        56     4  segments  creator, grows: arena segments made so far (control), else 0; a hint (L6)
        60     4  slots     creator: slots of the header ring (control), 0 where there is none

Ring: one for each reader, after the header page of the control segment, in whole pages.

         0     4  taken     reader: 1 once a reader has taken this index (L5)
         4     4  pid       reader: of its process, in its own pid namespace; a hint (L6)
         8    56  fallbacks reader: how often each of 14 reasons, by number, a word each; hints (L6)
        64   16n  entries   reader: entry number s lies at index s % n (L7)

Ring entry.

         0     8  value     reader: a ticket, a segment number, or the first ticket not discarded
         8     4  seq       reader: the entry's number, modulo 2**32
        12     4  kind      reader: 1 mapped, 2 bad segment, 3 opened, 4 released, 5 discarded

Header ring: at most one, after the release rings of the control segment, in whole pages.

         0    8r  floors    writer: for each of 64 readers the first ticket that was not taken back from it (L9)
       512  320n  slots     writer: header number s lies in slot s % n (L10)

Header slot.

         0     8  number    writer: counts the headers of this writer
         8   256  header    writer: see the layout of channels
       264    52  reserved
       316     4  checksum  writer: CRC-32 of bytes 0 to 315

Board: the last page of the control segment, for whoever looks on; its table stands in `_board` (L11).

Block: whole pages of an arena segment, at a page boundary (L2).

         0     8  magic       writer
         8     8  generation  writer: never used twice in an arena (L3)
        16     8  length      writer: bytes in use, this header included
        24     4  kind        writer: 1 message, 2 payload, 3 withdrawn (L4)
        28     4  stamp       writer: counts the messages that list this payload block
        32     8  skeleton    writer: bytes of the skeleton that follows this header; 0 in a payload block
        40    20  reserved
        60     4  checksum    writer: CRC-32 of bytes 0 to 23 and 32 to 59, and of the skeleton

Skeleton: a table, then the codec's stream.

         0     4  blocks    writer: other blocks that the message lies in
         4     4  pieces    writer: runs of bytes that the stream refers to
         8     8  stream    writer: bytes of the stream
        16   32n  blocks    writer: segment, reserved (4 + 4), offset, length, generation (8 + 8 + 8)
         .   24n  pieces    writer: block (4; 0 this one, k the k-th listed), reserved (4), offset in it (8), length (8)
         .     .  stream    writer: opaque here

Invariants; code and tests cite them by name.
    L1  A segment that shows the magic is fully initialised.
    L2  A block starts on a page boundary and has whole pages: a page belongs to at most one live block.
    L3  A generation names one use of a block, for good: a handle whose generation is not in the block is stale.
    L4  A withdrawn block is never opened again; a new use writes a new generation.
    L5  A reader's index is taken once, ever, under the exclusive lock on its byte.
    L6  Plain shared words are hints; what orders memory is a post and wait on one semaphore, or a send and receive.
    L7  Entries not yet drained never exceed the ring: a ticket makes at most two, a segment one, a message one more,
        and the writer keeps no more tickets alive than a quarter of the ring.
    L8  Nothing parsed is used before all of it is checked; whatever is wrong is a `LayoutError`.
    L9  A reader that has said OPENED looks at its floor after a full fence; a writer that has raised the floor looks
        for OPENED after one: a ticket below it is either not taken back or not read on.
    L10 A reader takes headers in the order of their numbers; a higher number in a slot means that it missed one. Tokens
        in its semaphore are how many it has not taken: they wake it, order the bytes (L6) and hold the writer back.
    L11 Nobody decides by the board. Its number stands before and after its bytes: one that is being written shows.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Final, NamedTuple

from shmcast.errors import LayoutError

Bytes = bytes | bytearray | memoryview

VERSION: Final = 1
PAGE: Final = mmap.PAGESIZE
LINE: Final = 64
TOKEN_BYTES: Final = 16
MAX_READERS: Final = 64
MAX_SEGMENTS: Final = 1024
RING_ENTRIES: Final = 16384
MAX_TICKETS: Final = (RING_ENTRIES - MAX_SEGMENTS - 1) // 4
HEADER_SLOTS: Final = 1024
FLOORS_BYTES: Final = MAX_READERS * 8
NEVER: Final = 2**64 - 1

SEGMENT_MAGIC: Final = b"SHMCAST1"
BLOCK_MAGIC: Final = b"SHMBLOCK"

SEGMENT: Final = struct.Struct("<8sII16sIIQIIII")
RING_HEAD: Final = struct.Struct("<II56s")
ENTRY: Final = struct.Struct("<QII")
BLOCK: Final = struct.Struct("<8sQQIIQ20xI")
TABLE: Final = struct.Struct("<IIQ")
LISTED: Final = struct.Struct("<I4xQQQ")
PIECE: Final = struct.Struct("<I4xQQ")
WORD: Final = struct.Struct("<I")
LONG: Final = struct.Struct("<Q")
SLOT: Final = struct.Struct("<Q256s52xI")

SEGMENTS_OFFSET: Final = 56
TAKEN_OFFSET: Final = 0
PID_OFFSET: Final = 4
FALLBACKS_OFFSET: Final = 8
MAX_REASONS: Final = 14
KIND_OFFSET: Final = 24
STAMP_OFFSET: Final = 28
STAMP_END: Final = 32


class Stale(LayoutError):
    """A block in another use than the one that is meant, or withdrawn: in good order, but not for this reader."""


class Kind(IntEnum):
    """What a segment is."""

    ARENA = 1
    CONTROL = 2


class BlockKind(IntEnum):
    """What a block holds."""

    MESSAGE = 1
    PAYLOAD = 2
    WITHDRAWN = 3


class EntryKind(IntEnum):
    """What a reader tells its writer."""

    MAPPED = 1
    BAD = 2
    OPENED = 3
    RELEASED = 4
    DISCARDED = 5


def round_up(size: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `size`."""
    return -(-size // unit) * unit


# Segments and their names.


@dataclass(frozen=True)
class SegmentHeader:
    """The identity of a segment: `number`, `size`, and for a control segment its rings and header slots."""

    kind: Kind
    token: bytes
    rank: int
    number: int
    size: int
    readers: int = 0
    entries: int = 0
    slots: int = 0

    def write(self, page: mmap.mmap | bytearray | memoryview) -> None:
        """Write everything, the magic last (L1)."""
        body = SEGMENT.pack(
            SEGMENT_MAGIC,
            VERSION,
            self.kind,
            self.token,
            self.rank,
            self.number,
            self.size,
            self.readers,
            self.entries,
            0,
            self.slots,
        )
        page[8 : SEGMENT.size] = body[8:]
        page[0:8] = body[:8]


def parse_segment(page: Bytes) -> SegmentHeader:
    """The header of a segment; trusts no byte of it."""
    if len(page) < SEGMENT.size:
        raise LayoutError(f"{len(page)} bytes cannot hold a segment header of {SEGMENT.size}")
    magic, version, kind, token, rank, number, size, readers, entries, _, slots = SEGMENT.unpack_from(page)
    if magic != SEGMENT_MAGIC:
        raise LayoutError(f"not a shmcast segment: its magic is {magic!r}")
    if version != VERSION:
        raise LayoutError(f"segment format {version}, this library reads {VERSION}: run one version on all ranks")
    if kind not in (Kind.ARENA, Kind.CONTROL):
        raise LayoutError(f"unknown kind of segment: {kind}")
    if size % PAGE or size < 2 * PAGE or number >= MAX_SEGMENTS:
        raise LayoutError(f"segment {number} claims {size} bytes")
    header = SegmentHeader(Kind(kind), token, rank, number, size, readers, entries, slots)
    if kind == Kind.ARENA and (readers or entries or slots):
        raise LayoutError("an arena segment has no rings")
    if kind == Kind.CONTROL and (
        not 0 < readers <= MAX_READERS
        or entries < 2
        or entries & (entries - 1)
        or slots & (slots - 1)
        or control_size(readers, entries, slots) != size
    ):
        raise LayoutError(
            f"control segment of {size} bytes for {readers} readers, {entries} entries each, and {slots} header slots"
        )
    return header


def write_word(memory: mmap.mmap | bytearray | memoryview, offset: int, value: int) -> None:
    """Store one aligned 32-bit word, whole."""
    memory[offset : offset + WORD.size] = WORD.pack(value)


def write_long(memory: mmap.mmap | bytearray | memoryview, offset: int, value: int) -> None:
    """Store one aligned 64-bit word, whole."""
    memory[offset : offset + LONG.size] = LONG.pack(value)


def ring_size(entries: int) -> int:
    """Bytes of one ring, whole pages."""
    return round_up(RING_HEAD.size + entries * ENTRY.size, PAGE)


def ring_offset(reader: int, entries: int) -> int:
    """Where reader `reader`'s ring starts in the control segment."""
    return PAGE + reader * ring_size(entries)


def control_size(readers: int, entries: int, slots: int = 0) -> int:
    """Bytes of a control segment."""
    return board_offset(readers, entries, slots) + PAGE


def board_offset(readers: int, entries: int, slots: int = 0) -> int:
    """Where the board lies in a control segment."""
    return ring_offset(readers, entries) + (slots > 0) * round_up(FLOORS_BYTES + slots * SLOT.size, PAGE)


def floor_offset(readers: int, entries: int, reader: int) -> int:
    """Where the floor of `reader` lies in a control segment that has a header ring."""
    return ring_offset(readers, entries) + reader * LONG.size


def slots_offset(readers: int, entries: int) -> int:
    """Where the first slot of the header ring lies in a control segment."""
    return ring_offset(readers, entries) + FLOORS_BYTES


# Rings.


class Entry(NamedTuple):
    """One word from a reader to its writer."""

    kind: EntryKind
    value: int


def write_entry(ring: mmap.mmap | bytearray | memoryview, entries: int, seq: int, kind: EntryKind, value: int) -> None:
    """Write entry number `seq`. The post that follows, not this store, is what publishes it (L6)."""
    # Not pack_into, here and below: it zeroes its target first, and another process would see that.
    at = RING_HEAD.size + seq % entries * ENTRY.size
    ring[at : at + ENTRY.size] = ENTRY.pack(value, seq & 0xFFFFFFFF, kind)


def parse_entry(ring: mmap.mmap | Bytes, entries: int, seq: int, base: int = 0) -> Entry:
    """Entry number `seq` of the ring at `base`."""
    value, number, kind = ENTRY.unpack_from(ring, base + RING_HEAD.size + seq % entries * ENTRY.size)
    if number != seq & 0xFFFFFFFF:
        raise LayoutError(f"ring entry {seq} carries number {number}")
    if not EntryKind.MAPPED <= kind <= EntryKind.DISCARDED:
        raise LayoutError(f"ring entry {seq} is of unknown kind {kind}")
    return Entry(EntryKind(kind), value)


# Header slots.


def pack_slot(number: int, header: Bytes) -> bytes:
    """The slot of header `number`."""
    raw = SLOT.pack(number, header, 0)[: -WORD.size]
    return raw + WORD.pack(zlib.crc32(raw))


class Slot(NamedTuple):
    """What a header slot shows."""

    number: int
    header: bytes


def parse_slot(raw: Bytes) -> Slot | None:
    """The header in a slot's bytes; None where nothing was written yet, or is being written."""
    if len(raw) != SLOT.size:
        raise LayoutError(f"a header slot has {SLOT.size} bytes, not {len(raw)}")
    number, header, crc = SLOT.unpack(raw)
    return Slot(number, header) if crc == zlib.crc32(raw[: -WORD.size]) else None


# Blocks and messages.


class Descriptor(NamedTuple):
    """Where a block lies in an arena, and which use of it is meant. `length`: bytes in use, block header included."""

    segment: int
    offset: int
    length: int
    generation: int

    def __str__(self) -> str:
        return f"{self.length} bytes at {self.offset} in segment {self.segment}, generation {self.generation}"


class Piece(NamedTuple):
    """A run of bytes of a message: `block` 0 is the message's own, k the k-th that it lists."""

    block: int
    offset: int
    length: int


class Message(NamedTuple):
    """A parsed skeleton: the codec's stream (a private copy), the blocks it lists, its pieces."""

    stream: bytes
    blocks: tuple[Descriptor, ...]
    pieces: tuple[Piece, ...]


class Plan(NamedTuple):
    """A message laid out in its block: how long the block is, and where each piece lies."""

    length: int
    pieces: tuple[Piece, ...]


def skeleton_size(stream: int, blocks: int, pieces: int) -> int:
    """Bytes of a skeleton."""
    return TABLE.size + blocks * LISTED.size + pieces * PIECE.size + stream


def plan_message(stream: int, blocks: int, pieces: list[Piece | int]) -> Plan:
    """Lay out a message whose stream has `stream` bytes and which lists `blocks` blocks.

    An `int` among `pieces` is the length of a piece that goes into the message's own block, at a multiple of 64 bytes.
    """
    at = BLOCK.size + skeleton_size(stream, blocks, len(pieces))
    placed = []
    for piece in pieces:
        if isinstance(piece, int):
            at = round_up(at, LINE)
            placed.append(Piece(0, at, piece))
            at += piece
        else:
            placed.append(piece)
    return Plan(at, tuple(placed))


def write_message(
    block: mmap.mmap | bytearray | memoryview, generation: int, length: int, message: Message, base: int = 0
) -> None:
    """Write block header and skeleton of `message` at `base`; its pieces are in place already."""
    skeleton = b"".join(
        (
            TABLE.pack(len(message.blocks), len(message.pieces), len(message.stream)),
            *(LISTED.pack(*listed) for listed in message.blocks),
            *(PIECE.pack(*piece) for piece in message.pieces),
            message.stream,
        )
    )
    block[base + BLOCK.size : base + BLOCK.size + len(skeleton)] = skeleton
    write_block(block, generation, length, BlockKind.MESSAGE, skeleton, base)


def write_block(
    block: mmap.mmap | bytearray | memoryview,
    generation: int,
    length: int,
    kind: BlockKind,
    skeleton: bytes = b"",
    base: int = 0,
) -> None:
    """Write a block header over `skeleton`, which is already behind it."""
    head = BLOCK.pack(BLOCK_MAGIC, generation, length, kind, 0, len(skeleton), 0)
    block[base : base + BLOCK.size] = head[: -WORD.size] + WORD.pack(_block_checksum(head, skeleton))


def _block_checksum(head: Bytes, skeleton: bytes) -> int:
    """Leaves out kind and stamp, which change while the block is in use."""
    crc = zlib.crc32(bytes(head[:KIND_OFFSET]) + bytes(head[STAMP_END : BLOCK.size - WORD.size]))
    return zlib.crc32(skeleton, crc)


def mark_withdrawn(block: mmap.mmap | bytearray | memoryview, base: int = 0) -> None:
    """Nobody may open this use of the block any more (L4): one aligned store."""
    write_word(block, base + KIND_OFFSET, BlockKind.WITHDRAWN)


def stamp_payload(block: mmap.mmap | bytearray | memoryview, base: int = 0) -> None:
    """One more message lists this block: a reader whose copy of the header is older drops all its copies."""
    (stamp,) = WORD.unpack_from(block, base + STAMP_OFFSET)
    write_word(block, base + STAMP_OFFSET, (stamp + 1) & 0xFFFFFFFF)


def check_block(head: Bytes, generation: int, length: int) -> None:
    """Raise unless `head` starts with the header of this use of a block: `Stale` in another use, else `LayoutError`."""
    if len(head) < BLOCK.size:
        raise LayoutError(f"{len(head)} bytes cannot hold a block header of {BLOCK.size}")
    magic, found, found_length, kind, _, size, _ = BLOCK.unpack_from(head)
    if magic != BLOCK_MAGIC:
        raise Stale(f"no block starts here: its magic is {magic!r}; the leases ended, and the memory is in another use")
    if found != generation:
        raise Stale(
            f"the block is at generation {found}, not {generation}; the leases ended, and the memory is in another use"
        )
    if kind == BlockKind.WITHDRAWN:
        raise Stale(f"generation {generation} of the block was withdrawn by its writer")
    if found_length != length or size > length - BLOCK.size:
        raise LayoutError(f"a block of {length} bytes claims {found_length}, {size} of them skeleton")


def parse_block(block: Bytes, generation: int, kind: BlockKind) -> bytes:
    """A private copy of the skeleton of the block that fills `block`, after checking that it is this use of it."""
    # One look: the writer may mark the block as withdrawn at any time, and what is looked at twice may differ. A copy
    # without the mark is from before the writer looked for OPENED: it finds that, and leaves the block to us (L4).
    head = bytes(block[: BLOCK.size])
    check_block(head, generation, len(block))
    found_kind, _, size, crc = BLOCK.unpack_from(head)[3:]
    if found_kind != kind:
        raise LayoutError(f"the block is of kind {found_kind}, not {kind}")
    if size and kind == BlockKind.PAYLOAD:
        raise LayoutError(f"a payload block with {size} bytes of skeleton")
    skeleton = bytes(block[BLOCK.size : BLOCK.size + size])
    if len(skeleton) != size or crc != _block_checksum(head, skeleton):
        raise LayoutError("the checksum of the block does not fit its header and skeleton")
    return skeleton


def parse_message(block: Bytes, generation: int) -> Message:
    """The message whose block fills `block`; its pieces lie inside the blocks that they name."""
    skeleton = parse_block(block, generation, BlockKind.MESSAGE)
    if len(skeleton) < TABLE.size:
        raise LayoutError(f"{len(skeleton)} bytes cannot hold a skeleton's table")
    n_blocks, n_pieces, n_stream = TABLE.unpack_from(skeleton)
    if skeleton_size(n_stream, n_blocks, n_pieces) != len(skeleton):
        raise LayoutError(
            f"a skeleton of {len(skeleton)} bytes claims {n_blocks} blocks, {n_pieces} pieces, {n_stream} of stream"
        )
    at = TABLE.size
    blocks = tuple(Descriptor(*LISTED.unpack_from(skeleton, at + i * LISTED.size)) for i in range(n_blocks))
    at += n_blocks * LISTED.size
    pieces = tuple(Piece(*PIECE.unpack_from(skeleton, at + i * PIECE.size)) for i in range(n_pieces))
    for listed in blocks:
        check_descriptor(listed)
    starts = (BLOCK.size + len(skeleton), *(BLOCK.size for _ in blocks))
    lengths = (len(block), *(listed.length for listed in blocks))
    for piece in pieces:
        if piece.block >= len(lengths) or piece.offset < starts[piece.block] or not piece.length:
            raise LayoutError(f"{piece} names no payload")
        if piece.offset + piece.length > lengths[piece.block] or piece.offset % LINE:
            raise LayoutError(f"{piece} leaves its block of {lengths[piece.block]} bytes, or is not aligned")
    # Small pieces are copied: a message that claims its bytes again and again would be copied each time. A piece may
    # begin in the line in which the one before it ends.
    if sum(piece.length for piece in pieces) > sum(lengths) + LINE * n_pieces:
        raise LayoutError(f"{n_pieces} pieces are larger than the blocks that they lie in")
    places = sorted((block.segment, block.offset, block.offset + round_up(block.length, PAGE)) for block in blocks)
    if any(segment == other and at < end for (segment, _, end), (other, at, _) in pairwise(places)):
        raise LayoutError("blocks that overlap: a page would belong to two (L2)")
    return Message(skeleton[at + n_pieces * PIECE.size :], blocks, pieces)


def check_descriptor(where: Descriptor) -> None:
    """Raise `LayoutError` unless `where` can be a block: on a page, past the segment's header, a header long."""
    if where.segment >= MAX_SEGMENTS or where.offset % PAGE or where.offset < PAGE or where.length < BLOCK.size:
        raise LayoutError(f"{where} is no block")
