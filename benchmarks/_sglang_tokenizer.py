"""The tokenizer's side: requests as a processor of Qwen2-VL gives them, sent as the release sends them."""

from __future__ import annotations

import copy
import importlib
import multiprocessing
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import zmq

from shmcast.integrations.sglang._release import find_release
from shmcast.integrations.sglang._replicas import Replicas
from shmcast.integrations.sglang._settings import read_settings
from shmcast.integrations.sglang._tokenizer import TokenizerWriter
from tests.sglang import requests
from tests.sglang.engine import io_struct

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

MIB = 1 << 20
ROW = requests.WIDTH * 4
SIDE = 32
WITH_VIDEO = 64 * MIB
VIDEO = (4, 36, 40)
END_SECONDS = 10.0


class Pixels:
    """Requests of about `size` bytes: images cut from one parent, and in large ones a video and audio."""

    def __init__(self, size: int) -> None:
        large = size >= WITH_VIDEO
        frames, height, width = VIDEO
        count = size // ROW - (frames * height * width if large else 0)
        whole, rest = divmod(count, SIDE * SIDE)
        grids = [(1, SIDE, SIDE)] * whole
        if rest >= 2 * SIDE:
            grids.append((1, rest // (2 * SIDE) * 2, SIDE))
        self._items = requests.images_of_one_parent(grids)
        if large:
            self._items += [requests.video(grid=VIDEO), requests.audio()]

    def raw(self) -> Any:
        """One request's: its own items, which nobody has hashed, around the same pixels."""
        return requests.raw_of([_anew(item) for item in self._items])


def _anew(item: Any) -> Any:
    new = copy.copy(item)
    new.feature = new.feature[:]  # another object: what is known of a tensor is not known of it
    return new


class Sent(NamedTuple):
    """Instants in ns: the processor has given the inputs, the tokenizer begins to send them, it is done."""

    made: int
    began: int
    done: int


class Tokenizer:
    """A process that sends requests to an entry rank. `send` returns at once, `sent` waits for it."""

    def __init__(self, address: str, sizes: Sequence[int]) -> None:
        # A fork, as it needs what SGLang keeps of the server's arguments in each of its processes.
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._pipe, address, sizes))
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def send(self, rid: str, size: int, *, hashed: bool, published: bool) -> None:
        self._pipe.send(("send", rid, size, hashed, published))

    def sent(self) -> Sent:
        return Sent(*self._pipe.recv())

    def publish(self, ranks: int) -> str:
        """Have memory for requests that are published; its address, as the schedulers inherit it."""
        self._pipe.send(("publish", ranks))
        return str(self._pipe.recv())

    def publish_no_more(self) -> dict[str, int]:
        """What kept requests from being published, and how often."""
        self._pipe.send(("publish_no_more",))
        return dict(self._pipe.recv())

    def close(self) -> None:
        self._pipe.close()
        self._process.join(END_SECONDS)
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, theirs: Connection, address: str, sizes: Sequence[int]) -> None:
    theirs.close()
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.connect(address)
        sender = _Sender(socket, sizes)
        pipe.send(None)
        while True:
            try:
                name, *args = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(sender, name)(*args))


class _Sender:
    """In the tokenizer's process."""

    def __init__(self, socket: Any, sizes: Sequence[int]) -> None:
        utils = importlib.import_module("sglang.srt.managers.mm_utils")
        self._wrap = getattr(utils, "wrap_shm_features", lambda request: request)
        self._pixels = {size: Pixels(size) for size in sizes}
        self._writer: TokenizerWriter | None = None
        self._put: Callable[[Any], None] = socket.send_pyobj
        if hasattr(io_struct, "sock_send"):
            self._put = partial(io_struct.sock_send, socket)

    def send(self, rid: str, size: int, hashed: bool, published: bool) -> Sent:
        raw = self._pixels[size].raw()
        request = requests.generate(rid, raw)
        made = time.monotonic_ns()
        if hashed:
            for item in requests.items_of(raw):
                item.set_pad_value()
        began = time.monotonic_ns()
        with self._writer.lending([request]) if published and self._writer else nullcontext():
            self._put(self._wrap(request))
        return Sent(made, began, time.monotonic_ns())

    def publish(self, ranks: int) -> str:
        settings = replace(read_settings(), on=True, tokenizer=True)
        self._writer = TokenizerWriter(Replicas(1, ranks), find_release(), settings)
        return self._writer.address

    def publish_no_more(self) -> dict[str, int]:
        if self._writer is None:
            return {}
        fallbacks = self._writer.stats().fallbacks
        self._writer.close()
        self._writer = None
        return dict(fallbacks)
