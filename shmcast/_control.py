"""Control planes: what carries the one header of each call from the entry rank to the others.

`GroupControl` does it over a torch CPU group, with votes, and tensors or objects where a message does not go through
shared memory. Every rank makes the same calls in the same order; the header decides what follows, nobody else. The
first exception out of a collective ends the plane for good: gloo leaves a group broken in which one rank timed out.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Final, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from shmcast._wire import HEADER, Call, Header, Reason, check_call, parse_header
from shmcast.errors import ShmcastError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch.distributed import ProcessGroup, Work

RECORD_BYTES: Final = 8192


class ControlBroken(ShmcastError):
    """The plane failed, now or earlier: this rank uses it no more."""


class NoHeader(ShmcastError):
    """The header of this call did not come to this rank; those of later calls may."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


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


class Control(ABC):
    """One rank's end of a plane. `src` is a rank of the group, never a global one. One thread at a time."""

    carries_tensors = False
    """Whether a message may go inline, or as pickle, and ranks may vote: all that takes collectives."""

    def __init__(self, rank: int, size: int, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.src = 0
        self.plane = 0
        self._calls = 0
        self._call = Call.BROADCAST
        self._batch = 0
        self._busy = threading.Lock()
        self._broken: BaseException | None = None

    def settle(self, src: int, plane: int) -> None:
        """What all ranks agreed on: the entry rank and the number of this plane."""
        self.src = src
        self.plane = plane

    @property
    def leads(self) -> bool:
        """Whether this is the entry rank."""
        return self.rank == self.src

    @property
    def broken(self) -> BaseException | None:
        """What ended the plane."""
        return self._broken

    def turn(self, call: Call, number: int | None = None, batch: int = 0) -> AbstractContextManager[bool]:
        """One call of all ranks, as long as the lock that this gives. Two at once would swap each other's bytes: an
        error, not a wait.

        `number`: of the call; default one more than that of the last. `batch`: digest of what it is about.

        Calls are counted, not headers: a rank that leaves a call without its header is out of step from then on, and
        the next header tells it so.
        """
        busy = self._busy.locked()
        self._calls = self._calls + 1 if number is None else number
        if busy:
            raise ShmcastError("two threads are in collectives of one Broadcaster: give each thread its own group")
        self._call = call
        self._batch = batch
        return self._busy

    @abstractmethod
    def send(self, header: Header) -> None:
        """Give all ranks the header of this call; the entry rank calls it, the others `receive`."""

    @abstractmethod
    def receive(self) -> Header:
        """The header that the entry rank sends. Raises `NoHeader`, or `ControlBroken` for good."""

    def send_tensor(self, tensor: Tensor) -> None:
        """Send the bytes of a message that goes inline or by pickle, a 1-D uint8 tensor."""
        raise NotImplementedError

    def receive_tensor(self, length: int) -> Tensor:
        """The message of `length` bytes that the last header announced."""
        raise NotImplementedError

    def any(self, failed: bool) -> bool:
        """Whether `failed` holds on any rank."""
        raise NotImplementedError

    def check(self, header: Header) -> None:
        """Raise `LayoutError` unless `header` is of this call."""
        check_call(header, self._calls, self._call, self._batch)

    def numbered(self, header: Header) -> bytes:
        """`header` as that of this call."""
        return bytes(header._replace(sequence=self._calls, call=self._call, plane=self.plane, batch=self._batch))


class GroupControl(Control):
    """A plane over a CPU group."""

    carries_tensors = True

    def __init__(self, group: ProcessGroup, timeout: float) -> None:
        super().__init__(group.rank(), group.size(), timeout)
        self._group: ProcessGroup | None = group
        self._pid = os.getpid()

    @property
    def group(self) -> ProcessGroup:
        """The group; `ControlBroken` where it was closed."""
        if self._group is None:
            raise ControlBroken(f"an earlier collective failed: {self._broken}")
        return self._group

    def exchange(self, record: bytes) -> list[bytes]:
        """Every rank's record, by rank; each at most `RECORD_BYTES` long, zero padded."""
        mine = _tensor(record[:RECORD_BYTES].ljust(RECORD_BYTES, b"\0"))
        all_of_them = [torch.empty(RECORD_BYTES, dtype=torch.uint8) for _ in range(self.size)]
        self._finish(lambda: self._start_gather(all_of_them, mine))
        return [_bytes(tensor).rstrip(b"\0") for tensor in all_of_them]

    def send(self, header: Header) -> None:
        self._broadcast(_tensor(self.numbered(header)))

    def receive(self) -> Header:
        """Anything else in a header's place breaks the plane."""
        tensor = torch.empty(HEADER.size, dtype=torch.uint8)
        self._broadcast(tensor)
        try:
            header = parse_header(_bytes(tensor), self.plane)
            self.check(header)
            return header
        except ShmcastError as error:
            self._broken = error
            raise ControlBroken(str(error)) from error

    def send_tensor(self, tensor: Tensor) -> None:
        self._broadcast(tensor)

    def receive_tensor(self, length: int) -> Tensor:
        try:
            tensor = torch.empty(length, dtype=torch.uint8)
        except RuntimeError as error:
            # The others are in a collective that this rank cannot join.
            self._broken = error
            raise ControlBroken(f"no memory for an inline message of {length} bytes") from error
        self._broadcast(tensor)
        return tensor

    def any(self, failed: bool) -> bool:
        word = torch.tensor([failed], dtype=torch.int32)
        self._finish(lambda: dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.group, async_op=True))
        return bool(word.item())

    def _broadcast(self, tensor: Tensor) -> None:
        self._finish(lambda: self._start_broadcast(tensor))

    def _start_broadcast(self, tensor: Tensor) -> Work | None:
        work: Work | None = dist.broadcast(tensor, group=self.group, group_src=self.src, async_op=True)
        return work

    def _start_gather(self, parts: list[Tensor], mine: Tensor) -> Work | None:
        work: Work | None = dist.all_gather(parts, mine, group=self.group, async_op=True)
        return work

    def _leave(self) -> None:
        """The plane is over."""

    def _finish(self, start: Callable[[], Work | None]) -> None:
        if self._broken is not None:
            raise ControlBroken(f"an earlier collective failed: {self._broken}") from self._broken
        if os.getpid() != self._pid:
            raise ControlBroken("this is a forked child, and the sockets of the group are its parent's")
        work: Work | None = None
        try:
            work = start()
            if work is not None:
                work.wait(timedelta(seconds=self.timeout))
        except BaseException as error:
            self._broken = error
            work = None
            self._leave()
            if isinstance(error, Exception):
                raise ControlBroken(str(error)) from error
            raise


class PrivateControl(GroupControl):
    """A plane over a gloo group of its own, over the ranks of `group`, that is closed where the plane ends: gloo ends a
    collective only where a socket closes, and so ranks that wait for this one hear of it. Collective.

    Not from `new_group`: its name, where not the whole world takes part, is made of how many groups this process has,
    so that it comes again after one was destroyed, and differs between ranks that are in other groups too. `name`: the
    same on every rank, and never used twice.
    """

    def __init__(self, group: ProcessGroup, name: str, timeout: float) -> None:
        store = PrefixStore(f"shmcast/{name}", dist.distributed_c10d._get_default_store())
        try:
            own = dist.ProcessGroupGloo(store, group.rank(), group.size(), timedelta(seconds=timeout))
        except RuntimeError as error:
            raise ShmcastError(
                f"rank {group.rank()} cannot make a group of its own over the same ranks: {error}"
            ) from error
        super().__init__(cast("ProcessGroup", own), timeout)

    def gather(self, header: bytes) -> list[bytes]:
        """Every rank's header of this call, by rank, in one collective."""
        all_of_them = torch.empty(self.size * HEADER.size, dtype=torch.uint8)
        parts = [all_of_them[i * HEADER.size : (i + 1) * HEADER.size] for i in range(self.size)]
        self._finish(lambda: self._start_gather(parts, _tensor(header)))
        return [_bytes(part) for part in parts]

    # Straight to the group: torch.distributed knows nothing of it.

    def _start_broadcast(self, tensor: Tensor) -> Work | None:
        options = dist.BroadcastOptions()
        options.rootRank = self.src
        return self.group.broadcast([tensor], options)

    def _start_gather(self, parts: list[Tensor], mine: Tensor) -> Work | None:
        return self.group.allgather([parts], [mine])

    def _leave(self) -> None:
        self._group = None


def _tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
