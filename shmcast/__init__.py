"""shmcast: multimodal inputs for every rank of a machine, through shared memory. One rank materializes, the others map.

Importing this package imports neither torch nor numpy; the first use of a name does.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from shmcast.errors import (
    ArenaFull,
    ClosedError,
    EncodeError,
    LayoutError,
    MaterializeError,
    NotAllowed,
    PeerDied,
    ShmcastError,
    StaleHandle,
)

if TYPE_CHECKING:
    from shmcast._wire import Handle
    from shmcast.broadcaster import Broadcaster
    from shmcast.metrics import Stats
    from shmcast.multimodal import Modality, MultimodalDataItem, MultimodalInputs
    from shmcast.policy import Policy, Route
    from shmcast.transport import Reader, Writer

__all__ = [
    "ArenaFull",
    "Broadcaster",
    "ClosedError",
    "EncodeError",
    "Handle",
    "LayoutError",
    "MaterializeError",
    "Modality",
    "MultimodalDataItem",
    "MultimodalInputs",
    "NotAllowed",
    "PeerDied",
    "Policy",
    "Reader",
    "Route",
    "ShmcastError",
    "StaleHandle",
    "Stats",
    "Writer",
]

_HOMES = {
    "Broadcaster": "broadcaster",
    "Handle": "_wire",
    "Modality": "multimodal",
    "MultimodalDataItem": "multimodal",
    "MultimodalInputs": "multimodal",
    "Policy": "policy",
    "Reader": "transport",
    "Route": "policy",
    "Stats": "metrics",
    "Writer": "transport",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return importlib.metadata.version("shmcast")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'shmcast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"shmcast.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
