"""A whole run as a YAML file: `--write_config` writes it, and `--config` makes the same run of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..support.files import write_atomically
from ..support.json_schema import plain
from ..trl_internals import launch as trl_launch
from . import command_line
from .command_line import Request

_HEADER = """\
# Written by `trl_ext train --write_config`. This repeats the run:
#   trl_ext train --config {file}
"""


def write(file: str, request: Request, divided: trl_launch.Split) -> None:
    """Writes the run that was asked for into a file that does not exist yet.

    Raises:
        ConfigError: The file exists, its folder does not, or a value cannot be written as YAML.
    """
    path = Path(file)
    if path.exists():
        raise ConfigError(f"--write_config {file}: the file exists. Name another one, or remove it.")
    if not path.parent.is_dir():
        raise ConfigError(f"--write_config {file}: there is no folder {str(path.parent)!r} (looked in {os.getcwd()}).")
    text = yaml.safe_dump(content(request, divided), sort_keys=False, allow_unicode=True, width=100)
    write_atomically(path, _HEADER.format(file=file) + text)
    command_line.say(f"wrote the run into {file}")


def content(request: Request, divided: trl_launch.Split) -> dict[str, Any]:
    """Returns the keys of the file: what was asked for in the YAML file and on the command line.

    Settings that nobody asked for stay out, so that the defaults of a machine and of the embedded demo stay theirs.
    """
    values: dict[str, Any] = {"env": request.environment} if request.environment else {}
    values |= divided.given | trl_launch.given_options(divided.launch) | request.own
    # a file that the task names was looked for beside the YAML file, and this one may be written elsewhere
    experiment = request.experiment | ({"task": request.task} if request.task else {})
    if experiment:
        values["experiment"] = experiment
    if request.plugins:
        values["plugins"] = request.plugins
    written = {name: plain(value) for name, value in values.items()}
    for name, value in written.items():
        if value is dataclasses.MISSING:
            raise ConfigError(f"--write_config: {name}={values[name]!r} cannot be written as YAML.")
    return written
