"""What of SGLang's modules is replaced, and put back. All targets are looked at before the first is replaced."""

from __future__ import annotations

import functools
import importlib
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from shmcast.integrations.sglang._gate import Gate
from shmcast.integrations.sglang._joining import ADDRESS
from shmcast.integrations.sglang._release import unlike
from shmcast.integrations.sglang._tokenizer import Target, close_writers, find_targets

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmcast.integrations.sglang._link import Link
    from shmcast.integrations.sglang._release import Release
    from shmcast.integrations.sglang._settings import Settings

links: dict[Any, Link] = {}
"""Of the schedulers of this process, until they are closed."""


def replace_targets(release: Release, settings: Settings) -> list[Callable[[], None]]:
    """Replace them; what puts each back."""
    # Who inherits the address was launched, and launches nothing.
    launches = settings.tokenizer and ADDRESS not in os.environ
    targets = find_targets(release, settings) if launches else []
    with suppress(ModuleNotFoundError):
        receiver = importlib.import_module("sglang.srt.managers.scheduler_components.request_receiver")
        if not hasattr(receiver, "sock_recv"):
            raise unlike("request_receiver has no sock_recv")
        targets.append(Target(receiver, "sock_recv", _receiving))
    targets.append(Target(release.scheduler, "__init__", functools.partial(_linking, release, settings)))
    return [*(_replace(*target) for target in targets), _close_links, close_writers]


def link(scheduler: Any, release: Release, settings: Settings) -> Link:
    """Put shmcast into a scheduler. Every rank of its world, at the same point."""
    from shmcast.integrations.sglang._link import Link

    links[scheduler] = made = Link(scheduler, release, settings)
    return made


def _linking(release: Release, settings: Settings, stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def init(scheduler: Any, *args: Any, **kwargs: Any) -> None:
        stock(scheduler, *args, **kwargs)
        link(scheduler, release, settings)

    return init


def _receiving(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def receive(socket: Any, flags: int = 0) -> Any:
        return socket.recv_pyobj(flags) if isinstance(socket, Gate) else stock(socket, flags)

    return receive


def _replace(owner: Any, name: str, wrapped: Callable[[Any], Any]) -> Callable[[], None]:
    stock = vars(owner)[name]
    setattr(owner, name, wrapped(stock))
    return lambda: setattr(owner, name, stock)


def _close_links() -> None:
    for scheduler in list(links):
        links.pop(scheduler).close()
