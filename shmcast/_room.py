"""How much shared memory there is room for: what tmpfs has free, and what every memory cgroup above us leaves.

A write past a cgroup's limit is not an error, it is a kill: so the headroom is read before memory is reserved.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from shmcast._layout import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

SHM: Final = "/dev/shm"
UNLIMITED: Final = 1 << 60
MAX_CAPACITY: Final = 2 << 30


class Room(NamedTuple):
    """Bytes that can still be reserved, and what sets the bound."""

    free: int
    bound: str


def remedy(bound: str) -> str:
    """What a person can do where `bound`, that of a `Room`, leaves too little."""
    if bound.startswith(SHM):
        return (
            f"make {SHM} larger (docker run --shm-size, or mount -o remount,size=... {SHM}), or pass a lower capacity"
        )
    if bound == "MemAvailable":
        return "free memory on this machine, or pass a lower capacity"
    return "raise that limit, or pass a lower capacity"


class _Files(NamedTuple):
    """What one generation of cgroups calls its files."""

    limits: tuple[str, ...]
    usage: str
    inactive: str


V1: Final = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
V2: Final = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def room(shm: str = SHM, proc: Path = Path("/proc/self"), meminfo: Path = Path("/proc/meminfo")) -> Room:
    """The least of what tmpfs, memory and each cgroup leave; 0 and the reason where there is no tmpfs."""
    try:
        fs = os.statvfs(shm)
    except OSError as error:
        return Room(0, f"{shm}: {error.strerror}")
    try:
        return min(Room(fs.f_bavail * fs.f_frsize, shm), _memory(meminfo), *cgroup_rooms(proc))
    except OSError as error:
        return Room(0, f"a cgroup's limit, which cannot be read ({error.strerror}),")


def cgroup_rooms(proc: Path = Path("/proc/self")) -> list[Room]:
    """What each memory cgroup above us that has a limit leaves; `OSError` where one does not say."""
    lefts = ((folder, _left(files, folder)) for files, folder in _memory_cgroups(proc))
    return [Room(max(0, left), f"the memory limit of {folder}") for folder, left in lefts if left is not None]


def _memory(meminfo: Path) -> Room:
    """What the machine itself has left: a tmpfs may promise more than there is."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return Room(int(fields["MemAvailable"].split()[0]) << 10, "MemAvailable")
    except (OSError, ValueError, KeyError):
        return Room(UNLIMITED, "MemAvailable")


def _memory_cgroups(proc: Path) -> Iterator[tuple[_Files, Path]]:
    """Every memory cgroup that this process is charged to, innermost first."""
    try:
        memberships = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split(" ") for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError as error:
        _refuse_to_guess(error)
        return
    for _, controllers, path in memberships:
        files = V2 if not controllers else V1
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
            if kind == "cgroup2" if not controllers else kind == "cgroup" and "memory" in options:
                yield from ((files, folder) for folder in _ancestors(path, mount[3], Path(mount[4])))


def _ancestors(path: str, root: str, top: Path) -> Iterator[Path]:
    """The folder of cgroup `path` under the mount `top` of `root`, and its parents up to `top`."""
    prefix = root.rstrip("/") + "/"
    # Inside a cgroup namespace the path may lie outside what is mounted: then the mount's top is all that we see.
    inner = top / path[len(prefix) :] if path.startswith(prefix) else top
    while inner != top and top in inner.parents:
        yield inner
        inner = inner.parent
    yield top


def _left(files: _Files, folder: Path) -> int | None:
    """Limit less usage of one cgroup; page cache that the kernel can drop counts as free. None without a limit."""
    try:
        limits = [(folder / name).read_text().strip() for name in files.limits if (folder / name).exists()]
        limit = min((int(text) for text in limits if text != "max"), default=UNLIMITED)
        if limit >= UNLIMITED:
            return None
        usage = int((folder / files.usage).read_text())
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
        return limit - usage + int(stat.get(files.inactive, "0"))
    except OSError as error:
        _refuse_to_guess(error)
        return None
    except ValueError:
        return None


def _refuse_to_guess(error: OSError) -> None:
    """A file that is not there, or not for us, sets no limit that could be known; one that cannot be opened now may."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error


def default_capacity(writers: int = 1) -> int:
    """A quarter of what is free, at most 2 GiB, shared by the ranks that may write."""
    return max(2 * PAGE, min(room().free // 4, MAX_CAPACITY) // writers)
