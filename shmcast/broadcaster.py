"""A collective over a CPU group: the entry rank's object on every rank, its bytes through shared memory.

Every call makes exactly one broadcast of a fixed-size header from the entry rank, whatever happens there; `inline` adds
one tensor of the length that the header gives, `agree` one all-reduce. All ranks follow the header, none decides alone
what adds or drops a collective.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast
from weakref import WeakSet

import torch

from shmcast._codec import Allow, encode
from shmcast._control import Control, GroupControl, cpu_group
from shmcast._entry import Entry
from shmcast._follower import Follower
from shmcast._joining import Offer, Settings, Verdict, attach, join, patience
from shmcast._layout import HEADER_SLOTS
from shmcast._planes import RingControl
from shmcast._points import Point, nowhere
from shmcast._sent import attempt, describe
from shmcast._wire import Call, Handle
from shmcast.errors import ArenaFull, ShmcastError, closed_error
from shmcast.metrics import Counters, Stats, merge
from shmcast.multimodal import MultimodalInputs
from shmcast.policy import Policy, Route
from shmcast.transport import Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from shmcast._points import Reached
    from shmcast._segment import Isolation

DEFAULT_TIMEOUT = 30.0

R = TypeVar("R")
T = TypeVar("T")

log = logging.getLogger("shmcast")

_broadcasters: WeakSet[Broadcaster] = WeakSet()


class Broadcaster:
    """One rank's part of a group that shares objects. Every rank of the group makes one, with the same settings.

    The constructor, `broadcast`, `materialize` and `materialize_batch` are collectives: every rank calls them in one
    order, from one thread at a time. Everything else may come from any thread of any one rank.

    Args:
        group: a process group; default the default one. Without a CPU backend a gloo group over its ranks is made.
            A group of one, or no torch.distributed: no shared memory, no collective, `fn` runs here.
        src: the entry rank, a rank of the group (not a global one).
        capacity: the most bytes of shared memory; default `SHMCAST_CAPACITY`, else as for `Writer`.
        isolation, pin: as for `Reader`; may differ between ranks. On the entry rank they mean nothing: its objects are
            its own.
        control: `group`: headers are broadcast over the group. `ring`: they go through shared memory, several times
            sooner; nothing travels inline then, no rank can agree, and a rank that misses a header runs `fn` itself.
            A rank that stays a whole ring (1024 headers) behind loses what it had not opened, handles of `share` too.
        policy: how messages travel. `SHMCAST_INLINE_MAX` replaces its `inline_max`; `SHMCAST_DISABLE=1` on any rank
            keeps the whole group off shared memory.
        allow: classes, or names of packages, whose instances may travel; `shmcast.multimodal` always may.
        timeout: seconds that a rank waits in one collective: more than the longest `fn`.
        reached: as for `Writer`.

    Raises:
        ValueError, TypeError: this rank's arguments or environment are wrong.
        ShmcastError: those of another rank are, which the message names; or the group's collectives fail.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        src: int = 0,
        capacity: int | None = None,
        isolation: Isolation | None = None,
        pin: bool = False,
        control: str = "group",
        policy: Policy | None = None,
        allow: Iterable[type | str] = (),
        timeout: float = DEFAULT_TIMEOUT,
        reached: Reached = nowhere,
    ) -> None:
        self._counters = Counters()
        self._closed = False
        self._pid = os.getpid()
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        self._end: Entry | Follower | None = None
        self._control: Control | None = None
        self._local = False
        self._why = "a group of one needs no shared memory"
        policy = Policy() if policy is None else policy
        settings = Settings(src, capacity, isolation, control, policy, allow, timeout, reached, pin=pin)
        cpu = cpu_group(group)
        if cpu is None:
            settings.check(1)
        else:
            self._control = plane = GroupControl(cpu, patience(timeout, DEFAULT_TIMEOUT))
            try:
                self._join(plane, settings)
            except BaseException:
                self.close()
                raise
        _broadcasters.add(self)

    # Collectives.

    def broadcast(self, obj: T | None = None) -> T:
        """The entry rank's `obj` on every rank; on the others the argument is ignored. Collective.

        Raises, on the entry rank, `EncodeError` for what cannot be flattened; on the others then `MaterializeError`.
        `PeerDied` or `ShmcastError` where the control plane has failed.
        """
        self._check_open()
        if self._control is None:
            return cast("T", obj)
        with self._control.turn(Call.BROADCAST):
            if isinstance(self._end, Entry):
                return cast("T", self._end.broadcast(obj))
            return cast("T", cast("Follower", self._end).broadcast())

    def materialize(self, raw: R, fn: Callable[[R], T] = MultimodalInputs.from_dict) -> T:  # type: ignore[assignment]
        """`fn(raw)`, run once, on the entry rank, and rebuilt on the others. Collective.

        With `Policy(peers_hold_raw=True)` every rank passes its own `raw`, equal in content: what of it is in the
        result travels as references, and a rank for which anything fails runs `fn(raw)` itself. With False the `raw`
        of the others is ignored. `fn` is deterministic and can be run again on the same `raw`, also after it raised.

        Raises what `fn` raises: on every rank that holds `raw`; elsewhere `MaterializeError` with its text.
        """
        self._check_open()
        if self._control is None or self._local:
            return self._counters.timed("materialize")(fn)(raw)
        with self._control.turn(Call.MATERIALIZE):
            return cast("Entry | Follower", self._end).materialize(raw, fn)

    def materialize_batch(
        self,
        raws: Sequence[R],
        fn: Callable[[R], T] = MultimodalInputs.from_dict,  # type: ignore[assignment]
    ) -> list[T | Exception]:
        """`materialize` for several requests under one header: for each its object, or the exception. Collective.

        One bad request fails alone, on every rank. Ranks that hold no raw inputs may pass anything.
        """
        self._check_open()
        if self._control is None or self._local:
            self._counters.observe("batch", len(raws))
            fn = self._counters.timed("materialize")(fn)
            return [attempt(fn, raw) for raw in raws]
        with self._control.turn(Call.BATCH):
            return cast("Entry | Follower", self._end).materialize_batch(raws, fn)

    # One rank alone.

    def share(self, obj: object, *, opens: int = 1) -> Handle:
        """Publish `obj` for every other rank, each of which may open it `opens` times. Entry rank only, no collective.

        Raises as `Writer.publish`; `ArenaFull` also where this group has no shared memory.
        """
        writer = self._check_writer("share")
        with self._counters.timed("publish"):
            encoded = encode(obj, writer.allow)
            handle = writer.put(encoded, opens=opens)
        self._counters.message("shm", encoded.nbytes)
        return handle

    def withdraw(self, handle: Handle) -> None:
        """Take back what will not be opened. Entry rank only."""
        self._check_writer("withdraw").withdraw(handle)

    def open(self, handle: Handle) -> object:
        """What the entry rank shared. Raises as `Reader.open`. Every rank but the entry rank, no collective."""
        reader = self._check_reader("open")
        with self._counters.timed("map"):
            obj, size = reader.fetch(handle)
        self._counters.message("shm", size)
        return obj

    def discard(self, handle: Handle) -> None:
        """Give back what this rank will not open. Every rank but the entry rank."""
        self._check_reader("discard").discard(handle)

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor: in the arena on the entry rank, so that sending it copies nothing; plain elsewhere.

        Raises `ArenaFull`; see `Writer.empty`.
        """
        self._check_open()
        return self._writer.empty(shape, dtype) if self._writer else torch.empty(tuple(shape), dtype=dtype)

    @property
    def route(self) -> Route:
        """What this group agreed on in the constructor: `shm`, or `inline` or `local` where shared memory is out."""
        if self._control is None or self._local:
            return Route.LOCAL
        return Route.SHM if self._writer or self._reader else Route.INLINE

    def stats(self) -> Stats:
        """This rank's counters; on the entry rank memory and leases too."""
        self._check_open()
        own = self._counters.stats()
        end = self._writer or self._reader
        return own if end is None else merge(own, end.stats())

    def close(self) -> None:
        """End this rank's part; no collective. Tensors that live stay valid."""
        self._closed = True
        if self._writer is not None:
            self._writer.close()
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> Broadcaster:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Joining.

    def _join(self, control: GroupControl, settings: Settings) -> None:
        """Every rank goes through both exchanges, whatever its arguments; the first to be wrong is named on all."""
        wrong: Exception | None = None
        try:
            settings = settings.check(control.size)
            offer = self._offer(control, settings)
        except Exception as error:
            wrong = error
            offer = Offer(wrong=describe(error))
        try:
            verdict = join(control, offer, lambda offers: self._attach(control, settings, offers))
        except ShmcastError:
            if wrong is not None:
                raise wrong from None
            raise
        self._local = verdict.route is Route.LOCAL
        self._why = verdict.why
        if verdict.route is not Route.SHM:
            self._leave_shared_memory(verdict)
        elif self._writer is not None:
            self._writer.settle()
        policy = replace(
            settings.policy,
            peers_hold_raw=verdict.holds_raw,
            agree=verdict.agree,
            route=Route.AUTO if verdict.route is Route.INLINE else settings.policy.route,
        )
        end = self._writer or self._reader
        if settings.control == "ring" and end is not None:
            self._control = ring = RingControl(control.rank, control.size, settings.timeout, end)
            ring.settle(verdict.src, verdict.plane)
        control.settle(verdict.src, verdict.plane)
        allow = Allow(settings.allow)
        if control.leads:
            self._end = Entry(self._control or control, self._writer, policy, allow, self._counters, settings.reached)
        else:
            self._end = Follower(
                self._control or control, self._reader, policy, allow, self._counters, settings.reached
            )

    def _offer(self, control: GroupControl, settings: Settings) -> Offer:
        offer = settings.offer()
        if settings.disabled or control.rank != settings.src:
            return offer
        try:
            self._writer = Writer(
                control.size - 1,
                capacity=settings.capacity,
                allow=settings.allow,
                policy=settings.policy,
                rank=control.rank,
                slots=HEADER_SLOTS if settings.control == "ring" else 0,
                reached=settings.reached,
            )
        except ValueError:
            raise
        except Exception as error:
            return replace(offer, trouble=describe(error))
        return replace(offer, address=bytes(self._writer.address).hex())

    def _attach(self, control: GroupControl, settings: Settings, offers: list[Offer]) -> str:
        """Map the entry rank's segments; what went wrong, or nothing."""
        try:
            src = offers[0].src
            if control.rank != src:
                self._reader = attach(offers[src].address, control.rank, src, settings)
            settings.reached(Point.JOINING)
        except Exception as error:
            return describe(error)
        return ""

    def _leave_shared_memory(self, verdict: Verdict) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._reader is not None:
            self._reader.close()
        self._writer = self._reader = None
        self._counters.fallback("disabled")
        log.warning("this group goes without shared memory (%s instead): %s", verdict.route.value, verdict.why)

    # Misuse.

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error("this Broadcaster", self._pid)

    def _check_writer(self, call: str) -> Writer:
        self._check_open()
        if self._writer is None:
            if self._control is not None and not self._control.leads:
                raise ShmcastError(
                    f"{call}() is for the entry rank, rank {self._control.src}, not {self._control.rank}"
                )
            raise ArenaFull(f"{call}(): no shared memory here: {self._why}")
        return self._writer

    def _check_reader(self, call: str) -> Reader:
        self._check_open()
        if self._reader is None:
            if self._control is not None and self._control.leads:
                raise ShmcastError(
                    f"{call}() is for the other ranks: rank {self._control.rank} shares, and has the object"
                )
            raise ShmcastError(f"{call}(): no shared memory here: {self._why}")
        return self._reader


def _forget() -> None:
    for broadcaster in list(_broadcasters):
        broadcaster._closed = True


os.register_at_fork(after_in_child=_forget)
