"""Headers of segments: parsed alone, and as the file that a reader maps its ring from."""

from __future__ import annotations

import os
import struct

from fuzz._answers import ask, require
from fuzz._memory import MemoryFile
from fuzz._target import Target, fields_of
from shmcast import _named, _segment
from shmcast._layout import (
    PAGE,
    SEGMENT,
    Kind,
    SegmentHeader,
    control_size,
    parse_segment,
    ring_offset,
    ring_size,
)
from shmcast.errors import LayoutError

TOKEN = bytes(range(16))
READERS, ENTRIES = 2, 256
FIELDS = fields_of(1, "8448844844444")
AS_CLAIMED = 2
"""Flag: the file has the size that its header claims, as far as that is no folly."""
LARGEST_FILE = 1 << 26


def headers() -> list[SegmentHeader]:
    """Headers as writers make them, those of control segments first."""
    sizes = [(READERS, ENTRIES, 0), (READERS, ENTRIES, 4), (64, 16384, 1024), (1, 2, 1)]
    controls = [
        SegmentHeader(Kind.CONTROL, TOKEN, 3, 0, control_size(readers, entries, slots), readers, entries, slots)
        for readers, entries, slots in sizes
    ]
    return controls + [SegmentHeader(Kind.ARENA, TOKEN, 3, number, (2 + number) * PAGE) for number in (0, 1, 1023)]


def seeds() -> list[bytes]:
    """A byte of flags and the header's bytes."""
    return [bytes([flags]) + page_of(header) for header in headers() for flags in (0, AS_CLAIMED)]


def page_of(header: SegmentHeader) -> bytes:
    """The bytes of a header."""
    page = bytearray(SEGMENT.size)
    header.write(page)
    return bytes(page)


def check_segment(data: bytes) -> str:
    """`parse_segment` of any bytes, whose fields are then what the bytes say."""
    raw = data[1:]
    answer = ask(lambda: parse_segment(memoryview(raw)), (LayoutError,))
    if answer.refused:
        return answer.refused
    header = answer.value
    require(isinstance(header, SegmentHeader), f"a {type(header).__name__} for a header")
    if isinstance(header, SegmentHeader):
        # The count of segments, a hint, is no part of what is parsed.
        require(page_of(header)[:56] == raw[:56], "other fields than the bytes have")
        require(page_of(header)[60:] == raw[60 : SEGMENT.size], "other slots than the bytes have")
        require(header.size >= 2 * PAGE and header.size % PAGE == 0, f"a segment of {header.size} bytes")
        rings = ring_offset(header.readers, header.entries) if header.readers else 0
        require(rings <= header.size, "rings outside the segment")
    return "parsed"


class _File(MemoryFile):
    """One file in memory that plays the segment of another process."""

    def show(self, raw: bytes, as_claimed: bool) -> int:
        """The descriptor of a file that starts with `raw`."""
        self.open(_named.MODE)
        size = control_size(READERS, ENTRIES)
        if as_claimed and len(raw) >= 48:
            (claimed,) = struct.unpack_from("<Q", raw, 40)
            size = min(claimed, LARGEST_FILE)
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, size)
        os.pwrite(self.fd, raw[:size], 0)
        return self.fd


_file = _File()


def check_attach(data: bytes) -> str:
    """What a reader looks at before it maps its ring of a control segment, and the mapping; a refusal of the system."""
    flags, raw = (data or b"\0")[0], data[1:]
    fd = _file.show(raw, bool(flags & AS_CLAIMED))
    expected = SegmentHeader(Kind.CONTROL, TOKEN, 3, 0, 0, READERS)

    def attach() -> SegmentHeader:
        header = _segment._check("/segment", fd, expected)
        ring = _segment._map(fd, ring_size(header.entries), 1, ring_offset(READERS - 1, header.entries))
        ring[-1] = ring[0]
        return header

    answer = ask(attach, (LayoutError, OSError))
    return answer.refused or "mapped"


TARGETS = (
    Target("segment", check_segment, seeds, FIELDS),
    Target("attach", check_attach, lambda: seeds()[:4], FIELDS, close=_file.close),
)
