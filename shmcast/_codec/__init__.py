"""Objects to skeleton and pieces, and back: the one place where received bytes become objects.

    allow = Allow([MyStruct, "sglang"])              what may be rebuilt, by class or by package
    leaves = Leaves.walk(raw)                        what the peers hold already, in a canonical order
    encoded = encode(obj, allow, leaves)             Encoded(stream, pieces)
    obj = decode(stream, pieces, allow, leaves)      pieces: uint8 tensors of lead + length bytes each
    obj = map_tensors(obj, function)                 the same object with other tensors in it

`encode` raises `EncodeError` (or its `NotAllowed`) with the path of the culprit; `decode` gives a value, or raises
`LayoutError` or `NotAllowed`, for any bytes at all, and runs no code that a stream could choose.

Imports point down:

    _encode | _decode | _moved
    _parts | _paths | _machine
    _leaves | _table | _allow
    _pieces | _classes | _geometry
"""

from ._allow import Allow
from ._decode import decode, tensor_over
from ._encode import Encoded, encode
from ._leaves import Leaves, nbytes_of
from ._moved import map_tensors, runs_of
from ._pieces import Piece

__all__ = [
    "Allow",
    "Encoded",
    "Leaves",
    "Piece",
    "decode",
    "encode",
    "map_tensors",
    "nbytes_of",
    "runs_of",
    "tensor_over",
]
