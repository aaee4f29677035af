"""The tokenizer's copies of large tensors: right, made once, and gone with what they were copied from."""

import gc
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from shmcast import ArenaFull, Writer
from shmcast.integrations.sglang import _staging
from shmcast.integrations.sglang._staging import SHARE, STAGED_FROM, Staging
from tests.support.waiting import until
from tests.test_sglang_pointers import RELEASE, Item

MIB = 1 << 20


class World:
    def __init__(self) -> None:
        self.writer = Writer(1, capacity=32 * MIB)
        self.staging = Staging(self.writer, RELEASE)

    def stage(self, *items: Item) -> list[Any]:
        staged: list[Any] = self.staging.stage({"mm_items": list(items)})["mm_items"]
        return staged

    @property
    def blocks(self) -> int:
        return self.writer.stats().live_blocks


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.staging.close()
    made.writer.close()


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


LARGE = {
    "shares": noise(SHARE // 2 + 12345),
    "bfloat16": noise(300, 400, dtype=torch.bfloat16),
    "strided": noise(300, 400)[:, ::2],
    "transposed": noise(300, 400).t(),
    "with gradients": noise(300, 400).requires_grad_(),
    "bool": noise(300, 400) > 0,
    "array": noise(300, 400).numpy(),
    "array of dates": np.arange(20_000).astype("datetime64[s]"),
    "array in Fortran's order": np.asfortranarray(noise(300, 400).numpy()),
    "array of every other": noise(300, 400).numpy()[::2, ::3],
}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, np.ndarray):
        return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and np.array_equal(ours, theirs)
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("leaf", LARGE.values(), ids=LARGE)
def test_a_copy_has_the_same_elements(world: World, leaf: Any) -> None:
    (item,) = world.stage(Item(leaf))
    assert item.feature is not leaf
    assert same(item.feature, leaf)
    assert world.blocks == 1


def test_all_of_a_request_are_in_one_block(world: World) -> None:
    leaves = list(LARGE.values())
    data: dict[str, Any] = {"listed": leaves[3:6], "nested": {"one": leaves[6], "small": torch.ones(3)}, "text": "text"}
    first = Item(leaves[0], (leaves[1],), model_specific_data=data)
    second = Item([leaves[2], *leaves[7:]])
    ours, others = world.stage(first, second)
    assert world.blocks == 1
    assert first.model_specific_data is data
    pairs = [
        (ours.feature, leaves[0]),
        (ours.precomputed_embeddings[0], leaves[1]),
        *zip(ours.model_specific_data["listed"], leaves[3:6], strict=True),
        (ours.model_specific_data["nested"]["one"], leaves[6]),
        *zip(others.feature, [leaves[2], *leaves[7:]], strict=True),
    ]
    assert [number for number, (mine, theirs) in enumerate(pairs) if mine is theirs or not same(mine, theirs)] == []
    assert ours.model_specific_data["nested"]["small"] is data["nested"]["small"]
    assert isinstance(ours.precomputed_embeddings, tuple)


def test_what_is_small_is_left_to_its_message(world: World) -> None:
    small = Item(
        torch.ones(STAGED_FROM // 4 - 1),
        model_specific_data={"grid": np.ones(3), "object": np.array([None] * 20_000)},
    )
    (item,) = world.stage(small)
    assert item == small
    assert item is not small
    assert world.blocks == 0


def test_a_tensor_is_copied_once_while_it_is_as_it_was(world: World) -> None:
    tensor = noise(300, 400)
    (first,), (second,) = world.stage(Item(tensor)), world.stage(Item(None, tensor))
    assert first.feature is second.precomputed_embeddings
    before = tensor.clone()
    tensor += 1
    (third,) = world.stage(Item(tensor))
    assert torch.equal(third.feature, tensor)
    assert torch.equal(first.feature, before)


def test_a_copy_goes_with_what_it_was_copied_from(world: World) -> None:
    tensor = noise(300, 400)
    world.stage(Item(tensor))
    gc.collect()
    assert world.blocks == 1
    del tensor
    until(lambda: world.blocks == 0, "its memory is free")


def test_what_is_cleared_is_copied_anew(world: World) -> None:
    tensor = noise(300, 400)
    world.stage(Item(tensor))
    assert world.staging.clear()
    assert not world.staging.clear()
    until(lambda: world.blocks == 0, "its memory is free")
    assert torch.equal(world.stage(Item(tensor))[0].feature, tensor)


def test_where_there_is_no_room_nothing_stays(world: World) -> None:
    with pytest.raises(ArenaFull):
        world.stage(Item(torch.empty(64 * MIB, dtype=torch.uint8)))
    assert not world.staging.clear()
    assert world.blocks == 0


def test_without_a_thread_nothing_is_staged(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    tensor = noise(300, 400)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            world.stage(Item(tensor))
    assert not world.staging.clear(), "what was not copied would be taken for a copy"
    assert torch.equal(world.stage(Item(tensor))[0].feature, tensor)


def test_what_a_thread_still_writes_to_is_not_free(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the wait for the copies, and not the copies."""
    go = threading.Event()
    real = np.copyto

    def slow(place: Any, source: Any) -> None:
        assert go.wait(50)
        real(place, source)

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    tensor = noise(300, 400)
    with monkeypatch.context() as patch:
        patch.setattr(np, "copyto", slow)
        patch.setattr("concurrent.futures.Future.result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            world.stage(Item(tensor))
    assert not world.staging.clear()
    gc.collect()
    assert world.blocks == 1
    go.set()
    until(lambda: world.blocks == 0, "its memory is free")


def test_a_closed_one_stages_nothing() -> None:
    made = World()
    made.stage(Item(noise(300, 400)))
    made.staging.close()
    with pytest.raises(RuntimeError):
        made.stage(Item(noise(300, 400)))
    made.writer.close()


def test_a_tensor_that_outlives_the_module_goes_quietly(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the interpreter's end modules lose their names before the last objects go."""
    said: list[Any] = []
    tensor = noise(300, 400)
    world.stage(Item(tensor))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", said.append)
        for name in [name for name in vars(_staging) if not name.startswith("__")]:
            patch.setattr(_staging, name, None)
        del tensor
        gc.collect()
    assert not said
    assert not world.staging.clear()
