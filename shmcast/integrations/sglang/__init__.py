"""shmcast inside SGLang's schedulers: multimodal inputs are made once a replica, and mapped by its ranks.

From SGLang 0.5.12 on, `SHMCAST_SGLANG=1` in the server's environment is all: SGLang finds `plugin` by its entry point.
Before, start the server with `python -m shmcast.integrations.sglang.launch`. docs/integrations.md tells the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_undo: list[Callable[[], None]] = []


def plugin() -> None:
    """The entry point in `sglang.srt.plugins`: `install`, if `SHMCAST_SGLANG=1`; else nothing at all."""
    from shmcast.integrations.sglang._settings import read_settings

    if read_settings().on:
        install()


def install() -> None:
    """Have every scheduler that this process makes share its requests' inputs. Done once; again: nothing.

    Raises:
        Unsupported: this SGLang looks different. Nothing of it was replaced.
        ValueError: a setting in the environment is wrong.
    """
    if _undo:
        return
    from shmcast.integrations.sglang._install import replace_targets
    from shmcast.integrations.sglang._release import find_release
    from shmcast.integrations.sglang._settings import read_settings

    _undo.extend(replace_targets(find_release(), read_settings()))


def run_scheduler_process(*args: Any, **kwargs: Any) -> Any:
    """What an `Engine` of a release before 0.5.12 runs in its scheduler processes, with `install` before it.

    `class Engine(sglang.Engine): run_scheduler_process_func = staticmethod(run_scheduler_process)`
    """
    install()
    from sglang.srt.managers.scheduler import run_scheduler_process as stock

    return stock(*args, **kwargs)


def uninstall() -> None:
    """Give SGLang's classes their own methods back, and the schedulers of this process theirs."""
    while _undo:
        _undo.pop()()


__all__ = ["install", "plugin", "run_scheduler_process", "uninstall"]
