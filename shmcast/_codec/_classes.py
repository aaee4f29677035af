"""The kinds of classes whose instances travel, and how each is taken apart and rebuilt.

An instance travels as the values of its fields, by position; attributes outside the fields follow in one dict of
extras, and after it the positions of fields that were never set. Rebuilding runs no `__init__`, `__new__`,
`__post_init__` or `__setstate__` of the class: a value goes back to the place it came from, `__dict__` or slot.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import operator
import sys
import types
from typing import TYPE_CHECKING, Any

from shmcast.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement, not in C
MAX_UNTRACKED_DEPTH = 1000

Values = tuple[Any, ...]


class Unfit(Exception):
    """A class, or one instance of it, that no kind covers; the text is the reason. Never leaves the codec."""


class ClassRecord:
    """One admitted class: its names in the order of travel, and the two ways across."""

    __slots__ = ("build", "cls", "digest", "kind", "label", "names", "take", "untracked")

    def __init__(self, cls: type, kind: str, names: tuple[str, ...]) -> None:
        self.cls = cls
        self.kind = kind
        self.names = names
        self.digest = hashlib.blake2b("\n".join((kind, *names)).encode(), digest_size=8).hexdigest()
        self.untracked = is_untracked(cls)
        self.label = ""  # what names it in a stream
        self.take: Callable[[Any], Values]
        self.build: Callable[[Values], Any]


def kind_of(cls: type) -> str | None:
    """`"enum"`, `"struct"`, `"namedtuple"`, `"dataclass"`, `"plain"`, or None for what can never travel."""
    if isinstance(cls, enum.EnumMeta):
        return "enum"
    if _is_struct(cls):
        return "struct"
    roots = [base for base in cls.__mro__ if not base.__flags__ & HEAP_TYPE]
    if roots == [tuple, object] and isinstance(getattr(cls, "_fields", None), tuple):
        return "namedtuple"
    if roots != [object]:
        return None
    return "dataclass" if dataclasses.is_dataclass(cls) else "plain"


def record_of(cls: type, kind: str) -> ClassRecord:
    """The record of a class of this kind; raises `Unfit`."""
    return _RECORDERS[kind](cls)


def _is_struct(cls: type) -> bool:
    # Never imports msgspec: a class of it exists only where the user has.
    msgspec = sys.modules.get("msgspec")
    return msgspec is not None and issubclass(cls, msgspec.Struct) and cls is not msgspec.Struct


def _enum_record(cls: type) -> ClassRecord:
    members: dict[str, enum.Enum] = dict(cls._member_map_)  # type: ignore[attr-defined]
    flag = issubclass(cls, enum.Flag)
    mask = 0
    for member in members.values() if flag else ():
        mask |= member.value

    def take(member: enum.Enum) -> Values:
        if members.get(member._name_) is member:
            return (member._name_,)
        if flag and 0 <= member._value_ <= mask and not member._value_ & ~mask:
            return (member._value_,)
        raise Unfit("an enum member outside its class")

    def build(values: Values) -> enum.Enum:
        (value,) = values
        if type(value) is str and value in members:
            return members[value]
        if flag and type(value) is int and value >= 0 and not value & ~mask:
            combined: enum.Enum = cls(value)
            return combined
        raise LayoutError(f"not a member of {cls.__qualname__}")

    # The names take part in the digest: two versions of an Enum may share a class name.
    record = ClassRecord(cls, "enum", tuple(members))
    record.take, record.build = take, build
    return record


def _namedtuple_record(cls: type) -> ClassRecord:
    names: tuple[str, ...] = tuple(cls._fields)  # type: ignore[attr-defined]
    has_dict = bool(cls.__dictoffset__)
    items = tuple.__getitem__

    def take(obj: Any) -> Values:
        values: Values = items(obj, slice(None))
        if len(values) != len(names):
            raise Unfit(f"a NamedTuple of {len(names)} fields that holds {len(values)} values")
        return (*values, dict(obj.__dict__)) if has_dict and obj.__dict__ else values

    def build(values: Values) -> Any:
        obj: Any = tuple.__new__(cls, values[: len(names)])
        if len(values) != len(names):
            extras, _ = split_tail(values, len(names))
            _add_extras(obj, extras)
        return obj

    record = ClassRecord(cls, "namedtuple", names)
    record.take, record.build = take, build
    return record


def split_tail(values: Values, count: int) -> tuple[dict[str, Any], frozenset[int]]:
    """The extras and the positions never set, which follow `count` field values; raises `LayoutError`."""
    if not count <= len(values) <= count + 2:
        raise LayoutError(f"{len(values)} values for {count} fields")
    extras = values[count] if len(values) > count else {}
    absent = values[count + 1] if len(values) > count + 1 else ()
    if type(extras) is not dict or not all(type(name) is str for name in extras):
        raise LayoutError("extras that are not a dict of names")
    # Their number first: a stream may name one long tuple again and again.
    if (
        type(absent) is not tuple
        or len(absent) > count
        or not all(type(index) is int and 0 <= index < count for index in absent)
    ):
        raise LayoutError("positions of absent fields that are not positions")
    return extras, frozenset(absent)


def _add_extras(obj: Any, extras: dict[str, Any]) -> None:
    if extras:
        try:
            held: dict[str, Any] = obj.__dict__
        except AttributeError:
            raise LayoutError(f"{type(obj).__qualname__} has no room for extras") from None
        held.update(extras)


def _slots(cls: type) -> dict[str, Any]:
    bases = reversed(cls.__mro__)
    named = (item for base in bases for item in vars(base).items())
    return {name: value for name, value in named if isinstance(value, types.MemberDescriptorType)}


class _Attributes:
    """A dataclass or a plain class: fields in `__dict__` or in slots, extras in `__dict__`."""

    def __init__(self, cls: type, kind: str) -> None:
        self.cls = cls
        self.slots = _slots(cls)
        fields = [field.name for field in dataclasses.fields(cls)] if kind == "dataclass" else []
        self.names = tuple(dict.fromkeys([*fields, *self.slots]))
        self.known = frozenset(self.names)
        self.has_dict = bool(cls.__dictoffset__)
        self.setters = [self.slots[name].__set__ for name in self.names if name in self.slots]
        self.in_dict = tuple(name for name in self.names if name not in self.slots)
        self.pick = operator.itemgetter(*self.names) if len(self.names) > 1 else None

    def take(self, obj: Any) -> Values:
        """All fields from `__dict__` and nothing else in it: one C call."""
        held = obj.__dict__
        if self.pick is not None and len(held) == len(self.names):
            try:
                values: Values = self.pick(held)
                return values
            except KeyError:
                pass
        return self.take_any(obj)

    def take_any(self, obj: Any) -> Values:
        """Fields wherever they are, extras, and the positions of the absent."""
        held: dict[str, Any] = obj.__dict__ if self.has_dict else {}
        values: list[Any] = []
        absent: list[int] = []
        for index, name in enumerate(self.names):
            try:
                slot = self.slots.get(name)
                values.append(held[name] if slot is None else slot.__get__(obj, self.cls))
            except (KeyError, AttributeError):
                values.append(None)
                absent.append(index)
        extras = {name: value for name, value in held.items() if name not in self.known}
        if absent:
            return (*values, extras, tuple(absent))
        return (*values, extras) if extras else tuple(values)

    def build(self, values: Values) -> Any:
        """Every field of a class without slots: one update of `__dict__`."""
        if len(values) != len(self.names):
            return self.build_any(values)
        obj: Any = object.__new__(self.cls)
        obj.__dict__.update(zip(self.names, values, strict=True))
        return obj

    def build_slots(self, values: Values) -> Any:
        """Every field of a class whose fields are all slots."""
        if len(values) != len(self.names):
            return self.build_any(values)
        obj: Any = object.__new__(self.cls)
        for setter, value in zip(self.setters, values, strict=True):
            setter(obj, value)
        return obj

    def build_any(self, values: Values) -> Any:
        """Fields wherever they belong, extras, some fields absent."""
        extras, absent = split_tail(values, len(self.names))
        obj: Any = object.__new__(self.cls)
        for index, name in enumerate(self.names):
            if index in absent:
                continue
            slot = self.slots.get(name)
            if slot is not None:
                slot.__set__(obj, values[index])
            else:
                obj.__dict__[name] = values[index]
        _add_extras(obj, extras)
        return obj


def _attributes_record(cls: type, kind: str) -> ClassRecord:
    plan = _Attributes(cls, kind)
    record = ClassRecord(cls, kind, plan.names)
    if not plan.slots:
        record.take, record.build = plan.take, plan.build
    else:
        record.take = plan.take_any
        record.build = plan.build_any if plan.in_dict else plan.build_slots
    return record


def _struct_record(cls: type) -> ClassRecord:
    names: tuple[str, ...] = cls.__struct_fields__  # type: ignore[attr-defined]
    has_dict = bool(cls.__dictoffset__)
    make = _struct_maker(cls)
    pick = operator.attrgetter(*names) if len(names) > 1 else None

    def take(obj: Any) -> Values:
        try:
            values: Values = pick(obj) if pick is not None else tuple(getattr(obj, name) for name in names)
        except AttributeError as error:
            raise Unfit(str(error)) from None
        return (*values, dict(obj.__dict__)) if has_dict and obj.__dict__ else values

    def build(values: Values) -> Any:
        if len(values) == len(names):
            return make(dict(zip(names, values, strict=True)))
        extras, absent = split_tail(values, len(names))
        if absent:
            raise LayoutError(f"{cls.__qualname__} with fields that are not set")
        obj = make(dict(zip(names, values, strict=False)))
        _add_extras(obj, extras)
        return obj

    record = ClassRecord(cls, "struct", names)
    record.take, record.build = take, build
    return record


def _struct_maker(cls: type) -> Callable[[dict[str, Any]], Any]:
    """Make a Struct by keyword, without `__post_init__`: through a subclass that has an empty one, cast back.

    A user's `__init_subclass__` would run for that subclass; such a Struct is made the plain way, `__post_init__` runs.
    """
    quiet = getattr(cls, "__post_init__", None) is not None and not hasattr(cls.__init_subclass__, "__func__")
    if not quiet:
        return lambda fields: cls(**fields)
    namespace = {"__post_init__": lambda self: None, "__module__": cls.__module__}
    shadow: Any = type(cls)(cls.__name__, (cls,), namespace, frozen=False)
    set_class = vars(object)["__class__"].__set__  # past a `__setattr__` of the class, which may take any name

    def make(fields: dict[str, Any]) -> Any:
        obj = shadow(**fields)
        set_class(obj, cls)
        return obj

    return make


_RECORDERS: dict[str, Callable[[type], ClassRecord]] = {
    "enum": _enum_record,
    "struct": _struct_record,
    "namedtuple": _namedtuple_record,
    "dataclass": lambda cls: _attributes_record(cls, "dataclass"),
    "plain": lambda cls: _attributes_record(cls, "plain"),
}


def is_untracked(cls: type) -> bool:
    """A Struct of `gc=False`: its deallocation recurses in C, so that a decoder must bound the nesting."""
    config = getattr(cls, "__struct_config__", None)
    return config is not None and not getattr(config, "gc", True)
