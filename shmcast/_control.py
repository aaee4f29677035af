"""The control plane over a torch CPU group: fixed-size headers, votes, and one tensor where a message goes inline.

Every rank makes the same calls in the same order; the header decides what follows, nobody else. The first exception
out of a collective ends the plane for good: gloo leaves a group broken in which one rank timed out.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import torch
import torch.distributed as dist
from torch import Tensor

from shmcast._wire import HEADER, Call, Header, check_call, parse_header
from shmcast.errors import ShmcastError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed import ProcessGroup, Work

RECORD_BYTES: Final = 8192


class ControlBroken(ShmcastError):
    """A collective failed, now or earlier: this rank issues none again."""


def cpu_group(group: ProcessGroup | None) -> ProcessGroup | None:
    """A group over the ranks of `group` that can carry CPU tensors; None for a group of one, or without any.

    A collective where `group` has no CPU backend: every rank of it makes a gloo group then.
    """
    if not dist.is_available() or not dist.is_initialized():
        if group is not None:
            raise ValueError("a process group was given, but torch.distributed is not initialised")
        return None
    whole = dist.group.WORLD if group is None else group
    if not isinstance(whole, dist.ProcessGroup):
        raise ValueError("this rank is not a member of the group")
    if dist.get_world_size(whole) == 1:
        return None
    try:
        whole._get_backend(torch.device("cpu"))
    except RuntimeError:
        ranks = dist.get_process_group_ranks(whole)
        made: ProcessGroup = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        return made
    return whole


class GroupControl:
    """One rank's end of the plane. `src` is a rank of the group, never a global one. One thread at a time."""

    def __init__(self, group: ProcessGroup, timeout: float) -> None:
        self._group = group
        self._timeout = timedelta(seconds=timeout)
        self._calls = 0
        self._call = Call.BROADCAST
        self._plane = 0
        self.src = 0
        self._busy = threading.Lock()
        self._broken: BaseException | None = None
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def settle(self, src: int, plane: int) -> None:
        """What all ranks agreed on: the entry rank and the number of this plane."""
        self.src = src
        self._plane = plane

    @property
    def broken(self) -> BaseException | None:
        """What ended the plane."""
        return self._broken

    @contextmanager
    def turn(self, call: Call) -> Iterator[None]:
        """One collective call of the user's. Two at once would swap each other's bytes: an error, not a wait.

        Calls are counted, not headers: a rank that leaves a call without its header is out of step from then on, and
        the next header tells it so.
        """
        if not self._busy.acquire(blocking=False):
            self._calls += 1
            raise ShmcastError("two threads are in collectives of one Broadcaster: give each thread its own group")
        try:
            self._calls += 1
            self._call = call
            yield
        finally:
            self._busy.release()

    def exchange(self, record: bytes) -> list[bytes]:
        """Every rank's record, by rank; each at most `RECORD_BYTES` long, zero padded."""
        mine = _tensor(record[:RECORD_BYTES].ljust(RECORD_BYTES, b"\0"))
        all_of_them = [torch.empty(RECORD_BYTES, dtype=torch.uint8) for _ in range(self.size)]
        self._finish(lambda: dist.all_gather(all_of_them, mine, group=self._group, async_op=True))
        return [_bytes(tensor).rstrip(b"\0") for tensor in all_of_them]

    def send(self, header: Header) -> None:
        """Broadcast the header of one message; the entry rank calls it, the others `receive`."""
        numbered = header._replace(sequence=self._calls, call=self._call, plane=self._plane)
        self._broadcast(_tensor(bytes(numbered)))

    @property
    def leads(self) -> bool:
        """Whether this is the entry rank."""
        return self.rank == self.src

    def receive(self) -> Header:
        """The header that the entry rank sends. Anything else in its place breaks the plane."""
        tensor = torch.empty(HEADER.size, dtype=torch.uint8)
        self._broadcast(tensor)
        try:
            header = parse_header(_bytes(tensor), self._plane)
            check_call(header, self._calls, self._call)
            return header
        except ShmcastError as error:
            self._broken = error
            raise ControlBroken(str(error)) from error

    def send_tensor(self, tensor: Tensor) -> None:
        """Broadcast the bytes of an inline message, a 1-D uint8 tensor."""
        self._broadcast(tensor)

    def receive_tensor(self, length: int) -> Tensor:
        """The inline message of `length` bytes that the last header announced."""
        try:
            tensor = torch.empty(length, dtype=torch.uint8)
        except RuntimeError as error:
            # The others are in a collective that this rank cannot join.
            self._broken = error
            raise ControlBroken(f"no memory for an inline message of {length} bytes") from error
        self._broadcast(tensor)
        return tensor

    def any(self, failed: bool) -> bool:
        """Whether `failed` holds on any rank."""
        word = torch.tensor([failed], dtype=torch.int32)
        self._finish(lambda: dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._group, async_op=True))
        return bool(word.item())

    def _broadcast(self, tensor: Tensor) -> None:
        self._finish(lambda: dist.broadcast(tensor, group=self._group, group_src=self.src, async_op=True))

    def _finish(self, start: Callable[[], Work | None]) -> None:
        if self._broken is not None:
            raise ControlBroken(f"an earlier collective failed: {self._broken}") from self._broken
        try:
            work = start()
            if work is not None:
                work.wait(self._timeout)
        except BaseException as error:
            self._broken = error
            if isinstance(error, Exception):
                raise ControlBroken(str(error)) from error
            raise


def _tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
