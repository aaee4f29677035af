"""One process that runs cases: its parent sees what it was at, however it ends."""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import struct
import sys
import time
from collections import Counter
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING, Any, Final

from fuzz import _tripwire
from fuzz._answers import Violation
from fuzz._mutate import LONGEST, Mutator
from fuzz.targets import load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fuzz._target import Target

CHUNK: Final = 1000
"""Cases that share one random generator, so that any of them can be made again without those before them."""
MEMORY: Final = 2 << 30
"""Address space that a worker may take beyond what it has when it starts."""
REPORT_EVERY: Final = 0.5
KEPT: Final = 5
"""Files written for one kind of violation."""

HEAD: Final = struct.Struct("<QQI")


class Ledger:
    """Memory shared with the parent: how many cases were begun and ended, and the bytes of the last one."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, HEAD.size + LONGEST)
        self._begun = self._ended = 0

    def begin(self, data: bytes) -> None:
        """Note a case before it runs."""
        self._begun += 1
        self._map[HEAD.size : HEAD.size + len(data)] = data
        HEAD.pack_into(self._map, 0, self._begun, self._ended, len(data))

    def end(self) -> None:
        """Note that it ended."""
        self._ended += 1
        struct.pack_into("<Q", self._map, 8, self._ended)

    def state(self) -> tuple[int, int, bytes]:
        """Cases begun, cases ended, the last case."""
        begun, ended, length = HEAD.unpack_from(self._map)
        return begun, ended, self._map[HEAD.size : HEAD.size + length]


class Session:
    """Runs cases of one target and tells the parent, through `pipe`, what came of them."""

    def __init__(self, target: Target, ledger: Ledger, pipe: int, findings: Path) -> None:
        self.target = target
        self._ledger = ledger
        self._pipe = pipe
        self._findings = findings
        self._outcomes: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._told = time.monotonic()
        self._bytes = 0

    def one(self, data: bytes) -> None:
        """Run one case."""
        self._ledger.begin(data)
        try:
            outcome = self.target.check(data)
        except Violation as violation:
            outcome = "VIOLATION"
            self._keep(data, str(violation))
        self._ledger.end()
        self._outcomes[outcome] += 1
        if not self._ledger._ended & 0xFF and time.monotonic() - self._told > REPORT_EVERY:
            self.report()

    def report(self, **more: Any) -> None:
        """Tell the parent what came of the cases since the last time."""
        os.write(self._pipe, json.dumps({"outcomes": self._outcomes, **more}).encode() + b"\n")
        self._outcomes.clear()
        self._told = time.monotonic()

    def _keep(self, data: bytes, text: str) -> None:
        kind = text[:40]
        self._kinds[kind] += 1
        if self._kinds[kind] <= KEPT:
            self.report(finding={"path": str(keep(self._findings, self.target.name, data)), "text": text[:500]})


def keep(folder: Path, target: str, data: bytes) -> Path:
    """Write an input to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{target}-{blake2b(data, digest_size=6).hexdigest()}"
    path.write_bytes(data)
    return path


def corpus_of(target: Target, folder: Path) -> list[bytes]:
    """What damage starts from: the library's own bytes, and the inputs that are kept."""
    home = folder / target.name
    kept = [path.read_bytes() for path in sorted(home.iterdir())] if home.is_dir() else []
    return [*target.seeds(), *kept]


def prepared(name: str) -> Target:
    """The target, its tripwire, and everything imported that error paths import on their first use."""
    _tripwire.install()
    target = load(name)
    mutator = Mutator(target, target.seeds(), Random(0))
    for data in (*target.seeds(), *(mutator.next() for _ in range(300))):
        try:
            target.check(data)
        except Violation:
            continue
    return target


def limit_memory() -> None:
    """Make a case that takes far too much memory fail instead of the machine."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def chunks_of(seed: int, target: Target, seeds: list[bytes], chunks: Iterator[int]) -> Iterator[Iterator[bytes]]:
    """The cases of each chunk."""
    for chunk in chunks:
        mutator = Mutator(target, seeds, Random(f"{seed}/{target.name}/{chunk}"))
        yield (mutator.next() for _ in range(CHUNK))


def mutate(session: Session, seeds: list[bytes], seed: int, chunks: Iterator[int], until: float) -> None:
    """Run the cases of these chunks, or as many of them as fit before `until`, a time of the monotonic clock."""
    for cases in chunks_of(seed, session.target, seeds, chunks):
        if time.monotonic() >= until:
            break
        for data in cases:
            session.one(data)
        session.report(chunk=True)


def guided(session: Session, corpus: Path, arguments: list[str], log: int) -> None:
    """Let atheris look for cases; never returns. What libFuzzer says goes to `log`."""
    import atheris

    os.dup2(log, 2)
    target = session.target
    mutator = Mutator(target, target.seeds(), Random(0))

    def damage(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, most))
        mutator._chance = Random(seed)
        mutator._seeds = [bytes(data) or b"\0"]
        return mutator.next()[:most]

    atheris.Setup([sys.argv[0], *arguments, str(corpus)], session.one, custom_mutator=damage)
    atheris.Fuzz()


def instrumented(name: str) -> Target:
    """The target, its parsers made to tell atheris where they were."""
    import atheris
    import torch  # noqa: F401 - before the instrumentation: only the library's own branches count

    _tripwire.install()
    with atheris.instrument_imports(include=["shmcast"]):
        load(name)
    return prepared(name)


def start() -> None:
    """What every worker does first."""
    faulthandler.enable()
