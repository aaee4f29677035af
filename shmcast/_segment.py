"""One named segment: created whole or not at all, attached after checks, unlinked by inode, forgotten by a fork."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import stat
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal
from weakref import WeakKeyDictionary, WeakSet

import posix_ipc

from shmcast._layout import PAGE, Kind, SegmentHeader, parse_segment, ring_offset, ring_size
from shmcast._named import MODE, open_memory, refused
from shmcast._pages import MADV_POPULATE_WRITE, address_of, populate, protect, unlock
from shmcast._room import SHM, remedy, room
from shmcast.errors import ArenaFull, LayoutError, PeerDied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Isolation = Literal["cow", "guard", "shared"]

STEP: Final = 64 << 20
MAX_PRIVATE: Final = 64

_maps: WeakKeyDictionary[mmap.mmap, tuple[int, int]] = WeakKeyDictionary()  # mapping -> (device, inode)
_segments: WeakSet[Segment] = WeakSet()
_unmapped: set[int] = set()  # descriptors of segments that have no mapping yet
_no_fork = threading.RLock()  # held by who adds to these, and by who forks


def isolation_of(isolation: Isolation | None, *, pin: bool) -> Isolation:
    """What these two arguments of a reader ask for together; `ValueError` where there is no such thing."""
    if isolation not in (None, "cow", "guard", "shared"):
        raise ValueError(f"isolation={isolation!r}: cow, guard or shared")
    if pin and isolation == "cow":
        raise ValueError(
            "pin=True with isolation='cow': registering takes a private copy of a copy-on-write map, which then never "
            "shows what the writer writes; leave isolation out, or ask for 'shared'"
        )
    if pin and isolation == "guard":
        raise ValueError(
            "pin=True with isolation='guard': CUDA registers no map that cannot be written to; leave isolation out, or "
            "ask for 'shared'"
        )
    return isolation or ("shared" if pin else "cow")


class Segment:
    """A mapped segment: its checked header, one mapping for good, one descriptor that holds the shared `flock`.

    Python's `mmap` holds a duplicate of the descriptor, so the `flock` lasts as long as the mapping does, and the
    mapping as long as the longest-lived tensor over it: a segment is dropped, never closed under its readers.
    """

    def __init__(self, name: str, header: SegmentHeader, fd: int, mapping: mmap.mmap) -> None:
        self.name = name
        self.header = header
        self.fd = fd
        self.map = mapping
        self.address = address_of(mapping)
        self._private: WeakSet[mmap.mmap] = WeakSet()
        _segments.add(self)

    def map_block(self, offset: int, length: int) -> mmap.mmap:
        """A private mapping of one block alone; beyond `MAX_PRIVATE`, as each takes a descriptor, a copy."""
        if len(self._private) >= MAX_PRIVATE:
            copy = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            done = 0
            while done < length:
                done += os.preadv(self.fd, [memoryview(copy)[done:]], offset + done)
            return copy
        mapping = _map(self.fd, length, mmap.MAP_PRIVATE, offset)
        self._private.add(mapping)
        return mapping

    def unlink(self) -> bool:
        """Remove the name if it still leads to this segment; whether that is done, and need not be tried again."""
        # By path: opening it would take a descriptor, of which there may be none left.
        try:
            if os.path.samestat(os.lstat(SHM + self.name), os.fstat(self.fd)):
                posix_ipc.unlink_shared_memory(self.name)
        except (OSError, posix_ipc.Error) as error:
            return isinstance(error, (FileNotFoundError, posix_ipc.ExistentialError))
        return True

    def drop(self) -> None:
        """Give up descriptor and mapping; the mapping goes when the last thing that lies in it goes."""
        if self.fd >= 0:
            os.close(self.fd)
            del self.map
        self.fd = -1


def create(name: str, header: SegmentHeader) -> Segment:
    """Make, reserve and map the segment that `header` describes, for its writer.

    Raises `ArenaFull` when there is no room, `OSError` when the system refuses; nothing is left behind then, nor by a
    SIGKILL in the middle: it has no name before it is complete and locked.
    """
    try:
        draft = _opened(lambda: os.open(SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, MODE))
    except FileNotFoundError:
        raise ArenaFull(f"{name}: there is no {SHM}; {header.size} bytes are wanted: mount a tmpfs there") from None
    except OSError as error:
        raise refused(error.errno or errno.EIO, SHM + name) from None
    try:
        os.fchmod(draft, MODE)
        fcntl.flock(draft, fcntl.LOCK_SH)
        _reserve(name, draft, header.size)
        first = bytearray(PAGE)
        header.write(first)
        os.pwrite(draft, first, 0)
        _link(draft, name)
        try:
            return _open_new(name, header)
        except BaseException:
            with suppress(OSError, posix_ipc.Error):
                posix_ipc.unlink_shared_memory(name)
            raise
    finally:
        _close(draft)


def _open_new(name: str, header: SegmentHeader) -> Segment:
    """Map what was linked: opened by its name, since /proc shows what it was opened as."""
    fd = _opened(lambda: open_memory(name))
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        mapping = _map(fd, header.size, mmap.MAP_SHARED)
        populate(mapping, MADV_POPULATE_WRITE)
    except BaseException:
        _close(fd)
        raise
    return Segment(name, header, fd, mapping)


def attach(name: str, expected: SegmentHeader, isolation: Isolation) -> Segment:
    """Map an arena segment of another process. `expected.size` is not compared: the creator decides it.

    Raises `PeerDied` when there is no such name, `LayoutError` when it is not what it should be, `OSError` when the
    system refuses.
    """
    fd, header = open_checked(name, expected)
    try:
        flags = mmap.MAP_PRIVATE if isolation == "cow" else mmap.MAP_SHARED
        mapping = _map(fd, header.size, flags)
        if isolation == "guard":
            protect(mapping)
    except BaseException:
        _close(fd)
        raise
    return Segment(name, header, fd, mapping)


def attach_ring(name: str, expected: SegmentHeader, reader: int) -> Segment:
    """Map one reader's ring of a control segment for writing, and nothing else of it; raises as `attach` does."""
    fd, header = open_checked(name, expected)
    try:
        mapping = _map(fd, ring_size(header.entries), mmap.MAP_SHARED, ring_offset(reader, header.entries))
    except BaseException:
        _close(fd)
        raise
    return Segment(name, header, fd, mapping)


def open_checked(name: str, expected: SegmentHeader) -> tuple[int, SegmentHeader]:
    """A descriptor of the segment called `name`, locked shared, and its header, known to be what we expect."""
    try:
        fd = _opened(lambda: open_memory(name))
    except FileNotFoundError:
        raise PeerDied(
            f"no segment {name}: rank {expected.rank}, its writer, is gone, or is in another mount or IPC namespace: "
            f"if it runs, give both one {SHM} (docker run --ipc), else make a new writer"
        ) from None
    try:
        # Never waits: whoever locks it exclusively is removing what a dead writer left.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return fd, _check(name, fd, expected)
    except BlockingIOError:
        _close(fd)
        raise PeerDied(f"{name} is being removed: rank {expected.rank}, its writer, is dead: make a new one") from None
    except BaseException:
        _close(fd)
        raise


def _check(name: str, fd: int, expected: SegmentHeader) -> SegmentHeader:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise LayoutError(f"{name} is not a regular file: uid {status.st_uid} put it there, remove it")
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != MODE:
        raise LayoutError(
            f"{name} belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}: not ours, of uid "
            f"{os.geteuid()} and mode {MODE:o}; run all ranks as one user"
        )
    header = parse_segment(os.pread(fd, PAGE, 0))
    if header.size != status.st_size:
        raise LayoutError(
            f"{name} has {status.st_size} bytes, its header says {header.size}: damaged, make a new writer"
        )
    if _identity(header) != _identity(expected):
        raise LayoutError(f"{name} is another segment than its name says: {header}; make a new writer")
    if expected.kind == Kind.CONTROL and header.readers != expected.readers:
        raise LayoutError(
            f"{name} serves {header.readers} readers, not {expected.readers}: take the address from its writer"
        )
    return header


def _identity(header: SegmentHeader) -> SegmentHeader:
    """Without what its creator decides."""
    return replace(header, size=0, readers=0, entries=0, slots=0)


def _link(fd: int, name: str) -> None:
    """Give a file without a name one, that nothing has."""
    # Given a directory's descriptor, Python follows the link to the file (AT_SYMLINK_FOLLOW); else it does not.
    folder = os.open(SHM, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.link(f"/proc/self/fd/{fd}", SHM + name, src_dir_fd=folder, follow_symlinks=True)
    except FileExistsError:
        raise refused(errno.EEXIST, SHM + name) from None
    finally:
        os.close(folder)


def _map(fd: int, size: int, flags: int, offset: int = 0) -> mmap.mmap:
    with _no_fork:
        mapping = mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        mapping.madvise(mmap.MADV_DONTFORK)
        if flags == mmap.MAP_PRIVATE:
            unlock(mapping)
        status = os.fstat(fd)
        _maps[mapping] = (status.st_dev, status.st_ino)
        _unmapped.discard(fd)
    return mapping


def _opened(opens: Callable[[], int]) -> int:
    """A descriptor that a forked child closes, also before there is a mapping that tells its inode."""
    with _no_fork:
        fd = opens()
        _unmapped.add(fd)
    return fd


def _close(fd: int) -> None:
    with _no_fork:
        _unmapped.discard(fd)
        os.close(fd)


def _reserve(name: str, fd: int, size: int) -> None:
    """Reserve every page, in steps: between two of them a cgroup's headroom may have shrunk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        # Past it comes no error but SIGXFSZ, where nobody has Python's way of ignoring that.
        raise ArenaFull(f"{name}: {size} bytes are wanted, RLIMIT_FSIZE allows a file {limit}: raise it (ulimit -f)")
    for offset in range(0, size, STEP):
        step = min(STEP, size - offset)
        free, bound = room()
        if free < step:
            raise ArenaFull(f"{name}: {step} of {size} bytes more are wanted, {bound} leaves {free}; {remedy(bound)}")
        try:
            os.posix_fallocate(fd, offset, step)
        except OSError as error:
            why = f"cannot reserve {size} bytes of shared memory: {error.strerror}; {bound} had {free} free"
            raise ArenaFull(f"{name}: {why}; {remedy(SHM)}") from error


def _forget() -> None:
    """In a forked child: no mapping, no descriptor, no lock of the parent is ours.

    The mappings are not there (MADV_DONTFORK), but their objects are, and freeing one would unmap whatever the child
    has at that address by then: they must never be freed. `mmap` hides its descriptor, so we look for the inodes.
    """
    _no_fork.release()
    for fd in _unmapped:
        os.close(fd)
    _unmapped.clear()
    inodes = set(_maps.values())
    for mapping in list(_maps):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))
    for segment in list(_segments):
        segment.fd = -1
    for fd in _descriptors() if inodes else ():
        with suppress(OSError):
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) in inodes:
                os.close(fd)


def _descriptors() -> Iterable[int]:
    """What may be open here; where no descriptor is left to look with, every number there is."""
    try:
        return [int(entry) for entry in os.listdir("/proc/self/fd")]
    except OSError:
        return range(os.sysconf("SC_OPEN_MAX"))


# The child has the lock that this thread took.
os.register_at_fork(before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_forget)
