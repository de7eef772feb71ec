"""TGDPO: other sources of guidance, guidance computed ahead, and what cannot work."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from trl_ext.testing import metrics_of, tiny_data, tiny_model, tiny_trainer
from trl_ext.trl_internals import seams
from trl_ext_hooks import Plugin, hookimpl

pytestmark = pytest.mark.skipif(seams.trl_version() < seams.Version("1.15"), reason="needs the fused head of TRL 1.15")


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that was trained with plain DPO on the same pairs."""
    folder = tmp_path_factory.mktemp("guide")
    trainer = tiny_trainer("dpo", tiny_model(folder / "start"), folder / "run", max_steps=6)
    trainer.train()
    trainer.save_model(str(folder / "guide"))
    return str(folder / "guide")


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same(left: Any, right: Any) -> None:
    for (name, a), b in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def with_columns(model: str, edit: Any = lambda values: values) -> Dataset:
    """Token rewards +1 for digits, -1 for letters, 0 for the end of the answer."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def add(row: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for side in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)
            ids = whole["input_ids"][len(prompt["input_ids"]) :]
            texts = tokenizer.batch_decode([[i] for i in ids])
            found[f"{side}_token_rewards"] = edit([float(t.isdigit()) - float(t.isalpha()) for t in texts])
        return found

    return tiny_data("dpo").map(add)


def token_rewards(pairs: Any) -> torch.Tensor:
    """The same as a function."""
    texts = [pairs.trainer.processing_class.batch_decode([[i] for i in row]) for row in pairs.batch["input_ids"][:, 1:]]
    values = [[float(len(t) == 1 and t.isdigit()) - float(len(t) == 1 and t.isalpha()) for t in row] for row in texts]
    return torch.tensor(values)


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("my_token_rewards")
    module.token_rewards, module.short = token_rewards, lambda pairs: torch.ones(2, 2)  # type: ignore[attr-defined]
    module.broken = lambda pairs: torch.full(pairs.mask.shape, float("nan"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_token_rewards", module)
    return "my_token_rewards:token_rewards"


@pytest.mark.parametrize("settings", [{}, {"max_length": 24}, {"max_length": 24, "truncation_mode": "keep_end"}])
def test_columns_and_a_function_agree(train: Any, model: str, function: str, settings: dict[str, Any]) -> None:
    with trl_ext.enable(tgdpo={"reward_columns": True, "alpha": 0.9}):
        columns = train("dpo", data=with_columns(model), **settings)
    with trl_ext.enable(tgdpo={"reward_func": function, "alpha": 0.9}):
        called = train("dpo", **settings)
    same(columns, called)
    assert logged(columns, "tgdpo/factor/chosen")[0] > 1.1


@pytest.mark.parametrize("settings", [{}, {"max_length": 24}, {"max_length": 24, "truncation_mode": "keep_end"}])
def test_precomputed_guidance_is_the_same_run(
    build: Any, train: Any, guide: str, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl_ext.trl_internals import frozen_models

    tiny_data("dpo").save_to_disk(str(tmp_path / "data"))
    data = Dataset.load_from_disk(str(tmp_path / "data"))  # data on disk have a cache
    extra = {"trainer": {"eval_dataset": data.select(range(6))}, "eval_strategy": "steps", "eval_steps": 1}
    with trl_ext.enable(tgdpo={"guide": guide}):
        live = train("dpo", data=data, **extra, **settings)
    scored: list[int] = []
    original = frozen_models.score
    monkeypatch.setattr(frozen_models, "score", lambda *a: (scored.append(1), original(*a))[1])
    with trl_ext.enable(tgdpo={"guide": guide, "precompute": True}):
        ahead = build("dpo", data=data, **extra, **settings)
        assert ahead._trl_ext.plugins["tgdpo"]._guide is None
        calls = len(scored)
        ahead.train()
        assert len(scored) == calls >= 3
        build("dpo", data=data, **extra, **settings)
        assert len(scored) == calls, "the second run did not take the first one's cache"
        columns = ahead.train_dataset.column_names
        assert {"chosen_guide_logps", "rejected_guide_logps"} <= set(columns)
    assert "chosen_guide_logps" not in ahead.train_dataset.column_names
    same(live, ahead)
    assert metrics_of(live) == metrics_of(ahead)


def test_another_guide_is_another_cache(build: Any, guide: str, model: str, tmp_path: Path) -> None:
    tiny_data("dpo").save_to_disk(str(tmp_path / "data"))
    data, found = Dataset.load_from_disk(str(tmp_path / "data")), []
    for name in (guide, model):
        with trl_ext.enable(tgdpo={"guide": name, "precompute": True}):
            found.append(build("dpo", data=data).train_dataset[0]["chosen_guide_logps"])
    assert len(found[0]) == len(found[1]) and found[0] != found[1]


def test_scoring_ahead_shows_its_progress(
    build: Any, guide: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE")
    with trl_ext.enable(tgdpo={"guide": guide, "precompute": True}):
        build("dpo", trainer={"eval_dataset": tiny_data("dpo", 4)})
    shown = capfd.readouterr().err
    assert all(f"Computing guide_logps for the {name} data: 100%" in shown for name in ("train", "eval"))


def test_iterable_data_cannot_be_scored_ahead(build: Any, guide: str) -> None:
    with (
        trl_ext.enable(tgdpo={"guide": guide, "precompute": True}),
        pytest.raises(trl_ext.ConfigError, match="cannot be computed ahead for the train data"),
    ):
        build("dpo", data=tiny_data("dpo").to_iterable_dataset())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_type": ["ipo"]}, "loss_type"),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_type"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"use_weighting": True}, "use_weighting"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
    ],
)
def test_settings_are_refused(build: Any, guide: str, settings: dict[str, Any], expected: str) -> None:
    with trl_ext.enable(tgdpo={"guide": guide}), pytest.raises(trl_ext.ConfigError, match=expected):
        build("dpo", **settings)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guide": "x", "reward_columns": True}, "exclude each other"),
        ({"alpha": -1, "guide": "x"}, "tgdpo.alpha: expected float, >= 0, got -1"),
        ({"reward_func": "x"}, "module:function"),
        ({"reward_columns": True, "precompute": True}, "belong to a guide"),
        ({"reward_columns": True, "guide_beta": 0.1}, "belong to a guide"),
    ],
)
def test_options_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=expected):
        trl_ext.enable(tgdpo=options)


def test_a_run_without_guidance(build: Any) -> None:
    with (
        trl_ext.enable("tgdpo"),
        pytest.raises(trl_ext.ConfigError, match=r"nothing says which tokens are good.*tgdpo\.guide=FOLDER"),
    ):
        build("dpo")


def test_a_guide_that_is_not_there(build: Any, tmp_path: Path) -> None:
    with (
        trl_ext.enable(tgdpo={"guide": str(tmp_path / "nothing")}),
        pytest.raises(trl_ext.ConfigError, match="cannot be loaded with its tokenizer"),
    ):
        build("dpo")


def test_another_tokenizer_is_refused(build: Any, guide: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(guide)
    tokenizer.add_tokens(["<more>"])
    AutoModelForCausalLM.from_pretrained(guide).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with (
        trl_ext.enable(tgdpo={"guide": str(tmp_path / "other")}),
        pytest.raises(trl_ext.ConfigError, match=r"another vocabulary \(101 tokens\) than the policy \(100 tokens\)"),
    ):
        build("dpo")


def test_a_function_that_is_not_there(build: Any) -> None:
    with (
        trl_ext.enable(tgdpo={"reward_func": "no_such_module_here:f"}),
        pytest.raises(trl_ext.ConfigError, match="No module named 'no_such_module_here'"),
    ):
        build("dpo")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("short", r"token_rewards have the shape \(2, 2\), expected"),
        ("broken", r"pair 0 in this batch \(chosen, position"),
    ],
)
def test_bad_token_rewards_stop_the_run(build: Any, function: str, name: str, expected: str) -> None:
    with trl_ext.enable(tgdpo={"reward_func": f"my_token_rewards:{name}"}):
        trainer = build("dpo")
        with pytest.raises(ValueError, match=expected) as caught:
            trainer.train()
    assert "tgdpo" in "".join(caught.value.__notes__)
    if name == "broken":
        assert "<|im_start|>user" in str(caught.value)


def test_a_wrong_number_of_token_rewards(build: Any, model: str) -> None:
    with trl_ext.enable(tgdpo={"reward_columns": True}):
        with pytest.raises(trl_ext.ConfigError, match="no column 'chosen_token_rewards'"):
            build("dpo")
        trainer = build("dpo", data=with_columns(model, lambda values: values[1:]))
        with pytest.raises(ValueError, match=r"chosen_token_rewards has \d+ numbers for the \d+ tokens of '"):
            trainer.train()


def test_negative_factors_are_counted_and_cut(train: Any, function: str) -> None:
    with trl_ext.enable(tgdpo={"reward_func": function, "alpha": 2.0}):
        free = train("dpo", max_steps=1)
    with trl_ext.enable(tgdpo={"reward_func": function, "alpha": 2.0, "min_factor": 0.1}):
        cut = train("dpo", max_steps=1)
    assert logged(free, "tgdpo/negative")[0] == 0  # letters are on the rejected side, digits on the chosen one
    assert logged(cut, "tgdpo/negative") == [0]

    class Flipped(Plugin):
        name = "flipped"
        trainers = ("dpo",)

        @hookimpl
        def loss_inputs(self, batch: Any) -> dict[str, Any]:
            return {name: value.roll(len(value) // 2, 0) for name, value in batch.items()}

    module = types.ModuleType("flipped_pairs")
    module.Flipped = Flipped  # type: ignore[attr-defined]
    sys.modules["flipped_pairs"] = module
    try:
        with trl_ext.enable("flipped_pairs:Flipped", tgdpo={"reward_func": function, "alpha": 2.0}):
            turned = train("dpo", max_steps=1)
        with trl_ext.enable("flipped_pairs:Flipped", tgdpo={"reward_func": function, "alpha": 2.0, "min_factor": 0.1}):
            clamped = train("dpo", max_steps=1)
    finally:
        del sys.modules["flipped_pairs"]
    assert logged(turned, "tgdpo/negative")[0] > 0.3
    assert logged(clamped, "tgdpo/negative") == [0] and logged(clamped, "tgdpo/factor/chosen")[0] >= 0.1


def test_alpha_zero_is_said_to_be_plain_dpo(build: Any, guide: str) -> None:
    with trl_ext.enable(tgdpo={"guide": guide, "alpha": 0}):
        trainer = build("dpo")
        assert "tgdpo: alpha is 0, so this is plain DPO" in trainer._trl_ext.plan.notes
