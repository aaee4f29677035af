"""What a process uses up and what it is kept from: CPU time, the GIL, bytes over sockets."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

BEAT_SECONDS = 0.002
SLACK_SECONDS = 100e-6  # within which the kernel's timer wakes a thread: that is nobody's fault
TCP_INFO_BYTES = 256
RECEIVED_AT = 128  # tcpi_bytes_received in struct tcp_info, see tcp(7)
CHUNK = bytes(1 << 20)
LITTLE = torch.zeros(16)

BURNER = """
import ctypes, hashlib, os, signal, sys, time
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
share, parent = float(sys.argv[1]), int(sys.argv[2])
chunk, began = bytes(1 << 20), time.monotonic()
print(flush=True)
while os.getppid() == parent:
    hashlib.sha256(chunk)
    ahead = time.process_time() / share - (time.monotonic() - began)
    if ahead > 0:
        time.sleep(ahead)
"""


def launch(seconds: float) -> None:
    """Work of this thread, as of launching kernels: small torch operations for so many seconds of CPU time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        torch.add(LITTLE, LITTLE)


def burn(seconds: float) -> None:
    """CPU seconds of this thread, most of them without the GIL, as in hashing, copying or decoding."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        hashlib.sha256(CHUNK[: 1 << 16])


@contextmanager
def burning(share: float) -> Iterator[None]:
    """Meanwhile another process uses this share of a CPU, more than one process where it is above 1."""
    command = [sys.executable, "-S", "-c", BURNER]
    count = max(1, -int(-share // 1))
    shares = [share / count] * count if share > 0 else []
    with ExitStack() as ends:
        for each in shares:
            arguments = [*command, str(each), str(os.getpid())]
            burner = ends.enter_context(subprocess.Popen(arguments, stdout=subprocess.PIPE))
            ends.callback(burner.kill)
            if burner.stdout is not None:
                burner.stdout.readline()  # it has started
        yield


def socket_bytes() -> int:
    """Bytes that this process's open TCP connections have received, without headers: the kernel counts them.

    `/proc/net/dev` would count other people's, `/proc/self/io` leaves out `send` and `recv`. Summed over all ranks
    this is what travelled.
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                total += _received(int(name))
    return total


def _received(fd: int) -> int:
    with socket.socket(fileno=os.dup(fd)) as connection:
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
            return 0
        state = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        return int(struct.unpack_from("Q", state, RECEIVED_AT)[0])


class Heartbeat:
    """A thread that wants the GIL every 2 ms, and how long it was kept waiting.

    What it waited for a CPU is not counted: the kernel says how long a thread was ready and did not run.
    """

    def __init__(self) -> None:
        self._waited = 0.0
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._began

    @property
    def share(self) -> float:
        """Of the time, that in which the thread could have run, but for the GIL; after the end."""
        return self._waited / self.seconds

    def _run(self) -> None:
        delayed = cpu_delay()
        while not self._ended.is_set():
            asleep = time.monotonic()
            time.sleep(BEAT_SECONDS)
            late = time.monotonic() - asleep - BEAT_SECONDS - SLACK_SECONDS
            before, delayed = delayed, cpu_delay()
            self._waited += max(0.0, late - (delayed - before))


def cpu_delay() -> float:
    """Seconds that this thread was ready to run and waited for a CPU."""
    return int(Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text().split()[1]) / 1e9
