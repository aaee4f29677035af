"""How long a lease lives: as long as anything that lies in the message's memory, by all roads of torch and numpy."""

from __future__ import annotations

import copy
import ctypes
import errno
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import ExitStack, nullcontext
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from shmcast._layout import PAGE
from shmcast._lease import COPY_BELOW
from shmcast.errors import ArenaFull, ClosedError, ShmcastError, StaleHandle
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer
from tests.support.codec import bits
from tests.support.reuse import overwrite_what_is_free, released

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shmcast._held import Lease
    from tests.support.ranks import Ranks

MIB = 1 << 20
BIG = 1 << 17
DEADLINE_SECONDS = 30.0
AT_ONCE = Policy(wait=0)


def until(condition: Callable[[], bool], what: str) -> None:
    """Poll until `condition()` holds; only a bug makes the deadline pass."""
    deadline, never = time.monotonic() + DEADLINE_SECONDS, threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after {DEADLINE_SECONDS:g} s: {what}")
        never.wait(0.001)


def big(value: int, size: int = BIG) -> torch.Tensor:
    """`size` bytes, each of them `value`."""
    return torch.full((size,), value, dtype=torch.uint8)


def tensor_of(obj: object) -> torch.Tensor:
    """`obj`, which is a tensor."""
    assert isinstance(obj, torch.Tensor)
    return obj


def values(obj: Any) -> set[int]:
    """The values of all bytes that `obj` shows, whatever kind of view it is."""
    if isinstance(obj, torch.Tensor):
        return set(bits(obj.detach()))
    if isinstance(obj, torch.UntypedStorage):
        return set(obj)
    if isinstance(obj, np.ndarray):
        return set(obj.tobytes())
    if isinstance(obj, memoryview):
        return set(obj.tobytes())
    if isinstance(obj, dict):
        return set().union(*map(values, obj.values()))
    if isinstance(obj, (list, tuple)):
        return set().union(*map(values, obj))
    return values(obj.keeps)


# pytest holds what a fixture gives until after the look for leftovers; a closed end keeps its control segment mapped.


@pytest.fixture
def writer(request: pytest.FixtureRequest) -> Iterator[Writer]:
    with Writer(2, capacity=MIB, policy=AT_ONCE) as writer:
        yield writer
    request.node.funcargs.clear()


@pytest.fixture
def reader(writer: Writer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 0) as reader:
        yield reader
    request.node.funcargs.clear()


@pytest.fixture
def other(writer: Writer, request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(writer.address, 1) as reader:
        yield reader
    request.node.funcargs.clear()


# What keeps a lease.


class Keeper:
    """Refers to a tensor from its own cycle, so that only the garbage collector ends it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.keeps = tensor[5:]
        self.itself = self


def _reshaped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(64, -1)


DERIVED: dict[str, Callable[[torch.Tensor], object]] = {
    "itself": lambda t: t,
    "slice": lambda t: t[3:70_000],
    "one byte": lambda t: t[-1],
    "strided": lambda t: t[::3],
    "transposed": lambda t: _reshaped(t).T,
    "last of a split": lambda t: torch.split(t, 1000)[-1],
    "one of unbind": lambda t: _reshaped(t).unbind()[7],
    "expanded": lambda t: t[:1].expand(9, 5),
    "as_strided": lambda t: t.as_strided((7, 9), (100, 3), 11),
    "view of a dtype": lambda t: t.view(torch.bfloat16),
    "complex part": lambda t: torch.view_as_real(t.view(torch.complex64)),
    "detached": lambda t: t.detach(),
    "data": lambda t: t.data,
    "parameter": lambda t: torch.nn.Parameter(t.view(torch.float32)),
    "parameter without gradient": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "module": lambda t: Keeper(torch.nn.ParameterList([torch.nn.Parameter(t, requires_grad=False)])[0]),
    "shallow copy": lambda t: copy.copy(t),
    "alias": lambda t: torch.ops.aten.alias(t),
    "another tensor's storage": lambda t: torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()),
    "untyped storage": lambda t: t.untyped_storage(),
    "numpy": lambda t: t.numpy(),
    "numpy slice": lambda t: t.numpy()[9:],
    "numpy of a slice": lambda t: t[9:].numpy(),
    "numpy view of a dtype": lambda t: t.numpy().view(np.float64)[1:].T,
    "numpy strides": lambda t: np.lib.stride_tricks.as_strided(t.numpy(), (5, 5), (10, 1)),
    "numpy and back": lambda t: torch.from_numpy(t.numpy()[1:])[1:],
    "dlpack": lambda t: torch.utils.dlpack.from_dlpack(t),
    "numpy by dlpack": lambda t: np.from_dlpack(t),
    "array protocol": lambda t: np.asarray(t),
    "memoryview": lambda t: t.numpy().data[5:],
    "dict": lambda t: {**{"a": t[:9]}},
    "list in a tuple": lambda t: (1, [t])[1:],
    "cycle": Keeper,
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("derive", DERIVED.values(), ids=DERIVED.keys())
def test_whatever_lies_in_the_memory_holds_the_lease(
    writer: Writer, reader: Reader, derive: Callable[[torch.Tensor], object], inference: bool
) -> None:
    handle = writer.publish(big(0x5A), readers=[0])
    with torch.inference_mode() if inference else nullcontext():
        opened = tensor_of(reader.open(handle))
        kept = derive(opened)
        del opened
        gc.collect()
        overwrite_what_is_free(writer, 0x11)
        assert values(kept) == {0x5A}
        assert reader.stats().leases_held == 1
        assert writer.stats().leases[0].opened == 1
        del kept
    released(reader)
    overwrite_what_is_free(writer, 0x22)
    assert writer.stats().live_blocks == 0


@pytest.mark.parametrize("derive", [DERIVED["slice"], DERIVED["numpy slice"], DERIVED["detached"]])
def test_what_crosses_the_edge_of_inference_mode_holds_the_lease(
    writer: Writer, reader: Reader, derive: Callable[[torch.Tensor], object]
) -> None:
    handle = writer.publish(big(0x5A), readers=[0], opens=2)
    with torch.inference_mode():
        within = tensor_of(reader.open(handle))
    outside = tensor_of(reader.open(handle))
    kept = [derive(within)]
    with torch.inference_mode():
        kept.append(derive(outside))
    del within, outside
    gc.collect()
    overwrite_what_is_free(writer, 0x11)
    assert values(kept) == {0x5A}
    assert reader.stats().leases_held == 2
    kept.clear()
    released(reader)


@pytest.mark.parametrize(
    "derive",
    [lambda t: t.clone(), lambda t: t[::2].contiguous(), lambda t: copy.deepcopy(t), lambda t: t.numpy().copy()],
    ids=["clone", "contiguous", "deepcopy", "numpy copy"],
)
def test_a_copy_holds_nothing(writer: Writer, reader: Reader, derive: Callable[[torch.Tensor], object]) -> None:
    kept = derive(tensor_of(reader.open(writer.publish(big(0x5A), readers=[0]))))
    released(reader)
    overwrite_what_is_free(writer, 0x11)
    assert writer.stats().live_blocks == 0
    assert values(kept) == {0x5A}


def test_one_of_several_tensors_holds_the_whole_message(writer: Writer, reader: Reader) -> None:
    obj = {"first": big(0x5A), "second": big(0x5A), "array": np.full(BIG, 0x5A, np.uint8), "rest": "text"}
    for name in ("first", "second", "array"):
        opened = reader.open(writer.publish(obj, readers=[0]))
        assert isinstance(opened, dict)
        kept = opened.pop(name)
        del opened
        gc.collect()
        overwrite_what_is_free(writer, 0x11)
        assert values(kept) == {0x5A}
        assert reader.stats().leases_held == 1
        assert writer.stats().live_blocks == 1
        del kept
        released(reader)


def test_views_of_one_parent_hold_it_together(writer: Writer, reader: Reader) -> None:
    parent = big(0x5A, 64 * 4096)
    views = reader.open(writer.publish(list(torch.split(parent, 4096)), readers=[0]))
    assert isinstance(views, list)
    kept = views[33]
    del views
    gc.collect()
    overwrite_what_is_free(writer, 0x11)
    assert values(kept) == {0x5A}
    assert reader.stats().leases_held == 1
    del kept
    released(reader)


@pytest.mark.parametrize(("size", "pins"), [(1, 0), (COPY_BELOW - 1, 0), (COPY_BELOW, 1)])
def test_only_a_large_tensor_pins_its_message(writer: Writer, reader: Reader, size: int, pins: int) -> None:
    obj = {"position": big(0x5A, size), "pixels": big(0x33)}
    opened = reader.open(writer.publish(obj, readers=[0]))
    assert isinstance(opened, dict)
    kept = opened["position"]
    del opened
    gc.collect()
    until(lambda: reader.stats().leases_held == pins, f"{pins} leases are held")
    overwrite_what_is_free(writer, 0x11)
    assert writer.stats().live_blocks == pins
    assert values(kept) == {0x5A}
    del kept
    released(reader)


def test_a_message_of_nothing_large_is_released_at_once(writer: Writer, reader: Reader) -> None:
    kept = []
    for i in range(20):
        kept.append(reader.open(writer.publish([big(i, 100), list(range(20_000)), "x"], readers=[0])))
        until(lambda: not writer.stats().live_blocks, "it is released")
    assert all(values(obj[0]) == {i} and obj[1] == [*range(20_000)] for i, obj in enumerate(kept))  # type: ignore[index]


def test_a_failed_open_holds_nothing(writer: Writer, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = writer.publish([big(1), big(2)], readers=[0], opens=2)

    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("shmcast.transport.decode", fail)
        with pytest.raises(MemoryError):
            reader.open(handle)
    released(reader)
    assert writer.stats().leases[0].held == 1
    assert values(reader.open(handle)) == {1, 2}
    released(reader)


# In-place writes.


PLACES = {
    "first byte": slice(0, 1),
    "last byte": slice(-1, None),
    "one page": slice(5 * PAGE, 5 * PAGE + 10),
    "across pages": slice(PAGE - 100, PAGE + 100),
    "all": slice(None),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_write_is_the_readers_own(writer: Writer, reader: Reader, other: Reader, place: slice) -> None:
    mine = writer.empty((BIG,), torch.uint8).fill_(1)
    handle = writer.publish([mine, big(1)])
    wrote, reads = reader.open(handle), other.open(handle)
    assert isinstance(wrote, list)
    wrote[0][place] = 7
    wrote[1].numpy()[place] = 7
    assert values(wrote[0][place]) == values(wrote[1][place]) == {7}
    assert values(reads) == {1}
    assert values(mine) == {1}
    del wrote, reads
    released(reader)
    released(other)
    again = writer.publish(mine, readers=[0])
    assert values(reader.open(again)) == {1}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_write_is_not_in_the_next_message(writer: Writer, reader: Reader, place: slice) -> None:
    for value in range(1, 5):
        handle = writer.publish([big(value), big(value, 9)], readers=[0])
        assert handle.where.offset == PAGE
        opened = reader.open(handle)
        assert values(opened) == {value}
        opened[0][place] = 0x77  # type: ignore[index]
        opened[1][:] = 0x77  # type: ignore[index]
        del opened
        released(reader)


def test_a_write_is_not_in_a_message_of_another_shape(writer: Writer, reader: Reader) -> None:
    opened = tensor_of(reader.open(writer.publish(big(1, 6 * BIG), readers=[0])))
    opened.fill_(0x77)
    del opened
    released(reader)
    handles = [writer.publish(big(value, BIG), readers=[0]) for value in range(2, 8)]
    assert [values(reader.open(handle)) for handle in handles] == [{value} for value in range(2, 8)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_each_open_of_one_message_has_its_own_pages(writer: Writer, reader: Reader, order: tuple[int, ...]) -> None:
    handle = writer.publish([big(1), big(1, 9)], readers=[0], opens=3)
    kept: dict[int, Any] = {}
    for i in range(3):
        kept[i] = reader.open(handle)
        assert values(kept[i]) == {1}
        kept[i][0].fill_(10 + i)
        kept[i][1].fill_(10 + i)
    for i in order:
        assert {values(obj) == {10 + at} for at, obj in kept.items()} == {True}
        del kept[i]
        until(lambda: reader.stats().leases_held == len(kept), "the lease is over")
    again = writer.publish(big(2), readers=[0])
    assert again.where.offset == handle.where.offset
    assert values(reader.open(again)) == {2}


def test_an_open_after_all_others_have_ended_sees_the_message(writer: Writer, reader: Reader) -> None:
    handle = writer.publish([big(1), big(1, 9)], readers=[0], opens=3)
    for _ in range(3):
        opened = reader.open(handle)
        assert values(opened) == {1}
        opened[0].fill_(9)  # type: ignore[index]
        del opened
        released(reader)


def test_messages_that_list_one_block_have_their_own_pages(writer: Writer, reader: Reader) -> None:
    tensor = writer.empty((BIG,), torch.uint8).fill_(1)
    first, second = (writer.publish([tensor, i], readers=[0]) for i in range(2))
    one = reader.open(first)
    one[0].fill_(2)  # type: ignore[index]
    two = reader.open(second)
    assert values(two[0]) == {1}  # type: ignore[index]
    two[0].fill_(3)  # type: ignore[index]
    assert values(one[0]) == {2}  # type: ignore[index]
    del one
    until(lambda: reader.stats().leases_held == 1, "the first lease is over")
    assert values(two[0]) == {3}  # type: ignore[index]
    del two
    released(reader)
    assert values(reader.open(writer.publish(tensor, readers=[0]))) == {1}


def test_shared_writes_are_everybodys(writer: Writer) -> None:
    mine = writer.empty((BIG,), torch.uint8).fill_(1)
    handle = writer.publish([mine, big(1)], opens=2)
    with Reader(writer.address, 0, isolation="shared") as left, Reader(writer.address, 1, isolation="shared") as right:
        one, two, three = left.open(handle), right.open(handle), left.open(handle)
        one[0].fill_(2)  # type: ignore[index]
        one[1].fill_(3)  # type: ignore[index]
        for seen in (two, three):
            assert [values(tensor) for tensor in seen] == [{2}, {3}]  # type: ignore[attr-defined]
        assert values(mine) == {2}
        del one, two, three, seen


@pytest.mark.faults
def test_guarded_memory_can_be_read_and_a_write_ends_the_process() -> None:
    [outcome] = exits_of({"a write": "guard()"})
    assert outcome == ("a write", -signal.SIGSEGV, "read\n", "")


# Closing and exit.


def test_tensors_outlive_their_reader(writer: Writer, reader: Reader) -> None:
    handles = [writer.publish(big(0x5A), readers=[0]), writer.publish(big(0x5B), readers=[0])]
    kept = tensor_of(reader.open(handles[0]))
    reader.close()
    with pytest.raises(ClosedError):
        reader.open(handles[1])
    until(lambda: writer.stats().live_blocks == 1, "what was not opened came back")
    overwrite_what_is_free(writer, 0x11)
    assert values(kept) == {0x5A}
    kept.fill_(0x33)
    assert writer.stats().leases[0].held == 1
    del kept
    until(lambda: writer.stats().live_blocks == 0, "the last lease came back")
    until(lambda: not _reader_threads(), "the reader's thread has ended")


def test_tensors_outlive_their_writer(reader: Reader, writer: Writer) -> None:
    tensor = writer.empty((BIG,), torch.uint8).fill_(0x5A)
    kept = reader.open(writer.publish([big(0x5A), tensor], readers=[0]))
    del tensor
    writer.close()
    gc.collect()
    assert values(kept) == {0x5A}
    assert not reader.writer_lives
    kept[0].fill_(1)  # type: ignore[index]
    assert values(kept[0]) == {1}  # type: ignore[index]
    del kept
    released(reader)
    reader.close()
    until(lambda: not _reader_threads(), "the reader's thread has ended, though nobody listens")


def test_the_last_finalizer_may_come_after_the_thread_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread is stopped between the two lines of a finalizer, while others see its lease end and close."""
    unraisable: list[object] = []

    def use(writer: Writer, reader: Reader) -> None:
        class SlowQueue:
            queue: SimpleQueue[Lease] = SimpleQueue()

            def put(self, lease: Lease) -> None:
                self.queue.put(lease)
                reader.close()
                until(lambda: not _reader_threads(), "the thread saw the last lease end")

            def get_nowait(self) -> Lease:
                return self.queue.get_nowait()

        kept = [reader.open(writer.publish(big(1)))]
        reader._leases._wake.release()  # a decode's end waits for the last exporter's to wake the thread
        until(lambda: reader._leases._ended.empty(), "the decode's end was seen")
        with monkeypatch.context() as patch:
            patch.setattr(reader._leases, "_ended", SlowQueue())
            patch.setattr(sys, "unraisablehook", lambda hook: unraisable.append(hook.exc_type))
            kept.clear()

    with Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        use(writer, reader)
    del writer, reader
    assert unraisable == []


def _reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("shmcast-reader")]


EXITS = {
    "globals": "opened = open_one()",
    "cycle": "cycle = [open_one()]; cycle.append(cycle); del cycle",
    "a module's attribute": "sys.kept = open_one()",
    "closed reader": "opened = open_one(); reader.close()",
    "closed writer": "opened = open_one(); writer.close()",
    "everything closed": "opened = open_one(); writer.close(); reader.close()",
    "nothing closed, nothing opened": "handle = writer.publish(7)",
    "memory of empty": "kept = [writer.empty((100_000,)), open_one()]",
    "numpy": "array = open_one().numpy()[7:]",
    "another thread": "threading.Thread(target=hold, args=(open_one(),), daemon=True).start(); started.wait()",
    "a use at exit": "atexit.register(open_one().sum)",
    "a forked child": "opened = open_one(); fork()",
}

# Each child of this one ends as any interpreter does; torch is imported once for all of them.
EXIT = """
import atexit, json, os, sys, tempfile, threading, warnings
import torch
from shmcast.transport import Reader, Writer

torch.set_num_threads(1)
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
started = threading.Event()

def make(isolation="cow"):
    global writer, reader
    writer = Writer(1, capacity=4 << 20)
    reader = Reader(writer.address, 0, isolation=isolation)
    while any(writer.address.token.hex() in name for name in os.listdir("/dev/shm")):
        started.wait(0.001)

def open_one():
    return reader.open(writer.publish(torch.full((100_000,), 7), opens=2))

def hold(tensor):
    kept = tensor[3:]
    started.set()
    threading.Event().wait()

def fork():
    pid = os.fork()
    if not pid:
        sys.exit(0)
    if os.waitpid(pid, 0)[1]:
        print("the child failed")

def guard():
    make("guard")
    opened = open_one()
    if opened.sum() == 700_000 and opened.numpy()[5] == 7 and (opened + 1)[9] == 8:
        print("read", flush=True)
    opened[5] = 8

outcomes = []
for name, how in json.loads(sys.argv[1]).items():
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            if how != "guard()":
                make()
            exec(how)
            print("end", flush=True)
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
        outcomes.append((name, code, *texts))
print(json.dumps(outcomes))
"""


def test_an_interpreter_that_exits_with_live_tensors_is_quiet() -> None:
    assert exits_of(EXITS) == [(name, 0, "end\n", "") for name in EXITS]


def exits_of(hows: dict[str, str]) -> list[tuple[str, int, str, str]]:
    """For each line of Python, run in an interpreter with a writer and a reader: name, exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EXIT, json.dumps(hows)], capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [(name, code, out, err) for name, code, out, err in json.loads(done.stdout)]


# Fork.


def in_child(function: Callable[[], object]) -> str:
    """`repr` of what `function` gives in a forked child, or of the exception; the child ends without any clean-up."""
    theirs, mine = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: this process has threads
        pid = os.fork()
    if not pid:
        try:
            os.write(mine, _outcome(function).encode())
        finally:
            os._exit(0)
    os.close(mine)
    try:
        ready, _, _ = select.select([theirs], [], [], DEADLINE_SECONDS)
        return os.read(theirs, 65_536).decode() if ready else "still busy at the deadline"
    finally:
        os.close(theirs)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _outcome(function: Callable[[], object]) -> str:
    try:
        return repr(function())
    except BaseException as error:
        return type(error).__name__


def test_in_a_forked_child_all_ends_are_closed(writer: Writer, reader: Reader) -> None:
    handle = writer.publish(big(0x5A), readers=[0], opens=2)
    kept = tensor_of(reader.open(handle))
    tensor = writer.empty((BIG,), torch.uint8).fill_(1)
    uses: dict[str, Callable[[], object]] = {
        "publish": lambda: writer.publish(1),
        "publish memory of empty": lambda: writer.publish(tensor),
        "empty": lambda: writer.empty((3,)),
        "writer's stats": writer.stats,
        "settle": writer.settle,
        "open": lambda: reader.open(handle),
    }
    assert {what: in_child(use) for what, use in uses.items()} == dict.fromkeys(uses, "ClosedError")
    quiet = (writer.close, reader.close, lambda: writer.withdraw(handle))
    assert [in_child(use) for use in quiet] == ["None"] * 3
    assert values(kept) == {0x5A}
    assert values(reader.open(handle)) == {0x5A}
    assert reader.writer_lives
    assert writer.stats().leases[0].alive is True


@pytest.mark.parametrize("use", ["discard", "discard_below"])
def test_in_a_forked_child_a_reader_discards_nothing(use: str) -> None:
    with Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        outcome = in_child(partial(getattr(reader, use), writer.publish(big(1))))
    del writer, reader
    assert outcome == "ClosedError"


def test_finalizers_of_a_forked_child_do_nothing(writer: Writer, reader: Reader) -> None:
    kept = [reader.open(writer.publish(big(value), readers=[0])) for value in range(3)]
    empty = [writer.empty((BIG,), torch.uint8).fill_(9)]

    def drop_all() -> int:
        kept.clear()
        empty.clear()
        return gc.collect() * 0

    assert in_child(drop_all) == "0"
    overwrite_what_is_free(writer, 0x11)
    assert writer.stats().leases[0].opened == 3
    assert reader.stats().leases_held == 3
    assert [values(tensor) for tensor in (*kept, *empty)] == [{0}, {1}, {2}, {9}]


def test_a_forked_child_has_ends_of_its_own(writer: Writer, reader: Reader) -> None:
    kept = reader.open(writer.publish(big(1), readers=[0]))

    def publish_and_open() -> set[int]:
        torch.set_num_threads(1)
        with Writer(1, capacity=MIB) as mine, Reader(mine.address, 0) as its:
            return values(its.open(mine.publish(big(2))))

    assert in_child(publish_and_open) == "{2}"
    with Reader(writer.address, 1) as late:
        assert values(late.open(writer.publish(big(3), readers=[1]))) == {3}
    assert values(kept) == {1}


def test_a_forked_child_reads_through_a_reader_of_its_own(writer: Writer, reader: Reader) -> None:
    handle = writer.publish(big(1))

    def attach() -> set[int]:
        late = Reader(writer.address, 1)
        return values(late.open(handle))

    assert in_child(attach) == "{1}"
    until(lambda: writer.stats().leases[1].alive is False, "the child's lock is free")
    assert writer.stats().leases[1].held == 0
    assert values(reader.open(handle)) == {1}


def test_a_living_child_keeps_no_lock_of_its_parent() -> None:
    with Writer(2, capacity=MIB, policy=AT_ONCE) as writer, Reader(writer.address, 0) as reader:
        hold, release = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            try:
                os.close(release)
                os.read(hold, 1)
            finally:
                os._exit(0)
        try:
            writer.close()
            until(lambda: not reader.writer_lives, "the writer's lock is free while a child of it lives")
        finally:
            os.close(release)
            os.close(hold)
            os.waitpid(pid, 0)


def _under_locks(writer: Writer, reader: Reader, use: Callable[[], object]) -> str:
    """What `use` comes to in a child that was forked while another thread held every lock that there is."""
    locks: list[Any] = [
        reader._leases._lock,
        reader._leases._outbox._lock,
        reader._counters._lock,
        writer._arena._lock._lock,
        writer._arena._growing._lock,
        writer._counters._lock,
    ]
    held, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            held.set()
            enough.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        return in_child(use)
    finally:
        enough.set()
        thread.join()


def test_a_fork_while_another_thread_holds_every_lock(writer: Writer, reader: Reader) -> None:
    handle = writer.publish(big(1), readers=[0], opens=2)
    kept = [reader.open(handle), writer.empty((BIG,), torch.uint8).fill_(1)]

    def use_and_end() -> list[str]:
        outcomes = [_outcome(lambda: reader.open(handle)), _outcome(lambda: writer.publish(1)), _outcome(writer.stats)]
        kept.clear()
        gc.collect()
        writer.withdraw(handle)
        reader.close()
        writer.close()
        with Writer(1, capacity=MIB) as mine, Reader(mine.address, 0) as its:
            outcomes.append(repr(its.open(mine.publish("works"))))
        return outcomes

    assert _under_locks(writer, reader, use_and_end) == repr(["ClosedError"] * 3 + ["'works'"])
    assert values(kept) == {1}
    assert values(reader.open(handle)) == {1}


@pytest.mark.parametrize("use", ["stats", "discard", "discard_below"])
def test_a_fork_under_locks_hangs_in_nothing(use: str) -> None:
    with Writer(1, capacity=MIB) as writer, Reader(writer.address, 0) as reader:
        arguments = () if use == "stats" else (writer.publish(big(1)),)
        outcome = _under_locks(writer, reader, partial(getattr(reader, use), *arguments))
    del writer, reader
    assert outcome != "still busy at the deadline"


# Threads.


def test_threads_release_at_once_while_others_open(writer: Writer, reader: Reader, other: Reader) -> None:
    threads, rounds = 4, 40
    start = threading.Barrier(2 * threads)
    wrong: list[object] = []

    def use(end: Reader, seed: int) -> None:
        start.wait()
        kept: list[tuple[int, Any]] = []
        for i in range(rounds):
            value = (seed * rounds + i) % 255 + 1
            with torch.inference_mode() if i % 2 else nullcontext():
                try:
                    handle = writer.publish([big(value, 70_000), value], readers=[end._leases.index], opens=2)
                except ArenaFull:
                    kept.clear()
                    continue
                kept += [(value, end.open(handle)[0][i:]), (value, end.open(handle)[0].numpy())]  # type: ignore[index]
            if i % 3 == 0:
                kept[-1][1][:] = value  # makes its pages private
            wrong.extend((value, values(view)) for value, view in kept if values(view) != {value})
            if len(kept) > 3:
                kept.clear()

    workers = [threading.Thread(target=use, args=(end, seed)) for seed, end in enumerate([reader, other] * threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    released(reader)
    released(other)
    until(lambda: writer.stats().live_blocks == 0, "all memory came back")
    assert writer.stats().messages > 0


def test_many_threads_drop_views_of_one_message(writer: Writer, reader: Reader) -> None:
    for value in range(1, 21):
        opened = reader.open(writer.publish([big(value) for _ in range(6)], readers=[0]))
        assert isinstance(opened, list)
        start = threading.Barrier(len(opened))

        def drop(views: list[torch.Tensor], start: threading.Barrier = start) -> None:
            start.wait()
            views.clear()

        workers = [threading.Thread(target=drop, args=([opened.pop()[9:]],)) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        released(reader)
    assert writer.stats().live_blocks == 0


def test_an_open_races_with_withdraw(writer: Writer, reader: Reader) -> None:
    """Either the reader gets the whole message, and keeps it, or `StaleHandle`; never bytes of another one."""
    outcomes: list[object] = []
    for value in range(1, 150):
        handle = writer.publish(big(value, 70_000), readers=[0])
        start = threading.Barrier(2)

        def withdraw(start: threading.Barrier = start, handle: Any = handle) -> None:
            start.wait()
            writer.withdraw(handle)
            writer.withdraw(writer.publish(big(0, 70_000), readers=[0]))

        worker = threading.Thread(target=withdraw)
        worker.start()
        start.wait()
        try:
            kept = reader.open(handle)
        except StaleHandle:
            kept = big(value)
        worker.join()
        outcomes.append(values(kept) == {value})
        del kept
    assert outcomes == [True] * 149
    released(reader)
    assert writer.stats().live_blocks == 0


# Locked memory.

MCL_CURRENT, MCL_FUTURE = 1, 2
libc = ctypes.CDLL(None, use_errno=True)


def lock_all(flags: int) -> bool:
    """`mlockall`; False where the system forbids it."""
    if libc.mlockall(flags) == 0:
        return True
    if ctypes.get_errno() in (errno.EPERM, errno.ENOMEM):
        return False
    raise OSError(ctypes.get_errno(), "mlockall")


def under_mlockall(when: str) -> list[set[int]]:
    """The values of each of several messages in one place, where each is overwritten by its reader; [] if forbidden."""
    flags = {"before": MCL_CURRENT | MCL_FUTURE, "future": MCL_FUTURE}.get(when, 0)
    seen: list[set[int]] = []
    try:
        if flags and not lock_all(flags):
            return []
        with Writer(1, capacity=2 * MIB, policy=AT_ONCE) as writer, Reader(writer.address, 0) as reader:
            for value in range(1, 6):
                handle = writer.publish([big(value), big(value, 9), writer.empty((BIG,), torch.uint8).fill_(value)])
                if when == "after" and value == 2 and not lock_all(MCL_CURRENT):
                    return []
                opened = reader.open(handle)
                seen.append(values(opened))
                for tensor in opened:  # type: ignore[attr-defined]
                    tensor.fill_(0x77)
                if when == "while held" and value == 2 and not lock_all(MCL_CURRENT):
                    return []
                del opened, tensor
                released(reader)
                if when == "between" and value == 2 and not lock_all(MCL_CURRENT):
                    return []
            return seen
    finally:
        libc.munlockall()


@pytest.mark.multiprocess
@pytest.mark.parametrize("when", ["before", "future", "after", "while held", "between"])
def test_no_message_is_stale_under_mlockall(ranks: Ranks, when: str) -> None:
    [seen] = ranks.start_each(under_mlockall, [(when,)]).results()
    if not seen:
        pytest.skip("RLIMIT_MEMLOCK forbids mlockall")
    assert seen == [{1}, {2}, {3}, {4}, {5}]


def attach_under_mlockall() -> bool | None:
    """Whether attaching under MCL_FUTURE has copied any page of the arena; None if forbidden."""
    with Writer(1, capacity=2 * MIB, policy=AT_ONCE) as writer:
        try:
            if not lock_all(MCL_FUTURE):
                return None
            with Reader(writer.address, 0) as reader:
                [segment] = reader._leases._segments
                assert segment is not None
                return reader._leases._pages.exist(segment.address, segment.header.size)
        finally:
            libc.munlockall()


@pytest.mark.multiprocess
def test_attaching_copies_no_page_under_mlockall(ranks: Ranks) -> None:
    [copied] = ranks.start_each(attach_under_mlockall, [()]).results()
    if copied is None:
        pytest.skip("RLIMIT_MEMLOCK forbids mlockall")
    assert not copied


def empty_under_mlockall() -> list[set[int]]:
    """A message whose memory of `empty` is written to after the reader's pages were locked; [] if forbidden."""
    with Writer(1, capacity=2 * MIB, policy=AT_ONCE) as writer, Reader(writer.address, 0) as reader:
        tensor = writer.empty((BIG,), torch.uint8).fill_(1)
        try:
            if not lock_all(MCL_CURRENT):
                return []
            tensor.fill_(2)
            return [values(reader.open(writer.publish(tensor)))]
        finally:
            libc.munlockall()


@pytest.mark.multiprocess
def test_memory_of_empty_is_not_stale_under_mlockall(ranks: Ranks) -> None:
    [seen] = ranks.start_each(empty_under_mlockall, [()]).results()
    if not seen:
        pytest.skip("RLIMIT_MEMLOCK forbids mlockall")
    assert seen == [{2}]


def test_errors_are_ours() -> None:
    assert issubclass(ClosedError, ShmcastError)
