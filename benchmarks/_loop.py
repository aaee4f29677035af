"""The one timing loop: contenders take turns message by message, in the same ranks, in an order that rotates.

One message, on every rank:

    1. stamp the payload anew, so that no bytes of an earlier message can pass for this one's
    2. (warm) send one message that is not timed: the last comparison has emptied the caches
    3. meet in a collective, agree on an instant, sleep until then
    4. call: from the latest start to the last end is what is timed
    5. compare every byte of what came with what the seed says
    6. drop it, and poll until every lease is back: the CPU time of this counts, as does that of 4

`CLOCK_MONOTONIC` is one clock for all processes of a machine, so starts and ends compare between ranks.
"""

from __future__ import annotations

import gc
import math
import os
import resource
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks._ranks import Place

WORD = 8
PAGE_WORDS = 4096 // WORD
MEET_AHEAD = 2_000_000  # ns
SETTLE_SECONDS = 60.0


class Site:
    """What one rank holds for messages of `size` bytes: int64 tensors of shape [size / 8].

    `payload` is what the entry rank sends, and what every rank holds where all hold the raw inputs; `expected` is a
    second copy, to compare with.
    """

    def __init__(self, place: Place, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.place = place
        self.size = size
        self.expected = torch.randint(-(2**62), 2**62, (size // WORD,), generator=generator)
        self.payload = self.expected.clone()

    def stamp(self, token: int) -> None:
        """Make the next message differ from every other, in each page."""
        self.expected[::PAGE_WORDS] = token
        self.payload[::PAGE_WORDS] = token


@dataclass(frozen=True)
class Contender:
    """One way to bring a tensor to every rank. All its functions but `alone` ones' `call` run on every rank.

    Attributes:
        key: its name in `--only` and in JSON.
        label: its name in the table.
        stands_for: who does it this way, and what is in its favour.
        setup: makes the state that the other functions get; a collective.
        call: what is timed; returns what this rank got.
        check: whether that is what was sent, byte for byte.
        prepare: what comes before each call and is not timed.
        settled: whether nothing of the last message is left; polled.
        calm: whether this rank holds nothing of the last message, though it may be sent again; polled.
        warms: a call can follow another one without `settled` in between.
        again: the same message is sent twice, first untimed: nothing of a call is cached on it.
        close: the end of a state.
        alone: only the entry rank calls.
    """

    key: str
    label: str
    stands_for: str
    setup: Callable[[Site], Any]
    call: Callable[[Any], object]
    check: Callable[[Any, Any], bool]
    prepare: Callable[[Any], None] = lambda state: None
    settled: Callable[[Any], bool] = lambda state: True
    calm: Callable[[Any], bool] = lambda state: True
    again: bool = False
    warms: bool = True
    close: Callable[[Any], None] = lambda state: None
    alone: bool = False


@dataclass(frozen=True)
class Case:
    """A contender at a size in bytes."""

    contender: Contender
    size: int


@dataclass(frozen=True)
class Sample:
    """One rank's part of one message: `case` is an index; nanoseconds, CPU seconds, minor page faults of the call."""

    case: int
    round: int
    start: int
    end: int
    cpu: float
    faults: int


@dataclass(frozen=True)
class Figures:
    """One case over all rounds and ranks; seconds. `cpu` is the median over rounds of the sum over ranks."""

    rounds: int
    median: float
    p99: float
    minimum: float
    cpu: float
    faults: float
    verified: int


def run_warm(place: Place, cases: Sequence[Case], rounds: int, warmup: int, seed: int) -> list[Sample]:
    """`rounds` messages of each case in turn, after `warmup` that are not in the result. On every rank."""
    sites = _sites(place, cases, seed)
    states = [case.contender.setup(sites[case.size]) for case in cases]
    samples = []
    _freeze()
    for round in range(-warmup, rounds):
        place.tell(f"round {max(0, round + 1)} of {rounds}")
        for index in rotated(len(cases), round):
            sample = _message(cases[index], states[index], sites[cases[index].size], index, round, warm=True)
            if round >= 0:
                samples.append(sample)
    for case, state in zip(cases, states, strict=True):
        case.contender.close(state)
    return samples


def run_cold(place: Place, cases: Sequence[Case], rounds: int, seed: int) -> list[Sample]:
    """The first message of a new setup, `rounds` times for each case in turn. On every rank."""
    sites = _sites(place, cases, seed)
    samples = []
    _freeze()
    for round in range(rounds):
        place.tell(f"cold, round {round + 1} of {rounds}")
        for index in rotated(len(cases), round):
            case, site = cases[index], sites[cases[index].size]
            state = case.contender.setup(site)
            samples.append(_message(case, state, site, index, round, warm=False))
            case.contender.close(state)
    return samples


def rotated(count: int, round: int) -> list[int]:
    """0 to count - 1, beginning with another one each round."""
    return [(round + at) % count for at in range(count)]


def summarise(per_rank: Sequence[Sequence[Sample]], cases: Sequence[Case]) -> list[Figures]:
    """The figures of each case from the samples of every rank."""
    figures = []
    for index, case in enumerate(cases):
        rounds: dict[int, list[Sample]] = {}
        for sample in (s for samples in per_rank for s in samples if s.case == index):
            rounds.setdefault(sample.round, []).append(sample)
        takers = [parts[:1] if case.contender.alone else parts for parts in rounds.values()]
        ready = [last_rank_ready(parts) for parts in takers]
        cpu = [sum(s.cpu for s in parts) for parts in takers]
        faults = [sum(s.faults for s in parts) for parts in takers]
        verified = sum(len(parts) for parts in takers)
        middle = statistics.median
        figures.append(
            Figures(len(ready), middle(ready), percentile(ready, 99), min(ready), middle(cpu), middle(faults), verified)
        )
    return figures


def last_rank_ready(parts: Sequence[Sample]) -> float:
    """Seconds from the latest start to the latest end."""
    return (max(s.end for s in parts) - max(s.start for s in parts)) / 1e9


def percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank: the smallest value that at least `percent` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)]


def _sites(place: Place, cases: Sequence[Case], seed: int) -> dict[int, Site]:
    return {size: Site(place, size, seed) for size in dict.fromkeys(case.size for case in cases)}


def _freeze() -> None:
    """What torch left in memory is no concern of the garbage collector; it stays on, as in an engine."""
    gc.collect()
    gc.freeze()


def _message(case: Case, state: Any, site: Site, index: int, round: int, *, warm: bool) -> Sample:
    contender, place = case.contender, site.place
    site.stamp(1000 * round + index)
    contender.prepare(state)
    if warm and contender.warms and (place.leads or not contender.alone):
        # What was compared last has left the caches as if nothing had ever been sent: one message that is not timed.
        # The one that is may be the same again only where nothing of the call is cached on the inputs.
        contender.call(state)
        _until(lambda: contender.calm(state), contender)
        if not contender.again:
            site.stamp(1000 * round + index)
            contender.prepare(state)
    meet()
    faults, cpu, start = _faults(), time.process_time(), time.monotonic_ns()
    got = None if contender.alone and not place.leads else contender.call(state)
    end, cpu, faults = time.monotonic_ns(), time.process_time() - cpu, _faults() - faults
    if (place.leads or not contender.alone) and not contender.check(state, got):
        raise RuntimeError(f"{contender.label}, {site.size} bytes, round {round}: rank {place.rank} got other bytes")
    dropping = time.process_time()
    got = None
    cpu += time.process_time() - dropping
    # The others first: what they have given back is what the entry rank waits for.
    if not place.leads:
        cpu += _settle(contender, state)
    dist.barrier()
    if place.leads:
        cpu += _settle(contender, state)
    return Sample(index, round, start, end, cpu, faults)


def meet() -> None:
    """Return on all ranks at one instant, as nearly as the kernel's timer can."""
    instant = torch.tensor([time.monotonic_ns()])
    dist.all_reduce(instant, op=dist.ReduceOp.MAX)
    left = int(instant) + MEET_AHEAD - time.monotonic_ns()
    if left > 0:
        time.sleep(left / 1e9)


def _until(condition: Callable[[], bool], contender: Contender) -> None:
    deadline = time.monotonic() + SETTLE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{contender.label}: the last message is still held after {SETTLE_SECONDS:g} s")
        os.sched_yield()


def _settle(contender: Contender, state: Any) -> float:
    """Wait until the last message is gone; the CPU seconds of this process, without those of asking."""
    cpu, asking = time.process_time(), 0.0
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        before = time.thread_time()
        done = contender.settled(state)
        asking += time.thread_time() - before
        if done:
            return max(0.0, time.process_time() - cpu - asking)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{contender.label}: the last message is still held after {SETTLE_SECONDS:g} s")
        os.sched_yield()


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
