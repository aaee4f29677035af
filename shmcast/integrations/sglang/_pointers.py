"""The tokenizer's segments, one a tensor, read into an arena by a worker: nothing of them is mapped or freed elsewhere.

SGLang attaches them while it unpickles a request, on the scheduler's thread; up to 0.5.9 it copies them there. Here a
`Pointer` stands in for `ShmPointerMMData` until a worker reads it, or until the request goes on as it came.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
from contextlib import suppress
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any

import torch

from shmcast._room import SHM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcast.integrations.sglang._release import Release
    from shmcast.transport import Writer

MODULE = "sglang.srt.managers.mm_utils"
NAME = "ShmPointerMMData"
FIELDS = ("feature", "precomputed_embeddings")
"""Where the tokenizer puts pointers: in the place of a tensor, or of each in a list."""


class Pointer:
    """What a `ShmPointerMMData` was pickled as: `state` names its segment, a contiguous tensor's shape and dtype."""

    __slots__ = ("state",)

    state: dict[str, Any]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state

    @property
    def nbytes(self) -> int:
        return int(self.state["shape"].numel() * self.state["dtype"].itemsize)

    def read(self, writer: Writer) -> torch.Tensor:
        """The tensor, in the writer's memory. The segment has no name after; that is the receiver's to do.

        Raises:
            ArenaFull: there is no room for it. The segment stays.
            OSError: there is no such segment, or it is too short.
        """
        tensor = writer.empty(self.state["shape"], self.state["dtype"])
        array: Any = tensor.view(-1).view(torch.uint8).numpy()
        memory = memoryview(array)
        fd = os.open(f"{SHM}/{self.state['shm_name'].lstrip('/')}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            at = 0
            while at < len(memory):
                count = os.preadv(fd, [memory[at:]], at)
                if not count:
                    raise OSError(f"segment {self.state['shm_name']} ends after {at} of {len(memory)} bytes")
                at += count
        finally:
            os.close(fd)
        self.discard()
        return tensor

    def discard(self) -> None:
        """Take the segment's name away, by the class that made it: its tracker is to know."""
        with suppress(FileNotFoundError):
            segment = SharedMemory(self.state["shm_name"])
            with suppress(FileNotFoundError):
                segment.unlink()
            segment.close()

    def restore(self) -> Any:
        """What SGLang would have unpickled."""
        cls = getattr(importlib.import_module(MODULE), NAME)
        real = cls.__new__(cls)
        real.__setstate__(self.state)
        return real


def receive_with(socket: Any) -> Callable[[int], Any]:
    """How to read one request from a socket, with flags of zmq: pickled ones with `Pointer`s in them."""
    io_struct = importlib.import_module("sglang.srt.managers.io_struct")
    stock = getattr(io_struct, "sock_recv", None)
    if not getattr(io_struct, "_USE_PICKLE_IPC", True) or not hasattr(socket, "getsockopt"):
        return socket.recv_pyobj if stock is None else partial(stock, socket)
    return lambda flags: _Unpickler(io.BytesIO(socket.recv(flags))).load()


def pointers(release: Release, raw: Any) -> list[Pointer]:
    """All in raw inputs; in what is none of SGLang's there are none."""
    with suppress(AttributeError, KeyError, TypeError):
        return [value for item in release.items(raw) for name in FIELDS for value in _found(getattr(item, name))]
    return []


def fetch(release: Release, raw: Any, writer: Writer) -> Any:
    """The same raw inputs, with all that is pointed to in the writer's memory; raises as `Pointer.read`."""
    return _replace(release, raw, lambda pointer: pointer.read(writer))


def restore(release: Release, raw: Any) -> None:
    """Put SGLang's own pointers into raw inputs that go on as they came."""
    _replace(release, raw, Pointer.restore)


class _Unpickler(pickle.Unpickler):
    """As `pickle.loads`, which SGLang uses, with one class for another."""

    def find_class(self, module: str, name: str) -> Any:
        return Pointer if (module, name) == (MODULE, NAME) else super().find_class(module, name)


def _found(value: Any) -> Iterator[Pointer]:
    if isinstance(value, Pointer):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _found(each)


def _replace(release: Release, raw: Any, new: Callable[[Pointer], Any]) -> Any:
    for item in release.items(raw) if pointers(release, raw) else ():
        for name in FIELDS:
            value = getattr(item, name)
            if any(_found(value)):
                setattr(item, name, _replaced(value, new))
    return raw


def _replaced(value: Any, new: Callable[[Pointer], Any]) -> Any:
    if isinstance(value, Pointer):
        return new(value)
    return type(value)([_replaced(each, new) for each in value]) if isinstance(value, (list, tuple)) else value
