"""Switching on: what is replaced, when it is refused, that nothing is half replaced and all of it can be undone."""

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import shmcast.integrations.sglang as integration
from shmcast.integrations.sglang._install import links
from shmcast.integrations.sglang._release import Unsupported, find_release
from tests.sglang.engine import VERSION, Engine, io_struct, schedule_batch
from tests.sglang.requests import KINDS, generate, raw_of, same
from tests.sglang.serving import MAKER, stock_inputs
from tests.support.ranks import Ranks

Scheduler = find_release().scheduler


@pytest.fixture(autouse=True)
def uninstalled() -> Iterator[None]:
    yield
    integration.uninstall()


def patched() -> bool:
    return hasattr(Scheduler.__init__, "__wrapped__")


def receiver() -> Any:
    return sys.modules.get("sglang.srt.managers.scheduler_components.request_receiver")


def test_the_release_is_known() -> None:
    release = find_release()
    assert tuple(int(part) for part in release.version.split(".")[:3]) == VERSION
    assert release.makes_from_dict == (VERSION < (0, 5, 10))
    assert release.request_errors == (VERSION >= (0, 5, 20))


def test_the_plugin_does_nothing_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHMCAST_SGLANG", raising=False)
    integration.plugin()
    assert not patched()
    monkeypatch.setenv("SHMCAST_SGLANG", "1")
    monkeypatch.setenv("SHMCAST_DISABLE", "1")
    integration.plugin()
    assert not patched()


def test_what_is_installed_is_taken_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = vars(Scheduler)["__init__"], getattr(receiver(), "sock_recv", None)
    monkeypatch.setenv("SHMCAST_SGLANG", "1")
    integration.plugin()
    integration.plugin()
    assert patched()
    integration.uninstall()
    assert (vars(Scheduler)["__init__"], getattr(receiver(), "sock_recv", None)) == stock
    integration.uninstall()


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMCAST_SGLANG", "1")
    for name, value in {
        "SHMCAST_SGLANG": "maybe",
        "SHMCAST_SGLANG_WORKERS": "0",
        "SGLANG_MM_BROADCAST_THRESHOLD": "1MB",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(ValueError, match=f"{name}="):
                integration.plugin()
        assert not patched()


def test_a_release_without_a_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Scheduler, "_process_and_broadcast_mm_inputs")
    with pytest.raises(Unsupported, match="Scheduler has no method _process_and_broadcast_mm_inputs"):
        integration.install()
    assert not patched()


def test_a_release_whose_method_takes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_process_and_broadcast_mm_inputs", lambda self, batch, where: None)
    expected = r"_process_and_broadcast_mm_inputs takes \(self, batch, where\), not \(self, raw_mm_inputs\)"
    with pytest.raises(Unsupported, match=expected):
        integration.install()
    assert not patched()


def test_a_release_without_a_maker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(schedule_batch.MultimodalInputs, MAKER)
    with pytest.raises(Unsupported, match="neither from_dict nor from_processor_output"):
        integration.install()
    assert not patched()


def test_a_release_without_a_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(io_struct, "AbortReq")
    with pytest.raises(Unsupported, match="io_struct has no AbortReq"):
        integration.install()
    assert not patched()


def test_sglang_finds_the_plugin() -> None:
    found = [point for point in importlib.metadata.entry_points(group="sglang.srt.plugins") if point.name == "shmcast"]
    if not found:
        pytest.skip("shmcast is on the path but not installed: make test-sglang installs it")
    assert found[0].load() is integration.plugin


def in_a_scheduler_of_its_own(rank: int, address: str) -> int:
    """`Scheduler(...)`, whose constructor here gives it what `Engine` gives one."""
    engine = Engine(address)
    stock = Scheduler.__init__
    Scheduler.__init__ = lambda self, server_args: self.__dict__.update(vars(engine.scheduler))
    try:
        integration.install()
        engine.scheduler = Scheduler(engine.args)
        assert links[engine.scheduler].admits
        if rank == 0:
            import zmq

            context = zmq.Context()
            sender = context.socket(zmq.PUSH)
            sender.connect(f"{address}-0")
            sender.send_pyobj(generate("pixels", raw_of(KINDS["all"]())))
        received: list[Any] = []
        while not received:
            received = engine.receive()
        same(engine.inputs(received[0]), stock_inputs(raw_of(KINDS["all"]())))
        if rank == 0:
            context.destroy(linger=0)
        del received
        integration.uninstall()
        assert engine.scheduler.recv_from_tokenizer is engine.socket
        return len(links)
    finally:
        integration.uninstall()
        Scheduler.__init__ = stock
        engine.close()


@pytest.mark.multiprocess
def test_a_scheduler_that_is_made_is_linked(engines: Ranks, tmp_path: Path) -> None:
    assert engines.run(2, in_a_scheduler_of_its_own, f"ipc://{tmp_path}/s") == [0, 0]
