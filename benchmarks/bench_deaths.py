"""How soon the living hear of a death: a reader whose writer is killed, a writer one of whose readers is.

python benchmarks/bench_deaths.py
python benchmarks/bench_deaths.py --rounds 100
"""

from __future__ import annotations

import os
import pickle
import signal
import statistics
import threading
import time
from contextlib import contextmanager
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from shmcast import Policy, Reader, Writer
from shmcast._wire import Address
from shmcast.errors import PeerDied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

MIB = 1 << 20
SIZE = 4 * MIB
HELD = 4
CAPACITY = (HELD + 1) * (SIZE + MIB)
BOUND = 1.0
PATIENCE = 30.0
WAITING = 0.05  # until the other end surely waits


@contextmanager
def forked(run: Callable[[Connection], None]) -> Iterator[tuple[int, Connection]]:
    """`run` in a child, with one end of a pipe; the child is killed in the end."""
    ours, theirs = Pipe()
    pid = os.fork()
    if not pid:
        try:
            ours.close()
            run(theirs)
        finally:
            os._exit(0)
    theirs.close()
    try:
        yield pid, ours
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def writer_killed() -> float:
    """Seconds from the SIGKILL of a writer until `PeerDied` in a reader that waits for a header."""

    def write(pipe: Connection) -> None:
        writer = Writer(1, capacity=CAPACITY, slots=64)
        pipe.send_bytes(bytes(writer.address))
        pipe.recv_bytes()
        pipe.send_bytes(pickle.dumps(writer.publish(torch.full((SIZE,), 7, dtype=torch.uint8))))
        signal.pause()

    with forked(write) as (pid, pipe), Reader(Address.parse(pipe.recv_bytes()), 0) as reader:
        pipe.send_bytes(b"here")
        kept: Any = reader.open(pickle.loads(pipe.recv_bytes()))
        killed: list[float] = []

        def kill() -> None:
            killed.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)

        timer = threading.Timer(WAITING, kill)
        timer.start()
        try:
            reader.next_header(PATIENCE)
        except PeerDied:
            took = time.monotonic() - killed[0]
        timer.join()
        if not bool((kept == 7).all()):
            raise RuntimeError("what a reader holds changed when its writer died")
    return took


def reader_killed() -> float:
    """Seconds from the SIGKILL of a reader that fills the memory until the other one has the next message."""

    def read(pipe: Connection, index: int) -> None:

        reader = Reader(Address.parse(pipe.recv_bytes()), index)
        pipe.send_bytes(b"here")
        kept = [reader.open(pickle.loads(pipe.recv_bytes())) for _ in range(HELD if index else 0)]
        pipe.send_bytes(str(len(kept)).encode())
        got: Any = reader.open(pickle.loads(pipe.recv_bytes()))
        pipe.send_bytes(str(time.monotonic() if bool((got == 9).all()) else 0.0).encode())

    with (
        Writer(2, capacity=CAPACITY, policy=Policy(wait=PATIENCE)) as writer,
        forked(lambda pipe: read(pipe, 0)) as (_, survivor),
        forked(lambda pipe: read(pipe, 1)) as (pid, victim),
    ):
        for pipe in (survivor, victim):
            pipe.send_bytes(bytes(writer.address))
            pipe.recv_bytes()
        for _ in range(HELD):
            victim.send_bytes(pickle.dumps(writer.publish(torch.ones(SIZE, dtype=torch.uint8), readers=[1])))
        victim.recv_bytes()
        survivor.recv_bytes()
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        handle = writer.publish(torch.full((3 * SIZE,), 9, dtype=torch.uint8), readers=[0])
        survivor.send_bytes(pickle.dumps(handle))
        return float(survivor.recv_bytes()) - began


@click.command(help=__doc__.partition("\n")[0])
@click.option("--rounds", default=20, show_default=True, type=click.IntRange(1), help="Deaths of each kind.")
def main(rounds: int) -> None:
    torch.set_num_threads(1)
    console = Console()
    missed = False
    for what, run in (
        ("a reader that waits hears that its writer was killed", writer_killed),
        ("the next message is with the other reader after one was killed", reader_killed),
    ):
        took = sorted(run() for _ in range(rounds))
        passed = took[0] > 0 and took[-1] <= BOUND
        missed |= not passed
        verdict = "[green]passed[/]" if passed else "[red]missed[/]"
        console.print(
            f"{verdict}  {what}, within {BOUND:g} s: median [bold]{statistics.median(took) * 1e3:.1f} ms[/], "
            f"longest {took[-1] * 1e3:.1f} ms of {rounds}",
            highlight=False,
            soft_wrap=True,
        )
    raise SystemExit(missed)


if __name__ == "__main__":
    main()
