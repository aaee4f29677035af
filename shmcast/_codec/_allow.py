"""What may be taken apart and rebuilt: classes by name, packages by prefix, nothing else.

A class travels as a module and a name without dots. It is resolved here, never by an unpickler: a listed class by
looking the pair up; a package's by importing the module and looking into its `__dict__`, where what is found must be a
class that says of itself `__module__` and `__qualname__` as asked.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from shmcast.errors import NotAllowed

from ._classes import ClassRecord, Unfit, kind_of, record_of

if TYPE_CHECKING:
    from collections.abc import Iterable

OWN_PACKAGES = ("shmcast.multimodal",)


class Allow:
    """The allow-list of one end.

    `items`: classes (an Enum, dataclass, NamedTuple, `msgspec.Struct`, or a plain class, which is rebuilt from its
    `__dict__`), and names of packages, whose Enums, dataclasses, NamedTuples and Structs are all admitted: `"sglang"`
    admits `sglang` and `sglang.x`, not `sglangx`. shmcast's own types are always in. Raises `TypeError` for anything
    else. Safe to share between threads.
    """

    __slots__ = ("_by_class", "_by_name", "_listed", "_packages")

    def __init__(self, items: Iterable[type | str] = ()) -> None:
        if isinstance(items, (str, type)):
            raise TypeError(f"allow is a sequence of classes and package names: allow=({items!r},)")
        self._listed: dict[tuple[str, str], type] = {}
        packages: list[str] = list(OWN_PACKAGES)
        for item in items:
            if isinstance(item, type):
                self._list(item)
            elif isinstance(item, str) and _is_module_name(item):
                packages.append(item)
            else:
                raise TypeError(f"allow holds classes and package names, not {item!r}")
        self._packages = tuple(packages)
        self._by_class: dict[type, ClassRecord] = {}
        self._by_name: dict[tuple[str, str], ClassRecord] = {}

    def __repr__(self) -> str:
        listed = [f"{module}.{name}" for module, name in self._listed]
        return f"Allow({[*listed, *self._packages]!r})"

    def by_class(self, cls: type) -> ClassRecord:
        """The record of a class met while encoding; raises `NotAllowed`, or `Unfit` where no kind covers it."""
        record = self._by_class.get(cls)
        if record is None:
            record = self.by_name(_home(cls), cls.__qualname__)
            if record.cls is not cls:
                raise Unfit(f"{cls.__module__}.{cls.__qualname__} is not the class that its module has by this name")
            self._by_class[cls] = record
        return record

    def by_name(self, module: str, name: str) -> ClassRecord:
        """The record of a class named by a stream; raises `NotAllowed`."""
        record = self._by_name.get((module, name))
        if record is None:
            record = self._resolve(module, name)
            self._by_name[(module, name)] = record
        return record

    def _list(self, cls: type) -> None:
        key = (_home(cls), cls.__qualname__)
        if "." in key[1]:
            raise TypeError(f"{key[0]}.{key[1]} is nested: only classes at the top of a module can be allowed")
        if self._listed.setdefault(key, cls) is not cls:
            raise TypeError(f"two classes in allow are called {key[0]}.{key[1]}")
        if kind_of(cls) is None:
            raise TypeError(f"{key[0]}.{key[1]} has a base made in C: it cannot be rebuilt")

    def _resolve(self, module: str, name: str) -> ClassRecord:
        cls = self._listed.get((module, name))
        listed = cls is not None
        if cls is None:
            cls = self._from_package(module, name)
        kind = kind_of(cls)
        if kind is None or (kind == "plain" and not listed):
            raise NotAllowed(
                f"{module}.{name} is not an Enum, dataclass, NamedTuple or msgspec.Struct: "
                f"a package does not admit it, name the class itself (allow=[{name}, ...])"
            )
        try:
            record = record_of(cls, kind)
        except Unfit as error:
            raise NotAllowed(f"{module}.{name}: {error}") from None
        record.label = f"{module}:{name}:{record.digest}"
        return record

    def _from_package(self, module: str, name: str) -> type:
        if not name.isidentifier() or not _is_module_name(module) or not self._admits(module):
            raise NotAllowed(
                f"{module}.{name} is not in the allow-list: add the class (allow=[{name.rpartition('.')[2]}, ...]) "
                f"or its package (allow=[{module.partition('.')[0]!r}, ...])"
            )
        try:
            found = vars(importlib.import_module(module)).get(name)
        except (Exception, SystemExit) as error:  # a module's top level may raise anything
            raise NotAllowed(f"{module}.{name}: the module cannot be imported: {error!r}") from error
        if not isinstance(found, type):
            raise NotAllowed(f"{module} has no class {name}")
        if found.__module__ != module or found.__qualname__ != name:
            raise NotAllowed(f"{module}.{name} is really {found.__module__}.{found.__qualname__}")
        return found

    def _admits(self, module: str) -> bool:
        # `__main__` of a package is a program: importing it would run it.
        if "__main__" in module.split(".") and module not in sys.modules:
            return False
        return any(module == package or module.startswith(package + ".") for package in self._packages)


def _is_module_name(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _home(cls: type) -> str:
    # A spawned process knows its parent's `__main__` as `__mp_main__`.
    module = cls.__module__
    return "__main__" if module == "__mp_main__" else module
