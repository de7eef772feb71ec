"""`trl_ext new`: a package that installs, and whose tests pass."""

import os
import sys

import pytest

from tests import processes
from trl_ext import ConfigError
from trl_ext.cli import new


def test_the_scaffold_installs_and_its_tests_pass(package, tmp_path):
    """A real install into a folder of its own; then its own tests, and its name works like a built-in's."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    processes.run([*pip, str(package)], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package)]
    tests = processes.run(command, env=environment, cwd=tmp_path)
    assert "2 passed" in tests.stdout, tests.stdout[-2000:]
    code = "from trl_ext.catalog.find import resolve; print(resolve({'my_method': {'eps': 0.1}})[0].origin)"
    shown = processes.run([sys.executable, "-c", code], env=environment, check=True)
    assert shown.stdout.strip() == "trl-ext-my-method"


def test_new_refuses_bad_names_and_used_folders(package, tmp_path):
    with pytest.raises(ConfigError, match="cannot be a plugin name"):
        new.scaffold("My Method", tmp_path / "other")
    with pytest.raises(ConfigError, match="is a built-in plugin"):
        new.scaffold("gdpo", tmp_path / "other")
    with pytest.raises(ConfigError, match="is not empty"):
        new.scaffold("my-method", package)
