"""Segments registered with CUDA: once each, in one piece, undone before they are unmapped; refused without harm.

The driver is `FakeCuda`; `test_gpu.py` has the real one.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

from shmcast import _arena, _cuda
from shmcast._layout import PAGE
from shmcast.broadcaster import Broadcaster
from shmcast.policy import Policy
from shmcast.scheduler import SchedulerBackend
from shmcast.transport import Reader, Writer
from tests.support.cuda import FakeCuda, installed
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.ranks import Ranks

BIG = 1 << 17
PORTABLE = 1


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with installed() as cuda:
        yield cuda


@pytest.fixture
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    monkeypatch.setattr(_arena, "STEP", 64 * PAGE)
    with Writer(2, capacity=1 << 21, policy=Policy(wait=60)) as writer:
        yield writer
    request.node.funcargs.clear()


def big(value: int, size: int = BIG) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def segments_of(reader: Reader) -> dict[int, int]:
    """Address and size of what the reader has mapped."""
    return {s.address: s.header.size for s in reader._leases._segments if s is not None}


def end(reader: Reader, cuda: FakeCuda) -> None:
    """Close it, and wait until it has undone everything."""
    reader.close()
    gc.collect()
    until(lambda: not cuda.registered, "nothing is registered")


def warnings_in(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.name == "shmcast"]


def test_each_segment_is_registered_once_and_whole_also_later_ones(writer: Writer, cuda: FakeCuda) -> None:
    with Reader(writer.address, 0, pin=True) as reader, Reader(writer.address, 1) as other:
        first = dict(cuda.registered)
        kept = [reader.open(writer.publish(big(1, 3 * BIG), readers=[0])) for _ in range(3)]
        # The reader's thread lists a later segment, and then registers it.
        until(
            lambda: len(cuda.registered) == len(segments_of(reader)) == len(writer._arena._segments),
            "all that came later are mapped and registered",
        )
        assert len(cuda.registered) > len(first)
        assert first.items() < cuda.registered.items()
        assert cuda.registered == segments_of(reader)
        assert [call[0] for call in cuda.calls] == ["register"] * len(cuda.registered)
        assert {call[3] for call in cuda.calls} == {PORTABLE}
        assert set(cuda.devices) == {0}
        assert not set(segments_of(other)) & set(cuda.registered)
        del kept
    end(reader, cuda)


def test_it_is_undone_before_the_segment_is_unmapped_and_not_under_a_tensor(writer: Writer, cuda: FakeCuda) -> None:
    reader = Reader(writer.address, 0, pin=True)
    kept: Any = reader.open(writer.publish(big(7), readers=[0]))
    view = kept[5:]
    del kept
    reader.close()
    until(lambda: not reader.writer_lives or reader.stats().leases_held == 1, "the reader knows of one lease")
    assert cuda.registered
    assert set(view.tolist()) == {7}
    del view
    end(reader, cuda)
    undone = [call for call in cuda.calls if call[0] == "unregister"]
    assert [mapped for _, _, mapped in undone] == [True]
    assert None not in cuda.devices


def test_a_reader_that_cannot_be_made_undoes_it(
    writer: Writer, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: object) -> None:
        raise OSError("no thread")

    monkeypatch.setattr("shmcast._threads.start", refuse)
    with pytest.raises(OSError, match="no thread"):
        Reader(writer.address, 0, pin=True)
    assert [call[0] for call in cuda.calls] == ["register", "unregister"]
    assert cuda.calls[1][2]  # still mapped
    assert not cuda.registered


def test_a_refusal_is_one_warning_and_tensors_that_are_not_pinned(
    writer: Writer, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.refuse = 2
    with Reader(writer.address, 0, pin=True) as reader, Reader(writer.address, 1, pin=True) as other:
        handle = writer.publish(big(9))
        assert all(set(end.open(handle).tolist()) == {9} for end in (reader, other))  # type: ignore[attr-defined]
    (said,) = warnings_in(caplog)
    assert "text of 2 (2)" in said
    assert "not pinned" in said
    until(lambda: not reader.stats().leases_held, "nothing is held")
    assert [call[0] for call in cuda.calls] == ["register"] * 2
    assert not cuda.pending, "the next kernel would be blamed for it"


def test_a_driver_that_fails_to_undo_it_is_a_warning(
    writer: Writer, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    with Reader(writer.address, 0, pin=True):
        cuda.registered.clear()
    until(lambda: bool(warnings_in(caplog)), "there is a warning")
    assert ["text of 713" in said for said in warnings_in(caplog)] == [True]
    assert not cuda.pending


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_cuda_there_is_one_warning_and_everything_works(
    writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    _cuda._warn.cache_clear()
    with Reader(writer.address, 0, pin=True) as reader, Reader(writer.address, 1, pin=True):
        assert set(reader.open(writer.publish(big(3))).tolist()) == {3}  # type: ignore[attr-defined]
    (said,) = warnings_in(caplog)
    assert said.startswith("pin=True: CUDA cannot be used here: ")


# Isolation.


def test_pinned_tensors_are_shared(writer: Writer, cuda: FakeCuda) -> None:
    with Reader(writer.address, 0, pin=True) as reader, Reader(writer.address, 1, pin=True) as other:
        handle = writer.publish(big(1))
        left: Any = reader.open(handle)
        right: Any = other.open(handle)
        left[17] = 200
        assert int(right[17]) == 200
        del left, right
    end(reader, cuda)


def test_shared_may_be_said(writer: Writer, cuda: FakeCuda) -> None:
    with Reader(writer.address, 0, pin=True, isolation="shared") as reader:
        assert cuda.registered == segments_of(reader)
    end(reader, cuda)


WHY = {"cow": "takes a private copy of a copy-on-write map", "guard": "cannot be written to"}


@pytest.mark.parametrize("isolation", WHY)
def test_another_isolation_is_refused_and_why(writer: Writer, isolation: Any, cuda: FakeCuda) -> None:
    makes: list[Any] = [
        lambda: Reader(writer.address, 0, pin=True, isolation=isolation),
        lambda: Broadcaster(pin=True, isolation=isolation),
        lambda: SchedulerBackend(fn=len, pin=True, isolation=isolation),
    ]
    for make in makes:
        with pytest.raises(ValueError, match=f"pin=True with isolation='{isolation}'.*{WHY[isolation]}"):
            make()
    assert not cuda.calls


def pinned_through(rank: int, how: str) -> list[tuple[bool, str]]:
    """Of each reader of this rank: whether its segments are registered, and its isolation."""
    with installed() as cuda:
        if how == "Broadcaster":
            with Broadcaster(pin=True) as group:
                return [seen(reader, cuda) for reader in (group._reader,) if reader is not None]
        with SchedulerBackend(fn=len, pin=True, placement="spread") as backend:
            return [seen(reader, cuda) for reader in backend._crew.readers]


def seen(reader: Reader, cuda: FakeCuda) -> tuple[bool, str]:
    return segments_of(reader).items() <= cuda.registered.items(), reader._leases._isolation


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "expected"),
    [("Broadcaster", [[], [(True, "shared")]]), ("SchedulerBackend", [[(True, "shared")], [(True, "shared")]])],
)
def test_a_group_hands_it_to_its_readers(ranks: Ranks, how: str, expected: Any) -> None:
    assert ranks.run(2, pinned_through, how) == expected


def test_the_look_for_warnings_can_fail(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("shmcast").warning("this one")
    assert warnings_in(caplog) == ["this one"]
