"""What `shmcast doctor` tries, against a kernel that has it and one that has not, and the ranks that it starts."""

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import posix_ipc
import pytest
from click.testing import CliRunner

from shmcast import _reclaim
from shmcast._pages import PrivatePages
from shmcast._reclaim import Verdict
from shmcast.cli import _checks, _probe_rank, _probes, command_line
from tests.support.mounts import in_namespace, tmpfs
from tests.support.writers import end, said

ROOT = Path(__file__).parent.parent


def refuse(code: int) -> Any:
    def call(*_: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return call


def test_memory_that_cannot_be_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP))
    line = _checks.run({"it": _probes.fallocate})["it"]
    assert line.status == "fail"
    assert "cannot reserve 8192 bytes of shared memory: Operation not supported" in line.found


def test_memory_that_is_promised_and_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, at, size: at or real(fd, at, size))
    assert _probes.fallocate().status == "fail"


def test_pages_that_cannot_be_mapped_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probes, "populate", lambda mapping, advice: False)
    assert [_probes.populate_read().status, _probes.populate_write().status] == ["warn", "warn"]


def test_what_tells_of_private_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _probes.private_pages().found.startswith(("PAGEMAP_SCAN", "/proc/self/pagemap"))
    monkeypatch.setattr(PrivatePages, "_scan", refuse(errno.ENOTTY))
    assert (_probes.private_pages().status, _probes.private_pages().found[:18]) == ("ok", "/proc/self/pagemap")
    monkeypatch.setattr(PrivatePages, "_words", lambda self, address, size: None)
    line = _probes.private_pages()
    assert (line.status, line.found) == ("warn", "the kernel does not say which pages were copied")


def test_private_pages_that_are_not_seen_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivatePages, "exist", lambda self, address, size: False)
    line = _probes.private_pages()
    assert (line.status, line.found.partition(" ")[2]) == ("fail", "does not see a copied page")


def test_private_pages_that_are_not_dropped_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivatePages, "drop", lambda self, address, size: True)
    line = _probes.private_pages()
    assert (line.status, line.found.partition(" ")[2]) == ("fail", "does not drop a copied page")


@pytest.mark.parametrize("answer", [True, False])
def test_ofd_locks_that_are_not_kept(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(_probes, "is_taken", lambda fd, byte: answer)
    assert (_probes.locks().status, _probes.locks().found) == ("fail", "OFD locks: not kept here")


def test_flock_that_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)
    assert (_probes.locks().status, _probes.locks().found) == ("fail", "flock: not kept here")


def test_no_pidfd_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pidfd_open", refuse(errno.ENOSYS))
    assert _probes.pidfd().status == "warn"


def test_semaphores_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def semaphore(*_: object, **__: object) -> NoReturn:
        raise posix_ipc.PermissionsError("No permission")

    monkeypatch.setattr(posix_ipc, "Semaphore", semaphore)
    line = _checks.run({"it": _probes.semaphores})["it"]
    assert (line.status, line.found) == ("fail", "PermissionsError: No permission")


@pytest.mark.faults
def test_a_doctor_that_is_killed_leaves_what_a_sweep_removes() -> None:
    script = (
        "import signal; from shmcast.cli import _probes\n"
        "with _probes.scratch() as segment: print(segment.name[1:], flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    name = said(process)
    found = {each.name: each.verdict for each in _reclaim.sweep()}
    assert found[name] is Verdict.IN_USE
    end(process)
    _reclaim.sweep()
    assert not Path("/dev/shm", name).exists()


# Ranks.


@pytest.mark.multiprocess
def test_ranks_that_map() -> None:
    done = CliRunner().invoke(command_line, ["doctor", "--ranks", "3", "--json"])
    last = json.loads(done.stdout)["checks"][-1]
    assert (last["check"], last["found"]) == ("ranks", "3 of 3 mapped a probe segment")
    assert done.exit_code == 0


@pytest.mark.parametrize("count", ["0", "65", "many"])
def test_wrong_numbers_of_ranks_are_refused(count: str) -> None:
    assert CliRunner().invoke(command_line, ["doctor", "--ranks", count]).exit_code == 2


def standing_in(folder: Path, script: str) -> str:
    """A program to be started in place of the interpreter."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_rank_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = standing_in(tmp_path, "echo first >&2; echo broken >&2; kill -9 $$")
    monkeypatch.setattr(sys, "executable", program)
    line = _probes.ranks(2)
    story = f"ended with status -{int(signal.SIGKILL)}; broken"
    assert (line.status, line.found) == ("fail", f"rank 0: {story}; rank 1: {story}")


@pytest.mark.multiprocess
def test_ranks_that_do_not_answer_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", standing_in(tmp_path, "exec sleep 1000"))
    monkeypatch.setattr(_probes, "RANK_SECONDS", 0.0)
    assert _probes.ranks(2).found == "; ".join(f"rank {rank}: did not answer within 0 seconds" for rank in (0, 1))


@pytest.mark.multiprocess
def test_ranks_with_another_shared_memory_cannot_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_namespace(tmpfs("1m"), "-c", "")  # skips where that may not be
    inside = f'{tmpfs("1m")} && exec {sys.executable} "$@"'
    monkeypatch.setattr(sys, "executable", standing_in(tmp_path, f"exec unshare -m sh -c '{inside}' sh \"$@\""))
    if os.geteuid():
        pytest.skip("only root may do so without a user namespace")
    line = _probes.ranks(1)
    assert line.status == "fail"
    assert line.found.startswith("rank 0: PeerDied: no segment /shmcast-")
    assert "another mount or IPC namespace" in line.found


def test_a_rank_that_maps_something_else_says_so() -> None:
    address = _probes.new_address()
    with _probes.scratch(address):
        assert _probe_rank.look(address.token, bytes(16)) == "mapped"
        assert _probe_rank.look(address.token, b"other") == "mapped something else"
    assert _probe_rank.look(address.token, bytes(16)).startswith("PeerDied: ")


def test_starting_no_process_at_all_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    line = _checks.run({"ranks": lambda: _probes.ranks(2)})["ranks"]
    assert (line.status, line.found.partition(":")[0]) == ("fail", "FileNotFoundError")
