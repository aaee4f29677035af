"""Reference leaves: what every rank holds already is sent as its place in a walk, if it still is what it was."""

from __future__ import annotations

import collections
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmcast import _sent
from shmcast._codec import Allow, Leaves, decode, encode, nbytes_of
from shmcast._codec._table import join, split
from shmcast.errors import EncodeError, LayoutError
from tests.support import codec_types as kinds
from tests.support.codec import carry, same

ALLOW = Allow(kinds.ALL)


def copy_of(raw: Any) -> Any:
    """The raw inputs as another rank received them."""
    return pickle.loads(pickle.dumps(raw))


def across(fn: Any, raw: Any, **how: Any) -> tuple[Any, Any, int]:
    """`fn` on the entry rank's raw, rebuilt on a rank with a copy of it: (result, the copy, number of pieces)."""
    theirs = copy_of(raw)
    their_leaves = Leaves.walk(theirs)
    leaves = Leaves.walk(raw)
    encoded = encode(fn(raw), ALLOW, leaves, **how)
    return decode(encoded.stream, carry(encoded), ALLOW, their_leaves), theirs, len(encoded.pieces)


def request() -> dict[str, Any]:
    """Two images cut from one parent, a video, audio, as a processor hands them over."""
    parent = torch.randn(400, 1176)
    features = [parent[:150], parent[150:], torch.randn(300, 1176), torch.randn(100, 128)]
    return {
        "mm_items": [
            {"feature": feature, "grid": torch.tensor([[1, 2, index]]), "offsets": [(index, index + 5)]}
            for index, feature in enumerate(features)
        ],
        "mrope_positions": torch.arange(3 * 50).view(3, 50),
        "mrope_position_delta": torch.tensor([[7]]),
    }


def materialize(raw: dict[str, Any]) -> kinds.Request:
    items = [
        kinds.Item(
            kinds.Kind.IMAGE,
            hash=2**63 + index,
            pad_value=10**6 + index,
            offsets=item["offsets"],
            feature=item["feature"],
            model_specific_data={"image_grid_thw": item["grid"]},
        )
        for index, item in enumerate(raw["mm_items"])
    ]
    return kinds.Request(
        items,
        im_token_id=151655,
        video_token_id=151656,
        mrope_positions=raw["mrope_positions"],
        mrope_position_delta=raw["mrope_position_delta"],
    )


def test_a_request_of_leaves_is_a_few_hundred_bytes() -> None:
    raw = request()
    leaves = Leaves.walk(raw)
    encoded = encode(materialize(raw), ALLOW, leaves)
    assert encoded.pieces == ()
    assert len(encoded.stream) < 1500
    theirs = copy_of(raw)
    back: Any = decode(encoded.stream, (), ALLOW, Leaves.walk(theirs))
    assert same(back, materialize(raw))
    for item, raw_item in zip(back.mm_items, theirs["mm_items"], strict=True):
        assert item.feature is raw_item["feature"]
        assert item.model_specific_data["image_grid_thw"] is raw_item["grid"]


LEAF = torch.arange(60, dtype=torch.float32).view(6, 10)

VIEWS: dict[str, Any] = {
    "the leaf": lambda leaf: leaf,
    "another object, same view": lambda leaf: leaf.view(6, 10),
    "slice": lambda leaf: leaf[2:4],
    "column": lambda leaf: leaf[:, 3],
    "transposed": lambda leaf: leaf.T,
    "element": lambda leaf: leaf[5, 9],
    "flat": lambda leaf: leaf.view(-1),
    "expanded": lambda leaf: leaf[0, 0].expand(100),
    "detached": lambda leaf: leaf.detach(),
    "as bytes": lambda leaf: leaf.view(torch.uint8),
    "as other dtype": lambda leaf: leaf[1:].view(torch.int16)[:, 3:],
    "as wider dtype": lambda leaf: leaf.view(torch.float64)[1:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_a_leaf_are_references(name: str) -> None:
    result, theirs, pieces = across(lambda raw: [VIEWS[name](raw["leaf"])], {"leaf": LEAF.clone()})
    assert pieces == 0
    assert same(result[0], VIEWS[name](LEAF))
    low, high = theirs["leaf"].data_ptr(), theirs["leaf"].data_ptr() + theirs["leaf"].nbytes
    assert low <= result[0].data_ptr() < high
    theirs["leaf"].zero_()
    assert not result[0].any()


def test_a_view_of_a_view_that_is_a_leaf() -> None:
    parent = torch.arange(1000)
    result, theirs, pieces = across(lambda raw: raw[0][10:20], [parent[100:200]])
    assert pieces == 0
    assert result.tolist() == list(range(110, 120))
    assert result.data_ptr() == theirs[0].data_ptr() + 80


def test_more_of_the_storage_than_the_leaf_is_no_reference() -> None:
    parent = torch.arange(1000)
    result, _, pieces = across(lambda raw: parent[90:120], [parent[100:200]])
    assert pieces == 1
    assert result.tolist() == list(range(90, 120))


def test_the_same_leaf_twice_is_one_object() -> None:
    result, theirs, _ = across(lambda raw: [raw[0], raw[0]], [torch.arange(5)])
    assert result[0] is result[1] is theirs[0]


def test_a_new_tensor_is_a_piece() -> None:
    result, _, pieces = across(lambda raw: [raw[0], raw[0] + 1], [torch.arange(5)])
    assert pieces == 1
    assert result[1].tolist() == [1, 2, 3, 4, 5]


WRITES: dict[str, Any] = {
    "in place": lambda leaf: leaf.add_(1),
    "through a view": lambda leaf: leaf[2:].zero_(),
    "item": lambda leaf: leaf.__setitem__(0, 9),
    "resized": lambda leaf: leaf.resize_(3),
    "other storage": lambda leaf: leaf.set_(torch.ones(60)),
    "data replaced": lambda leaf: setattr(leaf, "data", torch.ones(60)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_leaf_that_fn_wrote_to_travels_as_bytes(name: str) -> None:
    def fn(raw: Any) -> Any:
        WRITES[name](raw["leaf"])
        return raw["leaf"]

    raw = {"leaf": torch.arange(60.0)}
    result, _, pieces = across(fn, raw)
    assert pieces == 1
    assert same(result, raw["leaf"])


def test_a_swapped_storage_is_noticed_even_under_the_promise() -> None:
    def fn(raw: Any) -> Any:
        raw[0].data = torch.full((60,), 3.0)
        return raw[0]

    result, _, pieces = across(fn, [torch.arange(60.0)], keeps_leaves=True)
    assert pieces == 1
    assert result[0] == 3.0


def test_a_storage_that_was_cut_short_is_refused_not_read() -> None:
    leaf = torch.arange(1000.0)
    leaves = Leaves.walk([leaf])
    leaf.untyped_storage().resize_(8)
    with pytest.raises(EncodeError, match="freed or cut short"):
        encode(leaf, ALLOW, leaves, True)
    received = torch.arange(1000.0)
    theirs = Leaves.walk([received])
    source = torch.arange(1000.0)
    stream = encode(source[5:], ALLOW, Leaves.walk([source])).stream
    received.untyped_storage().resize_(8)
    with pytest.raises(LayoutError):
        decode(stream, (), ALLOW, theirs)


def test_inference_tensors_are_references_only_under_the_promise() -> None:
    with torch.inference_mode():
        raw = [torch.arange(10)]
    for promise, pieces in ((False, 1), (True, 0)):
        result, _, found = across(lambda raw: raw[0], raw, keeps_leaves=promise)
        assert found == pieces
        assert result.tolist() == list(range(10))


@pytest.mark.parametrize(
    "fn",
    [
        lambda raw: raw["array"],
        lambda raw: raw["array"][3:7],
        lambda raw: raw["array"][::-1],
        lambda raw: torch.from_numpy(raw["array"]),
        lambda raw: torch.from_numpy(raw["array"])[5:],
        lambda raw: raw["tensor"].numpy(),
        lambda raw: raw["tensor"].numpy()[2:4],
        lambda raw: raw["ids"],
    ],
    ids=["array", "slice", "reversed", "from_numpy", "from_numpy slice", "numpy()", "numpy() slice", "list"],
)
def test_arrays_and_lists_are_references_only_under_the_promise(fn: Any) -> None:
    raw = {"array": np.arange(20.0), "tensor": torch.arange(20.0), "ids": list(range(100))}
    for promise, pieces in ((False, 1), (True, 0)):
        result, theirs, found = across(fn, raw, keeps_leaves=promise)
        assert found == pieces
        assert same(result, fn(raw))
        if promise:
            theirs["array"][:] = 0
            theirs["tensor"].zero_()
            theirs["ids"][:] = []
            assert not any(result)


def test_lists_are_compared_by_identity() -> None:
    result, theirs, pieces = across(lambda raw: [raw[0], list(raw[0])], [list(range(100))], keeps_leaves=True)
    assert pieces == 1
    assert result[0] is theirs[0]
    assert result[1] is not theirs[0]


def test_bytes_cannot_change_and_are_always_references() -> None:
    result, theirs, pieces = across(lambda raw: raw, [b"x" * 2000, b"y" * 1023])
    assert pieces == 0
    assert result[0] is theirs[0]


def test_a_list_that_is_a_leaf_is_not_appended_to() -> None:
    """A stream that names the reader's own list and then appends to it."""
    raw = [list(range(100))]
    parts = split(encode(raw[0], ALLOW, Leaves.walk(raw), True).stream)
    for opcodes in (b"K\x01QK\x05a.", b"K\x01Q(K\x05K\x06e."):
        forged = join(parts.names, list(parts.table), b"\x80\x05" + opcodes)
        with pytest.raises(LayoutError, match="append"):
            decode(forged, (), ALLOW, Leaves.walk(raw))
    assert raw[0] == list(range(100))


# The walk.


class WithValues:
    """No dataclass, no Struct: the walk does not look inside."""

    def __init__(self) -> None:
        self.tensor = torch.ones(1)


def leaf_ids(raw: Any) -> list[Any]:
    return [int(leaf[0]) for leaf in Leaves.walk(raw).objects]


def number(index: int) -> torch.Tensor:
    return torch.tensor([index])


def test_the_order_of_the_walk() -> None:
    raw = {
        "z": [number(0), (number(1), {"b": number(2), "a": number(3)})],
        "item": kinds.Item(kinds.Kind.IMAGE, feature=number(5), offsets=[number(4)]),  # type: ignore[list-item]
        "struct": kinds.Struct(feature=number(6)),
        "pair": kinds.Pair(number(7), np.array([8])),
        "ids": [9, *range(100)],
        "bytes": bytes([10]) * 1024,
        "user": collections.UserDict({"a": number(11)}),
        "ordered": collections.OrderedDict(a=number(12)),
    }
    assert leaf_ids(raw) == list(range(13))


@pytest.mark.parametrize(
    "raw",
    [
        {1, 2},
        {torch.ones(1)},
        frozenset({b"x" * 2000}),
        WithValues(),
        list(range(63)),
        ["1", *range(100)],
        b"x" * 1023,
        "x" * 5000,
        kinds.Item,
        None,
        torch.nn.Parameter(torch.ones(3)),
    ],
    ids=lambda raw: type(raw).__name__,
)
def test_what_is_no_leaf(raw: Any) -> None:
    assert len(Leaves.walk([raw])) == 0


def test_a_leaf_and_a_container_are_counted_once() -> None:
    tensor, inner = number(1), [number(2)]
    assert leaf_ids([tensor, inner, {"a": tensor, "b": inner}, number(3)]) == [1, 2, 3]


def test_cycles_and_depth_in_raw() -> None:
    raw: list[Any] = [number(0)]
    raw.append(raw)
    deep: Any = number(1)
    for _ in range(100_000):
        deep = [deep]
    raw.append(deep)
    assert leaf_ids(raw) == [0, 1]
    while isinstance(deep, list):
        deep = deep.pop()


def test_leaves_stay_alive_and_are_not_copied() -> None:
    import weakref

    raw = [torch.ones(5)]
    address, alive = raw[0].data_ptr(), weakref.ref(raw[0])
    leaves = Leaves.walk(raw)
    raw.clear()
    leaf = alive()
    assert leaf is not None
    assert leaf.data_ptr() == address
    del leaf, leaves
    assert alive() is None


def test_tensors_that_cannot_travel_are_counted_but_never_referred_to() -> None:
    raw = [torch.ones(3, device="meta"), torch.ones(3).to_sparse(), torch.ones(3, requires_grad=True), torch.arange(4)]
    leaves = Leaves.walk(raw)
    assert len(leaves) == 4
    result = decode(encode(raw[3], ALLOW, leaves).stream, (), ALLOW, leaves)
    assert result is raw[3]
    for refused in raw[:3]:
        with pytest.raises(EncodeError):
            encode(refused, ALLOW, leaves)


# A rank whose raw inputs differ.


OTHERS: dict[str, Any] = {
    "other shape": [torch.zeros(5, 2)],
    "other dtype": [torch.zeros(10, dtype=torch.float64)],
    "other strides": [torch.zeros(20)[::2]],
    "requires grad": [torch.zeros(10, requires_grad=True)],
    "no leaf": [],
    "list": [list(range(100))],
    "array": [np.zeros(10, np.float32)],
    "bytes": [b"x" * 2000],
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("fn", [lambda leaf: leaf, lambda leaf: leaf[2:]], ids=["whole", "view"])
def test_other_raw_inputs_are_noticed(name: str, fn: Any) -> None:
    raw = [torch.zeros(10)]
    stream = encode(fn(raw[0]), ALLOW, Leaves.walk(raw)).stream
    with pytest.raises(LayoutError, match="leaf 0"):
        decode(stream, (), ALLOW, Leaves.walk(OTHERS[name]))


@pytest.mark.parametrize("value", [list(range(100)), b"x" * 2000, np.arange(50)], ids=["list", "bytes", "array"])
def test_other_lengths_are_noticed(value: Any) -> None:
    stream = encode(value, ALLOW, Leaves.walk([value]), True).stream
    with pytest.raises(LayoutError, match="leaf 0"):
        decode(
            stream, (), ALLOW, Leaves.walk([copy_of(value)[:-1] if isinstance(value, np.ndarray) else value + value])
        )


def test_a_rank_without_raw_inputs() -> None:
    raw = [torch.zeros(10)]
    stream = encode(raw[0][1:], ALLOW, Leaves.walk(raw)).stream
    with pytest.raises(LayoutError, match="this rank has none"):
        decode(stream, (), ALLOW)


@pytest.mark.parametrize("offset", [-4, -1, 1, 4, 36, 2**31 - 4])
def test_a_view_outside_the_leaf_is_refused(offset: int) -> None:
    """The leaf is a slice of a larger storage, whose other bytes are none of the stream's business."""
    parent = torch.arange(100, dtype=torch.float32)
    raw = [parent[50:60]]
    parts = split(encode(raw[0][1:9].view(torch.int32), ALLOW, Leaves.walk(raw)).stream)
    table = list(parts.table)
    at = table.index(4, 3)  # the offset of the view: one float32
    for forged_offset in (offset + 4, -offset):
        table[at] = forged_offset
        if forged_offset in (0, 4, 8):
            continue
        with pytest.raises(LayoutError):
            decode(join(parts.names, table, parts.pickle), (), ALLOW, Leaves.walk(raw))


@given(st.data())
def test_any_views_of_any_leaves(data: st.DataObject) -> None:
    raw = [torch.arange(40, dtype=torch.int32).view(5, 8), np.arange(30), torch.arange(100, dtype=torch.uint8)[10:90]]

    def fn(raw: list[Any]) -> list[Any]:
        cut = []
        for leaf, low, high, step in picks:
            cut.append(raw[leaf][min(low, high) : max(low, high) : step])
        return cut

    index = st.integers(0, 80)
    picks = data.draw(st.lists(st.tuples(st.integers(0, 2), index, index, st.integers(1, 3)), max_size=8))
    result, _, pieces = across(fn, raw, keeps_leaves=True)
    assert pieces == 0
    for back, was in zip(result, fn(raw), strict=True):
        assert same(back, was)


# What a request weighs before `fn` runs.


SHARED = torch.zeros(10, dtype=torch.int64)
SIZES: dict[str, tuple[Any, int]] = {
    "nothing": (None, 0),
    "a tensor": (torch.zeros(3, 5), 60),
    "an array": (np.zeros((3, 5), np.int16), 30),
    "a slice counts as what it shows": (torch.zeros(100, 10)[:3, ::2], 60),
    "expanded": (torch.zeros(1).expand(1000), 4000),
    "empty": ([torch.empty(0, 7), np.empty(0)], 0),
    "the same twice": ({"a": SHARED, "b": [SHARED, SHARED]}, 80),
    "two views of one": ([SHARED[:5], SHARED[5:]], 80),
    "deep": ([({"x": [torch.zeros(2)]}, torch.zeros(3)), torch.zeros(1)], 24),
    "no lists of numbers, text or bytes": ([list(range(5000)), "x" * 5000, b"x" * 5000], 0),
    "dataclasses": (kinds.Item(kinds.Kind.IMAGE, feature=torch.zeros(7), model_specific_data={"g": SHARED}), 108),
}


@pytest.mark.parametrize("what", SIZES)
def test_bytes_of_the_tensors(what: str) -> None:
    raw, size = SIZES[what]
    assert nbytes_of(raw) == size
    assert nbytes_of([raw, {"again": raw}]) == size
    assert _sent.size_of(raw) == size
    assert _sent.weigh(raw) == (size, False)
    assert _sent.weigh(raw, 7) == (7, False)


def test_bytes_of_what_holds_itself() -> None:
    raw: dict[str, Any] = {"a": torch.zeros(5)}
    raw["self"] = [raw]
    assert nbytes_of(raw) == 20


def test_what_cannot_be_walked_weighs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(raw: object) -> int:
        raise RuntimeError("not today")

    monkeypatch.setattr(_sent, "nbytes_of", fail)
    monkeypatch.setattr(_sent, "is_hashed", fail)
    assert _sent.size_of(SHARED) == 0
    assert _sent.weigh(SHARED) == (0, False)


def test_the_request_of_a_processor() -> None:
    raw = request()
    assert nbytes_of(raw) == sum(leaf.nbytes for leaf in Leaves.walk(raw).objects if hasattr(leaf, "nbytes"))
