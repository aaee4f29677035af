"""The package as a whole: what importing it costs, what it exports, and the house rules.

The house rules are naive string matching, for easy mistakes only.
"""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import shmcast

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "shmcast").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

NAMES = {
    "Admission",
    "ArenaFull",
    "Broadcaster",
    "ClosedError",
    "EncodeError",
    "Handle",
    "LayoutError",
    "MaterializeError",
    "Modality",
    "MultimodalDataItem",
    "MultimodalInputs",
    "NotAllowed",
    "PeerDied",
    "Policy",
    "Reader",
    "Route",
    "SchedulerBackend",
    "ShmcastError",
    "StaleHandle",
    "Stats",
    "UnknownRequest",
    "Writer",
    "to_device",
}
LIGHT = [
    "_blocks",
    "_board",
    "_cache",
    "_headers",
    "_layout",
    "_news",
    "_pages",
    "_peers",
    "_reclaim",
    "_ring",
    "_room",
    "_segment",
    "_tickets",
    "_turn",
    "_wire",
    "cli",
    "cli._checks",
    "cli._probe_rank",
    "cli._probes",
    "cli.doctor",
    "cli.gc",
    "errors",
    "policy",
]

NOUNS = {"Manager", "Handler", "Context", "Buffer", "Helper", "Info", "Data"}
FIELD_NAMES = {"MultimodalDataItem"}  # SGLang's name for it, which users know
LONGEST_FILE = 500


def heavy_after(statement: str) -> str:
    """Which of torch and numpy a new interpreter has loaded after `statement`."""
    script = f"import sys; {statement}; print(*sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    assert heavy_after("import shmcast; dir(shmcast); shmcast.__all__; shmcast.__version__") == ""


@pytest.mark.parametrize("module", LIGHT)
def test_what_cleaning_up_needs_loads_neither_torch_nor_numpy(module: str) -> None:
    assert heavy_after(f"import shmcast.{module}") == ""


def test_an_error_class_is_reachable_without_torch() -> None:
    assert heavy_after("import shmcast; shmcast.LayoutError") == ""


def test_the_look_for_heavy_modules_can_fail() -> None:
    assert heavy_after("import numpy") == "numpy"


def test_exported_names() -> None:
    assert set(shmcast.__all__) == NAMES
    assert len(shmcast.__all__) == len(NAMES)
    assert set(dir(shmcast)) >= NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_exported_name_is_there_and_knows_its_name(name: str) -> None:
    found = getattr(shmcast, name)
    assert found.__name__ == name
    assert found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    missing = "Teleporter"
    with pytest.raises(AttributeError, match=f"no attribute '{missing}'"):
        getattr(shmcast, missing)


def test_the_version_is_the_installed_one() -> None:
    assert shmcast.__version__ == importlib.metadata.version("shmcast")


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "shmcast" / "py.typed").is_file()


def test_pins_are_exact_and_portable() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin)] == []


def found_in(files: list[Path], pattern: str) -> list[str]:
    """`file:line: text` of every line in `files` that matches."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_no_test_sleeps() -> None:
    assert found_in(TESTS, r"\btime\.sleep\(|^from time import .*\bsleep\b") == []


def test_the_library_has_no_assert_statement() -> None:
    assert found_in(LIBRARY, r"^\s*assert\b") == []


def test_class_names_use_no_empty_nouns() -> None:
    names = {name for path in LIBRARY for name in re.findall(r"^\s*class (\w+)", path.read_text(), re.MULTILINE)}
    assert names >= {"LayoutError"}
    words = {name: set(re.findall(r"[A-Z][a-z]*", name)) for name in names - FIELD_NAMES}
    assert sorted(name for name in words if words[name] & NOUNS) == []


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_has_grown_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE
