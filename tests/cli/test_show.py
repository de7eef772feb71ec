"""`trl_ext show`: every declaration of a plugin."""

import json

from trl_ext.cli import main


def test_show_prints_every_option_with_its_source(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
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
    assert main.main(["show", "p3o"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reward_clip ")]
    assert " null " in line and "None" not in line  # as one writes it


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


def test_show_prints_what_to_cite(capsys):
    assert main.main(["show", "gdpo", "--bibtex"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "@misc{gdpo2026," and lines[-1] == "}" and "  eprint = {2601.05242}," in lines
    assert main.main(["show", "tools", "--bibtex"]) == 2
    assert "plugin 'tools' names nothing to cite" in capsys.readouterr().err


def test_show_an_unknown_plugin(capsys):
    assert main.main(["show", "gdop"]) == 2
    assert "Did you mean 'gdpo'" in capsys.readouterr().err
