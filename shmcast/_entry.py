"""The entry rank of a group: it materializes, decides how each message travels, and says so in one header."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from shmcast._codec import Allow, Leaves, encode
from shmcast._control import ControlBroken, GroupControl
from shmcast._sent import R, Sent, T, attempt, describe, index_of, note
from shmcast._wire import HeaderRoute, Reason
from shmcast.errors import ArenaFull, MaterializeError, PeerDied, ShmcastError
from shmcast.policy import Policy, Route
from shmcast.transport import Writer, pack_inline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmcast.metrics import Counters


class _Made(NamedTuple):
    """What came of one request on this rank, and how it is sent."""

    obj: object
    error: BaseException | None
    sent: Sent


class Entry:
    """The sending end of a group's collectives. `writer` is None where the group does without shared memory."""

    def __init__(
        self, control: GroupControl, writer: Writer | None, policy: Policy, allow: Allow, counters: Counters
    ) -> None:
        self._control = control
        self._writer = writer
        self._policy = policy
        self._allow = allow
        self._counters = counters
        # Whether a rank may run `fn` itself.
        self._heals = policy.peers_hold_raw and not policy.agree

    def broadcast(self, obj: T) -> T:
        """`obj` to every rank."""
        if self._control.broken is not None:
            raise self._gone()
        made = self._send(obj, None, heals=False)
        try:
            self._announce([made.sent], made.sent)
            if made.error is not None:
                raise made.error
            self._agree(made.sent, lambda: self._inline(obj))
        except ControlBroken as broken:
            raise self._gone() from broken
        return obj

    def materialize(self, raw: R, fn: Callable[[R], T]) -> T:
        """`fn(raw)` here, its result to every rank."""
        if self._control.broken is not None:
            return fn(raw)
        leaves = Leaves.walk(raw) if self._policy.peers_hold_raw else None
        local = self._local([leaves])
        made = _Made(None, None, local) if local else self._make(raw, fn, leaves)
        try:
            self._announce([made.sent], made.sent)
            if made.sent.route is HeaderRoute.LOCAL and (local or made.error is not None):
                return fn(raw)
            if made.error is not None:
                raise self._failure(made.error)
            self._agree(made.sent, lambda: self._inline(made.obj))
        except ControlBroken as broken:
            self._lost(broken)
            if made.error is not None and not isinstance(made.error, Exception):
                raise made.error from None
            if made.error is not None or local:
                return fn(raw)
        return made.obj  # type: ignore[return-value]

    def materialize_batch(self, raws: Sequence[R], fn: Callable[[R], T]) -> list[T | Exception]:
        """`fn` of each here, the results to every rank under one header."""
        if self._control.broken is not None:
            return [attempt(fn, raw) for raw in raws]
        leaves = [Leaves.walk(raw) if self._policy.peers_hold_raw else None for raw in raws]
        local = self._local(leaves)
        if local:
            made = [_Made(None, None, local) for _ in raws]
            index = local
        else:
            made, index = self._make_batch(raws, fn, leaves)
        try:
            self._announce([m.sent for m in made], index, batch=True)
            self._agree(index, lambda: self._inline_batch(made))
        except ControlBroken as broken:
            self._lost(broken)
        again = HeaderRoute.LOCAL
        return [
            attempt(fn, raw) if m.sent.route is again and (local or m.error is not None) else self._result(m)
            for raw, m in zip(raws, made, strict=True)
        ]

    # Making and sending.

    def _local(self, leaves: list[Leaves | None]) -> Sent | None:
        """Whether every rank is to run `fn` itself, which only raw inputs decide."""
        if not self._heals:
            return None
        if self._policy.route is Route.LOCAL:
            return Sent(HeaderRoute.LOCAL)
        if sum(each.nbytes for each in leaves if each is not None) < self._policy.threshold:
            return Sent(HeaderRoute.LOCAL, Reason.THRESHOLD)
        return None

    def _make(self, raw: R, fn: Callable[[R], T], leaves: Leaves | None) -> _Made:
        try:
            obj = fn(raw)
        except Exception as error:
            route = HeaderRoute.LOCAL if self._heals else HeaderRoute.NONE
            return _Made(None, error, Sent(route, Reason.RAISED, text=describe(error)))
        except BaseException as error:
            # Not a bad request but the end of this call (Ctrl-C): the others must hear of it all the same.
            return _Made(None, error, Sent(HeaderRoute.NONE, Reason.RAISED, text=describe(error)))
        return self._send(obj, leaves, heals=self._heals)

    def _make_batch(
        self, raws: Sequence[R], fn: Callable[[R], T], leaves: list[Leaves | None]
    ) -> tuple[list[_Made], Sent]:
        made = []
        for raw, mine in zip(raws, leaves, strict=True):
            made.append(self._make(raw, fn, mine))
            error = made[-1].error
            if error is not None and not isinstance(error, Exception):
                return made, made[-1].sent
        return made, self._send_index([m.sent for m in made])

    def _send_index(self, sents: list[Sent]) -> Sent:
        index = index_of(sents)
        if self._writer is not None and all(sent.inline is None for sent in sents):
            try:
                return Sent(HeaderRoute.SHM, handle=self._writer.put(encode(index, self._allow)))
            except (ArenaFull, OSError) as error:
                note(self._counters, Reason.FULL, error)
        return self._inline(index, Reason.CHOSEN)

    def _send(self, obj: object, leaves: Leaves | None, *, heals: bool) -> _Made:
        """Bring `obj` on its way: put it into shared memory, or make the tensor that goes inline."""
        otherwise = HeaderRoute.LOCAL if heals else HeaderRoute.NONE
        try:
            encoded = encode(obj, self._allow, leaves, self._policy.fn_keeps_leaves)
            size = encoded.nbytes
            small = size + len(encoded.stream) <= self._policy.inline_max
            if self._writer is None or small or self._policy.route is Route.INLINE:
                reason = Reason.DISABLED if self._writer is None else Reason.CHOSEN
                return _Made(obj, None, Sent(HeaderRoute.INLINE, reason, inline=pack_inline(encoded), size=size))
            try:
                return _Made(obj, None, Sent(HeaderRoute.SHM, handle=self._writer.put(encoded), size=size))
            except (ArenaFull, OSError) as error:
                text = describe(error)
                if heals:
                    return _Made(obj, None, Sent(HeaderRoute.LOCAL, Reason.FULL, text=text))
                return _Made(
                    obj, None, Sent(HeaderRoute.INLINE, Reason.FULL, inline=pack_inline(encoded), text=text, size=size)
                )
        except Exception as error:
            # Whatever it is, the others wait for a header.
            return _Made(obj, None if heals else error, Sent(otherwise, Reason.ENCODE, text=describe(error)))

    def _inline(self, obj: object, reason: Reason = Reason.OPEN) -> Sent:
        try:
            encoded = encode(obj, self._allow)
            return Sent(HeaderRoute.INLINE, reason, inline=pack_inline(encoded), size=encoded.nbytes)
        except Exception as error:
            return Sent(HeaderRoute.NONE, Reason.ENCODE, text=describe(error))

    def _inline_batch(self, made: list[_Made]) -> Sent:
        return self._inline(index_of([m.sent if m.error is not None else self._inline(m.obj) for m in made]))

    # Saying so.

    def _announce(self, sents: Sequence[Sent], sent: Sent, *, batch: bool = False) -> None:
        """The header, and what it promises. `sents`: what it speaks of, taken back if it cannot be said."""
        try:
            self._control.send(sent.header(batch=batch))
            if sent.inline is not None:
                self._control.send_tensor(sent.inline)
        except BaseException:
            for each in {*(s.handle for s in sents), sent.handle}:
                if each is not None and self._writer is not None:
                    self._writer.withdraw(each)
            raise
        for each_sent in sents:
            self._count(each_sent)

    def _count(self, sent: Sent) -> None:
        self._counters.message(sent.route.name.lower(), sent.size)
        if sent.reason not in (Reason.CHOSEN, Reason.THRESHOLD):
            note(self._counters, sent.reason, sent.text or "no shared memory in this group")

    def _agree(self, sent: Sent, again: Callable[[], Sent]) -> None:
        """Where the policy asks for it: all ranks have it, or get it inline, or fail alike."""
        if not self._policy.agree or sent.route is HeaderRoute.NONE:
            return
        while self._control.any(False):
            if sent.route is HeaderRoute.INLINE and sent.reason is Reason.OPEN:
                raise MaterializeError("a rank could not rebuild the object, not even from inline bytes")
            sent = again()
            self._announce([], sent)
            note(self._counters, Reason.OPEN, "a rank could not open the message; it was sent again inline")
            if sent.route is HeaderRoute.NONE:
                raise MaterializeError(f"a rank could not open the message, and it cannot be sent inline: {sent.text}")

    def _failure(self, error: BaseException) -> BaseException:
        if self._policy.agree and isinstance(error, Exception):
            failure = MaterializeError(f"fn raised on the entry rank: {describe(error)}")
            failure.__cause__ = error
            return failure
        return error

    def _result(self, made: _Made) -> Any:
        if made.error is not None and not isinstance(made.error, Exception):
            raise made.error
        return made.obj if made.error is None else self._failure(made.error)

    def _lost(self, broken: ControlBroken) -> None:
        """This rank has its object; with `agree` it must not go on alone."""
        note(self._counters, Reason.CONTROL, broken)
        if self._policy.agree:
            raise self._gone() from broken

    def _gone(self) -> ShmcastError:
        lives = self._writer.settle() if self._writer is not None else ()
        ranks = [rank for rank in range(self._control.size) if rank != self._control.src]
        dead = [rank for rank, alive in zip(ranks, lives, strict=False) if alive is False]
        if dead:
            return PeerDied(f"rank {', '.join(map(str, dead))} of the group is gone: {self._control.broken}")
        return ShmcastError(f"the control plane failed on rank {self._control.rank}: {self._control.broken}")
