"""Streams that an enemy wrote: a value, `LayoutError` or `NotAllowed`, no code run, no byte read outside a piece."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from shmcast._codec import Allow, Leaves, decode, encode
from shmcast._codec import _table as table_format
from shmcast._codec._table import HEADER, join, split
from shmcast.errors import EncodeError, LayoutError, NotAllowed, ShmcastError
from tests.support import codec_types as kinds
from tests.support.codec import bits, carry, span_of, tensors_in, within

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALLOW = Allow([*kinds.ALL, "sglang"])
PROTO = b"\x80\x05"
MARKER = b"K\x00Q"  # the persistent id of the rebuild marker

WATCHED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "exec", "compile", "import", "open")
_armed: list[str] | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _armed is not None and event in WATCHED:
        _armed.append(f"{event} {args[:1]!r}")


sys.addaudithook(_audit)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail if anything inside starts a process, opens a file, compiles, executes or imports."""
    global _armed
    seen: list[str] = []
    _armed = seen
    try:
        yield
    finally:
        _armed = None
    assert not seen


def forged(opcodes: bytes, names: list[str] | None = None, table: list[int] | None = None) -> bytes:
    """A stream of this pickle (protocol added), with no class, piece or entry unless given."""
    return join(names or [], table or [0, 0], PROTO + opcodes)


def refused(stream: bytes, pieces: Any = (), allow: Allow = ALLOW, **how: Any) -> ShmcastError:
    """The error that decode raises; nothing runs meanwhile."""
    with pytest.raises((LayoutError, NotAllowed)) as caught, nothing_runs():
        decode(stream, pieces, allow, **how)
    error: ShmcastError = caught.value
    return error


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Whatever torch and numpy import lazily on their error paths, they import now."""
    for length in (0, 1):
        with pytest.raises(LayoutError):
            decode(forged(b"K\x01Q.", ["torch.float64"], [0, 1, 9, 1, 0, 0, 1, 4, 1]), [torch.zeros(9)[length:]], ALLOW)
    with pytest.raises(RuntimeError):
        torch.zeros(9, dtype=torch.uint8)[1:].view(torch.float64)


# What a pickle could do: look up a name, call it, set state.


class Shell:
    """Pickles as the call of anything."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call = (call, args)

    def __reduce__(self) -> Any:
        return self.call


GADGETS: dict[str, Any] = {
    "os.system": Shell(os.system, "touch /tmp/owned"),
    "Popen": Shell(subprocess.Popen, ["touch", "/tmp/owned"]),
    "eval": Shell(eval, "1"),
    "exec": Shell(exec, "import os"),
    "getattr": Shell(getattr, "text", "upper"),
    "partial": Shell(functools.partial, os.system),
    "load from bytes": Shell(torch.storage._load_from_bytes, b"x"),
    "torch rebuild": torch.ones(3),
    "numpy rebuild": np.ones(3),
    "enum": kinds.Kind.IMAGE,
    "dataclass": kinds.Item(kinds.Kind.IMAGE),
    "struct": kinds.BareStruct(1),
    "class": kinds.Item,
    "function": os.getcwd,
    "set of an old protocol": {1, 2},
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", GADGETS)
def test_real_pickles_are_refused(name: str, protocol: int) -> None:
    opcodes = pickle.dumps(GADGETS[name], protocol=protocol)
    if protocol == 5 and name == "set of an old protocol":
        return
    refused(opcodes)
    refused(join([], [0, 0], opcodes))
    if protocol == 5:
        error = refused(forged(opcodes[2:]))
        assert "opcode" in str(error)


OPCODES: dict[str, bytes] = {
    "GLOBAL": b"cos\nsystem\n",
    "STACK_GLOBAL": b"\x8c\x02os\x8c\x06system\x93",
    "INST": b"(S'true'\nios\nsystem\n",
    "OBJ": b"(cos\nsystem\nS'true'\no",
    "NEWOBJ": b"\x8c\x02os\x8c\x06system\x93)\x81",
    "NEWOBJ_EX": b"NN}\x92",
    "EXT1": b"\x82\x01",
    "EXT2": b"\x83\x01\x00",
    "EXT4": b"\x84\x01\x00\x00\x00",
    "BUILD": b"N}b",
    "REDUCE of text": b"\x8c\x09os.system\x8c\x04true\x85R",
    "REDUCE of None": b"N)R",
    "REDUCE of None to good parts": b"N(K\x04K\x01tR",
    "REDUCE of text to good parts": b"\x8c\x09os.system(K\x04K\x01tR",
    "REDUCE of a list of the marker": b"]" + MARKER + b"a)R",
    "REDUCE without a tuple": MARKER + b"]R",
    "REDUCE without a code": MARKER + b")R",
    "REDUCE with a name": MARKER + b"\x8c\x09os.system\x85R",
    "REDUCE with True": MARKER + b"\x88\x85R",
    "REDUCE with a negative code": MARKER + b"J\xff\xff\xff\xff\x85R",
    "REDUCE with an unknown code": MARKER + b"K\x0f\x85R",
    "REDUCE with an unknown class": MARKER + b"K\x10\x85R",
    "PERSID": b"P0\n",
    "persistent id of text": b"\x8c\x010Q",
    "persistent id out of range": b"K\x05Q",
    "persistent id below zero": b"J\xff\xff\xff\xffQ",
    "persistent id of a bool": b"\x88Q",
    "GET of protocol 0": b"g0\n",
    "PUT": b"Np0\n",
    "BINPUT": b"Nq\x00",
    "DUP": b"N2\x86",
    "POP": b"NN0",
    "POP_MARK": b"N(1",
    "LONG": b"L5L\n",
    "INT": b"I5\n",
    "FLOAT": b"F5\n",
    "STRING": b"S'a'\n",
    "UNICODE": b"Va\n",
    "LIST": b"(l",
    "DICT": b"(d",
    "NEXT_BUFFER": b"\x97",
    "READONLY_BUFFER": b"N\x98",
    "BINBYTES8": b"\x8e\x01\x00\x00\x00\x00\x00\x00\x00a",
    "PROTO twice": b"\x80\x05N",
}


@pytest.mark.parametrize("name", OPCODES)
def test_opcodes_that_no_skeleton_has(name: str) -> None:
    for before, after in ((b"", b""), (b"]", b"a"), (b"}\x8c\x01a", b"s"), (b"N", b"\x86")):
        refused(forged(before + OPCODES[name] + after + b"."))


@pytest.mark.parametrize("opcode", range(256))
def test_every_opcode_alone(opcode: int) -> None:
    values = {ord("N"), ord("]"), ord("}"), ord(")"), 0x88, 0x89, 0x8F, 0x91}
    stream = forged(bytes([opcode]) + b".")
    if opcode in values - {0x91}:
        decode(stream, (), ALLOW)
    else:
        refused(stream)


@pytest.mark.parametrize(
    "label",
    [
        "os:system",
        "subprocess:Popen",
        "builtins:eval",
        "functools:partial",
        "copyreg:_reconstructor",
        "sglangx:Item",
        "sglang:os.system",
        "sglang.:Item",
        ".sglang:Item",
        "sglang..x:Item",
        "sglang:",
        ":Item",
        "sglang:Item.__class__",
        "sglang/../os:system",
        "tests.support.codec_types:Outer.Nested",
        "tests.support.codec_types:Kind.IMAGE",
        "tests.support.codec_types:Item.__init__",
        "tests.support.codec_types:msgspec.json",
        "tests.support.codec_types:dataclasses",
        "tests.support.codec_types:ALL",
        "tests.support:codec_types",
        "torch.storage:_load_from_bytes",
        "torch:Tensor",
        "shmcast._codec:Allow",
        "shmcast:os",
        "shmcast.multimodalx:Item",
        "shmcast.multimodal:torch",
        "__main__:Item",
        "sys:modules",
        "\x00:\x00",
    ],
)
def test_names_outside_the_allow_list(label: str) -> None:
    import shmcast.multimodal  # noqa: F401 - so that the look-up below imports nothing

    stream = forged(MARKER + b"K\x10\x85R.", [label + ":" + "0" * 16], [1, 0])
    assert isinstance(refused(stream), NotAllowed)


@pytest.mark.parametrize("label", ["", "os", "os:system", "a:b:c:d", ":::", "tests.support.codec_types:Item:00"])
def test_labels_that_are_no_labels(label: str) -> None:
    refused(forged(b"N.", [label], [1, 0]))


def test_more_classes_than_names() -> None:
    for classes in (-1, 1, 5, 100):
        refused(forged(b"N.", None, [classes, 0]))


# What an admitted class could be made to do.


def instance(cls: type, values: bytes, *more: bytes) -> bytes:
    """A stream whose one value is `cls` rebuilt of the values that these opcodes push."""
    record = ALLOW.by_class(cls)
    return forged(MARKER + b"(K\x10" + values + b"tR" + b"".join(more) + b".", [record.label], [1, 0])


BAD_INSTANCES = {
    "enum without a name": (kinds.Kind, b""),
    "enum of no such name": (kinds.Kind, b"\x8c\x05AUDIO"),
    "enum by attribute": (kinds.Kind, b"\x8c\x08__init__"),
    "enum by value": (kinds.Kind, b"K\x01"),
    "enum with state": (kinds.Kind, b"\x8c\x05IMAGE}"),
    "flag beyond its bits": (kinds.Access, b"K\x08"),
    "flag below zero": (kinds.Access, b"J\xff\xff\xff\xff"),
    "flag of True": (kinds.Access, b"\x88"),
    "too few values": (kinds.Frozen, b"K\x01"),
    "too many values": (kinds.Frozen, b"K\x01K\x01}))"),
    "extras of a list": (kinds.Frozen, b"K\x01K\x01]"),
    "extras with a number": (kinds.Frozen, b"K\x01K\x01}K\x01K\x01s"),
    "extras without room": (kinds.Slotted, b"K\x01K\x01}\x8c\x01aK\x01s"),
    "absent of a list": (kinds.Frozen, b"K\x01K\x01}]"),
    "absent out of range": (kinds.Frozen, b"K\x01K\x01}K\x02\x85"),
    "absent of text": (kinds.Frozen, b"K\x01K\x01}\x8c\x01a\x85"),
    "struct with absent fields": (kinds.Struct, b"K\x01\x8c\x01a}K\x01\x85"),
    "struct of too few": (kinds.Struct, b""),
    "namedtuple of too few": (kinds.Pair, b"K\x01"),
    "namedtuple with extras": (kinds.Pair, b"K\x01K\x01}\x8c\x01aK\x01s"),
    "plain without extras": (kinds.Plain, b"K\x01"),
    "BUILD of an instance": (kinds.Frozen, b"K\x01K\x01"),
}


@pytest.mark.parametrize("name", BAD_INSTANCES)
def test_instances_of_bad_parts(name: str) -> None:
    cls, values = BAD_INSTANCES[name]
    refused(instance(cls, values, b"}b" if name.startswith("BUILD") else b""))


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot say")


@dataclasses.dataclass(frozen=True)
class Moody:
    """Admitted, and so its hash may run; what it raises tells nothing."""

    value: Any

    def __hash__(self) -> int:
        raise Mute


def test_an_error_that_cannot_say_what_it_is() -> None:
    allow = Allow([Moody])
    stream = forged(b"}" + MARKER + b"(K\x10NtRNs.", [allow.by_class(Moody).label], [1, 0])
    assert str(refused(stream, allow=allow)) == "not a skeleton: Mute"


def test_an_enum_cannot_be_changed() -> None:
    for change in (
        b"}\x8c\x07_value_K\x09sb",
        b"}\x8c\x05valueK\x09sb",
        b"K\x09a",
        b"(K\x09e",
        b"K\x01K\x02s",
        b"(K\x01\x90",
    ):
        refused(instance(kinds.Holder, b"\x8c\x04LIST", change))
    assert kinds.Holder.LIST.value == [1, 2]
    assert [member.name for member in kinds.Holder] == ["LIST"]


def test_state_never_reaches_the_class() -> None:
    extras = b"}\x8c\x09__class__\x8c\x06objects\x8c\x08__dict__}s"
    with nothing_runs():
        back: Any = decode(
            instance(kinds.Frozen, b"K\x01K\x02}(\x8c\x09__class__K\x05\x8c\x07__new__K\x06u"), (), ALLOW
        )
    assert type(back) is kinds.Frozen
    assert kinds.Frozen() == kinds.Frozen(1, 2)
    refused(instance(kinds.Frozen, b"K\x01K\x02" + extras, b"b"))


def test_no_constructor_runs() -> None:
    with nothing_runs():
        back: Any = decode(instance(kinds.Sly, b"K\x05"), (), ALLOW)
    assert object.__getattribute__(back, "value") == 5
    post = decode(instance(kinds.FrozenStruct, b"\x8c\x04post"), (), ALLOW)
    assert type(post) is kinds.FrozenStruct


# Sizes, depths and amounts.


def test_truncations() -> None:
    encoded = encode(VALUES[0][0], ALLOW)
    pieces = carry(encoded)
    for length in range(len(encoded.stream)):
        refused(encoded.stream[:length], pieces)
    refused(encoded.stream + b".", pieces)
    refused(encoded.stream + b"\x00", pieces)


def test_lengths_that_lie() -> None:
    for opcodes in (
        b"\x8c\xffabc.",
        b"X\xff\xff\xff\xffabc.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc.",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"C\xffabc.",
        b"B\xff\xff\xff\xffabc.",
        b"\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"\x8a\xff\x01.",
        b"\x8b\xff\xff\xff\x7f\x01.",
        b"\x8b\xff\xff\xff\xff\x01.",
        b"\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
        b"\x95\x03\x00\x00\x00\x00\x00\x00\x00N.",
        b"j\xff\xff\xff\x7f.",
        b"h\x00.",
        b"\x94N.",
        b"",
        b"N",
        b".",
        b"NN.",
        b"(N.",
        b"t.",
        b"e.",
        b"\x86.",
        b"N\x87.",
        b"a.",
        b"}(Nu.",
        b"]K\x01s.",
        b"}K\x01a.",
        b"](K\x01\x90.",
        b"\x8f(]\x90.",
        b"}]K\x01s.",
        b"(]\x91.",
        b"\x8c\x01\xff.",
        b"G\x00.",
    ):
        refused(forged(opcodes))


def test_headers_that_lie() -> None:
    good = forged(b"N.")
    assert decode(good, (), ALLOW) is None
    for index, value in [
        (0, 0),
        (1, 0),
        (2, 0),
        (2, 2),
        (3, 0),
        (3, 3),
        (3, 16),
        (4, 1),
        (7, 255),
        (8, 1),
        (8, 200),
        (11, 255),
    ]:
        refused(good[:index] + bytes([value]) + good[index + 1 :])
    refused(b"")
    refused(HEADER.pack(b"sk", 1, 8, 2**32 - 1, 2**32 - 1))


def piece_between() -> torch.Tensor:
    """A piece of 64 bytes with other people's bytes before and behind it, in the same storage."""
    return torch.arange(192, dtype=torch.uint8)[64:128]


def over_piece(*entry: int, names: tuple[str, ...] = ("torch.float32",), size: int = 64) -> bytes:
    return forged(b"K\x01Q.", list(names), [0, 1, size, *entry])


TENSOR, ARRAY, INTS, BYTES, EMPTY = (
    table_format.TENSOR,
    table_format.ARRAY,
    table_format.INTS,
    table_format.BYTES,
    table_format.EMPTY,
)
STRIDED, FLAT = 4 + 1, 4

BAD_ENTRIES: dict[str, tuple[int, ...]] = {
    "kind zero": (0,),
    "kind unknown": (99,),
    "kind below zero": (-1,),
    "nothing behind the kind": (TENSOR,),
    "dtype out of range": (TENSOR, 1, 0, 0, FLAT, 4),
    "dtype below zero": (TENSOR, -1, 0, 0, FLAT, 4),
    "piece out of range": (TENSOR, 0, 1, 0, FLAT, 4),
    "piece below zero": (TENSOR, 0, -1, 0, FLAT, 4),
    "offset below zero": (TENSOR, 0, 0, -4, FLAT, 4),
    "offset of half an element": (TENSOR, 0, 0, 2, FLAT, 4),
    "offset at the end": (TENSOR, 0, 0, 64, FLAT, 1),
    "one element too many": (TENSOR, 0, 0, 0, FLAT, 17),
    "far too many": (TENSOR, 0, 0, 0, FLAT, 2**62),
    "size below zero": (TENSOR, 0, 0, 0, FLAT, -1),
    "no size": (TENSOR, 0, 0, 0, FLAT, 0),
    "product that wraps": (TENSOR, 0, 0, 0, 8, 2**32, 2**32),
    "product that wraps to zero": (TENSOR, 0, 0, 0, 9, 2**32, 2**32, 0, 0),
    "stride beyond the piece": (TENSOR, 0, 0, 0, STRIDED, 2, 16),
    "stride below zero": (TENSOR, 0, 0, 60, STRIDED, 2, -1),
    "stride that wraps": (TENSOR, 0, 0, 0, STRIDED, 5, 2**62),
    "stride that wraps back": (TENSOR, 0, 0, 0, 9, 3, 3, 2**62, -(2**62)),
    "expanded beyond memory": (TENSOR, 0, 0, 0, 9, 2**40, 2**40, 0, 0),
    "dims below zero": (TENSOR, 0, 0, 0, -4),
    "dims beyond all": (TENSOR, 0, 0, 0, 4 * 65, *[1] * 65),
    "dims beyond the table": (TENSOR, 0, 0, 0, 4 * 64),
    "strides missing": (TENSOR, 0, 0, 0, STRIDED, 2),
    "empty that is not": (EMPTY, 0, FLAT, 3),
    "empty with a stride below zero": (EMPTY, 0, STRIDED, 0, -1),
    "empty beyond memory": (EMPTY, 0, 12, 0, 2**40, 2**40),
    "ints of no ints": (INTS, 0, 0, 7),
    "ints too many": (INTS, 0, 0, 72),
    "bytes below zero": (BYTES, 0, 0, -1),
    "bytes too many": (BYTES, 0, 1, 64),
    "bytes before the piece": (BYTES, 0, -1, 10),
    "a leaf without raw": (table_format.LEAF, 0, 1, 0, FLAT, 4),
    "a leaf of no kind": (table_format.LEAF, 0, 9),
    "something left over": (TENSOR, 0, 0, 0, FLAT, 4, 0),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_entries_that_lie(name: str) -> None:
    piece = piece_between()
    refused(over_piece(*BAD_ENTRIES[name]), [piece])


ARRAY_NAMES = [
    "|O",
    "O",
    "|V8",
    "i4,i4",
    ">i4",
    "<i3",
    "<f1",
    "|S0",
    "<U0",
    "<M8[foo]",
    "<M8[s/0]",
    "<m8[1s/0]",
    "<M8[2s/4]",
    "<M8[0s]",
    "<M8[s]//0",
    "<M8[999999999999s]",
    "<U99999999999",
    "torch.float32",
    "a5",
    "",
    "{}",
]


@pytest.mark.parametrize("name", ARRAY_NAMES)
def test_numpy_dtypes_that_are_none(name: str) -> None:
    piece = piece_between()
    refused(over_piece(ARRAY, 0, 0, 0, FLAT, 1, names=(name, "")), [piece])
    text = name.encode()
    refused(forged(MARKER + b"K\x06\x8c" + bytes([len(text)]) + text + b"\x86R."))


@pytest.mark.parametrize("entry", [(0, 64, 1, -1), (0, 0, 2, -8), (0, 56, 2, 8), (0, 8, 3, -8), (0, -8, 2, 8)])
def test_arrays_outside_their_piece(entry: tuple[int, int, int, int]) -> None:
    piece = piece_between()
    index, offset, size, stride = entry
    refused(over_piece(ARRAY, 0, index, offset, STRIDED, size, stride, names=("<i8",)), [piece])


@pytest.mark.parametrize("name", ["torch.qint8", "torch.float", "float32", "torch.nn", "torch.load", ""])
def test_torch_dtypes_that_are_none(name: str) -> None:
    refused(over_piece(TENSOR, 0, 0, 0, FLAT, 1, names=(name, "")), [torch.zeros(64, dtype=torch.uint8)])


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [torch.zeros(63)],
        [torch.zeros(64)],
        [torch.zeros(8, 8, dtype=torch.uint8)],
        [torch.zeros(65, dtype=torch.uint8)],
    ],
    ids=["none", "short", "dtype", "dims", "long"],
)
def test_pieces_that_do_not_fit(pieces: list[torch.Tensor]) -> None:
    refused(over_piece(TENSOR, 0, 0, 0, FLAT, 4), pieces)
    refused(over_piece(TENSOR, 0, 0, 0, FLAT, 4), [torch.zeros(64, dtype=torch.uint8)] * 2)


def test_a_piece_is_copied_out_no_more_than_once() -> None:
    """A hundred entries of a few bytes each must not make a hundred copies of a large piece."""
    piece = torch.zeros(2**20, dtype=torch.uint8)
    for kind in (INTS, BYTES, table_format.BYTEARRAY):
        table = [0, 1, 2**20] + [kind, 0, 0, 2**20] * 100
        refused(forged(b"N.", [], table), [piece])


def test_a_hash_that_would_never_end() -> None:
    """Sixty doublings of a tuple: a hundred bytes of code, 2**60 steps of hash."""
    doubled = b")\x94" + b"".join(bytes([*b"h", index, *b"h", index]) + b"\x86\x94" for index in range(60))
    for hashed in (b"}h\x3cNs", b"\x8f(h\x3c\x90", b"(h\x3c\x91"):
        assert "nested too deeply" in str(refused(forged(b"(" + doubled + hashed + b"t.")))


def test_a_hash_that_would_never_end_inside_what_the_collector_cannot_see() -> None:
    """The same within a Struct of gc=False."""
    record = ALLOW.by_class(kinds.FrozenStruct)
    doubled = b")\x94" + b"".join(bytes([*b"h", index, *b"h", index]) + b"\x86\x94" for index in range(60))
    stream = forged(b"(" + doubled + b"}" + MARKER + b"(K\x10h\x3ctRNst.", [record.label], [1, 0])
    assert "nested too deeply" in str(refused(stream))


def test_a_key_is_weighed_without_a_copy_of_what_it_names_again_and_again() -> None:
    """A tuple of 4,000 times one list of 4,000: together 16 million parts, of which none may be listed first."""
    part = b"](" + b"N" * 4000 + b"e\x94"
    stream = forged(b"(" + part + b"}(" + b"h\x00" * 4000 + b"tNst.")
    tracemalloc.start()
    try:
        assert "nested too deeply" in str(refused(stream))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 << 20


def long_int(value: int) -> bytes:
    digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(digits)) + digits


@pytest.mark.parametrize("start", [b"}(", b"\x8f(", b"("], ids=["dict", "set", "frozenset"])
def test_keys_of_one_hash_are_refused_before_they_cost_their_square(start: bytes) -> None:
    keys = [long_int(index * sys.hash_info.modulus) for index in range(1, 6000)]
    end = {b"}(": b"u", b"\x8f(": b"\x90", b"(": b"\x91"}[start]
    between = b"N" if start == b"}(" else b""
    stream = forged(start + b"".join(key + between for key in keys) + end + b".")
    assert "one hash" in str(refused(stream))
    few = forged(start + b"".join(key + between for key in keys[:500]) + end + b".")
    value: Any = decode(few, (), ALLOW)
    assert len(value) == 500


def test_keys_of_one_hash_are_counted_over_all_that_is_added_to_a_container() -> None:
    items = b"".join(long_int(index * sys.hash_info.modulus) + b"Ns" for index in range(1, 6000))
    assert "one hash" in str(refused(forged(b"}" + items + b".")))


def test_a_vast_int_is_no_cheap_key() -> None:
    """Its hash walks its digits each time: nothing keeps it."""
    vast = long_int(1 << 800_000) + b"\x94"
    assert "nested too deeply" in str(refused(forged(b"(" + vast + b"}h\x00Ns" * 2000 + b"t.")))
    assert "nested too deeply" in str(refused(forged(b"(" + vast + b"}h\x00\x85Ns" * 2000 + b"t.")))
    once: Any = decode(forged(b"}" + vast + b"Ns."), (), ALLOW)
    assert once == {1 << 800_000: None}


@pytest.mark.parametrize("letter", [b"X", b"B"])
def test_long_text_is_no_cheap_key(letter: bytes) -> None:
    """A key that is equal to the one there, and not the same object, is compared with it byte by byte."""
    text = letter + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    again = b"h\x01Ns" * 40_000
    assert "keys" in str(refused(forged(b"(" + text + b"\x94" + text + b"\x94}h\x00Ns" + again + b"t.")))
    few: Any = decode(forged(b"(" + text + b"\x94" + text + b"\x94}h\x00Ns" + b"h\x01Ns" * 5 + b"t."), (), ALLOW)
    assert len(few[2]) == 1


def test_positions_of_absent_fields_are_counted_before_they_are_walked() -> None:
    """One long tuple of them, named for each of many instances, would be walked for each: three are one too many."""
    label = ALLOW.by_class(kinds.Frozen).label
    assert "positions" in str(refused(forged(MARKER + b"(K\x10NN}K\x00K\x00K\x00\x87tR.", [label], [1, 0])))
    both: Any = decode(forged(MARKER + b"(K\x10NN}K\x00K\x01\x86tR.", [label], [1, 0]), (), ALLOW)
    assert vars(both) == {}


def test_a_range_divides_no_vast_ints() -> None:
    vast = long_int(1 << 100_000)
    assert "vast" in str(refused(forged(MARKER + b"(K\x02K\x00" + vast + b"K\x03tR.")))
    assert "vast" in str(refused(forged(MARKER + b"(K\x02K\x00K\x05" + vast + b"tR.")))
    with pytest.raises(EncodeError, match=r"\[0\]: a range of ints of more than 128 bits"):
        encode([range(1 << 200)], ALLOW)
    most = range(-(2**128) + 1, 2**128 - 1, 3)
    encoded = encode([most], ALLOW)
    assert decode(encoded.stream, (), ALLOW) == [most]


DEEP = 100_000


@pytest.mark.parametrize("key", [b"}", b"\x8f("])
def test_a_hash_that_would_overflow_the_stack(key: bytes) -> None:
    end = b"Ns." if key == b"}" else b"\x90."
    refused(forged(key + b")" + b"\x85" * DEEP + end))


@pytest.mark.parametrize(
    ("start", "step"),
    [(b")", b"\x85"), (b"]" * DEEP, b"a"), (b"}\x8c\x01a" * DEEP + b"N", b"s")],
    ids=["tuples", "lists", "dicts"],
)
def test_depth_does_not_crash(start: bytes, step: bytes) -> None:
    count = DEEP - (1 if step == b"a" else 0)
    value = decode(forged(start + step * count + b"."), (), ALLOW)
    assert type(value) in (tuple, list, dict)
    del value
    gc.collect()


@pytest.mark.parametrize(
    "cls", [kinds.Pair, kinds.Frozen, kinds.Slotted, kinds.Struct, kinds.BareStruct, kinds.FrozenStruct]
)
def test_depth_of_instances_does_not_crash(cls: type) -> None:
    record = ALLOW.by_class(cls)
    rest = b"N" * (len(record.names) - 1)
    opcodes = (MARKER + b"(K\x10") * 20_000 + b"N" + (rest + b"tR") * 20_000 + b"."
    stream = forged(opcodes, [record.label], [1, 0])
    if cls is kinds.FrozenStruct:
        assert "nested too deeply" in str(refused(stream))
        return
    value = decode(stream, (), ALLOW)
    assert type(value) is cls
    del value
    gc.collect()


def test_what_is_named_again_and_again_is_not_copied_again_and_again() -> None:
    text = b"X" + struct.pack("<I", 100_000) + b"a" * 100_000 + b"\x94"
    copies = b"".join([MARKER + b"K\x08h\x00\x86R"] * 5)
    refused(forged(b"(" + text + copies + b"t."))
    record = ALLOW.by_class(kinds.Frozen)
    items = b"".join(b"X\x04\x00\x00\x00" + f"{index:04}".encode() + b"N" for index in range(1000))
    extras = b"}\x94(" + items + b"u"
    many = b"".join([MARKER + b"(K\x10NNh\x00tR"] * 200)
    refused(forged(b"(" + extras + many + b"t.", [record.label], [1, 0]))


def test_a_container_that_holds_itself_is_a_value_and_no_crash() -> None:
    value: Any = decode(forged(b"]\x94h\x00a."), (), ALLOW)
    assert value[0] is value
    value.clear()


# Anything at all.


def values() -> list[tuple[Any, Any]]:
    """Objects, and the raw inputs they refer to, that together use every kind of entry, code and class."""
    base = torch.arange(400, dtype=torch.float32)
    raw: dict[str, Any] = {"a": torch.arange(100.0), "n": np.arange(50.0), "l": list(range(70)), "b": b"x" * 2000}
    item = kinds.Item(kinds.Kind.IMAGE, 5, 7, [(1, 2), (3, 4)], feature=base[100:200].view(10, 10))
    item.later = base[50:150]  # type: ignore[attr-defined]
    return [
        ([kinds.Request([item, item], mrope_positions=torch.ones(3, 2, dtype=torch.int64)), base[::7]], None),
        ([base[:1].expand(9), torch.empty(0, 3), base[5:9].view(torch.bfloat16), torch.tensor(True)], None),
        (
            {
                "x": np.arange(30.0).reshape(5, 6).T,
                "y": np.arange(9)[::-1],
                "z": np.array(["a", "bc"]),
                "e": np.empty(0),
            },
            None,
        ),
        (
            [list(range(90)), b"x" * 3000, bytearray(2000), "é" * 300, 10**30, -1, 2.5, {1, 2}, frozenset([(1, 2)])],
            None,
        ),
        ([1j, slice(1, None), range(5), torch.float16, torch.Size([1, 2]), torch.device("cpu"), np.float32(3)], None),
        ([np.str_("ab"), np.dtype("f4"), np.datetime64("2020"), kinds.Access(5), kinds.Level.LOW, kinds.Word.NO], None),
        ([{(1, 2): kinds.Pair(1, 2), kinds.Frozen(1, 2): kinds.Slotted(3, 4)}, kinds.Struct(feature=[1])], None),
        ([kinds.FrozenStruct(kinds.FrozenStruct(2)), kinds.Mixed(1, 2, 3), kinds.OpenPair(1, 2)], None),
        ([raw["a"], raw["a"][10:20], raw["a"][3:].view(torch.int32), raw["b"], raw["a"].numpy()[4:9]], raw),
        ([raw["n"], raw["n"][4:8], raw["l"], torch.from_numpy(raw["n"])[3:], {"again": raw["l"]}], raw),
    ]


VALUES = values()


def fuzzed(stream: bytes, pieces: list[torch.Tensor], raw: Any) -> None:
    """A value whose tensors lie inside the pieces and leaves, or one of the two errors."""
    leaves = None if raw is None else Leaves.walk(raw)
    try:
        value = decode(stream, pieces, ALLOW, leaves)
    except (LayoutError, NotAllowed):
        return
    regions = list(pieces)
    if raw is not None:
        regions += [raw["a"].view(torch.uint8), torch.from_numpy(raw["n"]).view(torch.uint8)]
        assert raw["l"] == list(range(70))
    for found in tensors_in(value):
        assert within(found, regions)
        low, high = span_of(found)
        if high > low and (found.numel() if isinstance(found, torch.Tensor) else found.size) < 10**6:
            _ = bits(found) if isinstance(found, torch.Tensor) else found.tobytes()


@given(st.binary(max_size=300))
@example(b"")
@example(b"sk\x01\x01" + bytes(8))
def test_any_bytes(data: bytes) -> None:
    fuzzed(data, [], None)


@given(st.binary(max_size=100), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.sampled_from([0, 1]))
def test_any_bytes_behind_a_good_header(data: bytes, numbers: list[int], pieces: int) -> None:
    piece = [piece_between()] * pieces
    names = ["torch.float32", "<f4", "torch.uint8"]
    fuzzed(forged(data + b"."), [], None)
    fuzzed(forged(b"K\x01Q.", names, [0, pieces, *[64] * pieces, *numbers]), piece, None)


SMALL = st.integers(-3, 80)


@given(st.lists(SMALL | st.sampled_from([2**31, 2**62, -(2**62), 2**63 - 1]), max_size=16), st.integers(1, 10))
def test_any_entry_over_a_piece(numbers: list[int], kind: int) -> None:
    piece = piece_between()
    names = ["torch.float32", "<f4", "torch.complex128", "<U3", "torch.uint8"]
    for entry in ([kind, *numbers], [kind, 0, 0, *numbers], [kind, 1, 0, *numbers]):
        fuzzed(forged(b"K\x01Q.", names, [0, 1, 64, *entry]), [piece], None)


SNIPPETS = [
    *(bytes([opcode]) for opcode in b"()]}.NRQaeusb\x85\x86\x87t\x94\x8f\x90\x91\x88\x93\x81\x82io"),
    MARKER,
    MARKER + b"K\x10",
    b"h\x00",
    b"h\x05",
    b"J\xff\xff\xff\xff",
    b"\x8c\x04name",
    b"cos\nsystem\n",
    b"K\x01Q",
]


def mutated(stream: bytes, chance: random.Random) -> bytes:
    """One damage: bytes, the end, the table, the pickle, or the names."""
    kind = chance.randrange(5)
    if kind == 0:
        data = bytearray(stream)
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data)
    if kind == 1:
        return stream[: chance.randrange(len(stream))]
    parts = split(stream)
    names, table, code = list(parts.names), list(parts.table), bytearray(parts.pickle)
    if kind == 2:
        at = chance.randrange(len(table))
        table[at] = chance.choice([0, 1, -1, table[at] + 1, table[at] - 1, 2 * table[at], 2**31, 2**62, -(2**62)])
    elif kind == 3 and len(code) > 2:
        at = chance.randrange(2, len(code))
        code[at : at + chance.randrange(3)] = chance.choice(SNIPPETS)
    elif names:
        names[chance.randrange(len(names))] = chance.choice(
            [*names, "os:system:" + "0" * 16, "<f8", "|O", "torch.int8"]
        )
    return join(names, [max(-(2**63), min(2**63 - 1, number)) for number in table], bytes(code))


@given(st.sampled_from(range(len(VALUES))), st.integers(0, 2**32), st.integers(1, 3))
def test_any_damage_to_a_valid_stream(index: int, seed: int, times: int) -> None:
    obj, raw = VALUES[index]
    encoded = encode(obj, ALLOW, None if raw is None else Leaves.walk(raw), raw is not None)
    pieces, chance = carry(encoded), random.Random(seed)
    for _ in range(20):
        stream = encoded.stream
        for _ in range(times):
            stream = mutated(stream, chance) or encoded.stream
            if len(stream) < HEADER.size:
                break
            try:
                split(stream)
            except LayoutError:
                break
        fuzzed(stream, pieces, raw)


@pytest.mark.parametrize("index", range(len(VALUES)))
def test_the_undamaged_streams_decode(index: int) -> None:
    obj, raw = VALUES[index]
    leaves = None if raw is None else Leaves.walk(raw)
    encoded = encode(obj, ALLOW, leaves, raw is not None)
    with nothing_runs():
        value = decode(encoded.stream, carry(encoded), ALLOW, leaves)
    assert type(value) is type(obj)
    assert len(list(tensors_in(value))) == len(list(tensors_in(obj)))
