"""What goes through channels: addresses, handles, headers, and what ranks offer each other at the start."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

from fuzz._answers import ask, require
from fuzz._target import SEAL, Target, fields_of
from shmcast._joining import Offer
from shmcast._layout import MAX_READERS, PAGE, Descriptor
from shmcast._wire import HANDLE, HEADER, Address, Call, Handle, Header, HeaderRoute, Reason, parse_header
from shmcast.errors import LayoutError
from shmcast.integrations.sglang._tickets import CARRIED, RawTicket, carried, carrier_of

if TYPE_CHECKING:
    from random import Random

TOKEN = bytes(range(16))
PLANE = 7


def sealed(raw: bytes, size: int) -> bytes:
    """These bytes with the checksum that `size` bytes of them end with."""
    if len(raw) < size:
        return raw
    return raw[: size - 4] + struct.pack("<I", zlib.crc32(raw[: size - 4])) + raw[size:]


def handles() -> list[Handle]:
    """Handles of small and of extreme numbers."""
    return [
        Handle(TOKEN, 0, Descriptor(0, PAGE, 64, 1), 1, 1, 1),
        Handle(TOKEN, 2**32 - 1, Descriptor(1023, 2**40 * PAGE, 2**63, 2**64 - 1), 2**40, 2**64 - 1, 3),
    ]


def address_seeds() -> list[bytes]:
    """Flags and an address."""
    return [b"\0" + bytes(Address(TOKEN, rank, readers)) for rank, readers in ((0, 1), (2**32 - 1, 64))]


def check_address(data: bytes) -> str:
    """`Address.parse`: the address of just these bytes."""
    raw = data[1:]
    answer = ask(lambda: Address.parse(memoryview(raw)), (LayoutError,))
    if answer.refused:
        return answer.refused
    found = answer.value
    require(isinstance(found, Address) and bytes(found) == raw, "an address of other bytes")
    require(isinstance(found, Address) and 0 < found.readers <= MAX_READERS, "an address with impossible readers")
    return "parsed"


def handle_seeds() -> list[bytes]:
    """Flags and a handle."""
    return [bytes([SEAL]) + bytes(handle) for handle in handles()]


def check_handle(data: bytes) -> str:
    """`Handle.parse`: the handle of just these bytes, with no ticket beyond 64 bits."""
    raw = sealed(data[1:], HANDLE.size) if (data or b"\0")[0] & SEAL else data[1:]
    answer = ask(lambda: Handle.parse(memoryview(raw)), (LayoutError,))
    if answer.refused:
        return answer.refused
    require_handle(answer.value, raw)
    return "parsed"


def require_handle(found: object, raw: bytes) -> None:
    """Raise `Violation` unless `found` is the handle of these bytes."""
    require(isinstance(found, Handle), f"a {type(found).__name__} for a handle")
    if isinstance(found, Handle):
        # The reserved bytes count for the checksum and for nothing else.
        require(bytes(found)[:72] == raw[:72], "a handle of other bytes")
        require(found.ticket_of(MAX_READERS - 1, found.opens - 1) < 2**64, "a ticket of more than 64 bits")
        require(found.where.offset % PAGE == 0 and found.where.offset >= PAGE, f"{found.where}")


def carrier_seeds() -> list[bytes]:
    """Flags and the feature of a carrier."""
    return [bytes([SEAL]) + carrier_of(handle, known=known) for handle in handles() for known in (False, True)]


def check_carrier(data: bytes) -> str:
    """`carried`: a ticket with the handle and the flag of just these bytes, or none where they are not marked."""
    raw, size = data[1:], len(CARRIED) + 1
    if (data or b"\0")[0] & SEAL:
        raw = raw[:size] + sealed(raw[size:], HANDLE.size)
    answer = ask(lambda: carried(raw), (LayoutError,))
    if answer.refused:
        return answer.refused
    found = answer.value
    require((found is None) == (not raw.startswith(CARRIED)), "a mark that was not seen, or seen where there is none")
    if found is None:
        return "unmarked"
    require(isinstance(found, RawTicket), f"a {type(found).__name__} for a ticket")
    if isinstance(found, RawTicket):
        require(found.handle[:72] == raw[size : size + 72], "the handle of other bytes")
        require(found.hashed == (raw[size - 1 : size] == b"1"), "another flag")
    return "parsed"


def header_seeds() -> list[bytes]:
    """Flags and a header, of each route."""
    found = [Header(route, 5, Call.BATCH, PLANE, Reason.FULL, 9, None, "why", 77) for route in HeaderRoute]
    found = [header._replace(handle=handles()[0]) if header.route in (1, 5) else header for header in found]
    found += [Header(HeaderRoute.NONE, 2**64 - 1, plane=PLANE, text="é" * 99, length=2**63 - 1, batch=2**64 - 1)]
    return [bytes([SEAL]) + bytes(header) for header in found]


def check_header(data: bytes) -> str:
    """`parse_header`: a header of this plane, its fields as in the bytes."""
    raw = sealed(data[1:], HEADER.size) if (data or b"\0")[0] & SEAL else data[1:]
    answer = ask(lambda: parse_header(memoryview(raw).tobytes(), PLANE), (LayoutError,))
    if answer.refused:
        return answer.refused
    found = answer.value
    require(isinstance(found, Header), f"a {type(found).__name__} for a header")
    if isinstance(found, Header):
        route, call, reason, sequence, length = struct.unpack_from("<BBHQQ", raw, 12)
        plane, batch = struct.unpack_from("<QQ", raw, 112)
        require((found.route, found.call, found.reason) == (route, call, reason), "another route, call or reason")
        require((found.sequence, found.length, found.batch) == (sequence, length, batch), "other numbers")
        require(found.plane == plane == PLANE, "a header of another plane")
        require((found.handle is not None) == (route in (1, 5)), "a handle where there is none, or the reverse")
        if found.handle is not None:
            require_handle(found.handle, raw[32:112])
        require(len(found.text) <= 124 and not found.text.endswith("\0"), "text from elsewhere")
    return "parsed"


def offer_seeds() -> list[bytes]:
    """Flags and an offer."""
    offers = [
        Offer("d" * 64, '{"version": 1}', 1, 2**64 - 1, True, False, False, bytes(Address(TOKEN, 1, 3)).hex()),
        Offer(wrong="ValueError: é", trouble="no room", disabled=True),
    ]
    return [b"\0" + bytes(offer) for offer in offers]


JSON: tuple[bytes, ...] = (
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b"[" * 3000,
    b"1e999",
    b"NaN",
    b"-1",
    b"9" * 30,
    b"9" * 5000,
    b"\\ud800",
)
JSON += (b"true", b"null", b',"src":', b',"plane":', b',"address":', b':"zz"', b"0.5", b"18446744073709551616")


def reshape_offer(data: bytes, chance: Random) -> bytes:
    """A piece of JSON in the place of a few bytes."""
    at = 1 + int(chance.random() * len(data))
    end = at + int(chance.random() * 8)
    return data[:at] + JSON[int(chance.random() * len(JSON))] + data[end:]


def check_offer(data: bytes) -> str:
    """`Offer.parse`: every field of its own type, and numbers that later fit into a header."""
    raw = data[1:]
    answer = ask(lambda: Offer.parse(raw), (LayoutError,))
    if answer.refused:
        return answer.refused
    found = answer.value
    require(isinstance(found, Offer), f"a {type(found).__name__} for an offer")
    if isinstance(found, Offer):
        require(0 <= found.plane < 2**64, f"plane {found.plane} fits in no header")
        again = ask(lambda: bytes(found), ())
        require(isinstance(again.value, bytes), "an offer that has no bytes")
        ask(lambda: found.address and Address.parse(bytes.fromhex(found.address)), (LayoutError, ValueError))
    return "parsed"


TARGETS = (
    Target("address", check_address, address_seeds, fields_of(1, "844844")),
    Target("handle", check_handle, handle_seeds, fields_of(1, "4488448888844")),
    Target("carrier", check_carrier, carrier_seeds, fields_of(2 + len(CARRIED), "4488448888844")),
    Target("header", check_header, header_seeds, (*fields_of(1, "841128844844"), *fields_of(113, "88"))),
    Target("offer", check_offer, offer_seeds, (), reshape_offer),
)
