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
    UnknownRequest,
)

if TYPE_CHECKING:
    from shmcast._wire import Handle
    from shmcast.admission import Admission
    from shmcast.broadcaster import Broadcaster
    from shmcast.device import to_device
    from shmcast.metrics import Stats
    from shmcast.multimodal import Modality, MultimodalDataItem, MultimodalInputs
    from shmcast.policy import Policy, Route
    from shmcast.scheduler import SchedulerBackend
    from shmcast.transport import Reader, Writer

__all__ = [
    "Admission",
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
    "SchedulerBackend",
    "ShmcastError",
    "StaleHandle",
    "Stats",
    "UnknownRequest",
    "Writer",
    "to_device",
]

_HOMES = {
    "Admission": "admission",
    "Broadcaster": "broadcaster",
    "Handle": "_wire",
    "Modality": "multimodal",
    "MultimodalDataItem": "multimodal",
    "MultimodalInputs": "multimodal",
    "Policy": "policy",
    "Reader": "transport",
    "Route": "policy",
    "SchedulerBackend": "scheduler",
    "Stats": "metrics",
    "Writer": "transport",
    "to_device": "device",
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
