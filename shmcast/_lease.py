"""The reader's memory: the writer's segments mapped, its leases, and the one thread that gives them back.

A lease is held by the decode until it ends, and by each exporter: a numpy array over the mapping that one storage sits
on. Views, slices, `detach()`, `numpy()`, parameters all keep the exporter; a finalizer on a tensor would fire early.
Finalizers run in any thread, under any lock, so they only put the lease in a queue and post a semaphore.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING
from weakref import WeakSet, finalize, ref

import numpy as np
import posix_ipc
import torch
from torch import Tensor

from shmcast import _layout, _segment, _threads
from shmcast._cuda import Pins
from shmcast._headers import HeaderReader
from shmcast._held import Hold, Lease, Opened, Place
from shmcast._layout import (
    BLOCK,
    MAX_SEGMENTS,
    NEVER,
    PAGE,
    RING_ENTRIES,
    RING_HEAD,
    WORD,
    BlockKind,
    Descriptor,
    EntryKind,
    Kind,
    SegmentHeader,
    Stale,
    check_block,
    check_descriptor,
    parse_block,
    round_up,
)
from shmcast._named import open_semaphore
from shmcast._pages import MADV_POPULATE_READ, PrivatePages, populate
from shmcast._peers import WRITER_BYTE, Seat, is_taken
from shmcast._points import Point, nowhere
from shmcast._ring import Outbox, acquire_all, fence, introduce, wait
from shmcast._wire import foreign
from shmcast.errors import LayoutError, ShmcastError, StaleHandle, closed_error

if TYPE_CHECKING:
    from shmcast._points import Reached
    from shmcast._segment import Isolation, Segment
    from shmcast._wire import Address, Handle

COPY_BELOW = 64 << 10
FULL_RING_PAUSE = 0.01

log = logging.getLogger("shmcast")

_live: WeakSet[Leases] = WeakSet()


class Leases:
    """Reader `index` of the writer at `address`; safe to use from any thread."""

    def __init__(
        self, address: Address, index: int, isolation: Isolation, reached: Reached = nowhere, *, pin: bool = False
    ) -> None:
        self._address = address
        self._isolation: Isolation = isolation
        self._reached = reached
        self._lock = threading.RLock()
        self._ended: SimpleQueue[Lease] = SimpleQueue()
        self._held: set[Lease] = set()
        self._shared: dict[tuple[int, int], Lease] = {}
        self._opened: dict[tuple[int, int], tuple[int, int]] = {}
        self._segments: list[Segment | None] = []
        self._unsent: deque[tuple[EntryKind, int]] = deque()
        self._floor = 0
        self._closing = self._left = False
        self.index = index
        self.inherited = False
        self._pid = os.getpid()
        with ExitStack() as undo:
            self._ring = self._take_index()
            undo.callback(self._ring.drop)
            self._seat = self._take_seat()
            undo.callback(self._seat.release)
            self._posted = open_semaphore(address.posted(index))
            undo.callback(self._posted.close)
            self._wake = open_semaphore(address.wake(index))
            undo.callback(self._wake.close)
            self._headers: HeaderReader | None = None
            if self._ring.header.slots:
                self._headers = self._join_headers()
                undo.callback(self._headers.close)
            self._outbox = Outbox(self._ring.map, self._ring.header.entries, self._posted, reached)
            self._pages = PrivatePages()
            undo.callback(self._pages.close)
            undo.callback(self._drop_segments)
            self._pins = Pins() if pin else None
            if self._pins is not None:
                undo.callback(self._pins.close)
            self._map_new(first=True)
            thread = threading.Thread(target=self._serve, name=f"shmcast-reader-{index}", daemon=True)
            _live.add(self)
            _threads.start(thread)
            self._undo = undo.pop_all()

    # Opening.

    def open(self, handle: Handle) -> Opened:
        """Take the next of this reader's leases on `handle` and find its bytes.

        Raises `StaleHandle`, `LayoutError` for bytes that are not what they claim, `ClosedError`.
        """
        hold = self._take(handle)
        try:
            lease = hold.lease
            self._reached(Point.TAKEN)
            # The writer finds our OPENED, or we find its mark (withdraw) or our floor raised (revoke).
            fence()
            if lease.ticket < self._revoked():
                raise StaleHandle(
                    f"{self}: too late for {handle.where}: its writer has taken it back; take headers sooner"
                )
            message = _layout.parse_message(self._view(handle.where, lease), handle.where.generation)
            for listed in message.blocks:
                parse_block(self._view(listed, lease), listed.generation, BlockKind.PAYLOAD)
            places = [lease.places[where] for where in (handle.where, *message.blocks)]
            pieces = tuple(self._tensor(places[at], offset, length, lease) for at, offset, length in message.pieces)
            return Opened(hold, message.stream, pieces)
        except BaseException as error:
            hold.end()
            if isinstance(error, Stale):
                raise self._stale(handle.where, error) from None
            raise

    def headers(self) -> HeaderReader:
        """This reader's end of the header ring; `LayoutError` where its writer has none."""
        self._check_inherited()
        if self._headers is None:
            raise LayoutError(f"{self}: its writer posts no headers: make it with Writer(slots=...)")
        return self._headers

    def discard(self, handle: Handle) -> None:
        """Give back every lease on `handle` that this reader has not opened."""
        self._check_inherited()
        with suppress(StaleHandle), self._lock:
            self._look(handle)
            while True:
                self._post_later(EntryKind.RELEASED, self._next_ticket(handle))

    def discard_below(self, handle: Handle) -> None:
        """Give back every lease granted up to `handle` and not opened, whatever they are."""
        self._check_inherited()
        below = handle.ticket_of(self._address.readers, 0)
        with self._lock:
            self._check_open()
            self._floor = max(self._floor, below)
            self._post_later(EntryKind.DISCARDED, below)

    def was_revoked(self, handle: Handle) -> bool:
        """Whether the writer has taken this reader's leases on `handle` back: it was too late."""
        with self._lock:
            return not self._closing and handle.ticket_of(self.index, 0) < self._revoked()

    def report(self, segment: int) -> None:
        """Have the writer use a segment no more."""
        with self._lock:
            if not self._closing:
                self._post_later(EntryKind.BAD, segment)

    def tell(self, reason: int, count: int) -> None:
        """Show how often this rank fell back for the reason of this number. From any thread, a signal handler too."""
        if not self.inherited:
            self._outbox.tell(reason, count)

    def writer_lives(self) -> bool:
        """Whether the writer still holds its lock."""
        return self._ring.fd >= 0 and is_taken(self._ring.fd, WRITER_BYTE)

    def held(self) -> int:
        """How many leases this reader holds."""
        self._check_inherited()
        with self._lock:
            return len(self._held)

    def close(self) -> None:
        """Open nothing more, give back what was not opened; what is held stays valid and is given back when it ends."""
        if self.inherited:
            return
        with self._lock:
            self._closing = True
            if self._left:
                return
            self._reached(Point.LEAVING)
            self._post_later(EntryKind.DISCARDED, NEVER)
            self._left = True
        if self._headers is not None:
            self._headers.close()

    # Finding bytes.

    def _take(self, handle: Handle) -> Hold:
        """Take the next lease on `handle` and say so.

        All under the lock: an OPENED that came after the DISCARDED of `close` would name a ticket that the writer has
        taken back by then.
        """
        self._check_inherited()
        with self._lock:
            self._look(handle)
            lease = Lease(self._next_ticket(handle))
            self._held.add(lease)
            hold = Hold(lease, self._end_decode)
            if not self._outbox.post(EntryKind.OPENED, lease.ticket):
                raise ShmcastError(
                    f"{self}: its writer has not looked at {RING_ENTRIES - 1} entries: it is stopped, or idle"
                )
            return hold

    def _look(self, handle: Handle) -> None:
        """A handle that is stale already must cost no entry in the ring (L7): look before the ticket is taken."""
        self._check_open()
        if handle.token != self._address.token or handle.rank != self._address.rank:
            raise LayoutError(foreign(handle, self._address, "open or discard"))
        self._head(handle.where)

    def _head(self, where: Descriptor) -> bytes:
        """The block's header as the writer sees it, whatever this process has written to its own pages."""
        head = os.pread(self._segment(where).fd, BLOCK.size, where.offset)
        try:
            check_block(head, where.generation, where.length)
        except Stale as error:
            raise self._stale(where, error) from None
        return head

    def __str__(self) -> str:
        return f"reader {self.index} of the writer of rank {self._address.rank}"

    def _stale(self, where: Descriptor, error: Stale) -> StaleHandle:
        return StaleHandle(f"{self}: {where}: {error}: have it published again")

    def _revoked(self) -> int:
        """The first ticket that was not taken back from this reader."""
        header = self._ring.header
        if not header.slots:
            return 0
        raw = os.pread(
            self._ring.fd, _layout.LONG.size, _layout.floor_offset(header.readers, header.entries, self.index)
        )
        return int(_layout.LONG.unpack(raw)[0])

    def _check_inherited(self) -> None:
        """A forked child takes no lock: a thread that is not here may have held it."""
        if self.inherited:
            raise closed_error(str(self), self._pid)

    def _check_open(self) -> None:
        if self._closing:
            raise closed_error(str(self), self._pid)

    def _next_ticket(self, handle: Handle) -> int:
        if not handle.readers >> self.index & 1:
            raise StaleHandle(
                f"{self}: the message is not for reader {self.index}: publish it with readers=[{self.index}, ...]"
            )
        place = handle.where.segment, handle.where.offset
        # Tickets at one place only grow: a place is used again when every lease on its last use has ended.
        base, opened = self._opened.get(place, (0, 0))
        if handle.ticket > base:
            base, opened = handle.ticket, 0
        if handle.ticket < max(base, self._floor) or opened >= handle.opens:
            used = f"{self} has used up its {handle.opens} leases on {handle.where}"
            raise StaleHandle(f"{used}, opened or discarded: publish it with more opens")
        self._opened[place] = base, opened + 1
        return handle.ticket_of(self.index, opened)

    def _view(self, where: Descriptor, lease: Lease) -> memoryview:
        """The block at `where` in the mapping that this lease reads, known to be in the use that is meant."""
        place = lease.places.get(where) or self._place(where, lease)
        lease.places[where] = place
        view = memoryview(place.mapping)[place.offset : place.offset + where.length]
        if where in lease.shared and view[: BLOCK.size] != self._head(where):
            # Pages that were locked (mlockall) while the block was free are stale copies.
            self._drop(where)
        return view

    def _place(self, where: Descriptor, lease: Lease) -> Place:
        segment = self._segment(where)
        if self._isolation != "cow":
            return Place(segment.map, where.offset)
        with self._lock:
            if (where.segment, where.offset) in self._shared:
                self._settle()
            if self._shared.setdefault((where.segment, where.offset), lease) is lease:
                lease.shared.append(where)
                return Place(segment.map, where.offset)
        # An earlier open of this block is held, and may have been written to: this one gets pages of its own.
        return Place(segment.map_block(where.offset, round_up(where.length, PAGE)), 0)

    def _segment(self, where: Descriptor) -> Segment:
        check_descriptor(where)
        if where.segment >= len(self._segments):
            self._map_new()
        segment = self._segments[where.segment] if where.segment < len(self._segments) else None
        if segment is None or where.offset + round_up(where.length, PAGE) > segment.header.size:
            raise LayoutError(f"{self}: {where}: no such segment is mapped here; the warnings of this logger say why")
        return segment

    def _tensor(self, place: Place, offset: int, length: int, lease: Lease) -> Tensor:
        """`length` bytes as a 1-D uint8 tensor: over the mapping, or for few bytes a copy that pins nothing."""
        start = place.offset + offset
        if length < COPY_BELOW:
            return torch.frombuffer(bytearray(place.mapping[start : start + length]), dtype=torch.uint8)
        exporter = np.frombuffer(place.mapping, np.uint8, length, start)
        lease.exporters += 1
        lease.exporter = ref(exporter)
        finalize(exporter, self._end, lease).atexit = False
        return torch.frombuffer(exporter, dtype=torch.uint8)

    # Giving back.

    def _end(self, lease: Lease) -> None:
        """One holder of the lease is gone. Runs in finalizers: any thread, any lock held."""
        if not self.inherited:
            self._ended.put(lease)
            self._rouse()

    def _end_decode(self, lease: Lease) -> None:
        """The decode holds the lease no more. While an exporter lives, its end will wake the thread, not this one."""
        if not self.inherited:
            self._ended.put(lease)
            if lease.exporter is None or lease.exporter() is None:
                self._rouse()

    def _rouse(self) -> None:
        """Wake the thread; it may have seen the last lease in the queue, ended, and closed the semaphore by now."""
        with suppress(OSError, ValueError, posix_ipc.Error):
            self._wake.release()

    def _settle(self) -> None:
        """Release every lease whose holders are all gone. Runs under the lock."""
        with suppress(Empty):
            while True:
                lease = self._ended.get_nowait()
                lease.ends += 1
                if lease.ends == lease.exporters + 1:
                    self._release(lease)

    def _release(self, lease: Lease) -> None:
        clean = [self._drop(where) for where in lease.shared]
        if not all(clean):
            # A page that cannot be dropped would show the next message stale bytes: this place is never given back.
            pages = ", ".join(map(str, lease.shared))
            log.warning("%s: %s cannot be dropped, and stay taken: lock no received tensors", self, pages)
            return
        self._reached(Point.RELEASING)
        for where in lease.shared:
            self._shared.pop((where.segment, where.offset), None)
        self._held.discard(lease)
        self._unsent.append((EntryKind.RELEASED, lease.ticket))

    def _post_later(self, kind: EntryKind, value: int) -> None:
        self._unsent.append((kind, value))
        self._wake.release()

    def _send(self) -> bool:
        """Post what waits for room in the ring; False where some still does. Runs under the lock."""
        while self._unsent and self._outbox.post(*self._unsent[0]):
            self._unsent.popleft()
        return not self._unsent

    def _drop(self, where: Descriptor) -> bool:
        segment = self._segment(where)
        return self._pages.drop(segment.address + where.offset, round_up(where.length, PAGE))

    def _serve(self) -> None:
        """The reader's one thread: sleeps until a lease ended, the writer grew, or `close`."""
        while True:
            wait(self._wake)
            acquire_all(self._wake)
            with suppress(OSError):  # the next to wake this thread, or to open a message there, has it look again
                self._map_new()
            with self._lock:
                self._settle()
                sent = self._send()
                if self._closing and not self._held and (sent or not self.writer_lives()):
                    break
            while not sent and self.writer_lives():
                # The ring is full, which takes a writer that publishes nothing: its next publish makes room.
                time.sleep(FULL_RING_PAUSE)
                with self._lock:
                    sent = self._send()
        self._dismantle()

    # Segments.

    def _take_index(self) -> Segment:
        """Map this reader's own ring, and nobody else's."""
        expected = SegmentHeader(Kind.CONTROL, self._address.token, self._address.rank, 0, 0, self._address.readers)
        if not 0 <= self.index < self._address.readers:
            raise ValueError(f"index={self.index}: the writer serves readers 0 to {self._address.readers - 1}")
        return _segment.attach_ring(self._address.control, expected, self.index)

    def _take_seat(self) -> Seat:
        once = "an index is used once, so take another, or a new writer"
        try:
            seat = Seat(self._ring.fd, self.index)
        except BlockingIOError:
            raise StaleHandle(f"{self} is alive in another process, or in this one: {once}") from None
        try:
            if RING_HEAD.unpack_from(self._ring.map)[0]:
                raise StaleHandle(f"{self} was there before, and has been closed or has died: {once}")
            self._reached(Point.SEATED)
            introduce(self._ring.map)
        except BaseException:
            seat.release()
            raise
        return seat

    def _join_headers(self) -> HeaderReader:
        header = self._ring.header
        with ExitStack() as undo:
            ready = open_semaphore(self._address.ready(self.index))
            undo.callback(ready.close)
            # A descriptor of its own: another thread may be in `receive` while this reader is dismantled.
            fd = os.dup(self._ring.fd)
            undo.pop_all()
        return HeaderReader(fd, _layout.slots_offset(header.readers, header.entries), header.slots, ready)

    def _map_new(self, *, first: bool = False) -> None:
        """Map the segments that the writer has made since, and tell it; the first ones must succeed."""
        with self._lock:
            known = len(self._segments)
            (count,) = WORD.unpack(os.pread(self._ring.fd, WORD.size, _layout.SEGMENTS_OFFSET))
            for number in range(known, min(count, MAX_SEGMENTS)):
                segment = self._attach(number, first=first)
                self._segments.append(segment)
                self._unsent.append((EntryKind.MAPPED if segment else EntryKind.BAD, number))
                self._reached(Point.MAPPED)
            self._send()
            new = self._segments[known:]
        for segment in new:
            if segment is not None:
                populate(segment.map, MADV_POPULATE_READ)
                if self._pins is not None:
                    self._pins.add(segment.address, segment.header.size)

    def _attach(self, number: int, *, first: bool) -> Segment | None:
        expected = SegmentHeader(Kind.ARENA, self._address.token, self._address.rank, number, 0)
        try:
            return _segment.attach(self._address.segment(number), expected, self._isolation)
        except (ShmcastError, OSError) as error:
            if first:
                raise
            log.warning("%s cannot map segment %d, which is used no more: %s", self, number, error)
            return None

    def _dismantle(self) -> None:
        with self._lock:
            self._outbox.close()
            self._undo.close()

    def _drop_segments(self) -> None:
        for segment in self._segments:
            if segment is not None:
                segment.drop()
        self._segments.clear()


def _forget() -> None:
    for leases in list(_live):
        leases.inherited = True


os.register_at_fork(after_in_child=_forget)
