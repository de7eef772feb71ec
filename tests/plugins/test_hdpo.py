"""HDPO: its two channels, the loss of the second one token by token, and real runs with executed tool calls."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_ext
from trl_ext.testing import Scripted, calls, digits, reported, tiny_data, tiny_trainer
from trl_ext.tools import calculator
from trl_ext_hooks import Logps, Plugin, hookimpl
from trl_ext_plugins.hdpo import (
    accuracy_advantages,
    clipped_surrogate,
    importance_ratio,
    tool_advantages,
    tool_rewards,
)

NAN = math.nan
GROUPS = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=5
)


def rows_of(groups: list[list[tuple[int, bool]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(calls (N,), correct (N,), group ids (N,))."""
    counted, correct = zip(*(row for group in groups for row in group), strict=True)
    return torch.tensor(counted), torch.tensor(correct), torch.arange(4 * len(groups)) // 4


# --- the mathematics --------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.booleans())
def test_it_is_the_loop_of_the_definition(groups: list[list[tuple[int, bool]]], scale: bool) -> None:
    counted, correct, ids = rows_of(groups)
    found = tool_advantages(counted, correct, ids, scale=scale)
    for start, group in enumerate(groups):
        right = [1 / (m + 1) for m, ok in group if ok]
        for row, (m, ok) in enumerate(group):
            value = found[4 * start + row].item()
            if not ok or len(right) < 2 or max(right) - min(right) <= 1e-8:
                assert value == 0
                continue
            mean = math.fsum(right) / len(right)
            std = math.sqrt(sum((r - mean) ** 2 for r in right) / (len(right) - 1))
            expected = (1 / (m + 1) - mean) / (std + 1e-6 if scale else 1)
            assert value == pytest.approx(expected, abs=1e-9)
            assert (value == 0) == (abs(1 / (m + 1) - mean) <= 1e-8)
    rewards = tool_rewards(counted, correct)
    assert rewards.tolist() == [1 / (m + 1) if ok else 0 for group in groups for m, ok in group]


@settings(max_examples=100, deadline=None)
@given(GROUPS)
def test_the_right_ones_sum_to_0_and_fewer_calls_are_never_worse(groups: list[list[tuple[int, bool]]]) -> None:
    counted, correct, ids = rows_of(groups)
    found = tool_advantages(counted, correct, ids)
    assert (found[~correct] == 0).all()
    assert found.view(-1, 4).sum(1).abs().max() < 1e-7
    for group in ids.unique():
        mine = (ids == group) & correct
        ordered = found[mine][counted[mine].argsort()]
        assert (ordered.diff() <= 1e-12).all()


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.integers(0, 19), st.integers(0, 12))
def test_what_wrong_rollouts_called_is_nothing(groups: list[list[tuple[int, bool]]], row: int, other: int) -> None:
    counted, correct, ids = rows_of(groups)
    row %= len(counted)
    changed = counted.clone()
    changed[row] = other
    wrong = correct.clone()
    wrong[row] = False
    plain = tool_advantages(counted, wrong, ids)
    assert torch.equal(tool_advantages(changed, wrong, ids), plain)
    # turning one wrong takes it out of its own group and leaves the others alone
    elsewhere = ids != ids[row]
    assert torch.equal(tool_advantages(counted, correct, ids)[elsewhere], plain[elsewhere]) and plain[row] == 0


@pytest.mark.parametrize("size", range(2, 17))
def test_equal_calls_give_exactly_nothing(size: int) -> None:
    for m in (0, 1, 2, 5, 6, 9):
        found = tool_advantages(torch.full((size,), m), torch.ones(size).bool(), torch.zeros(size))
        assert (found.float() == 0).all()


def test_a_rollout_at_the_mean_has_no_signal() -> None:
    found = tool_advantages(torch.tensor([1, 2, 5]), torch.ones(3).bool(), torch.zeros(3))  # 1/2, 1/3, 1/6
    assert found[1] == 0 and found[0] > 0 > found[2]


def test_accuracy_is_normalised_over_everybody() -> None:
    rewards = torch.tensor([1.0, 0.1, 0.0, NAN, 0.9, 0.9, 0.9, 0.9, 1.0])
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    found = accuracy_advantages(rewards, ids)
    valid = rewards[:3].double()
    torch.testing.assert_close(found[:3], (valid - valid.mean()) / (valid.std() + 1e-6))
    assert found[3:].tolist() == [0] * 6  # NaN, constant, alone
    assert accuracy_advantages(rewards, ids, scale=False)[0].item() == pytest.approx(1 - 1.1 / 3)


def reference_surrogate(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    """The authors' order: clip, then the dual clip for negative advantages."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-ratio * advantage, -clipped * advantage)
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


@pytest.mark.parametrize("dual", [None, 3.0])
def test_the_surrogate_is_the_authors_dual_clip(dual: float | None) -> None:
    for ratio in (0.01, 0.5, 0.8, 1.0, 1.1, 1.3, 2.9, 3.1, 50.0):
        for advantage in (-2.0, -0.1, 0.0, 0.7):
            found = clipped_surrogate(torch.tensor(ratio), torch.tensor(advantage), 0.2, 0.28, dual).item()
            assert found == pytest.approx(reference_surrogate(ratio, advantage, 0.2, 0.28, dual), rel=1e-6)


def test_ratios_per_token_and_per_sequence() -> None:
    new, old = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -2.0, 9.0]])
    mask = torch.tensor([[1, 1, 0]])
    assert importance_ratio(new, old, mask)[0, :2].tolist() == pytest.approx([math.exp(0.5), 1])
    assert importance_ratio(new, old, mask, "sequence").tolist() == [[pytest.approx(math.exp(0.25))]]
    assert importance_ratio(new, old, mask * 0, "sequence").tolist() == [[1]]


# --- runs whose rollouts are written down -----------------------------------------------------------------------------


def rollout(turns: int, right: float | None, form: float = 1.0, tokens: int = 3, masked: int = 0) -> dict[str, Any]:
    """A rollout of some tokens, the second to the `masked + 1`st of which the model did not write."""
    ids = [10 + (7 * turns + 3 * j + 5 * int(bool(right)) + 11 * tokens) % 80 for j in range(tokens)]
    mask = [int(not 0 < j <= masked) for j in range(tokens)]
    return {"turns": turns, "right": right, "form": form, "completion_ids": ids, "env_mask": mask}


# two prompts: three right ones with 0, 2 and 2 calls; and two right ones with 1 and 4 calls
MIXED = [
    rollout(0, 1.0, 1.0, 3),
    rollout(2, 1.0, 1.0, 6, masked=2),
    rollout(2, 1.0, 0.0, 4, masked=1),
    rollout(3, 0.0, 1.0, 5, masked=3),
    rollout(1, 1.0, 1.0, 7, masked=4),
    rollout(4, 1.0, 1.0, 5, masked=2),
    rollout(0, 0.0, 0.0, 2),
    rollout(5, 0.0, 1.0, 8, masked=5),
]
ALL_RIGHT = [rollout(m, 1.0, 1.0, 2 + m, masked=m) for m in (0, 1, 3, 7, 2, 2, 2, 2)]
REWARDS = [reported("right"), reported("form")]
OPTIONS = {"format_reward": "form", "calls_field": "turns"}
SETTINGS: dict[str, Any] = {"rewards": REWARDS, "shuffle_dataset": False, "max_steps": 1, "max_grad_norm": 1e9}


class Look(Plugin):
    """Keeps every finished round."""

    name = "look"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


Run = Callable[..., tuple[Any, list[Any]]]


@pytest.fixture
def scripted(build: Any, plugin: Any) -> Run:
    """Trains on scripted rounds of 8 rows, two prompts of 4; gives the trainer and its rounds."""

    def run(
        *rounds: Any, options: dict[str, Any] | None = None, also: Any = (), **settings: Any
    ) -> tuple[Any, list[Any]]:
        given = {"rollout_func": Scripted(*rounds), **settings.pop("trainer", {})}
        defaults = {**SETTINGS, "data": tiny_data(rows=2), "max_steps": len(rounds)}
        with trl_ext.enable(plugin(Look), *also, hdpo={**OPTIONS, **(options or {})}):
            trainer = build(trainer=given, **defaults | settings)
            trainer.train()
            return trainer, trainer._trl_ext.plugins["look"].rounds

    return run


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def moved(trainer: Any, build: Any) -> float:
    fresh = dict(build().model.named_parameters())
    return max((value - fresh[name]).abs().max().item() for name, value in trainer.model.named_parameters())


def same_weights(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_both_channels_of_a_round(scripted: Run) -> None:
    trainer, (round,) = scripted(MIXED)
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64)
    expected = accuracy_advantages((round.rewards.double() * weights).sum(1), round.group_ids)
    torch.testing.assert_close(round.advantages.double(), expected, atol=1e-5, rtol=0)
    tool = round.batch["hdpo_tool_advantages"]
    third = torch.tensor([1, 1 / 3, 1 / 3])
    torch.testing.assert_close(tool[:3], (third - third.mean()) / (third.std() + 1e-6), atol=1e-5, rtol=0)
    assert tool[4].item() == pytest.approx(math.sqrt(0.5), abs=1e-4) and tool[5] == -tool[4]
    assert tool[[3, 6, 7]].tolist() == [0, 0, 0]
    # tokens that the model wrote, of rollouts with a signal and of all
    written = [3, 4, 3, 2, 3, 3, 2, 3]
    assert round.loss_mask.sum(1).tolist() == written
    assert round.batch["hdpo_tool_share"].item() == pytest.approx(16 / 23)
    assert logged(trainer, "reward")[0] == pytest.approx((0.9 * 5 + 0.1 * 6) / 8)
    assert logged(trainer, "rewards/right/mean")[0] == pytest.approx(5 / 8)
    for key, value in (("signal", 5 / 8), ("correct", 5 / 8), ("tool_rate", 6 / 8), ("tool_calls_mean", 17 / 8)):
        assert logged(trainer, f"hdpo/{key}") == [pytest.approx(value)], key
    assert logged(trainer, "hdpo/tool_calls_correct") == [pytest.approx(9 / 5)]


class Leaves(Plugin):
    """Cuts the graph at the log-probabilities, off the sampling policy, so that their gradients can be read."""

    name = "leaves"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.leaf: torch.Tensor | None = None
        self.batches: list[tuple[torch.Tensor, dict[str, Any]]] = []

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Logps:
        result = compute()
        if call.role != "policy":
            return result
        completions = call.input_ids[:, -call.logits_to_keep :]
        drift = 0.7 * torch.sin(completions.float()) * (result.per_token_logps != 0)
        self.leaf = (result.per_token_logps + drift).detach().requires_grad_()
        return dataclasses.replace(result, per_token_logps=self.leaf)

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        assert self.leaf is not None
        self.batches.append((self.leaf, dict(loss.batch)))


def expected_gradients(
    batches: list[tuple[torch.Tensor, dict[str, Any]]], args: Any, w_tool: float
) -> list[torch.Tensor]:
    """Gradients of w_acc L_acc + w_tool L_tool over one optimizer step, written down without the plugin's code."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf, _ in batches]

    def pieces(index: int, key: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token losses (m, T), their mask, and which rows take part."""
        batch, logps = batches[index][1], leaves[index]
        mask = (batch["completion_mask"] * batch["tool_mask"]).float()
        difference = logps - batch["old_per_token_logps"]
        if args.importance_sampling_level == "sequence":
            difference = ((difference * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(mask)
        advantage = batch[key].unsqueeze(1)
        ratio, loss = difference.exp(), None
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
        loss = torch.max(-ratio * advantage, -clipped * advantage)
        if args.delta is not None:
            loss = torch.where(advantage < 0, torch.min(loss, -args.delta * advantage), loss)
        rows = (batch[key] != 0) if key != "advantages" else batch.get("trl_ext_kept", torch.ones(len(mask)).bool())
        return loss, mask * rows.unsqueeze(1), rows

    def channel(key: str) -> torch.Tensor:
        parts = [pieces(index, key) for index in range(len(batches))]
        if args.loss_type == "bnpo":
            return sum((loss * mask).sum() / mask.sum().clamp(min=1) for loss, mask, _ in parts) / len(parts)  # type: ignore
        total = sum((loss * mask).sum() for loss, mask, _ in parts)
        count = sum(int(rows.sum()) for _, _, rows in parts)
        if args.loss_type == "dapo":
            return total / sum(mask.sum() for _, mask, _ in parts)
        if args.loss_type == "grpo":
            means = [(loss * mask).sum(1) / mask.sum(1).clamp(min=1) for loss, mask, _ in parts]
            return sum(mean.sum() for mean in means) / count
        if args.loss_type == "dr_grpo":
            return total / (count * args.max_completion_length)
        return total / count  # luspo

    (channel("advantages") + w_tool * channel("hdpo_tool_advantages")).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


LOSSES = [(kind, "token", None) for kind in ("dapo", "bnpo", "grpo", "dr_grpo", "luspo")]
LOSSES += [("dapo", "token", 3.0), ("dapo", "sequence", None), ("grpo", "sequence", 3.0), ("luspo", "sequence", None)]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("loss_type", "level", "delta"), LOSSES)
def test_gradients_of_every_token(
    loss_type: str, level: str, delta: float | None, accumulation: int, scripted: Run, plugin: Any
) -> None:
    """Rounds are used twice, so ratios leave 1 and the clips act."""
    trainer, _ = scripted(
        MIXED,
        options={"w_tool": 0.3},
        also=[plugin(Leaves)],
        loss_type=loss_type,
        importance_sampling_level=level,
        delta=delta,
        epsilon_high=0.28,
        num_iterations=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    batches = LEFT.pop()
    assert len(batches) == accumulation
    if accumulation > 1:  # a micro-batch without any signal is among the cases
        assert {bool((batch["hdpo_tool_advantages"] != 0).any()) for _, batch in batches} >= {True}
    expected = expected_gradients(batches, trainer.args, 0.3)
    ratios = [(leaf - batch["old_per_token_logps"]).exp() for leaf, batch in batches]
    assert max(ratio.max() for ratio in ratios) > 1.5 and min(ratio.min() for ratio in ratios) < 0.7
    for (leaf, batch), wanted in zip(batches, expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, wanted, atol=1e-6, rtol=1e-4)
        # tokens that a tool wrote, and padding, have none
        assert (leaf.grad[(batch["completion_mask"] * batch["tool_mask"]) == 0] == 0).all()


class Drop(Plugin):
    """Leaves out a right rollout with a signal, a wrong one, and another one of the second prompt."""

    name = "drop"
    trainers = ("grpo",)

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        return torch.tensor([True, False, True, False, True, True, True, False])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_rows_that_another_plugin_leaves_out(loss_type: str, scripted: Run, plugin: Any) -> None:
    """They are in no denominator of either channel; the statistics were made with them."""
    settings = {"loss_type": loss_type, "num_iterations": 2, "epsilon_high": 0.2}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer, (round,) = scripted(MIXED, options={"w_tool": 0.3}, also=[plugin(Drop), plugin(Leaves)], **settings)
    batches = LEFT.pop()
    for (leaf, _), wanted in zip(batches, expected_gradients(batches, trainer.args, 0.3), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, wanted, atol=1e-6, rtol=1e-4)
    assert round.kept.tolist() == Drop().keep_rows(round=None).tolist()
    _, (whole,) = scripted(MIXED, **settings)
    kept = whole.batch["hdpo_tool_advantages"] * round.kept
    assert torch.equal(round.batch["hdpo_tool_advantages"], kept) and (kept != 0).sum() == 4
    if loss_type != "dapo":
        assert round.batch["hdpo_tool_share"].item() == pytest.approx(4 / 5)


LEFT: list[Any] = []


@pytest.fixture(autouse=True)
def keep_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's instance ends with its trainer's session; its batches are kept."""
    LEFT.clear()
    original = Leaves.__init__

    def __init__(self: Leaves, options: Any = None) -> None:
        original(self, options)
        LEFT.append(self.batches)

    monkeypatch.setattr(Leaves, "__init__", __init__)


def test_without_the_tool_loss_it_is_grpo_on_the_weighted_rewards(scripted: Run, build: Any) -> None:
    settings = {"loss_type": "dapo", "num_iterations": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.05}
    settings |= {"per_device_train_batch_size": 4, "optim": "sgd"}
    ours, _ = scripted(MIXED, ALL_RIGHT, options={"w_tool": 0.0, "eps": 1e-4}, **settings)
    common = {**SETTINGS, **settings, "data": tiny_data(rows=2), "max_steps": 2, "reward_weights": [0.9, 0.1]}
    stock = build(trainer={"rollout_func": Scripted(MIXED, ALL_RIGHT)}, **common)
    stock.train()
    for key in ("loss", "grad_norm", "reward", "reward_std", "entropy", "clip_ratio/region_mean"):
        assert logged(ours, key) == pytest.approx(logged(stock, key), abs=1e-6), key
    same_weights(stock, ours, 1e-6)
    assert logged(ours, "hdpo/tool") == [0.0, 0.0]
    with_tool, _ = scripted(MIXED, ALL_RIGHT, options={"eps": 1e-4}, **settings)
    assert logged(with_tool, "grad_norm")[0] != pytest.approx(logged(stock, "grad_norm")[0], rel=1e-3)


def test_where_all_are_right_only_economy_is_learnt(scripted: Run, build: Any) -> None:
    silent, (round,) = scripted(ALL_RIGHT, options={"w_tool": 0.0})
    assert (round.advantages == 0).all() and logged(silent, "grad_norm") == [0.0]
    trainer, (round,) = scripted(ALL_RIGHT)
    assert (round.batch["hdpo_tool_advantages"][4:] == 0).all() and (round.advantages == 0).all()
    assert logged(trainer, "grad_norm")[0] > 0 and moved(trainer, build) > 1e-4
    double, _ = scripted(ALL_RIGHT, options={"w_tool": 0.3})
    assert logged(double, "grad_norm")[0] == pytest.approx(2 * logged(trainer, "grad_norm")[0], rel=1e-4)


def test_the_leanest_right_rollout_is_pulled_up(scripted: Run, plugin: Any) -> None:
    found = []
    for w_tool in (0.0, 0.15):
        scripted(MIXED, options={"w_tool": w_tool}, also=[plugin(Leaves)], num_iterations=1)
        ((leaf, batch),) = LEFT.pop()
        lean = batch["hdpo_tool_advantages"].argmax()
        wasteful = batch["hdpo_tool_advantages"].argmin()
        assert leaf.grad is not None
        mask = batch["completion_mask"] * batch["tool_mask"]
        found.append([(leaf.grad[row] * mask[row]).sum().item() for row in (lean, wasteful)])
    assert found[1][0] < found[0][0] < 0 and found[1][1] > found[0][1]


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo", "luspo"])
def test_a_batch_twice_has_the_loss_of_the_batch(loss_type: str, scripted: Run) -> None:
    once, _ = scripted(MIXED, loss_type=loss_type)
    twice, _ = scripted(MIXED + MIXED, loss_type=loss_type, per_device_train_batch_size=16, data=tiny_data(rows=4))
    for key in ("hdpo/tool", "loss", "grad_norm"):
        assert logged(twice, key) == pytest.approx(logged(once, key), rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_it_trains_alike_for_1x8_and_8x1(loss_type: str, scripted: Run, build: Any) -> None:
    common = {"loss_type": loss_type, "optim": "sgd", "learning_rate": 0.05}
    whole, _ = scripted(MIXED, ALL_RIGHT, **common)
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    split, _ = scripted(MIXED, ALL_RIGHT, **single, **common)
    same_weights(whole, split, 2e-6)
    assert logged(split, "hdpo/tool") == pytest.approx(logged(whole, "hdpo/tool"), rel=1e-3, abs=1e-6)
    assert moved(whole, build) > 1e-4


def test_rounds_that_span_several_optimizer_steps(scripted: Run) -> None:
    """steps_per_generation above the accumulation: the count of a round is rescaled to one step, as TRL does."""
    trainer, rounds = scripted(
        MIXED, MIXED, loss_type="dapo", per_device_train_batch_size=2, steps_per_generation=4, learning_rate=0.0
    )
    assert len(rounds) == 1  # two of its four steps
    halves = logged(trainer, "hdpo/tool")
    trainer, _ = scripted(
        *[MIXED] * 4, loss_type="dapo", per_device_train_batch_size=2, steps_per_generation=4, learning_rate=0.0
    )
    parts = logged(trainer, "hdpo/tool")
    assert parts[:2] == halves
    whole, _ = scripted(MIXED, loss_type="dapo")
    assert sum(parts) / 4 == pytest.approx(logged(whole, "hdpo/tool")[0], abs=1e-6)


def test_the_denominator_of_the_readme(scripted: Run) -> None:
    signal, (round,) = scripted(MIXED)
    everybody, _ = scripted(MIXED, options={"tool_loss_denominator": "all"})
    share = round.batch["hdpo_tool_share"].item()
    assert 0.5 < share < 1
    assert logged(everybody, "hdpo/tool")[0] == pytest.approx(share * logged(signal, "hdpo/tool")[0], rel=1e-4)


NOBODY = [rollout(m, 0.0, m % 2, 3 + m % 3) for m in range(8)]
ONE = [rollout(m, float(m == 2), 1.0, 3 + m % 3) for m in range(8)]


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo"])
@pytest.mark.parametrize("rows", [NOBODY, ONE], ids=["nobody", "one"])
def test_without_a_pair_of_right_answers(rows: Any, loss_type: str, scripted: Run) -> None:
    trainer, (round,) = scripted(rows, loss_type=loss_type)
    assert (round.batch["hdpo_tool_advantages"] == 0).all() and round.batch["hdpo_tool_share"] == 0
    assert logged(trainer, "hdpo/tool") == [0.0]
    plain, _ = scripted(rows, loss_type=loss_type, options={"w_tool": 0.0})
    same_weights(plain, trainer, 0.0)
    assert (round.advantages[:4] != 0).any()  # forms, or the right one, are still told apart


def test_correctness_that_does_not_apply(scripted: Run) -> None:
    """Such a rollout is neither right nor wrong: it is in no statistic, and has no advantage."""
    rows = [rollout(0, None), rollout(1, 1.0), rollout(3, 1.0), rollout(2, 0.0)]
    _, (round,) = scripted(rows + MIXED[4:])
    assert round.advantages[0] == 0 and round.batch["hdpo_tool_advantages"][0] == 0
    valid = torch.tensor([1.0, 1.0, 0.1])
    torch.testing.assert_close(round.advantages[1:4], (valid - valid.mean()) / (valid.std() + 1e-6), atol=1e-5, rtol=0)
    assert round.batch["hdpo_tool_advantages"][1] > 0 > round.batch["hdpo_tool_advantages"][2]


def test_a_form_that_does_not_apply_counts_nothing(scripted: Run) -> None:
    rows = [rollout(0, 1.0, None), rollout(1, 1.0), rollout(3, 0.0), rollout(2, 0.0)]  # type: ignore[arg-type]
    _, (round,) = scripted(rows + MIXED[4:])
    values = torch.tensor([0.9, 1.0, 0.1, 0.1])
    torch.testing.assert_close(
        round.advantages[:4], (values - values.mean()) / (values.std() + 1e-6), atol=1e-5, rtol=0
    )


def test_more_rewards_join_the_accuracy_channel_by_their_weights(scripted: Run) -> None:
    third = reported("turns")
    _, (round,) = scripted(
        MIXED, rewards=[third, *REWARDS], reward_weights=[0.01, 2.0, 1.0], options={"correct_reward": "right"}
    )
    assert round.reward_weights.tolist() == pytest.approx([0.01, 1.8, 0.1])
    total = (round.rewards.double() * torch.tensor([0.01, 1.8, 0.1])).sum(1)
    torch.testing.assert_close(
        round.advantages.double(), accuracy_advantages(total, round.group_ids), atol=1e-5, rtol=0
    )
    _, (plain,) = scripted(MIXED)
    assert torch.equal(round.batch["hdpo_tool_advantages"], plain.batch["hdpo_tool_advantages"])


def test_a_threshold_of_the_score(scripted: Run) -> None:
    rows = [rollout(0, 0.4), rollout(1, 0.6), rollout(2, 0.9), rollout(3, 0.5)]
    _, (round,) = scripted(rows + MIXED[4:], options={"correct_threshold": 0.5})
    assert [value != 0 for value in round.batch["hdpo_tool_advantages"][:4].tolist()] == [False, True, True, False]


def test_empty_completions_contribute_nothing(scripted: Run, plugin: Any) -> None:
    rows = [*MIXED[:5], rollout(4, 1.0, 1.0, 1, masked=0), *MIXED[6:]]
    rows[5]["env_mask"] = [0]  # right, and not a token of its own
    _, (round,) = scripted(rows, also=[plugin(Leaves)], num_iterations=2)
    assert round.batch["hdpo_tool_advantages"][5] != 0
    assert round.batch["hdpo_tool_share"].item() == pytest.approx(13 / 20)
    batches = LEFT.pop()
    for leaf, batch in batches:
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
        empty = (batch["completion_mask"] * batch["tool_mask"]).sum(1) == 0
        assert (leaf.grad[empty] == 0).all()


def test_a_group_of_one_in_evaluation_gives_nothing(build: Any, plugin: Any) -> None:
    data = tiny_data(rows=2)
    with trl_ext.enable(plugin(Look), hdpo=OPTIONS):
        extra = {"rollout_func": Scripted(MIXED, MIXED[:2]), "eval_dataset": data}
        trainer = build(trainer=extra, num_generations_eval=1, data=data, **SETTINGS)
        trainer.train()
        trainer.evaluate()
        last = trainer._trl_ext.plugins["look"].rounds[-1]
    assert last.mode == "eval" and last.advantages.tolist() == [0, 0]
    assert last.batch["hdpo_tool_advantages"].tolist() == [0, 0] and logged(trainer, "eval_hdpo/tool") == [0]


def test_evaluation_of_whole_groups(build: Any, plugin: Any) -> None:
    data = tiny_data(rows=2)
    with trl_ext.enable(plugin(Look), hdpo=OPTIONS):
        trainer = build(trainer={"rollout_func": Scripted(MIXED), "eval_dataset": data}, data=data, **SETTINGS)
        trainer.train()
        trainer.evaluate()
        first, last = trainer._trl_ext.plugins["look"].rounds
    assert torch.equal(first.batch["hdpo_tool_advantages"], last.batch["hdpo_tool_advantages"])
    assert torch.equal(first.batch["hdpo_tool_share"], last.batch["hdpo_tool_share"])
    assert math.isfinite(logged(trainer, "eval_loss")[0])


def test_it_resumes_exactly(build: Any, tmp_path: Path) -> None:
    def run(script: Scripted, resume: str | None = None) -> Any:
        with trl_ext.enable(hdpo=OPTIONS):
            common = {**SETTINGS, "data": tiny_data(rows=2), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
            trainer = build(trainer={"rollout_func": script}, output=tmp_path / "run", **common)
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(Scripted(MIXED, ALL_RIGHT))
    resumed = run(Scripted(ALL_RIGHT), str(tmp_path / "run" / "checkpoint-1"))
    same_weights(whole, resumed, 0.0)


def test_adapters_learn_the_tool_loss_too(scripted: Run) -> None:
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    trainer, _ = scripted(ALL_RIGHT, trainer=extra)
    learnt = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert learnt and all(value.abs().max() > 0 for value in learnt)  # they start at 0, and accuracy is silent


def test_otc_beside_hdpo_changes_accuracy_only(scripted: Run) -> None:
    """HDPO reads correctness before OTC multiplies, in whatever order the two are named."""
    _, (plain,) = scripted(MIXED, options={"correct_threshold": 0.9})
    other = {"otc": {"c": 4, "calls_field": "turns"}}
    _, (both,) = scripted(MIXED, options={"correct_threshold": 0.9}, also=[other])
    assert (both.rewards[:, 0] < 0.9)[plain.rewards[:, 0] == 1].any()
    assert torch.equal(both.batch["hdpo_tool_advantages"], plain.batch["hdpo_tool_advantages"])
    assert not torch.equal(both.advantages, plain.advantages)


# --- executed calls ---------------------------------------------------------------------------------------------------


def answered(completions: list[Any], **kwargs: Any) -> list[float]:
    """Whether a rollout ends with an answer rather than with a call that nobody executed."""
    return [float(not completion[-1].get("tool_calls")) for completion in completions]


@pytest.mark.parametrize("also", [[], ["shared-prefix"]], ids=["dense", "shared-prefix"])
def test_real_tools_in_trls_own_loop(also: list[str], tool_model: str, tmp_path: Path, plugin: Any) -> None:
    settings: dict[str, Any] = {"max_completion_length": 200, "max_tool_calling_iterations": 2, "max_steps": 3}
    settings["generation_kwargs"] = calls(tool_model, "calculator", likelihood=4.0, expression="6 * 7")
    settings |= {"data": tiny_data(rows=2), "learning_rate": 1e-3, "beta": 0.01, "delta": 3.0}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    with trl_ext.enable("hdpo", plugin(Look), *also):
        trainer = tiny_trainer(
            "grpo",
            tool_model,
            tmp_path / "run",
            rewards=[answered, digits],
            trainer={"tools": [calculator]},
            **settings,
        )
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        rounds = trainer._trl_ext.plugins["look"].rounds
    signals = 0
    for round in rounds:
        correct = torch.tensor(answered(round.completions)).bool()
        counted = torch.tensor(
            [sum(message["role"] == "tool" for message in completion) for completion in round.completions]
        )
        expected = tool_advantages(counted, correct, round.group_ids)
        torch.testing.assert_close(round.batch["hdpo_tool_advantages"].double(), expected, atol=1e-6, rtol=0)
        tokens = (round.loss_mask.sum(1) * (expected != 0)).sum() / round.loss_mask.sum()
        torch.testing.assert_close(round.batch["hdpo_tool_share"], tokens.float())
        assert ((round.batch["tool_mask"] == 0).any(1) == (counted > 0)).all()
        signals += int((expected != 0).sum())
    assert signals > 0 and len(rounds) == 2
    assert any((value - before[name]).abs().max() > 1e-5 for name, value in trainer.model.named_parameters())
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_truncated_rollouts_can_be_masked(scripted: Run) -> None:
    """No scripted completion ends its turn but those made so; the others lose their tokens in both channels."""
    end = 3
    rows = [
        {**row, "completion_ids": [*row["completion_ids"][:-1], end]} if i % 2 else row for i, row in enumerate(MIXED)
    ]
    trainer, (round,) = scripted(rows, mask_truncated_completions=True)
    assert trainer.processing_class.eos_token_id == end
    written = round.loss_mask.sum(1)
    assert written[::2].tolist() == [0] * 4 and (written[1::2] > 0).all()
    signal = round.batch["hdpo_tool_advantages"] != 0
    assert round.batch["hdpo_tool_share"].item() == pytest.approx(
        (written * signal).sum().item() / written.sum().item()
    )
    assert math.isfinite(logged(trainer, "loss")[0])


# --- runs that cannot work --------------------------------------------------------------------------------------------


def unloadable(**arguments: Any) -> Any:
    from trl import GRPOTrainer

    return GRPOTrainer(**arguments | {"model": "/no/such/model"})


ROLLOUT = {"rollout_func": lambda prompts, trainer: {}}


@pytest.mark.parametrize(
    ("options", "settings", "text"),
    [
        ({}, {"trainer": {}}, "hdpo: rollouts must be able to call tools; give the trainer `tools`"),
        (
            {"calls_field": None},
            {},
            "a rollout_func hold no tool messages, so no call would be counted. Set hdpo.calls_field",
        ),
        ({"correct_reward": "digit"}, {}, "called 'digit'. Did you mean 'digits'? Known: brevity, digits."),
        ({"format_reward": "form"}, {}, "hdpo: no reward function is called 'form'. Known: brevity, digits."),
        (
            {"format_reward": "digits"},
            {},
            "format_reward is 'digits', the first reward function, which judges the answer",
        ),
        (
            {},
            {"loss_type": "cispo", "epsilon_high": 5.0},
            "hdpo needs loss_type='dapo' or 'bnpo' or 'grpo' or 'dr_grpo'",
        ),
        ({}, {"top_entropy_quantile": 0.2}, "hdpo needs top_entropy_quantile=1.0, it is 0.2"),
        ({}, {"off_policy_mask_threshold": 0.5}, "hdpo needs off_policy_mask_threshold=None, it is 0.5"),
        ({}, {"scale_rewards": "none"}, "hdpo needs scale_rewards='group', it is 'none': HDPO normalises itself"),
        ({}, {"multi_objective_aggregation": "normalize_then_sum"}, "hdpo needs multi_objective_aggregation="),
    ],
)
def test_refused_before_the_model_is_loaded(options: Any, settings: Any, text: str, build: Any) -> None:
    given = {"calls_field": "turns", **options}
    with trl_ext.enable("hdpo", hdpo=given), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=unloadable, **{"trainer": ROLLOUT, **settings})
    assert text in str(caught.value)


def test_other_estimators_and_trainers_are_refused(build: Any) -> None:
    with pytest.raises(trl_ext.ConfigError, match="both claim estimator"):
        trl_ext.enable("hdpo", "gdpo")
    with (
        trl_ext.enable("hdpo"),
        pytest.raises(trl_ext.ConfigError, match="cannot serve the RLOO trainer; it serves grpo"),
    ):
        build("rloo")


def test_the_authors_dual_clip_is_recommended(build: Any) -> None:
    with trl_ext.enable(hdpo={"calls_field": "turns"}):
        notes = build(trainer=ROLLOUT)._trl_ext.plan.notes
        assert notes == ("hdpo recommends delta=3.0 (authors' code: dual clip); it is None",)
        assert build(trainer=ROLLOUT, delta=3.0)._trl_ext.plan.notes == ()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"w_tool": -0.1}, "w_tool and w_fmt at least 0"),
        ({"w_ans": 0.5}, "w_ans and w_fmt must add up to 1, they give 0.6"),
        ({"eps": 0}, "eps must be greater than 0"),
        ({"correct_reward": "a", "format_reward": "a"}, "must be two reward functions"),
        ({"call_tag": "<call>", "calls_field": "turns"}, "call_tag and calls_field exclude each other"),
        ({"tool_loss_denominator": "some"}, "expected 'signal' or 'all'"),
    ],
)
def test_wrong_options(options: Any, text: str) -> None:
    with pytest.raises(trl_ext.OptionError) as caught:
        trl_ext.enable("hdpo", hdpo=options)
    assert text in str(caught.value)
