"""Pointers to the tokenizer's segments, with stand-ins for SGLang's classes and real files in /dev/shm."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from shmcast import Reader, Writer
from shmcast._wire import Handle
from shmcast.errors import LayoutError
from shmcast.integrations.sglang._joining import ALLOW
from shmcast.integrations.sglang._pointers import Pointer, copied, held_bytes, make_of, map_all, pointers
from tests.support.leaks import names_of_others


@dataclass
class Item:
    feature: Any
    precomputed_embeddings: Any = None
    hash: int | None = None
    model_specific_data: dict[str, Any] = field(default_factory=dict)


@dataclass
class Inputs:
    mm_items: list[Item]
    extra: dict[str, Any] = field(default_factory=dict)


def with_items(raw: dict[str, Any], items: list[Item]) -> dict[str, Any]:
    return raw | {"mm_items": items}


RELEASE: Any = SimpleNamespace(
    items=lambda raw: raw["mm_items"] if isinstance(raw, dict) else raw.mm_items, with_items=with_items
)


def make(raw: dict[str, Any]) -> Inputs:
    for item in raw["mm_items"]:
        item.hash = int(torch.as_tensor(item.feature).sum())
    return Inputs(raw["mm_items"])


class Segments:
    """Pointers as SGLang's tokenizer pickles them."""

    def pointer(self, tensor: torch.Tensor) -> Pointer:
        made: Any = SharedMemory(f"test_{uuid.uuid4().hex}", create=True, size=tensor.nbytes)
        made.buf[: tensor.nbytes] = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        made.close()
        pointer = Pointer.__new__(Pointer)
        state = {"shm_name": made.name, "shape": tensor.shape, "dtype": tensor.dtype, "precomputed_hash": 7}
        pointer.__setstate__(state)
        return pointer


@pytest.fixture
def segments() -> Iterator[Segments]:
    before = names_of_others()
    yield Segments()
    assert names_of_others() == before


def pixels(value: int, *shape: int) -> torch.Tensor:
    return torch.full(shape or (64, 40), value, dtype=torch.int16)


@pytest.mark.parametrize(
    "tensor",
    [pixels(3), pixels(3)[:, ::2], torch.tensor(2.5), torch.ones(3, dtype=torch.bfloat16), torch.ones(2, 1, 5).bool()],
    ids=["plain", "strided", "scalar", "bfloat16", "bool"],
)
def test_a_tensor_is_mapped_as_it_was(segments: Segments, tensor: torch.Tensor) -> None:
    pointer = segments.pointer(tensor)
    mapped = pointer.map()
    assert (mapped.dtype, mapped.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(mapped, tensor)
    assert pointer.nbytes == tensor.nbytes
    pointer.discard()
    assert torch.equal(mapped, tensor), "its name is gone, its memory is not"


def test_what_is_written_to_one_map_is_seen_there_alone(segments: Segments) -> None:
    pointer = segments.pointer(pixels(1))
    mine, other = pointer.map(), pointer.map()
    mine.fill_(9)
    assert (int(other.max()), int(pointer.map().max())) == (1, 1)
    pointer.discard()


def test_maps_keep_no_descriptor(segments: Segments) -> None:
    pointer = segments.pointer(pixels(1))
    before = len(os.listdir("/proc/self/fd"))
    kept = [pointer.map() for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    del kept
    pointer.discard()


def test_a_name_is_taken_away_once_and_for_all(segments: Segments) -> None:
    pointer = segments.pointer(pixels(1))
    pointer.discard()
    pointer.discard()
    with pytest.raises(FileNotFoundError):
        pointer.map()


def test_a_segment_that_is_too_short_is_refused(segments: Segments) -> None:
    pointer = segments.pointer(pixels(1))
    pointer.state["shape"] = torch.Size([1 << 20])
    with pytest.raises(OSError, match=f"{pointer.path}, .* is no tensor of {2 << 20}"):
        pointer.map()
    pointer.discard()


def test_a_link_is_not_followed(segments: Segments) -> None:
    pointer = segments.pointer(pixels(1))
    other = segments.pointer(pixels(2))
    os.unlink(pointer.path)
    os.symlink(other.path, pointer.path)
    with pytest.raises(OSError, match="symbolic links"):
        pointer.map()
    pointer.discard()
    other.discard()


@pytest.mark.parametrize("name", ["", "..", "../tmp/x", "/a/b", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    pointer = Pointer({"shm_name": name, "shape": torch.Size([4]), "dtype": torch.uint8})
    with pytest.raises(LayoutError, match="segment of the name"):
        pointer.map()
    pointer.discard()


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ([1 << 62], OSError),  # in four bytes each more than an integer of 64 bits holds
        ([1 << 40, 1 << 40], OSError),
        ([-2, -3], LayoutError),
    ],
)
def test_a_shape_that_is_none_is_refused(segments: Segments, shape: list[int], error: type[Exception]) -> None:
    pointer = segments.pointer(pixels(1).float())
    pointer.state["shape"] = torch.Size(shape)
    with pytest.raises(error, match=pointer.path):
        pointer.map()
    pointer.discard()


def test_a_pipe_is_refused_and_not_waited_for(segments: Segments) -> None:
    pointer = segments.pointer(pixels(1))
    os.unlink(pointer.path)
    os.mkfifo(pointer.path)
    with pytest.raises(LayoutError, match="no regular file"):
        pointer.map()
    pointer.discard()


def test_what_is_held_counts_where_it_is_and_where_it_is_pointed_to(segments: Segments) -> None:
    pointer = segments.pointer(pixels(1))
    item = Item(pointer, [np.ones(100), pointer], model_specific_data={"grid": torch.ones(3, dtype=torch.int16)})
    assert held_bytes(RELEASE, {"mm_items": [item, Item("text")]}) == 2 * 64 * 40 * 2 + 800 + 6
    pointer.discard()


def test_inputs_are_made_of_maps_and_travel_as_pointers(segments: Segments) -> None:
    whole, listed, embedded = (segments.pointer(pixels(value)) for value in (1, 2, 3))
    inline = torch.ones(30_000)
    items = [Item(whole), Item([listed, listed]), Item(inline, precomputed_embeddings=(embedded,))]
    raw = {"mm_items": items}
    seen: list[Any] = []

    def look_and_make(given: dict[str, Any]) -> Inputs:
        seen.extend(given["mm_items"])
        assert not pointers(RELEASE, given)
        return Inputs(given["mm_items"], {"hashes": [int(item.feature[0].sum()) for item in given["mm_items"]]})

    made = make_of(RELEASE, look_and_make, copied(RELEASE, raw))
    assert made.extra["hashes"] == [40, 2 * 64 * 40, 1]
    assert [item.feature for item in items] == [whole, [listed, listed], inline], "the raw inputs are as they came"
    assert made.mm_items[0].feature is whole
    assert made.mm_items[1].feature == [listed, listed]
    assert made.mm_items[2].feature is inline
    assert made.mm_items[2].precomputed_embeddings == (embedded,)
    assert whole.travels
    assert listed.travels
    assert embedded.travels

    allow = (*ALLOW, Inputs, Item)
    with Writer(1, capacity=4 << 20, allow=allow) as writer, Reader(writer.address, 0, allow=allow) as reader:
        opened: Any = reader.open(Handle.parse(bytes(writer.publish(made))))
        found = map_all(RELEASE, opened)
        assert [pointer.path for pointer in found] == [whole.path, listed.path, listed.path, embedded.path]
        assert torch.equal(opened.mm_items[0].feature, pixels(1))
        assert torch.equal(opened.mm_items[1].feature[1], pixels(2))
        assert torch.equal(opened.mm_items[2].precomputed_embeddings[0], pixels(3))
        for pointer in found:
            pointer.discard()
        del opened


def test_what_the_maker_cut_travels_as_bytes(segments: Segments) -> None:
    """A tensor of its own over the map is none that a pointer stands for."""
    pointer = segments.pointer(pixels(5))
    made = make_of(RELEASE, lambda raw: Inputs([Item(raw["mm_items"][0].feature[:2])]), {"mm_items": [Item(pointer)]})
    assert torch.equal(made.mm_items[0].feature, pixels(5)[:2])
    assert not pointer.travels, "its name is nobody's to take away later"
    pointer.discard()


def test_without_pointers_nothing_is_copied() -> None:
    raw = {"mm_items": [Item(pixels(1))]}
    made = make_of(RELEASE, make, raw)
    assert made.mm_items[0] is raw["mm_items"][0]
    assert map_all(RELEASE, made) == []
    assert pointers(RELEASE, object()) == []


def test_one_that_cannot_be_mapped_is_the_makers_error(segments: Segments) -> None:
    here, gone = segments.pointer(pixels(1)), segments.pointer(pixels(2))
    gone.discard()
    with pytest.raises(FileNotFoundError):
        make_of(RELEASE, make, {"mm_items": [Item(here), Item(gone)]})
    assert not here.travels
    here.discard()
