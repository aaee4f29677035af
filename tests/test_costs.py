"""What `auto` goes by: what running `fn` everywhere costs against running it once, from what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcast._costs import COLD, ENOUGH, EXPLORE, KEPT, RATE, SMALL, Costs, Weight

MIB = 1 << 20
MS = 1e-3


def measured(
    ranks: int = 2,
    *,
    fn: float = 10 * MS,
    fixed: float = 1 * MS,
    weight: Weight = Weight(MIB, False),  # noqa: B008
    travelled: int = 0,
    times: int = COLD + ENOUGH,
) -> Costs:
    """Costs that have seen the same request so often."""
    costs = Costs(ranks)
    for _ in range(times):
        costs.saw_fn(weight, fn)
        costs.saw_publish(weight, travelled, fixed)
    return costs


def test_until_enough_is_known_messages_go_through_shared_memory() -> None:
    """Those into cold memory are not counted: they cost ten times what the next ones do."""
    cheap = {"fn": 1e-9, "fixed": 1.0}
    assert not Costs(2).chooses_local(Weight(MIB, False))
    for times in range(COLD + ENOUGH):
        assert not measured(times=times, **cheap).chooses_local(Weight(MIB, False))  # type: ignore[arg-type]
    assert measured(**cheap).chooses_local(Weight(MIB, False))  # type: ignore[arg-type]


def test_the_first_publishes_do_not_count() -> None:
    costs = Costs(2)
    weight = Weight(MIB, False)
    for _ in range(COLD):
        costs.saw_publish(weight, 0, 100.0)
    for _ in range(ENOUGH):
        costs.saw_fn(weight, 10 * MS)
        costs.saw_publish(weight, 0, 1 * MS)
    assert not costs.chooses_local(weight)


# With n ranks: local = n * fn; shm = fn + publish + (n - 1) * open, and opening costs what publishing costs.


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("side", [-1, 1])
def test_the_least_work_over_all_ranks(ranks: int, side: int) -> None:
    fixed = 1 * MS
    even = ranks * fixed / (ranks - 1)
    costs = measured(ranks, fn=even * (1 - 0.1 * side), fixed=fixed)
    assert costs.chooses_local(Weight(MIB, False)) is (side > 0)


def test_bytes_that_the_others_lack_cost_a_copy() -> None:
    """`fn` costs what a small message does; a result of as many bytes as the raw inputs has to be copied, too."""
    nbytes = 100 * MIB
    copy = nbytes * RATE
    assert measured(fn=1.5 * copy, fixed=copy / 100).chooses_local(Weight(nbytes, False)) is False
    weight = Weight(nbytes, False)
    for fn, local in ((0.5 * copy, True), (2 * copy, False)):
        costs = measured(fn=fn, fixed=1e-6, weight=weight, travelled=0)
        for _ in range(KEPT):
            costs.saw_fn(weight, fn)
            costs.saw_publish(weight, nbytes, copy + 1e-6)
        assert costs.chooses_local(weight) is local


def test_the_rate_of_copying_is_measured() -> None:
    weight = Weight(MIB, False)
    slow = measured(fixed=1e-6, fn=10 * MS, weight=weight)
    fast = measured(fixed=1e-6, fn=10 * MS, weight=weight)
    for _ in range(KEPT):
        slow.saw_publish(weight, MIB, 20 * MS)
        fast.saw_publish(weight, MIB, 1 * MS)
    assert slow.chooses_local(weight)
    assert not fast.chooses_local(weight)


def test_large_messages_alone_are_enough_to_begin_with() -> None:
    costs = measured(fn=1 * MS, fixed=50 * MS, travelled=MIB, times=COLD + 1)
    for _ in range(ENOUGH):
        costs.saw_publish(Weight(MIB, False), SMALL - 1, 50 * MS)
    assert costs.chooses_local(Weight(MIB, False))


@pytest.mark.parametrize("travelled", [0, SMALL, MIB])
def test_requests_without_tensors(travelled: int) -> None:
    """`fn` may make them out of a name or a number: nothing is known then of how much of it the others lack."""
    weight = Weight(0, False)
    assert measured(fn=1e-9, fixed=1.0, weight=weight, travelled=0).chooses_local(weight)
    costs = measured(fn=1.0, fixed=1e-6, weight=weight, travelled=travelled, times=KEPT)
    assert not costs.chooses_local(weight)
    assert not costs.chooses_local(Weight(MIB, False))


# Sizes that were not measured.


def test_a_size_that_was_not_measured_costs_by_the_byte() -> None:
    costs = measured(fn=1 * MS, fixed=1 * MS)
    assert costs.chooses_local(Weight(MIB // 4, False))
    assert not costs.chooses_local(Weight(16 * MIB, False))


def test_the_nearest_size_counts() -> None:
    costs = measured(fn=100 * MS, fixed=1 * MS, weight=Weight(MIB, False))
    for _ in range(ENOUGH):
        costs.saw_fn(Weight(64 * MIB, False), 0.1 * MS)
    assert not costs.chooses_local(Weight(2 * MIB, False))
    assert costs.chooses_local(Weight(32 * MIB, False))


def test_hashed_inputs_are_a_class_of_their_own() -> None:
    """With the hash there, `fn` costs the same whatever the size."""
    costs = measured(fn=100 * MS, fixed=1 * MS)
    hashed = Weight(MIB, True)
    assert not costs.chooses_local(hashed), "nothing is known of these"
    for _ in range(ENOUGH):
        costs.saw_fn(hashed, 0.01 * MS)
    assert costs.chooses_local(hashed)
    assert costs.chooses_local(Weight(1024 * MIB, True))
    assert not costs.chooses_local(Weight(MIB, False))


# What changes.


def test_the_median_is_not_moved_by_an_outlier() -> None:
    costs = measured(fn=10 * MS, fixed=1 * MS, times=KEPT)
    for _ in range(KEPT // 2 - COLD):
        costs.saw_fn(Weight(MIB, False), 0.0)
        costs.saw_publish(Weight(MIB, False), 0, 1000.0)
    assert not costs.chooses_local(Weight(MIB, False))


def test_the_last_runs_count() -> None:
    costs = measured(fn=10 * MS, fixed=1 * MS, times=10 * KEPT)
    for _ in range(KEPT):
        costs.saw_fn(Weight(MIB, False), 0.1 * MS)
    assert costs.chooses_local(Weight(MIB, False))


def test_every_so_often_it_is_measured_again() -> None:
    costs = measured(fn=1e-9, fixed=1.0)
    chosen = [costs.chooses_local(Weight(MIB, False)) for _ in range(3 * EXPLORE)]
    assert [number for number, local in enumerate(chosen, 1) if not local] == [EXPLORE, 2 * EXPLORE, 3 * EXPLORE]


def test_what_is_worth_sending_is_sent_each_time() -> None:
    costs = measured(fn=1.0, fixed=1e-6)
    assert not any(costs.chooses_local(Weight(MIB, False)) for _ in range(3 * EXPLORE))


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 1 << 33), st.booleans(), st.integers(0, 1 << 33), st.floats(0, 1e4))
    ),
    st.integers(1, 64),
)
def test_whatever_was_measured_there_is_an_answer(seen: list[tuple[bool, int, bool, int, float]], ranks: int) -> None:
    costs = Costs(ranks)
    for ran, nbytes, hashed, travelled, seconds in seen:
        weight = Weight(nbytes, hashed)
        if ran:
            costs.saw_fn(weight, seconds)
        else:
            costs.saw_publish(weight, travelled, seconds)
        assert type(costs.chooses_local(weight)) is bool
