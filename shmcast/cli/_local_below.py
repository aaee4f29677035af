"""What batches of several sizes cost when every rank runs `fn`, and when one does and the others map its result."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist
from rich.table import Table
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from shmcast import _reclaim
from shmcast.multimodal import MultimodalInputs
from shmcast.policy import Policy
from shmcast.scheduler import SchedulerBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROUTES: Final = ("local", "shm")
_SMALLEST: Final = 4096
_SECONDS: Final = 120.0
_REPEAT: Final = 4
"""Batches between two readings of the clocks."""
_SPAN: Final = 4 << 20
_STEP: Final = 65 * 64
_WORD: Final = 4


class RunFailed(Exception):
    """A rank failed; the message has its story."""


class Plan(NamedTuple):
    """What every rank is told; `largest` in bytes of a batch."""

    ranks: int
    batch: int
    rounds: int
    largest: int
    digest: str


class Cost(NamedTuple):
    """Of one batch of `size` bytes, in seconds: CPU time over all ranks, and until the last rank has it; medians."""

    size: int
    local_cpu: float
    shm_cpu: float
    local_time: float
    shm_time: float


def measure(plan: Plan) -> list[Cost]:
    """The costs by size, smallest first. Raises `RunFailed`."""
    with tempfile.TemporaryDirectory(prefix="shmcast-bench-") as folder:
        try:
            spawn(_serve, (plan, folder), plan.ranks)  # type: ignore[no-untyped-call]  # as torch has it
        except (ProcessRaisedException, ProcessExitedException) as error:
            raise RunFailed(str(error).strip()) from error
        finally:
            _reclaim.sweep()
        return [Cost(*row) for row in json.loads(Path(folder, "costs.json").read_text())]


def propose(costs: Sequence[Cost]) -> int:
    """The bytes from which on an exchange is to be made, so that the sizes measured cost least; ratios count."""
    loss = [math.log(cost.shm_cpu / cost.local_cpu) for cost in costs]
    # With the first `count` sizes run locally: what those save, as an exchange would cost so much more.
    saved = [sum(loss[:count]) for count in range(len(costs) + 1)]
    best = saved.index(max(saved))
    return 0 if best == 0 else costs[best].size if best < len(costs) else 2 * costs[-1].size


def as_table(costs: Sequence[Cost]) -> Table:
    """The costs, for a person."""
    table = Table()
    for name in (
        "bytes of a batch",
        "CPU ms, every rank",
        "CPU ms, exchange",
        "until ready ms, every rank",
        "exchange",
    ):
        table.add_column(name, justify="right")
    for cost in costs:
        table.add_row(str(cost.size), *(f"{seconds * 1e3:.3f}" for seconds in cost[1:]))
    return table


def _sizes(plan: Plan) -> list[int]:
    count = int(math.log2(plan.largest / _SMALLEST)) + 1
    return [_SMALLEST << shift for shift in range(count)]


def _serve(rank: int, plan: Plan, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=plan.ranks,
        timeout=timedelta(seconds=_SECONDS),
    )
    try:
        costs = _measure(rank, plan)
        if rank == 0:
            Path(folder, "costs.json").write_text(json.dumps(costs))
    finally:
        dist.destroy_process_group()


def _measure(rank: int, plan: Plan) -> list[Cost]:
    sizes = _sizes(plan)
    inputs = _Inputs(plan)
    fn = partial(MultimodalInputs.from_dict, digest=plan.digest)
    ends = [SchedulerBackend(fn=fn, policy=Policy(route=route), timeout=_SECONDS) for route in _ROUTES]
    # By round, size and route: CPU time and time of this rank.
    found = torch.zeros(plan.rounds, len(sizes), len(_ROUTES), 2, dtype=torch.float64)
    try:
        for round in range(-1, plan.rounds):
            for which, size in enumerate(sizes):
                for turn in range(len(_ROUTES)):
                    route = (round + turn) % len(_ROUTES)
                    cost = _run(ends[route], inputs, size)
                    if round >= 0:
                        found[round, which, route] = torch.tensor(cost)
    finally:
        for end in ends:
            end.close()
    cpu, time_ = found[..., 0].clone(), found[..., 1].clone()
    dist.all_reduce(cpu, dist.ReduceOp.SUM)
    dist.all_reduce(time_, dist.ReduceOp.MAX)

    def middle(values: torch.Tensor) -> float:
        return float(statistics.median(values.tolist())) / _REPEAT

    return [
        Cost(size, *(middle(values[:, which, route]) for values in (cpu, time_) for route in range(len(_ROUTES))))
        for which, size in enumerate(sizes)
    ]


def _run(end: SchedulerBackend, inputs: _Inputs, size: int) -> tuple[float, float]:
    """CPU time of this process and time until this rank has all of some batches, in seconds."""
    batches = [inputs.batch(size) for _ in range(_REPEAT)]
    dist.barrier()
    cpu, began = time.process_time(), time.monotonic()
    for batch in batches:
        end.submit(batch)
        for key, _ in batch:
            end.take(key, _SECONDS)
    took = time.monotonic() - began
    # What is given back in the background belongs to it.
    dist.barrier()
    return time.process_time() - cpu, took


class _Inputs:
    """Raw inputs that are alike on all ranks, no two of them equal."""

    def __init__(self, plan: Plan) -> None:
        self._requests = plan.batch
        self._number = 0
        generator = torch.Generator().manual_seed(1)
        self._pool = torch.rand((plan.largest + _SPAN) // _WORD, generator=generator).numpy()

    def batch(self, size: int) -> list[tuple[str, dict[str, Any]]]:
        """The next requests, with `size` bytes of features together."""
        words = max(1, size // self._requests // _WORD)
        return [self._request(words) for _ in range(self._requests)]

    def _request(self, words: int) -> tuple[str, dict[str, Any]]:
        self._number += 1
        offset = self._number * _STEP % _SPAN
        feature = torch.frombuffer(self._pool, dtype=torch.float32, count=words, offset=offset)
        return str(self._number), {"mm_items": [{"modality": "IMAGE", "offsets": [(0, 99)], "feature": feature}]}
