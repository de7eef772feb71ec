"""`trl_ext new`: a package that installs, and whose tests pass."""

import os
import sys

import pytest
from packaging.requirements import Requirement

from tests import processes
from trl_ext import ConfigError, __version__
from trl_ext.cli import new


def test_the_scaffold_installs_and_its_tests_pass(package, tmp_path):
    """A real install into a folder of its own; then its own tests, and its name works like a built-in's."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    processes.run([*pip, str(package)], check=True)
    (metadata,) = site.glob("trl_ext_my_method-*/METADATA")
    assert f"Requires-Dist: trl_ext<{new.next_breaking(__version__)},>={__version__}" in metadata.read_text()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(package)]
    tests = processes.run(command, env=environment, cwd=tmp_path)
    assert "2 passed" in tests.stdout, tests.stdout[-2000:]
    code = "from trl_ext.catalog.find import resolve; print(resolve({'my_method': {'eps': 0.1}})[0].origin)"
    shown = processes.run([sys.executable, "-c", code], env=environment, check=True)
    assert shown.stdout.strip() == "trl-ext-my-method"


def test_new_refuses_bad_names_and_used_folders(package, tmp_path):
    for name, better in (("My Method", "my-method"), ("My_Method2", "my-method2"), ("2-fast", "fast")):
        with pytest.raises(ConfigError, match=f"cannot be a plugin name.*, such as '{better}'"):
            new.scaffold(name, tmp_path / "other")
        assert new.scaffold(better, tmp_path / better).is_dir()
    with pytest.raises(ConfigError, match="is a built-in plugin"):
        new.scaffold("gdpo", tmp_path / "other")
    with pytest.raises(ConfigError, match="is not empty"):
        new.scaffold("my-method", package)


@pytest.mark.parametrize(("version", "upper"), [("0.1.0", "0.2"), ("0.9.3", "0.10"), ("1.4.2", "2"), ("2.0.0rc1", "3")])
def test_the_dependency_ends_before_the_next_breaking_version(version, upper):
    assert new.next_breaking(version) == upper
    bounds = Requirement(f"trl_ext>={version},<{upper}").specifier
    assert bounds.contains(version, prereleases=True) and not bounds.contains(f"{upper}.0")


def test_the_readme_says_how_to_test(package):
    readme = (package / "README.md").read_text()
    assert all(
        line in readme for line in ("pip install -e '.[test]'", "python -m pytest", "trl_ext check --plugin my-method")
    )
    assert 'test = ["pytest' in (package / "pyproject.toml").read_text()
