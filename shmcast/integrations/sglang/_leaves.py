"""What the items of a request hold: tensors, arrays and pointers, alone or in lists and dicts."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FEATURES: Final = ("feature", "precomputed_embeddings")
"""Where the tokenizer puts pointers: in the place of a tensor, or of each in a list."""

FIELDS: Final = (*FEATURES, "model_specific_data")


def leaves(value: Any) -> Iterator[Any]:
    """What is in it that is no container, in order."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def leaves_of(item: Any, names: tuple[str, ...] = FIELDS) -> Iterator[Any]:
    """What is in these fields of it."""
    return (leaf for name in names for leaf in leaves(getattr(item, name)))


def replaced(value: Any, new: Callable[[Any], Any]) -> Any:
    """The same with `new` of each leaf; the same object where every leaf stays."""
    if isinstance(value, dict):
        after = [replaced(each, new) for each in value.values()]
        return value if all(map(operator.is_, after, value.values())) else dict(zip(value, after, strict=True))
    if not isinstance(value, (list, tuple)):
        return new(value)
    after = [replaced(each, new) for each in value]
    return value if all(map(operator.is_, after, value)) else type(value)(after)


def replace(item: Any, new: Callable[[Any], Any], names: tuple[str, ...] = FIELDS) -> Any:
    """The item, with `new` of each leaf of these fields."""
    for name in names:
        before = getattr(item, name)
        after = replaced(before, new)
        if after is not before:
            setattr(item, name, after)
    return item


def nbytes_of(leaf: Any) -> int:
    """Of a tensor of the CPU or an array; of anything else 0."""
    if type(leaf) is torch.Tensor and leaf.is_cpu and leaf.layout is torch.strided:
        return leaf.numel() * leaf.element_size()
    if type(leaf) is np.ndarray and not leaf.dtype.hasobject:
        return leaf.nbytes
    return 0
