"""CUDA calls of our own: segments registered with the driver, and when no thread of ours may call it any more.

A thread of its own is on device 0 until it says otherwise, where its first call would make a context that takes
hundreds of MiB: every call is made on the device that was meant. At exit the calls end before the interpreter does: a
daemon thread that comes back from CUDA to an interpreter that is gone aborts the process.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for the contexts of all devices

log = logging.getLogger("shmcast")

_calling = threading.Lock()
_ended = False


@contextmanager
def calls(device: int) -> Iterator[bool]:
    """For CUDA calls on this device; gives False where none may be made: at exit, and in a forked child."""
    with _calling:
        if _ended:
            yield False
            return
        with torch.cuda.device(device):
            yield True


class Pins:
    """The mappings of one reader that are registered with CUDA, so that copies from them need no staging.

    A mapping is registered in one piece: a copy that crosses from one registration into another fails with "invalid
    argument", and a tensor may lie anywhere in a segment. Where the driver refuses, there is one warning in this
    process, and that mapping stays as it is.
    """

    def __init__(self) -> None:
        self._addresses: list[int] = []
        self._device = -1
        self._cudart: Any = None
        try:
            self._device = torch.cuda.current_device()
            self._cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
        except Exception as error:  # no CUDA in this torch, no driver, no device, a forked child
            _warn(f"pin=True: CUDA cannot be used here: {error}; tensors are not pinned")

    def add(self, address: int, size: int) -> None:
        """Register `size` bytes of memory at `address`, both whole pages. Never raises for what CUDA does."""
        if self._cudart is None:
            return
        # Before the call: an exception between call and note would leave it registered when it is unmapped, and
        # copies from what is mapped there next would read the pages of before.
        self._addresses.append(address)
        refused = self._call(self._cudart.cudaHostRegister, address, size, PORTABLE)
        if refused:
            self._addresses.remove(address)
            _warn(f"pin=True: cudaHostRegister of {size} bytes: {refused}; what lies there is not pinned")

    def close(self) -> None:
        """Undo it all: before the mappings go."""
        while self._addresses:
            refused = self._call(self._cudart.cudaHostUnregister, self._addresses.pop())
            if refused:
                _warn(f"pin=True: cudaHostUnregister: {refused}")

    def _call(self, function: Any, *args: int) -> str:
        """Why CUDA refused, or nothing; nothing, too, where the process ends and no call was made."""
        try:
            with calls(self._device) as allowed:
                code = function(*args) if allowed else 0
                if not int(code):
                    return ""
                _forget_error(self._device)
                return f"{self._cudart.cudaGetErrorString(code)} ({int(code)})"
        except Exception as error:
            return str(error)


def _forget_error(device: int) -> None:
    """Take the error of a failed call from this thread; else the next kernel that it launches is blamed for it.

    `cudart()` has no cudaGetLastError; torch asks for it, and so resets it, after a launch.
    """
    with suppress(RuntimeError):
        torch.ones(1, device=f"cuda:{device}")


@functools.cache
def _warn(text: str) -> None:
    """Each text once in a process: a group has a reader for each rank that writes."""
    log.warning("%s", text)


def _end() -> None:
    """Wait for the call that a thread is in, and let no other begin."""
    global _ended
    with _calling:
        _ended = True


def _forget() -> None:
    """In a forked child, where CUDA does not work; the lock may be held by a thread that is not here."""
    global _calling, _ended
    _calling, _ended = threading.Lock(), True


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)
