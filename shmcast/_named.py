"""Named objects of POSIX shared memory. What the system refuses is an `OSError` with its number and the path.

posix_ipc has one exception for two opposite things, others that are no `OSError`, and leaves the number out of some.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import posix_ipc

from shmcast._room import SHM
from shmcast.errors import LayoutError, PeerDied

if TYPE_CHECKING:
    from collections.abc import Iterator

MODE: Final = 0o600


def open_memory(name: str) -> int:
    """A descriptor of the segment `name`."""
    with _refusals(SHM + name):
        # Any other size would truncate it.
        return int(posix_ipc.SharedMemory(name, size=0).fd)


def open_semaphore(name: str) -> posix_ipc.Semaphore:
    """A semaphore of a writer's, `PeerDied` where there is none.

    `LayoutError` for an empty file: the C library maps it, and to use it is a SIGBUS.
    """
    path = _semaphore_path(name)
    try:
        with _refusals(path):
            if not os.lstat(path).st_size:
                raise LayoutError(f"{path} is an empty file, and no semaphore")
            return posix_ipc.Semaphore(name)
    except FileNotFoundError:
        raise PeerDied(f"no semaphore {name}: its writer was closed or died: make a new one") from None


class Semaphores:
    """The semaphores that one writer has made, and that still have a name."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._pid = os.getpid()

    def make(self, name: str) -> posix_ipc.Semaphore:
        """A new one."""
        # Noted first: Ctrl-C may come between the two, and a name that is not there is no trouble to `unlink`.
        self._names.append(name)
        try:
            with _refusals(_semaphore_path(name), posix_ipc.O_CREX):
                return posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=MODE)
        except FileExistsError:
            self._names.remove(name)
            raise

    def unlink(self) -> bool:
        """Remove every name; whether none is left. In a forked child they are not its own."""
        if os.getpid() != self._pid:
            return True
        self._names = [name for name in self._names if not _unlinked(name)]
        return not self._names


def _unlinked(name: str) -> bool:
    try:
        posix_ipc.unlink_semaphore(name)
    except posix_ipc.ExistentialError:
        return True
    except (OSError, posix_ipc.Error):
        return False
    return True


def _semaphore_path(name: str) -> str:
    return f"{SHM}/sem.{name[1:]}"


@contextmanager
def _refusals(path: str, flags: int = 0) -> Iterator[None]:
    """What posix_ipc raises about `path`, as `OSError`."""
    try:
        yield
    except posix_ipc.ExistentialError:
        code = errno.EEXIST if flags & posix_ipc.O_CREX and os.path.isdir(SHM) else errno.ENOENT
    except posix_ipc.PermissionsError:
        code = errno.EACCES
    except LayoutError:
        raise
    except ValueError:  # EINVAL and ENAMETOOLONG: something else has this name
        code = errno.EINVAL
    except MemoryError:
        code = errno.ENOMEM
    except OSError as error:
        # Without a number it is one of two, and the text tells.
        code = error.errno or (errno.ENFILE if "system" in str(error) else errno.EMFILE)
    else:
        return
    raise refused(code, path)


def refused(code: int, path: str) -> OSError:
    """The error `code` about `path`, with what to do about it."""
    advice = {
        errno.EEXIST: "; somebody took it: make a new writer, which has other names",
        errno.EACCES: f"; this process has uid {os.geteuid()}: run all ranks as one user, who may use {SHM}",
    }
    return OSError(code, os.strerror(code) + advice.get(code, ""), path)
