"""With a real device: pinned memory is pinned, and no block is used again under a copy. Skipped without a GPU."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner

import shmcast
from benchmarks import bench_h2d
from shmcast import _copies, _cuda
from shmcast._codec import map_tensors
from shmcast._pages import address_of
from shmcast.multimodal import Modality, MultimodalDataItem, MultimodalInputs
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.support.codec import same
from tests.support.ending import ends_quietly
from tests.support.leaks import keeping_fds
from tests.support.reuse import overwrite_what_is_free, released
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ROOT = Path(__file__).parent.parent
BIG = 1 << 20
CAPACITY = 8 * BIG
CYCLES = (1 << 30, 1 << 33, 1 << 36)  # that the device is kept busy: half a second, and more where that was too short


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    """CUDA, started; what it has open from now on stays open."""
    with keeping_fds():
        stream = new_stream()
        with torch.cuda.stream(stream):
            torch.empty(BIG, pin_memory=True).to("cuda", non_blocking=True).add_(1)
        stream.synchronize()
        memory = mmap.mmap(-1, BIG)
        pins = _cuda.Pins()
        pins.add(address_of(memory), BIG)
        pins.close()


@pytest.fixture(autouse=True)
def threads_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_copies, "IDLE_SECONDS", 0.01)


@pytest.fixture
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    with Writer(2, capacity=CAPACITY, policy=Policy(wait=0)) as writer:
        yield writer
    request.node.funcargs.clear()


@pytest.fixture
def reader(writer: Writer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 0, pin=True) as reader:
        yield reader
    request.node.funcargs.clear()


def new_stream(device: str = "cuda") -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's


def big(value: int) -> torch.Tensor:
    return torch.full((BIG,), value, dtype=torch.uint8)


def publish(writer: Writer, obj: object) -> Any:
    return writer.publish(obj, readers=[0])


def test_tensors_of_a_pinning_reader_are_pinned(writer: Writer, reader: Reader) -> None:
    with Reader(writer.address, 1) as plain:
        handle = writer.publish([big(1), torch.zeros(10)])
        pinned: Any = reader.open(handle)
        pageable: Any = plain.open(handle)
        assert [tensor.is_pinned() for tensor in (pinned[0], pinned[0][77:], pinned[0].view(torch.int64))] == [True] * 3
        assert not pinned[1].is_pinned()  # under 64 KiB: a copy
        assert not pageable[0].is_pinned()
        del pinned, pageable


def test_nothing_is_pinned_once_it_is_over(writer: Writer) -> None:
    reader = Reader(writer.address, 0, pin=True)
    segment = reader._leases._segments[0]
    assert segment is not None
    mapping, address, size = segment.map, segment.address, segment.header.size
    del segment
    reader.close()
    until(lambda: not reader._leases._segments, "the reader has dropped its segments")
    # It is still mapped here, and can be registered again: it was undone.
    pins = _cuda.Pins()
    pins.add(address, size)
    assert pins._addresses == [address]
    pins.close()
    del mapping


def test_a_refusal_leaves_no_error_behind(caplog: pytest.LogCaptureFixture) -> None:
    _cuda._warn.cache_clear()
    pins, again = _cuda.Pins(), _cuda.Pins()
    with mmap.mmap(-1, BIG) as memory:
        pins.add(address_of(memory), BIG)
        again.add(address_of(memory), BIG)
        again.close()
        assert float(torch.ones(3, device="cuda").sum()) == 3.0
        pins.close()
    assert ["cudaHostRegister" in record.getMessage() for record in caplog.records] == [True]
    _cuda._warn.cache_clear()


def test_a_message_arrives_as_it_was(writer: Writer, reader: Reader) -> None:
    features = torch.arange(60_000, dtype=torch.float32).view(600, 100)
    items = [
        MultimodalDataItem(Modality.IMAGE, feature=features, model_specific_data={"part": features[7:].t()}),
        MultimodalDataItem(Modality.AUDIO, feature=[torch.arange(50_000).to(torch.bfloat16), torch.empty(0, 3)]),
    ]
    message = MultimodalInputs(items, im_token_id=9, mrope_positions=torch.arange(30).view(3, 10))
    opened = reader.open(publish(writer, message))
    moved: Any = shmcast.to_device(opened, "cuda")
    assert moved.mm_items[0].feature.is_cuda
    assert moved.mm_items[0].part.stride() == (1, 100)
    storages = [tensor.untyped_storage().data_ptr() for tensor in (moved.mm_items[0].part, moved.mm_items[0].feature)]
    assert storages[0] == storages[1]
    assert same(map_tensors(moved, torch.Tensor.cpu), map_tensors(message, torch.Tensor.clone))
    del opened
    released(reader)


def bytes_after_reuse(writer: Writer, reader: Reader, meanwhile: Callable[[], None]) -> set[int]:
    """What arrives of a message of 0x5A that is dropped while its copy waits, everything free being overwritten."""
    stream = new_stream()
    with torch.cuda.stream(stream):
        torch.empty(BIG, dtype=torch.uint8, device="cuda")  # the allocator has it from here on
    for cycles in CYCLES:
        opened = reader.open(publish(writer, big(0x5A)))
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # torch's
        moved: Any = shmcast.to_device(opened, "cuda", stream)
        del opened
        gc.collect()
        meanwhile()
        overwrite_what_is_free(writer, 0xEE, BIG)
        waited = not stream.query()
        stream.synchronize()
        released(reader)
        if waited:
            return set(moved.unique().tolist())
    pytest.skip("the device was never busy for long enough")


def test_a_block_is_not_used_again_under_a_copy(writer: Writer, reader: Reader) -> None:
    held: list[int | None] = []
    assert bytes_after_reuse(writer, reader, lambda: held.append(reader.stats().leases_held)) == {0x5A}
    assert held[-1] == 1
    until(lambda: not writer.stats().leases[0].held, "the writer has its block back")


def test_the_look_for_a_block_that_was_used_again_can_fail(
    writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_copies, "hold", lambda copy: None)
    assert 0xEE in bytes_after_reuse(writer, reader, lambda: released(reader))


def test_a_pageable_message_arrives_too(writer: Writer) -> None:
    with Reader(writer.address, 0) as reader:
        moved: Any = shmcast.to_device(reader.open(publish(writer, big(0x77))), 0)
        assert moved.unique().tolist() == [0x77]
        released(reader)


def test_what_is_on_the_device_stays(writer: Writer) -> None:
    there = torch.arange(10, device="cuda")
    moved: Any = shmcast.to_device([there, torch.arange(10)], "cuda")
    assert moved[0] is there
    assert torch.equal(moved[0], moved[1])


def test_the_stream_must_be_of_the_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with pytest.raises(ValueError, match="stream is of cuda:1, device is cuda:0"):
        shmcast.to_device(torch.zeros(3), "cuda:0", new_stream("cuda:1"))


def test_registering_a_copy_on_write_map_has_it_show_no_later_bytes() -> None:
    check = bench_h2d.private_map()
    assert check["before"] == check["pages"]
    assert check["code"] or check["after"] < check["pages"]


def test_the_benchmark_runs() -> None:
    done = CliRunner().invoke(bench_h2d.main, ["--sizes", "1M", "--rounds", "2", "--registered", "1M"])
    assert done.exit_code in (0, 1), done.output  # how fast this machine is, is not tested
    assert "to_device" in done.output


ENDS = {
    "a copy under way": "moved = to_device(open_one(), 'cuda')",
    "a copy under way, and a long one": "torch.cuda._sleep(1 << 30); moved = to_device(open_one(), 'cuda')",
    "a closed reader": "moved = to_device(open_one(), 'cuda'); torch.cuda.synchronize(); reader.close()",
    "nothing copied": "kept = open_one()",
    "a forked child": "torch.cuda._sleep(1 << 30); to_device(open_one(), 'cuda'); fork()",
}

PROGRAM = """
import os, sys, warnings
import torch
from shmcast import Reader, Writer, to_device

warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def open_one():
    return reader.open(writer.publish(torch.full((100_000,), 7), opens=2))

def fork():
    pid = os.fork()
    if not pid:
        sys.exit(0)
    assert not os.waitpid(pid, 0)[1]

writer = Writer(1, capacity=32 << 20)
reader = Reader(writer.address, 0, pin=True)
exec(sys.argv[1])
print("end", flush=True)
"""


@pytest.mark.faults
@pytest.mark.parametrize("name", ENDS)
def test_an_interpreter_that_ends_is_quiet(name: str) -> None:
    ends_quietly(PROGRAM, ENDS[name])
