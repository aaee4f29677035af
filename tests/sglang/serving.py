"""A rank that serves: its engine linked to its peers, requests sent to it as the tokenizer sends them."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import zmq

from shmcast.integrations.sglang._install import link
from shmcast.integrations.sglang._release import find_release
from shmcast.integrations.sglang._settings import read_settings
from tests.sglang.engine import FROM_DICT, Engine, schedule_batch
from tests.sglang.requests import pointed
from tests.support.waiting import until

MAKER = "from_dict" if FROM_DICT else "from_processor_output"


class Serving:
    """One rank. `inputs`: by rid, of all requests received so far; `ticks`: the rids of each receive that gave any."""

    def __init__(self, engine: Engine, made: Any, senders: list[Any]) -> None:
        self.engine = engine
        self.link = made
        self._senders = senders
        self.inputs: dict[str, Any] = {}
        self.ticks: list[list[str]] = []
        self.other: list[Any] = []

    def send(self, *requests: Any, replica: int = 0) -> None:
        """As the tokenizer would; only rank 0 does."""
        if self._senders:
            for request in requests:
                self._senders[replica].send_pyobj(pointed(request))

    def tick(self) -> list[Any]:
        """One receive: every rank of the world calls it."""
        received = self.engine.receive()
        rids = []
        for request in received:
            parts = request.batch if hasattr(request, "batch") else [request]
            for part in parts:
                rids.append(part.rid)
                if not hasattr(part, "mm_inputs"):
                    self.other.append(part)
                    continue
                try:
                    self.inputs[part.rid] = self.engine.inputs(part)
                except Exception as error:
                    self.inputs[part.rid] = error.with_traceback(None)  # whose frames hold all that was received
        if rids:
            self.ticks.append(rids)
        return received

    def serve(self, count: int, *, together: bool = False) -> None:
        """Tick until `count` requests came. `together`: until they came on every rank of the world."""
        missing = torch.ones(1, dtype=torch.int32)
        while missing.item():
            if sum(map(len, self.ticks)) < count or together:
                self.tick()
            missing[0] = sum(map(len, self.ticks)) < count
            if together:
                dist.all_reduce(missing)

    def gate(self) -> Any:
        return self.engine.scheduler.recv_from_tokenizer

    def forget(self) -> None:
        self.inputs.clear()


def serve_staged(serve: Serving, count: int) -> None:
    """Two pipeline stages: the second receives what the first handled."""
    while sum(map(len, serve.ticks)) < count:
        received = serve.tick()
        serve.engine.hand_on(received)
        del received  # it has the tickets


@contextlib.contextmanager
def serving(address: str, *, settings: dict[str, Any] | None = None, **options: Any) -> Iterator[Serving]:
    """An engine, linked; nothing of it is left after. `settings`: what differs from the environment's."""
    engine = Engine(address, **options)
    context = zmq.Context()
    try:
        senders = []
        for replica in range(options.get("attn_dp", 1) if engine.rank == 0 else 0):
            senders.append(context.socket(zmq.PUSH))
            senders[-1].connect(f"{address}-{replica}")
        wanted = replace(read_settings(), **{"capacity": 256 << 20} | (settings or {}))
        made = link(engine.scheduler, find_release(), wanted)
        serve = Serving(engine, made, senders)
        try:
            yield serve
            with contextlib.suppress(RuntimeError):  # one that was killed on purpose does not come
                dist.barrier()  # who sends last may be gone before the others have read
        finally:
            serve.forget()
            serve.link.close()
    finally:
        context.destroy(linger=0)
        engine.close()


def leases(serve: Serving) -> int:
    """Held in all readers of an entry rank's writer."""
    return sum(reader.held for reader in serve.link.stats()["writer"].leases)


def wait_for_leases(serve: Serving, wanted: int) -> None:
    if serve.engine.receives:
        until(lambda: leases(serve) == wanted, f"{wanted} leases are held")


class Slow:
    """Makes inputs only when told to: in place of the class's own maker, for as long as it is entered."""

    def __init__(self) -> None:
        self.stock: Callable[..., Any] = getattr(schedule_batch.MultimodalInputs, MAKER)
        self.go = threading.Event()
        self.calls = 0

    def __enter__(self) -> "Slow":
        setattr(schedule_batch.MultimodalInputs, MAKER, staticmethod(self))
        return self

    def __exit__(self, *exc: object) -> None:
        self.go.set()
        setattr(schedule_batch.MultimodalInputs, MAKER, staticmethod(self.stock))

    def __call__(self, raw: Any, **options: Any) -> Any:
        self.calls += 1
        if not self.go.wait(50):
            raise TimeoutError("nobody told this maker to go on")
        return self.stock(raw, **options)


def stock_inputs(raw: Any) -> Any:
    """What every rank alone makes of raw inputs."""
    return getattr(schedule_batch.MultimodalInputs, MAKER)(raw)
