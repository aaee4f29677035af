"""SGLang's own data parallel controller between the tokenizer and the replicas' entry ranks: it starts no process here.

Its methods are the class's own: what they use is put where its constructor would, which launches the schedulers.
"""

import inspect
from typing import Any

import zmq
from sglang.srt.managers import data_parallel_controller
from sglang.srt.managers.data_parallel_controller import DataParallelController, LoadBalanceMethod

from tests.sglang.engine import Engine, io_struct

WAIT_MS = 60_000


class Controller:
    """`address`: the socket that a tokenizer connects to."""

    def __init__(self, address: str, engine: Engine) -> None:
        self.address = f"{address}-controller"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.bind(self.address)
        workers = [self._context.socket(zmq.PUSH) for _ in range(engine.replicas)]
        for replica, worker in enumerate(workers):
            worker.connect(f"{address}-{replica}")
        budget = data_parallel_controller.DPBudget
        method = engine.args.load_balance_method
        self.stock: Any = DataParallelController.__new__(DataParallelController)
        self.stock.__dict__.update(
            server_args=engine.args,
            recv_from_tokenizer=self._socket,
            workers=workers,
            status=[True] * engine.replicas,
            _active_workers=list(range(engine.replicas)),
            round_robin_counter=0,
            health_round_robin_counter=0,
            load_balance_method=LoadBalanceMethod.from_str(method),
            refresh_load_budget_on_dispatch=False,
            dp_budget=budget(*[engine.replicas][: len(inspect.signature(budget).parameters)]),
            control_message_step=engine.ranks["tp_size"] if engine.ranks["attn_dp_size"] > 1 else 1,
        )
        self.stock.dispatching = getattr(self.stock, f"{method}_scheduler")
        self.stock.init_dispatcher()

    def route(self, count: int) -> None:
        """Pass on so many messages, as its event loop would."""
        for _ in range(count):
            assert self._socket.poll(WAIT_MS), "the tokenizer sends nothing"
            receive = getattr(io_struct, "sock_recv", None)
            self.stock._request_dispatcher(self._socket.recv_pyobj() if receive is None else receive(self._socket))

    def close(self) -> None:
        self._context.destroy(linger=0)
