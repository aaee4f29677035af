"""What stands in a request in place of its multimodal inputs: where all ranks of its replica find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failure:
    """In a result's place: the maker raised, said as a text that is the same on all ranks."""

    text: str


class Ticket:
    """One request's inputs, in a message of shared memory that has those of every request of its batch.

    Travels in SGLang's own broadcast, and to the next pipeline stage, as the handle alone. What the handle opens to is
    kept beside it: on the rank that opened it, until the request is handled.
    """

    __slots__ = ("handle", "inputs", "number", "raw")

    mm_items = ()
    """SGLang looks through raw inputs for pointers to unwrap, in releases up to 0.5.9 by `get`: here are none."""

    def __init__(self, handle: bytes, number: int, raw: Any = None) -> None:
        self.handle = handle
        self.number = number
        self.raw = raw
        self.inputs: Any = None

    def __reduce__(self) -> tuple[type[Ticket], tuple[bytes, int]]:
        return Ticket, (self.handle, self.number)

    def get(self, key: str, default: Any = None) -> Any:
        return default
