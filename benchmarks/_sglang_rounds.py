"""What `bench_sglang` measures, and what comes of it; importing this imports no SGLang.

Two parts. Of a `request`: from the tokenizer's `send` until the last rank has its `MultimodalInputs`, with SGLang's own
receiving on every rank. Of the `method`: all ranks hold the raw inputs, and call at one instant what makes the rest.

`CLOCK_MONOTONIC` is one clock for all processes of a machine, so instants compare between ranks.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from benchmarks._loop import percentile
from benchmarks._ranks import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._ranks import Place

MAKER = "maker"
LABELS = {
    MAKER: "making them, on one rank",
    "alone": "stock: every rank alone",
    "flag": "stock: flag path",
    "shm-flag": "shmcast: flag path",
    "admission": "shmcast: admission",
    "tokenizer": "shmcast: tokenizer",
}
WAYS = {
    "method": (MAKER, "alone", "flag", "shm-flag"),
    "request": ("alone", "flag", "shm-flag", "admission", "tokenizer"),
}


class Case(NamedTuple):
    """One way with one kind of request; `hashed`: as the tokenizer sends them with SGLANG_MM_PRECOMPUTE_HASH=1."""

    part: str
    way: str
    size: int
    hashed: bool


@dataclass(frozen=True)
class Plan:
    """One run. `tick`: seconds that a scheduler sleeps between two looks for requests, as for a batch on a GPU."""

    ranks: int
    sizes: tuple[int, ...]
    rounds: int = 20
    warmup: int = 2
    cold_rounds: int = 3
    tick: float = 1e-3
    settings: Settings = field(default_factory=Settings)

    @property
    def cases(self) -> list[Case]:
        """Ways that are compared stand beside each other, and so take turns."""
        return [
            Case(part, way, size, hashed)
            for size in self.sizes
            for hashed in (False, True)
            for part, ways in WAYS.items()
            for way in ways
        ]


@dataclass(frozen=True)
class Sample:
    """One rank's part of one request: instants in ns, seconds of its scheduler's thread.

    Attributes:
        made: the tokenizer has what the processor gave, and hashes next where it hashes.
        start: it sends next; of a method: this rank's call.
        sent: it has sent.
        ready: this rank has the inputs.
        cpu, wall: what receiving and making took beyond looking as often for nothing.
    """

    case: Case
    round: int
    cold: bool
    made: int
    start: int
    sent: int
    ready: int
    cpu: float
    wall: float


@dataclass(frozen=True)
class Figures:
    """One case over all rounds, seconds. The busy ones are medians, of each rank in its turn.

    Attributes:
        median, p99, minimum: from the (latest) start until the last rank is ready.
        from_made: median from what the processor gave, wherever hashes are made then.
        send: median of what the tokenizer took to send.
        busy_cpu, busy_wall: of each rank's scheduler thread.
    """

    rounds: int
    median: float
    p99: float
    minimum: float
    from_made: float
    send: float
    busy_cpu: tuple[float, ...]
    busy_wall: tuple[float, ...]


def measure(place: Place, plan: Plan) -> tuple[str, list[Sample]]:
    """On every rank: SGLang's version, and this rank's samples."""
    from benchmarks import _sglang_ranks

    return _sglang_ranks.measure(place, plan)


def summarise(per_rank: Sequence[Sequence[Sample]]) -> dict[tuple[Case, bool], Figures]:
    """The figures of each case, warm and cold (True) apart, from the samples of all ranks."""
    rounds: dict[tuple[Case, bool], list[tuple[Sample, ...]]] = defaultdict(list)
    for parts in zip(*per_rank, strict=True):
        first = parts[0]
        rounds[first.case, first.cold].append(parts[:1] if first.case.way == MAKER else parts)
    return {key: _figures(found) for key, found in rounds.items()}


def _figures(rounds: Sequence[tuple[Sample, ...]]) -> Figures:
    took = [(max(s.ready for s in parts) - max(s.start for s in parts)) / 1e9 for parts in rounds]
    whole = [(max(s.ready for s in parts) - parts[0].made) / 1e9 for parts in rounds]
    by_rank = list(zip(*rounds, strict=True))
    return Figures(
        len(rounds),
        statistics.median(took),
        percentile(took, 99),
        min(took),
        statistics.median(whole),
        statistics.median((parts[0].sent - parts[0].start) / 1e9 for parts in rounds),
        tuple(statistics.median(s.cpu for s in samples) for samples in by_rank),
        tuple(statistics.median(s.wall for s in samples) for samples in by_rank),
    )
