"""The command `shmcast`, also as `python -m shmcast`."""

from __future__ import annotations

import sys

_EXTRA = {"click": "click", "rich": "rich", "PIL": "pillow"}


def main() -> None:
    """Run the command line; without the packages that it needs, say how to get them and exit with status 1."""
    try:
        from shmcast.cli import command_line

        command_line(prog_name="shmcast")
    except ModuleNotFoundError as error:
        package = _EXTRA.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        sys.exit(f"shmcast: the command line needs {package}, which is not installed: pip install 'shmcast[cli]'")


if __name__ == "__main__":
    main()
