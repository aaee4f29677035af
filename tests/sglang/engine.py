"""SGLang's own schedulers on a machine without a GPU: real classes, real methods, real sockets and groups, no model.

Importing this imports SGLang, with stand-ins for what only a GPU machine has: triton, which it only imports, the
kernels of old releases, and two declarations of torchvision's. A `Scheduler` is made without its constructor, which
loads a model, and given what receiving and making inputs use; its methods are the class's own.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import zmq

GPU_ONLY = ("triton", "sgl_kernel")


class _Stub(types.ModuleType):
    """A module in which every name exists: a class where it is capitalized, else one more such module."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []
        self.__version__ = "3.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = type(name, (Exception,), {"__init__": lambda self, *args, **kwargs: None})
        else:
            value = sys.modules.setdefault(f"{self.__name__}.{name}", _Stub(f"{self.__name__}.{name}"))
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else lambda function: function

    def __bool__(self) -> bool:
        return False


class _StubFinder:
    """Finds stubs for the modules of these packages."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
            if name.split(".")[0] in GPU_ONLY
            else None
        )

    def create_module(self, spec: Any) -> types.ModuleType:
        return sys.modules.get(spec.name) or _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        sys.modules[module.__name__] = module


def _import_sglang() -> None:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    if any(importlib.util.find_spec(name) is None for name in GPU_ONLY):
        sys.meta_path.insert(0, _StubFinder())
        triton: Any = importlib.import_module("triton")
        triton.cdiv = lambda a, b: -(a // -b)
        triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
        language: Any = importlib.import_module("triton.language")
        language.constexpr = type("constexpr", (), {"__init__": lambda self, value=None: setattr(self, "value", value)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for operator in ("nms", "qnms"):  # torchvision's own library, which declares them, is linked against CUDA
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        registry: Any = importlib.import_module("transformers.models.auto.configuration_auto")
        register = registry._LazyConfigMapping.register
        # Releases of before this transformers register configurations that it brings itself.
        registry._LazyConfigMapping.register = lambda self, key, value, exist_ok=False: register(
            self, key, value, exist_ok=True
        )
        importlib.import_module("sglang.srt.managers.scheduler")
        importlib.import_module("sglang.srt.managers.tokenizer_manager")


_import_sglang()

from sglang.srt.managers import io_struct, mm_utils, schedule_batch  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from sglang.version import __version__  # noqa: E402

VERSION = tuple(int(part) for part in __version__.split(".")[:3])
__all__ = [
    "FROM_DICT",
    "REQUEST_ERRORS",
    "VERSION",
    "Engine",
    "Group",
    "ServerArgs",
    "io_struct",
    "mm_utils",
    "schedule_batch",
]

FROM_DICT = hasattr(schedule_batch.MultimodalInputs, "from_dict")
REQUEST_ERRORS = hasattr(io_struct, "MMInputsProcessError")


class Group:
    """A group as SGLang's `GroupCoordinator` shows it."""

    def __init__(self, ranks: list[int], cpu_group: Any) -> None:
        self.ranks = ranks
        self.cpu_group = self.device_group = cpu_group  # 0.5.5 sends requests between stages by the latter
        self.rank = dist.get_rank()
        self.rank_in_group = ranks.index(self.rank)
        self.first_rank = ranks[0]
        self.world_size = len(ranks)

    @classmethod
    def of(cls, ranks: list[int]) -> Group:
        return cls(ranks, dist.new_group(ranks, backend="gloo", use_local_synchronization=True))


class Engine:
    """One rank's scheduler.

    `dp`: how many worlds there are, each of an equal share of the ranks. `pp`, `attn_dp`, `attn_cp`: sizes in a world;
    what is left of it is attention's tensor parallelism. `flag`: the server runs with
    --enable-broadcast-mm-inputs-process. `method`: of balancing the replicas' load.
    """

    def __init__(
        self,
        address: str,
        *,
        dp: int = 1,
        pp: int = 1,
        attn_dp: int = 1,
        attn_cp: int = 1,
        flag: bool = False,
        limit: int = -1,
        method: str = "round_robin",
    ) -> None:
        warnings.filterwarnings("ignore", module=r"sglang\.")
        self.rank = dist.get_rank()
        size = dist.get_world_size() // dp
        number, rank = divmod(self.rank, size)
        tp_size = size // pp
        attn_tp = tp_size // attn_dp // attn_cp
        stage, tp_rank = divmod(rank, tp_size)
        replica, in_replica = divmod(tp_rank, attn_tp * attn_cp)
        cp_rank, attn_tp_rank = divmod(in_replica, attn_tp)
        world = list(range(number * size, (number + 1) * size))
        stage_ranks = world[stage * tp_size : (stage + 1) * tp_size]
        attention = stage_ranks[replica * attn_cp * attn_tp : (replica + 1) * attn_cp * attn_tp]
        self.replicas = dp * attn_dp
        self.replica = number * attn_dp + replica
        self.ranks: dict[str, Any] = {
            "pp_rank": stage,
            "pp_size": pp,
            "tp_rank": tp_rank,
            "tp_size": tp_size,
            "attn_tp_rank": attn_tp_rank,
            "attn_tp_size": attn_tp,
            "attn_cp_rank": cp_rank,
            "attn_cp_size": attn_cp,
            "attn_dp_rank": replica,
            "attn_dp_size": attn_dp,
            "dp_rank": self.replica if self.replicas > 1 else None,
        }
        self.args = _server_args(self.ranks, rank, dp, flag, method)
        self.groups = {
            "world_group": Group.of(world) if dp > 1 else Group(world, dist.group.WORLD),
            "tp_group": Group.of(stage_ranks),
            "attn_tp_group": Group.of(attention[cp_rank * attn_tp : (cp_rank + 1) * attn_tp]),
            "attn_cp_group": Group.of(attention[attn_tp_rank::attn_tp]),
        }
        self.receives = stage == attn_tp_rank == cp_rank == 0
        self.context = zmq.Context()
        self._closing: list[Any] = []
        self.socket = self.rpc = None
        if self.receives:
            self.socket = self.context.socket(zmq.PULL)
            self.socket.bind(f"{address}-{self.replica}")
            self.rpc = self.context.socket(zmq.PULL)
            self.rpc.bind(f"{address}-{self.replica}-rpc")
        self.scheduler = self._make_scheduler(attn_dp > 1, limit)

    def close(self) -> None:
        self.context.destroy(linger=0)
        for undo in self._closing:
            undo()
        for group in self.groups.values():
            if group.cpu_group is not dist.group.WORLD:
                dist.destroy_process_group(group.cpu_group)

    def receive(self) -> list[Any]:
        """One tick's requests, by the scheduler's own way of receiving."""
        if hasattr(self.scheduler, "request_receiver"):
            return list(self.scheduler.request_receiver.recv_requests())
        return list(self.scheduler.recv_requests())

    def hand_on(self, received: list[Any]) -> None:
        """Send what the first of two pipeline stages handled to the second, over SGLang's own point-to-point."""
        from sglang.srt.utils import point_to_point_pyobj

        if self.ranks["pp_size"] == 2 and self.receives:
            next_stage = self.rank + self.ranks["tp_size"]
            point_to_point_pyobj(received, self.rank, self.groups["world_group"].cpu_group, self.rank, next_stage)

    def inputs(self, request: Any) -> Any:
        """A received request's `MultimodalInputs`, as its handling asks for them: None for text."""
        raw = getattr(request, "mm_inputs", getattr(request, "image_inputs", None))
        if raw is None:
            return None
        if hasattr(Scheduler, "_get_multimodal_inputs"):
            return self.scheduler._get_multimodal_inputs(raw)
        return self.scheduler._process_and_broadcast_mm_inputs(raw)

    def _make_scheduler(self, attn_dp_enabled: bool, limit: int) -> Any:
        scheduler = Scheduler.__new__(Scheduler)
        model = types.SimpleNamespace(is_multimodal=True, requires_mm_token_modalities=False)
        dp_tp = self.groups["attn_tp_group" if attn_dp_enabled else "tp_group"]
        scheduler.__dict__.update(
            server_args=self.args,
            model_config=model,
            recv_skipper=None,
            recv_from_tokenizer=self.socket,
            recv_from_rpc=self.rpc,
            input_blocker=None,
            mm_receiver=None,
            idle_sleeper=None,
            max_recv_per_poll=limit,
            enable_trace=False,
            last_batch=None,
        )
        if VERSION < (0, 5, 6):
            scheduler.__dict__.update(cpu_group=dp_tp.cpu_group, is_entry_rank=dp_tp.rank_in_group == 0)
        else:
            scheduler.__dict__.update(dp_tp_group=dp_tp, dp_tp_cpu_group=dp_tp.cpu_group)
        if VERSION < (0, 5, 13):
            scheduler.__dict__.update(self.ranks | self.groups)
            for name in ("tp_group", "attn_tp_group", "attn_cp_group"):
                setattr(scheduler, f"{name[:-6]}_cpu_group", self.groups[name].cpu_group)
            return scheduler
        return self._add_receiver(scheduler)

    def _add_receiver(self, scheduler: Any) -> Any:
        from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

        known = {field.name for field in dataclasses.fields(SchedulerRequestReceiver)}
        values: dict[str, Any] = {
            "recv_from_tokenizer": self.socket,
            "recv_from_rpc": self.rpc,
            "recv_skipper": None,
            "input_blocker": None,
            "mm_receiver": None,
            "server_args": self.args,
            "model_config": scheduler.model_config,
            "max_recv_per_poll": scheduler.max_recv_per_poll,
            "stream_output": lambda *args, **kwargs: None,
            "get_last_batch": lambda: None,
        }
        ps = types.SimpleNamespace(**self.ranks)
        if "ps" in known:
            scheduler.ps = ps
            values |= {"ps": ps} | self.groups
            for name in ("tp_group", "attn_tp_group", "attn_cp_group"):
                values[f"{name[:-6]}_cpu_group"] = self.groups[name].cpu_group
            scheduler.world_group = self.groups["world_group"]
        else:
            from sglang.srt.runtime_context import get_parallel

            get_parallel().override_permanently(**self.groups)
            self._closing.append(get_parallel().clear_stamp)
        self._set_globals()
        scheduler.request_receiver = SchedulerRequestReceiver(**{k: v for k, v in values.items() if k in known})
        return scheduler

    def _set_globals(self) -> None:
        """0.5.20 looks for attention's groups where `initialize_model_parallel` puts them."""
        from sglang.srt.distributed import parallel_state

        for name, group in (("_ATTN_TP", "attn_tp_group"), ("_ATTN_CP", "attn_cp_group")):
            if hasattr(parallel_state, name):
                setattr(parallel_state, name, self.groups[group])
                self._closing.append(partial(setattr, parallel_state, name, None))


def _server_args(ranks: dict[str, Any], rank: int, dp: int, flag: bool, method: str) -> Any:
    """`rank`: in its world."""
    attn_dp, attn_cp = ranks["attn_dp_size"], ranks["attn_cp_size"]
    values: dict[str, Any] = {
        "model_path": "dummy",
        "device": "cpu",
        "tp_size": ranks["tp_size"],
        "pp_size": ranks["pp_size"],
        "dp_size": dp * attn_dp,
        "load_balance_method": method,
        "enable_dp_attention": attn_dp > 1,
        "enable_broadcast_mm_inputs_process": flag,
    }
    if attn_cp > 1:
        values["attn_cp_size"] = attn_cp
    if VERSION < (0, 5, 6):  # which broadcasts always
        del values["enable_broadcast_mm_inputs_process"]
    args = ServerArgs(**values)
    if VERSION < (0, 5, 13):
        from sglang.srt.server_args import set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(args)
        return args
    from sglang.srt import runtime_context

    spawned: dict[str, Any] = {}
    if hasattr(runtime_context, "SpawnRanks"):
        spawned["ranks"] = runtime_context.SpawnRanks(world_rank=rank, dp_rank=ranks["dp_rank"], gpu_id=0)
    runtime_context.publish(args, role="scheduler", **spawned)
    return args
