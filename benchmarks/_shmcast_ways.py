"""The ways of shmcast, used by the same scheduler as the baselines (`baselines.py`)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from benchmarks.baselines import ENTRY, Contender, Way
from shmcast import Broadcaster, Policy, Reader, Route, Writer
from shmcast.admission import Admission
from shmcast.scheduler import SchedulerBackend

if TYPE_CHECKING:
    from benchmarks.baselines import Batch, Fn
    from shmcast import MultimodalInputs, Stats

# A cold start may have to wait until every rank has mapped a new segment; falling back would measure something else.
PATIENCE = 10.0
TIMEOUT = 100.0
# Requests end nearly in the order in which they were submitted: where so many are not ready, later ones are not asked.
MISSES = 8


class Sync(Way):
    """`Broadcaster.materialize_batch` on the scheduler's thread: the entry rank does the work while the others wait."""

    def __init__(self, fn: Fn, *, route: str) -> None:
        super().__init__(fn)
        self.broadcaster = Broadcaster(policy=Policy(route=route, wait=PATIENCE), timeout=TIMEOUT)

    def submit(self, batch: Batch) -> None:
        self.keep(batch, self.broadcaster.materialize_batch([raw for _, raw in batch], self.fn))

    def counts(self) -> dict[str, dict[str, int]]:
        return _counts(self.broadcaster.stats())

    def close(self) -> None:
        self.broadcaster.close()


class Admitted(Way):
    """`Admission` on the entry rank; handles ride on the engine's broadcast, and every rank opens them."""

    def __init__(self, fn: Fn) -> None:
        super().__init__(fn)
        self.writer = Writer(dist.get_world_size(), policy=Policy(wait=PATIENCE)) if self.leads else None
        self.reader = Reader(self.share(self.writer and self.writer.address), dist.get_rank())
        self.admission = Admission(self.writer, fn) if self.writer else None
        self.held: dict[str, Any] = {}

    def submit(self, batch: Batch) -> None:
        if self.admission is not None:
            self.held.update(batch)
            for key, raw in batch:
                self.admission.hold(key, raw)

    def offer(self) -> list[tuple[str, Any]]:
        return self._ready(0.0)

    def admit(self, offered: Any) -> list[str]:
        for key, what in offered or ():
            if isinstance(what, Exception):
                self.outcomes[key] = what
            elif isinstance(what, dict):
                self.outcomes[key] = self.attempt(what)
            else:
                self.outcomes[key] = self.reader.open(what)  # type: ignore[assignment]
        return list(self.outcomes)

    def take(self, key: str) -> MultimodalInputs:
        while key not in self.outcomes:
            self.admit(self.share(self._ready(TIMEOUT) if self.leads else None))
        return super().take(key)

    def counts(self) -> dict[str, dict[str, int]]:
        return _counts(self.admission.stats()) if self.admission else {}

    def close(self) -> None:
        self.reader.close()
        if self.admission is not None:
            self.admission.close()
        if self.writer is not None:
            self.writer.close()

    def _ready(self, timeout: float) -> list[tuple[str, Any]]:
        """What can go on: the handle, the exception, or, where nothing was published, the raw inputs."""
        if self.admission is None:
            return []
        found = []
        for key, what in self.admission.ready(timeout):
            raw = self.held.pop(key)
            found.append((key, raw if what is None else what))
        return found


class Backend(Way):
    """`SchedulerBackend`: each tick the ranks settle which requests all of them have, and take those."""

    settles = True

    def __init__(self, fn: Fn, *, placement: Any, route: str, control: Any) -> None:
        super().__init__(fn)
        policy = Policy(route=route, wait=PATIENCE)
        self.backend = SchedulerBackend(fn=fn, src=ENTRY, placement=placement, control=control, policy=policy)
        self.untaken: dict[str, None] = {}

    def submit(self, batch: Batch) -> None:
        self.untaken.update((key, None) for key, _ in batch)
        self.backend.submit(batch)

    def admit(self, offered: Any) -> list[str]:
        """What every rank has: asked are the oldest, in the order that is the same on all."""
        keys = list(self.untaken)
        if not keys:
            return []
        misses = 0
        ready = [False] * len(keys)
        for at, key in enumerate(keys):
            ready[at] = key in self.outcomes or self._receive(key, 0.0)
            misses += not ready[at]
            if misses == MISSES:
                break
        return [key for key, everywhere in zip(keys, self.settle(ready), strict=True) if everywhere]

    def take(self, key: str) -> MultimodalInputs:
        if key not in self.outcomes:
            self._receive(key, None)
        del self.untaken[key]
        return super().take(key)

    def counts(self) -> dict[str, dict[str, int]]:
        return _counts(self.backend.stats())

    def close(self) -> None:
        self.backend.close()

    def _receive(self, key: str, timeout: float | None) -> bool:
        """Whether the outcome of this request is here now."""
        try:
            self.outcomes[key] = self.backend.take(key, timeout)
        except TimeoutError:
            return False
        except Exception as error:
            self.outcomes[key] = error
        return True


def contenders(route: str, control: str) -> tuple[Contender, ...]:
    """Every way of shmcast; those that choose between routes with this one, where they can have it."""
    sync = Contender(
        "sync", "shmcast sync", "`Broadcaster.materialize_batch`; all ranks wait.", partial(Sync, route=route)
    )
    admission = Contender("admission", "shmcast admission", "`Admission`; handles ride on the engine's own.", Admitted)
    make = partial(Backend, route=route, control=control)
    entry = Contender(
        "async", "shmcast async", "`SchedulerBackend`; the entry rank does the work.", partial(make, placement="entry")
    )
    spread = Contender(
        "spread", "shmcast spread", "`SchedulerBackend`; the ranks share the work.", partial(make, placement="spread")
    )
    if route == Route.AUTO.value:
        return (sync, admission, entry, spread)
    # Tensors and pickles go over a group, from one rank.
    grouped = route in (Route.INLINE.value, Route.PICKLE.value)
    chosen = [sync, *([] if grouped and control == "ring" else [entry]), *([] if grouped else [spread])]
    return tuple(replace(way, key=f"{way.key}:{route}", label=f"{way.label}:{route}") for way in chosen)


def _counts(stats: Stats) -> dict[str, dict[str, int]]:
    routes = {route: traffic.messages for route, traffic in stats.routes.items()}
    return {"routes": routes, "fallbacks": dict(stats.fallbacks)}
