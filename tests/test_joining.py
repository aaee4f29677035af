"""What ranks offer each other before they trust anything: any bytes in its place are a `LayoutError`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from shmcast._joining import Offer, join
from shmcast.errors import LayoutError

OFFER = Offer("digest", "shown", 1, 2**64 - 1, True, False, False, "00ff", "é", "")


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(bytes(OFFER)), **fields}).encode()


def test_an_offer_comes_back() -> None:
    assert Offer.parse(bytes(OFFER)) == OFFER
    assert Offer.parse(b"{}") == Offer()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"\xff",
        b"[" * 100_000,
        b"9" * 5000,
        changed(src=1.0),
        changed(src=True),
        changed(plane=2**64),
        changed(plane=-1),
        changed(settings=None),
        changed(other=1),
        bytes(OFFER).decode().encode("utf-16"),
        bytes(OFFER).decode().encode("utf-32"),
    ],
    ids=lambda raw: repr(raw[:12]),
)
def test_refuses_an_offer(raw: bytes) -> None:
    with pytest.raises(LayoutError, match=r"no offer of shmcast|another rank"):
        Offer.parse(raw)


class Exchange:
    """A control plane on which every other rank says the same."""

    def __init__(self, records: list[bytes]) -> None:
        self.records = records

    def exchange(self, record: bytes) -> list[bytes]:
        return [record, *self.records]


@pytest.mark.parametrize("src", [-1, 2, 2**70])
def test_refuses_an_entry_rank_that_is_not_in_the_group(src: int) -> None:
    control: Any = Exchange([changed(src=src)])
    with pytest.raises(LayoutError, match=f"rank 1 names entry rank {src} in a group of 2"):
        join(control, OFFER, lambda offers: "")
