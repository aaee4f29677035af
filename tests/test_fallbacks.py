"""What fails, where, and what every rank then has: the object, or an error that says what is wrong. Nobody hangs."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import posix_ipc
import pytest
import torch
import torch.distributed as dist

from shmcast import Broadcaster, Policy, Route, _arena, _control, _follower, _segment, transport
from shmcast._room import Room
from shmcast.errors import (
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

HOLDS = Policy(wait=0.2)
SENDS = Policy(wait=0.2, peers_hold_raw=False)
AGREE = Policy(wait=0.2, agree=True)
POLICIES = {"holds": HOLDS, "sends": SENDS, "agree": AGREE}
# The ranks of most tests: 0 is the entry rank, 1 the one where something fails, 2 a bystander.
ENTRY, VICTIM, OTHER = range(3)
MIB = 1 << 20

Patch = pytest.MonkeyPatch
Materialize = Callable[[Any], Any]


def fails(error: Exception) -> Callable[..., Any]:
    """A function that raises, whatever it is called with: a new one each time, for its traceback holds mappings."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise type(error)(*error.args)

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
        patch.setattr(threading.Thread, "start", fails(RuntimeError("can't start new thread")))


def no_semaphore(patch: Patch, rank: int) -> None:
    if rank == ENTRY:
        patch.setattr(posix_ipc, "Semaphore", fails(posix_ipc.PermissionsError("no semaphore")))


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
                writers[0]._arena._segments[where.segment].map[where.offset + FIELDS[what]] ^= 0x5A
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

        def damaged(self: transport.Reader, handle: Any, *args: Any, **kwargs: Any) -> Any:
            segment = self._leases._segments[handle.where.segment]
            assert segment is not None
            segment.map[handle.where.offset + FIELDS[what]] ^= 0x5A
            patch.undo()
            return fetch(self, handle, *args, **kwargs)

        if rank == VICTIM:
            patch.setattr(transport.Reader, "fetch", damaged)

    return provoke


def no_inline_either(patch: Patch, rank: int) -> None:
    if rank == VICTIM:
        patch.setattr(transport.Reader, "fetch", fails(LayoutError("damaged")))
        patch.setattr(_follower, "unpack_inline", fails(LayoutError("damaged too")))


def nothing(patch: Patch, rank: int) -> None:
    pass


# What fails, and what entry rank, victim and bystander then have under each policy.

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
OTHERS_RAISED: tuple[str | None, str | None, str | None] = (None, "raised", "raised")
READERS: tuple[str | None, str | None, str | None] = (None, "open", "open")

CASES = {
    "nothing fails": Case(ALL_OK, (None, None, None)),
    "fn raises once": Case(RAISED, "raised", lambda: fluke(ValueError("a fluke"))),
    "fn raises always": Case(
        {**RAISED, "holds": (ValueError, ValueError, ValueError)}, "raised", lambda: fails(ValueError("always"))
    ),
    "fn is interrupted": Case(dict.fromkeys(POLICIES, STOPPED), OTHERS_RAISED, lambda: fluke(KeyboardInterrupt())),
    "fn exits": Case(dict.fromkeys(POLICIES, (SystemExit, *STOPPED[1:])), OTHERS_RAISED, lambda: fluke(SystemExit(3))),
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
    "magic": Case(STALE, READERS, late=damage("magic")),
    "checksum": Case(UNREADABLE, READERS, late=damage("checksum")),
    "skeleton": Case(UNREADABLE, READERS, late=damage("skeleton")),
    "kind": Case(UNREADABLE, READERS, late=damage("kind")),
    "generation": Case(STALE, READERS, late=damage("generation")),
    "magic here": Case(ALL_OK, (None, None, None), late=damage_here("magic")),
    "checksum here": Case(ALL_OK, (None, None, None), late=damage_here("checksum")),
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
    with Patch.context() as early, Patch.context() as late, warned() as lines:
        case.early(early, rank)
        with Broadcaster(policy=policy, capacity=case.capacity) as group:
            raw = {"a": payload(1, case.size)}
            case.late(late, rank)
            dist.barrier()
            with counted() as calls:
                got = outcome(lambda: group.materialize(raw if held else None, case.fn()))
            late.undo()
            told = got if isinstance(got, Raised) else OK if same(got, expected(case, raw)) else "something else"
            del got
            fallbacks = dict(group.stats().fallbacks)
            after = outcome(lambda: group.materialize({"a": payload(2)} if held else None, double))
            well = after if isinstance(after, Raised) else same(after, double({"a": payload(2)}))
            del after
            dist.barrier()
            # A reader that finds another block than it was told of takes no lease, and has none to give back.
            if rank == ENTRY and group.route is Route.SHM and name not in ("magic", "generation"):
                until_free(group)
            dist.barrier()
            return told, dict(calls), fallbacks, well, lines


def expected(case: Case, raw: Any) -> Any:
    if case.fn() in (with_function, with_plain):
        return case.fn()(raw)
    return double(raw)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_object_or_the_error(ranks: Ranks, name: str, policy: str) -> None:
    case = CASES[name]
    key: tuple[str | None, ...] = case.key if isinstance(case.key, tuple) else (case.key,) * 3
    if policy == "agree" and any(each == "open" for each in key):
        key = ("open",) * 3  # it is said to all, and all get it inline
    if policy == "sends":
        key = tuple(None if each == "open" else each for each in key)  # an error, no fallback
    told = ranks.run(3, fall, name, POLICIES[policy])
    for rank, (got, _, fallbacks, well, lines) in enumerate(told):
        result, wanted = case.results[policy][rank], key[rank]
        assert got == OK if result is OK else issubclass(got.kind, result)
        assert set(fallbacks) == ({wanted} if wanted else set())
        assert bool(lines) == bool(wanted), "a fallback is logged"
        assert well is True, "the next call is as if nothing had been"
    assert all(calls == told[0][1] for _, calls, *_ in told), "all ranks made the same collectives"


# Which route.


def routes(rank: int, policy: Policy, names: dict[str, str], sizes: list[int]) -> list[str]:
    held = policy.peers_hold_raw or rank == ENTRY
    taken: list[str] = []
    before: dict[str, int] = {}
    with environment(**names), Broadcaster(policy=policy) as group:
        for seed, size in enumerate(sizes):
            raw = {"a": payload(seed, size)}
            got = group.materialize(raw if held else None, double)
            assert torch.equal(got["a"], raw["a"] * 2)
            now = {route: traffic.messages for route, traffic in group.stats().routes.items()}
            taken += [route for route in now if now[route] > before.get(route, 0)]
            before = now
        assert group.stats().fallbacks == {}
        return taken


@pytest.mark.parametrize(
    ("policy", "names", "expected"),
    [
        pytest.param(Policy(), {}, ["shm", "shm"], id="auto"),
        pytest.param(Policy(route="shm"), {}, ["shm", "shm"], id="shm"),
        pytest.param(Policy(route="inline"), {}, ["inline", "inline"], id="inline"),
        pytest.param(Policy(route="local"), {}, ["local", "local"], id="local"),
        pytest.param(Policy(threshold=1000), {}, ["local", "shm"], id="threshold"),
        pytest.param(Policy(threshold=1001), {}, ["local", "shm"], id="threshold of a byte more"),
        pytest.param(Policy(threshold=5000), {}, ["local", "local"], id="threshold above"),
        pytest.param(Policy(threshold=5000, agree=True), {}, ["shm", "shm"], id="threshold, agree"),
        pytest.param(Policy(threshold=5000, peers_hold_raw=False), {}, ["shm", "shm"], id="threshold, sends"),
        pytest.param(Policy(inline_max=2000), {}, ["inline", "shm"], id="inline_max"),
        pytest.param(Policy(), {"SHMCAST_INLINE_MAX": "2000"}, ["inline", "shm"], id="inline_max of the environment"),
        pytest.param(Policy(inline_max=9000), {"SHMCAST_INLINE_MAX": "2000"}, ["inline", "shm"], id="which goes first"),
        pytest.param(Policy(inline_max=9000), {"SHMCAST_INLINE_MAX": "0"}, ["shm", "shm"], id="environment of 0"),
        pytest.param(Policy(inline_max=2000, peers_hold_raw=False), {}, ["inline", "shm"], id="inline_max, sends"),
        pytest.param(
            Policy(route="shm", inline_max=2000),
            {},
            ["shm", "shm"],
            id="shm over inline_max",
        ),
        pytest.param(
            Policy(route="inline", threshold=2000),
            {},
            ["inline", "inline"],
            id="inline over threshold",
        ),
    ],
)
def test_the_policy_chooses_the_route(ranks: Ranks, policy: Policy, names: dict[str, str], expected: list[str]) -> None:
    size = 1000 if policy.threshold == 1001 else 999
    assert ranks.run(2, routes, policy, names, [size, 4000]) == [expected] * 2


# Memory that readers hold; segments that one of them cannot map.


def full_and_free_again(rank: int) -> list[str]:
    """Readers hold everything, then let go."""
    with Broadcaster(policy=HOLDS, capacity=MIB) as group:
        kept: list[Any] = []
        taken = []
        for seed in range(5):
            before = dict(group.stats().routes)
            got = group.materialize({"a": payload(seed, 700_000)}, double)
            assert torch.equal(got["a"], payload(seed, 700_000) * 2)
            taken += [route for route, seen in group.stats().routes.items() if seen != before.get(route)]
            if seed < 2:
                kept.append(got)
            elif kept:
                kept.clear()
            del got
            dist.barrier()
            if rank == ENTRY and not kept:
                until_free(group)
            dist.barrier()
        return taken


def test_what_readers_hold_is_not_taken_from_them(ranks: Ranks) -> None:
    assert ranks.run(4, full_and_free_again) == [["shm", "local", "local", "shm", "shm"]] * 4


def grow_without_one(rank: int) -> tuple[list[str], list[int]]:
    """The victim cannot map segment 1: nobody's message goes there, then or later."""
    with Patch.context() as early, Patch.context() as late:
        small_steps(early, rank)
        with Broadcaster(policy=Policy(wait=0.05)) as group:
            no_map(OSError(12, "no memory"))(late, rank)
            dist.barrier()
            taken = []
            for size in (3 * MIB, 1000, 3 * MIB, 3 * MIB):
                before = dict(group.stats().routes)
                got = group.materialize({"a": payload(1, size)}, double)
                assert torch.equal(got["a"], payload(1, size) * 2)
                del got
                taken += [route for route, seen in group.stats().routes.items() if seen != before.get(route)]
                dist.barrier()
                late.undo()
                settle(group)
                dist.barrier()
            return taken, [] if group._writer is None else sorted(group._writer._arena._retired)


def settle(group: Broadcaster) -> None:
    """Until segment 1 has been refused, and segment 2, once it is there, mapped by all."""
    if group._writer is not None:
        arena = group._writer._arena

        def settled() -> bool:
            arena.drain()
            return arena._retired == {1} and all(map(arena._blocks.usable, range(2, len(arena._segments))))

        until(settled)


def test_a_segment_that_one_rank_cannot_map_is_never_used(ranks: Ranks) -> None:
    told = ranks.run(3, grow_without_one)
    assert [retired for _, retired in told] == [[1], [], []]
    for taken, _ in told:
        assert taken[:2] == ["local", "shm"]
        assert taken[3] == "shm"
        assert taken == told[0][0]


def report_damage(rank: int, what: str) -> bool:
    with Patch.context() as patch, Broadcaster() as group:
        damage(what)(patch, rank)
        group.materialize({"a": payload(1)}, double)
        writer = group._writer
        if writer is not None:
            until(lambda: writer.settle() == () and not writer._arena._blocks.usable(0))
        got = group.materialize({"a": payload(2)}, double)
        dist.barrier()
        return torch.equal(got["a"], payload(2) * 2)


@pytest.mark.parametrize("what", ["magic", "checksum", "generation"])
def test_damaged_bytes_are_reported_to_the_writer(ranks: Ranks, what: str) -> None:
    assert ranks.run(2, report_damage, what) == [True, True]


# The entry rank before its header, one row a way to be stopped there.


def materialize_in_a_hurry(rank: int, how: str) -> Any:
    raw: dict[str, Any] = {"a": payload(1)}
    with Patch.context() as patch, Broadcaster(hurried(), timeout=SHORT) as group:
        if how == "sparse":
            raw["sparse"] = torch.eye(3).to_sparse()
        elif how == "property":
            raw["broken"] = BrokenRaw()
        elif rank == ENTRY:
            patch.setattr(transport.Writer, "put", fails(KeyboardInterrupt()))  # type: ignore[arg-type]
        with counted() as calls:
            got = outcome(lambda: group.materialize(raw, lambda raw: double({"a": raw["a"]})))
        return (
            got.kind if isinstance(got, Raised) else same(got, double({"a": payload(1)})),
            dict(calls),
            Traffic.of(group),
        )


class BrokenRaw(dict[str, Any]):
    """A mapping that cannot be walked."""

    def values(self) -> Any:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("how", "entry", "others"),
    [
        ("sparse", True, True),
        ("property", True, True),
        ("put", KeyboardInterrupt, MaterializeError),
    ],
)
def test_the_others_hear_of_it_whatever_stops_the_entry_rank(ranks: Ranks, how: str, entry: Any, others: Any) -> None:
    told = ranks.run(3, materialize_in_a_hurry, how)
    assert [got for got, *_ in told] == [entry, others, others]
    for _, calls, traffic in told:
        assert calls == {"broadcast": 1}
        assert "control" not in traffic.fallbacks


EARLY = {"thread": no_thread, "semaphore": no_semaphore, "memory": no_memory}


def make_with_trouble(rank: int, how: str) -> Any:
    made = hurried()
    with Patch.context() as patch:
        EARLY[how](patch, rank)
        group = outcome(lambda: Broadcaster(made, timeout=SHORT))
    if isinstance(group, Raised):
        return group
    with group:
        return group.route, same(group.materialize({"a": payload(1)}, double), double({"a": payload(1)}))


@pytest.mark.parametrize("how", EARLY)
def test_whatever_keeps_a_rank_from_mapping_the_group_goes_on(ranks: Ranks, how: str) -> None:
    assert ranks.run(3, make_with_trouble, how) == [(Route.LOCAL, True)] * 3


# What must not stay behind.


def interrupted_batch(rank: int) -> tuple[Any, int]:
    def fn(raw: Any) -> Any:
        if raw["n"] == 1:
            raise KeyboardInterrupt
        return double({"a": raw["a"]})

    with Broadcaster() as group:
        got = outcome(lambda: group.materialize_batch([{"a": payload(n), "n": n} for n in range(3)], fn))
        dist.barrier()
        live = group.stats().live_blocks
        dist.barrier()
        return got.kind, live


def test_an_interrupted_batch_leaves_nothing_published(ranks: Ranks) -> None:
    assert ranks.run(2, interrupted_batch) == [(KeyboardInterrupt, 0), (MaterializeError, 0)]


def half_a_batch(rank: int, policy: Policy) -> tuple[Any, int]:
    """The victim cannot open the second message of a batch of four."""
    opened: list[int] = []

    def fetch(self: transport.Reader, *args: Any, **kwargs: Any) -> Any:
        opened.append(1)
        if len(opened) == 3:  # the index, the first request, this one
            raise LayoutError("damaged")
        return real(self, *args, **kwargs)

    real = transport.Reader.fetch
    held = policy.peers_hold_raw or rank == ENTRY
    with Patch.context() as patch, Broadcaster(hurried(), policy=policy, timeout=SHORT) as group:
        if rank == VICTIM:
            patch.setattr(transport.Reader, "fetch", fetch)
        raws = [{"a": payload(n)} for n in range(4)] if held else []
        got = outcome(lambda: group.materialize_batch(raws, double))
        told = got.kind if isinstance(got, Raised) else same(got, [double({"a": payload(n)}) for n in range(4)])
        del got
        # One message more: when its lease has been given back, all that was given back before has been, too.
        assert group.broadcast("more") == "more" or rank
        until(lambda: group.stats().leases_held == 0)
        dist.barrier()
        live = group.stats().live_blocks
        dist.barrier()
        return told, live


@pytest.mark.parametrize(
    ("policy", "victim"),
    [
        pytest.param(Policy(), True, id="holds"),
        pytest.param(Policy(peers_hold_raw=False), LayoutError, id="sends"),
        pytest.param(Policy(agree=True), True, id="agree"),
    ],
)
def test_a_batch_that_cannot_be_opened_is_given_back(ranks: Ranks, policy: Policy, victim: Any) -> None:
    told = ranks.run(3, half_a_batch, policy)
    assert [got for got, _ in told] == [True, victim, True]
    assert told[ENTRY][1] == 0


# Deaths.


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose_the_entry_rank(rank: int, policy: Policy) -> tuple[list[Any], bool, list[dict[str, int]], dict[str, int]]:
    """It dies while it runs `fn`, with the others in the collective; they hold a tensor from before."""
    with Broadcaster(hurried(), policy=policy, timeout=SHORT) as group:
        kept = group.broadcast(payload(5) if rank == ENTRY else None)
        dist.barrier()

        def fn(raw: Any) -> Any:
            if rank == ENTRY:
                die()
            return double(raw)

        told, made = [], []
        for number in range(3):
            with counted() as calls:
                told.append(outcome(lambda n=number: group.materialize({"a": payload(n)}, fn)))  # type: ignore[misc]
            made.append(dict(calls))
        told.append(outcome(group.broadcast))
        return told, torch.equal(kept, payload(5)), made, dict(group.stats().fallbacks)


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_entry_rank_dies(ranks: Ranks, n: int, policy: str) -> None:
    dead, *others = ranks.run(n, lose_the_entry_rank, POLICIES[policy], dies={ENTRY})
    assert isinstance(dead, Died)
    for told, valid, calls, fallbacks in others:
        assert valid, "what was mapped stays"
        assert calls == [{"broadcast": 1}, {}, {}], "a broken control plane is left alone"
        if policy == "holds":
            assert same(told[:3], [double({"a": payload(number)}) for number in range(3)])
            assert fallbacks == {"control": 3}
        for each in told[3 if policy == "holds" else 0 :]:
            assert each.kind is PeerDied
            assert each.text.startswith("rank 0 of the group, the entry rank, is gone")


def lose_another_rank(rank: int, policy: Policy) -> list[Any]:
    """The victim dies with a lease in its hands and more on their way."""
    held = policy.peers_hold_raw or rank == ENTRY
    with Broadcaster(hurried(), policy=policy, timeout=SHORT) as group:
        kept: Any = group.broadcast(payload(5) if rank == ENTRY else None)
        dist.barrier()
        if rank == VICTIM:
            die()
        told = []
        for number in range(3):
            raw = {"a": payload(number)}
            got = outcome(lambda raw=raw: group.materialize(raw if held else None, double))  # type: ignore[misc]
            told.append(got if isinstance(got, Raised) else same(got, double(raw)))
            del got
        assert torch.equal(kept, payload(5))
        told.append(outcome(lambda: group.broadcast(1)))
        if rank == ENTRY:
            until(lambda: group.stats().leases[VICTIM - 1].alive is False)
            until(lambda: not group.stats().leases[VICTIM - 1].held)
        return told


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_another_rank_dies(ranks: Ranks, n: int, policy: str) -> None:
    entry, dead, *others = ranks.run(n, lose_another_rank, POLICIES[policy], dies={VICTIM})
    assert isinstance(dead, Died)
    assert entry[-1].kind is PeerDied
    assert entry[-1].text.startswith("rank 1")
    for told in (entry, *others):
        for each in told[:3]:
            if policy == "holds" or (policy == "sends" and told is entry):
                assert each is True
            elif isinstance(each, Raised):
                assert issubclass(each.kind, ShmcastError)
            else:
                assert each is True
    for told in others:
        assert isinstance(told[-1], Raised)


def go_on_alone(rank: int) -> list[Any]:
    with Broadcaster(hurried(), policy=AGREE, timeout=SHORT) as group:
        dist.barrier()
        if rank == VICTIM:
            die()
        return [outcome(lambda: group.materialize({"a": payload(1)}, double)) for _ in range(2)]


def test_with_agree_no_rank_goes_on_alone(ranks: Ranks) -> None:
    entry, _ = ranks.run(2, go_on_alone, dies={VICTIM})
    assert [each.kind for each in entry] == [PeerDied, PeerDied]


# A rank that comes too late.


def come_late(rank: int, policy: Policy, late: int) -> tuple[list[Any], list[dict[str, int]], dict[str, int], bool]:
    """Rank `late` calls when all others have given up."""
    held = policy.peers_hold_raw or rank == ENTRY
    with Broadcaster(hurried(), policy=policy, timeout=0.5) as group:
        kept: Any = group.broadcast(payload(5) if rank == ENTRY else None)
        dist.barrier()
        if rank == late:
            dist.barrier()
        told, made = [], []
        for number in range(2):
            raw = {"a": payload(number)}
            with counted() as calls:
                got = outcome(lambda raw=raw: group.materialize(raw if held else None, double))  # type: ignore[misc]
            told.append(got if isinstance(got, Raised) else same(got, double(raw)))
            made.append(dict(calls))
            del got
        if rank != late:
            dist.barrier()
        fallbacks = dict(group.stats().fallbacks)
        dist.barrier()
        return told, made, fallbacks, torch.equal(kept, payload(5))


@pytest.mark.parametrize("late", [ENTRY, VICTIM])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_rank_comes_late(ranks: Ranks, policy: str, late: int) -> None:
    for rank, (told, calls, fallbacks, valid) in enumerate(ranks.run(3, come_late, POLICIES[policy], late)):
        assert valid
        for each in told:
            if policy == "holds" or (policy == "sends" and rank == ENTRY):
                assert each is True
            else:
                assert each is True or issubclass(each.kind, ShmcastError)
        if rank != late and rank == VICTIM:
            assert fallbacks.get("control")
        broken = [bool(made) for made in calls]
        assert broken in ([True, False], [True, True]), "the first call tries"
        if fallbacks.get("control") == 2:
            assert calls[1] == {}, "a broken control plane is left alone"


def leave(rank: int) -> Any:
    """The bystander's collective fails: it leaves, and lives."""
    with Patch.context() as patch, Broadcaster(hurried(), timeout=SHORT) as group:
        if rank == OTHER:
            patch.setattr(dist, "broadcast", fails(RuntimeError("broken")))
        got = outcome(lambda: group.materialize({"a": payload(1)}, double))
        assert same(got, double({"a": payload(1)}))
        patch.undo()
        told = None
        if rank == ENTRY:
            until(lambda: group.stats().leases[OTHER - 1].alive is False)
            group._control._broken = RuntimeError("broken")  # type: ignore[union-attr]
            told = outcome(lambda: group.broadcast(1))
        dist.barrier()
        return told


def test_only_the_dead_are_called_dead(ranks: Ranks) -> None:
    told, *_ = ranks.run(3, leave)
    assert told.kind is ShmcastError
