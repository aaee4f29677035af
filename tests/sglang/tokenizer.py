"""SGLang's own tokenizer manager in front of the engines, and its launch: what sends requests, with shmcast or without.

The manager is made without its constructor, which loads a tokenizer; the launch starts no process. What puts requests
on the wire is the class's own.
"""

import asyncio
import contextlib
import functools
import gc
import importlib
import inspect
import os
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import zmq
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from shmcast.integrations.sglang import _tokenizer
from shmcast.integrations.sglang._install import link, replace_targets
from shmcast.integrations.sglang._joining import ADDRESS
from shmcast.integrations.sglang._release import find_release
from shmcast.integrations.sglang._settings import Settings, read_settings
from tests.sglang.controller import Controller
from tests.sglang.engine import Engine
from tests.support.waiting import until

LAUNCH = "_launch_subprocesses"


class TimeStats:
    """Takes any note of a time."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("set_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _NoTransport:
    """In place of what hands over tensors of a GPU."""

    async def prepare_for_dispatch_async(self, inputs: Any) -> list[Any]:
        return []

    def prepare_for_dispatch(self, requests: Any) -> list[Any]:
        return []

    def cancel_for_dispatch(self, prepared: Any) -> None:
        pass


class Tokenizer:
    """One tokenizer manager, connected to a socket."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self.manager: Any = TokenizerManager.__new__(TokenizerManager)
        socket = self._context.socket(zmq.PUSH)
        socket.connect(address)
        self.manager.__dict__.update(
            send_to_scheduler=socket,
            tokenizer_ipc_name=None,
            rid_to_state={},
            encoder_dispatch_ready={},
            cuda_vmm_feature_transport=_NoTransport(),
            positional_embeds_transport=_NoTransport(),
            req_state_class=lambda *args, **kwargs: types.SimpleNamespace(),
        )

    def send(self, *requests: Any) -> None:
        for request in requests:
            self._call(self.manager._send_one_request, _as_it_came(request), request)

    def send_batch(self, requests: list[Any]) -> None:
        self._call(self.manager._send_batch_request, [_as_it_came(request) for request in requests], requests)

    def writer(self) -> Any:
        return _tokenizer.writers[self.manager].writer

    def close(self) -> None:
        self._context.destroy(linger=0)

    @staticmethod
    def _call(method: Any, obj: Any, tokenized: Any) -> None:
        """Releases until 0.5.9 take the request as it came, too."""
        for each in tokenized if isinstance(tokenized, list) else [tokenized]:
            if hasattr(each, "time_stats"):
                each.time_stats = TimeStats()
        sent = method(*([obj] if "obj" in inspect.signature(method).parameters else []), tokenized)
        if inspect.iscoroutine(sent):
            asyncio.run(sent)


def _as_it_came(tokenized: Any) -> Any:
    """The request before it was tokenized."""
    return types.SimpleNamespace(rid=tokenized.rid)


class Served:
    """One rank behind the tokenizer, which is in rank 0's process. `inputs`: by rid, of all requests received.

    `controller`: between the tokenizer and several replicas, in rank 0's process too.
    """

    def __init__(self, engine: Engine, made: Any, tokenizer: Tokenizer | None, controller: Controller | None) -> None:
        self.engine = engine
        self.link = made
        self.tokenizer = tokenizer
        self.controller = controller
        self.inputs: dict[str, Any] = {}
        self.received: list[str] = []

    def send(self, *requests: Any) -> None:
        """Only rank 0 does."""
        if self.tokenizer is not None:
            self.tokenizer.send(*requests)

    def route(self, count: int) -> None:
        """Have the controller pass on so many messages of the tokenizer's; it is in rank 0."""
        if self.controller is not None:
            self.controller.route(count)

    def tick(self) -> list[Any]:
        requests = self.engine.receive()
        for request in requests:
            for part in request.batch if hasattr(request, "batch") else [request]:
                self.received.append(part.rid)
                if not hasattr(part, "mm_inputs"):
                    continue
                try:
                    self.inputs[part.rid] = self.engine.inputs(part)
                except Exception as error:
                    self.inputs[part.rid] = error
        return requests

    def serve(self, count: int) -> None:
        """Tick until `count` requests came, on every rank of the world."""
        missing = torch.ones(1, dtype=torch.int32)
        while missing.item():
            self.tick()
            missing[0] = len(self.received) < count
            dist.all_reduce(missing, dist.ReduceOp.MAX)

    def held(self) -> int:
        """Leases on the tokenizer's messages, in all readers."""
        assert self.tokenizer is not None
        return sum(lease.held for lease in self.tokenizer.writer().stats().leases)

    def wait_until_free(self, *, alone: bool = False) -> None:
        """Until nobody, the tokenizer included, claims any of its memory; all ranks stay until then, if not alone."""
        gc.collect()
        if self.tokenizer is not None:
            writer = self.tokenizer.writer()
            until(lambda: self.held() == 0, "no lease on the tokenizer's messages is held")
            until(lambda: writer.stats().live_blocks == 0, "no block of the tokenizer's is live")
        if not alone:
            dist.barrier()

    def forget(self) -> None:
        self.inputs.clear()
        gc.collect()


@contextlib.contextmanager
def serving(
    address: str, *, absent: tuple[int, ...] = (), capacity: int = 256 << 20, **options: Any
) -> Iterator[Served]:
    """An engine, behind a tokenizer in rank 0. Ranks in `absent` are not told where its memory is."""
    engine = Engine(address, **options)
    settings = replace(read_settings(), on=True, tokenizer=True, capacity=capacity)
    tokenizer = controller = None
    told = [""]
    with contextlib.ExitStack() as stack:
        stack.callback(engine.close)
        if engine.rank == 0:
            if engine.replicas > 1:
                controller = Controller(address, engine)
                stack.callback(controller.close)
            tokenizer = Tokenizer(f"{address}-0" if controller is None else controller.address)
            stack.callback(tokenizer.close)
            told = [stack.enter_context(launched(tokenizer.manager, engine.args, settings))]
        dist.broadcast_object_list(told)
        stack.callback(os.environ.pop, ADDRESS, None)
        if engine.rank not in absent:
            os.environ[ADDRESS] = told[0]
        with making_groups_apart():
            made = link(engine.scheduler, find_release(), settings)
        stack.callback(made.close)
        dist.barrier()  # worlds do not wait for each other
        served = Served(engine, made, tokenizer, controller)
        stack.callback(served.forget)
        yield served
        with contextlib.suppress(RuntimeError):  # one that was killed on purpose does not come
            dist.barrier()  # the tokenizer publishes for ranks that are there


@contextlib.contextmanager
def making_groups_apart() -> Iterator[None]:
    """Have each world of a test make its groups as if it were alone: in one gloo group there are others beside it."""
    with mock.patch.object(dist, "new_group", functools.partial(dist.new_group, use_local_synchronization=True)):
        yield


@contextlib.contextmanager
def launched(manager: Any, args: Any, settings: Settings) -> Iterator[str]:
    """This manager, as a launch with shmcast gives it; the address that its schedulers would inherit, or nothing."""
    module = importlib.import_module("sglang.srt.entrypoints.engine")
    old = hasattr(module, LAUNCH)
    owner = module if old else module.Engine
    stock = vars(owner)[LAUNCH]
    inherited = []

    def launch(server_args: Any, port_args: Any = None) -> Any:
        inherited.append(os.environ.get(ADDRESS, ""))
        return manager, None, None, port_args

    setattr(owner, LAUNCH, launch if old else classmethod(lambda cls, server_args: launch(server_args)))
    undo = replace_targets(find_release(), settings)
    try:
        assert getattr(owner, LAUNCH)(server_args=args)[0] is manager
        assert ADDRESS not in os.environ
        yield inherited[0]
    finally:
        while undo:
            undo.pop()()
        setattr(owner, LAUNCH, stock)
