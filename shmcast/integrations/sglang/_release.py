"""What differs between releases of SGLang: where a rank stands, how inputs are made, how a bad request is said.

    0.5.5 to 0.5.9    inputs travel as a dict, `MultimodalInputs.from_dict`
    from 0.5.10       as a `MultimodalProcessorOutput`, `MultimodalInputs.from_processor_output`
    from 0.5.13       `SchedulerRequestReceiver` receives; before, `Scheduler.recv_requests`
    from 0.5.20       items are `msgspec.Struct`s; a bad request is that request's error, not the scheduler's end

All of it is found by looking at the classes, never by comparing version numbers.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

IDENTITY: Final = ("hash", "pad_value", "pad_values", "identity")
"""What making the inputs writes into the raw items of the rank that makes them."""

SUPPORTED: Final = "0.5.5 to 0.5.23"


class Unsupported(RuntimeError):
    """This release of SGLang, or the way it was started, is not one that shmcast can be switched on for."""


@dataclass(frozen=True)
class Release:
    """One release of SGLang, by what its classes have."""

    version: str
    scheduler: Any
    inputs: Any
    item: Any
    processed: Any
    image: Any
    single: tuple[Any, ...]
    batch: tuple[Any, ...]
    abort: Any
    session: tuple[Any, ...]
    refused: Any
    unwrap: Callable[[Any], Any]

    @property
    def makes_from_dict(self) -> bool:
        return hasattr(self.inputs, "from_dict")

    @property
    def request_errors(self) -> bool:
        """Whether one bad request ends as that request's error on all ranks; before 0.5.20 it ends the schedulers."""
        return self.refused is not None

    def maker(self, scheduler: Any) -> Callable[[Any], Any]:
        """The function from raw inputs to a `MultimodalInputs`, as `scheduler` would call it."""
        if self.makes_from_dict:
            return self.inputs.from_dict  # type: ignore[no-any-return]
        make = self.inputs.from_processor_output
        if "requires_mm_token_modalities" not in inspect.signature(make).parameters:
            return make  # type: ignore[no-any-return]
        wanted = scheduler.model_config.requires_mm_token_modalities
        return lambda raw: make(raw, requires_mm_token_modalities=wanted)

    def parts(self, request: Any) -> list[Any]:
        """The requests in what one receive gives: one, those of a batch, or none where it is no work."""
        if isinstance(request, self.batch):
            return list(request.batch)
        return [request] if isinstance(request, self.single) else []

    def raw_of(self, part: Any) -> Any:
        return getattr(part, _field(part))

    def set_raw(self, part: Any, raw: Any) -> None:
        setattr(part, _field(part), raw)

    def abort_of(self, abort: Any, part: Any) -> Any:
        """The same abort, of this request alone."""
        new = copy.copy(abort)
        new.rid, new.abort_all = part.rid, False
        return new

    def replica_of(self, part: Any) -> int | None:
        """The data parallel replica that a request names."""
        replica: int | None = getattr(part, _route(part), None)
        return replica

    def set_replica(self, part: Any, replica: int | None) -> None:
        setattr(part, _route(part), replica)

    @property
    def splits_batches(self) -> bool:
        """Whether the data parallel controller sends each request of a batch by itself.

        Before 0.5.10 it sends a batch as it sends what is no work: to every replica, or to the first.
        """
        controller = importlib.import_module("sglang.srt.managers.data_parallel_controller").DataParallelController
        return hasattr(controller, "dispatch_batch_generate")

    def items(self, raw: Any) -> list[Any]:
        """The items of raw inputs, or of made ones."""
        return raw["mm_items"] if isinstance(raw, dict) else raw.mm_items  # type: ignore[no-any-return]

    def with_items(self, raw: Any, items: list[Any]) -> Any:
        """The same raw inputs with other items, in a new object."""
        if isinstance(raw, dict):
            return raw | {"mm_items": items}
        new = copy.copy(raw)
        new.mm_items = items
        return new

    def carrier(self, feature: bytes) -> Any:
        """Raw inputs with nothing but this feature, which no processor gives: whole through pickle and msgpack."""
        items = [self.item(modality=self.image, feature=feature)]
        return {"mm_items": items} if self.makes_from_dict else self.processed(mm_items=items)

    @property
    def hides_raw(self) -> bool:
        """Whether raw inputs cross the socket pickled inside of what is not: from 0.5.17 to 0.5.19, without pickle."""
        part = SimpleNamespace(mm_inputs={}, mm_data_mooncake=None, time_stats=None)
        wrap = getattr(self.single[0], "wrap_pickle_fields", None)
        if wrap is not None:
            wrap(part)
        return bool(part.mm_inputs != {})

    def is_hashed(self, raw: Any) -> bool:
        """Whether making these inputs finds all of them hashed."""
        return all(item.hash is not None and item.pad_value is not None for item in self._valid(raw))

    def identities(self, raw: Any, made: Any) -> list[dict[str, Any]] | None:
        """By item, what making wrote into raw inputs; None where it did not keep to the items."""
        items = self._valid(raw)
        if len(items) != len(made.mm_items):
            return None
        self.write_back(raw, made)
        return [{name: getattr(item, name) for name in IDENTITY if hasattr(type(item), name)} for item in items]

    def set_identities(self, raw: Any, identities: list[dict[str, Any]] | None) -> None:
        """Write what another rank's `identities` gave into these raw inputs; None: nothing."""
        for item, identity in zip(self._valid(raw), identities or (), strict=False):
            for name, value in identity.items():
                setattr(item, name, value)

    def can_hold(self, raw: Any) -> bool:
        """Whether all tensors of raw inputs are on the CPU: what lies on a GPU, SGLang hands over itself."""
        return not any(_elsewhere(value) for item in self.items(raw) for value in _values(item))

    def write_back(self, raw: Any, inputs: Any) -> None:
        """Give this rank's raw items what the maker wrote into the entry rank's: the next pipeline stage reads it.

        A maker that splits items (`SGLANG_ENABLE_MM_SPLITTING`) writes into others.
        """
        items = self._valid(raw)
        for item, made in zip(items, inputs.mm_items, strict=True) if len(items) == len(inputs.mm_items) else ():
            for name in IDENTITY:
                if item is not made and hasattr(type(made), name):
                    setattr(item, name, getattr(made, name))

    def _valid(self, raw: Any) -> list[Any]:
        """The items that making the inputs keeps."""
        return [item for item in self.items(raw) if item.is_valid()]


def find_release() -> Release:
    """The release that is installed; `Unsupported` says what it lacks."""
    io = _module("sglang.srt.managers.io_struct")
    batch = _module("sglang.srt.managers.schedule_batch")
    scheduler = _module("sglang.srt.managers.scheduler")
    utils = _module("sglang.srt.managers.mm_utils")
    inputs = _attribute(batch, "MultimodalInputs")
    if not (hasattr(inputs, "from_dict") or hasattr(inputs, "from_processor_output")):
        raise unlike("MultimodalInputs has neither from_dict nor from_processor_output")
    cls = _attribute(scheduler, "Scheduler")
    check_method(cls, "_process_and_broadcast_mm_inputs", ["self", "raw_mm_inputs"])
    if not hasattr(cls, "recv_requests"):
        receiver = _module("sglang.srt.managers.scheduler_components.request_receiver")
        receiver_class = _attribute(receiver, "SchedulerRequestReceiver")
        check_method(receiver_class, "recv_requests", ["self"])
        if "recv_from_tokenizer" not in getattr(receiver_class, "__dataclass_fields__", {}):
            raise unlike("SchedulerRequestReceiver has no field recv_from_tokenizer")
        check_method(cls, "init_request_receiver", ["self"])
    return Release(
        version=str(getattr(_module("sglang.version"), "__version__", "of unknown version")),
        scheduler=cls,
        inputs=inputs,
        item=_attribute(batch, "MultimodalDataItem"),
        processed=getattr(batch, "MultimodalProcessorOutput", None),
        image=_attribute(batch, "Modality").IMAGE,
        single=(_attribute(io, "TokenizedGenerateReqInput"), _attribute(io, "TokenizedEmbeddingReqInput")),
        batch=(_attribute(io, "BatchTokenizedGenerateReqInput"), _attribute(io, "BatchTokenizedEmbeddingReqInput")),
        abort=_attribute(io, "AbortReq"),
        session=(_attribute(io, "OpenSessionReqInput"), _attribute(io, "CloseSessionReqInput")),
        refused=getattr(scheduler, "_MultimodalInputProcessingError", None),
        unwrap=getattr(utils, "unwrap_shm_features", lambda request: request),
    )


@dataclass(frozen=True)
class Place:
    """Where a rank stands: its pipeline stage, its replica under data-parallel attention, and in that its two ranks."""

    stage: int
    replica: int
    attn_cp: int
    attn_tp: int

    @property
    def receives(self) -> bool:
        """Whether this rank reads from the tokenizer: the entry rank of its replica."""
        return self.stage == self.attn_cp == self.attn_tp == 0


def place_of(scheduler: Any) -> Place:
    """Where this scheduler stands."""
    ranks = _ranks(scheduler)
    return Place(ranks.pp_rank, _replica(ranks), getattr(ranks, "attn_cp_rank", 0), ranks.attn_tp_rank)


def number_of(scheduler: Any) -> int:
    """This scheduler's replica, as SGLang's data parallel controller counts them."""
    ranks = _ranks(scheduler)
    number = getattr(ranks, "dp_rank", None)
    return _replica(ranks) if number is None else int(number)


def hears_aborts(scheduler: Any) -> bool:
    """Whether the entry rank of this scheduler's replica gets aborts from the tokenizer itself.

    Under data-parallel attention the first replica's does and broadcasts them to all, unless SGLang is told otherwise.
    """
    name = "enable_dp_attention_local_control_broadcast"
    ranks = _ranks(scheduler)
    local = getattr(scheduler.server_args, name, False) or getattr(ranks, name, False)
    return bool(local) or _replica(ranks) == 0


def world_group(scheduler: Any) -> Any:
    """The CPU group of all ranks of this scheduler's world."""
    group = getattr(scheduler, "world_group", None)
    return (_ranks(scheduler).world_group if group is None else group).cpu_group


def flag_group(scheduler: Any) -> Any:
    """The CPU group over which the stock flag path broadcasts; its first rank is the entry rank."""
    return scheduler.dp_tp_cpu_group if hasattr(scheduler, "dp_tp_cpu_group") else scheduler.cpu_group


def _ranks(scheduler: Any) -> Any:
    """0.5.5 to 0.5.12 keep ranks on the scheduler, later ones in `ps`, then in the runtime's context."""
    if hasattr(scheduler, "ps"):
        return scheduler.ps
    if hasattr(scheduler, "attn_tp_rank"):
        return scheduler
    return _module("sglang.srt.runtime_context").get_parallel()


def _replica(ranks: Any) -> int:
    value = getattr(ranks, "attn_dp_rank", 0)
    return 0 if value is None else int(value)


def _field(part: Any) -> str:
    return "mm_inputs" if hasattr(part, "mm_inputs") else "image_inputs"


def _route(part: Any) -> str:
    """Before 0.5.10 `data_parallel_rank`."""
    return "routed_dp_rank" if hasattr(part, "routed_dp_rank") else "data_parallel_rank"


def _values(item: Any) -> Iterable[Any]:
    yield item.feature
    yield item.precomputed_embeddings
    yield from (item.model_specific_data or {}).values()


def _elsewhere(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_elsewhere, value))
    return type(value).__name__.endswith("TransportProxy") or not getattr(value, "is_cpu", True)


def check_method(cls: Any, name: str, expected: list[str]) -> None:
    method = getattr(cls, name, None)
    if method is None:
        raise unlike(f"{cls.__name__} has no method {name}")
    found = list(inspect.signature(method).parameters)
    if found[: len(expected)] != expected:
        raise unlike(f"{cls.__name__}.{name} takes ({', '.join(found)}), not ({', '.join(expected)})")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise unlike(f"there is no module {error.name}") from error


def _attribute(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise unlike(f"{module.__name__} has no {name}")
    return getattr(module, name)


def unlike(what: str) -> Unsupported:
    return Unsupported(f"this SGLang does not look like {SUPPORTED}, nothing of it was replaced: {what}")
