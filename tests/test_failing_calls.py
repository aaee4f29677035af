"""The first, second, third ... call into the system fails: each time the right bytes or a documented error, then all is
well again, and nothing is left."""

import errno
import gc
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache, partial
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from shmcast import Broadcaster, Policy, _arena
from shmcast._reclaim import sweep
from shmcast.errors import ArenaFull, LayoutError, PeerDied, StaleHandle
from shmcast.scheduler import SchedulerBackend
from shmcast.transport import Reader, Writer
from tests.support.failing import MAIN, PLANE, READER, UNLINK, Failing
from tests.support.forks import ForkFailed, fork
from tests.support.leaks import Snapshot, wait_until_clean
from tests.support.ranks import Ranks
from tests.support.writers import names
from tests.test_broadcaster import double, until
from tests.test_broadcaster import payload as payload_of

pytestmark = [pytest.mark.multiprocess, pytest.mark.faults]


MIB = 1 << 20
SIZE = 100_000
LARGE, STEP = 768 << 10, 256 << 10  # a message that takes a segment more, and what segments are made of
T = TypeVar("T")
MAX_CALLS = 300
SHOWN = 5
DOCUMENTED = (ArenaFull, PeerDied, StaleHandle, LayoutError)
CODES = (errno.ENOSPC, errno.EMFILE, errno.ENOMEM, errno.EACCES, errno.EINTR)


@cache
def payload(seed: int, size: int = SIZE) -> torch.Tensor:
    return payload_of(seed, size)


def tried(use: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """What `use` gives; None where it raises what is documented."""
    try:
        return use(*args, **kwargs)
    except DOCUMENTED:
        pass
    except OSError as error:
        if not error.errno:
            raise AssertionError("an OSError without a number") from error
    return None


def straight(use: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What `use` gives where nothing fails any more; a segment may still be on its way to a reader."""
    got: list[T] = []

    def works() -> bool:
        with suppress(ArenaFull):
            got.append(use(*args, **kwargs))
        return bool(got)

    until(works)
    return got[0]


def opens(reader: Reader, handle: Any, seed: int, size: int = SIZE) -> torch.Tensor:
    got = reader.open(handle)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, payload(seed, size))
    return got


def writer_of(mode: Any = tried) -> Writer | None:
    made: Writer | None = mode(Writer, 2, capacity=16 * MIB, policy=Policy(wait=0.1), slots=4)
    return made


def readers_of(writer: Writer, mode: Any = tried) -> list[Reader]:
    made = [mode(Reader, writer.address, index) for index in range(2)]
    return [reader for reader in made if reader is not None]


def open_twice(writer: Writer, readers: list[Reader]) -> None:
    """The second time in a mapping of its own; and written to, so that there are pages to drop."""
    handle = tried(writer.publish, payload(1), opens=2)
    for reader in readers if handle is not None else ():
        kept = [tried(opens, reader, handle, 1) for _ in range(2)]
        for tensor in kept:
            if tensor is not None:
                tensor += 1


def grow(writer: Writer, readers: list[Reader], mode: Any = tried) -> None:
    """A message that takes a segment more."""
    handle = mode(writer.publish, payload(2, LARGE))
    for reader in readers if handle is not None else ():
        mode(opens, reader, handle, 2, LARGE)


def fill(writer: Writer, readers: list[Reader]) -> None:
    """Memory of `empty`."""
    memory = tried(writer.empty, (SIZE,), torch.uint8)
    if memory is not None:
        memory.copy_(payload(3))
        handle = tried(writer.publish, memory)
        for reader in readers if handle is not None else ():
            tried(opens, reader, handle, 3)


def take_back(writer: Writer, readers: list[Reader]) -> None:
    handle = tried(writer.publish, payload(4))
    if handle is not None:
        tried(writer.withdraw, handle)
        for reader in readers:
            tried(reader.open, handle)


def announce(writer: Writer, readers: list[Reader]) -> None:
    tried(writer.announce, bytes(256))
    for reader in readers:
        tried(reader.next_header, 0.05)


def look(writer: Writer, readers: list[Reader]) -> None:
    tried(writer.stats)
    for reader in readers:
        tried(reader.stats)


def well(writer: Writer, readers: list[Reader]) -> None:
    """Nothing fails any more: everything works."""
    handle = straight(writer.publish, payload(5))
    for reader in readers:
        opens(reader, handle, 5)
    grow(writer, readers, straight)
    writer.announce(bytes(256))


def use_ends(failing: Failing) -> str:
    """A writer and two readers from the first call to the last, with one that fails; which it was."""
    before = Snapshot.take()
    with ExitStack() as stack:
        with failing:
            writer = writer_of()
            readers = [] if writer is None else readers_of(writer)
            if writer is not None:
                for step in (open_twice, grow, fill, take_back, announce, look):
                    step(writer, readers)
        if writer is None:
            writer = writer_of(straight)
            assert writer is not None
            readers = readers_of(writer, straight)
        stack.enter_context(writer)
        readers = [stack.enter_context(reader) for reader in readers]
        well(writer, readers)
    del stack, writer, readers
    left = wait_until_clean(before)
    assert not left, left
    return failing.failed


def close_ends(failing: Failing) -> str:
    """Ends that are closed while calls fail, with names left, for a reader never came."""
    before = Snapshot.take()
    writer = Writer(2, capacity=MIB, slots=4)
    stem = writer.address.stem[1:]
    reader = Reader(writer.address, 0)
    kept = opens(reader, writer.publish(payload(1)), 1)
    with failing:
        writer.close()
        reader.close()
        del kept
        until(lambda: not any(thread.name.startswith(READER) for thread in threading.enumerate()))
    del writer, reader
    if "unlink" in failing.failed or "stat" in failing.failed:
        # A name that could not be removed is the next writer's to sweep, when no thread here has it mapped any more.
        until(partial(swept, stem))
    left = wait_until_clean(before)
    assert not left, left
    return failing.failed


def swept(stem: str) -> bool:
    gc.collect()
    sweep()
    return not names(stem)


def unnamed(arena: _arena.Arena) -> bool:
    return not arena.named


def idle_ends(failing: Failing) -> str:
    """A writer that does nothing unlinks what its readers have mapped, if not at once then a little later."""
    before = Snapshot.take()
    with failing, Writer(2, capacity=MIB, slots=4) as writer:
        with Reader(writer.address, 0), Reader(writer.address, 1):
            arena, stem = writer._arena, writer.address.stem[1:]
            until(partial(unnamed, arena))
        assert not names(stem)
    del writer, arena
    left = wait_until_clean(before)
    assert not left, left
    return failing.failed


SCENARIOS = {"use": use_ends, "close": close_ends, "idle": idle_ends}
THREADS = {"use": (MAIN, READER), "close": (MAIN, READER), "idle": (UNLINK,)}


def fail_each(scenario: str, code: int, thread: str, lasts: bool) -> tuple[int, list[str]]:
    """Run it with the first call failing, the second, and so on; how many runs, and what went wrong in any."""
    # A thread pool of the parent's does not work in a child.
    torch.set_num_threads(1)
    for seed in range(1, 6):
        payload(seed)
    payload(2, LARGE)
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:  # this process has other tests to run
        patch.setattr(_arena, "STEP", STEP)
        return fail_calls(scenario, code, thread, lasts)


def fail_calls(scenario: str, code: int, thread: str, lasts: bool) -> tuple[int, list[str]]:
    """As `fail_each`, each in a child of this process."""
    wrong: list[str] = []
    for number in range(1, MAX_CALLS):
        failing = Failing(number, code, thread, lasts=lasts)
        told: list[str] = []

        def run(failing: Failing = failing) -> Any:
            try:
                return SCENARIOS[scenario](failing)
            except BaseException as error:
                raise AssertionError(f"{failing.failed}: {error!r}") from error

        try:
            failed = fork(run)
        except ForkFailed as error:
            wrong.append(f"call {number}: {error}" if not wrong else str(error).strip().splitlines()[-1])
            continue
        if not failed:
            return number - 1, wrong
        told.append(failed)
    return MAX_CALLS, [*wrong, "it never ends"]


ONCE = [("use", code, False) for code in CODES]
ONCE += [(scenario, code, False) for scenario in ("close", "idle") for code in (errno.EACCES, errno.ENOMEM)]
LASTING = [("use", code, True) for code in (errno.ENOSPC, errno.EMFILE)]


def name_of(case: object) -> str | None:
    return errno.errorcode[case] if type(case) is int else None


@pytest.mark.parametrize(("scenario", "code", "lasts"), ONCE + LASTING, ids=name_of)
def test_any_call_may_fail(ranks: Ranks, scenario: str, code: int, lasts: bool) -> None:
    for number, thread in enumerate(THREADS[scenario]):
        [(runs, wrong)] = ranks.start_each(fail_each, [(scenario, code, thread, lasts)], check=False).results(100)
        print(f"{scenario}, {errno.errorcode[code]} on {thread}: {runs} calls failed")
        assert not wrong, f"{len(wrong)} of {runs}:\n" + "\n".join(wrong[:SHOWN])
        assert runs or number, "nothing was tried"


# A group: whichever call of one rank fails, every rank has every object.


def meet(rank: int, failing: Failing, victim: int, placement: str) -> bool:
    """Join, receive and leave, while a call of one rank fails; whether all came."""
    with Broadcaster(policy=Policy(wait=0.1), capacity=16 * MIB, timeout=20) as group:
        well = True
        for seed, size in ((1, SIZE), (2, LARGE), (3, SIZE)):
            got = group.materialize({"a": payload(seed, size)}, double)
            well = well and torch.equal(got["a"], payload(seed, size) * 2)
        batch: list[Any] = group.materialize_batch([{"a": payload(seed)} for seed in (4, 5)], double)
        well = well and all(torch.equal(got["a"], payload(s) * 2) for s, got in zip((4, 5), batch, strict=True))
        if rank == victim:
            failing.__exit__(None, None, None)
        got = group.materialize({"a": payload(5)}, double)
        return well and torch.equal(got["a"], payload(5) * 2)


def schedule(rank: int, failing: Failing, victim: int, placement: Any) -> bool:
    """Join, hand in, take and leave, while a call of one rank fails; whether all came."""
    policy = Policy(wait=0.1, route="shm", local_below=0)
    try:
        backend = SchedulerBackend(fn=double, placement=placement, policy=policy, capacity=16 * MIB, timeout=20)
    except OSError as error:
        # It has no threads, and leaves; the others make everything themselves.
        return rank == victim and error.errno == errno.EAGAIN and "start" in failing.failed
    with backend:
        well = True
        for batch in ({1: SIZE, 3: SIZE}, {2: LARGE, 4: SIZE}, {5: SIZE}):
            if rank == victim and 5 in batch:
                failing.__exit__(None, None, None)
            backend.submit([(seed, {"a": payload(seed, size)}) for seed, size in batch.items()])
            for seed, size in batch.items():
                well = torch.equal(backend.take(seed, 60)["a"], payload(seed, size) * 2) and well
        return well


def meet_each(rank: int, how: str, code: int, thread: str, victim: int) -> list[str]:
    """`meet` or `schedule` with the first call failing, the second, and so on: what failed."""
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_arena, "STEP", STEP)
        for number in range(1, MAX_CALLS):
            before = Snapshot.take(rank=True)
            with Failing(number, code, thread if rank == victim else "nobody's") as failing:
                try:
                    well = (meet if how == "group" else schedule)(rank, failing, victim, how)
                except Exception as error:
                    raise AssertionError(f"rank {rank}; on rank {victim} {failing.failed}") from error
            dist.barrier()
            left = wait_until_clean(before, rank=True)
            assert well, (number, failing.failed)
            assert not left, (failing.failed, left)
            over = torch.tensor([rank == victim and not failing.failed], dtype=torch.int32)
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
            if over.item():
                return told
            told.append(failing.failed)
    raise AssertionError("it never ends")


ALL = [
    (how, code, victim)
    for how in ("group", "entry", "spread")
    for code in (errno.EMFILE, errno.ENOMEM, errno.EACCES)
    for victim in (0, 1)
]
SOME = [("group", errno.EMFILE, 0), ("group", errno.ENOMEM, 1), ("group", errno.EACCES, 0)]
SOME += [("entry", errno.ENOMEM, 1), ("spread", errno.EMFILE, 0)]
TRIED = ALL if "MATRIX_ROUNDS" in os.environ else SOME


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("how", "code", "victim"), TRIED, ids=[f"{how}-{errno.errorcode[code]}-{victim}" for how, code, victim in TRIED]
)
def test_all_have_their_objects_whichever_call_fails(ranks: Ranks, how: str, code: int, victim: int) -> None:
    threads = [MAIN] if how == "group" else [MAIN, PLANE]
    if victim or how == "spread":
        threads.append(READER)
    for thread in threads:
        told = ranks.run(2, meet_each, how, code, thread, victim, timeout=100)
        print(f"{how}, {errno.errorcode[code]} on {thread} of rank {victim}: {len(told[0])} calls failed")
        assert told[0] or thread != MAIN
