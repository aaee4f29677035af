"""Pages of a mapping: which of them are private copies, how to drop those, how to make pages read-only.

A `MAP_PRIVATE` mapping shows the writer's later bytes only where this process never wrote. Before a block goes
back to its writer, every page of it that was copied must be dropped, or the next message would read stale.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from typing import Final, Literal

from shmcast._layout import PAGE

MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23

# struct pm_scan_arg and its categories, include/uapi/linux/fs.h (Linux 6.7).
PAGEMAP_SCAN: Final = 0xC0606610
SCAN_ARG: Final = struct.Struct("<12Q")
REGION_BYTES: Final = 24
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4

# /proc/self/pagemap, Documentation/admin-guide/mm/pagemap.rst.
PM_FILE: Final = 1 << 61
PM_SWAPPED: Final = 1 << 62
PM_PRESENT: Final = 1 << 63

_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.madvise, _libc.mprotect, _libc.munlock):
    _call.restype = ctypes.c_int
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def address_of(mapping: mmap.mmap) -> int:
    """Where a writable mapping starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def protect(mapping: mmap.mmap) -> None:
    """Make the pages of `mapping` read-only. The object still calls itself writable, so that torch does not warn."""
    if _libc.mprotect(address_of(mapping), len(mapping), mmap.PROT_READ):
        code = ctypes.get_errno()
        raise OSError(code, f"mprotect: {os.strerror(code)}")


def populate(mapping: mmap.mmap, advice: int) -> bool:
    """Map the pages now, not at their first touch; False for a kernel (before 5.14) that will map them then."""
    return _advise(address_of(mapping), len(mapping), advice)


def unlock(mapping: mmap.mmap) -> None:
    """Undo what `mlockall(MCL_FUTURE)` did to a new private mapping: it copied every page, and would do so again."""
    address = address_of(mapping)
    _libc.munlock(address, len(mapping))
    _advise(address, len(mapping), mmap.MADV_DONTNEED)


def _advise(address: int, size: int, advice: int) -> bool:
    """`madvise`, but not the method of `mmap`: that one holds the GIL while the kernel fills or drops pages."""
    return int(_libc.madvise(address, size, advice)) == 0


class PrivatePages:
    """Asks the kernel for private copies of pages in this process, and drops them."""

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def source(self, address: int, size: int) -> Literal["PAGEMAP_SCAN", "pagemap", "none"]:
        """What of the kernel answers `exist` for these pages."""
        if self._fd < 0:
            return "none"
        try:
            self._scan(address, size)
        except OSError:
            return "none" if self._words(address, size) is None else "pagemap"
        return "PAGEMAP_SCAN"

    def exist(self, address: int, size: int) -> bool:
        """Whether any page of `[address, address + size)` may be a private copy; yes where the kernel does not say."""
        if self._fd < 0:
            return True
        try:
            return self._scan(address, size)
        except OSError:
            return self._read(address, size)

    def drop(self, address: int, size: int) -> bool:
        """Drop private copies in `[address, address + size)`, which is mapped; False if they stay."""
        if not self.exist(address, size) or _advise(address, size, mmap.MADV_DONTNEED):
            return True
        # Locked pages (mlock, mlockall) are not dropped until they are unlocked.
        _libc.munlock(address, size)
        return _advise(address, size, mmap.MADV_DONTNEED)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _scan(self, address: int, size: int) -> bool:
        region = ctypes.create_string_buffer(REGION_BYTES)
        # Not file-backed, and present or swapped; one such page is enough.
        found = (1, PAGE_IS_FILE, PAGE_IS_FILE, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, PAGE_IS_PRESENT)
        arg = SCAN_ARG.pack(SCAN_ARG.size, 0, address, address + size, 0, ctypes.addressof(region), 1, *found)
        regions: int = fcntl.ioctl(self._fd, PAGEMAP_SCAN, bytearray(arg), True)
        return regions > 0

    def _read(self, address: int, size: int) -> bool:
        raw = self._words(address, size)
        return raw is None or any(
            word & PM_SWAPPED or (word & PM_PRESENT and not word & PM_FILE) for (word,) in struct.iter_unpack("<Q", raw)
        )

    def _words(self, address: int, size: int) -> bytes | None:
        """One word a page; None where the kernel gives none."""
        try:
            raw = os.pread(self._fd, size // PAGE * 8, address // PAGE * 8)
        except OSError:
            return None
        return raw if len(raw) == size // PAGE * 8 else None
