"""The same object with other tensors in it; and tensors as runs of bytes, to be copied where they lie together."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from shmcast.errors import EncodeError

from ._classes import ClassRecord, Unfit, kind_of, record_of
from ._geometry import MAX_DIMS
from ._leaves import ATOMS, is_plain
from ._parts import Refusal, tensor_span
from ._pieces import Piece, Span, is_sparse, merge, piece_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Placed(NamedTuple):
    """A tensor of a run, and how many bytes into the piece (`lead` included) its first element lies."""

    tensor: torch.Tensor
    offset: int


class Bytes(NamedTuple):
    """A run of bytes, and the tensors that lie in it."""

    piece: Piece
    placed: tuple[Placed, ...]


def map_tensors(obj: object, function: Callable[[torch.Tensor], torch.Tensor]) -> object:
    """`obj` with `function(tensor)` in the place of each tensor, also of one that is there several times.

    Goes through dicts (their values), lists, tuples, sets, and instances of what can travel: dataclasses, NamedTuples,
    Structs, plain classes; those are rebuilt without their `__init__`, as `decode` does it. Whatever holds no tensor,
    or cannot be taken apart, is not copied. Raises `EncodeError` for a cycle.
    """
    return _Mapper(function).map(obj)


def runs_of(tensors: Iterable[torch.Tensor]) -> tuple[list[Bytes], list[torch.Tensor]]:
    """The runs of bytes in which the tensors lie, each byte in one; and the tensors that are no plain runs.

    Those are: on a device, sparse, conjugated, with a gradient, empty, not aligned to their element, or a lone strided
    view that reaches over more than twice its own bytes.
    """
    plain: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    spans: list[Span] = []
    for tensor in tensors:
        span = _span(tensor)
        if span is None:
            others.append(tensor)
        else:
            plain.append(tensor)
            spans.append(span)
    found = []
    for run in merge(spans):
        members = [plain[member] for member in run.members]
        if is_sparse(run, spans):
            others += members
            continue
        piece = piece_of(run.low, run.high, [spans[member].keep for member in run.members])
        origin = run.low - piece.lead
        found.append(Bytes(piece, tuple(Placed(tensor, tensor.data_ptr() - origin) for tensor in members)))
    return found, others


def _span(tensor: torch.Tensor) -> Span | None:
    """The bytes of a tensor that views of bytes can stand for; None for any other."""
    if not is_plain(tensor) or not tensor.numel() or tensor.dim() > MAX_DIMS or tensor.data_ptr() % tensor.itemsize:
        return None
    try:
        return tensor_span(tensor)
    except Refusal:
        return None


_MAPPING = object()


class _Mapper:
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.function = function
        self.made: dict[int, object] = {}
        self.kept: list[object] = []  # what `made` names must live as long

    def map(self, obj: object) -> object:
        if type(obj) in ATOMS:
            return obj
        known = self.made.get(id(obj))
        if known is _MAPPING:
            raise EncodeError(f"a {type(obj).__name__} holds itself: a cycle")
        if known is None:
            self.kept.append(obj)
            self.made[id(obj)] = _MAPPING
            known = self.made[id(obj)] = self.mapped(obj)
        return known

    def mapped(self, obj: Any) -> object:
        cls = type(obj)
        if isinstance(obj, torch.Tensor):
            return self.function(obj)
        if cls is dict:
            values = self.values(obj.values())
            return obj if values is None else dict(zip(obj, values, strict=True))
        if cls in (list, tuple, set, frozenset):
            values = self.values(obj)
            return obj if values is None else cls(values)
        record = _record(cls)  # type: ignore[arg-type]  # mypy: type.__hash__ takes a type
        if record is None:
            return obj
        try:
            taken = self.values(record.take(obj))
        except (Unfit, AttributeError):  # a field that was never set; no `__dict__`
            return obj
        return obj if taken is None else record.build(tuple(taken))

    def values(self, values: Iterable[Any]) -> list[Any] | None:
        """Each mapped; None where all are the same as before."""
        if ATOMS.issuperset(map(type, values)):
            return None
        before = list(values)
        after = [self.map(value) for value in before]
        same = all(new is old for new, old in zip(after, before, strict=True))
        return None if same else after


@functools.lru_cache(maxsize=256)
def _record(cls: type) -> ClassRecord | None:
    """How to take an instance apart and rebuild it; None for what holds no tensors or cannot be."""
    kind = kind_of(cls)
    if kind is None or kind == "enum":
        return None
    try:
        return record_of(cls, kind)
    except Unfit:
        return None
