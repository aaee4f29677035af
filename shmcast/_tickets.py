"""Leases as the writer knows them: which ticket keeps which blocks, for which reader. Pure bookkeeping.

A ticket is a number that is never used twice, so that a double, late or invented release names a dead ticket and does
nothing. A ticket is unopened until its reader says otherwise; from the living only an unopened one is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from shmcast._layout import MAX_TICKETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from shmcast._blocks import Block


@dataclass(eq=False)
class _Grant:
    """What one publish gave: the tickets that are still alive keep every block of `blocks`."""

    blocks: tuple[Block, ...]
    since: float


@dataclass
class _Lease:
    grant: _Grant
    opened: bool = False


class Held(NamedTuple):
    """What one reader holds: leases, those of them that it has opened, and since when the oldest (caller's clock)."""

    leases: int
    opened: int
    since: float | None


class Tickets:
    """The living tickets of every reader. What ends tickets gives back the blocks to unclaim, one for each claim."""

    def __init__(self, readers: int) -> None:
        self._readers: tuple[dict[int, _Lease], ...] = tuple({} for _ in range(readers))
        self._opened = [0] * readers
        self._next = 1

    @property
    def next(self) -> int:
        """The first ticket that was not granted."""
        return self._next

    def room(self, readers: Iterable[int], opens: int) -> bool:
        """Whether each of `readers` can be given `opens` more tickets (L7)."""
        return all(len(self._readers[reader]) + opens <= MAX_TICKETS for reader in readers)

    def crowded(self, readers: Iterable[int], opens: int) -> str:
        """Which of `readers` cannot be given `opens` more tickets, in words; empty where each can."""
        full = [reader for reader in readers if not self.room((reader,), opens)]
        return (
            f"reader {full[0]} holds {len(self._readers[full[0]])} leases, {MAX_TICKETS} are the most: have it open, "
            "drop or discard what it was sent"
            if full
            else ""
        )

    def grant(self, blocks: Iterable[Block], readers: Iterable[int], opens: int, now: float) -> tuple[int, int]:
        """Give `opens` tickets to each of `readers`: the base ticket, and how many claims that makes on each block."""
        base, given = self._next, 0
        grant = _Grant(tuple(blocks), now)
        self._next += len(self._readers) * opens
        for reader in readers:
            for ticket in range(base + reader * opens, base + (reader + 1) * opens):
                self._readers[reader][ticket] = _Lease(grant)
                given += 1
        return base, given

    def opened(self, reader: int, ticket: int) -> bool:
        """The reader has opened this lease; False where it has no such ticket."""
        lease = self._readers[reader].get(ticket)
        if lease is not None:
            self._opened[reader] += not lease.opened
            lease.opened = True
        return lease is not None

    def released(self, reader: int, ticket: int) -> tuple[Block, ...]:
        """The reader has given this lease back."""
        lease = self._readers[reader].pop(ticket, None)
        self._opened[reader] -= lease is not None and lease.opened
        return lease.grant.blocks if lease else ()

    def discarded(self, reader: int, below: int) -> Iterator[Block]:
        """The reader gives back every ticket under `below` that it has not opened."""
        leases = self._readers[reader]
        for ticket in [t for t, lease in leases.items() if t < below and not lease.opened]:
            yield from leases.pop(ticket).grant.blocks

    def died(self, reader: int) -> Iterator[Block]:
        """The reader is dead: take back everything."""
        leases = self._readers[reader]
        self._opened[reader] = 0
        while leases:
            yield from leases.popitem()[1].grant.blocks

    def withdrawn(self, base: int, opens: int) -> Iterator[Block]:
        """Take back what no reader has opened of one grant."""
        for reader, leases in enumerate(self._readers):
            for ticket in range(base + reader * opens, base + (reader + 1) * opens):
                lease = leases.get(ticket)
                if lease is not None and not lease.opened:
                    yield from leases.pop(ticket).grant.blocks

    def alive(self, base: int, opens: int) -> bool:
        """Whether any ticket of one grant lives."""
        return any(
            ticket in leases
            for reader, leases in enumerate(self._readers)
            for ticket in range(base + reader * opens, base + (reader + 1) * opens)
        )

    def held(self, reader: int) -> Held:
        """What a reader holds now; as quick for thousands of leases as for one."""
        leases = self._readers[reader]
        # They are in the order in which they were given.
        oldest = next(iter(leases.values()), None)
        return Held(len(leases), self._opened[reader], None if oldest is None else oldest.grant.since)


def explain(
    length: int, wait: float, rank: int, held: Iterable[Held], usage: tuple[int, int, int, int], trouble: str
) -> str:
    """Why no block of `length` bytes came free. `usage`: live blocks, free bytes, largest hole, bytes in all."""
    live, free, largest, total = usage
    leases = ", ".join(f"reader {i} holds {h.leases}" for i, h in enumerate(held) if h.leases) or "no lease is held"
    return (
        f"no block of {length} bytes within {wait:g} s in the arena of rank {rank}: {live} blocks live, {free} of "
        f"{total} bytes free, the largest hole has {largest}; {leases}; {trouble}"
    )
