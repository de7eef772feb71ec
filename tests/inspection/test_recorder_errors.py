"""What cannot be recorded, views that do not fit a round, and the conformance check that looks at the hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext import ConfigError, PluginError
from trl_ext.inspection import file_format
from trl_ext.testing import conformance
from trl_ext_hooks import Curve, Plugin, Span, Views, hookimpl


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ([Span(0, 0, 1, "a")], ["returned list from 'inspect', expected Views"]),
        (Views([("a", 0, 1)]), ["returned tuple from 'inspect', expected Span"]),  # type: ignore[list-item]
        (Views([Span(8, 0, 1, "a")]), ["the span 'a'", "for row 8, expected a local row, 0 to 7"]),
        (Views([Span(-1, 0, 1, "a")]), ["the span 'a'", "for row -1, expected a local row, 0 to 7"]),
        (Views([Span(0, 0, 99, "a")]), ["start 0 and end 99 on row 0", "the number of tokens of the completion"]),
        (Views([Span(0, 1, 1, "a")]), ["start 1 and end 1", "expected 0 <= start < end"]),
        (Views(curves=[Curve(0, "c", [0, 1], [0.5])]), ["the curve 'c'", "2 positions and 1 values"]),
        (Views(curves=[Curve(0, "c", [1, 0], [0.5, 1])]), ["positions [1, 0], expected ascending ones from 0 to"]),
        (Views(curves=[Curve(9, "c", [], [])]), ["the curve 'c'", "for row 9"]),
    ],
)
def test_views_that_do_not_fit_the_round(views: Any, words: list[str], build: Any, plugin: Any) -> None:
    class Wrong(Plugin):
        name = "wrong"
        trainers = ("grpo",)

        @hookimpl
        def inspect(self, round: Any) -> Any:
            return views

    with trl_ext.enable(plugin(Wrong)) as handle, pytest.raises(PluginError) as caught:
        handle.record()
        build(max_steps=1).train()
    assert all(word in str(caught.value) for word in ["plugin 'wrong' returned", *words]), caught.value


def test_what_cannot_be_recorded(build: Any, plugin: Any, tmp_path: Path) -> None:
    trainer = build()
    for arguments in ({"rounds": 0}, {"max_rows": 0}):
        with pytest.raises(ConfigError, match="must be at least 1"):
            trl_ext.record(trainer, **arguments)
    trl_ext.record(trainer)
    with pytest.raises(ConfigError, match="this GRPOTrainer is being recorded already"):
        trl_ext.record(trainer)
    with pytest.raises(ConfigError, match="Attach first, then record"):
        trl_ext.attach(trainer, "gdpo")
    with pytest.raises(ConfigError, match="the DPO trainer generates no rounds to record; GRPO and RLOO do"):
        trl_ext.record(build("dpo"))
    with pytest.raises(ConfigError, match="object is none of TRL's"):
        trl_ext.record(object())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"rounds cannot be recorded in .*file/inspect: "):
        trl_ext.record(build(), folder=tmp_path / "file" / "inspect")


def test_handles_of_trainers_without_rounds(build: Any, plugin: Any) -> None:
    class Pairs(Plugin):
        name = "pairs"
        trainers = ("dpo",)

        @hookimpl
        def loss_inputs(self, batch: Any) -> None:
            return None

    class Both(Pairs):
        name = "both"
        trainers = ("grpo", "dpo")

    with trl_ext.enable(plugin(Pairs)) as handle, pytest.raises(ConfigError, match="serves no trainer with rounds"):
        handle.record()
    with trl_ext.enable(plugin(Both)) as handle:
        handle.record()
        with pytest.warns(UserWarning, match="this DPOTrainer generates no rounds: it is not recorded"):
            build("dpo")
        assert build()._trl_ext.recorder is not None


def test_a_subclass_that_scores_by_itself_cannot_be_recorded(build: Any) -> None:
    from trl import GRPOTrainer

    class Own(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            return {"advantages": torch.zeros(8)}

    trainer = trl_ext.record(build(cls=Own, max_steps=1))
    with pytest.raises(PluginError, match=r"Own finished a round without scoring it .* so it cannot be recorded"):
        trainer.train()


def test_attached_and_extended_trainers_are_recorded(build: Any) -> None:
    from trl import GRPOTrainer

    for trainer in (
        trl_ext.attach(build(max_steps=1), "gdpo"),
        build(cls=trl_ext.extend(GRPOTrainer, "gdpo"), max_steps=1),
    ):
        trl_ext.record(trainer).train()
        assert file_format.read(file_format.find(trainer.args.output_dir)[0]).advantage_stages == ["TRL", "gdpo"]


@pytest.mark.slow
def test_the_conformance_checks_look_at_the_hook(plugin: Any, tmp_path: Path) -> None:
    class Good(Plugin):
        name = "good"
        trainers = ("grpo",)

        @hookimpl
        def inspect(self, round: Any) -> Views:
            return Views([Span(0, 0, 1, "first")])

    class Meddles(Good):
        name = "meddles"

        @hookimpl
        def inspect(self, round: Any) -> Views:
            round.batch["advantages"].zero_()
            return Views()

    def check(cls: type, folder: str) -> Any:
        name = "grpo: recording a round changes nothing"
        (found,) = [entry for entry in conformance(plugin(cls), tmp_path / folder) if entry.name == name]
        return found

    good = check(Good, "good")
    assert good.passed and good.detail == "1 spans, 0 curves"
    failed = check(Meddles, "meddles")
    assert not failed.passed and "differs by up to" in failed.detail
