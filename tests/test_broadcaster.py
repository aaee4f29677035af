"""A group over gloo: one rank's object on every rank, byte for byte, under one header a call."""

import copy
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import shmcast
from shmcast import Broadcaster, Modality, MultimodalDataItem, MultimodalInputs, Policy, Route, transport
from shmcast.errors import ArenaFull, ClosedError, EncodeError, MaterializeError, ShmcastError, StaleHandle
from tests.support.codec import same
from tests.support.ranks import Ranks

pytestmark = pytest.mark.multiprocess

HOLDS = Policy(fn_keeps_leaves=True)
SENDS = Policy(peers_hold_raw=False)
COLLECTIVES = (
    *("all_gather", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast"),
    *("broadcast_object_list", "gather", "recv", "reduce", "scatter", "send"),
)
WAIT_SECONDS = 30.0
SHORT = 2.0


# What travels.


def request(seed: int, rows: int = 64) -> dict[str, Any]:
    """Raw inputs with every kind of feature: two images cut from one parent, a video, a sound, lists, embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    parent = numbers(2 * rows, 1176)
    grids = torch.tensor([[1, 8, 8], [1, 4, 16]])
    item = MultimodalDataItem
    items = [
        item(
            Modality.IMAGE, offsets=[(3, 66)], feature=parent[:rows], model_specific_data={"image_grid_thw": grids[:1]}
        ),
        item(
            Modality.IMAGE, offsets=[(70, 133)], feature=parent[rows:], model_specific_data={"fps": 2.0, "none": None}
        ),
        item(
            Modality.VIDEO, feature=numbers(rows, 600, dtype=torch.bfloat16), model_specific_data={"second": [1, 2.5]}
        ),
        item(Modality.AUDIO, feature=numbers(80, 300).numpy()),
        item(Modality.AUDIO, feature=[numbers(3, 4), numbers(0, 7)]),
        item(Modality.MULTI_IMAGES, precomputed_embeddings=numbers(rows, 512, dtype=torch.float16).t()),
    ]
    return {
        "mm_items": items,
        "input_ids": list(range(500)),
        "im_token_id": 151655,
        "im_start_id": 151652,
        "im_end_id": 151653,
        "slice_start_id": 7,
        "slice_end_id": 8,
        "video_token_id": 151656,
        "audio_token_id": 151646,
        "audio_start_id": 151647,
        "audio_end_id": 151648,
        "mrope_positions": torch.arange(1500, dtype=torch.int64).view(3, 500),
        "mrope_position_delta": torch.tensor([[seed]]),
    }


def reference(seed: int) -> MultimodalInputs:
    """What every rank must get."""
    return MultimodalInputs.from_dict(request(seed))


def payload(seed: int, size: int = 100_000) -> torch.Tensor:
    """Bytes that depend on the seed alone."""
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def double(raw: Any) -> Any:
    """A result that is no part of `raw`, so that its bytes must travel."""
    return {name: tensor * 2 for name, tensor in raw.items()}


def fussy(raw: Any) -> Any:
    """`double`, which refuses a request that is marked."""
    if "bad" in raw:
        raise KeyError(raw["bad"])
    return double(raw)


# What a rank function needs.


@dataclass(frozen=True)
class Traffic:
    """Counters of one rank, as plain values."""

    routes: dict[str, tuple[int, int]]
    fallbacks: dict[str, int]

    @classmethod
    def of(cls, group: Broadcaster) -> "Traffic":
        stats = group.stats()
        return cls({route: (n, size) for route, (n, size) in stats.routes.items()}, dict(stats.fallbacks))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another process does."""
    deadline, never = time.monotonic() + WAIT_SECONDS, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it never came true")
        never.wait(1e-3)


def until_free(group: Broadcaster, left: int = 0) -> None:
    """Until all leases that this entry rank has given are back, and only `left` blocks live."""
    until(lambda: (stats := group.stats()).live_blocks == left and not any(reader.held for reader in stats.leases))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count every call of a collective of torch.distributed."""
    calls: Counter[str] = Counter()

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        yield calls


@contextmanager
def warned() -> Iterator[list[str]]:
    """What the library logs as warnings."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logger = logging.getLogger("shmcast")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@contextmanager
def environment(**names: str) -> Iterator[None]:
    """Environment variables, for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield


def outcome(call: Callable[[], Any]) -> Any:
    """What `call` gives, or the class and text of what it raises."""
    try:
        return call()
    except BaseException as error:
        return Raised(type(error), str(error))


@dataclass(frozen=True)
class Raised:
    """An exception, as one rank tells another process of it."""

    kind: type[BaseException]
    text: str


def hurried(seconds: float = 2 * SHORT) -> dist.ProcessGroup:
    """A gloo group over all ranks whose collectives give up soon, also those that nobody waits for any more."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))
    return group


# One object on every rank.


def materialize_one(rank: int, policy: Policy, src: int, seed: int) -> tuple[Any, bool, list[int], Traffic]:
    held = policy.peers_hold_raw or rank == src
    raw = request(seed) if held else None
    lengths: list[int] = []
    put = transport.Writer.put

    def measured(self: transport.Writer, *args: Any, **kwargs: Any) -> shmcast.Handle:
        handle = put(self, *args, **kwargs)
        lengths.append(handle.where.length)
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport.Writer, "put", measured)
        with Broadcaster(src=src, policy=policy) as group:
            result: Any = group.materialize(raw)
            first, second = (item.feature for item in result.mm_items[:2])
            assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr(), "one parent, sent once"
            mine = raw is not None and first.data_ptr() == raw["mm_items"][0].feature.data_ptr()
            return result, mine, lengths, Traffic.of(group)


@pytest.mark.parametrize(("n", "src"), [(2, 1), (4, 0), (8, 5)])
def test_references_travel_alone_where_every_rank_holds_raw(ranks: Ranks, n: int, src: int) -> None:
    for rank, (result, mine, lengths, traffic) in enumerate(ranks.run(n, materialize_one, HOLDS, src, 7)):
        assert same(result, reference(7))
        assert mine, "the tensors of the result are those of this rank's own raw inputs"
        assert traffic == Traffic({"shm": (1, 0)}, {}), "no payload travels"
        assert len(lengths) == (rank == src)
        assert all(length < 2048 for length in lengths)


@pytest.mark.parametrize(("n", "src"), [(2, 0), (4, 3), (8, 2)])
def test_all_bytes_travel_where_only_the_entry_rank_holds_raw(ranks: Ranks, n: int, src: int) -> None:
    for result, _, _, traffic in ranks.run(n, materialize_one, SENDS, src, 8):
        assert same(result, reference(8))
        assert traffic.fallbacks == {}
        assert traffic.routes["shm"][0] == 1
        assert traffic.routes["shm"][1] > 500_000


def test_without_the_promise_arrays_travel_and_tensors_are_references(ranks: Ranks) -> None:
    for result, mine, _, traffic in ranks.run(2, materialize_one, Policy(), 0, 9):
        assert same(result, reference(9))
        assert mine
        assert 80 * 300 * 4 <= traffic.routes["shm"][1] < 100_000


def everything(seed: int) -> dict[Any, Any]:
    shared = payload(seed)
    return {
        "tree": [(1, 2.5, None, b"x" * 5000), {"deep": [{"er": {3, 4}}]}, "text" * 100, True],
        "views": [shared[:10], shared[10:90_000].view(-1, 10).t(), shared[5]],
        "empty": [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.int16), np.empty((0, 4))],
        "arrays": [np.arange(40_000, dtype=np.int32).reshape(200, 200).T, np.float64(1.5)],
        "dtypes": [shared[: 4 * 64].view(kind) for kind in (torch.bfloat16, torch.float8_e4m3fn, torch.complex64)],
        "long": list(range(3000)),
        (1, Modality.VIDEO): MultimodalInputs(mm_items=[], image_pad_len=[[1, 2]], num_image_tokens=3),
    }


def broadcast_each(rank: int, n: int) -> list[tuple[bool, Traffic, dict[str, int]]]:
    told = []
    for src in range(n):
        with Broadcaster(src=src) as group, counted() as calls:
            sent = everything(src) if rank == src else f"rank {rank} knows nothing"
            got = group.broadcast(sent)
            if rank == src:
                assert got is sent
            told.append((same(got, everything(src)), Traffic.of(group), dict(calls)))
    return told


@pytest.mark.parametrize("n", [2, 4])
def test_any_tree_from_any_rank_in_one_collective(ranks: Ranks, n: int) -> None:
    for told in ranks.run(n, broadcast_each, n):
        for equal, traffic, calls in told:
            assert equal
            assert calls == {"broadcast": 1}
            assert (traffic.routes["shm"][0], traffic.fallbacks) == (1, {})


def write_afterwards(rank: int) -> tuple[bool, bool]:
    """The entry rank overwrites what it has sent, then every other rank what it has got."""
    with Broadcaster() as group:
        mine = payload(1)
        got = group.broadcast(mine)
        if rank == 0:
            got.fill_(0)
        dist.barrier()
        kept = rank == 0 or torch.equal(got, payload(1))
        got.fill_(rank)
        dist.barrier()
        return kept, bool((got == rank).all())


def test_a_sender_may_overwrite_and_a_receiver_may_write_in_place(ranks: Ranks) -> None:
    assert ranks.run(4, write_afterwards) == [(True, True)] * 4


# Batches.


def materialize_batches(rank: int, policy: Policy) -> tuple[Any, ...]:
    held = policy.peers_hold_raw or rank == 0
    with Broadcaster(policy=policy) as group, counted() as calls:
        requests = group.materialize_batch([request(seed) for seed in (1, 2, 3)] if held else None)  # type: ignore[arg-type]
        none = group.materialize_batch([] if held else ())
        raws: list[dict[str, Any]] = [{"a": payload(1)}, {"bad": "this one"}, {"a": payload(2), "b": payload(3)}]
        mixed = group.materialize_batch(raws if held else [], fussy)
        told = [Raised(type(each), str(each)) if isinstance(each, Exception) else each for each in mixed]
        return requests, none, told, dict(calls), Traffic.of(group)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("policy", [Policy(), SENDS, Policy(agree=True)], ids=["holds", "sends", "agree"])
def test_one_header_for_a_batch_and_a_bad_request_fails_alone(ranks: Ranks, policy: Policy, n: int) -> None:
    for rank, (requests, none, mixed, calls, _) in enumerate(ranks.run(n, materialize_batches, policy)):
        assert same(requests, [reference(seed) for seed in (1, 2, 3)])
        assert none == []
        assert same(mixed[0], double({"a": payload(1)}))
        assert same(mixed[2], double({"a": payload(2), "b": payload(3)}))
        if policy.agree or (not policy.peers_hold_raw and rank > 0):
            assert mixed[1] == Raised(MaterializeError, "fn raised on rank 0, the entry rank: KeyError: 'this one'")
        else:
            assert mixed[1] == Raised(KeyError, "'this one'")
        assert calls == {"broadcast": 3, **({"all_reduce": 3} if policy.agree else {})}


def test_a_batch_counts_one_message_a_request_on_every_rank(ranks: Ranks) -> None:
    for *_, traffic in ranks.run(2, materialize_batches, SENDS):
        assert traffic.routes["shm"][0] == 5


def nested_calls(rank: int) -> list[Any]:
    """`fn` of one group uses another; then the same one, which is an error of that request."""
    with Broadcaster(dist.new_group()) as inner, Broadcaster() as outer:
        told: list[Any] = [outer.materialize({"a": payload(1)}, lambda raw: [double(raw)])]
        if rank == 0:
            told.append(outer.materialize({"a": payload(2)}, lambda raw: inner.broadcast(double(raw))))
        else:
            told.append(inner.broadcast())
            told.append(outer.materialize({"a": payload(2)}, double))
        told.append(outcome(lambda: outer.materialize({"a": payload(3)}, lambda raw: outer.materialize(raw, double))))
        told.append(outer.materialize({"a": payload(4)}, double))
        return told


def test_fn_may_use_another_group_but_not_its_own(ranks: Ranks) -> None:
    first, second = ranks.run(2, nested_calls)
    two = double({"a": payload(2)})
    assert same(first[:2], [[double({"a": payload(1)})], two])
    assert same(second[:3], [[double({"a": payload(1)})], two, two])
    for told in (first, second):
        assert told[-2].kind is ShmcastError
        assert "two threads" in told[-2].text
        assert same(told[-1], double({"a": payload(4)}))


# One header a call.


def every_call(rank: int, policy: Policy, capacity: int | None) -> list[dict[str, int]]:
    held = policy.peers_hold_raw or rank == 0
    told = []
    with Broadcaster(policy=policy, capacity=capacity) as group:
        small, big = ({"a": payload(1, 100)}, {"a": payload(2, 1 << 20)}) if held else ({}, {})
        three: list[Any] = [small, big, {"bad": 1}]

        def count(call: Callable[[], Any]) -> None:
            with counted() as calls:
                outcome(call)
            told.append(dict(calls))

        count(lambda: group.broadcast(small))
        count(lambda: group.broadcast(lambda: None if rank else 1))
        count(lambda: group.materialize(small, double))
        count(lambda: group.materialize(big, double))
        count(lambda: group.materialize({"bad": 1}, fussy))
        count(lambda: group.materialize(big, lambda raw: raw.keys()))  # a view of keys cannot travel
        count(lambda: group.materialize_batch(three if held else [], fussy))
        count(lambda: group.materialize_batch([], double))
    return told


ONE = {"broadcast": 1}
TWO = {"broadcast": 2}
VOTE = {"broadcast": 1, "all_reduce": 1}
VOTE_INLINE = {"broadcast": 2, "all_reduce": 1}


@pytest.mark.parametrize(
    ("policy", "capacity", "expected"),
    [
        pytest.param(Policy(), None, [ONE] * 8, id="holds"),
        pytest.param(SENDS, None, [ONE] * 8, id="sends"),
        pytest.param(Policy(), 16384, [ONE] * 8, id="holds, no room"),
        pytest.param(SENDS, 16384, [ONE, ONE, ONE, TWO, ONE, ONE, TWO, ONE], id="sends, no room"),
        pytest.param(Policy(route="local"), None, [ONE] * 8, id="local"),
        pytest.param(Policy(threshold=1000), None, [ONE] * 8, id="threshold"),
        pytest.param(Policy(route="inline"), None, [TWO, ONE, TWO, TWO, ONE, ONE, TWO, ONE], id="inline"),
        pytest.param(Policy(agree=True), None, [VOTE, ONE, VOTE, VOTE, ONE, ONE, VOTE, VOTE], id="agree"),
        pytest.param(
            Policy(agree=True, route="inline"),
            None,
            [VOTE_INLINE, ONE, VOTE_INLINE, VOTE_INLINE, ONE, ONE, VOTE_INLINE, VOTE],
            id="agree inline",
        ),
    ],
)
def test_each_call_is_one_header_whatever_happens(
    ranks: Ranks, policy: Policy, capacity: int | None, expected: list[dict[str, int]]
) -> None:
    assert ranks.run(2, every_call, policy, capacity) == [expected] * 2


# Which ranks.


def alone(rank: int) -> Any:
    with Broadcaster() as group, counted() as calls:
        raw = {"a": payload(1, 10)}
        got = group.materialize(raw, double), group.materialize_batch([raw, {"bad": 1}], fussy), group.broadcast(raw)
        assert got[2] is raw
        with pytest.raises(ArenaFull, match="group of one"):
            group.share(raw)
        with pytest.raises(ShmcastError, match="group of one"):
            group.open(None)  # type: ignore[arg-type]
        assert group.empty((2, 3), torch.int8).shape == (2, 3)
        with pytest.raises(KeyError, match="as told"):
            group.materialize({"bad": "as told"}, fussy)
        assert group.route is Route.LOCAL
        assert not [name for name in os.listdir("/dev/shm") if name.startswith("shmcast-")]
        return same(got[0], double(raw)), repr(got[1][1]), dict(calls), Traffic.of(group)


def test_a_group_of_one_runs_fn_and_nothing_else(ranks: Ranks) -> None:
    assert ranks.run(1, alone) == [(True, "KeyError(1)", {}, Traffic({}, {}))]


def test_no_process_group_is_like_a_group_of_one(ranks: Ranks) -> None:
    assert ranks.start_each(alone, [(0,)]).results() == [(True, "KeyError(1)", {}, Traffic({}, {}))]


def without_membership(rank: int) -> Raised | None:
    first = dist.new_group([0])
    told: Raised | None = outcome(lambda: Broadcaster(first)) if rank else None
    return told


def test_a_rank_outside_the_group_is_told_so(ranks: Ranks) -> None:
    assert ranks.run(2, without_membership)[1] == Raised(ValueError, "this rank is not a member of the group")


def in_subgroups(rank: int, members: list[list[int]], src: int) -> tuple[list[Any], dict[str, int]]:
    """As under DP attention: every group materializes its own requests at the same time."""
    got: list[Any] = []
    made = [dist.new_group(each) for each in members]
    mine = next(i for i, each in enumerate(members) if rank in each)
    with Broadcaster(made[mine], src=src, policy=SENDS) as group:
        leads = members[mine][src] == rank
        for number in range(5):
            seed = 100 * mine + number
            got.append(group.materialize({"a": payload(seed)} if leads else {}, double))
            got.append(group.broadcast([payload(seed + 50)] if leads else None))
            told: list[Any] = [group.share([number, mine]) if leads and len(members[mine]) > 1 else None]
            dist.broadcast_object_list(told, src=members[mine][src], group=made[mine])
            got.append([number, mine] if leads else group.open(told[0]))
        return got, Traffic.of(group).fallbacks


@pytest.mark.parametrize(
    ("n", "members", "src"),
    [
        (4, [[2, 3], [0, 1]], 1),
        (4, [[0], [1, 2, 3]], 0),
        (8, [[4, 5, 6, 7], [0, 1, 2, 3]], 3),
        (4, [[1, 3], [0, 2]], 1),
    ],
)
def test_groups_of_other_ranks_work_at_the_same_time(ranks: Ranks, n: int, members: list[list[int]], src: int) -> None:
    for rank, (got, fallbacks) in enumerate(ranks.run(n, in_subgroups, members, src)):
        mine = next(i for i, each in enumerate(members) if rank in each)
        seeds = [100 * mine + number for number in range(5)]
        expected = [
            each
            for number, seed in enumerate(seeds)
            for each in (double({"a": payload(seed)}), [payload(seed + 50)], [number, mine])
        ]
        assert same(got, expected)
        assert fallbacks == {}


def interleaved(rank: int, opposite: bool) -> list[Any]:
    """Two groups over the same ranks, from two threads of each rank, in whatever order they get to run."""
    groups = [Broadcaster(dist.new_group(), src=number, policy=SENDS) for number in (0, 1)]
    got: list[list[Any]] = [[], []]

    def work(which: int) -> None:
        for number in range(20):
            raw = {"a": payload(1000 * which + number)} if rank == which else {}
            got[which].append(groups[which].materialize(raw, double))

    threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
    for thread in threads[:: -1 if opposite and rank % 2 else 1]:
        thread.start()
    for thread in threads:
        thread.join()
    for group in groups:
        group.close()
    return got


def test_two_groups_of_the_same_ranks_do_not_disturb_each_other(ranks: Ranks) -> None:
    expected = [[double({"a": payload(1000 * which + number)}) for number in range(20)] for which in (0, 1)]
    assert all(same(got, expected) for got in ranks.run(4, interleaved, True))


def several(rank: int) -> list[Any]:
    """In turns: calls of two groups in one thread."""
    with Broadcaster(dist.new_group(), src=0) as one, Broadcaster(dist.new_group(), src=2, policy=SENDS) as two:
        got: list[Any] = []
        for number in range(10):
            got.append(one.materialize({"a": payload(number)}, double))
            got.append(two.broadcast(payload(number + 20) if rank == 2 else None))
        return got


def test_one_thread_may_alternate_between_groups(ranks: Ranks) -> None:
    expected = [each for k in range(10) for each in (double({"a": payload(k)}), payload(k + 20))]
    assert all(same(got, expected) for got in ranks.run(3, several))


# Handles.


def tell(group: Broadcaster, obj: Any) -> Any:
    """Carry `obj` by another channel than the library's, from rank 0."""
    told = [obj]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def share_and_open(rank: int) -> list[Any]:
    with Broadcaster() as group:
        if rank == 0:
            handles = [group.share({"a": payload(number)}, opens=2) for number in range(3)]
            tell(group, handles)
            dist.barrier()
            group.withdraw(handles[2])
            dist.barrier()
            dist.barrier()
            until_free(group)
            return [Traffic.of(group)]
        handles = tell(group, None)
        first, again = (group.open(handles[0]) for _ in range(2))
        again["a"].fill_(0)  # type: ignore[index]
        got: list[Any] = [first, outcome(lambda: group.open(handles[0]))]
        group.discard(handles[1])
        got.append(outcome(lambda: group.open(handles[1])))
        if rank == 1:
            got.append(copy.deepcopy(group.open(handles[2])))
        dist.barrier()
        dist.barrier()
        got.append(outcome(lambda: group.open(handles[2])))
        group.discard(handles[2])
        copied = copy.deepcopy(got[0]), got[1:], Traffic.of(group)
        del first, again, got
        dist.barrier()
        return list(copied)


def test_handles_are_opened_discarded_and_withdrawn(ranks: Ranks) -> None:
    entry, *others = ranks.run(3, share_and_open)
    assert entry[0] == Traffic({"shm": (3, 300_000)}, {})
    for rank, (first, rest, traffic) in enumerate(others, start=1):
        assert same(first, {"a": payload(0)})
        if rank == 1:
            assert same(rest.pop(2), {"a": payload(2)})
        assert [each.kind for each in rest] == [StaleHandle] * 3
        assert traffic.routes["shm"][0] == 2 + (rank == 1)


def empty_and_send(rank: int) -> Any:
    with Broadcaster() as group:
        if rank:
            plain = group.empty((3, 4), torch.bfloat16)
            assert plain.shape == (3, 4)
            assert plain.dtype is torch.bfloat16
            got: Any = group.broadcast()
            again: Any = group.broadcast()
            dist.barrier()
            return got, again, Traffic.of(group)
        before = group.stats()
        frame = group.empty((1024, 1024), torch.float32)
        frame.copy_(torch.arange(1 << 20).view(1024, 1024))
        held = group.stats()
        group.broadcast({"whole": frame, "part": frame[1:].t()})
        group.broadcast([frame])
        dist.barrier()
        sent = group.stats()
        # A page for each message, for none of them 4 MiB.
        assert before.free_bytes - held.free_bytes == (4 << 20) + 4096
        assert held.free_bytes - sent.free_bytes == 2 * 4096
        del frame
        until_free(group)
        assert group.stats().free_bytes == before.free_bytes
        return {}, {}, Traffic.of(group)


def test_a_tensor_of_empty_is_sent_without_a_copy(ranks: Ranks) -> None:
    frame = torch.arange(1 << 20, dtype=torch.float32).view(1024, 1024)
    for got, again, _ in ranks.run(4, empty_and_send)[1:]:
        assert torch.equal(got["whole"], frame)
        assert torch.equal(got["part"], frame[1:].t())
        assert torch.equal(again[0], frame)


def leases_come_back(rank: int) -> list[int]:
    """Every block is free again when the last tensor is gone, message after message."""
    with Broadcaster(policy=SENDS) as group:
        kept = []
        for number in range(6):
            got = group.materialize({"a": payload(number)}, double)
            kept.append(got if rank % 2 else None)
        dist.barrier()
        if rank == 0:
            until(lambda: [reader.held for reader in group.stats().leases] == [6, 1, 6])
        dist.barrier()
        del kept, got
        if rank == 0:
            until_free(group)
        return [reader.opened for reader in group.stats().leases]


def test_leases_come_back_when_tensors_go(ranks: Ranks) -> None:
    assert ranks.run(4, leases_come_back) == [[0, 0, 0], [], [], []]


# Misuse, stats, the end.


def misuse(rank: int) -> list[Raised]:
    with Broadcaster(src=1) as group:
        calls: list[Callable[[], Any]] = (
            [lambda: group.open(None), lambda: group.discard(None)]  # type: ignore[arg-type]
            if rank == 1
            else [lambda: group.share(1), lambda: group.withdraw(None)]  # type: ignore[arg-type]
        )
        told = [outcome(call) for call in calls]
        assert group.route is Route.SHM
        if rank == 1:
            told.append(outcome(lambda: group.share({"a": [1, len]})))
    group.close()
    closed: tuple[Callable[[], Any], ...] = (
        group.stats,
        group.broadcast,
        lambda: group.materialize({}),
        lambda: group.empty((3,)),
    )
    return [*told, *map(outcome, closed)]


def test_misuse_is_told_and_a_closed_group_stays_closed(ranks: Ranks) -> None:
    other, entry = ranks.run(2, misuse)
    assert [each.kind for each in other] == [ShmcastError] * 2 + [ClosedError] * 4
    assert other[0].text == "share() is for the entry rank, rank 1, not 0"
    assert [each.kind for each in entry] == [ShmcastError] * 2 + [EncodeError] + [ClosedError] * 4
    assert "rank 1 shares, and has the object" in entry[0].text
    assert '["a"][1]' in entry[2].text


def close_early(rank: int) -> bool:
    """The entry rank closes while others hold tensors: they stay valid."""
    group = Broadcaster()
    got = group.broadcast(payload(3) if rank == 0 else None)
    if rank == 0:
        group.close()
    dist.barrier()
    valid = torch.equal(got, payload(3))
    group.close()
    return valid and torch.equal(got, payload(3))


def test_tensors_outlive_the_group_on_both_ends(ranks: Ranks) -> None:
    assert ranks.run(3, close_early) == [True] * 3


def two_threads(rank: int) -> tuple[Any, Raised | None]:
    entered, leave = threading.Event(), threading.Event()

    def slow(raw: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        entered.set()
        leave.wait(WAIT_SECONDS)
        return {name: tensor * 2 for name, tensor in raw.items()}

    with Broadcaster() as group:
        if rank:
            return group.materialize({"a": payload(1)}, double), None
        got: list[Any] = []
        first = threading.Thread(target=lambda: got.append(group.materialize({"a": payload(1)}, slow)))
        first.start()
        entered.wait(WAIT_SECONDS)
        second: Raised = outcome(group.broadcast)
        leave.set()
        first.join()
        return got[0], second


def test_two_threads_at_once_in_one_group_are_an_error_of_the_second(ranks: Ranks) -> None:
    (first, told), (other, _) = ranks.run(2, two_threads)
    assert same(first, double({"a": payload(1)}))
    assert same(other, first)
    assert told is not None
    assert told.kind is ShmcastError
    assert "two threads" in told.text


# Settings.


def made_with(rank: int, odd: int, changed: dict[str, Any], names: dict[str, str], policy: Policy) -> tuple[Any, ...]:
    """Rank `odd` has other settings; then each kind of call once."""
    settings: dict[str, Any] = {"policy": policy, "timeout": SHORT, **(changed if rank == odd else {})}
    held = settings["policy"].peers_hold_raw or rank == 0
    with environment(**(names if rank == odd else {})), warned() as lines:
        group = Broadcaster(hurried(), **settings)
    with group:
        raw = {"a": payload(1)} if held else {}
        got = [
            outcome(lambda: group.materialize(raw, double)),
            outcome(lambda: group.materialize_batch([raw] if held else [], double)),
            outcome(lambda: group.broadcast(payload(2) if rank == 0 else None)),
            isinstance(outcome(lambda: group.materialize({"bad": 1} if held else {}, fussy)), Raised),
        ]
        return group.route, dict(group.stats().fallbacks), lines, got


EXPECTED: list[Any] = [double({"a": payload(1)}), [double({"a": payload(1)})], payload(2), True]
DIFFER = [
    pytest.param({"allow": ("tests.support",)}, {}, Policy(), "other settings.*tests.support", id="allow"),
    pytest.param({"allow": (Traffic,)}, {}, SENDS, "other settings.*Traffic", id="allow, sends"),
    pytest.param({"policy": Policy(threshold=5)}, {}, Policy(), "other settings.*threshold", id="threshold"),
    pytest.param({"policy": Policy(wait=1)}, {}, Policy(), "other settings.*wait", id="wait"),
    pytest.param({"policy": Policy(route="inline")}, {}, Policy(), "other settings.*inline", id="route"),
    pytest.param({}, {"SHMCAST_DISABLE": "1"}, Policy(), "SHMCAST_DISABLE is set on rank 1", id="disable"),
    pytest.param({}, {"SHMCAST_DISABLE": "yes"}, SENDS, "SHMCAST_DISABLE is set on rank 1", id="disable, sends"),
    pytest.param({}, {"SHMCAST_DISABLE": "1"}, Policy(agree=True), "SHMCAST_DISABLE", id="disable, agree"),
    pytest.param({}, {"SHMCAST_INLINE_MAX": "77"}, Policy(), "other settings.*77", id="inline_max"),
    pytest.param({"src": 1}, {}, Policy(), "other settings.*src", id="src"),
    pytest.param({"src": 1}, {}, SENDS, "other settings.*src", id="src, sends"),
    pytest.param({"policy": Policy(agree=True)}, {}, Policy(), "other settings.*agree", id="agree"),
    pytest.param({"policy": SENDS}, {}, Policy(), "other settings.*peers_hold_raw", id="one sends"),
    pytest.param({"policy": Policy()}, {}, SENDS, "other settings.*peers_hold_raw", id="one holds"),
]


@pytest.mark.parametrize(("changed", "names", "policy", "why"), DIFFER)
def test_ranks_that_differ_go_without_shared_memory(
    ranks: Ranks, changed: dict[str, Any], names: dict[str, str], policy: Policy, why: str
) -> None:
    policies = policy, changed.get("policy", policy)
    everywhere = all(each.peers_hold_raw and not each.agree for each in policies)
    expected = Route.LOCAL if everywhere else Route.INLINE
    for route, fallbacks, lines, got in ranks.run(3, made_with, 1, changed, names, policy):
        assert route is expected
        assert same(got, EXPECTED)
        assert fallbacks["disabled"] >= 1
        assert [line for line in lines if "goes without shared memory" in line] == lines[:1]
        assert "rank 1" in lines[0]
        assert re.search(why, lines[0])


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"capacity": 1 << 20}, {}),
        ({"isolation": "shared"}, {}),
        ({}, {"SHMCAST_CAPACITY": str(1 << 20)}),
        ({"timeout": 3 * SHORT}, {}),
        ({}, {"SHMCAST_DISABLE": "0", "SHMCAST_INLINE_MAX": "", "SHMCAST_CAPACITY": ""}),
    ],
    ids=str,
)
@pytest.mark.parametrize("odd", [0, 2])
def test_what_may_differ_between_ranks(ranks: Ranks, changed: dict[str, Any], names: dict[str, str], odd: int) -> None:
    for route, fallbacks, lines, got in ranks.run(3, made_with, odd, changed, names, SENDS):
        assert (route, fallbacks, lines) == (Route.SHM, {"raised": 1}, [])
        assert same(got, EXPECTED)


def made_wrongly(rank: int, odd: int, changed: dict[str, Any], names: dict[str, str]) -> Any:
    group = hurried()
    settings: dict[str, Any] = {"timeout": SHORT, **(changed if rank == odd else {})}
    with environment(**(names if rank == odd else {})):
        return outcome(lambda: Broadcaster(group, **settings))


def wrong(changed: dict[str, Any], names: dict[str, str], kind: type[Exception], text: str) -> Any:
    """One row: settings of one rank that are refused, and what every rank must say."""
    return pytest.param(changed, names, kind, text, id=f"{changed or names}"[:60])


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    ("changed", "names", "kind", "text"),
    [
        wrong({"src": 3}, {}, ValueError, "src=3"),
        wrong({"src": -1}, {}, ValueError, "src=-1"),
        wrong({"isolation": "none"}, {}, ValueError, "isolation='none'"),
        wrong({"control": "rings"}, {}, ValueError, "control='rings'"),
        wrong({"allow": (3,)}, {}, TypeError, "not 3"),
        wrong({"allow": ("not a name",)}, {}, TypeError, "not a name"),
        wrong({}, {"SHMCAST_CAPACITY": "lots"}, ValueError, "SHMCAST_CAPACITY='lots'"),
        wrong({}, {"SHMCAST_INLINE_MAX": "-1"}, ValueError, "SHMCAST_INLINE_MAX='-1'"),
        wrong({}, {"SHMCAST_DISABLE": "maybe"}, ValueError, "SHMCAST_DISABLE='maybe'"),
        wrong({"allow": Traffic}, {}, TypeError, "allow"),
        wrong({"policy": "shm"}, {}, TypeError, "policy='shm'"),
        wrong({"timeout": "long"}, {}, TypeError, ""),
        wrong({"allow": "tests"}, {}, TypeError, "allow"),
    ],
)
def test_wrong_settings_of_one_rank_are_named_on_all(
    ranks: Ranks, odd: int, changed: dict[str, Any], names: dict[str, str], kind: type[Exception], text: str
) -> None:
    for rank, told in enumerate(ranks.run(3, made_wrongly, odd, changed, names)):
        assert isinstance(told, Raised)
        assert text in told.text
        if rank == odd:
            assert told.kind is kind
        else:
            assert told.kind is ShmcastError
            assert f"rank {odd} was made with wrong arguments: {kind.__name__}: " in told.text


@pytest.mark.parametrize("capacity", [1, -5])
def test_a_wrong_capacity_of_the_entry_rank_is_named_on_all(ranks: Ranks, capacity: int) -> None:
    entry, other = ranks.run(2, made_wrongly, 0, {"capacity": capacity}, {})
    assert entry.kind is ValueError
    assert other.kind is ShmcastError
    assert f"rank 0 was made with wrong arguments: ValueError: capacity={capacity}" in other.text
