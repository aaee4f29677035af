"""`shmcast gc`: removes what the dead left, keeps everything else, and says what and why."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from shmcast._arena import Arena
from shmcast._layout import PAGE, Kind, SegmentHeader
from shmcast.cli import command_line
from tests.support.mounts import NO_SHM, in_namespace, tmpfs
from tests.support.writers import SHM, end, names, said, start

ROOT = Path(__file__).parent.parent
MODULE = sys.modules["shmcast.cli.gc"]  # which the command of the same name hides


def run(*options: str) -> Any:
    return CliRunner().invoke(command_line, ["gc", *options])


def told(text: str, stem: str) -> dict[str, dict[str, Any]]:
    """What was said in JSON about the names of one writer."""
    return {each["name"]: each for each in json.loads(text)["names"] if stem in each["name"]}


@pytest.fixture
def killed() -> str:
    """The stem of a writer that was killed before its readers came."""
    process = start()
    stem = said(process)
    end(process)
    assert len(names(stem)) == 7
    return stem


@pytest.mark.faults
def test_what_a_killed_writer_left_is_removed_and_told(killed: str) -> None:
    before = {name: os.stat(SHM / name).st_blocks * 512 for name in names(killed)}
    done = run("--json")
    found = told(done.stdout, killed)
    assert {name: each["bytes"] for name, each in found.items()} == before
    assert {each["verdict"] for each in found.values()} == {"removed"}
    assert {each["why"] for each in found.values()} == {"nobody alive holds its lock", "its control segment is dead"}
    assert names(killed) == []
    assert json.loads(done.stdout)["removed_bytes"] >= sum(before.values())
    assert told(run("--json").stdout, killed) == {}


@pytest.mark.faults
def test_a_dry_run_removes_nothing_and_ends_with_status_1(killed: str) -> None:
    before = names(killed)
    try:
        done = run("--dry-run", "--json")
        assert {each["verdict"] for each in told(done.stdout, killed).values()} == {"dead"}
        assert sorted(told(done.stdout, killed)) == before
        assert json.loads(done.stdout)["dry_run"] is True
        assert json.loads(done.stdout)["removed_bytes"] == 0
        assert json.loads(done.stdout)["left_bytes"] > 0
        assert done.exit_code == 1
        lines = run("--dry-run").stdout.splitlines()
        assert sum(line.startswith("would remove") and killed in line for line in lines) == len(before)
        assert "names of dead processes are left" in lines[-1]
        assert names(killed) == before
    finally:
        run()
    assert names(killed) == []


@pytest.mark.faults
def test_what_the_living_have_is_kept() -> None:
    living = Arena(1, 2 * PAGE, 0)
    try:
        stem = living.address.stem[1:]
        before = names(stem)
        found = told(run("--json").stdout, stem)
        assert sorted(found) == before
        assert {each["verdict"] for each in found.values()} == {"in use"}
        lines = [line for line in run().stdout.splitlines() if stem in line]
        assert all(line.startswith("kept") and "  in use: " in line for line in lines)
        assert len(lines) == len(before) == 4
        assert names(stem) == before
    finally:
        living.close()


@pytest.mark.faults
@pytest.mark.parametrize("missing", [("torch", "numpy"), ("torch", "numpy", "posix_ipc", "rich", "PIL")])
def test_it_works_without_torch_and_numpy(killed: str, missing: tuple[str, ...]) -> None:
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); sys.argv = ['shmcast', 'gc', '--json']\n"
        "from shmcast.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(told(done.stdout, killed)) == 7
    assert names(killed) == []


# Squatters.


def segment(path: Path, token: str, number: int = 0) -> Path:
    page = bytearray(2 * PAGE)
    SegmentHeader(Kind.ARENA, bytes.fromhex(token), 0, number, 2 * PAGE).write(page)
    path.write_bytes(page)
    path.chmod(0o600)
    return path


SQUATTERS: dict[str, tuple[Callable[[Path, str], object], str]] = {
    "symlink": (lambda path, token: path.symlink_to("/etc/passwd"), "not a regular file"),
    "fifo": (lambda path, token: os.mkfifo(path), "not a regular file"),
    "folder": (lambda path, token: path.mkdir(), "not a regular file"),
    "other mode": (lambda path, token: segment(path, token).chmod(0o666), "unclear"),
    "truncated": (lambda path, token: os.truncate(segment(path, token), PAGE), "other header"),
    "cut in its header": (lambda path, token: os.truncate(segment(path, token), 20), "unclear"),
    "zero bytes": (lambda path, token: path.touch(), "no magic"),
    "foreign bytes": (lambda path, token: path.write_bytes(b"foreign" * PAGE), "no magic"),
    "header of another name": (lambda path, token: segment(path, token, 7), "other header"),
}


@pytest.fixture
def squatted() -> Iterator[tuple[Path, str]]:
    token = secrets.token_hex(16)
    path = SHM / f"shmcast-{token}-0-0"
    yield path, token
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("what", SQUATTERS)
def test_a_squatter_is_kept_and_told(squatted: tuple[Path, str], what: str) -> None:
    path, token = squatted
    make, verdict = SQUATTERS[what]
    make(path, token)
    (found,) = told(run("--json").stdout, token).values()
    assert found["verdict"] == verdict
    (line,) = [line for line in run().stdout.splitlines() if token in line]
    assert line.startswith("kept ")
    assert f"  {verdict}: {found['why']}" in line
    assert os.path.lexists(path)


def test_root_keeps_what_is_of_others(squatted: tuple[Path, str]) -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    path, token = squatted
    os.chown(segment(path, token), 12345, 12345)
    (found,) = told(run("--json").stdout, token).values()
    assert found["verdict"] == "other owner"
    assert "uid 12345" in found["why"]
    assert path.exists()


# Other machines than this one.

LEAVE_ONE = """
import sys
from pathlib import Path
from shmcast._layout import PAGE, Kind, SegmentHeader
page = bytearray(2 * PAGE)
SegmentHeader(Kind.ARENA, bytes(16), 0, 0, 2 * PAGE).write(page)
path = Path("/dev/shm/shmcast-" + "0" * 32 + "-0-0")
path.write_bytes(page)
path.chmod(0o600)
"""


def gc_in(prepare: str, *options: str) -> tuple[int, str]:
    done = in_namespace(prepare, "-m", "shmcast", "gc", *options)
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_nothing_there_is_nothing_left() -> None:
    assert gc_in(tmpfs("1m")) == (0, "removed 0 names, 0 bytes freed; kept 0 others\n")


def test_no_shared_memory_at_all_is_nothing_left() -> None:
    code, out = gc_in(NO_SHM, "--json")
    assert code == 0
    assert json.loads(out) == {
        "folder": "/dev/shm",
        "dry_run": False,
        "error": None,
        "removed_bytes": 0,
        "left_bytes": 0,
        "names": [],
    }


@pytest.mark.faults
def test_what_cannot_be_removed_is_told_with_status_1() -> None:
    prepare = f"{tmpfs('1m')} && {sys.executable} -c '{LEAVE_ONE}' && mount -o remount,bind,ro /dev/shm"
    code, out = gc_in(prepare)
    assert code == 1
    assert out.splitlines()[0].startswith("NOT REMOVED")
    assert "cannot be removed: Read-only file system" in out
    assert out.splitlines()[-1].startswith(
        "removed 0 names, 0 bytes freed; 1 names of dead processes are left, 8192 bytes"
    )


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(MODULE, "SHM", str(tmp_path / "file"))
    done = run()
    assert done.exit_code == 1
    assert "Not a directory" in done.stderr
    assert "Not a directory" in json.loads(run("--json").stdout)["error"]
