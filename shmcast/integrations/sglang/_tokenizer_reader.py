"""The tokenizer's messages at a scheduler rank: opened, and at the entry rank hashed while their request is held."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from shmcast._sent import describe
from shmcast._wire import Handle
from shmcast.integrations.sglang._tickets import RawTicket

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcast.integrations.sglang._release import Release
    from shmcast.transport import Reader

log = logging.getLogger("shmcast")


class TokenizerReader:
    """Safe to use from any thread.

    Args:
        reader: of the tokenizer's writer.
        release: of SGLang.
        make: the release's maker.
    """

    def __init__(self, reader: Reader, release: Release, make: Callable[[Any], Any]) -> None:
        self.reader = reader
        self._release = release
        self._make = make
        self._opening = threading.Lock()

    def open(self, ticket: RawTicket) -> None:
        """Have `ticket.raw` on this rank, with what the entry rank knows of it; raises what `Reader.open` does."""
        with self._opening:
            if ticket.raw is None:
                ticket.raw = self.reader.open(Handle.parse(ticket.handle))
                self._release.set_identities(ticket.raw, ticket.identities)

    def discard(self, ticket: RawTicket) -> None:
        """Give this rank's lease back, opened or not."""
        with self._opening:
            ticket.raw = None
            self.reader.discard(Handle.parse(ticket.handle))

    def prepare_all(self, raws: list[Any], make_all: Callable[[list[Any]], list[Any]]) -> list[Any] | None:
        """What an `Admission` runs in place of `make_all`: None where nothing but tickets' inputs was to be made."""
        for raw in raws:
            if isinstance(raw, RawTicket):
                self._prepare(raw)
        own = [None if isinstance(raw, RawTicket) else raw for raw in raws]
        return None if all(raw is None for raw in own) else make_all(own)

    def _prepare(self, ticket: RawTicket) -> None:
        """Hash, so that no rank has to. Without it each does, and a bad request fails there as in stock."""
        if ticket.known:
            return
        try:
            self.open(ticket)
            raw = ticket.raw
            ticket.identities = self._release.identities(raw, self._make(raw))
        except Exception as error:
            log.debug("inputs of a request that each rank makes for itself: %s", describe(error))
