"""Requests as SGLang's tokenizer makes them: every kind of feature that processors give, in the release's types."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from tests.sglang.engine import FROM_DICT, VERSION, io_struct, mm_utils, schedule_batch

if TYPE_CHECKING:
    from collections.abc import Callable

Item = schedule_batch.MultimodalDataItem
Modality = schedule_batch.Modality
WIDTH = 1176


def rows(count: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    """Pixels: float32, (count, width)."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def image(feature: Any, grid: tuple[int, int, int], start: int, **more: Any) -> Any:
    tokens = grid[0] * grid[1] * grid[2] // 4
    data = {"image_grid_thw": torch.tensor([grid], dtype=torch.int64)}
    return Item(
        modality=Modality.IMAGE,
        offsets=[(start, start + tokens - 1)],
        feature=feature,
        model_specific_data=data,
        **more,
    )


def images_of_one_parent(grids: list[tuple[int, int, int]], seed: int = 0) -> list[Any]:
    """Images that are views of one tensor, as a processor's split gives them."""
    counts = [t * h * w for t, h, w in grids]
    parent = rows(sum(counts), seed)
    items, at, token = [], 0, 3
    for count, grid in zip(counts, grids, strict=True):
        items.append(image(parent[at : at + count], grid, token))
        at += count
        token += count // 4 + 3
    return items


def video(seed: int = 1, grid: tuple[int, int, int] = (2, 20, 20)) -> Any:
    return Item(
        modality=Modality.VIDEO,
        offsets=[(0, grid[0] * grid[1] * grid[2] // 4 - 1)],
        feature=rows(grid[0] * grid[1] * grid[2], seed),
        model_specific_data={
            "video_grid_thw": torch.tensor([grid]),
            "second_per_grid_ts": torch.tensor([1.0]),
        },
    )


def audio(seed: int = 2) -> Any:
    """Its feature is an ndarray."""
    return Item(
        modality=Modality.AUDIO,
        offsets=[(0, 24)],
        feature=rows(128, seed, 300).reshape(1, 128, 300).numpy(),
        model_specific_data={
            "audio_feature_lens": torch.tensor([300]),
            "feature_attention_mask": torch.ones(1, 300, dtype=torch.int32),
            "sampling_rates": np.array([16000]),
        },
    )


def embeddings(seed: int = 3) -> Any:
    """No pixels: what an encoder elsewhere made of them."""
    return Item(
        modality=Modality.IMAGE,
        offsets=[(0, 15)],
        precomputed_embeddings=rows(16, seed, 2048).to(torch.bfloat16),
        model_specific_data={},
    )


def listed(seed: int = 4) -> Any:
    """Its feature is a list of tensors."""
    return Item(
        modality=Modality.IMAGE,
        offsets=[(0, 7)],
        feature=[rows(40, seed, 588), rows(24, seed + 1, 588)],
        model_specific_data={"tgt_sizes": torch.tensor([[8, 5], [6, 4]])},
    )


def raw_of(items: list[Any], tokens: int = 4000) -> Any:
    """What a processor returns for these items."""
    fields = {
        "mm_items": items,
        "input_ids": list(range(tokens)),
        "im_token_id": 151655,
        "im_start_id": 151652,
        "im_end_id": 151653,
        "video_token_id": 151656,
        "audio_token_id": 151646,
        "mrope_positions": torch.arange(tokens).expand(3, -1).contiguous(),
        "mrope_position_delta": torch.tensor([[0]]),
    }
    return fields if FROM_DICT else schedule_batch.MultimodalProcessorOutput.from_dict(fields)


def items_of(raw: Any) -> list[Any]:
    return list(raw["mm_items"] if FROM_DICT else raw.mm_items)


KINDS: dict[str, Callable[[], list[Any]]] = {
    "images of one parent": lambda: images_of_one_parent([(1, 40, 40), (1, 26, 18), (1, 30, 30)]),
    "video": lambda: [video()],
    "audio as ndarray": lambda: [audio()],
    "embeddings": lambda: [embeddings()],
    "list of tensors": lambda: [listed()],
    "all": lambda: [*images_of_one_parent([(1, 20, 20), (1, 10, 12)]), video(), audio(), embeddings(), listed()],
}


def generate(rid: str, raw: Any, **more: Any) -> Any:
    """A request to generate, text where `raw` is None."""
    cls = io_struct.TokenizedGenerateReqInput
    values: dict[str, Any] = {
        "rid": rid,
        "input_text": "",
        "input_ids": [1, 2, 3],
        "mm_inputs": raw,
        "sampling_params": None,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "stream": False,
    }
    for name in _required(cls):
        values.setdefault(name, None)
    return cls(**values | more)


def pointed(request: Any) -> Any:
    """A copy with its tensors in segments of their own, if the release's tokenizer does that.

    No tokenizer does so with a batch; from 0.5.12 on SGLang's receiving reads it.
    """
    if hasattr(request, "batch") and VERSION >= (0, 5, 12):
        request = copy.copy(request)
        request.batch = [pointed(part) for part in request.batch]
        return request
    if getattr(request, "mm_inputs", None) is None or not hasattr(mm_utils, "wrap_shm_features"):
        return request
    request = copy.copy(request)
    raw = request.mm_inputs = copy.copy(request.mm_inputs)
    items = [copy.copy(item) for item in items_of(raw)]
    if FROM_DICT:
        raw["mm_items"] = items
    else:
        raw.mm_items = items
    return mm_utils.wrap_shm_features(request)


def embed(rid: str, raw: Any) -> Any:
    """A request for an embedding. Its inputs are called `image_inputs` up to 0.5.12."""
    cls = io_struct.TokenizedEmbeddingReqInput
    values = dict.fromkeys(_required(cls)) | {"rid": rid, "input_text": "", "input_ids": [1, 2, 3]}
    return cls(**values | {"mm_inputs" if "mm_inputs" in _fields(cls) else "image_inputs": raw})


def batch(requests: list[Any]) -> Any:
    return io_struct.BatchTokenizedGenerateReqInput(batch=requests)


def abort(rid: str = "", *, everything: bool = False) -> Any:
    return io_struct.AbortReq(rid=rid, abort_all=everything)


def malformed() -> Any:
    """Inputs that making raises on: an item with nothing to hash."""
    return raw_of([Item(modality=Modality.IMAGE, offsets=[(0, 3)], feature=object(), model_specific_data={})])


def _required(cls: type) -> list[str]:
    if dataclasses.is_dataclass(cls):
        return [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
    return [field.name for field in msgspec.structs.fields(cls) if field.required]


def same(left: Any, right: Any, path: str = "inputs") -> None:
    """Raise `AssertionError` with the path where two results differ: in type, field, tensor byte or value."""
    assert type(left) is type(right), f"{path}: {type(left)} and {type(right)}"
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, f"{path}: {left.dtype} and {right.dtype}"
        assert left.shape == right.shape, f"{path}: {left.shape} and {right.shape}"
        assert left.contiguous().view(torch.uint8).equal(right.contiguous().view(torch.uint8)) or left.numel() == 0, (
            path
        )
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype, path
        assert left.shape == right.shape, path
        assert left.tobytes() == right.tobytes(), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), f"{path}: {sorted(left)} and {sorted(right)}"
        for key in left:
            same(left[key], right[key], f"{path}[{key!r}]")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), f"{path}: {len(left)} and {len(right)}"
        for number, pair in enumerate(zip(left, right, strict=True)):
            same(*pair, f"{path}[{number}]")
    elif names := _fields(left):
        for name in names:
            same(getattr(left, name), getattr(right, name), f"{path}.{name}")
    else:
        assert left == right, f"{path}: {left!r} and {right!r}"


def _fields(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    if isinstance(value, msgspec.Struct) or (isinstance(value, type) and issubclass(value, msgspec.Struct)):
        return list(value.__struct_fields__)
    return []
