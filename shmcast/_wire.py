"""Byte layout of what goes through channels: addresses, handles, headers. Format version 1, little endian.

Pure functions over bytes; whatever is wrong with them is a `LayoutError`.

Address: where a writer is found.

    offset  size  field     written by
    ------  ----  --------  -----------------------------------------------------------
         0    16  token     writer
        16     4  rank      writer
        20     4  readers   writer

Handle: where a message lies and which tickets its readers hold.

         0     4  magic       writer
         4     4  opens       writer: leases of each reader
         8    16  token       writer
        24     4  rank        writer
        28     4  segment     writer
        32     8  offset      writer
        40     8  length      writer
        48     8  generation  writer
        56     8  ticket      writer: reader i's leases are ticket + i * opens and the opens - 1 after it
        64     8  readers     writer: bit i set, reader i may open it
        72     4  reserved
        76     4  checksum    writer: CRC-32 of bytes 0 to 75

Header: what one collective of the control plane carries.

         0     8  magic     entry rank
         8     4  version   entry rank
        12     1  route     entry rank: 1 shm, 2 inline, 3 local, 4 none (it has nothing to send), 5 raw, 6 pickle
        13     1  call      entry rank: 1 broadcast, 2 materialize, 3 materialize_batch
        14     2  reason    entry rank: why the route is not the first choice, 0 when it is (`Reason`)
        16     8  sequence  entry rank: counts the calls of a control plane
        24     8  length    entry rank: bytes of the one tensor that follows (inline); leaves of its raw inputs (shm)
        32    80  handle    entry rank (shm, raw), else zeros
       112     8  plane     entry rank: which control plane this is, agreed on in the constructor
       120     8  batch     entry rank: digest of the batch that a scheduler handed in, else 0
       128   124  text      entry rank: UTF-8, zero padded
       252     4  checksum  entry rank: CRC-32 of bytes 0 to 251
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from shmcast._layout import MAX_READERS, MAX_TICKETS, NEVER, VERSION, WORD, Bytes, Descriptor, check_descriptor
from shmcast.errors import LayoutError

HANDLE_MAGIC: Final = b"SHMh"
HEADER_MAGIC: Final = b"SHMHEAD1"
TEXT_BYTES: Final = 124

ADDRESS: Final = struct.Struct("<16sII")
HANDLE: Final = struct.Struct("<4sI16sIIQQQQQ4xI")
HEADER: Final = struct.Struct("<8sIBBHQQ80sQQ124sI")


class Reason(IntEnum):
    """Why a message does not travel by the first choice."""

    CHOSEN = 0
    THRESHOLD = 1
    RAISED = 2
    ENCODE = 3
    FULL = 4
    OPEN = 5
    CONTROL = 6
    DISABLED = 7
    MISSED = 8
    LATE = 9
    COST = 10
    CLOSED = 11


LAST_REASON: Final = max(Reason)
CHOICES: Final = frozenset((Reason.CHOSEN, Reason.THRESHOLD, Reason.COST))
"""Reasons that are no fallback."""


class Call(IntEnum):
    """Which collective call a header belongs to."""

    BROADCAST = 1
    MATERIALIZE = 2
    BATCH = 3


class HeaderRoute(IntEnum):
    """How the message behind a header travels."""

    SHM = 1
    INLINE = 2
    LOCAL = 3
    NONE = 4
    RAW = 5
    PICKLE = 6


WITH_HANDLE: Final = frozenset((HeaderRoute.SHM, HeaderRoute.RAW))
"""Routes on which a message in shared memory travels: what `fn` made, or the raw inputs for every rank's `fn`."""


@dataclass(frozen=True)
class Address:
    """Where a writer is found: small and picklable, sent to its readers once, by any channel."""

    token: bytes
    rank: int
    readers: int

    @property
    def stem(self) -> str:
        return f"/shmcast-{self.token.hex()}-{self.rank}"

    @property
    def control(self) -> str:
        """Name of the control segment."""
        return f"{self.stem}-c"

    def segment(self, number: int) -> str:
        """Name of an arena segment."""
        return f"{self.stem}-{number}"

    def posted(self, reader: int) -> str:
        """Name of the semaphore that counts the entries in a reader's ring."""
        return f"{self.stem}-p{reader}"

    def wake(self, reader: int) -> str:
        """Name of the semaphore that wakes a reader's thread."""
        return f"{self.stem}-w{reader}"

    def ready(self, reader: int) -> str:
        """Name of the semaphore that counts the headers a reader has not taken."""
        return f"{self.stem}-h{reader}"

    def __bytes__(self) -> bytes:
        return ADDRESS.pack(self.token, self.rank, self.readers)

    @classmethod
    def parse(cls, raw: Bytes) -> Address:
        """The address in `raw`, or `LayoutError`."""
        if len(raw) != ADDRESS.size:
            raise LayoutError(f"an address has {ADDRESS.size} bytes, not {len(raw)}")
        token, rank, readers = ADDRESS.unpack(raw)
        if not 0 < readers <= MAX_READERS:
            raise LayoutError(f"an address with {readers} readers")
        return cls(token, rank, readers)

    def __reduce__(self) -> tuple[object, ...]:
        return Address.parse, (bytes(self),)


@dataclass(frozen=True)
class Handle:
    """A message's place and its readers' tickets; `bytes(handle)` and `Handle.parse` go where pickle does not."""

    token: bytes
    rank: int
    where: Descriptor
    ticket: int
    readers: int
    opens: int

    def __post_init__(self) -> None:
        """Every ticket that the handle can name has 64 bits, and its place can be a block."""
        check_descriptor(self.where)
        if not (0 < self.opens <= MAX_TICKETS and 0 <= self.readers < 2**MAX_READERS):
            raise LayoutError(f"a handle for readers {self.readers:#x} that each may open {self.opens} times")
        if not 0 <= self.ticket <= NEVER - (MAX_READERS + 1) * self.opens:
            raise LayoutError(f"a handle with ticket {self.ticket}")

    def ticket_of(self, reader: int, opened: int) -> int:
        """The ticket of `reader`'s lease number `opened`."""
        return self.ticket + reader * self.opens + opened

    def __bytes__(self) -> bytes:
        raw = HANDLE.pack(
            HANDLE_MAGIC,
            self.opens,
            self.token,
            self.rank,
            self.where.segment,
            self.where.offset,
            self.where.length,
            self.where.generation,
            self.ticket,
            self.readers,
            0,
        )[:-4]
        return raw + WORD.pack(zlib.crc32(raw))

    @classmethod
    def parse(cls, raw: Bytes) -> Handle:
        """The handle in `raw`, or `LayoutError`."""
        if len(raw) != HANDLE.size:
            raise LayoutError(f"a handle has {HANDLE.size} bytes, not {len(raw)}")
        magic, opens, token, rank, segment, offset, length, generation, ticket, readers, crc = HANDLE.unpack(raw)
        if magic != HANDLE_MAGIC or crc != zlib.crc32(raw[: HANDLE.size - 4]):
            raise LayoutError("these bytes are no handle, or a damaged one")
        return cls(token, rank, Descriptor(segment, offset, length, generation), ticket, readers, opens)

    def __reduce__(self) -> tuple[object, ...]:
        return Handle.parse, (bytes(self),)


def foreign(handle: Handle, address: Address, use: str) -> str:
    """In words: that `handle` is not of the writer at `address`, and what to do."""
    theirs, ours = (f"rank {a.rank}, token {a.token.hex()[:8]}" for a in (handle, address))
    return f"a handle of another writer ({theirs}; this is an end of {ours}): {use} it with an end of that one"


class Header(NamedTuple):
    """What the entry rank says of one message.

    `length`: bytes of the tensor broadcast that follows (inline), or how many leaves its raw inputs have (shm).
    `batch`: whose requests it speaks of.
    """

    route: HeaderRoute
    sequence: int
    call: Call = Call.BROADCAST
    plane: int = 0
    reason: Reason = Reason.CHOSEN
    length: int = 0
    handle: Handle | None = None
    text: str = ""
    batch: int = 0

    def __bytes__(self) -> bytes:
        raw = HEADER.pack(
            HEADER_MAGIC,
            VERSION,
            self.route,
            self.call,
            self.reason,
            self.sequence,
            self.length,
            bytes(self.handle) if self.handle else b"",
            self.plane,
            self.batch,
            self.text.encode("utf-8", "replace")[:TEXT_BYTES],
            0,
        )[:-4]
        return raw + WORD.pack(zlib.crc32(raw))


def parse_header(raw: Bytes, plane: int) -> Header:
    """The header in `raw`, which must be of control plane `plane`."""
    if len(raw) != HEADER.size:
        raise LayoutError(f"a header has {HEADER.size} bytes, not {len(raw)}")
    magic, version, route, found_call, reason, found, length, handle, found_plane, batch, text, crc = HEADER.unpack(raw)
    if magic != HEADER_MAGIC or version != VERSION:
        raise LayoutError(f"not a header of format {VERSION}: another collective ran on this group in between")
    if crc != zlib.crc32(raw[: HEADER.size - 4]):
        raise LayoutError("a damaged header")
    if found_plane != plane:
        raise LayoutError(
            "a header of another Broadcaster: two share a group, and the ranks call them in different orders"
        )
    if not HeaderRoute.SHM <= route <= HeaderRoute.PICKLE or not Call.BROADCAST <= found_call <= Call.BATCH:
        raise LayoutError(f"header with unknown route {route} or call {found_call}")
    if length >> 63:
        raise LayoutError(f"header with length {length}, which no tensor has")
    if reason > LAST_REASON:
        raise LayoutError(f"header with unknown reason {reason}")
    return Header(
        HeaderRoute(route),
        found,
        Call(found_call),
        plane,
        Reason(reason),
        length,
        Handle.parse(handle) if route in WITH_HANDLE else None,
        text.rstrip(b"\0").decode("utf-8", "replace"),
        batch,
    )


def check_call(header: Header, sequence: int, call: Call, batch: int = 0) -> None:
    """Raise `LayoutError` unless `header` is of call number `sequence`, a call of kind `call`, over that batch."""
    if (header.sequence, header.call) != (sequence, call):
        raise LayoutError(
            f"the entry rank is in call {header.sequence}, of kind {header.call}, this rank in call {sequence}, of "
            f"kind {call}: the ranks did not make the same calls"
        )
    if header.batch != batch:
        raise LayoutError(f"call {sequence}: the batch of the entry rank has other keys, or raw inputs of other sizes")
