"""`--enable-broadcast-mm-inputs-process`: every rank holds the raw inputs, one makes them, and only a header moves."""

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.sglang import requests
from tests.sglang.engine import REQUEST_ERRORS
from tests.sglang.requests import KINDS, raw_of, same
from tests.sglang.serving import Slow, serving, stock_inputs
from tests.support.ranks import Ranks

pytestmark = pytest.mark.multiprocess

FLAG_ALONE = {"admission": False}


def at(path: Path) -> str:
    return f"ipc://{path}/s"


def every_kind(rank: int, address: str) -> list[int]:
    with serving(address, flag=True, settings=FLAG_ALONE) as serve:
        assert not serve.link.admits
        make = serve.engine.scheduler._process_and_broadcast_mm_inputs
        for name, kind in KINDS.items():
            raw = raw_of(kind())
            expected = stock_inputs(raw_of(kind()))
            same(make(raw), expected, name)
            # What the next pipeline stage reads, on this rank too.
            for item, made in zip(requests.items_of(raw), expected.mm_items, strict=True):
                assert (item.hash, item.pad_value) == (made.hash, made.pad_value)
                assert getattr(item, "pad_values", None) == getattr(made, "pad_values", None)
        assert make(None) is None
        stats = serve.link.stats()["flag"]
        assert not stats.fallbacks
        return [stats.messages, stats.bytes]


@pytest.mark.parametrize("n", [2, 4])
def test_every_kind_is_what_every_rank_alone_makes(engines: Ranks, tmp_path: Path, n: int) -> None:
    results = engines.run(n, every_kind, at(tmp_path))
    assert [messages for messages, _ in results] == [len(KINDS)] * n
    assert {size for _, size in results} == {0}, "tensors that every rank holds travelled"


def test_the_entry_rank_alone_makes_them(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(3, counted, at(tmp_path)) == [1, 0, 0]


def counted(rank: int, address: str) -> int:
    with Slow() as maker, serving(address, flag=True, settings=FLAG_ALONE) as serve:
        maker.go.set()
        serve.engine.scheduler._process_and_broadcast_mm_inputs(raw_of(KINDS["video"]()))
        return maker.calls


def failing(rank: int, address: str) -> list[str]:
    with serving(address, flag=True, settings=FLAG_ALONE) as serve:
        make = serve.engine.scheduler._process_and_broadcast_mm_inputs
        try:
            make(requests.malformed())
        except Exception as error:
            said = [type(error).__name__, str(error)]
        same(make(raw_of(KINDS["all"]())), stock_inputs(raw_of(KINDS["all"]())))
        return said


def test_a_malformed_request_fails_alike_and_the_next_one_does_not(engines: Ranks, tmp_path: Path) -> None:
    first, *others = engines.run(3, failing, at(tmp_path))
    assert all(other == first for other in others)
    if REQUEST_ERRORS:
        assert first[0] == "_MultimodalInputProcessingError"
        assert first[1].startswith("Multimodal input processing failed on the TP entry rank: ")


def under_threshold(rank: int, address: str) -> int:
    settings = FLAG_ALONE | {"threshold": 1 << 20}
    with Slow() as maker, serving(address, flag=True, settings=settings) as serve:
        maker.go.set()
        make = serve.engine.scheduler._process_and_broadcast_mm_inputs
        small = make(raw_of(KINDS["list of tensors"]()))
        calls = maker.calls
        large = make(raw_of(KINDS["video"]()))
        same(small, maker.stock(raw_of(KINDS["list of tensors"]())))
        same(large, maker.stock(raw_of(KINDS["video"]())))
        return calls


def test_small_inputs_are_made_by_every_rank(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, under_threshold, at(tmp_path)) == [1, 1]


def one_rank(rank: int, address: str) -> bool:
    with serving(address, flag=True, settings=FLAG_ALONE) as serve:
        same(
            serve.engine.scheduler._process_and_broadcast_mm_inputs(raw_of(KINDS["video"]())),
            stock_inputs(raw_of(KINDS["video"]())),
        )
        return "flag" in serve.link.stats()


def test_one_rank_keeps_the_stock_path(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(1, one_rank, at(tmp_path)) == [False]


def drawn(rank: int, address: str) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_MM_SKIP_COMPUTE_HASH", "1")
        with serving(address, flag=True, settings=FLAG_ALONE | {"draws_hashes": True}) as serve:
            inputs = serve.engine.scheduler._process_and_broadcast_mm_inputs(raw_of(KINDS["all"]()))
            return [item.hash for item in inputs.mm_items]


def test_hashes_that_are_drawn_are_the_entry_ranks(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, drawn, at(tmp_path))
    assert first == second
    assert None not in first


def hashed_by(rank: int, address: str) -> tuple[set[str], list[int]]:
    threads: set[str] = set()
    stock = requests.Item.set_pad_value

    def noting(item: Any) -> None:
        if item.hash is None:
            threads.add(threading.current_thread().name.rpartition("_")[0])
        stock(item)

    requests.Item.set_pad_value = noting
    try:
        with serving(address, flag=True, settings=FLAG_ALONE) as serve:
            make = serve.engine.scheduler._process_and_broadcast_mm_inputs
            inputs = make(raw_of(KINDS["images of one parent"]()))
            return threads, [item.hash for item in inputs.mm_items]
    finally:
        requests.Item.set_pad_value = stock


def test_the_entry_rank_hashes_items_side_by_side(engines: Ranks, tmp_path: Path) -> None:
    first, second = engines.run(2, hashed_by, at(tmp_path))
    assert (first[0], second[0]) == ({"shmcast-hashing"}, set())
    assert (
        first[1] == second[1] == [item.hash for item in stock_inputs(raw_of(KINDS["images of one parent"]())).mm_items]
    )


def hashed_before(rank: int, address: str) -> int:
    raw = raw_of(KINDS["all"]())
    for item in requests.items_of(raw):
        item.set_pad_value()
    with serving(address, flag=True, settings=FLAG_ALONE) as serve:
        same(serve.engine.scheduler._process_and_broadcast_mm_inputs(raw), stock_inputs(raw))
        return int(serve.link.stats()["flag"].messages)


def test_what_came_hashed_is_made_by_every_rank(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, hashed_before, at(tmp_path)) == [0, 0]
