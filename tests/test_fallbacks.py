"""What fails, where, and what every rank then has: the object, or an error that says what is wrong. Nobody hangs."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import posix_ipc
import pytest
import torch
import torch.distributed as dist

from shmcast import Broadcaster, Policy, Route, _arena, _control, _follower, _lease, _segment, transport
from shmcast._room import Room
from shmcast.errors import (
    ArenaFull,
    EncodeError,
    LayoutError,
    MaterializeError,
    NotAllowed,
    PeerDied,
    ShmcastError,
    StaleHandle,
)
from tests.support.codec import same
from tests.support.ranks import Died, Ranks
from tests.test_broadcaster import (
    SHORT,
    Raised,
    Traffic,
    counted,
    double,
    environment,
    hurried,
    outcome,
    payload,
    until,
    until_free,
    warned,
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.faults]

HOLDS = Policy(wait=0.02)
SENDS = Policy(wait=0.02, peers_hold_raw=False)
AGREE = Policy(wait=0.02, agree=True)
POLICIES = {"holds": HOLDS, "sends": SENDS, "agree": AGREE}
# The ranks of most tests: 0 is the entry rank, 1 the one where something fails, 2 a bystander.
ENTRY, VICTIM, OTHER = range(3)
MIB = 1 << 20

Patch = pytest.MonkeyPatch
Materialize = Callable[[Any], Any]


def fails(error: Exception) -> Callable[..., Any]:
    """A function that raises, whatever it is called with."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


# What fails: `fn` on the entry rank.


def fluke(error: BaseException) -> Materialize:
    """`double`, whose first call raises on the entry rank."""
    calls: list[int] = []

    def fn(raw: Any) -> Any:
        calls.append(1)
        if dist.get_rank() == ENTRY and len(calls) == 1:
            raise error
        return double(raw)

    return fn


class Plain:
    """A class that no allow-list names."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain)

    __hash__ = None  # type: ignore[assignment]


def with_function(raw: Any) -> Any:
    return {**double(raw), "function": len}


def with_plain(raw: Any) -> Any:
    return {**double(raw), "plain": Plain()}


# What fails: memory, mappings, bytes. Each gets a MonkeyPatch and the rank, before or after the group is made.


def no_room(patch: Patch, rank: int) -> None:
    patch.setattr(_segment, "room", lambda: Room(0, "this test"))


def small_steps(patch: Patch, rank: int) -> None:
    """The arena begins with 1 MiB and grows by as much."""
    patch.setattr(_arena, "STEP", MIB)


def no_map(error: Exception) -> Callable[[Patch, int], None]:
    def provoke(patch: Patch, rank: int) -> None:
        if rank == VICTIM:
            patch.setattr(_segment, "attach", fails(error))

    return provoke


def no_thread(patch: Patch, rank: int) -> None:
    if rank == VICTIM:
        patch.setattr(_lease.threading.Thread, "start", fails(RuntimeError("can't start new thread")))


def no_semaphore(patch: Patch, rank: int) -> None:
    if rank == ENTRY:
        patch.setattr(_arena.posix_ipc, "Semaphore", fails(posix_ipc.PermissionsError("no semaphore")))


def no_memory(patch: Patch, rank: int) -> None:
    if rank == VICTIM:
        patch.setattr(_segment, "attach", fails(MemoryError()))


# Offsets in a block's header: magic, generation, kind, checksum; and the first byte of the skeleton.
FIELDS = {"magic": 0, "generation": 8, "kind": 24, "checksum": 60, "skeleton": 64}


def damage(what: str) -> Callable[[Patch, int], None]:
    """The entry rank's block is damaged after it was published and before the others hear of it."""

    def provoke(patch: Patch, rank: int) -> None:
        send = _control.GroupControl.send
        writers: list[transport.Writer] = []
        put = transport.Writer.put

        def remember(self: transport.Writer, *args: Any, **kwargs: Any) -> Any:
            writers[:] = [self]
            return put(self, *args, **kwargs)

        def damaged(self: _control.GroupControl, header: Any) -> None:
            if header.handle is not None:
                where = header.handle.where
                writers[0]._arena.segment(where.segment).map[where.offset + FIELDS[what]] ^= 0x5A
                patch.undo()
            send(self, header)

        if rank == ENTRY:
            patch.setattr(transport.Writer, "put", remember)
            patch.setattr(_control.GroupControl, "send", damaged)

    return provoke


def damage_here(what: str) -> Callable[[Patch, int], None]:
    """One rank alone sees damaged bytes, in its own copy of the page."""

    def provoke(patch: Patch, rank: int) -> None:
        fetch = transport.Reader.fetch

        def damaged(self: transport.Reader, handle: Any, leaves: Any = None) -> Any:
            segment = self._leases._segments[handle.where.segment]
            assert segment is not None
            segment.map[handle.where.offset + FIELDS[what]] ^= 0x5A
            patch.undo()
            return fetch(self, handle, leaves)

        if rank == VICTIM:
            patch.setattr(transport.Reader, "fetch", damaged)

    return provoke


def no_inline_either(patch: Patch, rank: int) -> None:
    if rank == VICTIM:
        patch.setattr(transport.Reader, "fetch", fails(LayoutError("damaged")))
        patch.setattr(_follower, "unpack_inline", fails(LayoutError("damaged too")))


def nothing(patch: Patch, rank: int) -> None:
    pass


# The table of section 6 of the design: what fails, and under each policy what (entry rank, victim, bystander) then have.

OK = "ok"
Row = tuple[Any, Any, Any]


@dataclass(frozen=True)
class Case:
    """One way to fail. `results` by policy: `OK`, or the class of the error; `fallbacks`: the key each rank counts."""

    results: dict[str, Row]
    key: str | tuple[str | None, str | None, str | None]
    fn: Callable[[], Materialize] = field(default=lambda: double)
    early: Callable[[Patch, int], None] = nothing
    late: Callable[[Patch, int], None] = nothing
    size: int = 100_000
    capacity: int | None = None


ALL_OK = {"holds": (OK, OK, OK), "sends": (OK, OK, OK), "agree": (OK, OK, OK)}
ALL_FAIL = (MaterializeError,) * 3
RAISED = {
    "holds": (OK, OK, OK),
    "sends": (ValueError, MaterializeError, MaterializeError),
    "agree": ALL_FAIL,
}
NOT_SENT = {"holds": (OK, OK, OK), "sends": (EncodeError, MaterializeError, MaterializeError), "agree": ALL_FAIL}
UNREADABLE = {"holds": (OK, OK, OK), "sends": (OK, LayoutError, LayoutError), "agree": (OK, OK, OK)}
UNREADABLE_HERE = {"holds": (OK, OK, OK), "sends": (OK, LayoutError, OK), "agree": (OK, OK, OK)}
STALE = {"holds": (OK, OK, OK), "sends": (OK, StaleHandle, StaleHandle), "agree": (OK, OK, OK)}
STOPPED = (KeyboardInterrupt, MaterializeError, MaterializeError)
READERS: tuple[str | None, str | None, str | None] = (None, "open", "open")

CASES = {
    "nothing fails": Case(ALL_OK, (None, None, None)),
    "fn raises once": Case(RAISED, "raised", lambda: fluke(ValueError("a fluke"))),
    "fn raises always": Case(
        {**RAISED, "holds": (ValueError, ValueError, ValueError)}, "raised", lambda: fails(ValueError("always"))
    ),
    "fn is interrupted": Case(dict.fromkeys(POLICIES, STOPPED), "raised", lambda: fluke(KeyboardInterrupt())),
    "fn exits": Case(
        dict.fromkeys(POLICIES, (SystemExit, MaterializeError, MaterializeError)),
        "raised",
        lambda: fluke(SystemExit(3)),
    ),
    "cannot be encoded": Case(NOT_SENT, "encode", lambda: with_function),
    "class not allowed": Case(
        {**NOT_SENT, "sends": (NotAllowed, MaterializeError, MaterializeError)}, "encode", lambda: with_plain
    ),
    "larger than the capacity": Case(ALL_OK, "full", size=2 * MIB, capacity=MIB),
    "no room at first": Case(ALL_OK, "disabled", early=no_room),
    "no room to grow": Case(ALL_OK, "full", early=small_steps, late=no_room, size=3 * MIB),
    "cannot map: gone": Case(ALL_OK, "disabled", early=no_map(PeerDied("another mount namespace"))),
    "cannot map: refused": Case(ALL_OK, "disabled", early=no_map(PermissionError("not here"))),
    "cannot map: foreign": Case(ALL_OK, "disabled", early=no_map(LayoutError("not a segment"))),
    "cannot map later": Case(ALL_OK, "full", early=small_steps, late=no_map(OSError(12, "no memory")), size=3 * MIB),
    "magic": Case(UNREADABLE, READERS, late=damage("magic")),
    "checksum": Case(UNREADABLE, READERS, late=damage("checksum")),
    "skeleton": Case(UNREADABLE, READERS, late=damage("skeleton")),
    "kind": Case(UNREADABLE, READERS, late=damage("kind")),
    "generation": Case(STALE, READERS, late=damage("generation")),
    "magic here": Case(UNREADABLE_HERE, (None, "open", None), late=damage_here("magic")),
    "checksum here": Case(UNREADABLE_HERE, (None, "open", None), late=damage_here("checksum")),
    "skeleton here": Case(UNREADABLE_HERE, (None, "open", None), late=damage_here("skeleton")),
    "generation here": Case(ALL_OK, (None, None, None), late=damage_here("generation")),
    "inline fails too": Case(
        {"holds": (OK, OK, OK), "sends": (OK, LayoutError, OK), "agree": ALL_FAIL},
        (None, "open", None),
        late=no_inline_either,
    ),
}


def fall(rank: int, name: str, policy: Policy) -> tuple[Any, dict[str, int], dict[str, int], Any, list[str]]:
    """Provoke the failure, materialize, and once more when all is well again."""
    case = CASES[name]
    held = policy.peers_hold_raw or rank == ENTRY
    made = hurried()
    with Patch.context() as early, Patch.context() as late, warned() as lines:
        case.early(early, rank)
        with Broadcaster(made, policy=policy, timeout=SHORT, capacity=case.capacity) as group:
            raw = {"a": payload(1, case.size)}
            case.late(late, rank)
            with counted() as calls:
                got = outcome(lambda: group.materialize(raw if held else None, case.fn()))
            late.undo()
            told = got if isinstance(got, Raised) else OK if same(got, expected(case, raw)) else "something else"
            del got
            fallbacks = dict(group.stats().fallbacks)
            after = outcome(lambda: group.materialize({"a": payload(2)} if held else None, double))
            well = isinstance(after, dict) and torch.equal(after["a"], payload(2) * 2)
            del after
            dist.barrier(made)
            if rank == ENTRY and group.route is Route.SHM and name != "generation":
                until_free(group)
            dist.barrier(made)
            return told, dict(calls), fallbacks, well or after, lines


def expected(case: Case, raw: Any) -> Any:
    if case.fn() in (with_function, with_plain):
        return case.fn()(raw)
    return double(raw)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_object_or_the_error(ranks: Ranks, name: str, policy: str) -> None:
    case = CASES[name]
    key = case.key if isinstance(case.key, tuple) else (case.key,) * 3
    if policy == "agree" and any(each == "open" for each in key):
        key = ("open",) * 3  # it is said to all, and all get it inline
    told = ranks.run(3, fall, name, POLICIES[policy])
    results = tuple(each.kind if isinstance(each, Raised) else each for each, *_ in told)
    assert results == case.results[policy]
    for rank, (_, _, fallbacks, well, lines) in enumerate(told):
        wanted = key[rank]
        assert set(fallbacks) == ({wanted} if wanted else set())
        assert bool(lines) == bool(wanted), "a fallback is logged"
        assert well is True, "the next call is as if nothing had been"
    assert all(calls == told[0][1] for _, calls, *_ in told), "all ranks made the same collectives"
