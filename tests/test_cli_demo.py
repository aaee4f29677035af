"""`shmcast demo`: its arguments, what it prints, what it measures, and how it ends when something fails."""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from shmcast.cli import _inputs, _pixels, _rank, _report, _run, command_line
from shmcast.cli._inputs import Part, Request, build_request
from shmcast.cli._rank import WAYS, Call, Memory, Report, Span, fingerprint
from shmcast.cli.demo import size_of
from shmcast.multimodal import MultimodalInputs
from tests.support.ranks import Ranks

ROOT = Path(__file__).parent.parent
KEYS = [way.key for way in WAYS]


def small_request(pictures: int = 2, side: int = 280) -> Request:
    processor = _pixels.own_processor()
    images = [Image.effect_mandelbrot((side, side), (-2, -1, 1, 1), 20 + n) for n in range(pictures)]
    return build_request([Part("picture", *processor.run(image)) for image in images], [], processor.name)


# The command line.


def script(text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_needs_neither_torch_nor_numpy() -> None:
    done = script(
        "import atexit, sys; sys.argv = ['shmcast', 'demo', '--help']; from shmcast.__main__ import main\n"
        "atexit.register(lambda: print('loaded:', *{'torch', 'numpy', 'PIL'} & set(sys.modules)))\n"
        "main()"
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: shmcast demo [OPTIONS] [FILES]..." in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("missing", ["click", "rich", "PIL"])
def test_a_missing_package_is_named_with_the_way_to_get_it(missing: str, tmp_path: Path) -> None:
    done = script(
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['shmcast', 'demo', {str(tmp_path)!r}]\n"
        "from shmcast.__main__ import main; main()"
    )
    package = {"PIL": "pillow"}.get(missing, missing)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"shmcast: the command line needs {package}, which is not installed: pip install 'shmcast[cli]'"


def test_any_other_missing_module_is_a_bug_and_shown_as_one() -> None:
    done = script("import sys; sys.modules['shmcast.cli.demo'] = None; from shmcast.__main__ import main; main()")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--ranks", "1"], "1 is not in the range 2<=x<=64"),
        (["--ranks", "65"], "65 is not in the range 2<=x<=64"),
        (["--rounds", "0"], "0 is not in the range"),
        (["--capacity", "lots"], "'lots' is not a size; examples: 268435456, 256M, 1G"),
        (["--capacity", "10K"], "'10K' is less than 1M"),
        (["--max-pixels", "3135"], "3135 is less than 3136"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], told: str) -> None:
    done = CliRunner().invoke(command_line, ["demo", *arguments])
    assert done.exit_code == 2
    assert told in done.stderr


def test_the_default_that_help_gives_is_the_one_that_is_used() -> None:
    assert f"[default: {_pixels.MAX_PIXELS}]" in " ".join(
        CliRunner().invoke(command_line, ["demo", "-h"]).output.split()
    )


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 1 << 20), ("256M", 256 << 20), ("2g", 2 << 30), ("64MiB", 64 << 20), ("1T", 1 << 40)]
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(None, None, text) == size


def test_when_nothing_is_left_it_says_so_and_fails(tmp_path: Path) -> None:
    (tmp_path / "notes\x1b[31m.txt").write_text("hello")
    (tmp_path / "zero.png").touch()
    paths = [str(tmp_path), str(tmp_path / "gone")]
    done = CliRunner().invoke(command_line, ["demo", *paths])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[2:] == [
        rf"shmcast: {tmp_path}/notes\x1b[31m.txt is not a picture, a video or a WAV file that can be read here",
        f"shmcast: {tmp_path}/zero.png is empty",
        f"shmcast: {tmp_path}/gone does not exist",
        "shmcast: nothing is left to send: none of what was named can be used",
    ]
    done = CliRunner().invoke(command_line, ["demo", "--json", *paths])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["error"] == "nothing is left to send: none of what was named can be used"
    assert [Path(each["file"]).name for each in told["refused"]] == ["notes\x1b[31m.txt", "zero.png", "gone"]


# The report, from numbers that are made up.


def made_up(
    ready: dict[str, float], *, equal: bool = True, routes: dict[str, dict[str, int]] | None = None, late: float = 0.0
) -> list[Report]:
    """Two ranks, two rounds. `fn` takes 0.1 s, rank 1 is ready last; the second round takes twice as long."""
    reports = []
    for rank in (0, 1):
        calls = []
        for way in WAYS:
            for number in (1, 2):
                at = 1000.0 * number
                start, end = at + late * rank, at + (ready[way.key] * number if rank else 0.1)
                fn = Span(at, at + 0.1) if rank == 0 or way.key == "alone" else None
                calls.append(Call(way.key, "same", Span(start, end), fn, cpu=0.25))
            seen = "same" if equal or rank == 0 or way.key != "bytes" else "other"
            calls.append(Call(way.key, seen, memory=Memory(rank * 1_000_000, 90_000_000)))
        fallbacks = {"bytes": {"full": 1}} if routes else {}
        reports.append(Report(tuple(calls), routes or {"bytes": {"shm": 3}, "references": {"shm": 3}}, fallbacks, 5))
    return reports


READY = {"alone": 0.3, "object_list": 1.1, "bytes": 0.2, "references": 0.11}


def test_rows_are_medians_over_rounds_of_the_last_rank() -> None:
    outcome = _report.outcome_of(made_up(READY), "same")
    rows = {row.way.key: row for row in outcome.rows}
    assert list(rows) == KEYS
    assert rows["bytes"].rounds == pytest.approx((0.2, 0.4))
    assert rows["bytes"].ready == pytest.approx(0.3)
    assert rows["bytes"].cpu == pytest.approx(0.5)
    assert rows["bytes"].sooner == pytest.approx(1.65 / 0.3)
    assert rows["object_list"].sooner == 1
    assert rows["bytes"].entry == Memory(0, 90_000_000)
    assert rows["bytes"].others == Memory(1_000_000, 90_000_000)
    assert outcome.equal
    assert outcome.shared == 5
    assert outcome.fallbacks == ()


def test_what_comes_after_fn_is_told_apart_where_only_one_rank_runs_it() -> None:
    rows = {row.way.key: row for row in _report.outcome_of(made_up(READY), "same").rows}
    assert rows["alone"].after_fn is None
    assert rows["bytes"].after_fn == pytest.approx(0.2)
    assert rows["bytes"].fn == pytest.approx(0.1)


def test_a_rank_that_begins_late_is_not_blamed_on_the_way() -> None:
    rows = {row.way.key: row for row in _report.outcome_of(made_up(READY, late=0.105), "same").rows}
    assert rows["references"].ready == pytest.approx(0.165 - 0.105)
    assert rows["references"].after_fn == pytest.approx(0.165 - 0.105)


@pytest.mark.parametrize(("equal", "expected"), [(False, "same"), (True, "something else")])
def test_bytes_that_differ_are_told(equal: bool, expected: str) -> None:
    outcome = _report.outcome_of(made_up(READY, equal=equal), expected)
    assert not outcome.equal
    assert "NOT EVERY RANK HAD EQUAL BYTES" in printed(outcome, 80)
    assert not _report.as_object(small_request(), outcome, 2)["equal"]


def test_a_way_that_did_not_go_through_shared_memory_is_told() -> None:
    routes = {"bytes": {"shm": 1, "inline": 2}, "references": {"shm": 3}}
    outcome = _report.outcome_of(made_up(READY, routes=routes), "same")
    assert outcome.fallbacks == (
        "shmcast, bytes, not always through shared memory (it went inline): "
        "there is no room for it; is --capacity, or /dev/shm, too small?",
    )
    assert "it went inline" in printed(outcome, 80)


def printed(outcome: _report.Outcome, width: int) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, highlight=False)
    console.print(_report.as_table(small_request(), outcome, 64))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("factor", [1e-3, 1, 1000])
def test_the_table_fits_and_nothing_of_it_is_cut(width: int, factor: float) -> None:
    outcome = _report.outcome_of(made_up({key: 0.1 + factor * (value - 0.1) for key, value in READY.items()}), "same")
    text = printed(outcome, width)
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= width
    for way in WAYS:
        assert len([line for line in text.splitlines() if line.startswith(f" {way.title} ")]) == 1
    assert re.search(r"shmcast, bytes .* ms .* 1\.0 \+ 90\.0 MB .*x", text) or factor == 1000
    assert "2 pictures: 800 patches, 3.8 MB (through Pillow and numpy)" in text


# What ranks measure.


def measured(rank: int) -> tuple[Report, dict[str, int], dict[str, int]]:
    """A run with two rounds: the report, how many features each way hashed here, and how many came over the group."""
    from shmcast import digest

    now: list[str] = []
    hashed = dict.fromkeys(KEYS, 0)
    real, ran = digest._hash, _rank._Ends.run

    def counting(data: Any, name: str) -> bytes:
        hashed[now[-1]] += 1
        return real(data, name)

    def run(self: Any, way: _rank.Way, raw: Any) -> MultimodalInputs:
        now.append(way.key)
        return ran(self, way, raw)

    digest._hash, _rank._Ends.run = counting, run  # type: ignore[method-assign]
    try:
        report = _rank.measure(rank, 2, None, small_request().raw, lambda text: None)
    finally:
        digest._hash, _rank._Ends.run = real, ran  # type: ignore[method-assign]
    return report, hashed, {key: now.count(key) for key in KEYS}


@pytest.mark.multiprocess
def test_every_way_does_its_work_anew_in_every_round(ranks: Ranks) -> None:
    expected = fingerprint(MultimodalInputs.from_dict(small_request().raw))
    for rank, (report, hashed, calls) in enumerate(ranks.run(3, measured)):
        # Two timed rounds, one before to warm up, one after for memory.
        assert calls == dict.fromkeys(KEYS, 4)
        pictures = 2 * 4
        assert hashed == {
            "alone": pictures,
            "object_list": pictures if rank == 0 else 0,
            "bytes": pictures if rank == 0 else 0,
            "references": pictures if rank == 0 else 0,
        }
        assert {call.fingerprint for call in report.calls} == {expected}
        assert report.routes == {"bytes": {"shm": 4}, "references": {"shm": 4}}
        assert report.fallbacks == {"bytes": {}, "references": {}}
        assert [call.way for call in report.calls if call.whole][:5] != KEYS + KEYS[:1]


def told(rank: int) -> list[str]:
    steps: list[str] = []
    _rank.measure(rank, 1, None, small_request(1, 56).raw, steps.append)
    return steps


@pytest.mark.multiprocess
def test_the_entry_rank_tells_what_it_begins(ranks: Ranks) -> None:
    entry, other = ranks.run(2, told)
    assert other == []
    assert [step.partition(":")[0] for step in entry] == (
        ["warming up"] * 4 + ["round 1 of 1"] * 4 + ["looking at memory"] * 4
    )


def changed_fingerprints() -> set[str]:
    raw = small_request().raw
    made = [MultimodalInputs.from_dict(_inputs.fresh(raw)) for _ in range(5)]
    feature = made[1].mm_items[1].feature
    feature[-1, -1] += 1  # type: ignore[index, call-overload]
    made[2].mm_items[0].hash = 1
    made[3].mm_items[0].image_grid_thw[0, 0] = 2
    made[4].mm_items.pop()
    return {fingerprint(each) for each in made}


def test_a_fingerprint_sees_every_change() -> None:
    assert len(changed_fingerprints()) == 5


def test_private_memory_is_what_this_process_alone_has() -> None:
    before = _rank.private_bytes()
    held = torch.ones(8 << 20, dtype=torch.uint8)
    after = _rank.private_bytes()
    assert after - before > 0.9 * held.nbytes
    del held
    assert _rank.private_bytes() - before < 1 << 20


# Whole runs.


@pytest.mark.multiprocess
def test_a_run_from_files_to_json(tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        Image.effect_mandelbrot((560, 420), (-2, -1, 1, 1), 40).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("hello")
    command = [sys.executable, "-m", "shmcast", "demo", str(tmp_path), "--ranks", "2", "--rounds", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"shmcast: {tmp_path}/notes.txt is not a picture" in done.stderr
    found = json.loads(done.stdout)
    size = 2 * 40 * 30 * 4704
    assert found["request"] | {"processor": ""} == {
        "files": {"picture": 2},
        "patches": 2400,
        "bytes": size,
        "processor": "",
    }
    assert [Path(each["file"]).name for each in found["refused"]] == ["notes.txt"]
    assert found["equal"]
    assert found["fallbacks"] == []
    assert [way["way"] for way in found["ways"]] == KEYS
    added = {way["way"]: way["private_bytes"]["others"]["added"] for way in found["ways"]}
    assert added["object_list"] > 0.9 * size
    assert added["bytes"] < 0.1 * size > added["references"]


@pytest.mark.multiprocess
def test_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    Image.effect_mandelbrot((560, 420), (-2, -1, 1, 1), 40).save(tmp_path / "a.png")
    command = [sys.executable, "-m", "shmcast", "demo", str(tmp_path), "--ranks", "2", "--rounds", "1000"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "round 1 of" in line:
                break
        # As a terminal does: to every process of the group.
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 1
    assert rest.strip().splitlines()[-1] == "Aborted!"
    assert "Traceback" not in rest
    assert list((tmp_path / "temporary").iterdir()) == []


def running() -> list[Any]:
    """The demonstration's own processes: the pool's are children of this process too."""
    return [child for child in multiprocessing.active_children() if child.name.startswith("demo-rank-")]


def kill_one(text: str) -> None:
    running()[0].kill()


def interrupt(text: str) -> None:
    raise KeyboardInterrupt


@pytest.mark.multiprocess
@pytest.mark.faults
@pytest.mark.parametrize(
    ("on_step", "error", "told"),
    [(kill_one, _run.RunFailed, r"rank \d was killed \(SIGKILL\)"), (interrupt, KeyboardInterrupt, "^$")],
)
def test_a_run_that_ends_early_leaves_nothing(
    on_step: Callable[[str], None], error: type[BaseException], told: str
) -> None:
    with pytest.raises(error, match=told):
        _run.run_ranks(small_request().raw, 2, 50, None, on_step)
    assert running() == []


@pytest.mark.multiprocess
def test_a_rank_that_raises_is_told_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMCAST_CAPACITY", "plenty")
    with pytest.raises(_run.RunFailed, match=r"rank \d: \w+: .*SHMCAST_CAPACITY='plenty'.* \(\w+\.py, line \d+\)"):
        _run.run_ranks(small_request().raw, 2, 1, None, print)


def test_ranks_that_say_nothing_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "SECONDS", 0.0)
    with pytest.raises(_run.RunFailed, match="no rank has been heard of"):
        _run.run_ranks(small_request().raw, 2, 1, None, print)
    assert running() == []


def test_ctrl_c_while_ranks_start_is_put_off_not_lost() -> None:
    reached = []

    def start() -> None:
        with _run._children_deaf_to_ctrl_c():
            signal.raise_signal(signal.SIGINT)
            reached.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    with pytest.raises(KeyboardInterrupt):
        start()
    assert [signal.SIGINT in mask for mask in reached] == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_unwinds_the_stack() -> None:
    def leave() -> None:
        with _run._ended_by_sigterm():
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        leave()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_run_that_fails_is_an_error_in_json_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (56, 56)).save(tmp_path / "a.png")

    def fail(*_: Any) -> list[Report]:
        raise _run.RunFailed("rank 1 was killed")

    monkeypatch.setattr(_run, "run_ranks", fail)
    done = CliRunner().invoke(command_line, ["demo", "--json", str(tmp_path)])
    assert done.exit_code == 1
    assert json.loads(done.stdout) == {"error": "rank 1 was killed", "refused": []}
    assert done.stderr.splitlines()[-1] == "shmcast: rank 1 was killed"


@pytest.mark.parametrize(("expected", "code"), [(True, 0), (False, 1)])
def test_the_exit_status_tells_whether_bytes_were_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: bool, code: int
) -> None:
    Image.new("L", (56, 56)).save(tmp_path / "a.png")
    monkeypatch.setattr(_run, "run_ranks", lambda *_: made_up(READY))
    monkeypatch.setattr(_rank, "fingerprint", lambda _: "same" if expected else "other")
    done = CliRunner().invoke(command_line, ["demo", str(tmp_path)])
    assert done.exit_code == code
    assert done.stdout.startswith("1 picture: 16 patches, 0.1 MB")
