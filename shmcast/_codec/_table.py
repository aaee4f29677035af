"""The stream: a header, the names, the table of what lies out of band, and the pickle of the rest.

    offset  size  field
    ------  ----  -----
         0     2  magic         b"sk"
         2     1  version       1
         3     1  width         bytes of one integer of the table: 1, 2, 4 or 8
         4     4  names_bytes   UTF-8, one name a line
         8     4  count         integers in the table
        12     -  names         then the table, then the pickle up to the end

Little-endian. Names: first the classes, `module:qualname:digest`, then dtypes. The table: number of classes, number of
pieces, `lead + length` of each piece, then the entries. An entry is its kind and what the kind asks for; a *form* is
`4 * dims + 2 * read_only + strided`, followed by the sizes and, if strided, the strides.

    kind          integers that follow
    ----          --------------------
    TENSOR        dtype, piece, offset, form ...            strides in elements, offset in bytes
    ARRAY         dtype, piece, offset, form ...            strides in bytes
    INTS          piece, offset, length                     a list of int64, length in bytes
    BYTES         piece, offset, length
    BYTEARRAY     piece, offset, length
    EMPTY         dtype, form ...                           a tensor without elements
    EMPTY_ARRAY   dtype, form ...
    LEAF          leaf, its signature                       the leaf itself
    LEAF_TENSOR   leaf, its signature, dtype, offset, form  a view; offset from the first byte of the leaf
    LEAF_ARRAY    leaf, its signature, dtype, offset, form
    signature     leaf kind, then dtype, form ... (tensor, array) or length (list, bytes)
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from shmcast.errors import LayoutError

from ._geometry import MAX_DIMS, Shape, contiguous_strides

if TYPE_CHECKING:
    from collections.abc import Sequence

HEADER = struct.Struct("<2sBBII")
MAGIC = b"sk"
VERSION = 1

TENSOR, ARRAY, INTS, BYTES, BYTEARRAY, EMPTY, EMPTY_ARRAY, LEAF, LEAF_TENSOR, LEAF_ARRAY = range(1, 11)

# Persistent ids of the pickle: the rebuild marker, then the entries of the table.
MARKER = 0
FIRST_ENTRY = 1

# First value of what the marker is applied to: a code below, or FIRST_CLASS + the index of a class.
COMPLEX, SLICE, RANGE, DTYPE, SIZE, DEVICE, NUMPY_DTYPE, NUMPY_SCALAR, NUMPY_TEXT = range(9)
FIRST_CLASS = 16

_CODES = {1: "b", 2: "h", 4: "i", 8: "q"}


class Parts(NamedTuple):
    """A stream taken apart, nothing in it believed yet."""

    names: list[str]
    table: Sequence[int]
    pickle: bytes


def join(names: list[str], table: list[int], pickled: bytes) -> bytes:
    """The stream of these parts."""
    low, high = min(table), max(table)
    reach = max(high, -low - 1)
    width = next(width for width in _CODES if reach < 1 << (8 * width - 1))
    text = "\n".join(names).encode()
    header = HEADER.pack(MAGIC, VERSION, width, len(text), len(table))
    return b"".join((header, text, struct.pack(f"<{len(table)}{_CODES[width]}", *table), pickled))


def split(stream: bytes) -> Parts:
    """The parts of a stream; raises `LayoutError`."""
    if len(stream) < HEADER.size:
        raise LayoutError(f"{len(stream)} bytes cannot hold a skeleton")
    magic, version, width, names_bytes, count = HEADER.unpack_from(stream)
    if magic != MAGIC or version != VERSION or width not in _CODES:
        raise LayoutError(f"not a skeleton: {stream[:4]!r}")
    table_at = HEADER.size + names_bytes
    pickle_at = table_at + count * width
    if pickle_at > len(stream):
        raise LayoutError(f"a skeleton of at least {pickle_at} bytes in {len(stream)}")
    try:
        names = stream[HEADER.size : table_at].decode().split("\n") if names_bytes else []
    except UnicodeDecodeError as error:
        raise LayoutError(f"names that are no text: {error}") from None
    return Parts(names, struct.unpack_from(f"<{count}{_CODES[width]}", stream, table_at), stream[pickle_at:])


def put_form(table: list[int], shape: Shape, strides: Shape, unit: int, read_only: bool = False) -> None:
    """Append a form; `unit` is what one element counts in the strides (1 for tensors, the itemsize for arrays)."""
    usual = contiguous_strides(shape)
    if unit != 1:
        usual = tuple([step * unit for step in usual])
    strided = strides != usual
    table.append(4 * len(shape) + 2 * read_only + strided)
    table += shape
    if strided:
        table += strides


class Cursor:
    """Reads the integers of a table one after the other; raises `LayoutError` past its end."""

    __slots__ = ("at", "table")

    def __init__(self, table: Sequence[int]) -> None:
        self.table = table
        self.at = 0

    def more(self) -> bool:
        return self.at < len(self.table)

    def take(self, count: int) -> Sequence[int]:
        end = self.at + count
        if count < 0 or end > len(self.table):
            raise LayoutError(f"the table ends at {len(self.table)}, not at {end}")
        found = self.table[self.at : end]
        self.at = end
        return found

    def form(self, unit: int) -> tuple[Shape, Shape, bool]:
        """Shape, strides, read_only."""
        (form,) = self.take(1)
        dims = form >> 2
        if not 0 <= dims <= MAX_DIMS:
            raise LayoutError(f"{dims} dims")
        shape = tuple(self.take(dims))
        if form & 1:
            strides = tuple(self.take(dims))
        else:
            strides = contiguous_strides(shape)
            if unit != 1:
                strides = tuple([step * unit for step in strides])
        return shape, strides, bool(form & 2)
