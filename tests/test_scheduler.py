"""Batches handed in by every rank, taken one request at a time: the same objects on all, one header a batch."""

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast import MultimodalInputs, Policy
from shmcast._control import GroupControl
from shmcast._lease import COPY_BELOW
from shmcast._points import Point
from shmcast.errors import ShmcastError, UnknownRequest
from shmcast.scheduler import SchedulerBackend
from shmcast.transport import Writer
from tests.support.codec import same
from tests.support.ranks import Ranks
from tests.test_broadcaster import (
    Raised,
    counted,
    outcome,
    payload,
    reference,
    request,
    until,
)

pytestmark = pytest.mark.multiprocess

LONG = 60.0
SIZE = 150_000
MIB = 1 << 20
SHM = Policy(route="shm", local_below=0)
WAYS = list(itertools.product(["entry", "spread"], ["ring", "group"]))
every_way = pytest.mark.parametrize(("placement", "control"), WAYS)


def raw(seed: int, size: int = SIZE) -> dict[str, Any]:
    return {"a": payload(seed, size), "seed": seed}


def made(seed: int, size: int = SIZE) -> dict[str, Any]:
    """What `twice` makes of it."""
    return {"a": payload(seed, size) * 2, "made of": seed}


def twice(raw: dict[str, Any]) -> dict[str, Any]:
    """A result whose bytes must travel, and which refuses what is marked."""
    if "bad" in raw:
        raise ValueError(f"bad request {raw['seed']}")
    return {"a": raw["a"] * 2, "made of": raw["seed"]}


def backend(placement: str = "entry", control: str = "ring", **how: Any) -> SchedulerBackend:
    return SchedulerBackend(**{"fn": twice, "policy": SHM, "placement": placement, "control": control, **how})


def settled(backend: SchedulerBackend) -> None:
    """Nothing of what was handed in is left: no lease on either side, no block. Every rank calls it."""

    def nothing_left() -> bool:
        gc.collect()
        stats = backend.stats()
        return not (stats.live_blocks or stats.leases_held or any(reader.held for reader in stats.leases))

    until(nothing_left)
    assert (backend.stats().pending, backend.stats().pending_bytes) == (0, 0)
    # A rank that closes gives everything back.
    dist.barrier()


# Every rank has every object.


def in_batches(rank: int, placement: str, control: str, sizes: list[int]) -> list[bool]:
    """All batches in flight at once, taken in another order on each rank."""
    told = []
    with backend(placement, control) as group:
        keys = iter(range(sum(sizes)))
        for size in sizes:
            group.submit([(key, raw(key, SIZE + 1000 * key)) for key in itertools.islice(keys, size)])
        order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(rank)).tolist()
        kept = []
        for key in order:
            kept.append(group.take(key))
            told.append(same(kept[-1], made(key, SIZE + 1000 * key)))
        told.append(all(same(got, made(key, SIZE + 1000 * key)) for got, key in zip(kept, order, strict=True)))
        kept.clear()
        dist.barrier()
        settled(group)
        assert dict(group.stats().fallbacks) == {}
    return told


@every_way
@pytest.mark.parametrize(("n", "sizes"), [(2, [1, 5, 1, 50]), (4, [5, 1, 0, 12, 3])])
def test_every_rank_has_every_object(ranks: Ranks, n: int, sizes: list[int], placement: str, control: str) -> None:
    assert ranks.run(n, in_batches, placement, control, sizes) == [[True] * (sum(sizes) + 1)] * n


def multimodal(rank: int, placement: str, control: str) -> list[Any]:
    with SchedulerBackend(policy=SHM, placement=placement, control=control) as group:  # type: ignore[arg-type]
        group.submit([(f"request {seed}", request(seed)) for seed in range(3)])
        return [group.take(f"request {seed}") for seed in range(3)]


@every_way
def test_multimodal_inputs(ranks: Ranks, placement: str, control: str) -> None:
    expected = [reference(seed) for seed in range(3)]
    assert all(type(each) is MultimodalInputs for each in expected)
    assert all(same(got, expected) for got in ranks.run(3, multimodal, placement, control))


def count_runs(rank: int, placement: str, control: str) -> tuple[list[int], int, int]:
    """Who ran `fn` for which request; headers that were posted, and collectives."""
    ran: list[int] = []
    posted: list[int] = []
    announce = Writer.announce

    def fn(raw: Any) -> Any:
        ran.append(raw["seed"])
        return twice(raw)

    def counting(self: Writer, header: bytes) -> Any:
        posted.append(1)
        return announce(self, header)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "announce", counting)
        with backend(placement, control, fn=fn) as group, counted() as calls:
            for batch in ([0, 1, 2, 3, 4, 5], [6], [7, 8]):
                group.submit([(key, raw(key, 80_000 + 8 * key)) for key in batch])
            for key in range(9):
                assert same(group.take(key), made(key, 80_000 + 8 * key))
            dist.barrier()
            return sorted(ran), len(posted), calls.total() - 1


def test_one_rank_runs_fn_once_and_posts_one_header_a_batch(ranks: Ranks) -> None:
    assert ranks.run(3, count_runs, "entry", "ring") == [([*range(9)], 3, 0), ([], 0, 0), ([], 0, 0)]


def test_spread_runs_each_fn_once_over_all_ranks(ranks: Ranks) -> None:
    """Largest first onto the rank with the fewest bytes so far; a rank without a share posts nothing."""
    told = ranks.run(3, count_runs, "spread", "ring")
    assert [ran for ran, *_ in told] == [[0, 5, 6], [1, 4, 8], [2, 3, 7]]
    assert [posted for _, posted, _ in told] == [2, 2, 2]
    assert [calls for *_, calls in told] == [0, 0, 0]


def group_calls(rank: int, placement: str) -> int:
    """How many collectives of the backend's own group two batches take, and an empty one."""
    made: list[int] = []
    finish = GroupControl._finish

    def counting(self: GroupControl, start: Any) -> None:
        made.append(1)
        finish(self, start)

    with pytest.MonkeyPatch.context() as patch, backend(placement, "group") as group:
        patch.setattr(GroupControl, "_finish", counting)
        for batch in ([0, 1, 2], [], [3]):
            group.submit([(key, raw(key)) for key in batch])
            for key in batch:
                group.take(key)
        dist.barrier()
        group.close()
        return len(made)


@pytest.mark.parametrize("placement", ["entry", "spread"])
def test_one_exchange_a_batch_over_a_group(ranks: Ranks, placement: str) -> None:
    assert ranks.run(3, group_calls, placement) == [2, 2, 2]


# Taking.


@contextmanager
def gate() -> Iterator[tuple[Callable[[Any], Any], threading.Event]]:
    """An `fn` that waits, for a request that says so, until the event is set."""
    event = threading.Event()

    def fn(raw: Any) -> Any:
        if raw["seed"] >= 100:
            assert event.wait(LONG)
        return twice(raw)

    try:
        yield fn, event
    finally:
        event.set()


def taken_before_the_header_is_said(rank: int, control: str) -> tuple[dict[str, int], dict[str, int]]:
    """The maker gets no further than the header of a batch before its results are taken."""
    taken = threading.Event()

    def reached(point: Point) -> None:
        if point is Point.SENT:
            assert taken.wait(LONG)

    policy = Policy(route="shm", local_below=0, wait=0.0)
    with backend(control=control, policy=policy, capacity=MIB, reached=reached) as group:
        group.submit([("fits", raw(1)), ("does not", raw(2, 2 * MIB))])
        assert same(group.take("fits"), made(1))
        assert same(group.take("does not"), made(2, 2 * MIB))
        stats = group.stats()
        taken.set()
        settled(group)
        return {route: seen.messages for route, seen in stats.routes.items()}, dict(stats.fallbacks)


@pytest.mark.parametrize("control", ["ring", "group"])
def test_what_was_taken_is_counted(ranks: Ranks, control: str) -> None:
    told = ranks.run(2, taken_before_the_header_is_said, control)
    assert told == [({"shm": 1, "local": 1}, {"full": 1})] * 2


def wait_for_one(rank: int, placement: str, control: str) -> None:
    with gate() as (fn, go), backend(placement, control, fn=fn) as group:
        group.submit([("early", raw(1))])
        assert same(group.take("early"), made(1))
        group.submit([("late", raw(100))])
        group.submit([("later", raw(2))])
        for timeout in (0, 0.01, -1.0):
            with pytest.raises(TimeoutError, match="request 'late'"):
                group.take("late", timeout)
        assert group.stats().pending == 2, "it is as it was"
        dist.barrier()
        go.set()
        assert same(group.take("later", LONG), made(2))
        assert same(group.take("late"), made(100))
        dist.barrier()
        settled(group)


@every_way
def test_a_take_that_times_out_leaves_the_request(ranks: Ranks, placement: str, control: str) -> None:
    ranks.run(2, wait_for_one, placement, control)


def overtake(rank: int, placement: str) -> bool:
    """In a batch of two the first is there while `fn` still runs on the second, on the rank that makes them."""
    with gate() as (fn, go), backend(placement, fn=fn) as group:
        keys = [0, 100] if placement == "entry" else [0, 1, 100]
        group.submit([(key, raw(key, SIZE - key)) for key in keys])
        mine = rank == 0 if placement == "entry" else True
        if mine:
            own = 0 if placement == "entry" or rank == 0 else 1
            assert same(group.take(own), made(own, SIZE - own))
        with pytest.raises(TimeoutError):
            group.take(100, 0)
        dist.barrier()
        go.set()
        assert same(group.take(100), made(100, SIZE - 100))
        dist.barrier()
        return mine


@pytest.mark.parametrize("placement", ["entry", "spread"])
def test_take_waits_for_its_own_request_only(ranks: Ranks, placement: str) -> None:
    assert ranks.run(2, overtake, placement) == [True, placement == "spread"]


def queue_up(rank: int, placement: str, control: str) -> None:
    with backend(placement, control) as group:
        for seed in (1, 2, 3):
            group.submit([("same", raw(seed)), (seed, raw(10 + seed))])
        assert [group.take("same")["made of"] for _ in range(3)] == [1, 2, 3]
        assert [group.take(seed)["made of"] for seed in (3, 1, 2)] == [13, 11, 12]
        with pytest.raises(UnknownRequest, match="request 'same' was taken already"):
            group.take("same")
        with pytest.raises(UnknownRequest, match="no request 'other' was submitted"):
            group.take("other")
        with pytest.raises(ValueError, match="a key is in the batch twice"):
            group.submit([("k", raw(1)), ("l", raw(2)), ("k", raw(3))])
        with pytest.raises(TypeError):
            group.submit([([], raw(1))])  # type: ignore[list-item]
        assert group.stats().pending == 0
        group.submit([(("tuple", None), raw(4)), (None, raw(5)), (2.5, raw(6))])
        assert [group.take(key)["made of"] for key in (None, ("tuple", None), 2.5)] == [5, 4, 6]
        dist.barrier()


@every_way
def test_keys(ranks: Ranks, placement: str, control: str) -> None:
    ranks.run(2, queue_up, placement, control)


def one_bad(rank: int, placement: str, control: str, policy: Policy) -> list[Any]:
    with backend(placement, control, policy=policy) as group:
        group.submit([(seed, raw(seed) | ({"bad": 1} if seed in (1, 4) else {})) for seed in range(6)])
        group.submit([("alone", raw(7) | {"bad": 1})])
        told = [outcome(lambda key=key: group.take(key)) for key in [*range(6), "alone"]]  # type: ignore[misc]
        return [each if isinstance(each, Raised) else same(each, made(key)) for key, each in enumerate(told)]


BAD = [True, Raised(ValueError, "bad request 1"), True, True, Raised(ValueError, "bad request 4"), True]


@every_way
@pytest.mark.parametrize("route", ["shm", "local", "raw"])
def test_a_bad_request_fails_alone_alike_on_every_rank(ranks: Ranks, placement: str, control: str, route: str) -> None:
    told = ranks.run(2, one_bad, placement, control, Policy(route=route, local_below=0))
    assert told == [[*BAD, Raised(ValueError, "bad request 7")]] * 2


def leave_in_fn(rank: int, control: str, size: int, error: type[BaseException]) -> list[Any]:
    def fn(raw: Any) -> Any:
        if raw["seed"] == 1:
            raise error("enough")
        return twice(raw)

    policy = Policy(route="auto", local_below=1000)
    with backend("entry", control, fn=fn, policy=policy) as group:
        group.submit([(seed, raw(seed, size)) for seed in range(3)])
        told = [outcome(lambda key=key: group.take(key)) for key in range(3)]  # type: ignore[misc]
        return [each.text if isinstance(each, Raised) else same(each, made(key, size)) for key, each in enumerate(told)]


class Enough(BaseException):
    """What no `except Exception` sees."""


@pytest.mark.parametrize("error", [SystemExit, Enough])
@pytest.mark.parametrize(("control", "size"), [("ring", SIZE), ("group", SIZE), ("ring", 10)])
def test_fn_cannot_end_a_thread(ranks: Ranks, control: str, size: int, error: type[BaseException]) -> None:
    text = f"fn raised {error.__name__}: enough"
    assert ranks.run(2, leave_in_fn, control, size, error) == [[True, text, True]] * 2


def own_calls(rank: int) -> Any:
    """`fn` that calls the backend, on the rank that makes."""
    box: list[SchedulerBackend] = []

    def fn(raw: Any) -> Any:
        return box[0].take("other") if raw["seed"] == 1 and rank == 0 else twice(raw)

    with backend(fn=fn) as group:
        box.append(group)
        group.submit([("one", raw(1)), ("other", raw(2))])
        told = outcome(lambda: group.take("one", LONG))
        assert same(group.take("other"), made(2))
        box.clear()
        dist.barrier()
        return told if isinstance(told, Raised) else same(told, made(1))


def test_fn_that_takes_fails_and_does_not_wait_for_itself(ranks: Ranks) -> None:
    wrong = Raised(ShmcastError, "fn called take('other'): it would wait for itself")
    assert ranks.run(2, own_calls) == [wrong, True]


# Memory.


def abort_some(rank: int, placement: str, control: str) -> None:
    with backend(placement, control) as group:
        group.submit([(key, raw(key)) for key in range(8)])
        assert same(group.take(0), made(0))
        assert group.abort(1) is True
        assert group.abort(1) is group.abort(0) is group.abort("never") is False
        with pytest.raises(UnknownRequest, match="request 1 was aborted already"):
            group.take(1)
        assert same(group.take(7), made(7)), "all of the batch is there now"
        for key in range(2, 7):
            assert group.abort(key)
        dist.barrier()
        settled(group)


@every_way
def test_what_was_aborted_gives_its_memory_back(ranks: Ranks, placement: str, control: str) -> None:
    ranks.run(3, abort_some, placement, control)


def take_on_one_rank(rank: int, placement: str, control: str) -> None:
    """Aborting or taking is one rank's own business, and so is its order."""
    with backend(placement, control) as group:
        for batch in range(4):
            group.submit([((batch, key), raw(4 * batch + key)) for key in range(4)])
        keys = list(itertools.product(range(4), range(4)))
        for batch, key in keys if rank else reversed(keys):
            if (batch + key + rank) % 2:
                assert same(group.take((batch, key)), made(4 * batch + key))
            else:
                group.abort((batch, key))
        dist.barrier()
        settled(group)


@every_way
def test_ranks_abort_and_take_what_they_like(ranks: Ranks, placement: str, control: str) -> None:
    ranks.run(2, take_on_one_rank, placement, control)


def evict(rank: int, how: dict[str, Any]) -> tuple[int, int]:
    ran: list[int] = []

    def fn(raw: Any) -> Any:
        ran.append(raw["seed"])
        return twice(raw)

    with backend(fn=fn, **how) as group:
        for key in range(6):
            group.submit([(key, raw(key, 2 * COPY_BELOW))])
            until(lambda: group._requests.find(key).wait(0))  # noqa: B023
        assert group.stats().pending == 6
        ran.clear()
        for key in reversed(range(6)):
            assert same(group.take(key), made(key, 2 * COPY_BELOW))
        dist.barrier()
        settled(group)
        # Counted after the results were dropped, which is after whoever waited for the last one was told.
        return group.stats().evicted, len(ran)


def test_beyond_a_count_the_oldest_is_evicted_and_made_again(ranks: Ranks) -> None:
    assert ranks.run(2, evict, {"max_pending": 2}) == [(4, 4)] * 2


def test_beyond_bytes_of_shared_memory_the_oldest_is_evicted(ranks: Ranks) -> None:
    """The rank that makes holds its own memory, not shared one."""
    told = ranks.run(2, evict, {"max_pending_bytes": 5 * COPY_BELOW})
    assert told[1] == (4, 4)


def drop_results(rank: int, placement: str, control: str) -> None:
    """What was taken is the caller's alone; raw inputs are let go with it."""
    with backend(placement, control) as group:
        inputs = [raw(key) for key in range(3)]
        refs = [weakref.ref(each["a"]) for each in inputs]
        group.submit(list(enumerate(inputs)))
        got = [weakref.ref(group.take(key)["a"]) for key in range(3)]
        inputs.clear()
        until(lambda: not any(ref() is not None for ref in [*refs, *got]))
        dist.barrier()


@every_way
def test_nothing_is_kept_of_what_was_taken(ranks: Ranks, placement: str, control: str) -> None:
    ranks.run(2, drop_results, placement, control)
