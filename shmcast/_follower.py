"""Every rank of a group but the entry rank: it follows headers, maps or receives, and heals itself where it may."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from shmcast._control import Control, ControlBroken, NoHeader
from shmcast._points import Point, nowhere
from shmcast._sent import HERE, Deliver, R, Sent, T, attempt, ignore, note, note_sent, parse_index, unpickled, walk
from shmcast._wire import HeaderRoute, Reason
from shmcast.errors import ClosedError, LayoutError, MaterializeError, PeerDied, ShmcastError
from shmcast.policy import Policy, Route
from shmcast.transport import Reader, unpack_inline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from shmcast._codec import Allow, Leaves
    from shmcast._points import Reached
    from shmcast.metrics import Counters


def _put_off(raw: object) -> object:
    """An `fn` that leaves it to whoever takes the result."""
    return HERE


class _Taken(NamedTuple):
    """An object that came, and the bytes of its tensors that travelled."""

    obj: object
    size: int


class Follower:
    """The receiving end of a group's collectives. `reader` is None where the group does without shared memory."""

    def __init__(
        self,
        control: Control,
        reader: Reader | None,
        policy: Policy,
        allow: Allow,
        counters: Counters,
        reached: Reached = nowhere,
    ) -> None:
        self._control = control
        self._reader = reader
        self._policy = policy
        self._allow = allow
        self._counters = counters
        self._reached = reached
        # Whether this rank may run `fn` itself.
        self._heals = policy.peers_hold_raw and not policy.agree
        self._writer_lived: bool | None = None
        if reader is not None:
            reader.count(counters)

    def broadcast(self) -> object:
        """The entry rank's object."""
        try:
            sent = self._receive()
            if sent.route is HeaderRoute.NONE:
                raise MaterializeError(f"{self._entry} could not send its object: {sent.text}")
            return self._agreed(sent, lambda s: self._take(s, None).obj)
        except NoHeader as late:
            raise MaterializeError(f"the object of {self._entry} did not come: {late}") from late
        except ControlBroken as broken:
            raise self._gone(broken) from broken

    def materialize(self, raw: R, fn: Callable[[R], T]) -> T:
        """The entry rank's `fn(raw)`, or this rank's own where that is what all agreed on, or what heals."""
        fn = self._counters.timed("materialize")(fn)
        # Before the header comes: while the entry rank runs `fn`, this rank has nothing else to do.
        leaves = walk(raw) if self._policy.peers_hold_raw else None
        try:
            sent = self._receive()
            if sent.route is HeaderRoute.NONE:
                raise MaterializeError(f"fn raised on rank {self._control.src}, the entry rank: {sent.text}")
            if self._heals:
                return cast("T", self._resolve(sent, raw, fn, lambda: leaves).obj)
            made = self._agreed(sent, lambda s: self._open(s, fn, leaves))
            if isinstance(made, Exception):
                raise made
            return made
        except NoHeader as late:
            return self._without(late, lambda: fn(raw))
        except ControlBroken as broken:
            return self._by_itself(broken, lambda: fn(raw))

    def materialize_batch(
        self, raws: Sequence[R] | None, fn: Callable[[R], T], *, deliver: Deliver = ignore, lazy: bool = False
    ) -> list[T | Exception]:
        """As `materialize`, for each request of a batch. `deliver` gets each result as soon as it is there.

        `lazy`: where this rank is to run `fn` on its own raw inputs, the result is `HERE` instead.
        """
        fn = cast("Callable[[R], T]", _put_off) if lazy else self._counters.timed("materialize")(fn)
        mine = list(raws) if raws is not None and self._policy.peers_hold_raw else None
        if mine is not None:
            self._counters.observe("batch", len(mine))
        try:
            sent = self._receive()
            if sent.route is HeaderRoute.NONE:
                raise MaterializeError(f"the batch ended on rank {self._control.src}, the entry rank: {sent.text}")
            if self._heals:
                return self._resolve_batch(sent, mine or [], fn, deliver)
            leaves = None if mine is None else [walk(raw) for raw in mine]
            return self._agreed(sent, lambda s: self._open_batch(s, fn, leaves))
        except NoHeader as late:
            return self._without(late, lambda: [attempt(fn, raw) for raw in mine or ()])
        except ControlBroken as broken:
            return self._by_itself(broken, lambda: [attempt(fn, raw) for raw in mine or ()])

    # Following.

    @property
    def _entry(self) -> str:
        return f"the entry rank, rank {self._control.src},"

    def _receive(self) -> Sent:
        with self._counters.timed("header"):
            header = self._control.receive()
        self._reached(Point.RECEIVED)
        inline = None
        if header.route in (HeaderRoute.INLINE, HeaderRoute.PICKLE):
            inline = self._control.receive_tensor(header.length)
        leaves = header.length if header.route is HeaderRoute.SHM else 0
        sent = Sent(header.route, header.reason, header.handle, inline, header.text, leaves=leaves)
        self._note_sent(sent)
        return sent

    def _note_sent(self, sent: Sent) -> None:
        note_sent(self._counters, sent, f"{self._entry} says: ")

    def _resolve(self, sent: Sent, raw: R, fn: Callable[[R], T], leaves: Callable[[], Leaves | None]) -> _Taken:
        """What was sent, or what `fn` makes of this rank's own raw inputs."""
        if sent.route in (HeaderRoute.LOCAL, HeaderRoute.NONE):
            if fn is not _put_off:
                self._counters.message("local", 0)
            return _Taken(fn(raw), 0)
        try:
            taken = self._take(sent, leaves() if sent.route is not HeaderRoute.RAW else None)
        except Exception as error:
            self._note_open(error)
            return _Taken(fn(raw), 0)
        return taken if sent.route is not HeaderRoute.RAW else _Taken(fn(cast("R", taken.obj)), taken.size)

    def _resolve_batch(self, sent: Sent, raws: list[R], fn: Callable[[R], T], deliver: Deliver) -> list[T | Exception]:
        try:
            entries = self._entries(sent, len(raws))
        except Exception as error:
            self._note_open(error)
            return [attempt(fn, raw) for raw in raws]
        results: list[T | Exception] = []
        with self._giving_back(entries):
            for entry, raw in zip(entries, raws, strict=True):
                got = attempt(lambda pair: self._resolve(pair[0], pair[1], fn, lambda: walk(pair[1])), (entry, raw))
                result, size = got if isinstance(got, _Taken) else (got, 0)
                deliver(len(results), result, size)
                results.append(cast("T | Exception", result))
        return results

    def _note_open(self, error: Exception) -> None:
        if not isinstance(error, ClosedError):
            note(self._counters, Reason.OPEN, error)

    def _entries(self, sent: Sent, count: int) -> list[Sent]:
        """What a header says of each request of a batch of which this rank has all raw inputs."""
        if sent.route is HeaderRoute.LOCAL:
            return [sent] * count
        if count == 1 and sent.route is not HeaderRoute.PICKLE:
            return [sent]
        return self._take_batch(sent, count)

    # Taking.

    def _take(self, sent: Sent, leaves: Leaves | None, *, count: bool = True) -> _Taken:
        """The object that was sent; whatever goes wrong, the leases on it are given back."""
        started = perf_counter()
        if sent.route is HeaderRoute.INLINE and sent.inline is not None:
            taken = _Taken(unpack_inline(sent.inline, self._allow, leaves), sent.inline.numel())
        elif sent.handle is not None and self._reader is not None:
            try:
                if sent.leaves and leaves is not None and len(leaves) != sent.leaves:
                    raise LayoutError(
                        f"the raw inputs have {len(leaves)} tensors, arrays and long lists here, {sent.leaves} on the "
                        "entry rank: are they equal, or did an earlier fn add to them?"
                    )
                taken = _Taken(*self._reader.fetch(sent.handle, leaves, from_header=True))
            except BaseException:
                self._discard(sent)
                raise
        elif sent.route is HeaderRoute.PICKLE:
            each = sent if sent.objects else self._take_pickled(sent, 1)[0]
            if not each.objects:
                raise MaterializeError(f"fn raised on rank {self._control.src}, the entry rank: {each.text}")
            taken = _Taken(each.objects[0][0], each.size)
        else:
            raise MaterializeError(f"{self._entry} sent by {sent.route.name.lower()} what this rank cannot take")
        if count:
            self._counters.observe("map", perf_counter() - started)
            self._counters.message(sent.route.name.lower(), taken.size)
        return taken

    def _open(self, sent: Sent, fn: Callable[[R], T], leaves: Leaves | None) -> T | Exception:
        """What was sent, where this rank may not fall back to raw inputs of its own, or what `fn` raises on them."""
        if sent.route is HeaderRoute.RAW:
            return attempt(fn, cast("R", self._take(sent, None).obj))
        return cast("T", self._take(sent, leaves).obj)

    def _take_pickled(self, sent: Sent, count: int | None) -> list[Sent]:
        """For each request of a batch by pickle what `_take` takes; loads it only where the policy says so."""
        if self._policy.route is not Route.PICKLE or sent.inline is None:
            raise MaterializeError(f"{self._entry} sent by pickle, which the policy of this rank does not allow")
        made = unpickled(sent.inline)
        if count not in (None, len(made)):
            raise LayoutError(f"a batch of {len(made)} requests came by pickle, not {count}")
        size = sent.inline.numel() // max(1, len(made))
        return [
            Sent(HeaderRoute.NONE, Reason.RAISED, text=text)
            if text
            else Sent(HeaderRoute.PICKLE, size=size, objects=((obj, ""),))
            for obj, text in made
        ]

    def _take_batch(self, sent: Sent, count: int | None) -> list[Sent]:
        pickled = sent.route is HeaderRoute.PICKLE
        entries = self._take_pickled(sent, count) if pickled else self._take_index(sent, count)
        for entry in entries:
            self._note_sent(entry)
        return entries

    def _take_index(self, sent: Sent, count: int | None) -> list[Sent]:
        try:
            return parse_index(self._take(sent, None, count=False).obj, count)
        except BaseException:
            # The handles in it are not known, nor ever will be.
            if sent.handle is not None and self._reader is not None:
                with suppress(ClosedError):
                    self._reader.discard_below(sent.handle)
            raise

    def _open_batch(self, sent: Sent, fn: Callable[[R], T], leaves: Sequence[Leaves | None] | None) -> list[Any]:
        count = None if leaves is None else len(leaves)
        entries = self._take_batch(sent, count)
        with self._giving_back(entries):
            return [
                MaterializeError(f"fn raised on rank {self._control.src}, the entry rank: {entry.text}")
                if entry.route is HeaderRoute.NONE
                else self._open(entry, fn, mine)
                for entry, mine in zip(entries, leaves or [None] * len(entries), strict=True)
            ]

    @contextmanager
    def _giving_back(self, entries: list[Sent]) -> Iterator[None]:
        """If this does not come to its end, what of a batch was not opened is given back."""
        try:
            yield
        except BaseException:
            for entry in entries:
                self._discard(entry)
            raise

    def _discard(self, sent: Sent) -> None:
        """Give back what was not opened; a reader that was closed, or is a parent's, has nothing left to give."""
        if sent.handle is not None and self._reader is not None:
            with suppress(ClosedError):
                self._reader.discard(sent.handle)

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
                raise MaterializeError(
                    "a rank could not rebuild the object, not even from inline bytes: its log says why"
                ) from cause
            sent = self._receive()
            if sent.route is HeaderRoute.NONE:
                raise MaterializeError(f"a rank could not open the message: {sent.text}") from cause

    # Alone.

    def _without(self, late: NoHeader, run: Callable[[], T]) -> T:
        """This call goes without its header; the next may have one."""
        note(self._counters, late.reason, late)
        if not self._heals:
            raise MaterializeError(f"the result of {self._entry} did not come: {late}") from late
        return run()

    def _by_itself(self, broken: ControlBroken, run: Callable[[], T]) -> T:
        """The control plane is over: give back what was not opened, and run `fn` here from now on."""
        if not isinstance(broken.__cause__, ClosedError):
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
