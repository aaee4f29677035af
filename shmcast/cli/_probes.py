"""What `shmcast doctor` tries: each thing that the library asks of the kernel, on a scratch segment of its own.

The segment is made as a writer makes its own, so that one that a kill leaves behind is removed like any other.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Final

from shmcast._layout import PAGE, TOKEN_BYTES, Kind, SegmentHeader
from shmcast._pages import MADV_POPULATE_READ, MADV_POPULATE_WRITE, PrivatePages, address_of, populate
from shmcast._peers import Seat, is_taken
from shmcast._wire import Address
from shmcast.cli._checks import Line

if TYPE_CHECKING:
    import mmap
    from collections.abc import Iterator

    from shmcast._segment import Segment

RANK_SECONDS: Final = 60.0
"""How long the ranks have to answer, all together."""
_LINUX: Final = f"Linux {platform.release()}"
_SANDBOX: Final = "ask for a newer kernel, or for a sandbox (seccomp, gVisor) that lets it through"


def new_address() -> Address:
    """Names that nobody has."""
    return Address(secrets.token_bytes(TOKEN_BYTES), 0, 1)


@contextmanager
def scratch(address: Address | None = None) -> Iterator[Segment]:
    """A segment of two pages, gone at the end. Raises as `_segment.create`."""
    # Here, as it needs posix_ipc: without that the probes fail, not the report.
    from shmcast._segment import create

    address = address or new_address()
    segment = create(address.segment(0), SegmentHeader(Kind.ARENA, address.token, 0, 0, 2 * PAGE))
    try:
        yield segment
    finally:
        segment.unlink()
        segment.drop()


def fallocate() -> Line:
    """Reserve a page more."""
    with scratch() as segment:
        os.posix_fallocate(segment.fd, segment.header.size, PAGE)
        taken = os.fstat(segment.fd).st_blocks * 512
    if taken < segment.header.size + PAGE:
        means = "memory is not taken when it is reserved: a full tmpfs kills with SIGBUS in place of falling back"
        return Line("fail", f"{taken} of {segment.header.size + PAGE} bytes were reserved", means, _SANDBOX)
    return Line("ok", "reserves pages", "a tmpfs that is full is an error to fall back on, not a SIGBUS")


def populate_read() -> Line:
    """Map a private page ahead, as a reader does."""
    with scratch() as segment:
        return _populated(populate(segment.map_block(PAGE, PAGE), MADV_POPULATE_READ), "a reader's first look at pages")


def populate_write() -> Line:
    """Map shared pages ahead, as a writer does."""
    with scratch() as segment:
        return _populated(populate(segment.map, MADV_POPULATE_WRITE), "a writer's first message")


def _populated(done: bool, who: str) -> Line:
    if done:
        return Line("ok", "works", f"{who} takes no page faults")
    return Line("warn", f"not on {_LINUX}", f"{who} takes a page fault each, once", "nothing has to; Linux 5.14 has it")


def private_pages() -> Line:
    """Have the kernel tell a page that was written to from one that was not, and drop the copy."""
    pages = PrivatePages()
    try:
        with scratch() as segment:
            segment.map[PAGE] = 7
            mapping = segment.map_block(PAGE, PAGE)
            return _looked_at(pages, mapping)
    finally:
        pages.close()


def _looked_at(pages: PrivatePages, mapping: mmap.mmap) -> Line:
    address = address_of(mapping)
    seen, source = mapping[0], pages.source(address, PAGE)
    clean = pages.exist(address, PAGE)
    mapping[0] = 8
    copied = pages.exist(address, PAGE)
    dropped = pages.drop(address, PAGE) and mapping[0] == seen
    means = "a rank's own writes are dropped before a block is used again"
    if not copied or not dropped:
        wrong = "does not see a copied page" if not copied else "does not drop a copied page"
        return Line(
            "fail", f"{source} {wrong}", "a rank that writes into a tensor would see stale bytes later", _SANDBOX
        )
    if source == "none" or clean:
        found = "the kernel does not say which pages were copied"
        return Line("warn", found, f"{means}, and all others with them: every message faults its pages anew", _SANDBOX)
    if source == "pagemap":
        return Line(
            "ok", f"/proc/self/pagemap; no PAGEMAP_SCAN on {_LINUX}", f"{means}; Linux 6.7 looks for them faster"
        )
    return Line("ok", source, means)


def locks() -> Line:
    """Locks of both kinds, seen through other descriptors."""
    with scratch() as segment:
        seat = Seat(segment.fd, 0)
        try:
            held = is_taken(segment.fd, 0)
        finally:
            seat.release()
        freed = not is_taken(segment.fd, 0)
        guarded = not _exclusive(segment.fd)
    if not (held and freed and guarded):
        which = "OFD locks" if not (held and freed) else "flock"
        means = "nobody can tell who lives: memory of the dead would stay, or of the living be removed"
        return Line("fail", f"{which}: not kept here", means, _SANDBOX)
    return Line("ok", "OFD locks and flock work", "the kernel tells who lives, and takes the locks of the dead back")


def _exclusive(fd: int) -> bool:
    """Whether a lock can be had that the shared one on `fd` forbids."""
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(other)
    return True


def pidfd() -> Line:
    """Nothing in the library rests on it; other tools do."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Line(
            "warn", f"{error.strerror} on {_LINUX}", "shmcast does not need it: it asks locks, not pids", _SANDBOX
        )
    return Line("ok", "works", "shmcast does not need it: it asks locks, not pids")


def semaphores() -> Line:
    """Make, post, acquire and unlink one."""
    import posix_ipc

    name = new_address().posted(0)
    semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600)
    try:
        semaphore.unlink()
        semaphore.release()
        semaphore.acquire(0)
    finally:
        semaphore.close()
    return Line("ok", "made, posted, acquired, unlinked", "they order what ranks tell each other, and wake them")


def ranks(count: int) -> Line:
    """Start `count` processes, each of which maps a segment that this one has made."""
    word = secrets.token_bytes(TOKEN_BYTES)
    address = new_address()
    with scratch(address) as segment:
        segment.map[PAGE : PAGE + len(word)] = word
        answers = _ask([sys.executable, "-m", "shmcast.cli._probe_rank", address.token.hex(), word.hex()], count)
    wrong = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer != "mapped"]
    if wrong:
        means = "a group with such a rank goes without shared memory (disabled)"
        return Line("fail", "; ".join(wrong), means, "one mount and IPC namespace, one user, one shmcast for all ranks")
    return Line("ok", f"{count} of {count} mapped a probe segment", "processes started here can share memory")


def _ask(command: list[str], count: int) -> list[str]:
    """What each of `count` processes says."""
    deadline = time.monotonic() + RANK_SECONDS
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        return [_answer(process, deadline) for process in started]


def _answer(process: subprocess.Popen[str], deadline: float) -> str:
    with suppress(subprocess.TimeoutExpired):
        said, complained = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        last = complained.strip().splitlines()[-1:]
        return said.strip() or "; ".join([f"ended with status {process.returncode}", *last])
    return f"did not answer within {RANK_SECONDS:.0f} seconds"
