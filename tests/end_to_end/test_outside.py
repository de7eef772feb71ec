"""A plugin of somebody else: a package of its own, really installed, found by name and trained with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes

ROOT = Path(__file__).parents[2]
SOURCES = [str(ROOT), str(ROOT / "hooks"), str(ROOT / "plugins")]

PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "acme-methods"
version = "0.7"

[project.entry-points.trl_ext]
half-step = "acme_methods:HalfStep"

[tool.setuptools]
py-modules = ["acme_methods"]
"""

METHOD = """\
from dataclasses import dataclass

from trl_ext_hooks import Plugin, hookimpl, option


@dataclass(frozen=True)
class HalfStepOptions:
    factor: float = option(0.5, help="what advantages are multiplied by")


class HalfStep(Plugin):
    name = "half-step"
    summary = "halves every advantage"
    trainers = ("grpo", "rloo")
    Options = HalfStepOptions

    @hookimpl
    def advantages(self, round):
        return self.options.factor * round.advantages
"""

TRAIN = """\
import sys
import trl_ext
from trl_ext.testing import tiny_trainer

assert not [name for name in sys.modules if name.startswith("acme")]
with trl_ext.enable("gdpo", "half-step", half_step={"factor": 0.25}) as handle:
    spec = handle.specs[1]
    assert (spec.origin, spec.version) == ("acme-methods", "0.7"), spec
    trainer = tiny_trainer("grpo", sys.argv[1], sys.argv[2])
    trainer.train()
    change = trainer.state.log_history[0]["half-step/advantage_change"]
    plain = trainer.state.log_history[0]["gdpo/advantage_change"]
    assert change > 0.1, change
print("trained", trainer.state.global_step)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "acme_methods.py").write_text(METHOD)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    done = processes.run(command)
    assert done.returncode == 0, done.stderr
    return target


def run(site: Path | None, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([*([str(site)] if site else []), *SOURCES, os.environ.get("PYTHONPATH", "")])
    return processes.run([sys.executable, "-c", code, *arguments], env={**os.environ, "PYTHONPATH": path})


@pytest.mark.slow
def test_an_installed_package_trains_by_name(installed: Path, model: str, tmp_path: Path) -> None:
    done = run(installed, TRAIN, model, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert "trained 2" in done.stdout


def test_installing_it_changes_nothing_by_itself(installed: Path) -> None:
    listed = (
        "from trl_ext.catalog import find; import sys; print(sorted(find.outside()), 'acme_methods' in sys.modules)"
    )
    assert run(installed, listed).stdout.strip() == "['half-step'] False"
    assert run(None, listed).stdout.strip() == "[] False"
