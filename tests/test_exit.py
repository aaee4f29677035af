"""Interpreters that end badly say what they mean to say, and nothing else: no warning, no BufferError, no name left.

All run with every warning an error and in development mode, where memory and resources that are not given up are told.
`test_lifetime.py` has more of those that hold tensors, `test_scheduler_ends.py` those with a process group.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent.parent
TRACEBACK = "Traceback (most recent call last):"

# What a script does, its exit code, and the last line of the one traceback that it ends with, where it does.
EXITS: dict[str, tuple[str, int, str]] = {
    "ends that nobody closed": ("made = everything()", 0, ""),
    "tensors and ends in a cycle": ("made = [open_one(), everything()]; made.append(made); del made", 0, ""),
    "an exception while tensors are held": ("fail(open_one(), everything())", 1, "ValueError: this one"),
    "Ctrl-C while tensors are held": ("fail(open_one(), KeyboardInterrupt())", -2, "KeyboardInterrupt"),
    "an exception that holds tensors": (
        "opened = open_one(); error = ValueError('this one'); error.tensor = opened; raise error",
        1,
        "ValueError: this one",
    ),
    "sys.exit while tensors are held": ("opened = open_one()[5:]; sys.exit(4)", 4, ""),
    "sys.exit in a finally": ("opened = open_one()\ntry: fail(opened)\nfinally: sys.exit(5)", 5, ""),
    "sys.exit in fn": ("Broadcaster().materialize(open_one(), fn=lambda raw: sys.exit(6))", 6, ""),
    "sys.exit in fn of a backend": (
        "backend = SchedulerBackend(fn=lambda raw: sys.exit(7), policy=Policy(local_below=0))\n"
        "backend.submit([('a', open_one())])\n"
        "try: backend.take('a')\n"
        "except MaterializeError as error: assert 'SystemExit' in str(error)",
        0,
        "",
    ),
    "sys.exit in fn of an Admission": (
        "admission = Admission(writer, lambda raw: sys.exit(8)); admission.hold('a', open_one())\n"
        "outcomes = admission.ready(timeout=60)",
        0,
        "",
    ),
    "a batch in flight": (
        "backend = SchedulerBackend(fn=wait, policy=Policy(local_below=0)); backend.submit([('a', open_one())])\n"
        "started.wait()",
        0,
        "",
    ),
    "a daemon thread that publishes and opens": ("go(send); started.wait()", 0, ""),
    "a daemon thread that waits for a header": (
        "posting = Writer(1, capacity=1 << 20, slots=16); waiting = Reader(posting.address, 0)\n"
        "threading.Thread(target=wait_for, args=(waiting,), daemon=True).start(); started.wait()",
        0,
        "",
    ),
    "a daemon thread while the main one fails": (
        "go(send); started.wait(); fail(open_one())",
        1,
        "ValueError: this one",
    ),
    "a reader that outlives its writer": ("opened = open_one(); writer.close(); del opened; sys.exit(9)", 9, ""),
    "a message that nobody opened": ("handle = writer.publish(torch.ones(100_000)); sys.exit(10)", 10, ""),
    "memory of empty that nobody published": ("kept = writer.empty((100_000,)); fail(kept)", 1, "ValueError: this one"),
}

PROGRAM = """
import contextlib, json, os, secrets, sys, tempfile, threading, warnings
import torch
from shmcast import Admission, Broadcaster, Policy, Reader, SchedulerBackend, Writer
from shmcast.errors import ClosedError, MaterializeError, PeerDied

torch.set_num_threads(1)
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
started = threading.Event()

def open_one():
    return reader.open(writer.publish(torch.full((100_000,), 7), opens=2))

def everything():
    return [Broadcaster(), SchedulerBackend(fn=len), Admission(writer, len), Writer(1, capacity=1 << 20)]

def fail(*held):
    raise next((one for one in held if isinstance(one, BaseException)), ValueError("this one"))

def wait(raw):
    started.set()
    threading.Event().wait(0.2)
    return raw

def wait_for(end):
    started.set()
    with contextlib.suppress(ClosedError, PeerDied):
        end.next_header(60)

def send():
    assert reader.open(writer.publish({"a": [1]})) == {"a": [1]}

# What a daemon thread does is not torch's: one that is inside torch when the interpreter ends may abort it.
def go(step):
    def run():
        # The interpreter closes the ends under it.
        with contextlib.suppress(ClosedError):
            while True:
                step()
                started.set()
    threading.Thread(target=run, daemon=True).start()

def token_bytes(size, real=secrets.token_bytes):
    return os.getpid().to_bytes(8, "big") + real(size - 8)

def names_of(pid):
    return [name for name in os.listdir("/dev/shm") if pid.to_bytes(8, "big").hex() in name]

secrets.token_bytes = token_bytes  # so that names tell whose they are
outcomes = {}
for name, how in json.loads(sys.argv[1]).items():
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            writer = Writer(1, capacity=16 << 20)
            reader = Reader(writer.address, 0)
            break
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
        outcomes[name] = (code, *texts, names_of(pid))
else:
    print(json.dumps(outcomes))
    sys.exit(0)
exec(how)
"""


class Outcome(NamedTuple):
    """How an interpreter ended, and the names that it left in /dev/shm."""

    code: int
    out: str
    err: str
    names: Sequence[str] = ()


def run(*args: str) -> Outcome:
    command = [sys.executable, "-W", "error", "-X", "dev", *args]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """Each in a child of one interpreter, which imports torch for all of them."""
    done = run("-c", PROGRAM, json.dumps({name: how for name, (how, _, _) in EXITS.items()}))
    assert (done.code, done.err) == (0, "")
    return {name: Outcome(*outcome) for name, outcome in json.loads(done.out).items()}


@pytest.mark.faults
@pytest.mark.parametrize("name", EXITS)
def test_an_interpreter_that_ends_badly_is_quiet(outcomes: dict[str, Outcome], name: str) -> None:
    _, code, last = EXITS[name]
    found = outcomes[name]
    assert (found.code, found.out, found.names) == (code, "", []), found.err
    if not last:
        assert found.err == ""
        return
    lines = found.err.splitlines()
    assert (lines[0], lines[-1]) == (TRACEBACK, last), found.err
    assert found.err.count(TRACEBACK) == 1
    assert "ignored" not in found.err


SPAWNING = """
    import sys
    import torch, torch.multiprocessing as mp
    from shmcast import Reader, Writer

    def child(address, handle):
        reader = Reader(address, 0)
        kept = reader.open(handle)
        sys.exit(int(kept[0]))

    if __name__ == "__main__":
        writer = Writer(1, capacity=4 << 20)
        handle = writer.publish(torch.full((100_000,), 3))
        process = mp.get_context("spawn").Process(target=child, args=(writer.address, handle))
        process.start()
        process.join()
        sys.exit(process.exitcode)
"""


@pytest.mark.multiprocess
def test_a_spawned_child_and_its_parent_are_quiet(tmp_path: Path) -> None:
    """With a resource tracker of multiprocessing, which knows nothing of our names, and must not hear of them."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SPAWNING))
    assert run(str(script)) == Outcome(3, "", "")
