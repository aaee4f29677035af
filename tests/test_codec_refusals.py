"""What cannot be sent: an `EncodeError` that names the path and the reason, and never a crash or another error."""

from __future__ import annotations

import gc
import io
import pickle
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

from shmcast._codec import Allow, encode
from shmcast.errors import EncodeError, NotAllowed
from tests.support import codec_types as kinds
from tests.support.codec import round_trip, same

ALLOW = Allow(kinds.ALL)


class Subclass(torch.Tensor):
    pass


class ArraySubclass(np.ndarray):
    pass


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Table(dict):  # type: ignore[type-arg]
    pass


def sparse() -> torch.Tensor:
    return torch.eye(3).to_sparse()


def quantised() -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def freed() -> torch.Tensor:
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED: dict[str, tuple[Any, str]] = {
    "meta": (lambda: torch.ones(3, device="meta"), "on meta"),
    "sparse": (sparse, "sparse_coo"),
    "quantised": (quantised, "quantised"),
    "requires grad": (lambda: torch.ones(3, requires_grad=True), "requires grad"),
    "parameter": (lambda: torch.nn.Parameter(torch.ones(3)), "Parameter"),
    "frozen parameter": (lambda: torch.nn.Parameter(torch.ones(3), requires_grad=False), "Parameter"),
    "conj": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "conj"),
    "neg": (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "neg"),
    "tensor subclass": (lambda: torch.ones(3).as_subclass(Subclass), "subclass Subclass"),
    "storage freed": (freed, "freed"),
    "storage": (lambda: torch.ones(3).untyped_storage(), "UntypedStorage"),
    "generator": (lambda: torch.Generator(), "Generator"),
    "object array": (lambda: np.array([1, "a"], dtype=object), "dtype object"),
    "structured array": (lambda: np.zeros(2, "i4,f4"), "dtype"),
    "void array": (lambda: np.zeros(2, "V4"), "dtype"),
    "foreign byte order": (lambda: np.zeros(2, ">i4"), "byte order"),
    "array subclass": (lambda: np.zeros(2).view(ArraySubclass), "subclass ArraySubclass"),
    "masked array": (lambda: np.ma.masked_array([1, 2]), "subclass MaskedArray"),
    "void scalar": (lambda: np.void(b"abc"), "dtype"),
    "structured dtype": (lambda: np.dtype("i4,f4"), "dtype"),
    "function": (lambda: round_trip, "function"),
    "lambda": (lambda: lambda: None, "function"),
    "builtin": (lambda: len, "builtin"),
    "method": (lambda: [].append, "method"),
    "module": (lambda: sys, "module"),
    "class": (lambda: kinds.Item, "a class"),
    "builtin class": (lambda: int, "a class"),
    "open file": (lambda: io.BytesIO(b"x"), "BytesIO"),
    "lock": (threading.Lock, "lock"),
    "iterator": (lambda: iter([1]), "iterator"),
    "coroutine": (lambda: (index for index in range(3)), "generator"),
    "object": (object, "object"),
    "exception": (lambda: ValueError("x"), "ValueError"),
    "ellipsis": (lambda: ..., "ellipsis"),
    "not implemented": (lambda: NotImplemented, "NotImplementedType"),
    "memoryview": (lambda: memoryview(b"x"), "memoryview"),
    "pickle buffer": (lambda: pickle.PickleBuffer(b"x"), "PickleBuffer"),
    "text subclass": (lambda: Text("a"), "Text"),
    "int subclass": (lambda: Number(5), "Number"),
    "dict subclass": (lambda: Table(a=1), "Table"),
    "slice of text": (lambda: slice("a", "b"), "slice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_path_and_reason(name: str) -> None:
    make, reason = REFUSED[name]
    culprit = make()
    request = kinds.Request([kinds.Item(kinds.Kind.IMAGE), kinds.Item(kinds.Kind.IMAGE, feature={"a": [1, culprit]})])
    with pytest.raises(EncodeError) as caught:
        encode(request, ALLOW)
    assert str(caught.value).startswith('mm_items[1].feature["a"][1]: ')
    assert reason in str(caught.value)
    assert isinstance(caught.value, TypeError)


PATHS: dict[str, Any] = {
    "the object itself": lambda bad: bad,
    "[3]": lambda bad: [0, 1, 2, bad],
    '["a"][3]': lambda bad: {"a": [0, 1, 2, bad]},
    '["say \\"hi\\""]': lambda bad: {'say "hi"': bad},
    "[5][None]": lambda bad: {5: {None: bad}},
    "[(1, 2)]": lambda bad: {(1, 2): bad},
    "[1][0][0]": lambda bad: (0, ([bad],)),
    "{...}": lambda bad: {bad},
    ".keys()[1]": lambda bad: {"a": 1, bad: 2},
    'mm_items[0].model_specific_data["grid"]': lambda bad: kinds.Request(
        [kinds.Item(kinds.Kind.IMAGE, model_specific_data={"grid": bad})]
    ),
    "left": lambda bad: kinds.Slotted(bad),
    "right.left": lambda bad: kinds.Pair(1, kinds.Pair(bad)),
    "[0].feature": lambda bad: [kinds.Struct(feature=bad)],
    "only": lambda bad: kinds.BareStruct(bad),
}


@pytest.mark.parametrize("path", PATHS)
def test_paths(path: str) -> None:
    with pytest.raises(EncodeError) as caught:
        encode(PATHS[path](len), ALLOW)
    assert str(caught.value).removesuffix(": a builtin_function_or_method cannot be sent") == path.lstrip(".")


def test_extras_have_paths() -> None:
    item = kinds.Item(kinds.Kind.IMAGE)
    item.later = [len]  # type: ignore[attr-defined]
    with pytest.raises(EncodeError, match=r"^later\[0\]: "):
        encode(item, ALLOW)


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        (kinds.Kind.IMAGE, "codec_types.Kind"),
        (kinds.Frozen(1), "codec_types.Frozen"),
        (kinds.Pair(1), "codec_types.Pair"),
        (kinds.BareStruct(1), "codec_types.BareStruct"),
        (kinds.Plain(), "codec_types.Plain"),
        (kinds.Outer.Nested.ONE, "codec_types.Outer.Nested"),
    ],
)
def test_a_class_outside_the_allow_list(obj: Any, said: str) -> None:
    with pytest.raises(NotAllowed) as caught:
        encode({"a": obj}, Allow())
    text = str(caught.value)
    assert text.startswith('["a"]: ')
    assert said in text
    assert "allow=[" in text


def test_a_local_class() -> None:
    import enum

    class Local(enum.Enum):
        ONE = 1

    with pytest.raises(NotAllowed, match=r"<locals>.Local is not in the allow-list"):
        encode(Local.ONE, Allow([__name__]))


def cycles() -> dict[str, tuple[Any, str]]:
    ring: list[Any] = [1]
    ring.append(ring)
    table: dict[str, Any] = {}
    table["self"] = {"inner": table}
    through: list[Any] = []
    through.append((through,))
    plain: Any = kinds.Plain()
    plain.inner = [plain]
    item = kinds.Item(kinds.Kind.IMAGE)
    item.model_specific_data["owner"] = item
    return {
        "list": (ring, "[1]"),
        "dict": (table, '["self"]["inner"]'),
        "tuple": (through, "[0][0]"),
        "plain": (plain, "inner[0]"),
        "dataclass": (item, 'model_specific_data["owner"]'),
        "below": ([0, {"a": ring}], '[1]["a"][1]'),
    }


@pytest.mark.parametrize("name", list(cycles()))
def test_cycles(name: str) -> None:
    obj, path = cycles()[name]
    with pytest.raises(EncodeError, match="a cycle") as caught:
        encode(obj, ALLOW)
    assert str(caught.value) == f"{path}: a cycle"
    del obj, caught
    gc.collect()


def test_a_cycle_of_instances_is_noticed_at_once_and_not_by_running_out_of_stack() -> None:
    """Where somebody raised the recursion limit there is no RecursionError, only a crash."""
    allow = Allow(kinds.ALL)
    record, taken = allow.by_class(kinds.Plain), []
    take = record.take

    def counted(obj: Any) -> Any:
        taken.append(obj)
        return take(obj)

    record.take = counted
    plain: Any = kinds.Plain()
    plain.inner = {"a": (plain,)}
    with pytest.raises(EncodeError, match="a cycle"):
        encode(plain, allow)
    assert taken == [plain]
    del plain.inner


def test_sharing_is_no_cycle() -> None:
    shared = [1]
    value = {"a": shared, "b": [shared, {"c": shared}]}
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "wrap", [lambda inner: [inner], lambda inner: (inner,), lambda inner: {"a": inner}, kinds.Frozen]
)
def test_nested_too_deeply(wrap: Any) -> None:
    deep: Any = 0
    for _ in range(100_000):
        deep = wrap(deep)
    with pytest.raises(EncodeError, match="nested too deeply"):
        encode(deep, ALLOW)


def test_depth_in_reason_round_trips() -> None:
    deep: Any = 0
    for _ in range(100):
        deep = [(deep,)]
    assert same(round_trip(deep), deep)


def test_what_a_class_raises_is_an_encode_error() -> None:
    class Angry:
        def __getattribute__(self, name: str) -> Any:
            if name == "__dict__":
                raise RuntimeError("no")
            return object.__getattribute__(self, name)

    Angry.__qualname__ = "Angry"
    with pytest.raises(EncodeError, match="cannot be flattened") as caught:
        encode([Angry()], Allow([Angry]))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_refusal_leaves_nothing_alive() -> None:
    import weakref

    tensor = torch.ones(1000)
    alive = weakref.ref(tensor)
    with pytest.raises(EncodeError):
        encode([tensor, len], ALLOW)
    del tensor
    gc.collect()
    assert alive() is None
