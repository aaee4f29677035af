"""One rank of `shmcast doctor --ranks`: maps the probe segment and says so, or why not, on standard output."""

from __future__ import annotations

import sys

from shmcast._layout import PAGE, Kind, SegmentHeader
from shmcast._wire import Address


def look(token: bytes, word: bytes) -> str:
    """Map the segment of this token; `mapped` where `word` is in it, else what is wrong."""
    from shmcast._segment import attach

    address = Address(token, 0, 1)
    try:
        segment = attach(address.segment(0), SegmentHeader(Kind.ARENA, token, 0, 0, 0), "cow")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    same = segment.map[PAGE : PAGE + len(word)] == word
    segment.drop()
    return "mapped" if same else "mapped something else"


if __name__ == "__main__":
    print(look(bytes.fromhex(sys.argv[1]), bytes.fromhex(sys.argv[2])))
