"""`shmcast gc`: removes what dead processes left in /dev/shm, and says of every name of ours what it is."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

import click

from shmcast._reclaim import LEFT_OVER, Found, Verdict, examine, sweep
from shmcast._room import SHM

if TYPE_CHECKING:
    from collections.abc import Iterable

_DONE: Final = {Verdict.DEAD: "would remove", Verdict.REMOVED: "removed", Verdict.FAILED: "NOT REMOVED"}


@click.command()
@click.option("--dry-run", is_flag=True, help="Remove nothing, say what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="One object on standard output, nothing else there.")
def gc(dry_run: bool, as_json: bool) -> None:
    """Remove the shared memory that dead processes of this user left, and nothing else.

    What a living process uses, what is another user's and whatever is in doubt stays; each name is told with the
    reason. A Writer does the same when it is made. Needs neither torch nor numpy.

    Exit status: 0 if nothing of the dead is left over, 1 if something is: with --dry-run, or because it could not be
    removed.
    """
    trouble = _trouble()
    found = examine() if dry_run else sweep()
    if as_json:
        click.echo(json.dumps(_as_object(found, dry_run, trouble)))
    else:
        _tell(found, trouble)
    if trouble or any(each.verdict in LEFT_OVER for each in found):
        raise click.exceptions.Exit(1)


def _trouble() -> str:
    """Why nothing can be said about /dev/shm. Where it is not there at all, nothing can be left in it."""
    try:
        os.scandir(SHM).close()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{SHM}: {error.strerror}"
    return ""


def _as_object(found: Iterable[Found], dry_run: bool, trouble: str) -> dict[str, Any]:
    found = list(found)
    return {
        "folder": SHM,
        "dry_run": dry_run,
        "error": trouble or None,
        "removed_bytes": _nbytes(found, {Verdict.REMOVED}),
        "left_bytes": _nbytes(found, LEFT_OVER),
        "names": [
            {"name": each.name, "bytes": each.nbytes, "verdict": each.verdict.value, "why": each.why} for each in found
        ],
    }


def _tell(found: list[Found], trouble: str) -> None:
    for each in found:
        done = _DONE.get(each.verdict)
        why = each.why if done else f"{each.verdict.value}: {each.why}"
        click.echo(f"{done or 'kept':<12} {each.nbytes:>12}  {each.name}  {why}")
    if trouble:
        click.echo(f"shmcast: {trouble}", err=True)
        return
    gone = [each for each in found if each.verdict is Verdict.REMOVED]
    left = [each for each in found if each.verdict in LEFT_OVER]
    parts = [f"removed {len(gone)} names, {_nbytes(gone, {Verdict.REMOVED})} bytes freed"]
    if left:
        parts.append(f"{len(left)} names of dead processes are left, {_nbytes(left, LEFT_OVER)} bytes")
    parts.append(f"kept {len(found) - len(gone) - len(left)} others")
    click.echo("; ".join(parts))


def _nbytes(found: Iterable[Found], verdicts: Iterable[Verdict]) -> int:
    return sum(each.nbytes for each in found if each.verdict in set(verdicts))
