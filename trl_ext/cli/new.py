"""`trl_ext new`: an installable package with a working plugin, its test and its entry point."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "trl-ext-{name}"
version = "0.1.0"
description = "The method {name} as a plugin of trl_ext"
requires-python = ">=3.11"
dependencies = ["trl_ext"]

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
from trl_ext_hooks.ops import group_normalize


@dataclass(frozen=True)
class {cls}Options:
    eps: float = option(1e-4, help="added to the standard deviation of a group", source="TRL")


def {function}_advantages(rewards: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor, eps: float):
    """Formula 1: (r - mean of the group) / (std of the group + eps), r the weighted sum of the rewards.

    Args:
        rewards: (N, F), NaN = does not apply.
        weights: (F,).
        group_ids: (N,).

    Returns:
        (N,); 0 for groups in which all rewards are equal and for rows without a reward.
    """
    total = (rewards * weights).nansum(dim=1)
    total = torch.where(torch.isnan(rewards).all(dim=1), torch.nan, total)
    return torch.nan_to_num(group_normalize(total, group_ids, eps=eps))


class {cls}(Plugin):
    name = "{name}"
    paper = "arXiv 0000.00000"
    summary = "what it does, in one line"
    trainers = ("grpo",)
    Options = {cls}Options
    claims = ("estimator",)

    @hookimpl
    def advantages(self, round: Round):
        return {function}_advantages(round.rewards, round.reward_weights, round.group_ids, self.options.eps)
'''

_TEST = """\
import torch
from trl_ext.testing import conformance

import {module}


def test_advantages_of_a_group_add_up_to_zero():
    rewards = torch.tensor([[0.0], [1.0], [1.0], [0.1], [0.1], [0.1]])
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    advantages = {module}.{function}_advantages(rewards, torch.ones(1), groups, eps=1e-4)
    assert abs(advantages[:3].sum()) < 1e-5
    assert (advantages[3:] == 0).all()


def test_conformance(tmp_path):
    checks = conformance("{module}:{cls}", tmp_path)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
"""

_README = """\
# trl-ext-{name}

    pip install -e .
    trl_ext show {name}
    trl_ext check --plugin {name}
    trl_ext train --plugin {name}

or, in a TRL script: `import trl_ext; trl_ext.enable("{name}")`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a package with one working plugin (an advantage estimator that equals GRPO's), its tests and its entry "
        "point. Put your formula into the pure function, and run its tests."
    )
    parser.add_argument("name", help="name of the method: lower-case words joined by hyphens")
    parser.add_argument("--folder", help="where to write it (default: ./trl-ext-NAME)")


def run(args: argparse.Namespace) -> int:
    folder = scaffold(args.name, args.folder)
    print(f"wrote {folder}\n\nnext:\n  pip install -e {folder}\n  trl_ext check --plugin {args.name}")
    return 0


def scaffold(name: str, folder: str | Path | None = None) -> Path:
    """Writes the package and returns its folder.

    Raises:
        ConfigError: The name is not usable or taken, or the folder holds something already.
    """
    from ..catalog import builtins
    from ..errors import ConfigError

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigError(f"{name!r} cannot be a plugin name; use words in lower case joined by hyphens.")
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
    for path, text in files.items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(name=name, module=module, cls=cls, function=function))
    return target
