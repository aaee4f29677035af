"""A writer with a ring of headers and its readers against a plain model, with random posts, receives, opens, losses.

The model says of each reader how many headers it has taken, so which come and which it has missed, and which leases
were taken back from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from shmcast.errors import StaleHandle
from shmcast.transport import Reader, Writer
from tests.test_headers import header, number_of
from tests.test_lifetime import AT_ONCE, until

if TYPE_CHECKING:
    from shmcast._wire import Handle

CAPACITY = 32 << 20
SIZE = 70_000
READERS = 2

indices = st.integers(0, READERS - 1)


@dataclass
class Mirror:
    """What one reader knows: headers taken, messages by number that it may still open, tensors that it keeps."""

    taken: int = 0
    tokens: int = 0
    behind: bool = False
    unopened: set[int] = field(default_factory=set)
    kept: dict[int, torch.Tensor] = field(default_factory=dict)


class Headers(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.posted = 0
        self.handles: list[Handle] = []
        self.before: list[int] = []  # how many messages were published when a header was posted
        self.mirrors = [Mirror() for _ in range(READERS)]

    @initialize(slots=st.sampled_from([2, 4, 8, 32]))
    def make(self, slots: int) -> None:
        self.slots = slots
        self.margin = min(16, slots // 2)
        self.writer = Writer(READERS, capacity=CAPACITY, policy=AT_ONCE, slots=slots)
        self.readers = [Reader(self.writer.address, index) for index in range(READERS)]

    @precondition(lambda self: len(self.handles) < 40)
    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        for _ in range(count):
            number = len(self.handles)
            self.handles.append(self.writer.publish(torch.full((SIZE,), number, dtype=torch.uint8)))
            for mirror in self.mirrors:
                mirror.unopened.add(number)

    @rule(count=st.integers(1, 20))
    def post(self, count: int) -> None:
        for _ in range(count):
            skipped = tuple(index for index, mirror in enumerate(self.mirrors) if not self.has_room(mirror))
            for index in skipped:
                gone = self.before[self.posted - self.slots]
                self.mirrors[index].unopened -= set(range(gone))
            assert self.writer.announce(header(self.posted)) == skipped
            self.before.append(len(self.handles))
            self.posted += 1
            for mirror in self.mirrors:
                mirror.tokens += 1

    def has_room(self, mirror: Mirror) -> bool:
        if self.posted < self.slots:
            return True
        mirror.behind = mirror.tokens >= (self.slots // 2 if mirror.behind else self.slots - self.margin)
        return not mirror.behind

    @rule(index=indices, count=st.integers(1, 30))
    def receive(self, index: int, count: int) -> None:
        mirror = self.mirrors[index]
        for _ in range(count):
            if mirror.taken == self.posted:
                with pytest.raises(TimeoutError):
                    self.readers[index].next_header(0)
                mirror.tokens = 0
                return
            missed = mirror.taken < self.posted - self.slots
            assert number_of(self.readers[index].next_header(0)) == (None if missed else mirror.taken)
            mirror.taken += 1
            mirror.tokens = max(0, mirror.tokens - 1)

    @precondition(lambda self: any(m.tokens and m.tokens == self.posted - m.taken for m in self.mirrors))
    @rule(index=indices)
    def lose_a_token(self, index: int) -> None:
        """At most one is on its way at a time: the margin is for that."""
        mirror = self.mirrors[index]
        if mirror.tokens and mirror.tokens == self.posted - mirror.taken:
            self.readers[index]._leases.headers()._ready.acquire(0)  # type: ignore[union-attr]
            mirror.tokens -= 1

    @precondition(lambda self: self.handles)
    @rule(index=indices, which=st.integers(0, 1 << 16), keep=st.booleans())
    def open(self, index: int, which: int, keep: bool) -> None:
        mirror, number = self.mirrors[index], which % len(self.handles)
        if number not in mirror.unopened:
            with pytest.raises(StaleHandle):
                self.readers[index].open(self.handles[number])
            return
        mirror.unopened.remove(number)
        opened = self.readers[index].open(self.handles[number])
        assert isinstance(opened, torch.Tensor)
        assert (opened == number).all()
        if keep:
            mirror.kept[number] = opened

    @rule(index=indices)
    def drop(self, index: int) -> None:
        self.mirrors[index].kept.clear()

    @rule()
    def settle(self) -> None:
        """The writer knows of just those leases and blocks that the model has, and nothing has been overwritten."""
        for mirror in self.mirrors:
            assert all((tensor == number).all() for number, tensor in mirror.kept.items())
        held = [mirror.unopened | set(mirror.kept) for mirror in self.mirrors]
        expected = (len(set().union(*held)), [len(each) for each in held])

        def found() -> tuple[int, list[int]]:
            stats = self.writer.stats()
            return stats.live_blocks, [lease.held for lease in stats.leases]

        until(lambda: found() == expected, f"{expected} blocks and leases")

    def teardown(self) -> None:
        if not hasattr(self, "writer"):
            return
        try:
            self.settle()
            for mirror in self.mirrors:
                mirror.kept.clear()
        finally:
            for reader in self.readers:
                reader.close()
            self.writer.close()


TestHeaders = Headers.TestCase
TestHeaders.settings = settings(max_examples=25, stateful_step_count=30)
