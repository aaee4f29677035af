"""`shmcast doctor`: each check against a machine that has what it looks for and one that has not, and the report."""

import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner
from rich.console import Console

from shmcast import _reclaim
from shmcast.cli import _checks, command_line
from shmcast.cli._checks import Line
from tests.support.mounts import NO_SHM, in_namespace, tmpfs
from tests.support.writers import end, names, said, start
from tests.test_room import GIB, Machine, group

ROOT = Path(__file__).parent.parent
MODULE = sys.modules["shmcast.cli.doctor"]  # which the command of the same name hides
MIB = 1 << 20
PROBES = ("posix_fallocate", "MADV_POPULATE_READ", "MADV_POPULATE_WRITE", "private pages", "OFD locks")
PACKAGES = ("posix_ipc", "numpy", "torch")


def lines_of(text: str) -> dict[str, dict[str, str]]:
    return {each["check"]: each for each in json.loads(text)["checks"]}


def statuses(text: str) -> dict[str, str]:
    return {name: line["status"] for name, line in lines_of(text).items()}


# The report.


def test_here_nothing_fails_and_every_check_has_a_line() -> None:
    done = CliRunner().invoke(command_line, ["doctor", "--json"])
    found = json.loads(done.stdout)
    assert [line["check"] for line in found["checks"]] == list(MODULE.CHECKS)
    assert [line for line in found["checks"] if line["status"] == "fail"] == []
    assert done.exit_code == 0
    assert all(line["found"] and line["means"] for line in found["checks"])
    assert all(line["todo"] for line in found["checks"] if line["status"] != "ok")
    assert found["shmcast"] == importlib.metadata.version("shmcast")
    assert found["kernel"] == os.uname().release


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_has_every_word(width: int) -> None:
    lines = {
        "short": Line("ok", "found [bold]this", "means that"),
        "a longer name": Line("warn", "x" * 300, "means much", "do it [now]"),
        "last": Line("fail", "nothing", "means [bold]harm[/bold]", "do the rest"),
    }
    out = io.StringIO()
    Console(file=out, width=width).print(MODULE.as_table(lines))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= width
    together = "".join(text.split())
    for line in lines.values():
        for part in (line.found, line.means, line.todo):
            assert "".join(part.split()) in together.replace("do:", "") or part in text
    assert text.splitlines()[-1] == "1 ok, 1 to look at, 1 failed"


def broken() -> NoReturn:
    raise RuntimeError("the kernel said no")


@pytest.mark.parametrize(
    ("extra", "worst", "code"),
    [
        ({}, "ok", 0),
        ({"w": lambda: Line("warn", "a", "b", "c")}, "warn", 0),
        ({"w": lambda: Line("warn", "a", "b", "c"), "f": lambda: Line("fail", "a", "b", "c")}, "fail", 1),
        ({"b": broken}, "fail", 1),
    ],
)
def test_the_exit_status_is_1_where_anything_fails(
    monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], worst: str, code: int
) -> None:
    monkeypatch.setattr(MODULE, "CHECKS", {**extra, "last": lambda: Line("ok", "a", "b")})
    done = CliRunner().invoke(command_line, ["doctor", "--json"])
    assert (json.loads(done.stdout)["status"], done.exit_code) == (worst, code)
    assert statuses(done.stdout)["last"] == "ok"
    assert CliRunner().invoke(command_line, ["doctor"]).exit_code == code


def test_a_check_that_raises_is_a_line_that_says_so() -> None:
    lines = _checks.run({"broken": broken, "next": lambda: Line("ok", "a", "b")})
    assert lines["broken"].status == "fail"
    assert lines["broken"].found == "RuntimeError: the kernel said no"
    assert lines["next"] == Line("ok", "a", "b")


@pytest.mark.parametrize("missing", [("torch", "numpy"), ("torch", "numpy", "posix_ipc")])
def test_missing_packages_fail_alone(missing: tuple[str, ...]) -> None:
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r})); sys.argv = ['shmcast', 'doctor', '--json']\n"
        "from shmcast.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    found = lines_of(done.stdout)
    failed = {name for name, line in found.items() if line["status"] == "fail"}
    assert failed - set(missing) == ({*PROBES, "semaphores"} if "posix_ipc" in missing else set())
    assert set(missing) <= failed
    assert {found[name]["found"] for name in missing} == {"not importable"}
    assert all("posix_ipc" in found[name]["found"] for name in failed - set(missing))


def test_it_loads_neither_torch_nor_numpy() -> None:
    script = (
        "import atexit, sys; sys.argv = ['shmcast', 'doctor', '--ranks', '1']; from shmcast.__main__ import main\n"
        "atexit.register(lambda: print('loaded:', *{'torch', 'numpy'} & set(sys.modules)))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert done.stdout.splitlines()[-2].startswith(f"{len(MODULE.CHECKS) + 1 - done.stdout.count('warn')} ok")


# /dev/shm.


def doctor_in(prepare: str, limits: str = ":") -> tuple[int, dict[str, dict[str, str]]]:
    done = in_namespace(prepare, "-m", "shmcast", "doctor", "--json", limits=limits)
    assert done.stderr == ""
    return done.returncode, lines_of(done.stdout)


def test_dockers_default_is_too_small() -> None:
    code, found = doctor_in(tmpfs("64m"))
    assert code == 0
    assert found["/dev/shm"]["status"] == "warn"
    assert found["/dev/shm"]["found"] == "tmpfs of 64.0 MiB, 64.0 MiB free"
    assert "--shm-size" in found["/dev/shm"]["todo"]
    assert "emptyDir" in found["/dev/shm"]["todo"]
    assert found["default Writer"]["status"] == "warn"
    assert found["default Writer"]["found"] == "up to 16.0 MiB of 64.0 MiB that can be reserved; bound by /dev/shm"


def test_a_larger_one_is_not() -> None:
    _, found = doctor_in(tmpfs("300m"))
    assert [found[name]["status"] for name in ("/dev/shm", "default Writer")] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("requests", "capacity", "status", "todo"),
    [(3, None, "ok", ""), (4, None, "warn", "set SHMCAST_CAPACITY=52428800"), (4, 52428800, "ok", "")],
)
def test_a_queue_fits_into_a_writer_or_needs_a_larger_one(
    monkeypatch: pytest.MonkeyPatch, requests: int, capacity: int | None, status: str, todo: str
) -> None:
    monkeypatch.delenv("SHMCAST_CAPACITY", raising=False)
    if capacity is not None:
        monkeypatch.setenv("SHMCAST_CAPACITY", str(capacity))
    monkeypatch.setattr(_checks, "default_capacity", lambda: 40 << 20)
    monkeypatch.setattr(_checks, "room", lambda: (1 << 30, "/dev/shm"))
    line = _checks.queue(requests, 10 << 20)
    assert (line.status, line.todo) == (status, todo)
    assert f"{requests} requests of 10.0 MiB" in line.found


def test_a_queue_that_is_more_than_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "room", lambda: (64 << 20, "/dev/shm"))
    line = _checks.queue(7, 10 << 20)
    assert line.status == "warn"
    assert "more than the 64.0 MiB that /dev/shm leaves" in line.means
    assert "--shm-size" in line.todo


def test_a_queue_is_asked_for() -> None:
    done = CliRunner().invoke(command_line, ["doctor", "--json", "--queue", "1", "--request-mib", "0.5"])
    assert done.exit_code == 0
    assert lines_of(done.stdout)["queue"]["found"] == "1.0 MiB for 1 requests of 512.0 KiB and one that is being made"


def test_where_no_writer_fits_it_fails() -> None:
    code, found = doctor_in(tmpfs("128k"))
    assert code == 1
    assert found["default Writer"]["status"] == "fail"
    assert {found[name]["status"] for name in PROBES} == {"ok"}


def test_no_shared_memory_at_all() -> None:
    code, found = doctor_in(NO_SHM)
    assert code == 1
    assert found["/dev/shm"]["found"] == "/dev/shm: No such file or directory"
    failed = {name for name, line in found.items() if line["status"] == "fail"}
    assert failed == {"/dev/shm", "default Writer", "semaphores", *PROBES}


def test_one_that_is_read_only() -> None:
    code, found = doctor_in(f"{tmpfs('1g')} && mount -o remount,bind,ro /dev/shm")
    assert code == 1
    assert found["/dev/shm"]["status"] == "fail"
    assert "not writable here" in found["/dev/shm"]["found"]
    assert {found[name]["status"] for name in PROBES} == {"fail"}


def test_one_that_is_no_tmpfs(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    shm = tmp_path / "dev" / "shm"
    shm.mkdir(parents=True)
    mounts.write_text(f"1 0 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {tmp_path} rw shared:1 - tmpfs tmpfs rw\n")
    assert _checks.shared_memory(str(shm), mounts).found.startswith("tmpfs of ")
    mounts.write_text(mounts.read_text() + f"3 2 0:3 / {shm} rw - overlay overlay rw\n")
    line = _checks.shared_memory(str(shm), mounts)
    assert (line.status, line.found.split(" of ")[0]) == ("warn", "overlay")


# Limits.


@pytest.mark.parametrize(("limit", "status"), [("20", "warn"), ("255", "warn"), ("256", "ok")])
def test_few_descriptors(limit: str, status: str) -> None:
    code, found = doctor_in(tmpfs("1g"), f"ulimit -n {limit}")
    assert code == 0
    assert found["RLIMIT_NOFILE"]["status"] == status
    assert found["RLIMIT_NOFILE"]["found"] == f"{limit}, at most {limit}"


def test_too_few_descriptors_to_try_anything_are_lines_too() -> None:
    code, found = doctor_in(tmpfs("1g"), "exec 9>&- && ulimit -n 5")
    assert code == 1
    assert found["RLIMIT_NOFILE"]["status"] == "warn"
    assert found["OFD locks"]["status"] == "fail"
    assert "Too many open files" in found["OFD locks"]["found"]
    assert list(found) == list(MODULE.CHECKS)


def test_little_address_space() -> None:
    _, found = doctor_in(tmpfs("8g"), f"ulimit -v {1 << 20}")
    assert found["RLIMIT_AS"]["found"].startswith("1.0 GiB, ")
    assert found["RLIMIT_AS"]["status"] == "warn"
    _, found = doctor_in(tmpfs("1m"), f"ulimit -v {1 << 20}")
    assert found["RLIMIT_AS"]["status"] == "ok"


def test_the_memory_cgroup_that_binds(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    top = machine.mount(2)
    inner = group(top / "a" / "b", 8 * GIB, GIB)
    outer = group(top / "a", 4 * GIB, 3 * GIB)
    machine.member("/a/b")
    (machine.proc / "cgroup").write_text("".join(f"{line}\n" for line in machine.memberships))
    (machine.proc / "mountinfo").write_text("".join(f"{line}\n" for line in machine.mounts))
    line = _checks.memory_limit(machine.proc)
    assert line.status == "ok"
    assert line.found == f"1.0 GiB left by the memory limit of {outer}, the least of 2 with a limit"
    group(inner, GIB, GIB - 10 * MIB)
    line = _checks.memory_limit(machine.proc)
    assert (line.status, line.found.split(",")[0]) == ("warn", f"10.0 MiB left by the memory limit of {inner}")
    group(inner, "max", GIB)
    group(outer, "max", GIB)
    assert _checks.memory_limit(machine.proc).found == "no memory cgroup above this process has a limit"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("always within_size advise [never] deny force\n", "never"),
        ("always within_size [advise] never deny force\n", "advise"),
        ("[always] within_size advise never deny force\n", "always"),
        ("strange\n", "strange"),
    ],
)
def test_huge_pages(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "shmem_enabled").write_text(text)
    line = _checks.huge_pages(tmp_path / "shmem_enabled")
    assert (line.status, line.found) == ("ok", found)
    assert bool(line.todo) is (found != "always")


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    assert _checks.huge_pages(tmp_path / "none").status == "ok"


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SHMCAST_")]:
        monkeypatch.delenv(name)
    assert _checks.environment().status == "ok"
    monkeypatch.setenv("SHMCAST_CAPACITY", "1000000")
    assert _checks.environment() == Line("ok", "SHMCAST_CAPACITY=1000000", "read when a Broadcaster is made")
    monkeypatch.setenv("SHMCAST_DISABLE", "1")
    line = _checks.environment()
    assert (line.status, line.found) == ("warn", "SHMCAST_CAPACITY=1000000, SHMCAST_DISABLE=1")
    monkeypatch.setenv("SHMCAST_CAPACITY", "lots")
    line = _checks.run({"environment": _checks.environment})["environment"]
    assert (line.status, line.found) == ("fail", "ValueError: SHMCAST_CAPACITY='lots': a number of bytes")


# RemoveIPC.


def logind(root: Path, files: dict[str, str], uid: int = 1000) -> tuple[str, str]:
    (root / "run/systemd/system").mkdir(parents=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    line = _checks.remove_ipc(root, uid)
    return line.status, line.found


YES, NO = "[Login]\nRemoveIPC=yes\n", "[Login]\nRemoveIPC=no\n"
MAIN, DROPPED = "etc/systemd/logind.conf", "etc/systemd/logind.conf.d"


@pytest.mark.parametrize(
    ("files", "status", "where"),
    [
        ({}, "warn", "the default"),
        ({MAIN: "[Login]\n#RemoveIPC=no\n"}, "warn", "the default"),
        ({MAIN: "[Other]\nRemoveIPC=no\n"}, "warn", "the default"),
        ({MAIN: NO}, "ok", f"/{MAIN}"),
        ({MAIN: "[Login]\nRemoveIPC = off \n"}, "ok", f"/{MAIN}"),
        ({MAIN: NO, f"{DROPPED}/a.conf": YES}, "warn", f"/{DROPPED}/a.conf"),
        ({MAIN: YES, f"{DROPPED}/a.conf": NO, f"{DROPPED}/b.conf": "[Login]\n"}, "ok", f"/{DROPPED}/a.conf"),
        ({f"{DROPPED}/a.conf": NO, f"{DROPPED}/b.conf": YES}, "warn", f"/{DROPPED}/b.conf"),
        ({f"{DROPPED}/a.txt": NO}, "warn", "the default"),
        ({MAIN: NO, f"{DROPPED}/a.conf": "[Login]\nRemoveIPC=\n"}, "warn", "the default"),
        ({"usr/lib/systemd/logind.conf": NO}, "ok", "/usr/lib/systemd/logind.conf"),
        ({"usr/lib/systemd/logind.conf": NO, MAIN: "[Login]\n"}, "warn", "the default"),
        ({"usr/lib/systemd/logind.conf.d/z.conf": NO, f"{DROPPED}/a.conf": YES}, "ok", None),
        ({"usr/lib/systemd/logind.conf.d/a.conf": YES, f"{DROPPED}/a.conf": NO}, "ok", f"/{DROPPED}/a.conf"),
    ],
)
def test_what_logind_was_told(tmp_path: Path, files: dict[str, str], status: str, where: str | None) -> None:
    found = logind(tmp_path, files)
    assert found[0] == status
    assert where is None or f"({where})" in found[1]


def test_system_users_and_machines_without_systemd_are_spared(tmp_path: Path) -> None:
    assert _checks.remove_ipc(tmp_path, 1000).found == "systemd does not run here"
    assert logind(tmp_path, {MAIN: YES}, uid=999)[0] == "ok"
    assert _checks.remove_ipc(tmp_path, 1000).status == "warn"


# Packages.


@pytest.mark.parametrize(
    ("version", "below", "status"),
    [
        ("1.3.2", 2, "ok"),
        ("1.2", 2, "ok"),
        ("1.2.0.post1", 2, "ok"),
        ("1.1.9", 2, "fail"),
        ("1.0", None, "fail"),
        ("2.0.1", 2, "warn"),
        ("2.0.1", None, "ok"),
        ("10.0", None, "ok"),
    ],
)
def test_versions(monkeypatch: pytest.MonkeyPatch, version: str, below: int | None, status: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["other>=9", "posix-ipc>=1.2", "click>=8; extra"])
    line = _checks.package("posix_ipc", below)
    assert (line.status, line.found) == (status, version)


def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["posix_ipc >= 1.12"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.9")
    assert _checks.package("posix_ipc").status == "fail"


def test_an_import_system_that_refuses_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> NoReturn:
        raise ModuleNotFoundError(f"no {name} here")

    monkeypatch.setattr(importlib.util, "find_spec", refused)
    assert _checks.package("torch").found == "not importable"


def test_the_floor_is_that_of_the_metadata() -> None:
    assert {name: _checks.package(name).means for name in PACKAGES} == {
        "posix_ipc": "shmcast needs 1.2 or newer",
        "numpy": "shmcast needs 1.26 or newer",
        "torch": "shmcast needs 2.6 or newer",
    }


def test_a_module_that_was_not_installed_as_a_package() -> None:
    assert _checks.package("tests").status == "warn"


# Leftovers.


@pytest.mark.faults
def test_leftovers_are_a_warning_and_stay() -> None:
    process = start()
    stem = said(process)
    end(process)
    before = names(stem)
    try:
        done = CliRunner().invoke(command_line, ["doctor", "--json"])
        line = lines_of(done.stdout)["leftovers"]
        assert (line["status"], line["todo"]) == ("warn", "run shmcast gc")
        assert int(line["found"].split(" names of the dead")[0]) >= len(before) == 7
        assert done.exit_code == 0
        assert names(stem) == before
    finally:
        _reclaim.sweep()


def test_what_is_unclear_is_counted(tmp_path: Path) -> None:
    (tmp_path / f"shmcast-{'0' * 32}-0-0").touch()
    line = _checks.leftovers(str(tmp_path))
    assert line.found == "nothing of the dead; 0 names in use, 1 unclear, 0 of other users"
    assert "--dry-run" in line.todo
