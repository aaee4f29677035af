"""What lies in rings: entries that a reader posts, slots that a writer fills with headers."""

from __future__ import annotations

import mmap
import os
import struct
import zlib

import posix_ipc

from fuzz._answers import ask, require
from fuzz._memory import MemoryFile
from fuzz._target import SEAL, Target, fields_of
from shmcast._headers import HeaderReader
from shmcast._layout import ENTRY, PAGE, RING_HEAD, SLOT, Entry, EntryKind, pack_slot
from shmcast._ring import Inbox
from shmcast.errors import LayoutError, PeerDied

ENTRIES = 16
SLOTS = 4
THIEF = 2
"""Flag: another process takes tokens between the look and the acquire."""
HEAD = struct.Struct("<BHI")


class Tokens:
    """A semaphore of this process alone, as `posix_ipc.Semaphore` behaves."""

    def __init__(self, value: int, stolen: bool = False) -> None:
        self.value = value
        self._stolen = stolen

    def acquire(self, timeout: float | None = None) -> None:
        """Take one token, at once or not at all."""
        if not self.value or self._stolen:
            raise posix_ipc.BusyError("no token")
        self.value -= 1

    def release(self) -> None:
        self.value += 1


_control = mmap.mmap(-1, 2 * PAGE)


def ring_seeds() -> list[bytes]:
    """Flags, tokens, the number that comes next, and the ring's entries."""
    kinds = list(EntryKind)
    found = []
    for tokens, start, flags in ((3, 0, 0), (16, 5, 0), (40, 2**32 - 3, SEAL), (5, 0, THIEF), (0, 1, 0)):
        ring = [b""] * ENTRIES
        for seq in range(start, start + ENTRIES):
            ring[seq % ENTRIES] = ENTRY.pack(seq * 7 % 2**64, seq & 0xFFFFFFFF, kinds[seq % len(kinds)])
        found.append(HEAD.pack(flags, tokens, start) + b"".join(ring))
    return found


def check_ring(data: bytes) -> str:
    """`Inbox.drain` over any ring with any number of tokens: entries that are there, in order, and no more of them."""
    flags, tokens, start = HEAD.unpack(data[: HEAD.size].ljust(HEAD.size, b"\0"))
    ring = bytearray(data[HEAD.size :][: ENTRIES * ENTRY.size].ljust(ENTRIES * ENTRY.size, b"\0"))
    if flags & SEAL:
        for seq in range(start, start + ENTRIES):
            struct.pack_into("<I", ring, seq % ENTRIES * ENTRY.size + 8, seq & 0xFFFFFFFF)
    _control[PAGE + RING_HEAD.size : PAGE + RING_HEAD.size + len(ring)] = bytes(ring)
    inbox = Inbox(_control, PAGE, ENTRIES, Tokens(tokens, bool(flags & THIEF)))
    inbox._seq = start
    answer = ask(lambda: list(inbox.drain()), ())
    found = answer.value
    if not isinstance(found, list):
        return "nothing"
    expected = []
    for seq in range(start, start + len(found)):
        value, number, kind = ENTRY.unpack_from(ring, seq % ENTRIES * ENTRY.size)
        require(number == seq & 0xFFFFFFFF, f"entry {seq} out of turn")
        expected.append(Entry(EntryKind(kind), value))
    require(found == expected, "entries that are not in the ring")
    require(flags & THIEF or len(found) + inbox.bad == min(tokens, ENTRIES), "entries without tokens, or the reverse")
    return "entries" if found else "nothing"


def slot_seeds() -> list[bytes]:
    """Flags, the reader's next number, and the slots."""
    found = []
    for number, shown in ((0, range(0, 4)), (1, range(0, 4)), (2, (4, 5, 2, 3)), (3, (8, 9, 10, 11))):
        slots = b"".join(pack_slot(each, bytes([each]) * 256) for each in shown)
        found.append(bytes([0, number]) + slots)
    return [*found, found[0][:400].ljust(2 + SLOTS * SLOT.size, b"\0"), bytes([SEAL, 0]) + bytes(SLOTS * SLOT.size)]


class _File(MemoryFile):
    """One file in memory that plays a control segment."""

    def show(self, raw: bytes) -> int:
        """The descriptor of a file of these bytes."""
        self.open()
        if len(raw) != os.pwrite(self.fd, raw, 0) or os.fstat(self.fd).st_size != len(raw):
            os.ftruncate(self.fd, len(raw))
        return self.fd


_file = _File()


def check_slot(data: bytes) -> str:
    """`HeaderReader.receive` over any slots of a dead writer: a header that is there and whole, or that it missed."""
    flags, number = data[:2].ljust(2, b"\0")
    raw = bytearray(data[2:][: SLOTS * SLOT.size])
    if flags & SEAL:
        for at in range(0, len(raw) - SLOT.size + 1, SLOT.size):
            struct.pack_into("<I", raw, at + 316, zlib.crc32(raw[at : at + 316]))
    reader = HeaderReader(_file.show(bytes(raw)), 0, SLOTS, Tokens(flags >> 1 & 3))
    reader._number = number
    reader._brief = False
    answer = ask(lambda: reader.receive(0), (LayoutError, PeerDied))
    if answer.refused:
        return answer.refused
    at = number % SLOTS * SLOT.size
    shown = int.from_bytes(raw[at : at + 8], "little")
    require(zlib.crc32(raw[at : at + 316]) == int.from_bytes(raw[at + 316 : at + 320], "little"), "a torn slot")
    if answer.value is None:
        require(shown > number, f"header {shown} counts as missed where {number} is due")
        return "missed"
    require(shown == number and answer.value == bytes(raw[at + 8 : at + 264]), "another header than the one due")
    return "header"


RING_FIELDS = ((1, 2), (3, 4), *(field for n in range(ENTRIES) for field in fields_of(HEAD.size + 16 * n, "844")))
SLOT_FIELDS = ((1, 1), *((2 + SLOT.size * n, 8) for n in range(SLOTS)), *((318 + SLOT.size * n, 4) for n in range(4)))

TARGETS = (
    Target("ring", check_ring, ring_seeds, RING_FIELDS),
    Target("slot", check_slot, slot_seeds, SLOT_FIELDS, close=_file.close),
)
