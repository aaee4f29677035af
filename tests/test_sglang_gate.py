"""The gate before an entry rank's socket, with stand-ins for SGLang's requests: what waits, what passes, and when."""

import collections
import copy
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import zmq

from shmcast import Admission, Reader, Writer
from shmcast._wire import Handle
from shmcast.integrations.sglang._gate import Gate, maker_of_all
from shmcast.integrations.sglang._pointers import Pointer
from shmcast.integrations.sglang._release import Place, Release
from shmcast.integrations.sglang._settings import read_settings
from shmcast.integrations.sglang._tickets import Aborted, Failure, Ticket
from tests.support.waiting import until


@dataclass
class Item:
    feature: Any
    precomputed_embeddings: Any = None
    model_specific_data: dict[str, Any] = field(default_factory=dict)
    hash: int | None = None
    pad_value: int | None = None

    def is_valid(self) -> bool:
        return self.feature is not None


@dataclass
class Request:
    rid: str
    mm_inputs: Any = None
    session_params: Any = None
    session_id: str | None = None


@dataclass
class Batch:
    batch: list[Request]


@dataclass
class Abort:
    rid: str = ""
    abort_all: bool = False


@dataclass
class CloseSession:
    session_id: str


@dataclass
class OpenSession:
    session_id: str


@dataclass
class Control:
    name: str


class Inputs:
    @staticmethod
    def from_dict(raw: dict[str, Any]) -> dict[str, Any]:
        if "bad" in raw:
            raise ValueError("bad pixels")
        return {"pixels": raw["mm_items"][0].feature * 2}


def raw(value: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"mm_items": [Item(torch.full((64, 1024), value))], **more}


def hashed(value: float = 1.0) -> dict[str, Any]:
    """As a tokenizer sends them with SGLANG_MM_PRECOMPUTE_HASH=1."""
    return {"mm_items": [Item(torch.full((64, 1024), value), hash=7, pad_value=8)]}


def release(*, errors: bool = True) -> Release:
    return Release(
        version="0.0.0",
        scheduler=object,
        inputs=Inputs,
        item=Item,
        processed=None,
        image=None,
        single=(Request,),
        batch=(Batch,),
        abort=Abort,
        session=(OpenSession, CloseSession),
        refused=RuntimeError if errors else None,
        unwrap=lambda request: request,
    )


class World:
    """A gate over a queue of requests, a writer with one reader, and a maker that can be made to wait."""

    def __init__(
        self, *, errors: bool = True, workers: int = 1, max_held_bytes: int = 1 << 30, brief: float = 0.0
    ) -> None:
        self.queue: collections.deque[Any] = collections.deque()
        self.go = threading.Event()
        self.go.set()
        self.made: list[Any] = []
        self.writer = Writer(1, capacity=16 << 20, allow=[Failure])
        self.reader = Reader(self.writer.address, 0, allow=[Failure])
        made = maker_of_all(release(errors=errors), self._make)
        self.admission = Admission(self.writer, made, workers=workers, max_held_bytes=max_held_bytes)
        self.gate = Gate(self._receive, self.admission, release(errors=errors), brief)

    def _make(self, one: Any) -> Any:
        self.made.append(one)
        assert self.go.wait(50)
        return Inputs.from_dict(one)

    def _receive(self, flags: int) -> Any:
        assert flags & zmq.NOBLOCK
        if not self.queue:
            raise zmq.Again
        return self.queue.popleft()

    def poll(self, *requests: Any) -> list[Any]:
        """What comes through the gate until it has nothing more just now."""
        self.queue.extend(requests)
        out = []
        while True:
            try:
                out.append(self.gate.recv_pyobj(zmq.NOBLOCK))
            except zmq.Again:
                return out

    def poll_until(self, count: int) -> list[Any]:
        out: list[Any] = []

        def enough() -> bool:
            out.extend(self.poll())
            return len(out) >= count

        until(enough, f"{count} requests are through")
        return out

    def inputs(self, ticket: Any) -> Any:
        assert isinstance(ticket, Ticket)
        opened: Any = self.reader.open(Handle.parse(ticket.handle))
        return opened[ticket.number]

    def close(self) -> None:
        self.go.set()
        self.admission.close()
        self.reader.close()
        self.writer.close()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def rids(requests: list[Any]) -> list[str]:
    return [request.rid for request in requests]


def test_a_request_comes_out_with_a_ticket_to_what_was_made(world: World) -> None:
    assert world.poll(Request("a", raw(3.0))) == []
    assert world.gate.waiting
    (request,) = world.poll_until(1)
    assert world.inputs(request.mm_inputs)["pixels"].eq(6).all()
    assert request.mm_inputs.raw["mm_items"][0].feature.eq(3).all(), "the raw inputs are there to fall back to"
    assert not world.gate.waiting


@pytest.fixture
def patient() -> Iterator[World]:
    """A look waits for what is nearly ready as long as that takes."""
    made = World(brief=50)
    yield made
    made.close()


def test_what_is_hashed_comes_out_of_the_look_that_took_it_in(patient: World) -> None:
    mine = collections.namedtuple("Params", "id")("mine")
    text, a, close = patient.poll(Request("a", hashed(3.0), session_params=mine), Request("text"), CloseSession("mine"))
    assert (text.rid, a.rid, close) == ("text", "a", CloseSession("mine"))
    assert patient.inputs(a.mm_inputs)["pixels"].eq(6).all()
    assert not patient.gate.waiting


def test_what_somebody_has_to_hash_is_not_waited_for(patient: World) -> None:
    patient.go.clear()
    assert patient.poll(Batch([Request("a", hashed()), Request("b", raw())]), Request("c", raw())) == []
    patient.go.set()
    assert len(patient.poll_until(2)) == 2


def test_what_is_hashed_is_waited_for_once_and_not_for_ever() -> None:
    world = World(brief=1e-3)
    try:
        world.go.clear()
        assert world.poll(Request("a", hashed())) == []
        assert world.gate._nearly_ready == set()
        world.go.set()
        assert rids(world.poll_until(1)) == ["a"]
    finally:
        world.close()


def test_text_and_control_pass_while_something_is_held(world: World) -> None:
    world.go.clear()
    control = Control("flush")
    assert world.poll(Request("pixels", raw()), Request("text"), control) == [Request("text"), control]
    world.go.set()
    assert rids(world.poll_until(1)) == ["pixels"]


def test_a_session_keeps_its_order_and_others_do_not_wait_for_it(world: World) -> None:
    world.go.clear()
    mine = collections.namedtuple("Params", "id")("mine")
    out = world.poll(
        Request("1", raw(), session_params=mine),
        Request("2", session_params=mine),
        Request("other", session_id="other"),
        CloseSession("mine"),
    )
    assert rids(out) == ["other"]
    world.go.set()
    first, second, third = world.poll_until(3)
    assert (first.rid, second.rid, third) == ("1", "2", CloseSession("mine"))
    assert world.poll(Request("3", session_params=mine))[0].rid == "3", "a session that waits for nothing waited"


def test_a_session_that_opens_anew_waits_for_its_end(world: World) -> None:
    world.go.clear()
    mine = collections.namedtuple("Params", "id")("mine")
    assert world.poll(Request("1", raw(), session_params=mine), CloseSession("mine"), OpenSession("mine")) == []
    assert world.poll(OpenSession("other")) == [OpenSession("other")]
    world.go.set()
    assert world.poll_until(3)[1:] == [CloseSession("mine"), OpenSession("mine")]


@pytest.mark.parametrize(
    ("abort", "out"),
    [
        (Abort("user"), ["user-1", "user-2"]),
        (Abort("user-2"), ["user-2"]),
        (Abort(abort_all=True), ["user-1", "user-2", "else"]),
        (Abort("nobody"), []),
    ],
)
def test_an_abort_comes_after_what_it_names(world: World, abort: Abort, out: list[str]) -> None:
    world.go.clear()
    held = [Request(rid, raw()) for rid in ("user-1", "user-2", "else")]
    *requests, last = world.poll(*held, abort)
    assert last is abort
    assert rids(requests) == out
    assert all(request.mm_inputs is None for request in requests)
    world.go.set()
    assert sorted(rids(world.poll_until(3 - len(out)))) == sorted({"user-1", "user-2", "else"} - set(out))


def test_what_an_abort_named_gives_its_memory_back(world: World) -> None:
    world.go.clear()
    world.poll(Request("a", raw()), Abort("a"))
    world.go.set()
    world.admission.close()  # waits for the maker, which has published by then or not
    assert world.writer.stats().leases[0].held == 0


def test_a_batch_is_one_message_and_the_rest_of_it_goes_on_as_it_came(world: World) -> None:
    parts = [Request("a", raw(1.0)), Request("text"), Request("b", raw(2.0))]
    world.queue.append(Batch(parts))
    (batch,) = world.poll_until(1)
    assert batch.batch[1].mm_inputs is None
    assert batch.batch[0].mm_inputs.handle == batch.batch[2].mm_inputs.handle
    opened: Any = world.reader.open(Handle.parse(batch.batch[0].mm_inputs.handle))
    assert [opened[part.mm_inputs.number]["pixels"].mean().item() for part in (parts[0], parts[2])] == [2.0, 4.0]
    world.go.clear()
    other = raw()
    (again, _) = world.poll(Batch([Request("c", raw()), Request("d", other)]), Abort("c"))
    assert [part.mm_inputs for part in again.batch] == [None, other]


def test_what_an_abort_names_that_came_elsewhere_has_its_own(world: World) -> None:
    world.go.clear()
    assert world.poll(*(Request(rid, raw()) for rid in ("user-1", "user-2", "else"))) == []
    world.gate.hear(Abort("user"))
    requests = world.poll()
    assert rids(requests) == ["user-1", "user-2"]
    for request in requests:
        aborted = pickle.loads(pickle.dumps(request.mm_inputs))
        assert isinstance(aborted, Aborted)
        assert (aborted.ticket, aborted.mm_items, aborted.abort) == (None, (), Abort(request.rid))
    world.gate.hear(Abort(abort_all=True))
    (request,) = world.poll()
    assert request.mm_inputs.abort == Abort("else")
    assert not world.gate.waiting


def test_what_an_abort_leaves_of_a_batch_is_not_what_a_worker_has(world: World) -> None:
    """It may be at it: it writes to the items, and SGLang to those that go on."""
    world.go.clear()
    assert world.poll(Batch([Request("a", raw()), Request("b", raw())])) == []
    until(lambda: bool(world.made), "a worker is at it")
    batch, _ = world.poll(Abort("a"))
    world.go.set()
    until(lambda: len(world.made) == 2, "it is at the second part")
    (own,), (gone_on,) = world.made[1]["mm_items"], batch.batch[1].mm_inputs["mm_items"]
    assert own is not gone_on
    assert own.feature is gone_on.feature


def test_a_pointer_to_nowhere_ends_no_look(world: World) -> None:
    nowhere = {"mm_items": [Item(Pointer({"shm_name": "a/b", "shape": torch.Size([4]), "dtype": torch.uint8}))]}
    other = copy.deepcopy(nowhere)
    world.go.clear()
    assert world.poll(Request("bad", nowhere)) == []
    bad, abort = world.poll(Abort("bad"))
    assert (bad.rid, bad.mm_inputs, abort) == ("bad", None, Abort("bad"))
    assert world.poll(Request("good", raw()), Request("bad too", other)) == []
    world.go.set()
    assert rids(world.poll_until(2)) == ["good", "bad too"]


def test_what_a_closed_gate_had_goes_on_as_it_came(world: World) -> None:
    ready, held, aborted = raw(1.0), raw(2.0), raw(3.0)
    assert world.poll(Request("ready", ready)) == []
    until(lambda: world.admission.stats().messages == 1, "it is published")
    world.go.clear()
    world.gate._take_in(Request("aborted", aborted))
    world.gate._take_in(Request("held", held))
    world.gate._let_out()
    world.gate.hear(Abort("aborted"))
    world.go.set()
    world.gate.close()
    after = raw(4.0)
    out = world.poll(Request("after", after))
    assert [getattr(request, "mm_inputs", request) for request in out] == [ready, None, held, Abort("aborted"), after]
    assert not world.gate.waiting


def test_a_bad_request_is_that_requests_failure(world: World) -> None:
    world.queue.append(Batch([Request("bad", raw(bad=True)), Request("good", raw())]))
    (batch,) = world.poll_until(1)
    opened: Any = world.reader.open(Handle.parse(batch.batch[0].mm_inputs.handle))
    assert isinstance(opened[0], Failure)
    assert opened[0].text == "Multimodal input processing failed on the TP entry rank: ValueError: bad pixels"
    assert opened[1]["pixels"].eq(2).all()


def test_before_there_were_such_failures_it_goes_on_raw() -> None:
    world = World(errors=False)
    try:
        bad = raw(bad=True)
        world.queue.append(Request("bad", bad))
        assert world.poll_until(1)[0].mm_inputs is bad
    finally:
        world.close()


def test_what_is_too_much_goes_on_raw() -> None:
    world = World(max_held_bytes=1)
    try:
        one = raw()
        assert world.poll(Request("a", one)) == []
        assert world.poll()[0].mm_inputs is one
        assert world.admission.stats().fallbacks == {"held": 1}
    finally:
        world.close()


@pytest.mark.parametrize("value", [torch.empty(1, device="meta"), [torch.empty(1, device="meta")]])
def test_what_is_not_on_the_cpu_passes(world: World, value: Any) -> None:
    request = Request("a", {"mm_items": [Item(value)]})
    assert world.poll(request) == [request]
    assert not world.gate.waiting


def test_a_request_that_nobody_understands_passes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    strange = [Request(rid, object()) for rid in ("a", "b")]
    assert world.poll(*strange) == strange
    assert len(caplog.records) == 1
    assert "AttributeError" in caplog.text


def test_a_ticket_travels_as_its_handle_alone() -> None:
    import pickle

    ticket = Ticket(b"handle", 2, raw())
    ticket.inputs = raw()
    back = pickle.loads(pickle.dumps(ticket))
    assert (back.handle, back.number, back.raw, back.inputs) == (b"handle", 2, None, None)
    assert len(pickle.dumps(ticket)) < 120
    assert list(ticket.mm_items) == ticket.get("mm_items", []) == []


def test_one_rank_of_a_replica_receives() -> None:
    assert Place(0, 3, 0, 0).receives
    assert not any(place.receives for place in (Place(1, 0, 0, 0), Place(0, 0, 1, 0), Place(0, 0, 0, 1)))


@pytest.mark.parametrize(
    ("name", "value", "attribute", "expected"),
    [
        ("SHMCAST_SGLANG", "1", "on", True),
        ("SGLANG_MM_SKIP_COMPUTE_HASH", "y", "draws_hashes", True),
        ("SHMCAST_SGLANG_ADMISSION", "no", "admission", False),
        ("SHMCAST_SGLANG_TOKENIZER", "true", "tokenizer", True),
        ("SHMCAST_SGLANG_WORKERS", "5", "workers", 5),
        ("SHMCAST_SGLANG_HELD_BYTES", "100", "held_bytes", 100),
        ("SHMCAST_SGLANG_WAIT", "0", "wait", 0.0),
        ("SHMCAST_CAPACITY", "4096", "capacity", 4096),
        ("SGLANG_MM_BROADCAST_THRESHOLD", "1000", "threshold", 1000),
        ("SGLANG_MM_SKIP_COMPUTE_HASH", "1", "draws_hashes", True),
    ],
)
def test_a_setting_is_read(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, attribute: str, expected: object
) -> None:
    before = getattr(read_settings(), attribute)
    monkeypatch.setenv(name, value)
    assert getattr(read_settings(), attribute) == expected != before


@pytest.mark.parametrize("value", ["x", "-1", "0", "65", "1.5"])
def test_a_setting_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SHMCAST_SGLANG_WORKERS", value)
    with pytest.raises(ValueError, match=f"SHMCAST_SGLANG_WORKERS='{value}': a whole number, 1 to 64"):
        read_settings()


def test_the_plugin_is_inert_where_it_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from shmcast.integrations.sglang import _undo, plugin

    monkeypatch.delenv("SHMCAST_SGLANG", raising=False)
    plugin()
    assert not _undo


def test_without_sglang_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from shmcast.integrations.sglang import _undo, install
    from shmcast.integrations.sglang._release import Unsupported

    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(Unsupported, match="nothing of it was replaced: there is no module sglang"):
        install()
    assert not _undo
