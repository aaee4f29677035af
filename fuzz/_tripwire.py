"""Tells when code runs that no parser may run: programs, files written, modules loaded, names looked up by a pickle.

One audit hook for the life of the process; it notes what the thread that is watched does while it is watched.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any, Final

NEVER_HERE: Final = frozenset(
    (
        "code.__new__",
        "compile",
        "ctypes.dlopen",
        "exec",
        "marshal.loads",
        "os.chmod",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.posix_spawn",
        "os.remove",
        "os.rename",
        "os.system",
        "os.truncate",
        "pickle.find_class",
        "socket.connect",
        "subprocess.Popen",
    )
)
WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ADMITTED: Final = ("shmcast.multimodal",)
"""Packages that every allow-list admits: a stream may name modules inside them, and so have them imported."""

_watched: int | None = None
_seen: list[str] = []
_hooked = False


def install() -> None:
    """Add the hook, once."""
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(_audit)


def watch() -> None:
    """From now on note what this thread does."""
    global _watched
    _watched = threading.get_ident()


def seen() -> list[str]:
    """Watch no more; what was noted since `watch`."""
    global _watched
    _watched = None
    if not _seen:
        return []
    found = _seen.copy()
    _seen.clear()
    return found


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched is None or _watched != threading.get_ident():
        return
    if event in NEVER_HERE or (event == "open" and _writes(args)) or (event == "import" and _loads(args)):
        _seen.append(f"{event}{args[:2]!r}")


def _writes(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    if mode is not None and any(letter in mode for letter in "wax+"):
        return True
    return mode is None and bool(flags & WRITES)


def _loads(args: tuple[Any, ...]) -> bool:
    name = args[0]
    return name not in sys.modules and not any(name == home or name.startswith(home + ".") for home in ADMITTED)
