"""Fuzz the parsers: `python -m fuzz.run [TARGET ...] --cases 100000`, or `make fuzz ARGS="skeleton --seconds 60"`.

Cases run in processes of their own: one that crashes or hangs leaves the input that did it, and the rest goes on. An
input that breaks a rule is written to a file; the command that replays it is printed. Ends with 1 if there is any.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click

from fuzz import _tripwire, _worker
from fuzz._answers import Violation
from fuzz._mutate import LONGEST
from fuzz.targets import MODULES, load

HERE: Final = Path(__file__).parent
POLL: Final = 0.05
MOST_FINDINGS: Final = 20


@dataclass(frozen=True)
class Plan:
    """One campaign: a target, an engine, and how long. `patience`: seconds after which a case counts as hanging."""

    target: str
    engine: str
    cases: int
    seconds: float
    seed: int
    processes: int
    findings: Path
    patience: float = 20.0


@dataclass
class Outcome:
    """What came of it."""

    cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, str]] = field(default_factory=list)
    coverage: str = ""


class Worker:
    """A child process and what is known of it here."""

    def __init__(self, plan: Plan, number: int, until: float, chunk: int) -> None:
        self.plan = plan
        self.number = number
        self.until = until
        self.chunk = chunk
        self.ledger = _worker.Ledger()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
        self.pipe, writes = os.pipe()
        self.rest = b""
        self.since = time.monotonic()
        self.begun = 0
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                os.close(self.pipe)
                self._work(writes)
                code = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(writes)
        os.set_blocking(self.pipe, False)

    def _work(self, pipe: int) -> None:
        plan = self.plan
        _worker.start()
        guided = plan.engine == "atheris"
        target = _worker.instrumented(plan.target) if guided else _worker.prepared(plan.target)
        session = _worker.Session(target, self.ledger, pipe, plan.findings)
        seeds = _worker.corpus_of(target, HERE / "corpus")
        _worker.limit_memory()
        if guided:
            with tempfile.TemporaryDirectory() as folder:
                for number, data in enumerate(seeds):
                    Path(folder, str(number)).write_bytes(data)
                _worker.guided(session, Path(folder), self._arguments(), self.log.fileno())
            return
        last = -(-plan.cases // _worker.CHUNK) if plan.cases else sys.maxsize
        chunks = itertools.takewhile(lambda chunk: chunk < last, itertools.count(self.chunk, plan.processes))
        _worker.mutate(session, seeds, plan.seed, iter(chunks), self.until)
        target.close()

    def _arguments(self) -> list[str]:
        plan = self.plan
        left = max(1, int(self.until - time.monotonic())) if plan.seconds else 0
        return [
            f"-seed={plan.seed + self.number + 1}",
            f"-runs={plan.cases // plan.processes or -1}",
            f"-max_total_time={left}",
            f"-max_len={LONGEST}",
            "-rss_limit_mb=0",
            "-timeout=0",
            "-print_final_stats=1",
        ]

    def read(self, outcome: Outcome) -> None:
        """Take over what it reported."""
        while True:
            try:
                found = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                return
            if not found:
                return
            *lines, self.rest = (self.rest + found).split(b"\n")
            for line in lines:
                report: dict[str, Any] = json.loads(line)
                outcome.outcomes.update(report["outcomes"])
                outcome.findings += [report["finding"]] if "finding" in report else []
                self.chunk += self.plan.processes * bool(report.get("chunk"))

    def stuck(self) -> bool:
        """Whether it is at the same case for too long."""
        begun, ended, _ = self.ledger.state()
        now = time.monotonic()
        if begun == ended or begun != self.begun:
            self.begun, self.since = begun, now
        return now - self.since > self.plan.patience

    def ended(self) -> int | None:
        """How it ended, None while it runs; a worker that is stuck is killed."""
        if self.stuck():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return -signal.SIGALRM
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def close(self) -> str:
        """Let go of it; what libFuzzer said last."""
        os.close(self.pipe)
        self.log.seek(0)
        text = self.log.read().decode(errors="replace")
        self.log.close()
        return text


def campaign(plan: Plan) -> Outcome:
    """Run a plan to its end."""
    outcome = Outcome()
    start = time.monotonic()
    until = start + plan.seconds if plan.seconds else float("inf")
    workers = [Worker(plan, number, until, number) for number in range(plan.processes)]
    while workers:
        time.sleep(POLL)
        for worker in list(workers):
            code = worker.ended()
            worker.read(outcome)
            if code is None:
                continue
            workers.remove(worker)
            begun, finished, data = worker.ledger.state()
            text = worker.close()
            outcome.coverage = "; ".join(filter(None, (outcome.coverage, _coverage(text))))
            if begun != finished:
                outcome.findings.append(_death(plan, code, data))
                outcome.outcomes["VIOLATION"] += 1
                if len(outcome.findings) < MOST_FINDINGS and plan.engine == "mutate":
                    workers.append(Worker(plan, worker.number, until, worker.chunk + plan.processes))
            elif code and plan.engine == "mutate":
                outcome.findings.append({"path": "", "text": f"the worker ended with {code} between two cases"})
    outcome.cases = sum(outcome.outcomes.values())
    outcome.seconds = time.monotonic() - start
    return outcome


def _death(plan: Plan, code: int, data: bytes) -> dict[str, str]:
    path = _worker.keep(plan.findings, plan.target, data)
    if code == -signal.SIGALRM:
        return {"path": str(path), "text": f"no answer within {plan.patience:g} s"}
    return {"path": str(path), "text": f"the process ended with {signal.Signals(-code).name if code < 0 else code}"}


def _coverage(log: str) -> str:
    found = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", log)
    return "{} branches, {} features, corpus {}".format(*found[-1]) if found else ""


def show(plan: Plan, outcome: Outcome) -> None:
    """Print what came of a plan."""
    rate = outcome.cases / outcome.seconds if outcome.seconds else 0.0
    counts = ", ".join(f"{name} {count:,}" for name, count in outcome.outcomes.most_common())
    click.echo(f"{plan.target:9} {outcome.cases:>11,} cases {outcome.seconds:7.1f} s {rate:>9,.0f}/s  {counts}")
    if outcome.coverage:
        click.echo(f"          coverage: {outcome.coverage}")
    for finding in outcome.findings:
        click.echo(f"          VIOLATION: {finding['text']}")
        if finding["path"]:
            click.echo(f"          replay: python -m fuzz.run {plan.target} --replay {finding['path']}")


def replay(name: str, path: Path) -> bool:
    """Run the inputs of a file or folder in this process; whether all were answered."""
    _tripwire.install()
    target = load(name)
    good = True
    for each in sorted(path.iterdir()) if path.is_dir() else [path]:
        try:
            click.echo(f"{name} {each.name}: {target.check(each.read_bytes())}")
        except Violation as violation:
            good = False
            click.echo(f"{name} {each.name}: VIOLATION: {violation}")
    target.close()
    return good


@click.command()
@click.argument("targets", nargs=-1, type=click.Choice(sorted(MODULES)))
@click.option("--engine", type=click.Choice(["mutate", "atheris"]), default="mutate", show_default=True)
@click.option("--cases", type=click.IntRange(min=0), default=0, help="Of each target; rounded up to whole chunks.")
@click.option("--seconds", type=click.FloatRange(min=0), default=0.0, help="For each target.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--processes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--patience", type=float, default=20.0, show_default=True, help="Seconds until a case counts as hanging.")
@click.option(
    "--replay", "file", type=click.Path(exists=True, path_type=Path), help="Run this file's or folder's cases."
)
@click.option("--findings", type=click.Path(path_type=Path), default=HERE / "findings", help="Where violations go.")
def main(
    targets: tuple[str, ...],
    engine: str,
    cases: int,
    seconds: float,
    seed: int,
    processes: int,
    patience: float,
    file: Path | None,
    findings: Path,
) -> None:
    """Feed hostile bytes to TARGETS, all of them by default, one after the other; 10,000 cases each unless told."""
    if file is not None:
        if len(targets) != 1:
            raise click.UsageError("--replay takes one target")
        sys.exit(0 if replay(targets[0], file) else 1)
    failed = False
    for target in targets or MODULES:
        if not seconds and not cases:
            cases = 10_000
        plan = Plan(target, engine, cases, seconds, seed, processes, findings, patience)
        outcome = campaign(plan)
        show(plan, outcome)
        failed = failed or bool(outcome.findings)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
