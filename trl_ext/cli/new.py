"""`trl_ext new`: an installable package with a working plugin, its tests and its entry point."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from packaging.version import Version

_NAME = r"[a-z][a-z0-9]*(-[a-z0-9]+)*"
_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "trl-ext-{name}"
version = "0.1.0"
description = "The method {name} as a plugin of trl_ext"
requires-python = ">=3.11"
dependencies = ["trl_ext>={oldest},<{next}"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.trl_ext]
{name} = "{module}:{cls}"

[tool.setuptools]
py-modules = ["{module}"]
"""

_MODULE = '''\
"""{cls}: one sentence on what the method changes against GRPO, and where it is published.

Stages: advantages. Differences from the authors' code: none known.
"""

from dataclasses import dataclass

import torch
from trl_ext_hooks import Plugin, Round, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_normalize


def {function}_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, eps: float) -> torch.Tensor:
    """Formula 1: (r - mean of the group) / (std of the group + eps).

    Args:
        rewards: (N,) r, NaN = no reward applies.
        group_ids: (N,).

    Returns:
        (N,); 0 for groups in which all rewards are equal and for rows without a reward.
    """
    return torch.nan_to_num(group_normalize(rewards, group_ids, eps=eps))


class {cls}(Plugin):
    name = "{name}"
    paper = "arXiv 0000.00000"
    summary = "what it does, in one line"
    trainers = ("grpo",)
    claims = ("estimator",)

    @dataclass(frozen=True)
    class Options:
        eps: float = option(1e-4, gt=0, help="added to the standard deviation of a group", source="TRL")

    options: Options

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        return {function}_advantages(round.total_reward, round.group_ids, self.options.eps)
'''

_TEST = """\
import torch
from trl_ext.testing import conformance

import {module}


def test_advantages_of_a_group_add_up_to_zero():
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.1, 0.1, 0.1])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages = {module}.{function}_advantages(rewards, groups, eps=1e-4)
    assert abs(advantages[:3].sum()) < 1e-5
    assert (advantages[3:] == 0).all()


def test_conformance(tmp_path):
    checks = conformance("{module}:{cls}", tmp_path)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
"""

_README = """\
# trl-ext-{name}

    pip install -e '.[test]'
    trl_ext show {name}
    trl_ext train --plugin {name}

or, in a TRL script: `import trl_ext; trl_ext.enable("{name}")`.

## Tests

    python -m pytest
    trl_ext check --plugin {name}

The tests compare the formula of `{module}.py` with numbers made by hand, and train a tiny model with the plugin in
seconds on a CPU. Change the numbers together with the formula. `trl_ext check` prints a line for each check of the
second test.

`pyproject.toml` asks for `trl_ext>={oldest},<{next}`. Raise the upper bound when the tests pass on the next release.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = (
        "Writes a package with one working plugin, its tests and its entry point. The\n"
        "plugin computes advantages as GRPO does: put your own formula into its pure\n"
        "function and run the tests."
    )
    parser.epilog = "example:\n  trl_ext new my-method --folder my-method"
    parser.add_argument("name", help="name of the method: lower-case words joined by hyphens")
    parser.add_argument("--folder", help="where to write it (default: ./trl-ext-NAME)")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    folder = scaffold(args.name, args.folder)
    print(f"wrote {folder}\n\nnext:\n  pip install -e {shlex.quote(f'{folder}[test]')}")
    print(f"  python -m pytest {shlex.quote(str(folder))}\n  trl_ext check --plugin {args.name}")
    return 0


def scaffold(name: str, folder: str | Path | None = None) -> Path:
    """Writes the package and returns its folder.

    Args:
        name: Name of the method.
        folder: Where to write, by default `trl-ext-NAME`.

    Raises:
        ConfigError: The name is malformed or taken, or the folder is not empty.
    """
    from .._version import __version__
    from ..catalog import builtins
    from ..errors import ConfigError

    if not re.fullmatch(_NAME, name):
        better = re.sub(r"[^a-z0-9]+", "-", name.lower()).lstrip("-0123456789").rstrip("-")
        hint = f", such as {better!r}" if re.fullmatch(_NAME, better) else ""
        raise ConfigError(f"{name!r} cannot be a plugin name; use lower-case words joined by hyphens{hint}.")
    if name in builtins.BUILTINS:
        raise ConfigError(f"{name!r} is a built-in plugin; choose another name.")
    target = Path(folder or f"trl-ext-{name}")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; choose another --folder.")
    function = name.replace("-", "_")
    module = f"trl_ext_{function}"
    cls = "".join(word.capitalize() for word in name.split("-"))
    files = {
        "pyproject.toml": _PYPROJECT,
        f"{module}.py": _MODULE,
        f"tests/test_{function}.py": _TEST,
        "README.md": _README,
    }
    for path, template in files.items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        names = {"name": name, "module": module, "cls": cls, "function": function}
        file.write_text(template.format(**names, oldest=__version__, next=next_breaking(__version__)))
    return target


def next_breaking(version: str) -> str:
    """Returns the next version that may break the contract: `0.1.0` -> `0.2`, `1.4.2` -> `2`."""
    major, minor, *_ = Version(version).release
    return f"{major + 1}" if major else f"0.{minor + 1}"
