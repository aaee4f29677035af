"""The fuzz targets: no input breaks them, each of them can fail, and the driver tells of what kills a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz.run
from fuzz import _tripwire
from fuzz._answers import Violation, ask, require
from fuzz._mutate import Mutator
from fuzz._worker import prepared
from fuzz.targets import MODULES, blocks, inline, load, segments, skeletons, wire
from shmcast import _segment
from shmcast._headers import HeaderReader
from shmcast._joining import Offer
from shmcast._layout import Message, Piece
from shmcast._ring import Inbox
from shmcast._wire import Address, Handle, Header, HeaderRoute
from shmcast.errors import LayoutError
from shmcast.integrations.sglang._tickets import RawTicket
from shmcast.transport import Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fuzz._target import Target

ROOT = Path(__file__).parent.parent
CORPUS = ROOT / "fuzz" / "corpus"
FILES = sorted(path for path in CORPUS.glob("*/*") if path.is_file())


@pytest.fixture(params=MODULES)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each target in turn, with the tripwire in place and nothing left to import."""
    found = prepared(request.param)
    yield found
    found.close()


# No input breaks them.


def test_every_target_is_where_it_says(target: Target) -> None:
    assert target == load(target.name)
    assert target.check(b"")


def test_what_the_library_writes_is_accepted(target: Target) -> None:
    outcomes = {target.check(data) for data in target.seeds()}
    assert outcomes & {"parsed", "mapped", "entries", "header", "decoded", "opened", "settled"}


@settings(max_examples=20)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_any_damage_is_answered(data: st.DataObject, seed: int) -> None:
    name = data.draw(st.sampled_from(sorted(MODULES)))
    found = load(name)
    mutator = Mutator(found, found.seeds(), Random(seed))
    try:
        for _ in range(20):
            case = mutator.next()
            try:
                found.check(case)
            except Violation as violation:
                raise AssertionError(f"{name}: {violation}: {case!r}") from violation
    finally:
        found.close()


CHEAP = ["segment", "block", "message", "ring", "slot", "address", "handle", "carrier", "header", "offer"]


@pytest.mark.parametrize("name", [*CHEAP, "skeleton", "opcodes", "entries", "inline", "index"])
@settings(max_examples=50)
@given(data=st.binary(max_size=300), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_are_answered(name: str, data: bytes, seed: int) -> None:
    found = load(name)
    try:
        found.check(data)
        found.check(Mutator(found, [data], Random(seed)).next())
    finally:
        found.close()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_corpus_is_answered(path: Path) -> None:
    found = prepared(path.parent.name)
    try:
        assert found.check(path.read_bytes())
    finally:
        found.close()


def test_the_corpus_is_small_and_has_every_target() -> None:
    assert {path.parent.name for path in FILES} == set(MODULES)
    assert len(FILES) <= 100
    assert sum(path.stat().st_size for path in FILES) < 200_000


def test_damage_is_the_same_for_the_same_seed(target: Target) -> None:
    seeds = target.seeds()
    one, other, third = (Mutator(target, seeds, Random(seed)) for seed in (5, 5, 6))
    cases = [one.next() for _ in range(50)]
    assert cases == [other.next() for _ in range(50)]
    assert cases != [third.next() for _ in range(50)]
    assert len(set(cases)) > 25


# Each of them can fail.


def breaks(error: Exception) -> Callable[..., Any]:
    """A parser that raises this, whatever it is given."""

    def parse(*_: Any, **__: Any) -> Any:
        raise error

    return parse


def gives(value: object) -> Callable[..., Any]:
    """A parser that gives this, whatever it is given."""
    return lambda *_, **__: value


OUTSIDE = Message(b"", (), (Piece(0, 64, 2**20),))

PLANTED: list[tuple[str, object, str, Callable[..., Any]]] = [
    ("segment", segments, "parse_segment", breaks(IndexError())),
    ("segment", segments, "parse_segment", gives(segments.headers()[-1])),
    ("attach", _segment, "_check", breaks(MemoryError())),
    ("block", blocks, "parse_block", breaks(KeyError())),
    ("block", blocks, "parse_block", gives(b"from elsewhere")),
    ("message", blocks, "parse_message", breaks(OverflowError())),
    ("message", blocks, "parse_message", gives(OUTSIDE)),
    ("ring", Inbox, "drain", breaks(ValueError())),
    ("ring", Inbox, "drain", gives([(1, 1)])),
    ("slot", HeaderReader, "receive", breaks(ValueError())),
    ("slot", HeaderReader, "receive", gives(b"x" * 256)),
    ("address", Address, "parse", breaks(ZeroDivisionError())),
    ("handle", Handle, "parse", breaks(TypeError())),
    ("handle", Handle, "parse", gives(wire.handles()[1])),
    ("carrier", wire, "carried", breaks(IndexError())),
    ("carrier", wire, "carried", gives(RawTicket(bytes(wire.handles()[1]), True))),
    ("header", wire, "parse_header", breaks(UnicodeDecodeError("utf-8", b"", 0, 1, "why"))),
    ("header", wire, "parse_header", gives(Header(HeaderRoute.NONE, 1))),
    ("offer", Offer, "parse", breaks(RecursionError())),
    ("offer", Offer, "parse", gives(Offer(plane=2**64))),
    ("skeleton", skeletons, "decode", breaks(AssertionError())),
    ("skeleton", skeletons, "decode", gives([torch.zeros(3)])),
    ("opcodes", skeletons, "decode", gives({"a": torch.zeros(3)})),
    ("entries", skeletons, "decode", gives((torch.zeros(3).numpy(),))),
    ("inline", inline, "unpack_inline", gives(torch.zeros(3))),
    ("inline", inline, "unpack_inline", breaks(BufferError())),
    ("index", inline, "parse_index", breaks(RuntimeError())),
    ("index", inline, "parse_index", gives({})),
    ("reader", Reader, "open", breaks(ValueError())),
    ("reader", Reader, "open", gives(torch.zeros(1 << 16))),
    ("writer", Writer, "settle", breaks(KeyError())),
]


def test_every_target_has_a_planted_violation() -> None:
    assert {name for name, *_ in PLANTED} == set(MODULES)


@pytest.mark.parametrize("row", PLANTED, ids=lambda row: f"{row[0]}-{row[2]}")
def test_a_target_catches_a_planted_violation(
    row: tuple[str, object, str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, owner, attribute, parser = row
    found = prepared(name)
    try:
        data = found.seeds()[0]
        assert found.check(data)
        monkeypatch.setattr(owner, attribute, parser)
        with pytest.raises(Violation):
            found.check(data)
        monkeypatch.undo()
    finally:
        found.close()


def write_a_file() -> None:
    with open(os.devnull, "w"):
        pass


def connect() -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/nowhere")


FORBIDDEN: dict[str, Callable[[], object]] = {
    "a shell": lambda: os.system("true"),
    "a program": lambda: subprocess.run(["true"], check=True),
    "a file": write_a_file,
    "a file by number": lambda: os.close(os.open(os.devnull, os.O_RDWR)),
    "code": lambda: eval("1 + 1"),
    "a module": lambda: __import__("shmcast.no_such_module"),
    "a connection": connect,
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_tripwire_tells_of_code_that_runs(name: str) -> None:
    _tripwire.install()
    with pytest.raises(Violation, match="code ran"):
        ask(FORBIDDEN[name], (OSError, ImportError))


def test_the_tripwire_lets_what_parsers_do_pass() -> None:
    _tripwire.install()
    with open(__file__) as file:
        assert ask(lambda: (len(file.readline()), __import__("os")), ()).value
    os.close(os.open(os.devnull, os.O_RDWR))
    assert ask(lambda: 5, ()).value == 5


def test_an_error_that_hides_a_lack_of_memory_is_told() -> None:
    def hides() -> None:
        try:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        except RuntimeError as error:
            raise LayoutError("not a skeleton") from error

    with pytest.raises(Violation, match="memory"):
        ask(hides, (LayoutError,))
    assert ask(breaks(LayoutError("only wrong")), (LayoutError,)).refused == "LayoutError"
    with pytest.raises(Violation, match="why"):
        require(False, "why")


# The driver.

PLANT = """
import os, signal, sys, types
from pathlib import Path
from fuzz import run, targets
from fuzz._answers import ask
from fuzz._target import Target

deeds = {
    "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "hangs": lambda: signal.pause(),
    "grows": lambda: ask(lambda: len(bytearray(b"1") * (300 << 20)), ()),
    "raises": lambda: ask(lambda: {}["no"], ()),
}


def check(data):
    if data == b"poison":
        deeds[sys.argv[1]]()
    return "parsed"


planted = types.ModuleType("fuzz.targets.planted")
planted.TARGETS = (Target("planted", check, lambda: [b"good"]),)
sys.modules["fuzz.targets.planted"] = planted
targets.MODULES["planted"] = "planted"
run._worker.corpus_of = lambda target, folder: [b"good"]
run._worker.Mutator.next = lambda self, count=[0]: count.append(0) or (b"poison" if len(count) % 700 == 0 else b"good")
plan = run.Plan("planted", "mutate", 2000, 0.0, 1, 1, Path(sys.argv[2]), 0.5)
outcome = run.campaign(plan)
run.show(plan, outcome)
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("deed", "says"),
    [("dies", "SIGSEGV"), ("hangs", "no answer within"), ("grows", "took"), ("raises", "KeyError: 'no'")],
)
def test_the_driver_keeps_the_input_that_did_it(deed: str, says: str, tmp_path: Path) -> None:
    script = textwrap.dedent(PLANT)
    done = subprocess.run(
        [sys.executable, "-c", script, deed, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert "VIOLATION" in done.stdout
    (kept,) = {path.read_bytes() for path in tmp_path.iterdir()}
    assert kept == b"poison"


@pytest.mark.multiprocess
def test_the_driver_counts_and_replays(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "fuzz.run", *arguments, "--findings", str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert "2,000 cases" in run("segment", "--cases", "2000", "--processes", "2")
    text = run("block", "--replay", str(CORPUS / "block"))
    assert text.count("\n") == len(list((CORPUS / "block").iterdir()))
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_a_violation_is_and_how_to_replay_it(capsys: pytest.CaptureFixture[str]) -> None:
    plan = fuzz.run.Plan("block", "mutate", 1, 0.0, 1, 1, ROOT)
    outcome = fuzz.run.Outcome(1, 1.0, findings=[{"path": "x", "text": "KeyError"}], coverage="5 branches")
    fuzz.run.show(plan, outcome)
    shown = capsys.readouterr().out
    assert "VIOLATION: KeyError" in shown
    assert "python -m fuzz.run block --replay x" in shown
    assert "coverage: 5 branches" in shown
