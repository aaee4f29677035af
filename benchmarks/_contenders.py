"""Every way that is compared. Each is as its users would write it, and in its best shape where there is a choice."""

from __future__ import annotations

import mmap
import os
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np
import posix_ipc
import torch
import torch.distributed as dist

from benchmarks._loop import Contender, Site
from shmcast import Broadcaster, Modality, MultimodalDataItem, MultimodalInputs, Policy

if TYPE_CHECKING:
    from torch import Tensor

BASELINE = "object-list"
HASH = 0x5EED
# A cold start may have to wait until every rank has mapped a new segment; falling back would measure something else.
PATIENCE = 10.0
NAME_BYTES = 64
MODE = 0o600


def inputs_of(feature: Tensor, hash_value: int = HASH) -> MultimodalInputs:
    """A request of one picture, whose hash is known already."""
    item = MultimodalDataItem(Modality.IMAGE, offsets=[(0, 99)], feature=feature)
    item.hash, item.pad_value = hash_value, hash_value
    return MultimodalInputs([item], im_token_id=151655)


def raw_of(feature: Tensor, hash_value: int | None) -> dict[str, Any]:
    """The same before `from_dict`; it computes the hash where there is none."""
    item = {"modality": "IMAGE", "offsets": [(0, 99)], "feature": feature, "hash": hash_value}
    return {"mm_items": [item], "im_token_id": 151655}


def same_inputs(state: Any, got: MultimodalInputs) -> bool:
    """Whether a request has the bytes that the seed says, and a hash."""
    (item,) = got.mm_items
    return torch.equal(item.feature, state.site.expected) and isinstance(item.hash, int)  # type: ignore[arg-type]


class Shmcast:
    """A Broadcaster over all ranks, and what it sends next."""

    def __init__(self, site: Site, *, peers_hold_raw: bool) -> None:
        self.site = site
        self.broadcaster = Broadcaster(policy=Policy(peers_hold_raw=peers_hold_raw, wait=PATIENCE))
        self.next: MultimodalInputs | None = None
        self.raw: dict[str, Any] = {}

    def prepare_copied(self) -> None:
        self.next = inputs_of(self.site.payload) if self.site.place.leads else None

    def prepare_empty(self) -> None:
        if self.site.place.leads:
            feature = self.broadcaster.empty(self.site.payload.shape, torch.int64)
            self.next = inputs_of(feature.copy_(self.site.payload))

    def prepare_raw(self, hash_value: int | None) -> None:
        self.raw = raw_of(self.site.payload, hash_value)

    def broadcast(self) -> object:
        return self.broadcaster.broadcast(self.next)

    def materialize(self) -> object:
        return self.broadcaster.materialize(self.raw)

    def calm(self) -> bool:
        stats = self.broadcaster.stats()
        return not stats.leases_held and not any(reader.held for reader in stats.leases)

    def settled(self) -> bool:
        self.next = None
        stats = self.broadcaster.stats()
        return not stats.live_blocks and not stats.leases_held

    def close(self) -> None:
        stats = self.broadcaster.stats()
        self.broadcaster.close()
        if stats.fallbacks or set(stats.routes) - {"shm"}:
            raise RuntimeError(f"not by shared memory: {dict(stats.routes)}, fallbacks {dict(stats.fallbacks)}")


class ObjectList:
    """`broadcast_object_list` of the object."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def call(self) -> object:
        objects = [inputs_of(self.site.payload) if self.site.place.leads else None]
        dist.broadcast_object_list(objects, src=0)
        return objects[0]


class Gloo:
    """The tensor alone, into memory that every rank has ready."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.memory = site.payload if site.place.leads else torch.empty_like(site.payload)

    def call(self) -> Tensor:
        dist.broadcast(self.memory, src=0)
        return self.memory

    def check(self, got: Tensor) -> bool:
        return torch.equal(got, self.site.expected)


class SegmentEach:
    """A new segment for each message; its name goes over the group, and is unlinked when all have mapped it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.name = ""

    def call(self) -> Tensor:
        if self.site.place.leads:
            self.name = f"/segment-each-{secrets.token_hex(8)}"
            segment = posix_ipc.SharedMemory(self.name, posix_ipc.O_CREX, mode=MODE, size=0)
            os.posix_fallocate(segment.fd, 0, self.site.size)
            mapped = self._map(segment)
            np.copyto(mapped, self.site.payload.numpy())
            self._tell()
            return torch.from_numpy(mapped)
        return torch.from_numpy(self._map(posix_ipc.SharedMemory(self._hear(), flags=0, size=0)))

    def check(self, got: Tensor) -> bool:
        return torch.equal(got, self.site.expected)

    def settled(self) -> bool:
        if self.name:
            posix_ipc.unlink_shared_memory(self.name)
            self.name = ""
        return True

    def _map(self, segment: posix_ipc.SharedMemory) -> np.ndarray[Any, np.dtype[np.int64]]:
        try:
            return np.frombuffer(mmap.mmap(segment.fd, self.site.size), np.int64)
        finally:
            segment.close_fd()

    def _tell(self) -> None:
        name = bytearray(self.name.encode().ljust(NAME_BYTES, b"\0"))
        dist.broadcast(torch.frombuffer(name, dtype=torch.uint8), src=0)

    def _hear(self) -> str:
        name = torch.empty(NAME_BYTES, dtype=torch.uint8)
        dist.broadcast(name, src=0)
        return name.numpy().tobytes().rstrip(b"\0").decode()


class FromDict:
    """Every rank holds the raw inputs and materializes them itself."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.raw: dict[str, Any] = {}

    def prepare(self, hash_value: int | None) -> None:
        self.raw = raw_of(self.site.payload, hash_value)

    def call(self) -> object:
        return MultimodalInputs.from_dict(self.raw)


class PlainCopy:
    """The same bytes into private memory of the same process that was written before."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.memory = np.empty(len(site.payload), np.int64)

    def call(self) -> Tensor:
        np.copyto(self.memory, self.site.payload.numpy())
        return torch.from_numpy(self.memory)

    def check(self, got: Tensor) -> bool:
        return torch.equal(got, self.site.expected)


def _shmcast(key: str, label: str, stands_for: str, *, peers_hold_raw: bool, **functions: Any) -> Contender:
    return Contender(
        key,
        label,
        stands_for,
        setup=lambda site: Shmcast(site, peers_hold_raw=peers_hold_raw),
        check=same_inputs,
        settled=Shmcast.settled,
        calm=Shmcast.calm,
        close=Shmcast.close,
        **functions,
    )


CONTENDERS = (
    _shmcast(
        "copied",
        "shmcast, copied once",
        "Only the entry rank has the request: one copy into the arena, a header, a mapping on every other rank.",
        peers_hold_raw=False,
        prepare=Shmcast.prepare_copied,
        again=True,
        call=Shmcast.broadcast,
    ),
    _shmcast(
        "empty",
        "shmcast, from empty()",
        "The tensor was produced inside the arena (not timed: it has to be produced somewhere): nothing is copied.",
        peers_hold_raw=False,
        prepare=Shmcast.prepare_empty,
        again=True,
        call=Shmcast.broadcast,
    ),
    _shmcast(
        "references",
        "shmcast, references",
        "Every rank holds the raw inputs, as in SGLang: the header and a skeleton that names them. The hash is there.",
        peers_hold_raw=True,
        prepare=lambda state: state.prepare_raw(HASH),
        call=Shmcast.materialize,
    ),
    _shmcast(
        "references-hashing",
        "shmcast, references, hashed once",
        "The same, but the hash is not there: the entry rank computes it for all.",
        peers_hold_raw=True,
        prepare=lambda state: state.prepare_raw(None),
        call=Shmcast.materialize,
    ),
    Contender(
        BASELINE,
        "broadcast_object_list",
        "What engines do today: pickle and TCP for every byte.",
        setup=ObjectList,
        call=ObjectList.call,
        check=same_inputs,
    ),
    Contender(
        "gloo",
        "gloo tensor broadcast",
        "The tensor alone over TCP, no pickle: shapes known beforehand, into memory that is there and warm.",
        setup=Gloo,
        call=Gloo.call,
        check=Gloo.check,
    ),
    Contender(
        "segment-each",
        "a new segment a message",
        "Shared memory without a pool: create, reserve, copy, broadcast the name, map; unlinked later, not timed.",
        setup=SegmentEach,
        call=SegmentEach.call,
        check=SegmentEach.check,
        warms=False,
        settled=SegmentEach.settled,
    ),
    Contender(
        "from-dict",
        "from_dict on every rank",
        "Every rank holds the raw inputs and does the same work, which is hashing.",
        setup=FromDict,
        prepare=lambda state: state.prepare(None),
        call=FromDict.call,
        check=same_inputs,
    ),
    Contender(
        "from-dict-hashed",
        "from_dict, the hash is there",
        "The same where somebody has hashed before: no work at all is left.",
        setup=FromDict,
        prepare=lambda state: state.prepare(HASH),
        call=FromDict.call,
        check=same_inputs,
    ),
    Contender(
        "plain-copy",
        "a plain copy, one process",
        "The yardstick: the same bytes into private memory that was written before, on the entry rank alone.",
        setup=PlainCopy,
        call=PlainCopy.call,
        check=PlainCopy.check,
        alone=True,
    ),
)
BY_KEY = {contender.key: contender for contender in CONTENDERS}
