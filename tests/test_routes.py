"""The ways of a Broadcaster's messages that are there to be compared: routes raw and pickle, headers through a ring."""

import gc
import os
import signal
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast import Broadcaster, Policy, Route, transport
from shmcast.errors import EncodeError, LayoutError, MaterializeError, PeerDied, ShmcastError
from tests.support.codec import same
from tests.support.ranks import Died, Ranks
from tests.test_broadcaster import (
    SHORT,
    Raised,
    Traffic,
    counted,
    double,
    everything,
    fussy,
    hurried,
    outcome,
    payload,
    reference,
    request,
    until_free,
)

pytestmark = pytest.mark.multiprocess

RAW = Policy(route="raw")
PICKLE = Policy(route="pickle")
POLICIES = {
    "raw": RAW,
    "raw, sends": Policy(route="raw", peers_hold_raw=False),
    "pickle": PICKLE,
    "pickle, sends": Policy(route="pickle", peers_hold_raw=False),
    "pickle, agree": Policy(route="pickle", agree=True),
}


# The routes.


def each_way(rank: int, policy: Policy) -> tuple[Any, list[Any], int, Traffic, dict[str, int]]:
    """One request, a batch with a bad one; how often `fn` ran here."""
    ran: list[int] = []

    def fn(raw: Any) -> Any:
        ran.append(1)
        return fussy(raw)

    held = policy.peers_hold_raw or rank == 0
    raws: list[dict[str, Any]] = [{"a": payload(1)}, {"bad": "this one"}, {"a": payload(2), "b": payload(3)}]
    with Broadcaster(policy=policy) as group, counted() as calls:
        one = group.materialize({"a": payload(5)} if held else None, fn)
        batch = group.materialize_batch(raws if held else [], fn)
        told = [Raised(type(each), str(each)) if isinstance(each, Exception) else each for each in batch]
        return one, told, len(ran), Traffic.of(group), dict(calls)


@pytest.mark.parametrize("name", POLICIES)
def test_every_rank_has_the_objects(ranks: Ranks, name: str) -> None:
    policy = POLICIES[name]
    for rank, (one, batch, ran, traffic, _) in enumerate(ranks.run(3, each_way, policy)):
        assert same(one, double({"a": payload(5)}))
        assert same(batch[0], double({"a": payload(1)}))
        assert same(batch[2], double({"a": payload(2), "b": payload(3)}))
        alone = policy.route is Route.RAW or (policy.peers_hold_raw and not policy.agree)
        if (rank == 0 and not policy.agree) or alone:
            assert batch[1] == Raised(KeyError, "'this one'")
        else:
            assert batch[1].kind is MaterializeError
            assert "'this one'" in batch[1].text
        if policy.route is Route.RAW:
            assert ran == 4, "every rank runs fn on what was sent"
        else:
            # Where ranks run fn themselves when it raised, the entry rank does so as well.
            assert ran == (4 + alone if rank == 0 else 1 if alone else 0)
        if rank:
            assert traffic.routes[Route(policy.route).value][0] >= 3


def multimodal(rank: int, policy: Policy) -> Any:
    with Broadcaster(policy=policy) as group:
        return group.materialize_batch([request(seed) for seed in range(3)])


@pytest.mark.parametrize("policy", [RAW, PICKLE], ids=["raw", "pickle"])
def test_multimodal_inputs(ranks: Ranks, policy: Policy) -> None:
    expected = [reference(seed) for seed in range(3)]
    assert all(same(got, expected) for got in ranks.run(2, multimodal, policy))


def single_values(rank: int, policy: Policy) -> list[Any]:
    """Results that look like what carries them."""
    values: list[Any] = [None, [], (1, ""), [(1, "")], [[1, "x"]], "text", {"a": (2, "y")}]
    with Broadcaster(policy=policy) as group:
        told = [group.materialize({"n": n}, lambda raw: values[raw["n"]]) for n in range(len(values))]
        told += group.materialize_batch([{"n": n} for n in range(len(values))], lambda raw: values[raw["n"]])
        return told


@pytest.mark.parametrize("policy", [RAW, PICKLE, Policy()], ids=["raw", "pickle", "auto"])
def test_a_result_is_not_taken_for_what_carries_it(ranks: Ranks, policy: Policy) -> None:
    values: list[Any] = [None, [], (1, ""), [(1, "")], [[1, "x"]], "text", {"a": (2, "y")}]
    assert ranks.run(2, single_values, policy) == [values * 2] * 2


def mapped(rank: int) -> tuple[bool, bool]:
    """With raw what `fn` gets on the others lies in shared memory, also where they hold their own."""
    seen: list[int] = []

    def fn(raw: Any) -> Any:
        seen.append(raw["a"].data_ptr())
        return raw

    mine = {"a": payload(1)}
    with Broadcaster(policy=RAW) as group:
        got = group.materialize(mine, fn)
        own = seen == [mine["a"].data_ptr()]
        ok = torch.equal(got["a"], payload(1))
        del got
        dist.barrier()
        if rank == 0:
            until_free(group)
        return own, ok


def test_raw_inputs_are_mapped(ranks: Ranks) -> None:
    assert ranks.run(2, mapped) == [(True, True), (False, True)]


class Explosive:
    """What cannot be pickled, for a reason of its own."""

    def __reduce__(self) -> Any:
        raise ValueError("not this one")


UNSENDABLE: dict[str, Any] = {"function": lambda: None, "its own reason": Explosive(), "lock": threading.Lock()}


def unsendable(rank: int, what: str, held: bool) -> Any:
    """The second of three cannot be pickled."""
    policy = Policy(route="pickle", peers_hold_raw=held)
    values = [1, UNSENDABLE[what], 3]
    with Broadcaster(hurried(), policy=policy, timeout=SHORT) as group:
        told = [outcome(lambda n=n: group.materialize({"n": n}, lambda raw: values[raw["n"]])) for n in range(3)]  # type: ignore[misc]
        return [type(each).__name__ if not isinstance(each, Raised) else each.kind for each in told]


@pytest.mark.parametrize("what", UNSENDABLE)
def test_what_cannot_be_pickled_is_made_on_every_rank(ranks: Ranks, what: str) -> None:
    kind = type(UNSENDABLE[what]).__name__
    assert ranks.run(2, unsendable, what, True) == [["int", kind, "int"]] * 2


@pytest.mark.parametrize("what", UNSENDABLE)
def test_what_cannot_be_pickled_is_an_error_where_it_cannot_be_made(ranks: Ranks, what: str) -> None:
    entry, other = ranks.run(2, unsendable, what, False)
    assert (entry[0], entry[2], other[0], other[2]) == ("int",) * 4
    assert entry[1] in (type(UNSENDABLE[what]).__name__, EncodeError, MaterializeError) or issubclass(
        entry[1], Exception
    )
    assert issubclass(other[1], Exception)


# Headers through a ring.


def over_a_ring(rank: int, n: int) -> list[bool]:
    told = []
    for src in range(n):
        with Broadcaster(src=src, control="ring") as group, counted() as calls:
            told.append(same(group.broadcast(everything(src) if rank == src else None), everything(src)))
            told.append(same(group.materialize(request(src)), reference(src)))
            raws: list[Any] = [{"a": payload(1)}, {"bad": "this one"}, {"a": payload(2)}]
            batch = group.materialize_batch(raws, fussy)
            told.append(same(batch[::2], [double({"a": payload(1)}), double({"a": payload(2)})]))
            told.append(isinstance(batch[1], KeyError))
            told.append(group.materialize_batch([], fussy) == [])
            told.append(not calls)
            told.append(group.route is Route.SHM and set(group.stats().fallbacks) <= {"raised"})
            # The frames of its error hold the batch.
            del batch
            gc.collect()
            dist.barrier()
            if rank == src:
                until_free(group)
            dist.barrier()
    return told


@pytest.mark.parametrize("n", [2, 3])
def test_a_ring_takes_no_collective(ranks: Ranks, n: int) -> None:
    assert ranks.run(n, over_a_ring, n) == [[True] * 7 * n] * n


def share_over_a_ring(rank: int) -> bool:
    with Broadcaster(control="ring") as group:
        told: list[Any] = [group.share({"a": payload(1)}) if rank == 0 else None]
        dist.broadcast_object_list(told)
        got: Any = group.open(told[0]) if rank else {"a": payload(1)}
        equal = torch.equal(got["a"], payload(1))
        dist.barrier()
        return equal


def test_handles_ride_along(ranks: Ranks) -> None:
    assert ranks.run(2, share_over_a_ring) == [True, True]


def without_raw(rank: int) -> list[Any]:
    policy = Policy(peers_hold_raw=False)
    with Broadcaster(control="ring", policy=policy) as group:
        raw = {"a": payload(1)} if rank == 0 else {}
        told = [same(group.materialize(raw, double), double({"a": payload(1)}))]
        told.append(outcome(lambda: group.materialize({"bad": "one"} if rank == 0 else {}, fussy)).kind)
        told.append(outcome(lambda: group.broadcast((lambda: 1) if rank == 0 else None)).kind)
        told.append(same(group.broadcast(payload(2) if rank == 0 else None), payload(2)))
        dist.barrier()
        return told


def test_a_ring_where_only_the_entry_rank_has_raw_inputs(ranks: Ranks) -> None:
    assert ranks.run(2, without_raw) == [
        [True, KeyError, EncodeError, True],
        [True, MaterializeError, MaterializeError, True],
    ]


def no_ring(rank: int, policy: Policy) -> Any:
    return outcome(lambda: Broadcaster(control="ring" if rank else "group", policy=policy if rank else None))


@pytest.mark.parametrize(
    "policy", [PICKLE, Policy(route="inline"), Policy(agree=True)], ids=["pickle", "inline", "agree"]
)
def test_what_takes_collectives_is_refused(ranks: Ranks, policy: Policy) -> None:
    other, own = ranks.run(2, no_ring, policy)
    assert own.kind is ValueError
    assert "takes collectives" in own.text
    assert other.kind is ShmcastError
    assert "rank 1 was made with wrong arguments" in other.text


def lose_the_entry_rank(rank: int) -> list[Any]:
    with Broadcaster(control="ring", timeout=60.0) as group:
        kept = group.broadcast(payload(5) if rank == 0 else None)
        dist.barrier()

        def fn(raw: Any) -> Any:
            if rank == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return double(raw)

        told = [outcome(lambda n=n: group.materialize({"a": payload(n)}, fn)) for n in range(3)]  # type: ignore[misc]
        equal = [same(each, double({"a": payload(n)})) for n, each in enumerate(told)]
        return [*equal, outcome(group.broadcast).kind, torch.equal(kept, payload(5)), dict(group.stats().fallbacks)]


@pytest.mark.faults
def test_the_entry_rank_of_a_ring_dies(ranks: Ranks) -> None:
    dead, *others = ranks.run(3, lose_the_entry_rank, dies={0})
    assert isinstance(dead, Died)
    assert others == [[True, True, True, PeerDied, True, {"control": 3}]] * 2


def late_header(rank: int, held: bool) -> tuple[list[Any], dict[str, int]]:
    """The entry rank calls when the other has given up; then all is as before."""
    policy = Policy(peers_hold_raw=held)
    raw = {"a": payload(1)}
    with Broadcaster(control="ring", policy=policy, timeout=1.0) as group:
        told = []
        if rank == 0:
            dist.barrier()
        told.append(outcome(lambda: group.materialize(raw, double)))
        if rank:
            dist.barrier()
        dist.barrier()
        for _ in range(3):
            # The entry rank first, so that its header is there.
            if rank:
                dist.barrier()
            told.append(outcome(lambda: group.materialize(raw, double)))
            if rank == 0:
                dist.barrier()
        equal = [each.kind if isinstance(each, Raised) else same(each, double(raw)) for each in told]
        told.clear()
        dist.barrier()
        if rank == 0:
            until_free(group)
        dist.barrier()
        return equal, dict(group.stats().fallbacks)


@pytest.mark.parametrize("held", [True, False])
def test_a_header_that_comes_too_late(ranks: Ranks, held: bool) -> None:
    entry, other = ranks.run(2, late_header, held)
    assert entry == ([True] * 4, {})
    assert other == ([held or MaterializeError, True, True, True], {"late": 1})


def miss_a_header(rank: int) -> tuple[list[bool], dict[str, int]]:
    """The other rank makes its calls when the entry rank is a whole ring further."""
    count = 1024 + 5
    with Broadcaster(control="ring", policy=Policy(wait=0.01, local_below=0), timeout=30.0) as group:
        if rank:
            dist.barrier()
        told = [group.materialize({"n": n}, lambda raw: [raw["n"]]) == [n] for n in range(count)]
        if rank == 0:
            dist.barrier()
        dist.barrier()
        told.append(group.materialize({"n": -1}, lambda raw: [raw["n"]]) == [-1])
        dist.barrier()
        if rank == 0:
            until_free(group)
        dist.barrier()
        return [all(told)], dict(group.stats().fallbacks)


def test_a_rank_that_is_a_whole_ring_behind(ranks: Ranks) -> None:
    entry, other = ranks.run(2, miss_a_header)
    assert entry == ([True], {})
    assert other[0] == [True]
    assert other[1]["missed"] == 5


def damaged(rank: int) -> tuple[bool, dict[str, int]]:
    """What came cannot be read on one rank: it is given back, and made there."""
    with pytest.MonkeyPatch.context() as patch, Broadcaster(control="ring") as group:
        if rank == 1:

            def fetch(self: transport.Reader, *args: Any, **kwargs: Any) -> Any:
                raise LayoutError("damaged")

            patch.setattr(transport.Reader, "fetch", fetch)
        equal = same(group.materialize({"a": payload(1)}, double), double({"a": payload(1)}))
        patch.undo()
        equal = same(group.materialize({"a": payload(2)}, double), double({"a": payload(2)})) and equal
        dist.barrier()
        if rank == 0:
            until_free(group)
        dist.barrier()
        return equal, dict(group.stats().fallbacks)


def test_what_one_rank_cannot_read(ranks: Ranks) -> None:
    assert ranks.run(3, damaged) == [(True, {}), (True, {"open": 1}), (True, {})]
