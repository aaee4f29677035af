"""What every rank of `bench_sglang` does: one server, whose scheduler has shmcast in it or has not.

One request, on every rank:

    1. meet; look for requests some times, in vain
    2. the entry rank tells the tokenizer to send; all look until it is there
    3. of a method: meet again, and begin at one instant
    4. the way's call: its end is `ready`
    5. compare every byte with what making the inputs here gives

A scheduler with shmcast is a copy of the stock one with a `Link`: both read from one socket, in turn.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch
import torch.distributed as dist

from benchmarks._loop import meet, rotated
from benchmarks._sglang_rounds import MAKER, Case, Sample
from benchmarks._sglang_tokenizer import Pixels, Sent, Tokenizer
from shmcast.integrations.sglang._joining import ADDRESS
from shmcast.integrations.sglang._link import Link
from shmcast.integrations.sglang._release import find_release
from shmcast.integrations.sglang._settings import read_settings
from tests.sglang import requests
from tests.sglang.engine import VERSION, Engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks._ranks import Place
    from benchmarks._sglang_rounds import Plan

LOOKS = 20  # before a request is sent
PATIENCE = 60.0
SETTINGS: dict[str, dict[str, Any]] = {
    "shm-flag": {"admission": False},
    "admission": {},
    "tokenizer": {"tokenizer": True},
}
"""Of the ways that have shmcast: what differs from its defaults."""


class Look(NamedTuple):
    """One look for requests: the instant of its end in ns, seconds of the thread."""

    ended: int
    cpu: float
    wall: float


def measure(place: Place, plan: Plan) -> tuple[str, list[Sample]]:
    logging.getLogger("shmcast").setLevel(logging.ERROR)
    server = Server(place, plan)
    samples = []
    for round in range(plan.cold_rounds):
        for case in _in_turn(plan, round):
            place.tell(f"cold, round {round + 1} of {plan.cold_rounds}, {case.way}")
            with server.linked(case.way) as engine:
                samples.append(server.request(case, engine, round, cold=True))
    with ExitStack() as links:
        ways = dict.fromkeys(case.way for case in plan.cases)
        engines = {way: links.enter_context(server.linked(way)) for way in ways}
        for round in range(-plan.warmup, plan.rounds):
            for case in _in_turn(plan, round):
                place.tell(f"round {round + 1} of {plan.rounds}, {case.way}")
                sample = server.request(case, engines[case.way], round)
                if round >= 0:
                    samples.append(sample)
    server.close()
    return ".".join(map(str, VERSION)), samples


class Server:
    """This rank's part of one server; the tokenizer is the entry rank's child."""

    def __init__(self, place: Place, plan: Plan) -> None:
        address = [f"ipc://@bench-sglang-{os.getpid()}"]
        dist.broadcast_object_list(address)
        self._place = place
        self._tick = plan.tick
        self._release = find_release()
        self._stock = Engine(address[0])
        self._tokenizer = Tokenizer(f"{address[0]}-0", plan.sizes) if place.leads else None
        make = self._release.maker(self._stock.scheduler)
        self._expected = {size: make(Pixels(size).raw()) for size in plan.sizes}
        self._sent = 0

    def close(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.close()
        self._stock.close()

    @contextmanager
    def linked(self, way: str) -> Iterator[Engine]:
        """The server with shmcast, where the way has it; collective."""
        if way not in SETTINGS:
            yield self._stock
            return
        # torch names a group by its ranks and by how many there are: without one more, a second Link's would find the
        # first one's addresses.
        dist.new_group([self._place.rank], use_local_synchronization=True)
        engine = copy.copy(self._stock)
        engine.scheduler = copy.copy(engine.scheduler)
        settings = replace(read_settings(), on=True, **SETTINGS[way])
        if not settings.admission:
            engine.scheduler.server_args = copy.copy(engine.args)
            engine.scheduler.server_args.enable_broadcast_mm_inputs_process = True
        if settings.tokenizer:
            told = [self._tokenizer.publish(self._place.ranks) if self._tokenizer else ""]
            dist.broadcast_object_list(told)
            os.environ[ADDRESS] = told[0]
        link = Link(engine.scheduler, self._release, settings)
        os.environ.pop(ADDRESS, None)
        if link.admits != settings.admission or ("tokenizer" in link.stats()) != settings.tokenizer:
            raise RuntimeError(f"{way}: the ranks share nothing")
        yield engine
        for end, stats in link.stats().items():
            self._complain(way, end, stats.fallbacks)
        link.close()
        if settings.tokenizer and self._tokenizer is not None:
            self._complain(way, "tokenizer's process", self._tokenizer.publish_no_more())

    def _complain(self, way: str, end: str, fallbacks: Mapping[str, int]) -> None:
        if fallbacks:
            click.echo(f"{way}, rank {self._place.rank}, {end} fell back: {dict(fallbacks)}", err=True)

    def request(self, case: Case, engine: Engine, round: int, *, cold: bool = False) -> Sample:
        """Send one and take it; collective."""
        gc.collect()
        meet()
        looks, request = self._receive(case, engine)
        start = 0
        if case.part == "method":
            meet()
            start = time.monotonic_ns()
        cpu, wall = time.thread_time(), time.monotonic_ns()
        inputs = self._take(case.way, engine, request)
        ready = time.monotonic_ns()
        cpu = time.thread_time() - cpu
        if case.way != MAKER or self._place.leads:
            requests.same(inputs, self._expected[case.size])
        sent = self._hear()
        receiving = _beyond_idle(looks, sent)
        return Sample(
            case,
            round,
            cold,
            sent.made,
            start or sent.began,
            sent.done,
            ready,
            receiving.cpu + cpu,
            receiving.wall + (ready - wall) / 1e9,
        )

    def _receive(self, case: Case, engine: Engine) -> tuple[list[Look], Any]:
        looks: list[Look] = []
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if self._tokenizer is not None and len(looks) == LOOKS:
                self._sent += 1
                published = case.way == "tokenizer"
                self._tokenizer.send(str(self._sent), case.size, hashed=case.hashed, published=published)
            cpu, wall = time.thread_time(), time.monotonic_ns()
            received = engine.receive()
            ended = time.monotonic_ns()
            looks.append(Look(ended, time.thread_time() - cpu, (ended - wall) / 1e9))
            if received:
                return looks, received[0]
            time.sleep(self._tick)
        raise RuntimeError(f"{case}: no request came in {PATIENCE:g} s")

    def _take(self, way: str, engine: Engine, request: Any) -> Any:
        """The request's `MultimodalInputs`."""
        if way in ("admission", "tokenizer"):
            return engine.inputs(request)
        raw = self._release.raw_of(request)
        if way in ("flag", "shm-flag"):
            return engine.scheduler._process_and_broadcast_mm_inputs(raw)
        if way == MAKER and not self._place.leads:
            return None
        return self._release.maker(engine.scheduler)(raw)

    def _hear(self) -> Sent:
        """The tokenizer's instants, on every rank."""
        sent = torch.tensor([0, 0, 0] if self._tokenizer is None else self._tokenizer.sent())
        dist.broadcast(sent, 0)
        return Sent(*sent.tolist())


def _in_turn(plan: Plan, round: int) -> list[Case]:
    cases = plan.cases
    return [cases[at] for at in rotated(len(cases), round % len(cases))]


def _beyond_idle(looks: list[Look], sent: Sent) -> Look:
    """What looking took from `sent.began` on, without what so many looks take where nothing is there.

    All of the last look counts: in it the request came.
    """
    idle = [look for look in looks[1:] if look.ended < sent.made]
    meanwhile = [look for look in looks[:-1] if look.ended > sent.began]
    last = looks[-1]
    return Look(
        last.ended,
        last.cpu + _excess([look.cpu for look in meanwhile], [look.cpu for look in idle]),
        last.wall + _excess([look.wall for look in meanwhile], [look.wall for look in idle]),
    )


def _excess(seconds: list[float], idle: list[float]) -> float:
    return max(0.0, sum(seconds) - len(seconds) * sum(idle) / len(idle))
