"""One reader of a soak, a process of its own: it opens, checks, holds, writes to, discards or ignores what it is told.

What a message has in it, and what each reader is to do with it, comes from the seed and the message's number alone:
both sides compute it, and nothing but handles travels.
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import signal
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from shmcast import Reader, StaleHandle

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from shmcast import Handle
    from shmcast._wire import Address

KIB, MIB = 1 << 10, 1 << 20
SHIFT = MIB  # how far apart the same place of two tensors can lie in the content
POPULAR = 10
PR_SET_PDEATHSIG = 1

Source = Literal["plain", "empty", "popular"]
Deed = Literal["open", "write", "numpy", "slice", "twice", "discard", "ignore", "sweep", "stranger"]


class Part(NamedTuple):
    """One tensor: which bytes of the content it has, its shape, and what its memory is when it is published."""

    start: int
    shape: tuple[int, ...]
    source: Source = "plain"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Message(NamedTuple):
    """What message `number` has in it, how often it can be opened, and after how many others it is withdrawn."""

    number: int
    parts: tuple[Part, ...]
    ints: int
    opens: int
    withdrawn: int | None
    again: bool


class Order(NamedTuple):
    """What a reader does with a message: a deed, and for how many messages more it keeps what it has opened."""

    number: int
    handle: Handle
    deed: Deed
    hold: int


class Attach(NamedTuple):
    """Become reader number `reader` of the writer at `address`; what is held of the last one stays held."""

    address: Address
    reader: int


class Release(NamedTuple):
    """Check and drop all that is held."""


class Answer(NamedTuple):
    """`what` came of the order about message `number`; `size` bytes were compared. `wrong`: a reason to fail."""

    number: int
    what: str
    size: int = 0
    wrong: bool = False


class Settings(NamedTuple):
    """What all readers of a soak have in common."""

    seed: int
    largest: int
    held: int
    leaks: bool


class Content:
    """The bytes that all tensors are made of, the same in every process."""

    def __init__(self, seed: int, largest: int) -> None:
        self.bytes = torch.from_numpy(
            np.frombuffer(bytearray(np.random.default_rng(seed).bytes(largest + SHIFT)), "u1")
        )

    def of(self, part: Part) -> torch.Tensor:
        return self.bytes[part.start : part.start + part.size].view(part.shape)


def popular(seed: int, largest: int) -> tuple[Part, ...]:
    """Tensors that are published again and again: those that a content cache is for."""
    rng = random.Random(f"{seed} popular")
    sizes = [rng.randint(64 * KIB, max(64 * KIB, largest // 8)) for _ in range(POPULAR)]
    return tuple(Part(rng.randrange(SHIFT), (size,), "popular") for size in sizes)


def message_of(seed: int, number: int, largest: int, slots: int = 0) -> Message:
    """What message `number` of a soak is; `withdrawn` is right only where `slots` is how many readers there are."""
    rng = random.Random(f"{seed} message {number}")
    kind = rng.choices(("bytes", "one", "many", "nothing", "empty", "popular"), (20, 25, 10, 5, 20, 20))[0]
    if kind == "bytes":
        parts = [_part(rng, rng.randint(1, 64 * KIB))]
    elif kind in ("one", "empty"):
        source: Source = "plain" if kind == "one" else "empty"
        parts = [_part(rng, _size(rng, largest), source) for _ in range(rng.randint(1, 2))]
    elif kind == "many":
        parts = [_part(rng, rng.randint(0, 8 * KIB)) for _ in range(rng.randint(20, 200))]
    elif kind == "nothing":
        parts = [Part(0, shape) for shape in ((0,), (3, 0, 5), ())]
    else:
        parts = [*rng.sample(popular(seed, largest), rng.randint(1, 3)), _part(rng, 4 * KIB)]
    ints, later, opens = rng.choice((0, 0, 10_000)), rng.randint(1, 30), 2 if rng.random() < 0.1 else 1
    raced, again = rng.random() < 0.04, rng.random() < 0.2
    ignored = any(deed_of(seed, number, slot)[0] == "ignore" for slot in range(slots))
    withdrawn = later if ignored else 0 if raced else None
    return Message(number, tuple(parts), ints, opens, withdrawn, again)


def deed_of(seed: int, number: int, slot: int) -> tuple[Deed, int]:
    """What the reader in a slot does with message `number`, and how long it holds it."""
    rng = random.Random(f"{seed} deed {number} {slot}")
    deeds: tuple[Deed, ...] = ("open", "write", "numpy", "slice", "twice", "discard", "ignore", "sweep", "stranger")
    deed = rng.choices(deeds, (50, 8, 8, 8, 8, 7, 4, 1, 6))[0]
    return deed, rng.choice((0, 0, 1, rng.randint(2, 20), rng.randint(20, 200)))


def _size(rng: random.Random, largest: int) -> int:
    """Any order of magnitude from 64 KiB on as often as any other."""
    return int(64 * KIB * math.pow(largest / (64 * KIB), rng.random()))


def _part(rng: random.Random, size: int, source: Source = "plain") -> Part:
    start = rng.randrange(SHIFT)
    return Part(start, (size // 4, 4) if size % 4 == 0 and rng.random() < 0.3 else (size,), source)


class Held(NamedTuple):
    """A tensor or an array, the bytes that it must have, and the order after which it is dropped."""

    number: int
    due: int
    got: Any
    wanted: torch.Tensor | int

    def check(self) -> int:
        """Every byte; how many."""
        got = torch.as_tensor(self.got).reshape(-1)
        if isinstance(self.wanted, int):
            same = bool((got == self.wanted).all())
        else:
            same = torch.equal(got, self.wanted.reshape(-1))
        if not same:
            raise WrongBytes(f"message {self.number}: other bytes came, or were put in their place")
        return int(got.numel())


class WrongBytes(Exception):
    """What a soak looks for."""


class Taker:
    """What a reader's process has."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._content = Content(settings.seed, settings.largest)
        self._reader: Reader | None = None
        self._held: list[Held] = []
        self._leaked: list[object] = []

    def attach(self, order: Attach) -> None:
        self.close()
        self._reader = Reader(order.address, order.reader)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def follow(self, order: Order) -> Answer:
        """Do it; a handle that was withdrawn meanwhile, or was for others, is stale."""
        assert self._reader is not None
        message = message_of(self._settings.seed, order.number, self._settings.largest)
        size = self._drop(order.number)
        if order.deed in ("discard", "sweep"):
            (self._reader.discard if order.deed == "discard" else self._reader.discard_below)(order.handle)
        elif order.deed != "ignore":
            try:
                for _ in range(message.opens if order.deed == "twice" else 1):
                    size += self._take(message, order)
            except StaleHandle:
                return Answer(order.number, "stale", size)
            if order.deed != "twice":
                self._reader.discard(order.handle)
        return Answer(order.number, order.deed, size)

    def release(self) -> int:
        """Check and drop everything; how many bytes."""
        return self._drop(math.inf)

    def _take(self, message: Message, order: Order) -> int:
        assert self._reader is not None
        obj: Any = self._reader.open(order.handle)
        if (obj["number"], obj["ints"]) != (message.number, list(range(message.ints))):
            raise WrongBytes(f"message {message.number}: it says that it is {obj['number']}")
        due = message.number + order.hold
        opened = [
            Held(message.number, due, tensor, self._content.of(part))
            for tensor, part in zip(obj["tensors"], message.parts, strict=True)
        ]
        size = sum(held.check() for held in opened)
        if self._settings.leaks and message.number % 4 == 0:
            self._leaked.append(obj)
        self._held += [self._kept(held, order) for held in opened]
        return size

    def _kept(self, held: Held, order: Order) -> Held:
        if order.deed == "write":
            held.got.fill_(order.number % 251)
            return held._replace(wanted=order.number % 251)
        if order.deed == "numpy":
            return held._replace(got=held.got.numpy())
        if order.deed == "slice":
            assert isinstance(held.wanted, torch.Tensor)
            third = held.got.numel() // 3
            some = slice(third, 2 * third)
            return held._replace(got=held.got.reshape(-1)[some], wanted=held.wanted.reshape(-1)[some])
        return held

    def _drop(self, number: float) -> int:
        """Check what is due, and what is more than may be held, the oldest first, and drop it."""
        too_much = sum(torch.as_tensor(held.got).numel() for held in self._held) - self._settings.held
        kept, size = [], 0
        for held in self._held:
            if held.due <= number or too_much > 0:
                size += (checked := held.check())
                too_much -= checked
            else:
                kept.append(held)
        self._held = kept
        return size


def read(pipe: Connection, settings: Settings, first: Attach) -> None:
    """The process: do what comes through `pipe` until it is closed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    torch.set_num_threads(1)
    taker = Taker(settings)
    order: Attach | Order | Release = first
    with suppress(EOFError, BrokenPipeError):  # the parent is gone, or has closed the pipe
        try:
            while True:
                pipe.send(_do(taker, order))
                order = pipe.recv()
        except (EOFError, BrokenPipeError):
            raise
        except Exception:
            pipe.send(Answer(getattr(order, "number", -1), traceback.format_exc(), wrong=True))
    taker.close()


def _do(taker: Taker, order: Attach | Order | Release) -> Answer:
    if isinstance(order, Attach):
        taker.attach(order)
        return Answer(-1, "attached")
    if isinstance(order, Order):
        return taker.follow(order)
    size = taker.release()
    gc.collect()
    return Answer(-1, "released", size)
