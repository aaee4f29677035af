"""A thousand messages through one arena: nothing grows, nothing is copied twice, nobody takes a page fault any more."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import socket
import tempfile
from collections import deque
from multiprocessing.connection import Client, Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from shmcast._layout import PAGE
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcast._wire import Address
    from tests.support.ranks import Ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

MIB = 1 << 20
PAYLOAD = 8 * MIB
MESSAGES, WARM = 1000, 100
HELD = 3  # messages that a reader holds at a time
DEADLINE_SECONDS = 60.0
PATIENT = Policy(wait=DEADLINE_SECONDS)


class Usage(NamedTuple):
    """What this process has taken: page faults since it began, open descriptors, names of its writer in /dev/shm."""

    faults: int
    fds: int
    names: int
    segment_bytes: int

    @classmethod
    def now(cls, address: Address, segment_bytes: int = 0) -> Usage:
        return cls(
            resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
            len(os.listdir("/proc/self/fd")),
            sum(address.token.hex() in name for name in os.listdir("/dev/shm")),
            segment_bytes,
        )


@contextlib.contextmanager
def doors() -> Iterator[tuple[str, Callable[[], Connection]]]:
    """Where other processes connect to, and how to take the next that did."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/door")
        server.listen()
        server.settimeout(DEADLINE_SECONDS)
        yield f"{folder}/door", lambda: Connection(server.accept()[0].detach())


# Faults, descriptors, names.


def stream(door: str, from_empty: bool) -> tuple[Usage, Usage]:
    """Publish all messages; usage when it is warm, and at the end."""
    torch.set_num_threads(1)
    payload = torch.zeros(PAYLOAD, dtype=torch.uint8)
    usages = []
    with Writer(1, capacity=64 * MIB, policy=PATIENT) as writer, Client(door) as pipe:
        pipe.send(writer.address)
        assert pipe.recv() == "attached"
        until(lambda: writer.stats().leases[0].alive is True and not Usage.now(writer.address).names, "no name is left")
        for number in range(MESSAGES):
            if number in (WARM, MESSAGES - 1):
                usages.append(Usage.now(writer.address, writer.stats().segment_bytes))
            if from_empty:
                payload = writer.empty((PAYLOAD,), torch.uint8)
            payload.fill_(number % 251)
            pipe.send(writer.publish({"number": number, "payload": payload}))
        pipe.send(None)
        assert pipe.recv() == "done"
        del payload
        until(lambda: writer.stats().live_blocks == 0, "all memory came back")
    return usages[0], usages[1]


def consume(door: str, from_empty: bool) -> tuple[Usage, Usage]:
    """Open all messages, read every byte, hold some for a while; usage when it is warm, and at the end."""
    torch.set_num_threads(1)
    usages = []
    with Client(door) as pipe:
        address = pipe.recv()
        with Reader(address, 0) as reader:
            pipe.send("attached")
            held: deque[tuple[int, torch.Tensor]] = deque()
            for number in range(MESSAGES):
                if number in (WARM, MESSAGES - 1):
                    usages.append(Usage.now(address))
                message = reader.open(pipe.recv())
                assert isinstance(message, dict)
                held.append((message["number"], message["payload"]))
                del message
                if len(held) == HELD:
                    expected, tensor = held.popleft()
                    low, high = tensor.view(torch.int64).aminmax()
                    assert low == high
                    assert tensor[0] == expected % 251
                    del tensor
            assert pipe.recv() is None
            held.clear()
            until(lambda: reader.stats().leases_held == 0, "all leases are over")
            pipe.send("done")
    return usages[0], usages[1]


def _run(role: str, door: str, from_empty: bool) -> tuple[Usage, Usage]:
    return (stream if role == "writer" else consume)(door, from_empty)


def relay(left: Connection, right: Connection) -> None:
    """Carry what two processes tell each other, until both have gone."""
    targets = {left: right, right: left}
    with left, right:
        while targets:
            ready = wait(list(targets), DEADLINE_SECONDS)
            if not ready:
                pytest.fail("two processes wait for each other")
            for source in ready:
                assert isinstance(source, Connection)
                try:
                    targets[source].send_bytes(source.recv_bytes())
                except (EOFError, OSError):
                    del targets[source]


@pytest.mark.parametrize("from_empty", [False, True], ids=["copied", "from empty"])
def test_a_thousand_messages_take_nothing(ranks: Ranks, from_empty: bool) -> None:
    with doors() as (door, accept):
        round = ranks.start_each(_run, [("writer", door, from_empty), ("reader", door, from_empty)])
        pipes = [accept(), accept()]
        relay(*pipes)
        (writer_warm, writer_end), (reader_warm, reader_end) = round.results()
    payload_pages = (MESSAGES - WARM) * PAYLOAD // PAGE
    for warm, end in ((writer_warm, writer_end), (reader_warm, reader_end)):
        assert end.faults - warm.faults < payload_pages / 1000
        assert end.fds == warm.fds
        assert end.names == warm.names == 0
    assert writer_warm.segment_bytes == writer_end.segment_bytes == 64 * MIB


# One copy.


def smaps(pattern: str) -> int:
    """Sum in bytes of the lines of /proc/self/smaps_rollup that match."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kib) << 10 for kib in re.findall(rf"^{pattern}:\s+(\d+) kB$", text, re.MULTILINE))


def shared_pss(address: Address) -> int:
    """This process's share of the writer's arena: each page divided by how many processes map it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = re.search(rf"/shmcast-{address.token.hex()}-\d+-\d+( |$)", line) is not None
        elif inside and line.startswith("Pss:"):
            total += int(line.split()[1]) << 10
    return total


def read_all(door: str, index: int) -> tuple[int, int, int]:
    """Private bytes before and after reading a message, and the share of the arena while all hold it."""
    torch.set_num_threads(1)
    with Client(door) as pipe:
        pipe.send(index)
        address = pipe.recv()
        with Reader(address, index) as reader:
            pipe.send("attached")
            kept: Any = reader.open(pipe.recv())  # as warm-up, a small one of the same kind
            kept[0].view(torch.int64).sum()
            del kept
            handle = pipe.recv()
            before = smaps("Private_.*")
            kept = reader.open(handle)
            for tensor in kept:
                tensor.view(torch.int64).sum()
            after = smaps("Private_.*")
            pipe.send("read")
            assert pipe.recv() == "all have read"
            share = shared_pss(address)
            pipe.send("measured")
            assert pipe.recv() == "all have measured"
            del kept, tensor
    return before, after, share


def test_readers_hold_one_copy(ranks: Ranks) -> None:
    size, n = 48 * MIB, 4
    with Writer(n, capacity=64 * MIB, policy=PATIENT) as writer, doors() as (door, accept):
        round = ranks.start_each(read_all, [(door, index) for index in range(n)])
        pipes = [accept() for _ in range(n)]

        def tell_all(what: object, answer: object = None) -> None:
            for pipe in pipes:
                pipe.send(what)
            if answer is not None:
                assert [pipe.recv() for pipe in pipes] == [answer] * n

        assert sorted(pipe.recv() for pipe in pipes) == list(range(n))
        tell_all(writer.address, "attached")
        tell_all(writer.publish([torch.ones(MIB, dtype=torch.uint8)]))
        tell_all(writer.publish([torch.ones(size // 2, dtype=torch.uint8) for _ in range(2)]), "read")
        tell_all("all have read", "measured")
        mine = shared_pss(writer.address)
        tell_all("all have measured")
        results = round.results()
        for pipe in pipes:
            pipe.close()
    for before, after, _ in results:
        assert after - before < size / 100
    # All shares of all processes together are the arena, once.
    shares = mine + sum(share for _, _, share in results)
    assert size <= shares <= 64 * MIB + n * PAGE
