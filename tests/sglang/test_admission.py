"""Requests through SGLang's own receiving, held at the entry rank and opened by all: what stock gives, when it may."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast.integrations.sglang import _joining
from shmcast.integrations.sglang._install import link
from shmcast.integrations.sglang._release import find_release
from shmcast.integrations.sglang._settings import read_settings
from tests.sglang import requests
from tests.sglang.engine import FROM_DICT, REQUEST_ERRORS, VERSION, Engine, io_struct
from tests.sglang.requests import KINDS, abort, batch, generate, raw_of, same
from tests.sglang.serving import Serving, Slow, leases, serve_staged, serving, stock_inputs, wait_for_leases
from tests.support.ranks import Ranks

pytestmark = pytest.mark.multiprocess


def at(path: Path) -> str:
    return f"ipc://{path}/s"


# Equality.


def every_kind(rank: int, address: str, flag: bool) -> dict[str, int]:
    with serving(address, flag=flag) as serve:
        sent = [generate(name, raw_of(kind())) for name, kind in KINDS.items()]
        serve.send(*sent, generate("text", None))
        serve.serve(len(KINDS) + 1)
        assert serve.inputs["text"] is None
        for name, kind in KINDS.items():
            same(serve.inputs[name], stock_inputs(raw_of(kind())), name)
        assert not any(stats.fallbacks for stats in serve.link.stats().values())
        serve.forget()
        wait_for_leases(serve, 0)
        return {name: stats.messages for name, stats in serve.link.stats().items()}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("flag", [False, True])
def test_every_kind_is_what_every_rank_alone_makes(engines: Ranks, tmp_path: Path, n: int, flag: bool) -> None:
    first, *others = engines.run(n, every_kind, at(tmp_path), flag)
    assert first["admission"] == len(KINDS)
    assert all(other["reader"] == len(KINDS) for other in [first, *others])
    assert first.get("flag", 0) == 0, "what was made already went through the flag path"


def in_inference_mode(rank: int, address: str, flag: bool) -> int:
    """As the scheduler's event loop runs: what it receives there are inference tensors, also to the worker threads."""
    with torch.inference_mode(), serving(address, flag=flag, settings={"admission": not flag}) as serve:
        serve.send(*(generate(name, raw_of(kind())) for name, kind in KINDS.items()))
        serve.serve(len(KINDS))
        for name, kind in KINDS.items():
            same(serve.inputs[name], stock_inputs(raw_of(kind())), name)
        stats = serve.link.stats()["flag" if flag else "reader"]
        assert not stats.fallbacks
        return int(stats.messages)


@pytest.mark.parametrize("flag", [False, True])
def test_in_inference_mode_it_is_the_same(engines: Ranks, tmp_path: Path, flag: bool) -> None:
    assert engines.run(2, in_inference_mode, at(tmp_path), flag) == [len(KINDS)] * 2


def embedding(rank: int, address: str) -> int:
    with serving(address) as serve:
        serve.send(requests.embed("pixels", raw_of(KINDS["video"]())))
        received: list[Any] = []
        while not received:
            received = serve.engine.receive()
        same(serve.engine.inputs(received[0]), stock_inputs(raw_of(KINDS["video"]())))
        return int(serve.link.stats()["reader"].messages)


def test_a_request_for_an_embedding_is_held_too(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, embedding, at(tmp_path)) == [1, 1]


def hashed_already(rank: int, address: str) -> int:
    raw = raw_of(KINDS["all"]())
    for item in requests.items_of(raw):
        item.set_pad_value()
        item.hash = 7 + item.offsets[0][0]
    with serving(address) as serve:
        serve.send(generate("hashed", raw))
        serve.serve(1)
        same(serve.inputs["hashed"], stock_inputs(raw))
        return int(serve.inputs["hashed"].mm_items[0].hash)


def test_hashes_that_came_along_stay(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, hashed_already, at(tmp_path)) == [10, 10]


def samples(rank: int, address: str) -> list[list[str]]:
    """n=2: two requests with one set of features, copied as the tokenizer copies them."""
    raw = raw_of(KINDS["images of one parent"]())
    first = generate("first", raw)
    second = copy.copy(first)
    second.rid = "second"
    second.mm_inputs = raw_of([copy.copy(item) for item in requests.items_of(raw)])
    with serving(address) as serve:
        serve.send(first, second)
        serve.serve(2)
        same(serve.inputs["first"], serve.inputs["second"])
        serve.inputs.pop("first").mm_items[0].feature.zero_()
        same(serve.inputs["second"], stock_inputs(raw_of(KINDS["images of one parent"]())))
        return serve.ticks


def test_samples_of_one_request_are_each_others_equal_and_each_its_own(engines: Ranks, tmp_path: Path) -> None:
    ticks = engines.run(2, samples, at(tmp_path))
    assert ticks[0] == ticks[1]


def in_batch(rank: int, address: str) -> dict[str, Any]:
    parts = [generate(name, raw_of(kind())) for name, kind in KINDS.items()]
    parts.insert(2, generate("text", None))
    with serving(address) as serve:
        serve.send(batch(parts))
        serve.serve(len(parts))
        assert serve.ticks == [[part.rid for part in parts]]
        for name, kind in KINDS.items():
            same(serve.inputs[name], stock_inputs(raw_of(kind())), name)
        assert serve.inputs["text"] is None
        messages = {name: stats.messages for name, stats in serve.link.stats().items()}
        serve.forget()
        wait_for_leases(serve, 0)
        return messages


def test_a_batch_travels_as_one_message(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, in_batch, at(tmp_path))
    assert (first["admission"], first["reader"], second["reader"]) == (1, 1, 1)


def changed_later(rank: int, address: str) -> float:
    raw = raw_of(KINDS["images of one parent"]())
    with serving(address) as serve:
        serve.send(generate("one", raw), generate("two", raw_of(KINDS["video"]())))
        serve.serve(2)
        one, two = serve.inputs["one"], serve.inputs["two"]
        dist.barrier()
        # As the scheduler does with what is its own: replaced, moved, merged, and, which it should not, written.
        one.mm_items[0].feature.fill_(rank)
        dist.barrier()
        seen = float(one.mm_items[0].feature.mean())
        one.mm_items[1].feature = one.mm_items[1].feature.to(torch.float16)
        one.mm_items[2].feature = None
        merged = len(one.mm_items) + len(two.mm_items)
        if hasattr(one, "merge"):
            one.merge(two)
            assert len(one.mm_items) == merged
        same(stock_inputs(raw), stock_inputs(raw_of(KINDS["images of one parent"]())))
        del one, two
        serve.forget()
        wait_for_leases(serve, 0)
        return seen


def test_a_rank_may_do_with_its_inputs_what_it_likes(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, changed_later, at(tmp_path)) == [0.0, 1.0]


def again(rank: int, address: str) -> list[bool]:
    """A scheduler that is linked, unlinked, and linked again in the same world."""
    admits = []
    with serving(address) as serve:
        for number in range(2):
            serve.send(generate("pixels", raw_of(KINDS["video"]())))
            serve.serve(number + 1)
            same(serve.inputs.pop("pixels"), stock_inputs(raw_of(KINDS["video"]())))
            admits.append(serve.link.admits)
            dist.barrier()
            serve.link.close()
            serve.link = link(serve.engine.scheduler, find_release(), read_settings())
    return admits


def test_a_scheduler_is_linked_again(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, again, at(tmp_path)) == [[True, True]] * 2


# Order.


def held_then_text(rank: int, address: str) -> list[list[str]]:
    with Slow() as slow, serving(address) as serve:
        serve.send(generate("pixels", raw_of(KINDS["video"]())), generate("text", None))
        serve.serve(1)
        assert serve.ticks == [["text"]]
        assert slow.calls <= 1
        slow.go.set()
        serve.serve(2)
        same(serve.inputs["pixels"], slow.stock(raw_of(KINDS["video"]())))
        return serve.ticks


def test_text_overtakes_what_is_held(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, held_then_text, at(tmp_path)) == [[["text"], ["pixels"]]] * 2


def session(rank: int, address: str) -> list[list[str]]:
    mine = io_struct.SessionParams(id="mine")
    other = io_struct.SessionParams(id="other")
    with Slow() as slow, serving(address) as serve:
        serve.send(
            generate("1 pixels", raw_of(KINDS["video"]()), session_params=mine),
            generate("2 text", None, session_params=mine),
            io_struct.CloseSessionReqInput(session_id="mine"),
            generate("text of another", None, session_params=other),
        )
        serve.serve(1)
        assert serve.ticks == [["text of another"]]
        slow.go.set()
        serve.serve(4)
        return serve.ticks


def test_a_session_keeps_its_order_to_its_end(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, session, at(tmp_path))
    assert first == second
    rids = [rid for tick in first for rid in tick]
    assert rids[:3] == ["text of another", "1 pixels", "2 text"]
    assert len(rids) == 4


def shifted(rank: int, address: str) -> list[Any]:
    """As a session does with a turn whose first token it strips, through what the request has for inputs."""
    with serving(address) as serve:
        serve.send(generate("turn", raw_of(KINDS["images of one parent"]())))
        received: list[Any] = []
        while not received:
            received = serve.engine.receive()
        for item in received[0].mm_inputs.mm_items:
            item.offsets = [(start - 1, end - 1) for start, end in item.offsets]
        return [item.offsets for item in serve.engine.inputs(received[0]).mm_items]


@pytest.mark.skipif(FROM_DICT, reason="sessions shift offsets since 0.5.12")
def test_offsets_that_a_session_shifts_are_the_inputs(engines: Ranks, tmp_path: Path) -> None:
    expected = [[(start - 1, end - 1) for start, end in item.offsets] for item in KINDS["images of one parent"]()]
    assert engines.run(2, shifted, at(tmp_path)) == [expected] * 2


def limited(rank: int, address: str) -> list[list[str]]:
    with serving(address, limit=1) as serve:
        serve.send(*(generate(str(number), None) for number in range(3)))
        serve.send(generate("pixels", raw_of(KINDS["video"]())))
        serve.serve(4)
        return serve.ticks


@pytest.mark.skipif(VERSION < (0, 5, 6), reason="there is no such limit")
def test_a_limit_of_requests_a_tick_holds(engines: Ranks, tmp_path: Path) -> None:
    ticks = engines.run(2, limited, at(tmp_path))
    assert ticks[0] == ticks[1] == [["0"], ["1"], ["2"], ["pixels"]]


def sleeping(rank: int, address: str) -> list[int]:
    slept: list[int] = []
    with Slow() as slow, serving(address) as serve:
        scheduler = serve.engine.scheduler
        scheduler.idle_sleeper = type("Sleeper", (), {"maybe_sleep": lambda self: slept.append(len(serve.ticks))})()
        scheduler.maybe_sleep_on_idle()
        serve.send(generate("pixels", raw_of(KINDS["video"]())), generate("text", None))
        serve.serve(1)
        scheduler.maybe_sleep_on_idle()
        slow.go.set()
        serve.serve(2)
        scheduler.maybe_sleep_on_idle()
        return slept


def test_a_scheduler_that_holds_requests_does_not_sleep_on_its_sockets(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, sleeping, at(tmp_path))
    assert first == [0, 2]
    assert second == [0, 1, 2]


# Aborts.


def aborted_while_held(rank: int, address: str, everything: bool) -> list[list[str]]:
    with Slow() as slow, serving(address) as serve:
        serve.send(
            generate("user-1", raw_of(KINDS["video"]())),
            generate("user-2", raw_of(KINDS["video"](), tokens=10)),
            generate("else", raw_of(KINDS["audio as ndarray"]())),
            abort(everything=True) if everything else abort("user"),
        )
        serve.serve(4 if everything else 3)
        assert serve.inputs["user-1"] is None, "an aborted request brought inputs"
        assert serve.inputs["user-2"] is None
        assert isinstance(serve.other[0], io_struct.AbortReq)
        slow.go.set()
        serve.serve(4)
        if not everything:
            same(serve.inputs["else"], slow.stock(raw_of(KINDS["audio as ndarray"]())))
        serve.forget()
        wait_for_leases(serve, 0)
        return serve.ticks


@pytest.mark.parametrize("everything", [False, True])
def test_an_abort_lets_what_it_names_out_before_it(engines: Ranks, tmp_path: Path, everything: bool) -> None:
    first, second = engines.run(2, aborted_while_held, at(tmp_path), everything)
    named = ["user-1", "user-2", *(["else"] if everything else []), "" if everything else "user"]
    assert first == second == ([named] if everything else [named, ["else"]])


def aborted_in_part(rank: int, address: str) -> list[list[str]]:
    with Slow() as slow, serving(address) as serve:
        serve.send(batch([generate(rid, raw_of(KINDS["video"]())) for rid in "ab"]), abort("a"))
        slow.go.set()
        serve.serve(3)
        assert serve.inputs["a"] is None
        same(serve.inputs["b"], slow.stock(raw_of(KINDS["video"]())))
        serve.forget()
        wait_for_leases(serve, 0)
        return serve.ticks


def test_the_rest_of_a_batch_that_is_aborted_in_part_goes_on_as_it_came(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, aborted_in_part, at(tmp_path)) == [[["a", "b", "a"]]] * 2


def aborted_when_ready(rank: int, address: str) -> list[list[str]]:
    with serving(address) as serve:
        serve.send(generate("pixels", raw_of(KINDS["video"]())))
        serve.serve(1)
        serve.send(abort("pixels"))
        serve.serve(2)
        assert serve.inputs["pixels"] is not None
        serve.forget()  # the scheduler drops the request
        wait_for_leases(serve, 0)
        return serve.ticks


def test_an_abort_of_what_went_on_is_the_schedulers(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, aborted_when_ready, at(tmp_path)) == [[["pixels"], ["pixels"]]] * 2


# What fails.


def bad_one(rank: int, address: str) -> list[str]:
    with serving(address) as serve:
        good = generate("good", raw_of(KINDS["video"]()))
        serve.send(generate("bad", requests.malformed()), good)
        serve.serve(2)
        same(serve.inputs["good"], stock_inputs(raw_of(KINDS["video"]())))
        error = serve.inputs["bad"]
        assert isinstance(error, Exception)
        serve.forget()
        wait_for_leases(serve, 0)
        return [type(error).__name__, str(error)]


def test_a_malformed_request_fails_alike_on_all_ranks_and_alone(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, bad_one, at(tmp_path))
    if REQUEST_ERRORS:
        assert first == second
        assert first[0] == "_MultimodalInputProcessingError"
        assert "processing failed on the TP entry rank" in first[1]
    else:  # each rank makes it again, and raises what it raises in stock
        assert first[0] == second[0] != "_MultimodalInputProcessingError"


def bad_in_batch(rank: int, address: str) -> str:
    with serving(address) as serve:
        serve.send(batch([generate("bad", requests.malformed()), generate("good", raw_of(KINDS["video"]()))]))
        serve.serve(2)
        same(serve.inputs["good"], stock_inputs(raw_of(KINDS["video"]())))
        return type(serve.inputs["bad"]).__name__


def test_a_malformed_request_of_a_batch_fails_alone(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, bad_in_batch, at(tmp_path))
    assert first == second != "MultimodalInputs"


def cannot_open(rank: int, address: str) -> dict[str, Any]:
    with serving(address) as serve:
        if rank == 1:
            reader = serve.link._ends.reader
            stock = reader.open
            calls: list[Any] = []

            def open_second(handle: Any) -> Any:
                calls.append(handle)
                if len(calls) == 1:
                    raise OSError(24, "no descriptors")
                return stock(handle)

            reader.open = open_second
        serve.send(generate("first", raw_of(KINDS["all"]())))
        serve.serve(1)
        serve.send(generate("second", raw_of(KINDS["all"]())))
        serve.serve(2)
        for rid in ("first", "second"):
            same(serve.inputs[rid], stock_inputs(raw_of(KINDS["all"]())))
        serve.forget()
        wait_for_leases(serve, 0)
        return {"ticks": serve.ticks}


def test_a_message_that_one_rank_cannot_open_goes_raw_to_all(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(3, cannot_open, at(tmp_path)) == [{"ticks": [["first"], ["second"]]}] * 3


def no_room(rank: int, address: str) -> dict[str, int]:
    def large() -> Any:
        """An ndarray: no segment of the tokenizer's has it."""
        item = requests.audio()
        item.feature = requests.rows(1000, 5).numpy()
        return raw_of([item])

    with serving(address, settings={"capacity": 1 << 20, "wait": 0.0}) as serve:
        serve.send(generate("large", large()))
        serve.serve(1)
        same(serve.inputs["large"], stock_inputs(large()))
        return dict(serve.link.stats()["admission"].fallbacks) if rank == 0 else {}


def test_what_finds_no_room_goes_on_as_in_stock(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, no_room, at(tmp_path)) == [{"full": 1}, {}]


def too_much_held(rank: int, address: str) -> dict[str, int]:
    with Slow() as slow, serving(address, settings={"held_bytes": 8 << 20}) as serve:
        serve.send(*(generate(str(n), raw_of(requests.images_of_one_parent([(1, 30, 30)]))) for n in range(3)))
        slow.go.set()
        serve.serve(3)
        same(serve.inputs["2"], slow.stock(raw_of(requests.images_of_one_parent([(1, 30, 30)]))))
        return dict(serve.link.stats()["admission"].fallbacks) if rank == 0 else {}


def test_what_is_too_much_to_hold_goes_on_as_in_stock(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, too_much_held, at(tmp_path))
    assert (set(first) <= {"held"}, second) == (True, {})


def on_a_gpu(rank: int, address: str) -> list[list[str]]:
    raw = raw_of(KINDS["video"]())
    feature = requests.items_of(raw)[0].feature
    requests.items_of(raw)[0].feature = torch.empty(feature.shape, device="meta")
    with serving(address) as serve:
        dist.barrier()  # its groups are made everywhere
        if rank == 0:
            serve.gate()._take_in(generate("elsewhere", raw))
            assert not serve.gate()._held
        return [list(map(str, serve.ticks))]


def test_what_is_not_on_the_cpu_is_not_held(engines: Ranks, tmp_path: Path) -> None:
    engines.run(2, on_a_gpu, at(tmp_path))


# Layouts.


def layout(rank: int, address: str, options: dict[str, Any], replicas: int) -> list[str]:
    with serving(address, **options) as serve:
        assert serve.link.admits
        for replica in range(replicas):
            serve.send(
                generate(f"{replica}", raw_of(KINDS["all"](), tokens=100 + replica)),
                generate(f"{replica} text", None),
                replica=replica,
            )
        serve.serve(2, together=True)
        (rid,) = [rid for rid, inputs in serve.inputs.items() if inputs is not None]
        same(serve.inputs[rid], stock_inputs(raw_of(KINDS["all"](), tokens=100 + int(rid))))
        dist.barrier()
        serve.forget()
        wait_for_leases(serve, 0)
        return sorted(serve.inputs) or sorted(rid for tick in serve.ticks for rid in tick)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attn_dp": 2}, ["0", "0", "1", "1"]),
        pytest.param(
            {"attn_cp": 2},
            ["0", "0", "0", "0"],
            marks=pytest.mark.skipif(VERSION < (0, 5, 6), reason="there is no context parallelism"),
        ),
        ({"attn_dp": 2, "flag": True}, ["0", "0", "1", "1"]),
    ],
    ids=["two replicas", "context parallel", "two replicas, flag"],
)
def test_under_data_parallel_attention(
    engines: Ranks, tmp_path: Path, options: dict[str, Any], expected: list[str]
) -> None:
    replicas = options.get("attn_dp", 1)
    got = engines.run(4, layout, at(tmp_path), options, replicas)
    assert [rids[0] for rids in got] == expected
    assert all(len(rids) == 2 for rids in got)


def tick_until(serve: Serving, done: Callable[[], bool]) -> None:
    """Of all ranks of a world, until it is so on each."""
    missing = torch.ones(1, dtype=torch.int32)
    while missing.item():
        serve.tick()
        missing[0] = not done()
        dist.all_reduce(missing)


def aborted_elsewhere(rank: int, address: str, everything: bool) -> list[str]:
    """An abort comes to the first replica's entry rank, which tells all ranks; the second one holds what it names."""
    with Slow() as slow, serving(address, attn_dp=2) as serve:
        raws = {"user-1": "video", "user-2": "all", "else": "audio as ndarray"}
        serve.send(*(generate(rid, raw_of(KINDS[kind]())) for rid, kind in raws.items()), replica=1)
        tick_until(serve, lambda: rank != 2 or len(serve.gate()._held) == 3)
        serve.send(abort(everything=True) if everything else abort("user"))
        tick_until(serve, lambda: rank < 2 or "user-2" in serve.inputs)
        slow.go.set()
        tick_until(serve, lambda: rank < 2 or "else" in serve.inputs)
        for rid, kind in raws.items() if rank >= 2 else ():
            if everything or rid != "else":
                assert serve.inputs[rid] is None
            else:
                same(serve.inputs[rid], slow.stock(raw_of(KINDS[kind]())))
        assert not any(request.abort_all for request in serve.other[1:])
        serve.forget()
        wait_for_leases(serve, 0)
        return [rid for tick in serve.ticks for rid in tick]


@pytest.mark.parametrize("everything", [False, True])
def test_an_abort_reaches_what_another_replica_holds(engines: Ranks, tmp_path: Path, everything: bool) -> None:
    first, second, *others = engines.run(4, aborted_elsewhere, at(tmp_path), everything)
    rid = "" if everything else "user"
    assert first == second == [rid]
    ended = ["user-1", "user-1", "user-2", "user-2"]
    assert others == [[rid, *ended, "else", "else"] if everything else [rid, *ended, "else"]] * 2


def staged(rank: int, address: str) -> list[str]:
    with serving(address, pp=2) as serve:
        serve.send(generate("pixels", raw_of(KINDS["all"]())), generate("text", None))
        serve_staged(serve, 2)
        same(serve.inputs["pixels"], stock_inputs(raw_of(KINDS["all"]())))
        dist.barrier()
        serve.forget()
        wait_for_leases(serve, 0)
        return sorted(rid for tick in serve.ticks for rid in tick)


def test_a_later_pipeline_stage_maps_what_the_first_made(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(4, staged, at(tmp_path)) == [["pixels", "text"]] * 4


def staged_bad(rank: int, address: str) -> str:
    with serving(address, pp=2) as serve:
        serve.send(generate("bad", requests.malformed()))
        serve_staged(serve, 1)
        error = serve.inputs["bad"]
        dist.barrier()
        serve.forget()
        wait_for_leases(serve, 0)
        dist.barrier()  # a rank that leaves gives back what it never opened
        return str(error)


@pytest.mark.skipif(not REQUEST_ERRORS, reason="a bad request ends the schedulers")
def test_a_malformed_request_leaves_nothing_in_a_later_stage(engines: Ranks, tmp_path: Path) -> None:
    first, *others = engines.run(4, staged_bad, at(tmp_path))
    assert "processing failed on the TP entry rank" in first
    assert others == [first] * 3


# Joining.


class NoGroups:
    """torch.distributed without one function."""

    def __getattr__(self, name: str) -> Any:
        assert name != "new_group", "a rank would still connect when another one takes it down again"
        return getattr(dist, name)


def differing(rank: int, address: str) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_joining, "dist", NoGroups())
        with serving(address, settings={"workers": 1 + rank}) as serve:
            serve.send(generate("pixels", raw_of(KINDS["video"]())))
            serve.serve(1)
            same(serve.inputs["pixels"], stock_inputs(raw_of(KINDS["video"]())))
            return serve.link.admits is True


def test_ranks_with_other_settings_go_on_as_in_stock(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, differing, at(tmp_path)) == [False, False]


def cannot_attach(rank: int, address: str) -> bool:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(13, "no such thing here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_joining, "dist", NoGroups())
        if rank == 1:
            patch.setattr(_joining, "Reader", refuse)
        with serving(address, flag=True) as serve:
            serve.send(generate("pixels", raw_of(KINDS["video"]())))
            serve.serve(1)
            same(serve.inputs["pixels"], stock_inputs(raw_of(KINDS["video"]())))
            return serve.link.admits is True


def test_a_rank_that_cannot_attach_keeps_all_apart(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(3, cannot_attach, at(tmp_path)) == [False] * 3


def no_threads(rank: int, address: str) -> bool:
    from shmcast.integrations.sglang import _link

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(11, "no threads")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_link, "Admission", refuse)
        with serving(address, flag=True) as serve:
            serve.send(generate("pixels", raw_of(KINDS["video"]())))
            serve.serve(1)
            same(serve.inputs["pixels"], stock_inputs(raw_of(KINDS["video"]())))
            return serve.link.admits is True


def test_an_entry_rank_that_cannot_hold_requests_keeps_all_apart(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, no_threads, at(tmp_path)) == [False, False]


def on_two_nodes(rank: int, address: str) -> list[bool]:
    """One of the two was never asked to have shmcast: no collective may wait for it."""
    from shmcast.integrations.sglang import _link

    engine = Engine(address, flag=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for module in (_joining, _link):
                patch.setattr(module, "nodes_of", lambda scheduler: 2)
            if rank == 0:
                made = link(engine.scheduler, find_release(), read_settings())
                assert not made.admits
                assert not made.stats()
                made.close()
        return [rank == 0]
    finally:
        dist.barrier()
        engine.close()


def test_several_nodes_are_left_alone(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, on_two_nodes, at(tmp_path)) == [[True], [False]]


def alone(rank: int, address: str) -> bool:
    with serving(address) as serve:
        serve.send(generate("pixels", raw_of(KINDS["video"]())))
        serve.serve(1)
        same(serve.inputs["pixels"], stock_inputs(raw_of(KINDS["video"]())))
        return serve.link.admits is True


def test_one_rank_has_nobody_to_share_with(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(1, alone, at(tmp_path)) == [False]


def unlinked(rank: int, address: str) -> list[str]:
    """After `close` the scheduler is what it was."""
    with serving(address, flag=True) as serve:
        scheduler = serve.engine.scheduler
        serve.link.close()
        assert scheduler.recv_from_tokenizer is serve.engine.socket
        names = {"recv_requests", "_get_multimodal_inputs", "_process_and_broadcast_mm_inputs", "maybe_sleep_on_idle"}
        serve.send(generate("pixels", raw_of(KINDS["video"]())))
        serve.serve(1)
        same(serve.inputs["pixels"], stock_inputs(raw_of(KINDS["video"]())))
        return sorted(names & set(vars(scheduler)))


def test_a_link_that_is_closed_leaves_stock(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, unlinked, at(tmp_path)) == [[], []]


# Steady.


def many(rank: int, address: str, rounds: int) -> int:
    raw = raw_of(KINDS["list of tensors"]())
    expected = stock_inputs(raw)
    with serving(address, settings={"capacity": 64 << 20}) as serve:
        segments = set()
        for number in range(rounds):
            serve.send(generate(str(number), raw), generate(f"{number} text", None))
            serve.serve(2 * number + 2)
            same(serve.inputs[str(number)], expected)
            serve.forget()
            if rank == 0:
                segments.add(serve.link.stats()["writer"].segment_bytes)
        wait_for_leases(serve, 0)
        assert not any(stats.fallbacks for stats in serve.link.stats().values())
        return len(segments)


@pytest.mark.slow
def test_two_hundred_requests_leave_nothing_behind(engines: Ranks, tmp_path: Path) -> None:
    first, _ = engines.run(2, many, at(tmp_path), 200)
    assert first == 1, "the arena grew"


def dies(rank: int, address: str) -> int:
    import signal

    with serving(address) as serve:
        serve.send(generate("pixels", raw_of(KINDS["video"]())))
        serve.serve(1)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        serve.forget()
        wait_for_leases(serve, 0)
        return leases(serve)


@pytest.mark.faults
def test_what_a_killed_rank_held_comes_back(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, dies, at(tmp_path), dies=[1])[0] == 0
