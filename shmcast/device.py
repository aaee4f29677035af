"""A message's tensors copied to a GPU while the caller goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import torch

from shmcast import _copies
from shmcast._codec import map_tensors, runs_of, tensor_over

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def to_device(obj: T, device: torch.device | str | int, stream: torch.cuda.Stream | None = None) -> T:
    """`obj` with its tensors on a CUDA device. Returns once the copies are queued, not once they are done.

    Goes through dicts, lists, tuples, sets, dataclasses, NamedTuples, `msgspec.Struct`s and plain classes, and rebuilds
    what holds a tensor as `open` does; `obj` stays as it is, and shares the rest with the result. Tensors keep dtype,
    shape, strides, and share memory as they did: bytes that several of them reach are copied once, into one storage.
    A lone strided view that reaches over more than twice its own bytes arrives contiguous. numpy arrays stay on the
    CPU, as they are; `torch.from_numpy` first makes tensors of them without a copy.

    The copies read shared memory until they are done: so long the message is held, also when `obj` is dropped at once.
    They overlap with other work only from a reader with `pin=True`.

    Args:
        obj: an object as `open`, `broadcast`, `materialize` or `take` give it, or any other of such parts.
        device: a CUDA device; without an index the current one.
        stream: of this device; default its current stream. The copies are queued on it, so work on it may use the
            result at once; other streams must wait for it, and `Tensor.record_stream` tells the allocator.

    Raises:
        ValueError: not a CUDA device, or a stream of another device.
        EncodeError: `obj` holds itself.
        RuntimeError, AssertionError: as torch raises them: no CUDA, no memory on the device.
    """
    index = _index_of(device)
    if stream is not None and stream.device_index != index:
        raise ValueError(f"stream is of cuda:{stream.device_index}, device is cuda:{index}: they must be the same")
    tensors: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        return tensors.setdefault(id(tensor), tensor)

    map_tensors(obj, note)
    with torch.cuda.device(index), torch.cuda.stream(stream):
        copied = _copy(list(tensors.values()), index)
    return cast("T", map_tensors(obj, lambda tensor: copied[id(tensor)]))


def _index_of(device: torch.device | str | int) -> int:
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        raise ValueError(f"device={str(device)!r}: a CUDA device, such as 'cuda' or 'cuda:1'")
    return torch.cuda.current_device() if found.index is None else found.index


def _copy(tensors: list[Tensor], index: int) -> dict[int, Tensor]:
    """Queue the copies on the current stream; the copy of each tensor by its id."""
    runs, others = runs_of(tensors)
    target = torch.device("cuda", index)
    copied: dict[int, Tensor] = {}
    sources = [*(piece.source for piece, _ in runs), *(tensor for tensor in others if tensor.is_cpu)]
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
    try:
        for piece, placed in runs:
            memory = torch.empty(piece.lead + piece.source.numel(), dtype=torch.uint8, device=target)
            memory[piece.lead :].copy_(piece.source, non_blocking=True)
            for tensor, offset in placed:
                shape, strides = tuple(tensor.shape), tensor.stride()
                copied[id(tensor)] = tensor_over(memory, tensor.dtype, offset, shape, strides)
        for tensor in others:
            copied[id(tensor)] = tensor.to(target, non_blocking=True)
    finally:
        # Also where one of them raised: those before it are under way.
        if sources:
            event.record()
            _copies.hold(_copies.Copy(event, index, sources))
    return copied
