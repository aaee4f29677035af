"""How a group begins: every rank says what it was made with, then whether it can map; all conclude the same.

Two exchanges, in which every rank takes part whatever its settings or errors, so that none waits for one that raised.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from shmcast._layout import VERSION
from shmcast.errors import LayoutError, ShmcastError
from shmcast.policy import Policy, Route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmcast._control import GroupControl

TEXT = 400


@dataclass(frozen=True)
class Offer:
    """One rank's word.

    Attributes:
        settings: digest of everything that must be equal on all ranks.
        shown: those settings, shortened, for a person.
        src: the entry rank, as this rank was told.
        plane: a random number; rank 0's names the control plane.
        holds_raw: this rank passes its own raw inputs.
        agree: this rank wants every rank to agree on each message.
        disabled: its environment forbids shared memory.
        address: of the writer, in hexadecimal, from the entry rank.
        trouble: why it cannot use shared memory.
        wrong: why its arguments or environment are refused; ends the constructor on every rank.
    """

    settings: str = ""
    shown: str = ""
    src: int = 0
    plane: int = 0
    holds_raw: bool = False
    agree: bool = False
    disabled: bool = False
    address: str = ""
    trouble: str = ""
    wrong: str = ""

    def __bytes__(self) -> bytes:
        cut = {name: value[:TEXT] if isinstance(value, str) else value for name, value in asdict(self).items()}
        return json.dumps(cut, ensure_ascii=False).encode("utf-8", "replace")

    @classmethod
    def parse(cls, raw: bytes) -> Offer:
        """The offer in `raw`, or `LayoutError`."""
        try:
            fields = json.loads(raw)
            offer = cls(**fields)
        except (ValueError, TypeError, RecursionError) as error:
            raise LayoutError(f"another rank answers something else: {error}; is this the same library?") from error
        if any(type(value) is not type(getattr(cls, name)) for name, value in asdict(offer).items()):
            raise LayoutError(f"another rank answers something else: {fields}")
        return offer


class Verdict(NamedTuple):
    """What all ranks concluded, from the same offers: where they differ, what makes no rank wait for another.

    `why`: what kept the group off `shm`, empty where nothing did.
    """

    route: Route
    why: str
    src: int
    plane: int
    holds_raw: bool
    agree: bool


def settings_of(src: int, policy: Policy, allow: Sequence[type | str]) -> tuple[str, str]:
    """Digest and short text of what must be equal on all ranks."""
    names = sorted(item if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}" for item in allow)
    policy_fields = asdict(replace(policy, route=Route(policy.route).value)) | {"route": Route(policy.route).value}
    shown = json.dumps({"version": VERSION, "src": src, **policy_fields, "allow": names}, sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest(), shown


def join(control: GroupControl, offer: Offer, attach: Callable[[int, str], str]) -> Verdict:
    """Exchange offers, then let `attach` map the entry rank's segments; it returns what went wrong, or nothing.

    Raises `ShmcastError` where another rank's arguments are wrong.
    """
    offers = [Offer.parse(raw) for raw in control.exchange(bytes(offer))]
    for rank, other in enumerate(offers):
        if other.wrong:
            raise ShmcastError(f"rank {rank} was made with wrong arguments: {other.wrong}")
    why = _difference(offers)
    if not why:
        trouble = attach(offers[0].src, offers[offers[0].src].address)
        troubles = [
            raw.decode("utf-8", "replace") for raw in control.exchange(trouble[:TEXT].encode("utf-8", "replace"))
        ]
        why = next((f"rank {rank} cannot map: {text}" for rank, text in enumerate(troubles) if text), "")
    holds_raw, agree = all(o.holds_raw for o in offers), any(o.agree for o in offers)
    otherwise = Route.LOCAL if holds_raw and not agree else Route.INLINE
    return Verdict(otherwise if why else Route.SHM, why, offers[0].src, offers[0].plane, holds_raw, agree)


def _difference(offers: list[Offer]) -> str:
    """What keeps this group off shared memory; the same text on every rank."""
    for rank, offer in enumerate(offers):
        if offer.disabled:
            return f"SHMCAST_DISABLE is set on rank {rank}"
        if offer.settings != offers[0].settings:
            return f"rank {rank} was made with other settings than rank 0: {offer.shown}, not {offers[0].shown}"
        if offer.trouble:
            return f"rank {rank} has no shared memory: {offer.trouble}"
    return ""
