"""A target: one parser with its seeds, and what tells the mutator where its input has fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

SEAL: Final = 1
"""In an input's first byte: the target mends the checksum, so that what lies behind it is reached."""


def nothing() -> None:
    """A target that holds nothing has nothing to end."""


@dataclass(frozen=True)
class Target:
    """One parser under test.

    Attributes:
        name: as on the command line, and of its folder in the corpus.
        check: parses one input; the outcome's name, or `Violation`. The first byte of an input is flags of the target.
        seeds: inputs that the library's own writers made; each must be accepted.
        fields: offset and size of integers in an input, for edits that hit them whole.
        reshape: damage that knows the format, on top of the mutator's own.
        close: ends what `check` keeps between inputs.
    """

    name: str
    check: Callable[[bytes], str]
    seeds: Callable[[], list[bytes]]
    fields: tuple[tuple[int, int], ...] = ()
    reshape: Callable[[bytes, Random], bytes] | None = None
    close: Callable[[], None] = nothing


def fields_of(at: int, sizes: str) -> tuple[tuple[int, int], ...]:
    """The fields of a struct that starts at `at`; `sizes`: one digit each, its bytes."""
    found = []
    for size in map(int, sizes):
        found.append((at, size))
        at += size
    return tuple(found)
