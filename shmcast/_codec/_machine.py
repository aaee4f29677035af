"""A pickle machine that can only build plain data: no opcode of it looks up a name, sets state or calls anything.

It knows the opcodes that `_encode` produces and no others. `REDUCE` applies the one marker, which stands for
the codec's own rebuild function. Everything is bounded by the length of the code: nothing here recurses, a dict key or
set member, whose hash recurses in C, is weighed before it is hashed, and keys that have one hash are paid for: each is
compared with all of them.
"""

from __future__ import annotations

import gc
import pickle
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

from shmcast.errors import LayoutError

MAX_KEY_DEPTH = 1000
KEY_BUDGET = 1 << 18
KEY_BUDGET_BYTE = 16  # for each byte of the code
LONG_KEY = 4096
FEW_STEPS = 16

_PROTO = b"\x80\x05"
_U2, _I4, _U4, _U8, _F8 = (struct.Struct(code) for code in ("<H", "<i", "<I", "<Q", ">d"))
_SIMPLE = frozenset((str, int, float, bool, bytes, complex, type(None)))
_CHEAP = frozenset((float, bool, type(None)))  # a hash of these is shared by a few dozen at most
_LONG = frozenset((int, str, bytes))
_HASH_MODULUS = sys.hash_info.modulus
_HAVE_GC = 1 << 14  # Py_TPFLAGS_HAVE_GC: what `gc` can look into


class Machine:
    """One run over one pickle.

    `entries`: what a persistent id gives, the marker first. `rebuild`: called with what the marker is applied to.
    """

    __slots__ = (
        "_budget",
        "_code",
        "_entries",
        "_hashes",
        "_marks",
        "_memo",
        "_rebuild",
        "_sealed",
        "_stack",
        "_weights",
    )

    def __init__(self, code: bytes, entries: Sequence[object], rebuild: Callable[[tuple[Any, ...]], object]) -> None:
        self._code = code
        self._entries = entries
        self._rebuild = rebuild
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        # Lists that came from outside, perhaps the reader's own raw inputs: nothing may be appended to them.
        self._sealed = {id(entry) for entry in entries if type(entry) is list}
        self._budget = KEY_BUDGET + KEY_BUDGET_BYTE * len(code)
        # For each container with other than cheap keys: itself, and how many of them have each hash.
        self._hashes: dict[int, tuple[object, dict[int, int]]] = {}
        # Parts of keys that were weighed: each, kept alive, and its weight.
        self._weights: dict[int, tuple[object, int]] = {}

    def run(self) -> object:
        """The one value that the code leaves; raises `LayoutError`, or what a damaged code leads to (see `decode`)."""
        code, stack, memo = self._code, self._stack, self._memo
        if code[:2] != _PROTO:
            raise LayoutError("not pickle protocol 5")
        at = 2
        while True:
            opcode = code[at]
            at += 1
            if opcode == MEMOIZE:
                memo.append(stack[-1])
            elif opcode == BININT1:
                stack.append(code[at])
                at += 1
            elif opcode == BINGET:
                stack.append(memo[code[at]])
                at += 1
            elif opcode == NONE:
                stack.append(None)
            elif opcode == STOP:
                break
            else:
                at = _HANDLERS[opcode](self, at)
        if at != len(code) or len(stack) != 1 or self._marks:
            raise LayoutError(f"the pickle ends at byte {at} of {len(code)}")
        return stack[0]

    # Reading the code.

    def _bytes(self, at: int, length: int) -> bytes:
        found = self._code[at : at + length]
        if len(found) != length:
            raise LayoutError(f"{length} bytes at {at} of {len(self._code)}")
        return found

    def _sized(self, at: int, size: struct.Struct) -> tuple[bytes, int]:
        (length,) = size.unpack_from(self._code, at)
        at += size.size
        return self._bytes(at, length), at + length

    def _frame(self, at: int) -> int:
        (length,) = _U8.unpack_from(self._code, at)
        if length > len(self._code) - at - 8:
            raise LayoutError(f"a frame of {length} bytes at {at} of {len(self._code)}")
        return at + 8

    # Plain values.

    def _true(self, at: int) -> int:
        self._stack.append(True)
        return at

    def _false(self, at: int) -> int:
        self._stack.append(False)
        return at

    def _int2(self, at: int) -> int:
        self._stack.append(_U2.unpack_from(self._code, at)[0])
        return at + 2

    def _int4(self, at: int) -> int:
        self._stack.append(_I4.unpack_from(self._code, at)[0])
        return at + 4

    def _long1(self, at: int) -> int:
        length = self._code[at]
        self._stack.append(int.from_bytes(self._bytes(at + 1, length), "little", signed=True))
        return at + 1 + length

    def _long4(self, at: int) -> int:
        digits, at = self._sized(at, _U4)
        self._stack.append(int.from_bytes(digits, "little", signed=True))
        return at

    def _float(self, at: int) -> int:
        self._stack.append(_F8.unpack_from(self._code, at)[0])
        return at + 8

    def _text1(self, at: int) -> int:
        length = self._code[at]
        self._stack.append(self._bytes(at + 1, length).decode("utf-8", "surrogatepass"))
        return at + 1 + length

    def _text4(self, at: int) -> int:
        text, at = self._sized(at, _U4)
        self._stack.append(text.decode("utf-8", "surrogatepass"))
        return at

    def _text8(self, at: int) -> int:
        text, at = self._sized(at, _U8)
        self._stack.append(text.decode("utf-8", "surrogatepass"))
        return at

    def _bytes1(self, at: int) -> int:
        length = self._code[at]
        self._stack.append(self._bytes(at + 1, length))
        return at + 1 + length

    def _bytes4(self, at: int) -> int:
        data, at = self._sized(at, _U4)
        self._stack.append(data)
        return at

    def _bytearray(self, at: int) -> int:
        data, at = self._sized(at, _U8)
        self._stack.append(bytearray(data))
        return at

    # Containers.

    def _mark(self, at: int) -> int:
        self._marks.append(len(self._stack))
        return at

    def _popped(self) -> list[Any]:
        start = self._marks.pop()
        found = self._stack[start:]
        del self._stack[start:]
        return found

    def _empty_list(self, at: int) -> int:
        self._stack.append([])
        return at

    def _empty_dict(self, at: int) -> int:
        self._stack.append({})
        return at

    def _empty_set(self, at: int) -> int:
        self._stack.append(set())
        return at

    def _empty_tuple(self, at: int) -> int:
        self._stack.append(())
        return at

    def _open_list(self) -> list[Any]:
        target = self._stack[-1]
        if type(target) is not list or id(target) in self._sealed:
            raise LayoutError("append to what is not a list of the pickle")
        return target

    def _append(self, at: int) -> int:
        item = self._stack.pop()
        self._open_list().append(item)
        return at

    def _appends(self, at: int) -> int:
        items = self._popped()
        self._open_list().extend(items)
        return at

    def _setitem(self, at: int) -> int:
        item = self._stack.pop()
        key = self._stack.pop()
        self._set_items([key], [item])
        return at

    def _setitems(self, at: int) -> int:
        items = self._popped()
        if len(items) % 2:
            raise LayoutError("a key without a value")
        self._set_items(items[::2], items[1::2])
        return at

    def _set_items(self, keys: list[Any], values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise LayoutError("items for what is not a dict")
        self._weigh(target, keys)
        target.update(zip(keys, values, strict=True))

    def _additems(self, at: int) -> int:
        items = self._popped()
        target = self._stack[-1]
        if type(target) is not set:
            raise LayoutError("members for what is not a set")
        self._weigh(target, items)
        target.update(items)
        return at

    def _frozenset(self, at: int) -> int:
        items = self._popped()
        self._weigh(items, items)
        self._stack.append(frozenset(items))
        return at

    def _tuple1(self, at: int) -> int:
        self._stack[-1:] = [(self._stack[-1],)]
        return at

    def _tuple2(self, at: int) -> int:
        second = self._stack.pop()
        self._stack[-1] = (self._stack[-1], second)
        return at

    def _tuple3(self, at: int) -> int:
        third = self._stack.pop()
        second = self._stack.pop()
        self._stack[-1] = (self._stack[-1], second, third)
        return at

    def _tuple(self, at: int) -> int:
        self._stack.append(tuple(self._popped()))
        return at

    # What was met before, and what lies out of band.

    def _get4(self, at: int) -> int:
        self._stack.append(self._memo[_U4.unpack_from(self._code, at)[0]])
        return at + 4

    def _persistent(self, at: int) -> int:
        index = self._stack.pop()
        if type(index) is not int or index < 0:
            raise LayoutError("a persistent id that is no index")
        self._stack.append(self._entries[index])
        return at

    def _reduce(self, at: int) -> int:
        parts = self._stack.pop()
        if type(parts) is not tuple or self._stack.pop() is not self._entries[0]:
            raise LayoutError("REDUCE of something else than the marker")
        self._stack.append(self._rebuild(parts))
        return at

    def _refuse(self, at: int) -> int:
        raise LayoutError(f"opcode {self._code[at - 1]:#04x} at byte {at - 1} is none that a skeleton has")

    # Keys and members.

    def _weigh(self, target: object, keys: list[Any]) -> None:
        """Refuse keys of `target` whose hash would walk too far, and too many of them that have one hash."""
        for key in keys:
            if _is_cheap(key):
                continue
            weight = self._weight(key)
            _, met = self._hashes.setdefault(id(target), (target, {}))
            found = hash(key)
            before = met.get(found, 0)
            met[found] = before + 1
            self._charge(before * weight)

    def _weight(self, key: object) -> int:
        """How many parts a hash of `key` walks: a tuple of tuples shares parts, its hash walks each anew."""
        steps = 0
        pending: list[tuple[Iterator[Any], object, int]] = [(iter((key,)), key, 0)]
        while pending:
            parts, whole, start = pending[-1]
            for part in parts:
                kind = type(part)
                steps += 1
                if kind in _SIMPLE:
                    if kind in _LONG:
                        steps += _extent(part)
                elif id(part) in self._weights:
                    steps += self._weights[id(part)][1]
                elif not isinstance(part, type):
                    if steps > self._budget or len(pending) > MAX_KEY_DEPTH:
                        raise LayoutError("a key nested too deeply")
                    pending.append((_parts(part), part, steps))
                    break
            else:
                pending.pop()
                # The hash walks it each time; weighing it need not.
                if pending and steps - start > FEW_STEPS:
                    self._weights[id(whole)] = whole, steps - start
        self._charge(steps)
        return steps

    def _charge(self, steps: int) -> None:
        self._budget -= steps
        if self._budget < 0:
            raise LayoutError("keys nested too deeply, or too many with one hash")


def _is_cheap(key: Any) -> bool:
    """Whether nothing can be made of many such keys: they have hashes of their own, and are compared at once."""
    kind = type(key)
    if kind is str or kind is bytes:
        return len(key) <= LONG_KEY
    if kind is int:
        return bool(-_HASH_MODULUS < key < _HASH_MODULUS)
    return kind in _CHEAP


def _extent(part: Any) -> int:
    """The hash of a large int walks its digits; long text is walked where it meets text that is equal, not the same."""
    return int(part.bit_length() if type(part) is int else len(part)) >> 6


def _parts(whole: Any) -> Iterator[Any]:
    """What a hash of `whole` may walk. Containers are not copied: the same one may be met at each of many levels."""
    kind = type(whole)
    if kind in (tuple, frozenset, list, set):
        return iter(whole)
    if kind is dict:
        return chain(whole, whole.values())
    if kind.__flags__ & _HAVE_GC:
        return iter(gc.get_referents(whole))
    # A Struct of gc=False keeps its fields from `gc`.
    names: tuple[str, ...] = getattr(kind, "__struct_fields__", ())
    return (object.__getattribute__(whole, name) for name in names)


def _opcodes(table: dict[bytes, Handler]) -> list[Handler]:
    handlers: list[Handler] = [Machine._refuse] * 256
    for opcode, handler in table.items():
        handlers[opcode[0]] = handler
    return handlers


Handler = Callable[[Machine, int], int]

MEMOIZE, BININT1, BINGET, NONE, STOP = (
    opcode[0] for opcode in (pickle.MEMOIZE, pickle.BININT1, pickle.BINGET, pickle.NONE, pickle.STOP)
)

_HANDLERS = _opcodes(
    {
        pickle.FRAME: Machine._frame,
        pickle.NEWTRUE: Machine._true,
        pickle.NEWFALSE: Machine._false,
        pickle.BININT2: Machine._int2,
        pickle.BININT: Machine._int4,
        pickle.LONG1: Machine._long1,
        pickle.LONG4: Machine._long4,
        pickle.BINFLOAT: Machine._float,
        pickle.SHORT_BINUNICODE: Machine._text1,
        pickle.BINUNICODE: Machine._text4,
        pickle.BINUNICODE8: Machine._text8,
        pickle.SHORT_BINBYTES: Machine._bytes1,
        pickle.BINBYTES: Machine._bytes4,
        pickle.BYTEARRAY8: Machine._bytearray,
        pickle.MARK: Machine._mark,
        pickle.EMPTY_LIST: Machine._empty_list,
        pickle.EMPTY_DICT: Machine._empty_dict,
        pickle.EMPTY_SET: Machine._empty_set,
        pickle.EMPTY_TUPLE: Machine._empty_tuple,
        pickle.APPEND: Machine._append,
        pickle.APPENDS: Machine._appends,
        pickle.SETITEM: Machine._setitem,
        pickle.SETITEMS: Machine._setitems,
        pickle.ADDITEMS: Machine._additems,
        pickle.FROZENSET: Machine._frozenset,
        pickle.TUPLE1: Machine._tuple1,
        pickle.TUPLE2: Machine._tuple2,
        pickle.TUPLE3: Machine._tuple3,
        pickle.TUPLE: Machine._tuple,
        pickle.LONG_BINGET: Machine._get4,
        pickle.BINPERSID: Machine._persistent,
        pickle.REDUCE: Machine._reduce,
    }
)
