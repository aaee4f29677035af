"""Interpreters that end with something alive, without a word."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


def ends_quietly(program: str, argument: str, *flags: str) -> None:
    """Run `program`, which prints "end" last, with `argument` in `sys.argv[1]`; warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *flags, "-c", textwrap.dedent(program), argument],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
