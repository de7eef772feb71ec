"""What `trl_ext` says without training: help, version, plugins and their declarations; and what that costs."""

import json
import subprocess
import sys

import pytest

from trl_ext.catalog import builtins
from trl_ext.cli import main
from trl_ext.support.tables import print_table

LIGHT = """
import sys, time
began = time.perf_counter()
import trl_ext, trl_ext.cli.main
try:
    trl_ext.cli.main.main(["--help"])
except SystemExit:
    pass
seconds = time.perf_counter() - began
heavy = [name for name in ("torch", "trl", "transformers", "accelerate", "datasets", "rich") if name in sys.modules]
print("RESULT", seconds, *heavy)
"""


def test_import_and_help_are_light():
    best = None
    for _ in range(3):  # the best of three, as other processes may keep the machine busy
        done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
        _, seconds, *heavy = done.stdout.splitlines()[-1].split()
        assert heavy == []
        best = min(float(seconds), best or 1e9)
    assert best < 0.5


def test_help_names_every_command_and_gives_examples(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in main.COMMANDS)
    assert "trl_ext train --plugin gdpo" in text


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main([name, "--help"])
    assert stop.value.code == 0
    assert f"trl_ext {name}" in capsys.readouterr().out


def test_train_help_teaches_and_trl_help_lists_its_options(capsys):
    with pytest.raises(SystemExit):
        main.main(["train", "--help"])
    text = capsys.readouterr().out
    assert "--help-trl" in text and "plugins:" in text and "--accelerate_config zero2" in text
    assert main.main(["train", "--trainer", "rloo", "--help-trl"]) == 0
    text = capsys.readouterr().out
    assert "--num_generations" in text and "--model_name_or_path" in text


def test_unknown_command(capsys):
    assert main.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("TRL_EXT_TRACEBACK", "1")
    with pytest.raises(Exception, match="trian"):
        main.main(["trian"])


@pytest.fixture(autouse=True)
def no_width_is_given(monkeypatch):
    """Test runners set COLUMNS, and tables obey it."""
    monkeypatch.delenv("COLUMNS", raising=False)


def test_plugins_lists_built_ins(capsys):
    assert main.main(["plugins", "--json"]) == 0
    found = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}
    assert set(builtins.BUILTINS) <= set(found)
    gdpo = found["gdpo"]
    assert gdpo["paper"] == "arXiv 2601.05242" and gdpo["trainers"] == ["grpo"] and "advantages" in gdpo["hooks"]
    assert main.main(["plugins"]) == 0
    text = capsys.readouterr().out
    assert gdpo["summary"] in text  # on one line, however long it is


def test_plugins_shows_a_broken_package_and_goes_on(tmp_path, monkeypatch, capsys):
    info = tmp_path / "strange-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[trl_ext]\nstrange = strange_module:Strange\n")
    (tmp_path / "strange_module.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main.main(["plugins"]) == 0
    shown = capsys.readouterr()
    assert "gdpo" in shown.out and "broken: strange:" in shown.err and "a_package_that_nobody_has" in shown.err
    assert main.main(["plugins", "--json"]) == 0
    found = {plugin["name"]: plugin["broken"] for plugin in json.loads(capsys.readouterr().out)}
    assert found["gdpo"] is None and "a_package_that_nobody_has" in found["strange"]


def test_show_prints_every_option_with_its_source(capsys):
    assert main.main(["show", "gdpo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    options = {option["name"]: option for option in found["options"]}
    assert options["group_eps"] == {
        "name": "group_eps",
        "type": "float",
        "required": False,
        "default": 1e-4,
        "help": "added to a group's standard deviation",
        "source": "authors' fork, TRL",
        "bounds": {"gt": 0},
    }
    assert found["claims"] == ["estimator"]
    assert main.main(["show", "gdpo"]) == 0
    text = capsys.readouterr().out
    assert all(option["name"] in text and option["source"] in text for option in options.values())


PLUGIN = """
from dataclasses import dataclass
from trl_ext_hooks import Plugin, hookimpl, option

@dataclass(frozen=True)
class Options:
    floor: float = option(help="least advantage")

class Floor(Plugin):
    name = "floor"
    trainers = ("grpo", "rloo")
    Options = Options

    @hookimpl
    def advantages(self, round):
        return round.advantages.clamp(min=self.options.floor)
"""


def test_show_takes_files_and_modules(tmp_path, monkeypatch, capsys):
    file = tmp_path / "floor_for_show.py"
    file.write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    for reference in (str(file), "floor_for_show:Floor"):
        assert main.main(["show", reference]) == 0
        text = capsys.readouterr().out
        assert "floor" in text and "required" in text and "least advantage" in text


def test_show_an_unknown_plugin(capsys):
    assert main.main(["show", "gdop"]) == 2
    assert "Did you mean 'gdpo'" in capsys.readouterr().err


def test_tables_keep_words_whole_in_pipes_and_narrow_terminals(monkeypatch, capsys):
    row = ["a-name", "word " * 60, "[not markup]"]
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(["x", "y", "z"], [row])
    lines = capsys.readouterr().out.splitlines()
    assert any("word " * 59 in line and "[not markup]" in line for line in lines)
    monkeypatch.setenv("COLUMNS", "60")
    print_table(["x", "y", "z"], [row])
    text = capsys.readouterr().out
    assert text.count("word") == 60 and max(map(len, text.splitlines())) <= 60
