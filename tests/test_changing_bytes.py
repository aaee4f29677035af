"""Bytes that another process changes while they are read: a named error or an object that is whole, in its place."""

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from shmcast import Policy
from shmcast._layout import RING_ENTRIES, SLOT, slots_offset
from shmcast._segment import Segment
from shmcast.errors import LayoutError, NotAllowed, StaleHandle
from shmcast.transport import Reader, Writer
from tests.support.forks import fork
from tests.support.ranks import Ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.faults]

MIB = 1 << 20
ROUNDS, OPENS = 60, 40
SLOTS = 16
LARGE, SMALL = 70_000, 300


@contextmanager
def flipping(segment: Segment, start: int, length: int, seed: int) -> Iterator[None]:
    """A child changes bytes in this range of a segment, one at a time, and puts each back."""
    path, ready = f"/proc/{os.getpid()}/fd/{segment.fd}", os.pipe()
    child = os.fork()
    if child == 0:
        try:
            flip(path, start, length, random.Random(seed), ready[1])
        finally:
            os._exit(1)
    os.read(ready[0], 1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        died = os.waitpid(child, 0)[1]
        for fd in ready:
            os.close(fd)
    assert os.waitstatus_to_exitcode(died) == -signal.SIGKILL


def flip(path: str, start: int, length: int, dice: random.Random, ready: int) -> None:
    file = os.open(path, os.O_RDWR)
    parent = os.getppid()
    while os.getppid() == parent:
        for _ in range(1000):
            at = start + dice.randrange(length)
            before = os.pread(file, 1, at)
            os.pwrite(file, bytes([dice.choice((0, 1, 127, 128, 255, before[0] ^ 1 << dice.randrange(8)))]), at)
            os.pwrite(file, before, at)
        if ready:
            os.write(ready, b".")
            ready = 0


def leaves(obj: object) -> Iterator[torch.Tensor]:
    """Every tensor of an object, of whatever shape it came."""
    if isinstance(obj, torch.Tensor):
        yield obj
    elif isinstance(obj, dict):
        for key, value in obj.items():
            yield from leaves(key)
            yield from leaves(value)
    elif isinstance(obj, (list, tuple, set, frozenset)):
        for value in obj:
            yield from leaves(value)


def tried(use: Callable[[], object], inside: Callable[[torch.Tensor], bool]) -> str:
    """The error, or that all tensors lie where they may."""
    try:
        got = use()
    except (LayoutError, NotAllowed, StaleHandle, TimeoutError) as error:
        return type(error).__name__
    for tensor in leaves(got):
        assert inside(tensor), "a tensor outside of its memory"
        tensor.sum()
    return "whole"


def open_what_changes(seed: int) -> Counter[str]:
    told: Counter[str] = Counter()
    sent = {"large": torch.arange(LARGE, dtype=torch.uint8), "small": [torch.ones(SMALL), "text", (1, 2.5, None)]}
    with (
        Writer(1, capacity=16 * MIB, policy=Policy(wait=60)) as writer,
        Reader(writer.address, 0, isolation="shared") as reader,
    ):
        segment, theirs = writer._arena._segments[0], reader._leases._segments[0]
        assert theirs is not None
        first, last = theirs.address, theirs.address + theirs.header.size

        def inside(tensor: torch.Tensor) -> bool:
            size = tensor.untyped_storage().nbytes()
            # What is small was copied.
            return size < 1 << 16 or first <= tensor.untyped_storage().data_ptr() <= last - size

        for number in range(ROUNDS):
            handle = writer.publish(sent, opens=OPENS)
            where = handle.where
            # The head of the block, its tables and its stream; not the tensors, which any bytes are.
            with flipping(segment, where.offset, min(where.length, 1024), seed * ROUNDS + number):
                for _ in range(OPENS):
                    told[tried(lambda handle=handle: reader.open(handle), inside)] += 1  # type: ignore[misc]
            tried(lambda handle=handle: reader.discard(handle), inside)  # type: ignore[misc]
    return told


def hear(reader: Reader, header: bytes) -> None:
    """The ring knows nothing of what is in a header, whose parser has a target of its own in `fuzz`."""
    got = reader.next_header(0.0)
    if got != header:
        assert got is None or len(got) == len(header)
        raise LayoutError("a header that was changed, or skipped")


def hear_what_changes(seed: int) -> Counter[str]:
    told: Counter[str] = Counter()
    with Writer(1, capacity=MIB, slots=SLOTS) as writer, Reader(writer.address, 0) as reader:
        header = bytes(range(256))
        with flipping(writer._arena._control, slots_offset(1, RING_ENTRIES), SLOTS * SLOT.size, seed):
            # As often as it takes for the child to have had its turn in between.
            while told["LayoutError"] < OPENS:
                for _ in range(SLOTS // 2):
                    writer.announce(header)
                while (heard := tried(lambda: hear(reader, header), lambda _: True)) != "TimeoutError":
                    told[heard] += 1
    return told


def apart(scene: Any, seed: int) -> Counter[str]:
    """In a child, so that a crash is one of it alone."""

    def run() -> Counter[str]:
        torch.set_num_threads(1)
        told: Counter[str] = scene(seed)
        return told

    told: Counter[str] = fork(run, timeout=80)
    return told


@pytest.mark.parametrize("scene", [open_what_changes, hear_what_changes])
def test_bytes_that_change_while_they_are_read_are_refused_or_read_whole(ranks: Ranks, scene: Any) -> None:
    [told] = ranks.start_each(apart, [(scene, 7)], check=False).results(90)
    print(dict(told))
    assert told["whole"], told
    assert told["LayoutError"], "nothing was changed in time"
