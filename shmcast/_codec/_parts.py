"""What the pickler is not left alone with: values with codes of their own, and all that cannot be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shmcast.errors import EncodeError

from . import _table
from ._classes import Values, kind_of
from ._geometry import MAX_DIMS, MAX_RANGE_BITS, extent, is_vast, refuse_numpy_dtype
from ._pieces import Span

if TYPE_CHECKING:
    from collections.abc import Callable


class Refusal(Exception):
    """Something inside the object that cannot be sent; its path is looked for once this is caught."""

    def __init__(self, culprit: object, reason: str, error: type[EncodeError] = EncodeError) -> None:
        super().__init__(reason)
        self.culprit = culprit
        self.reason = reason
        self.error = error


def _slice_parts(value: slice) -> Values:
    bounds = (value.start, value.stop, value.step)
    if not all(bound is None or type(bound) is int for bound in bounds):
        raise Refusal(value, "a slice of anything but ints cannot be sent")
    return (_table.SLICE, *bounds)


def _range_parts(value: range) -> Values:
    bounds = (value.start, value.stop, value.step)
    if is_vast(*bounds):
        raise Refusal(value, f"a range of ints of more than {MAX_RANGE_BITS} bits cannot be sent")
    return (_table.RANGE, *bounds)


BUILTINS: dict[type, Callable[[Any], Values]] = {
    complex: lambda value: (_table.COMPLEX, value.real, value.imag),
    slice: _slice_parts,
    range: _range_parts,
    torch.dtype: lambda value: (_table.DTYPE, str(value)),
    torch.Size: lambda value: (_table.SIZE, *value),
    torch.device: lambda value: (_table.DEVICE, str(value)),
}


def numpy_parts(value: Any) -> Values:
    """The code and the parts of a numpy scalar or dtype; raises `Refusal`."""
    dtype = value if isinstance(value, np.dtype) else value.dtype
    if isinstance(value, (np.str_, np.bytes_)) and type(value) in (np.str_, np.bytes_):
        return (_table.NUMPY_TEXT, value.item())
    reason = refuse_numpy_dtype(dtype)
    if reason or (value is not dtype and type(value).__module__ != "numpy"):
        raise Refusal(value, reason or f"a {type(value).__name__} cannot be sent")
    if value is dtype:
        return (_table.NUMPY_DTYPE, dtype.str)
    return (_table.NUMPY_SCALAR, dtype.str, value.tobytes())


def refuse_type(obj: object) -> str | None:
    """Why no instance of this type can be sent, or None."""
    cls = type(obj)
    if isinstance(obj, torch.nn.Parameter):
        return "a Parameter cannot be sent: pass .detach()"
    if isinstance(obj, torch.Tensor):
        return f"a tensor of the subclass {cls.__name__} cannot be sent"
    if isinstance(obj, np.ndarray):
        return f"an array of the subclass {cls.__name__} cannot be sent: pass np.asarray() of it"
    if isinstance(obj, type):
        return "a class cannot be sent, only its instances"
    return f"a {cls.__name__} cannot be sent" if kind_of(cls) is None else None


def refuse_tensor(tensor: torch.Tensor) -> str:
    """Why this tensor, which is not plain, cannot be sent."""
    if not tensor.is_cpu:
        return f"a tensor on {tensor.device} cannot be sent, only CPU tensors"
    if tensor.requires_grad:
        return "a tensor that requires grad cannot be sent: pass .detach()"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"a {'nested' if tensor.is_nested else tensor.layout} tensor cannot be sent, only dense ones"
    if tensor.is_conj() or tensor.is_neg():
        return "a tensor with the conj or neg bit cannot be sent: pass .resolve_conj() or .resolve_neg()"
    if tensor.dim() > MAX_DIMS:
        return f"a tensor of {tensor.dim()} dims cannot be sent"
    return f"a quantised tensor ({tensor.dtype}) cannot be sent"


def tensor_span(tensor: torch.Tensor) -> Span:
    """The bytes that a tensor with elements reaches; raises `Refusal` where its storage does not have them."""
    storage = tensor.untyped_storage()
    low, used = tensor.data_ptr(), tensor.nbytes
    high = low + used
    if not tensor.is_contiguous():
        high = low + (extent(tuple(tensor.shape), tensor.stride())[1] + 1) * tensor.itemsize
    start = storage.data_ptr()
    if low < start or high > start + storage.nbytes():
        raise Refusal(tensor, "its storage has been freed or cut short")
    return Span(low, high, used, storage._cdata, storage)
