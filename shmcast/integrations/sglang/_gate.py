"""The gate in front of the entry rank's socket: requests with inputs wait there until these are in shared memory.

    socket -> Gate -> held: a worker makes and publishes -> Ticket in the request -> SGLang's own broadcast

SGLang reads requests through it as it would from the socket. Text goes straight through; what is held comes out when
it is ready, requests of one session in their order; an abort lets what it names out first.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import zmq

from shmcast._sent import describe
from shmcast._wire import Handle
from shmcast.integrations.sglang._pointers import copied, held_bytes, pointers, restore
from shmcast.integrations.sglang._tickets import Aborted, Failure, RawTicket, Ticket, carried

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from shmcast.admission import Admission, Outcome
    from shmcast.integrations.sglang._release import Release

BRIEF: Final = 3e-3
"""Twice what mapping and publishing 90 MiB in 16 items takes, and less than a tick of a scheduler that has work."""

log = logging.getLogger("shmcast")


@dataclass(frozen=True)
class _Held:
    request: Any
    session: Hashable


class Gate:
    """Stands in for `recv_from_tokenizer`. For the scheduler's thread alone.

    Args:
        receive: one request from the socket; `zmq.Again` where there is none.
        admission: its `fn` takes the list of a request's raw inputs, None for each part that has none.
        release: of SGLang.
        brief: seconds that a look waits for what it took in, where nobody has to hash.
    """

    def __init__(
        self, receive: Callable[[int], Any], admission: Admission, release: Release, brief: float = BRIEF
    ) -> None:
        self._receive = receive
        self._admission = admission
        self._release = release
        self._keys = count()
        self._held: dict[int, _Held] = {}
        self._sessions: Counter[Hashable] = Counter()
        self._out: deque[Any] = deque()
        self._brief = brief
        self._nearly_ready: set[int] = set()
        self._complained = False
        self._closed = False

    @property
    def waiting(self) -> bool:
        """Whether a request is held, or out and not yet received: the scheduler must not sleep on its sockets."""
        return bool(self._held or self._out)

    def recv_pyobj(self, flags: int = 0) -> Any:
        """The next request that can go on; raises `zmq.Again` where none can, whatever the flags."""
        self._let_out()
        while not self._out:
            try:
                self._take_in(self._receive(flags | zmq.NOBLOCK))
            except zmq.Again:
                self._let_out_nearly_ready()
                if not self._out:
                    raise
        return self._as_it_goes(self._out.popleft())

    def close(self) -> None:
        """Hold no more: what is held or out goes on as it came, for no rank opens tickets from now on."""
        self._closed = True
        for key in list(self._held):
            self._admission.abort(key)
            self._out.append(self._forget(key))
        for request in list(self._out):
            for part in self._release.parts(request):
                raw = self._release.raw_of(part)
                if isinstance(raw, Aborted):
                    self._release.set_raw(part, None)
                    self._out.append(raw.abort)
                elif isinstance(raw, Ticket) and not isinstance(raw, RawTicket):
                    self._release.set_raw(part, raw.raw)

    def hear(self, abort: Any) -> None:
        """An abort that all ranks of the world have by now: what it names comes out with an abort of its own."""
        self._let_out_aborted(abort, follows=False)

    def _take_in(self, request: Any) -> None:
        if self._closed:
            self._out.append(request)
            return
        if isinstance(request, self._release.abort):
            self._let_out_aborted(request, follows=True)
        session = self._session_of(request)
        try:
            raws = self._raws(request)
            if raws is not None or self._sessions[session]:
                self._hold(request, raws, session)
                return
        except Exception as error:
            if not self._complained:
                self._complained = True
                log.warning("requests like this are not held, they go on as they came: %s", describe(error))
        self._out.append(request)

    def _hold(self, request: Any, raws: list[Any] | None, session: Hashable) -> None:
        key = next(self._keys)
        # Copies: a worker writes to the items, and an abort may let the request go on meanwhile.
        own = [copied(self._release, raw) if self._is_raw(raw) else raw for raw in raws or ()]
        nbytes = sum(held_bytes(self._release, raw) for raw in own if self._is_raw(raw))
        hashed = raws is not None and all(raw is None or self._is_hashed(raw) for raw in raws)
        self._admission.hold(key, own if raws else None, session=session, nbytes=nbytes)
        self._held[key] = _Held(request, session)
        if hashed:
            self._nearly_ready.add(key)
        if session is not None:
            self._sessions[session] += 1

    def _raws(self, request: Any) -> list[Any] | None:
        """The raw inputs of each part of a request; None: it has none, or none that can be held."""
        parts = self._release.parts(request)
        if all(self._release.raw_of(part) is None for part in parts):
            return None
        for part in parts:
            self._recognise(part)
        self._release.unwrap(request)
        raws = [self._release.raw_of(part) for part in parts]
        if all(raw is None or (isinstance(raw, RawTicket) and raw.known) for raw in raws):
            return None
        return raws if all(raw is None or self._release.can_hold(raw) for raw in raws) else None

    @staticmethod
    def _is_raw(raw: Any) -> bool:
        return raw is not None and not isinstance(raw, RawTicket)

    def _is_hashed(self, raw: Any) -> bool:
        return raw.known if isinstance(raw, RawTicket) else self._release.is_hashed(raw)

    def _recognise(self, part: Any) -> None:
        """Put a ticket in the place of a carrier from the tokenizer."""
        raw = self._release.raw_of(part)
        items = [] if raw is None else self._release.items(raw)
        ticket = carried(items[0].feature) if len(items) == 1 else None
        if ticket is not None:
            self._release.set_raw(part, ticket)

    def _let_out_nearly_ready(self) -> None:
        """Give what this look took in, and what only has to be published, the time for that: else it waits a tick."""
        end = monotonic() + self._brief
        while not self._nearly_ready.isdisjoint(self._held) and (left := end - monotonic()) > 0:
            self._let_out(left)
        self._nearly_ready.clear()

    def _let_out(self, timeout: float = 0.0) -> None:
        """Move what is ready from the admission to the scheduler."""
        if not self._held:
            return
        for key, outcome in self._admission.ready(timeout):
            request = self._forget(key)
            self._hand(request, outcome)
            self._out.append(request)

    def _as_it_goes(self, request: Any) -> Any:
        """A request for the scheduler. What of it nobody read is SGLang's to attach."""
        for part in self._release.parts(request):
            raw = self._release.raw_of(part)
            if raw is not None and not isinstance(raw, Ticket):
                restore(self._release, raw)
        return request

    def _let_out_aborted(self, abort: Any, *, follows: bool) -> None:
        """What an abort names goes on without inputs: the scheduler ends it as it ends any that waits.

        `follows`: the abort comes behind it. The rest of a batch goes on as it came.
        """
        for key, held in list(self._held.items()):
            parts = self._release.parts(held.request)
            named = [part for part in parts if abort.abort_all or part.rid.startswith(abort.rid)]
            if not named or not self._admission.abort(key):
                continue
            for part in named:
                self._drop(part)
                if not follows:
                    own = self._release.abort_of(abort, part)
                    self._release.set_raw(part, Aborted(own, self._release.raw_of(part)))
            self._out.append(self._forget(key))

    def _drop(self, part: Any) -> None:
        """Let a part go on without inputs. The tokenizer's leases come back on each rank: their ticket stays."""
        raw = self._release.raw_of(part)
        if isinstance(raw, RawTicket):
            raw.dropped = True
            return
        for pointer in [] if raw is None else pointers(self._release, raw):
            pointer.discard()
        self._release.set_raw(part, None)

    def _forget(self, key: int) -> Any:
        held = self._held.pop(key)
        if held.session is not None:
            self._sessions[held.session] -= 1
            if not self._sessions[held.session]:
                del self._sessions[held.session]
        return held.request

    def _hand(self, request: Any, outcome: Outcome) -> None:
        """Put what became of a request's inputs into it. Without a handle it keeps the raw ones, as in stock."""
        if not isinstance(outcome, Handle):
            return
        for number, part in enumerate(self._release.parts(request)):
            raw = self._release.raw_of(part)
            if self._is_raw(raw):
                ticket = Ticket(bytes(outcome), number, raw)
                ticket.cut = [pointer for pointer in pointers(self._release, raw) if not pointer.travels]
                self._release.set_raw(part, ticket)

    def _session_of(self, request: Any) -> Hashable:
        """The session whose order a request keeps; None: it has none."""
        params = getattr(request, "session_params", None)
        session: Hashable = None
        if params is not None:
            session = params.id
        elif self._release.parts(request) or isinstance(request, self._release.session):
            session = getattr(request, "session_id", None)
        return session


def maker_of_all(release: Release, make: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    """Makes all parts of a request: for each what is made, or, where SGLang knows such errors, its failure."""

    def attempt(raw: Any) -> Any:
        if raw is None:
            return None
        try:
            return make(raw)
        except Exception as error:
            if not release.request_errors:
                raise
            return Failure(f"Multimodal input processing failed on the TP entry rank: {describe(error)}")

    return lambda raws: [attempt(raw) for raw in raws]
