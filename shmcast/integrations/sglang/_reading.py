"""Reads a request from the tokenizer's socket: what SGLang's own reading gives, sooner, with `Pointer`s in it.

    bytes -> pickle: `ShmPointerMMData` -> `Pointer`; torch's storage of a small tensor -> its bytes, taken as they lie

A request with images has dozens of small tensors, grids and positions. torch pickles each as a file of its own, and
reading that back is 0.1 ms of the scheduler's thread: most of what taking a request in cost. Here that file, if it is
one plain storage of the CPU as torch writes it, is read by its form; any other one is torch's to read.
"""

from __future__ import annotations

import importlib
import io
import pickle
import re
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.storage import TypedStorage

from shmcast.integrations.sglang._pointers import MODULE, NAME, Pointer

if TYPE_CHECKING:
    from collections.abc import Callable

    Load = Callable[[int], Any]

DTYPES: Final = {
    b"BoolStorage": torch.bool,
    b"ByteStorage": torch.uint8,
    b"CharStorage": torch.int8,
    b"ShortStorage": torch.int16,
    b"IntStorage": torch.int32,
    b"LongStorage": torch.int64,
    b"HalfStorage": torch.float16,
    b"BFloat16Storage": torch.bfloat16,
    b"FloatStorage": torch.float32,
    b"DoubleStorage": torch.float64,
}
"""By the name under which torch pickles their storage; no dtype without one of its own."""

_BODY: Final = (
    rb"\x80\x02\(X\x07\0\0\0storageq\0ctorch\n(?P<name>\w+)\nq\x01X(?P<length>.{4})(?P<key>\d+)q\x02"
    rb"X\x03\0\0\0cpuq\x03[KMJ](?P<numel>(?<=K).|(?<=M)..|(?<=J).{4})Ntq\x04Q\.\x80\x02\]q\0X(?P=length)(?P=key)q\x01a\.(?P<count>.{8})"
)
"""What `torch.serialization._legacy_save` writes of one storage behind what it writes of every one: what it is, a list
with its key, and how many elements follow."""


def receive_with(socket: Any) -> Load:
    """How to read one request from a socket, with flags of zmq; as SGLang's own where requests are not pickled."""
    io_struct = importlib.import_module("sglang.srt.managers.io_struct")
    stock = getattr(io_struct, "sock_recv", None)
    if not getattr(io_struct, "_USE_PICKLE_IPC", True) or not hasattr(socket, "getsockopt"):
        return socket.recv_pyobj if stock is None else partial(stock, socket)
    return lambda flags: loads(socket.recv(flags))


def loads(data: bytes) -> Any:
    """As `pickle.loads`, which SGLang uses, with `Pointer`s."""
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _OWN.get((module, name)) or super().find_class(module, name)


def storage_of(data: bytes) -> Any:
    """What `torch.storage._load_from_bytes` gives."""
    found = _form().match(data)
    dtype = DTYPES.get(found["name"]) if found else None
    if found is None or dtype is None or not _fits(found, dtype):
        load: Any = torch.storage._load_from_bytes
        return load(data)
    memory = torch.empty(len(data) - found.end(), dtype=torch.uint8)
    memory.numpy()[:] = np.frombuffer(data, np.uint8, offset=found.end())
    return _typed(memory, dtype)


def _fits(found: re.Match[bytes], dtype: torch.dtype) -> bool:
    """Whether the key is as long as it says, and as many elements follow as it says, both times."""
    length, numel, count = (int.from_bytes(found[name], "little") for name in ("length", "numel", "count"))
    rest = len(found.string) - found.end()
    return length == len(found["key"]) and 0 < numel == count and numel * dtype.itemsize == rest


def tensor_of(
    storage: Any, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, metadata: Any = None
) -> Any:
    """What `torch._utils._rebuild_tensor_v2` gives."""
    if type(storage) is not TypedStorage or requires_grad or hooks or metadata:
        rebuild: Any = torch._utils._rebuild_tensor_v2
        return rebuild(storage, offset, size, stride, requires_grad, hooks, metadata)
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


def _typed(memory: torch.Tensor, dtype: torch.dtype) -> Any:
    """The storage of `memory`, as a pickle has it."""
    storage: Any = TypedStorage
    return storage(wrap_storage=memory.untyped_storage(), dtype=dtype, _internal=True)


@cache
def _form() -> re.Pattern[bytes]:
    """Of a pickled storage, as this torch writes it."""
    _, (data,) = _typed(torch.empty(1, dtype=torch.uint8), torch.uint8).__reduce__()
    stream = io.BytesIO(data)
    for _ in ("magic", "protocol", "machine"):
        pickle.load(stream)
    return re.compile(re.escape(data[: stream.tell()]) + _BODY, re.DOTALL)


_OWN: Final = {
    (MODULE, NAME): Pointer,
    ("torch.storage", "_load_from_bytes"): storage_of,
    ("torch._utils", "_rebuild_tensor_v2"): tensor_of,
}
