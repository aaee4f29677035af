"""The bytes of every format, at offsets written down a second time here, and parsers that trust none of them."""

import pickle
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmcast import _layout, _wire
from shmcast._layout import (
    BlockKind,
    Descriptor,
    Entry,
    EntryKind,
    Kind,
    Message,
    Piece,
    SegmentHeader,
    Stale,
    parse_block,
    parse_entry,
    parse_message,
    parse_segment,
    plan_message,
)
from shmcast._wire import Address, Call, Handle, Header, HeaderRoute, Reason
from shmcast.errors import LayoutError

PAGE = _layout.PAGE
TOKEN = bytes(range(16))

# name: (offset, size). Declared here once more, on purpose: a change of the format must show.
SEGMENT = {
    "magic": (0, 8),
    "version": (8, 4),
    "kind": (12, 4),
    "token": (16, 16),
    "rank": (32, 4),
    "number": (36, 4),
    "size": (40, 8),
    "readers": (48, 4),
    "entries": (52, 4),
    "segments": (56, 4),
}
BLOCK = {
    "magic": (0, 8),
    "generation": (8, 8),
    "length": (16, 8),
    "kind": (24, 4),
    "stamp": (28, 4),
    "skeleton": (32, 8),
    "checksum": (60, 4),
}
TABLE = {"blocks": (64, 4), "pieces": (68, 4), "stream": (72, 8)}
HANDLE = {
    "magic": (0, 4),
    "opens": (4, 4),
    "token": (8, 16),
    "rank": (24, 4),
    "segment": (28, 4),
    "offset": (32, 8),
    "length": (40, 8),
    "generation": (48, 8),
    "ticket": (56, 8),
    "readers": (64, 8),
    "checksum": (76, 4),
}
HEADER = {
    "magic": (0, 8),
    "version": (8, 4),
    "route": (12, 1),
    "call": (13, 1),
    "reason": (14, 2),
    "sequence": (16, 8),
    "length": (24, 8),
    "handle": (32, 80),
    "plane": (112, 8),
    "batch": (120, 8),
    "text": (128, 124),
    "checksum": (252, 4),
}

Fields = dict[str, tuple[int, int]]


def put(raw: bytearray, fields: Fields, **values: int | bytes) -> bytearray:
    """Write each named field in place, numbers little endian."""
    for name, value in values.items():
        offset, size = fields[name]
        raw[offset : offset + size] = value if isinstance(value, bytes) else value.to_bytes(size, "little")
    return raw


def seal_block(raw: bytearray) -> bytearray:
    """Give a block the checksum that fits it, as an enemy would."""
    size = min(int.from_bytes(raw[32:40], "little"), len(raw))
    return put(raw, BLOCK, checksum=zlib.crc32(bytes(raw[:24]) + bytes(raw[32:60]) + bytes(raw[64 : 64 + size])))


def seal(raw: bytearray) -> bytearray:
    """Give a handle or a header the checksum that fits it."""
    raw[-4:] = zlib.crc32(bytes(raw[:-4])).to_bytes(4, "little")
    return raw


def arena_header(**changes: Any) -> SegmentHeader:
    return SegmentHeader(**{"kind": Kind.ARENA, "token": TOKEN, "rank": 3, "number": 5, "size": 4 * PAGE, **changes})


def control_header(readers: int = 2, entries: int = 256) -> SegmentHeader:
    size = _layout.control_size(readers, entries)
    return SegmentHeader(Kind.CONTROL, TOKEN, 3, 0, size, readers=readers, entries=entries)


def written(header: SegmentHeader) -> bytearray:
    page = bytearray(64)
    header.write(page)
    return page


MESSAGE = Message(b"stream!", (Descriptor(1, PAGE, 512, 40),), (Piece(0, 192, 16), Piece(1, 64, 448), Piece(0, 256, 1)))
LENGTH = 257


def message_block(message: Message = MESSAGE, generation: int = 41, length: int = LENGTH) -> bytearray:
    block = bytearray(length)
    _layout.write_message(block, generation, length, message)
    return block


def parsed(
    raw: bytes | bytearray, sequence: int = 6, call: Call = Call.MATERIALIZE, plane: int = 9, batch: int = 0
) -> Header:
    """The header in `raw`, as rank in that call would read it."""
    header = _wire.parse_header(raw, plane)
    _wire.check_call(header, sequence, call, batch)
    return header


def example_header(route: HeaderRoute, **fields: Any) -> Header:
    return Header(route, **{"sequence": 6, "call": Call.MATERIALIZE, "plane": 9, **fields})


def example_handle(**changes: Any) -> Handle:
    fields: dict[str, Any] = {
        "token": TOKEN,
        "rank": 2,
        "where": Descriptor(1, 2 * PAGE, 4097, 9),
        "ticket": 77,
        "readers": 0b1011,
        "opens": 2,
    }
    return Handle(**{**fields, **changes})


class Recorder(bytearray):
    """A buffer that keeps the order of the stores into it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.stores: list[tuple[int, int]] = []

    def __setitem__(self, key: Any, value: Any) -> None:
        self.stores.append((key.start, key.stop))
        super().__setitem__(key, value)


# --- golden bytes


def test_arena_segment_header_bytes() -> None:
    expected = put(
        bytearray(64), SEGMENT, magic=b"SHMCAST1", version=1, kind=1, token=TOKEN, rank=3, number=5, size=4 * PAGE
    )
    assert written(arena_header()) == expected
    assert parse_segment(expected) == arena_header()


def test_control_segment_header_bytes() -> None:
    header = control_header(readers=2, entries=256)
    expected = put(
        bytearray(64),
        SEGMENT,
        magic=b"SHMCAST1",
        version=1,
        kind=2,
        token=TOKEN,
        rank=3,
        size=PAGE + 2 * _layout.round_up(64 + 16 * 256, PAGE) + PAGE,
        readers=2,
        entries=256,
    )
    assert written(header) == expected
    assert parse_segment(expected) == header


def test_the_count_of_segments_is_no_part_of_the_identity() -> None:
    page = written(control_header())
    _layout.write_word(page, _layout.SEGMENTS_OFFSET, 7)
    assert page[56:60] == b"\7\0\0\0"
    assert parse_segment(page) == control_header()


def test_ring_entry_bytes() -> None:
    ring = bytearray(64 + 16 * 4)
    _layout.write_entry(ring, 4, 2**32 + 6, EntryKind.RELEASED, 0x1122334455667788)
    expected = bytes.fromhex("8877665544332211 06000000 04000000")
    assert ring == bytes(64 + 16 * 2) + expected + bytes(16)
    assert parse_entry(ring, 4, 2**32 + 6) == Entry(EntryKind.RELEASED, 0x1122334455667788)
    assert parse_entry(bytes(100) + ring, 4, 6, base=100) == Entry(EntryKind.RELEASED, 0x1122334455667788)


def test_message_bytes() -> None:
    skeleton = b"".join(
        (
            bytes.fromhex("01000000 03000000 0700000000000000"),
            *(n.to_bytes(size, "little") for n, size in ((1, 8), (PAGE, 8), (512, 8), (40, 8))),
            *(n.to_bytes(8, "little") for n in (0, 192, 16)),
            *(n.to_bytes(8, "little") for n in (1, 64, 448)),
            *(n.to_bytes(8, "little") for n in (0, 256, 1)),
            b"stream!",
        )
    )
    expected = put(
        bytearray(LENGTH), BLOCK, magic=b"SHMBLOCK", generation=41, length=LENGTH, kind=1, skeleton=len(skeleton)
    )
    expected[64 : 64 + len(skeleton)] = skeleton
    assert message_block() == seal_block(expected)
    assert parse_message(expected, 41) == MESSAGE


def test_payload_block_bytes() -> None:
    block = bytearray(PAGE)
    _layout.write_block(block, 2**64 - 2, PAGE, BlockKind.PAYLOAD)
    expected = put(bytearray(PAGE), BLOCK, magic=b"SHMBLOCK", generation=2**64 - 2, length=PAGE, kind=2)
    assert block == seal_block(expected)
    assert parse_block(block, 2**64 - 2, BlockKind.PAYLOAD) == b""


def test_address_bytes() -> None:
    address = Address(TOKEN, 3, 8)
    assert bytes(address) == TOKEN + bytes.fromhex("03000000 08000000")
    assert Address.parse(bytes(address)) == address
    assert pickle.loads(pickle.dumps(address)) == address


def test_names_of_one_writer() -> None:
    address = Address(TOKEN, 3, 8)
    stem = "/shmcast-000102030405060708090a0b0c0d0e0f-3"
    names = address.control, address.segment(12), address.posted(7), address.wake(7)
    assert names == (f"{stem}-c", f"{stem}-12", f"{stem}-p7", f"{stem}-w7")


def test_handle_bytes() -> None:
    expected = put(
        bytearray(80),
        HANDLE,
        magic=b"SHMh",
        opens=2,
        token=TOKEN,
        rank=2,
        segment=1,
        offset=2 * PAGE,
        length=4097,
        generation=9,
        ticket=77,
        readers=0b1011,
    )
    assert bytes(example_handle()) == seal(expected)
    assert Handle.parse(expected) == example_handle()


def test_header_bytes() -> None:
    handle = example_handle()
    text = "voll: \N{LATIN SMALL LETTER A WITH DIAERESIS}"
    header = Header(HeaderRoute.SHM, 6, Call.BATCH, 2**64 - 3, Reason.FULL, 12, handle, text, 7)
    expected = put(
        bytearray(256),
        HEADER,
        magic=b"SHMHEAD1",
        version=1,
        route=1,
        call=3,
        plane=2**64 - 3,
        reason=4,
        sequence=6,
        length=12,
        handle=bytes(handle),
        batch=7,
        text=b"voll: \xc3\xa4".ljust(124, b"\0"),
    )
    assert bytes(header) == seal(expected)
    assert parsed(expected, 6, Call.BATCH, 2**64 - 3, 7) == header


def test_struct_sizes() -> None:
    sizes = {
        name: getattr(module, name).size
        for module in (_layout, _wire)
        for name in (
            "SEGMENT",
            "RING_HEAD",
            "ENTRY",
            "BLOCK",
            "TABLE",
            "LISTED",
            "PIECE",
            "ADDRESS",
            "HANDLE",
            "HEADER",
        )
        if hasattr(module, name)
    }
    expected = [64, 64, 16, 64, 16, 32, 24, 24, 80, 256]
    assert list(sizes.values()) == expected


# --- stores that other processes see


def test_L1_the_magic_is_stored_last() -> None:
    page = Recorder(64)
    arena_header().write(page)
    assert page.stores[-1] == (0, 8)
    assert all(start >= 8 for start, _ in page.stores[:-1])


def test_an_entry_is_stored_at_once() -> None:
    ring = Recorder(64 + 16 * 4)
    _layout.write_entry(ring, 4, 5, EntryKind.OPENED, 1)
    assert ring.stores == [(80, 96)]


def test_the_block_header_is_stored_after_its_skeleton() -> None:
    block = Recorder(LENGTH)
    _layout.write_message(block, 41, LENGTH, MESSAGE)
    assert [start for start, _ in block.stores] == [64, 0]


def test_L4_the_mark_is_one_aligned_word() -> None:
    block = Recorder(LENGTH)
    _layout.write_message(block, 41, LENGTH, MESSAGE)
    before, block.stores = bytes(block), []
    _layout.mark_withdrawn(block)
    assert block.stores == [(24, 28)]
    assert bytes(block) == before[:24] + b"\3\0\0\0" + before[28:]


# --- segments


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"magic": b"SHMCAST2"}, "not a shmcast segment"),
        ({"magic": bytes(8)}, "not a shmcast segment"),
        ({"version": 2}, "segment format 2"),
        ({"version": 0}, "segment format 0"),
        ({"kind": 0}, "unknown kind of segment: 0"),
        ({"kind": 3}, "unknown kind of segment: 3"),
        ({"size": 4 * PAGE + 1}, "claims"),
        ({"size": PAGE}, "claims"),
        ({"size": 0}, "claims"),
        ({"number": 1024}, "segment 1024 claims"),
        ({"readers": 1}, "no rings"),
        ({"entries": 1}, "no rings"),
    ],
)
def test_refuses_an_arena_header(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        parse_segment(put(written(arena_header()), SEGMENT, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"readers": 0},
        {"readers": 65},
        {"readers": 3},
        {"entries": 0},
        {"entries": 1},
        {"entries": 255},
        {"entries": 512},
        {"entries": 2**32 - 1},
        {"size": 64 * PAGE},
    ],
)
def test_refuses_a_control_header(changes: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match="control segment of"):
        parse_segment(put(written(control_header()), SEGMENT, **changes))


@pytest.mark.parametrize("size", [0, 1, 63])
def test_refuses_a_short_segment(size: int) -> None:
    with pytest.raises(LayoutError, match=f"{size} bytes cannot hold"):
        parse_segment(bytes(written(arena_header()))[:size])


def test_the_limits_of_a_segment_pass() -> None:
    for header in (
        arena_header(size=2 * PAGE),
        arena_header(number=1023),
        control_header(64, 2),
        control_header(1, 8192),
    ):
        assert parse_segment(written(header)) == header


@given(st.integers(1, 64), st.integers(1, 13))
def test_rings_are_whole_pages_and_tile_the_control_segment(readers: int, exponent: int) -> None:
    entries = 2**exponent
    offsets = [_layout.ring_offset(reader, entries) for reader in range(readers)]
    size = _layout.ring_size(entries)
    assert size % PAGE == 0
    assert size >= 64 + 16 * entries
    assert offsets == [PAGE + i * size for i in range(readers)]
    assert offsets[-1] + size == _layout.board_offset(readers, entries)
    assert _layout.board_offset(readers, entries) + PAGE == _layout.control_size(readers, entries)


def test_L7_living_tickets_cannot_overrun_the_ring() -> None:
    tickets, segments, ring = _layout.MAX_TICKETS, _layout.MAX_SEGMENTS, _layout.RING_ENTRIES
    assert tickets <= ring // 4
    # Each ticket: opened, released; each message (one ticket at least): discarded; each segment: mapped; then left.
    assert 3 * tickets + segments + 1 < ring


# --- entries


@pytest.mark.parametrize("seq", [4, 5, 3, 2**16, 2**32 - 4, 2**32 + 4])
def test_refuses_an_entry_of_another_number(seq: int) -> None:
    ring = bytearray(64 + 16 * 4)
    for written_before in (0, 1, 2):
        _layout.write_entry(ring, 4, written_before, EntryKind.OPENED, 1)
    with pytest.raises(LayoutError, match=f"entry {seq} carries number"):
        parse_entry(ring, 4, seq)


@pytest.mark.parametrize("kind", [0, 6, 2**32 - 1])
def test_refuses_an_entry_of_unknown_kind(kind: int) -> None:
    ring = bytearray(64 + 16 * 4)
    ring[64 + 12 : 64 + 16] = kind.to_bytes(4, "little")
    with pytest.raises(LayoutError, match=f"unknown kind {kind}"):
        parse_entry(ring, 4, 0)


def test_a_new_ring_holds_no_entry() -> None:
    ring = bytes(64 + 16 * 4)
    for seq in range(4):
        with pytest.raises(LayoutError):
            parse_entry(ring, 4, seq)


# --- blocks


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": 2}, "of kind 2, not 1"),
        ({"kind": 0}, "of kind 0, not 1"),
        ({"length": LENGTH - 1}, "claims 256"),
        ({"length": LENGTH + 1}, "claims 258"),
        ({"length": 2**64 - 1}, "claims"),
        ({"skeleton": LENGTH - 63}, "skeleton"),
        ({"skeleton": 2**64 - 1}, "skeleton"),
    ],
)
def test_refuses_a_block(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LayoutError, match=says) as caught:
        parse_message(seal_block(put(message_block(), BLOCK, **changes)), 41)
    assert not isinstance(caught.value, Stale)


@pytest.mark.parametrize("size", [0, 63])
def test_refuses_a_short_block(size: int) -> None:
    with pytest.raises(LayoutError, match=f"{size} bytes cannot hold a block header"):
        parse_block(message_block()[:size], 41, BlockKind.MESSAGE)


def test_every_torn_byte_of_header_and_skeleton_is_noticed() -> None:
    whole = message_block()
    covered = 64 + int.from_bytes(whole[32:40], "little")
    for at in range(covered):
        torn = bytearray(whole)
        torn[at] ^= 0x10
        if at in range(28, 32):  # the stamp, which changes while the block is in use
            assert parse_message(torn, 41) == MESSAGE
            continue
        with pytest.raises(LayoutError):
            parse_message(torn, 41)
    for at in range(covered, LENGTH):
        torn = bytearray(whole)
        torn[at] ^= 0x10
        assert parse_message(torn, 41) == MESSAGE


def test_a_message_overwritten_halfway_is_noticed() -> None:
    old, new = message_block(), message_block(MESSAGE._replace(stream=b"other!!"), generation=42)
    covered = 64 + int.from_bytes(old[32:40], "little")
    for cut in range(9, covered, 5):
        with pytest.raises(LayoutError):
            parse_message(new[:cut] + old[cut:], 42)


def test_L3_another_generation_is_stale() -> None:
    for generation in (40, 42, 0, 2**64 - 1):
        with pytest.raises(Stale, match="at generation 41"):
            parse_message(message_block(), generation)


def test_L4_a_withdrawn_block_is_stale_until_its_next_use() -> None:
    block = bytearray(100) + message_block() + bytearray(100)
    _layout.mark_withdrawn(block, base=100)
    use = memoryview(block)[100:-100]
    for kind in (BlockKind.MESSAGE, BlockKind.PAYLOAD):
        with pytest.raises(Stale, match="withdrawn"):
            parse_block(use, 41, kind)
    with pytest.raises(Stale, match="at generation"):
        parse_block(use, 40, BlockKind.MESSAGE)
    _layout.write_message(block, 42, LENGTH, MESSAGE, base=100)
    assert parse_message(use, 42) == MESSAGE
    assert block[:100] + block[-100:] == bytes(200)


@pytest.mark.parametrize("kind", [BlockKind.MESSAGE, BlockKind.PAYLOAD])
def test_L4_a_mark_that_comes_after_the_look_changes_nothing(kind: BlockKind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer marks, in another process, while a reader that has said OPENED parses: it may see that or not."""
    block = message_block()
    if kind == BlockKind.PAYLOAD:
        _layout.write_block(block, 41, LENGTH, kind)
    skeleton = parse_block(block, 41, kind)
    look = _layout.check_block

    def look_and_be_overtaken(head: Any, generation: int, length: int) -> None:
        look(head, generation, length)
        _layout.mark_withdrawn(block)

    monkeypatch.setattr(_layout, "check_block", look_and_be_overtaken)
    assert parse_block(block, 41, kind) == skeleton
    with pytest.raises(Stale, match="withdrawn"):
        parse_block(block, 41, kind)


def test_a_block_header_alone_tells_which_use_it_is() -> None:
    block = message_block(generation=2**63 + 5)
    head = bytes(block[:64])
    _layout.check_block(head, 2**63 + 5, len(block))
    with pytest.raises(Stale, match="at generation"):
        _layout.check_block(head, 5, len(block))
    with pytest.raises(LayoutError, match="claims"):
        _layout.check_block(head, 2**63 + 5, len(block) + 1)
    with pytest.raises(LayoutError, match="cannot hold"):
        _layout.check_block(head[:63], 2**63 + 5, len(block))
    with pytest.raises(LayoutError, match=f"{LENGTH - 63} of them skeleton"):
        _layout.check_block(put(bytearray(head), BLOCK, skeleton=LENGTH - 63), 2**63 + 5, len(block))
    _layout.mark_withdrawn(block)
    with pytest.raises(Stale, match="withdrawn"):
        _layout.check_block(bytes(block[:64]), 2**63 + 5, len(block))


def test_a_checksum_that_does_not_fit_is_not_merely_stale() -> None:
    for at in (60, 63, 64, 190):
        torn = message_block()
        torn[at] ^= 1
        with pytest.raises(LayoutError, match="the checksum of the block does not fit") as caught:
            parse_message(torn, 41)
        assert not isinstance(caught.value, Stale)


def test_a_place_where_no_block_starts_any_more_is_stale() -> None:
    for magic in (b"SHMBLOCk", b"tHMBLOCK", bytes(8)):
        with pytest.raises(Stale, match="no block starts here"):
            parse_message(put(message_block(), BLOCK, magic=magic), 41)


def test_a_stamp_counts_and_changes_nothing_else() -> None:
    block = Recorder(100 + PAGE)
    _layout.write_block(block, 7, PAGE, BlockKind.PAYLOAD, base=100)
    before, block.stores = bytes(block), []
    for count in (1, 2, 3):
        _layout.stamp_payload(block, base=100)
        assert bytes(block) == before[:128] + count.to_bytes(4, "little") + before[132:]
        assert parse_block(memoryview(block)[100:], 7, BlockKind.PAYLOAD) == b""
    assert block.stores == [(128, 132)] * 3


def test_a_stamp_wraps() -> None:
    block = put(bytearray(64), BLOCK, stamp=2**32 - 1)
    _layout.stamp_payload(block)
    assert block == bytes(64)


def test_a_new_use_of_a_block_begins_without_stamp_and_mark() -> None:
    block = bytearray(PAGE)
    _layout.write_block(block, 7, PAGE, BlockKind.PAYLOAD)
    _layout.stamp_payload(block)
    _layout.mark_withdrawn(block)
    _layout.write_block(block, 8, PAGE, BlockKind.PAYLOAD)
    fresh = bytearray(PAGE)
    _layout.write_block(fresh, 8, PAGE, BlockKind.PAYLOAD)
    assert block == fresh


def test_a_payload_block_is_no_message_and_the_reverse() -> None:
    payload = bytearray(PAGE)
    _layout.write_block(payload, 1, PAGE, BlockKind.PAYLOAD)
    with pytest.raises(LayoutError, match="of kind 2"):
        parse_message(payload, 1)
    with pytest.raises(LayoutError, match="of kind 1"):
        parse_block(message_block(), 41, BlockKind.PAYLOAD)


# --- skeletons


@pytest.mark.parametrize(
    "table",
    [{"blocks": 2}, {"blocks": 0}, {"pieces": 2}, {"pieces": 2**32 - 1}, {"stream": 8}, {"stream": 2**64 - 1}],
)
def test_refuses_a_table_that_does_not_add_up(table: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match="a skeleton of 127 bytes claims"):
        parse_message(seal_block(put(message_block(), TABLE, **table)), 41)


def test_refuses_a_skeleton_without_a_table() -> None:
    block = bytearray(80)
    _layout.write_block(block, 1, 80, BlockKind.MESSAGE, skeleton=bytes(15))
    with pytest.raises(LayoutError, match="15 bytes cannot hold a skeleton's table"):
        parse_message(block, 1)


@pytest.mark.parametrize(
    "listed",
    [
        Descriptor(1024, PAGE, 512, 1),
        Descriptor(0, PAGE + 64, 512, 1),
        Descriptor(0, 0, 512, 1),
        Descriptor(0, PAGE, 63, 1),
    ],
)
def test_refuses_what_cannot_be_a_block(listed: Descriptor) -> None:
    with pytest.raises(LayoutError, match="is no block"):
        _layout.check_descriptor(listed)
    with pytest.raises(LayoutError, match="is no block"):
        parse_message(message_block(Message(b"", (listed,), ())), 41)
    with pytest.raises(LayoutError, match="is no block"):
        example_handle(where=listed)
    fields = dict(zip(("segment", "offset", "length"), listed[:3], strict=True))
    with pytest.raises(LayoutError, match="is no block"):
        Handle.parse(seal(put(bytearray(bytes(example_handle())), HANDLE, **fields)))


@pytest.mark.parametrize(
    "piece",
    [
        Piece(2, 192, 1),
        Piece(2**32 - 1, 192, 1),
        Piece(0, 128, 1),
        Piece(0, 0, 1),
        Piece(0, 193, 1),
        Piece(0, 192, 66),
        Piece(0, 256, 2),
        Piece(0, 320, 0),
        Piece(0, 192, 2**64 - 1),
        Piece(0, 2**64 - 64, 64),
        Piece(1, 0, 1),
        Piece(1, 64, 449),
        Piece(1, 65, 1),
        Piece(1, 576, 0),
    ],
)
def test_refuses_a_piece_outside_its_block(piece: Piece) -> None:
    message = Message(b"seven b", MESSAGE.blocks, (piece, Piece(1, 64, 448), Piece(0, 256, 1)))
    with pytest.raises(LayoutError, match="Piece"):
        parse_message(message_block(message), 41)


@pytest.mark.parametrize("piece", [Piece(0, 192, 0), Piece(1, 64, 0), Piece(1, 512, 0)])
def test_refuses_a_piece_without_bytes(piece: Piece) -> None:
    with pytest.raises(LayoutError, match="names no payload"):
        parse_message(message_block(Message(b"seven b", MESSAGE.blocks, (piece,))), 41)


def test_refuses_pieces_that_claim_the_same_bytes_again_and_again() -> None:
    """A reader copies small pieces: a skeleton of a few KiB would make it copy hundreds of MiB."""
    pieces = (Piece(1, 64, 448),) * 100
    with pytest.raises(LayoutError, match="larger than the blocks"):
        parse_message(message_block(Message(b"", MESSAGE.blocks, pieces), length=8192), 41)


@pytest.mark.parametrize(
    "other", [Descriptor(3, PAGE, 64, 1), Descriptor(3, 2 * PAGE, 64, 2), Descriptor(3, PAGE, 64, 9)]
)
def test_L2_refuses_blocks_that_share_a_page(other: Descriptor) -> None:
    listed = Descriptor(3, PAGE, PAGE + 1, 1)
    for blocks in ((listed, other), (other, Descriptor(4, PAGE, 64, 1), listed)):
        with pytest.raises(LayoutError, match="overlap"):
            parse_message(message_block(Message(b"", blocks, ())), 41)
    apart = (listed, Descriptor(3, 3 * PAGE, 64, 2), Descriptor(4, PAGE, 64, 1))
    assert parse_message(message_block(Message(b"", apart, ())), 41).blocks == apart


def test_refuses_a_payload_block_with_a_skeleton() -> None:
    """Whoever lists it often would have its checksum computed as often."""
    block = bytearray(LENGTH)
    block[64:70] = b"sixsix"
    _layout.write_block(block, 41, LENGTH, BlockKind.PAYLOAD, b"sixsix")
    with pytest.raises(LayoutError, match="payload block with 6 bytes of skeleton"):
        _layout.parse_block(block, 41, BlockKind.PAYLOAD)


def test_the_stream_is_a_private_copy() -> None:
    block = message_block()
    message = parse_message(memoryview(block), 41)
    block[:] = bytes(len(block))
    assert message == MESSAGE
    assert type(message.stream) is bytes


descriptors = st.builds(
    Descriptor,
    st.integers(0, 1023),
    st.integers(1, 2**40).map(lambda page: page * PAGE),
    st.integers(64, 2**40),
    st.integers(0, 2**64 - 1),
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[int, Message]:
    """The length of a block, and a message that lies well in it."""
    stream = draw(st.binary(max_size=80))
    roomy = descriptors.filter(lambda block: block.length > 128)
    blocks = tuple(draw(st.lists(roomy, max_size=4, unique_by=lambda block: block.segment)))
    wanted: list[Piece | int] = []
    for block in draw(st.permutations([*range(1, len(blocks) + 1), *[0] * draw(st.integers(0, 4))])):
        if not block:
            wanted.append(draw(st.integers(1, 300)))
            continue
        line = draw(st.integers(1, (blocks[block - 1].length - 1) // 64))
        wanted.append(Piece(block, 64 * line, draw(st.integers(1, blocks[block - 1].length - 64 * line))))
    plan = plan_message(len(stream), len(blocks), wanted)
    return plan.length, Message(stream, blocks, plan.pieces)


@given(messages(), st.integers(0, 2**64 - 1), st.integers(0, 200))
def test_messages_round_trip(case: tuple[int, Message], generation: int, base: int) -> None:
    length, message = case
    block = bytearray(b"\xee" * (base + length + 64))
    _layout.write_message(block, generation, length, message, base)
    assert parse_message(memoryview(block)[base : base + length], generation) == message
    skeleton = 64 + _layout.skeleton_size(len(message.stream), len(message.blocks), len(message.pieces))
    assert block[:base] + block[base + skeleton :] == b"\xee" * (len(block) - skeleton)


@given(st.integers(0, 5000), st.integers(0, 9), st.lists(st.one_of(st.integers(0, 9000), st.just(Piece(1, 64, 7)))))
def test_a_plan_is_tight_aligned_and_keeps_the_order(stream: int, blocks: int, wanted: list[Piece | int]) -> None:
    plan = plan_message(stream, blocks, wanted)
    assert len(plan.pieces) == len(wanted)
    at = 64 + 16 + 32 * blocks + 24 * len(wanted) + stream
    for piece, want in zip(plan.pieces, wanted, strict=True):
        if isinstance(want, Piece):
            assert piece is want
            continue
        assert (piece.block, piece.length) == (0, want)
        assert piece.offset % 64 == 0
        assert 0 <= piece.offset - at < 64
        at = piece.offset + want
    assert plan.length == at


# --- addresses, handles, headers


@pytest.mark.parametrize("raw", [b"", bytes(23), bytes(25)])
def test_refuses_an_address_of_another_size(raw: bytes) -> None:
    with pytest.raises(LayoutError, match=f"an address has 24 bytes, not {len(raw)}"):
        Address.parse(raw)


@pytest.mark.parametrize("readers", [0, 65, 2**32 - 1])
def test_refuses_an_address_with_impossible_readers(readers: int) -> None:
    with pytest.raises(LayoutError, match=f"an address with {readers} readers"):
        Address.parse(TOKEN + bytes(4) + readers.to_bytes(4, "little"))


@pytest.mark.parametrize("size", [0, 79, 81])
def test_refuses_a_handle_of_another_size(size: int) -> None:
    with pytest.raises(LayoutError, match=f"a handle has 80 bytes, not {size}"):
        Handle.parse(bytes(example_handle()).ljust(size, b"\0")[:size])


def test_refuses_a_handle_with_any_byte_changed() -> None:
    whole = bytes(example_handle())
    for at in range(80):
        with pytest.raises(LayoutError, match="no handle, or a damaged one"):
            Handle.parse(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"opens": 0}, "may open 0 times"),
        ({"ticket": 2**64 - 1}, f"with ticket {2**64 - 1}"),
        ({"ticket": 2**64 - 1 - 65 * 2 + 1}, "with ticket"),
        ({"opens": _layout.MAX_TICKETS + 1}, "may open"),
    ],
)
def test_refuses_a_handle_with_impossible_tickets(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        example_handle(**changes)
    with pytest.raises(LayoutError, match=says):
        Handle.parse(seal(put(bytearray(bytes(example_handle())), HANDLE, **changes)))


def test_the_last_ticket_has_64_bits() -> None:
    handle = example_handle(ticket=2**64 - 1 - 65 * 2)
    assert Handle.parse(bytes(handle)).ticket_of(64, 2) == 2**64 - 1 - 65 * 2 + 64 * 2 + 2


@pytest.mark.parametrize("changes", [{"opens": -1}, {"readers": -1}, {"readers": 2**64}, {"ticket": -1}])
def test_refuses_to_make_a_handle_that_has_no_bytes(changes: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match="a handle"):
        example_handle(**changes)


def test_refuses_a_foreign_magic_with_a_fitting_checksum() -> None:
    with pytest.raises(LayoutError, match="no handle"):
        Handle.parse(seal(put(bytearray(bytes(example_handle())), HANDLE, magic=b"SHMH")))


handles = st.builds(
    Handle,
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
    descriptors,
    st.integers(0, 2**63),
    st.integers(0, 2**64 - 1),
    st.integers(1, _layout.MAX_TICKETS),
)


@given(handles)
def test_handles_round_trip_and_pickle_small(handle: Handle) -> None:
    assert Handle.parse(bytes(handle)) == handle
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(handle, protocol)
        assert pickle.loads(pickled) == handle
        assert protocol < 3 or len(pickled) <= 256


@given(st.integers(1, 64), st.integers(1, 9), st.integers(1, 2**40))
def test_no_two_leases_of_a_handle_share_a_ticket(readers: int, opens: int, ticket: int) -> None:
    handle = example_handle(ticket=ticket, opens=opens)
    tickets = [handle.ticket_of(reader, opened) for reader in range(readers) for opened in range(opens)]
    assert tickets == list(range(ticket, ticket + readers * opens))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"magic": b"SHMHEAD2"}, "another collective ran"),
        ({"version": 2}, "another collective ran"),
        ({"plane": 8}, "another Broadcaster"),
        ({"sequence": 7}, "in call 7, of kind 2, this rank in call 6, of kind 2"),
        ({"call": 1}, "in call 6, of kind 1, this rank in call 6, of kind 2"),
        ({"call": 0}, "unknown route 1 or call 0"),
        ({"route": 0}, "unknown route 0"),
        ({"route": 7}, "unknown route 7"),
        ({"reason": 12}, "unknown reason 12"),
        ({"length": 2**63}, f"length {2**63}"),
        ({"handle": bytes(80)}, "no handle"),
    ],
)
def test_refuses_a_header(changes: dict[str, Any], says: str) -> None:
    raw = bytearray(bytes(example_header(HeaderRoute.SHM, handle=example_handle())))
    with pytest.raises(LayoutError, match=says):
        parsed(seal(put(raw, HEADER, **changes)))


def test_refuses_a_header_with_any_byte_changed() -> None:
    whole = bytes(example_header(HeaderRoute.INLINE, length=9, text="x"))
    for at in range(256):
        with pytest.raises(LayoutError):
            parsed(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])


@pytest.mark.parametrize("size", [0, 255, 257])
def test_refuses_a_header_of_another_size(size: int) -> None:
    with pytest.raises(LayoutError, match=f"a header has 256 bytes, not {size}"):
        parsed(bytes(size))


def test_only_the_shm_route_carries_a_handle() -> None:
    for route in (HeaderRoute.INLINE, HeaderRoute.LOCAL, HeaderRoute.NONE):
        raw = seal(put(bytearray(bytes(example_header(route))), HEADER, handle=b"\xff" * 80))
        assert parsed(raw).handle is None


@given(st.text(max_size=200))
def test_a_long_text_is_cut_and_never_breaks_the_header(text: str) -> None:
    got = parsed(bytes(example_header(HeaderRoute.NONE, text=text))).text
    sent = text.encode("utf-8", "replace")
    if len(sent) <= 124:
        assert got == sent.decode().rstrip("\0")
    else:
        # The cut may fall inside a character: that one, and no other, is replaced.
        assert sent.decode().startswith(got.rstrip("\0").rstrip("\N{REPLACEMENT CHARACTER}"))


@given(
    st.builds(
        Header,
        st.sampled_from([HeaderRoute.INLINE, HeaderRoute.LOCAL, HeaderRoute.NONE]),
        st.integers(0, 2**64 - 1),
        st.sampled_from(Call),
        st.integers(0, 2**64 - 1),
        st.sampled_from(Reason),
        st.integers(0, 2**63 - 1),
        st.none(),
        st.text("ab\N{EURO SIGN}", max_size=41),
        st.integers(0, 2**64 - 1),
    )
)
def test_headers_round_trip(header: Header) -> None:
    assert parsed(bytes(header), header.sequence, header.call, header.plane, header.batch) == header


# --- any bytes at all (L8)

PARSERS: dict[str, Callable[[bytes], object]] = {
    "segment": parse_segment,
    "block": lambda raw: parse_block(raw, 41, BlockKind.MESSAGE),
    "message": lambda raw: parse_message(raw, 41),
    "entry": lambda raw: parse_entry(raw.ljust(128, b"\0"), 4, 1),
    "address": Address.parse,
    "handle": Handle.parse,
    "header": parsed,
}


def ring_with_entries() -> bytearray:
    ring = bytearray(128)
    for seq in range(4):
        _layout.write_entry(ring, 4, seq, EntryKind.OPENED, seq)
    return ring


VALID: dict[str, bytes] = {
    "segment": bytes(written(control_header())),
    "block": bytes(message_block()),
    "message": bytes(message_block()),
    "entry": bytes(ring_with_entries()),
    "address": bytes(Address(TOKEN, 3, 8)),
    "handle": bytes(example_handle()),
    "header": bytes(example_header(HeaderRoute.SHM, handle=example_handle(), text="t")),
}
SEALS: dict[str, Callable[[bytearray], bytearray]] = {"block": seal_block, "message": seal_block}
SEALS |= {"handle": seal, "header": seal}


def check_parsed(name: str, raw: bytes) -> None:
    """A value that needs no further check, or `LayoutError`; nothing else."""
    try:
        value = PARSERS[name](raw)
    except LayoutError:
        return
    if isinstance(value, SegmentHeader):
        again = bytearray(64)
        value.write(again)
        assert parse_segment(again) == value
        assert value.size % PAGE == 0
    elif isinstance(value, Message):
        check_message(value, raw)
    elif isinstance(value, Address | Handle):
        assert type(value).parse(bytes(value)) == value
    elif isinstance(value, Header):
        assert (value.handle is not None) == (value.route is HeaderRoute.SHM)


def check_message(message: Message, raw: bytes) -> None:
    skeleton = 80 + 32 * len(message.blocks) + 24 * len(message.pieces) + len(message.stream)
    assert skeleton <= len(raw)
    for listed in message.blocks:
        assert listed.offset % PAGE == 0
        assert listed.offset >= PAGE
    for block, offset, length in message.pieces:
        end = message.blocks[block - 1].length if block else len(raw)
        assert offset >= (64 if block else skeleton)
        assert offset % 64 == 0
        assert offset + length <= end


@pytest.mark.parametrize("name", PARSERS)
@given(raw=st.binary(max_size=300))
def test_any_bytes_give_a_value_or_layout_error(name: str, raw: bytes) -> None:
    check_parsed(name, raw)


edits = st.lists(
    st.tuples(st.integers(0, 400), st.one_of(st.binary(min_size=1, max_size=1), st.binary(min_size=1, max_size=8))),
    max_size=4,
)


def edited(raw: bytes, changes: Sequence[tuple[int, bytes]], size: int) -> bytearray:
    out = bytearray(raw)
    for at, patch in changes:
        at %= len(raw)
        out[at : at + len(patch)] = patch[: len(raw) - at]
    return out[: max(0, len(out) + size)] + bytes(max(0, size))


@pytest.mark.parametrize("name", PARSERS)
@given(changes=edits, size=st.sampled_from([0, 0, 0, 0, -1, 1, -64, 64]), resealed=st.booleans())
def test_valid_bytes_with_changes_give_a_value_or_layout_error(
    name: str, changes: list[tuple[int, bytes]], size: int, resealed: bool
) -> None:
    raw = edited(VALID[name], changes, size)
    if resealed and name in SEALS and len(raw) >= 64:
        raw = SEALS[name](raw)
    check_parsed(name, bytes(raw))


def test_the_valid_examples_are_valid() -> None:
    for name, parse in PARSERS.items():
        parse(VALID[name])
