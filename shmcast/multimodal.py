"""The reference types: what a multimodal request carries, field by field as in SGLang.

The fields, their order and their defaults are those of SGLang 0.5.7 to 0.5.9, the last releases with
`MultimodalInputs.from_dict`; 0.5.5 and 0.5.6 lack only `format`. Where those releases differ:

    pad value       as in 0.5.9: above all token ids; before, it could be one
    item.x = value  for an unknown x goes to `model_specific_data`, where `item.x` finds it, as in SGLang since 0.5.20

An item whose hash is left to its first reader keeps the *name* of the digest, a str, in its `hash` and `pad_value`
slots (`vars(item)`), and `item.hash` puts the number there. So it copies, pickles and travels as a plain dataclass,
and stays unread until somebody asks: whatever carries items should take field values from `vars(item)`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch

from shmcast.digest import DEFAULT, require
from shmcast.digest import digest as digest_of

if TYPE_CHECKING:
    from typing_extensions import Self

Feature: TypeAlias = torch.Tensor | np.ndarray[Any, Any] | list[Any]

PAD_SHIFT = 1_000_000
"""Pad values start here, above every token id, so that a padded prompt matches only the same picture."""


class Modality(enum.Enum):
    """What an item shows."""

    IMAGE = enum.auto()
    MULTI_IMAGES = enum.auto()
    VIDEO = enum.auto()
    AUDIO = enum.auto()

    @staticmethod
    def from_str(modality_str: str) -> Modality:
        """The modality of that name, in any case. Raises ValueError, which lists the names."""
        try:
            return Modality[modality_str.upper()]
        except KeyError:
            raise ValueError(f"no modality is named {modality_str!r}; there are {[m.name for m in Modality]}") from None

    @staticmethod
    def all() -> list[Modality]:
        """One modality for each encoder: images, one or many, share theirs."""
        return [Modality.IMAGE, Modality.VIDEO, Modality.AUDIO]


class MultimodalInputFormat(enum.Enum):
    """How far an item's data has come before it reached the engine."""

    NORMAL = enum.auto()
    PROCESSOR_OUTPUT = enum.auto()
    PRECOMPUTED_EMBEDDING = enum.auto()


def pad_value_of(hash_value: int) -> int:
    """The token id that stands for an item in a padded prompt, from the item's hash."""
    return PAD_SHIFT + hash_value % (1 << 30)


class _Deferred:
    """A field that may be left to its first reader; the value lies in `vars(item)` under the field's name.

    A str there is the name of the digest to compute it with.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    # dataclasses asks the class for the field's default.
    @overload
    def __get__(self, item: None, owner: type) -> None: ...
    @overload
    def __get__(self, item: MultimodalDataItem, owner: type) -> int | None: ...
    def __get__(self, item: MultimodalDataItem | None, owner: type) -> int | None:
        if item is None:
            return None
        value: int | str | None = vars(item).get(self._name)
        if isinstance(value, str):
            item._settle()
            settled: int | None = vars(item)[self._name]
            return settled
        return value

    def __set__(self, item: MultimodalDataItem, value: int | None) -> None:
        vars(item)[self._name] = value


@dataclasses.dataclass(repr=False)
class MultimodalDataItem:
    """The inputs of one modality: a picture or several, a video, a sound.

    `feature` is what the processor made of them, on the CPU: a tensor or an array (`pixel_values`, say, of shape
    [patches, width]), or a list of them; `precomputed_embeddings` the encoder's output instead. `offsets` are the
    (first, last) token positions of each in the prompt. What only some models need lies in `model_specific_data` and
    reads like an attribute; so does an attribute of an unknown name once written.
    """

    modality: Modality
    hash: _Deferred = _Deferred()
    pad_value: _Deferred = _Deferred()
    offsets: list[Any] | None = None
    format: MultimodalInputFormat = MultimodalInputFormat.NORMAL
    feature: Feature | None = None
    precomputed_embeddings: Feature | None = None
    model_specific_data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        extras = self.__dict__.get("model_specific_data")
        if extras is not None and name in extras:
            return extras[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).__dataclass_fields__:
            self.model_specific_data[name] = value
            return
        if name in ("feature", "precomputed_embeddings") and name in self.__dict__:
            # The engine moves a feature to its device, or drops it: an unread hash is of what was there before.
            self._settle()
        object.__setattr__(self, name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def set(self, key: str, value: Any) -> None:
        """Set a field, or a value of `model_specific_data` if no field has that name."""
        setattr(self, key, value)

    def __repr__(self) -> str:
        """Fields that are set, arrays by their shape; reads no unread hash."""
        shown = {key: value for key, value in vars(self).items() if value is not None}
        return f"{type(self).__name__}({', '.join(f'{key}={_shown(value)}' for key, value in shown.items())})"

    def set_pad_value(self, digest: str = DEFAULT, *, lazy: bool = False) -> None:
        """Set `hash`, unless it is known, and `pad_value` from it; an item that has a pad value is left as it is.

        `digest` is the name of a digest, the same on every rank. `lazy` leaves the work to the first who reads
        `hash` or `pad_value` or replaces what they are of; until then nobody may write into the feature. Raises
        ValueError for an item without a feature and embeddings, and whatever `shmcast.digest.digest` raises.
        """
        if not lazy:
            self._settle()
        slots = vars(self)
        if slots.get("pad_value") is not None:
            return
        if slots.get("hash") is None:
            data = self._hashed()
            if lazy:
                require(digest)
            slots["hash"] = digest if lazy else digest_of(data, digest)
        slots["pad_value"] = digest if lazy else pad_value_of(slots["hash"])

    def is_modality(self, modality: Modality) -> bool:
        """Whether the item is of exactly this modality."""
        return self.modality == modality

    def is_audio(self) -> bool:
        """Whether the item holds sound."""
        return self.modality == Modality.AUDIO

    def is_image(self) -> bool:
        """Whether the item holds one picture or several."""
        return self.modality in (Modality.IMAGE, Modality.MULTI_IMAGES)

    def is_video(self) -> bool:
        """Whether the item holds a video."""
        return self.modality == Modality.VIDEO

    def is_valid(self) -> bool:
        """Whether the item is of a modality at all: `MultimodalInputs.from_dict` drops the others."""
        return self.is_image() or self.is_video() or self.is_audio()

    def is_precomputed_embedding(self) -> bool:
        """Whether the item came as encoder output."""
        return self.format == MultimodalInputFormat.PRECOMPUTED_EMBEDDING

    @classmethod
    def from_dict(cls, obj: dict[str, Any]) -> Self:
        """An item from its fields by name; `modality` may be a name. Values are kept, not copied.

        Raises ValueError for a modality that is missing or unknown, TypeError for a name that no field has.
        """
        fields = dict(obj)
        if "modality" not in fields:
            raise ValueError("modality is missing")
        modality = fields.pop("modality")
        if isinstance(modality, str):
            modality = Modality.from_str(modality)
        if not isinstance(modality, Modality):
            raise ValueError(f"modality must be a Modality or its name, not {modality!r}")
        unknown = fields.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise TypeError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}; put it into model_specific_data")
        return cls(modality=modality, **fields)

    def merge(self, other: MultimodalDataItem) -> None:
        """Append the features and offsets of `other`, as new lists, and combine the hashes.

        Both features must be lists: tensors do not concatenate by `+`, and a list that is shared stays as it was.
        Raises TypeError for anything else.
        """
        for name in ("feature", "offsets"):
            for item in (self, other):
                if not isinstance(getattr(item, name), list):
                    raise TypeError(f"merge needs lists, and {name} is {_shown(getattr(item, name))}")
        combined = hash((self.hash, other.hash))
        self.feature = [*vars(self)["feature"], *vars(other)["feature"]]
        self.offsets = [*vars(self)["offsets"], *vars(other)["offsets"]]
        self.hash, self.pad_value = combined, pad_value_of(combined)

    def _hashed(self) -> Any:
        data = self.precomputed_embeddings if self.feature is None else self.feature
        if data is None:
            raise ValueError("neither feature nor precomputed_embeddings is there to hash")
        return data

    def _settle(self) -> None:
        """Compute what is unread. Readers that race compute the same."""
        slots = vars(self)
        # Looked up before the slot: once another reader has filled that, the feature may be gone.
        feature, embeddings = slots.get("feature"), slots.get("precomputed_embeddings")
        name = slots.get("hash")
        if isinstance(name, str):
            slots["hash"] = digest_of(embeddings if feature is None else feature, name)
        if isinstance(slots.get("pad_value"), str):
            slots["pad_value"] = None if slots.get("hash") is None else pad_value_of(slots["hash"])


_OPTIONAL = (
    "mrope_positions",
    "mrope_position_delta",
    "im_token_id",
    "im_start_id",
    "im_end_id",
    "video_token_id",
    "slice_start_id",
    "slice_end_id",
    "audio_start_id",
    "audio_end_id",
    "audio_token_id",
)


@dataclasses.dataclass
class MultimodalInputs:
    """All multimodal inputs of one request.

    `mrope_positions` is [3, tokens] int64 and `mrope_position_delta` [1, 1] int64, on the CPU; the rest are token ids
    of the model and counts.
    """

    mm_items: list[MultimodalDataItem]
    image_pad_len: list[Any] | None = None
    num_image_tokens: int | None = None
    im_token_id: int | None = None
    im_start_id: int | None = None
    im_end_id: int | None = None
    slice_start_id: int | None = None
    slice_end_id: int | None = None
    video_token_id: int | None = None
    audio_token_id: int | None = None
    audio_start_id: int | None = None
    audio_end_id: int | None = None
    mrope_positions: torch.Tensor | None = None
    mrope_position_delta: torch.Tensor | None = None

    @classmethod
    def from_dict(cls, obj: dict[str, Any], *, lazy: bool = False, digest: str = DEFAULT) -> Self:
        """The inputs from a processor's output; runs on any rank, and gives the same on all.

        `obj["mm_items"]` is a list of items (`MultimodalDataItem`, or dicts of their fields); those of no modality are
        dropped, keys that are no fields ignored. Nothing is copied and no tensor written: features, positions and
        items *are* those of `obj`, so that its items know their hash the next time. `lazy` leaves the hashes to their
        first reader, `digest` names the digest (see `MultimodalDataItem.set_pad_value`).

        Raises ValueError or TypeError that names the field, for what is missing, of a wrong type, or not hashable.
        """
        if not isinstance(obj, dict):
            raise TypeError(f"from_dict needs a dict, not {type(obj).__name__}")
        if "mm_items" not in obj:
            raise ValueError("mm_items is missing")
        raw = obj["mm_items"]
        if not isinstance(raw, list):
            raise TypeError(f"mm_items must be a list, not {type(raw).__name__}")
        items = []
        for index, one in enumerate(raw):
            try:
                item = _item_of(one)
                if item.is_valid():
                    item.set_pad_value(digest, lazy=lazy)
                    items.append(item)
            except TypeError as error:
                raise TypeError(f"mm_items[{index}]: {error}") from error
            except ValueError as error:
                raise ValueError(f"mm_items[{index}]: {error}") from error
        return cls(mm_items=items, **{name: obj[name] for name in _OPTIONAL if name in obj})

    def contains_image_inputs(self) -> bool:
        """Whether any item is a picture."""
        return any(item.is_image() for item in self.mm_items)

    def contains_video_inputs(self) -> bool:
        """Whether any item is a video."""
        return any(item.is_video() for item in self.mm_items)

    def contains_audio_inputs(self) -> bool:
        """Whether any item is sound."""
        return any(item.is_audio() for item in self.mm_items)

    def contains_mm_input(self) -> bool:
        """Whether any item is of a modality at all."""
        return any(item.is_valid() for item in self.mm_items)

    def merge(self, other: MultimodalInputs) -> None:
        """Append `other`'s items, pads and positions; ids that are not set here are taken over from it.

        Lists and tensors are made new, those of before stay as they were.
        """
        self.mm_items = [*self.mm_items, *other.mm_items]
        if self.image_pad_len is not None:
            self.image_pad_len = [*self.image_pad_len, *(other.image_pad_len or [])]
        if self.mrope_positions is not None and other.mrope_positions is not None:
            self.mrope_positions = torch.cat([self.mrope_positions, other.mrope_positions], dim=1)
        if self.mrope_position_delta is not None and other.mrope_position_delta is not None:
            self.mrope_position_delta = torch.cat([self.mrope_position_delta, other.mrope_position_delta], dim=0)
        for name, value in vars(other).items():
            if "_id" in name and getattr(self, name, None) is None:
                setattr(self, name, value)


def is_hashed(raw: Any) -> bool:
    """Whether every item of a processor's output carries its hash already; computes none."""
    items = raw.get("mm_items") if isinstance(raw, dict) else getattr(raw, "mm_items", None)
    return isinstance(items, list) and bool(items) and all(map(_carries_hash, items))


def _carries_hash(item: Any) -> bool:
    if isinstance(item, dict):
        return item.get("hash") is not None
    if isinstance(item, MultimodalDataItem):
        return isinstance(vars(item).get("hash"), int)
    return getattr(item, "hash", None) is not None


def _item_of(raw: Any) -> MultimodalDataItem:
    if isinstance(raw, MultimodalDataItem):
        return raw
    if isinstance(raw, dict):
        return MultimodalDataItem.from_dict(raw)
    raise TypeError(f"an item must be a MultimodalDataItem or a dict of its fields, not {type(raw).__name__}")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"<{type(value).__name__} {tuple(value.shape)} {value.dtype}>"
    if isinstance(value, list):
        return f"<list of {len(value)}>"
    return repr(value)
