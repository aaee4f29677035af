"""The tokenizer's segments, one a tensor: each rank maps them where they are, and their names go when all have."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shmcast.integrations.sglang import _link
from shmcast.integrations.sglang._pointers import map_all
from tests.sglang.engine import REQUEST_ERRORS, mm_utils
from tests.sglang.requests import KINDS, abort, batch, generate, malformed, pointed, raw_of, same
from tests.sglang.serving import Serving, Slow, serve_staged, serving, stock_inputs
from tests.support.leaks import names_of_others
from tests.support.ranks import Ranks

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(not hasattr(mm_utils, "wrap_shm_features"), reason="tensors travel inside of requests"),
]


def at(path: Path) -> str:
    return f"ipc://{path}/s"


def mapped(serve: Serving, rid: str) -> set[str]:
    """The names that this rank's tensors of a request were mapped by."""
    places = {leaf.data_ptr() for item in serve.inputs[rid].mm_items for leaf in _tensors(item.feature)}
    names = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if any(low <= place < high for place in places):
            names.add(line.split(maxsplit=5)[5].removesuffix(" (deleted)"))
    return names


def _tensors(feature: Any) -> list[Any]:
    return [leaf for leaf in (feature if isinstance(feature, list) else [feature]) if hasattr(leaf, "data_ptr")]


def held_by_all(rank: int, address: str) -> set[str]:
    with serving(address) as serve:
        fds = len(os.listdir("/proc/self/fd"))
        sent = ("images of one parent", "video")
        serve.send(*(generate(kind, raw_of(KINDS[kind]())) for kind in sent))
        serve.serve(len(sent))
        names = set().union(*(mapped(serve, kind) for kind in sent))
        assert len(os.listdir("/proc/self/fd")) == fds
        dist.barrier()
        assert not names & {f"/dev/shm/{name}" for name in names_of_others()}
        for kind in sent:
            same(serve.inputs[kind], stock_inputs(raw_of(KINDS[kind]())))
        if rank == 0:
            assert serve.link.stats()["admission"].bytes < 1 << 20  # not their pixels
        return names


def test_all_ranks_map_what_the_tokenizer_wrote(engines: Ranks, tmp_path: Path) -> None:
    first, *others = engines.run(3, held_by_all, at(tmp_path))
    assert len(first) == 3 + 1
    assert not any("shmcast" in name for name in first)
    assert others == [first] * 2


def in_a_batch(rank: int, address: str) -> None:
    with serving(address) as serve:
        serve.send(batch([generate(kind, raw_of(KINDS[kind]())) for kind in KINDS]))
        serve.serve(len(KINDS))
        for kind in KINDS:
            same(serve.inputs[kind], stock_inputs(raw_of(KINDS[kind]())))


def aborted_unread(rank: int, address: str) -> None:
    with Slow() as slow, serving(address, settings={"workers": 1}) as serve:
        serve.send(*(generate(rid, raw_of(KINDS["video"]())) for rid in ("a", "b", "c")))
        serve.send(abort("b"))
        serve.serve(2)
        slow.go.set()
        serve.serve(4)
        for rid in ("a", "c"):
            same(serve.inputs[rid], slow.stock(raw_of(KINDS["video"]())))


def unheld(rank: int, address: str) -> None:
    with serving(address, settings={"held_bytes": 0}) as serve:
        serve.send(generate("a", raw_of(KINDS["list of tensors"]())), generate("b", raw_of(KINDS["video"]())))
        serve.serve(2)
        same(serve.inputs["a"], stock_inputs(raw_of(KINDS["list of tensors"]())))
        same(serve.inputs["b"], stock_inputs(raw_of(KINDS["video"]())))
        assert serve.link.stats()["reader"].messages == 0


def unopened(rank: int, address: str) -> None:
    """One rank cannot map: the entry rank maps again, and sends the bytes."""
    with serving(address) as serve:
        if rank == 1:
            serve.link._ends.reader.open = lambda handle: 1 / 0
        serve.send(generate("a", raw_of(KINDS["all"]())))
        serve.serve(1)
        same(serve.inputs["a"], stock_inputs(raw_of(KINDS["all"]())))


def staged(rank: int, address: str) -> None:
    with serving(address, pp=2) as serve:
        serve.send(generate("a", raw_of(KINDS["all"]())))
        serve_staged(serve, 1)
        same(serve.inputs["a"], stock_inputs(raw_of(KINDS["all"]())))


def bad(rank: int, address: str) -> None:
    with serving(address) as serve:
        serve.send(batch([generate("bad", malformed()), generate("good", raw_of(KINDS["video"]()))]))
        serve.serve(2)
        same(serve.inputs["good"], stock_inputs(raw_of(KINDS["video"]())))


def fails_at(bad: int) -> Callable[[Any, Any], Any]:
    """Maps what inputs point to, but for the one time."""
    times = itertools.count(1)

    def fail(release: Any, inputs: Any) -> Any:
        if next(times) == bad:
            raise OSError("cannot be mapped")
        return map_all(release, inputs)

    return fail


def unmapped(rank: int, address: str, who: int, bad: int, request: Any, **options: Any) -> None:
    """One rank fails to map once; of a batch all parts go raw, for they are one message."""
    kinds = [part.rid for part in getattr(request, "batch", [request])]
    with pytest.MonkeyPatch.context() as patch, serving(address, **options) as serve:
        if rank == who:
            patch.setattr(_link, "map_all", fails_at(bad))
        serve.send(request)
        serve_staged(serve, len(kinds)) if options else serve.serve(len(kinds))
        for kind in kinds:
            same(serve.inputs[kind], stock_inputs(raw_of(KINDS[kind]())))


def unmapped_in_part(rank: int, address: str) -> None:
    unmapped(rank, address, 1, 2, batch([generate(kind, raw_of(KINDS[kind]())) for kind in ("video", "all")]))


def unmapped_by_entry(rank: int, address: str) -> None:
    unmapped(rank, address, 0, 1, generate("all", raw_of(KINDS["all"]())))


def unmapped_staged(rank: int, address: str) -> None:
    unmapped(rank, address, 1, 1, generate("all", raw_of(KINDS["all"]())), pp=2)


def cut(rank: int, address: str) -> None:
    """The maker keeps no tensor as it is, and then one rank cannot open: what was cut is there to be sent."""
    make = Cutting()
    with make, serving(address) as serve:
        serve.send(generate("opened", raw_of(KINDS["video"]())))
        serve.serve(1)
        if rank == 1:
            serve.link._ends.reader.open = lambda handle: 1 / 0
        serve.send(generate("unopened", raw_of(KINDS["video"]())))
        serve.serve(2)
        for rid in ("opened", "unopened"):
            same(serve.inputs[rid], make(raw_of(KINDS["video"]())))


class Cutting(Slow):
    """Gives other tensors than it takes, as one that splits items does."""

    def __call__(self, raw: Any, **options: Any) -> Any:
        made = self.stock(raw, **options)
        for item in made.mm_items:
            item.feature = item.feature[:7] + 1
        return made


def closed(rank: int, address: str) -> None:
    """What is held while the links close goes on as in stock."""
    with Slow() as slow, serving(address, settings={"workers": 1}) as serve:
        sent = ("video", "all")
        serve.send(*(generate(kind, raw_of(KINDS[kind]())) for kind in sent))
        held = torch.zeros(1, dtype=torch.int32)
        while not held.item():
            serve.tick()
            held[0] = rank != 0 or len(serve.gate()._held) == len(sent)
            dist.all_reduce(held, dist.ReduceOp.MIN)
        slow.go.set()
        serve.link.close()
        serve.send(generate("embeddings", raw_of(KINDS["embeddings"]())))
        serve.serve(3)
        for kind in (*sent, "embeddings"):
            same(serve.inputs[kind], slow.stock(raw_of(KINDS[kind]())))


WAYS = [
    in_a_batch,
    aborted_unread,
    unheld,
    unopened,
    staged,
    bad,
    unmapped_in_part,
    unmapped_by_entry,
    unmapped_staged,
    cut,
    closed,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_no_segment_of_the_tokenizer_stays(engines: Ranks, tmp_path: Path, way: Callable[[int, str], None]) -> None:
    """The look for what is left is every test's."""
    engines.run(4 if way in (staged, unmapped_staged) else 2, way, at(tmp_path))


def gone(rank: int, address: str) -> str:
    with serving(address) as serve:
        lost = generate("lost", raw_of(KINDS["video"]()))
        if rank == 0:
            lost = pointed(lost)
            for name in names_of_others():
                os.unlink(f"/dev/shm/{name}")
        serve.send(lost, generate("good", raw_of(KINDS["video"]())))
        serve.serve(2)
        same(serve.inputs["good"], stock_inputs(raw_of(KINDS["video"]())))
        return str(serve.inputs["lost"])


def gone_when_sent_raw(rank: int, address: str) -> str:
    """Made, and then neither can one rank open it nor is it there to be sent."""
    with serving(address) as serve:
        if rank == 1:
            stock = serve.link._ends.reader.open

            def lose(handle: Any) -> Any:
                for name in names_of_others():
                    os.unlink(f"/dev/shm/{name}")
                return stock(handle)

            serve.link._ends.reader.open = lose
        serve.send(generate("lost", raw_of(KINDS["video"]())))
        serve.serve(1)
        dist.barrier()
        serve.send(generate("good", raw_of([])))
        serve.serve(2)
        return str(serve.inputs["lost"])


@pytest.mark.skipif(not REQUEST_ERRORS, reason="before 0.5.20 it ends the schedulers, as in stock")
@pytest.mark.parametrize(("way", "said"), [(gone, "FileNotFoundError"), (gone_when_sent_raw, "were lost between")])
def test_a_segment_that_is_gone_is_that_requests_failure(
    engines: Ranks, tmp_path: Path, way: Callable[[int, str], str], said: str
) -> None:
    first, second = engines.run(2, way, at(tmp_path))
    assert first == second
    assert said in first
