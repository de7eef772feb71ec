"""Dynamic reward weighting in rounds and losses made by hand, on one process and on two, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trl_ext
from tests.engine.stages.ranks import Ranks, RankView
from tests.refusals import refused
from trl_ext.testing import tiny_data
from trl_ext_hooks import UsageError
from trl_ext_hooks.basics import MetricLog
from trl_ext_plugins.dynamic_weights import DynamicWeights

NAMES = ("right", "short")


def method(**options: Any) -> DynamicWeights:
    return DynamicWeights(DynamicWeights.Options(**options))


def round_of(*rewards: list[float], mode: str = "train", weights: tuple[float, ...] = (1.0, 1.0)) -> SimpleNamespace:
    log = MetricLog("dynamic-weights")
    return SimpleNamespace(
        rewards=torch.tensor(rewards),
        reward_names=NAMES,
        reward_weights=torch.tensor(weights),
        advantages=torch.arange(4.0),
        mode=mode,
        log=log.add,
        logged=lambda name: log.values[f"dynamic-weights/{name}"][0],
    )


def factors(plugin: DynamicWeights, *points: list[float], **more: Any) -> list[float]:
    """What advantages are multiplied by in rounds whose mean rewards are these points."""
    found = []
    for point in points:
        round = round_of(point, **more)
        result = plugin.advantages(round)
        assert result is not None and torch.equal(result, round.advantages * plugin.factor)
        assert round.logged("factor") == plugin.factor
        found.append(plugin.factor)
    return found


def test_a_gain_of_volume_raises_the_step() -> None:
    plugin = method(normalise=False)
    found = factors(plugin, [0.5, 0.4], [0.6, 0.5], [0.55, 0.45], [0.6, 0.5], [0.5, 0.9])
    # the reference itself, a first point, one that it covers, the same again, and a long box beside it
    gains = [0.01, 0.0, 0.0, 0.0]
    assert found == [1.0, *(pytest.approx(0.5 + 1.5 * math.tanh(gain), abs=1e-6) for gain in gains)]
    assert plugin.archive == [[pytest.approx(0.6), 0.5]]  # no box has an area where one objective is the reference
    assert factors(plugin, [0.52, 0.8])[0] > 0.5 and len(plugin.archive) == 2
    assert factors(plugin, [0.7, 0.9])[0] > 0.5 and len(plugin.archive) == 1  # covers both


def test_rewards_of_another_scale_weigh_the_same() -> None:
    rows = [[0.0, 100.0], [1.0, 300.0]], [[1.0, 300.0], [1.0, 300.0]]
    plain, scaled = method(), method()
    for rewards in rows:
        plain.advantages(round_of(*rewards))
        scaled.advantages(round_of(*([a, b / 100] for a, b in rewards)))
    assert plain.units == pytest.approx([0.5, 100]) and plain.factor == pytest.approx(scaled.factor)
    assert plain.factor == pytest.approx(0.5 + 1.5 * math.tanh(1))  # one deviation of each
    constant = method()
    constant.advantages(round_of([0.1, 0.0], [0.1, 1.0], [0.1, 0.0]))
    assert constant.units[0] == 1


def test_a_negative_weight_means_that_less_is_better() -> None:
    up, down = method(normalise=False), method(normalise=False)
    factors(up, [0.5, 0.5], [0.7, 0.3])
    factors(down, [0.5, 0.5], [0.7, 0.3], weights=(1.0, -1.0))
    assert up.factor == 0.5 and down.factor == pytest.approx(0.5 + 1.5 * math.tanh(0.04), abs=1e-6)


def test_a_round_without_one_of_the_rewards_is_no_measurement() -> None:
    plugin = method(normalise=False)
    factors(plugin, [0.5, 0.5], [0.6, 0.6])
    before = plugin.factor
    assert factors(plugin, [math.nan, 0.9]) == [before] and before > 0.5


def test_evaluations_measure_the_rounds_after_them() -> None:
    plugin = method(measure="eval", normalise=False)
    for values in ([0.4, 0.4], [0.6, 0.6]):  # two batches of one evaluation
        assert plugin.advantages(round_of(values, mode="eval")) is None
    assert factors(plugin, [9.0, 9.0]) == [1.0] and plugin.reference == pytest.approx([0.5, 0.5])
    assert factors(plugin, [7.0, 9.0]) == [1.0]  # nothing was evaluated since
    plugin.advantages(round_of([0.7, 0.7], mode="eval"))
    assert factors(plugin, [0.0, 0.0], [0.0, 0.0]) == [pytest.approx(0.5 + 1.5 * math.tanh(0.04), abs=1e-6)] * 2
    training = method()
    assert training.advantages(round_of([1.0, 1.0], mode="eval")) is None and training.reference is None


class View(RankView):
    """A process of a run whose policy has three parameters."""

    kind = "grpo"
    learning_rate = 0.01
    args = SimpleNamespace(max_grad_norm=1.0, scale_rewards="group")

    def __init__(self, ranks: Ranks, rank: int) -> None:
        super().__init__(ranks, rank)
        self.unwrapped_model = torch.nn.Module()
        self.unwrapped_model.layer = torch.nn.Parameter(torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64))
        self.unwrapped_model.head = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._ranks.gather(self.process_index, tensor)).sum(0)


def gradient_step(view: View, micro_batches: int) -> DynamicWeights:
    """One optimizer step on eight rows of two groups, dealt to processes and micro-batches."""
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(8, 5, 3, generator=draw, dtype=torch.float64)
    rewards = torch.randn(8, 2, generator=draw)
    mask = (torch.rand(8, 5, generator=draw) < 0.7).double()
    plugin = method(way="gradient", regularization=0.002, parameters="lay")
    assert plugin.setup(view) == []
    scored = SimpleNamespace(mode="train", rewards=rewards, reward_names=NAMES, reward_weights=torch.tensor([3.0, 1.0]))
    assert plugin.rewards(scored).weights.tolist() == [3.0, 1.0]
    size = 8 // view.num_processes
    own = slice(view.process_index * size, (view.process_index + 1) * size)
    ids = torch.arange(8) // 4
    round = SimpleNamespace(mode="train", rewards=rewards, group_ids=ids, local=own, trainer=view)
    fields = plugin.batch_fields(round)["dynamic_weights_advantages"]
    parts = zip(*(torch.chunk(x, micro_batches) for x in (fields, features[own], mask[own])), strict=True)
    for advantages, inputs, counted in parts:
        logps = torch.log_softmax(inputs, dim=2) @ view.unwrapped_model.layer
        loss = SimpleNamespace(mode="train", per_token_logps=logps, old_per_token_logps=logps.detach(), mask=counted)
        loss.batch, loss.clip_range, loss.sampling_ratio = {"dynamic_weights_advantages": advantages}, (0.2, 0.2), None
        assert plugin.loss_terms(loss) == {} and logps.requires_grad
    plugin.optimizer_step(view)
    assert plugin._gradients is None
    assert plugin.rewards(scored).weights.tolist() == pytest.approx([4 * weight for weight in plugin.weights])
    scored.mode = "eval"
    assert plugin.rewards(scored) is None
    return plugin


def test_processes_and_micro_batches_change_no_weight() -> None:
    one = gradient_step(View(Ranks(1), 0), 1)
    assert sum(one.weights) == pytest.approx(1) and abs(one.weights[0] - 0.75) > 1e-3
    for count, micro_batches in ((1, 4), (2, 1), (2, 2)):
        ranks = Ranks(count)
        plugins = ranks.run(lambda rank, ranks=ranks, number=micro_batches: gradient_step(View(ranks, rank), number))
        for plugin in plugins:
            assert plugin.weights == pytest.approx(one.weights, rel=1e-5) and plugin.weights == plugins[0].weights


def test_gradients_that_are_not_finite() -> None:
    plugin = method(way="gradient")
    plugin.weights, plugin._gradients, plugin._tokens = [0.5, 0.5], torch.full((2, 3), torch.nan), 4.0
    with refused(UsageError, "gradients of single rewards are not finite", "Lower learning_rate"):
        plugin.optimizer_step(View(Ranks(1), 0))


def test_refusals_and_warnings(build: Any) -> None:
    gradient = {"way": "gradient"}
    with trl_ext.enable({"dynamic-weights": gradient}):
        with refused(trl_ext.ConfigError, "reward_weights=[1.0, -1.0] must not be negative", "Turn the reward"):
            build(reward_weights=[1.0, -1.0])
        with refused(trl_ext.ConfigError, "reentrant checkpointing allows one", "{'use_reentrant': False}"):
            build(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
        (note,) = build()._trl_ext.plan.notes
        assert "learning_rate=0.01 / dynamic-weights.regularization=1e-05 is 1000" in note
        assert not build(learning_rate=1e-6)._trl_ext.plan.notes
    with (
        trl_ext.enable({"dynamic-weights": {**gradient, "parameters": "nobody"}}),
        refused(trl_ext.ConfigError, "no parameter that trains has a name with", "Names look like model."),
    ):
        build()
    with refused(trl_ext.OptionError, "parameters='(' is not a regular expression"):
        trl_ext.enable({"dynamic-weights": {**gradient, "parameters": "("}})
    with trl_ext.enable({"dynamic-weights": {"measure": "eval"}}):
        with refused(trl_ext.ConfigError, 'needs evaluations, and eval_strategy is "no"', 'Set eval_strategy="steps"'):
            build()
        (note,) = build(
            eval_strategy="steps", eval_steps=1, trainer={"eval_dataset": tiny_data(rows=4)}
        )._trl_ext.plan.notes
        assert "eval_on_start=True takes it before training" in note
