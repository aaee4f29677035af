"""Reading a pickled request: what `pickle.loads` gives, whatever is in it, and pointers in place of segments."""

import itertools
import pickle
import re
import sys
import types
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmcast.integrations.sglang import _reading
from shmcast.integrations.sglang._pointers import MODULE, NAME, Pointer
from shmcast.integrations.sglang._reading import DTYPES, loads, storage_of

OTHERS = [torch.complex64, torch.complex128]
"""Left to torch."""


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    numel = int(torch.Size(shape).numel())
    return torch.arange(numel * dtype.itemsize).remainder(2).to(torch.uint8).view(dtype).view(shape)


def bytes_in(storage: Any) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()


def same(ours: Any, stock: Any) -> None:
    assert type(ours) is type(stock)
    if isinstance(stock, (list, tuple)):
        for mine, theirs in zip(ours, stock, strict=True):
            same(mine, theirs)
        return
    assert (ours.dtype, ours.shape, ours.stride()) == (stock.dtype, stock.shape, stock.stride())
    assert (ours.storage_offset(), ours.device) == (stock.storage_offset(), stock.device)
    assert (ours.requires_grad, ours.is_neg()) == (stock.requires_grad, stock.is_neg())
    assert bytes_in(ours.untyped_storage()) == bytes_in(stock.untyped_storage())


def storage_in(tensor: Any) -> Any:
    """What pickle has of a tensor's storage."""
    return tensor.__reduce_ex__(2)[1][0]


def file_of(tensor: torch.Tensor) -> bytes:
    """torch's file of a tensor's storage, as it is in a pickle."""
    data: bytes = storage_in(tensor).__reduce__()[1][0]
    return data


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What torch was asked to read."""
    real: Any = torch.storage._load_from_bytes
    found: list[bytes] = []

    def load(data: bytes) -> Any:
        found.append(data)
        return real(data)

    load.__module__, load.__qualname__ = real.__module__, real.__qualname__  # pickled by its name
    monkeypatch.setattr(torch.storage, "_load_from_bytes", load)
    return found


@pytest.mark.parametrize("dtype", [*DTYPES.values(), *OTHERS], ids=str)
@pytest.mark.parametrize("protocol", [2, pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL])
def test_a_tensor_is_read_as_by_pickle(dtype: torch.dtype, protocol: int, asked: list[bytes]) -> None:
    whole = of(dtype, 6, 8)
    data = pickle.dumps([whole, whole, whole[2:4], whole.t(), whole[:, ::2], of(dtype, 1), of(dtype, 70_000)], protocol)
    ours = loads(data)
    assert bool(asked) == (dtype in OTHERS)
    same(ours, pickle.loads(data))
    assert ours[0] is ours[1]


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(0), torch.tensor(1.5, requires_grad=True), torch.ones(3, dtype=torch.complex64).conj(), torch.ones(3)],
    ids=["empty", "with gradients", "conjugated", "plain"],
)
def test_what_is_more_than_a_plain_tensor_is_read_as_by_pickle(tensor: torch.Tensor) -> None:
    data = pickle.dumps(tensor)
    same(loads(data), pickle.loads(data))


def test_hooks_and_metadata_are_torchs_to_set() -> None:
    storage = storage_in(torch.ones(3))
    got = _reading.tensor_of(storage, 0, (3,), (1,), False, OrderedDict(), {"neg": True})
    assert got.is_neg()
    assert got.tolist() == [-1, -1, -1]


def test_what_is_read_is_memory_of_its_own() -> None:
    """Not the request's bytes."""
    data = pickle.dumps(torch.arange(4))
    got = loads(data)
    got += 1
    assert got.tolist() == [1, 2, 3, 4]
    assert loads(data).tolist() == [0, 1, 2, 3]


def outcome(read: Any, data: bytes) -> Any:
    """The bytes that were read, or what was raised."""
    try:
        storage = read(data)
        return storage.dtype, bytes_in(storage._untyped_storage)
    except Exception as error:
        return type(error)


def test_what_torch_cannot_read_is_not_read() -> None:
    """It pickles these and cannot read them; they come as pointers or not at all."""
    data = pickle.dumps(of(torch.uint16, 3))
    assert outcome(pickle.loads, data) is AttributeError
    assert outcome(loads, data) is AttributeError


@pytest.mark.parametrize("cut", [0, 10, 100, 140, 200, -1, -8, -9, -20])
def test_a_damaged_file_is_torchs_to_refuse(cut: int, asked: list[bytes]) -> None:
    data = file_of(torch.arange(3))[:cut]
    got = outcome(storage_of, data)
    assert asked == [data]
    assert got == outcome(torch.storage._load_from_bytes, data)


@given(at=st.integers(0, 300), byte=st.integers(0, 255), dtype=st.sampled_from(list(DTYPES.values())))
def test_a_file_with_another_byte_is_read_as_by_torch_or_left_to_it(at: int, byte: int, dtype: torch.dtype) -> None:
    data = bytearray(file_of(of(dtype, 5)))
    data[at % len(data)] = byte
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.storage, "_load_from_bytes", lambda data: None)
        read = storage_of(bytes(data)) is not None
    if read:
        assert outcome(storage_of, bytes(data)) == outcome(torch.storage._load_from_bytes, bytes(data))


def test_a_key_of_another_length_is_torchs_to_refuse(asked: list[bytes]) -> None:
    data = file_of(torch.arange(3))
    key = re.search(rb"X(.)\0\0\0\d+q\x02", data)
    assert key is not None
    longer = data.replace(b"X" + key[1] + bytes(3), b"X" + bytes([key[1][0] + 1, 0, 0, 0]))
    assert longer.count(b"X" + bytes([key[1][0] + 1, 0, 0, 0])) == 2
    assert isinstance(outcome(storage_of, longer), type)
    assert asked == [longer]


def test_a_file_of_another_machine_is_torchs_to_read(asked: list[bytes]) -> None:
    data = file_of(torch.arange(3)).replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    assert data != file_of(torch.arange(3))
    outcome(storage_of, data)
    assert asked == [data]


def test_a_segment_of_the_tokenizers_becomes_a_pointer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType(MODULE)
    sent = type(NAME, (), {"__module__": MODULE})
    setattr(module, NAME, sent)
    for parents in itertools.accumulate(MODULE.split("."), "{}.{}".format):
        monkeypatch.setitem(sys.modules, parents, module)
    pointer = sent()
    vars(pointer).update(shm_name="x", shape=torch.Size([2, 3]), dtype=torch.float32)
    found = loads(pickle.dumps([pointer, pointer]))
    assert [type(each) for each in found] == [Pointer, Pointer]
    assert found[0] is found[1]
    assert (found[0].state, found[0].nbytes, found[0].travels) == (vars(pointer), 24, False)
