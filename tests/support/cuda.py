"""A device, for machines without one: what the library asks of CUDA, in the memory of this process.

Copies that do not block wait in a queue until `finish`, and read the addresses that they were given only then, whoever
has written there since: as those of a busy stream do.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shmcast import _copies, _cuda
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEVICE = "cuda:0"


@contextmanager
def installed() -> Iterator[FakeCuda]:
    """The device where torch has the real one; in the end nobody may use it any more."""
    cuda = FakeCuda()
    with pytest.MonkeyPatch.context() as patch:
        cuda.install(patch.setattr)
        patch.setattr(_copies, "IDLE_SECONDS", 0.01)
        _cuda._warn.cache_clear()  # a warning comes once in a process
        yield cuda
        gc.collect()
        cuda.finish()
        until(lambda: not copying_threads() and not cuda.registered, "all copies and registrations have ended")
    _cuda._warn.cache_clear()


def copying_threads() -> list[threading.Thread]:
    """The library's threads that ask whether copies are done."""
    return [thread for thread in threading.enumerate() if thread.name == "shmcast-copies"]


class Event:
    """Recorded behind the copies that were queued by then."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.behind = 0

    def record(self) -> None:
        self.behind = self.cuda.queued

    def query(self) -> bool:
        self.cuda.queries += 1
        return self.cuda.finished >= self.behind

    def synchronize(self) -> None:
        self.cuda.finish()


class FakeCuda:
    """Driver, streams, events and device memory.

    Attributes:
        registered: address -> size.
        pinned: the same of pinned memory that torch made.
        calls: what was asked of the driver, in order: name, address, and size and flags where there are any.
        refuse: the code that the next registrations get, 0 for none.
        pending: the error that the next kernel would be blamed for.
        devices: on which device each call was made; None where its thread had not said.
        empties: how many more times there is device memory.
        sizes: bytes of each copy that was queued.
        streams: what each call ran on.
    """

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.pinned: dict[int, int] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.refuse = 0
        self.pending = 0
        self.devices: list[int | None] = []
        self.empties = 1000
        self.streams: list[object] = []
        self.queries = self.queued = self.finished = 0
        self.sizes: list[int] = []
        self._on = threading.local()
        self._queue: list[tuple[torch.Tensor, int]] = []

    def install(self, set_attribute: Callable[[Any, str, Any], None]) -> None:
        """Put it where torch has the real one."""
        empty, ones, copy = torch.empty, torch.ones, torch.Tensor.copy_
        to: Callable[..., torch.Tensor] = torch.Tensor.to

        def fake_empty(*size: Any, device: Any = None, pin_memory: bool = False, **how: Any) -> torch.Tensor:
            if is_ours(device):
                if not self.empties:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                self.empties -= 1
                device = None
            made = empty(*size, device=device, **how)
            if pin_memory:
                self.pinned[made.data_ptr()] = made.nbytes
            return made

        def fake_ones(*size: Any, device: Any = None, **how: Any) -> torch.Tensor:
            if is_ours(device):
                error, self.pending, device = self.pending, 0, None
                if error:
                    raise RuntimeError(f"CUDA error {error} of an earlier call")
            return ones(*size, device=device, **how)

        def fake_copy(tensor: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not non_blocking:
                return copy(tensor, source)
            self._queue.append((tensor, source.data_ptr()))
            self.sizes.append(source.nbytes)
            self.queued += 1
            return tensor

        def fake_to(tensor: torch.Tensor, device: Any, *args: Any, **how: Any) -> torch.Tensor:
            if is_ours(device):
                return to(tensor, "cpu", *args, copy=True, **how)
            return to(tensor, device, *args, **how)

        def fake_is_pinned(tensor: torch.Tensor) -> bool:
            ranges = {**self.registered, **self.pinned}.items()
            return any(low <= tensor.data_ptr() < low + size for low, size in ranges)

        for name, value in (("empty", fake_empty), ("ones", fake_ones)):
            set_attribute(torch, name, value)
        for name, function in (("copy_", fake_copy), ("to", fake_to), ("is_pinned", fake_is_pinned)):
            set_attribute(torch.Tensor, name, function)
        set_attribute(torch.cuda, "is_available", lambda: True)
        set_attribute(torch.cuda, "get_device_name", lambda: "none")
        set_attribute(torch.cuda, "check_error", self.check)
        set_attribute(torch.cuda, "synchronize", self.finish)
        set_attribute(torch.cuda, "current_device", lambda: 0)
        set_attribute(torch.cuda, "cudart", lambda: self)
        set_attribute(torch.cuda, "device", self.on_device)
        set_attribute(torch.cuda, "stream", self.on_stream)
        set_attribute(torch.cuda, "Event", lambda: Event(self))

    def finish(self) -> None:
        """Let the device do all that was queued."""
        while self._queue:
            tensor, address = self._queue.pop(0)
            ctypes.memmove(tensor.data_ptr(), address, tensor.nbytes)
            self.finished += 1

    # What torch has.

    def check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"text of {code} ({code})")

    @contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        before = getattr(self._on, "device", None)
        self._on.device = device
        try:
            yield
        finally:
            self._on.device = before

    @contextmanager
    def on_stream(self, stream: object) -> Iterator[None]:
        self.streams.append(stream)
        yield

    # What the driver has.

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self._called("register", address, size, flags)
        if self.refuse:
            self.pending = self.refuse
            return self.refuse
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self._called("unregister", address, is_mapped(address))
        if self.registered.pop(address, None) is None:
            self.pending = 713
            return 713
        return 0

    def cudaGetErrorString(self, code: int) -> str:
        return f"text of {code}"

    def _called(self, *call: Any) -> None:
        self.calls.append(call)
        self.devices.append(getattr(self._on, "device", None))


def is_ours(device: Any) -> bool:
    return isinstance(device, (str, int, torch.device)) and torch.device(device).type == "cuda"


def is_mapped(address: int) -> bool:
    """Whether this process has shared memory of ours at `address`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, _, rest = line.partition("-")
        if int(low, 16) <= address < int(rest.split()[0], 16):
            return "/dev/shm/" in rest
    return False
