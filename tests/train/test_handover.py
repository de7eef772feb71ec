"""What the parent process hands over is what its workers get, options included, and nothing is checked twice."""

import dataclasses

import pytest

from tests import processes
from trl_ext.catalog import options
from trl_ext.train import command_line, handover

METHOD = """
from dataclasses import dataclass
from trl_ext_hooks import Plugin, hookimpl, option

@dataclass(frozen=True)
class Inner:
    target: str = option(help="a name")

class Method(Plugin):
    name, trainers = "method", ("grpo",)

    @dataclass(frozen=True)
    class Options:
        rate: float = option(0.5, gt=0, help="a number")
        inner: tuple[Inner, ...] = option((), help="nested")

    @hookimpl
    def advantages(self, round):
        return round.advantages
"""


def understood(*argv):
    args, rest = command_line.Parser().parse_known_args([*map(str, argv)])
    return command_line.understand(args, rest)


@pytest.fixture
def method(tmp_path):
    """The path of a plugin file."""
    file = tmp_path / "method.py"
    file.write_text(METHOD)
    return file


def test_a_worker_gets_the_request_of_the_parent(config, method, tmp_path, monkeypatch):
    path = config(plugins={str(method): {"rate": 0.25, "inner": [{"target": "a"}]}})
    argv = ["--plugin", "gdpo", "--set", "gdpo.group_eps=0.1", "--config", path, "--beta", "0.1"]
    request = understood(*argv, "--inspect", 3, "--no_save", "--no_reward_check")
    file = handover.write(request, tmp_path)
    monkeypatch.setattr(options, "build", lambda *_: pytest.fail("options are built once"))
    same = handover.read(file)
    assert same == request
    assert (same.inspect, same.save, same.check_rewards) == (3, False, False)
    assert [spec.cls.name for spec in same.specs] == ["method", "gdpo"]
    assert same.specs[0].options.inner[0].target == "a"


def test_another_process_loads_the_plugin_file_itself(method, tmp_path):
    file = handover.write(understood("--plugin", method, "--set", "method.rate=0.25"), tmp_path)
    code = (
        "import sys; from pathlib import Path; from trl_ext.train import handover\n"
        f"spec, = handover.read(Path({str(file)!r})).specs\n"
        "print(spec.name, spec.options.rate, type(spec.options) is spec.cls.Options)"
    )
    done = processes.run_python(code, check=True)
    assert done.stdout.split() == ["method", "0.25", "True"]


def test_the_request_says_what_to_do_by_default():
    request = understood("--plugin", "gdpo")
    assert dataclasses.replace(request, plugins={}, specs=()) == command_line.Request(
        {}, (), "grpo", None, {}, [], check_rewards=True, inspect=None, save=True
    )
