"""How much room there is, read from made-up trees of /proc and cgroup folders."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from shmcast._room import Room, room

GIB = 1 << 30
LOTS = 1 << 50
V1_LIMIT, V1_USAGE, V1_CACHE = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
V2_LIMIT, V2_USAGE, V2_CACHE = "memory.max", "memory.current", "inactive_file"
NO_LIMIT_V1 = 9223372036854771712


class Machine:
    """A /proc/self, a /proc/meminfo, a tmpfs and cgroup mounts, all in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proc = folder / "proc"
        self.proc.mkdir()
        self.meminfo = folder / "meminfo"
        self.memberships: list[str] = []
        self.mounts = ["22 1 0:20 / /proc rw,nosuid shared:13 - proc proc rw"]
        self.tmpfs = LOTS

    def mount(self, version: int, root: str = "/", options: str = "rw,memory") -> Path:
        """A mount that shows the hierarchy from `root` on."""
        top = self.folder / f"mount{len(self.mounts)}"
        top.mkdir()
        kind = "cgroup2 cgroup2 rw,nsdelegate" if version == 2 else f"cgroup cgroup {options}"
        self.mounts.append(f"30 22 0:26 {root} {top} rw,relatime shared:4 - {kind}")
        return top

    def member(self, path: str, version: int = 2, controllers: str = "memory") -> None:
        self.memberships.append(f"0::{path}" if version == 2 else f"4:{controllers}:{path}")

    def room(self) -> Room:
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in self.memberships))
        (self.proc / "mountinfo").write_text("".join(f"{line}\n" for line in self.mounts))
        return room("/tmpfs", self.proc, self.meminfo)


def group(folder: Path, limit: str | int, usage: int = 0, cache: int = 0, version: int = 2) -> Path:
    """Make `folder` a memory cgroup."""
    folder.mkdir(parents=True, exist_ok=True)
    names = (V2_LIMIT, V2_USAGE, V2_CACHE) if version == 2 else (V1_LIMIT, V1_USAGE, V1_CACHE)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cache}\nactive_file 7\n")
    return folder


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)

    def statvfs(path: str) -> SimpleNamespace:
        assert path == "/tmpfs"
        return SimpleNamespace(f_bavail=made.tmpfs // 4096, f_frsize=4096)

    monkeypatch.setattr(os, "statvfs", statvfs)
    return made


def test_tmpfs_alone(machine: Machine) -> None:
    machine.tmpfs = 5 * GIB
    assert machine.room() == Room(5 * GIB, "/tmpfs")


def test_no_tmpfs_is_no_room(tmp_path: Path) -> None:
    assert room(str(tmp_path / "none")) == Room(0, f"{tmp_path}/none: No such file or directory")


def test_the_machine_here_has_room() -> None:
    free, bound = room()
    assert 0 < free <= os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    assert bound


def test_memory_that_the_machine_has_left(machine: Machine) -> None:
    machine.meminfo.write_text("MemTotal:       32 kB\nMemAvailable:       12 kB\nSwapFree: 0 kB\n")
    assert machine.room() == Room(12 << 10, "MemAvailable")


@pytest.mark.parametrize("text", ["", "MemTotal: 1 kB\n", "MemAvailable: many kB\n", "no colon\n"])
def test_unreadable_meminfo_bounds_nothing(machine: Machine, text: str) -> None:
    machine.meminfo.write_text(text)
    assert machine.room() == Room(LOTS, "/tmpfs")


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_less_usage_and_with_the_cache_back(machine: Machine, version: int) -> None:
    inner = group(machine.mount(version) / "job" / "7", 100 * 4096, 30 * 4096, 5 * 4096, version)
    machine.member("/job/7", version)
    assert machine.room() == Room(75 * 4096, f"the memory limit of {inner}")


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_all_ancestors_counts(machine: Machine, version: int) -> None:
    top = machine.mount(version)
    limits = {"a/b/c": 90, "a/b": 70, "a": 80}
    for path, limit in limits.items():
        group(top / path, limit * GIB, 10 * GIB, version=version)
    machine.member("/a/b/c", version)
    assert machine.room() == Room(60 * GIB, f"the memory limit of {top}/a/b")


@pytest.mark.parametrize("version", [1, 2])
def test_the_top_of_the_mount_counts_too(machine: Machine, version: int) -> None:
    top = group(machine.mount(version), 3 * GIB, GIB, version=version)
    group(top / "a", 5 * GIB, version=version)
    machine.member("/a", version)
    assert machine.room() == Room(2 * GIB, f"the memory limit of {top}")


def test_a_sibling_does_not_count(machine: Machine) -> None:
    top = machine.mount(2)
    group(top / "a", 9 * GIB)
    group(top / "b", 1 * GIB)
    group(top / "a" / "child", 1 * GIB)
    machine.member("/a")
    assert machine.room() == Room(9 * GIB, f"the memory limit of {top}/a")


@pytest.mark.parametrize(("limit", "version"), [("max", 2), (NO_LIMIT_V1, 1), (1 << 60, 1)])
def test_no_limit_is_no_bound(machine: Machine, limit: str | int, version: int) -> None:
    group(machine.mount(version) / "a", limit, 7 * GIB, version=version)
    machine.member("/a", version)
    assert machine.room() == Room(LOTS, "/tmpfs")


def test_an_ancestor_without_limit_hides_no_other(machine: Machine) -> None:
    top = machine.mount(2)
    group(top / "a", 4 * GIB)
    group(top / "a" / "b", "max", GIB)
    machine.member("/a/b")
    assert machine.room() == Room(4 * GIB, f"the memory limit of {top}/a")


def test_more_used_than_allowed_is_no_room(machine: Machine) -> None:
    inner = group(machine.mount(2) / "a", 4096, 8192)
    machine.member("/a")
    assert machine.room() == Room(0, f"the memory limit of {inner}")


@pytest.mark.parametrize("missing", [V2_LIMIT, V2_USAGE, "memory.stat"])
def test_a_group_without_its_files_bounds_nothing(machine: Machine, missing: str) -> None:
    inner = group(machine.mount(2) / "a", 4096)
    machine.member("/a")
    assert machine.room().free == 4096
    (inner / missing).unlink()
    assert machine.room() == Room(LOTS, "/tmpfs")


@pytest.mark.parametrize("name", [V2_LIMIT, V2_USAGE])
def test_a_group_with_unreadable_numbers_bounds_nothing(machine: Machine, name: str) -> None:
    inner = group(machine.mount(2) / "a", 4096)
    (inner / name).write_text("nonsense\n")
    machine.member("/a")
    assert machine.room() == Room(LOTS, "/tmpfs")


def test_without_the_cache_line_nothing_is_added(machine: Machine) -> None:
    inner = group(machine.mount(2) / "a", 8192, 4096, 999)
    (inner / "memory.stat").write_text("anon 5\n")
    machine.member("/a")
    assert machine.room().free == 4096


@pytest.mark.parametrize("name", ["cgroup", "mountinfo"])
def test_a_proc_without_cgroups_bounds_nothing(machine: Machine, name: str) -> None:
    group(machine.mount(2) / "a", 4096)
    machine.member("/a")
    assert machine.room().free == 4096
    (machine.proc / name).unlink()
    assert room("/tmpfs", machine.proc, machine.meminfo) == Room(LOTS, "/tmpfs")


def test_hybrid_the_memory_controller_of_version_1_beside_version_2(machine: Machine) -> None:
    machine.mount(1, options="rw,cpu,cpuacct")
    memory, unified = machine.mount(1), machine.mount(2)
    inner = group(memory / "job", 6 * GIB, GIB, version=1)
    (unified / "job").mkdir()
    machine.member("/", 1, "cpu,cpuacct")
    machine.member("/job", 1)
    machine.member("/job", 2)
    assert machine.room() == Room(5 * GIB, f"the memory limit of {inner}")


def test_other_controllers_do_not_count(machine: Machine) -> None:
    group(machine.mount(1, options="rw,cpu") / "a", 4096, version=1)
    machine.member("/a", 1, "cpu")
    machine.member("/a", 1, "name=systemd")
    machine.mount(1)
    assert machine.room() == Room(LOTS, "/tmpfs")


def test_a_controller_mounted_with_others(machine: Machine) -> None:
    inner = group(machine.mount(1, options="rw,cpu,memory") / "a", 4096, version=1)
    machine.member("/a", 1, "cpu,memory")
    assert machine.room() == Room(4096, f"the memory limit of {inner}")


def test_a_bind_mount_that_shows_part_of_the_hierarchy(machine: Machine) -> None:
    top = machine.mount(2, root="/pods/p1")
    inner = group(top / "app", GIB)
    group(top, 2 * GIB)
    machine.member("/pods/p1/app")
    assert machine.room() == Room(GIB, f"the memory limit of {inner}")


@pytest.mark.parametrize(
    ("root", "path"),
    [("/pods/p1", "/pods/p1"), ("/pods/p1", "/pods/p10/app"), ("/pods/p1", "/"), ("/", "/../other"), ("/../..", "/")],
    ids=["itself", "common prefix", "above", "outside the namespace", "mounted from outside"],
)
def test_outside_of_what_is_mounted_the_top_counts(machine: Machine, root: str, path: str) -> None:
    top = group(machine.mount(2, root=root), 2 * GIB)
    machine.member(path)
    assert machine.room() == Room(2 * GIB, f"the memory limit of {top}")


def test_the_least_of_all_sources(machine: Machine) -> None:
    group(machine.mount(2) / "a", 3 * GIB)
    machine.member("/a")
    machine.meminfo.write_text(f"MemAvailable: {4 << 20} kB\n")
    machine.tmpfs = 5 * GIB
    assert machine.room().free == 3 * GIB
    machine.tmpfs = 2 * GIB
    assert machine.room() == Room(2 * GIB, "/tmpfs")
    machine.meminfo.write_text(f"MemAvailable: {1 << 20} kB\n")
    assert machine.room() == Room(GIB, "MemAvailable")


@pytest.mark.parametrize(("high", "free"), [(2 * GIB, GIB), ("max", 7 * GIB), (9 * GIB, 7 * GIB)])
def test_the_throttle_of_a_group_counts_as_its_limit(machine: Machine, high: int | str, free: int) -> None:
    inner = group(machine.mount(2) / "a", 8 * GIB, GIB)
    (inner / "memory.high").write_text(f"{high}\n")
    machine.member("/a")
    assert machine.room() == Room(free, f"the memory limit of {inner}")


def test_the_throttle_of_a_group_without_limit_counts_too(machine: Machine) -> None:
    inner = group(machine.mount(2) / "a", "max", GIB)
    (inner / "memory.high").write_text(f"{3 * GIB}\n")
    machine.member("/a")
    assert machine.room().free == 2 * GIB
