"""What `shmcast doctor` reads: limits, mounts, settings, packages, leftovers. Each check is a function giving a `Line`.

Imports neither torch nor numpy, nor posix_ipc: what is missing is a line of the report, not the end of it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import resource
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from shmcast._layout import PAGE, RING_ENTRIES, control_size
from shmcast._reclaim import LEFT_OVER, Verdict, examine
from shmcast._room import SHM, cgroup_rooms, default_capacity, remedy, room
from shmcast.policy import read_environment

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

DOCKER_BYTES: Final = 64 << 20
"""What a container gets for /dev/shm unless it is told otherwise; also the step in which a writer grows."""
FEW_FILES: Final = 256
FIRST_USER: Final = 1000

_LARGER: Final = (
    "make it larger: docker run --shm-size=8g; in Kubernetes an emptyDir with medium: Memory, mounted at /dev/shm; "
    "else mount -o remount,size=8g /dev/shm"
)
_ODD: Final = {Verdict.NO_MAGIC, Verdict.OTHER_HEADER, Verdict.NOT_A_FILE, Verdict.UNCLEAR}


@dataclass(frozen=True)
class Line:
    """What one check found, what that means, and what to do about it, if anything."""

    status: Literal["ok", "warn", "fail"]
    found: str
    means: str
    todo: str = ""


def run(checks: Mapping[str, Callable[[], Line]]) -> dict[str, Line]:
    """Carry out each check; one that raises fails, and the others go on."""
    lines = {}
    for name, check in checks.items():
        try:
            lines[name] = check()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            lines[name] = Line("fail", text, "this could not be tried here", "see what the message names")
    return lines


def shared_memory(shm: str = SHM, mounts: Path = Path("/proc/self/mountinfo")) -> Line:
    """Is there a tmpfs, how large, how much of it is free."""
    none = "there is no shared memory: every group goes without, and every rank runs fn or gets bytes inline"
    try:
        fs = os.statvfs(shm)
    except OSError as error:
        return Line("fail", f"{shm}: {error.strerror}", none, f"mount -t tmpfs -o size=8g,mode=1777 tmpfs {shm}")
    kind = _filesystem(shm, mounts)
    size, free = fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize
    found = f"{kind} of {nice(size)}, {nice(free)} free"
    if fs.f_flag & os.ST_RDONLY or not os.access(shm, os.W_OK | os.X_OK):
        return Line("fail", f"{found}, not writable here", none, f"mount {shm} rw with mode=1777")
    if kind != "tmpfs":
        means = "what is written there may go to a disk, and it may not know how much it has free"
        return Line("warn", found, means, f"mount a tmpfs at {shm}")
    if size <= DOCKER_BYTES:
        means = "as small as Docker makes it: a request or two fill it, and the next fall back (full)"
        return Line("warn", found, means, _LARGER)
    return Line("ok", found, "writers make their segments here")


def writer() -> Line:
    """What a Writer takes that is told no capacity."""
    free, bound = room()
    capacity = default_capacity()
    found = f"up to {nice(capacity)} of {nice(free)} that can be reserved; bound by {bound}"
    if free < control_size(1, RING_ENTRIES) + 2 * PAGE:
        means = "not even an empty Writer fits: every group goes without shared memory (disabled)"
        return Line(
            "fail", found, means, f"free what {bound} counts, or raise it; shmcast gc removes what the dead left"
        )
    if capacity < DOCKER_BYTES:
        means = "large requests will fall back (full): a message and the one under way must fit"
        return Line("warn", found, means, f"raise what binds ({bound}), or pass a capacity and hold fewer results")
    return Line("ok", found, "the capacity of a Writer that is told none: a quarter, at most 2 GiB")


def queue(requests: int, nbytes: int) -> Line:
    """What so many requests of `nbytes` that wait with their inputs, and one that is being made, take of memory."""
    asked = read_environment().capacity
    capacity = default_capacity() if asked is None else asked
    free, bound = room()
    needed = (requests + 1) * -(-nbytes // PAGE) * PAGE
    found = f"{nice(needed)} for {requests} requests of {nice(nbytes)} and one that is being made"
    if needed > free:
        means = f"more than the {nice(free)} that {bound} leaves: what finds no room travels as without shmcast"
        return Line("warn", found, means, f"{remedy(bound)}; or queue less")
    if needed > capacity:
        means = f"more than the {nice(capacity)} of one writer: what finds no room travels as without shmcast"
        return Line("warn", found, means, f"set SHMCAST_CAPACITY={needed}")
    return Line("ok", found, f"within the {nice(capacity)} of one writer, which all ranks of a node share")


def memory_limit(proc: Path = Path("/proc/self")) -> Line:
    """The memory cgroup that leaves least."""
    rooms = cgroup_rooms(proc)
    if not rooms:
        return Line("ok", "no memory cgroup above this process has a limit", "only the machine's memory binds")
    free, bound = min(rooms)
    found = f"{nice(free)} left by {bound}, the least of {len(rooms)} with a limit"
    means = "shared memory counts there; a write past it is a kill, so shmcast reserves no more than is left"
    if free < DOCKER_BYTES:
        return Line("warn", found, f"{means}: next to nothing", "raise the container's memory limit, or use less")
    return Line("ok", found, means)


def environment() -> Line:
    """What the SHMCAST_ variables ask for."""
    asked = read_environment()
    found = ", ".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith("SHMCAST_"))
    if asked.disabled:
        means = "the whole group of a rank that has this goes without shared memory"
        return Line("warn", found, means, "unset SHMCAST_DISABLE unless you mean it")
    return Line("ok", found or "no SHMCAST_ variable is set", "read when a Broadcaster is made")


def open_files() -> Line:
    """RLIMIT_NOFILE: each mapping holds a descriptor or two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)}, at most {_limit(hard)}"
    means = "a segment takes two descriptors in each process that maps it, and blocks opened again one each"
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        return Line("warn", found, f"{means}; a rank without any falls back (open)", "ulimit -n 4096, or LimitNOFILE=")
    return Line("ok", found, means)


def address_space() -> Line:
    """RLIMIT_AS: segments are mapped whole."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return Line("ok", "unlimited", "each rank maps every segment of its writers whole")
    left = soft - int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    found = f"{nice(soft)}, {nice(max(0, left))} of it left in this process"
    means = "each rank maps every segment of its writers whole, beside what torch maps"
    if left < default_capacity():
        return Line("warn", found, f"{means}: less than a default Writer takes", "ulimit -v unlimited, or LimitAS=")
    return Line("ok", found, means)


def locked_memory() -> Line:
    """RLIMIT_MEMLOCK: nothing here locks; what others lock cannot be dropped."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = nice(soft) if soft != resource.RLIM_INFINITY else "unlimited"
    return Line("ok", found, "shmcast locks nothing; an engine that calls mlockall copies every page it maps from here")


def huge_pages(path: Path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")) -> Line:
    """Which pages shared memory gets."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return Line("ok", "this kernel has none for shared memory", "pages are as small as the processor has them")
    chosen = re.search(r"\[(\w+)\]", text)
    found = chosen[1] if chosen else text
    if found in ("always", "force", "within_size"):
        return Line("ok", found, "large pages where they fit: fewer faults at first touch; a private write copies more")
    means = "small pages, the default; blocks are used again, so that only the first touch of a page pays for it"
    return Line("ok", found, means, "nothing has to be done; within_size in that file tries large pages: measure it")


def remove_ipc(root: Path = Path("/"), uid: int | None = None) -> Line:
    """Whether systemd removes this user's names when he logs out."""
    uid = os.geteuid() if uid is None else uid
    if not (root / "run/systemd/system").is_dir():
        return Line("ok", "systemd does not run here", "nobody removes names at a logout")
    value, where = _remove_ipc(root)
    found = f"RemoveIPC={value} ({where})"
    if value == "no":
        return Line("ok", found, "nobody removes names at a logout")
    if uid < FIRST_USER:
        return Line("ok", f"{found}, uid {uid}", "systemd spares what root and system users have")
    means = f"when uid {uid} logs out for the last time, all its names go: readers that come later find no writer"
    todo = "RemoveIPC=no under [Login] in /etc/systemd/logind.conf.d/shmcast.conf, or loginctl enable-linger"
    return Line("warn", found, means, todo)


def package(name: str, below: int | None = None) -> Line:
    """Which version of a package is there; `below`: the first major version that was not tried. Imports nothing."""
    try:
        there = importlib.util.find_spec(name) is not None
    except ImportError:
        there = False
    if not there:
        return Line("fail", "not importable", f"shmcast needs {name}", f"pip install {name} for this interpreter")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Line("warn", "there, of unknown version", "its metadata is not installed", f"pip install {name}")
    least = _least(name)
    parts = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if parts < tuple(map(int, least.split("."))):
        return Line("fail", version, f"shmcast needs {name} {least} or newer", f"pip install '{name}>={least}'")
    if below is not None and parts[0] >= below:
        return Line(
            "warn", version, f"shmcast was not tried with {name} {below} or newer", f"pip install '{name}<{below}'"
        )
    return Line("ok", version, f"shmcast needs {least} or newer" + (f", below {below}" if below else ""))


def leftovers(folder: str = SHM) -> Line:
    """What `shmcast gc` would remove."""
    found = examine(folder)
    count = Counter(each.verdict for each in found)
    odd = sum(count[verdict] for verdict in _ODD)
    text = f"{count[Verdict.IN_USE]} names in use, {odd} unclear, {count[Verdict.OTHER_OWNER]} of other users"
    dead = [each for each in found if each.verdict in LEFT_OVER]
    if dead:
        nbytes = sum(each.nbytes for each in dead)
        means = "memory that nobody uses, and that stays taken until it is removed; the next Writer does that too"
        return Line("warn", f"{len(dead)} names of the dead, {nice(nbytes)}; {text}", means, "run shmcast gc")
    todo = "shmcast gc --dry-run tells what is unclear, and why" if odd else ""
    return Line("ok", f"nothing of the dead; {text}", "no memory is lost", todo)


def nice(nbytes: int) -> str:
    """So many bytes, for a person."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << power:
            return f"{nbytes / (1 << power):.1f} {unit}"
    return f"{nbytes} bytes"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _filesystem(folder: str, mounts: Path) -> str:
    """The kind of the file system that `folder` lies on: that of the last mount over the longest prefix."""
    kinds = {}
    for line in mounts.read_text().splitlines():
        fields = line.split(" ")
        kinds[fields[4]] = fields[fields.index("-") + 1]
    path = Path(os.path.realpath(folder))
    return next((kinds[str(p)] for p in (path, *path.parents) if str(p) in kinds), "an unknown file system")


def _least(name: str) -> str:
    """The oldest version that this library's metadata admits."""
    for line in importlib.metadata.requires("shmcast") or ():
        match = re.match(r"([\w.-]+?)\s*>=\s*([\d.]+)", line)
        if match and match[1].replace("-", "_").lower() == name:
            return match[2]
    return "0"


def _remove_ipc(root: Path) -> tuple[str, str]:
    """What logind was told, and where: the last of its files that says anything."""
    told = ("yes", "the default")
    for path in _logind_files(root):
        section = ""
        for line in path.read_text(errors="replace").splitlines():
            key, _, value = (part.strip() for part in line.partition("="))
            if line.strip().startswith("["):
                section = line.strip()
            elif section == "[Login]" and key == "RemoveIPC":
                # An empty value takes back what was said before.
                truth = "yes" if value.lower() in ("1", "yes", "y", "true", "t", "on") else "no"
                told = (truth, f"/{path.relative_to(root)}") if value else ("yes", "the default")
    return told


def _logind_files(root: Path) -> Iterator[Path]:
    """In the order in which they count: one main file, then the others by name; a folder hides those after it."""
    folders = [root / folder / "systemd" for folder in ("etc", "run", "usr/local/lib", "usr/lib")]
    yield from [path for folder in folders if (path := folder / "logind.conf").is_file()][:1]
    parts: dict[str, Path] = {}
    for folder in folders:
        for path in folder.glob("logind.conf.d/*.conf"):
            parts.setdefault(path.name, path)
    yield from (parts[name] for name in sorted(parts) if parts[name].is_file())
