"""Real writers in processes of their own, to be killed; what they have in /dev/shm."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SHM = Path("/dev/shm")

WRITER = """
import os, signal, sys
from shmcast import _arena
from shmcast._layout import PAGE
_arena.STEP = 8 * PAGE
arena = _arena.Arena(2, 32 * PAGE, 3)
arena.reserve(7 * PAGE, 0.0)
arena.reserve(PAGE, 0.0)
if "fork" in sys.argv:
    if os.fork() == 0:
        print("child", flush=True)
        sys.stdin.read()
        os._exit(0)
print(arena.address.stem[1:], flush=True)
signal.pause()
"""


def start(*words: str) -> "subprocess.Popen[str]":
    """A writer for two readers that never come; it says its stem, and waits."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: "subprocess.Popen[str]") -> str:
    """Its next line."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def names(stem: str) -> list[str]:
    """What a writer has in /dev/shm."""
    return sorted(name for name in os.listdir(SHM) if stem in name)


def end(process: "subprocess.Popen[str]") -> None:
    """Kill it, and wait until it is gone."""
    process.kill()
    process.communicate(timeout=60)
