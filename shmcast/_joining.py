"""How a group begins: every rank says what it was made with, then whether it can map; all conclude the same.

Two exchanges, in which every rank takes part whatever its settings or errors, so that none waits for one that raised.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from shmcast._codec import Allow
from shmcast._layout import NEVER, VERSION
from shmcast._points import nowhere
from shmcast._segment import isolation_of
from shmcast._wire import Address
from shmcast.errors import LayoutError, ShmcastError
from shmcast.policy import Policy, Route, read_environment
from shmcast.transport import Reader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shmcast._control import GroupControl
    from shmcast._points import Reached
    from shmcast._segment import Isolation

TEXT = 400
MAX_TIMEOUT = 30 * 86400.0


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
        address: of its writer, in hexadecimal, where it has one.
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
            fields = json.loads(raw.decode())
            offer = cls(**fields)
        except (ValueError, TypeError, RecursionError) as error:
            raise LayoutError(
                f"this is no offer of shmcast: {error}; run one version, and the same calls, on all"
            ) from error
        if any(type(value) is not type(getattr(cls, name)) for name, value in asdict(offer).items()):
            raise LayoutError(f"this is no offer of shmcast: {fields}; run one version, and the same calls, on all")
        if not 0 <= offer.plane <= NEVER:
            raise LayoutError(f"another rank names control plane {offer.plane:#x}, which fits in no header")
        return offer


class Settings(NamedTuple):
    """What one rank was made with."""

    src: int
    capacity: int | None
    isolation: Isolation | None
    control: str
    policy: Policy
    allow: Any  # checked here: an iterable of classes and package names, then a tuple
    timeout: float
    reached: Reached = nowhere
    disabled: bool = False
    pin: bool = False

    def check(self, size: int) -> Settings:
        """These settings with those of the environment, for a group of `size`; `ValueError` and `TypeError` else."""
        if self.control not in ("group", "ring"):
            raise ValueError(f"control={self.control!r}: 'group' or 'ring'")
        isolation_of(self.isolation, pin=self.pin)
        if not 0 <= self.src < size:
            raise ValueError(f"src={self.src}: a rank of the group, 0 to {size - 1}")
        if not isinstance(self.policy, Policy):
            raise TypeError(f"policy={self.policy!r}: a Policy")
        if not 0 < self.timeout < MAX_TIMEOUT:
            raise ValueError(f"timeout={self.timeout}: seconds, more than none and less than a month")
        if self.control == "ring":
            check_ring(self.policy)
        Allow(self.allow)
        environment = read_environment()
        policy = self.policy
        if environment.inline_max is not None:
            policy = replace(policy, inline_max=environment.inline_max)
        capacity = environment.capacity if self.capacity is None else self.capacity
        return self._replace(capacity=capacity, policy=policy, allow=tuple(self.allow), disabled=environment.disabled)

    def offer(self, **others: int | str) -> Offer:
        """What this rank says first. `others`: more that must be equal on all ranks."""
        digest, shown = settings_of(self.policy, self.allow, src=self.src, control=self.control, **others)
        holds, agree = self.policy.peers_hold_raw, self.policy.agree
        return Offer(digest, shown, self.src, secrets.randbits(64), holds, agree, self.disabled)


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


def settings_of(policy: Policy, allow: Sequence[type | str], **others: int | str) -> tuple[str, str]:
    """Digest and short text of what must be equal on all ranks."""
    names = sorted(item if isinstance(item, str) else f"{item.__module__}.{item.__qualname__}" for item in allow)
    policy_fields = asdict(replace(policy, route=Route(policy.route).value)) | {"route": Route(policy.route).value}
    shown = json.dumps({"version": VERSION, **others, **policy_fields, "allow": names}, sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest(), shown


def check_ring(policy: Policy) -> None:
    """Raise `ValueError` for a policy that takes collectives, which neither a ring nor spread work has."""
    if policy.route in (Route.INLINE, Route.PICKLE) or policy.agree:
        asked = "agree=True" if policy.agree else f"route={Route(policy.route).value!r}"
        raise ValueError(f"Policy({asked}) takes collectives: only control='group' with one entry rank has them")


def patience(timeout: object, default: float) -> float:
    """The timeout of the first exchanges: one that is wrong is said in them, for which it takes one that is right."""
    return float(timeout) if isinstance(timeout, (int, float)) and 0 < timeout < MAX_TIMEOUT else default


def attach(address: str, rank: int, src: int, settings: Settings) -> Reader:
    """The reader of rank `rank` on the writer of rank `src`, from the address in its offer."""
    writer = Address.parse(bytes.fromhex(address))
    return Reader(
        writer,
        rank - (rank > src),
        isolation=settings.isolation,
        allow=settings.allow,
        pin=settings.pin,
        reached=settings.reached,
    )


def join(control: GroupControl, offer: Offer, attach: Callable[[list[Offer]], str]) -> Verdict:
    """Exchange offers, then let `attach` map the writers' segments; it returns what went wrong, or nothing.

    Raises `ShmcastError` where another rank's arguments are wrong.
    """
    offers = [_parse(rank, raw) for rank, raw in enumerate(control.exchange(bytes(offer)))]
    for rank, other in enumerate(offers):
        if other.wrong:
            raise ShmcastError(f"rank {rank} was made with wrong arguments: {other.wrong}")
        if not 0 <= other.src < len(offers):
            raise LayoutError(f"rank {rank} names entry rank {other.src} in a group of {len(offers)}")
    why = _difference(offers)
    if not why:
        trouble = attach(offers)
        troubles = [
            raw.decode("utf-8", "replace") for raw in control.exchange(trouble[:TEXT].encode("utf-8", "replace"))
        ]
        why = next((f"rank {rank} cannot map: {text}" for rank, text in enumerate(troubles) if text), "")
    holds_raw, agree = all(o.holds_raw for o in offers), any(o.agree for o in offers)
    otherwise = Route.LOCAL if holds_raw and not agree else Route.INLINE
    return Verdict(otherwise if why else Route.SHM, why, offers[0].src, offers[0].plane, holds_raw, agree)


def _parse(rank: int, raw: bytes) -> Offer:
    try:
        return Offer.parse(raw)
    except LayoutError as error:
        raise LayoutError(f"rank {rank} of the group: {error}") from error


def _difference(offers: list[Offer]) -> str:
    """What keeps this group off shared memory; the same text on every rank."""
    for rank, offer in enumerate(offers):
        if offer.disabled:
            return f"SHMCAST_DISABLE is set on rank {rank}: unset it there to have shared memory"
        if offer.settings != offers[0].settings:
            differ = f"{offer.shown}, not {offers[0].shown}"
            return f"rank {rank} was made with other settings than rank 0, pass the same on all: {differ}"
        if offer.trouble:
            return f"rank {rank} has no shared memory: {offer.trouble}"
    return ""
