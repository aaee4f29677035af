"""Every way that people have tried to give each rank a request's inputs, from torch.distributed alone.

A scheduler uses them all alike, and those of shmcast too (`_shmcast_ways.py`), from its one thread, on every rank:

    submit(batch)        hand in (key, raw) pairs: the same, in the same order, on every rank
    offer(), admit(it)   once a tick: what the entry rank adds to the engine's own broadcast, and which keys every rank
                         can take now without waiting; a scheduler that waits needs neither
    take(key)            that request's inputs, once; raises what `fn` raised
    close()              the end; a collective of none

The ranks are those of the default group, whose rank 0 is the entry rank.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from shmcast import MultimodalInputs

    Raw: TypeAlias = dict[str, Any]
    Fn: TypeAlias = Callable[[Raw], MultimodalInputs]
    Batch: TypeAlias = Sequence[tuple[str, Raw]]
    Outcome: TypeAlias = MultimodalInputs | Exception

ENTRY = 0
POOL_THREADS = 2


class Way:
    """One rank's end of a way that has every request's outcome as soon as `submit` returns.

    `settles`: ranks are ready at different times, and agree once a tick, by `settle`, on what all have.
    """

    settles = False

    def __init__(self, fn: Fn) -> None:
        self.fn = fn
        self.leads = dist.get_rank() == ENTRY
        self.outcomes: dict[str, Outcome] = {}

    def submit(self, batch: Batch) -> None:
        """Hand in a batch; every rank."""
        raise NotImplementedError

    def offer(self) -> Any:
        """What rides on the engine's next broadcast, picklable; entry rank, once a tick."""
        return None

    def admit(self, offered: Any) -> list[str]:
        """The keys, alike on every rank, that `take` has ready; every rank, once a tick."""
        return list(self.outcomes)

    def take(self, key: str) -> MultimodalInputs:
        """A request's inputs; raises what `fn` raised, and KeyError for a key that is not there."""
        outcome = self.outcomes.pop(key)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def counts(self) -> dict[str, dict[str, int]]:
        """Messages by route and fallbacks by reason, of a way that has such."""
        return {}

    def close(self) -> None:
        """Give everything back."""

    def attempt(self, raw: Raw) -> Outcome:
        """`fn(raw)`, or what it raised."""
        try:
            return self.fn(raw)
        except Exception as error:
            return error

    def share(self, value: Any) -> Any:
        """The entry rank's `value`, on every rank."""
        objects = [value if self.leads else None]
        dist.broadcast_object_list(objects, src=ENTRY)
        return objects[0]

    def settle(self, ready: Sequence[bool]) -> list[bool]:
        """For each whether it is so on every rank; as many, in the same order, on all."""
        everywhere = torch.tensor(ready, dtype=torch.uint8)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return [bool(one) for one in everywhere.tolist()]

    def keep(self, batch: Batch, outcomes: Iterable[Outcome]) -> None:
        """These are the outcomes of this batch."""
        self.outcomes.update(zip((key for key, _ in batch), outcomes, strict=True))


class EveryRankAlone(Way):
    """No exchange: every rank does all the work."""

    def submit(self, batch: Batch) -> None:
        self.keep(batch, [self.attempt(raw) for _, raw in batch])


class ObjectEach(Way):
    """The entry rank does the work, and sends each object by a call of its own."""

    def submit(self, batch: Batch) -> None:
        self.keep(batch, [self.share(self.attempt(raw) if self.leads else None) for _, raw in batch])


class ObjectBatch(Way):
    """The entry rank does the work, and sends all objects of a batch in one call."""

    def submit(self, batch: Batch) -> None:
        self.keep(batch, self.share([self.attempt(raw) for _, raw in batch] if self.leads else None))


class RawDict(Way):
    """The entry rank sends the raw inputs, a batch in one call, and every rank does the work on what it received."""

    def submit(self, batch: Batch) -> None:
        raws = self.share([raw for _, raw in batch] if self.leads else None)
        self.keep(batch, [self.attempt(raw) for raw in raws])


class Futures(Way):
    """Threads of the entry rank do the work; what is done goes to all by `broadcast_object_list`, in submit order."""

    def __init__(self, fn: Fn) -> None:
        super().__init__(fn)
        self.pool = ThreadPoolExecutor(POOL_THREADS) if self.leads else None
        self.futures: dict[str, Future[Outcome]] = {}

    def submit(self, batch: Batch) -> None:
        if self.pool is not None:
            self.futures.update({key: self.pool.submit(self.attempt, raw) for key, raw in batch})

    def offer(self) -> list[str]:
        done = []
        for key, future in self.futures.items():
            if not future.done():
                break
            done.append(key)
        return done

    def admit(self, offered: Any) -> list[str]:
        if offered:
            self.outcomes |= self.share(
                {key: self.futures.pop(key).result() for key in offered} if self.leads else None
            )
        return list(self.outcomes)

    def take(self, key: str) -> MultimodalInputs:
        if key not in self.outcomes:
            self.outcomes[key] = self.share(self.futures.pop(key).result() if self.leads else None)
        return super().take(key)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


class Threshold(Way):
    """Small requests by every rank alone, the others by `broadcast_object_list`, each by a call of its own."""

    least = 1 << 20
    """Bytes of features from which on a request is sent."""

    def submit(self, batch: Batch) -> None:
        outcomes: list[Outcome] = []
        for _, raw in batch:
            if bytes_of(raw) < self.least:
                outcomes.append(self.attempt(raw))
            else:
                outcomes.append(self.share(self.attempt(raw) if self.leads else None))
        self.keep(batch, outcomes)


def bytes_of(raw: Raw) -> int:
    """Bytes of a request's features, from their shapes."""
    return sum(item["feature"].nbytes for item in raw["mm_items"])


@dataclass(frozen=True)
class Contender:
    """One way to be compared.

    Attributes:
        key: its name in `--only` and in JSON.
        label: its name in the table.
        stands_for: who does it this way, and what is in its favour.
        make: this rank's end, from `fn`; a collective.
    """

    key: str
    label: str
    stands_for: str
    make: Callable[[Fn], Way]


BASELINE = "alone"
BASELINES = (
    Contender(BASELINE, "every rank alone", "All ranks hold the raw inputs and do the same work.", EveryRankAlone),
    Contender("object", "object list, a request", "`broadcast_object_list` of each request's object.", ObjectEach),
    Contender("object-batch", "object list, a batch", "The same, one call for a batch.", ObjectBatch),
    Contender("raw", "raw dict", "`broadcast_object_list` of a batch's raw inputs; every rank does the work.", RawDict),
    Contender(
        "futures", "pool of futures", "Threads on the entry rank; objects are sent when done, in order.", Futures
    ),
    Contender("threshold", "size threshold", "Below 1 MiB every rank alone, above `broadcast_object_list`.", Threshold),
)
