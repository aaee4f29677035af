"""What soaks share: what processes use up while they run, whether that is flat, and how it is shown."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MIB = 1 << 20
PANEL_INCHES = (4.5, 2.8)
COLUMNS = 3


class Use(NamedTuple):
    """What one process has at one moment; bytes, or how many.

    `private`: resident memory without files and shared memory: that is bounded by the capacity, and touched little by
    little. `pss`: all resident memory, what is shared divided by those who share it. `maps`: mappings of our segments
    and semaphores, those without a name too.
    """

    private: int
    rss: int
    pss: int
    fds: int
    threads: int
    maps: int


def use_of(pid: int | str = "self") -> Use | None:
    """What process `pid` has now; None where it is gone."""
    proc = Path("/proc") / str(pid)
    try:
        status = _fields(proc / "status")
        rollup = _fields(proc / "smaps_rollup")
        maps = (proc / "maps").read_text().count("shmcast-")
        return Use(
            status["RssAnon"] << 10,
            status["VmRSS"] << 10,
            rollup["Pss"] << 10,
            len(os.listdir(proc / "fd")),
            len(os.listdir(proc / "task")),
            maps,
        )
    except (OSError, KeyError):  # a process that has ended, but was not waited for, has a status without memory
        return None


def _fields(path: Path) -> dict[str, int]:
    pairs = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return {name: int(value.split()[0]) for name, value in pairs if value.split()[:1] and value.split()[0].isdigit()}


class Bound(NamedTuple):
    """Flat is: at most so many times what it was, and so much more."""

    growth: float = 1.0
    slack: float = 0.0


PRIVATE = Bound(1.10, 16 * MIB)


def compare(values: Sequence[float]) -> tuple[float, float]:
    """The median of the second quarter and of the last; the first one warms up."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])


def judge(series: Mapping[str, Sequence[float]], bounds: Mapping[str, Bound]) -> list[str]:
    """For each of `series` that is not flat within its bound, what is wrong with it."""
    reasons = []
    for name, bound in bounds.items():
        before, after = compare(series[name])
        if after > before * bound.growth + bound.slack:
            reasons.append(f"{name} grew from {shown(name, before)} to {shown(name, after)}")
    return reasons


def shown(name: str, value: float) -> str:
    """A figure for a person: those whose names end in bytes, private, rss or pss are bytes."""
    sized = name.rpartition(" ")[2] in ("private", "rss", "pss", "bytes")
    return f"{value / MIB:.0f} MiB" if sized else f"{value:.0f}"


def span(name: str, values: Sequence[float]) -> str:
    """From what to what a series went."""
    before, after = compare(values)
    return f"{shown(name, before)} to {shown(name, after)}"


def require_matplotlib() -> None:
    """Say how to get it, before the measuring."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install 'shmcast[bench]'") from None


def plot(target: str, title: str, times: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """A PNG: for each panel, named as in `shown`, a line for each of its series over `times`, in seconds."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1]), layout="constrained")
    figure.suptitle(title)
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, lines) in zip(axes, panels.items(), strict=False):
        sized = shown(name, 0) != "0"
        for label, values in lines.items():
            heights = [value / MIB if sized else value for value in values]
            axis.plot(times[: len(heights)], heights[: len(times)], label=label, linewidth=1)
        axis.set_title(f"{name}, MiB" if sized else name, fontsize=9)
        axis.set_xlabel("seconds", fontsize=8)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=6)
    figure.savefig(target, format="png", dpi=100)
