"""Skeleton streams: whole ones, the opcodes of their pickle alone, and the entries of their table alone."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from fuzz._answers import ask, require
from fuzz._target import Target
from shmcast._codec import Allow, Leaves, decode, encode
from shmcast._codec._table import join, split
from shmcast.errors import LayoutError, NotAllowed
from shmcast.multimodal import Modality, MultimodalDataItem, MultimodalInputs
from tests.support import codec_types as kinds
from tests.support.codec import bits, carry, tensors_in, within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

ALLOW: Final = Allow(kinds.ALL)
ERRORS: Final = (LayoutError, NotAllowed)
MARKER: Final = b"K\x00Q"
PROTO: Final = b"\x80\x05"
READ_UP_TO: Final = 100_000
"""Elements: an expanded view of one byte has as many as its writer likes, and whoever copies it knows its shape."""


def values() -> list[tuple[Any, Any]]:
    """Objects, with the raw inputs they refer to, that together use every kind of entry, code and class."""
    base = torch.arange(400, dtype=torch.float32)
    raw = {"a": torch.arange(100.0), "n": np.arange(50.0), "l": list(range(70)), "b": b"x" * 2000}
    item = kinds.Item(kinds.Kind.IMAGE, 5, 7, [(1, 2), (3, 4)], feature=base[100:200].view(10, 10))
    own = MultimodalDataItem(Modality.VIDEO, offsets=[(0, 3)], feature=torch.ones(2, 3))
    a, n = raw["a"], raw["n"]
    return [
        ([kinds.Request([item, item], mrope_positions=torch.ones(3, 2, dtype=torch.int64)), base[::7]], None),
        ([base[:1].expand(9), torch.empty(0, 3), base[5:9].view(torch.bfloat16), torch.tensor(True)], None),
        ({"x": np.arange(30.0).reshape(5, 6).T, "y": np.arange(9)[::-1], "z": np.array(["a", "bc"])}, None),
        ([list(range(90)), b"x" * 3000, bytearray(2000), "é" * 300, 10**30, -1, {1, 2}, frozenset([(1, 2)])], None),
        ([1j, slice(1, None), range(5), torch.float16, torch.Size([1, 2]), torch.device("cpu"), np.float32(3)], None),
        ([np.str_("ab"), np.dtype("f4"), np.datetime64("2020"), kinds.Access(5), kinds.Level.LOW], None),
        ([np.array(["2020-01-01"], "M8[25s]"), np.dtype("m8[ns]"), np.empty(0), np.bytes_(b"ab"), 2.5], None),
        ([{(1, 2): kinds.Pair(1, 2), kinds.Frozen(1, 2): kinds.Slotted(3, 4)}, kinds.Struct(feature=[1])], None),
        ([{kinds.FrozenStruct(kinds.FrozenStruct(2)): 1}, kinds.Mixed(1, 2, 3), kinds.OpenPair(1, 2)], None),
        ([a, a[10:20], a[3:].view(torch.int32), raw["b"], a.numpy()[4:9]], raw),  # type: ignore[index,attr-defined]
        ([n, n[4:8], raw["l"], {"again": raw["l"]}], raw),  # type: ignore[index]
        (MultimodalInputs([own]), None),
    ]


class Case:
    """One object encoded: its stream, its pieces as a transport gives them, the raw inputs of the other side."""

    def __init__(self, obj: Any, raw: Any) -> None:
        self.leaves = None if raw is None else Leaves.walk(raw)
        encoded = encode(obj, ALLOW, self.leaves, raw is not None)
        self.stream = encoded.stream
        self.pieces = carry(encoded)
        self.regions = list(self.pieces)
        self.list = raw["l"] if raw else []
        if raw is not None:
            self.regions += [raw["a"].view(torch.uint8), torch.from_numpy(raw["n"]).view(torch.uint8)]

    def check(self, stream: bytes) -> str:
        """Decode a stream over these pieces: an object whose tensors lie in them, or a documented error."""
        answer = ask(lambda: decode(stream, self.pieces, ALLOW, self.leaves), ERRORS)
        if answer.refused:
            return answer.refused
        require_inside(answer.value, self.regions)
        require(self.list == list(range(len(self.list))), "a leaf of the raw inputs was changed")
        return "decoded"


def require_inside(value: Any, regions: Sequence[torch.Tensor]) -> None:
    """Raise `Violation` unless every tensor and array of a value lies in `regions`; each is read."""
    for found in tensors_in(value):
        require(within(found, regions), "a tensor outside its pieces")
        count = found.numel() if isinstance(found, torch.Tensor) else found.size
        if 0 < count < READ_UP_TO:
            _ = bits(found) if isinstance(found, torch.Tensor) else found.tobytes()


@lru_cache(maxsize=1)
def cases() -> list[Case]:
    """Every value, encoded once."""
    return [Case(obj, raw) for obj, raw in values()]


def skeleton_seeds() -> list[bytes]:
    """The number of a case, and its stream."""
    return [bytes([number]) + case.stream for number, case in enumerate(cases())]


def check_skeleton(data: bytes) -> str:
    """`decode` of any stream."""
    return cases()[(data or b"\0")[0] % len(cases())].check(data[1:])


# The pickle alone: every class, an entry of each kind.

PIECE: Final = 64
TABLE: Final = (
    *(len(kinds.ALL), 1, PIECE),
    *(1, 0, 0, 0, 4, 16),  # TENSOR: 16 of float32
    *(2, 1, 0, 8, 4, 4),  # ARRAY: 4 of int64
    *(3, 0, 0, 16),  # INTS
    *(4, 0, 16, 8),  # BYTES
    *(5, 0, 24, 8),  # BYTEARRAY
    *(6, 0, 8, 0, 3),  # EMPTY
    *(7, 1, 4, 0),  # EMPTY_ARRAY
)
DTYPES: Final = ("torch.float32", "<i8", "torch.uint8", "torch.complex128", "<U3", "torch.bool", "<M8[s]")

VALUES: Final = (
    *(b"N", b"\x88", b"\x89", b"]", b"}", b")", b"\x8f", b"K\x01", b"K\x10", b"M\x00\x01", b"J\xff\xff\xff\xff"),
    *(b"\x8a\x01\x05", b"\x8a\x09" + b"\xff" * 8 + b"\x1f", b"G?\xf0\x00\x00\x00\x00\x00\x00", b"\x8c\x01a"),
    *(b"\x8c\x05IMAGE", b"\x8c\x04left", b"\x8c\x09__class__", b"C\x03abc", b"X\x02\x00\x00\x00ab", b"h\x00", b"h\x01"),
    *(b"h\x02", b"j\x00\x00\x00\x00", b"\x96\x02\x00\x00\x00\x00\x00\x00\x00ab", b"\x8c\x07cpu:999", b"\x8c\x03<f4"),
    *(bytes([ord("K"), entry, ord("Q")]) for entry in range(9)),
)
DEEDS: Final = (
    *(b"(", b"\x85", b"\x86", b"\x87", b"t", b"a", b"e", b"s", b"u", b"\x90", b"\x91", b"R", b"\x94", b"Q", b"."),
    *(b"h\x00h\x00\x86\x94", b"]\x94h\x00a", b"}h\x00Ns", b"\x8f(h\x00\x90", b"\x85" * 50, b"cos\nsystem\n", b"\x93"),
    *(b"\x81", b"b", b"i", b"o", b"\x82\x01", b"P0\n", b"2", b"0", b"1", b"\x95\x03\x00\x00\x00\x00\x00\x00\x00"),
)
REBUILDS: Final = tuple(MARKER + b"(K" + bytes([code]) for code in (*range(10), *range(16, 16 + len(kinds.ALL))))


@lru_cache(maxsize=1)
def opcodes_case() -> tuple[Case, bytes]:
    """The piece that all entries are over, and what stands before the opcodes."""
    case = Case(None, None)
    case.pieces = [torch.arange(3 * PIECE, dtype=torch.uint8)[PIECE : 2 * PIECE]]
    case.regions = case.pieces
    labels = [ALLOW.by_class(cls).label for cls in kinds.ALL]
    return case, join([*labels, *DTYPES], list(TABLE), PROTO)


@lru_cache(maxsize=1)
def opcode_seeds() -> list[bytes]:
    """A byte without a meaning, and the opcodes of programs that work."""
    number = {cls: bytes([16 + index]) for index, cls in enumerate(kinds.ALL)}
    made = {
        kinds.Frozen: b"K\x01]",
        kinds.Pair: b"K\x01K\x02",
        kinds.Kind: b"\x8c\x05IMAGE",
        kinds.Access: b"K\x05",
        kinds.Slotted: b"NN",
        kinds.Mixed: b"NNN",
        kinds.Struct: b"N\x8c\x01a",
        kinds.FrozenStruct: b"N",
        kinds.Plain: b"}\x8c\x01aK\x01s",
        kinds.OpenPair: b"NN}\x8c\x01aK\x01s",
    }
    programs = [MARKER + b"(K" + number[cls] + code + b"tR" for cls, code in made.items()]
    programs += [b"](" + b"".join(b"K" + bytes([entry]) + b"Q" for entry in range(1, 8)) + b"e"]
    programs += [
        b"}\x94(K\x01)\x85h\x00u",
        b"\x8f(K\x01K\x02\x90",
        b"(K\x01K\x02\x91",
        MARKER + b"(K\x01NK\x05NtR",
        MARKER + b"(K\x02K\x00K\x05K\x01tR",
        MARKER + b"(K\x07\x8c\x03<f4C\x04abcdtR",
        MARKER + b"(K\x06\x8c\x06<M8[s]tR",
        MARKER + b"(K\x05\x8c\x03cputR",
    ]
    return [b"\0" + program + b"." for program in programs]


def wrapped(program: bytes, chance: Random) -> bytes:
    """A program that makes a container or an instance of what this one makes, and still works if this one does."""
    others = opcode_seeds()
    other = others[int(chance.random() * len(others))][1:-1]
    value = program.removesuffix(b".")
    kind = int(chance.random() * 8)
    if kind < 3:
        return (b"](" + value + other + b"e.", b"(" + other + value + b"t.", b"}\x8c\x01a" + value + b"s.")[kind]
    if kind < 5:
        return (b"}" + value + b"Ns.", b"\x8f(" + value + other + b"\x90.")[kind - 3]
    code = (b"\x10", b"\x17", b"\x1a")[kind - 5]  # of one class or another, with as many values as may fit
    return MARKER + b"(K" + code + value + other * int(chance.random() * 3) + b"tR."


def reshape_opcodes(data: bytes, chance: Random) -> bytes:
    """A few opcodes more, in between or in the place of some; or all of it inside something larger."""
    if chance.random() < 0.4 and len(data) < 400:
        return data[:1] + wrapped(data[1:], chance)
    grown = b""
    for _ in range(1 + int(chance.random() * 4)):
        source = (VALUES, VALUES, DEEDS, REBUILDS)[int(chance.random() * 4)]
        grown += source[int(chance.random() * len(source))]
    at = len(data) - 1 if chance.random() < 0.3 else 1 + int(chance.random() * len(data))
    return data[:at] + grown + data[at + int(chance.random() * 4) * (chance.random() < 0.5) :]


def check_opcodes(data: bytes) -> str:
    """`decode` of a stream with these opcodes, and with classes and entries of every kind."""
    case, before = opcodes_case()
    return case.check(before + data[1:])


# The table alone.

ENTRY_NAMES: Final = ("torch.float32", "<f4", "torch.complex128", "<U3", "torch.uint8", "<M8[s]", "torch.bool", "|S5")
NUMBERS: Final = (*range(-3, 12), 16, 17, 60, 63, 64, 65, 2**31, 2**32, 2**40, 2**62, -(2**62), 2**63 - 1, -(2**63))


def entry_seeds() -> list[bytes]:
    """The number of a dtype, and the table's integers behind the piece: an entry each."""
    entries = [
        *((1, 0, 0, 0, 8, 4, 4), (1, 0, 0, 8, 9, 3, 2, 4, 1), (1, 0, 0, 0, 5, 9, 0), (2, 1, 0, 4, 9, 2, 3, 4, 8)),
        *((2, 1, 0, 60, 7, 4, -4), (3, 0, 8, 16), (4, 0, 0, 64), (5, 0, 3, 5), (6, 0, 8, 0, 2), (7, 1, 9, 0, 1, 4, 4)),
        *((8, 0, 1, 0, 4, 100), (9, 0, 1, 0, 4, 100, 0, 8, 4, 10), (10, 0, 3, 70, 1, 8, 4, 3)),
    ]
    return [b"\0" + struct.pack(f"<{len(entry)}q", *entry) for entry in entries]


def reshape_entry(data: bytes, chance: Random) -> bytes:
    """One integer of the table changed, taken away, or put in between."""
    at = 1 + int(chance.random() * (len(data) // 8 + 1)) * 8
    new = struct.pack("<q", NUMBERS[int(chance.random() * len(NUMBERS))])
    kind = chance.random()
    if kind < 0.6:
        return data[:at] + new + data[at + 8 :]
    return data[:at] + (new + data[at:] if kind < 0.8 else data[at + 8 :])


@lru_cache(maxsize=1)
def entries_case() -> Case:
    """The piece that entries are over, and leaves that they may refer to."""
    raw = {"a": torch.arange(100.0), "n": np.arange(50.0), "l": list(range(70)), "b": b"x" * 2000}
    case = Case(raw["a"], raw)
    case.pieces = [torch.arange(3 * PIECE, dtype=torch.uint8)[PIECE : 2 * PIECE]]
    case.regions += case.pieces
    return case


def check_entries(data: bytes) -> str:
    """`decode` of a stream with these entries over one piece and a few leaves."""
    case = entries_case()
    first = (data or b"\0")[0] % len(ENTRY_NAMES)
    names = [*ENTRY_NAMES[first:], *ENTRY_NAMES[:first]]
    numbers = [number for (number,) in struct.iter_unpack("<q", data[1 : 1 + (len(data) - 1) // 8 * 8])]
    return case.check(join(names, [0, 1, PIECE, *numbers], PROTO + b"K\x01Q."))


# Damage to whole streams.

LABELS: Final = (
    *("os:system:" + "0" * 16, "shmcast.multimodal:torch:" + "0" * 16, "shmcast.multimodal.x:Y:" + "0" * 16, "a:b", ""),
    *("<f8", "|O", "torch.int8", "torch.qint8", "<M8[s/0]", "<M8[0s]", "<m8[7/3D]", "<U0", "|S999999999", ">i4"),
)


def reshape_stream(stream: bytes, chance: Random) -> bytes:
    """A stream whose header fits again after its names, its table or its pickle were damaged."""
    try:
        parts = split(stream)
    except LayoutError:
        return stream
    names, table, code = list(parts.names), list(parts.table), parts.pickle
    kind = chance.random()
    if kind < 0.4 and table:
        at = int(chance.random() * len(table))
        table[at] = NUMBERS[int(chance.random() * len(NUMBERS))] if kind < 0.25 else table[at] + (kind < 0.32) * 2 - 1
    elif kind < 0.9 and len(code) > 2:
        code = code[:2] + reshape_opcodes(b"\0" + code[2:], chance)[1:]
    elif names:
        names[int(chance.random() * len(names))] = (*LABELS, *names)[int(chance.random() * (len(LABELS) + len(names)))]
    return join(names, [max(-(2**63), min(2**63 - 1, number)) for number in table] or [0], code)


def behind(head: int, reshape: Callable[[bytes, Random], bytes]) -> Callable[[bytes, Random], bytes]:
    """The same damage to what stands behind `head` bytes."""
    return lambda data, chance: data[:head] + reshape(data[head:], chance)


TARGETS = (
    Target("skeleton", check_skeleton, skeleton_seeds, ((3, 1), (4, 1), (5, 4), (9, 4)), behind(1, reshape_stream)),
    Target("opcodes", check_opcodes, opcode_seeds, (), reshape_opcodes),
    Target("entries", check_entries, entry_seeds, tuple((1 + 8 * n, 8) for n in range(10)), reshape_entry),
)
