"""A rank's part of a group of schedulers: how it joins, its planes, their ends and their threads.

Who owns what: a plane's `Writer` belongs to the rank that makes, its `Reader`s to the others; each rank closes its own.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from shmcast._codec import Allow
from shmcast._control import PrivateControl
from shmcast._entry import Entry
from shmcast._follower import Follower
from shmcast._joining import Offer, Settings, attach, join
from shmcast._layout import HEADER_SLOTS
from shmcast._planes import GatherControl, Gathered, RingControl
from shmcast._points import Point
from shmcast._room import default_capacity
from shmcast._sent import describe
from shmcast._workers import Alone, Batch, Plane, Shared, Steward, Work, Worker
from shmcast.errors import ArenaFull, ShmcastError
from shmcast.policy import Route
from shmcast.transport import Reader, Writer

if TYPE_CHECKING:
    from shmcast._control import Control, GroupControl
    from shmcast.metrics import Counters

log = logging.getLogger("shmcast")


class Crew:
    """This rank's planes, their ends, and, once started, their threads."""

    def __init__(self, counters: Counters) -> None:
        """Of a rank that is alone."""
        self._counters = counters
        self._planes: list[list[Plane]] = [[Alone()]]
        self._workers: list[Worker | Steward] = []
        self.threads: frozenset[int | None] = frozenset()
        self.writer: Writer | None = None
        self.readers: list[Reader] = []
        self._sources: list[int] = []
        self.route = Route.LOCAL
        self.src = 0

    def join(self, control: GroupControl, settings: Settings | Exception, *, spread: bool) -> None:
        """Go through both exchanges, with settings or with what is wrong with them. Collective.

        Raises what is wrong here, or `ShmcastError` that says what is wrong on another rank.
        """
        offer = self._offer(control, settings, spread=spread)
        if isinstance(settings, Exception) or isinstance(offer, Exception):
            wrong = offer if isinstance(offer, Exception) else ShmcastError("no settings")
            with suppress(ShmcastError):
                join(control, Offer(wrong=describe(wrong)), lambda _: "")
            raise wrong
        verdict = join(control, offer, lambda offers: self._attach(control, settings, offers))
        self.route, self.src = verdict.route, verdict.src
        if verdict.route is not Route.SHM:
            self._leave_shared_memory(verdict.why)
            return
        self._make_planes(control, settings, verdict.plane, spread=spread)
        if self.writer is not None:
            self.writer.settle()

    def start(self, work: Work) -> None:
        """Start the threads."""
        for planes in self._planes:
            name = f"shmcast-plane-{len(self._workers)}"
            only = planes[0]
            if isinstance(only, Shared) and only.can_help:
                self._workers.append(Steward(only, name, work))
            else:
                self._workers.append(Worker(planes, name, work))
        self.threads = frozenset(worker.thread for worker in self._workers)

    def put(self, batch: Batch) -> None:
        """Hand a batch to the threads that have to do with it."""
        try:
            for worker in self._workers:
                worker.put(batch)
        except BaseException:
            # Ctrl-C between two of them: the others would wait for this rank. A worker takes a batch once.
            for worker in self._workers:
                worker.put(batch)
            raise

    def close(self, wait: float) -> None:
        """End the threads and the ends; `work.ending` is set. Waits at most `wait` seconds for a running `fn`."""
        for worker in self._workers:
            worker.end()
        # A follower that waits for a header of the ring ends now.
        for reader in self.readers:
            reader.close()
        deadline = time.monotonic() + wait
        for worker in self._workers:
            worker.join(deadline)
        if self.writer is not None:
            self.writer.close()
        # With them goes the group, and so the other ranks hear of it.
        self._planes, self._workers = [], []

    # Joining.

    def _offer(self, control: GroupControl, settings: Settings | Exception, *, spread: bool) -> Offer | Exception:
        """What this rank says first, with the address of its writer where it has one; or what is wrong."""
        if isinstance(settings, Exception):
            return settings
        try:
            offer = settings.offer(placement="spread" if spread else "entry")
            if settings.disabled or not (spread or control.rank == settings.src):
                return offer
            self.writer = Writer(
                control.size - 1,
                capacity=settings.capacity or default_capacity(control.size if spread else 1),
                allow=settings.allow,
                policy=settings.policy,
                rank=control.rank,
                slots=HEADER_SLOTS if settings.control == "ring" else 0,
                reached=settings.reached,
            )
        except (ArenaFull, OSError) as error:
            return replace(offer, trouble=describe(error))
        except Exception as error:
            return error
        return replace(offer, address=bytes(self.writer.address).hex())

    def _attach(self, control: GroupControl, settings: Settings, offers: list[Offer]) -> str:
        """Map the segments of every other rank that writes; what went wrong, or nothing."""
        try:
            for src, offer in enumerate(offers):
                if src != control.rank and offer.address:
                    self._sources.append(src)
                    self.readers.append(attach(offer.address, control.rank, src, settings))
            settings.reached(Point.JOINING)
        except Exception as error:
            return describe(error)
        return ""

    def _make_planes(self, control: GroupControl, settings: Settings, plane: int, *, spread: bool) -> None:
        """A plane for each rank that writes, this one's first; a thread for each, or one for all on a group."""
        ends: list[tuple[int, Writer | Reader]] = list(zip(self._sources, self.readers, strict=True))
        if self.writer is not None:
            ends.insert(0, (control.rank, self.writer))
        if settings.control == "group":
            # Only the thread that takes batches uses it, and never the group that was given.
            control = PrivateControl(control.group, f"{plane:x}", settings.timeout)
        gathered = Gathered(control) if spread and isinstance(control, PrivateControl) else None
        planes: list[Plane] = []
        for src, end in ends:
            each: Control
            if settings.control == "ring":
                each = RingControl(control.rank, control.size, settings.timeout, end)
            elif gathered is not None:
                each = GatherControl(gathered)
            else:
                each = control
            each.settle(src, (plane + src) % 2**64)
            planes.append(self._shared(each, settings, end, always=settings.control == "group" and each.leads))
        self._planes = [[each] for each in planes] if settings.control == "ring" else [planes]

    def _shared(self, control: Control, settings: Settings, end: Writer | Reader, *, always: bool) -> Shared:
        policy, allow = settings.policy, Allow(settings.allow)
        made: Entry | Follower
        if isinstance(end, Writer):
            made = Entry(control, end, policy, allow, self._counters, settings.reached)
        else:
            made = Follower(control, end, policy, allow, self._counters, settings.reached)
        return Shared(control, made, policy, always=always)

    def _leave_shared_memory(self, why: str) -> None:
        if self.writer is not None:
            self.writer.close()
        for reader in self.readers:
            reader.close()
        self.writer, self.readers = None, []
        self._counters.fallback("disabled")
        log.warning("this group goes without shared memory (%s instead): %s", self.route.value, why)
