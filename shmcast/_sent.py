"""How the entry rank sent one object: the content of a header, or of one entry in the index of a batch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from shmcast._codec import Leaves
from shmcast._wire import TEXT_BYTES, Handle, Header, HeaderRoute, Reason
from shmcast.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcast.metrics import Counters

R = TypeVar("R")
T = TypeVar("T")

log = logging.getLogger("shmcast")


class Sent(NamedTuple):
    """Route and content: a handle (`shm`), a message as one uint8 tensor (`inline`), or the error's text (`none`)."""

    route: HeaderRoute
    reason: Reason = Reason.CHOSEN
    handle: Handle | None = None
    inline: Tensor | None = None
    text: str = ""
    size: int = 0

    def header(self) -> Header:
        """What a collective carries of it."""
        length = 0 if self.inline is None else self.inline.numel()
        return Header(self.route, 0, reason=self.reason, length=length, handle=self.handle, text=self.text)


def index_of(sents: list[Sent]) -> object:
    """The index of a batch: plain values that the codec can carry."""
    return [
        (
            int(sent.route),
            int(sent.reason),
            bytes(sent.handle) if sent.handle else b"",
            sent.inline,
            sent.text[:TEXT_BYTES],
        )
        for sent in sents
    ]


def parse_index(index: object, count: int | None) -> list[Sent]:
    """The entries of a batch of `count` requests (None: as many as there are), or `LayoutError`."""
    if type(index) is not list or count not in (None, len(index)):
        raise LayoutError(f"the index of a batch of {count} is {type(index).__name__} of another length")
    return [_parse_entry(entry) for entry in index]


def _parse_entry(entry: Any) -> Sent:
    try:
        route, reason, handle, inline, text = entry
        sent = Sent(HeaderRoute(route), Reason(reason), Handle.parse(handle) if handle else None, inline, text)
    except (TypeError, ValueError) as error:
        raise LayoutError(f"an entry in the index of a batch: {error}") from error
    if (sent.handle is not None) != (sent.route is HeaderRoute.SHM) or type(text) is not str:
        raise LayoutError(f"an entry in the index of a batch with route {sent.route.name} and handle {sent.handle}")
    if (type(inline) is Tensor) != (sent.route is HeaderRoute.INLINE):
        raise LayoutError(
            f"an entry in the index of a batch with route {sent.route.name}, inline {type(inline).__name__}"
        )
    return sent


def attempt(fn: Callable[[R], T], raw: R) -> T | Exception:
    """What `fn(raw)` gives, or the exception that it raises."""
    try:
        return fn(raw)
    except Exception as error:
        return error


def describe(error: BaseException) -> str:
    """An error as the text that travels; an error that cannot say what it is must not keep a header back."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def walk(raw: object) -> Leaves | None:
    """The leaves of raw inputs; None for what cannot be walked, which then has no leaf that could be a reference."""
    try:
        return Leaves.walk(raw)
    except Exception as error:
        log.debug("raw inputs that cannot be walked: %s", describe(error))
        return None


def note(counters: Counters, reason: Reason, detail: object) -> None:
    """Count a fallback; log it the first time for this reason."""
    name = reason.name.lower()
    if counters.fallback(name):
        log.warning("fallback (%s), said once, then only counted: %s", name, detail)
