"""What running `fn` everywhere costs against running it once: estimates by which `auto` chooses a route.

The measure is work, summed over all ranks: on a busy machine that is what throughput is made of. With n ranks,

    local   n * fn
    shm     fn + publish + (n - 1) * open

where opening is taken to cost what publishing costs without the copy: encode and decode, put and map mirror each other.
Estimates are medians of the last runs in a size class (powers of two of the raw inputs' bytes), apart for inputs that
carry their hashes: those have next to nothing left to do. A class that has too few runs takes its neighbour's, by the
byte. Until there are some, messages go through shared memory, and the first ones, into cold memory, do not count.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final, NamedTuple

KEPT: Final = 15
ENOUGH: Final = 3
COLD: Final = 3
EXPLORE: Final = 256
SMALL: Final = 64 << 10

# Until it was measured: a copy of 5 GB/s.
RATE: Final = 1 / 5e9


class Weight(NamedTuple):
    """What is known of a request before `fn` runs: bytes of its tensors, and whether its items carry their hashes."""

    nbytes: int
    hashed: bool

    @property
    def kind(self) -> tuple[bool, int]:
        """Its class."""
        return self.hashed, self.nbytes.bit_length()


class Costs:
    """Running estimates on the rank that publishes. One thread at a time."""

    def __init__(self, ranks: int) -> None:
        self._others = ranks - 1
        self._fn: dict[tuple[bool, int], deque[float]] = {}
        self._fixed: deque[float] = deque(maxlen=KEPT)
        self._rate: deque[float] = deque(maxlen=KEPT)
        self._lacked: deque[float] = deque(maxlen=KEPT)
        self._cold = COLD
        self._locals = 0
        self._decided: dict[tuple[bool, int], bool] = {}

    def saw_fn(self, weight: Weight, seconds: float) -> None:
        """`fn` took this long on a request."""
        self._decided.clear()
        self._fn.setdefault(weight.kind, deque(maxlen=KEPT)).append(seconds)

    def saw_publish(self, weight: Weight, travelled: int, seconds: float) -> None:
        """A message of `travelled` bytes that the other ranks lacked took this long to encode and put."""
        self._decided.clear()
        if self._cold:
            self._cold -= 1
            return
        if weight.nbytes:
            self._lacked.append(travelled / weight.nbytes)
        if travelled < SMALL:
            self._fixed.append(seconds)
        elif self._fixed:
            self._rate.append(max(seconds - median(self._fixed), 0.0) / travelled)
        else:
            self._fixed.append(max(seconds - travelled * RATE, 0.0))

    def chooses_local(self, weight: Weight) -> bool:
        """Whether every rank had better run `fn` itself. Every so often it says no all the same, to measure again."""
        local = self._decided.get(weight.kind)
        if local is None:
            local = self._decided[weight.kind] = self._decide(weight)
        self._locals += local
        return local and self._locals % EXPLORE != 0

    def _decide(self, weight: Weight) -> bool:
        fn = self._fn_time(weight)
        if fn is None or len(self._fixed) < ENOUGH:
            return False
        fixed = median(self._fixed)
        lacked = median(self._lacked) if self._lacked else 1.0
        rate = median(self._rate) if self._rate else RATE
        publish = fixed + lacked * weight.nbytes * rate
        return self._others * fn < publish + self._others * fixed

    def _fn_time(self, weight: Weight) -> float | None:
        """Seconds that `fn` is likely to take, None where too little is known."""
        enough = {kind: median(seen) for kind, seen in self._fn.items() if len(seen) >= ENOUGH}
        hashed, size = weight.kind
        same = [kind for kind in enough if kind[0] == hashed]
        if not same:
            return None
        nearest = min(same, key=lambda kind: abs(kind[1] - size))
        return enough[nearest] * (1.0 if hashed else 2.0 ** (size - nearest[1]))
