"""Counters of what travelled and how, and the frozen record that a user sees of them."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping


class Traffic(NamedTuple):
    """What travelled: messages, and the bytes of their tensors that were copied, mapped or sent."""

    messages: int
    bytes: int


@dataclass(frozen=True)
class ReaderLeases:
    """What one reader holds of a writer's arena.

    Attributes:
        reader: its index.
        alive: None while it has not come, False once it has died or left.
        held: leases that it was given and has not given back.
        opened: those of them that it has opened.
        oldest: seconds since the oldest of them was given, None where there is none.
    """

    reader: int
    alive: bool | None
    held: int
    opened: int
    oldest: float | None


@dataclass(frozen=True)
class Stats:
    """A snapshot; all counts are since the object was made.

    Attributes:
        messages: messages published (writer, entry rank) or received (reader, other ranks).
        bytes: bytes of their tensors that travelled; a reference leaf counts nothing.
        routes: the same by route.
        fallbacks: how often a route was not the first choice, by reason.
        live_blocks: blocks that somebody claims (writer only, like the next four).
        free_bytes: bytes in holes of the segments made so far.
        largest_free_block: bytes of the largest hole.
        segment_bytes: bytes of all arena segments.
        leases: what each reader holds.
        leases_held: leases that this reader holds (reader only).
    """

    messages: int = 0
    bytes: int = 0
    routes: Mapping[str, Traffic] = field(default_factory=dict)
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    live_blocks: int = 0
    free_bytes: int = 0
    largest_free_block: int = 0
    segment_bytes: int = 0
    leases: tuple[ReaderLeases, ...] = ()
    leases_held: int = 0


class Counters:
    """Counts from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()

    def message(self, route: str, size: int) -> None:
        """One message of `size` bytes travelled by `route`."""
        with self._lock:
            self._messages[route] += 1
            self._bytes[route] += size

    def fallback(self, reason: str) -> bool:
        """A route was not the first choice; True the first time for this reason."""
        with self._lock:
            self._fallbacks[reason] += 1
            return self._fallbacks[reason] == 1

    def stats(
        self,
        *,
        usage: tuple[int, int, int, int] = (0, 0, 0, 0),
        leases: tuple[ReaderLeases, ...] = (),
        leases_held: int = 0,
    ) -> Stats:
        """A frozen copy. `usage`: live blocks, free bytes, largest hole, bytes of segments."""
        with self._lock:
            routes = {route: Traffic(n, self._bytes[route]) for route, n in sorted(self._messages.items())}
            fallbacks = dict(sorted(self._fallbacks.items()))
        return Stats(
            sum(traffic.messages for traffic in routes.values()),
            sum(traffic.bytes for traffic in routes.values()),
            MappingProxyType(routes),
            MappingProxyType(fallbacks),
            *usage,
            leases,
            leases_held,
        )
