"""What shmcast puts into one scheduler: the gate, the settling of tickets, the flag path. `close` takes it out again.

Everything is put on the scheduler object itself, where an attribute hides the method of its class.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from shmcast._sent import describe, size_of
from shmcast._wire import Handle
from shmcast.admission import Admission
from shmcast.broadcaster import Broadcaster
from shmcast.errors import MaterializeError
from shmcast.integrations.sglang._gate import Gate, maker_of_all
from shmcast.integrations.sglang._hashing import Hashing, splits_or_moves
from shmcast.integrations.sglang._joining import ALLOW, Apart, Shared, nodes_of, share
from shmcast.integrations.sglang._pointers import make_of, map_all, pointers
from shmcast.integrations.sglang._reading import receive_with
from shmcast.integrations.sglang._release import flag_group, hears_aborts
from shmcast.integrations.sglang._tickets import Aborted, Failure, RawTicket, Ticket
from shmcast.integrations.sglang._tokenizer_reader import TokenizerReader
from shmcast.policy import Policy, Route

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcast.integrations.sglang._release import Release
    from shmcast.integrations.sglang._settings import Settings
    from shmcast.metrics import Stats
    from shmcast.transport import Writer

FLAG_CAPACITY = 64 << 20
"""Bytes of shared memory of the flag path: tensors travel as references there."""

log = logging.getLogger("shmcast")

_ABSENT = object()


class Link:
    """One scheduler's. Made by every rank of SGLang's world at the same point, the end of `Scheduler.__init__`."""

    def __init__(self, scheduler: Any, release: Release, settings: Settings) -> None:
        self._scheduler = scheduler
        self._release = release
        self._settings = settings
        self._hashing: Hashing | None = None
        self._make = release.maker(scheduler)
        if not splits_or_moves():
            self._make = self._hashing = Hashing(release, self._make)
        self._make_all = maker_of_all(release, self._make)
        self._hidden: dict[str, Any] = {}
        self._shared: Shared | None = None
        self._gate: Gate | None = None
        self._hears: Callable[[Any], None] | None = None
        self._flag: Broadcaster | None = None
        self._tokenizer: TokenizerReader | None = None
        shared = share(scheduler, settings, self._admit)
        if isinstance(shared, Shared):
            self._shared = shared
            if shared.tokenizer is not None:
                self._tokenizer = TokenizerReader(shared.tokenizer, release, self._make)
            self._put_gate(shared)
            self._put_settling()
        self._put_making()
        if shared.place.receives:
            self._say(shared)

    @property
    def admits(self) -> bool:
        """Whether this scheduler's requests travel with tickets."""
        return self._shared is not None

    def stats(self) -> dict[str, Stats]:
        """Of the ends that this rank has: `reader`, `tokenizer`, `flag`, on an entry rank `writer` and `admission`."""
        ends: dict[str, Any] = {"flag": self._flag}
        if self._shared is not None:
            names = ("reader", "writer", "tokenizer", "admission")
            ends |= {name: getattr(self._shared, name) for name in names}
        return {name: end.stats() for name, end in ends.items() if end is not None}

    def close(self) -> None:
        """Give the scheduler its own methods and socket back. Tensors that it holds stay valid.

        Requests that are held or on their way out go on as they came: the gate stays for them, and holds no more.
        """
        if self._gate is not None:
            self._gate.close()
        for name, value in self._hidden.items():
            if value is _ABSENT:
                vars(self._scheduler).pop(name, None)
            else:
                setattr(self._scheduler, name, value)
        self._hidden = {}
        if self._gate is not None and self._gate.waiting:
            self._scheduler.recv_from_tokenizer = self._gate
            if hasattr(self._scheduler, "request_receiver"):
                receiver = self._scheduler.request_receiver
                self._scheduler.request_receiver = replace(receiver, recv_from_tokenizer=self._gate)
        if self._flag is not None:
            self._flag.close()
        if self._shared is not None:
            self._shared.close()
        if self._hashing is not None:
            self._hashing.close()
        self._gate = self._flag = self._shared = self._tokenizer = None

    def settle(self, requests: Any) -> Any:
        """Open what the tickets among these requests name, alike on all ranks. Returns the requests.

        Where one rank cannot open a message, none uses it: the entry rank sends the raw inputs behind it instead.
        Behind a request that was aborted while it was held comes its abort, where none else would.
        """
        requests = self._with_aborts(requests)
        parts = [part for request in requests or () for part in self._release.parts(request)]
        tickets = [(part, ticket) for part in parts if isinstance(ticket := self._release.raw_of(part), Ticket)]
        found = [ticket for part, ticket in tickets if not self._drop(part, ticket)]
        if not found:
            return requests
        messages: dict[bytes, list[Ticket]] = {}
        for ticket in found:
            messages.setdefault(ticket.handle, []).append(ticket)
        failed = torch.tensor([not self._open(*message) for message in messages.items()], dtype=torch.int32)
        stage = self._ends.stage
        if stage is not None:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=stage)
        if failed.any():
            self._send_raw([t for bad, tickets in zip(failed, messages.values(), strict=True) if bad for t in tickets])
        for ticket in found:
            if ticket.inputs is not None:
                ticket.raw = None
            # What is cut nobody else knows of; the rest the last to map takes away.
            for pointer in (*ticket.cut, *(ticket.pointers if self._ends.ends_names else ())):
                pointer.discard()
        return requests

    def _with_aborts(self, requests: Any) -> Any:
        """The aborts among these reach what the gate holds; what it let out for one before has its own behind it."""
        followed = []
        for request in requests or ():
            if self._hears and isinstance(request, self._release.abort):
                self._hears(request)
            followed.append(request)
            for part in self._release.parts(request):
                raw = self._release.raw_of(part)
                if isinstance(raw, Aborted):
                    self._release.set_raw(part, raw.ticket)
                    followed.append(raw.abort)
        return followed if requests else requests

    def _open(self, handle: bytes, tickets: list[Ticket]) -> bool:
        """Whether this rank could."""
        reader = self._ends.reader
        try:
            if isinstance(tickets[0], RawTicket):
                reader = self._borrowed.reader
                self._borrowed.open(tickets[0])
                return True
            inputs: Any = reader.open(Handle.parse(handle))
            for ticket in tickets:
                ticket.inputs = inputs[ticket.number]
                ticket.pointers = map_all(self._release, ticket.inputs)
        except Exception as error:
            log.warning("this rank cannot open a request's inputs, all get the raw ones: %s", describe(error))
            with suppress(Exception):
                reader.discard(Handle.parse(handle))
            return False
        return True

    def _drop(self, part: Any, ticket: Ticket) -> bool:
        """Whether a request was aborted while it was held: then this rank's lease goes back, and it has no inputs.

        Not where stages follow, which need the ticket for that: there it is opened as any.
        """
        if not (isinstance(ticket, RawTicket) and ticket.dropped and self._is_one_stage(self._ends)):
            return False
        self._borrowed.discard(ticket)
        self._release.set_raw(part, None)
        return True

    @staticmethod
    def _is_one_stage(ends: Shared) -> bool:
        """Whether all ranks of the replica are in one pipeline stage."""
        return ends.stage is not None and dist.get_world_size(ends.stage) == ends.ranks

    def _send_raw(self, tickets: list[Ticket]) -> None:
        """Collective over a stage: the raw inputs behind tickets that a rank could not open."""
        ends = self._ends
        raws = [[self._own_raw(ticket) for ticket in tickets]]
        if ends.stage is not None:
            dist.broadcast_object_list(raws, src=ends.entry, group=ends.stage)
        for ticket, raw in zip(tickets, raws[0], strict=True):
            if raw is None and ends.place.stage == 0 and self._release.request_errors:
                ticket.inputs = Failure("Multimodal inputs were lost between the tokenizer and the TP entry rank")
                continue
            if raw is None:
                raise MaterializeError(
                    f"pipeline stage {ends.place.stage} cannot open a request's inputs, and the raw ones stayed in "
                    "stage 0: see the warning of the rank that could not"
                )
            ticket.inputs, ticket.raw = None, raw

    def _own_raw(self, ticket: Ticket) -> Any:
        """The raw inputs behind a ticket, with their bytes; None where they are not here."""
        if ticket.raw is None or isinstance(ticket, RawTicket):
            return ticket.raw
        ticket.pointers = pointers(self._release, ticket.raw)
        try:
            map_all(self._release, ticket.raw)
        except Exception as error:
            log.warning("the raw inputs of a request cannot be mapped: %s", describe(error))
            return None
        return ticket.raw

    def _take(self, stock: Callable[[Any], Any], inputs: Any) -> Any:
        """What stands in for `stock`, a method that makes raw inputs: what is made already passes through."""
        if isinstance(inputs, Ticket):
            if isinstance(inputs.inputs, Failure):
                raise self._release.refused(inputs.inputs.text)
            return stock(inputs.raw) if inputs.inputs is None else inputs.inputs
        return inputs if isinstance(inputs, self._release.inputs) else stock(inputs)

    def _materialize(self, raw_mm_inputs: Any) -> Any:
        """What stands in for the stock flag path. Every rank of its group, in the same order."""
        if raw_mm_inputs is None or self._flag is None:
            return None
        if self._is_cheap(raw_mm_inputs):
            (made,) = self._make_all([raw_mm_inputs])
        else:
            (made,) = self._flag.materialize([raw_mm_inputs], self._make_all)
        if isinstance(made, Failure):
            raise self._release.refused(made.text)
        self._release.write_back(raw_mm_inputs, made)
        return made

    def _is_cheap(self, raw: Any) -> bool:
        """Whether every rank makes these inputs itself; from what is the same on all of them, which hold the same."""
        settings = self._settings
        small = not settings.draws_hashes and size_of(raw) < settings.threshold
        return small or self._release.is_hashed(raw)

    # What stands in for the scheduler's own.

    @property
    def _ends(self) -> Shared:
        if self._shared is None:
            raise RuntimeError("a ticket came to a scheduler that shares nothing")
        return self._shared

    @property
    def _borrowed(self) -> TokenizerReader:
        if self._tokenizer is None:
            raise RuntimeError("the tokenizer's ticket came to a scheduler that does not read its memory")
        return self._tokenizer

    def _put(self, name: str, value: Any) -> None:
        self._hidden.setdefault(name, vars(self._scheduler).get(name, _ABSENT))
        setattr(self._scheduler, name, value)

    def _admit(self, writer: Writer) -> Admission:
        release, settings = self._release, self._settings
        make = maker_of_all(release, partial(make_of, release, self._make))

        def make_held(raws: list[Any]) -> list[Any] | None:
            return make(raws) if self._tokenizer is None else self._tokenizer.prepare_all(raws, make)

        return Admission(writer, make_held, workers=settings.workers, max_held_bytes=settings.held_bytes)

    def _put_gate(self, shared: Shared) -> None:
        if shared.admission is None:
            return
        scheduler = self._scheduler
        receive = receive_with(scheduler.recv_from_tokenizer)
        self._gate = gate = Gate(receive, shared.admission, self._release)
        self._put("recv_from_tokenizer", gate)
        # Not where stages follow: under data-parallel attention none of them would be told.
        if not hears_aborts(scheduler) and self._is_one_stage(shared):
            self._hears = gate.hear
        sleep = scheduler.maybe_sleep_on_idle
        # It sleeps on the sockets: nothing would wake it when what is held is ready.
        self._put("maybe_sleep_on_idle", lambda: None if gate.waiting else sleep())

    def _put_settling(self) -> None:
        scheduler = self._scheduler
        if not hasattr(scheduler, "request_receiver"):
            receive = scheduler.recv_requests
            self._put("recv_requests", lambda: self.settle(receive()))
            return
        receiver = scheduler.request_receiver
        if self._gate is not None:
            receiver = replace(receiver, recv_from_tokenizer=self._gate)
        self._put("request_receiver", _Settling(receiver, self.settle))

    def _put_making(self) -> None:
        scheduler = self._scheduler
        stock = scheduler._process_and_broadcast_mm_inputs
        group = flag_group(scheduler)
        if _uses_flag(scheduler) and nodes_of(scheduler) == 1 and group is not None and dist.get_world_size(group) > 1:
            self._flag = _flag_path(group, self._settings)
            stock = self._materialize
        self._put("_process_and_broadcast_mm_inputs", partial(self._take, stock))
        if hasattr(scheduler, "_get_multimodal_inputs"):
            self._put("_get_multimodal_inputs", partial(self._take, scheduler._get_multimodal_inputs))

    def _say(self, shared: Shared | Apart) -> None:
        flag = "" if self._flag is None else f"; flag path: {self._flag.route.value}"
        if isinstance(shared, Shared):
            log.info("SGLang %s: %d ranks share multimodal inputs%s", self._release.version, shared.ranks, flag)
        else:
            log.warning("SGLang %s: requests travel as in stock, %s%s", self._release.version, shared.why, flag)


class _Settling:
    """SGLang's receiver, with tickets settled in what it receives."""

    def __init__(self, receiver: Any, settle: Callable[[Any], Any]) -> None:
        self._receiver = receiver
        self._settle = settle

    def recv_requests(self, *args: Any, **kwargs: Any) -> Any:
        return self._settle(self._receiver.recv_requests(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._receiver, name)


def _flag_path(group: Any, settings: Settings) -> Broadcaster:
    """Collective over `group`."""
    if settings.draws_hashes:  # no two ranks make the same, so that none may make what another one sends
        policy = Policy(route=Route.SHM, fn_keeps_leaves=True, agree=True)
        return Broadcaster(group, capacity=FLAG_CAPACITY, policy=policy, allow=ALLOW)
    # Not by cost: that is measured on this thread, and others hash for it.
    policy = Policy(route=Route.SHM, fn_keeps_leaves=True)
    return Broadcaster(group, control="ring", capacity=FLAG_CAPACITY, policy=policy, allow=ALLOW)


def _uses_flag(scheduler: Any) -> bool:
    """0.5.5 has the path without the flag."""
    if not hasattr(scheduler, "_get_multimodal_inputs"):
        return True
    return bool(getattr(scheduler.server_args, "enable_broadcast_mm_inputs_process", False))
