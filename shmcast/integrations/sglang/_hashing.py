"""An entry rank's items hashed side by side, before SGLang's maker asks for each in turn: SHA-256 frees the GIL.

SGLang does the same in its tokenizer (`SGLANG_MM_PRECOMPUTE_HASH`): an item that has its hash is not hashed again.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shmcast import _threads
from shmcast.integrations.sglang._leaves import FEATURES, leaves_of, nbytes_of
from shmcast.integrations.sglang._settings import hashes_in_gpu_buffer, is_on

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcast.integrations.sglang._release import Release


class Hashing:
    """A maker whose items are hashed by several threads. Safe to use from any thread.

    Args:
        release: of SGLang.
        make: the release's maker, which hashes what is not.
    """

    def __init__(self, release: Release, make: Callable[[Any], Any]) -> None:
        self._release = release
        self._make = make
        self._pool = _threads.few("shmcast-hashing")

    def __call__(self, raw: Any) -> Any:
        items = [item for item in self._release.items(raw) if item.hash is None and item.is_valid()]
        if len(items) > 1 and self._release.can_hold(raw):
            self._hash(items)
        return self._make(raw)

    def _hash(self, items: list[Any]) -> None:
        """What of them can be; the maker does the rest, and raises what they raise."""
        items.sort(key=_nbytes, reverse=True)  # a long one that comes last would leave the other threads idle
        with suppress(RuntimeError):  # there is no thread to be had
            for done in [self._pool.submit(item.set_pad_value) for item in items]:
                with suppress(Exception):
                    done.result()

    def close(self) -> None:
        self._pool.shutdown()


def _nbytes(item: Any) -> int:
    return sum(map(nbytes_of, leaves_of(item, FEATURES)))


def splits_or_moves() -> bool:
    """Whether SGLang is told to hash other items than the raw ones, or elsewhere: then it does so alone."""
    return hashes_in_gpu_buffer() or is_on("SGLANG_ENABLE_MM_SPLITTING")
