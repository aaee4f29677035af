"""What keeps a message of another process: a lease, and the decode that holds it first."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from weakref import finalize

if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable
    from weakref import ref

    from torch import Tensor

    from shmcast._layout import Descriptor


class Place(NamedTuple):
    """Where this process sees a block: a mapping, and the block's offset in it."""

    mapping: mmap.mmap
    offset: int


class Lease:
    """One opened ticket. Over when as many ends were seen as it has exporters, and one more for the decode.

    `Hold` is the decode's: exporters are made only while it lives.
    """

    def __init__(self, ticket: int) -> None:
        self.ticket = ticket
        self.shared: list[Descriptor] = []
        self.places: dict[Descriptor, Place] = {}
        self.exporters = 0
        self.exporter: ref[object] | None = None  # one of them, to see whether any lives
        self.ends = 0


class Hold:
    """What keeps a lease while its message is decoded: until `end`, or until it is dropped by whatever was raised."""

    def __init__(self, lease: Lease, end: Callable[[Lease], None]) -> None:
        self.lease = lease
        self.end = finalize(self, end, lease)
        self.end.atexit = False


class Opened(NamedTuple):
    """A message that is safe to decode as long as `hold` is not ended."""

    hold: Hold
    stream: bytes
    pieces: tuple[Tensor, ...]
