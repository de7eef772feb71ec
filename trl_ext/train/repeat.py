"""What a run must be asked for to be repeated: written into its record, and read from there."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..support.versions import versions

HIDDEN = "***"


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a YAML file without tokens and `env:`, because output folders are published."""
    return {name: value for name, value in config.items() if name != "env" and not _is_secret(name)}


def without_secrets(command: Sequence[str]) -> list[str]:
    """Returns a command line in which the values of tokens are hidden."""
    hidden: list[str] = []
    for argument in command:
        option, equals, _ = argument.partition("=")
        if hidden and _is_secret(hidden[-1]) and not argument.startswith("--"):
            hidden.append(HIDDEN)
        else:
            hidden.append(f"{option}={HIDDEN}" if equals and _is_secret(option) else argument)
    return hidden


def _is_secret(name: str) -> bool:
    return name.endswith("_token")


def read_record(path: str) -> dict[str, Any]:
    """Returns what the recorded run was asked for, and says which versions are others now.

    Raises:
        ConfigError: The file is not the record of a run, or an old one that does not hold it.
        OSError: The file cannot be read.
    """
    try:
        record = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ConfigError(f"--config {path} is not valid JSON: {error}") from error
    config = record.get("config") if isinstance(record, Mapping) else None
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"--config {path} is JSON without the key `config`, which the record of a run (trl_ext_run.json) holds. "
            f"Name the record of another run, or a YAML file."
        )
    now = versions()
    changed = [
        f"{package} {version} (now {now.get(package)})"
        for package, version in record.get("versions", {}).items()
        if now.get(package) != version
    ]
    if changed:
        print(f"trl_ext: the recorded run used {', '.join(changed)}", file=sys.stderr, flush=True)
    return dict(config)
