"""Where in an object a refused part sits. Only ever runs when an error is being raised."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

WHOLE = "the object itself"
SOMEWHERE = "somewhere inside"
MAX_DEPTH = 3000
ATOMS = frozenset((type(None), bool, int, float, str, bytes))

Step = tuple[str, Any]


def path_to(root: object, target: object) -> str:
    """The path of the first place that holds `target`, such as `mm_items[2].feature` or `["a"][3]`."""
    try:
        return _path_to(root, target)
    except Exception:  # a property or a key's repr, none of ours, must not hide the refusal
        return SOMEWHERE


def _path_to(root: object, target: object) -> str:
    seen: set[int] = set()
    pending: list[tuple[str, Iterator[Step]]] = [("", iter((("", root),)))]
    while pending:
        prefix, steps = pending[-1]
        for step, value in steps:
            path = prefix + step
            if value is target:
                return path.lstrip(".") or WHOLE
            if id(value) not in seen:
                seen.add(id(value))
                pending.append((path, _steps(value)))
                break
        else:
            pending.pop()
    return WHOLE


def cycle_in(root: object) -> str | None:
    """The path of a container that holds itself, or None; does not look deeper than `MAX_DEPTH`."""
    try:
        return _cycle_in(root)
    except Exception:  # as above
        return None


def _cycle_in(root: object) -> str | None:
    done: set[int] = set()
    above: set[int] = set()
    pending: list[tuple[str, Any, Iterator[Step]]] = [("", None, iter((("", root),)))]
    while pending:
        prefix, holder, steps = pending[-1]
        for step, value in steps:
            if type(value) in ATOMS:
                continue
            if id(value) in above:
                return (prefix + step).lstrip(".") or WHOLE
            if _holds(value) and id(value) not in done and len(pending) < MAX_DEPTH:
                above.add(id(value))
                pending.append((prefix + step, value, _steps(value)))
                break
        else:
            pending.pop()
            above.discard(id(holder))
            done.add(id(holder))
    return None


def _holds(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple, set, frozenset)) or hasattr(value, "__dict__"):
        return True
    return bool(_field_names(value))


def _field_names(value: Any) -> list[str]:
    if isinstance(value, type):
        return []
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    msgspec = sys.modules.get("msgspec")
    if msgspec is not None and isinstance(value, msgspec.Struct):
        return list(value.__struct_fields__)
    return []


def _steps(value: Any) -> Iterator[Step]:
    if isinstance(value, dict):
        for index, (key, item) in enumerate(list(value.items())):
            yield f".keys()[{index}]", key
            yield f"[{_shown(key)}]", item
    elif isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", None)
        if isinstance(names, tuple):
            yield from ((f".{name}", item) for name, item in zip(names, value, strict=False))
            return
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from (("{...}", item) for item in value)
    elif not isinstance(value, type):
        names = _field_names(value)
        held: dict[str, Any] = getattr(value, "__dict__", None) or {}
        for name in names:
            if name in held or hasattr(type(value), name):
                yield f".{name}", held[name] if name in held else getattr(value, name, None)
        yield from ((f".{name}", item) for name, item in list(held.items()) if name not in names)


def _shown(key: object) -> str:
    if type(key) is str:
        return '"' + key[:64].replace('"', '\\"') + '"'
    return repr(key)[:64] if isinstance(key, (int, float, bytes, tuple, type(None))) else type(key).__name__
