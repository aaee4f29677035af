"""`shmcast demo`: one real request, to every rank, in four ways: the times, the memory, and a check of the bytes."""

from __future__ import annotations

import json
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from shmcast.cli._inputs import Refused, Request
    from shmcast.cli._report import Outcome

_LEAST_CAPACITY: Final = 1 << 20


def size_of(ctx: click.Context | None, param: click.Parameter | None, text: str | None) -> int | None:
    """A number of bytes, at least a MiB: 268435456, 256M, 256MiB, 1G."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,15})([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a size; examples: 268435456, 256M, 1G.", ctx, param)
    size = int(found[1]) << 10 * " KMGT".index(found[2].upper() or " ")
    if size < _LEAST_CAPACITY:
        raise click.BadParameter(f"{text!r} is less than 1M.", ctx, param)
    return size


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path, readable=False))
@click.option("--ranks", type=click.IntRange(2, 64), default=4, show_default=True, help="How many processes.")
@click.option("--rounds", type=click.IntRange(1, 1000), default=5, show_default=True, help="After one that warms up.")
@click.option(
    "--capacity",
    callback=size_of,
    metavar="SIZE",
    help="The most shared memory, say 512M.  [default: a quarter of what is free]",
)
@click.option("--max-pixels", type=int, help="The most pixels of a picture or frame.  [default: 1003520]")
@click.option("--json", "as_json", is_flag=True, help="One object on standard output, nothing else there.")
def demo(
    files: tuple[Path, ...], ranks: int, rounds: int, capacity: int | None, max_pixels: int | None, as_json: bool
) -> None:
    """Send one request to all ranks of this machine in four ways, check that the bytes are equal, and compare.

    FILES are pictures, videos, WAV files, or folders of them; without any, pictures are drawn. They become what a
    Qwen2-VL model takes. A file that cannot be used is named, and the others go on.
    """
    progress = _Progress()
    refused: list[Refused] = []
    try:
        with progress.shown():
            request = _read(files, max_pixels, progress, refused)
            outcome = _run(request, ranks, rounds, capacity, progress)
    except _Stop as stop:
        _fail(str(stop), refused, as_json)
    _show(request, outcome, ranks, as_json)
    if not outcome.equal:
        raise click.exceptions.Exit(1)


class _Stop(Exception):
    """The run cannot go on; the message says why."""


def _read(files: tuple[Path, ...], max_pixels: int | None, progress: _Progress, refused: list[Refused]) -> Request:
    """The request of these files, or of drawn pictures."""
    progress.say("loading libraries")
    from shmcast.cli import _inputs, _pixels

    most = _pixels.MAX_PIXELS if max_pixels is None else max_pixels
    if most < _pixels.MIN_PIXELS:
        raise click.BadParameter(f"{most} is less than {_pixels.MIN_PIXELS}.", param_hint="'--max-pixels'")
    processor = _pixels.best_processor(most)
    if not files:
        progress.say("drawing pictures")
        return _inputs.build_request(_inputs.sample_parts(processor), (), processor.name)
    progress.say("reading files")
    parts, left_out = _inputs.read_request(files, processor, most)
    refused += left_out
    for each in left_out:
        progress.note(f"{_printable(each.file)} {_printable(each.reason)}")
    if not parts:
        raise _Stop("nothing is left to send: none of what was named can be used")
    return _inputs.build_request(parts, refused, processor.name)


def _run(request: Request, ranks: int, rounds: int, capacity: int | None, progress: _Progress) -> Outcome:
    """Have the ranks measure."""
    from shmcast.cli import _inputs, _rank, _report
    from shmcast.cli._run import RunFailed, run_ranks
    from shmcast.multimodal import MultimodalInputs

    progress.begin(f"starting {ranks} ranks", (rounds + 2) * len(_rank.WAYS) + 1)
    try:
        reports = run_ranks(request.raw, ranks, rounds, capacity, progress.step)
    except RunFailed as error:
        raise _Stop(str(error)) from error
    except OSError as error:
        raise _Stop(f"the ranks cannot be started: {error}") from error
    return _report.outcome_of(reports, _rank.fingerprint(MultimodalInputs.from_dict(_inputs.fresh(request.raw))))


def _show(request: Request, outcome: Outcome, ranks: int, as_json: bool) -> None:
    from rich.console import Console

    from shmcast.cli import _report

    if as_json:
        click.echo(json.dumps(_report.as_object(request, outcome, ranks)))
    else:
        Console(highlight=False).print(_report.as_table(request, outcome, ranks))


def _fail(message: str, refused: Iterable[Refused], as_json: bool) -> NoReturn:
    if as_json:
        names = [{"file": each.file, "reason": each.reason} for each in refused]
        click.echo(json.dumps({"error": message, "refused": names}))
    click.echo(f"shmcast: {message}", err=True)
    raise click.exceptions.Exit(1)


def _printable(text: str) -> str:
    """The text, as one line, with nothing in it that a terminal would obey."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text
    )


class _Progress:
    """What goes on, on standard error: a bar on a terminal, else a line for each new phase."""

    def __init__(self) -> None:
        self._advance: Callable[[str, int | None, bool], None] = self._line
        self._print: Callable[[str], None] = _to_stderr
        self._last = ""

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While this lasts, the bar is there."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)

            def advance(text: str, total: int | None, step: bool) -> None:
                bar.update(task, description=text, advance=int(step), total=total)

            self._advance = advance
            # Through the bar, which else would be in the way.
            self._print = lambda text: bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            yield

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(f"shmcast: {text}")

    def say(self, text: str) -> None:
        """A phase of unknown length."""
        self._advance(text, None, False)

    def begin(self, text: str, steps: int) -> None:
        """A phase of so many steps."""
        self._advance(text, steps, False)

    def step(self, text: str) -> None:
        """The next step."""
        self._advance(text, None, True)

    def _line(self, text: str, total: int | None, step: bool) -> None:
        phase = text.partition(":")[0]
        if phase != self._last:
            self._last = phase
            _to_stderr(f"shmcast: {phase}")


def _to_stderr(text: str) -> None:
    click.echo(text, err=True)
