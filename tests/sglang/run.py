"""Runs the tests of this folder against releases of SGLang, in an environment of their own: `make test-sglang`.

One release is installed, without its dependencies, most of which are CUDA; the others are unpacked and put before it on
the path, a process each. Where that cannot be done the tests are skipped, and a line says why.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
INSTALLED = "0.5.23"
RELEASES = ("0.5.23", "0.5.20", "0.5.17", "0.5.12", "0.5.9", "0.5.5")
REQUIREMENTS = ROOT / "tests" / "sglang" / "requirements.txt"


class CannotInstall(Exception):
    """An environment with SGLang cannot be made here; the text says why."""


@click.command()
@click.option("--release", "releases", multiple=True, help=f"Default: {', '.join(RELEASES)}.")
@click.option("--environment", type=click.Path(path_type=Path), default=ROOT / ".venv-sglang", show_default=False)
@click.option("--only-install", is_flag=True, help="Make the environment, run nothing.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(releases: tuple[str, ...], environment: Path, only_install: bool, arguments: tuple[str, ...]) -> None:
    """Run the tests with ARGUMENTS for pytest, for each release in turn."""
    wanted = releases or RELEASES
    try:
        _install(environment)
        paths = {release: _unpack(environment, release) for release in wanted}
    except CannotInstall as error:
        click.echo(f"skipped: SGLang cannot be installed here: {error}")
        return
    failed = (
        [] if only_install else [release for release in wanted if not _test(environment, paths[release], arguments)]
    )
    if failed:
        raise click.ClickException(f"failed with SGLang {', '.join(failed)}")


def _install(environment: Path) -> None:
    done = environment / ".setup-done"
    if done.exists() and done.stat().st_mtime >= max(
        REQUIREMENTS.stat().st_mtime, (ROOT / "pyproject.toml").stat().st_mtime
    ):
        return
    click.echo(f"setting up {environment.name}; the first time this takes some minutes and two gigabytes")
    if not (environment / "bin" / "python").exists():
        _run([sys.executable, "-m", "venv", str(environment)])
    pip = _pip(environment)
    _run([*pip, "install", "--constraint", str(ROOT / "constraints.txt"), "torch"])
    _run([*pip, "install", "--no-deps", "--requirement", str(REQUIREMENTS)])
    _run([*pip, "install", "--no-deps", f"sglang=={INSTALLED}", "--editable", str(ROOT)])
    done.touch()


def _unpack(environment: Path, release: str) -> Path | None:
    """A folder with that release in it; None: the one that is installed."""
    if release == INSTALLED:
        return None
    folder = environment / "releases" / release
    if not folder.exists():
        wheels = environment / "wheels"
        _run([*_pip(environment), "download", "--no-deps", "--dest", str(wheels), f"sglang=={release}"])
        (wheel,) = wheels.glob(f"sglang-{release}-*.whl")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder.with_suffix(".part"))
        folder.with_suffix(".part").rename(folder)
    return folder


def _test(environment: Path, path: Path | None, arguments: tuple[str, ...]) -> bool:
    click.echo(f"SGLang {INSTALLED if path is None else path.name}:")
    paths = [str(ROOT), *([] if path is None else [str(path)])]
    command = [str(environment / "bin" / "python"), "-m", "pytest", "tests/sglang", *arguments]
    return not subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}).returncode


def _pip(environment: Path) -> list[str]:
    return [str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]


def _run(command: list[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        said = (ran.stderr or ran.stdout).strip().splitlines() or ["no word why"]
        raise CannotInstall(f"{' '.join(command[-3:])}: {said[-1]}")


if __name__ == "__main__":
    main()
