"""Every rank of a group but the entry rank: it follows headers, maps or receives, and heals itself where it may."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from shmcast._control import ControlBroken, GroupControl
from shmcast._sent import R, Sent, T, attempt, note, parse_index, walk
from shmcast._wire import CHOICES, HeaderRoute, Reason
from shmcast.errors import MaterializeError, PeerDied, ShmcastError
from shmcast.transport import Reader, unpack_inline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shmcast._codec import Allow, Leaves
    from shmcast.metrics import Counters
    from shmcast.policy import Policy


class Follower:
    """The receiving end of a group's collectives. `reader` is None where the group does without shared memory."""

    def __init__(
        self, control: GroupControl, reader: Reader | None, policy: Policy, allow: Allow, counters: Counters
    ) -> None:
        self._control = control
        self._reader = reader
        self._policy = policy
        self._allow = allow
        self._counters = counters
        # Whether this rank may run `fn` itself.
        self._heals = policy.peers_hold_raw and not policy.agree
        self._writer_lived: bool | None = None

    def broadcast(self) -> object:
        """The entry rank's object."""
        try:
            sent = self._receive()
            if sent.route is HeaderRoute.NONE:
                raise MaterializeError(f"the entry rank could not send its object: {sent.text}")
            return self._agreed(sent, lambda s: self._take(s, None))
        except ControlBroken as broken:
            raise self._gone(broken) from broken

    def materialize(self, raw: R, fn: Callable[[R], T]) -> T:
        """The entry rank's `fn(raw)`, or this rank's own where that is what all agreed on, or what heals."""
        fn = self._counters.timed("materialize")(fn)
        leaves = self._walk(raw)
        try:
            sent = self._receive()
            return self._resolve(sent, raw, fn, leaves)
        except ControlBroken as broken:
            return self._by_itself(broken, lambda: fn(raw))

    def materialize_batch(self, raws: Sequence[R] | None, fn: Callable[[R], T]) -> list[T | Exception]:
        """As `materialize`, for each request of a batch."""
        fn = self._counters.timed("materialize")(fn)
        mine = list(raws) if raws is not None and self._policy.peers_hold_raw else None
        if mine is not None:
            self._counters.observe("batch", len(mine))
        leaves = [self._walk(raw) for raw in mine or ()]
        try:
            sent = self._receive()
            return self._resolve_batch(sent, mine, fn, leaves)
        except ControlBroken as broken:
            return self._by_itself(broken, lambda: [attempt(fn, raw) for raw in mine or ()])

    # Following.

    def _walk(self, raw: object) -> Leaves | None:
        """Before the header comes: while the entry rank runs `fn`, this rank has nothing else to do."""
        return walk(raw) if self._policy.peers_hold_raw else None

    def _receive(self) -> Sent:
        with self._counters.timed("header"):
            header = self._control.receive()
        inline = self._control.receive_tensor(header.length) if header.route is HeaderRoute.INLINE else None
        if header.reason not in CHOICES:
            note(
                self._counters, header.reason, f"the entry rank says: {header.text or 'no shared memory in this group'}"
            )
        return Sent(header.route, header.reason, header.handle, inline, header.text)

    def _resolve(self, sent: Sent, raw: R, fn: Callable[[R], T], leaves: Leaves | None) -> T:
        if sent.route is HeaderRoute.LOCAL:
            self._counters.message("local", 0)
            return fn(raw)
        if sent.route is HeaderRoute.NONE:
            raise MaterializeError(f"fn raised on the entry rank: {sent.text}")
        if not self._heals:
            agreed: T = self._agreed(sent, lambda s: self._take(s, leaves))
            return agreed
        try:
            taken: T = self._take(sent, leaves)
            return taken
        except Exception as error:
            note(self._counters, Reason.OPEN, error)
            return fn(raw)

    def _resolve_batch(
        self, sent: Sent, raws: list[R] | None, fn: Callable[[R], T], leaves: Sequence[Leaves | None]
    ) -> list[T | Exception]:
        if sent.route is HeaderRoute.LOCAL:
            self._counters.message("local", 0)
            return [attempt(fn, raw) for raw in raws or ()]
        if sent.route is HeaderRoute.NONE:
            raise MaterializeError(f"the batch ended on the entry rank: {sent.text}")
        count = None if raws is None else len(raws)
        if not self._heals:
            return self._agreed(sent, lambda s: self._take_batch(s, count, leaves))
        try:
            entries = self._take_index(sent, count)
        except Exception as error:
            note(self._counters, Reason.OPEN, error)
            return [attempt(fn, raw) for raw in raws or ()]
        with self._giving_back(entries):
            return [
                attempt(lambda request: self._resolve(request[0], request[1], fn, request[2]), request)
                for request in zip(entries, raws or (), leaves, strict=True)
            ]

    # Taking.

    def _take(
        self, sent: Sent, leaves: Leaves | None, *, count: bool = True
    ) -> Any:  # what the entry rank's fn returns
        """The object that was sent; whatever goes wrong, the leases on it are given back."""
        started = perf_counter()
        if sent.route is HeaderRoute.INLINE and sent.inline is not None:
            obj, size = unpack_inline(sent.inline, self._allow, leaves), sent.inline.numel()
        elif sent.handle is not None and self._reader is not None:
            try:
                obj, size = self._reader.fetch(sent.handle, leaves, from_header=True)
            except BaseException:
                self._reader.discard(sent.handle)
                raise
        else:
            raise MaterializeError(f"the entry rank sent by {sent.route.name.lower()} what this rank cannot take")
        if count:
            self._counters.observe("map", perf_counter() - started)
            self._counters.message(sent.route.name.lower(), size)
        return obj

    def _take_index(self, sent: Sent, count: int | None) -> list[Sent]:
        try:
            return parse_index(self._take(sent, None, count=False), count)
        except BaseException:
            # The handles in it are not known, nor ever will be.
            if sent.handle is not None and self._reader is not None:
                self._reader.discard_below(sent.handle)
            raise

    def _take_batch(self, sent: Sent, count: int | None, leaves: Sequence[Leaves | None]) -> list[Any]:
        entries = self._take_index(sent, count)
        known = leaves or [None] * len(entries)
        with self._giving_back(entries):
            return [
                MaterializeError(f"fn raised on the entry rank: {entry.text}")
                if entry.route is HeaderRoute.NONE
                else self._take(entry, mine)
                for entry, mine in zip(entries, known, strict=True)
            ]

    @contextmanager
    def _giving_back(self, entries: list[Sent]) -> Iterator[None]:
        """If this does not come to its end, what of a batch was not opened is given back."""
        try:
            yield
        except BaseException:
            for entry in entries:
                if entry.handle is not None and self._reader is not None:
                    self._reader.discard(entry.handle)
            raise

    def _agreed(self, sent: Sent, take: Callable[[Sent], T]) -> T:
        """What `take` gives; where the policy asks for it, only if every rank got it, else from inline bytes."""
        if not self._policy.agree:
            return take(sent)
        while True:
            got = attempt(take, sent)
            if not self._control.any(isinstance(got, Exception)):
                return got  # type: ignore[return-value]
            cause = got if isinstance(got, Exception) else None
            if sent.route is HeaderRoute.INLINE and sent.reason is Reason.OPEN:
                raise MaterializeError("a rank could not rebuild the object, not even from inline bytes") from cause
            sent = self._receive()
            if sent.route is HeaderRoute.NONE:
                raise MaterializeError(f"a rank could not open the message: {sent.text}") from cause

    # Alone.

    def _by_itself(self, broken: ControlBroken, run: Callable[[], T]) -> T:
        """The control plane is over: give back what was not opened, and run `fn` here from now on."""
        note(self._counters, Reason.CONTROL, broken)
        if not self._heals:
            raise self._gone(broken) from broken
        self._leave()
        return run()

    def _leave(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def _gone(self, broken: ControlBroken) -> ShmcastError:
        # Asked once, before the reader is closed: later it could not tell.
        if self._writer_lived is None:
            self._writer_lived = self._reader is None or self._reader.writer_lives
        self._leave()
        if not self._writer_lived:
            return PeerDied(f"rank {self._control.src} of the group, the entry rank, is gone: {broken}")
        return ShmcastError(f"the control plane failed on rank {self._control.rank}: {broken}")
