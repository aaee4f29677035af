"""Every value that travels: plain data, all dtypes and shapes of tensors and arrays, codes of their own."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmcast._codec import Allow, decode, encode
from shmcast._codec._geometry import TORCH_DTYPES
from tests.support.codec import bits, carry, round_trip, same

PLAIN = [
    None,
    True,
    0,
    255,
    256,
    65536,
    -1,
    2**31,
    -(2**63),
    2**64,
    10**700,
    -(10**700),
    0.0,
    -0.0,
    float("inf"),
    float("nan"),
    1 + 2j,
    "",
    "é" * 300,
    "x" * 70_000,
    "\ud800 alone",
    b"",
    b"x" * 300,
    b"x" * 1023,
    b"x" * 1024,
    b"x" * 100_000,
    bytearray(b"abc"),
    bytearray(b"abc" * 1000),
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    [],
    [1],
    list(range(63)),
    {},
    {"a": 1},
    {"a": {"b": [1, (2, {3})]}, 1: "one", (1, 2): "pair", None: None},
    set(),
    {1, "a", (2, 3)},
    frozenset(),
    frozenset({1, frozenset({2})}),
    slice(None),
    slice(1, -2, 3),
    range(5),
    range(10**30, -5, -7),
    [{"id": index, "name": str(index)} for index in range(2500)],
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: f"{type(value).__name__}-{str(value)[:12]}")
def test_plain_values(value: Any) -> None:
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        torch.float16,
        torch.bfloat16,
        torch.Size([]),
        torch.Size([2, 3, 2**40]),
        torch.device("cpu"),
        torch.device("cuda:3"),
        np.float32(1.5),
        np.float64("nan"),
        np.int8(-3),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.complex64(1j),
        np.longdouble(1.25),
        np.datetime64("2020-02-03"),
        np.timedelta64(5, "ms"),
        np.str_("text"),
        np.str_(""),
        np.bytes_(b"bytes"),
        np.dtype("float32"),
        np.dtype("<U5"),
        np.dtype("datetime64[ns]"),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}",
)
def test_codes_of_their_own(value: Any) -> None:
    back = round_trip([value])[0]
    assert type(back) is type(value)
    assert same(back, value)


def filled(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of this dtype whose bytes all differ from their neighbours' (bool: valid ones)."""
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = torch.arange(count, dtype=torch.int64) % (2 if dtype is torch.bool else 251)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says of complex32, once, that it is experimental
        return raw.to(torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("name", sorted(TORCH_DTYPES))
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (0,), (3, 0, 2), (2, 1, 2, 1, 3)], ids=str)
def test_every_dtype_and_shape(name: str, shape: tuple[int, ...]) -> None:
    tensor = filled(TORCH_DTYPES[name], *shape)
    back = round_trip(tensor)
    assert same(back, tensor)
    assert back.device.type == "cpu"
    assert not back.requires_grad


def test_the_dtype_table_is_torchs_own_without_the_quantised() -> None:
    wanted = {
        torch.bool,
        torch.uint8,
        torch.uint64,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.complex32,
        torch.float64,
    }
    assert wanted <= set(TORCH_DTYPES.values())
    assert not {torch.qint8, torch.quint8, torch.qint32} & set(TORCH_DTYPES.values())


BASE = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)

STRIDED = {
    "transposed": BASE.transpose(0, 3),
    "permuted": BASE.permute(2, 0, 3, 1),
    "stepped": BASE[:, ::2, :, 1:],
    "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
    "expanded far": torch.tensor(7.0).expand(10**9),
    "channels last": BASE.contiguous(memory_format=torch.channels_last),
    "size one, odd stride": torch.arange(6.0).as_strided((1, 3), (99, 1)),
    "overlapping windows": torch.arange(10.0).unfold(0, 4, 1),
    "every second": torch.arange(9.0)[::2],
    "zero size, odd stride": torch.empty(0).as_strided((0, 3), (7, 5)),
}


@pytest.mark.parametrize("name", STRIDED)
def test_strides_survive(name: str) -> None:
    tensor = STRIDED[name]
    back = round_trip(tensor)
    assert back.shape == tensor.shape
    assert back.stride() == tensor.stride()
    if tensor.numel() < 10**6:
        assert bits(back) == bits(tensor)
    else:
        assert back[0] == back[-1] == tensor[0]


ARRAYS = {
    "bool": np.array([True, False]),
    "int8": np.arange(-3, 3, dtype=np.int8),
    "uint16": np.arange(5, dtype=np.uint16),
    "float16": np.arange(5, dtype=np.float16),
    "longdouble": np.arange(5, dtype=np.longdouble),
    "complex128": np.arange(5) * 1j,
    "datetime": np.array(["2020-01-01", "2021-01-01"], dtype="M8[s]"),
    "timedelta": np.array([1, 2], dtype="m8[us]"),
    "text": np.array(["ab", "cde"]),
    "bytes": np.array([b"ab", b"cde"]),
    "0-dim": np.array(5),
    "empty": np.empty((0, 3), np.float32),
    "empty text": np.array([], dtype="<U7"),
    "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    "reversed": np.arange(10)[::-1],
    "reversed 2-d": np.arange(12).reshape(3, 4)[::-1, ::-1],
    "stepped": np.arange(20).reshape(4, 5)[1:, ::2],
    "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "unaligned": np.frombuffer(b"x" + bytes(range(16)), np.int32, 4, 1),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name: str) -> None:
    array = ARRAYS[name]
    back = round_trip(array)
    assert type(back) is np.ndarray
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable == array.flags.writeable
    if array.size:
        assert back.strides == array.strides


def test_an_array_keeps_the_piece_that_it_lies_in() -> None:
    encoded = encode(np.arange(100), Allow())
    (piece,) = carry(encoded)
    back = decode(encoded.stream, [piece], Allow())
    base: Any = back
    while isinstance(base, np.ndarray):
        base = base.base
    assert isinstance(base, torch.Tensor)
    assert base.untyped_storage()._cdata == piece.untyped_storage()._cdata


@pytest.mark.parametrize("first", [0, -(2**63), 2**63 - 200, 10**6])
def test_long_lists_of_ints_are_pieces(first: int) -> None:
    ids = [first + index for index in range(100)]
    encoded = encode(ids, Allow())
    assert [piece.source.numel() for piece in encoded.pieces] == [800]
    assert len(encoded.stream) < 60
    assert same(decode(encoded.stream, carry(encoded), Allow()), ids)


@pytest.mark.parametrize(
    "value",
    [
        [*range(100), True],
        [True, *range(100)],
        [*range(100), 2**63],
        [*range(100), 1.0],
        [0.5] * 100,
        [[1, 2]] * 100,
        [*range(99), "a"],
    ],
    ids=["bool last", "bool first", "too large", "float", "floats", "lists", "text"],
)
def test_other_long_lists_stay_in_the_stream(value: list[Any]) -> None:
    assert not encode(value, Allow()).pieces
    assert same(round_trip(value), value)


def test_large_bytes_are_pieces_and_come_back_as_their_type() -> None:
    value = {"blob": b"abc" * 1000, "array": bytearray(b"xyz" * 1000)}
    encoded = encode(value, Allow())
    assert sorted(piece.source.numel() for piece in encoded.pieces) == [3000, 3000]
    back = decode(encoded.stream, carry(encoded), Allow())
    assert same(back, value)
    back["array"].append(1)  # type: ignore[index]


def test_identity_survives() -> None:
    ids, blob, inner, tensor = list(range(100)), b"x" * 2000, {"a": 1}, torch.arange(5)
    value = [ids, ids, blob, blob, inner, inner, tensor, tensor, (inner, ids)]
    back = round_trip(value)
    assert back[0] is back[1] is back[8][1]
    assert back[2] is back[3]
    assert back[4] is back[5] is back[8][0]
    assert back[6] is back[7]


def test_nothing_is_copied() -> None:
    tensor = torch.arange(1000, dtype=torch.float32)
    (piece,) = encode({"a": tensor}, Allow()).pieces
    assert piece.source.data_ptr() == tensor.data_ptr()
    assert piece.source.dtype is torch.uint8
    assert piece.source.numel() == tensor.nbytes


def test_a_piece_keeps_its_source_alive() -> None:
    (piece,) = encode([torch.full((1000,), 7.0)], Allow()).pieces
    torch.full((1000,), 8.0)
    assert piece.source.view(torch.float32).eq(7.0).all()


def test_a_flattener_leaves_no_garbage_cycle() -> None:
    import gc
    import weakref

    tensor = torch.arange(1000)
    alive = weakref.ref(tensor)
    gc.disable()
    try:
        encode([tensor, list(range(100)), {"a": 1}], Allow())
        del tensor
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inside_a_grad_mode(mode: Any) -> None:
    with mode():
        tensor = torch.arange(6.0).view(2, 3)
        assert same(round_trip([tensor, tensor[1:]])[1], tensor[1:])
    assert same(round_trip(tensor), tensor)


def test_golden_stream() -> None:
    """The bytes as the table in `_table.py` says; a change of them is a change of the format."""
    stream = encode({"a": [1, 2.5], "t": torch.zeros(2, 3)}, Allow()).stream
    header = b"sk" + bytes([1, 1]) + (13).to_bytes(4, "little") + (10).to_bytes(4, "little")
    lead = stream[len(header) + 13 + 2] - 24
    table = bytes([0, 1, 24 + lead, 1, 0, 0, lead, 8, 2, 3])
    assert stream[: len(header)] == header
    assert stream[len(header) : len(header) + 13] == b"torch.float32"
    assert stream[len(header) + 13 :][:10] == table
    assert stream[len(header) + 23 :] == (
        b"\x80\x05\x95\x1f\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94]\x94(K\x01G@\x04\x00\x00\x00\x00\x00\x00e"
        b"\x8c\x01t\x94K\x01Qu."
    )


KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any dtype that torch can print, perhaps transposed, perhaps a slice that is not sparse."""
    names = [name for name in sorted(TORCH_DTYPES) if not re.search(r"bits|int[1-7]\b|float4", name)]
    tensor = filled(TORCH_DTYPES[draw(st.sampled_from(names))], *draw(st.lists(st.integers(0, 4), max_size=4)))
    if tensor.dim() > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if tensor.dim() and tensor.shape[0] > 1 and draw(st.booleans()):
        tensor = tensor[1:]
    return tensor


def arrays() -> st.SearchStrategy[np.ndarray[Any, Any]]:
    from hypothesis.extra import numpy as hnp

    kinds = hnp.boolean_dtypes() | hnp.integer_dtypes(endianness="=") | hnp.floating_dtypes(endianness="=")
    return hnp.arrays(kinds, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))


TREES = st.recursive(
    KEYS
    | st.floats()
    | st.complex_numbers()
    | tensors()
    | arrays()
    | st.builds(bytearray, st.binary(max_size=2000))
    | st.lists(st.integers(-(2**63), 2**63 - 1), min_size=60, max_size=70),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(KEYS, inner, max_size=5)
        | st.tuples(inner)
        | st.tuples(inner, inner, inner, inner)
    ),
    max_leaves=20,
)


@given(TREES)
def test_any_tree_round_trips(tree: Any) -> None:
    assert same(round_trip(tree), tree)
