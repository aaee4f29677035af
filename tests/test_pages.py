"""Private copies of pages: found by either way to ask the kernel, dropped also where locked, assumed where unsure."""

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from shmcast import _pages
from shmcast._layout import PAGE
from shmcast._pages import PrivatePages, address_of

PAGES = 16
SIZE = PAGES * PAGE


def _says(word: str) -> bool:
    """Whether this kernel can tell which pages are private copies, by the scan or by the file."""
    try:
        with open("/proc/self/pagemap", "rb") as pagemap:
            if word == "file":
                return bool(pagemap.read(8))
            region = ctypes.create_string_buffer(24)
            arg = struct.pack("<12Q", 96, 0, 0, PAGE, 0, ctypes.addressof(region), 1, 1, 0, 0, 8, 8)
            fcntl.ioctl(pagemap, 0xC0606610, bytearray(arg), True)
            return True
    except OSError:
        return False


WAYS = [
    pytest.param(way, marks=pytest.mark.skipif(not _says(way), reason="this kernel does not say"))
    for way in ("scan", "file")
]


class Twin:
    """One file of `PAGES` pages, seen by its writer and, through a private mapping, by a reader."""

    def __init__(self) -> None:
        fd = os.memfd_create("pages")
        os.ftruncate(fd, SIZE)
        self.writer = mmap.mmap(fd, SIZE)
        self.private = mmap.mmap(fd, SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        self.address = address_of(self.private)

    def publish(self, value: int) -> None:
        self.writer[:] = bytes([value]) * SIZE

    def seen(self) -> list[int]:
        """The first byte of each page, as the reader sees it."""
        return [self.private[page * PAGE] for page in range(PAGES)]


@pytest.fixture
def twin() -> Iterator[Twin]:
    made = Twin()
    made.publish(1)
    yield made
    made.private.close()
    made.writer.close()


@pytest.fixture
def pages() -> Iterator[PrivatePages]:
    made = PrivatePages()
    yield made
    made.close()


def refuse_ioctl(*_: object) -> None:
    raise OSError(errno.ENOTTY, "no such ioctl")


@pytest.fixture(params=WAYS)
def asking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, pages: PrivatePages) -> PrivatePages:
    """Asks by the scan, or as on a kernel before 6.7."""
    if request.param == "file":
        monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    else:
        monkeypatch.setattr(pages, "_read", pytest.fail)
    return pages


def test_a_private_page_is_stale(twin: Twin) -> None:
    twin.private[3 * PAGE] = 9
    twin.publish(2)
    assert twin.seen() == [2, 2, 2, 9, *[2] * (PAGES - 4)]


def test_untouched_pages_are_not_private(twin: Twin, asking: PrivatePages) -> None:
    assert not asking.exist(twin.address, SIZE)


def test_read_pages_are_not_private(twin: Twin, asking: PrivatePages) -> None:
    assert twin.seen() == [1] * PAGES
    assert not asking.exist(twin.address, SIZE)


def test_populated_pages_are_not_private(twin: Twin, asking: PrivatePages) -> None:
    _pages.populate(twin.private, 22)
    assert not asking.exist(twin.address, SIZE)


@pytest.mark.parametrize("page", [0, 7, PAGES - 1])
def test_finds_the_one_private_page_and_only_in_its_range(twin: Twin, asking: PrivatePages, page: int) -> None:
    twin.private[page * PAGE + 17] = 9
    assert asking.exist(twin.address, SIZE)
    answers = [asking.exist(twin.address + i * PAGE, PAGE) for i in range(PAGES)]
    assert answers == [i == page for i in range(PAGES)]


def test_a_write_by_the_kernel_is_found_too(twin: Twin, asking: PrivatePages) -> None:
    inside, outside = os.pipe()
    os.write(outside, b"kernel")
    os.readv(inside, [memoryview(twin.private)[5 * PAGE : 5 * PAGE + 6]])
    os.close(inside)
    os.close(outside)
    assert twin.private[5 * PAGE : 5 * PAGE + 6] == b"kernel"
    assert [asking.exist(twin.address + i * PAGE, PAGE) for i in (4, 5, 6)] == [False, True, False]


def test_dropped_pages_show_the_writer_again(twin: Twin, asking: PrivatePages) -> None:
    for page in (2, 3, 11):
        twin.private[page * PAGE] = 9
    assert asking.drop(twin.address + 2 * PAGE, 2 * PAGE)
    twin.publish(2)
    assert twin.seen() == [2] * 11 + [9] + [2] * (PAGES - 12)
    assert asking.drop(twin.address, SIZE)
    assert twin.seen() == [2] * PAGES
    assert not asking.exist(twin.address, SIZE)


def test_nothing_is_dropped_where_nothing_is_private(
    twin: Twin, asking: PrivatePages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pages, "_advise", pytest.fail)
    assert asking.drop(twin.address, SIZE)


def mlock(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        pytest.skip(f"mlock: {os.strerror(ctypes.get_errno())}")


def test_locked_pages_are_private_and_are_dropped(twin: Twin, asking: PrivatePages) -> None:
    mlock(twin.address, 4 * PAGE)
    assert [asking.exist(twin.address + i * PAGE, PAGE) for i in (0, 3, 4)] == [True, True, False]
    twin.publish(2)
    assert twin.seen()[:5] == [1, 1, 1, 1, 2]
    assert asking.drop(twin.address, 4 * PAGE)
    assert twin.seen() == [2] * PAGES
    twin.publish(3)
    assert twin.seen() == [3] * PAGES


def test_unlock_makes_a_mapping_fresh_for_good(twin: Twin, asking: PrivatePages) -> None:
    mlock(twin.address, 4 * PAGE)
    _pages.unlock(twin.private)
    twin.publish(2)
    assert twin.seen() == [2] * PAGES
    assert not asking.exist(twin.address, SIZE)


def test_pages_that_cannot_be_dropped_are_told(
    twin: Twin, pages: PrivatePages, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def refusing(name: str) -> Callable[..., int]:
        def call(*args: int) -> int:
            asked.append((name, *args))
            return -1

        return call

    monkeypatch.setattr(_pages, "_libc", SimpleNamespace(madvise=refusing("madvise"), munlock=refusing("munlock")))
    twin.private[PAGE] = 9
    assert not pages.drop(twin.address + PAGE, PAGE)
    region = (twin.address + PAGE, PAGE)
    drop = ("madvise", *region, mmap.MADV_DONTNEED)
    assert asked == [drop, ("munlock", *region), drop]


# --- no help from the kernel: yes, they may be private


def test_without_pagemap_every_page_may_be_private(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        pages = PrivatePages()
    assert pages.exist(twin.address, SIZE)
    twin.private[0] = 9
    assert pages.drop(twin.address, SIZE)
    assert twin.seen() == [1] * PAGES
    pages.close()


@pytest.mark.parametrize("answer", [None, b"", bytes(8 * (PAGES - 1))], ids=["error", "nothing", "short"])
def test_an_unreadable_pagemap_means_private(
    twin: Twin, pages: PrivatePages, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    def pread(*_: object) -> bytes:
        if answer is None:
            raise OSError(errno.EIO, "pagemap")
        return answer

    monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    monkeypatch.setattr(os, "pread", pread)
    assert pages.exist(twin.address, SIZE)


@pytest.mark.parametrize(
    ("word", "private"),
    [
        (0, False),
        (1 << 63 | 1 << 61, False),
        (1 << 61, False),
        (1 << 63, True),
        (1 << 62, True),
        (1 << 62 | 1 << 61, True),
    ],
    ids=["absent", "file", "file, absent", "anonymous", "swapped", "swapped file"],
)
def test_reads_a_pagemap_word(
    twin: Twin, pages: PrivatePages, monkeypatch: pytest.MonkeyPatch, word: int, private: bool
) -> None:
    asked: list[tuple[int, int]] = []

    def pread(_: int, size: int, offset: int) -> bytes:
        asked.append((size, offset))
        return bytes(8) + word.to_bytes(8, "little") + bytes(8)

    monkeypatch.setattr(fcntl, "ioctl", refuse_ioctl)
    monkeypatch.setattr(os, "pread", pread)
    assert pages.exist(twin.address, 3 * PAGE) is private
    assert asked == [(24, twin.address // PAGE * 8)]


def test_close_twice_closes_once(pages: PrivatePages) -> None:
    pages.close()
    fd = os.open("/dev/null", os.O_RDONLY)
    pages.close()
    os.fstat(fd)
    os.close(fd)


# --- guard


def python(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)


@pytest.mark.faults
def test_a_write_into_protected_pages_is_a_segfault() -> None:
    done = python(
        """
        import mmap, os
        from shmcast._pages import protect
        fd = os.memfd_create("guard")
        os.ftruncate(fd, 8192)
        other = mmap.mmap(fd, 8192)
        mapping = mmap.mmap(fd, 8192)
        other[:2] = b"ok"
        protect(mapping)
        other[2:4] = b"ay"
        print(mapping[:4].decode(), memoryview(mapping).readonly, flush=True)
        mapping[4096] = 1
        print("written")
        """
    )
    assert (done.stdout, done.returncode) == ("okay False\n", -signal.SIGSEGV)


def test_protect_tells_why_it_cannot(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    def mprotect(*_: Any) -> int:
        ctypes.set_errno(errno.EACCES)
        return -1

    monkeypatch.setattr(_pages, "_libc", SimpleNamespace(mprotect=mprotect))
    with pytest.raises(PermissionError, match="mprotect: Permission denied"):
        _pages.protect(twin.private)


def test_populate_is_only_a_wish(twin: Twin) -> None:
    _pages.populate(twin.private, 12345)
    assert twin.seen() == [1] * PAGES


@pytest.mark.faults
def test_a_mapping_made_under_mlockall_is_not_private() -> None:
    done = python(
        """
        import ctypes, os, sys
        from shmcast import _segment
        from shmcast._pages import PrivatePages, address_of
        fd = os.memfd_create("future")
        os.ftruncate(fd, 65536)
        os.pwrite(fd, b"1" * 65536, 0)
        if ctypes.CDLL(None).mlockall(2):  # MCL_FUTURE
            sys.exit(77)
        mapping = _segment._map(fd, 65536, _segment.mmap.MAP_PRIVATE)
        pages = PrivatePages()
        before = mapping[:1]
        os.pwrite(fd, b"2" * 65536, 0)
        print(before.decode(), mapping[:1].decode(), mapping[-1:].decode(), pages.exist(address_of(mapping), 65536))
        """
    )
    if done.returncode == 77:
        pytest.skip("mlockall is not permitted")
    assert (done.returncode, done.stderr) == (0, "")
    expected = "1 2 2 False\n" if _says("scan") or _says("file") else "1 2 2 True\n"
    assert done.stdout == expected
