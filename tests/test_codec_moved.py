"""The same object with other tensors in it, and tensors as runs of bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shmcast._codec import _moved, map_tensors, runs_of, tensor_over
from shmcast.errors import EncodeError
from shmcast.multimodal import Modality, MultimodalDataItem, MultimodalInputs
from tests.support.codec import same
from tests.support.codec_types import (
    BareStruct,
    Frozen,
    FrozenStruct,
    Item,
    Kind,
    Mixed,
    OpenPair,
    Pair,
    Plain,
    PlainSlots,
    Request,
    Slotted,
    Struct,
)


def filled(cls: type, **values: Any) -> Any:
    """An instance with these attributes, made without `__init__`."""
    obj: Any = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(obj, name, value)
    return obj


def open_pair(value: Any) -> OpenPair:
    pair = OpenPair(value)
    pair.extra = value  # type: ignore[attr-defined]
    return pair


def open_struct(value: Any) -> Struct:
    struct = Struct(feature=1)
    struct.more = value  # type: ignore[attr-defined]
    return struct


HOLDERS: dict[str, Any] = {
    "itself": lambda t: t,
    "dict": lambda t: {"a": t, "b": 7},
    "keys that are tuples": lambda t: {(1, 2): {"x": t}},
    "list": lambda t: [1, "two", [t, None]],
    "tuple": lambda t: (t, (3, t)),
    "NamedTuple": Pair,
    "NamedTuple with attributes": open_pair,
    "dataclass": lambda t: Request([Item(Kind.IMAGE, feature=[t], model_specific_data={"more": t})]),
    "frozen dataclass": Frozen,
    "dataclass with slots": Slotted,
    "some slots": lambda t: filled(Mixed, left=t, right=2),
    "Struct": lambda t: Struct(feature=t),
    "Struct with extras": lambda t: open_struct({"t": t}),
    "Struct without gc": FrozenStruct,
    "Struct that __post_init__ would refuse": lambda t: Struct(feature=t, format="normal"),
    "plain class": lambda t: filled(Plain, left=t),
    "plain slots": lambda t: filled(PlainSlots, left=t, right=1),
    "multimodal inputs": lambda t: MultimodalInputs(
        [MultimodalDataItem(Modality.IMAGE, feature=t, model_specific_data={"grid": t})], mrope_positions=t
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_every_tensor_is_replaced_and_nothing_else(name: str) -> None:
    before, after = torch.arange(5), torch.arange(5) + 10
    source = HOLDERS[name](before)
    assert same(map_tensors(source, lambda tensor: after), HOLDERS[name](after))
    assert same(source, HOLDERS[name](before))


def test_what_holds_no_tensor_is_the_same_object() -> None:
    kept = {"ids": list(range(100)), "item": Item(Kind.VIDEO), "array": np.arange(3), "any": object(), "set": {1}}
    obj = {"tensor": torch.zeros(1), **kept}
    found: Any = map_tensors(obj, torch.clone)
    assert all(found[name] is value for name, value in kept.items())
    assert map_tensors(kept, torch.clone) is kept


def test_what_is_there_twice_is_there_twice_after() -> None:
    shared = [torch.zeros(2)]
    found: Any = map_tensors({"a": shared, "b": shared, "c": shared[0]}, torch.clone)
    assert found["a"] is found["b"]
    assert found["c"] is found["a"][0]


def test_what_is_gone_does_not_stand_for_what_has_its_address_now() -> None:
    # As the attributes beside the fields of an instance, which are a dict only while it is taken apart.
    mapper = _moved._Mapper(lambda tensor: tensor + 1000)
    found: list[Any] = [mapper.map({"mine": torch.tensor(number)}) for number in range(200)]
    assert [int(one["mine"]) for one in found] == list(range(1000, 1200))


def test_a_hash_that_was_not_read_stays_unread() -> None:
    item = MultimodalDataItem(Modality.IMAGE, feature=torch.arange(8.0))
    item.set_pad_value(lazy=True)
    moved: Any = map_tensors(item, torch.clone)
    assert vars(moved)["hash"] == vars(item)["hash"] == "sha256"
    assert moved.hash == item.hash


def test_a_cycle_is_an_error() -> None:
    cycle: list[Any] = [torch.zeros(1)]
    cycle.append({"again": cycle})
    with pytest.raises(EncodeError, match="a list holds itself"):
        map_tensors(cycle, torch.clone)


def test_an_instance_that_cannot_be_taken_apart_stays_as_it_is() -> None:
    unset = BareStruct(only=1)
    del unset.only
    assert map_tensors([unset, torch.zeros(1)], torch.clone)[0] is unset  # type: ignore[index]


# Runs of bytes.


def rebuilt(tensors: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """The tensors over copies of their runs, by id."""
    found = {}
    for piece, placed in runs_of(tensors)[0]:
        memory = torch.zeros(piece.lead + piece.source.numel(), dtype=torch.uint8)
        memory[piece.lead :] = piece.source
        for tensor, offset in placed:
            found[id(tensor)] = tensor_over(memory, tensor.dtype, offset, tuple(tensor.shape), tensor.stride())
    return found


BASE = torch.arange(4096, dtype=torch.float32)

TENSORS: dict[str, torch.Tensor] = {
    "whole": BASE,
    "slice": BASE[5:77],
    "2-D": BASE.view(64, 64),
    "transposed": BASE.view(64, 64).t(),
    "every second": BASE[::2],
    "expanded": BASE[3:4].expand(7, 9),
    "0-dim": BASE[9],
    "bfloat16": torch.arange(9).to(torch.bfloat16)[1:],
    "bool": torch.tensor([True, False, True])[1:],
    "complex": torch.arange(6.0).to(torch.complex64),
    "fp8": torch.arange(6.0).to(torch.float8_e4m3fn),
    "int8 at an odd address": torch.arange(100, dtype=torch.int8)[7:],
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_over_a_copy_of_its_run_is_the_same(name: str) -> None:
    tensor = TENSORS[name]
    found = rebuilt([tensor])[id(tensor)]
    assert same(found, tensor)
    assert found.stride() == tensor.stride()


def test_bytes_that_several_reach_are_in_one_run() -> None:
    views = [BASE[i * 64 : (i + 1) * 64] for i in range(64)] + [BASE.view(64, 64).t(), BASE.view(torch.int32)]
    runs, others = runs_of(views)
    assert not others
    assert [piece.source.numel() for piece, _ in runs] == [BASE.nbytes]
    found = rebuilt(views)
    assert all(same(found[id(view)], view) for view in views)
    assert len({found[id(view)].untyped_storage().data_ptr() for view in views}) == 1


def test_a_slice_of_a_large_storage_is_the_slice() -> None:
    runs, _ = runs_of([BASE[10:20], BASE[4000:4010]])
    assert [piece.source.numel() for piece, _ in runs] == [40, 40]


OTHERS: dict[str, Any] = {
    "empty": lambda: torch.empty(0, 3),
    "gradient": lambda: torch.zeros(3, requires_grad=True),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conjugated": lambda: torch.arange(3.0).to(torch.complex64).conj(),
    "far apart": lambda: BASE[::100],
    "not aligned": lambda: torch.frombuffer(bytearray(41), dtype=torch.float32, offset=1, count=10),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_plain_run_is_told_apart(name: str) -> None:
    tensor = OTHERS[name]()
    runs, others = runs_of([tensor])
    assert (runs, len(others)) == ([], 1)
    assert others[0] is tensor
