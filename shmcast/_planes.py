"""Control planes of a scheduler: headers through a writer's ring, or one all-gather for the headers of all ranks.

Neither carries tensors, pickle or votes: where shared memory does not do, each rank runs `fn` on its own raw inputs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from shmcast._control import Control, ControlBroken, NoHeader, PrivateControl
from shmcast._wire import Header, Reason, parse_header
from shmcast.errors import LayoutError, ShmcastError
from shmcast.transport import Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Callable


T = TypeVar("T")


class RingControl(Control):
    """A plane over the header ring of one writer. `end`: that writer on the entry rank, a reader of it elsewhere."""

    def __init__(self, rank: int, size: int, timeout: float, end: Writer | Reader) -> None:
        super().__init__(rank, size, timeout)
        self._end = end
        self._early: Header | None = None
        self._silent = False

    def send(self, header: Header) -> None:
        self._attempt(lambda: self._post(self.numbered(header)))

    def receive(self) -> Header:
        """A header of a later call stays for that call; one of an earlier call, which this rank gave up, is dropped."""
        # One that was silent for this long is not waited for again before it has said something.
        deadline = time.monotonic() + (0.0 if self._silent else self.timeout)
        while True:
            header, self._early = self._early or self._next(deadline), None
            if header is None:
                continue
            if header.sequence > self._calls:
                self._early = header
                raise NoHeader(Reason.MISSED, f"rank {self.src} is in call {header.sequence} already")
            if header.sequence == self._calls:
                try:
                    self.check(header)
                except LayoutError as error:
                    self._drop(header)
                    raise NoHeader(Reason.MISSED, str(error)) from None
                return header
            self._drop(header)
            # It is not silent: the header of this call may be a whole batch away.
            deadline = time.monotonic() + self.timeout

    def ready(self, number: int, timeout: float) -> bool:
        """Whether `receive` in call `number` has something to say at once, after at most `timeout` seconds."""
        end = time.monotonic() + timeout
        try:
            while self._early is None or self._early.sequence < number:
                if self._early is not None:
                    early, self._early = self._early, None
                    self._drop(early)
                self._early = self._parsed(self._attempt(lambda: self._receive(max(0.0, end - time.monotonic()))))
        except TimeoutError:
            return False
        except ControlBroken:
            pass
        return True

    def _drop(self, header: Header) -> None:
        """Give back what it speaks of, and whatever came before that and was not opened."""
        if header.handle is not None and isinstance(self._end, Reader):
            self._end.discard_below(header.handle)

    def _post(self, header: bytes) -> None:
        if not isinstance(self._end, Writer):
            raise ShmcastError("only the entry rank sends headers")
        self._end.announce(header)

    def _next(self, deadline: float) -> Header | None:
        try:
            raw = self._attempt(lambda: self._receive(max(0.0, deadline - time.monotonic())))
        except TimeoutError:
            self._silent = True
            raise NoHeader(Reason.LATE, f"no header of rank {self.src} within {self.timeout:g} s") from None
        return self._parsed(raw)

    def _parsed(self, raw: bytes | None) -> Header | None:
        self._silent = False
        return None if raw is None else self._attempt(lambda: parse_header(raw, self.plane))

    def _receive(self, timeout: float) -> bytes | None:
        if not isinstance(self._end, Reader):
            raise ShmcastError("the entry rank receives no headers")
        return self._end.next_header(timeout)

    def _attempt(self, run: Callable[[], T]) -> T:
        if self._broken is not None:
            raise ControlBroken(str(self._broken)) from self._broken
        try:
            return run()
        except (ShmcastError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            self._broken = error
            raise ControlBroken(str(error)) from error


class Gathered:
    """The headers of one call, of all ranks, by one all-gather: what the planes of a group's ranks share."""

    def __init__(self, group: PrivateControl) -> None:
        self.group = group
        self.headers: list[bytes] = []


class GatherControl(Control):
    """The plane of rank `src` among those that share an all-gather. The rank's own plane must send before any receives.

    Every rank sends exactly one header a call, also where it has nothing to say.
    """

    def __init__(self, gathered: Gathered) -> None:
        super().__init__(gathered.group.rank, gathered.group.size, gathered.group.timeout)
        self._gathered = gathered

    def send(self, header: Header) -> None:
        self._gathered.headers = []
        self._gathered.headers = self._gathered.group.gather(self.numbered(header))

    def receive(self) -> Header:
        broken = self._gathered.group.broken
        if broken is not None or not self._gathered.headers:
            raise ControlBroken(f"no headers were gathered: {broken}") from broken
        try:
            header = parse_header(self._gathered.headers[self.src], self.plane)
            self.check(header)
        except LayoutError as error:
            raise NoHeader(Reason.MISSED, str(error)) from None
        return header

    @property
    def broken(self) -> BaseException | None:
        return self._gathered.group.broken
