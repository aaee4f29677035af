"""The writer of a soak, which also starts, kills, stops and hears its readers."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter, deque
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks._soak import MIB, Use, use_of
from benchmarks._soak_reader import (
    Answer,
    Attach,
    Content,
    Message,
    Order,
    Part,
    Release,
    Settings,
    deed_of,
    message_of,
    popular,
    read,
)
from shmcast import ArenaFull, Policy, Writer
from shmcast.digest import digest

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    import torch

    from shmcast import Handle

SHM = Path("/dev/shm")
BEHIND = 8  # orders that a reader that is awake may not have answered
PATIENCE = 60.0  # seconds until a reader that is awake and does not answer hangs
SAMPLES = 300


class Failed(Exception):
    """The soak is over, and this is why."""


class Plan(NamedTuple):
    """What is soaked; sizes in bytes, times in seconds. `kills`: messages between two; `plant`: a fault on purpose."""

    seconds: float
    seed: int
    readers: int
    capacity: int
    indices: int
    rate: float
    kills: int
    plant: str

    @property
    def largest(self) -> int:
        """The most bytes of a tensor."""
        return min(32 * MIB, self.capacity // 8)

    @property
    def settings(self) -> Settings:
        """What each reader is told."""
        return Settings(self.seed, self.largest, self.capacity // (4 * self.readers), self.plant == "leases")


class Sample(NamedTuple):
    """One moment. `names`, `named`: names in /dev/shm of all our writers, and their bytes; `stale`: of closed ones."""

    at: float
    names: int
    named: int
    stale: int
    leases: int
    blocks: int
    segments: int
    writer: Use
    readers: list[Use | None]


class Slot:
    """A place that one reader's process after the other takes."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.index = -1
        self.process: BaseProcess
        self.pipe: Connection
        self.awaited = 0  # attaches and releases that were ordered and not answered
        self.ordered: deque[Message] = deque()
        self.wakes: int | None = None  # with which message a reader that is stopped goes on

    @property
    def behind(self) -> bool:
        """Whether the next message has to wait for it."""
        return self.wakes is None and len(self.ordered) > BEHIND


class Soak:
    """Everything that runs; `close` ends it, whatever happened."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self.samples: list[Sample] = []
        self._content = Content(plan.seed, plan.largest)
        self._popular = {part: self._content.of(part).clone() for part in popular(plan.seed, plan.largest)}
        self._context = get_context("forkserver")
        # Importing torch is what takes a new process long.
        self._context.set_forkserver_preload(["torch"])
        self._tokens: list[str] = []
        self._planted: list[bytearray] = []
        self._withdrawals: dict[int, list[Handle]] = {}
        self._writer = self._new_writer()
        self.slots = [Slot(number) for number in range(plan.readers)]

    def run(self, tell: Callable[[str], None]) -> None:
        """Until the time is over; raises `Failed`."""
        for slot in self.slots:
            self._start(slot)
        self._until(self._nothing_awaited, "attach")
        began = due = time.monotonic()
        number = 0
        while (now := time.monotonic()) - began < self.plan.seconds:
            if (now - began) * SAMPLES >= len(self.samples) * max(self.plan.seconds, SAMPLES / 4):
                self.samples.append(self._sample(now - began))
                if len(self.samples) % 10 == 0:
                    tell(f"{now - began:.0f} s: {number} messages, {self.counts['kills']} kills")
            number += 1
            self._trouble(number)
            self._until(lambda: not any(slot.behind for slot in self.slots), "answer")
            self._publish(number)
            due = max(due + 1 / self.plan.rate, time.monotonic())
            time.sleep(max(0.0, due - time.monotonic()))
        self.counts["messages"] = number

    def finish(self) -> list[str]:
        """Have everything given back; what is left nevertheless."""
        self._wake_all()
        self._until(lambda: not any(slot.ordered for slot in self.slots), "answer")
        for handles in self._withdrawals.values():
            for handle in handles:
                self._writer.withdraw(handle)
        for slot in self.slots:
            self._tell(slot, Release())
        self._until(self._nothing_awaited, "release")
        left = self._left()
        for slot in self.slots:
            slot.pipe.close()
            slot.process.join(PATIENCE)
            if slot.process.exitcode != 0:
                left.append(f"reader {slot.index} ended with exit code {slot.process.exitcode}")
        self._writer.close()
        return left + [f"/dev/shm/{path.name} is left" for path in self._names()]

    def close(self) -> None:
        """Kill what still runs."""
        for slot in self.slots:
            if slot.index >= 0:
                slot.process.kill()
                slot.process.join()
                slot.pipe.close()
        self._writer.close()

    # What happens to readers.

    def _trouble(self, number: int) -> None:
        """What the seed has in store before message `number`."""
        rng = random.Random(f"{self.plan.seed} trouble {number}")
        kills, stops = rng.random() < 1 / self.plan.kills, rng.random() < 2 / self.plan.kills
        slot, messages = rng.choice(self.slots), rng.randint(2, 30)
        for other in self.slots:
            if other.wakes is not None and other.wakes <= number:
                self._wake(other)
        if kills:
            self._kill(slot)
        elif stops and slot.wakes is None:
            os.kill(slot.process.pid or 0, signal.SIGSTOP)
            slot.wakes = number + messages
            self.counts["stops"] += 1

    def _wake(self, slot: Slot) -> None:
        os.kill(slot.process.pid or 0, signal.SIGCONT)
        slot.wakes = None
        self.counts["continued"] += 1

    def _wake_all(self) -> None:
        for slot in self.slots:
            if slot.wakes is not None:
                self._wake(slot)

    def _kill(self, slot: Slot) -> None:
        """SIGKILL, whatever it is doing, and another under an index that was never used."""
        self.counts["kills of stopped readers"] += slot.wakes is not None
        slot.process.kill()
        slot.process.join()
        slot.pipe.close()
        slot.index = -1
        slot.ordered.clear()
        slot.awaited, slot.wakes = 0, None
        self.counts["kills"] += 1
        if self._index == self.plan.indices:
            self._renew()
        self._start(slot)
        self.counts["restarts"] += 1

    def _start(self, slot: Slot) -> None:
        slot.pipe, theirs = self._context.Pipe()
        slot.index = self._next_index()
        first = Attach(self._writer.address, slot.index)
        slot.process = self._context.Process(target=read, args=(theirs, self.plan.settings, first), daemon=True)
        slot.process.start()
        theirs.close()
        slot.awaited = 1

    def _next_index(self) -> int:
        self._index += 1
        return self._index - 1

    # Writers.

    def _new_writer(self) -> Writer:
        plan = self.plan
        self._index = 0
        writer = Writer(plan.indices, capacity=plan.capacity, policy=Policy(cache_bytes=plan.capacity // 4))
        self._tokens.append(writer.address.token.hex())
        self.counts["writers"] += 1
        return writer

    def _renew(self) -> None:
        """A new writer; the readers that live go to it, and hold what they have of the old one."""
        self._wake_all()
        old = self._writer
        self._count(old)
        self._writer = self._new_writer()
        self._withdrawals.clear()
        for slot in self.slots:
            if slot.index >= 0:
                slot.index = self._next_index()
                self._tell(slot, Attach(self._writer.address, slot.index))
        self._until(self._nothing_awaited, "attach")
        old.close()

    def _count(self, writer: Writer) -> None:
        self.counts["cache hits"] += writer.stats().cache_hits

    # Messages.

    def _publish(self, number: int) -> None:
        plan = self.plan
        message = message_of(plan.seed, number, plan.largest, plan.readers)
        if plan.plant == "memory":
            self._planted.append(bytearray(b"x" * 16 * MIB))
        elif plan.plant == "fds":
            os.dup(0)
        tensors = [self._tensor(part) for part in message.parts]
        slots = [slot for slot in self.slots if not slot.awaited]
        readers = [slot.index for slot in slots if deed_of(plan.seed, number, slot.number)[0] != "stranger"]
        obj = {"number": number, "ints": list(range(message.ints)), "tensors": tensors}
        for _ in range(1 + message.again):
            try:
                handle = self._writer.publish(obj, readers=readers, opens=message.opens)
            except ArenaFull:
                self.counts["full"] += 1
                continue
            if plan.plant == "bytes" and message.parts[0].source == "empty":
                tensors[0].view(-1)[0] ^= 1
            for slot in slots:
                self._tell(slot, Order(number, handle, *deed_of(plan.seed, number, slot.number)))
                slot.ordered.append(message)
            if message.withdrawn is not None:
                self._withdrawals.setdefault(number + message.withdrawn, []).append(handle)
        for handle in self._withdrawals.pop(number, ()):
            self._writer.withdraw(handle)
            self.counts["withdrawn"] += 1

    def _tensor(self, part: Part) -> torch.Tensor:
        content = self._content.of(part)
        if part.source == "popular":
            content = self._popular[part]
            digest(content)  # what makes it known to the cache
        elif part.source == "empty":
            # Where there is no memory for it, it goes as it is.
            with suppress(ArenaFull):
                tensor = self._writer.empty(content.shape, content.dtype).copy_(content)
                self.counts["empty()"] += 1
                return tensor
        return content

    # What readers say.

    def _tell(self, slot: Slot, order: Attach | Order | Release) -> None:
        slot.awaited += not isinstance(order, Order)
        try:
            slot.pipe.send(order)
        except BrokenPipeError:
            self._hear(slot)
            raise Failed(f"reader {slot.index} died on its own") from None

    def _nothing_awaited(self) -> bool:
        return not any(slot.awaited for slot in self.slots if slot.index >= 0)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        """Hear the readers until `condition()` holds."""
        deadline = time.monotonic() + PATIENCE
        self._hear_all(0)
        while not condition():
            if time.monotonic() > deadline:
                late = [slot.index for slot in self.slots if slot.wakes is None and (slot.ordered or slot.awaited)]
                raise Failed(f"readers {late} did not {what} within {PATIENCE:g} s")
            self._hear_all(0.1)

    def _hear_all(self, timeout: float) -> None:
        slots = [slot for slot in self.slots if slot.index >= 0]
        ready = wait([slot.pipe for slot in slots], timeout)
        for slot in slots:
            if slot.pipe in ready:
                self._hear(slot)

    def _hear(self, slot: Slot) -> None:
        with suppress(EOFError, ConnectionResetError):
            while slot.pipe.poll():
                self._judge(slot, slot.pipe.recv())
            return
        slot.process.join(PATIENCE)
        raise Failed(f"reader {slot.index} died on its own, with exit code {slot.process.exitcode}")

    def _judge(self, slot: Slot, answer: Answer) -> None:
        if answer.wrong:
            raise Failed(f"reader {slot.index}: {answer.what}")
        self.counts["bytes compared"] += answer.size
        self.counts[answer.what] += 1
        if answer.number < 0:
            slot.awaited -= 1
            return
        message = slot.ordered.popleft()
        if message.number != answer.number:
            raise Failed(f"reader {slot.index} answered {answer.number}, not {message.number}")
        stranger = deed_of(self.plan.seed, message.number, slot.number)[0] == "stranger"
        if answer.what == "stale" and message.withdrawn is None and not stranger:
            raise Failed(f"reader {slot.index}: message {message.number} was stale, and nobody had taken it back")
        if stranger and answer.what != "stale":
            raise Failed(f"reader {slot.index} opened message {message.number}, which was for others")

    # What is used, and what is left.

    def _sample(self, at: float) -> Sample:
        stats = self._writer.stats()
        names = self._names()
        current = self._tokens[-1]
        writer = use_of()
        if writer is None:
            raise Failed("/proc does not say what this process uses")
        return Sample(
            at,
            len(names),
            sum(_allocated(path) for path in names),
            sum(current not in path.name for path in names),
            sum(lease.held for lease in stats.leases),
            stats.live_blocks,
            stats.segment_bytes,
            writer,
            [use_of(slot.process.pid or 0) for slot in self.slots],
        )

    def _names(self) -> list[Path]:
        """What all writers of this soak have in /dev/shm."""
        names = (path for path in SHM.iterdir() if "shmcast-" in path.name)
        return sorted(path for path in names if any(token in path.name for token in self._tokens))

    def _left(self) -> list[str]:
        """What is held once nothing is used any more, after the readers had time to say so; the cache keeps its own."""
        deadline = time.monotonic() + PATIENCE / 6
        while True:
            stats = self._writer.stats()
            leases = [lease for lease in stats.leases if lease.held]
            if not (leases or stats.live_blocks > len(self._popular)):
                self._count(self._writer)
                return []
            if time.monotonic() > deadline:
                who = [f"reader {lease.reader} holds {lease.held} leases" for lease in leases]
                return [*who, f"{stats.live_blocks} blocks are in use, {len(self._popular)} of them may be cached"]
            time.sleep(0.02)


def _allocated(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_blocks * 512
    return 0
