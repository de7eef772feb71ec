"""`trl_ext plugins`: the list, with broken packages."""

import json

from trl_ext.catalog import builtins
from trl_ext.cli import main


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
