"""The entry rank of a group: it materializes, decides how each message travels, and says so in one header."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from shmcast._codec import Allow, Encoded, Leaves, encode
from shmcast._control import Control, ControlBroken
from shmcast._costs import Costs, Weight
from shmcast._points import Point, nowhere
from shmcast._sent import (
    Deliver,
    R,
    Sent,
    T,
    attempt,
    describe,
    ignore,
    index_of,
    note,
    note_sent,
    pickled,
    walk,
    weigh,
)
from shmcast._wire import CHOICES, Handle, HeaderRoute, Reason
from shmcast.errors import ArenaFull, ClosedError, MaterializeError, PeerDied, ShmcastError
from shmcast.policy import Policy, Route
from shmcast.transport import Writer, pack_inline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from shmcast._points import Reached
    from shmcast.metrics import Counters


class _Made(NamedTuple):
    """What came of one request on this rank, and how it is sent. `again`: every rank runs `fn` itself, this one too."""

    obj: object
    error: Exception | None
    sent: Sent
    again: bool = False

    @property
    def is_on_its_way(self) -> bool:
        """Whether it was made, and what is sent of it copied."""
        return self.error is None and not self.again and self.sent.route is not HeaderRoute.PICKLE


class _Task(NamedTuple):
    """One request before `fn`. `local`: why every rank is to run `fn` itself, None where they need not."""

    raw: Any
    weight: Weight
    leaves: Leaves | None
    local: Reason | None


UNKNOWN = Weight(0, False)


class Entry:
    """The sending end of a group's collectives. `writer` is None where the group does without shared memory."""

    def __init__(
        self,
        control: Control,
        writer: Writer | None,
        policy: Policy,
        allow: Allow,
        counters: Counters,
        reached: Reached = nowhere,
    ) -> None:
        self._control: Control = control
        self._writer = writer
        self._policy = policy
        self._costs = Costs(control.size)
        self._allow = allow
        self._counters = counters
        self._reached = reached
        # Whether a rank may run `fn` itself.
        self._heals = policy.peers_hold_raw and not policy.agree
        self._owing = False
        if writer is not None:
            writer.count(counters)

    def broadcast(self, obj: T) -> T:
        """`obj` to every rank."""
        if self._control.broken is not None:
            raise self._gone()
        try:
            with self._owing_a_header():
                with self._counters.timed("publish"):
                    made = self._send(obj, None, heals=False)
                self._announce(made.sent)
            self._count(made.sent)
            if made.error is not None:
                raise made.error
            self._agree(made.sent, lambda: self._inline(obj))
        except ControlBroken as broken:
            raise self._gone() from broken
        return obj

    def materialize(self, raw: R, fn: Callable[[R], T]) -> T:
        """`fn(raw)` here, its result to every rank."""
        fn = self._counters.timed("materialize")(fn)
        if self._control.broken is not None:
            return self._alone(lambda: fn(raw))
        try:
            with self._owing_a_header():
                (task,) = self._tasks([raw], None)
                made = self._make(task, fn)
                if made.sent.route is HeaderRoute.PICKLE:
                    made = made._replace(sent=self._pickle([made]))
                self._announce(made.sent)
            self._count(made.sent)
            if made.again:
                return self._run(task, fn)
            if made.error is not None:
                raise self._failure(made.error)
            self._agree(made.sent, lambda: self._inline(made.obj))
        except ControlBroken as broken:
            note(self._counters, Reason.CONTROL, broken)
            return self._alone(lambda: cast("T", made.obj) if made.error is None and not made.again else fn(raw))
        return cast("T", made.obj)

    def materialize_batch(
        self,
        raws: Sequence[R],
        fn: Callable[[R], T],
        *,
        weights: Sequence[Weight] | None = None,
        deliver: Deliver = ignore,
    ) -> list[T | Exception]:
        """`fn` of each here, the results to every rank under one header.

        `weights`: what each weighs, where that is known. `deliver` gets each result as soon as nothing can change it
        any more, and what is sent of it was copied; never where ranks have to agree.
        """
        self._counters.observe("batch", len(raws))
        fn = self._counters.timed("materialize")(fn)
        if self._control.broken is not None:
            return self._alone(lambda: [attempt(fn, raw) for raw in raws])
        made: list[_Made] = []
        try:
            with self._owing_a_header(made):
                tasks = self._tasks(raws, weights)
                for number, task in enumerate(tasks):
                    each = self._make(task, fn)
                    made.append(each)
                    if not self._policy.agree and each.is_on_its_way:
                        # Before the header: who has the result may look for it in the counters.
                        self._count(each.sent)
                        deliver(number, each.obj, each.sent.size)
                index = self._send_index(made)
                self._announce(index)
            for each in made:
                if self._policy.agree or not each.is_on_its_way:
                    self._count(each.sent)
            self._agree(index, lambda: self._inline_batch(made))
        except ControlBroken as broken:
            note(self._counters, Reason.CONTROL, broken)
            self._alone(lambda: None)
        results: list[T | Exception] = []
        for number, (task, each) in enumerate(zip(tasks, made, strict=True)):
            results.append(attempt(lambda t: self._run(t, fn), task) if each.again else self._result(each))
            if not each.is_on_its_way:
                deliver(number, results[-1], 0)
        return results

    def leave_batch(self, weights: Sequence[Weight]) -> bool:
        """Where every rank had better run `fn` itself on all of a batch: say so, run nothing, and return True."""
        if self._control.broken is not None or self._policy.route is not Route.AUTO or not self._heals:
            return False
        if not all(self._costs.chooses_local(weight) for weight in weights):
            return False
        with suppress(ControlBroken):
            self._announce(Sent(HeaderRoute.LOCAL, Reason.COST))
        return True

    def skip_batch(self) -> None:
        """Have the other ranks run `fn` themselves for one batch: this one is closing."""
        if self._control.broken is None:
            with suppress(ControlBroken):
                self._announce(Sent(HeaderRoute.LOCAL, Reason.CLOSED))

    # Making and sending.

    def _tasks(self, raws: Sequence[R], weights: Sequence[Weight] | None) -> list[_Task]:
        """What is to be done with each request, decided before `fn` may change anything."""
        known = self._policy.peers_hold_raw
        chooses = self._heals and self._policy.route in (Route.AUTO, Route.LOCAL)
        if weights is None:
            weights = [weigh(raw) if chooses else UNKNOWN for raw in raws]
        below = sum(weight.nbytes for weight in weights) < self._policy.threshold
        tasks = []
        for raw, weight in zip(raws, weights, strict=True):
            local = None
            if chooses and self._policy.route is Route.LOCAL:
                local = Reason.CHOSEN
            elif chooses and below:
                local = Reason.THRESHOLD
            elif chooses and self._costs.chooses_local(weight):
                local = Reason.COST
            tasks.append(_Task(raw, weight, walk(raw) if known and local is None else None, local))
        return tasks

    def _run(self, task: _Task, fn: Callable[[R], T]) -> T:
        started = perf_counter()
        obj = fn(task.raw)
        self._costs.saw_fn(task.weight, perf_counter() - started)
        return obj

    def _make(self, task: _Task, fn: Callable[[R], T]) -> _Made:
        if task.local is not None:
            return _Made(None, None, Sent(HeaderRoute.LOCAL, task.local), again=True)
        if self._policy.route is Route.RAW and self._writer is not None:
            sent = self._send(task.raw, None, heals=True).sent
            if sent.route is HeaderRoute.SHM:
                return _Made(None, None, sent._replace(route=HeaderRoute.RAW), again=True)
        try:
            obj = self._run(task, fn)
        except Exception as error:
            route = HeaderRoute.LOCAL if self._heals else HeaderRoute.NONE
            # Kept only where it is the result: its frames hold this batch.
            kept = None if self._heals else error
            reason = Reason.CLOSED if isinstance(error, ClosedError) else Reason.RAISED
            return _Made(None, kept, Sent(route, reason, text=describe(error)), again=self._heals)
        if self._policy.route is Route.PICKLE and self._control.carries_tensors:
            return _Made(obj, None, Sent(HeaderRoute.PICKLE))
        started = perf_counter()
        with self._counters.timed("publish"):
            made = self._send(obj, task.leaves, heals=self._heals)
        if made.sent.route is HeaderRoute.SHM:
            self._costs.saw_publish(task.weight, made.sent.size, perf_counter() - started)
        return made

    def _pickle(self, made: list[_Made]) -> Sent:
        try:
            tensor = pickled(
                (m.obj, "" if m.sent.route is HeaderRoute.PICKLE else m.sent.text or "no result") for m in made
            )
        except Exception as error:
            route = HeaderRoute.LOCAL if self._heals else HeaderRoute.NONE
            return Sent(route, Reason.ENCODE, text=describe(error))
        return Sent(HeaderRoute.PICKLE, inline=tensor, size=tensor.numel())

    def _send_index(self, made: list[_Made]) -> Sent:
        """What stands in the header of a batch: where its index is, or what is the same for all of its requests."""
        if any(m.sent.route is HeaderRoute.PICKLE for m in made):
            return self._pickle(made)
        sents = [m.sent for m in made]
        if self._heals:
            alike = all(sent.route is HeaderRoute.LOCAL and sent.reason in CHOICES for sent in sents)
            if alike or len(sents) == 1:
                return sents[0] if sents else Sent(HeaderRoute.LOCAL)
        index = index_of(sents)
        if self._writer is not None and all(sent.inline is None for sent in sents):
            try:
                return Sent(HeaderRoute.SHM, handle=self._writer.put(encode(index, self._allow)))
            except (ArenaFull, OSError) as error:
                full = describe(error)
        else:
            full = ""
        if self._control.carries_tensors:
            if full:
                note(self._counters, Reason.FULL, full)
            return self._inline(index, Reason.CHOSEN)
        self._withdraw(sents)
        return Sent(HeaderRoute.LOCAL if self._heals else HeaderRoute.NONE, Reason.FULL, text=full)

    def _send(self, obj: object, leaves: Leaves | None, *, heals: bool) -> _Made:
        """Bring `obj` on its way: put it into shared memory, or make the tensor that goes inline."""
        otherwise = HeaderRoute.LOCAL if heals else HeaderRoute.NONE
        try:
            encoded = encode(obj, self._allow, leaves, self._policy.fn_keeps_leaves)
            size = encoded.nbytes
            if self._goes_inline(size + len(encoded.stream)):
                reason = Reason.DISABLED if self._writer is None else Reason.CHOSEN
                return _Made(obj, None, Sent(HeaderRoute.INLINE, reason, inline=pack_inline(encoded), size=size))
            try:
                sent = Sent(HeaderRoute.SHM, handle=self._put(encoded), size=size, leaves=len(leaves or ()))
                return _Made(obj, None, sent)
            except (ArenaFull, OSError) as error:
                text = describe(error)
            if heals or not self._control.carries_tensors:
                return _Made(obj, None, Sent(otherwise, Reason.FULL, text=text))
            inline = pack_inline(encoded)
            return _Made(obj, None, Sent(HeaderRoute.INLINE, Reason.FULL, inline=inline, text=text, size=size))
        except Exception as error:
            # Whatever it is, the others wait for a header.
            return _Made(obj, None if heals else error, Sent(otherwise, Reason.ENCODE, text=describe(error)))

    def _goes_inline(self, size: int) -> bool:
        if not self._control.carries_tensors:
            return False
        if self._writer is None or self._policy.route is Route.INLINE:
            return True
        return self._policy.route is Route.AUTO and size <= self._policy.inline_max

    def _put(self, encoded: Encoded) -> Handle:
        if self._writer is None:
            raise ArenaFull("no shared memory in this group")
        return self._writer.put(encoded)

    def _inline(self, obj: object, reason: Reason = Reason.OPEN) -> Sent:
        try:
            encoded = encode(obj, self._allow)
            return Sent(HeaderRoute.INLINE, reason, inline=pack_inline(encoded), size=encoded.nbytes)
        except Exception as error:
            return Sent(HeaderRoute.NONE, Reason.ENCODE, text=describe(error))

    def _inline_batch(self, made: list[_Made]) -> Sent:
        return self._inline(index_of([m.sent if m.error is not None else self._inline(m.obj) for m in made]))

    # Saying so.

    @contextmanager
    def _owing_a_header(self, made: Sequence[_Made] = ()) -> Iterator[None]:
        """Whatever ends this before the header was sent (Ctrl-C in `fn`), the others hear of it; then it goes on up."""
        self._owing = True
        try:
            yield
        except BaseException as error:
            self._withdraw(m.sent for m in made)
            if self._owing and self._control.broken is None:
                with suppress(ControlBroken):
                    self._announce(Sent(HeaderRoute.NONE, Reason.RAISED, text=describe(error)))
            raise

    def _announce(self, sent: Sent) -> None:
        """The header, and what it promises, which is taken back if it cannot be said."""
        try:
            self._owing = False
            with self._counters.timed("header"):
                self._control.send(sent.header())
            self._reached(Point.SENT)
            if sent.inline is not None:
                self._control.send_tensor(sent.inline)
        except BaseException:
            self._withdraw((sent,))
            raise

    def _count(self, sent: Sent) -> None:
        self._counters.message(sent.route.name.lower(), sent.size)
        if sent.reason is not Reason.CLOSED:
            note_sent(self._counters, sent)

    def _withdraw(self, sents: Iterable[Sent]) -> None:
        for sent in sents:
            if sent.handle is not None and self._writer is not None:
                self._writer.withdraw(sent.handle)

    def _agree(self, sent: Sent, again: Callable[[], Sent]) -> None:
        """Where the policy asks for it: all ranks have it, or get it inline, or fail alike."""
        if not self._policy.agree or sent.route is HeaderRoute.NONE:
            return
        while self._control.any(False):
            if sent.route is HeaderRoute.INLINE and sent.reason is Reason.OPEN:
                raise MaterializeError(
                    "a rank could not rebuild the object, not even from inline bytes: its log says why"
                )
            sent = again()
            self._announce(sent)
            note(self._counters, Reason.OPEN, "a rank could not open the message; it was sent again inline")
            if sent.route is HeaderRoute.NONE:
                raise MaterializeError(f"a rank could not open the message, and it cannot be sent inline: {sent.text}")

    def _failure(self, error: Exception) -> Exception:
        if not self._policy.agree:
            return error
        failure = MaterializeError(f"fn raised on rank {self._control.src}, the entry rank: {describe(error)}")
        failure.__cause__ = error
        return failure

    def _result(self, made: _Made) -> Any:  # what fn returned, or the exception in its place
        return made.obj if made.error is None else self._failure(made.error)

    def _alone(self, run: Callable[[], T]) -> T:
        """The control plane is over. This rank has its raw inputs; but with `agree` none goes on alone."""
        if self._policy.agree:
            raise self._gone() from self._control.broken
        return run()

    def _gone(self) -> ShmcastError:
        ranks = [rank for rank in range(self._control.size) if rank != self._control.src]
        dead = [ranks[reader] for reader in self._writer.settle()] if self._writer is not None else []
        if dead:
            return PeerDied(f"rank {', '.join(map(str, dead))} of the group is gone: {self._control.broken}")
        return ShmcastError(f"the control plane failed on rank {self._control.rank}: {self._control.broken}")
