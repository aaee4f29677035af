"""How the entry rank sent one object: the content of a header, or of one entry in the index of a batch."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from shmcast._codec import Leaves, nbytes_of
from shmcast._costs import Weight
from shmcast._wire import CHOICES, TEXT_BYTES, WITH_HANDLE, Handle, Header, HeaderRoute, Reason
from shmcast.errors import LayoutError
from shmcast.multimodal import is_hashed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shmcast.metrics import Counters

R = TypeVar("R")
T = TypeVar("T")

Deliver = Callable[[int, object, int], None]
"""Gets the number of a request in its batch, its object or exception, and the bytes of shared memory it pins."""

_ENTRIES: Final = [[int, int, bytes, inline, str, int] for inline in (type(None), Tensor)]
"""Types of the parts of an entry in the index of a batch."""

HERE: Final = object()
"""In a result's place: whoever wants it runs `fn` on the raw inputs."""

log = logging.getLogger("shmcast")


class Sent(NamedTuple):
    """Route and content: a handle (`shm`, `raw`), a message as one uint8 tensor (`inline`), an error's text (`none`).

    By pickle too: a tensor of bytes, and then `objects`, for each request what `fn` made or the text of what it raised.
    `leaves`: how many the raw inputs have that the message may refer to; 0 where it refers to none.
    """

    route: HeaderRoute
    reason: Reason = Reason.CHOSEN
    handle: Handle | None = None
    inline: Tensor | None = None
    text: str = ""
    size: int = 0
    leaves: int = 0
    objects: tuple[tuple[object, str], ...] = ()

    def header(self) -> Header:
        """What a collective carries of it."""
        length = self.leaves if self.inline is None else self.inline.numel()
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
            sent.leaves,
        )
        for sent in sents
    ]


def parse_index(index: object, count: int | None) -> list[Sent]:
    """The entries of a batch of `count` requests (None: as many as there are), or `LayoutError`."""
    if type(index) is not list or count not in (None, len(index)):
        raise LayoutError(f"the index of a batch of {count} is {type(index).__name__} of another length")
    return [_parse_entry(entry) for entry in index]


def _parse_entry(entry: Any) -> Sent:
    # Before anything is asked of it: a tensor has no truth value, and unpacks row by row, of which it may have 2**40.
    if type(entry) is not tuple or [type(part) for part in entry] not in _ENTRIES:
        raise LayoutError("an entry in the index of a batch with parts of other types")
    route, reason, handle, inline, text, leaves = entry
    try:
        parsed = Handle.parse(handle) if handle else None
        sent = Sent(HeaderRoute(route), Reason(reason), parsed, inline, text, leaves=leaves)
    except ValueError as error:
        raise LayoutError(f"an entry in the index of a batch: {error}") from error
    if (sent.handle is not None) != (sent.route in WITH_HANDLE):
        raise LayoutError(f"an entry in the index of a batch with route {sent.route.name} and handle {sent.handle}")
    if (inline is not None) != (sent.route is HeaderRoute.INLINE) or sent.route is HeaderRoute.PICKLE:
        raise LayoutError(
            f"an entry in the index of a batch with route {sent.route.name}, inline {type(inline).__name__}"
        )
    return sent


def ignore(number: int, result: object, size: int) -> None:
    """A `Deliver` for those who wait for the whole batch."""


def pickled(made: Iterable[tuple[object, str]]) -> Tensor:
    """As `broadcast_object_list` would send it: each object, or the text of what was raised in its place."""
    return torch.frombuffer(bytearray(pickle.dumps(tuple(made), protocol=pickle.HIGHEST_PROTOCOL)), dtype=torch.uint8)


def unpickled(tensor: Tensor) -> tuple[tuple[object, str], ...]:
    """What is in a tensor of `pickled`, from a rank that may run code here; `LayoutError` for anything else."""
    try:
        made = pickle.loads(tensor.numpy().data)
    except Exception as error:
        raise LayoutError(f"what came by pickle cannot be loaded here: {describe(error)}") from error
    if type(made) is tuple and all(type(e) is tuple and len(e) == 2 and type(e[1]) is str for e in made):
        return made
    raise LayoutError(f"what came by pickle is no batch: {type(made).__name__}")


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


def size_of(raw: object) -> int:
    """Bytes of the tensors of raw inputs; none, where they cannot be walked."""
    try:
        return nbytes_of(raw)
    except Exception as error:
        log.debug("raw inputs that cannot be weighed: %s", describe(error))
        return 0


def weigh(raw: object, nbytes: int | None = None) -> Weight:
    """What a request weighs before `fn` runs. `nbytes`: its `size_of`, where that is known."""
    try:
        hashed = is_hashed(raw)
    except Exception:
        hashed = False
    return Weight(size_of(raw) if nbytes is None else nbytes, hashed)


def walk(raw: object) -> Leaves | None:
    """The leaves of raw inputs; None for what cannot be walked, which then has no leaf that could be a reference."""
    try:
        return Leaves.walk(raw)
    except Exception as error:
        log.debug("raw inputs that cannot be walked: %s", describe(error))
        return None


def note_sent(counters: Counters, sent: Sent, by: str = "") -> None:
    """Count why something is not sent the way it was meant to be, where it is not. `by`: put before the log's text."""
    if sent.reason not in CHOICES:
        note(counters, sent.reason, f"{by}{sent.text or 'no shared memory in this group'}")


def note(counters: Counters, reason: Reason, detail: object) -> None:
    """Count a fallback; log it the first time for this reason."""
    name = reason.name.lower()
    if counters.fallback(name):
        log.warning("fallback (%s), said once, then only counted: %s", name, detail)
