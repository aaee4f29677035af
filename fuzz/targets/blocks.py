"""Block headers, and messages with their tables of blocks and pieces."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from fuzz._answers import ask, require
from fuzz._target import SEAL, Target, fields_of
from shmcast import _layout
from shmcast._layout import (
    BLOCK,
    LINE,
    MAX_SEGMENTS,
    PAGE,
    BlockKind,
    Descriptor,
    Message,
    Piece,
    parse_block,
    parse_message,
    plan_message,
)
from shmcast.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Sequence

GENERATION = 41
OTHER_USE = 2
"""Flag: another generation is asked for than the block shows."""
PAYLOAD = 4
"""Flag: a payload block is asked for."""
FIELDS = fields_of(1, "8884488844")
TABLE_FIELDS = (*FIELDS, *fields_of(65, "448" + "448884488844888"), *fields_of(65 + 16, "44884488448844884488"))


def sealed(raw: bytes) -> bytes:
    """These bytes with the length and the checksum that a block of them has."""
    if len(raw) < BLOCK.size:
        return raw
    block = bytearray(raw)
    struct.pack_into("<Q", block, 16, len(block))
    (size,) = struct.unpack_from("<Q", block, 32)
    crc = zlib.crc32(bytes(block[:24]) + bytes(block[32:60]))
    struct.pack_into("<I", block, 60, zlib.crc32(bytes(block[64 : 64 + size]) if size < 2**32 else b"", crc))
    return bytes(block)


def message_block(stream: bytes, blocks: Sequence[Descriptor], pieces: list[Piece | int]) -> bytes:
    """A block that holds such a message; an int is the length of a piece in the block itself."""
    plan = plan_message(len(stream), len(blocks), pieces)
    block = bytearray(plan.length)
    message = Message(stream, tuple(blocks), plan.pieces)
    _layout.write_message(block, GENERATION, plan.length, message)
    return bytes(block)


def block_seeds() -> list[bytes]:
    """Messages, withdrawn ones, payloads, empty ones, a stamped one."""
    message = bytearray(message_block(b"seven b", (), [65, 1]))
    payload = bytearray(PAGE)
    _layout.write_block(payload, GENERATION, len(payload), BlockKind.PAYLOAD)
    least = bytearray(BLOCK.size)
    _layout.write_block(least, GENERATION, len(least), BlockKind.PAYLOAD)
    withdrawn = bytearray(message)
    _layout.mark_withdrawn(withdrawn)
    stamped = bytearray(payload[:200])
    _layout.write_block(stamped, GENERATION, len(stamped), BlockKind.PAYLOAD)
    _layout.stamp_payload(stamped)
    found = [(SEAL, message), (0, message), (0, withdrawn), (OTHER_USE, message)]
    found += [(PAYLOAD, payload), (PAYLOAD | SEAL, least), (PAYLOAD, stamped)]
    return [bytes([flags]) + bytes(raw) for flags, raw in found]


def message_seeds() -> list[bytes]:
    """Messages that list no block, one, several; with pieces here and there, and without."""
    listed = Descriptor(0, PAGE, 5000, 7)
    others = [listed, Descriptor(1, 3 * PAGE, 64 + 4096, 8), Descriptor(1023, 2**40 * PAGE, 2**40, 2**64 - 1)]
    found = [
        message_block(b"", (), []),
        message_block(b"stream", (), [65, 1, 4000]),
        message_block(b"a longer stream" * 9, (listed,), [Piece(1, 64, 448), 300]),
        message_block(b"s", others, [Piece(3, 128, 2**39), Piece(1, 64, 100), 7, Piece(2, 64, 4096)]),
    ]
    return [bytes([SEAL]) + raw for raw in found]


def opened(data: bytes) -> tuple[int, bytes, int]:
    """Flags, block, and the generation that is asked for."""
    flags = (data or b"\0")[0]
    raw = sealed(data[1:]) if flags & SEAL else data[1:]
    shown = struct.unpack_from("<Q", raw, 8)[0] if len(raw) >= BLOCK.size else GENERATION
    return flags, raw, shown ^ 1 if flags & OTHER_USE else shown


def check_block(data: bytes) -> str:
    """`parse_block` of any bytes: a skeleton that is in them, of a block that is what was asked for."""
    flags, raw, generation = opened(data)
    kind = BlockKind.PAYLOAD if flags & PAYLOAD else BlockKind.MESSAGE
    answer = ask(lambda: parse_block(memoryview(raw), generation, kind), (LayoutError,))
    if answer.refused:
        return answer.refused
    magic, found, length, shown, _, size, _ = BLOCK.unpack_from(raw)
    require(magic == b"SHMBLOCK" and not flags & OTHER_USE, "a block in another use")
    require(found == generation and length == len(raw) and shown == kind, "another block than was asked for")
    require(answer.value == raw[64 : 64 + size], "a skeleton that is not in the block")
    require(kind == BlockKind.MESSAGE or answer.value == b"", "a payload with a skeleton")
    return "parsed"


def check_message(data: bytes) -> str:
    """`parse_message` of any bytes: blocks that can be, pieces inside them that do not share bytes."""
    _, raw, generation = opened(data)
    answer = ask(lambda: parse_message(memoryview(raw), generation), (LayoutError,))
    if answer.refused:
        return answer.refused
    message = answer.value
    require(isinstance(message, Message), f"a {type(message).__name__} for a message")
    if isinstance(message, Message):
        require_sound(message, raw)
    return "parsed"


def require_sound(message: Message, raw: bytes) -> None:
    """Raise `Violation` unless a message lies in its block and in those that it lists, and claims no byte twice."""
    ends = [len(raw), *(block.length for block in message.blocks)]
    for block in message.blocks:
        require(block.segment < MAX_SEGMENTS and block.offset % PAGE == 0 and block.offset >= PAGE, f"{block}")
        require(block.length >= BLOCK.size, f"{block}")
    for piece in message.pieces:
        require(piece.block < len(ends) and piece.length > 0 and piece.offset % LINE == 0, f"{piece}")
        require(BLOCK.size <= piece.offset and piece.offset + piece.length <= ends[piece.block], f"{piece}")
    # A piece may begin in the line in which the one before it ends.
    most = sum(ends) + LINE * len(message.pieces)
    require(sum(piece.length for piece in message.pieces) <= most, "pieces that together are larger than their blocks")
    require(message.stream in raw, "a stream that is not in the block")


TARGETS = (
    Target("block", check_block, block_seeds, FIELDS),
    Target("message", check_message, message_seeds, TABLE_FIELDS),
)
