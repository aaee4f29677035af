"""The tokenizer's hop to data parallel replicas, through SGLang's own controller: who gets what, and who holds it."""

import contextlib
import os
import signal
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast.integrations.sglang import _tokenizer
from shmcast.integrations.sglang._joining import ADDRESS, _attach
from shmcast.integrations.sglang._release import find_release
from shmcast.integrations.sglang._replicas import Replicas, replicas_of, resolved
from shmcast.transport import Writer
from tests.sglang.engine import VERSION, ServerArgs, io_struct
from tests.sglang.requests import abort, generate, items_of, same
from tests.sglang.serving import Slow, stock_inputs
from tests.sglang.test_tokenizer import at, lent, made_of, sample_of, tokenizer_of
from tests.sglang.tokenizer import Served, serving
from tests.support.ranks import Died, Ranks
from tests.support.waiting import until

pytestmark = pytest.mark.multiprocess

ROUTE = "routed_dp_rank" if hasattr(io_struct.TokenizedGenerateReqInput, "routed_dp_rank") else "data_parallel_rank"
BY_LOAD = "total_requests" if VERSION >= (0, 5, 8) else "shortest_queue"
SPLITS = find_release().splits_batches

each_layout = pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"dp": 2}, id="plain"),
        pytest.param({"attn_dp": 2}, id="attention"),
        pytest.param(
            {"attn_dp": 2, "attn_cp": 2},
            id="attention, context parallel",
            marks=pytest.mark.skipif(VERSION < (0, 5, 6), reason="there is no context parallelism"),
        ),
        pytest.param(
            {"attn_dp": 2, "pp": 2},
            id="attention, two stages",
            marks=pytest.mark.skipif(VERSION < (0, 5, 7), reason="stages send to each other from GPU to GPU"),
        ),
    ],
)
two_layouts = pytest.mark.parametrize("layout", [{"dp": 2}, {"attn_dp": 2}], ids=["plain", "attention"])


def video() -> Any:
    """Small enough that many fit into the writer's first segment."""
    return made_of("video")


def named(rid: str, raw: Any, replica: int | None) -> Any:
    return generate(rid, raw, **{ROUTE: replica})


def serve(served: Served, count: int) -> None:
    """Tick until `count` requests came to this rank."""
    serve_until(served, lambda: len(served.received) >= count)


def serve_until(served: Served, done: Callable[[], bool]) -> None:
    """Tick until it is so on each rank, as often on all; a second stage has what the first handled."""
    missing = torch.ones(1, dtype=torch.int32)
    while missing.item():
        received = served.tick()
        served.engine.hand_on(received)
        del received  # it has the tickets
        missing[0] = not done()
        dist.all_reduce(missing, dist.ReduceOp.MAX)


def holders(served: Served) -> list[int]:
    """The tokenizer's messages that each replica's ranks hold, by replica."""
    found = tokenizer_of(served).writer().stats().leases
    ranks = len(found) // served.engine.replicas
    held = [[lease.held for lease in found[start : start + ranks]] for start in range(0, len(found), ranks)]
    assert all(len(set(each)) == 1 for each in held), "ranks of one replica hold alike"
    return [each[0] for each in held]


def fallbacks(served: Served) -> dict[str, int]:
    return dict(_tokenizer.writers[tokenizer_of(served).manager].stats().fallbacks)


def serve_videos(served: Served, count: int) -> list[str]:
    """The rids of so many requests that came, each with all that `video` has."""
    serve(served, count)
    for rid in served.received:
        same(served.inputs[rid], stock_inputs(video()))
    finish(served)
    return sorted(served.received)


def finish(served: Served) -> None:
    """Nobody holds anything any more."""
    served.forget()
    served.wait_until_free()


# Who gets what.


def by_name(rank: int, address: str, layout: dict[str, Any]) -> tuple[list[str], int]:
    with serving(address, **layout) as served:
        if rank == 0:
            for number, replica in enumerate((1, 0, 1)):
                served.send(named(f"{replica}: {number}", made_of("all"), replica))
            assert holders(served) == [1, 2]
            assert not fallbacks(served)
        served.route(3)
        serve(served, 1 + served.engine.replica)
        for rid in served.received:
            same(served.inputs[rid], stock_inputs(made_of("all")))
        opened = lent(served)
        finish(served)
        return sorted(served.received), opened


@each_layout
def test_a_request_goes_to_the_replica_that_it_names(engines: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    results = engines.run(4, by_name, at(tmp_path), layout)
    first, second = (["0: 1"], 1), (["1: 0", "1: 2"], 2)
    assert sorted(results) == [first, first, second, second]


def aborted(rank: int, address: str, layout: dict[str, Any]) -> tuple[int, list[str]]:
    """While the second replica's entry rank hashes it. Where replicas share a world, only the first one is told."""
    with Slow() as slow, serving(address, **layout) as served:
        if rank == 0:
            served.send(named("gone", video(), 1))
        served.route(1)
        entry = served.engine.replica == 1 and served.engine.receives
        serve_until(served, lambda: not entry or slow.calls == 1)
        if rank == 0:
            tokenizer_of(served).manager.send_to_scheduler.send_pyobj(abort("gone"))
        served.route(1)
        serve_until(served, lambda: served.engine.replica == 0 or "gone" in served.inputs)
        assert served.inputs.pop("gone", None) is None
        slow.go.set()
        finish(served)
        return served.engine.replica, served.received


@two_layouts
def test_an_abort_reaches_what_another_replica_holds(engines: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    results = engines.run(4, aborted, at(tmp_path), layout)
    told = ["gone"] if "attn_dp" in layout else []
    second = [received for replica, received in results if replica == 1]
    assert second == [[*told, "gone", "gone"]] * 2


def in_turn(rank: int, address: str, layout: dict[str, Any]) -> tuple[int, list[str]]:
    """Text is the controller's to send, and what names its replica takes nobody's turn."""
    with serving(address, **layout) as served:
        sent = [named(str(number), video(), None) for number in range(4)]
        sent.insert(1, named("named", video(), 1))
        sent.insert(3, generate("text", None))
        served.send(*sent)
        if rank == 0:
            assert [getattr(request, ROUTE) for request in sent] == [0, 1, 1, None, 0, 1]
            assert not fallbacks(served)
        sent.clear()
        served.route(6)
        serve(served, 3)
        for rid in set(served.received) - {"text"}:
            same(served.inputs[rid], stock_inputs(video()))
        finish(served)
        return served.engine.replica, sorted(served.received)


@each_layout
def test_the_tokenizer_takes_turns_where_the_controller_would(
    engines: Ranks, tmp_path: Path, layout: dict[str, Any]
) -> None:
    first, second = (0, ["0", "2", "text"]), (1, ["1", "3", "named"])
    assert sorted(engines.run(4, in_turn, at(tmp_path), layout)) == [first, first, second, second]


def by_load(rank: int, address: str, layout: dict[str, Any]) -> tuple[int, list[str]]:
    with serving(address, method=BY_LOAD, **layout) as served:
        sent = [named("first", video(), None), named("named", video(), 0), named("second", video(), None)]
        served.send(*sent)
        if rank == 0:
            assert [getattr(request, ROUTE) for request in sent] == [None, 0, None]
            assert holders(served) == [1, 0]
            assert fallbacks(served) == {"replica": 2}
        sent.clear()
        served.route(3)
        return served.engine.replica, serve_videos(served, 2 - served.engine.replica)


@two_layouts
def test_where_the_controller_goes_by_load_a_request_that_names_none_goes_as_in_stock(
    engines: Ranks, tmp_path: Path, layout: dict[str, Any]
) -> None:
    results = engines.run(4, by_load, at(tmp_path), layout)
    first, second = (0, ["first", "named"]), (1, ["second"])
    assert sorted(results) == [first, first, second, second]


def as_batch(rank: int, address: str, layout: dict[str, Any]) -> list[str]:
    with serving(address, **layout) as served:
        parts = [named(str(number), video(), None) for number in range(3)]
        if rank == 0:
            tokenizer_of(served).send_batch(parts)
            assert [getattr(part, ROUTE) for part in parts] == ([0, 1, 0] if SPLITS else [None] * 3)
            assert holders(served) == ([2, 1] if SPLITS else [0, 0])
            assert fallbacks(served) == ({} if SPLITS else {"replica": 1})
        parts.clear()
        served.route(1)
        replica = served.engine.replica
        # Before 0.5.10 a batch is what is no work: to every replica, or to the first rank of a world.
        unsplit = 3 if replica == 0 or "dp" in layout else 0
        return serve_videos(served, 2 - replica if SPLITS else unsplit)


@two_layouts
def test_a_batch_goes_where_the_controller_sends_its_parts(
    engines: Ranks, tmp_path: Path, layout: dict[str, Any]
) -> None:
    results = engines.run(4, as_batch, at(tmp_path), layout)
    if SPLITS:
        assert results == [["0", "2"]] * 2 + [["1"]] * 2
    else:
        every = ["0", "1", "2"]
        assert results == [every] * 2 + [every if "dp" in layout else []] * 2


def samples(rank: int, address: str, layout: dict[str, Any]) -> tuple[int, int]:
    with serving(address, **layout) as served:
        tokenized = named("first", video(), None)
        size = sum(item.feature.numel() * 4 for item in items_of(tokenized.mm_inputs))
        used = 0
        for number in range(4) if rank == 0 else ():
            served.send(sample_of(tokenized, str(number)))
        if rank == 0:
            assert holders(served) == [2, 2]
            stats = tokenizer_of(served).writer().stats()
            used = stats.segment_bytes - stats.free_bytes
        del tokenized
        served.route(4)
        serve(served, 2)
        first, second = served.received
        served.inputs[first].mm_items[0].feature.zero_()
        same(served.inputs[second], stock_inputs(video()))
        finish(served)
        return used, size


@two_layouts
def test_samples_share_their_tensors_across_replicas(engines: Ranks, tmp_path: Path, layout: dict[str, Any]) -> None:
    (used, size), *_ = engines.run(4, samples, at(tmp_path), layout)
    assert size <= used < 2 * size


# What fails.


def unsent(rank: int, address: str) -> None:
    with serving(address, dp=2) as served:
        if rank == 0:
            manager = tokenizer_of(served).manager
            socket, manager.send_to_scheduler = manager.send_to_scheduler, None
            for replica in (None, 1):
                request = named("lost", video(), replica)
                with pytest.raises(AttributeError):
                    served.send(request)
                assert getattr(request, ROUTE) == replica
                same(request.mm_inputs, video())
                del request
            manager.send_to_scheduler = socket
            served.wait_until_free(alone=True)
        dist.barrier()


def test_what_cannot_be_sent_names_no_replica(engines: Ranks, tmp_path: Path) -> None:
    engines.run(4, unsent, at(tmp_path))


def killed(rank: int, address: str, end: str) -> list[str]:
    """The entry rank of the second replica dies with a request on its way there: its other rank never sees that."""
    with serving(address, dp=2) as served:
        if rank == 0:
            served.send(named("lost", video(), 1))
            assert holders(served) == [0, 1]
        served.route(1)
        dist.barrier()
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 3:
            until(lambda: os.path.exists(end), "the others are done")
            assert lent(served) == 0
            return sorted(served.received)
        if rank == 0:
            writer = tokenizer_of(served).writer()
            until(lambda: writer.stats().leases[2].alive is False, "the tokenizer notices")
            assert [lease.held for lease in writer.stats().leases] == [0, 0, 0, 1]
            request = named("stock", video(), 1)
            raw = request.mm_inputs
            with _tokenizer.writers[tokenizer_of(served).manager].lending([request]):
                assert request.mm_inputs is raw
            served.send(*(named(str(number), video(), None) for number in range(2)))
            assert fallbacks(served) == {"readers": 1}
        served.route(2)
        while len(served.received) < 2:
            served.tick()
        for rid in served.received:
            same(served.inputs[rid], stock_inputs(video()))
        served.forget()
        if rank == 0:
            Path(end).touch()
            served.wait_until_free(alone=True)
        return sorted(served.received)


@pytest.mark.faults
def test_a_dead_replica_gets_nothing_and_what_was_on_its_way_comes_back_with_its_last_rank(
    engines: Ranks, tmp_path: Path
) -> None:
    first, second, died, rest = engines.run(4, killed, at(tmp_path), str(tmp_path / "end"), dies=[2])
    assert first == second == ["0", "1"]
    assert isinstance(died, Died)
    assert rest == []


def absent(rank: int, address: str, layout: dict[str, Any]) -> list[str]:
    with serving(address, absent=(3,), **layout) as served:
        assert ("tokenizer" in served.link.stats()) is (served.engine.replica == 0)
        served.send(*(named(str(number), video(), None) for number in range(2)), named("named", video(), 1))
        if rank == 0:
            assert holders(served)[0] == 2
            assert fallbacks(served) == {"readers": 1}
        served.route(3)
        return serve_videos(served, 2 - served.engine.replica)


@two_layouts
def test_a_replica_whose_ranks_did_not_all_attach_gets_no_turns(
    engines: Ranks, tmp_path: Path, layout: dict[str, Any]
) -> None:
    assert engines.run(4, absent, at(tmp_path), layout) == [["0", "1"]] * 2 + [["named"]] * 2


def unknown(rank: int, address: str) -> None:
    """In stock the controller ends at such a name; that is its own to do."""
    with serving(address, dp=2) as served:
        for replica in (-1, 2) if rank == 0 else ():
            request = named("unknown", video(), replica)
            raw = request.mm_inputs
            with _tokenizer.writers[tokenizer_of(served).manager].lending([request]):
                assert request.mm_inputs is raw
                assert getattr(request, ROUTE) == replica
        if rank == 0:
            assert fallbacks(served) == {"replica": 2}
        finish(served)


def test_a_replica_that_does_not_exist_is_named_as_in_stock(engines: Ranks, tmp_path: Path) -> None:
    engines.run(4, unknown, at(tmp_path))


# Who is who.


def arguments(**more: Any) -> Any:
    return types.SimpleNamespace(**{"tp_size": 4, "pp_size": 1, "load_balance_method": "round_robin"} | more)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Replicas(1, 4)),
        ({"dp_size": 2, "pp_size": 3}, Replicas(2, 12)),
        ({"dp_size": 2, "enable_dp_attention": True, "pp_size": 3}, Replicas(2, 6)),
        ({"dp_size": 1, "attn_dp_size": 2, "enable_dp_attention": False}, Replicas(2, 2)),
        ({"dp_size": 2, "load_balance_method": BY_LOAD}, Replicas(2, 4, f"load_balance_method={BY_LOAD}")),
        ({"dp_size": 2, "disaggregation_mode": "decode"}, Replicas(2, 4, "disaggregation_mode=decode")),
    ],
)
def test_what_arguments_say(given: dict[str, Any], expected: Replicas) -> None:
    assert replicas_of(arguments(**given)) == expected


def test_readers() -> None:
    replicas = Replicas(2, 3)
    assert [list(replicas.readers(replica)) for replica in (-1, 0, 1, 2)] == [[], [0, 1, 2], [3, 4, 5], []]


@pytest.mark.skipif(VERSION < (0, 5, 8), reason="this release knows no such method")
@pytest.mark.parametrize(("mode", "turns"), [("null", True), ("prefill", False), ("decode", False)])
def test_the_method_that_the_release_chooses(mode: str, turns: bool) -> None:
    args: Any = ServerArgs(model_path="dummy", device="cpu", tp_size=2, dp_size=2, load_balance_method="auto")
    if hasattr(args, "_handle_load_balance_method"):
        args.disaggregation_mode = mode
        args._handle_load_balance_method()
    else:
        from sglang.srt.arg_groups.serving_hook import handle_load_balance_method

        args = ServerArgs(model_path="dummy", device="cpu", tp_size=2, dp_size=2, disaggregation_mode=mode)
        handle_load_balance_method(args)
    assert (replicas_of(resolved(args)).choosing == "") is turns


@pytest.fixture
def inherited(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A writer for so many replicas of so many ranks, whose address this process inherited."""
    with contextlib.ExitStack() as stack:

        def inherit(count: int, ranks: int) -> Writer:
            writer = stack.enter_context(Writer(count * ranks, capacity=1 << 20))
            monkeypatch.setenv(ADDRESS, f"{bytes(writer.address).hex()}:{ranks}")
            return writer

        yield inherit


@pytest.mark.parametrize(
    ("count", "number", "expected"),
    [(2, 1, 3), (2, 0, 1), (1, 5, 1)],
    ids=["the second", "the first", "one that has a number of a router's"],
)
def test_which_reader_a_rank_is(inherited: Any, count: int, number: int, expected: int) -> None:
    writer = inherited(count, 2)
    settings = types.SimpleNamespace(tokenizer=True)
    reader, said = _attach(2, 1, number, settings)  # type: ignore[arg-type]
    assert reader is not None
    assert said == os.environ[ADDRESS]
    with reader:
        assert [lease.reader for lease in writer.stats().leases if lease.alive] == [expected]


@pytest.mark.parametrize(
    ("ranks", "number", "why"),
    [(4, 0, "for replicas of 2 ranks, here are 4"), (2, 2, "index=4")],
)
def test_a_rank_that_the_tokenizer_does_not_know(inherited: Any, ranks: int, number: int, why: str) -> None:
    inherited(2, 2)
    reader, said = _attach(ranks, 0, number, types.SimpleNamespace(tokenizer=True))  # type: ignore[arg-type]
    assert reader is None
    assert why in said
