"""A writer and two readers against a plain model, with random publishes, opens, writes, drops, discards, withdrawals.

The model knows for each message which leases are left, and for each tensor that is kept which bytes it must show.
"""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmcast._layout import BLOCK, PAGE, round_up
from shmcast.errors import ArenaFull, StaleHandle
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shmcast._wire import Handle
    from shmcast.metrics import Stats

CAPACITY = 1 << 20
LARGE, SMALL = 70_000, 500  # bytes: what is mapped at open, and what is copied
DEADLINE_SECONDS = 30.0

numbers = st.integers(0, 1 << 16)
positions = st.integers(0, SMALL - 1)
slices = st.tuples(numbers, positions, st.booleans())  # of which tensor, from where, as an array


@dataclass(eq=False)
class Empty:
    """Memory of `empty`: the tensor while the test keeps it, what it shows."""

    tensor: torch.Tensor | None
    value: int

    @property
    def pages(self) -> int:
        return round_up(BLOCK.size + LARGE, PAGE)


@dataclass(eq=False)
class Message:
    """What was published: for each tensor its size and value, and how many leases each reader has not opened."""

    handle: Handle
    contents: list[tuple[int, int]]
    listed: list[Empty]
    unopened: list[int]
    leases: list[Lease] = field(default_factory=list)

    @property
    def tickets(self) -> int:
        return sum(self.unopened) + sum(lease.pins for lease in self.leases)


@dataclass(eq=False)
class Lease:
    """One open: what each tensor of it must show, and what is kept of it."""

    reader: int
    mirrors: list[NDArray[np.uint8]]
    views: list[View] = field(default_factory=list)

    @property
    def pins(self) -> bool:
        return any(len(view.mirror.base) >= LARGE for view in self.views if view.mirror.base is not None)


@dataclass(eq=False)
class View:
    """A slice that is kept, and the same slice of the mirror."""

    lease: Lease
    real: Any
    mirror: NDArray[np.uint8]


class Transport(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        gc.freeze()  # so that collecting looks at nothing but what the rules make
        self.writer = Writer(2, capacity=CAPACITY, policy=Policy(wait=0))
        self.readers = [Reader(self.writer.address, index) for index in range(2)]
        self.messages: list[Message] = []
        self.empties: list[Empty] = []

    @property
    def views(self) -> list[View]:
        return [view for message in self.messages for lease in message.leases for view in lease.views]

    # What a user does.

    @rule(
        sizes=st.lists(st.sampled_from([LARGE, LARGE, SMALL, 3 * LARGE]), max_size=3),
        value=numbers,
        mask=st.integers(0, 3),
        opens=st.integers(1, 3),
        lists=st.integers(0, 3),
    )
    def publish(self, sizes: list[int], value: int, mask: int, opens: int, lists: int) -> None:
        contents = [(size, (value + i) % 256) for i, size in enumerate(sizes)]
        tensors = [torch.full((size,), byte, dtype=torch.uint8) for size, byte in contents]
        listed = [empty for i, empty in enumerate(self.empties) if empty.tensor is not None and lists >> i & 1]
        tensors += [empty.tensor for empty in listed if empty.tensor is not None]
        contents += [(LARGE, empty.value) for empty in listed]
        readers = [index for index in range(2) if mask >> index & 1]
        room = self.settled().largest_free_block  # when releases arrive decides where blocks lie: not left to chance
        try:
            handle = self.writer.publish(tensors, readers=readers, opens=opens)
        except ArenaFull:
            assert room < sum(sizes) + 2 * PAGE
            return
        unopened = [opens if index in readers else 0 for index in range(2)]
        self.messages.append(Message(handle, contents, listed, unopened))

    @rule(value=numbers)
    def empty(self, value: int) -> None:
        room = self.settled().largest_free_block
        try:
            tensor = self.writer.empty((LARGE,), torch.uint8)
        except ArenaFull:
            assert room < LARGE + 2 * PAGE
            return
        self.empties.append(Empty(tensor.fill_(value % 256), value % 256))

    @precondition(lambda self: self.empties)
    @rule(which=numbers, value=numbers)
    def rewrite_empty(self, which: int, value: int) -> None:
        empty = self.empties[which % len(self.empties)]
        if empty.tensor is None or any(empty in message.listed and message.tickets for message in self.messages):
            return
        self.settled()
        empty.value = value % 256
        empty.tensor.fill_(empty.value)

    @precondition(lambda self: self.empties)
    @rule(which=numbers)
    def drop_empty(self, which: int) -> None:
        self.empties[which % len(self.empties)].tensor = None

    @precondition(lambda self: self.messages)
    @rule(which=numbers, index=st.integers(0, 1), keep=st.lists(slices, max_size=3))
    def open(self, which: int, index: int, keep: list[tuple[int, int, bool]]) -> None:
        message = self.messages[which % len(self.messages)]
        if not message.unopened[index]:
            with pytest.raises(StaleHandle):
                self.readers[index].open(message.handle)
            return
        message.unopened[index] -= 1
        opened = self.readers[index].open(message.handle)
        assert isinstance(opened, list)
        assert [(len(tensor), *tensor.aminmax()) for tensor in opened] == [
            (size, value, value) for size, value in message.contents
        ]
        lease = Lease(index, [np.full(size, value, np.uint8) for size, value in message.contents])
        message.leases.append(lease)
        for number, start, as_array in keep if opened else ():
            at = number % len(opened)
            real = opened[at].numpy() if as_array else opened[at]
            lease.views.append(View(lease, real[start:], lease.mirrors[at][start:]))

    @precondition(lambda self: self.views)
    @rule(which=numbers, start=positions, length=numbers, value=numbers)
    def write(self, which: int, start: int, length: int, value: int) -> None:
        view = self.views[which % len(self.views)]
        view.real[start : start + length] = value % 256
        view.mirror[start : start + length] = value % 256

    @precondition(lambda self: self.views)
    @rule(which=numbers, in_cycle=st.booleans())
    def drop(self, which: int, in_cycle: bool) -> None:
        view = self.views[which % len(self.views)]
        view.lease.views.remove(view)
        if in_cycle:
            cycle = [view.real]
            cycle.append(cycle)

    @precondition(lambda self: self.messages)
    @rule(which=numbers, index=st.integers(0, 1))
    def discard(self, which: int, index: int) -> None:
        message = self.messages[which % len(self.messages)]
        self.readers[index].discard(message.handle)
        message.unopened[index] = 0

    @precondition(lambda self: self.messages)
    @rule(which=numbers, index=st.integers(0, 1))
    def discard_below(self, which: int, index: int) -> None:
        at = which % len(self.messages)
        self.readers[index].discard_below(self.messages[at].handle)
        for message in self.messages[: at + 1]:
            message.unopened[index] = 0

    @precondition(lambda self: self.messages)
    @rule(which=numbers)
    def withdraw(self, which: int) -> None:
        message = self.messages[which % len(self.messages)]
        self.writer.withdraw(message.handle)
        message.unopened = [0, 0]

    @rule()
    def collect(self) -> None:
        gc.collect()

    # What must hold.

    @invariant()
    def no_view_has_changed(self) -> None:
        for view in self.views:
            assert np.array_equal(np.asarray(view.real), view.mirror)

    @rule()
    def settle(self) -> None:
        self.settled()

    def settled(self) -> Stats:
        """Once all releases have arrived, the writer knows of just those blocks and leases that the model has."""
        gc.collect()
        messages = [message for message in self.messages if message.tickets]
        empties = [
            empty
            for empty in self.empties
            if empty.tensor is not None or any(empty in message.listed for message in messages)
        ]
        pages = sum(round_up(message.handle.where.length, PAGE) for message in messages)
        pages += sum(empty.pages for empty in empties)
        expected = (
            len(messages) + len(empties),
            CAPACITY - PAGE - pages,
            [
                sum(m.unopened[i] + sum(lease.pins for lease in m.leases if lease.reader == i) for m in messages)
                for i in range(2)
            ],
        )
        deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
        while (found := self.found())[:-1] != expected and time.monotonic() < deadline:
            never.wait(0.001)
        assert found[:-1] == expected
        return found[-1]

    def found(self) -> tuple[int, int, list[int], Stats]:
        stats = self.writer.stats()
        return stats.live_blocks, stats.free_bytes, [held.held for held in stats.leases], stats

    def teardown(self) -> None:
        try:
            for message in self.messages:
                message.leases.clear()
                message.unopened = [0, 0]
                self.writer.withdraw(message.handle)
            for empty in self.empties:
                empty.tensor = None
            stats = self.settled()
            assert stats.live_blocks == 0
            assert stats.free_bytes == stats.largest_free_block == CAPACITY - PAGE
            assert [reader.stats().leases_held for reader in self.readers] == [0, 0]
        finally:
            gc.unfreeze()
            for reader in self.readers:
                reader.close()
            self.writer.close()


TestTransport = Transport.TestCase
TestTransport.settings = settings(max_examples=30, stateful_step_count=40)
