"""What `docs/security.md` claims: what processes of another user cannot do, and what those of the same user can.

The other user is a real process that has given up root: without root these tests are skipped.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shmcast import _reclaim
from shmcast._layout import RING_ENTRIES, Kind, SegmentHeader, ring_offset, ring_size
from shmcast._segment import attach
from shmcast.broadcaster import Broadcaster
from shmcast.errors import ArenaFull, LayoutError, MaterializeError
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.ranks import Ranks

SHM = Path("/dev/shm")
ROOT = Path(__file__).parent.parent
STRANGER = 54321
MIB = 1 << 20
AT_ONCE = Policy(wait=0)

pytestmark = pytest.mark.faults
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

GIVE_UP = f"""
import ctypes, errno, os, signal, stat, sys
def become_a_stranger():
    os.setgroups([])
    os.setresgid({STRANGER}, {STRANGER}, {STRANGER})
    os.setresuid({STRANGER}, {STRANGER}, {STRANGER})
def fails(what, *args):
    try:
        what(*args)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "works"
"""


def stranger(code: str, *args: str, data: bytes = b"") -> str:
    """What `code` prints as a process of another user; everything it needs is imported before."""
    program = GIVE_UP + "become_a_stranger()\n" + textwrap.dedent(code)
    return run(program, *args, data=data)


def run(program: str, *args: str, data: bytes = b"", status: int = 0) -> str:
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, input=data, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == status, done.stderr.decode()
    return done.stdout.decode().strip()


def names_of(token: bytes) -> list[str]:
    return sorted(name for name in os.listdir(SHM) if token.hex() in name)


@pytest.fixture
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    """One whose reader has not come: all its names are there."""
    with Writer(1, capacity=4 * MIB, policy=AT_ONCE) as writer:
        yield writer
    request.node.funcargs.clear()


@pytest.fixture
def taken() -> Iterator[list[Path]]:
    """Names that another user takes; removed in the end."""
    paths: list[Path] = []
    yield paths
    for path in paths:
        path.unlink()


# Another user.


def test_a_name_has_128_bits_that_no_seed_predicts() -> None:
    tokens = set()
    for _ in range(3):
        random.seed(1)
        torch.manual_seed(1)
        with Writer(1, capacity=MIB) as writer:
            tokens.add(writer.address.token)
            assert {name.split("-")[1] for name in names_of(writer.address.token)} == {writer.address.token.hex()}
    assert len(tokens) == 3
    assert {len(token) for token in tokens} == {16}


@as_root
def test_another_user_cannot_open_change_or_remove_anything(writer: Writer) -> None:
    names = names_of(writer.address.token)
    assert [name.partition("-")[0] for name in names] == ["sem.shmcast", "sem.shmcast", "shmcast", "shmcast"]
    said = stranger(
        """
        for name in sys.argv[1:]:
            path = f"/dev/shm/{name}"
            print(
                fails(os.open, path, os.O_RDONLY), fails(os.open, path, os.O_RDWR), fails(os.truncate, path, 0),
                fails(os.chmod, path, 0o666), fails(os.chown, path, os.getuid(), -1), fails(os.unlink, path),
                fails(os.rename, path, path + "x"), fails(os.setxattr, path, "user.x", b"x"),
            )
        """,
        *names,
    )
    answers = {answer for line in said.splitlines() for answer in line.split()}
    assert len(said.splitlines()) == 4
    assert answers <= {"EACCES", "EPERM", "ENOTSUP"}
    with Reader(writer.address, 0) as reader:
        assert reader.open(writer.publish([1])) == [1]


@as_root
def test_another_user_can_see_names_owners_and_sizes(writer: Writer) -> None:
    said = stranger(
        """
        for name in os.listdir("/dev/shm"):
            if sys.argv[1] in name:
                status = os.stat(f"/dev/shm/{name}")
                print(name, status.st_uid, status.st_size)
        """,
        writer.address.token.hex(),
    )
    seen = {line.split()[0]: int(line.split()[2]) for line in said.splitlines()}
    assert seen == {name: (SHM / name).stat().st_size for name in names_of(writer.address.token)}


@as_root
def test_another_user_that_is_given_the_address_gets_no_reader(writer: Writer) -> None:
    program = GIVE_UP + textwrap.dedent(
        """
        from shmcast import Reader
        from shmcast._wire import Address
        become_a_stranger()
        try:
            Reader(Address.parse(bytes.fromhex(sys.argv[1])), 0)
        except PermissionError as error:
            print(error)
        """
    )
    assert writer.address.control in run(program, bytes(writer.address).hex())
    assert writer.stats().leases[0].alive is None


@as_root
@pytest.mark.parametrize("mode", ["600", "666"])
def test_a_perfect_copy_that_another_user_made_is_refused(writer: Writer, taken: list[Path], mode: str) -> None:
    path = SHM / f"{writer.address.stem[1:]}-7"
    header = SegmentHeader(Kind.ARENA, writer.address.token, writer.address.rank, 7, 8192)
    page = bytearray(8192)
    header.write(page)
    stranger(
        """
        with open(sys.argv[1], "xb") as file:
            file.write(sys.stdin.buffer.read())
            os.fchmod(file.fileno(), int(sys.argv[2], 8))
        """,
        *(str(path), mode),
        data=bytes(page),
    )
    taken.append(path)
    with pytest.raises(LayoutError, match=f"belongs to uid {STRANGER} with mode {mode}: not ours"):
        attach(f"/{path.name}", header, "cow")


@as_root
@pytest.mark.parametrize("what", ["file", "link", "fifo"])
def test_another_user_that_takes_the_next_name_stops_growth_and_no_more(taken: list[Path], what: str) -> None:
    with Writer(1, capacity=192 * MIB, policy=AT_ONCE) as writer, Reader(writer.address, 0) as reader:
        path = SHM / f"{writer.address.stem[1:]}-1"
        stranger(
            """
            path, what = sys.argv[1:]
            if what == "file":
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o666))
            elif what == "link":
                os.symlink("/etc/passwd", path)
            else:
                os.mkfifo(path, 0o666)
            """,
            *(str(path), what),
        )
        taken.append(path)
        before = path.lstat()
        held = writer.empty((40 * MIB,), torch.uint8)
        with pytest.raises(ArenaFull, match=f"somebody took it: make a new writer.*{path.name}"):
            writer.empty((40 * MIB,), torch.uint8)
        assert reader.open(writer.publish(b"x" * MIB)) == b"x" * MIB
        del held
    after = path.lstat()
    assert (after.st_ino, after.st_uid, after.st_size) == (before.st_ino, STRANGER, before.st_size)


@as_root
def test_another_user_that_takes_a_semaphores_name_stops_the_writer(
    taken: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only between the making of the control segment and that of the semaphores: the token is known by then."""
    token = os.urandom(16)
    monkeypatch.setattr("secrets.token_bytes", lambda _: token)
    path = SHM / f"sem.shmcast-{token.hex()}-0-w0"
    stranger("os.close(os.open(sys.argv[1], os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))", str(path))
    taken.append(path)
    with pytest.raises(FileExistsError, match=f"{token.hex()}-0-w0"):
        Writer(1, capacity=MIB)
    # Where it had the right to, it removed the name with its own: root has, others have not.
    taken[:] = [path for path in taken if path.exists()]
    assert names_of(token) == [path.name for path in taken]


@as_root
def test_another_user_that_fills_the_memory_ends_no_writer() -> None:
    """All memory is reserved before it is used: a store to it is never a SIGBUS."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    program = GIVE_UP + textwrap.dedent(
        """
        import shmcast, torch
        writer = shmcast.Writer(1, capacity=256 << 20, policy=shmcast.Policy(wait=0))
        child = os.fork()
        if not child:
            become_a_stranger()
            fd = os.open("/dev/shm/filled", os.O_CREAT | os.O_RDWR, 0o666)
            said = "none"
            while said != "ENOSPC":
                said = fails(os.write, fd, bytes(1 << 20))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        first = writer.empty((60 << 20,), torch.uint8).fill_(7)
        reader = shmcast.Reader(writer.address, 0)
        assert int(reader.open(writer.publish(first)).sum()) == 7 * (60 << 20)
        for what in (lambda: writer.empty((60 << 20,), torch.uint8), lambda: shmcast.Writer(1, capacity=64 << 20)):
            try:
                what()
            except shmcast.ArenaFull as error:
                print("/dev/shm leaves" in str(error))
        del first
        reader.close()
        writer.close()
        """
    )
    mount = 'mount -t tmpfs -o size=160m,mode=1777 tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-W", "ignore", "-c", program]
    if subprocess.run([*command[:5], "exec true"], capture_output=True).returncode:
        pytest.skip("no mount namespace")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["True", "True"], "")


@as_root
def test_a_sweep_neither_removes_nor_minds_what_another_user_put_there(taken: list[Path]) -> None:
    token = os.urandom(16)
    stem = f"shmcast-{token.hex()}-0"
    page = bytearray(8192)
    SegmentHeader(Kind.ARENA, token, 0, 0, 8192).write(page)
    stranger(
        """
        stem = f"/dev/shm/{sys.argv[1]}"
        with open(f"{stem}-0", "xb") as file:
            file.write(sys.stdin.buffer.read())
        os.mkfifo(f"{stem}-1", 0o666)
        os.symlink("/etc/passwd", f"{stem}-2")
        os.mkdir(f"{stem}-3")
        os.rmdir(f"{stem}-3")
        """,
        stem,
        data=bytes(page),
    )
    taken += [SHM / f"{stem}-{number}" for number in range(3)]
    found = [found for found in _reclaim.sweep() if token.hex() in found.name]
    assert [each.verdict for each in found] == [_reclaim.Verdict.OTHER_OWNER, *[_reclaim.Verdict.NOT_A_FILE] * 2]
    assert names_of(token) == [path.name for path in taken]


# The same user.


def mappings_of_a_reader(address: bytes) -> list[list[str]]:
    """Of /proc/self/maps in a process with reader 1: permissions, offset and name of what is in /dev/shm."""
    program = textwrap.dedent(
        """
        import sys
        from shmcast import Reader
        from shmcast._wire import Address
        reader = Reader(Address.parse(bytes.fromhex(sys.argv[1])), 1)
        for line in open("/proc/self/maps"):
            if "/dev/shm/" in line:
                fields = line.split()
                start, end = (int(part, 16) for part in fields[0].split("-"))
                print(fields[1], int(fields[2], 16), end - start, fields[5].rpartition("-")[2])
        reader.close()
        """
    )
    return [line.split() for line in run(program, address.hex()).splitlines()]


@pytest.mark.multiprocess
def test_of_its_writers_memory_a_reader_can_write_to_its_own_ring_and_semaphores() -> None:
    with Writer(3, capacity=4 * MIB) as writer:
        found = mappings_of_a_reader(bytes(writer.address))
    shared = {(name, offset, size) for access, offset, size, name in found if access == "rw-s"}
    ring = ("c", str(ring_offset(1, RING_ENTRIES)), str(ring_size(RING_ENTRIES)))
    assert ring in shared
    assert {name for name, _, _ in shared} == {"c", "p1", "w1"}
    assert [entry for entry in shared if entry[0] == "c"] == [ring]
    assert {name for access, _, _, name in found if access == "rw-p"} == {"0"}


def test_any_reader_can_read_what_is_for_another() -> None:
    secret = os.urandom(100_000)
    with Writer(2, capacity=4 * MIB) as writer, Reader(writer.address, 1) as reader:
        handle = writer.publish(torch.frombuffer(bytearray(secret), dtype=torch.uint8), readers=[0])
        segment = reader._leases._segments[handle.where.segment]
        assert segment is not None
        assert secret in os.pread(segment.fd, handle.where.length, handle.where.offset)


def test_the_same_user_can_change_bytes_that_no_checksum_covers(writer: Writer) -> None:
    with Reader(writer.address, 0) as reader:
        handle = writer.publish(torch.zeros(100_000, dtype=torch.uint8))
        mapping = writer._arena._segments[0].map
        mapping[handle.where.offset + handle.where.length - 1] = 9
        obj: Any = reader.open(handle)
        assert int(obj[-1]) == 9
        handle = writer.publish({"a": 1})
        mapping[handle.where.offset + 64] ^= 1
        with pytest.raises(LayoutError, match="checksum"):
            reader.open(handle)
        del obj, mapping


@pytest.mark.multiprocess
def test_a_writer_that_cuts_its_segment_ends_its_readers() -> None:
    """There is no seal on memory that has a name: the same user is trusted not to."""
    program = textwrap.dedent(
        """
        import faulthandler, os, torch
        from shmcast import Reader, Writer
        faulthandler.disable()
        writer = Writer(1, capacity=4 << 20)
        reader = Reader(writer.address, 0)
        tensor = reader.open(writer.publish(torch.zeros(1 << 20, dtype=torch.uint8)))
        os.ftruncate(writer._arena._segments[0].fd, 0)
        tensor.sum()
        """
    )
    run(program, status=-signal.SIGBUS)


# Pickle.


class Planted:
    """Its pickle makes a folder where it is loaded."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def sends_pickle(rank: int, folder: str) -> str:
    """The entry rank does not keep to what was agreed on; what that does on the other."""
    with Broadcaster(policy=Policy(peers_hold_raw=False)) as bc:
        if rank == 0:
            bc._end._policy = Policy(route="pickle", peers_hold_raw=False)  # type: ignore[union-attr]
        try:
            bc.materialize(folder, fn=Planted)
        except MaterializeError as error:
            return str(error)
    return "nothing"


@pytest.mark.multiprocess
def test_pickle_is_loaded_only_where_the_policy_of_this_rank_says_so(ranks: Ranks, tmp_path: Path) -> None:
    folder = tmp_path / "planted"
    said = ranks.run(2, sends_pickle, str(folder))
    assert said == ["nothing", "the entry rank, rank 0, sent by pickle, which the policy of this rank does not allow"]
    assert not folder.exists()


def loads_pickle(rank: int, folder: str) -> bool:
    with Broadcaster(policy=Policy(route="pickle", peers_hold_raw=False)) as bc:
        bc.materialize(folder, fn=Planted)
    return os.path.isdir(folder)


@pytest.mark.multiprocess
def test_the_route_pickle_runs_what_the_entry_rank_sends(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, loads_pickle, str(tmp_path / "planted"))[1]
