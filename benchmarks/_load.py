"""A scheduler's loop on each rank, under load, and what one way costs it.

For each round and each way, in an order that rotates, on every rank:

    1. make the way anew
    2. cold: the first requests of the new setup, measured apart
    3. warm-up: more of them; every byte of every result is compared, and nothing is timed
    4. warm: the load, measured; afterwards every result's hash is compared, and every byte of the last ones
    5. close it: nothing of one way lives while another is measured

A tick is: the engine's own broadcast, which says what has arrived and carries what the way adds; hand in; take what is
ready; then `tick` seconds of CPU time as of launching kernels; then `gpu` seconds of waiting for them. All it takes
beyond those two is the stall of the scheduler's thread. With `waits` there is no broadcast: a rank hands in a batch and
takes the oldest as soon as no more fit, waiting for it.

`CLOCK_MONOTONIC` is one clock for all processes of a machine, so instants compare between ranks.
"""

from __future__ import annotations

import gc
import itertools
import pickle
import random
import statistics
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist

from benchmarks import _gauges
from benchmarks._loop import percentile, rotated
from benchmarks._ranks import Settings
from benchmarks.baselines import ENTRY, Way
from shmcast import MultimodalInputs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from benchmarks._ranks import Place
    from benchmarks.baselines import Contender, Raw

    Pool: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

WORD = 4  # of a feature: float32
SPAN = 16 << 20
STEP = 65 * 64  # from one request's window to the next: 64-byte aligned, and no two of SPAN / 64 are alike
CALM_TICKS = 50
KEPT_BYTES = 256 << 20  # of results that are compared byte for byte after the timed part


@dataclass(frozen=True)
class Load:
    """What arrives, and what it costs. Sizes in bytes, times in seconds.

    Attributes:
        size: of a request's one feature.
        concurrency: that many requests are in flight at any time.
        rate: or so many arrive a second, at random, None for `concurrency`.
        batch: requests handed in at once, at most; with `waits` always.
        hashed: the raw inputs carry their hash.
        cost_cpu: CPU time that `fn` takes; 0 and `cost_wait` 0: the hashing of the feature.
        cost_wait: time that `fn` waits.
        text: text-only requests for each that is not.
        silent: leave out those that are not; the text-only ones arrive as before.
        tick: CPU time of each tick on the scheduler's thread.
        gpu: what it then waits for.
        waits: the scheduler waits for what it needs, in place of asking what is ready.
        requests: how many are measured, of all kinds.
        duration: seconds after which no more arrive, None for no end before that number.
    """

    size: int
    concurrency: int = 16
    rate: float | None = None
    batch: int = 1
    hashed: bool = False
    cost_cpu: float = 0.0
    cost_wait: float = 0.0
    text: int = 0
    silent: bool = False
    tick: float = 0.0
    gpu: float = 0.0
    waits: bool = False
    requests: int = 64
    duration: float | None = None

    def is_text(self, number: int) -> bool:
        """Whether the request of this number has no multimodal inputs."""
        return number % (self.text + 1) != 0


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        ranks: how many.
        loads: one table each.
        rounds: of all loads and contenders in turn.
        cold: measure the first requests of a new setup, apart: as many as are in flight at once.
        warmup: as many that are not timed.
        quiet: after each way the same loop without requests, while a process beside each rank uses the CPU time that
            the way has used on it.
    """

    ranks: int
    loads: tuple[Load, ...]
    rounds: int = 3
    cold: bool = True
    warmup: bool = True
    quiet: bool = False
    seed: int = 1
    settings: Settings = field(default_factory=Settings)


@dataclass
class Part:
    """What one rank saw of one part. `load` is an index. Times in seconds, instants in nanoseconds."""

    load: int
    contender: str
    round: int
    mode: str  # cold, warm or quiet
    began: int = 0
    ended: int = 0
    arrived: dict[int, int] = field(default_factory=dict)  # by number of the request; entry rank only
    taken: dict[int, int] = field(default_factory=dict)
    ticks: dict[int, int] = field(default_factory=dict)  # the tick on which it was taken
    stalls: list[float] = field(default_factory=list)
    launched: float = 0.0
    cpu: float = 0.0  # without what was launched
    no_gil: float = 0.0
    received: int = 0
    runs: int = 0
    verified: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)


class Work:
    """`fn` at its cost, counted."""

    def __init__(self, load: Load) -> None:
        self.runs = 0
        self._load = load
        self._lock = threading.Lock()

    def __call__(self, raw: Raw) -> MultimodalInputs:
        with self._lock:
            self.runs += 1
        if self._load.cost_cpu:
            _gauges.burn(self._load.cost_cpu)
        if self._load.cost_wait:
            time.sleep(self._load.cost_wait)
        return MultimodalInputs.from_dict(raw)


def pool_of(loads: Sequence[Load], seed: int) -> Pool:
    """Random numbers, of which each request's feature is a window."""
    words = (max(load.size for load in loads) + SPAN) // WORD
    pool: Pool = torch.rand(words, generator=torch.Generator().manual_seed(seed)).numpy()
    return pool


class Requests:
    """The raw inputs of each request, by number, alike on all ranks, and what comes of them."""

    def __init__(self, load: Load, pool: Pool) -> None:
        self._load = load
        self._words = max(1, load.size // WORD)
        self._pool = pool
        self._hashes: dict[int, int | None] = {}

    def raw(self, number: int) -> Raw:
        """As a processor leaves them: one picture. The feature has a storage of its own, as when it was received."""
        feature = torch.frombuffer(
            self._pool, dtype=torch.float32, count=self._words, offset=number * STEP % (SPAN // 64 * 64)
        )
        known = self._load.hashed or self._load.cost_cpu or self._load.cost_wait
        item = {"modality": "IMAGE", "offsets": [(0, 99)], "feature": feature, "hash": number + 1 if known else None}
        return {"mm_items": [item], "im_token_id": 151655}

    def check(self, number: int, got: MultimodalInputs) -> None:
        """Raise unless this is `fn(raw)`, byte for byte."""
        (item,) = got.mm_items
        wanted = self.raw(number)["mm_items"][0]["feature"]
        if not isinstance(item.feature, torch.Tensor) or not torch.equal(item.feature, wanted):
            raise RuntimeError(f"other bytes came for request {number}")
        self.check_hash(number, item.hash)

    def check_hash(self, number: int, found: int | None) -> None:
        """Raise unless this is the hash of that request."""
        if number not in self._hashes:
            self._hashes[number] = MultimodalInputs.from_dict(self.raw(number)).mm_items[0].hash
        if found != self._hashes[number]:
            raise RuntimeError(f"the hash {found} came for request {number}")


class Feed:
    """Which requests arrive, and when; the entry rank decides, all ranks make the same."""

    def __init__(self, load: Load, numbers: range, seed: int) -> None:
        self._load = load
        self._left = deque(n for n in numbers if not (load.silent and not load.is_text(n)))
        self.arrived: dict[int, int] = {}
        gaps = random.Random(f"{seed} {numbers.start}")
        # Every number has its instant, left out or not.
        at = itertools.accumulate(gaps.expovariate(load.rate) for _ in numbers) if load.rate else ()
        self._instants = dict(zip(numbers, at, strict=False))
        self._began = time.monotonic_ns()

    def due(self, in_flight: int) -> list[int]:
        """Those that arrive now, where so many are in flight."""
        now = time.monotonic_ns()
        if self._load.duration is not None and now - self._began > self._load.duration * 1e9:
            self._left.clear()
        due: list[int] = []
        while self._left and self._is_due(now, in_flight + len(due)):
            number = self._left.popleft()
            instant = self._instants.get(number)
            self.arrived[number] = now if instant is None else self._began + int(instant * 1e9)
            due.append(number)
        return due

    @property
    def over(self) -> bool:
        """Whether no more will come."""
        return not self._left

    def _is_due(self, now: int, in_flight: int) -> bool:
        if self._load.rate is None:
            return in_flight < self._load.concurrency
        return self._began + self._instants[self._left[0]] * 1e9 <= now


class Ticks:
    """A feed of nothing, for so many ticks."""

    def __init__(self, count: int) -> None:
        self._left = count
        self.arrived: dict[int, int] = {}

    def due(self, in_flight: int) -> list[int]:
        """None."""
        self._left -= 1
        return []

    @property
    def over(self) -> bool:
        """Whether these were the last."""
        return self._left <= 0


class Results:
    """What was taken in one part: when, and whether it is right."""

    def __init__(self, part: Part, requests: Requests, load: Load, *, at_once: bool) -> None:
        self._part = part
        self._requests = requests
        self._at_once = at_once
        self._hashes: dict[int, int | None] = {}
        most = max(1, min(load.concurrency, KEPT_BYTES // max(1, load.size)))
        self._kept: deque[tuple[int, MultimodalInputs]] = deque(maxlen=most)

    def add(self, number: int, got: MultimodalInputs | None, tick: int) -> None:
        """A request's inputs were taken; None for a text-only one."""
        self._part.taken[number] = time.monotonic_ns()
        self._part.ticks[number] = tick
        if got is None:
            return
        if self._at_once:
            self._requests.check(number, got)
        else:
            self._hashes[number] = got.mm_items[0].hash
            self._kept.append((number, got))

    def verify(self) -> None:
        """Raise unless everything was right."""
        for number, found in self._hashes.items():
            self._requests.check_hash(number, found)
        for number, got in self._kept:
            self._requests.check(number, got)
        self._part.verified = len(self._kept)
        self._kept.clear()


def run_ticks(way: Way, load: Load, requests: Requests, feed: Feed | Ticks, results: Results, part: Part) -> None:
    """The loop of an engine whose ranks go in step; on every rank."""
    pending: set[int] = set()
    for tick in itertools.count():
        began = time.monotonic_ns()
        arrived, over, offered = share((feed.due(len(pending)), feed.over, way.offer()) if way.leads else None)
        several = [number for number in arrived if not load.is_text(number)]
        for batch in chunks(several, load.batch):
            way.submit([(str(number), requests.raw(number)) for number in batch])
        pending.update(several)
        for number in arrived:
            if load.is_text(number):
                results.add(number, None, tick)
        for key in way.admit(offered):
            results.add(int(key), way.take(key), tick)
            pending.remove(int(key))
        _launch(load, part)
        part.stalls.append((time.monotonic_ns() - began) / 1e9 - load.tick - load.gpu)
        if over and not pending:
            break


def run_waits(way: Way, load: Load, requests: Requests, numbers: range, results: Results, part: Part) -> None:
    """The loop of a scheduler that waits for what it needs; on every rank, without an exchange of its own."""
    flying: deque[int] = deque()

    def take() -> None:
        number = flying.popleft()
        results.add(number, way.take(str(number)), 0)

    for batch in chunks(numbers, load.batch):
        began = time.monotonic_ns()
        while flying and len(flying) + len(batch) > load.concurrency:
            take()
        part.arrived.update(dict.fromkeys(batch, time.monotonic_ns()))
        way.submit([(str(number), requests.raw(number)) for number in batch])
        flying.extend(batch)
        part.stalls.append((time.monotonic_ns() - began) / 1e9)
        _launch(load, part)
    while flying:
        take()


def share(value: Any) -> Any:
    """The engine's own broadcast, of the entry rank's `value`: the length, then the pickle; nothing more if idle."""
    leads = dist.get_rank() == ENTRY
    idle = leads and not any(value)
    packed = bytearray(pickle.dumps(value)) if leads and not idle else bytearray()
    length = torch.tensor([len(packed)])
    dist.broadcast(length, src=ENTRY)
    if not length:
        return [], False, None
    body = torch.frombuffer(packed, dtype=torch.uint8) if leads else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(body, src=ENTRY)
    return value if leads else pickle.loads(body.numpy().tobytes())


def chunks(numbers: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    """In order, at most `most` at a time."""
    return (numbers[at : at + most] for at in range(0, len(numbers), most))


def run_plan(place: Place, plan: Plan, contenders: Sequence[Contender]) -> list[Part]:
    """Everything, on every rank; each part is told as it begins."""
    parts: list[Part] = []
    gc.collect()
    gc.freeze()  # what torch left in memory is no concern of the collector, which stays on, as in an engine
    pool = pool_of(plan.loads, plan.seed)
    several = [Requests(load, pool) for load in plan.loads]
    for round in range(plan.rounds):
        for index, requests in enumerate(several):
            for which in rotated(len(contenders), round):
                place.tell(f"round {round + 1} of {plan.rounds}: {contenders[which].label}")
                parts += _Rank(plan, index, requests, round).run(contenders[which])
    return parts


class _Rank:
    """One load and one round, on one rank."""

    def __init__(self, plan: Plan, index: int, requests: Requests, round: int) -> None:
        self._plan = plan
        self._index = index
        self._load = plan.loads[index]
        self._requests = requests
        self._round = round
        self._numbers = 0

    def run(self, contender: Contender) -> list[Part]:
        """One way: its cold part, its warm part, and that of the quiet loop, where they are asked for."""
        plan, load, parts = self._plan, self._load, []
        at_once = load.concurrency if load.rate is None else load.batch
        burst = replace(load, rate=None, concurrency=at_once, duration=None)
        work = Work(load)
        way = contender.make(work)
        try:
            if plan.cold:
                parts.append(self._part(contender.key, "cold"))
                self._measure(way, work, burst, self._next(at_once), parts[-1])
            if plan.warmup:
                part = self._part(contender.key, "warm-up")
                results = Results(part, self._requests, load, at_once=True)
                self._turn(way, burst, self._next(at_once), results, part)
            warm = self._part(contender.key, "warm")
            self._measure(way, work, load, self._next(load.requests), warm)
            warm.counts = way.counts()
        finally:
            way.close()
        parts.append(warm)
        if plan.quiet:
            parts.append(self._part(contender.key, "quiet"))
            idle = Idle(work)
            idle.settles = way.settles
            self._measure_quiet(idle, warm, parts[-1])
        return parts

    def _part(self, key: str, mode: str) -> Part:
        return Part(self._index, key, self._round, mode)

    def _next(self, count: int) -> range:
        """The next numbers; they begin with that of a request that is not text-only."""
        group = self._load.text + 1
        first = -(-self._numbers // group) * group
        self._numbers = first + count
        return range(first, first + count)

    def _measure(self, way: Way, work: Work, load: Load, numbers: range, part: Part) -> None:
        results = Results(part, self._requests, load, at_once=False)
        runs = work.runs
        with _measuring(part):
            self._turn(way, load, numbers, results, part)
        part.runs = work.runs - runs
        results.verify()

    def _turn(self, way: Way, load: Load, numbers: range, results: Results, part: Part) -> None:
        if load.waits:
            run_waits(way, load, self._requests, numbers, results, part)
            return
        feed = Feed(load, numbers, self._plan.seed)
        run_ticks(way, load, self._requests, feed, results, part)
        part.arrived = feed.arrived

    def _measure_quiet(self, idle: Way, model: Part, part: Part) -> None:
        ticks = len(model.stalls)
        calm = self._part(model.contender, "calm")
        self._idle(idle, calm, min(ticks, CALM_TICKS))
        # The loop's own CPU time is not to be burnt as well.
        extra = max(0.0, model.cpu - calm.cpu / len(calm.stalls) * ticks)
        with _gauges.burning(extra / (model.ended - model.began) * 1e9):
            self._idle(idle, part, ticks)

    def _idle(self, idle: Way, part: Part, ticks: int) -> None:
        results = Results(part, self._requests, self._load, at_once=False)
        with _measuring(part):
            run_ticks(idle, self._load, self._requests, Ticks(ticks), results, part)


class Idle(Way):
    """Nobody hands anything in; the ranks settle that, where the way before did."""

    def admit(self, offered: Any) -> list[str]:
        if self.settles:
            self.settle([True])
        return []


@contextmanager
def _measuring(part: Part) -> Iterator[None]:
    """What the whole of this costs the process."""
    dist.barrier()
    received, cpu = _gauges.socket_bytes(), time.process_time()
    part.began = time.monotonic_ns()
    with _gauges.Heartbeat() as beat:
        yield
    part.ended = time.monotonic_ns()
    part.cpu = max(0.0, time.process_time() - cpu - part.launched)
    part.received = _gauges.socket_bytes() - received
    part.no_gil = beat.share


def _launch(load: Load, part: Part) -> None:
    """What a tick is for: work of this thread, then waiting."""
    if load.tick:
        _gauges.launch(load.tick)
        part.launched += load.tick
    if load.gpu:
        time.sleep(load.gpu)


# Figures.


@dataclass(frozen=True)
class Figures:
    """One way under one load over all rounds and ranks; seconds and bytes.

    Attributes:
        requests: done in all rounds, text-only ones too.
        rate: requests a second, until the last rank has taken the last one; median over rounds.
        p50, p99: from the arrival of a request that is not text-only until it is taken on the last rank, all rounds.
        text_p50, text_p99: the same of text-only ones, None where there are none.
        cpu: over all ranks, without what was launched; median over rounds.
        cpu_each: the same for one request.
        stall_p99, stall_max: what ticks took beyond launching and waiting, on any rank.
        no_gil: share of the time in which another thread of a rank waited for the GIL; the worst rank, median.
        received: bytes over TCP connections, for one request, all ranks.
        runs: how often `fn` ran for one request that is not text-only, all ranks.
        verified: results that were compared byte for byte after the timed part.
        counts: messages by route and fallbacks by reason of the entry rank, summed over rounds.
    """

    requests: int
    rate: float
    p50: float | None
    p99: float | None
    text_p50: float | None
    text_p99: float | None
    cpu: float
    cpu_each: float
    stall_p99: float
    stall_max: float
    no_gil: float
    received: float
    runs: float
    verified: int
    counts: dict[str, dict[str, int]]


def summarise(per_rank: Sequence[Sequence[Part]], loads: Sequence[Load]) -> dict[tuple[int, str, str], Figures]:
    """By index of the load, key of the contender, and mode."""
    found: dict[tuple[int, str, str], list[tuple[Part, ...]]] = {}
    for parts in zip(*per_rank, strict=True):
        found.setdefault((parts[0].load, parts[0].contender, parts[0].mode), []).append(parts)
    return {case: _figures(rounds, loads[case[0]]) for case, rounds in found.items()}


def _figures(rounds: list[tuple[Part, ...]], load: Load) -> Figures:
    several: list[float] = []
    text: list[float] = []
    for parts in rounds:
        check_alike(parts)
        for number, seconds in latencies(parts).items():
            (text if load.is_text(number) else several).append(seconds)
    done = [max(1, len(parts[0].taken)) for parts in rounds]
    cpu = [sum(part.cpu for part in parts) for parts in rounds]
    stalls = [stall for parts in rounds for part in parts for stall in part.stalls]
    counts: dict[str, Counter[str]] = {}
    for parts in rounds:
        for kind, each in parts[0].counts.items():
            counts.setdefault(kind, Counter()).update(each)
    middle = statistics.median
    return Figures(
        requests=sum(len(parts[0].taken) for parts in rounds),
        rate=middle(rate(parts) for parts in rounds),
        p50=percentile(several, 50) if several else None,
        p99=percentile(several, 99) if several else None,
        text_p50=percentile(text, 50) if text else None,
        text_p99=percentile(text, 99) if text else None,
        cpu=middle(cpu),
        cpu_each=middle(each / count for each, count in zip(cpu, done, strict=True)),
        stall_p99=percentile(stalls, 99),
        stall_max=max(stalls),
        no_gil=middle(max(part.no_gil for part in parts) for parts in rounds),
        received=middle(sum(p.received for p in parts) / count for parts, count in zip(rounds, done, strict=True)),
        runs=sum(part.runs for parts in rounds for part in parts) / max(1, len(several)),
        verified=sum(part.verified for parts in rounds for part in parts),
        counts={kind: dict(each) for kind, each in counts.items()},
    )


def check_alike(parts: Sequence[Part]) -> None:
    """Raise unless every rank took the same requests on the same ticks."""
    for part in parts[1:]:
        if part.ticks != parts[0].ticks:
            raise RuntimeError(f"{part.contender}: ranks took different requests, or on different ticks")


def latencies(parts: Sequence[Part]) -> dict[int, float]:
    """Of each request by number: seconds from its arrival until the last rank has taken it."""
    arrived = parts[0].arrived
    return {n: (max(part.taken[n] for part in parts) - at) / 1e9 for n, at in arrived.items() if n in parts[0].taken}


def rate(parts: Sequence[Part]) -> float:
    """Requests a second, from the first arrival until the last rank has taken the last; 0 without any."""
    if not parts[0].taken:
        return 0.0
    last = max(max(part.taken.values()) for part in parts)
    return len(parts[0].taken) / (last - min(parts[0].arrived.values())) * 1e9
