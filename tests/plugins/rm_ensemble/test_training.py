"""Ensembles of real reward models, before GDPO in one run, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import brevity, digits
from trl_ext.testing.distributed import compare
from trl_ext_plugins.gdpo import condition_rewards, gdpo_advantages
from trl_ext_plugins.rm_ensemble import combine


@pytest.fixture
def judges(model: str, tmp_path: Path) -> list[str]:
    """Folders of two classifiers with the policy's tokenizer, as users name them on the hub."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    tokenizer, folders = AutoTokenizer.from_pretrained(model), []
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for number in range(2):
        torch.manual_seed(number)
        config = Qwen2Config(
            vocab_size=len(tokenizer), num_key_value_heads=1, num_labels=1, pad_token_id=tokenizer.pad_token_id, **shape
        )
        judge = Qwen2ForSequenceClassification(config)
        judge.score.weight.data *= 30  # scores of an untrained head hardly differ
        folders.append(str(tmp_path / f"judge-{number}"))
        judge.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    return folders


def test_real_reward_models_before_gdpo_whose_condition_names_the_ensemble(
    judges: list[str], train: Any, look: str
) -> None:
    common = {"rewards": [*judges, digits], "max_steps": 1, "reward_weights": [0.5, 0.5, 2.0]}
    with trl_ext.enable(look):
        (raw,) = train(**common)._trl_ext.plugins["look"].rounds
    assert raw.reward_names == ("judge-0", "judge-1", "digits")
    assert (raw.reward("judge-0") - raw.reward("judge-1")).abs().min() > 1e-4
    expected = combine(raw.rewards[:, :2].T.double(), "uwo", 2.0).float()
    threshold = expected.median().item()
    options = {
        "rm-ensemble": {"models": ["judge-0", "judge-1"], "objective": "uwo", "coefficient": 2.0},
        "gdpo": {"conditions": [{"target": "digits", "given": "ensemble", "threshold": threshold}]},
    }
    with trl_ext.enable("rm-ensemble", "gdpo", look, **options):
        trainer = train(**common)
        (round,) = trainer._trl_ext.plugins["look"].rounds
    assert round.completion_ids == raw.completion_ids and round.reward_names == ("ensemble", "digits")
    torch.testing.assert_close(round.reward("ensemble"), expected)
    columns = condition_rewards(torch.stack([round.reward("ensemble"), raw.reward("digits")], dim=1), 1, 0, threshold)
    assert torch.equal(round.rewards, columns) and not torch.equal(round.reward("digits"), raw.reward("digits"))
    torch.testing.assert_close(
        round.advantages, gdpo_advantages(columns, torch.tensor([0.5, 2.0]), round.group_ids), atol=1e-5, rtol=1e-5
    )
    logs = trainer.state.log_history[0]
    assert logs["rewards/ensemble/mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert logs["rm-ensemble/model/judge-1"] == pytest.approx(raw.reward("judge-1").mean().item(), abs=1e-5)
    assert logs["rm-ensemble/penalty"] > 0 and "gdpo/zero_std/ensemble" in logs


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_one_model_is_the_plain_run(kind: str, train: Any) -> None:
    common = {"rewards": [brevity], "reward_weights": [0.3], "beta": 0.0}
    plain = train(kind, **common)
    with trl_ext.enable("rm-ensemble", **{"rm-ensemble": {"objective": "uwo"}}):
        ours = train(kind, **common)
    for one, other in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert ours.state.log_history[0]["rewards/ensemble/mean"] == plain.state.log_history[0]["rewards/brevity/mean"]


def test_a_resumed_run_gives_the_same_numbers(build: Any) -> None:
    common = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with trl_ext.enable("rm-ensemble", **{"rm-ensemble": {"standardize": True}}):
        whole = build(**common)
        whole.train()
        resumed = build(**common)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-1")
        one, other = (trainer._trl_ext.plugins["rm-ensemble"].moments for trainer in (whole, resumed))
    assert one == other and {count for count, _, _ in one.values()} == {16.0}
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_one_and_two_processes_agree(model: str, tmp_path: Path) -> None:
    options = {"objective": "uwo", "standardize": True}
    settings = {"rewards": [digits, brevity], "max_steps": 3}
    compare(2, "grpo", model, tmp_path, {"rm-ensemble": options}, settings)
