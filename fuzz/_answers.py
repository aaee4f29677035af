"""What a parser may answer: the right object, or an error that it documents. Anything else is a `Violation`."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

from fuzz import _tripwire

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

MOST_KIB: Final = 256 << 10
"""By how much one case may raise the most memory that this process ever had. Inputs have a few KiB."""

OUT_OF_MEMORY: Final = ("allocate memory", "not enough memory")


class Violation(Exception):
    """A parser did what none may do; the text says what."""


class Asked(NamedTuple):
    """What a parser answered: its error's name, else `value`."""

    value: object
    refused: str = ""


def ask(parse: Callable[[], object], errors: Sequence[type[Exception]]) -> Asked:
    """Run `parse` under the tripwire. Raises `Violation` for any error but `errors`, for memory, for code that ran."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _tripwire.watch()
    try:
        answer = Asked(parse())
    except tuple(errors) as error:
        answer = Asked(None, type(error).__name__)
        short = _short_of_memory(error)
        if short:
            raise Violation(f"it asked for more memory than there is, and hid that: {short}") from error
    except Exception as error:
        raise Violation(f"{type(error).__name__}: {error}") from error
    finally:
        ran = _tripwire.seen()
    if ran:
        raise Violation(f"code ran: {ran}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > MOST_KIB:
        raise Violation(f"one case took {grown >> 10} MiB")
    return answer


def require(holds: bool, what: str) -> None:
    """Raise `Violation` unless what was parsed is right."""
    if not holds:
        raise Violation(what)


def _short_of_memory(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
            return f"{type(error).__name__}: {error}"
        error = error.__cause__ or error.__context__
    return ""
