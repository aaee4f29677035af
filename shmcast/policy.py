"""What a user may decide: how messages travel and what a rank does when they cannot."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from enum import Enum


class Route(str, Enum):
    """How one message travels; the entry rank decides and says so in the header.

    `shm`: through shared memory. `inline`: its bytes in a tensor broadcast. `local`: not at all, every rank runs `fn`.
    `pickle`: `broadcast_object_list`. `raw`: the raw inputs travel through shared memory, and every rank runs `fn`.
    `auto`: `shm` or `local`, whichever takes less work over all ranks, from what was measured so far.
    """

    AUTO = "auto"
    SHM = "shm"
    INLINE = "inline"
    LOCAL = "local"
    PICKLE = "pickle"
    RAW = "raw"


@dataclass(frozen=True)
class Policy:
    """The rules of a `Writer` or a `Broadcaster`; every rank of a group passes the same.

    Attributes:
        route: `auto`, or one route pinned for every message, for comparisons. `local` needs `peers_hold_raw`; `pickle`
            runs what the entry rank sends: among ranks that trust each other; `raw` cannot be agreed on.
        peers_hold_raw: every rank passes its own `raw` to `materialize`, equal in content and structure: then
            tensors that all ranks hold travel as references, and every rank can fall back to `fn(raw)`. With False
            only the entry rank's `raw` counts, all bytes travel, and the fallback is the route `inline`.
        fn_keeps_leaves: promises that `fn` never writes into the tensors, arrays and lists of `raw`. Without it only
            tensors whose version counter did not move become references.
        agree: for an `fn` that may differ between ranks. One more collective a message, and no rank ever runs `fn`
            alone: a fallback is the entry rank's object, inline, on all.
        threshold: raw inputs with fewer bytes of tensors than this run `fn` on every rank. 0: none do.
        local_below: batches of a `SchedulerBackend` with fewer bytes of tensors than this run `fn` on every rank, when
            `take` asks for them, without any exchange; with the route `auto` only. `shmcast bench local-below`
            proposes one.
        inline_max: messages of at most this many bytes travel inside the control plane. 0: none do.
        wait: seconds that a publish may wait for memory before it falls back.
        cache_bytes: how much shared memory may keep tensors that were published, so that equal ones are sent without
            a copy: those of 64 KiB and more whose digest `shmcast.digest` computed. 0: none.
    """

    route: Route | str = Route.AUTO
    peers_hold_raw: bool = True
    fn_keeps_leaves: bool = False
    agree: bool = False
    threshold: int = 0
    local_below: int = 128 << 10
    inline_max: int = 0
    wait: float = 0.25
    cache_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "route", Route(self.route))
        for name in ("threshold", "local_below", "inline_max", "wait", "cache_bytes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Policy({name}={getattr(self, name)}): must be finite and not negative")
        if self.route is Route.LOCAL and (self.agree or not self.peers_hold_raw):
            raise ValueError("Policy(route='local') needs raw inputs on every rank, and no agreement between them")
        if self.route is Route.RAW and self.agree:
            raise ValueError("Policy(route='raw') has every rank run fn: there is nothing that ranks could agree on")


@dataclass(frozen=True)
class Environment:
    """What the environment asks for, read when a Broadcaster is made."""

    disabled: bool
    capacity: int | None
    inline_max: int | None


def read_environment() -> Environment:
    """`SHMCAST_DISABLE` (0 or 1), `SHMCAST_CAPACITY` and `SHMCAST_INLINE_MAX` (bytes); `ValueError` names a bad one."""
    disabled = os.environ.get("SHMCAST_DISABLE", "0").strip().lower()
    if disabled not in ("0", "1", "", "false", "true", "no", "yes"):
        raise ValueError(f"SHMCAST_DISABLE={disabled!r}: 0 or 1")
    return Environment(disabled in ("1", "true", "yes"), _bytes("SHMCAST_CAPACITY"), _bytes("SHMCAST_INLINE_MAX"))


def _bytes(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r}: a number of bytes")
    return int(text)
