"""The tokenizer's end, in the launcher's process: raw inputs go into shared memory, and a carrier to the schedulers.

    launch -> Writer, its address in the environment -> each scheduler rank: a Reader
    send -> raw inputs published -> carrier in the request -> ZMQ -> Gate

Where it does not fit, or there is no room, a request goes as in stock.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch

from shmcast._sent import describe
from shmcast.errors import ArenaFull, ClosedError
from shmcast.integrations.sglang._joining import ADDRESS, ALLOW
from shmcast.integrations.sglang._release import check_method, unlike
from shmcast.integrations.sglang._replicas import Replicas, replicas_of, resolved
from shmcast.integrations.sglang._settings import is_on
from shmcast.integrations.sglang._staging import Staging
from shmcast.integrations.sglang._tickets import carrier_of
from shmcast.metrics import Counters, merge
from shmcast.policy import Policy
from shmcast.transport import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from shmcast._wire import Handle
    from shmcast.integrations.sglang._release import Release
    from shmcast.integrations.sglang._settings import Settings
    from shmcast.metrics import Stats

FIRST_BYTES: Final = 120 << 20
"""Of the requests that find memory at once; twice as much is made for them."""

log = logging.getLogger("shmcast")

writers: WeakKeyDictionary[Any, TokenizerWriter] = WeakKeyDictionary()
"""Of the tokenizer managers of this process."""


class Target(NamedTuple):
    """An attribute to replace, and what makes the new value of the old one."""

    owner: Any
    name: str
    wrap: Callable[[Any], Any]


class _Lent(NamedTuple):
    """A request with a carrier in it, and what it had before."""

    request: Any
    raw: Any
    named: int | None
    handle: Handle


class TokenizerWriter:
    """Publishes the raw inputs of one tokenizer manager's requests. For its event loop's thread alone.

    Raises:
        ArenaFull: there is no shared memory to be had.
        OSError: the system refuses it.
    """

    def __init__(self, replicas: Replicas, release: Release, settings: Settings) -> None:
        # The thread that publishes serves all requests: it never waits for room.
        policy = Policy(wait=0)
        self.writer = Writer(replicas.count * replicas.ranks, capacity=settings.capacity, allow=ALLOW, policy=policy)
        # Now, and not while the first request waits; schedulers map it when they attach.
        with suppress(ArenaFull):
            self.writer.empty((FIRST_BYTES,), torch.uint8)
        self._replicas = replicas
        self._turn = 0
        self._release = release
        self._staging = Staging(self.writer, release)
        self._counters = Counters()
        self.writer.count(self._counters)

    @property
    def address(self) -> str:
        """What the schedulers inherit."""
        return f"{bytes(self.writer.address).hex()}:{self._replicas.ranks}"

    @contextmanager
    def lending(self, requests: Iterable[Any]) -> Iterator[None]:
        """Put carriers into these requests while they are sent. Where sending raises, all is as before."""
        lent: list[_Lent] = []
        try:
            for request in requests:
                self._lend(request, lent)
            yield
        except BaseException:
            for request, raw, named, handle in lent:
                self.writer.withdraw(handle)
                self._release.set_raw(request, raw)
                if self._replicas.count > 1:
                    self._release.set_replica(request, named)
            raise

    def leave_batch(self, requests: Iterable[Any]) -> bool:
        """Whether requests that are sent as one go as in stock: several replicas may get each of them."""
        if self._replicas.count == 1 or self._release.splits_batches:
            return False
        if any(self._release.raw_of(request) is not None for request in requests):
            self._fallback("replica", "batches do not go to one replica in this release")
        return True

    def stats(self) -> Stats:
        """Of its memory, and how many requests went as in stock, by reason."""
        return merge(self._counters.stats(), self.writer.stats())

    def close(self) -> None:
        """Requests go as in stock from now on."""
        self._staging.close()
        self.writer.close()

    def _lend(self, request: Any, lent: list[_Lent]) -> None:
        """Put a carrier into this request, or leave it as it is: then it goes as in stock."""
        raw = self._release.raw_of(request)
        if raw is None or not self._release.items(raw):
            return
        named = self._release.replica_of(request)
        replica = self._choose(named)
        handle = None if replica is None else self._publish(raw, replica)
        if replica is None or handle is None:
            return
        lent.append(_Lent(request, raw, named, handle))
        payload = carrier_of(handle, known=self._release.is_hashed(raw))
        self._release.set_raw(request, self._release.carrier(payload))
        if named is None and self._replicas.count > 1:
            self._release.set_replica(request, replica)
            self._turn = replica + 1

    def _choose(self, named: int | None) -> int | None:
        """The replica that a request goes to: the one it names, or whose turn it is. None: that cannot be said here."""
        count = self._replicas.count
        missing = self._missing()
        if missing is None:
            return None
        turns = [(self._turn + number) % count for number in range(count)]
        if count > 1 and named is not None:
            if not self._replicas.readers(named):
                self._fallback("replica", f"a request names replica {named} of {count}")
                return None
            turns = [named]
        elif count > 1 and self._replicas.choosing:
            self._fallback("replica", f"the controller chooses where a request names none: {self._replicas.choosing}")
            return None
        for replica in turns:
            if missing.isdisjoint(self._replicas.readers(replica)):
                return replica
        self._fallback("readers", f"of the scheduler ranks, {sorted(missing)} did not attach, or are gone")
        return None

    def _publish(self, raw: Any, replica: int) -> Handle | None:
        """None: there is no room, or these inputs cannot travel so."""
        readers = self._replicas.readers(replica)
        try:
            if not self._release.can_hold(raw):
                return None
            try:
                return self.writer.publish(self._staging.stage(raw), readers=readers)
            except ArenaFull:
                if not self._staging.clear():
                    raise
                return self.writer.publish(self._staging.stage(raw), readers=readers)
        except Exception as error:
            reason = "full" if isinstance(error, (ArenaFull, OSError)) else "encode"
            self._fallback(reason, describe(error))
            return None

    def _missing(self) -> set[int] | None:
        """The scheduler ranks that are not there; None: this end is closed. Asking takes back what dead ones held."""
        try:
            return {lease.reader for lease in self.writer.stats().leases if not lease.alive}
        except ClosedError:
            return None

    def _fallback(self, reason: str, detail: str) -> None:
        if self._counters.fallback(reason):
            log.warning("tokenizer (%s), said once: requests go as in stock: %s", reason, detail)


def refusal(args: Any, settings: Settings) -> str:
    """Why a server with these resolved arguments cannot have the tokenizer publish, or nothing."""
    replicas = replicas_of(args)
    if not settings.admission:
        return "SHMCAST_SGLANG_ADMISSION=0: the schedulers would not take it in"
    for name, why in (
        ("tokenizer_worker_num", "each tokenizer worker would need memory of its own"),
        ("nnodes", "shared memory ends with the machine"),
    ):
        if getattr(args, name, 1) > 1:
            return f"{name}={getattr(args, name)}: {why}"
    for name, why in (
        ("language_only", "inputs come from encoders, not from the tokenizer"),
        ("encoder_only", "there are no schedulers"),
        ("skip_tokenizer_init", "SGLang sends inputs whole then"),
        ("use_ray", "the schedulers do not inherit the environment"),
    ):
        if getattr(args, name, False):
            return f"{name}: {why}"
    if is_on("SGLANG_RUST_SERVER"):
        return "SGLANG_RUST_SERVER: the tokenizer is not in Python"
    if replicas.count > 1 and getattr(args, "elastic_ep_backend", None):
        return f"elastic_ep_backend={args.elastic_ep_backend}: replicas come and go"
    if replicas.ranks == 1:
        return "one scheduler rank has nobody to share with"
    return ""


def find_targets(release: Release, settings: Settings) -> list[Target]:
    """What to replace in a process that may launch a server; `Unsupported` says what this SGLang lacks."""
    manager = importlib.import_module("sglang.srt.managers.tokenizer_manager").TokenizerManager
    check_method(manager, "_send_one_request", ["self"])
    check_method(manager, "_send_batch_request", ["self"])
    sending = functools.partial(_sending, release)
    targets = [Target(manager, name, sending) for name in ("_send_one_request", "_send_batch_request")]
    launching = functools.partial(_launching, release, settings)
    engine = importlib.import_module("sglang.srt.entrypoints.engine")
    name = "_launch_subprocesses"
    owners = [engine if hasattr(engine, name) else engine.Engine]
    if owners == [engine]:
        # Until 0.5.11 a function, which the HTTP server imports by name; without what that needs there is none.
        with suppress(ImportError):
            owners.append(importlib.import_module("sglang.srt.entrypoints.http_server"))
    for owner in owners:
        check_method(owner, name, [])
        if "server_args" not in inspect.signature(getattr(owner, name)).parameters:
            raise unlike(f"{owner.__name__}.{name} takes no server_args")
    return [*targets, *(Target(owner, name, launching) for owner in owners)]


def close_writers() -> None:
    """Of all tokenizer managers of this process."""
    for manager in list(writers):
        writers.pop(manager).close()


def _launching(release: Release, settings: Settings, stock: Any) -> Any:
    """Make the writer before the schedulers are spawned, and give it to the tokenizer manager that comes of it."""
    if isinstance(stock, classmethod):
        return classmethod(_launching(release, settings, stock.__func__))
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def launch(*args: Any, **kwargs: Any) -> Any:
        server_args = signature.bind(*args, **kwargs).arguments["server_args"]
        end = _open(server_args, release, settings)
        # Empty where there is none: who inherits it is launched, and launches nothing.
        os.environ[ADDRESS] = "" if end is None else end.address
        try:
            launched = stock(*args, **kwargs)
            if end is not None:
                writers[launched[0]] = end
        except BaseException:
            if end is not None:
                end.close()
            raise
        finally:
            del os.environ[ADDRESS]
        return launched

    return launch


def _open(args: Any, release: Release, settings: Settings) -> TokenizerWriter | None:
    if hasattr(args, "resolve_once"):
        args.resolve_once()  # the launch does so next, and would raise the same
    try:
        args = resolved(args)
        why = refusal(args, settings)
        if release.hides_raw:
            why = why or "SGLANG_USE_PICKLE_IPC=0: this release wraps up what the entry rank would have to look at"
        if not why:
            replicas = replicas_of(args)
            end = TokenizerWriter(replicas, release, settings)
            text = "SGLang %s: the tokenizer publishes for %d replicas of %d ranks"
            log.info(text, release.version, replicas.count, replicas.ranks)
            return end
    except Exception as error:
        why = describe(error)
    log.warning("SHMCAST_SGLANG_TOKENIZER=1 has no effect, the tokenizer sends as in stock: %s", why)
    return None


def _sending(release: Release, stock: Callable[..., Any]) -> Callable[..., Any]:
    def lending(manager: Any, args: tuple[Any, ...]) -> Any:
        found = [each for arg in args for each in (arg if isinstance(arg, list) else [arg])]
        requests = [each for each in found if isinstance(each, release.single)]
        as_one = any(isinstance(arg, list) for arg in args)
        end = writers[manager]
        return nullcontext() if as_one and end.leave_batch(requests) else end.lending(requests)

    if inspect.iscoroutinefunction(stock):

        @functools.wraps(stock)
        async def send_async(manager: Any, *args: Any, **kwargs: Any) -> Any:
            if manager not in writers:
                return await stock(manager, *args, **kwargs)
            with lending(manager, (*args, *kwargs.values())):
                return await stock(manager, *args, **kwargs)

        return send_async

    @functools.wraps(stock)
    def send(manager: Any, *args: Any, **kwargs: Any) -> Any:
        if manager not in writers:
            return stock(manager, *args, **kwargs)
        with lending(manager, (*args, *kwargs.values())):
            return stock(manager, *args, **kwargs)

    return send
