"""A writer whose reader is hostile: whatever is in that reader's ring, the leases of the others stay."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import torch

from fuzz._answers import ask, require
from fuzz._target import SEAL, Target, fields_of
from shmcast._layout import ENTRY, PAGE, RING_ENTRIES, RING_HEAD, EntryKind, ring_offset
from shmcast.errors import ArenaFull
from shmcast.policy import Policy
from shmcast.transport import Writer

if TYPE_CHECKING:
    from shmcast._wire import Handle

POSTED: Final = 16
HOSTILE, HONEST = 0, 1
LIFE: Final = 16
"""Cases that one writer goes through; then what the hostile reader has retired is made anew."""


class Stage:
    """A writer, two readers' rings, no reader: what they say is written here."""

    def __init__(self) -> None:
        self.writer = Writer(2, capacity=32 * PAGE, policy=Policy(wait=0))
        self.arena = self.writer._arena
        self.cases = 0

    def post(self, entries: bytes, in_turn: bool) -> None:
        """Put entries where the writer looks next, a token with each, and have it look."""
        control, inbox = self.arena._control.map, self.arena._peers[HOSTILE].inbox
        for at in range(0, len(entries) - ENTRY.size + 1, ENTRY.size):
            entry = bytearray(entries[at : at + ENTRY.size])
            if in_turn:
                struct.pack_into("<I", entry, 8, inbox._seq & 0xFFFFFFFF)
            start = ring_offset(HOSTILE, RING_ENTRIES) + RING_HEAD.size + inbox._seq % RING_ENTRIES * ENTRY.size
            control[start : start + ENTRY.size] = bytes(entry)
            inbox._posted.release()
            self.arena.drain()


_stages: list[Stage] = []


def stage() -> Stage:
    """The writer of this case."""
    if _stages and _stages[0].cases >= LIFE:
        close()
    if not _stages:
        _stages.append(Stage())
    _stages[0].cases += 1
    return _stages[0]


def close() -> None:
    """Close the writer."""
    while _stages:
        _stages.pop().writer.close()


def seeds() -> list[bytes]:
    """Flags, and entries of every kind about small and extreme numbers."""
    values = (0, 1, 2, 5, 2**32, 2**64 - 1)
    entries = [ENTRY.pack(value, 0, kind) for kind in EntryKind for value in values if value < 2**64 - 1 or kind < 5]
    return [bytes([SEAL]) + b"".join(entries[at : at + 4]) for at in range(0, len(entries), 4)]


def published() -> tuple[Stage, Handle]:
    """A message that both readers hold, of a writer that has room."""
    it = stage()
    try:
        return it, it.writer.publish([torch.ones(3), "text"])
    except ArenaFull:  # an earlier case has retired the one segment
        close()
        it = stage()
        return it, it.writer.publish([torch.ones(3), "text"])


def check(data: bytes) -> str:
    """Everything a writer does with what one reader posted, and what the other still holds then."""
    flags, entries = (data or b"\0")[0], data[1:][: POSTED * ENTRY.size]
    it, handle = published()

    def run() -> str:
        it.post(entries, bool(flags & SEAL))
        it.writer.settle()
        held = it.writer.stats().leases[HONEST].held
        require(held == 1, f"the other reader holds {held} leases, not one")
        it.writer.withdraw(handle)
        return "settled"

    return str(ask(run, ()).value)


TARGETS = (
    Target("writer", check, seeds, tuple(f for n in range(4) for f in fields_of(1 + 16 * n, "844")), None, close),
)
