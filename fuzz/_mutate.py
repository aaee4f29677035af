"""Damages inputs: deterministic for a seed, aware of fields, no dependency."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from fuzz._target import Target

LONGEST: Final = 1 << 16
NUMBERS: Final = (
    *(0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 255, 256, 1023, 1024, 4095, 4096, 4097, 8192, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1),
)


class Mutator:
    """An endless stream of damaged inputs of one target."""

    def __init__(self, target: Target, seeds: Sequence[bytes], chance: Random) -> None:
        self._target = target
        self._seeds = seeds
        self._chance = chance

    def next(self) -> bytes:
        """One input: a seed, damaged once or a few times."""
        chance = self._chance
        data = self._seeds[self._below(len(self._seeds))]
        for _ in range(1 + (chance.random() < 0.4) + (chance.random() < 0.15) * self._below(6)):
            reshape = self._target.reshape
            if reshape is not None and chance.random() < 0.7:
                data = reshape(data, chance)
            else:
                data = _DAMAGES[self._below(len(_DAMAGES))](self, data)
        return data[:LONGEST]

    def _below(self, limit: int) -> int:
        return int(self._chance.random() * limit)

    def _number(self, size: int) -> bytes:
        number = NUMBERS[self._below(len(NUMBERS))]
        return (number % (1 << 8 * size)).to_bytes(size, "little")

    def flip(self, data: bytes) -> bytes:
        """One bit."""
        if not data:
            return b"\0"
        at = self._below(len(data))
        return data[:at] + bytes([data[at] ^ 1 << self._below(8)]) + data[at + 1 :]

    def byte(self, data: bytes) -> bytes:
        """One byte, anything."""
        at = self._below(len(data) + 1)
        return data[:at] + bytes([self._below(256)]) + data[at + 1 :]

    def word(self, data: bytes) -> bytes:
        """One integer of 2, 4 or 8 bytes anywhere, to a number at which things change."""
        size = (2, 4, 8)[self._below(3)]
        at = self._below(max(1, len(data) - size))
        return data[:at] + self._number(size) + data[at + size :]

    def field(self, data: bytes) -> bytes:
        """One field of the format: a number at which things change, the input's length, or a little more or less."""
        fields = self._target.fields
        if not fields:
            return self.word(data)
        at, size = fields[self._below(len(fields))]
        kind = self._below(3)
        found = int.from_bytes(data[at : at + size], "little")
        if kind == 0:
            new = self._number(size)
        elif kind == 1:
            new = ((found + self._below(9) - 4) % (1 << 8 * size)).to_bytes(size, "little")
        else:
            new = ((len(data) + self._below(130) - 65) % (1 << 8 * size)).to_bytes(size, "little")
        return data[:at] + new + data[at + size :]

    def cut(self, data: bytes) -> bytes:
        """The end is missing."""
        return data[: self._below(len(data) + 1)]

    def drop(self, data: bytes) -> bytes:
        """A run of bytes is missing."""
        at = self._below(len(data) + 1)
        return data[:at] + data[at + 1 + self._below(16) :]

    def repeat(self, data: bytes) -> bytes:
        """A run of bytes comes twice, or many times."""
        at, length = self._below(len(data) + 1), 1 + self._below(32)
        times = 1 if self._chance.random() < 0.8 else self._below(64)
        return data[:at] + data[at : at + length] * times + data[at:]

    def insert(self, data: bytes) -> bytes:
        """Foreign bytes in between, or behind."""
        at = self._below(len(data) + 1)
        return data[:at] + self._chance.randbytes(1 + self._below(16)) + data[at:]

    def splice(self, data: bytes) -> bytes:
        """A part of another seed in the place of a part of this one."""
        other = self._seeds[self._below(len(self._seeds))]
        start, end = sorted((self._below(len(other) + 1), self._below(len(other) + 1)))
        at = self._below(len(data) + 1) if self._chance.random() < 0.5 else start
        return data[:at] + other[start:end] + data[at + end - start :]

    def swap(self, data: bytes) -> bytes:
        """Two words change places."""
        size = (1, 4, 8)[self._below(3)]
        if len(data) < 2 * size:
            return data
        left, right = sorted((self._below(len(data) - size), self._below(len(data) - size)))
        if right - left < size:
            return data
        one, other = data[left : left + size], data[right : right + size]
        return data[:left] + other + data[left + size : right] + one + data[right + size :]


_DAMAGES: tuple[Callable[[Mutator, bytes], bytes], ...] = (
    Mutator.flip,
    Mutator.byte,
    Mutator.word,
    Mutator.field,
    Mutator.field,
    Mutator.field,
    Mutator.cut,
    Mutator.drop,
    Mutator.repeat,
    Mutator.insert,
    Mutator.splice,
    Mutator.swap,
)
