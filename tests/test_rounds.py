"""Many rounds over one arena: readers hold tensors for random times while blocks are used again, every byte checked."""

import random
from collections import Counter, deque
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast import Broadcaster, Handle, Policy
from shmcast.errors import ArenaFull, StaleHandle
from tests.support.ranks import Ranks
from tests.test_broadcaster import payload, until_free

pytestmark = pytest.mark.multiprocess

LARGEST = 400_000
SHIFTS = 1 << 16
SIZES = (0, 1, 4096, 65_535, 65_536, 70_000, 150_001, LARGEST)
HOLDS = 10
KINDS = ("broadcast", "materialize", "batch", "share", "empty")


class Plan:
    """What travels in each round: the same on every rank, from the seed alone."""

    def __init__(self, seed: int, rounds: int) -> None:
        draw = random.Random(seed)
        self._noise = payload(seed, LARGEST + SHIFTS)
        self.kinds = [draw.choice(KINDS) for _ in range(rounds)]
        self.shapes = [
            [(draw.choice(SIZES), draw.randrange(SHIFTS)) for _ in range(draw.randint(1, 3))] for _ in range(rounds)
        ]

    def tensors(self, number: int) -> list[torch.Tensor]:
        """The tensors of one round: windows of one noise, no two rounds alike."""
        return [self._noise[shift : shift + size] for size, shift in self.shapes[number]]

    def raw(self, number: int) -> dict[str, Any]:
        return {"number": number, "tensors": [tensor.clone() for tensor in self.tensors(number)]}


def take_in(raw: dict[str, Any]) -> dict[str, Any]:
    """A result whose bytes are not those of `raw`."""
    return {"number": raw["number"], "tensors": [tensor.bitwise_not() for tensor in raw["tensors"]]}


class Held:
    """What one rank got in one round, and whether it has written into it since."""

    def __init__(self, number: int, tensors: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
        self.number = number
        self.tensors = tensors
        self._expected = expected
        self._written: int | None = None

    def write(self, value: int) -> None:
        """In place, over all of it: the bytes of this rank alone."""
        self._written = value
        for tensor in self.tensors:
            tensor.fill_(value)

    def check(self) -> None:
        for tensor, expected in zip(self.tensors, self._expected, strict=True):
            if self._written is None:
                assert torch.equal(tensor, expected), f"round {self.number}: other bytes than were sent"
            else:
                assert bool((tensor == self._written).all()), f"round {self.number}: other bytes than were written here"


class Rank:
    """One rank's part: `entry` sends, the others take, hold, write and let go as their own draw says."""

    def __init__(self, rank: int, plan: Plan, group: Broadcaster, seed: int) -> None:
        self._rank = rank
        self._plan = plan
        self._group = group
        self._draw = random.Random(f"{seed}/{rank}")
        self._held: deque[tuple[int, Held]] = deque()
        self.seen: Counter[str] = Counter()

    def play(self, number: int) -> None:
        getattr(self, "_" + self._plan.kinds[number])(number)
        for until, held in list(self._held):
            held.check()
            if until <= number:
                self._held.remove((until, held))

    def let_go(self) -> None:
        self._held.clear()

    def _keep(self, number: int, got: Any, *, turned: bool = False) -> None:
        expected = self._plan.tensors(number)
        if turned:
            expected = [tensor.bitwise_not() for tensor in expected]
        if self._rank == 0:
            return
        assert got["number"] == number
        held = Held(number, got["tensors"], expected)
        del got
        held.check()
        if self._draw.random() < 0.3:
            held.write(self._rank)
            self.seen["written"] += 1
        self._held.append((number + self._draw.randrange(HOLDS), held))

    def _broadcast(self, number: int) -> None:
        self._keep(number, self._group.broadcast(self._plan.raw(number) if self._rank == 0 else None))

    def _materialize(self, number: int) -> None:
        raw = self._plan.raw(number) if self._rank == 0 else {}
        self._keep(number, self._group.materialize(raw, take_in), turned=True)

    def _batch(self, number: int) -> None:
        """Three requests: this round's twice, and between them one that fails."""
        raw = self._plan.raw(number)
        raws: list[dict[str, Any]] = [raw, {}, raw] if self._rank == 0 else []
        first, bad, last = self._group.materialize_batch(raws, take_in)
        assert isinstance(bad, Exception)
        self._keep(number, first, turned=True)
        self._keep(number, last, turned=True)

    def _empty(self, number: int) -> None:
        if self._rank:
            self._keep(number, self._group.broadcast())
            return
        raw = self._plan.raw(number)
        raw["tensors"] = [self._into_arena(tensor) for tensor in raw["tensors"]]
        self._group.broadcast(raw)

    def _into_arena(self, tensor: torch.Tensor) -> torch.Tensor:
        try:
            return self._group.empty(tensor.shape, tensor.dtype).copy_(tensor)
        except ArenaFull:
            self.seen["full"] += 1
            return tensor

    def _share(self, number: int) -> None:
        """A handle by another channel: each rank opens it, discards it, or lets it lie; or it is withdrawn."""
        told: list[Handle | None] = [None]
        if self._rank == 0:
            try:
                told = [self._group.share(self._plan.raw(number), opens=2)]
            except ArenaFull:
                self.seen["full"] += 1
        dist.broadcast_object_list(told, src=0)
        handle = told[0]
        if handle is None:
            return
        if self._rank == 0:
            if number % 2:
                self._group.withdraw(handle)
                dist.barrier()
            else:
                dist.barrier()
                self._group.withdraw(handle)
            return
        for _ in range(self._draw.randrange(3)):
            try:
                self._keep(number, self._group.open(handle))
                self.seen["opened"] += 1
            except StaleHandle:
                assert number % 2, "not withdrawn before all have opened"
                self.seen["stale"] += 1
        if self._draw.random() < 0.5:
            self._group.discard(handle)
        dist.barrier()


def play(rank: int, seed: int, rounds: int, capacity: int) -> tuple[Counter[str], dict[str, int], int]:
    plan = Plan(seed, rounds)
    policy = Policy(peers_hold_raw=False, wait=0.001)
    with Broadcaster(policy=policy, capacity=capacity) as group:
        before = group.stats().free_bytes
        mine = Rank(rank, plan, group, seed)
        for number in range(rounds):
            mine.play(number)
        mine.let_go()
        dist.barrier()
        if rank == 0:
            until_free(group)
            assert group.stats().free_bytes == before
        dist.barrier()
        routes = {route: traffic.messages for route, traffic in group.stats().routes.items()}
        return mine.seen, routes, group.stats().leases_held


@pytest.mark.parametrize(
    ("n", "rounds", "capacity"),
    [
        pytest.param(4, 150, 16 << 20, id="4 ranks, room enough"),
        pytest.param(4, 300, 2 << 20, id="4 ranks, often full"),
        pytest.param(8, 40, 4 << 20, id="8 ranks"),
        pytest.param(2, 300, 4 << 20, id="2 ranks"),
    ],
)
def test_every_byte_of_every_round(ranks: Ranks, n: int, rounds: int, capacity: int) -> None:
    told = ranks.run(n, play, n, rounds, capacity)
    (entry, routes, _), *others = told
    assert routes["shm"] > rounds // 2
    if capacity == 2 << 20:
        assert routes["inline"] > 0, "at times nothing is free"
        assert entry["full"] > 0
    if capacity == 16 << 20:
        assert set(routes) == {"shm", "none"}
    for seen, _, left in others:
        assert left == 0
        assert seen["written"]
        assert seen["opened"]
    if rounds > 100:
        assert sum(seen["stale"] for seen, *_ in others) > 0, "at times the withdrawal comes first"
