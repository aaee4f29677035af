"""Classes that the codec's tests send: of the shape that multimodal inputs have, and of every kind."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple

import msgspec


class Kind(enum.Enum):
    IMAGE = 1
    VIDEO = 2
    PICTURE = 1


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Word(str, enum.Enum):
    YES = "yes"
    NO = "no"


class Access(enum.Flag):
    READ = 1
    WRITE = 2
    RUN = 4
    ALL = 7


class Holder(enum.Enum):
    LIST = [1, 2]  # noqa: RUF012 - a value that an attack would like to change


@dataclasses.dataclass
class Item:
    """One image, video or audio clip of a request."""

    modality: Kind
    hash: int | None = None
    pad_value: int | None = None
    offsets: list[tuple[int, int]] | None = None
    format: str = "normal"
    feature: Any = None
    precomputed_embeddings: Any = None
    model_specific_data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pad_value == -1:
            raise RuntimeError("__post_init__ ran")


@dataclasses.dataclass
class Request:
    """A request's items and what belongs to all of them."""

    mm_items: list[Item]
    image_pad_len: list[int] | None = None
    num_image_tokens: int | None = None
    im_token_id: int | None = None
    video_token_id: int | None = None
    mrope_positions: Any = None
    mrope_position_delta: Any = None
    padded_input_ids: list[int] | None = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    left: Any = 1
    right: Any = 2


@dataclasses.dataclass(slots=True)
class Slotted:
    left: Any = 1
    right: Any = 2


@dataclasses.dataclass
class Mixed(Slotted):
    """Slots from its base, a `__dict__` of its own."""

    third: Any = 3


@dataclasses.dataclass
class Sly:
    """Every way a dataclass has to run code when it is made or restored the usual way."""

    value: Any = 0

    def __new__(cls, *args: Any, **kwargs: Any) -> Sly:
        raise RuntimeError("__new__ ran")

    def __init__(self) -> None:
        raise RuntimeError("__init__ ran")

    def __setattr__(self, name: str, value: Any) -> None:
        raise RuntimeError("__setattr__ ran")

    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("__setstate__ ran")

    def __reduce__(self) -> Any:
        raise RuntimeError("__reduce__ ran")


class Pair(NamedTuple):
    left: Any
    right: Any = None


class OpenPair(Pair):
    """A NamedTuple with room for attributes."""


class Plain:
    """Rebuilt from its `__dict__`, only where it is allowed by itself."""


class PlainSlots:
    __slots__ = ("left", "right")


class Struct(msgspec.Struct, dict=True, kw_only=True, array_like=True):
    """As SGLang's items are since they became Structs."""

    feature: Any
    format: str = "normal"

    def __post_init__(self) -> None:
        if self.format == "post":
            raise RuntimeError("__post_init__ ran")


class FrozenStruct(msgspec.Struct, frozen=True, gc=False):
    inner: Any = None

    def __post_init__(self) -> None:
        if self.inner == "post":
            raise RuntimeError("__post_init__ ran")


class TakingStruct(msgspec.Struct, dict=True, kw_only=True, array_like=True):
    """Takes names that are no fields into one of them, as SGLang's items do."""

    feature: Any
    others: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.feature == "post":
            raise RuntimeError("__post_init__ ran")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__struct_fields__:
            msgspec.Struct.__setattr__(self, name, value)
        else:
            self.others[name] = value


class BareStruct(msgspec.Struct):
    only: Any


class WatchingStruct(msgspec.Struct):
    """Sees every subclass, so that none may be made to keep `__post_init__` from running."""

    made: int

    def __init_subclass__(cls) -> None:
        raise RuntimeError("__init_subclass__ ran")

    def __post_init__(self) -> None:
        self.made += 1


class Outer:
    class Nested(enum.Enum):
        ONE = 1


ALL: tuple[type, ...] = (
    Kind,
    Level,
    Word,
    Access,
    Holder,
    Item,
    Request,
    Frozen,
    Slotted,
    Mixed,
    Sly,
    Pair,
    OpenPair,
    Plain,
    PlainSlots,
    Struct,
    FrozenStruct,
    TakingStruct,
    BareStruct,
    WatchingStruct,
)
