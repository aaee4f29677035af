"""An entry rank's items hashed side by side, with stand-ins for SGLang's."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shmcast import _threads
from shmcast.integrations.sglang._hashing import Hashing

RELEASE: Any = SimpleNamespace(items=lambda raw: raw, can_hold=lambda raw: all(item.feature.is_cpu for item in raw))


@dataclass
class Item:
    feature: torch.Tensor
    valid: bool = True
    bad: bool = False
    precomputed_embeddings: Any = None
    hash: int | None = None
    by: list[str] = field(default_factory=list)

    def is_valid(self) -> bool:
        return self.valid

    def set_pad_value(self) -> None:
        if self.hash is not None:
            return
        self.by.append(threading.current_thread().name)
        if self.bad:
            raise ValueError("bad pixels")
        self.hash = int(self.feature.sum())


def make(items: list[Item]) -> list[int | None]:
    for item in items:
        item.set_pad_value()
    return [item.hash for item in items]


@pytest.fixture
def hashing() -> Iterator[Hashing]:
    made = Hashing(RELEASE, make)
    yield made
    made.close()


def items_of(*sizes: int, **more: Any) -> list[Item]:
    return [Item(torch.ones(size), **more) for size in sizes]


def test_items_are_hashed_before_the_maker_asks(hashing: Hashing) -> None:
    items = items_of(3, 500, 20)
    assert hashing(items) == [3, 500, 20]
    assert all(item.by[0].startswith("shmcast-hashing") and len(item.by) == 1 for item in items)


def test_the_longest_come_first(hashing: Hashing, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    real = hashing._pool.submit

    def submit(hash: Any) -> Any:
        order.append(len(hash.__self__.feature))
        return real(hash)

    monkeypatch.setattr(hashing._pool, "submit", submit)
    items = items_of(3, 500, 20)
    items[0].precomputed_embeddings = [torch.ones(700)]
    hashing(items)
    assert order == [3, 500, 20]
    order.clear()
    assert hashing(items_of(3, 500, 20)) == [3, 500, 20], "what is made has the items' own order"
    assert order == [500, 20, 3]


def test_what_needs_no_second_thread_has_none(hashing: Hashing) -> None:
    ready = items_of(4)
    ready[0].hash = 7
    (one,) = items_of(5)
    other = items_of(6, valid=False)
    assert hashing([*ready, one, *other]) == [7, 5, 6]
    assert one.by == other[0].by == [threading.current_thread().name]
    elsewhere = [*items_of(4, 5), Item(torch.empty(1, device="meta"), valid=False, hash=1)]
    hashing(elsewhere)
    assert elsewhere[0].by == [threading.current_thread().name]


def test_what_an_item_raises_the_maker_raises(hashing: Hashing) -> None:
    items = [*items_of(3, bad=True), *items_of(4, 5)]
    with pytest.raises(ValueError, match="bad pixels"):
        hashing(items)
    assert items[0].by[-1] == threading.current_thread().name
    assert [item.hash for item in items] == [None, 4, 5]


def test_without_a_thread_the_maker_hashes(hashing: Hashing, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert hashing(items_of(3, 4)) == [3, 4]
    assert hashing(items_of(3, 4)) == [3, 4]


def test_a_pool_has_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, threads in ((1, 1), (2, 2), (64, _threads.FEW)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, processors=processors: set(range(processors)))
        with _threads.few("test") as pool:
            assert pool._max_workers == threads
