"""The tokenizer's hop: raw inputs published by SGLang's own tokenizer manager, opened by SGLang's own schedulers."""

import contextlib
import copy
import os
import signal
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast.errors import LayoutError
from shmcast.integrations.sglang import _tokenizer
from shmcast.integrations.sglang._install import replace_targets
from shmcast.integrations.sglang._joining import ADDRESS
from shmcast.integrations.sglang._release import find_release
from shmcast.integrations.sglang._settings import read_settings
from shmcast.integrations.sglang._tickets import CARRIED, carried
from shmcast.integrations.sglang._tokenizer import refusal
from tests.sglang.engine import REQUEST_ERRORS, VERSION, io_struct, schedule_batch
from tests.sglang.requests import KINDS, WIDTH, abort, generate, image, items_of, raw_of, rows, same
from tests.sglang.serving import Slow, stock_inputs
from tests.sglang.tokenizer import Served, Tokenizer, launched, serving
from tests.support.ranks import Died, Ranks
from tests.support.waiting import until

pytestmark = pytest.mark.multiprocess


def at(path: Path) -> str:
    return f"ipc://{path}/s"


def made_of(name: str) -> Any:
    """Raw inputs of a kind."""
    kind: Any = KINDS[name]
    return raw_of(kind())


def images() -> Any:
    return made_of("images of one parent")


def hashed(raw: Any) -> Any:
    """As SGLANG_MM_PRECOMPUTE_HASH=1 has the tokenizer do."""
    items: list[Any] = items_of(raw)
    for item in items:
        item.set_pad_value()
    return raw


def tokenizer_of(served: Served) -> Tokenizer:
    """On rank 0."""
    assert served.tokenizer is not None
    return served.tokenizer


def lent(served: Served) -> int:
    """Messages of the tokenizer's that this rank opened."""
    return int(served.link.stats()["tokenizer"].messages)


@contextlib.contextmanager
def counting_hashes() -> Iterator[list[int]]:
    """One entry for each item that this process hashes."""
    found: list[int] = []
    item = schedule_batch.MultimodalDataItem
    stock = item.set_pad_value

    def set_pad_value(self: Any) -> None:
        if self.hash is None:
            found.append(1)
        stock(self)

    item.set_pad_value = set_pad_value
    try:
        yield found
    finally:
        item.set_pad_value = stock


# Equality.


def every_kind(rank: int, address: str, flag: bool, known: bool) -> tuple[dict[str, int], int]:
    with serving(address, flag=flag) as served:
        for name in KINDS:
            raw = made_of(name)
            served.send(generate(name, hashed(raw) if known else raw))
            del raw  # while it lives, so does the tokenizer's copy
        served.send(generate("text", None))
        with counting_hashes() as hashes:
            served.serve(len(KINDS) + 1)
        assert served.inputs.pop("text") is None
        for name in KINDS:
            same(served.inputs[name], stock_inputs(made_of(name)), name)
        stats = served.link.stats()
        assert not any(each.fallbacks for each in stats.values())
        served.forget()
        served.wait_until_free()
        return {name: each.messages for name, each in stats.items()}, len(hashes)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_every_kind_is_what_every_rank_alone_makes(
    engines: Ranks, tmp_path: Path, n: int, flag: bool, known: bool
) -> None:
    (first, hashes), *others = engines.run(n, every_kind, at(tmp_path), flag, known)
    assert first["tokenizer"] == len(KINDS)
    assert (first["admission"], first["writer"], first["reader"]) == (0, 0, 0), "the entry rank published again"
    assert bool(hashes) is not known
    assert all((stats["tokenizer"], hashes) == (len(KINDS), 0) for stats, hashes in others), "another rank hashed"


def in_batch(rank: int, address: str, known: bool) -> int:
    parts = [generate(name, hashed(made_of(name)) if known else made_of(name)) for name in KINDS]
    parts.insert(2, generate("text", None))
    with serving(address) as served:
        if served.tokenizer is not None:
            served.tokenizer.send_batch(parts)
        served.serve(len(parts))
        assert served.received == [part.rid for part in parts]
        assert served.inputs["text"] is None
        for name in KINDS:
            same(served.inputs[name], stock_inputs(made_of(name)), name)
        opened = lent(served)
        served.forget()
        parts.clear()
        served.wait_until_free()
        return opened


@pytest.mark.parametrize("known", [False, True])
def test_a_batch_too(engines: Ranks, tmp_path: Path, known: bool) -> None:
    assert engines.run(2, in_batch, at(tmp_path), known) == [len(KINDS)] * 2


def samples(rank: int, address: str, count: int) -> tuple[int, int]:
    with serving(address) as served:
        tokenized = generate("first", images())
        size = sum(item.feature.numel() * 4 for item in items_of(tokenized.mm_inputs))
        used = 0
        for number in range(count) if served.tokenizer is not None else ():
            served.send(sample_of(tokenized, f"sample {number}"))
        if served.tokenizer is not None:
            same(tokenized.mm_inputs, images())
            stats = served.tokenizer.writer().stats()
            used = stats.segment_bytes - stats.free_bytes
        served.serve(count)
        served.inputs["sample 0"].mm_items[0].feature.zero_()
        for number in range(1, count):
            same(served.inputs[f"sample {number}"], stock_inputs(images()))
        del tokenized
        served.forget()
        served.wait_until_free()
        return used, size


def sample_of(tokenized: Any, rid: str) -> Any:
    """As the tokenizer manager copies a request for each sample; until 0.5.12 it copies no deeper."""
    one = copy.copy(tokenized)
    if VERSION >= (0, 5, 17):
        one.mm_inputs = copy.copy(one.mm_inputs)
        one.mm_inputs.mm_items = [copy.copy(item) for item in one.mm_inputs.mm_items]
    one.rid = rid
    return one


def test_samples_of_one_request_share_its_tensors(engines: Ranks, tmp_path: Path) -> None:
    (used, size), _ = engines.run(2, samples, at(tmp_path), 5)
    assert size <= used < 2 * size


def changed_between(rank: int, address: str) -> None:
    with serving(address) as served:
        tokenized = generate("first", images())
        served.send(sample_of(tokenized, "before"))
        items_of(tokenized.mm_inputs)[0].feature.zero_()
        served.send(sample_of(tokenized, "after"))
        served.serve(2)
        same(served.inputs["before"], stock_inputs(images()))
        assert not served.inputs["after"].mm_items[0].feature.any()
        assert served.inputs["after"].mm_items[1].feature.any()


def test_a_tensor_that_was_written_to_since_is_copied_again(engines: Ranks, tmp_path: Path) -> None:
    engines.run(2, changed_between, at(tmp_path))


def odd_layouts(rank: int, address: str) -> None:
    """Slices, transposed ones, one tensor twice, arrays of several types: what is staged is what came."""

    def raw() -> Any:
        item = items_of(images())[0]
        wide = rows(400, 3)
        item.feature = wide.t()
        item.model_specific_data |= {
            "strided": wide[::2, 1:],
            "again": wide,
            "half": wide.to(torch.bfloat16),
            "flags": wide > 0,
            "array": wide.double().numpy()[:, ::3],
            "shorts": (wide * 9).short().numpy(),
        }
        return raw_of([item])

    with serving(address) as served:
        served.send(generate("odd", raw()))
        served.serve(1)
        same(served.inputs["odd"], stock_inputs(raw()))
        assert lent(served) == 1


def test_odd_layouts(engines: Ranks, tmp_path: Path) -> None:
    engines.run(2, odd_layouts, at(tmp_path))


def by_msgpack(rank: int, address: str, known: bool) -> int:
    assert not io_struct._USE_PICKLE_IPC
    with serving(address) as served:
        raw = made_of("all")
        served.send(packable(generate("all", hashed(raw) if known else raw)))
        served.serve(1)
        same(served.inputs["all"], stock_inputs(made_of("all")))
        return lent(served)


def packable(request: Any) -> Any:
    """With what msgpack's decoder asks of a request."""
    from array import array

    from sglang.srt.sampling.sampling_params import SamplingParams

    request.input_ids = array("q", request.input_ids)
    request.sampling_params = SamplingParams()
    return request


@pytest.mark.skipif(VERSION < (0, 5, 20), reason="this release sends inputs by pickle only")
@pytest.mark.parametrize("known", [False, True])
def test_by_msgpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.setenv("SGLANG_USE_PICKLE_IPC", "0")  # which SGLang reads when it is imported
    with Ranks() as ranks:
        assert ranks.run(2, by_msgpack, at(tmp_path), known) == [1, 1]


def staged(rank: int, address: str, known: bool) -> list[str]:
    """Two pipeline stages: the second receives what the first handled."""
    with serving(address, pp=2) as served:
        raw = made_of("all")
        served.send(generate("pixels", hashed(raw) if known else raw), generate("text", None))
        with counting_hashes() as hashes:
            while len(served.received) < 2:
                received = served.tick()
                served.engine.hand_on(received)
                del received  # it has the tickets
        assert rank == 0 or not hashes
        same(served.inputs["pixels"], stock_inputs(made_of("all")))
        del raw
        served.forget()
        dist.barrier()
        served.wait_until_free()
        return sorted(served.received)


@pytest.mark.skipif(VERSION < (0, 5, 7), reason="this release sends requests to the next stage from GPU to GPU")
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("n", [2, 4])
def test_the_next_pipeline_stage_opens_its_own_lease(engines: Ranks, tmp_path: Path, n: int, known: bool) -> None:
    assert engines.run(n, staged, at(tmp_path), known) == [["pixels", "text"]] * n


# What is held, and dropped.


def overtaken(rank: int, address: str) -> list[str]:
    with Slow() as slow, serving(address) as served:
        served.send(generate("pixels", images()), generate("text", None))
        served.serve(1)
        assert served.received == ["text"]
        slow.go.set()
        served.serve(2)
        same(served.inputs["pixels"], stock_inputs(images()))
        return served.received


def test_text_overtakes_what_the_entry_rank_hashes(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, overtaken, at(tmp_path)) == [["text", "pixels"]] * 2


def aborted(rank: int, address: str, running: bool) -> int:
    """`running`: a worker has opened the entry rank's lease; else both are busy with others."""
    with Slow() as slow, serving(address) as served:
        others = [] if running else ["first", "second"]
        served.send(*(generate(rid, images()) for rid in others), generate("gone", images()))
        if rank == 0:
            tokenizer = tokenizer_of(served)
            until(lambda: slow_ticks(served, slow, 1 if running else 2), "the workers are busy")
            tokenizer.manager.send_to_scheduler.send_pyobj(abort("gone"))
        dist.barrier()
        served.inputs.clear()
        served.serve(2)
        assert served.received == ["gone", "gone"]
        assert served.inputs["gone"] is None
        slow.go.set()
        served.serve(2 + len(others))
        served.forget()
        served.wait_until_free()
        return lent(served)


def slow_ticks(served: Served, slow: Slow, busy: int) -> bool:
    """Whether that many makers run, after one look at the socket."""
    with contextlib.suppress(Exception):
        served.engine.scheduler.recv_from_tokenizer.recv_pyobj()
    return slow.calls == busy


@pytest.mark.parametrize("running", [True, False])
def test_what_is_aborted_while_held_gives_all_leases_back(engines: Ranks, tmp_path: Path, running: bool) -> None:
    opened = engines.run(2, aborted, at(tmp_path), running)
    assert opened == ([1, 0] if running else [2, 2])


def bad(rank: int, address: str) -> str:
    item = items_of(images())[0]
    item.feature = [["neither a tensor", 7]]
    with serving(address) as served:
        served.send(generate("bad", raw_of([item])), generate("good", images()))
        served.serve(2)
        same(served.inputs["good"], stock_inputs(images()))
        return type(served.inputs["bad"]).__name__


def test_a_bad_request_is_as_bad_on_all_ranks(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, bad, at(tmp_path))
    assert first == second


# What fails.


def one_cannot_open(rank: int, address: str, who: int, known: bool) -> str:
    with serving(address) as served:
        if rank == who:
            reader = served.link._tokenizer.reader
            stock = reader.open

            def open_once(handle: Any) -> Any:
                reader.open = stock
                raise LayoutError("a page of it is missing")

            reader.open = open_once
        raw = made_of("all")
        served.send(generate("all", hashed(raw) if known else raw), generate("more", hashed(images())))
        del raw
        served.serve(2)
        same(served.inputs["more"], stock_inputs(images()))
        got = served.inputs.pop("all")
        if not isinstance(got, Exception):
            same(got, stock_inputs(made_of("all")))
        result = type(got).__name__
        del got
        served.forget()
        served.wait_until_free()
        return result


@pytest.mark.parametrize("known", [False, True])
def test_where_another_rank_cannot_open_the_entry_rank_sends_what_it_opened(
    engines: Ranks, tmp_path: Path, known: bool
) -> None:
    assert engines.run(2, one_cannot_open, at(tmp_path), 1, known) == ["MultimodalInputs"] * 2


@pytest.mark.skipif(not REQUEST_ERRORS, reason="in this release a lost request ends the schedulers")
def test_where_the_entry_rank_cannot_open_the_request_ends(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, one_cannot_open, at(tmp_path), 0, True)
    assert first == second == "_MultimodalInputProcessingError"


def absent(rank: int, address: str) -> int:
    with serving(address, absent=(1,)) as served:
        assert served.link.admits
        assert "tokenizer" not in served.link.stats()
        served.send(generate("pixels", images()), generate("more", images()))
        served.serve(2)
        same(served.inputs["pixels"], stock_inputs(images()))
        return served.tokenizer.writer().stats().messages if served.tokenizer is not None else 0


def test_where_a_rank_does_not_attach_all_is_as_in_stock(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, absent, at(tmp_path)) == [0, 0]


def full(rank: int, address: str) -> int:
    with serving(address, capacity=32 << 20) as served:
        served.send(*(generate(str(number), hashed(images())) for number in range(4)))
        served.serve(4)
        for number in range(4):
            same(served.inputs[str(number)], stock_inputs(images()))
        opened = lent(served)
        served.forget()
        served.wait_until_free()
        return opened


def test_what_there_is_no_room_for_goes_as_in_stock(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, full, at(tmp_path))
    assert first == second
    assert 1 <= first < 4


def first(rank: int, address: str) -> int:
    """The first request is a large one: more than the memory with which a writer starts."""
    pixels = image(torch.zeros(20_000, WIDTH), (1, 100, 200), 3)
    with serving(address) as served:
        before = 0 if served.tokenizer is None else served.tokenizer.writer().stats().segment_bytes
        served.send(generate("large", raw_of([pixels])))
        served.serve(1)
        assert served.inputs["large"].mm_items[0].feature.numel() == 20_000 * WIDTH
        after = 0 if served.tokenizer is None else served.tokenizer.writer().stats().segment_bytes
        assert after == before, "memory was made for it while it waited"
        return int(served.link.stats()["tokenizer"].messages)


def test_the_first_request_finds_memory_that_all_have_mapped(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(4, first, at(tmp_path)) == [1] * 4


def unsent(rank: int, address: str) -> None:
    with serving(address) as served:
        if served.tokenizer is not None:
            manager = served.tokenizer.manager
            socket, manager.send_to_scheduler = manager.send_to_scheduler, None
            request = generate("lost", images())
            with pytest.raises(AttributeError):
                served.send(request)
            same(request.mm_inputs, images())
            manager.send_to_scheduler = socket
            del request
            served.wait_until_free(alone=True)


def test_what_cannot_be_sent_is_taken_back(engines: Ranks, tmp_path: Path) -> None:
    engines.run(2, unsent, at(tmp_path))


def killed(rank: int, address: str) -> int:
    with serving(address) as served:
        served.send(generate("pixels", images()))
        served.serve(1)
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        served.forget()
        tokenizer = tokenizer_of(served)
        writer = tokenizer.writer()
        until(lambda: writer.stats().leases[1].alive is False, "the tokenizer notices")
        served.wait_until_free(alone=True)
        request = generate("more", images())
        raw = request.mm_inputs
        with _tokenizer.writers[tokenizer.manager].lending([request]):
            assert request.mm_inputs is raw, "it goes as in stock"
        return int(writer.stats().live_blocks)


@pytest.mark.faults
def test_what_a_dead_rank_held_comes_back(engines: Ranks, tmp_path: Path) -> None:
    live, died = engines.run(2, killed, at(tmp_path), dies=[1])
    assert live == 0
    assert isinstance(died, Died)


def many(rank: int, address: str, count: int) -> tuple[int, int]:
    sizes = []
    with serving(address) as served:
        for number in range(count):
            served.send(generate(str(number), hashed(images()) if number % 2 else images()))
            served.serve(number + 1)
            served.inputs.clear()
            if served.tokenizer is not None:
                sizes.append(served.tokenizer.writer().stats().segment_bytes)
        served.wait_until_free()
        assert lent(served) == count
    return (sizes[count // 10], sizes[-1]) if sizes else (0, 0)


@pytest.mark.slow
def test_memory_stays_what_it_was(engines: Ranks, tmp_path: Path) -> None:
    (early, late), _ = engines.run(2, many, at(tmp_path), 200, timeout=300)
    assert late == early


# The launch.


def arguments(**more: Any) -> Any:
    return types.SimpleNamespace(tp_size=2, pp_size=1, **more)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tokenizer_worker_num": 4}, "tokenizer_worker_num=4: each tokenizer worker"),
        ({"nnodes": 2}, "nnodes=2: shared memory ends"),
        ({"dp_size": 2, "elastic_ep_backend": "mooncake"}, "elastic_ep_backend=mooncake: replicas come"),
        ({"dp_size": 2, "enable_dp_attention": True}, "nobody to share with"),
        ({"language_only": True}, "language_only: inputs come from encoders"),
        ({"encoder_only": True}, "encoder_only"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init"),
        ({"use_ray": True}, "use_ray"),
        ({"tp_size": 1}, "nobody to share with"),
    ],
)
def test_refused(given: dict[str, Any], why: str) -> None:
    args = arguments()
    vars(args).update(given)
    assert why in refusal(args, read_settings())
    assert not refusal(arguments(), read_settings())
    assert not refusal(arguments(dp_size=2), read_settings())


def test_refused_without_admission_and_with_the_rust_server(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "SHMCAST_SGLANG_ADMISSION=0" in refusal(arguments(), replace(read_settings(), admission=False))
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    assert "SGLANG_RUST_SERVER" in refusal(arguments(), read_settings())


class Manager:
    """Stands for a tokenizer manager."""


def test_a_refused_launch_says_why_and_is_stock(caplog: pytest.LogCaptureFixture) -> None:
    settings = replace(read_settings(), on=True, tokenizer=True)
    with launched(Manager(), arguments(nnodes=2), settings) as address:
        assert not address
        assert not _tokenizer.writers
    assert "the tokenizer sends as in stock: nnodes=2" in caplog.text


@pytest.mark.skipif(not (0, 5, 17) <= VERSION < (0, 5, 20), reason="this release does not wrap inputs up")
def test_refused_where_the_gate_cannot_see_a_carrier(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(io_struct, "_USE_PICKLE_IPC", False)
    with launched(Manager(), arguments(), replace(read_settings(), on=True, tokenizer=True)) as address:
        assert not address
    assert "SGLANG_USE_PICKLE_IPC=0: this release wraps up" in caplog.text


def test_a_launch_that_fails_leaves_nothing() -> None:
    settings = replace(read_settings(), on=True, tokenizer=True, capacity=1 << 20)

    class NoManager:
        __slots__ = ()  # no weak references

    with pytest.raises(TypeError, match="weak reference"), launched(NoManager(), arguments(), settings):
        pass
    assert ADDRESS not in os.environ
    assert not _tokenizer.writers


def test_schedulers_replace_nothing_of_the_tokenizer_and_uninstall_puts_all_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(read_settings(), on=True, tokenizer=True)
    targets = [(target.owner, target.name) for target in _tokenizer.find_targets(find_release(), settings)]
    assert {name for _, name in targets} == {"_send_one_request", "_send_batch_request", "_launch_subprocesses"}
    before = [vars(owner)[name] for owner, name in targets]
    for inherited, replaced in (("", True), ("00", False)):
        with monkeypatch.context() as patch:
            if inherited:
                patch.setenv(ADDRESS, inherited)
            undo = replace_targets(find_release(), settings)
        now = [vars(owner)[name] for owner, name in targets]
        assert [a is not b for a, b in zip(now, before, strict=True)] == [replaced] * len(targets)
        while undo:
            undo.pop()()
        assert [vars(owner)[name] for owner, name in targets] == before


# The carrier.


def test_a_damaged_carrier_is_refused_and_others_are_none_of_ours() -> None:
    assert carried(None) is None
    assert carried(torch.zeros(3)) is None
    assert carried(b"pixels") is None
    for damaged in (CARRIED, CARRIED + b"1", CARRIED + b"1" + bytes(90)):
        with pytest.raises(LayoutError):
            carried(damaged)
