"""How a SchedulerBackend begins and ends: settings, routes, groups, close with work in flight, fork, exit."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast import Modality, MultimodalDataItem, MultimodalInputs, Policy, Route
from shmcast._costs import COLD, ENOUGH
from shmcast.errors import ClosedError, ShmcastError
from shmcast.scheduler import SchedulerBackend
from tests.support.codec import same
from tests.support.ranks import Ranks
from tests.test_broadcaster import Raised, environment, outcome, until, warned
from tests.test_scheduler import LONG, SIZE, backend, every_way, gate, made, raw, settled, twice

pytestmark = pytest.mark.multiprocess


# Close.


def never_taken(rank: int, placement: str, control: str) -> None:
    with backend(placement, control) as group:
        group.submit([(key, raw(key)) for key in range(4)])
        assert same(group.take(3), made(3))
        dist.barrier()
    dist.barrier()


@every_way
def test_what_is_never_taken_leaves_nothing(ranks: Ranks, placement: str, control: str) -> None:
    ranks.run(2, never_taken, placement, control)


def close_in_flight(rank: int, placement: str, control: str) -> list[Any]:
    """All ranks close while `fn` runs on the first of several batches, and a thread waits for one of the last."""
    started = threading.Event()
    told: list[Any] = []
    makes = rank == 0 or placement == "spread"
    with gate() as (fn, go):

        def waiting(raw: Any) -> Any:
            started.set()
            return fn(raw)

        group = backend(placement, control, fn=waiting)
        for key in range(100, 104):
            group.submit([(key, raw(key)), (-key, raw(key))])
        assert not makes or started.wait(LONG)
        # Of two alike the first is made by rank 0, the second by rank 1, if each makes one.
        mine = -103 if rank else 103
        taking = threading.Thread(target=lambda: told.append(outcome(lambda: group.take(mine))))
        taking.start()
        closing = threading.Thread(target=group.close)
        closing.start()
        until(lambda: group._closed)
        if makes:
            # `fn` still runs.
            taking.join()
        go.set()
        taking.join()
        closing.join()
        group.close()
        # Another rank, of whose close it heard first, has run fn itself.
        assert makes or same(told[0], made(103)) or told[0].kind is ClosedError
        calls = (lambda: group.submit([]), lambda: group.take(1), lambda: group.abort(1), group.stats)
        told += [outcome(call) for call in calls]
        dist.barrier()
        return [each.kind for each in (told if makes else told[1:])]


@every_way
def test_close_with_work_in_flight_on_all_ranks(ranks: Ranks, placement: str, control: str) -> None:
    entry, other = ranks.run(2, close_in_flight, placement, control)
    assert entry == [ClosedError] * 5
    assert other == [ClosedError] * (5 if placement == "spread" else 4)


def close_on_one(rank: int, placement: str, control: str, who: int) -> bool:
    """One rank closes with batches in flight; the others have every object, also of what they hand in later."""
    with backend(placement, control) as group:
        group.submit([("first", raw(0))])
        group.take("first")
        dist.barrier()
        group.submit([(key, raw(key)) for key in range(1, 6)])
        if rank == who:
            group.close()
            dist.barrier()
            dist.barrier()
            return True
        dist.barrier()
        group.submit([(key, raw(key)) for key in range(6, 9)])
        told = [same(group.take(key, LONG), made(key)) for key in range(1, 9)]
        dist.barrier()
        return all(told)


@every_way
@pytest.mark.parametrize("who", [0, 1])
def test_close_on_one_rank(ranks: Ranks, placement: str, control: str, who: int) -> None:
    assert ranks.run(3, close_on_one, placement, control, who) == [True] * 3


def objects_outlive(rank: int) -> bool:
    with backend() as group:
        group.submit([(key, raw(key)) for key in range(3)])
        kept = [group.take(key) for key in range(3)]
        dist.barrier()
    return all(same(got, made(key)) for key, got in enumerate(kept))


def test_what_was_taken_outlives_the_backend(ranks: Ranks) -> None:
    assert ranks.run(2, objects_outlive) == [True, True]


# Fork and exit.


def fork(rank: int) -> int:
    with gate() as (fn, go), backend(fn=fn) as group:
        group.submit([("early", raw(1)), ("late", raw(100))])
        child = os.fork()
        if child == 0:
            told = [outcome(call) for call in (lambda: group.take("early"), group.stats, lambda: group.submit([]))]
            group.close()
            os._exit(0 if all(isinstance(each, Raised) and each.kind is ClosedError for each in told) else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        go.set()
        assert same(group.take("late"), made(100))
        assert same(group.take("early"), made(1))
        dist.barrier()
        return code


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_no_backend(ranks: Ranks) -> None:
    assert ranks.run(2, fork) == [0, 0]


SCRIPT = """
    import sys, threading
    import torch, torch.distributed as dist
    from shmcast import Policy
    from shmcast.scheduler import SchedulerBackend

    rank, store, placement, control, end = int(sys.argv[1]), *sys.argv[2:]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    started = threading.Event()

    def fn(raw):
        started.set()
        return {"a": raw["a"] * 2}

    policy = Policy(route="shm", local_below=0)
    group = SchedulerBackend(fn=fn, placement=placement, control=control, policy=policy)
    for batch in range(20):
        group.submit([((batch, key), {"a": torch.full((200_000,), key, dtype=torch.uint8)}) for key in range(4)])
    kept = group.take((0, 1))
    print(int(kept["a"][-1]))
    if end == "raise":
        raise SystemExit(0)
    if end == "destroy":
        dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("placement", "control", "end"),
    [
        ("entry", "ring", "return"),
        ("spread", "ring", "raise"),
        ("entry", "group", "raise"),
        ("spread", "group", "destroy"),
    ],
)
def test_an_interpreter_exits_quietly_with_work_in_flight(
    tmp_path: Path, placement: str, control: str, end: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    store = str(tmp_path / "store")
    names = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), store, placement, control, end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=names,
        )
        for rank in range(2)
    ]
    told = [(*process.communicate(timeout=LONG), process.returncode) for process in processes]
    for out, err, code in told:
        assert (out, code) == ("2\n", 0)
        # That the other one is gone may be said; that this one is, it knows.
        assert all(line.startswith(("fallback (closed)", "fallback (control)")) for line in err.splitlines()), err


# Settings.


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "placement": ({"placement": "both"}, ValueError, "placement='both'"),
    "control": ({"control": "socket"}, ValueError, "control='socket'"),
    "src": ({"src": 2}, ValueError, "src=2: a rank of the group, 0 to 1"),
    "fn": ({"fn": 7}, TypeError, "fn=7"),
    "max_pending": ({"max_pending": 0}, ValueError, "max_pending=0"),
    "max_pending_bytes": ({"max_pending_bytes": 0}, ValueError, "max_pending_bytes=0"),
    "timeout": ({"timeout": 0}, ValueError, "timeout=0"),
    "policy": ({"policy": "shm"}, TypeError, "policy='shm'"),
    "isolation": ({"isolation": "all"}, ValueError, "isolation='all'"),
    "no raw": ({"policy": Policy(peers_hold_raw=False)}, ValueError, "peers_hold_raw=False"),
    "agree": ({"policy": Policy(agree=True), "control": "group"}, ValueError, "agree=True"),
    "inline over a ring": ({"policy": Policy(route="inline")}, ValueError, "route='inline'"),
    "pickle over a ring": ({"policy": Policy(route="pickle")}, ValueError, "route='pickle'"),
    "inline, spread": (
        {"policy": Policy(route="inline"), "control": "group", "placement": "spread"},
        ValueError,
        "route='inline'",
    ),
}


def wrong_arguments(rank: int, name: str) -> Any:
    arguments, _, _ = WRONG[name]
    return outcome(lambda: SchedulerBackend(**arguments if rank == 1 else {}))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named_on_every_rank(ranks: Ranks, name: str) -> None:
    _, kind, text = WRONG[name]
    other, own = ranks.run(2, wrong_arguments, name)
    assert own.kind is kind
    assert text in own.text
    assert other.kind is ShmcastError
    assert other.text.startswith("rank 1 was made with wrong arguments")
    assert text in other.text


DIFFERENT: dict[str, dict[str, Any]] = {
    "placement": {"placement": "spread"},
    "control": {"control": "group"},
    "route": {"policy": Policy(route="local")},
    "local_below": {"policy": Policy(local_below=1 << 20)},
    "allow": {"allow": ("tests",)},
    "src": {"src": 1},
}


def different(rank: int, name: str) -> Any:
    with warned() as lines, SchedulerBackend(fn=twice, **DIFFERENT[name] if rank == 1 else {}) as group:
        route = group.route
        group.submit([(key, raw(key)) for key in range(5)])
        told = [same(group.take(key, LONG), made(key)) for key in range(5)]
        dist.barrier()
        return route, all(told), dict(group.stats().fallbacks), len(lines)


@pytest.mark.parametrize("name", DIFFERENT)
def test_settings_that_differ_have_every_rank_run_fn(ranks: Ranks, name: str) -> None:
    assert ranks.run(2, different, name) == [(Route.LOCAL, True, {"disabled": 1}, 1)] * 2


def disabled(rank: int, placement: str, control: str) -> Any:
    names = {"SHMCAST_DISABLE": "1"} if rank == 1 else {}
    with environment(**names), backend(placement, control) as group:
        group.submit([(key, raw(key)) for key in range(5)])
        told = [same(group.take(key), made(key)) for key in range(5)]
        return group.route, all(told), {route: n for route, (n, _) in group.stats().routes.items()}


@every_way
def test_disabled_somewhere_every_rank_runs_fn(ranks: Ranks, placement: str, control: str) -> None:
    assert ranks.run(2, disabled, placement, control) == [(Route.LOCAL, True, {"local": 5})] * 2


def alone(rank: int, placement: str, control: str) -> Any:
    with backend(placement, control) as group:
        group.submit([(key, raw(key) | ({"bad": 1} if key == 1 else {})) for key in range(3)])
        told = [outcome(lambda key=key: group.take(key)) for key in range(3)]  # type: ignore[misc]
        assert group.route is Route.LOCAL
        assert not [name for name in os.listdir("/dev/shm") if name.startswith("shmcast-")]
        return same(told[0], made(0)), told[1], same(told[2], made(2)), group.stats().segment_bytes


@every_way
def test_a_group_of_one(ranks: Ranks, placement: str, control: str) -> None:
    expected = [(True, Raised(ValueError, "bad request 1"), True, 0)]
    assert ranks.run(1, alone, placement, control) == expected
    if (placement, control) == ("entry", "ring"):
        assert ranks.start_each(alone, [(0, placement, control)]).results() == expected


def in_subgroups(rank: int, members: list[list[int]], src: int, placement: str, control: str) -> bool:
    groups = [dist.new_group(each) for each in members]
    mine = next(i for i, each in enumerate(members) if rank in each)
    with backend(placement, control, group=groups[mine], src=src) as group:
        for batch in range(3):
            group.submit([((batch, key), raw(100 * mine + 10 * batch + key)) for key in range(4)])
        told = [
            same(group.take((batch, key)), made(100 * mine + 10 * batch + key))
            for batch in range(3)
            for key in range(4)
        ]
        assert group.stats().fallbacks == {}
        makes = placement == "spread" or members[mine][src] == rank
        assert bool(group.stats().segment_bytes) is makes
        dist.barrier()
        return all(told)


@every_way
@pytest.mark.parametrize(("members", "src"), [([[2, 3], [0, 1]], 1), ([[1, 3], [0, 2]], 0)])
def test_groups_that_do_not_start_at_rank_0(
    ranks: Ranks, members: list[list[int]], src: int, placement: str, control: str
) -> None:
    assert ranks.run(4, in_subgroups, members, src, placement, control) == [True] * 4


# Routes.


def routes(rank: int, placement: str, control: str, policy: Policy, sizes: list[int]) -> dict[str, int]:
    with backend(placement, control, policy=policy) as group:
        for key, size in enumerate(sizes):
            group.submit([(key, raw(key, size))])
            assert same(group.take(key), made(key, size))

        def counted() -> dict[str, int]:
            return {route: n for route, (n, _) in group.stats().routes.items()}

        until(lambda: sum(counted().values()) >= len(sizes))
        assert dict(group.stats().fallbacks) == {}
        dist.barrier()
        settled(group)
        return counted()


ROUTES = [
    pytest.param(Policy(route="shm", local_below=1 << 30), {"shm": 2}, id="shm"),
    pytest.param(Policy(route="local"), {"local": 2}, id="local"),
    pytest.param(Policy(route="raw"), {"raw": 2}, id="raw"),
    pytest.param(Policy(threshold=2000, local_below=0), {"local": 1, "shm": 1}, id="threshold"),
    pytest.param(Policy(local_below=1000), {"local": 1, "shm": 1}, id="local_below"),
    pytest.param(Policy(local_below=999), {"shm": 2}, id="not below"),
    pytest.param(Policy(), {"local": 1, "shm": 1}, id="auto"),
]
OVER_A_GROUP = [
    pytest.param(Policy(route="inline"), {"inline": 2}, id="inline"),
    pytest.param(Policy(route="pickle"), {"pickle": 2}, id="pickle"),
    pytest.param(Policy(inline_max=2000, local_below=0), {"inline": 1, "shm": 1}, id="inline_max"),
]


@every_way
@pytest.mark.parametrize(("policy", "expected"), ROUTES)
def test_the_policy_chooses_the_route(
    ranks: Ranks, policy: Policy, expected: dict[str, int], placement: str, control: str
) -> None:
    assert ranks.run(2, routes, placement, control, policy, [999, 2 * SIZE]) == [expected] * 2


@pytest.mark.parametrize(("policy", "expected"), OVER_A_GROUP)
def test_routes_that_take_a_group(ranks: Ranks, policy: Policy, expected: dict[str, int]) -> None:
    assert ranks.run(2, routes, "entry", "group", policy, [999, SIZE]) == [expected] * 2


def below(rank: int, control: str) -> list[Any]:
    """A batch is judged as a whole, before its `fn`, which runs when it is asked for."""
    ran: list[int] = []

    def fn(raw: Any) -> Any:
        ran.append(raw["seed"])
        return twice(raw)

    with backend(control=control, fn=fn, policy=Policy(local_below=1000)) as group:
        group.submit([(key, raw(key, 333)) for key in range(3)])
        told: list[Any] = [list(ran), group.stats().times["header"].count]
        assert same(group.take(1), made(1, 333))
        told += [list(ran), group.stats().pending]
        ran.clear()
        group.submit([(10 + key, raw(key, 250)) for key in range(4)])
        assert all(same(group.take(10 + key), made(key, 250)) for key in range(4))
        until(lambda: group.stats().times["header"].count > 0)
        dist.barrier()
        told += [len(ran), group.stats().times["header"].count]
        return told


@pytest.mark.parametrize("control", ["ring", "group"])
def test_small_batches_run_here_without_a_header(ranks: Ranks, control: str) -> None:
    assert ranks.run(2, below, control) == [[[], 0, [1], 2, 4, 1], [[], 0, [1], 2, 0, 1]]


def hashed(rank: int) -> int:
    """Inputs of 1 MiB with their hash; how many requests went by `local` among the last."""
    count = COLD + ENOUGH + 12
    ran: list[object] = []

    def fn(raw: Any) -> Any:
        ran.append(raw)
        return MultimodalInputs.from_dict(raw)

    with SchedulerBackend(fn=fn) as group:
        for key in range(count):
            item = MultimodalDataItem(Modality.IMAGE, feature=torch.full((1 << 20,), key, dtype=torch.uint8))
            item.hash = 7 + key
            group.submit([(key, {"mm_items": [item]})])
            got = group.take(key)
            assert got.mm_items[0].hash == 7 + key
            assert (got.mm_items[0].feature == key).all()
        dist.barrier()
        if rank:
            until(lambda: group.stats().times["header"].count == count)
        local = group.stats().routes["local"].messages if "local" in group.stats().routes else 0
    assert len(ran) <= count
    return local


def test_auto_runs_fn_everywhere_where_the_hash_is_known(ranks: Ranks) -> None:
    entry, other = ranks.run(2, hashed)
    # Once it knows that fn takes next to nothing, the other rank does not wait for what the header says.
    assert other >= entry >= 10
