"""The handle of enabled plugins: asked for again, in blocks inside blocks, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

import trl_ext
from trl_ext import ConfigError
from trl_ext.plan.overview import Overview
from trl_ext_hooks import Plugin, hookimpl

HALF = """
from trl_ext_hooks import Plugin, hookimpl

class Half(Plugin):
    name = "half"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round):
        return round.advantages / 2
"""


class Weights(Plugin):
    """Works on tokens, which RLOO does not weigh."""

    name = "weights"
    trainers = ("grpo", "rloo")

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        return round.advantages

    @hookimpl
    def token_weights(self, round: Any) -> None:
        return None


def test_the_same_plugins_and_options_give_the_same_handle(plugin: Callable[[type], str]) -> None:
    with trl_ext.enable("gdpo", gdpo={"group_eps": 1e-3}) as handle:
        assert trl_ext.enable({"gdpo": {"group_eps": 0.001}}) is handle
        assert trl_ext.enable("trl_ext_plugins.gdpo:GDPO", gdpo={"group_eps": 1e-3}) is handle
        handle.disable()
    with trl_ext.enable("gdpo") as another:
        assert another is not handle


def test_blocks_inside_a_block_leave_it_on() -> None:
    original = GRPOTrainer.__init__
    with trl_ext.enable("gdpo") as outer:
        with trl_ext.enable("gdpo") as inner, trl_ext.enable("gdpo"):
            assert inner is outer
        with pytest.raises(KeyError), trl_ext.enable("gdpo"):
            raise KeyError
        assert GRPOTrainer.__init__ is not original
    assert GRPOTrainer.__init__ is original


def test_a_block_leaves_on_what_was_enabled_without_one() -> None:
    original = GRPOTrainer.__init__
    handle = trl_ext.enable("gdpo")
    with trl_ext.enable("gdpo"):
        pass
    assert GRPOTrainer.__init__ is not original
    with handle:  # takes back the first call
        pass
    assert GRPOTrainer.__init__ is original


def test_disable_takes_back_every_call() -> None:
    original = GRPOTrainer.__init__
    with trl_ext.enable("gdpo"):
        trl_ext.enable("gdpo").disable()
        assert GRPOTrainer.__init__ is original
    assert GRPOTrainer.__init__ is original


def test_another_set_says_what_differs_and_how_to_switch() -> None:
    with trl_ext.enable("gdpo"):
        with pytest.raises(ConfigError, match=r"gdpo\.group_eps is 0\.0001 and was asked for as 0\.5\. To switch"):
            trl_ext.enable("gdpo", gdpo={"group_eps": 0.5})
        with pytest.raises(ConfigError, match=r"and gdpo and otc were asked for.*name all of them in one call"):
            trl_ext.enable("gdpo", "otc")
        trl_ext.disable()
        with trl_ext.enable("gdpo", gdpo={"group_eps": 0.5}) as switched:
            assert "gdpo.group_eps" in switched.describe()


def test_an_edited_plugin_file_is_another_set(tmp_path: Path) -> None:
    file = tmp_path / "half.py"
    file.write_text(HALF)
    with trl_ext.enable(str(file)) as handle:
        assert trl_ext.enable(str(file)) is handle
        file.write_text(HALF.replace("/ 2", "* 0.5"))
        with pytest.raises(ConfigError, match="half is another class now, for example because its file was edited"):
            trl_ext.enable(str(file))
        handle.disable()


# --- what it says of itself -------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """The rows of all tables in a piece of HTML, and its tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if data.strip() and self.rows:
            self.rows[-1].append(data)


def test_it_shows_plan_options_and_what_ran(build: Any, plugin: Callable[[type], str]) -> None:
    with trl_ext.enable(plugin(Weights), "gdpo", gdpo={"group_eps": 0.5}) as handle:
        assert repr(handle) == "<trl_ext: weights, gdpo on grpo>"
        assert "enabled, no trainer has them" in handle.describe()
        trainer = build()
        trainer.train()
        text, rows = handle.describe(), Cells(handle._repr_html_()).rows
        calls = {hook: trainer._trl_ext.calls["gdpo", hook] for hook in ("advantages", "round_metrics")}
        assert text.splitlines()[0] == "weights and gdpo on GRPO: enabled, 1 living trainer with them"
        assert calls["advantages"] > 1
        assert ["advantages", "gdpo → weights", f"{calls['advantages']} → {calls['advantages']}"] in rows
        assert ["gdpo.group_eps", "0.5"] in rows and len([row for row in rows if row[0].startswith("gdpo.")]) == 1
        for row in rows:
            assert any(line.split() == " ".join(row).split() for line in text.splitlines()), row
    assert "disabled, no trainer has them" in handle.describe()


def test_stages_that_only_one_trainer_has_are_marked(plugin: Callable[[type], str]) -> None:
    with trl_ext.enable(plugin(Weights)) as handle:
        stages = {hook: (names, calls) for hook, names, calls in handle._overview().stages()}
    assert stages == {"advantages": ("weights", "0"), "token_weights": ("weights (GRPO)", "0")}
    assert "all options: default" in handle.describe() and "all options: default" in handle._repr_html_()


def test_html_escapes_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Overview, "options", lambda self: [("gdpo.text", "'<script>[bold]&'")])
    cells = Cells(Overview((), (), True, ()).html())
    assert "script" not in cells.tags and ["gdpo.text", "'<script>[bold]&'"] in cells.rows


def test_dir_shows_the_api() -> None:
    assert dir(trl_ext) == sorted(trl_ext.__all__)
    assert {"enable", "disable", "attach", "Handle"} <= set(dir(trl_ext))
