"""What a user may decide, and what of it makes no sense."""

import dataclasses
import math
from typing import Any

import pytest

from shmcast._joining import check_ring
from shmcast.policy import Environment, Policy, Route, read_environment


def test_by_default_nothing_is_local_or_inline() -> None:
    policy = Policy()
    assert policy.route is Route.AUTO
    assert (policy.threshold, policy.inline_max, policy.cache_bytes) == (0, 0, 0)
    assert policy.local_below == 128 << 10
    assert policy.peers_hold_raw
    assert not policy.fn_keeps_leaves
    assert not policy.agree
    assert policy.wait > 0


@pytest.mark.parametrize("route", Route)
def test_a_route_may_be_given_by_name(route: Route) -> None:
    assert Policy(route=route.value).route is route
    assert Policy(route=route).route is route


@pytest.mark.parametrize("route", ["", "SHM", "pickled", "none"])
def test_refuses_an_unknown_route(route: str) -> None:
    with pytest.raises(ValueError, match=f"'{route}' is not a valid Route"):
        Policy(route=route)


@pytest.mark.parametrize("name", ["threshold", "local_below", "inline_max", "wait", "cache_bytes"])
def test_refuses_what_is_negative(name: str) -> None:
    for value in (-1, -(2**40), -math.inf):
        with pytest.raises(ValueError, match=rf"Policy\({name}={value}\): must be finite and not negative"):
            Policy(**{name: value})  # type: ignore[arg-type]
    assert getattr(Policy(**{name: 0}), name) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("wait", [math.nan, math.inf])
def test_refuses_a_wait_that_never_ends(wait: float) -> None:
    with pytest.raises(ValueError, match=rf"Policy\(wait={wait}\): must be finite"):
        Policy(wait=wait)


def test_local_needs_raw_inputs_on_every_rank() -> None:
    assert Policy(route="local").route is Route.LOCAL
    cases: list[dict[str, Any]] = [{"agree": True}, {"peers_hold_raw": False}]
    for case in cases:
        with pytest.raises(ValueError, match=r"Policy\(route='local'\) needs raw inputs on every rank"):
            Policy(route="local", **case)
        for route in ("auto", "shm", "inline", "pickle"):
            Policy(route=route, **case)


def test_raw_has_nothing_to_agree_on() -> None:
    with pytest.raises(ValueError, match=r"Policy\(route='raw'\) has every rank run fn"):
        Policy(route="raw", agree=True)
    assert Policy(route="raw", peers_hold_raw=False).route is Route.RAW


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        (Policy(route="inline"), r"route='inline'"),
        (Policy(route="pickle"), r"route='pickle'"),
        (Policy(agree=True), r"agree=True"),
        (Policy(route="pickle", agree=True), r"agree=True"),
    ],
)
def test_what_takes_collectives_is_not_for_a_ring(policy: Policy, asked: str) -> None:
    with pytest.raises(ValueError, match=rf"Policy\({asked}\) takes collectives"):
        check_ring(policy)


@pytest.mark.parametrize("route", ["auto", "shm", "local", "raw"])
def test_all_else_is(route: str) -> None:
    check_ring(Policy(route=route, threshold=5, local_below=7, inline_max=9))


def test_a_policy_does_not_change() -> None:
    policy = Policy()
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.wait = 3.0  # type: ignore[misc]
    assert dataclasses.replace(policy, wait=3.0) == Policy(wait=3.0)
    assert hash(Policy(route="shm")) == hash(Policy(route=Route.SHM))


# --- the environment


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHMCAST_DISABLE", "SHMCAST_CAPACITY", "SHMCAST_INLINE_MAX"):
        monkeypatch.delenv(name, raising=False)


def test_an_empty_environment_asks_for_nothing() -> None:
    assert read_environment() == Environment(False, None, None)


@pytest.mark.parametrize(
    ("text", "disabled"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        (" 1 ", True),
        ("0", False),
        ("false", False),
        ("No", False),
        ("", False),
    ],
)
def test_disable(monkeypatch: pytest.MonkeyPatch, text: str, disabled: bool) -> None:
    monkeypatch.setenv("SHMCAST_DISABLE", text)
    assert read_environment().disabled is disabled


@pytest.mark.parametrize("text", ["2", "on", "-1", "disable"])
def test_refuses_another_word_for_disable(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SHMCAST_DISABLE", text)
    with pytest.raises(ValueError, match=f"SHMCAST_DISABLE='{text}': 0 or 1"):
        read_environment()


@pytest.mark.parametrize(("name", "field"), [("SHMCAST_CAPACITY", "capacity"), ("SHMCAST_INLINE_MAX", "inline_max")])
class TestBytes:
    @pytest.mark.parametrize(("text", "value"), [("0", 0), ("4096", 4096), (" 17 ", 17), ("", None), ("  ", None)])
    def test_reads(self, monkeypatch: pytest.MonkeyPatch, name: str, field: str, text: str, value: int | None) -> None:
        monkeypatch.setenv(name, text)
        assert getattr(read_environment(), field) == value

    @pytest.mark.parametrize("text", ["-1", "1.5", "1e9", "64M", "0x10", "1_000", "many"])
    def test_refuses(self, monkeypatch: pytest.MonkeyPatch, name: str, field: str, text: str) -> None:
        monkeypatch.setenv(name, text)
        with pytest.raises(ValueError, match=f"{name}='{text}': a number of bytes"):
            read_environment()

    def test_the_other_is_not_touched(self, monkeypatch: pytest.MonkeyPatch, name: str, field: str) -> None:
        monkeypatch.setenv(name, "5")
        assert {"capacity", "inline_max"} == {field} | {
            other for other in ("capacity", "inline_max") if getattr(read_environment(), other) is None
        }
