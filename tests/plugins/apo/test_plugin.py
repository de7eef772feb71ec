"""APO: what cannot work, and options."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import trl_ext
from tests.plugins.apo.runs import OPTIONS, go
from trl_ext.testing import conformance, tiny_args, tiny_data
from trl_ext_hooks import UsageError
from trl_ext_plugins.apo.pairs import collect


def test_a_trainer_alone_cannot_have_it(build: Any) -> None:
    with (
        trl_ext.enable(apo=OPTIONS),
        pytest.raises(trl_ext.ConfigError, match=r"'apo' trains several times and owns the whole run.*trl_ext\.run"),
    ):
        build("dpo")


def test_a_run_without_an_owner(model: str, tmp_path: Path) -> None:
    with pytest.raises(trl_ext.ConfigError, match="none of the plugins shared-prefix owns a run"):
        trl_ext.run("shared-prefix", model=model, args=tiny_args("dpo", tmp_path), train_dataset=tiny_data("dpo"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_type": ["apo_zero"]}, r"Anchored Preference Optimization \(arXiv 2408.06266\), another method"),
        ({"loss_type": ["sigmoid", "apo_down"]}, "Anchored"),
        ({"sync_ref_model": True}, "sync_ref_model=False"),
        ({"disable_dropout": False}, "disable_dropout=True"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(
    model: str, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(trl_ext.ConfigError, match=expected):
        go(model, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "round-1").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_refused_before_anything_is_loaded(model: str, tmp_path: Path, stage: int) -> None:
    """Accelerate refuses it to the second trainer of a process, after a whole round."""
    args = tiny_args("dpo", tmp_path / "run")
    args.deepspeed_plugin = types.SimpleNamespace(zero_stage=stage)  # made by transformers where DeepSpeed is there
    with pytest.raises(trl_ext.ConfigError, match=r"'apo' trains several times .* DeepSpeed .* use DDP or FSDP"):
        trl_ext.run("apo", model="/no/such/model", args=args, train_dataset=tiny_data("grpo"), apo=OPTIONS)


@pytest.mark.parametrize("command", [["plugins"], ["show", "apo"]])
def test_the_other_method_of_that_name_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from trl_ext.cli import main

    assert main.main(command) == 0
    assert "not TRL's Anchored apo_zero and apo_down" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 1.0}, "alpha: expected float, < 1"),
        ({"rounds": 0}, "rounds: expected int, >= 1"),
        ({"rounds": 4, "betas": [0.1, 0.2, 0.3]}, "one for each of the 4 rounds"),
        ({"betas": [0.0]}, "greater than 0"),
        ({"num_samples": 1}, "num_samples: expected int, >= 2"),
        ({"held_out": -1}, "held_out: expected int, >= 0"),
        ({"judge": "x.y"}, "exclude each other"),
        ({"reward_weights": [1.0, 2.0]}, "one value per reward function"),
    ],
)
def test_options_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=expected):
        trl_ext.enable(apo=OPTIONS | options)


def test_odd_options_are_told(model: str, tmp_path: Path, watch: str) -> None:
    from trl_ext.catalog import find
    from trl_ext.plan import check as plan_check
    from trl_ext_hooks import Config

    specs = find.resolve({"apo": OPTIONS | {"alpha": -0.1, "betas": [1.0, 0.1, 0.1]}})
    notes = plan_check.make_plan(specs, Config("dpo", tiny_args("dpo", tmp_path), (), None, ())).notes
    assert any("averages outputs" in note for note in notes) and any("do not fall" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"reward_funcs": []}, trl_ext.ConfigError, "nothing says which completions are better"),
        ({"reward_funcs": ["nothing"]}, trl_ext.ConfigError, "neither a path such as"),
        ({"reward_funcs": ["apo_rewards.many"]}, trl_ext.ConfigError, "has no 'many'"),
        ({"reward_funcs": [], "judge": "apo_rewards.No"}, UsageError, "apo.judge='apo_rewards.No'"),
        ({"rounds": 20}, UsageError, "too few prompts for 20 rounds: 12"),
        ({"held_out": 11}, UsageError, "too few prompts for 3 rounds: 1"),
        ({"held_out": 13, "prompts_per_round": 2}, UsageError, "too few prompts for 3 rounds: 0"),
    ],
)
def test_what_is_missing_is_told_first(
    model: str, tmp_path: Path, options: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        go(model, tmp_path / "run", options)
    assert not (tmp_path / "run" / "apo.json").exists()


def test_streams_and_data_without_prompts(model: str, tmp_path: Path) -> None:
    for data in (tiny_data("grpo").to_iterable_dataset(), Dataset.from_dict({"text": ["a"]})):
        with pytest.raises(UsageError, match="column 'prompt' that can be read in any order"):
            go(model, tmp_path / "run", train_dataset=data)


def test_samples_that_other_machines_keep_are_noticed(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds 2 files of samples, and all processes wrote 3"):
        collect(finished / "round-1" / "samples", tmp_path, 3)


def test_conformance_says_what_it_did_not_look_at(tmp_path: Path) -> None:
    checks = conformance("apo", tmp_path)
    assert [check.name for check in checks] == ["declaration", "runs"] and "not looked at" in checks[1].detail
