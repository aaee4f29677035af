"""The two ends of shared memory: a `Writer` publishes objects, `Reader`s open them. No process group is needed.

    object -> encode -> block in an arena -> Handle -> any channel -> mapping -> decode -> object

A `Writer` owns all memory. It hands each reader a lease on each message; a block is used again when every lease on it
has ended, which a reader's tensors decide by being alive.
"""

from __future__ import annotations

import atexit
import os
import threading
from bisect import bisect_right
from contextlib import suppress
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakSet, finalize, ref

import numpy as np
import posix_ipc
import torch

from shmcast import _layout, _reclaim
from shmcast._arena import Arena
from shmcast._codec import Allow, Encoded, Leaves, decode, encode
from shmcast._contents import Contents, Found, Fresh
from shmcast._layout import BLOCK, MAX_READERS, MAX_TICKETS, BlockKind, Message, parse_message, plan_message
from shmcast._lease import Leases
from shmcast._points import Point, nowhere
from shmcast._segment import isolation_of
from shmcast._wire import Reason
from shmcast.errors import ArenaFull, EncodeError, LayoutError, ShmcastError, StaleHandle, closed_error
from shmcast.metrics import Counters, ReaderLeases, Stats
from shmcast.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from shmcast._blocks import Block
    from shmcast._points import Reached
    from shmcast._segment import Isolation
    from shmcast._wire import Address, Handle

Memory = np.ndarray[tuple[int], np.dtype[np.uint8]]

_writers: WeakSet[Writer] = WeakSet()


class Writer:
    """The end that publishes. Safe to use from any thread.

    Args:
        readers: how many readers there will be, 1 to 64; each attaches once, under an index of its own.
        capacity: the most bytes of shared memory to use; default a quarter of what is free, at most 2 GiB.
        allow: classes, or names of packages, whose instances may travel.
        policy: only `wait` and `cache_bytes` matter here.
        rank: names the writer in messages and in /dev/shm.
        slots: of the ring for `announce`, a power of two; 0: the writer has none.
        reached: called at each point of its life, for tests of what happens to whoever dies there.

    Raises:
        ArenaFull: there is no shared memory to be had.
        OSError: the system refuses it.
    """

    def __init__(
        self,
        readers: int,
        *,
        capacity: int | None = None,
        allow: Iterable[type | str] = (),
        policy: Policy | None = None,
        rank: int = 0,
        slots: int = 0,
        reached: Reached = nowhere,
    ) -> None:
        if not 1 <= readers <= MAX_READERS:
            raise ValueError(f"readers={readers}: a writer serves 1 to {MAX_READERS}")
        if capacity is not None and capacity < 2 * _layout.PAGE:
            raise ValueError(f"capacity={capacity}: at least {2 * _layout.PAGE} bytes")
        self.allow = Allow(tuple(allow))
        self._policy = policy or Policy()
        self._counters = Counters()
        self._empties: dict[Block, _Empty] = {}
        self._closed = False
        self._pid = os.getpid()
        _reclaim.sweep()
        self._arena = Arena(readers, capacity, rank, slots=slots, cache_bytes=self._policy.cache_bytes, reached=reached)
        self._contents = Contents(self._arena, self._policy.cache_bytes, self._counters)
        self.count(self._counters)
        self._announcing = threading.Lock()
        _writers.add(self)

    @property
    def address(self) -> Address:
        """What each reader needs, once, by any channel; a few bytes, picklable."""
        return self._arena.address

    def publish(self, obj: object, *, readers: Iterable[int] | None = None, opens: int = 1) -> Handle:
        """Put `obj` into shared memory for `readers` (default all), each of which may open it `opens` times.

        Tensors that lie in memory of `empty`, or whose bytes the content cache holds (`Policy.cache_bytes`), are not
        copied; all others are, once. Nobody may write to them meanwhile.

        Returns:
            A handle of at most 256 pickled bytes.

        Raises:
            ArenaFull: no block came free within `policy.wait` seconds.
            EncodeError: `obj` cannot be flattened (`NotAllowed`: it has a class that is not allowed).
            ClosedError: the writer was closed.
        """
        with self._counters.timed("publish"):
            encoded = encode(obj, self.allow)
            handle = self.put(encoded, readers=readers, opens=opens)
        self._counters.message("shm", encoded.nbytes)
        return handle

    def put(self, encoded: Encoded, *, readers: Iterable[int] | None = None, opens: int = 1) -> Handle:
        """`publish` for an object that is encoded already; counts nothing but hits and misses of the cache."""
        self._check_open()
        everyone = range(self.address.readers)
        chosen = sorted(set(everyone if readers is None else readers))
        if any(reader not in everyone for reader in chosen):
            raise ValueError(f"readers={chosen}: this writer has readers 0 to {self.address.readers - 1}")
        if not 1 <= opens <= MAX_TICKETS:
            raise ValueError(f"opens={opens}: 1 to {MAX_TICKETS}")
        listed = self._find_empties(encoded)
        with self._contents.find(encoded, listed) as cached:
            if cached.found:
                with suppress(ArenaFull):
                    return self._write(encoded, listed | cached.found, chosen, opens, 0, cached.fresh)
        # Nothing of it is cached, or what is lies in the way of the rest: all that is claimed pins a place.
        return self._write(encoded, listed, chosen, opens, self._policy.wait)

    def announce(self, header: bytes) -> tuple[int, ...]:
        """Post `header`, 256 bytes, to every reader; needs `slots`. Waits at most `policy.wait` for slow readers.

        Returns:
            The readers that were a whole ring behind for longer: they miss the oldest header, and what they had not
            opened of the messages published up to it is taken back.
        """
        self._check_open()
        headers = self._arena.headers
        if headers is None:
            raise ShmcastError(
                f"the writer of rank {self.address.rank} has no slots for headers: make it with slots=1024"
            )
        try:
            with self._announcing:
                return headers.post(header, self._policy.wait)
        except posix_ipc.Error:
            self._check_open()  # `close` came in between
            raise

    def withdraw(self, handle: Handle) -> None:
        """Take back what will not be opened. Who opens it later gets `StaleHandle`; who has opened it keeps it."""
        if not self._closed:
            self._arena.withdraw(handle)

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor inside the arena: publishing it, or views of it, copies nothing.

        Publishing freezes it: it must not be written to while a reader may hold it; it may be published again. The
        memory comes back when neither a reader nor this process holds it.

        Raises:
            ArenaFull: no block came free within `policy.wait` seconds.
        """
        self._check_open()
        shape = torch.Size(shape)
        if any(length < 0 for length in shape):
            raise ValueError(f"empty({tuple(shape)}): no length may be negative")
        size = shape.numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        block = self._arena.reserve(BLOCK.size + size, self._policy.wait)
        mapping = self._arena.mapping(block)
        _layout.write_block(mapping, block.generation, block.length, BlockKind.PAYLOAD, base=block.offset)
        exporter = np.frombuffer(mapping, np.uint8, size, block.offset + BLOCK.size)
        # From here on the exporter holds the claim, and whatever raises drops it.
        finalize(exporter, self._expire, block).atexit = False
        tensor = torch.frombuffer(exporter, dtype=torch.uint8).view(dtype).view(shape)
        self._empties[block] = _Empty(tensor.data_ptr(), tensor.data_ptr() + size, ref(tensor), None)
        return tensor

    def stats(self) -> Stats:
        """Counters, memory, and what each reader holds."""
        self._check_open()
        self._arena.reclaim()
        now = self._arena.clock()
        leases = tuple(
            ReaderLeases(i, alive, held.leases, held.opened, None if held.since is None else now - held.since)
            for i, (alive, held) in enumerate(zip(self._arena.alive(), self._arena.held(), strict=True))
        )
        return self._counters.stats(usage=self._arena.usage(), leases=leases)

    def count(self, counters: Counters) -> None:
        """Have `shmcast top` show what these count of this rank, too."""
        self._arena.news.count(counters)

    def close(self) -> None:
        """Publish no more, leave no name behind. What readers have mapped, and tensors of `empty`, stay valid."""
        if not self._closed:
            self._closed = True
            self._arena.close()

    def settle(self) -> tuple[int, ...]:
        """Hear the readers, unlink what all have mapped, take back what the dead hold; who died."""
        self._check_open()
        self._arena.reclaim()
        return self._arena.died()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error(f"the writer of rank {self.address.rank}", self._pid)

    def _expire(self, block: Block) -> None:
        """The last tensor over a block of `empty` is gone. Runs in finalizers."""
        self._empties.pop(block, None)
        self._arena.expire(block)

    def _write(
        self,
        encoded: Encoded,
        listed: Mapping[int, Found],
        readers: Sequence[int],
        opens: int,
        wait: float,
        fresh: Iterable[Fresh] = (),
    ) -> Handle:
        blocks = tuple(dict.fromkeys(found.block for found in listed.values()))
        sizes = self._place(encoded, listed, blocks)
        plan = plan_message(len(encoded.stream), len(blocks), sizes)
        block = self._arena.reserve(plan.length, wait, readers, opens)
        reached = self._arena.reached
        try:
            reached(Point.RESERVED)
            self._contents.fill(fresh)
            mapping = self._arena.mapping(block)
            memory = np.frombuffer(mapping, np.uint8, block.size, block.offset)
            copy_pieces(encoded, plan.pieces, memory, reached)
            message = Message(encoded.stream, tuple(b.where for b in blocks), plan.pieces)
            _layout.write_message(mapping, block.generation, plan.length, message, block.offset)
            reached(Point.WRITTEN)
            handle = self._arena.grant(block, blocks, readers, opens)
        finally:
            self._arena.free(block)
        try:
            reached(Point.GRANTED)
        except BaseException:
            self.withdraw(handle)
            raise
        return handle

    def _find_empties(self, encoded: Encoded) -> dict[int, Found]:
        """For each piece that lies in memory of `empty`, by its number: the block, and where in it."""
        empties = sorted(
            (empty.start, empty.end, block.generation, block) for block, empty in tuple(self._empties.items())
        )
        found = {}
        for number, piece in enumerate(encoded.pieces if empties else ()):
            at = piece.source.data_ptr()
            start, end, _, block = empties[bisect_right(empties, at, key=itemgetter(0)) - 1]
            if start <= at and at + piece.source.numel() <= end:
                self._freeze(block)
                found[number] = Found(block, BLOCK.size + at - start)
        return found

    def _freeze(self, block: Block) -> None:
        frozen = self._empties[block]
        tensor = frozen.tensor()
        if tensor is None or tensor.is_inference():
            return
        if frozen.version not in (None, tensor._version) and self._arena.is_leased(block):
            raise EncodeError(
                f"a tensor of empty(), shape {tuple(tensor.shape)}, was written to after it was published, while they "
                "hold it: they would see it change. Write into a new tensor of empty()."
            )
        self._empties[block] = frozen._replace(version=tensor._version)

    @staticmethod
    def _place(encoded: Encoded, listed: Mapping[int, Found], blocks: tuple[Block, ...]) -> list[_layout.Piece | int]:
        places: list[_layout.Piece | int] = []
        for number, piece in enumerate(encoded.pieces):
            length = piece.lead + piece.source.numel()
            found = listed.get(number)
            if found is None:
                places.append(length)
            else:
                places.append(_layout.Piece(blocks.index(found.block) + 1, found.offset - piece.lead, length))
        return places


class Reader:
    """The end that opens. Safe to use from any thread.

    Args:
        address: the writer's.
        index: this reader's number, below the writer's `readers`; an index is used once, ever.
        isolation: `cow`: tensors are writable, writes stay in this process. `guard`: a write is a SIGSEGV (debugging).
            `shared`: a write changes the message for everybody, at the user's risk. Default `cow`; `shared` with `pin`.
        allow: as the writer's.
        pin: register every segment with CUDA, once, on the device that is current now, so that copies from its tensors
            overlap with other work (`to_device`), and `is_pinned()` says so. Tensors under 64 KiB are copies, and not
            pinned. Starts CUDA in this process. Where it cannot: one warning, and tensors that are not pinned.
        reached: as the writer's.

    Raises:
        PeerDied: there is no such writer on this machine (any more).
        StaleHandle: the index is taken.
        LayoutError: the segments are not what they claim.
        OSError: the system refuses to map them.
        ValueError: no such index or isolation, or `pin` with an isolation other than `shared`.
    """

    def __init__(
        self,
        address: Address,
        index: int,
        *,
        isolation: Isolation | None = None,
        allow: Iterable[type | str] = (),
        pin: bool = False,
        reached: Reached = nowhere,
    ) -> None:
        isolation = isolation_of(isolation, pin=pin)
        self._allow = Allow(tuple(allow))
        self._counters = Counters()
        self._leases = Leases(address, index, isolation, reached, pin=pin)

    def open(self, handle: Handle) -> object:
        """The object behind `handle`, its tensors mapped; those under 64 KiB are copies and pin nothing.

        The message is held until the last of its tensors, with all views of them, is gone.

        Raises:
            StaleHandle: it was withdrawn, discarded, opened too often, or is for other readers.
            LayoutError: its bytes are not what they claim; `NotAllowed`: it has a class that is not allowed here.
            ClosedError: the reader was closed.
        """
        with self._counters.timed("map"):
            obj, size = self.fetch(handle)
        self._counters.message("shm", size)
        return obj

    def fetch(self, handle: Handle, leaves: Leaves | None = None, *, from_header: bool = False) -> tuple[object, int]:
        """`open` for a message that may refer to `leaves`; also the bytes of its pieces, and counts nothing.

        `from_header`: the handle came straight from its writer, so that what does not fit is the segment's fault.
        """
        try:
            opened = self._leases.open(handle)
        except (LayoutError, StaleHandle):
            if from_header and not self._leases.was_revoked(handle):
                self._leases.report(handle.where.segment)
            raise
        try:
            obj = decode(opened.stream, opened.pieces, self._allow, leaves)
            return obj, sum(piece.numel() for piece in opened.pieces)
        finally:
            opened.hold.end()

    def next_header(self, timeout: float) -> bytes | None:
        """The writer's next header, in order; None for one that this reader was too late for. One thread at a time.

        Raises:
            TimeoutError: none came within `timeout` seconds.
            PeerDied: the writer is gone, or was closed, and has left none.
            ClosedError: this reader was closed.
            LayoutError: the writer has no ring for headers.
        """
        return self._leases.headers().receive(timeout)

    def discard(self, handle: Handle) -> None:
        """Give back what this reader will not open of `handle`."""
        self._leases.discard(handle)

    def discard_below(self, handle: Handle) -> None:
        """Give back everything published up to `handle` that this reader has not opened."""
        self._leases.discard_below(handle)

    @property
    def writer_lives(self) -> bool:
        """Whether the writer's process is alive and has not closed it."""
        return self._leases.writer_lives()

    def count(self, counters: Counters) -> None:
        """Have `shmcast top` show the fallbacks that these count of this rank."""
        counters.watch(self._tell)

    def _tell(self, reason: str, count: int) -> None:
        if reason.upper() in Reason.__members__:
            self._leases.tell(Reason[reason.upper()], count)

    def stats(self) -> Stats:
        """Messages opened, and the leases that are held now."""
        return self._counters.stats(leases_held=self._leases.held())

    def close(self) -> None:
        """Open no more, and give back what was not opened. Tensors that live stay valid, their leases held."""
        self._leases.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Empty(NamedTuple):
    """A tensor of `empty`: its addresses, itself while it lives, and its version when it was last published."""

    start: int
    end: int
    tensor: ref[Tensor]
    version: int | None


def pack_inline(encoded: Encoded) -> Tensor:
    """A message as one 1-D uint8 tensor, laid out like a block of generation 0."""
    plan = plan_message(len(encoded.stream), 0, [piece.lead + piece.source.numel() for piece in encoded.pieces])
    tensor = torch.empty(plan.length, dtype=torch.uint8)
    memory = tensor.numpy()
    copy_pieces(encoded, plan.pieces, memory)
    _layout.write_message(memory.data, 0, plan.length, Message(encoded.stream, (), plan.pieces))
    return tensor


def unpack_inline(tensor: Tensor, allow: Allow, leaves: Leaves | None = None) -> object:
    """The object in a tensor of `pack_inline`; its tensors are views of it. `LayoutError` for anything else."""
    if tensor.dtype is not torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
        raise LayoutError(f"an inline message of {tensor.dtype}, shape {tuple(tensor.shape)}")
    message = parse_message(tensor.numpy().data, 0)
    if message.blocks:
        raise LayoutError("an inline message lists blocks")
    pieces = tuple(tensor[offset : offset + length] for _, offset, length in message.pieces)
    return decode(message.stream, pieces, allow, leaves)


def copy_pieces(encoded: Encoded, places: Sequence[_layout.Piece], memory: Memory, reached: Reached = nowhere) -> None:
    """Copy the pieces that go into a message's own block, `memory`, each to its place."""
    for piece, place in zip(encoded.pieces, places, strict=True):
        if not place.block:
            start = place.offset + piece.lead
            piece.copy_to(memory[start : start + piece.source.numel()])
            reached(Point.COPYING)


def _forget() -> None:
    for writer in list(_writers):
        writer._closed = True


def _close_all() -> None:
    """At exit, so that no name stays that a reader never mapped."""
    for writer in list(_writers):
        writer.close()


os.register_at_fork(after_in_child=_forget)
atexit.register(_close_all)
