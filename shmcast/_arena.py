"""The writer's memory: its control segment, its arena segments, what its readers say, who holds what.

Owner: the writer creates every segment and semaphore, and unlinks every name as soon as each reader that lives has
mapped it. Readers die, leave or never come; what they hold comes back when the kernel says that their lock is free.
"""

from __future__ import annotations

import secrets
import threading
import time
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING

from shmcast import _layout, _segment
from shmcast._blocks import Block, Blocks
from shmcast._cache import Cache
from shmcast._headers import HeaderWriter
from shmcast._layout import MAX_SEGMENTS, NEVER, PAGE, RING_ENTRIES, EntryKind, Kind, SegmentHeader
from shmcast._names import Names
from shmcast._news import News
from shmcast._peers import WRITER_BYTE, Seat, is_taken
from shmcast._points import Point, nowhere
from shmcast._ring import Inbox, Peer, fence
from shmcast._room import default_capacity
from shmcast._segment import STEP, Segment
from shmcast._tickets import Held, Tickets, explain
from shmcast._turn import Reentered, Turn
from shmcast._wire import Address, Handle, foreign
from shmcast.errors import ArenaFull, ClosedError, LayoutError

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable, Hashable, Iterable

    from shmcast._points import Reached


class Arena:
    """Blocks in shared memory for `readers` readers; safe to use from any thread."""

    def __init__(
        self,
        readers: int,
        capacity: int | None,
        rank: int,
        clock: Callable[[], float] = time.monotonic,
        slots: int = 0,
        cache_bytes: int = 0,
        reached: Reached = nowhere,
    ) -> None:
        """Raises `ArenaFull` where there is no shared memory to be had, `OSError` where the system refuses it.

        `slots`: of the header ring, a power of two; 0 for none. `cache_bytes`: what the cache may keep.
        """
        self.address = Address(secrets.token_bytes(_layout.TOKEN_BYTES), rank, readers)
        self.capacity = default_capacity() if capacity is None else capacity
        self.clock = clock
        self.reached = reached
        self._lock = Turn()
        self._growing = Turn()
        self._stop = threading.Event()
        self._blocks = Blocks()
        self._tickets = Tickets(readers)
        self._cache = Cache(cache_bytes)
        self._expired: SimpleQueue[Block] = SimpleQueue()
        self._withdrawn: SimpleQueue[Handle] = SimpleQueue()
        self._segments: list[Segment] = []
        self._retired: set[int] = set()
        self._names = Names(self.drain, self._stop, reached)
        self._slots = slots
        self.headers: HeaderWriter | None = None
        self._floors = [0] * readers
        self._lagging: dict[int, int] = {}
        self._hopeless = False
        self.news = News(self._write_board, _layout.board_offset(readers, RING_ENTRIES, slots), self.capacity, clock)
        self._control = self._create_control(readers)
        self._seat: Seat | None = None
        self._peers: tuple[Peer, ...] = ()
        try:
            self._seat = Seat(self._control.fd, WRITER_BYTE)
            for i in range(readers):
                self._peers += (self._create_peer(i),)
                reached(Point.CREATED)
            if slots:
                self.headers = self._make_headers()
            self._add_segment(min(self.capacity, STEP))
            self._write_board()
            self._names.watch()
        except BaseException:
            self.close()
            raise

    # Memory.

    def mapping(self, block: Block) -> mmap.mmap:
        """What a block lies in."""
        with self._lock.free():
            self._check_open()
            return self._segments[block.segment].map

    def reserve(self, length: int, wait: float, readers: Iterable[int] = (), opens: int = 0) -> Block:
        """A block of `length` bytes with one claim, once each of `readers` can be given `opens` tickets.

        In this order: drain what readers have released, grow, take back what the dead hold, give up what only the
        cache holds, wait, take back what readers hold that have taken no header in that time. `ArenaFull` then. With a
        header ring one wait is enough: until a lease comes back, nothing waits again.
        """
        readers = tuple(readers)
        block = self._try(length, readers, opens)
        if block is not None:
            return block
        trouble = self._tickets.crowded(readers, opens) or self._grow(length)
        before = self.headers.taken() if self.headers else {}
        self._revoke_laggards(self._lagging)
        deadline = time.monotonic() + (0.0 if self._hopeless else wait)
        pause = 0.0
        while True:
            self.reclaim()
            # After growth, or a cache would never outgrow the first segment; but nothing waits while it idles there.
            block = self._try(length, readers, opens, True)
            if block is not None:
                return block
            left = deadline - time.monotonic()
            if left <= 0 and not (pause and self._revoke_laggards(before)):
                self._hopeless |= self.headers is not None and wait > 0
                raise ArenaFull(explain(length, wait, self.address.rank, self.held(), self.usage(), trouble))
            time.sleep(max(0.0, min(pause, left)))
            pause = min(2 * pause + 1e-5, 2e-3)

    def free(self, *blocks: Block) -> None:
        """Give up a claim on each."""
        with self._lock.free():
            for block in blocks:
                self._blocks.unclaim(block)

    def expire(self, block: Block) -> None:
        """Give up a claim from a finalizer: only noted, done at the next reserve."""
        self._expired.put(block)

    def find(self, key: Hashable) -> Block | None:
        """The block that is kept under `key`, with one claim more."""
        with self._lock.free():
            self._check_open()
            block = self._cache.find(key)
            if block is None or not self._blocks.usable(block.segment):
                return None
            block.claims += 1
            return block

    def keep(self, key: Hashable, block: Block | None) -> None:
        """Have the cache claim a block that is complete, in place of what it keeps under `key`; or nothing there."""
        with self._lock.free():
            if block is not None:
                block.claims += 1
            self._unclaim(self._cache.drop(key) if block is None else self._cache.add(key, block))

    # Leases.

    def is_leased(self, block: Block) -> bool:
        """Whether anybody but the writer's own storage claims the block."""
        with self._lock.free():
            self._drain()
            return block.claims > 1

    def grant(self, message: Block, listed: Iterable[Block], readers: Iterable[int], opens: int) -> Handle:
        """Give each of `readers` `opens` leases on a message that is complete."""
        blocks = (message, *listed)
        self.news.stir()
        with self._lock.free():
            self._check_open()
            for block in blocks[1:]:
                _layout.stamp_payload(self._segments[block.segment].map, block.offset)
            readers = [reader for reader in readers if self._peers[reader].listens]
            base, given = self._tickets.grant(blocks, readers, opens, self.clock())
            for block in blocks:
                block.claims += given
        mask = sum(1 << reader for reader in readers)
        return Handle(self.address.token, self.address.rank, message.where, base, mask, opens)

    def withdraw(self, handle: Handle) -> None:
        """Take back the leases of `handle` that no reader has opened; nothing happens where none is left."""
        if (handle.token, handle.rank) != (self.address.token, self.address.rank):
            raise LayoutError(foreign(handle, self.address, "withdraw"))
        try:
            with self._lock.free():
                self._withdraw(handle)
        except Reentered:
            # From a finalizer: noted, and done at the next call.
            self._withdrawn.put(handle)

    def _withdraw(self, handle: Handle) -> None:
        if self._stop.is_set():
            return
        block = self._blocks.at(handle.where.segment, handle.where.offset)
        if block is None or block.where != handle.where or not self._tickets.alive(handle.ticket, handle.opens):
            return
        # 1. The mark is stored.  2. A full fence.  3. Tickets whose OPENED is in no ring by now are taken back.
        # A reader posts OPENED, fences, and then looks for the mark: one of us sees the other, so that nobody
        # reads a block that came free.
        _layout.mark_withdrawn(self._segments[block.segment].map, block.offset)
        fence()
        self._read_all()
        self._unclaim(self._tickets.withdrawn(handle.ticket, handle.opens))

    def _make_headers(self) -> HeaderWriter:
        base = _layout.slots_offset(self.address.readers, RING_ENTRIES)
        ready = [peer.ready for peer in self._peers if peer.ready is not None]
        return HeaderWriter(self._control.map, base, self._slots, ready, self, self.reached)

    def listening(self) -> list[int]:
        """The readers that can still open what is published, as far as `reclaim` knows."""
        with self._lock.free():
            self._check_open()
            return [reader for reader, peer in enumerate(self._peers) if peer.listens]

    def still_listening(self) -> list[int]:
        """The same, after `reclaim`."""
        self.reclaim()
        return self.listening()

    def granted(self) -> int:
        """The first ticket that was not granted yet."""
        return self._tickets.next

    def _revoke_laggards(self, before: dict[int, int]) -> bool:
        """Take back what readers have not opened that have headers to take and took none since `before`; if any did."""
        now = self.headers.taken() if self.headers else {}
        lagging = {reader: taken for reader, taken in before.items() if now.get(reader) == taken}
        for reader in lagging:
            self.revoke(reader, self._tickets.next)
        revoked = lagging.keys() - self._lagging.keys()
        self._lagging = lagging
        return bool(revoked)

    def revoke(self, reader: int, below: int) -> None:
        """Take back every ticket of `reader` under `below` that it has not opened, for good (L9)."""
        with self._lock.free():
            self._check_open()
            # A floor that went down would let a reader open what was given out again.
            self._floors[reader] = below = max(below, self._floors[reader])
            # As in withdraw: the floor is stored, a full fence, then tickets whose OPENED is in no ring by now.
            _layout.write_long(
                self._control.map, _layout.floor_offset(self.address.readers, RING_ENTRIES, reader), below
            )
            fence()
            self._read_all()
            self._unclaim(self._tickets.discarded(reader, below))

    def drain(self) -> None:
        """Read what readers have told, and unlink what all of them have mapped."""
        with self._lock.free():
            self._drain()
            self._update_segments()

    def reclaim(self) -> None:
        """Take back everything that dead readers hold."""
        with self._lock.free():
            self._drain()
            for i, peer in enumerate(self._peers):
                if not peer.dead and self._lost(i, peer):
                    # It may have posted between our drain and its death.
                    self._read(i, peer)
                    peer.dead = True
                    self._unclaim(self._tickets.died(i))
            self._update_segments()

    # State.

    def held(self) -> tuple[Held, ...]:
        """What each reader holds."""
        with self._lock.free():
            return tuple(self._tickets.held(i) for i in range(len(self._peers)))

    def alive(self) -> tuple[bool | None, ...]:
        """For each reader: True, False once it died or left, None while it has not come."""
        with self._lock.free():
            return tuple(
                False if not peer.listens else is_taken(self._control.fd, i) if peer.inbox.taken() else None
                for i, peer in enumerate(self._peers)
            )

    def died(self) -> tuple[int, ...]:
        """The readers that died, as far as `reclaim` knows; not those that left."""
        return tuple(i for i, peer in enumerate(self._peers) if peer.dead and not peer.left)

    def usage(self) -> tuple[int, int, int, int]:
        """Live blocks, free bytes, largest free block, bytes of all segments."""
        with self._lock.free():
            return self._blocks.usage

    @property
    def named(self) -> int:
        """How many segments still have a name in /dev/shm."""
        return len(self._names)

    def _write_board(self) -> None:
        """Tell whoever looks on how things stand."""
        self.news.take()
        with self._lock.free():
            if self._control.fd >= 0:
                rows = [(self._tickets.held(i), peer.inbox.heard) for i, peer in enumerate(self._peers)]
                self.news.post(self._control.map, self._stop.is_set(), self._tickets.next, self._blocks.usage, rows)

    def close(self) -> None:
        """Unlink what still has a name, give up the lock; what readers have mapped stays with them."""
        self._stop.set()
        self.news.close()
        self._write_board()
        with self._lock.free():
            self._names.unlink_all()
            if self._seat is not None:
                self._seat.release()
            for segment in (self._control, *self._segments):
                segment.drop()
            for peer in self._peers:
                peer.close()
            self._peers = ()
            self._segments.clear()

    # Creation and growth.

    def _create_control(self, readers: int) -> Segment:
        size = _layout.control_size(readers, RING_ENTRIES, self._slots)
        header = SegmentHeader(
            Kind.CONTROL, self.address.token, self.address.rank, 0, size, readers, RING_ENTRIES, self._slots
        )
        segment = _segment.create(self.address.control, header)
        self._names.add(segment)
        return segment

    def _create_peer(self, reader: int) -> Peer:
        names = [self.address.posted(reader), self.address.wake(reader)]
        if self._slots:
            names.append(self.address.ready(reader))
        with ExitStack() as undo:
            made = []
            for name in names:
                made.append(self._names.semaphore(name))
                undo.callback(made[-1].close)
            undo.pop_all()
        base = _layout.ring_offset(reader, RING_ENTRIES)
        return Peer(Inbox(self._control.map, base, RING_ENTRIES, made[0]), made[1], made[2] if self._slots else None)

    def _add_segment(self, size: int) -> None:
        number = len(self._segments)
        size = max(2 * PAGE, size // PAGE * PAGE)
        header = SegmentHeader(Kind.ARENA, self.address.token, self.address.rank, number, size)
        segment = _segment.create(self.address.segment(number), header)
        try:
            self.reached(Point.GROWN)
        except BaseException:
            segment.unlink()
            segment.drop()
            raise
        with self._lock.free():
            self._segments.append(segment)
            self._names.add(segment)
            self._blocks.add(number, size, usable=number == 0)
            _layout.write_word(self._control.map, _layout.SEGMENTS_OFFSET, number + 1)
            self._update_segments()

    def _grow(self, length: int) -> str:
        """Add a segment that `length` bytes fit in, unless one is on its way; else why not."""
        with self._growing.free():
            with self._lock.free():
                pending = [
                    segment.header.number
                    for segment in self._segments
                    if segment.header.number not in self._retired
                    and not self._blocks.usable(segment.header.number)
                    and segment.header.size - PAGE >= length
                ]
                total = self._blocks.total
            if pending:
                return self._awaited(pending[0])
            need = PAGE + _layout.round_up(length, PAGE)
            # Room for two: while readers still hold one message of this size, the next one is under way.
            size = min(max(_layout.round_up(2 * need, STEP), _layout.round_up(total // 2, STEP)), self.capacity - total)
            if size < need or len(self._segments) == MAX_SEGMENTS:
                return f"the capacity of {self.capacity} bytes is used up: raise it, or have less held at a time"
            try:
                self._add_segment(size)
            except (ArenaFull, OSError) as error:
                return str(error)
            for peer in self._peers:
                with suppress(OSError):
                    peer.wake.release()
            self._names.watch()
            return self._awaited(len(self._segments) - 1)

    def _awaited(self, number: int) -> str:
        late = [i for i, peer in enumerate(self._peers) if peer.mapped and peer.listens and number not in peer.mapped]
        return f"new segment {number} waits for readers {late} to map it: look whether they are stopped or starved"

    # What readers say. All of these run under the lock.

    def _try(self, length: int, readers: tuple[int, ...], opens: int, evict: bool = False) -> Block | None:
        with self._lock.free():
            self._check_open()
            self._drain()
            if not self._tickets.room(readers, opens):
                return None
            return self._blocks.allocate(length, self._cache.evict if evict else list)

    def _lost(self, reader: int, peer: Peer) -> bool:
        """Whether a reader that came is gone. It locks, then says `taken`; asked twice: processors reorder."""
        if not peer.inbox.taken() or is_taken(self._control.fd, reader):
            return False
        fence()
        return not is_taken(self._control.fd, reader)

    def _check_open(self) -> None:
        if self._stop.is_set():
            raise ClosedError(f"the writer of rank {self.address.rank} was closed: make a new one")

    def _drain(self) -> None:
        while not self._expired.empty():
            self._blocks.unclaim(self._expired.get_nowait())
        while not self._withdrawn.empty():
            self._withdraw(self._withdrawn.get_nowait())
        self._read_all()

    def _read_all(self) -> None:
        self.news.stir()
        for i, peer in enumerate(self._peers):
            self._read(i, peer)

    def _read(self, reader: int, peer: Peer) -> None:
        for kind, value in peer.inbox.drain():
            if kind == EntryKind.RELEASED:
                self._unclaim(self._tickets.released(reader, value))
            elif kind == EntryKind.OPENED:
                self._tickets.opened(reader, value)
            elif kind == EntryKind.DISCARDED:
                self._unclaim(self._tickets.discarded(reader, value))
                peer.left = peer.left or value == NEVER
                self._update_segments()
            elif value < len(self._segments):
                if kind == EntryKind.MAPPED:
                    peer.mapped.add(value)
                else:
                    self._retired.add(value)
                self._update_segments()

    def _unclaim(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._blocks.unclaim(block)
            self._hopeless = False

    def _update_segments(self) -> None:
        """Use what every reader that listens has mapped and none has refused; unlink what every reader has mapped."""
        for segment in self._segments:
            number = segment.header.number
            # A reader that has not come yet maps what exists when it comes, or fails to come.
            ready = all(number in peer.mapped for peer in self._peers if peer.listens and peer.mapped)
            self._blocks.set_usable(number, ready and number not in self._retired)
        self._names.unlink_mapped(self._mapped_by_all)

    def _mapped_by_all(self, number: int) -> bool:
        return all(number in peer.mapped or number in self._retired for peer in self._peers if peer.listens)
