"""What the environment asks of shmcast inside SGLang; the scheduler processes inherit it."""

from __future__ import annotations

import os
from dataclasses import dataclass

from shmcast.admission import DEFAULT_HELD_BYTES
from shmcast.policy import read_environment

MAX_WORKERS = 64
TRUE = ("1", "true", "yes", "y")
FALSE = ("0", "false", "no", "n")


@dataclass(frozen=True)
class Settings:
    """Read once a process; every rank must have the same.

    Attributes:
        on: `SHMCAST_SGLANG`, and not `SHMCAST_DISABLE`.
        admission: `SHMCAST_SGLANG_ADMISSION`: hold requests at the entry rank until their inputs are published.
        tokenizer: `SHMCAST_SGLANG_TOKENIZER`: the tokenizer publishes, the schedulers map.
        workers: `SHMCAST_SGLANG_WORKERS`: threads of an entry rank that make inputs.
        held_bytes: `SHMCAST_SGLANG_HELD_BYTES`: of raw inputs that an entry rank may hold; a request beyond it goes on
            as in stock.
        wait: `SHMCAST_SGLANG_WAIT`: seconds that a worker waits for shared memory until its request goes on as in
            stock. Nobody else waits with it.
        capacity: `SHMCAST_CAPACITY`: bytes of shared memory of an entry rank, None: as `Writer`.
        threshold: `SGLANG_MM_BROADCAST_THRESHOLD`: on the flag path, inputs with fewer bytes of tensors are made by
            every rank.
        draws_hashes: `SGLANG_MM_SKIP_COMPUTE_HASH`: SGLang draws a hash for each item instead of computing it.
    """

    on: bool
    admission: bool
    tokenizer: bool
    workers: int
    held_bytes: int
    wait: float
    capacity: int | None
    threshold: int
    draws_hashes: bool


def read_settings() -> Settings:
    """From the environment; `ValueError` names what is wrong."""
    environment = read_environment()
    return Settings(
        on=_flag("SHMCAST_SGLANG", False) and not environment.disabled,
        admission=_flag("SHMCAST_SGLANG_ADMISSION", True),
        tokenizer=_flag("SHMCAST_SGLANG_TOKENIZER", False),
        workers=_number("SHMCAST_SGLANG_WORKERS", 2, 1, MAX_WORKERS),
        held_bytes=_number("SHMCAST_SGLANG_HELD_BYTES", DEFAULT_HELD_BYTES, 0),
        wait=float(_number("SHMCAST_SGLANG_WAIT", 2, 0, 3600)),
        capacity=environment.capacity,
        threshold=_number("SGLANG_MM_BROADCAST_THRESHOLD", 0, 0),
        draws_hashes=_flag("SGLANG_MM_SKIP_COMPUTE_HASH", False),
    )


def is_on(name: str) -> bool:
    """Whether SGLang takes a variable of its own for true."""
    return _text(name) in TRUE


def hashes_in_gpu_buffer() -> bool:
    """Whether SGLang moves features through one GPU buffer to hash them."""
    return _text("SGLANG_MM_BUFFER_SIZE_MB") not in ("", "0")


def _text(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def _flag(name: str, default: bool) -> bool:
    text = _text(name)
    if text in ("", *TRUE, *FALSE):
        return text in TRUE if text else default
    raise ValueError(f"{name}={text!r}: 0 or 1")


def _number(name: str, default: int, least: int, most: int | None = None) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        raise ValueError(f"{name}={text!r}: a whole number, {least} " + (f"to {most}" if most else "or more"))
    return int(text)
