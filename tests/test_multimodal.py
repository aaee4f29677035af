"""The reference types: SGLang's fields, hashes and pad values, at once or when somebody asks."""

import copy
import dataclasses
import hashlib
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from shmcast.digest import digest
from shmcast.multimodal import Modality, MultimodalDataItem, MultimodalInputFormat, MultimodalInputs, is_hashed

IMAGE = Modality.IMAGE


def number_of(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def pad_of(number: int) -> int:
    return 1_000_000 + number % 2**30


def pixels(seed: int = 0, rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(seed))


def raw_request() -> dict[str, Any]:
    """Two images cut from one parent, a video and a sound, as a Qwen2-VL processor gives them."""
    parent = pixels(1, 16)
    grids = torch.tensor([[1, 2, 4], [1, 2, 4]])
    items = [
        MultimodalDataItem(
            IMAGE, offsets=[(3, 4)], feature=parent[:8], model_specific_data={"image_grid_thw": grids[:1]}
        ),
        MultimodalDataItem(
            IMAGE, offsets=[(8, 9)], feature=parent[8:], model_specific_data={"image_grid_thw": grids[1:]}
        ),
        MultimodalDataItem(Modality.VIDEO, offsets=[(12, 15)], feature=pixels(2), model_specific_data={"fps": 2.0}),
        MultimodalDataItem(Modality.AUDIO, offsets=[(17, 20)], feature=pixels(3).numpy()),
    ]
    return {
        "mm_items": items,
        "input_ids": list(range(24)),
        "im_start_id": 151652,
        "im_end_id": 151653,
        "im_token_id": 151655,
        "video_token_id": 151656,
        "audio_start_id": 151647,
        "audio_end_id": 151648,
        "audio_token_id": 151646,
        "slice_start_id": 7,
        "slice_end_id": 8,
        "mrope_positions": torch.arange(24).expand(3, -1).contiguous(),
        "mrope_position_delta": torch.tensor([[0]]),
    }


def expected_hashes(raw: dict[str, Any]) -> list[int]:
    return [number_of(np.asarray(item.feature).tobytes()) for item in raw["mm_items"]]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each hash that an item really asked for."""
    calls: list[str] = []

    def counting(data: Any, name: str) -> int:
        calls.append(name)
        return digest(data, name)

    monkeypatch.setattr("shmcast.multimodal.digest_of", counting)
    return calls


def by_fields(item: MultimodalDataItem) -> MultimodalDataItem:
    """What a codec does: values from `__dict__`, an instance without `__init__`, every field set past `__setattr__`."""
    values = [vars(item)[field.name] for field in dataclasses.fields(item)]
    assert len(vars(item)) == len(values)
    rebuilt = object.__new__(type(item))
    for field, value in zip(dataclasses.fields(item), values, strict=True):
        object.__setattr__(rebuilt, field.name, value)
    return rebuilt


def by_dict(item: MultimodalDataItem) -> MultimodalDataItem:
    rebuilt = object.__new__(type(item))
    rebuilt.__dict__.update(vars(item))
    return rebuilt


COPIES: dict[str, Callable[[MultimodalDataItem], MultimodalDataItem]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle 2": lambda item: pickle.loads(pickle.dumps(item, protocol=2)),
    "pickle 5": lambda item: pickle.loads(pickle.dumps(item, protocol=5)),
    "fields": by_fields,
    "dict": by_dict,
}


# --- fields


def test_item_fields_are_those_of_sglang_in_its_order() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(MultimodalDataItem)}
    assert list(defaults) == [
        "modality",
        "hash",
        "pad_value",
        "offsets",
        "format",
        "feature",
        "precomputed_embeddings",
        "model_specific_data",
    ]
    assert defaults["modality"] is defaults["model_specific_data"] is dataclasses.MISSING
    assert defaults["format"] is MultimodalInputFormat.NORMAL
    assert [defaults[name] for name in ("hash", "pad_value", "offsets", "feature", "precomputed_embeddings")] == [
        None
    ] * 5


def test_input_fields_are_those_of_sglang_in_its_order() -> None:
    fields = dataclasses.fields(MultimodalInputs)
    assert [field.name for field in fields] == [
        "mm_items",
        "image_pad_len",
        "num_image_tokens",
        "im_token_id",
        "im_start_id",
        "im_end_id",
        "slice_start_id",
        "slice_end_id",
        "video_token_id",
        "audio_token_id",
        "audio_start_id",
        "audio_end_id",
        "mrope_positions",
        "mrope_position_delta",
    ]
    assert fields[0].default is dataclasses.MISSING
    assert {field.default for field in fields[1:]} == {None}


def test_modalities() -> None:
    assert [(member.name, member.value) for member in Modality] == [
        ("IMAGE", 1),
        ("MULTI_IMAGES", 2),
        ("VIDEO", 3),
        ("AUDIO", 4),
    ]
    assert Modality.all() == [Modality.IMAGE, Modality.VIDEO, Modality.AUDIO]
    assert Modality.from_str("video") is Modality.from_str("VIDEO") is Modality.VIDEO
    with pytest.raises(ValueError, match=r"'smell'.*IMAGE"):
        Modality.from_str("smell")


def test_a_new_item_has_no_hash_until_it_is_set(computed: list[str]) -> None:
    item = MultimodalDataItem(IMAGE, feature=pixels())
    assert item.hash is None
    assert item.pad_value is None
    assert vars(item).keys() == {field.name for field in dataclasses.fields(item)}
    assert not computed


@pytest.mark.parametrize(
    ("modality", "image", "video", "audio"),
    [
        (Modality.IMAGE, True, False, False),
        (Modality.MULTI_IMAGES, True, False, False),
        (Modality.VIDEO, False, True, False),
        (Modality.AUDIO, False, False, True),
        ("IMAGE", False, False, False),
        (None, False, False, False),
    ],
)
def test_kinds_of_items(modality: Any, image: bool, video: bool, audio: bool) -> None:
    item = MultimodalDataItem(modality)
    assert (item.is_image(), item.is_video(), item.is_audio()) == (image, video, audio)
    assert item.is_valid() == (image or video or audio)
    assert item.is_modality(modality)
    assert not item.is_precomputed_embedding()
    item.format = MultimodalInputFormat.PRECOMPUTED_EMBEDDING
    assert item.is_precomputed_embedding()


def test_unknown_names_are_values_of_the_model() -> None:
    grid = torch.tensor([[1, 2, 4]])
    item = MultimodalDataItem(IMAGE, model_specific_data={"image_grid_thw": grid})
    assert item.image_grid_thw is grid
    item.tokens = 4
    item.set("scale", 2)
    item["crop"] = True
    assert item.model_specific_data == {"image_grid_thw": grid, "tokens": 4, "scale": 2, "crop": True}
    assert (item.tokens, item.scale, item.crop) == (4, 2, True)
    item.set("offsets", [(0, 1)])
    item["feature"] = None
    assert item.offsets == [(0, 1)]
    assert len(item.model_specific_data) == 4
    assert vars(item).keys() == {field.name for field in dataclasses.fields(item)}
    with pytest.raises(AttributeError, match="'MultimodalDataItem' object has no attribute 'nothing'"):
        _ = item.nothing
    assert not hasattr(object.__new__(MultimodalDataItem), "anything")


def test_items_do_not_share_their_values() -> None:
    one, other = MultimodalDataItem(IMAGE), MultimodalDataItem(IMAGE)
    one.extra = 1
    assert other.model_specific_data == {}


def test_repr_shows_shapes_and_reads_no_hash(computed: list[str]) -> None:
    item = MultimodalDataItem(IMAGE, feature=pixels(), offsets=[(1, 2)])
    item.set_pad_value(lazy=True)
    shown = repr(item)
    assert "feature=<Tensor (8, 12) torch.float32>" in shown
    assert "hash='sha256'" in shown
    assert "offsets=<list of 1>" in shown
    assert "precomputed" not in shown
    assert not computed


# --- an item from a dict


def test_item_from_dict_keeps_its_values() -> None:
    feature, offsets = pixels(), [(1, 2)]
    item = MultimodalDataItem.from_dict({"modality": "IMAGE", "feature": feature, "offsets": offsets, "hash": 5})
    assert item.modality is IMAGE
    assert item.feature is feature
    assert item.offsets is offsets
    assert (item.hash, item.pad_value) == (5, None)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({}, ValueError, "modality is missing"),
        ({"modality": "SMELL"}, ValueError, "'SMELL'"),
        ({"modality": 1}, ValueError, "modality must be"),
        ({"modality": IMAGE, "pixels": 1}, TypeError, "'pixels'.*model_specific_data"),
    ],
)
def test_item_from_dict_names_what_is_wrong(fields: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MultimodalDataItem.from_dict(fields)


# --- the hash and the pad value


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("feature", "bytes_hashed"),
    [
        (torch.tensor([1.0, 2.0]), bytes.fromhex("0000803f00000040")),
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).t(), bytes([1, 3, 2, 4])),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), bytes.fromhex("0000803f00000040")),
        (np.array([[1, 2], [3, 4]], dtype=np.uint8).T, bytes([1, 3, 2, 4])),
        ([torch.tensor([1.0]), torch.tensor([[2.0]])], bytes.fromhex("0000803f00000040")),
        ([torch.tensor([1.0]), [torch.tensor(2.0)]], bytes.fromhex("0000803f00000040")),
        ([torch.tensor([1.0]), torch.tensor([2])], bytes.fromhex("0000803f00000040")),
    ],
)
def test_the_hash_is_sglangs(feature: Any, bytes_hashed: bytes, lazy: bool) -> None:
    item = MultimodalDataItem(IMAGE, feature=feature)
    item.set_pad_value(lazy=lazy)
    assert item.hash == number_of(bytes_hashed)
    assert item.pad_value == pad_of(number_of(bytes_hashed))
    assert item.feature is feature


def test_a_golden_pad_value() -> None:
    item = MultimodalDataItem(IMAGE, feature=torch.empty(0))
    item.set_pad_value()
    assert (item.hash, item.pad_value) == (0xE3B0C44298FC1C14, 1_000_000 + 0x18FC1C14)


def test_embeddings_are_hashed_where_there_is_no_feature() -> None:
    item = MultimodalDataItem(IMAGE, precomputed_embeddings=pixels(1))
    item.set_pad_value()
    assert item.hash == number_of(pixels(1).numpy().tobytes())
    both = MultimodalDataItem(IMAGE, feature=pixels(2), precomputed_embeddings=pixels(1))
    both.set_pad_value()
    assert both.hash == number_of(pixels(2).numpy().tobytes())


@pytest.mark.parametrize("lazy", [False, True])
def test_what_is_known_is_kept(lazy: bool, computed: list[str]) -> None:
    known = MultimodalDataItem(IMAGE, hash=2**30 + 7, feature=pixels())
    known.set_pad_value(lazy=lazy)
    assert (known.pad_value, known.hash) == (1_000_007, 2**30 + 7)
    padded = MultimodalDataItem(IMAGE, pad_value=9, feature=pixels())
    padded.set_pad_value(lazy=lazy)
    assert (padded.pad_value, padded.hash) == (9, None)
    assert not computed


def test_a_hash_that_is_given_needs_no_feature() -> None:
    item = MultimodalDataItem(IMAGE, hash=3)
    item.set_pad_value()
    assert item.pad_value == 1_000_003


@pytest.mark.parametrize("lazy", [False, True])
def test_an_item_with_nothing_to_hash_is_an_error_at_once(lazy: bool) -> None:
    item = MultimodalDataItem(IMAGE)
    with pytest.raises(ValueError, match="neither feature nor precomputed_embeddings"):
        item.set_pad_value(lazy=lazy)
    assert vars(item)["hash"] is vars(item)["pad_value"] is None


@pytest.mark.parametrize("lazy", [False, True])
def test_digests_by_name(lazy: bool) -> None:
    blake3 = pytest.importorskip("blake3").blake3
    item = MultimodalDataItem(IMAGE, feature=pixels())
    item.set_pad_value("blake3", lazy=lazy)
    assert item.hash == int.from_bytes(blake3(pixels().numpy().tobytes()).digest()[:8], "big")
    assert item.pad_value == pad_of(item.hash)


@pytest.mark.parametrize("lazy", [False, True])
def test_an_unknown_digest_is_an_error_at_once(lazy: bool) -> None:
    item = MultimodalDataItem(IMAGE, feature=pixels())
    with pytest.raises(ValueError, match="md5"):
        item.set_pad_value("md5", lazy=lazy)
    assert vars(item)["hash"] is None


# --- left to the first reader


def unread(feature: Any = None) -> MultimodalDataItem:
    item = MultimodalDataItem(IMAGE, offsets=[(1, 2)], feature=pixels() if feature is None else feature)
    item.set_pad_value(lazy=True)
    return item


@pytest.mark.parametrize("name", ["hash", "pad_value"])
def test_the_first_reader_computes_both_once(name: str, computed: list[str]) -> None:
    item = unread()
    assert not computed
    number = number_of(pixels().numpy().tobytes())
    assert getattr(item, name) == {"hash": number, "pad_value": pad_of(number)}[name]
    assert (vars(item)["hash"], vars(item)["pad_value"]) == (number, pad_of(number))
    assert (item.hash, item.pad_value) == (number, pad_of(number))
    assert computed == ["sha256"]


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_an_unread_item_are_unread(way: str, computed: list[str]) -> None:
    item = unread()
    other = COPIES[way](item)
    assert not computed
    assert isinstance(vars(item)["hash"], str)
    assert vars(other).keys() == vars(item).keys()
    assert other.hash == number_of(pixels().numpy().tobytes())
    assert isinstance(vars(item)["hash"], str)
    assert item.pad_value == other.pad_value
    assert len(computed) == 2


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_a_read_item_are_read(way: str, computed: list[str]) -> None:
    item = unread()
    number = item.hash
    other = COPIES[way](item)
    assert (other.hash, other.pad_value) == (number, item.pad_value)
    assert other.modality is IMAGE
    assert torch.equal(torch.as_tensor(other.feature), pixels())
    assert len(computed) == 1


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_an_item_without_a_hash_have_none(way: str) -> None:
    other = COPIES[way](MultimodalDataItem(IMAGE, feature=pixels()))
    assert other.hash is other.pad_value is None


def test_slots_hold_plain_values() -> None:
    item = unread()
    assert (vars(item)["hash"], vars(item)["pad_value"]) == ("sha256", "sha256")
    assert vars(item).keys() == {field.name for field in dataclasses.fields(item)}
    replaced = dataclasses.replace(item, offsets=None)
    assert replaced.hash == number_of(pixels().numpy().tobytes())


@pytest.mark.parametrize("replacement", [None, pixels(5)], ids=["dropped", "replaced"])
@pytest.mark.parametrize("name", ["feature", "precomputed_embeddings"])
def test_an_unread_hash_is_of_what_was_there_before(name: str, replacement: Any) -> None:
    item = MultimodalDataItem.from_dict({"modality": IMAGE, name: pixels()})
    item.set_pad_value(lazy=True)
    setattr(item, name, replacement)
    assert getattr(item, name) is replacement
    assert item.hash == number_of(pixels().numpy().tobytes())


def test_a_hash_written_to_an_unread_item_counts() -> None:
    item = unread()
    item.hash = 7
    assert (item.hash, item.pad_value) == (7, 1_000_007)
    cleared = unread()
    cleared.hash = None
    assert cleared.pad_value is None
    cleared.set_pad_value()
    assert cleared.hash == number_of(pixels().numpy().tobytes())


def test_setting_twice_reads_an_unread_item(computed: list[str]) -> None:
    item = unread()
    item.set_pad_value(lazy=True)
    assert not computed
    item.set_pad_value()
    assert vars(item)["hash"] == number_of(pixels().numpy().tobytes())


def test_a_feature_that_cannot_be_hashed_fails_its_reader_every_time() -> None:
    item = unread([1.0, 2.0])
    for _ in range(2):
        with pytest.raises(TypeError, match="float in a list"):
            _ = item.hash


def test_readers_that_race_read_the_same() -> None:
    expected = number_of(pixels(rows=500).numpy().tobytes())
    for _ in range(30):
        item = unread(pixels(rows=500))
        start = threading.Barrier(4)

        def read(index: int, item: MultimodalDataItem = item, start: threading.Barrier = start) -> int | None:
            start.wait()
            if index == 3:
                item.feature = None
            return item.hash if index % 2 else item.pad_value

        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(read, range(4)))
        assert found == [pad_of(expected), expected] * 2


# --- inputs from a dict


@pytest.mark.parametrize("lazy", [False, True])
def test_from_dict(lazy: bool) -> None:
    raw = raw_request()
    expected = expected_hashes(raw)
    features = [item.feature for item in raw["mm_items"]]
    inputs = MultimodalInputs.from_dict(raw, lazy=lazy)
    assert [item.hash for item in inputs.mm_items] == expected
    assert [item.pad_value for item in inputs.mm_items] == [pad_of(number) for number in expected]
    assert all(item is own for item, own in zip(inputs.mm_items, raw["mm_items"], strict=True))
    assert all(item.feature is feature for item, feature in zip(inputs.mm_items, features, strict=True))
    for name in raw.keys() - {"mm_items", "input_ids"}:
        assert getattr(inputs, name) is raw[name]
    assert not hasattr(inputs, "input_ids")
    assert inputs.image_pad_len is None
    assert inputs.num_image_tokens is None


def test_from_dict_writes_no_tensor_and_no_list() -> None:
    raw = raw_request()
    before = copy.deepcopy(raw)
    tensors = [item.feature for item in raw["mm_items"][:3]] + [raw["mrope_positions"], raw["mrope_position_delta"]]
    versions = [tensor._version for tensor in tensors]
    MultimodalInputs.from_dict(raw)
    assert [tensor._version for tensor in tensors] == versions
    for item, old in zip(raw["mm_items"], before["mm_items"], strict=True):
        np.testing.assert_array_equal(item.feature, old.feature)
        assert item.offsets == old.offsets
    assert raw["input_ids"] == before["input_ids"]
    assert raw.keys() == before.keys()


def test_a_request_is_hashed_once(computed: list[str]) -> None:
    raw = raw_request()
    MultimodalInputs.from_dict(raw)
    assert len(computed) == 4
    again = MultimodalInputs.from_dict(raw)
    MultimodalInputs.from_dict(raw, lazy=True)
    assert [item.hash for item in again.mm_items] == expected_hashes(raw)
    assert len(computed) == 4


def test_a_lazy_request_is_hashed_when_asked(computed: list[str]) -> None:
    raw = raw_request()
    inputs = MultimodalInputs.from_dict(raw, lazy=True)
    through = pickle.loads(pickle.dumps(inputs))
    assert not computed
    assert through.mm_items[2].pad_value == pad_of(expected_hashes(raw)[2])
    assert len(computed) == 1
    MultimodalInputs.from_dict(raw)
    assert [vars(item)["hash"] for item in raw["mm_items"]] == expected_hashes(raw)


def test_from_dict_takes_dicts_for_items() -> None:
    feature = pixels()
    fields = {"modality": "IMAGE", "feature": feature}
    inputs = MultimodalInputs.from_dict({"mm_items": [fields]})
    assert inputs.mm_items[0].feature is feature
    assert inputs.mm_items[0].hash == number_of(feature.numpy().tobytes())
    assert fields.keys() == {"modality", "feature"}


def test_from_dict_drops_items_of_no_modality() -> None:
    valid = MultimodalDataItem(Modality.AUDIO, feature=pixels())
    raw = {"mm_items": [MultimodalDataItem(None), valid, MultimodalDataItem("IMAGE")]}  # type: ignore[arg-type]
    inputs = MultimodalInputs.from_dict(raw)
    assert inputs.mm_items == [valid]
    assert len(raw["mm_items"]) == 3
    assert MultimodalInputs.from_dict({"mm_items": []}).mm_items == []


def test_from_dict_by_another_digest() -> None:
    blake3 = pytest.importorskip("blake3").blake3
    inputs = MultimodalInputs.from_dict({"mm_items": [{"modality": IMAGE, "feature": pixels()}]}, digest="blake3")
    assert inputs.mm_items[0].hash == int.from_bytes(blake3(pixels().numpy().tobytes()).digest()[:8], "big")


GOOD = {"modality": "IMAGE", "feature": torch.ones(2)}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (None, TypeError, "needs a dict, not NoneType"),
        ([GOOD], TypeError, "needs a dict, not list"),
        ({}, ValueError, "mm_items is missing"),
        ({"mm_items": None}, TypeError, "mm_items must be a list, not NoneType"),
        ({"mm_items": (GOOD,)}, TypeError, "mm_items must be a list, not tuple"),
        ({"mm_items": [GOOD, None]}, TypeError, r"mm_items\[1\]: an item must be .* not NoneType"),
        ({"mm_items": [GOOD, GOOD, {}]}, ValueError, r"mm_items\[2\]: modality is missing"),
        ({"mm_items": [{"modality": "X"}]}, ValueError, r"mm_items\[0\]: .*'X'"),
        ({"mm_items": [GOOD | {"pixels": 1}]}, TypeError, r"mm_items\[0\]: .*'pixels'"),
        ({"mm_items": [{"modality": "IMAGE"}]}, ValueError, r"mm_items\[0\]: neither feature nor"),
    ],
)
def test_from_dict_names_the_field_that_is_wrong(raw: Any, error: type[Exception], words: str, lazy: bool) -> None:
    with pytest.raises(error, match=words):
        MultimodalInputs.from_dict(raw, lazy=lazy)


def test_from_dict_names_the_item_that_cannot_be_hashed() -> None:
    with pytest.raises(TypeError, match=r"mm_items\[1\]: cannot hash builtins\.float in a list"):
        MultimodalInputs.from_dict({"mm_items": [GOOD, {"modality": "AUDIO", "feature": [0.5]}]})
    with pytest.raises(ValueError, match=r"mm_items\[0\]: an empty list"):
        MultimodalInputs.from_dict({"mm_items": [{"modality": "AUDIO", "feature": []}]})


def test_contains() -> None:
    inputs = MultimodalInputs.from_dict(raw_request())
    assert inputs.contains_image_inputs()
    assert inputs.contains_video_inputs()
    assert inputs.contains_audio_inputs()
    assert inputs.contains_mm_input()
    image = MultimodalInputs(mm_items=[MultimodalDataItem(Modality.MULTI_IMAGES)])
    assert image.contains_image_inputs()
    assert not image.contains_video_inputs()
    assert not image.contains_audio_inputs()
    assert not MultimodalInputs(mm_items=[]).contains_mm_input()


# --- merging


def test_merging_inputs() -> None:
    one = MultimodalInputs.from_dict(raw_request())
    other = MultimodalInputs.from_dict(
        {**raw_request(), "im_token_id": 99, "mrope_position_delta": torch.tensor([[3]])}
    )
    own, positions, video_id = one.mm_items, one.mrope_positions, one.video_token_id
    one.image_pad_len, other.image_pad_len = [1], [2]
    one.im_start_id, one.num_image_tokens, other.num_image_tokens = None, 5, 6
    one.merge(other)
    assert one.mm_items == [*own, *other.mm_items]
    assert len(own) == len(other.mm_items) == 4
    assert one.image_pad_len == [1, 2]
    assert one.mrope_positions is not None
    assert positions is not None
    assert one.mrope_positions.shape == (3, 48)
    assert positions.shape == (3, 24)
    assert torch.equal(torch.as_tensor(one.mrope_position_delta), torch.tensor([[0], [3]]))
    assert [one.im_token_id, one.im_start_id, one.video_token_id] == [151655, 151652, video_id]
    assert one.num_image_tokens == 5


def test_merging_inputs_that_lack_positions() -> None:
    one, other = MultimodalInputs.from_dict(raw_request()), MultimodalInputs(mm_items=[])
    positions = one.mrope_positions
    one.merge(other)
    assert one.mrope_positions is positions
    other.merge(one)
    assert other.mrope_positions is other.mrope_position_delta is None
    assert other.mm_items == one.mm_items


@pytest.mark.parametrize("lazy", [False, True])
def test_merging_items(lazy: bool) -> None:
    tensors = [pixels(1), pixels(2)]
    one, other = (MultimodalDataItem(IMAGE, offsets=[(n, n)], feature=[tensors[n]]) for n in range(2))
    for item in (one, other):
        item.set_pad_value(lazy=lazy)
    hashes = tuple(number_of(tensor.numpy().tobytes()) for tensor in tensors)
    shared = one.feature
    one.merge(other)
    assert isinstance(one.feature, list)
    assert one.feature[0] is tensors[0]
    assert one.feature[1] is tensors[1]
    assert one.offsets == [(0, 0), (1, 1)]
    assert one.hash == hash(hashes)
    assert one.pad_value == pad_of(hash(hashes))
    assert isinstance(shared, list)
    assert len(shared) == 1
    assert other.hash == hashes[1]


def test_items_with_tensors_are_not_merged_by_adding_them() -> None:
    one, other = (MultimodalDataItem(IMAGE, offsets=[], feature=pixels(n)) for n in range(2))
    with pytest.raises(TypeError, match=r"feature is <Tensor \(8, 12\)"):
        one.merge(other)
    assert torch.equal(torch.as_tensor(one.feature), pixels(0))


# Whether the hashes are there.


def test_a_request_carries_its_hashes_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_now(*args: object) -> int:
        raise AssertionError("it computed a hash")

    raw = raw_request()
    lazy = raw_request()
    MultimodalInputs.from_dict(lazy, lazy=True)
    done = MultimodalInputs.from_dict(raw_request())
    monkeypatch.setattr("shmcast.multimodal.digest_of", not_now)
    assert not is_hashed(raw)
    assert not is_hashed(lazy), "an unread hash is still to be computed"
    assert is_hashed({"mm_items": done.mm_items})
    assert is_hashed(done)
    for item in raw["mm_items"][:-1]:
        item.hash = 5
    assert not is_hashed(raw), "all but one"
    raw["mm_items"][-1].hash = 0
    assert is_hashed(raw), "a hash of 0 is one"


class Foreign:
    """An item of an engine's own."""

    def __init__(self, hash: int | None) -> None:
        self.hash = hash


@pytest.mark.parametrize(
    ("raw", "hashed"),
    [
        ({"mm_items": [{"feature": 1, "hash": 7}, {"hash": 0}]}, True),
        ({"mm_items": [{"feature": 1, "hash": 7}, {"hash": None}]}, False),
        ({"mm_items": [{"feature": 1}]}, False),
        ({"mm_items": [Foreign(1), Foreign(2)]}, True),
        ({"mm_items": [Foreign(1), Foreign(None)]}, False),
        ({"mm_items": [object()]}, False),
        ({"mm_items": []}, False),
        ({"mm_items": None}, False),
        ({}, False),
        (None, False),
        ([1, 2], False),
        ("text", False),
    ],
)
def test_whatever_stands_for_a_request_carries_hashes_or_not(raw: Any, hashed: bool) -> None:
    assert is_hashed(raw) is hashed
