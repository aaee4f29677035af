"""The documents say what the code does: tables against structs, examples by running them, names by looking them up."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import shmcast
from shmcast import _board, _layout, _wire
from shmcast._reclaim import Verdict
from shmcast.cli.doctor import CHECKS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FORMAT = (DOCS / "format.md").read_text()
README = (ROOT / "README.md").read_text()

ROW = re.compile(r"^ +(?P<offset>\d+) +(?P<size>\d+) +(?P<field>\w+)")

# Which struct each table of the format describes.
STRUCTS = {
    "Segment header": _layout.SEGMENT,
    "Ring entry": _layout.ENTRY,
    "Header slot": _layout.SLOT,
    "Block": _layout.BLOCK,
    "Board": _board.BOARD,
    "Board fallback": _board.FALLBACK,
    "Board reader": _board.READER,
    "Address": _wire.ADDRESS,
    "Handle": _wire.HANDLE,
    "Header": _wire.HEADER,
}


def tables(text: str) -> dict[str, list[tuple[int, int, str]]]:
    """The rows (offset, size, field) of each titled table in `text`."""
    found: dict[str, list[tuple[int, int, str]]] = {}
    title = ""
    for line in text.splitlines():
        if re.match(r"^[A-Z][a-z ]+[:.]", line):
            title = re.split(r"[:.]", line)[0]
        row = ROW.match(line)
        if row:
            found.setdefault(title, []).append((int(row["offset"]), int(row["size"]), row["field"]))
    return found


def block_after(title: str, text: str) -> str:
    """The first code block after a heading."""
    return text.split(f"## {title}\n")[1].split("```")[1].strip("\n")


@pytest.mark.parametrize(
    ("title", "doc"),
    [("In shared memory", _layout.__doc__), ("The board", _board.__doc__), ("Through channels", _wire.__doc__)],
)
def test_format_page_has_the_tables_of_the_code(title: str, doc: str) -> None:
    assert block_after(title, FORMAT) in doc


def test_format_page_has_the_invariants_of_the_code() -> None:
    assert _layout.__doc__ is not None
    assert block_after("Invariants", FORMAT) in _layout.__doc__


@pytest.mark.parametrize("title", STRUCTS)
def test_tables_tile_their_structs(title: str) -> None:
    rows = tables(FORMAT)[title]
    ends = [offset + size for offset, size, _ in rows]
    assert [offset for offset, _, _ in rows] == [0, *ends[:-1]]
    assert ends[-1] == STRUCTS[title].size


@pytest.mark.parametrize("title", STRUCTS)
def test_fields_sit_where_the_tables_say(title: str) -> None:
    layout = STRUCTS[title]
    rows = [row for row in tables(FORMAT)[title] if row[2] != "reserved"]
    codes = re.findall(r"\d*[a-wyzA-Z]", layout.format.lstrip("<"))
    assert len(codes) == len(rows)
    for number, (offset, size, field) in enumerate(rows):
        values = [
            b"\xff" * struct.calcsize(c) if c.endswith("s") else 2 ** (8 * struct.calcsize("<" + c)) - 1 for c in codes
        ]
        blank = [b"" if c.endswith("s") else 0 for c in codes]
        blank[number] = values[number]
        packed = layout.pack(*blank)
        assert packed == bytes(offset) + b"\xff" * size + bytes(layout.size - offset - size), field


def test_entry_kinds_and_routes_are_those_of_the_tables() -> None:
    for kind in _layout.EntryKind:
        assert f"{kind.value} {kind.name.lower()}" in FORMAT
    for route in _wire.HeaderRoute:
        assert f"{route.value} {route.name.lower()}" in FORMAT


def test_version_is_the_one_of_the_format_page() -> None:
    assert f"format version {_layout.VERSION}." in FORMAT


PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "SECURITY.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_test_that_a_claim_rests_on_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (DOCS / "security.md").read_text())
    assert len(named) > 40
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_every_public_name_is_on_the_map() -> None:
    api = (DOCS / "api.md").read_text()
    for name in shmcast.__all__:
        assert f"`{name}" in api or f".{name}" in api, name


def test_every_fallback_reason_is_in_the_failure_modes() -> None:
    page = (DOCS / "failure-modes.md").read_text()
    for reason in _wire.Reason:
        if reason not in _wire.CHOICES:
            assert f"fallback ({reason.name.lower()})" in page


def test_every_check_and_verdict_is_in_the_operations() -> None:
    page, _, _ = (DOCS / "operations.md").read_text().partition("## shmcast top")
    rows = re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)
    verdicts = {verdict.value for verdict in Verdict}
    assert [row for row in rows if row not in verdicts] == [*CHECKS, "ranks", "queue"]
    assert verdicts <= set(rows)


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


INTEGRATIONS = (DOCS / "integrations.md").read_text()


def test_every_setting_of_the_sglang_integration_has_a_row() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \|", INTEGRATIONS, flags=re.MULTILINE)
    folder = ROOT / "shmcast" / "integrations" / "sglang"
    told = re.findall(r"`(S[A-Z_]+)`: ", (folder / "_settings.py").read_text())
    assert sorted(rows) == sorted({"SHMCAST_SGLANG", *told})


@pytest.mark.multiprocess
@pytest.mark.parametrize("page", [README, INTEGRATIONS], ids=["README", "integrations"])
def test_an_example_runs_as_it_stands(page: str, tmp_path: Path) -> None:
    (program,) = examples(page)
    path = tmp_path / "example.py"
    path.write_text(program)
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1" in done.stdout
