"""`shmcast top`: real groups seen from another process, whoever of them died, sleeps, lies, or ends in the middle."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from shmcast._layout import PAGE, RING_ENTRIES, Kind, SegmentHeader, control_size
from shmcast.cli import _groups, _processes
from shmcast.cli._groups import GroupSeen, ReaderSeen, SegmentSeen, Sight, look
from shmcast.cli._processes import Process, open_files
from shmcast.cli.top import draw
from tests.support.ranks import Died

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.ranks import Ranks, Round

ROOT = Path(__file__).parent.parent
DEADLINE_SECONDS = 60.0
NOBODY = 65534
MIB = 1 << 20
IMPORTS = """
import os, torch
from shmcast import Broadcaster, Policy, Reader, Writer
def message(n): return {"x": torch.full((n << 20,), 7, dtype=torch.uint8)}
"""


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until `condition()` is true, and return it; only a bug makes the deadline pass."""
    deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {DEADLINE_SECONDS:g} s: {what}")
        never.wait(0.005)
    return found


def act(door: str, number: int) -> None:
    """The body of a process: run what comes through the socket at `door`, until there is no more."""
    names: dict[str, Any] = {}
    exec(IMPORTS, names)
    with Client(door) as pipe:
        pipe.send(number)
        while (text := pipe.recv()) is not None:
            try:
                code = compile(text, "<test>", "eval")
            except SyntaxError:
                exec(text, names)
                pipe.send(None)
            else:
                pipe.send(eval(code, names))
    for name in ("kept", "r", "w", "b"):
        if name in names:
            end = names.pop(name)
            if name != "kept":
                end.close()
            del end


class Puppet:
    """The test's end of one process, which runs what it is called with, and answers with the value."""

    def __init__(self, pipe: Connection, stage: Stage, number: int) -> None:
        self.pipe = pipe
        self.stage = stage
        self.number = number
        self.dead = False

    @property
    def pid(self) -> int:
        return self.stage.round.pids[self.number]

    def __call__(self, text: str) -> Any:
        self.pipe.send(text)
        if not self.pipe.poll(DEADLINE_SECONDS):
            pytest.fail(f"process {self.number} does not answer")
        return self.pipe.recv()

    def kill(self) -> None:
        """SIGKILL, and wait until it has ended."""
        self.stage.round.kill(self.number)
        self.dead = True
        with contextlib.suppress(EOFError, ConnectionResetError):
            self.pipe.recv()


class Stage:
    """`n` processes that know nothing of each other."""

    def __init__(self, ranks: Ranks, n: int) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
            door = f"{folder}/door"
            server.bind(door)
            server.listen()
            server.settimeout(DEADLINE_SECONDS)
            self.round: Round = ranks.start_each(act, [(door, number) for number in range(n)])
            pipes: dict[int, Connection] = {}
            for _ in range(n):
                pipe = Connection(server.accept()[0].detach())
                pipes[pipe.recv()] = pipe
        self.puppets = [Puppet(pipes[number], self, number) for number in range(n)]

    def __enter__(self) -> list[Puppet]:
        return self.puppets

    def __exit__(self, kind: object, *exc: object) -> None:
        for puppet in self.puppets:
            if not puppet.dead:
                puppet.pipe.send(None)
            puppet.pipe.close()
        if kind is None:
            results = self.round.results()
            assert [isinstance(result, Died) for result in results] == [puppet.dead for puppet in self.puppets]


@contextlib.contextmanager
def a_group(ranks: Ranks) -> Iterator[tuple[list[Puppet], str]]:
    """A writer and two readers that have mapped, in three processes; and its token."""
    with Stage(ranks, 3) as puppets:
        writer, *readers = puppets
        address = writer("w = Writer(2, capacity=64 << 20)") or writer("w.address")
        for index, reader in enumerate(readers):
            reader.pipe.send(f"address = __import__('shmcast')._wire.Address.parse({bytes(address)!r})")
            reader.pipe.recv()
            reader(f"r = Reader(address, {index}); kept = []")
        until(lambda: writer("w._arena.named") == 0, "no name is left")
        yield puppets, address.token.hex()


def publish(writer: Puppet, *readers: Puppet) -> None:
    """Publish one message of a mebibyte, which these readers open and keep."""
    handle = writer("h = w.publish(message(1))") or writer("bytes(h)")
    for reader in readers:
        reader(f"kept.append(r.open(__import__('shmcast').Handle.parse({handle!r})))")


def seen(token: str) -> GroupSeen:
    """The group of this token, as it is seen now."""
    (group,) = [group for group in look().groups if group.token == token]
    return group


def until_seen(token: str, condition: Callable[[GroupSeen], bool], what: str) -> GroupSeen:
    found: GroupSeen = until(lambda: (group := seen(token)) and condition(group) and group, what)
    return found


def top(*arguments: str, columns: int = 160) -> str:
    """What the command prints."""
    environment = {**os.environ, "COLUMNS": str(columns)}
    done = subprocess.run(
        [sys.executable, "-m", "shmcast", "top", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def drawn(sight: Sight, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, force_terminal=False)
    console.print(draw(sight))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# A group.


@pytest.mark.multiprocess
def test_a_group_without_a_name_is_seen_with_its_leases_and_who_holds_them(ranks: Ranks) -> None:
    with a_group(ranks) as ((writer, one, two), token):
        began = time.monotonic()
        for _ in range(3):
            publish(writer, one)
        group = until_seen(token, lambda g: g.readers[1].held == 3 and g.messages == 3, "three messages")
        assert group.trouble == ""
        assert (group.rank, group.state) == (0, "open")
        assert group.process is not None
        assert (group.process.pid, group.pid_hint) == (writer.pid, writer.pid)
        assert "python" in group.process.command
        assert (group.capacity, group.segment_bytes, group.live_blocks) == (64 * MIB, 64 * MIB, 3)
        assert group.bytes == 3 * MIB
        assert group.free_bytes == group.largest_free_block == 64 * MIB - PAGE - 3 * (MIB + PAGE)
        assert group.age is not None
        assert group.board_age is not None
        assert 0 <= group.board_age <= group.age
        assert [segment.number for segment in group.segments] == [None, 0]
        for segment in group.segments:
            assert segment.pids == tuple(sorted((writer.pid, one.pid, two.pid)))
            assert not segment.named
            assert segment.resident == segment.bytes
        first, second = group.readers
        assert [reader.process and reader.process.pid for reader in group.readers] == [one.pid, two.pid]
        assert [reader.pid_hint for reader in group.readers] == [one.pid, two.pid]
        assert (first.state, first.held, first.opened) == ("alive", 3, 3)
        assert (second.state, second.held, second.opened) == ("alive", 3, 0)
        assert second.oldest is not None
        assert 0 < second.oldest <= time.monotonic() - began
        table = top("--once")
        assert re.search(rf"^{token[:8]} rank 0 · 2 readers · 3 messages, 3.0 MiB sent", table, re.MULTILINE)
        assert re.search(rf"^reader 1 +{two.pid} +alive +3 +0 +[0-9.]+ s", table, re.MULTILINE)


@pytest.mark.multiprocess
def test_what_readers_gave_back_to_an_idle_writer_is_seen(ranks: Ranks) -> None:
    """The writer sleeps, so its board does not change, and neither do its own books: the ring tells."""
    with a_group(ranks) as ((writer, one, two), token):
        publish(writer, one)
        publish(writer, one, two)
        until_seen(token, lambda g: [r.held for r in g.readers] == [2, 2], "two messages")
        os.kill(writer.pid, signal.SIGSTOP)
        try:
            two("kept.clear()")
            group = until_seen(token, lambda g: g.readers[1].held == 1, "the second reader gave one back")
            assert group.state == "stopped"
            assert group.readers[1].opened == 0
            assert not group.readers[1].settled
            one("kept.clear()")
            group = until_seen(token, lambda g: g.readers[0].held == 0, "the first reader gave both back")
            assert group.readers[0].oldest is None
            assert group.live_blocks == 2, "this is the writer's to say"
        finally:
            os.kill(writer.pid, signal.SIGCONT)
        writer("w.stats().live_blocks")
        until_seen(token, lambda g: g.live_blocks == 1, "the writer listened")


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_killed_reader_is_gone_and_a_stopped_one_is_not(ranks: Ranks) -> None:
    with a_group(ranks) as ((writer, one, two), token):
        publish(writer, one, two)
        until_seen(token, lambda g: [r.opened for r in g.readers] == [1, 1], "both hold it")
        os.kill(one.pid, signal.SIGSTOP)
        two.kill()
        group = until_seen(token, lambda g: g.readers[0].state == "stopped", "it is stopped")
        assert (group.readers[1].state, group.readers[1].process) == ("gone", None)
        assert group.readers[1].pid_hint == two.pid
        assert group.readers[1].held == 1, "its leases come back when the writer asks who lives"
        assert all(two.pid not in segment.pids for segment in group.segments)
        assert f"({two.pid})" in top("--once")
        os.kill(one.pid, signal.SIGCONT)
        writer("w.stats().live_blocks")
        group = until_seen(token, lambda g: g.readers[1].held == 0, "the writer asked")
        assert (group.readers[0].state, group.readers[0].held) == ("alive", 1)


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_killed_writer_is_dead_and_a_closed_one_closed(ranks: Ranks) -> None:
    for how in ("dead", "closed"):
        with a_group(ranks) as ((writer, one, _), token):
            publish(writer, one)
            until_seen(token, lambda g: g.readers[0].held == 1, "it is held")
            if how == "dead":
                writer.kill()
            else:
                writer("w.close()")
            group = seen(token)
            assert (group.state, group.process, group.pid_hint) == (how, None, writer.pid)
            assert (group.readers[0].state, group.readers[0].held) == ("alive", 1)
            assert one.pid in group.segments[-1].pids


def broadcast(rank: int, folder: str) -> str:
    """One request on two ranks whose `fn` raises, so that each falls back; then wait until the test has seen it."""
    from shmcast import Broadcaster

    def fn(raw: object) -> object:
        raise ValueError("no such picture")

    with Broadcaster() as bc:
        with pytest.raises(ValueError, match="no such picture"):
            bc.materialize({"n": 1}, fn)
        Path(folder, f"rank-{rank}-{os.getpid()}").touch()
        until(Path(folder, "seen").exists, "the test has seen it")
    return "ended"


@pytest.mark.multiprocess
def test_the_fallbacks_of_both_ranks_of_a_broadcaster_are_seen(ranks: Ranks, tmp_path: Path) -> None:
    running = ranks.start(2, broadcast, str(tmp_path))
    until(lambda: len(list(tmp_path.glob("rank-*"))) == 2, "both ranks fell back")

    def group() -> GroupSeen | None:
        mine = [g for g in look().groups if g.process is not None and g.process.pid == running.pids[0]]
        return mine[0] if mine and mine[0].fallbacks else None

    found: GroupSeen = until(group, "the entry rank's board tells it")
    assert found.fallbacks == {"raised": 1}
    (reader,) = found.readers
    assert reader.process is not None
    assert (reader.process.pid, dict(reader.fallbacks)) == (running.pids[1], {"raised": 1})
    Path(tmp_path, "seen").touch()
    assert running.results() == ["ended"] * 2


@pytest.mark.multiprocess
def test_a_reader_that_has_not_come_is_absent_and_names_are_counted(ranks: Ranks) -> None:
    with Stage(ranks, 1) as (writer,):
        token = writer("w = Writer(2, capacity=64 << 20)") or writer("w.address").token.hex()
        group = seen(token)
        assert [reader.state for reader in group.readers] == ["absent"] * 2
        assert [segment.named for segment in group.segments] == [True, True]
        assert "1 segment (2 named)" in drawn(Sight((group,), (), ()))


# JSON and tables.


@pytest.mark.multiprocess
def test_json_is_one_document_with_the_fields_that_the_page_names(ranks: Ranks) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    with a_group(ranks) as (_, token):
        document = json.loads(top("--json"))
    assert list(document) == ["schema", "groups", "orphans", "hidden"]
    assert document["schema"] == 1
    (group,) = [group for group in document["groups"] if group["token"] == token]
    assert all(reader["state"] == "alive" for reader in group["readers"])
    shapes = [(group, GroupSeen), (group["readers"][0], ReaderSeen), (group["segments"][0], SegmentSeen)]
    for shape, kind in [*shapes, (group["process"], Process)]:
        fields = [field.name for field in dataclasses.fields(kind)]
        assert list(shape) == fields
        assert [name for name in (*fields, *document) if f"`{name}`" not in page] == []


def test_top_loads_neither_torch_nor_numpy() -> None:
    text = (
        "import atexit, sys; sys.argv = ['shmcast', 'top', '--once']; from shmcast.__main__ import main\n"
        "atexit.register(lambda: print('loaded:', *{'torch', 'numpy', 'PIL'} & set(sys.modules)))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_where_there_is_nothing_it_says_so() -> None:
    assert (
        drawn(Sight((), (), ()))
        == "0 groups, 0 processes, 0.0 MiB resident\nNo process of this user has a segment open.\n"
    )
    text = drawn(Sight((), ("shmcast-a", "shmcast-b", "shmcast-c", "shmcast-d"), (17,)))
    assert "4 names in /dev/shm that nobody has open: shmcast-a, shmcast-b, shmcast-c, ..." in text
    assert "not allowed to look at 1 process of this user" in text


def test_the_table_fits_80_columns_whatever_a_process_calls_itself() -> None:
    process = Process(4194304, "python [bold]serve.py[/bold] " + "x" * 200, stopped=False)
    reader = ReaderSeen(63, "stopped", process, 0, 3839, 3839, 86400.0, False, {"control": 4000000000, "open": 1})
    group = GroupSeen("ab" * 16, 4, "open", process, fallbacks={"full": 1}, readers=(reader,), trouble="torn")
    text = drawn(Sight((group,), (), ()), 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert re.search(r"^reader 63 +4194304 +stopped +3839 +3839 +<= 24\.0 h", text, re.MULTILINE)
    assert "python [bold]" in drawn(Sight((group,), (), ()), 200)


@pytest.mark.multiprocess
def test_it_refreshes_in_a_terminal_until_ctrl_c(ranks: Ranks) -> None:
    with a_group(ranks) as ((writer, *_), token):
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
            os.execve(sys.executable, [sys.executable, "-m", "shmcast", "top", "--interval", "0.1"], environment)
        screen = Screen(terminal)
        try:
            screen.until(f"{token[:8]} rank 0 · 2 readers · 0 messages")
            publish(writer)
            screen.until(f"{token[:8]} rank 0 · 2 readers · 1 message, 1.0 MiB sent")
            os.write(terminal, b"\x03")
            screen.until("\x1b[?1049l")  # back from the alternate screen
        finally:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.close(terminal)
        assert code == 0
        assert "Traceback" not in screen.text


class Screen:
    """What a program has written to a pseudo terminal."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.text = ""

    def until(self, what: str) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while what not in re.sub(r"\x1b\[[0-9;]*m", "", self.text):
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"not drawn: {what}\n{self.text[-3000:]}")
            try:
                self.text += os.read(self.fd, 1 << 16).decode("utf-8", "replace")
            except OSError:  # EIO: it has ended
                pytest.fail(f"ended without {what}\n{self.text[-3000:]}")


# Others' processes, hostile segments, what vanishes.


HOLDS = """
    import os, sys
    fds = []
    for path in sys.argv[1:]:
        fds.append(os.open(path, os.O_RDWR))
    print("ready", flush=True)
    for line in sys.stdin:
        if line.startswith("dup"):
            os.dup2(os.open("/dev/null", os.O_RDWR), fds[0])
        print("done", flush=True)
"""


@contextlib.contextmanager
def holder(*paths: Path, name: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that has these files open, and closes the first where it is told `dup`."""
    command = [sys.executable, "-c", textwrap.dedent(HOLDS), *map(str, paths)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.stdin.close()
            process.wait()


@pytest.fixture
def token() -> Iterator[str]:
    """A token, whose files in /dev/shm are removed at the end."""
    made = secrets.token_hex(16)
    yield made
    for path in Path("/dev/shm").glob(f"*{made}*"):
        path.unlink()


def segment(token: str, end: str, content: bytes, mode: int = 0o600) -> Path:
    path = Path(f"/dev/shm/shmcast-{token}-0-{end}")
    path.write_bytes(content)
    path.chmod(mode)
    return path


def header(token: str, **changes: Any) -> bytes:
    fields: dict[str, Any] = {"readers": 1, "entries": RING_ENTRIES, "slots": 0, "rank": 0, **changes}
    size = control_size(fields["readers"], fields["entries"], fields["slots"])
    page = bytearray(PAGE)
    SegmentHeader(Kind.CONTROL, bytes.fromhex(token), number=0, size=size, **fields).write(page)
    return bytes(page)


def sized(content: bytes, size: int) -> bytes:
    return content.ljust(size, b"\0")


@pytest.mark.faults
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda token: b"", "0 bytes cannot hold"),
        (lambda token: b"x" * 8192, "not a shmcast segment"),
        (lambda token: header(token), "it has 4096 bytes, its header says"),
        (lambda token: sized(header(token, rank=1), control_size(1, RING_ENTRIES)), "another segment than its name"),
        (lambda token: sized(header("00" * 16), control_size(1, RING_ENTRIES)), "another segment than its name"),
        (lambda token: sized(header(token, entries=1 << 17), control_size(1, 1 << 17)), "rings of 131072 entries"),
        (lambda token: sized(header(token), control_size(1, RING_ENTRIES) - PAGE) + b"\1" * PAGE, "checksum"),
        (lambda token: sized(header(token), control_size(1, RING_ENTRIES) - PAGE) + sized(b"\1", PAGE), "written"),
        (lambda token: sized(header(token), control_size(1, RING_ENTRIES)), ""),
    ],
)
def test_a_foreign_or_truncated_control_segment_is_told_and_harms_nobody(
    token: str, content: Callable[[str], bytes], told: str
) -> None:
    path = segment(token, "c", content(token))
    with holder(path) as process:
        path.unlink()
        group = seen(token)
        assert told in group.trouble
        assert bool(group.trouble) == bool(told)
        assert (group.state, group.capacity, group.process) == ("unknown", None, None)
        assert group.segments[0].pids == (process.pid,)
        drawn(Sight((group,), (), ()))


@pytest.mark.multiprocess
def test_what_is_no_segment_of_ours_is_not_looked_at(token: str, tmp_path: Path) -> None:
    readable = segment(token, "0", b"x", 0o644)
    elsewhere = tmp_path / f"shmcast-{token}-0-0"
    os.mkfifo(elsewhere, 0o600)
    with holder(readable, elsewhere):
        assert [group for group in look().groups if group.token == token] == []


@pytest.mark.multiprocess
def test_segments_without_a_control_segment_are_a_group_of_their_own(token: str) -> None:
    with holder(segment(token, "0", b"x" * 8192), segment(token, "1", b"")):
        group = seen(token)
        assert [s.number for s in group.segments] == [0, 1]
        assert "nobody has its control segment open" in group.trouble


@pytest.mark.multiprocess
def test_a_name_that_nobody_has_open_is_an_orphan(token: str) -> None:
    path = segment(token, "c", b"")
    assert path.name in look().orphans
    with holder(path):
        assert path.name not in look().orphans


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_process_that_ends_while_it_is_looked_at_is_not_there(token: str) -> None:
    """At each moment of the look: after it was listed, after its descriptors were, after one of them was."""
    path = segment(token, "c", b"")
    for moment in range(3):
        with holder(path) as process:
            seen_links = 0

            def wanted(link: str, process: subprocess.Popen[str] = process, moment: int = moment) -> bool:
                nonlocal seen_links
                if token not in link:
                    return False
                seen_links += 1
                if seen_links == moment:
                    process.kill()
                    process.wait()
                return True

            if moment == 0:
                process.kill()
                process.wait()
                with pytest.raises(FileNotFoundError):
                    list(open_files(Process(process.pid, "", False), wanted))
            else:
                assert list(open_files(Process(process.pid, "", False), wanted)) == []
                assert seen_links == moment


@pytest.mark.multiprocess
@pytest.mark.faults
def test_the_look_goes_on_where_processes_vanish(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = segment(token, "c", b"")
    real = _processes.processes
    with holder(path) as stays, holder(path) as goes:

        def vanishing() -> Iterator[Process]:
            yield Process(2**22 + 1, "", False)  # no pid is that high
            for process in real():
                if process.pid == goes.pid:
                    goes.kill()
                    goes.wait()
                yield process

        monkeypatch.setattr(_groups, "processes", vanishing)
        assert seen(token).segments[0].pids == (stays.pid,)


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_descriptor_that_is_used_anew_meanwhile_is_not_taken_for_the_segment(token: str) -> None:
    with holder(segment(token, "c", b"")) as process:
        links: list[str] = []

        def wanted(link: str) -> bool:
            found = token in link
            if found:
                links.append(link)
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("dup\n")
                process.stdin.flush()
                assert process.stdout.readline() == "done\n"
            return found

        assert list(open_files(Process(process.pid, "", False), wanted)) == []
        assert len(links) == 1


def as_nobody(run: Callable[[], object]) -> Any:
    """What `run` returns in a forked child of another user."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(write, json.dumps(run()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return json.loads(text)


@pytest.mark.multiprocess
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_other_users_see_nothing_of_a_group_and_show_nothing_to_it(token: str) -> None:
    path = segment(token, "c", sized(header(token), control_size(1, RING_ENTRIES)))
    with holder(path) as process:
        assert seen(token).segments[0].pids == (process.pid,)
        sight = as_nobody(lambda: dataclasses.asdict(look()))
        assert [group for group in sight["groups"] if group["token"] == token] == []
        assert path.name not in sight["orphans"]
        os.chown(path, NOBODY, NOBODY)
        assert [group for group in look().groups if group.token == token] == []
        assert path.name not in look().orphans


@pytest.mark.multiprocess
def test_a_command_line_with_escapes_is_made_harmless() -> None:
    command = [sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()", "\x1b]0;gone\x07", "\u202e"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        (shown,) = [each.command for each in _processes.processes() if each.pid == process.pid]
        process.communicate()
    assert shown.endswith("?]0;gone? ?")
    assert shown.isprintable()


@pytest.mark.multiprocess
@pytest.mark.faults
def test_a_board_that_stays_torn_is_told_and_the_rest_is_shown(ranks: Ranks) -> None:
    with a_group(ranks) as ((writer, *readers), token):
        publish(writer, *readers)
        until_seen(token, lambda g: g.messages == 1, "one message")
        # As a SIGKILL in the middle of a write leaves it.
        writer("a = w._arena; at = a._control.header.size - 4096; before = bytes(a._control.map[at : at + 8])")
        writer("a._control.map[at : at + 8] = b'\\xff' * 8")
        group = seen(token)
        assert "the board is being written" in group.trouble
        assert (group.state, group.messages, group.board_age) == ("open", None, None)
        assert [(r.state, r.held) for r in group.readers] == [("alive", None)] * 2
        assert re.search(r"^reader 0 +\d+ +alive +\? +\?", drawn(Sight((group,), (), ())), re.MULTILINE)
        writer("a._control.map[at : at + 8] = before")
        assert seen(token).messages == 1
