"""Thinkless: the weights against two means, modes and rewards, the warm-up, and real runs against a direct loss."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_ext
from trl_ext.testing import digits, tiny_data
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_hooks.toolkit.losses import masked_mean
from trl_ext_plugins.thinkless import add_control_tokens, boxed_match, boxed_reward, mode_reward, warmup_rows
from trl_ext_plugins.thinkless.degrpo import (
    clipped_surrogate,
    control_tokens,
    sequence_mean_weights,
    token_mean_weights,
)
from trl_ext_plugins.thinkless.rewards import boxed

ROOT = Path(__file__).parents[2]
SEEDS = st.integers(0, 10_000)
LETTERS = {"think": "T", "short": "S", "close": "E"}
"""Control tokens that the tiny model's alphabet has."""


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def batch(seed: int, lengths: tuple[int, ...] = (5, 1, 3, 0, 2), drift: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    old = -torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    return {
        "old": old,
        "logps": (old + drift * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_(),
        "advantages": torch.randn(shape[0], 1, generator=generator, dtype=torch.float64),
        "mask": mask,
        "control": control_tokens(torch.zeros_like(mask), mask),
    }


def token_mean(data: dict[str, torch.Tensor], alpha: float | None) -> torch.Tensor:
    """The trainer's token mean (loss_type dapo) of weighted advantages."""
    weights: Any = 1.0
    if alpha is not None:
        weights = token_mean_weights(data["control"], data["mask"], alpha, data["control"].sum(), data["mask"].sum())
    losses = clipped_surrogate(data["logps"], data["old"], data["advantages"] * weights, 0.2, 0.2)
    return masked_mean(losses, data["mask"])


def sequence_mean(data: dict[str, torch.Tensor], alpha: float) -> torch.Tensor:
    """The trainer's mean over rows of means over tokens (loss_type grpo)."""
    weights = sequence_mean_weights(data["control"], data["mask"], alpha)
    losses = clipped_surrogate(data["logps"], data["old"], data["advantages"] * weights, 0.2, 0.2)
    return masked_mean(losses, data["mask"], dim=1).mean()


def gradient(loss: torch.Tensor, data: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.autograd.grad(loss, data["logps"])[0]


# --- the mathematics --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, 2), st.floats(0, 1))
def test_weighted_advantages_are_the_two_means(seed: int, alpha: float, drift: float) -> None:
    """Both aggregations, off-policy with clipping, on ragged rows with an empty one, against plain loops."""
    data = batch(seed, drift=drift)
    losses = clipped_surrogate(data["logps"], data["old"], data["advantages"], 0.2, 0.2).tolist()
    lengths = data["mask"].sum(1).tolist()
    control = [losses[i][0] for i, n in enumerate(lengths) if n]
    response = [losses[i][t] for i, n in enumerate(lengths) for t in range(1, n)]
    expected = alpha * sum(control) / len(control) + sum(response) / len(response)
    assert token_mean(data, alpha).item() == pytest.approx(expected, abs=1e-9)
    rows = 0.0
    for i, n in enumerate(lengths):
        if n:
            rows += alpha * losses[i][0] + (sum(losses[i][1:n]) / (n - 1) if n > 1 else 0.0)
    assert sequence_mean(data, alpha).item() == pytest.approx(rows / len(lengths), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_neutral_alpha_is_the_plain_token_mean(seed: int) -> None:
    data = batch(seed)
    total, on = data["mask"].sum().item(), data["control"].sum().item()
    neutral = token_mean(data, on / (total - on))
    torch.testing.assert_close(neutral, token_mean(data, None) * total / (total - on))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0, 3))
def test_weights_of_control_tokens_add_up_to_alpha_and_of_the_others_to_1(seed: int, alpha: float) -> None:
    data = batch(seed)
    total, control = data["mask"].sum(), data["control"]
    weights = token_mean_weights(control, data["mask"], alpha, control.sum(), total)
    assert (weights[control].sum() / total).item() == pytest.approx(alpha)
    assert (weights[~control].sum() / total).item() == pytest.approx(1)
    assert (weights[data["mask"] == 0] == 0).all()


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.1, 3))
def test_alpha_scales_the_gradient_of_control_tokens_and_no_other(seed: int, alpha: float) -> None:
    data = batch(seed)
    for form in (token_mean, sequence_mean):
        one, other = gradient(form(data, 1.0), data), gradient(form(data, alpha), data)
        torch.testing.assert_close(other[data["control"]], alpha * one[data["control"]])
        torch.testing.assert_close(other[~data["control"]], one[~data["control"]])


def test_the_gradient_of_the_control_token_does_not_depend_on_lengths() -> None:
    """Unlike in GRPO; in the sequence form it does not depend on the row's own length either."""
    short, long = batch(0, (3, 2, 4)), batch(0, (3, 2, 4))
    repeat = [0, 1, 1, 2, 2, 3, 3]
    for name in ("old", "logps", "mask", "control"):
        long[name] = long[name].detach()[:, repeat]
    long["logps"].requires_grad_()
    (plain, plain_long), (ours, ours_long), (rows, rows_long) = (
        [gradient(form(data, alpha), data)[:, 0] for data in (short, long)]
        for form, alpha in ((token_mean, None), (token_mean, 0.3), (sequence_mean, 0.3))
    )
    torch.testing.assert_close(ours, ours_long)
    torch.testing.assert_close(rows, rows_long)
    assert (plain - plain_long).abs().max() > 0.01
    on_policy = batch(0, (3, 2, 4), drift=0.0)
    found = gradient(sequence_mean(on_policy, 0.3), on_policy)[:, 0]
    torch.testing.assert_close(found, -0.3 * on_policy["advantages"][:, 0] / 3)


def test_on_policy_the_gradient_is_the_weighted_advantage() -> None:
    data = batch(4, drift=0.0)
    weights = token_mean_weights(data["control"], data["mask"], 0.4, data["control"].sum(), data["mask"].sum())
    expected = -data["advantages"] * weights / data["mask"].sum()
    torch.testing.assert_close(gradient(token_mean(data, 0.4), data), expected)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (0, 0), (0, 1)])
def test_means_over_nothing_are_0(lengths: tuple[int, ...]) -> None:
    data = batch(0, (*lengths, 2))
    data = {name: value[: len(lengths)] for name, value in data.items()}
    data["logps"] = data["logps"].detach().requires_grad_()
    for form in (token_mean, sequence_mean):
        loss = form(data, 0.5)
        assert math.isfinite(loss.item()) and torch.isfinite(gradient(loss, data)).all()


def test_what_counts_as_control_token() -> None:
    ids = torch.tensor([[7, 1, 2, 7, 1], [1, 7, 2, 8, 1], [8, 2, 3, 0, 0], [8, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    tools = torch.tensor([[1, 1, 0, 1, 1]] * 2 + [[1, 1, 1, 1, 1]] * 2)
    first = [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert control_tokens(ids, mask).int().tolist() == first
    known = [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert control_tokens(ids, mask, (7, 8)).int().tolist() == known
    every = [[1, 0, 0, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert control_tokens(ids, mask, None, tools).int().tolist() == every
    both = [[1, 0, 0, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert control_tokens(ids, mask, (7, 8), tools).int().tolist() == both


def test_advantages_of_the_cases_that_matter() -> None:
    """Right short answers get 1, wrong ones -1: one right one among G has A = 2 (1 - 1/G), no right one has 0."""
    rewards = torch.tensor([1.0, -1, -1, -1, -1, -1, -1, -1], dtype=torch.float64)
    found = group_normalize(rewards, torch.arange(8) // 4, scale=False)
    assert found[0].item() == pytest.approx(2 * (1 - 1 / 4)) and (found[4:] == 0).all()


# --- rewards ----------------------------------------------------------------------------------------------------------


def scored(reward: Any, *rows: tuple[str | None, str | None, Any]) -> list[float | None]:
    modes, answers, references = zip(*rows, strict=True)
    return reward(completions=[""] * len(rows), thinkless_mode=modes, thinkless_answer=answers, solution=references)


def test_rewards_of_modes() -> None:
    reward = mode_reward(lambda answer, solution: answer == solution, think=0.8, wrong_think=-0.5, format_error=-2.0)
    rows = [("short", "7", "7"), ("think", "7", "7"), ("short", "8", "7"), ("think", "8", "7")]
    rows += [(None, "7", "7"), ("think", None, "7")]
    assert scored(reward, *rows) == [1.0, 0.8, -1.0, -0.5, -2.0, -2.0]


def test_any_of_several_references_may_match_and_some_rows_cannot_be_told() -> None:
    reward = mode_reward(lambda answer, solution: None if solution is None else answer == solution)
    rows = [("short", "7", ["8", "7"]), ("short", "7", ["8", "9"]), ("short", "7", None), ("think", "7", [None, "7"])]
    assert scored(reward, *rows) == [1.0, -1.0, None, 0.5]


def test_accuracy_is_logged_per_mode() -> None:
    seen: list[tuple[str, float]] = []
    reward = mode_reward(lambda answer, solution: answer == solution)
    reward(
        completions=[""] * 4,
        thinkless_mode=["short", "think", "think", None],
        thinkless_answer=["7", "8", None, None],  # the third one never ended its thoughts
        solution=["7"] * 4,
        log_metric=lambda name, value: seen.append((name, value)),
    )
    wrong = ("thinkless/accuracy_think", 0.0)
    assert seen == [("thinkless/accuracy_short", 1.0), wrong, wrong]


def test_a_reward_of_modes_without_the_plugin_or_the_column() -> None:
    with pytest.raises(ValueError, match="enable that plugin"):
        boxed_reward(completions=["x"], solution=["7"])
    with pytest.raises(ValueError, match="the column 'solution', which the data lacks; it is called with answer"):
        boxed_reward(completions=["x"], thinkless_mode=["short"], thinkless_answer=["7"], answer=["7"])


def test_boxed_answers() -> None:
    assert boxed(r"so \boxed{1} and \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed(r"\boxed{7} then \boxed{8") == "7" and boxed("7") is None
    assert boxed_match(r"it is \boxed{ x + 1 }", "$x+1$") and boxed_match(r"\boxed{7}", r"so \boxed{7}")
    assert not boxed_match("7", "7") and not boxed_match(r"\boxed{8}", "7")


# --- control tokens and warm-up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_control_tokens_are_added_once_as_ordinary_tokens(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_ext.testing import tiny_model

    folder = tiny_model(tmp_path, tie_word_embeddings=tied)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    before = model.get_input_embeddings().weight.detach().clone()
    text = "<think>a</think><short>b"
    assert add_control_tokens(model, tokenizer) == ["<think>", "</think>", "<short>"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 5 and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert model.config.vocab_size == len(tokenizer) == len(before) + 3
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(layer.weight[ids[0]], layer.weight[: len(before)].mean(0))
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)
    assert add_control_tokens(model, tokenizer) == []


def test_texts_of_the_warm_up() -> None:
    example = {"prompt": "1+1=", "short": "2", "think": "one and one</think>2"}
    assert warmup_rows(example) == [
        {"prompt": "1+1=", "completion": "<short>2"},
        {"prompt": "1+1=", "completion": "<think>one and one</think>2"},
    ]
    marked = {"prompt": "1+1=", "short": "<short>2", "think": "<think>one and one</think>2"}
    assert warmup_rows(marked) == warmup_rows(example)
    with pytest.raises(ValueError, match="has no '</think>'"):
        warmup_rows(example | {"think": "one and one"})


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


# --- real runs --------------------------------------------------------------------------------------------------------


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


class Look(Plugin):
    name = "look"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


def noisy(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) * (n + 1) % 7) / 3 for n, ids in enumerate(completion_ids)]


COMMON = {"rewards": [noisy], "scale_rewards": "none", "optim": "sgd", "learning_rate": 0.5, "max_steps": 4}


def test_modes_answers_and_metrics(train: Any, plugin: Any) -> None:
    """The mode is the first token: `S` inside thoughts and `T ... E` inside a short answer change nothing."""
    asked: list[dict[str, Any]] = []

    def reward(thinkless_mode: Any, thinkless_answer: Any, **columns: Any) -> list[float]:
        asked.append({"modes": list(thinkless_mode), "answers": list(thinkless_answer)})
        return [{"think": 0.5, "short": 1.0, None: -1.0}[mode] for mode in thinkless_mode]

    with trl_ext.enable(plugin(Scripted), "thinkless", plugin(Look), thinkless=LETTERS | {"alpha": 0.25}):
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
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        losses = clipped_surrogate(loss.per_token_logps, loss.old_per_token_logps, loss.advantages, 0.2, 0.2)
        control = torch.zeros_like(loss.mask)
        control[:, 0] = loss.mask[:, 0]
        response = loss.mask * (1 - control)
        if loss.trainer.args.loss_type == "dapo":
            return PolicyLoss(0.3 * masked_mean(losses, control) + masked_mean(losses, response))
        rows = 0.3 * (losses * control).sum(1) + masked_mean(losses, response, dim=1)
        return PolicyLoss(rows.mean())


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
def test_accumulation_trains_alike(turns: str, control: str, train: Any, plugin: Any) -> None:
    """Control tokens and lengths differ between micro-batches; the means are those of the round."""
    options = LETTERS | {"alpha": 0.4, "turns": turns, "control": control}
    with trl_ext.enable(plugin(Tools), plugin(Scripted), "thinkless", plugin(Look), thinkless=options):
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


def test_masked_truncated_completions_leave_both_means(train: Any, plugin: Any) -> None:
    with trl_ext.enable("thinkless", plugin(Look), thinkless=LETTERS | {"alpha": 0.3}):
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


def test_rewards_that_cannot_be_told_and_constant_groups(train: Any, plugin: Any) -> None:
    def some(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [None if n == 0 else float(n) if n < 4 else -1.0 for n in range(len(completion_ids))]

    with trl_ext.enable("thinkless", plugin(Scripted), plugin(Look), thinkless=LETTERS):
        trainer = train(**COMMON | {"rewards": [some], "max_steps": 1})
        (round,) = trainer._trl_ext.plugins["look"].rounds
    assert (round.advantages[0] == 0).all() and (round.advantages[4:] == 0).all()
    assert (round.advantages[[1, 3]].abs().amax(1) > 0).all()
    assert logged(trainer, "thinkless/reward_think") == [pytest.approx((3 - 1 - 1) / 3)]


def test_with_adapters_shared_prefixes_kl_and_entropy(train: Any) -> None:
    from peft import LoraConfig

    common = COMMON | {"beta": 0.05, "num_iterations": 3, "max_steps": 3, "learning_rate": 2.0}
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


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "settings_", "expected"),
    [
        ({}, {"loss_type": "grpo"}, "thinkless needs loss_type='dapo', it is 'grpo': thinkless.aggregation=token_mean"),
        ({"aggregation": "sequence_mean"}, {}, "thinkless needs loss_type='grpo', it is 'dapo'"),
        ({}, {"importance_sampling_level": "sequence"}, "thinkless needs importance_sampling_level='token'"),
        (
            {},
            {"top_entropy_quantile": 0.2},
            "thinkless needs top_entropy_quantile=1.0, it is 0.2: it would drop",
        ),
        ({}, {"off_policy_mask_threshold": 0.5}, "thinkless needs off_policy_mask_threshold=None"),
    ],
)
def test_settings_that_do_not_fit(options: Any, settings_: dict[str, Any], expected: str, build: Any) -> None:
    from trl import GRPOConfig, GRPOTrainer

    if not all(hasattr(GRPOConfig, name) for name in settings_):
        pytest.skip("this TRL has no such setting")
    with trl_ext.enable("thinkless", thinkless=options), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=lambda **given_: GRPOTrainer(**given_ | {"model": "/no/such/model"}), **settings_)
    assert expected in str(caught.value)


def test_a_tokenizer_without_the_tokens(build: Any) -> None:
    expected = r"no single token for <think>, <short>, </think>, so the model cannot choose a mode\. Add them and teach"
    with trl_ext.enable("thinkless"), pytest.raises(trl_ext.ConfigError, match=expected):
        build()


@pytest.mark.parametrize("written", ["T", "TE", "S"])
def test_a_template_that_writes_the_mode(written: str, model: str, build: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    opening = "<|im_start|>assistant\n"
    assert tokenizer.chat_template.count(opening) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace(opening, opening + written)
    expected = f"thinkless: the chat template itself writes {written[0]!r} before the model's first token"
    with trl_ext.enable("thinkless", thinkless=LETTERS), pytest.raises(trl_ext.ConfigError) as caught:
        build(trainer={"processing_class": tokenizer})
    assert expected in str(caught.value)


def test_a_prompt_may_name_the_tokens_but_not_end_with_one(build: Any) -> None:
    from datasets import Dataset

    texts = {"fine": ["Take T or S:"] * 8, "written": ["Take T or S: T "] * 8}
    with trl_ext.enable("thinkless", thinkless=LETTERS):
        build(data=Dataset.from_dict({"prompt": texts["fine"]}), rewards=[noisy], max_steps=1).train()
        trainer = build(data=Dataset.from_dict({"prompt": texts["written"]}), rewards=[noisy], max_steps=1)
        with pytest.raises(ValueError, match="writes the control token itself; leave it to the model"):
            trainer.train()


def test_rloo_cannot_weigh_tokens(build: Any) -> None:
    with trl_ext.enable("thinkless"), pytest.raises(trl_ext.ConfigError, match="'thinkless' cannot serve the RLOO"):
        build("rloo")


@pytest.mark.parametrize(("options", "text"), [({"alpha": -1.0}, "alpha"), ({"think": "S", "short": "S"}, "different")])
def test_impossible_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=text):
        trl_ext.enable("thinkless", thinkless=options)


def test_the_help_says_how_to_choose_alpha(capsys: Any) -> None:
    """A rule, the metric that says whether it is kept, and examples on both ends that keep it."""
    from trl_ext.cli.main import main

    assert main(["show", "thinkless", "--json"]) == 0
    (alpha,) = [entry for entry in json.loads(capsys.readouterr().out)["options"] if entry["name"] == "alpha"]
    assert alpha["default"] == 0.001
    for words in (
        "start with 10 / mean response length",
        "(metric control_weight)",
        "at 10 sooner",
        "thousands of tokens",
    ):
        assert words in alpha["help"]
    assert main(["show", "thinkless"]) == 0
    assert "control_weight" in capsys.readouterr().out
