"""What shmcast inside SGLang promises: one line each, passed or missed, with the figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks._sglang_rounds import Case
from benchmarks.bench_broadcast import clock, shown
from benchmarks.bench_targets import MIB, Line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks._sglang_rounds import Figures

    Found = Mapping[Case, Figures]

TIMES_SOONER = {18 * MIB: 8, 90 * MIB: 15}
WITHOUT_MAKER = 100
LARGE = 90 * MIB
BUSY_SHARE = 20
TOKENIZER_TIMES = 3


def judge(found: Found) -> list[Line]:
    """The lines whose sizes and ways were measured."""
    sizes = {case.size for case in found}
    lines = [line for size, times in TIMES_SOONER.items() if size in sizes for line in _method(found, size, times)]
    if LARGE in sizes:
        lines += [*_busy(found), *_request(found)]
    return lines


def _method(found: Found, size: int, times: int) -> list[Line]:
    def took(way: str, hashed: bool) -> float:
        return found[Case("method", way, size, hashed)].median

    lines = []
    for hashed, least in ((False, times), (True, WITHOUT_MAKER)):
        ours, stock = took("shm-flag", hashed), took("flag", hashed)
        what = "nothing left to make (hashes are there)" if hashed else "hashing included"
        lines.append(
            Line(
                f"{shown(size)}, flag path, {what}: at least {least} times sooner than stock",
                f"{stock / ours:.1f} times ({clock(ours)} to {clock(stock)} ms)",
                stock >= least * ours,
            )
        )
    ours, alone = took("shm-flag", False), took("alone", False)
    lines.append(
        Line(
            f"{shown(size)}, flag path, hashing included: sooner than every rank alone",
            f"{alone / ours:.2f} times ({clock(ours)} to {clock(alone)} ms, "
            f"one rank alone {clock(took('maker', False))} ms)",
            ours < alone,
        )
    )
    return lines


def _busy(found: Found) -> list[Line]:
    lines = []
    for name in ("cpu", "wall"):

        def busy(way: str, hashed: bool, name: str = name) -> float:
            own = found[Case("request", way, LARGE, hashed)]
            return max(own.busy_cpu if name == "cpu" else own.busy_wall)

        what = f"{shown(LARGE)}, scheduler's thread busy ({'CPU time' if name == 'cpu' else name}), admission"
        ours = busy("admission", False)
        for way, called in (("alone", "every rank alone"), ("flag", "the stock flag path")):
            stock = busy(way, False)
            lines.append(
                Line(
                    f"{what}: at most 1/{BUSY_SHARE} of {called}",
                    f"1/{stock / ours:.1f} ({clock(ours)} to {clock(stock)} ms)",
                    ours * BUSY_SHARE <= stock,
                )
            )
        for hashed in (False, True):
            ours, stock = busy("admission", hashed), busy("alone", True)
            lines.append(
                Line(
                    f"{what}, {'hashes are there' if hashed else 'hashing included'}: "
                    "less than every rank alone where hashes are there",
                    f"{clock(ours)} to {clock(stock)} ms",
                    ours < stock,
                )
            )
    return lines


def _request(found: Found) -> list[Line]:
    def of(way: str, hashed: bool) -> Figures:
        return found[Case("request", way, LARGE, hashed)]

    stock = of("alone", True)
    ours = of("tokenizer", True).median
    return [
        Line(
            f"{shown(LARGE)}, tokenizer's send to last rank, hashes are there: admission sooner than stock",
            _sooner(of("admission", True).median, stock.median),
            of("admission", True).median < stock.median,
        ),
        Line(
            f"{shown(LARGE)}, from the processor's result: admission, which hashes, sooner than stock whose "
            "tokenizer hashes",
            _sooner(of("admission", False).from_made, stock.from_made),
            of("admission", False).from_made < stock.from_made,
        ),
        Line(
            f"{shown(LARGE)}, tokenizer's send to last rank, hashes are there: published by the tokenizer at least "
            f"{TOKENIZER_TIMES} times sooner than stock",
            _sooner(ours, stock.median),
            ours * TOKENIZER_TIMES <= stock.median,
        ),
    ]


def _sooner(ours: float, stock: float) -> str:
    return f"{stock / ours:.2f} times ({clock(ours)} to {clock(stock)} ms)"
