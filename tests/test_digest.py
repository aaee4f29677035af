"""Digests: SGLang's bytes in SGLang's order, no copy, and a cache that only the living and the unchanged can hit."""

import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmcast import digest as digest_module
from shmcast.digest import NAMES, digest, digest_bytes, require

STEP = digest_module._STEP


def first_eight(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def flat(value: Any) -> list[Any]:
    return [leaf for inner in value for leaf in flat(inner)] if isinstance(value, list) else [value]


def reference(feature: Any) -> int:
    """SGLang's rules once more, by another way: join everything, make it float32 if bfloat16, take all bytes."""
    if isinstance(feature, np.ndarray):
        return first_eight(np.asarray(feature).tobytes(order="C"))
    if isinstance(feature, bytes):
        return first_eight(feature)
    whole = torch.cat([tensor.detach().flatten() for tensor in flat(feature)])
    if whole.dtype == torch.bfloat16:
        whole = whole.float()
    return first_eight(whole.numpy().tobytes())


class Recorder:
    """A hasher that keeps where each run lay, and how long it was."""

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []

    def update(self, run: memoryview, /) -> None:
        self.runs.append((np.frombuffer(run, np.uint8).ctypes.data, run.nbytes))

    def digest(self) -> bytes:
        return bytes(32)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for each time that bytes are really hashed."""
    calls: list[str] = []
    real = digest_module._hasher

    def counting(name: str) -> Any:
        calls.append(name)
        return real(name)

    monkeypatch.setattr(digest_module, "_hasher", counting)
    yield calls
    gc.collect()


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    return (torch.arange(count) % 251).to(dtype).reshape(shape)


# --- the same number as SGLang


def test_golden_values() -> None:
    """Written out, so that neither side of the other tests can drift."""
    assert digest(b"") == 0xE3B0C44298FC1C14
    assert digest(torch.empty(0)) == 0xE3B0C44298FC1C14
    assert digest(torch.tensor([1, 2, 3], dtype=torch.uint8)) == 0x039058C6F2C0CB49
    assert digest(torch.tensor([1.0, 2.0])) == first_eight(bytes.fromhex("0000803f00000040"))
    assert digest(torch.tensor([1.0, 2.0], dtype=torch.bfloat16)) == first_eight(bytes.fromhex("0000803f00000040"))


NUMPY_KNOWS = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.bfloat16,
]


@pytest.mark.parametrize("dtype", NUMPY_KNOWS, ids=str)
def test_every_dtype_hashes_as_sglang_does(dtype: torch.dtype) -> None:
    tensor = values(6, 7, dtype=dtype)
    assert digest(tensor) == reference(tensor)
    assert digest(tensor.t()) == reference(tensor.t())
    assert digest([tensor, tensor[1:3]]) == reference([tensor, tensor[1:3]])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dtypes_that_sglang_cannot_hash_are_their_bytes(dtype: torch.dtype) -> None:
    raw = torch.arange(48, dtype=torch.uint8)
    assert digest(raw.view(dtype)) == digest(raw)
    assert digest([raw.view(dtype), raw.view(dtype)]) == digest([raw, raw])


SHAPES = {
    "contiguous": lambda t: t,
    "scalar": lambda t: t[3, 4],
    "empty": lambda t: t[:0],
    "offset": lambda t: t[5:9],
    "transposed": lambda t: t.t(),
    "strided": lambda t: t[::3, 1::2],
    "flipped": lambda t: t.flip(0),
    "expanded": lambda t: t[:1].expand(5, -1),
    "one column": lambda t: t[:, 3],
    "one of a column": lambda t: t[4:5, 3],
    "none of a column": lambda t: t[:0, 3],
    "needs grad": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_shape_hashes_its_elements_in_row_major_order(shape: str, dtype: torch.dtype) -> None:
    tensor = SHAPES[shape](values(20, 30, dtype=dtype))
    assert digest(tensor) == reference(tensor)
    assert digest([tensor]) == reference(tensor)


def test_parts_gathered_in_steps_join_without_a_seam() -> None:
    columns = values(3, STEP // 4 + 5)
    assert digest(columns.t()) == reference(columns.t())
    assert digest(columns[:, 1:]) == reference(columns[:, 1:])
    wide = values(2 * (STEP // 4) + 3, dtype=torch.bfloat16)
    assert digest(wide) == reference(wide)
    assert digest(wide[::2]) == reference(wide[::2])
    array = columns.numpy()
    assert digest(array.T) == reference(array.T)
    assert digest(np.asfortranarray(array)) == reference(array)


def test_conjugate_and_negative_views_hash_their_values() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    plain, conj = digest(tensor), digest(tensor.conj())
    assert plain != conj == digest(torch.tensor([1 - 2j, 3 + 4j]))
    assert digest(tensor.conj().imag) == digest(torch.tensor([-2.0, 4.0]))
    assert digest(torch._neg_view(torch.tensor([2.0, -4.0]))) == digest(torch.tensor([-2.0, 4.0]))
    assert digest(tensor) == plain


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(4, 6),
        np.arange(24, dtype=np.float32).reshape(4, 6).T,
        np.arange(24, dtype=np.int16)[::-2],
        np.array(7.5),
        np.zeros((3, 0)),
        np.arange(5, dtype=">i4"),
        np.array(["a", "bcd"]),
        np.array(["2026-01-02"], dtype="datetime64[s]"),
        np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]),
        np.ma.masked_array(np.arange(4), [False, True, False, False]),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_arrays_hash_in_c_order(array: np.ndarray[Any, Any]) -> None:
    assert digest(array) == reference(array)


def test_a_read_only_array_hashes_without_a_warning() -> None:
    array = np.arange(9.0)
    array.flags.writeable = False
    assert digest(array) == reference(array)


def test_bytes_like_objects_are_hashed_as_they_are() -> None:
    for data in (b"picture", bytearray(b"picture"), memoryview(b"picture")):
        assert digest(data) == first_eight(b"picture")


# --- lists


def test_lists_hash_like_one_concatenation() -> None:
    a, b, c = values(3, 4), values(5), values(2, 2, 2) + 1
    assert digest([a, b, c]) == reference([a, b, c])
    assert digest([a, [b, [c]]]) == reference([a, b, c])
    assert digest([[a, b], [c]]) == digest([a, b, c])
    assert digest([a, b]) != digest([b, a])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.float32, torch.int64),
        (torch.bfloat16, torch.int64),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.uint8, torch.int16),
        (torch.bool, torch.float16),
    ],
    ids=str,
)
def test_lists_of_several_dtypes_are_promoted_as_a_concatenation_would(one: torch.dtype, other: torch.dtype) -> None:
    mixed = [values(300, dtype=one) * 5, values(3, 100, dtype=other) * 5, torch.empty(0, dtype=one)]
    assert digest(mixed) == reference(mixed)
    assert digest(mixed[::-1]) == reference(mixed[::-1])


def test_an_empty_tensor_still_takes_part_in_promotion() -> None:
    mixed = [torch.ones(2), torch.empty(0, dtype=torch.float64)]
    assert digest(mixed) == reference(mixed) == digest(torch.ones(2, dtype=torch.float64))


def test_lists_of_arrays_hash_their_bytes_in_order() -> None:
    a, b = np.arange(4.0), np.arange(6, dtype=np.int16).reshape(2, 3).T
    assert digest([a, [b]]) == first_eight(a.tobytes() + b.tobytes())


@given(
    st.recursive(
        st.lists(st.floats(width=32), max_size=5).map(lambda numbers: torch.tensor(numbers, dtype=torch.float32)),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_nesting_hashes_like_the_flat_list(nested: Any) -> None:
    if not flat(nested):
        with pytest.raises(ValueError, match="empty list"):
            digest(nested)
    else:
        assert digest(nested) == reference(nested)


# --- errors


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "NoneType"),
        (3, "builtins.int"),
        ("text", "builtins.str"),
        ((torch.ones(2),), "builtins.tuple"),
        ([1.0, 2.0], "float in a list"),
        ([[1, 2], [3]], "int in a list"),
        ([torch.ones(2), None], "NoneType in a list"),
        (np.array([object()]), "object"),
        (np.array([(1, None)], dtype=[("a", "i4"), ("b", "O")]), "addresses"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, device="meta"), "meta"),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_what_has_no_fixed_bytes_is_refused_by_name(data: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        digest(data)


def test_an_unknown_name_lists_the_known_ones() -> None:
    for call in (lambda: digest(b"", "md5"), lambda: digest_bytes(torch.ones(1), "md5"), lambda: require("md5")):
        with pytest.raises(ValueError, match=r"'md5'.*'sha256', 'blake3'"):
            call()


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "blake3", None)
    with pytest.raises(ImportError, match=r"pip install 'shmcast\[digest\]'") as caught:
        digest(b"", "blake3")
    assert caught.value.name == "blake3"
    with pytest.raises(ImportError, match="blake3"):
        require("blake3")
    require("sha256")


def test_the_package_of_an_extra_is_imported_only_when_named() -> None:
    script = "import sys, shmcast.digest as d; d.digest(b'x'); print('blake3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the other digest


def test_blake3_hashes_the_same_bytes() -> None:
    blake3 = pytest.importorskip("blake3").blake3
    tensor = values(40, 50)
    whole = blake3(tensor.numpy().tobytes()).digest()
    assert digest_bytes(tensor, "blake3") == whole
    assert digest(tensor, "blake3") == int.from_bytes(whole[:8], "big")
    assert digest(tensor.t(), "blake3") == digest(tensor.t().contiguous(), "blake3")
    assert blake3(b"").hexdigest().startswith("af1349b9f5f9a1a6")


@pytest.mark.parametrize("name", NAMES)
def test_the_number_is_the_head_of_the_whole_digest(name: str) -> None:
    if name != "sha256":
        pytest.importorskip(name)
    whole = digest_bytes(values(10), name)
    assert len(whole) == 32
    assert digest(values(10), name) == int.from_bytes(whole[:8], "big")


def test_names_do_not_share_what_is_remembered() -> None:
    pytest.importorskip("blake3")
    tensor = values(100)
    assert digest(tensor) != digest(tensor, "blake3") != digest(tensor)


# --- no copy


def test_contiguous_memory_is_hashed_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(digest_module, "_hasher", lambda name: recorder)
    tensor = values(3000, 1000)
    array = np.arange(5000.0)
    digest(tensor)
    digest(tensor[10:20])
    digest([tensor[:1], array])
    digest(array)
    assert recorder.runs == [
        (tensor.data_ptr(), tensor.nbytes),
        (tensor[10:].data_ptr(), 10 * 4000),
        (tensor.data_ptr(), 4000),
        (array.ctypes.data, array.nbytes),
        (array.ctypes.data, array.nbytes),
    ]


def test_what_must_be_copied_is_copied_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(digest_module, "_hasher", lambda name: recorder)
    gathered = values(3, STEP).t()
    widened = values(STEP, dtype=torch.bfloat16)
    rows = gathered.numpy()
    for data in (gathered, widened, rows):
        recorder.runs.clear()
        digest(data)
        lengths = [length for _, length in recorder.runs]
        assert len(lengths) > 1
        assert max(lengths) <= STEP
        assert sum(lengths) == 4 * (data.size if isinstance(data, np.ndarray) else data.numel())


def test_hashing_writes_nothing() -> None:
    tensor = values(50, 60)
    before, version = tensor.clone(), tensor._version
    digest(tensor)
    digest([tensor.t(), tensor])
    assert torch.equal(tensor, before)
    assert tensor._version == version
    assert tensor.grad_fn is None


# --- the cache


def test_the_same_bytes_are_hashed_once(hashed: list[str]) -> None:
    tensor = values(100)
    assert digest(tensor) == digest(tensor) == reference(tensor)
    assert len(hashed) == 1


def test_new_views_of_one_extent_share_a_digest(hashed: list[str]) -> None:
    parent = values(10, 20)
    assert digest(parent[2:5]) == digest(parent[2:5]) == reference(parent[2:5])
    assert digest(parent[1:][1:4]) == reference(parent[2:5])
    assert len(hashed) == 1


def test_other_extents_and_readings_are_other_entries(hashed: list[str]) -> None:
    parent = values(12, 12)
    views = [parent, parent[1:], parent[:6], parent.t(), parent[::2], parent.view(72, 2)[1:]]
    assert [digest(view) for view in views] == [reference(view) for view in views]
    assert [digest(view) for view in views] == [reference(view) for view in views]
    assert len(hashed) == len(views)


def test_a_counted_write_is_seen(hashed: list[str]) -> None:
    parent = values(10, 20)
    before = digest(parent[2:5])
    parent[9, 9] += 1
    assert digest(parent[2:5]) == before
    parent[3, 3] += 1
    assert digest(parent[2:5]) == reference(parent[2:5]) != before
    assert len(hashed) == 3


def test_a_write_in_inference_mode_to_a_plain_tensor_is_seen() -> None:
    tensor = values(30)
    before = digest(tensor)
    with torch.inference_mode():
        tensor.add_(1)
        assert digest(tensor) == reference(tensor) != before


def test_versions_of_two_counters_are_not_mixed_up() -> None:
    """`.data` counts apart: the same number says nothing there."""
    tensor = values(30)
    apart = tensor.data
    apart.add_(1)
    assert digest(apart) == reference(apart)
    tensor.add_(1)
    assert tensor._version == apart._version
    assert digest(tensor) == reference(tensor)


def test_swapping_the_storage_is_seen() -> None:
    tensor = values(30)
    before, version = digest(tensor), tensor._version
    tensor.data = values(30) + 5
    assert tensor._version == version
    assert digest(tensor) == reference(tensor) != before


def test_a_write_through_a_numpy_alias_is_not_seen(hashed: list[str]) -> None:
    """The limit that the module states: torch counts no such write. An array of its own is hashed each time."""
    tensor = values(30)
    before = digest(tensor)
    alias = tensor.numpy()
    alias[0] = 99
    assert digest(tensor) == before
    assert digest(alias) == reference(tensor) != before
    tensor.add_(0)
    assert digest(tensor) == digest(alias)
    assert len(hashed) == 4


def test_inference_tensors_are_hashed_each_time(hashed: list[str]) -> None:
    with torch.inference_mode():
        tensor = values(30)
        assert digest(tensor) == reference(tensor)
        tensor.add_(1)
        assert digest(tensor) == reference(tensor)
    assert digest(tensor) == reference(tensor)
    assert len(hashed) == 3


def test_arrays_and_lists_are_hashed_each_time(hashed: list[str]) -> None:
    array, tensor = np.arange(8.0), values(8)
    for data in (array, [tensor], array, [tensor]):
        digest(data)
    assert len(hashed) == 4
    array[0] = 5
    assert digest(array) == reference(array)


def test_a_write_while_hashing_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = values(30)
    real = digest_module._hasher

    def writing(name: str) -> Any:
        hasher = real(name)
        tensor.add_(1)
        return hasher

    monkeypatch.setattr(digest_module, "_hasher", writing)
    digest(tensor)
    monkeypatch.setattr(digest_module, "_hasher", real)
    assert tensor.untyped_storage() not in digest_module._remembered


def test_storages_are_forgotten_when_they_die() -> None:
    gc.collect()
    before = len(digest_module._remembered)
    tensors = [values(100) + number for number in range(20)]
    for tensor in tensors:
        digest(tensor)
        digest(tensor[10:])
    assert len(digest_module._remembered) == before + 20
    view = tensors[0][50:]
    del tensors, tensor
    gc.collect()
    assert len(digest_module._remembered) == before + 1
    assert torch.equal(view, values(100)[50:])
    del view
    gc.collect()
    assert len(digest_module._remembered) == before


def test_remembering_keeps_nothing_alive() -> None:
    array = np.arange(64, dtype=np.float32)
    alive = weakref.ref(array)
    tensor = torch.from_numpy(array)
    digest(tensor)
    digest(tensor[3:])
    del array, tensor
    gc.collect()
    assert alive() is None


def test_an_address_used_again_is_not_the_old_storage(hashed: list[str]) -> None:
    """The same memory, the same extent and the same version under a new storage: only liveness tells them apart."""
    memory = np.zeros(1024, dtype=np.float32)
    digests, ids = set(), []
    for number in range(50):
        memory[:] = number
        tensor = torch.from_numpy(memory)
        digests.add(digest(tensor))
        ids.append((id(tensor), id(tensor.untyped_storage()), tensor.data_ptr(), tensor._version))
        del tensor
    assert len(digests) == len(hashed) == 50
    assert len(set(ids)) < 50, "no id was used again: the test shows nothing"


def test_the_extents_of_a_storage_that_lives_on_are_bounded() -> None:
    tensor = values(2000)
    for start in range(1000):
        assert digest(tensor[start:]) == reference(tensor[start:])
        assert len(digest_module._remembered[tensor.untyped_storage()]) <= digest_module._EXTENTS


def test_many_threads_get_the_right_digests() -> None:
    tensors = [values(500) + number for number in range(8)]
    expected = [reference(tensor) for tensor in tensors]
    start = threading.Barrier(8)

    def work(seed: int) -> list[int]:
        start.wait()
        order = [(seed + step) % len(tensors) for step in range(400)]
        wrong = []
        for index in order:
            short_lived = tensors[index].clone()
            if digest(short_lived) != expected[index] or digest(tensors[index]) != expected[index]:
                wrong.append(index)
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[]] * 8


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_can_hash() -> None:
    """Nothing is locked, so a fork at any moment leaves the child a cache that works."""
    tensor = values(100)
    expected = digest(tensor)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = json.dumps([digest(tensor), digest(tensor[1:])])
            os.write(writing, answer.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        assert json.loads(stream.read()) == [expected, reference(tensor[1:])]
    os.waitpid(child, 0)
