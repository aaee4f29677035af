"""Commands in a mount namespace of their own, where /dev/shm is another, smaller, read-only, or not there."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NO_SHM = "mount -t tmpfs tmpfs /dev && touch /dev/null && mount --bind $NULL /dev/null"


@functools.cache
def _unshare() -> list[str] | None:
    """How this user gets a mount namespace in which he may mount; None where he may not."""
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        line = [*command, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
        if shutil.which("unshare") and subprocess.run(line, capture_output=True, check=False).returncode == 0:
            return command
    return None


def tmpfs(size: str) -> str:
    """What makes /dev/shm a new tmpfs of `size`."""
    return f"mount -t tmpfs -o mode=1777,size={size} tmpfs /dev/shm"


def in_namespace(prepare: str, *arguments: str, limits: str = ":") -> "subprocess.CompletedProcess[str]":
    """Python with `arguments`, after the shell's `prepare` in a new mount namespace. Skips where it may not."""
    unshare = _unshare()
    if unshare is None:
        pytest.skip("this user may not mount in a namespace of his own")
    # The null device is reached through a descriptor once /dev is hidden.
    script = f'exec 9<>/dev/null; NULL=/proc/self/fd/9; {prepare} && {limits} && exec "$@"'
    return subprocess.run(
        [*unshare, "sh", "-c", script, "sh", sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
