"""The board: its bytes, at offsets written down a second time here; torn, damaged, hostile; when it is written."""

from __future__ import annotations

import gc
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shmcast import _board, _layout, _news
from shmcast._board import Board, Claim, Introduction, Row, Torn, claim_of, pack_board, parse_board, store_board
from shmcast._layout import Entry, EntryKind
from shmcast._wire import Reason
from shmcast.errors import LayoutError
from shmcast.metrics import Counters
from shmcast.transport import Reader, Writer
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shmcast._arena import Arena

DEADLINE_SECONDS = 60.0
SIZE = 1904

# field: (offset, size). Declared here once more, on purpose: a change of the format must show.
FIELDS = {
    "before": (0, 8),
    "written": (8, 8),
    "made": (16, 8),
    "pid": (24, 4),
    "state": (28, 4),
    "capacity": (32, 8),
    "granted": (40, 8),
    "live": (48, 8),
    "free": (56, 8),
    "largest": (64, 8),
    "total": (72, 8),
    "messages": (80, 8),
    "bytes": (88, 8),
    "after": (1896, 8),
}
BOARD = Board(
    written=900,
    made=100,
    pid=4711,
    closed=False,
    capacity=1 << 30,
    granted=77,
    live=3,
    free=5000,
    largest=4000,
    total=9000,
    messages=12,
    bytes=1 << 40,
    fallbacks={"full": 7, "held": 2},
    readers=(Row(3, 1, 500, 9), Row(0, 0, 0, 2**40)),
)


def put(raw: bytearray, **values: int) -> bytearray:
    """`raw` with these fields set, and sealed, as an enemy would."""
    for name, value in values.items():
        at, size = FIELDS[name]
        raw[at : at + size] = value.to_bytes(size, "little")
    raw[1892:1896] = zlib.crc32(bytes(raw[:1892])).to_bytes(4, "little")
    return raw


# Bytes.


def test_board_bytes() -> None:
    raw = bytearray(SIZE)
    raw[96:112] = b"full".ljust(12, b"\0") + (7).to_bytes(4, "little")
    raw[112:128] = b"held".ljust(12, b"\0") + (2).to_bytes(4, "little")
    for at, row in ((352, BOARD.readers[0]), (376, BOARD.readers[1])):
        held, opened, since, heard = row
        raw[at : at + 8] = held.to_bytes(4, "little") + opened.to_bytes(4, "little")
        raw[at + 8 : at + 24] = since.to_bytes(8, "little") + heard.to_bytes(8, "little")
    numbers = {name: getattr(BOARD, name) for name in FIELDS if name not in ("before", "after", "state")}
    put(raw, before=6, after=6, state=1, **numbers)
    assert pack_board(6, BOARD) == raw
    assert parse_board(raw, 2) == BOARD


def test_the_board_is_the_last_page_of_a_control_segment_with_and_without_slots() -> None:
    assert _board.BOARD.size == SIZE <= _layout.PAGE
    for slots in (0, 1, 1024):
        at = _layout.board_offset(3, 256, slots)
        assert at % _layout.PAGE == 0
        assert at + _layout.PAGE == _layout.control_size(3, 256, slots)
    assert _layout.board_offset(3, 256, 1024) >= _layout.slots_offset(3, 256) + 1024 * _layout.SLOT.size


@given(
    st.builds(
        Board,
        written=st.integers(2**62, 2**63),
        made=st.integers(0, 2**62),
        pid=st.integers(0, 2**32 - 1),
        closed=st.booleans(),
        capacity=st.integers(0, 2**64 - 1),
        granted=st.integers(0, 2**64 - 1),
        live=st.integers(0, 2**64 - 1),
        free=st.integers(2**40, 2**50),
        largest=st.integers(0, 2**40),
        total=st.integers(2**50, 2**64 - 1),
        messages=st.integers(0, 2**64 - 1),
        bytes=st.integers(0, 2**64 - 1),
        fallbacks=st.dictionaries(
            st.from_regex(r"[a-z_]{1,12}", fullmatch=True), st.integers(0, 2**32 - 1), max_size=16
        ),
        readers=st.lists(
            st.builds(Row, st.integers(5, 3839), st.integers(0, 5), st.integers(1, 2**63), st.integers(0, 2**63)),
            min_size=1,
            max_size=64,
        ).map(tuple),
    ),
    st.integers(1, 2**64 - 1),
)
def test_what_is_packed_is_parsed(board: Board, number: int) -> None:
    assert parse_board(pack_board(number, board), len(board.readers)) == board


def test_more_than_fits_is_cut_and_stays_a_board() -> None:
    crowd = {f"{'reason'}_{chr(97 + i)}": 2**40 - i for i in range(20)} | {"a_very_long_reason": 1}
    board = parse_board(pack_board(1, BOARD._replace(fallbacks=crowd)), 2)
    assert board is not None
    assert board.fallbacks == dict.fromkeys([*crowd][:16], 2**32 - 1)
    board = parse_board(pack_board(1, BOARD._replace(fallbacks={"a_very_long_reason": 1})), 2)
    assert board is not None
    assert board.fallbacks == {"a_very_long_": 1}


def test_a_page_of_zeros_is_a_board_that_was_not_written_yet() -> None:
    assert parse_board(bytes(_layout.PAGE), 2) is None


# Torn, damaged, hostile.


def test_L11_a_board_that_is_being_written_is_torn_wherever_the_write_stands() -> None:
    """Whatever part of the bytes has arrived, in the order of the stores: the old board, the new one, or `Torn`."""
    old, new = pack_board(7, BOARD), pack_board(8, BOARD._replace(messages=13, live=4))
    for cut in range(1, SIZE):
        mixed = new[:cut] + old[cut:]
        if mixed != new:
            with pytest.raises(Torn):
                parse_board(mixed, 2)


def test_L11_stores_that_arrive_in_another_order_do_not_pass_for_a_board() -> None:
    old, new = pack_board(7, BOARD), pack_board(8, BOARD._replace(messages=13, live=4))
    for start, end in ((8, 1896), (8, 96), (48, 56), (0, 8), (1892, 1904), (1896, 1904)):
        with pytest.raises(Torn):
            parse_board(old[:start] + new[start:end] + old[end:], 2)
    # Both numbers have arrived, what is between them has not.
    with pytest.raises(Torn):
        parse_board(new[:8] + old[8:1896] + new[1896:], 2)


def test_L11_the_number_is_stored_before_and_after_everything_else() -> None:
    class Memory(bytearray):
        stores: list[tuple[int, int]]

        def __setitem__(self, key: Any, value: Any) -> None:
            self.stores.append((key.start, key.stop))
            super().__setitem__(key, value)

    memory = Memory(_layout.PAGE + SIZE)
    memory.stores = []
    store_board(memory, _layout.PAGE, 5, BOARD)
    assert memory.stores == [(4096, 4104), (4104, 4096 + 1896), (4096 + 1896, 4096 + 1904)]
    assert parse_board(memory[_layout.PAGE :], 2) == BOARD


@given(st.integers(0, SIZE - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, change: int) -> None:
    raw = bytearray(pack_board(6, BOARD))
    raw[at] ^= change
    if 1888 <= at < 1892:  # reserved, and under the checksum
        assert raw != pack_board(6, BOARD)
    with pytest.raises(LayoutError):
        parse_board(raw, 2)


@pytest.mark.parametrize("size", [0, 1, 8, 1903])
def test_a_short_board_is_refused(size: int) -> None:
    with pytest.raises(LayoutError, match="cannot hold a board"):
        parse_board(pack_board(6, BOARD)[:size], 2)


@pytest.mark.parametrize("readers", [-1, 0, 65])
def test_a_board_for_an_impossible_number_of_readers_is_refused(readers: int) -> None:
    with pytest.raises(LayoutError):
        parse_board(pack_board(6, BOARD), readers)


@pytest.mark.parametrize(
    "values",
    [
        {"state": 0},
        {"state": 3},
        {"largest": 5001},
        {"free": 9001, "largest": 1},
        {"made": 901},
        {"written": 99},
    ],
    ids=str,
)
def test_a_sealed_board_that_contradicts_itself_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(LayoutError, match="contradicts"):
        parse_board(put(bytearray(pack_board(6, BOARD)), **values), 2)


@pytest.mark.parametrize(
    ("at", "change"),
    [
        (96, b"\x1b[2J"),
        (96, b"FULL"),
        (96, b"\0ull"),
        (100, b"\0\0x\0"),
        (128 + 12, b"\1"),
        (352, (4000).to_bytes(4, "little")),
        (356, (4).to_bytes(4, "little")),
        (360, bytes(8)),
        (376 + 8, b"\1"),
    ],
)
def test_a_sealed_board_with_wrong_rows_is_refused(at: int, change: bytes) -> None:
    raw = bytearray(pack_board(6, BOARD))
    raw[at : at + len(change)] = change
    with pytest.raises(LayoutError):
        parse_board(put(raw), 2)


@given(st.binary(min_size=SIZE, max_size=SIZE), st.integers(1, 64), st.booleans())
def test_whatever_the_bytes_are_it_is_a_board_or_a_layout_error(raw: bytes, readers: int, sealed: bool) -> None:
    hostile = bytearray(raw)
    if sealed:
        put(hostile, before=3, after=3)
    try:
        board = parse_board(hostile, readers)
    except LayoutError:
        return
    assert len(board.readers) == readers if board else not any(raw)


WRITES = """
    import mmap, sys
    from shmcast._board import Board, Row, store_board

    with open(sys.argv[1], "r+b") as file:
        memory = mmap.mmap(file.fileno(), 4096)
    number = int(sys.argv[2])
    print("ready", flush=True)
    while True:
        number += 1
        store_board(memory, 0, number, Board(number, number, 1, False, *[number] * 8, {"full": number}, (Row(1, 1, number, number),) * 64))
"""  # noqa: E501


@pytest.mark.faults
@pytest.mark.multiprocess
def test_L11_a_writer_killed_in_the_middle_leaves_a_whole_board_or_a_torn_one(tmp_path: Path) -> None:
    """Read all the while by another process, and after a SIGKILL: no state of the board is ever mixed of two."""
    path = tmp_path / "board"
    path.write_bytes(bytes(4096))
    whole = torn = 0
    for _ in range(5):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ) as memory:
            before = int.from_bytes(memory[:8], "little")
            command = [sys.executable, "-c", textwrap.dedent(WRITES), str(path), str(before)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                until(lambda before=before, memory=memory: memory[:8] != before.to_bytes(8, "little"), "it writes")  # type: ignore[misc]
                for last in [False] * 4000 + [True]:
                    if last:
                        process.send_signal(signal.SIGKILL)
                        process.wait()
                    try:
                        board = parse_board(os.pread(file.fileno(), 4096, 0), 64)
                    except Torn:
                        torn += 1
                        continue
                    assert board is not None
                    number = board.written
                    told = (number, number, 1, False, *[number] * 8, {"full": number}, board.readers)
                    assert board == Board._make(told)
                    assert set(board.readers) == {Row(1, 1, number, number)}
                    whole += 1
    assert whole > 100, f"{torn} were torn"


# What a reader holds, by its board and its ring.


def said(*entries: tuple[EntryKind, int]) -> list[Entry]:
    return [Entry(*entry) for entry in entries]


OPENED, RELEASED, DISCARDED, MAPPED = EntryKind.OPENED, EntryKind.RELEASED, EntryKind.DISCARDED, EntryKind.MAPPED
NEVER = _layout.NEVER


@pytest.mark.parametrize(
    ("entries", "claim"),
    [
        ([], Claim(3, 1, 500, True, False)),
        ([(MAPPED, 1)], Claim(3, 1, 500, True, False)),
        ([(OPENED, 70)], Claim(3, 2, 500, True, False)),
        ([(RELEASED, 60)], Claim(2, 0, 500, False, False)),
        ([(OPENED, 70), (RELEASED, 70)], Claim(2, 1, 500, False, False)),
        ([(RELEASED, 1), (RELEASED, 2), (RELEASED, 3)], Claim(0, 0, 0, False, False)),
        # Given after the board was written: 77 and above.
        ([(OPENED, 77)], Claim(4, 2, 500, True, False)),
        ([(OPENED, 77), (RELEASED, 77)], Claim(3, 1, 500, False, False)),
        ([(RELEASED, 80)], Claim(3, 1, 500, True, False)),
        ([(DISCARDED, NEVER)], Claim(1, 1, 500, False, True)),
        ([(DISCARDED, 77)], Claim(1, 1, 500, False, False)),
        ([(DISCARDED, 60)], Claim(3, 1, 500, False, False)),
        ([(DISCARDED, NEVER), (RELEASED, 60)], Claim(0, 0, 0, False, True)),
        # Invented ones.
        ([(RELEASED, n) for n in range(20)], Claim(0, 0, 0, False, False)),
    ],
)
def test_what_a_reader_said_since_is_counted(entries: list[tuple[EntryKind, int]], claim: Claim) -> None:
    assert claim_of(BOARD, BOARD.readers[0], said(*entries)) == claim


@given(
    st.lists(st.tuples(st.sampled_from(list(EntryKind)), st.integers(0, NEVER)), max_size=50),
    st.integers(0, 20).flatmap(lambda held: st.tuples(st.just(held), st.integers(0, held))),
)
def test_no_word_of_a_reader_makes_a_claim_that_cannot_be(
    entries: list[tuple[EntryKind, int]], row: tuple[int, int]
) -> None:
    claim = claim_of(BOARD, Row(*row, 1, 0), said(*entries))
    assert 0 <= claim.opened <= claim.held
    assert bool(claim.since) == bool(claim.held)


def test_the_head_of_a_ring() -> None:
    raw = bytearray(64)
    assert _board.parse_introduction(raw) == Introduction(False, 0, (0,) * 14)
    raw[0:8] = b"\1\0\0\0\x39\x05\0\0"
    raw[8 + 4 * Reason.OPEN] = 9
    assert _board.parse_introduction(raw) == Introduction(True, 1337, (0, 0, 0, 0, 0, 9) + (0,) * 8)
    with pytest.raises(LayoutError):
        _board.parse_introduction(raw[:63])


def test_every_reason_has_a_word_in_the_head_of_a_ring() -> None:
    assert max(Reason) < _layout.MAX_REASONS


# When it is written.


class Owner:
    """Whose board it is, without a board."""

    def __init__(self) -> None:
        self.news = _news.News(self.write, 0, 1, lambda: 1.0)
        self.written = 0

    def write(self) -> None:
        self.news.take()
        self.written += 1


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shmcast-board"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_news, "INTERVAL", 0.01)


@pytest.mark.usefixtures("quick")
def test_news_are_written_once_for_a_burst_and_again_for_the_next() -> None:
    owner = Owner()
    for number in (1, 2, 3):
        owner.news.stir()
        owner.news.stir()
        until(lambda number=number: owner.written == number, "written")  # type: ignore[misc]
        assert owner.news._queue.empty()
    owner.news.close()
    until(lambda: not threads(), "the thread has ended")
    assert owner.written == 3


def test_the_end_does_not_wait_for_the_rest_of_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_news, "INTERVAL", 3600.0)
    owner = Owner()
    for _ in range(1000):
        owner.news.stir()
    until(owner.news._queue.empty, "the burst has begun")
    owner.news.close()
    until(lambda: not threads(), "the thread has ended")
    assert owner.written == 0


@pytest.mark.usefixtures("quick")
def test_who_drops_its_board_keeps_no_thread() -> None:
    owner = Owner()
    owner.news.count(Counters())
    seen = ref(owner)
    until(lambda: (it := seen()) is not None and it.written == 1, "the thread sleeps again")
    del owner
    gc.collect()
    until(lambda: not threads(), "the thread has ended")


class Shown:
    """A writer with two readers, and what its control segment shows."""

    def __init__(self) -> None:
        self.writer = Writer(2, capacity=64 << 20)
        self.readers = [Reader(self.writer.address, index) for index in range(2)]
        self.control = self.writer._arena._control

    @property
    def board(self) -> Board:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                board = parse_board(self.control.map[self.at : self.at + _layout.PAGE], 2)
            except Torn:
                assert time.monotonic() < deadline
                continue
            assert board is not None
            return board

    @property
    def at(self) -> int:
        header = self.control.header
        return _layout.board_offset(header.readers, header.entries, header.slots)

    def fallbacks(self, reader: int) -> dict[str, int]:
        at = _layout.ring_offset(reader, self.control.header.entries)
        head = _board.parse_introduction(self.control.map[at : at + 64])
        assert head.taken
        assert head.pid == os.getpid()
        return {Reason(n).name.lower(): count for n, count in enumerate(head.fallbacks) if count}

    def close(self) -> None:
        for reader in self.readers:
            reader.close()
        self.writer.close()
        del self.control


@pytest.fixture
def shown() -> Iterator[Shown]:
    made = Shown()
    yield made
    made.close()


def test_a_new_writer_has_a_board_at_once(shown: Shown) -> None:
    assert (shown.board.pid, shown.board.closed, shown.board.capacity) == (os.getpid(), False, 64 << 20)
    assert shown.board.total == 64 << 20
    assert 0 < shown.board.made <= shown.board.written <= time.monotonic_ns()
    assert len(shown.board.readers) == 2


def test_the_last_state_of_a_burst_is_shown(shown: Shown) -> None:
    started = time.monotonic_ns()
    handles = [shown.writer.publish({"x": torch.ones(1 << 20, dtype=torch.uint8)}) for _ in range(3)]
    kept = shown.readers[0].open(handles[0])
    until(lambda: [row.held for row in shown.board.readers] == [3, 3], "all three are granted")
    until(lambda: shown.board.messages == 3, "and counted")
    board = shown.board
    assert board.live == 3
    assert board.bytes == 3 << 20
    assert board.granted == 7
    assert all(started <= row.since <= board.written for row in board.readers)
    # The writer idles, and hears of the lease when somebody has it listen.
    del kept
    until(lambda: shown.writer.stats().leases[0].held == 2, "it is released")
    until(lambda: shown.board.readers[0].held == 2, "and the board says so")
    assert shown.board.readers[0].opened == 0


def nobody_watches(arena: Arena) -> bool:
    """Whether the thread that looks after names has ended, for there are none."""
    idle = arena._names._idle
    return not arena.named and idle is not None and not idle.is_alive()


@pytest.mark.usefixtures("quick")
def test_a_lease_that_is_granted_long_after_its_block_was_reserved_is_shown(shown: Shown) -> None:
    """A copy of many bytes takes longer than a board is late."""
    arena = shown.writer._arena
    until(lambda: nobody_watches(arena), "nobody else listens")
    block = arena.reserve(100, 0.0)
    until(lambda: shown.board.live == 1 and not arena.news._stirred, "the block is on the board")
    arena.grant(block, (), [0], 1)
    arena.free(block)
    until(lambda: shown.board.readers[0].held == 1, "and the lease")


def test_an_idle_writer_leaves_its_board_alone(shown: Shown) -> None:
    shown.writer.publish(1)
    until(lambda: nobody_watches(shown.writer._arena), "no name is left")
    until(lambda: not shown.writer._arena.news._stirred, "the last state is written")
    (thread,) = threads()
    assert thread.is_alive()
    assert shown.writer._arena.news._queue.empty(), "it waits for news, without a timeout"


def test_a_closed_writer_says_so_on_a_board_that_readers_still_have(shown: Shown) -> None:
    handle = shown.writer.publish({"x": torch.ones(1 << 20, dtype=torch.uint8)})
    kept = shown.readers[0].open(handle)
    mapping = shown.control.map
    at = shown.at
    shown.writer.close()
    board = parse_board(mapping[at : at + _layout.PAGE], 2)
    assert board is not None
    assert board.closed
    assert board.readers[0].held == 1
    del kept


def test_fallbacks_of_all_that_counts_are_on_the_board(shown: Shown) -> None:
    one, two = Counters(), Counters()
    one.fallback("full")
    shown.writer.count(one)
    shown.writer.count(two)
    for _ in range(3):
        two.fallback("held")
    two.fallback("full")
    two.message("inline", 5)
    until(lambda: shown.board.fallbacks == {"held": 3, "full": 2}, "both are added up")
    until(lambda: (shown.board.messages, shown.board.bytes) in ((0, 0), (1, 5)), "messages, too")


def test_a_readers_fallbacks_are_in_the_head_of_its_own_ring(shown: Shown) -> None:
    counters = Counters()
    counters.fallback("open")
    shown.readers[1].count(counters)
    assert shown.fallbacks(1) == {"open": 1}
    counters.fallback("open")
    counters.fallback("missed")
    counters.fallback("held")  # no reason of a header: it has no word
    assert shown.fallbacks(1) == {"open": 2, "missed": 1}
    assert shown.fallbacks(0) == {}
    shown.readers[1].close()
    until(lambda: _settle(shown) == [0], "it has left")
    counters.fallback("open")
    assert shown.fallbacks(1) == {"open": 2, "missed": 1}


def _settle(shown: Shown) -> list[int]:
    shown.writer.settle()
    return shown.writer._arena.listening()


@pytest.mark.multiprocess
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_writes_nothing(shown: Shown) -> None:
    counters = Counters()
    shown.readers[0].count(counters)
    shown.writer.count(counters)
    pid = os.fork()
    if pid == 0:
        counters.fallback("open")  # the ring is not there: a SIGSEGV if it were written
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert shown.fallbacks(0) == {}
