"""`new`, `check` and `doctor`: what an author meets first."""

import argparse
import json
import os
import subprocess
import sys

import pytest

from trl_ext import ConfigError
from trl_ext.catalog import declaration
from trl_ext.cli import check, doctor, new
from trl_ext.testing import conformance
from trl_ext_hooks import Plugin, hookimpl


def arguments(command, *argv):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture
def package(tmp_path):
    return new.scaffold("my-method", tmp_path / "package")


def test_the_scaffold_installs_and_its_tests_pass(package, tmp_path):
    """A real install into a folder of its own; then its own tests, and its name works like a built-in's."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*pip, str(package)], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "2 passed" in tests.stdout, tests.stdout[-2000:]
    code = "from trl_ext import registry; print(registry.resolve({'my_method': {'eps': 0.1}})[0].origin)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "trl-ext-my-method"


def test_new_refuses_bad_names_and_used_folders(package, tmp_path):
    with pytest.raises(ConfigError, match="cannot be a plugin name"):
        new.scaffold("My Method", tmp_path / "other")
    with pytest.raises(ConfigError, match="is a built-in plugin"):
        new.scaffold("gdpo", tmp_path / "other")
    with pytest.raises(ConfigError, match="is not empty"):
        new.scaffold("my-method", package)


def test_check_reports_every_check(package, capsys):
    file = str(package / "trl_ext_my_method.py")
    assert check.run(arguments(check, "--plugin", file, "--set", "my-method.eps=1e-3", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report) == 6 and all(entry["passed"] for entry in report)


def test_check_finds_what_an_author_cannot_see(plugin, tmp_path):
    """A plugin whose numbers depend on the clock of the process, and one that draws from the shared generator."""
    import torch
    from transformers import TrainerCallback

    class Drifting(Plugin):
        name = "drifting"
        trainers = ("grpo",)
        rounds = 0.0

        @hookimpl
        def advantages(self, round):
            type(self).rounds += 0.5  # on the class: neither fresh for each trainer nor in the checkpoint
            return round.advantages * type(self).rounds

        @hookimpl
        def rollout(self, prompts, generate):
            return generate(prompts)

    class Draws(Plugin):
        name = "draws"
        trainers = ("grpo",)

        @hookimpl
        def setup(self, trainer):
            class Draw(TrainerCallback):
                def on_train_begin(self, *args, **kwargs):
                    torch.rand(1)

            trainer.add_callback(Draw())

    failed = [entry.name for entry in conformance(plugin(Drifting), tmp_path / "a") if not entry.passed]
    assert failed == [
        "grpo: the same run gives the same numbers",
        "grpo: a resumed run ends where an uninterrupted one does",
    ]
    failed = [entry.name for entry in conformance(plugin(Draws), tmp_path / "b") if not entry.passed]
    assert failed[0] == "grpo: setting it up leaves the random stream alone"


def test_check_says_why_a_plugin_cannot_be_loaded(tmp_path):
    (report,) = conformance(str(tmp_path / "missing.py"), tmp_path)
    assert not report.passed and "does not exist" in report.detail


def test_doctor_knows_this_machine(capsys):
    assert doctor.run(arguments(doctor, "--json")) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["problems"] == []
    assert set(findings["trainers"]) == set(declaration.KINDS)
    assert findings["versions"]["trl"]
    assert doctor.run(arguments(doctor)) == 0
    assert "ready to train" in capsys.readouterr().out


def test_doctor_names_a_missing_seam(monkeypatch, capsys):
    from trl_ext.trl_internals import seams

    monkeypatch.delattr(seams.trainer_class("grpo"), "_calculate_rewards")
    assert doctor.run(arguments(doctor)) == 1
    assert "GRPOTrainer._calculate_rewards is missing" in capsys.readouterr().out
