"""The tokenizer's segments, one a tensor: every rank maps them where they are, nothing of them is copied.

    tokenizer: a segment -> entry rank: a `Pointer`, mapped while a worker makes the inputs -> the message: a `Pointer`
    -> each rank: mapped -> first rank of the last pipeline stage, when all there have: its name taken away

SGLang attaches them while it unpickles a request, on the scheduler's thread, and from 0.5.10 on once more for each
rank; up to 0.5.20 each rank copies them there. Here a `Pointer` stands in for `ShmPointerMMData` until a worker maps
it, or until the request goes on as it came.
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import torch

from shmcast._room import SHM
from shmcast.errors import LayoutError
from shmcast.integrations.sglang._leaves import FEATURES, leaves_of, nbytes_of, replace

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcast.integrations.sglang._release import Release

MODULE = "sglang.srt.managers.mm_utils"
NAME = "ShmPointerMMData"


@dataclass(eq=False)
class Pointer:
    """What a `ShmPointerMMData` was pickled as: `state` names its segment, a contiguous tensor's shape and dtype.

    `travels`: it is in a message, and its name stays until all have that.
    """

    state: dict[str, Any]
    travels: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.travels = False

    @property
    def nbytes(self) -> int:
        return self._numel * int(self.state["dtype"].itemsize)

    @property
    def _numel(self) -> int:
        return math.prod(self.state["shape"])  # `torch.Size.numel` wraps around

    @property
    def path(self) -> str:
        """The segment's, which lies in /dev/shm; `LayoutError` for a name that leads elsewhere."""
        name = str(self.state["shm_name"]).lstrip("/")
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise LayoutError(f"a pointer to a segment of the name {name!r}")
        return f"{SHM}/{name}"

    def map(self) -> torch.Tensor:
        """The tensor, where it lies; what is written to it is this process's alone.

        Raises:
            OSError: there is no such segment, or it is too short.
            LayoutError: its name or its shape is none of a segment.
        """
        path, shape = self.path, self.state["shape"]
        if any(size < 0 for size in shape):
            raise LayoutError(f"a pointer to {path} of the shape {tuple(shape)}")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):  # to open a pipe again, as torch does, would wait for its other end
                raise LayoutError(f"{path} is no regular file")
            if self.nbytes > found.st_size:
                raise OSError(f"{path}, {found.st_size} bytes, is no tensor of {self.nbytes}")
            # Not `mmap`, which would keep a descriptor a tensor.
            tensor = torch.from_file(f"/proc/self/fd/{fd}", shared=False, size=self._numel, dtype=self.state["dtype"])
        except RuntimeError as error:
            raise OSError(f"{path} cannot be mapped: {error}") from error
        finally:
            os.close(fd)
        return tensor.view(shape)

    def discard(self) -> None:
        """Take the segment's name away, as the class that made it would: also from the tracker of processes.

        Nothing where there is none, or where the name is none of a segment.
        """
        with suppress(LayoutError):
            name = f"/{os.path.basename(self.path)}"
            with suppress(OSError):
                os.unlink(self.path)
            # A tracker that is not the maker's does not know the name yet.
            resource_tracker.register(name, "shared_memory")
            resource_tracker.unregister(name, "shared_memory")

    def restore(self) -> Any:
        """What SGLang would have unpickled."""
        cls = getattr(importlib.import_module(MODULE), NAME)
        real = cls.__new__(cls)
        real.__setstate__(self.state)
        return real


def pointers(release: Release, inputs: Any) -> list[Pointer]:
    """All in inputs, raw or made; in what is none of SGLang's there are none."""
    with suppress(AttributeError, KeyError, TypeError):
        found = (leaf for item in release.items(inputs) for leaf in leaves_of(item, FEATURES))
        return [leaf for leaf in found if isinstance(leaf, Pointer)]
    return []


def held_bytes(release: Release, raw: Any) -> int:
    """Of the tensors and arrays of all items, here or in segments."""
    found = (leaf for item in release.items(raw) for leaf in leaves_of(item))
    return sum(leaf.nbytes if isinstance(leaf, Pointer) else nbytes_of(leaf) for leaf in found)


def copied(release: Release, raw: Any) -> Any:
    """The same raw inputs in items of their own."""
    return release.with_items(raw, [copy.copy(item) for item in release.items(raw)])


def make_of(release: Release, make: Callable[[Any], Any], raw: Any) -> Any:
    """What `make` gives for raw inputs, whose pointers are mapped in place: again where it kept these tensors.

    Raises what `make` does, and `OSError` or `LayoutError` where a segment cannot be mapped.
    """
    if not pointers(release, raw):
        return make(raw)
    mapped: dict[int, tuple[torch.Tensor, Pointer]] = {}

    def map_one(leaf: Any) -> Any:
        if not isinstance(leaf, Pointer):
            return leaf
        tensor = leaf.map()
        mapped[id(tensor)] = tensor, leaf
        return tensor

    def point(leaf: Any) -> Any:
        found = mapped.get(id(leaf))
        if found is None:
            return leaf
        found[1].travels = True
        return found[1]

    _replace_all(release, raw, map_one)
    made = make(raw)
    _replace_all(release, made, point)
    return made


def map_all(release: Release, inputs: Any) -> list[Pointer]:
    """Map what inputs point to, raw or made, in its place; returns what stood there. Raises as `Pointer.map`."""
    found = pointers(release, inputs)
    if found:
        _replace_all(release, inputs, lambda leaf: leaf.map() if isinstance(leaf, Pointer) else leaf)
    return found


def restore(release: Release, raw: Any) -> None:
    """Put SGLang's own pointers into raw inputs that go on as they came."""
    if pointers(release, raw):
        _replace_all(release, raw, lambda leaf: leaf.restore() if isinstance(leaf, Pointer) else leaf)


def _replace_all(release: Release, inputs: Any, new: Callable[[Any], Any]) -> None:
    for item in release.items(inputs):
        replace(item, new, FEATURES)
