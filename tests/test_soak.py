"""The soaks run, really kill and restart, and fail where something leaks or bytes are wrong; no time is tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks._soak import MIB, PRIVATE, Bound, compare, judge, shown, use_of
from benchmarks._soak_reader import Content, Held, Part, WrongBytes, deed_of, message_of, popular

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent.parent
LARGEST = 4 * MIB
DEEDS = {"open", "write", "numpy", "slice", "twice", "discard", "ignore", "sweep", "stranger"}


def soak(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / program), *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.multiprocess
@pytest.mark.faults
@pytest.mark.slow
def test_readers_that_are_killed_and_stopped_leave_memory_flat(tmp_path: Path) -> None:
    png, figures = tmp_path / "soak.png", tmp_path / "soak.json"
    done = soak(
        *("soak.py", "--seconds", "10", "--capacity", "128", "--indices", "6", "--kills", "20"),
        *("--json", str(figures), "--plot", str(png)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flat after" in done.stdout
    report: dict[str, Any] = json.loads(figures.read_text())
    assert (report["verdict"], report["reasons"]) == ("flat", [])
    counts = report["counts"]
    assert counts["kills"] == counts["restarts"] > 0
    assert counts["stops"] >= counts["continued"] > 0
    assert counts["writers"] > 1
    # All at first, each that was restarted, and with each new writer all but the one that was just killed. One that
    # is killed before it says so does not count.
    assert counts["attached"] <= 3 + counts["restarts"] + 2 * (counts["writers"] - 1)
    assert counts["attached"] > 3
    assert counts["messages"] > 0
    assert counts["bytes compared"] > counts["messages"]
    assert len(report["at"]) > 20
    assert all(len(values) == len(report["at"]) for values in report["series"].values())
    assert max(report["series"]["leases"]) > 0
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.multiprocess
@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "said"),
    [
        ("memory", "writer private grew from"),  # 16 MiB a message: few messages are enough, many are too many
        ("fds", "writer fds grew from"),
        ("leases", "leases"),
        ("bytes", "other bytes came"),
    ],
)
def test_what_is_planted_is_found(plant: str, said: str) -> None:
    rate = ("--rate", "10") if plant == "memory" else ()
    done = soak("soak.py", "--seconds", "6", "--capacity", "128", "--readers", "2", "--plant", plant, *rate)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED after" in done.stdout
    assert said in done.stdout.partition("FAILED after")[2]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_scheduler_backend_is_flat(tmp_path: Path) -> None:
    figures, png = tmp_path / "soak.json", tmp_path / "soak.png"
    done = soak(
        *("soak_scheduler.py", "--minutes", "0.1", "--ranks", "2", "--rate", "20"),
        *("--json", str(figures), "--plot", str(png)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(figures.read_text())
    assert report["verdict"] == "flat"
    assert all(rank["taken"] > 0 and rank["samples"]["private"] for rank in report["ranks"])
    assert png.read_bytes().startswith(b"\x89PNG")


def test_indices_for_one_reader_more_than_there_are() -> None:
    done = soak("soak.py", "--readers", "4", "--indices", "4")
    assert done.returncode == 2
    assert "more than the 4 readers" in done.stderr


# The verdict.


@pytest.mark.parametrize(
    ("values", "bound", "flat"),
    [
        ([5.0] * 8, Bound(), True),
        ([5.0] * 6 + [6.0, 6.0], Bound(), False),
        ([5.0] * 6 + [6.0, 6.0], Bound(slack=1), True),
        ([5.0] * 6 + [6.0, 6.0], Bound(growth=1.2), True),
        ([0.0, 0.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0], Bound(), True),  # the first quarter warms up
        ([9.0, 9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0], Bound(), True),
        ([1.0], Bound(), True),
    ],
)
def test_flat_is_within_its_bound(values: Sequence[float], bound: Bound, flat: bool) -> None:
    assert (judge({"fds": values}, {"fds": bound}) == []) is flat


def test_the_reason_names_what_grew_in_units_for_a_person() -> None:
    values = [10.0 * MIB] * 6 + [100.0 * MIB] * 2
    assert judge({"writer private": values}, {"writer private": PRIVATE}) == [
        "writer private grew from 10 MiB to 100 MiB"
    ]
    assert shown("fds", 12) == "12"
    assert compare([1, 2, 3, 4]) == (2, 4)


def test_use_is_of_a_process_and_none_of_one_that_is_gone() -> None:
    mine = use_of()
    assert mine is not None
    assert 0 < mine.private <= mine.rss
    assert 0 < mine.pss <= mine.rss
    fd = os.open("/dev/null", os.O_RDONLY)
    more = use_of(os.getpid())
    os.close(fd)
    assert more is not None
    assert more.fds == mine.fds + 1
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert use_of(child.pid) is None  # it has ended, and nobody has waited for it
    assert use_of(child.pid) is None


# What comes from the seed.


def test_messages_and_deeds_come_from_the_seed_alone() -> None:
    program = (
        "from benchmarks._soak_reader import deed_of, message_of\n"
        f"print([message_of(3, n, {LARGEST}, 4) for n in range(50)], [deed_of(3, n, 1) for n in range(50)])"
    )
    command = [sys.executable, "-c", program]
    printed = {
        subprocess.check_output(command, text=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": salt})
        for salt in ("1", "2")
    }
    here = f"{[message_of(3, n, LARGEST, 4) for n in range(50)]} {[deed_of(3, n, 1) for n in range(50)]}\n"
    assert printed == {here}
    assert message_of(3, 1, LARGEST) != message_of(4, 1, LARGEST)


def test_a_reader_that_knows_of_no_others_computes_the_same_message() -> None:
    for number in range(200):
        alone, among = message_of(1, number, LARGEST), message_of(1, number, LARGEST, 8)
        assert alone._replace(withdrawn=None) == among._replace(withdrawn=None)


def test_every_kind_of_message_and_deed_comes_up() -> None:
    messages = [message_of(1, number, LARGEST, 3) for number in range(1000)]
    parts = [part for message in messages for part in message.parts]
    assert {part.source for part in parts} == {"plain", "empty", "popular"}
    assert {part.size for part in parts} > {0, 1}
    assert max(part.size for part in parts) > LARGEST // 2
    assert max(len(message.parts) for message in messages) > 100
    assert {message.opens for message in messages} == {1, 2}
    assert {message.withdrawn for message in messages} > {None, 0}
    assert {deed_of(1, number, 0)[0] for number in range(1000)} == DEEDS
    assert all(part.start + part.size <= LARGEST + MIB for part in popular(1, LARGEST))


def test_one_wrong_byte_is_found() -> None:
    content = Content(1, LARGEST)
    part = Part(5, (1000,))
    got = content.of(part).clone()
    assert Held(1, 1, got, content.of(part)).check() == 1000
    assert Held(1, 1, got.numpy(), content.of(part)).check() == 1000
    got[999] ^= 1
    with pytest.raises(WrongBytes, match="message 1"):
        Held(1, 1, got, content.of(part)).check()
    with pytest.raises(WrongBytes):
        Held(1, 1, torch.tensor([7, 7, 8], dtype=torch.uint8), 7).check()
