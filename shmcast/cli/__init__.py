"""The command line. Commands import torch and numpy when they run, not before; `doctor` and `gc` never do."""

from __future__ import annotations

import click

from shmcast.cli.bench import bench
from shmcast.cli.demo import demo
from shmcast.cli.doctor import doctor
from shmcast.cli.gc import gc
from shmcast.cli.top import top


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="shmcast")
def command_line() -> None:
    """Multimodal inputs for every rank of a machine, through shared memory."""


command_line.add_command(bench)
command_line.add_command(demo)
command_line.add_command(doctor)
command_line.add_command(gc)
command_line.add_command(top)
