"""What a piece of code may leave behind in a process and on the machine, and whether it did.

`Snapshot.take()` before, `wait_until_clean(before)` after: the names of everything that is new and stays.
"""

import gc
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SHM = Path("/dev/shm")
OURS = ("shmcast-", "sem.shmcast-")
SETTLE_SECONDS = 5.0

_kept_pids: set[int] = set()
_kept_links: set[str] = set()


def keep_process(pid: int) -> None:
    """From now on the child `pid` is expected to stay: it belongs to a pool that outlives the tests."""
    _kept_pids.add(pid)


@contextmanager
def keeping_fds() -> Iterator[None]:
    """From now on what the block opens is expected to stay open."""
    before = set(_links())
    yield
    _kept_links.update(set(_links()) - before)


@dataclass(frozen=True)
class Snapshot:
    """What this process holds, and our names in /dev/shm, at one moment."""

    names: Counter[str]
    mappings: Counter[str]
    fds: Counter[str]
    threads: Counter[str]
    children: Counter[int]

    @classmethod
    def take(cls, *, rank: bool = False) -> "Snapshot":
        """Look at everything, or in a rank only at what is surely its own: a peer may hold names, the group sockets."""
        return cls(
            names=Counter() if rank else Counter(_names()),
            mappings=Counter(_mappings()),
            fds=Counter(link for link in _links() if not rank or link.startswith(f"{SHM}/")),
            threads=Counter(_threads()),
            children=Counter(_children()),
        )

    def new_since(self, before: "Snapshot") -> list[str]:
        """A line for each thing that is here and was not in `before`."""
        pairs = (
            ("name in /dev/shm", self.names - before.names),
            ("mapping of", self.mappings - before.mappings),
            ("open fd on", self.fds - before.fds),
            ("thread", self.threads - before.threads),
            ("child process", Counter(map(_describe, self.children - before.children))),
        )
        return [f"{kind} {what}{f' ({n} times)' if n > 1 else ''}" for kind, new in pairs for what, n in new.items()]


def wait_until_clean(before: Snapshot, *, rank: bool = False, seconds: float = SETTLE_SECONDS) -> list[str]:
    """Give finalizers and background threads up to `seconds`; return what is left over even then."""
    deadline = time.monotonic() + seconds
    never, pause = threading.Event(), 0.01
    while (left := _leftovers(before, rank)) and time.monotonic() < deadline:
        gc.collect()
        never.wait(pause)
        pause = min(2 * pause, 0.3)
    return left


def _leftovers(before: Snapshot, rank: bool) -> list[str]:
    multiprocessing.active_children()  # reaps those that ended
    now = Snapshot.take(rank=rank)
    foreign = {name for name in now.names - before.names if _held_by_strangers(name)}
    for name in foreign:
        del now.names[name]
    return now.new_since(before)


def _names() -> list[str]:
    """Our names in /dev/shm: by the library's prefix, and of this user."""
    found = []
    for entry in os.scandir(SHM):
        if entry.name.startswith(OURS):
            try:
                owner = entry.stat(follow_symlinks=False).st_uid
            except FileNotFoundError:
                continue
            if owner == os.getuid():
                found.append(entry.name)
    return found


def names_of_others() -> list[str]:
    """What else lies in /dev/shm."""
    return sorted(entry for entry in os.listdir(SHM) if not entry.startswith(OURS))


def _held_by_strangers(name: str) -> bool:
    """Whether a process outside this one's family uses /dev/shm/`name`, as a second test run on this machine would."""
    family = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    path = str(SHM / name)
    return any(pid not in family and _uses(pid, path) for pid in psutil.pids())


def _uses(pid: int, path: str) -> bool:
    try:
        if path in Path(f"/proc/{pid}/maps").read_text():
            return True
        return any(os.readlink(fd) == path for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def _mappings() -> set[str]:
    """Shared memory that this process has mapped, segments and semaphores, unlinked ones too."""
    text = Path("/proc/self/maps").read_text()
    lines = (line for line in text.splitlines() if f" {SHM}/" in line)
    return {line.split(maxsplit=5)[5].removesuffix(" (deleted)") for line in lines}


def _links() -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))
        except FileNotFoundError:  # the listing's own descriptor
            continue
    return [link for link in links if link not in _kept_links]


def _threads() -> list[str]:
    """Threads that would keep the process from ending, and all of the library's."""
    return [
        f"{thread.name!r}{' (daemon)' if thread.daemon else ''}"
        for thread in threading.enumerate()
        if not thread.daemon or thread.name.startswith("shmcast")
    ]


def _children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True) if child.pid not in _kept_pids]


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"{pid}: {' '.join(process.cmdline())[:200] or process.status()}"
    except psutil.NoSuchProcess:
        return f"{pid}: just ended"
