"""`trl_ext plugins`: the list, with broken packages."""

import functools
import json

from trl_ext.catalog import builtins
from trl_ext.cli import main, plugins


def test_plugins_lists_built_ins(capsys):
    assert main.main(["plugins", "--json"]) == 0
    found = {plugin["name"]: plugin for plugin in json.loads(capsys.readouterr().out)}
    assert set(builtins.BUILTINS) <= set(found)
    gdpo = found["gdpo"]
    assert gdpo["paper"] == "arXiv 2601.05242" and gdpo["trainers"] == ["grpo"] and "advantages" in gdpo["hooks"]
    assert main.main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "name" and max(map(len, lines)) <= 80
    words = {word for line in lines for word in line.split()}
    assert set(builtins.BUILTINS) <= words
    assert all(set(plugin["summary"].split()) <= words for plugin in found.values() if plugin["summary"])


def names(argv, capsys):
    code = main.main(["plugins", "--json", *argv])
    listed = [plugin["name"] for plugin in json.loads(capsys.readouterr().out)]
    assert code == (0 if listed else 1)
    return listed


def test_plugins_of_a_trainer_or_with_a_word(capsys, monkeypatch):
    monkeypatch.setattr(plugins, "listing", functools.cache(plugins.listing))
    everything, of_dpo = names([], capsys), names(["--trainer", "dpo"], capsys)
    assert {"apo", "tgdpo", "shared-prefix"} <= set(of_dpo) and "gdpo" not in of_dpo
    assert names(["--trainer", "DPO"], capsys) == of_dpo
    with_tool = names(["--search", "Tool"], capsys)
    assert {"hdpo", "otc", "tools"} <= set(with_tool) < set(everything)
    assert names(["--search", "tool", "--trainer", "rloo"], capsys) == ["otc"]
    assert names(["--search", "2601.05242"], capsys) == ["gdpo"] and "decs" in names(["--search", "keep_rows"], capsys)
    assert names(["--search", "[no/such]"], capsys) == []
    assert main.main(["plugins", "--search", "[no/such]"]) == 1
    assert "no plugin is as asked for" in capsys.readouterr().err
    assert main.main(["plugins", "--trainer", "ppo"]) == 2


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
