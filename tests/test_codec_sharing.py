"""Pieces: what shares memory is sent once and still shares it; what does not, does not."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmcast._codec import Allow, decode, encode
from tests.support.codec import bits, carry, round_trip, same, span_of

ALLOW = Allow()


def sizes(obj: Any) -> list[int]:
    return sorted(piece.source.numel() for piece in encode(obj, ALLOW).pieces)


def test_a_parent_cut_into_views_is_one_piece() -> None:
    parent = torch.randn(64, 100)
    views = [parent[index] for index in range(64)]
    assert sizes(views) == [parent.nbytes]
    back = round_trip(views)
    assert all(same(one, other) for one, other in zip(views, back, strict=True))
    assert len({one.untyped_storage()._cdata for one in back}) == 1


def test_a_write_through_one_view_shows_in_another() -> None:
    parent = torch.zeros(10)
    back = round_trip({"all": parent, "middle": parent[3:6], "bytes": parent.view(torch.uint8)})
    back["middle"].fill_(1.0)
    assert back["all"].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert back["bytes"].any()


def test_a_slice_of_a_huge_storage_sends_the_slice() -> None:
    parent = torch.zeros(10_000_000)
    assert sizes(parent[5_000_000:5_000_010]) == [40]


def test_slices_with_a_gap_are_pieces_of_their_own() -> None:
    parent = torch.arange(1000)
    assert sizes([parent[:10], parent[500:520]]) == [80, 160]


def test_relative_storage_offsets_survive() -> None:
    parent = torch.arange(100)
    left, right = round_trip([parent[20:40], parent[30:60]])
    assert right.storage_offset() - left.storage_offset() == 10
    assert right.data_ptr() - left.data_ptr() == 80


def test_neighbours_of_different_storages_stay_apart() -> None:
    room = np.zeros(256, np.uint8)
    left = torch.frombuffer(memoryview(room.data)[:128], dtype=torch.uint8)
    right = torch.frombuffer(memoryview(room.data)[128:], dtype=torch.uint8)
    assert right.data_ptr() == left.data_ptr() + 128
    assert sizes([left, right]) == [128, 128]


def test_storages_that_overlap_are_one_piece() -> None:
    room = np.arange(256, dtype=np.uint8)
    left = torch.frombuffer(memoryview(room.data)[:200], dtype=torch.uint8)
    right = torch.frombuffer(memoryview(room.data)[100:], dtype=torch.uint8)
    assert sizes([left, right]) == [256]
    back = round_trip([left, right])
    assert same(back[0], left)
    assert same(back[1], right)
    back[0][150] = 77
    assert back[1][50] == 77


def test_a_numpy_alias_shares_its_tensors_piece() -> None:
    tensor = torch.arange(100, dtype=torch.float32)
    value = {"tensor": tensor, "alias": tensor.numpy()[10:20], "back": torch.from_numpy(tensor.numpy()[50:])}
    assert sizes(value) == [400]
    back = round_trip(value)
    back["tensor"][10] = -5.0
    assert back["alias"][0] == -5.0
    assert same(back["back"], value["back"])


def test_views_of_one_array_touch() -> None:
    parent = np.arange(100)
    assert sizes([parent[:50], parent[50:]]) == [800]


def test_bytes_and_an_array_over_them() -> None:
    blob = bytes(range(256)) * 10
    value = [blob, np.frombuffer(blob, np.uint8)[100:200]]
    assert sizes(value) == [2560]
    assert same(round_trip(value), value)


def test_a_lone_sparse_view_is_sent_as_a_contiguous_copy() -> None:
    parent = torch.arange(10_000).view(100, 100)
    assert sizes(parent[:, 0]) == [800]
    back = round_trip(parent[:, 0])
    assert back.is_contiguous()
    assert back.tolist() == parent[:, 0].tolist()
    array = np.arange(10_000).reshape(100, 100)[:, 7]
    assert sizes(array) == [800]
    assert round_trip(array).tolist() == array.tolist()


def test_a_view_of_half_its_extent_keeps_its_strides() -> None:
    view = torch.arange(100)[::2]
    assert sizes(view) == [99 * 8]
    assert same(round_trip(view), view)


def test_sparse_views_that_share_keep_sharing() -> None:
    parent = torch.arange(10_000).view(100, 100)
    value = [parent[:, 0], parent[:, 1]]
    back = round_trip(value)
    assert [one.stride() for one in back] == [(100,), (100,)]
    assert same(back, value)
    assert back[1].data_ptr() - back[0].data_ptr() == 8


def test_a_tensor_off_its_alignment_is_copied() -> None:
    room = np.zeros(41, np.uint8)
    skewed = torch.frombuffer(memoryview(room.data)[1:], dtype=torch.uint8)
    array = np.frombuffer(memoryview(room.data)[1:], np.float32)
    tensor = torch.from_numpy(array)
    assert tensor.data_ptr() % 4
    back = round_trip([tensor, skewed])
    assert same(back[0], tensor)
    assert back[0].data_ptr() % 4 == 0
    assert same(back[1], skewed)


def test_zero_size_tensors_need_no_piece() -> None:
    value = [torch.empty(0, 3), torch.empty(2, 0, dtype=torch.bfloat16), np.empty((3, 0))]
    assert sizes(value) == []
    assert same(round_trip(value), value)


@pytest.mark.parametrize("start", range(0, 70, 3))
def test_lead_keeps_the_place_in_the_line(start: int) -> None:
    parent = torch.arange(300, dtype=torch.uint8)
    (piece,) = encode(parent[start:], ALLOW).pieces
    assert piece.lead == parent[start:].data_ptr() % 64
    assert piece.source.data_ptr() % 64 == piece.lead


@pytest.mark.parametrize("start", range(17))
def test_every_element_keeps_its_alignment(start: int) -> None:
    floats = torch.arange(40).to(torch.complex128)[start:]
    tail = torch.view_as_real(floats).flatten()[1:]
    back = round_trip([floats, tail])
    assert [one.data_ptr() % 64 for one in back] == [floats.data_ptr() % 64, tail.data_ptr() % 64]


def test_a_piece_may_be_a_slice_of_a_larger_tensor() -> None:
    """As on the route `inline`: one received tensor, each piece at a multiple of 64 in it."""
    parent = torch.arange(30, dtype=torch.float64)
    encoded = encode([parent[1:9], parent[20:].view(torch.int16), b"x" * 1500], ALLOW)
    room = torch.zeros(65_536, dtype=torch.uint8)
    pieces, at = [], 0
    for piece in encoded.pieces:
        end = at + piece.lead + piece.source.numel()
        room[at + piece.lead : end] = piece.source
        pieces.append(room[at:end])
        at = end + (-end % 64)
    back: Any = decode(encoded.stream, pieces, ALLOW)
    assert same(back, [parent[1:9], parent[20:].view(torch.int16), b"x" * 1500])
    low, high = room.data_ptr(), room.data_ptr() + at
    assert all(low <= span_of(one)[0] and span_of(one)[1] <= high for one in back[:2])


def test_tensors_lie_in_the_pieces_and_lists_do_not() -> None:
    encoded = encode([torch.arange(10), list(range(100))], ALLOW)
    pieces = carry(encoded)
    back: Any = decode(encoded.stream, pieces, ALLOW)
    for piece in pieces:
        piece.zero_()
    assert back[0].tolist() == [0] * 10
    assert back[1] == list(range(100))


SLICES = st.tuples(st.integers(0, 99), st.integers(1, 100), st.integers(1, 3))


@given(st.lists(SLICES, min_size=1, max_size=12))
def test_any_views_of_one_parent_share_as_before(cuts: list[tuple[int, int, int]]) -> None:
    parent = torch.arange(100, dtype=torch.int32)
    views = [parent[start : start + length : step] for start, length, step in cuts]
    back = round_trip(views)
    assert [one.tolist() for one in back] == [one.tolist() for one in views]
    for left, right, was, and_was in pairs(back, views):
        if overlaps(was, and_was):
            assert right.data_ptr() - left.data_ptr() == and_was.data_ptr() - was.data_ptr()


def pairs(back: list[torch.Tensor], views: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    both = list(zip(back, views, strict=True))
    return [(left, right, was, and_was) for left, was in both for right, and_was in both if was is not and_was]


def overlaps(left: torch.Tensor, right: torch.Tensor) -> bool:
    (low, high), (other_low, other_high) = span_of(left), span_of(right)
    return low < other_high and other_low < high


@given(st.lists(SLICES, min_size=1, max_size=8))
def test_pieces_never_overlap_and_hold_every_view(cuts: list[tuple[int, int, int]]) -> None:
    parents = [torch.arange(100), torch.arange(100, dtype=torch.uint8)]
    views = [parents[index % 2][start : start + length] for index, (start, length, _) in enumerate(cuts)]
    spans = [(piece.source.data_ptr(), piece.source.numel()) for piece in encode(views, ALLOW).pieces]
    for (low, length), (after, _) in itertools.pairwise(spans):
        assert low + length <= after
    for view in views:
        low, high = span_of(view)
        assert any(start <= low and high <= start + length for start, length in spans)
    assert [bits(one) for one in round_trip(views)] == [bits(one) for one in views]
