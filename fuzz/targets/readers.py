"""Whole messages in a mapped segment: `Reader.open`, its writer hostile."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import torch

from fuzz._answers import ask, require
from fuzz._target import SEAL, Target, fields_of
from fuzz.targets import blocks, inline, skeletons
from shmcast._layout import BLOCK, MAX_SEGMENTS, PAGE, Descriptor, parse_message
from shmcast._lease import COPY_BELOW
from shmcast._pages import address_of
from shmcast._wire import Handle
from shmcast.errors import LayoutError, NotAllowed, StaleHandle
from shmcast.transport import Reader, Writer
from tests.support import codec_types as kinds
from tests.support.codec import bits, span_of, tensors_in

if TYPE_CHECKING:
    from random import Random

HEAD: Final = struct.Struct("<BIQQQ")
PAYLOAD: Final = 2
"""Flag: the bytes go over the payload block that the message lists, not over the message."""
OTHER_PLACE: Final = 4
"""Flag: the handle is as in the input; else its place is the message's own, and its length that of the input."""
SETTLE_EVERY: Final = 64
SIZE: Final = 64 * PAGE


class Stage:
    """A writer with one message, and its reader, in this process."""

    def __init__(self) -> None:
        self.writer = Writer(1, capacity=SIZE, allow=kinds.ALL)
        self.reader = Reader(self.writer.address, 0, allow=kinds.ALL)
        self.own = self.writer.empty((20_000,), torch.float32)
        self.own.fill_(1)
        item = kinds.Item(kinds.Kind.IMAGE, feature=self.own[:18_000])
        self.handle = self.writer.publish([item, torch.ones(20_000), torch.arange(9), list(range(80)), "text"])
        self.segment = self.writer._arena._segments[0]
        self.image = bytes(self.segment.map)
        where = self.handle.where
        self.message = bytes(self.image[where.offset : where.offset + where.length])
        (self.listed,) = parse_message(self.message, where.generation).blocks
        self.ticket = 1 << 40
        self.count = 0

    def handle_of(self, where: Descriptor) -> Handle:
        """A handle of this writer with a ticket that no other had."""
        self.ticket += 64
        return Handle(self.handle.token, self.handle.rank, where, self.ticket, 1, 1)

    def show(self, at: int, raw: bytes) -> None:
        """Write hostile bytes over the segment, as a writer can."""
        self.segment.map[at : at + len(raw)] = raw

    def restore(self, at: int, length: int) -> None:
        """The segment as it was; what the reader has said is read, or its ring would fill."""
        self.segment.map[at : at + length] = self.image[at : at + length]
        self.count += 1
        if not self.count % SETTLE_EVERY:
            self.writer.settle()

    def require_mapped(self, value: Any) -> None:
        """Raise `Violation` unless the large tensors of a value lie in mappings of the segment; all are read."""
        mapped = self.reader._leases._segments[0]
        homes = [(mapped.address, mapped.header.size)] if mapped is not None else []
        homes += [(address_of(private), len(private)) for private in mapped._private] if mapped is not None else []
        for found in tensors_in(value):
            low, high = span_of(found)
            inside = any(start <= low and high <= start + size for start, size in homes)
            require(inside or high - low < COPY_BELOW, "a large tensor outside the segment")
            count = found.numel() if isinstance(found, torch.Tensor) else found.size
            if 0 < count < skeletons.READ_UP_TO:
                _ = bits(found) if isinstance(found, torch.Tensor) else found.tobytes()

    def close(self) -> None:
        del self.own
        self.reader.close()
        self.writer.close()


_stages: list[Stage] = []


def stage() -> Stage:
    """The one pair of ends of this process."""
    if not _stages:
        _stages.append(Stage())
    return _stages[0]


def close() -> None:
    """Close both ends."""
    while _stages:
        _stages.pop().close()


def seeds() -> list[bytes]:
    """Flags, where the handle points, and the bytes that are written there: a message, or the head of a payload."""
    it = stage()
    where, listed = it.handle.where, it.listed
    skeleton = BLOCK.size + int.from_bytes(it.message[32:40], "little")
    payload = it.image[listed.offset : listed.offset + BLOCK.size]
    return [
        HEAD.pack(SEAL, *where) + it.message[:skeleton],
        HEAD.pack(SEAL | OTHER_PLACE, *where) + it.message[:skeleton],
        HEAD.pack(PAYLOAD, *where) + payload,
    ]


def check(data: bytes) -> str:
    """`Reader.open` of any handle while any bytes lie in the message's block, or in the one that it lists."""
    it = stage()
    flags, segment, offset, length, generation = HEAD.unpack(data[: HEAD.size].ljust(HEAD.size, b"\0"))
    home = it.listed if flags & PAYLOAD else it.handle.where
    raw = data[HEAD.size :][: home.length]
    if flags & SEAL and not flags & PAYLOAD:
        raw = blocks.sealed(raw + it.message[len(raw) :])
    shown = int.from_bytes(raw[8:16], "little")
    where = Descriptor(segment % (2 * MAX_SEGMENTS), offset, length, generation)
    if not flags & OTHER_PLACE:
        where = it.handle.where._replace(generation=it.handle.where.generation if flags & PAYLOAD else shown)
    it.show(home.offset, raw)
    try:
        answer = ask(lambda: it.reader.open(it.handle_of(where)), (LayoutError, NotAllowed, StaleHandle))
        if not answer.refused:
            it.require_mapped(answer.value)
    finally:
        it.restore(home.offset, len(raw))
    return answer.refused or "opened"


def reshape(data: bytes, chance: Random) -> bytes:
    """The same damage as to an inline message; or other pieces, or other blocks, in its table."""
    it = stage()
    head, raw = data[: HEAD.size], data[HEAD.size :]
    if head[:1] == bytes([PAYLOAD]) or chance.random() < 0.4:
        return data
    whole = raw + it.message[len(raw) :]
    damaged = inline.reshape_block(b"\0" + whole, chance)[1:]
    skeleton = BLOCK.size + int.from_bytes(damaged[32:40], "little")
    return head + damaged[: min(skeleton, len(damaged))]


WORDS = HEAD.size + BLOCK.size
FIELDS = (
    *fields_of(1, "4888"),
    *fields_of(HEAD.size, "8884488844"),
    *fields_of(WORDS, "448" + "44888" + "44884488448844884488"),
)

TARGETS = (Target("reader", check, seeds, FIELDS, reshape, close),)
