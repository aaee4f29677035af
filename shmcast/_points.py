"""Instants at which a process can die, by name: what it had done by then, and what nobody else knows yet.

Each end calls `reached(point)` as it comes to one. What that raises is raised there, and what it kills dies there: the
tests of who cleans up after whom hand in such callables, everybody else hands in none.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    Reached = Callable[["Point"], None]


class Point(Enum):
    """An instant of a writer's, a reader's or a rank's life."""

    # A writer's.
    CREATED = "created"  # its control segment has a name, but not all of its semaphores
    GROWN = "grown"  # a segment has a name, and no reader was told
    RESERVED = "reserved"  # a block is claimed, and nothing is in it
    COPYING = "copying"  # one piece more of a message is in its block
    WRITTEN = "written"  # a message is complete, and nobody has a lease
    GRANTED = "granted"  # readers have leases, and nobody was told
    POSTING = "posting"  # a header is in the ring, and no reader was given a token
    SENT = "sent"  # a header is on its way to all
    UNLINKING = "unlinking"  # all have mapped a segment, and it still has its name
    CLOSING = "closing"  # the semaphores have no names any more, the segments have

    # A reader's.
    SEATED = "seated"  # it holds its lock, and has not said that it came
    MAPPED = "mapped"  # it has mapped a segment, and has not said so
    RECEIVED = "received"  # it has a header, and has opened nothing of it
    TAKEN = "taken"  # it has said that it uses a lease, and has read nothing
    TELLING = "telling"  # an entry is in its ring, and the writer was given no token
    RELEASING = "releasing"  # the last tensor of a message is gone, and the writer was not told
    LEAVING = "leaving"  # it is closed, and has not said so

    # A rank's, in a constructor.
    JOINING = "joining"  # it has heard the others' offers, and they have not heard whether it could map


def nowhere(point: Point) -> None:
    """Nobody wants to know."""
