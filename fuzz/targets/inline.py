"""Inline messages, and the index of a batch: any object at all that came as a message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fuzz._answers import Asked, ask, require
from fuzz._target import SEAL, Target
from fuzz.targets import blocks, skeletons
from fuzz.targets.wire import handles
from shmcast import _layout
from shmcast._codec import encode
from shmcast._layout import BLOCK, Message, parse_message, skeleton_size
from shmcast._sent import Sent, index_of, parse_index
from shmcast._wire import HeaderRoute, Reason
from shmcast.errors import LayoutError
from shmcast.transport import pack_inline, unpack_inline

if TYPE_CHECKING:
    from random import Random


def packed(obj: Any) -> bytes:
    """Flags, and an object as an inline message."""
    return bytes([SEAL]) + pack_inline(encode(obj, skeletons.ALLOW)).numpy().tobytes()


def inline_seeds() -> list[bytes]:
    """Every value of the skeletons that needs no raw inputs."""
    return [packed(obj) for obj, raw in skeletons.values() if raw is None]


def batches() -> list[list[Sent]]:
    """What an entry rank sends of batches."""
    inline = pack_inline(encode([1, torch.ones(3)], skeletons.ALLOW))
    sents = [
        Sent(HeaderRoute.SHM, handle=handles()[0], leaves=4),
        Sent(HeaderRoute.RAW, handle=handles()[1]),
        Sent(HeaderRoute.INLINE, Reason.FULL, inline=inline),
        Sent(HeaderRoute.LOCAL, Reason.THRESHOLD),
        Sent(HeaderRoute.NONE, Reason.RAISED, text="ValueError: é"),
    ]
    return [[], sents, sents[2:3] * 3]


def index_seeds() -> list[bytes]:
    """Indexes, and other objects in their place."""
    entry = (3, 0, b"", None, "", 0)
    odd: list[Any] = [
        [entry, list(entry), "six6ix", {n: n for n in range(6)}],
        [(1, 0, torch.arange(80), None, "", 0), (2, 0, b"", torch.ones(2, 2).T, "", 0)],
        [torch.arange(12.0).view(6, 2), torch.zeros(1, dtype=torch.uint8).expand(600)],
        [
            (2, 0, b"", torch.zeros(1, dtype=torch.uint8).expand(900), "", 0),
            (2, 0, b"", torch.ones(9).bfloat16(), "", 0),
        ],
        torch.ones(3),
    ]
    return [*(packed(index_of(batch)) for batch in batches()), *(packed(obj) for obj in odd)]


def unpacked(data: bytes) -> tuple[Asked, torch.Tensor]:
    """The answer to an inline message, and the tensor that it came in."""
    raw = blocks.sealed(data[1:]) if (data or b"\0")[0] & SEAL else data[1:]
    tensor = torch.empty(len(raw), dtype=torch.uint8)
    tensor.numpy()[:] = bytearray(raw)
    return answer_to(tensor), tensor


def answer_to(tensor: torch.Tensor) -> Asked:
    """What `unpack_inline` says to any tensor."""
    return ask(lambda: unpack_inline(tensor, skeletons.ALLOW), skeletons.ERRORS)


def check_inline(data: bytes) -> str:
    """`unpack_inline` of any tensor of bytes: an object whose tensors lie in it."""
    answer, tensor = unpacked(data)
    if answer.refused:
        return answer.refused
    skeletons.require_inside(answer.value, [tensor])
    return "decoded"


def check_index(data: bytes) -> str:
    """`parse_index` of any object that an inline message can carry, and then its own inline messages."""
    answer, tensor = unpacked(data)
    if answer.refused:
        return f"{answer.refused} (message)"
    parsed = ask(lambda: parse_index(answer.value, None), (LayoutError,))
    if parsed.refused:
        return parsed.refused
    require(isinstance(parsed.value, list), "an index that is no list")
    for sent in parsed.value if isinstance(parsed.value, list) else ():
        require(type(sent.text) is str and type(sent.leaves) is int, "text and leaves of other types")
        require((sent.inline is not None) == (sent.route is HeaderRoute.INLINE), "an inline message where none is")
        require((sent.handle is not None) == (sent.route in (1, 5)), "a handle where none is, or the reverse")
        if sent.inline is not None:
            skeletons.require_inside(answer_to(sent.inline).value, [tensor])
    return "parsed"


def reshape_block(data: bytes, chance: Random) -> bytes:
    """A message whose stream was damaged, with its pieces where they were."""
    raw = blocks.sealed(data[1:])
    try:
        message = parse_message(raw, int.from_bytes(raw[8:16], "little"))
    except LayoutError:
        return data
    stream = skeletons.reshape_stream(message.stream, chance)
    needed = BLOCK.size + skeleton_size(len(stream), len(message.blocks), len(message.pieces))
    block = bytearray(raw)
    if not message.pieces:
        block = block[:needed].ljust(needed, b"\0")
    elif needed > min((piece.offset for piece in message.pieces if not piece.block), default=needed):
        return data
    _layout.write_message(block, 0, len(block), Message(stream, message.blocks, message.pieces))
    return bytes([SEAL]) + bytes(block)


TARGETS = (
    Target("inline", check_inline, inline_seeds, blocks.TABLE_FIELDS, reshape_block),
    Target("index", check_index, index_seeds, blocks.TABLE_FIELDS, reshape_block),
)
