"""Writer and Reader in processes that share nothing but an address; processes that die, stop, come late or never."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import tempfile
import time
from collections import deque
from multiprocessing.connection import Client, Connection
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shmcast import _reclaim
from shmcast._reclaim import Verdict
from shmcast.errors import ArenaFull, PeerDied, ShmcastError, StaleHandle
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.support.ranks import Died
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcast._wire import Address, Handle
    from tests.support.ranks import Ranks, Round

pytestmark = pytest.mark.multiprocess

MIB = 1 << 20
BIG = 1 << 17
DEADLINE_SECONDS = 60.0
AT_ONCE = Policy(wait=0)
PATIENT = Policy(wait=DEADLINE_SECONDS)


def names_of(address: Address) -> list[str]:
    """What a writer has in /dev/shm."""
    return [name for name in os.listdir("/dev/shm") if address.token.hex() in name]


def pattern(number: int, size: int) -> torch.Tensor:
    """`size` int32 that no other message has."""
    return torch.arange(number * 1_000_003, number * 1_000_003 + size, dtype=torch.int32)


def fill(writer: Writer) -> tuple[list[Handle], str]:
    """Publish messages of the values 0, 1, ... until the arena is full; why it is."""
    handles: list[Handle] = []
    try:
        while len(handles) < 100:
            handles.append(writer.publish(torch.full((BIG,), len(handles), dtype=torch.uint8)))
    except ArenaFull as error:
        return handles, str(error)
    pytest.fail("the arena is never full")


class Actor:
    """What one process holds: an end, and what it has opened. Each method is a command that the test gives."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()
        self.kept: dict[int, Any] = {}
        self.writer: Writer
        self.reader: Reader

    def write(self, readers: int, capacity: int) -> Address:
        self.writer = self.stack.enter_context(Writer(readers, capacity=capacity, policy=AT_ONCE))
        return self.writer.address

    def publish(self, value: int) -> Handle:
        return self.writer.publish(torch.full((BIG,), value, dtype=torch.uint8))

    def read(self, address: Address, index: int) -> None:
        self.reader = self.stack.enter_context(Reader(address, index))

    def open(self, key: int, handle: Handle) -> set[int]:
        self.kept[key] = self.reader.open(handle)
        return self.check(key)

    def check(self, key: int) -> set[int]:
        return set(self.kept[key].unique().tolist())

    def fill(self, key: int, value: int) -> None:
        self.kept[key].fill_(value)

    def drop(self, key: int) -> None:
        del self.kept[key]

    def lives(self) -> bool:
        return self.reader.writer_lives

    def follow(self, pipe: Connection, seed: int) -> int:
        """Open what comes, hold it for a random number of rounds, write into some of it, check all of it."""
        dice = random.Random(seed)
        held: deque[tuple[torch.Tensor, torch.Tensor]] = deque()
        rounds = 0
        while (item := pipe.recv()) is not None:
            number, size, handle = item
            message = self.reader.open(handle)
            assert isinstance(message, dict)
            assert message["number"] == number
            assert torch.equal(message["table"], pattern(0, BIG)), f"round {number}: another table"
            expected = pattern(number, size)
            assert torch.equal(message["payload"], expected), f"round {number}: bytes of another message"
            view = message["payload"][dice.randrange(100) :]
            expected = expected[-len(view) :].clone()
            if dice.random() < 0.4:
                message["table"].fill_(-1)
                view[::1024] = expected[::1024] = -number
            held.append((view, expected))
            del message, view
            while len(held) > dice.randrange(5):
                oldest, expected = held.popleft()
                assert torch.equal(oldest, expected), f"round {number}: a held tensor changed"
                del oldest
            rounds += 1
        assert all(torch.equal(view, expected) for view, expected in held)
        return rounds


def act(door: str, number: int) -> None:
    """The body of a process: do what comes through the socket at `door`, until there is no more."""
    torch.set_num_threads(1)
    actor = Actor()
    with Client(door) as pipe, actor.stack:
        pipe.send(number)
        while (command := pipe.recv()) is not None:
            name, *args = command
            try:
                pipe.send(getattr(actor, name)(*([pipe] if name == "follow" else []), *args))
            except ShmcastError as error:
                pipe.send(type(error))
        actor.kept.clear()


class Puppet:
    """The test's end of one actor."""

    def __init__(self, pipe: Connection, stage: Stage, number: int) -> None:
        self.pipe = pipe
        self.stage = stage
        self.number = number
        self.dead = False

    @property
    def pid(self) -> int:
        return self.stage.round.pids[self.number]

    def __call__(self, name: str, *args: object) -> Any:
        """Give a command and wait for its result: a value, or the class of the error."""
        self.pipe.send((name, *args))
        return self.answer()

    def answer(self) -> Any:
        if not self.pipe.poll(DEADLINE_SECONDS):
            pytest.fail(f"process {self.number} does not answer")
        return self.pipe.recv()

    def kill(self) -> None:
        """SIGKILL, and wait until it has ended."""
        self.stage.round.kill(self.number)
        self.dead = True
        with contextlib.suppress(EOFError, ConnectionResetError):
            self.answer()

    def end(self) -> None:
        if not self.dead:
            self.pipe.send(None)
        self.pipe.close()


class Stage:
    """`n` actors in processes of their own, which know nothing of each other."""

    def __init__(self, ranks: Ranks, n: int) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
            door = f"{folder}/door"
            server.bind(door)
            server.listen()
            server.settimeout(DEADLINE_SECONDS)
            self.round: Round = ranks.start_each(act, [(door, number) for number in range(n)])
            pipes: dict[int, Connection] = {}
            for _ in range(n):
                pipe = Connection(server.accept()[0].detach())
                pipes[pipe.recv()] = pipe
        self.puppets = [Puppet(pipes[number], self, number) for number in range(n)]

    def __enter__(self) -> list[Puppet]:
        return self.puppets

    def __exit__(self, kind: object, *exc: object) -> None:
        for puppet in self.puppets:
            puppet.end()
        if kind is None:
            results = self.round.results()
            assert [isinstance(result, Died) for result in results] == [puppet.dead for puppet in self.puppets]


# Everybody lives.


def stream(writer: Writer, puppets: list[Puppet], rounds: int, on_round: Callable[[int], None] = lambda i: None) -> int:
    """Publish `rounds` messages to actors that `follow`, each with a table that all messages share; bytes published."""
    dice, published = random.Random(7), 0
    table = writer.empty((BIG,), torch.int32).copy_(pattern(0, BIG))
    for number in range(1, rounds + 1):
        size = dice.choice([1000, 20_000, 50_000, 100_000, 200_000])
        payload = pattern(number, size)
        if number % 3 == 0:
            payload = writer.empty((size,), torch.int32).copy_(payload)
        living = [puppet for puppet in puppets if not puppet.dead]
        readers = [puppet.number for puppet in living]
        handle = writer.publish({"number": number, "payload": payload, "table": table}, readers=readers)
        for puppet in living:
            puppet.pipe.send((number, size, handle))
        published += payload.nbytes
        on_round(number)
    return published


@pytest.mark.slow
def test_readers_hold_tensors_for_random_rounds_while_blocks_are_reused(ranks: Ranks) -> None:
    with Writer(3, capacity=16 * MIB, policy=PATIENT) as writer, Stage(ranks, 3) as puppets:
        for puppet in puppets:
            puppet("read", writer.address, puppet.number)
            puppet.pipe.send(("follow", puppet.number))
        until(lambda: not names_of(writer.address), "no name is left")
        assert stream(writer, puppets, 400) > 4 * writer.stats().segment_bytes
        for puppet in puppets:
            puppet.pipe.send(None)
        assert [puppet.answer() for puppet in puppets] == [400] * 3
        until(lambda: writer.stats().live_blocks == 0, "all memory came back")
        assert writer.stats().segment_bytes == 16 * MIB


def test_each_process_has_its_own_writes(ranks: Ranks) -> None:
    with Writer(2, capacity=4 * MIB, policy=AT_ONCE) as writer, Stage(ranks, 2) as puppets:
        left, right = puppets
        for puppet in puppets:
            puppet("read", writer.address, puppet.number)
        mine = writer.empty((BIG,), torch.uint8).fill_(1)
        first = writer.publish(mine)
        assert left("open", 0, first) == {1}
        left("fill", 0, 9)
        assert right("open", 0, first) == {1}
        right("fill", 0, 8)
        second = writer.publish(mine)
        assert left("open", 1, second) == right("open", 1, second) == {1}
        assert (left("check", 0), right("check", 0), set(mine.tolist())) == ({9}, {8}, {1})


def test_a_reader_that_comes_late_opens_what_waits_for_it(ranks: Ranks) -> None:
    with Writer(2, capacity=4 * MIB, policy=AT_ONCE) as writer, Stage(ranks, 2) as (early, late):
        early("read", writer.address, 0)
        handles = [writer.publish(torch.full((BIG,), value, dtype=torch.uint8)) for value in range(3)]
        assert [early("open", i, handle) for i, handle in enumerate(handles)] == [{0}, {1}, {2}]
        for i in range(3):
            early("drop", i)
        until(lambda: writer.stats().leases[0].held == 0, "the early reader holds nothing")
        assert writer.stats().live_blocks == 3
        late("read", writer.address, 1)
        assert [late("open", i, handle) for i, handle in enumerate(handles)] == [{0}, {1}, {2}]
        until(lambda: not names_of(writer.address), "no name is left")


def test_a_reader_that_never_comes_holds_what_is_for_it(ranks: Ranks) -> None:
    with Writer(2, capacity=MIB, policy=AT_ONCE) as writer, Stage(ranks, 1) as (only,):
        only("read", writer.address, 0)
        handles, why = fill(writer)
        assert "reader 1 holds 7" in why
        assert [only("open", 0, handle) for handle in handles] == [{value} for value in range(len(handles))]
        assert writer.stats().leases[1].alive is None
        for handle in handles:
            writer.withdraw(handle)
        until(lambda: writer.stats().live_blocks == 1, "only what the first reader holds is live")
        only("drop", 0)
        until(lambda: writer.stats().live_blocks == 0, "all memory came back")
        for value in range(20):
            handle = writer.publish(torch.full((BIG,), value, dtype=torch.uint8), readers=[0])
            assert only("open", 0, handle) == {value}


def test_two_writers_in_one_process_and_their_readers(ranks: Ranks) -> None:
    with Stage(ranks, 2) as puppets, contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Writer(1, capacity=MIB, policy=AT_ONCE, rank=rank)) for rank in (0, 1)]
        for puppet, writer in zip(puppets, writers, strict=True):
            puppet("read", writer.address, 0)
        for value in range(20):
            handles = [
                writer.publish(torch.full((BIG,), value + 100 * i, dtype=torch.uint8))
                for i, writer in enumerate(writers)
            ]
            seen = [puppet("open", 0, handle) for puppet, handle in zip(puppets, handles, strict=True)]
            assert seen == [{value}, {value + 100}]


# Somebody dies or stops.


@pytest.mark.faults
def test_leases_of_a_killed_reader_come_back(ranks: Ranks) -> None:
    with Writer(2, capacity=4 * MIB, policy=AT_ONCE) as writer, Stage(ranks, 2) as (killed, lives):
        for index, puppet in enumerate((killed, lives)):
            puppet("read", writer.address, index)
        handles = [writer.publish(torch.full((BIG,), value, dtype=torch.uint8), opens=2) for value in range(5)]
        assert [killed("open", i, handle) for i, handle in enumerate(handles[:3])] == [{0}, {1}, {2}]
        assert lives("open", 0, handles[0]) == {0}
        killed.kill()
        until(lambda: writer.stats().leases[0].held == 0, "the leases of the dead came back")
        stats = writer.stats()
        assert stats.leases[0].alive is False
        assert (stats.leases[1].held, stats.leases[1].opened) == (10, 1)
        assert stats.live_blocks == 5
        for handle in handles:
            writer.withdraw(handle)
        until(lambda: writer.stats().live_blocks == 1, "only what the living reader holds is live")
        for value in range(30):
            handle = writer.publish(torch.full((MIB,), value, dtype=torch.uint8))
            assert handle.readers == 0b10  # none for the dead
            writer.withdraw(handle)
        assert lives("check", 0) == {0}


@pytest.mark.faults
def test_a_publish_takes_back_what_the_dead_hold(ranks: Ranks) -> None:
    """Without any call of `stats`, and whether the dead reader held a lease, or was to get one."""
    with Writer(1, capacity=MIB, policy=PATIENT) as writer, Stage(ranks, 1) as (killed,):
        killed("read", writer.address, 0)
        handles = [writer.publish(torch.full((BIG,), value, dtype=torch.uint8)) for value in range(7)]
        assert killed("open", 0, handles[0]) == {0}
        killed.kill()
        handle = writer.publish(torch.full((6 * BIG,), 9, dtype=torch.uint8))
        assert handle.readers == 0
        assert writer.stats().live_blocks == 0


@pytest.mark.faults
def test_a_publish_that_waits_takes_back_what_the_dying_hold(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    with Writer(1, capacity=MIB, policy=Policy(wait=5)) as writer, Stage(ranks, 1) as (killed,):
        killed("read", writer.address, 0)
        assert killed("open", 0, writer.publish(torch.full((5 * BIG,), 1, dtype=torch.uint8))) == {1}
        sleep = time.sleep

        def kill_first(seconds: float) -> None:
            """The publish waits: now."""
            if not killed.dead:
                killed.kill()
            sleep(seconds)

        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", kill_first)
            try:
                published = writer.publish(torch.full((5 * BIG,), 2, dtype=torch.uint8)).readers == 0
            except ArenaFull:
                published = False
    del writer
    assert published


@pytest.mark.faults
@pytest.mark.slow
def test_others_go_on_when_a_reader_is_killed_in_the_middle(ranks: Ranks) -> None:
    with Writer(3, capacity=16 * MIB, policy=PATIENT) as writer, Stage(ranks, 3) as puppets:
        for puppet in puppets:
            puppet("read", writer.address, puppet.number)
            puppet.pipe.send(("follow", puppet.number))

        def kill_one(number: int) -> None:
            if number == 60:
                puppets[1].kill()

        stream(writer, puppets, 200, kill_one)
        for puppet in (puppets[0], puppets[2]):
            puppet.pipe.send(None)
            assert puppet.answer() == 200
        until(lambda: writer.stats().live_blocks == 0, "all memory came back")
        assert [held.alive for held in writer.stats().leases] == [True, False, True]


@pytest.mark.faults
def test_tensors_outlive_a_killed_writer(ranks: Ranks) -> None:
    with Stage(ranks, 2) as (killed, process):
        address = killed("write", 2, 4 * MIB)
        with Reader(address, 0) as reader:
            process("read", address, 1)
            until(lambda: not names_of(address), "no name is left")
            handles = [killed("publish", value) for value in range(1, 4)]
            kept = reader.open(handles[0])
            assert isinstance(kept, torch.Tensor)
            assert process("open", 0, handles[0]) == {1}
            assert reader.writer_lives
            assert process("lives") is True
            killed.kill()
            until(lambda: not reader.writer_lives, "the reader sees that its writer is dead")
            assert process("lives") is False
            assert names_of(address) == []
            kept[5:].fill_(9)
            assert set(kept.tolist()) == {1, 9}
            assert process("check", 0) == {1}
            process("drop", 0)
            del kept
            until(lambda: reader.stats().leases_held == 0, "the lease ends, though nobody listens")
            with pytest.raises(PeerDied):
                Reader(address, 0)


@pytest.mark.faults
def test_all_killed_after_they_attached_leave_nothing(ranks: Ranks) -> None:
    with Stage(ranks, 3) as puppets:
        address = puppets[0]("write", 2, 4 * MIB)
        for index, puppet in enumerate(puppets[1:]):
            puppet("read", address, index)
        handle = puppets[0]("publish", 3)
        assert [puppet("open", 0, handle) for puppet in puppets[1:]] == [{3}, {3}]
        until(lambda: not names_of(address), "no name is left")
        for puppet in puppets:
            puppet.kill()
    assert names_of(address) == []


@pytest.mark.faults
def test_what_a_writer_left_before_its_readers_came_is_swept_by_the_next(ranks: Ranks) -> None:
    with Stage(ranks, 2) as (killed, reads), Writer(1, capacity=MIB) as alive:
        address = killed("write", 2, 4 * MIB)
        reads("read", address, 0)
        assert len(names_of(address)) == 2 + 2 * 2
        killed.kill()
        with Writer(1, capacity=MIB):
            # A reader that has mapped it is alive: it is not for us to remove.
            assert len(names_of(address)) == 2 + 2 * 2
        reads.kill()
        with Writer(1, capacity=MIB):
            assert names_of(address) == []
        assert len(names_of(alive.address)) == 2 + 2
    assert not [found for found in _reclaim.sweep() if found.verdict is Verdict.REMOVED]


@pytest.mark.faults
def test_a_stopped_reader_stops_nobody(ranks: Ranks) -> None:
    with Writer(2, capacity=MIB, policy=AT_ONCE) as writer, Stage(ranks, 2) as (stopped, runs):
        for index, puppet in enumerate((stopped, runs)):
            puppet("read", writer.address, index)
        handles = [writer.publish(torch.full((BIG,), 100, dtype=torch.uint8))]
        assert stopped("open", 0, handles[0]) == {100}
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            more, why = fill(writer)
            handles += more
            assert "reader 0 holds 7" in why
            assert [runs("open", 0, handle) for handle in handles] == [{100}, *({i} for i in range(6))]
            runs("drop", 0)
            until(lambda: writer.stats().leases[1].held == 0, "the running reader holds nothing")
            assert writer.stats().leases[0].alive is True  # stopped is not dead
            assert writer.stats().leases[0].held == len(handles)
            with pytest.raises(ArenaFull):
                writer.publish(torch.full((BIG,), 0, dtype=torch.uint8), readers=[1])
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        assert stopped("check", 0) == {100}
        assert [stopped("open", i, handle) for i, handle in enumerate(more, 1)] == [{i} for i in range(6)]
        for i in range(len(handles)):
            stopped("drop", i)
        until(lambda: writer.stats().live_blocks == 0, "all memory came back")


@pytest.mark.faults
def test_a_stopped_reader_opens_nothing_that_was_withdrawn(ranks: Ranks) -> None:
    with Writer(1, capacity=MIB, policy=AT_ONCE) as writer, Stage(ranks, 1) as (stopped,):
        stopped("read", writer.address, 0)
        handle = writer.publish(torch.full((BIG,), 1, dtype=torch.uint8))
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            stopped.pipe.send(("open", 0, handle))
            writer.withdraw(handle)
            again = writer.publish(torch.full((BIG,), 2, dtype=torch.uint8))
            assert again.where.offset == handle.where.offset
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.answer() is StaleHandle
        assert stopped("open", 1, again) == {2}


@pytest.mark.faults
def test_an_index_is_used_once_also_after_death(ranks: Ranks) -> None:
    with Writer(2, capacity=MIB, policy=AT_ONCE) as writer, Stage(ranks, 2) as (first, second):
        first("read", writer.address, 0)
        assert second("read", writer.address, 0) is StaleHandle
        first.kill()
        until(lambda: writer.stats().leases[0].alive is False, "the writer sees that its reader is dead")
        assert second("read", writer.address, 0) is StaleHandle
        second("read", writer.address, 1)
        until(lambda: not names_of(writer.address), "who is dead keeps no name")
        assert second("read", writer.address, 0) is PeerDied  # there is no name to come by


@pytest.mark.faults
def test_many_readers_die_one_after_another(ranks: Ranks) -> None:
    with Writer(4, capacity=MIB, policy=AT_ONCE) as writer, Stage(ranks, 2) as puppets:
        for index, puppet in enumerate(puppets):
            puppet("read", writer.address, index)
        for index, puppet in enumerate(puppets):
            handle = writer.publish(torch.full((BIG,), index, dtype=torch.uint8), readers=[index])
            assert puppet("open", 0, handle) == {index}
            puppet.kill()
        until(lambda: writer.stats().live_blocks == 0, "all memory came back")
        assert [held.alive for held in writer.stats().leases] == [False, False, None, None]
