"""Giving back, and writing over what was given back: a tensor that still shows its bytes holds them."""

import gc

import torch

from shmcast._layout import BLOCK, PAGE
from shmcast.errors import ArenaFull
from shmcast.transport import Reader, Writer
from tests.support.waiting import until


def overwrite_what_is_free(writer: Writer, value: int, size: int = 1 << 17) -> None:
    """Write `value` into every byte of the arena that no block holds; `size`: of the largest tensor to try."""
    kept = []
    while size >= PAGE:
        try:
            kept.append(writer.empty((size - BLOCK.size,), torch.uint8).fill_(value))
        except ArenaFull:
            size //= 2


def released(reader: Reader) -> None:
    """Wait until the reader has given everything back."""
    gc.collect()
    until(lambda: not reader.stats().leases_held, "the reader holds no lease")
