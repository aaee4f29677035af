"""Who shares a replica's requests, and the memory between them. Collective: every rank of SGLang's world calls it.

    all ranks: place, settings, what does not fit -> the entry rank of each replica: a Writer, its address -> all: a
    Reader, or what went wrong

Three exchanges over the world's CPU group, on every rank and whatever it finds: nobody waits for one that gave up, and
all ranks of a replica come to the same end.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch.distributed as dist

from shmcast._sent import describe
from shmcast._wire import Address
from shmcast.integrations.sglang._pointers import Pointer
from shmcast.integrations.sglang._release import Place, number_of, place_of, world_group
from shmcast.integrations.sglang._settings import Settings, hashes_in_gpu_buffer, is_on
from shmcast.integrations.sglang._tickets import Failure
from shmcast.policy import Policy
from shmcast.transport import Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup

    from shmcast.admission import Admission

ADDRESS: Final = "SHMCAST_SGLANG_ADDRESS"
"""The environment variable by which schedulers inherit the address of their tokenizer's writer, in hex.

After a colon: how many of its readers each replica has.
"""

ALLOW: tuple[type | str, ...] = ("sglang", Failure, Pointer)

log = logging.getLogger("shmcast")


class Shared(NamedTuple):
    """One rank's ends of a replica's memory.

    `writer`, `admission`: on its entry rank. `reader`: on every rank. `tokenizer`: on every rank or on none. `stage`:
    this pipeline stage's ranks of it, None where there is one. `entry`: the global rank of the first of these.
    `ends_names`: on the first rank of the last stage, which maps after all others.
    """

    place: Place
    ranks: int
    writer: Writer | None
    admission: Admission | None
    reader: Reader
    tokenizer: Reader | None
    stage: ProcessGroup | None
    entry: int
    ends_names: bool

    def close(self) -> None:
        _close(self.stage, self.admission, self.tokenizer, self.reader, self.writer)


class Apart(NamedTuple):
    """Why a replica's ranks share nothing: the same text on all of them."""

    place: Place
    why: str


@dataclass(frozen=True)
class _Said:
    """What one rank says in an exchange. `attached`: to whose tokenizer, or why not."""

    place: Place
    settings: Settings
    trouble: str
    address: bytes = b""
    attached: str = ""


def share(scheduler: Any, settings: Settings, admit: Callable[[Writer], Admission]) -> Shared | Apart:
    """Make this rank's ends, an entry rank's admission by `admit`. Every rank of the world, at the same point."""
    place = place_of(scheduler)
    if nodes_of(scheduler) > 1:  # the other nodes may not have been asked: no exchange
        return Apart(place, f"--nnodes {nodes_of(scheduler)}: shared memory ends with the machine")
    group = world_group(scheduler)
    rank = dist.get_rank(group)
    mine = _Said(place, settings, unfit(scheduler, settings))
    writer: Writer | None = None
    admission: Admission | None = None
    reader: Reader | None = None
    tokenizer: Reader | None = None

    said = _exchange(group, mine)
    replicas = _replicas(said)
    replica = replicas[place.replica]
    why = _trouble(said, replica)

    if not why and place.receives:
        try:
            policy = Policy(wait=settings.wait)
            writer = Writer(len(replica), capacity=settings.capacity, allow=ALLOW, policy=policy, rank=rank)
            admission = admit(writer)
            mine = replace(mine, address=bytes(writer.address))
        except Exception as error:
            mine = replace(mine, trouble=describe(error))
    said = _exchange(group, mine)
    why = why or _trouble(said, replica)

    if not why:
        try:
            reader = Reader(Address.parse(said[replica[0]].address), replica.index(rank), allow=ALLOW)
        except Exception as error:
            mine = replace(mine, trouble=describe(error))
        tokenizer, attached = _attach(len(replica), replica.index(rank), number_of(scheduler), settings)
        mine = replace(mine, attached=attached)
    said = _exchange(group, mine)
    why = why or _trouble(said, replica)
    groups = _make_groups(group, said, replicas)
    if tokenizer is not None and any(said[other].attached != mine.attached for other in replica):
        tokenizer.close()
        tokenizer = None
    if not why and settings.tokenizer and tokenizer is None and place.receives:
        log.warning("the tokenizer sends as in stock: %s", [said[other].attached or "not tried" for other in replica])

    stage = groups.get((place.replica, place.stage))
    if why or reader is None:
        _close(stage, admission, tokenizer, reader, writer)
        return Apart(place, why)
    entry = next(other for other in replica if said[other].place.stage == place.stage)
    first = dist.get_global_rank(group, entry)
    last = said[replica[-1]].place.stage  # they are sorted by it
    ends_names = rank == entry and place.stage == last
    return Shared(place, len(replica), writer, admission, reader, tokenizer, stage, first, ends_names)


def _close(stage: ProcessGroup | None, *ends: Admission | Reader | Writer | None) -> None:
    """In this order: an admission waits for what it runs, which uses the others."""
    for end in ends:
        if end is not None:
            end.close()
    if stage is not None:
        dist.destroy_process_group(stage)


def nodes_of(scheduler: Any) -> int:
    """Machines that the server runs on; the same on all of them."""
    return int(getattr(scheduler.server_args, "nnodes", 1))


def unfit(scheduler: Any, settings: Settings) -> str:
    """Why this server cannot hold requests, or nothing."""
    args = scheduler.server_args
    if not settings.admission:
        return "SHMCAST_SGLANG_ADMISSION=0"
    if getattr(args, "language_only", False):
        return "--language-only: inputs come from encoders, not from the tokenizer"
    if getattr(args, "mm_feature_transport", None) == "cuda_vmm":
        return "--mm-feature-transport cuda_vmm: features do not pass through this machine's memory"
    if is_on("SGLANG_RUST_SERVER"):
        return "SGLANG_RUST_SERVER=1: requests come through no socket"
    if hashes_in_gpu_buffer():
        return "SGLANG_MM_BUFFER_SIZE_MB: one GPU buffer for all requests, which two threads cannot fill"
    return ""


def _attach(ranks: int, index: int, number: int, settings: Settings) -> tuple[Reader | None, str]:
    """This rank's end of the tokenizer's memory, and what to say of it: its address, or why there is none.

    It is one of `ranks` in the replica with this number.
    """
    text = os.environ.get(ADDRESS, "")
    if not settings.tokenizer or not text:
        return None, f"no {ADDRESS}"
    try:
        token, _, wanted = text.partition(":")
        address = Address.parse(bytes.fromhex(token))
        if int(wanted) != ranks:
            return None, f"the tokenizer publishes for replicas of {wanted} ranks, here are {ranks}"
        # A server of one replica may have been given a number all the same, by a router in front of several servers.
        first = 0 if address.readers == ranks else number * ranks
        return Reader(address, first + index, allow=ALLOW), text
    except Exception as error:
        return None, describe(error)


def _make_groups(
    world: ProcessGroup, said: list[_Said], replicas: dict[int, list[int]]
) -> dict[tuple[int, int], ProcessGroup]:
    """One for each stage of several ranks, of the replicas that share; of others than this rank's, nothing to use.

    Every rank of the world makes all of them in this order, as SGLang makes its own. A group that only its members make
    is named by its ranks: made again, it would find the addresses of the one before it. None is made to be destroyed:
    a rank may still be connecting when another one, done with it, hangs up.
    """
    stages: dict[tuple[int, int], list[int]] = {}
    for number, replica in replicas.items():
        for rank in replica if not _trouble(said, replica) else ():
            stages.setdefault((number, said[rank].place.stage), []).append(dist.get_global_rank(world, rank))
    return {
        stage: dist.new_group(sorted(members), backend="gloo")
        for stage, members in sorted(stages.items())
        if len(members) > 1
    }


def _replicas(said: list[_Said]) -> dict[int, list[int]]:
    """The ranks of each replica; its entry rank comes first, and those of a stage stand together."""
    places = [each.place for each in said]
    found: dict[int, list[int]] = {}
    for rank in sorted(
        range(len(said)), key=lambda rank: (places[rank].stage, places[rank].attn_cp, places[rank].attn_tp)
    ):
        found.setdefault(places[rank].replica, []).append(rank)
    return found


def _exchange(group: ProcessGroup, mine: _Said) -> list[_Said]:
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, mine, group=group)
    return said


def _trouble(said: list[_Said], replica: list[int]) -> str:
    """What keeps this replica's ranks apart; the same text on each of them."""
    first = said[replica[0]]
    if len(replica) == 1:
        return "one rank has nobody to share with"
    if not first.place.receives:
        return f"rank {replica[0]} should be the entry rank of its replica, and stands at {first.place}"
    for rank in replica:
        if said[rank].trouble:
            return f"rank {rank}: {said[rank].trouble}"
        if said[rank].settings != first.settings:
            return f"rank {rank} has other settings than rank {replica[0]}: {said[rank].settings}, {first.settings}"
    return ""
