"""What stands in a request in place of its multimodal inputs: where all ranks of its replica find them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from shmcast._wire import Handle
from shmcast.errors import LayoutError

CARRIED: Final = b"shmcast: raw inputs "
"""What the feature of a carrier starts with; a digit, whether its items are hashed, and a handle follow."""


@dataclass(frozen=True)
class Failure:
    """In a result's place: the maker raised, said as a text that is the same on all ranks."""

    text: str


class Ticket:
    """One request's inputs, in a message of shared memory that has those of every request of its batch.

    Travels in SGLang's own broadcast, and to the next pipeline stage, as the handle alone. What the handle opens to is
    kept beside it: on the rank that opened it, until the request is handled. `pointers`: what of that lies in segments
    of the tokenizer's. `cut`: on the entry rank, the segments of its raw inputs that are not in the message.
    """

    __slots__ = ("cut", "handle", "inputs", "number", "pointers", "raw")

    def __init__(self, handle: bytes, number: int, raw: Any = None) -> None:
        self.handle = handle
        self.number = number
        self.raw = raw
        self.inputs: Any = None
        self.pointers: list[Any] = []
        self.cut: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Ticket, (self.handle, self.number)

    @property
    def mm_items(self) -> Any:
        """What SGLang sees of the inputs before it asks for them: a session shifts the offsets of their items.

        Until they are opened there is nothing in these that it would have to unwrap.
        """
        return getattr(self.raw if self.inputs is None else self.inputs, "mm_items", ())

    def get(self, key: str, default: Any = None) -> Any:
        """Releases up to 0.5.9 look in here for pointers to unwrap: there are none."""
        return default


class RawTicket(Ticket):
    """One request's raw inputs, in a message of the tokenizer's on which every rank of its replica has a lease.

    `identities`: by item, what making the inputs wrote, once the entry rank knows it. `known`: no rank has to hash.
    `dropped`: nobody will use it; its leases are still to be given back. `raw`: what this rank opened.
    """

    __slots__ = ("dropped", "hashed", "identities")

    def __init__(
        self, handle: bytes, hashed: bool, identities: list[dict[str, Any]] | None = None, dropped: bool = False
    ) -> None:
        super().__init__(handle, 0)
        self.hashed = hashed
        self.identities = identities
        self.dropped = dropped

    @property
    def known(self) -> bool:
        return self.hashed or self.identities is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return RawTicket, (self.handle, self.hashed, self.identities, self.dropped)


class Aborted(Ticket):
    """A request that was aborted while it was held, by an abort that came to all ranks and will not come behind it.

    `ticket`: what its leases are to be given back by, or None. `abort`: names this request alone.
    """

    __slots__ = ("abort", "ticket")

    def __init__(self, abort: Any, ticket: RawTicket | None) -> None:
        super().__init__(b"", 0)
        self.abort = abort
        self.ticket = ticket

    def __reduce__(self) -> tuple[Any, ...]:
        return Aborted, (self.abort, self.ticket)


def carrier_of(handle: Handle, *, known: bool) -> bytes:
    """The feature of a carrier: what crosses a socket in place of raw inputs, by pickle or msgpack."""
    return CARRIED + (b"1" if known else b"0") + bytes(handle)


def carried(feature: Any) -> RawTicket | None:
    """The ticket in a carrier's feature; None where it is none. `LayoutError`: it is a damaged one."""
    if not isinstance(feature, bytes) or not feature.startswith(CARRIED):
        return None
    flag, handle = feature[len(CARRIED) :][:1], feature[len(CARRIED) + 1 :]
    if flag not in (b"0", b"1"):
        raise LayoutError(f"a carrier with the flag {flag!r}")
    return RawTicket(bytes(Handle.parse(handle)), flag == b"1")
