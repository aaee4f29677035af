"""Copies to a device: the same object with the same bytes, and the message held until the device has read it.

The device is `FakeCuda`, whose copies read their addresses only when told; `test_gpu.py` has a real one.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import shmcast
from shmcast.errors import EncodeError
from shmcast.multimodal import Modality, MultimodalDataItem, MultimodalInputs
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.support.codec import same
from tests.support.codec_types import Request, Struct
from tests.support.cuda import DEVICE, FakeCuda, copying_threads, installed
from tests.support.ending import ends_quietly
from tests.support.reuse import overwrite_what_is_free, released
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
MIB = 1 << 20
BIG = 1 << 17


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with installed() as cuda:
        yield cuda


@pytest.fixture
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    with Writer(1, capacity=MIB, allow=["tests"], policy=Policy(wait=0)) as writer:
        yield writer
    request.node.funcargs.clear()


@pytest.fixture
def reader(writer: Writer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 0, allow=["tests"]) as reader:
        yield reader
    request.node.funcargs.clear()


@pytest.fixture
def pinning(writer: Writer, cuda: FakeCuda, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 0, allow=["tests"], pin=True) as reader:
        yield reader
    request.node.funcargs.clear()


def big(value: int, size: int = BIG) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def message() -> MultimodalInputs:
    features = torch.arange(60_000, dtype=torch.float32).view(600, 100)
    items = [
        MultimodalDataItem(
            Modality.IMAGE, feature=features, offsets=[(0, 3)], model_specific_data={"part": features[7:]}
        ),
        MultimodalDataItem(Modality.AUDIO, feature=[torch.arange(50_000).to(torch.bfloat16)]),
    ]
    return MultimodalInputs(items, im_token_id=9, mrope_positions=torch.arange(30).view(3, 10))


# What comes out.


def test_a_message_arrives_as_it_was(writer: Writer, reader: Reader, cuda: FakeCuda) -> None:
    opened = reader.open(writer.publish(message()))
    moved: Any = shmcast.to_device(opened, DEVICE)
    cuda.finish()
    assert same(moved, message())
    assert same(opened, message())
    assert moved.mm_items[0].feature.untyped_storage().data_ptr() == (
        moved.mm_items[0].part.untyped_storage().data_ptr()
    )
    del opened
    released(reader)


def test_shared_bytes_are_copied_once(cuda: FakeCuda) -> None:
    base = torch.arange(64 * 100)
    obj = {"views": [base[i * 100 : (i + 1) * 100] for i in range(64)], "all": base.view(64, 100).t()}
    moved: Any = shmcast.to_device(obj, DEVICE)
    cuda.finish()
    assert cuda.sizes == [base.nbytes]
    assert same(moved, obj)
    moved["views"][3][7] = -1
    assert int(moved["all"][7, 3]) == -1


def test_what_is_no_plain_run_of_bytes_is_copied_too(cuda: FakeCuda) -> None:
    obj = [torch.empty(0, 3), torch.eye(3).to_sparse(), torch.arange(1000.0)[::100], torch.zeros(2, requires_grad=True)]
    moved = shmcast.to_device(obj, DEVICE)
    assert all(torch.equal(new.to_dense(), old.to_dense()) for new, old in zip(moved, obj, strict=True))
    assert not any(new is old for new, old in zip(moved, obj, strict=True))


def test_arrays_stay_on_the_cpu(writer: Writer, reader: Reader, cuda: FakeCuda) -> None:
    opened: Any = reader.open(writer.publish(Struct(feature=np.arange(40_000), format="x")))
    assert shmcast.to_device(opened, DEVICE) is opened
    assert not copying_threads()
    moved: Any = shmcast.to_device(Struct(feature=torch.from_numpy(opened.feature)), DEVICE)
    cuda.finish()
    assert moved.feature.tolist() == list(range(40_000))
    del opened
    released(reader)


def test_what_holds_no_tensor_is_shared_with_the_source(cuda: FakeCuda) -> None:
    request = Request([], padded_input_ids=list(range(1000)), mrope_positions=torch.zeros(3, 4))
    moved = shmcast.to_device(request, DEVICE)
    assert moved is not request
    assert moved.padded_input_ids is request.padded_input_ids


def test_it_all_happens_on_the_stream(cuda: FakeCuda) -> None:
    class Stream:
        device_index = 0

    stream: Any = Stream()
    shmcast.to_device(torch.zeros(3), "cuda", stream)
    shmcast.to_device(torch.zeros(3), 0)
    assert cuda.streams == [stream, None]


def test_another_device_than_the_stream_s_is_refused(cuda: FakeCuda) -> None:
    class Stream:
        device_index = 1

    stream: Any = Stream()
    with pytest.raises(ValueError, match="stream is of cuda:1, device is cuda:0"):
        shmcast.to_device(torch.zeros(3), DEVICE, stream)


@pytest.mark.parametrize("device", ["cpu", "meta", torch.device("cpu")])
def test_a_device_that_is_none_of_cuda_is_refused(device: Any) -> None:
    with pytest.raises(ValueError, match="a CUDA device, such as"):
        shmcast.to_device(torch.zeros(3), device)


def test_a_cycle_is_refused_before_anything_is_copied(cuda: FakeCuda) -> None:
    cycle: list[Any] = [torch.zeros(3)]
    cycle.append(cycle)
    with pytest.raises(EncodeError, match="a cycle"):
        shmcast.to_device(cycle, DEVICE)
    assert not cuda.queued


# How long the message is held.


def test_a_block_is_not_used_again_under_a_copy(writer: Writer, pinning: Reader, cuda: FakeCuda) -> None:
    opened = pinning.open(writer.publish({"pixels": big(0x5A), "more": [big(0x33)]}))
    moved: Any = shmcast.to_device(opened, DEVICE)
    del opened
    gc.collect()
    asked = cuda.queries
    until(lambda: cuda.queries > asked + 3, "the event was asked, and is not done")
    assert pinning.stats().leases_held == 1
    assert writer.stats().leases[0].held == 1
    overwrite_what_is_free(writer, 0xEE)
    cuda.finish()
    assert set(moved["pixels"].tolist()) == {0x5A}
    assert set(moved["more"][0].tolist()) == {0x33}
    # It comes back though nobody calls anything.
    until(lambda: not writer.stats().leases[0].held, "the writer has its block back")


def test_the_look_for_a_block_that_was_used_again_can_fail(writer: Writer, reader: Reader, cuda: FakeCuda) -> None:
    opened: Any = reader.open(writer.publish(big(0x5A)))
    memory = torch.empty(BIG, dtype=torch.uint8, device=DEVICE)
    memory.copy_(opened, non_blocking=True)  # nobody holds what it reads
    del opened
    released(reader)
    overwrite_what_is_free(writer, 0xEE)
    cuda.finish()
    assert 0xEE in set(memory.tolist())


def test_copies_that_end_out_of_order_come_back_out_of_order(
    writer: Writer, reader: Reader, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = threading.Event()
    first = reader.open(writer.publish(big(1)))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "Event", lambda: SlowEvent(slow))
        shmcast.to_device(first, DEVICE)
    second = reader.open(writer.publish(big(2)))
    shmcast.to_device(second, DEVICE)
    del first, second
    cuda.finish()
    until(lambda: reader.stats().leases_held == 1, "the second has come back")
    slow.set()
    released(reader)


class SlowEvent:
    """Done when told."""

    def __init__(self, done: threading.Event) -> None:
        self.query = done.is_set

    def record(self) -> None:
        pass


def test_a_copy_that_raises_loses_no_lease(writer: Writer, reader: Reader, cuda: FakeCuda) -> None:
    opened: Any = reader.open(writer.publish([big(1), big(2)]))
    cuda.empties = 1
    with pytest.raises(torch.OutOfMemoryError):
        shmcast.to_device(opened, DEVICE)
    assert cuda.queued == 1
    del opened
    asked = cuda.queries
    until(lambda: cuda.queries > asked + 3, "the event was asked, and is not done")
    assert reader.stats().leases_held == 1  # the first copy may be reading
    cuda.finish()
    released(reader)


def test_an_event_that_cannot_be_asked_now_is_asked_again(
    writer: Writer, reader: Reader, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    class Capturing(SlowEvent):
        def __init__(self) -> None:
            pass

        def query(self) -> bool:
            nonlocal asked
            asked += 1
            if asked < 4:
                raise RuntimeError("operation not permitted when stream is capturing")
            return True

    monkeypatch.setattr(torch.cuda, "Event", Capturing)
    opened = reader.open(writer.publish(big(1)))
    shmcast.to_device(opened, DEVICE)
    del opened
    released(reader)
    assert asked == 4


def test_one_thread_asks_for_all_and_ends(writer: Writer, reader: Reader, cuda: FakeCuda) -> None:
    for value in range(5):
        opened = reader.open(writer.publish(big(value)))
        shmcast.to_device(opened, DEVICE)
        assert len(copying_threads()) == 1
    del opened
    cuda.finish()
    released(reader)
    until(lambda: not copying_threads(), "the thread has ended")


def test_where_there_is_no_thread_it_waits(
    writer: Writer, reader: Reader, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: object) -> None:
        raise OSError("no thread")

    opened = reader.open(writer.publish(big(8)))
    monkeypatch.setattr("shmcast._threads.start", refuse)
    moved: Any = shmcast.to_device(opened, DEVICE)
    assert set(moved.tolist()) == {8}
    del opened
    released(reader)


def test_a_closed_reader_gives_back_what_was_copied(writer: Writer, pinning: Reader, cuda: FakeCuda) -> None:
    moved = shmcast.to_device(pinning.open(writer.publish(big(4))), DEVICE)
    pinning.close()
    asked = cuda.queries
    until(lambda: cuda.queries > asked + 3, "the event was asked, and is not done")
    assert cuda.registered  # under a copy nothing is undone
    cuda.finish()
    until(lambda: not cuda.registered, "nothing is registered")
    assert set(moved.tolist()) == {4}  # type: ignore[attr-defined]
    assert cuda.calls[-1][2]  # it was still mapped


# Processes that end.

ENDS = {
    "a copy under way": "moved = to_device(open_one(), DEVICE)",
    "a copy that is done": "moved = to_device(open_one(), DEVICE); cuda.finish()",
    "a closed reader": "moved = to_device(open_one(), DEVICE); reader.close()",
    "everything closed": "moved = to_device(open_one(), DEVICE); cuda.finish(); reader.close(); writer.close()",
    "an error": "moved = to_device(open_one(), DEVICE)\ntry: fail()\nexcept ZeroDivisionError: pass",
    "a forked child": "opened = open_one(); moved = to_device(opened, DEVICE); asked = fork(); assert not asked, asked",
    "a reader closed when no calls are made any more": "late = close",
    "a thread of ours that is inside CUDA": "threading.Thread(target=go, daemon=True).start(); started.wait()",
    "a thread of ours that lets a copy go": (
        "moved = to_device(open_one(), DEVICE); weakref.finalize(*_copies._copies._under_way, let_go)\n"
        "cuda.finish(); started.wait()"
    ),
}

PROGRAM = """
import atexit, gc, os, sys, threading, warnings, weakref
import torch

late = lambda: None
atexit.register(lambda: late())  # first in, last out

from shmcast import Reader, Writer, to_device, _copies, _cuda
from tests.support.cuda import DEVICE, FakeCuda, copying_threads, installed

warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
cuda = FakeCuda()
cuda.install(setattr)
started = threading.Event()

def open_one():
    return reader.open(writer.publish(torch.full((100_000,), 7), opens=2))

def fail():
    1 / 0

def fork():
    before, queries = len(cuda.calls), cuda.queries
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    global opened, reader
    cuda.finished = 100
    opened = None
    reader.close()
    gc.collect()
    with _cuda.calls(0) as allowed:
        assert not allowed
    threads = [thread.name for thread in threading.enumerate()]
    os._exit(10 * (cuda.calls[before:] != []) + (cuda.queries != queries) + 2 * (threads != ["MainThread"]))

def close():
    reader.close()
    while reader._leases._segments:
        started.wait(0.001)
    assert cuda.registered

def go():
    # A thread that is inside torch when the interpreter ends has it aborted; to free a tensor is to be inside.
    global matrix
    matrix = torch.ones(700, 700)
    while True:
        with _cuda.calls(0) as allowed:
            if not allowed:
                return
            started.set()
            matrix @ matrix

def let_go():
    matrix = torch.ones(700, 700)
    started.set()
    for _ in range(20):
        matrix @ matrix

writer = Writer(1, capacity=32 << 20)
reader = Reader(writer.address, 0, pin=True)
exec(sys.argv[1])
print("end", flush=True)
"""


@pytest.mark.faults
@pytest.mark.parametrize("name", ENDS)
def test_an_interpreter_that_ends_is_quiet(name: str) -> None:
    ends_quietly(PROGRAM, ENDS[name], "-X", "dev")
