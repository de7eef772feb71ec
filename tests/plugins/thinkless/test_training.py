"""Thinkless in real runs: against a direct loss, with tools, adapters and shared prefixes, after the warm-up."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import digits, tiny_data
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl
from trl_ext_hooks.toolkit.losses import clipped_surrogate, masked_mean
from trl_ext_plugins.thinkless import mode_reward
from trl_ext_plugins.thinkless.maths import (
    token_mean_weights,
)

ROOT = Path(__file__).parents[3]


LETTERS = {"think": "T", "short": "S", "close": "E"}
"""Control tokens that the tiny model's alphabet has."""


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


class Scripted(Plugin):
    """Answers of known modes and lengths: think, short, no mode, and long thoughts without an end, by turns."""

    name = "scripted"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: Any, generate: Any, trainer: Any) -> Any:
        texts = ["TabScEd1", "S2TxE", "7b", "Tcut"]
        result = generate(prompts)
        ids = [trainer.processing_class.encode(texts[row % 4] + "abc"[: row % 3]) for row in range(len(prompts))]
        completions = [[{"role": "assistant", "content": trainer.processing_class.decode(row)}] for row in ids]
        return dataclasses.replace(result, completion_ids=ids, completions=completions)


def noisy(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) * (n + 1) % 7) / 3 for n, ids in enumerate(completion_ids)]


COMMON = {"rewards": [noisy], "scale_rewards": "none", "optim": "sgd", "learning_rate": 0.5, "max_steps": 4}


def test_modes_answers_and_metrics(train: Any, plugin: Any, look: str) -> None:
    """The mode is the first token: `S` inside thoughts and `T ... E` inside a short answer change nothing."""
    asked: list[dict[str, Any]] = []

    def reward(thinkless_mode: Any, thinkless_answer: Any, **columns: Any) -> list[float]:
        asked.append({"modes": list(thinkless_mode), "answers": list(thinkless_answer)})
        return [{"think": 0.5, "short": 1.0, None: -1.0}[mode] for mode in thinkless_mode]

    with trl_ext.enable(plugin(Scripted), "thinkless", look, thinkless=LETTERS | {"alpha": 0.25}):
        trainer = train(rewards=[reward], scale_rewards="none", max_steps=1)
        (round,) = trainer._trl_ext.plugins["look"].rounds
    assert asked[0]["modes"] == ["think", "short", None, "think"] * 2
    assert asked[0]["answers"] == ["d1", "2TxEa", None, None, "d1a", "2TxEab", None, None]
    assert logged(trainer, "thinkless/think_share") == [pytest.approx(4 / 6)]
    assert logged(trainer, "thinkless/missing_control") == [0.25]
    assert logged(trainer, "thinkless/reward_think") == [0.5] and logged(trainer, "thinkless/reward_short") == [1.0]
    tokens = round.loss_mask.sum().item()
    assert logged(trainer, "thinkless/control_weight") == [pytest.approx(0.25 * (tokens - 8) / 8)]
    row = torch.tensor([0.25, 0.75, -1.25, 0.25] * 2)
    control = pytest.approx(-row.mean().item(), abs=1e-6)
    assert logged(trainer, "thinkless/control_loss") == [control]
    lengths = round.loss_mask.sum(1) - 1
    response = -(row * lengths).sum() / lengths.sum()
    assert logged(trainer, "thinkless/response_loss") == [pytest.approx(response.item(), abs=1e-6)]
    weights = round.advantages / torch.where(round.loss_mask == 1, row.unsqueeze(1), 1)
    torch.testing.assert_close(weights[:, 0], torch.full((8,), 0.25 * tokens / 8))


class Direct(Plugin):
    """The loss of DeGRPO written out, in place of weights on advantages."""

    name = "direct"
    trainers = ("grpo",)
    honours = ("loss_type", "keep_rows")

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        ratio = torch.exp(loss.per_token_logps - loss.old_per_token_logps)
        losses = clipped_surrogate(ratio, loss.advantages, 0.2, 0.2)
        control = torch.zeros_like(loss.mask)
        control[:, 0] = loss.mask[:, 0]
        response = loss.mask * (1 - control)
        if loss.trainer.args.loss_type == "dapo":
            return PolicyLoss(0.3 * masked_mean(losses, control) + masked_mean(losses, response))
        rows = 0.3 * (losses * control).sum(1) + masked_mean(losses, response, dim=1)
        return PolicyLoss(rows.sum() / loss.mask.any(dim=1).sum())


@pytest.mark.parametrize(("aggregation", "loss_type"), [("token_mean", "dapo"), ("sequence_mean", "grpo")])
def test_a_run_is_that_of_the_loss_written_out(aggregation: str, loss_type: str, train: Any, plugin: Any) -> None:
    common = COMMON | {"loss_type": loss_type, "num_iterations": 2, "learning_rate": 2.0}
    with trl_ext.enable(plugin(Direct), plugin(Scripted)):
        direct = train(**common)
    options = LETTERS | {"alpha": 0.3, "aggregation": aggregation}
    with trl_ext.enable("thinkless", plugin(Scripted), thinkless=options):
        ours = train(**common)
    assert logged(ours, "loss") == pytest.approx(logged(direct, "loss"), abs=1e-5)
    assert_close_training(direct, ours, 2e-5)
    assert max(logged(ours, "clip_ratio/region_mean")) > 0  # TRL's own clipping, on both sides of the comparison


class Drop(Plugin):
    """Leaves out the first rows of each group, with other lengths and modes than the rest."""

    name = "drop"
    trainers = ("grpo",)

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        return torch.tensor([0, 0, 1, 1, 0, 1, 1, 1]).bool()


@pytest.mark.parametrize(("aggregation", "loss_type"), [("token_mean", "dapo"), ("sequence_mean", "grpo")])
def test_rows_that_others_leave_out_are_in_no_mean(
    aggregation: str, loss_type: str, train: Any, plugin: Any, look: str
) -> None:
    """Alpha weighs the mean over control tokens against the mean over the others, of what is left."""
    common = COMMON | {"loss_type": loss_type, "learning_rate": 2.0}
    with trl_ext.enable(plugin(Direct), plugin(Scripted), plugin(Drop)):
        direct = train(**common)
    options = LETTERS | {"alpha": 0.3, "aggregation": aggregation}
    runs = []
    for order in (["thinkless", plugin(Drop)], [plugin(Drop), "thinkless"]):
        with trl_ext.enable(*order, plugin(Scripted), look, thinkless=options):
            runs.append(train(**common))
            round = runs[-1]._trl_ext.plugins["look"].rounds[0]
    for ours in runs:
        assert logged(ours, "loss") == pytest.approx(logged(direct, "loss"), abs=1e-5)
        assert_close_training(direct, ours, 2e-5)
    assert round.kept.sum() == 5 and int(round.batch["thinkless_control"].sum()) == 5
    if aggregation == "token_mean":
        weights = round.token_advantages / torch.where(round.loss_mask == 1, round.batch["thinkless_advantages"], 1.0)
        control = round.batch["thinkless_control"]
        total, others = round.loss_mask.sum(), (round.loss_mask * ~control).bool()
        torch.testing.assert_close(weights[control].sum() / total, torch.tensor(0.3))
        torch.testing.assert_close(weights[others].sum() / total, torch.tensor(1.0))


def test_a_neutral_alpha_is_grpo(train: Any, plugin: Any) -> None:
    """With answers of 5 tokens and alpha = 1/4, all weights are 5/4: plain dapo with a learning rate of 5/4."""

    class Five(Plugin):
        name = "five"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts: Any, generate: Any) -> Any:
            result = generate(prompts)
            ids = [[10 + (7 * row + t * t) % 80 for t in range(5)] for row in range(len(prompts))]
            return dataclasses.replace(result, completion_ids=ids)

    common = COMMON | {"num_iterations": 2, "max_grad_norm": 0.0}
    five = plugin(Five)
    with trl_ext.enable(five):
        plain = train(**common | {"learning_rate": 0.5 * 5 / 4})
    with trl_ext.enable("thinkless", five, thinkless=LETTERS | {"alpha": 0.25}):
        ours = train(**common)
    with trl_ext.enable("thinkless", five, thinkless=LETTERS | {"alpha": 2.5}):
        other = train(**common)
    assert logged(ours, "thinkless/control_weight") == [1.0, 1.0]
    assert_close_training(plain, ours, 1e-5)
    with pytest.raises(AssertionError):
        assert_close_training(plain, other, 1e-4)


def test_without_alpha_a_run_is_plain_grpo(train: Any) -> None:
    plain = train(**COMMON)
    with trl_ext.enable("thinkless", thinkless=LETTERS | {"alpha": None}):
        ours = train(**COMMON)
    for one, other in zip(plain.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert logged(ours, "thinkless/missing_control") and not logged(ours, "thinkless/control_weight")


class Tools(Plugin):
    """Calls every third token the result of a tool."""

    name = "tools"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: Any, generate: Any) -> Any:
        result = generate(prompts)
        mask = [[int(t % 3 != 1) for t in range(len(ids))] for ids in result.completion_ids]
        return dataclasses.replace(result, tool_mask=mask)


@pytest.mark.parametrize("turns", ["first", "every"])
@pytest.mark.parametrize("control", ["position", "by_id"])
def test_accumulation_trains_alike(turns: str, control: str, train: Any, plugin: Any, look: str) -> None:
    """Control tokens and lengths differ between micro-batches; the means are those of the round."""
    options = LETTERS | {"alpha": 0.4, "turns": turns, "control": control}
    with trl_ext.enable(plugin(Tools), plugin(Scripted), "thinkless", look, thinkless=options):
        whole = train(per_device_train_batch_size=16, **COMMON)
        split = train(per_device_train_batch_size=4, gradient_accumulation_steps=4, **COMMON)
        round = whole._trl_ext.plugins["look"].rounds[0]
    known = {whole.processing_class.convert_tokens_to_ids(letter) for letter in "TS"}
    opening = [
        ids[t]
        for ids in round.completion_ids
        for t in range(len(ids) if turns == "every" else 1)
        if t == 0 or t % 3 == 2  # behind the result of a tool
    ]
    expected = len(opening) if control == "position" else sum(token in known for token in opening)
    assert int(round.batch["thinkless_control"].sum()) == expected
    assert_close_training(whole, split, 1e-5)
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)


def test_masked_truncated_completions_leave_both_means(train: Any, look: str) -> None:
    with trl_ext.enable("thinkless", look, thinkless=LETTERS | {"alpha": 0.3}):
        trainer = train(mask_truncated_completions=True, max_completion_length=48, **COMMON)
        rounds = trainer._trl_ext.plugins["look"].rounds
    kept = [int((round.loss_mask.sum(1) > 0).sum()) for round in rounds]
    assert any(0 < count < 8 for count in kept)
    for round, count in zip(rounds, kept, strict=True):
        assert int(round.batch["thinkless_control"].sum()) == count
        if count:
            weights = token_mean_weights(
                round.batch["thinkless_control"], round.loss_mask, 0.3, torch.tensor(count), round.loss_mask.sum()
            )
            torch.testing.assert_close(round.advantages, (round.batch["thinkless_advantages"] * weights).float())


def test_rewards_that_cannot_be_told_and_constant_groups(train: Any, plugin: Any, look: str) -> None:
    def some(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [None if n == 0 else float(n) if n < 4 else -1.0 for n in range(len(completion_ids))]

    with trl_ext.enable("thinkless", plugin(Scripted), look, thinkless=LETTERS):
        trainer = train(**COMMON | {"rewards": [some], "max_steps": 1})
        (round,) = trainer._trl_ext.plugins["look"].rounds
    assert (round.advantages[0] == 0).all() and (round.advantages[4:] == 0).all()
    assert (round.advantages[[1, 3]].abs().amax(1) > 0).all()
    assert logged(trainer, "thinkless/reward_think") == [pytest.approx((3 - 1 - 1) / 3)]


def test_with_adapters_shared_prefixes_kl_and_entropy(train: Any) -> None:
    from peft import LoraConfig

    common = COMMON | {"beta": 0.05, "num_iterations": 3, "max_steps": 3, "learning_rate": 2.0}
    common |= {"scale_rewards": "group"}  # gdpo does not apply the authors' "none"
    common["rewards"] = [digits, noisy]
    common["trainer"] = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}

    def run(*plugins: str) -> Any:
        torch.manual_seed(0)  # before 1.16, TRL makes adapters from the random state that it finds
        with trl_ext.enable("thinkless", *plugins, thinkless=LETTERS | {"alpha": 0.3}):
            return train(**common)

    dense, packed, both = run(), run("shared-prefix"), run("gdpo", "shared-prefix")
    assert min(logged(packed, "shared-prefix/token_ratio")) > 1.1 and logged(dense, "kl")[-1] > 0
    assert_close_training(dense, packed, 2e-5)
    with pytest.raises(AssertionError):
        assert_close_training(dense, both, 1e-4)  # gdpo makes the advantages here


def test_warm_up_then_reinforcement(model: str, build: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The recipe teaches a model that never saw the tokens to open with one of them, and DeGRPO goes on from there."""
    from trl import ModelConfig, ScriptArguments, SFTConfig

    data = [
        {"prompt": row["prompt"], "short": row["answer"], "think": f"add</think>{row['answer']}"} for row in tiny_data()
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, data)))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    args = SFTConfig(
        str(tmp_path / "warm"),
        max_steps=40,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    main = runpy.run_path(str(ROOT / "recipes" / "warmup" / "thinkless.py"))["main"]
    main(ScriptArguments(dataset_name=str(tmp_path / "data")), args, ModelConfig(model_name_or_path=model))

    reward = mode_reward(lambda answer, expected: answer.strip() == expected, reference="answer")
    with trl_ext.enable("thinkless", thinkless={"alpha": 0.2}):
        settings_ = {"scale_rewards": "none", "max_steps": 2, "learning_rate": 1e-3}
        trainer = build(model=str(tmp_path / "warm"), rewards=[reward], **settings_)
        trainer.train()
    missing, thinking = logged(trainer, "thinkless/missing_control"), logged(trainer, "thinkless/think_share")
    assert max(missing) < 0.2 and 0 < sum(thinking) / 2 < 1
    assert all(math.isfinite(value) for value in logged(trainer, "loss")) and max(logged(trainer, "grad_norm")) > 0
