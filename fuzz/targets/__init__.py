"""One small module for each group of parsers; `load` imports the one that is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fuzz._target import Target

MODULES: Final = {
    "segment": "segments",
    "attach": "segments",
    "block": "blocks",
    "message": "blocks",
    "ring": "rings",
    "slot": "rings",
    "writer": "writers",
    "address": "wire",
    "handle": "wire",
    "carrier": "wire",
    "header": "wire",
    "offer": "wire",
    "skeleton": "skeletons",
    "opcodes": "skeletons",
    "entries": "skeletons",
    "inline": "inline",
    "index": "inline",
    "reader": "readers",
}
"""Which module each target is in."""


def load(name: str) -> Target:
    """The target of this name; imports what it tests."""
    module = importlib.import_module(f"fuzz.targets.{MODULES[name]}")
    targets: tuple[Target, ...] = module.TARGETS
    return next(target for target in targets if target.name == name)
