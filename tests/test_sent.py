"""The index of a batch and inline messages: any object and any tensor in their place is a `LayoutError`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shmcast._codec import Allow, encode
from shmcast._layout import PAGE, Descriptor
from shmcast._sent import Sent, index_of, parse_index
from shmcast._wire import Handle, HeaderRoute, Reason
from shmcast.errors import LayoutError
from shmcast.transport import pack_inline, unpack_inline

ALLOW = Allow()
HANDLE = Handle(bytes(16), 0, Descriptor(0, PAGE, 64, 1), 1, 1, 1)
INLINE = pack_inline(encode([1, torch.ones(3)], ALLOW))
SENTS = [
    Sent(HeaderRoute.SHM, handle=HANDLE, leaves=4),
    Sent(HeaderRoute.RAW, handle=HANDLE),
    Sent(HeaderRoute.INLINE, Reason.FULL, inline=INLINE),
    Sent(HeaderRoute.LOCAL, Reason.THRESHOLD),
    Sent(HeaderRoute.NONE, Reason.RAISED, text="why"),
]


def test_an_index_comes_back() -> None:
    assert parse_index(index_of(SENTS), len(SENTS)) == SENTS


GOOD = (int(HeaderRoute.SHM), 0, bytes(HANDLE), None, "", 0)

BAD_ENTRIES: dict[str, Any] = {
    "a list": list(GOOD),
    "too short": GOOD[:5],
    "too long": (*GOOD, 0),
    "text": "sixsix",
    "a dict": dict.fromkeys(range(6)),
    "rows without end": torch.zeros(1).expand(2**40),
    "an array": np.arange(6),
    "a route of none": (9, *GOOD[1:]),
    "a route as bool": (True, *GOOD[1:]),
    "a route as tensor": (torch.tensor(1), *GOOD[1:]),
    "a reason of none": (1, 99, *GOOD[2:]),
    "a tensor for a handle": (1, 0, torch.arange(80), *GOOD[3:]),
    "an array for a handle": (1, 0, np.arange(80), *GOOD[3:]),
    "a list for a handle": (1, 0, [0] * 80, *GOOD[3:]),
    "text for a handle": (1, 0, "x" * 80, *GOOD[3:]),
    "a short handle": (1, 0, bytes(HANDLE)[:79], *GOOD[3:]),
    "a damaged handle": (1, 0, bytes(80), *GOOD[3:]),
    "no handle": (1, 0, b"", *GOOD[3:]),
    "a handle too many": (3, *GOOD[1:]),
    "inline of nothing": (2, 0, b"", None, "", 0),
    "inline of an array": (2, 0, b"", np.zeros(9, np.uint8), "", 0),
    "inline where none is": (3, 0, b"", INLINE, "", 0),
    "by pickle": (6, 0, b"", INLINE, "", 0),
    "text of bytes": (*GOOD[:4], b"", 0),
    "leaves of text": (*GOOD[:5], "0"),
    "leaves as bool": (*GOOD[:5], True),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_refuses_an_entry(name: str) -> None:
    assert parse_index([GOOD], 1)
    with pytest.raises(LayoutError):
        parse_index([GOOD, BAD_ENTRIES[name]], 2)


@pytest.mark.parametrize("index", [None, (), {}, "", torch.ones(2), [GOOD]])
def test_refuses_an_index(index: object) -> None:
    with pytest.raises(LayoutError):
        parse_index(index, 2)


@pytest.mark.parametrize(
    "tensor",
    [
        INLINE.bfloat16(),
        INLINE.to(torch.float32),
        INLINE.view(torch.int8),
        INLINE.view(1, -1),
        INLINE.repeat_interleave(2)[::2],
        torch.zeros(1, dtype=torch.uint8).expand(900),
        torch.zeros(1, dtype=torch.uint8).expand(2**40),
        torch.tensor(1, dtype=torch.uint8),
        INLINE[:0],
        INLINE[:-1],
    ],
    ids=["bfloat16", "float32", "int8", "2-D", "strided", "expanded", "vast", "0-D", "empty", "cut"],
)
def test_refuses_an_inline_message(tensor: torch.Tensor) -> None:
    assert unpack_inline(INLINE, ALLOW)
    with pytest.raises(LayoutError):
        unpack_inline(tensor, ALLOW)
