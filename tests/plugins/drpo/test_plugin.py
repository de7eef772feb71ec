"""DRPO and DisCO: the loss of a step on several processes, rows that take no part, warnings and refusals."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trl_ext
from tests.engine.stages.ranks import Ranks, RankView
from tests.refusals import refused
from trl_ext.testing import tiny_args
from trl_ext_hooks import Config, Loss, Plugin, StepBatch, hookimpl
from trl_ext_plugins.drpo import DRPO, DisCO
from trl_ext_plugins.drpo.maths import completion_scores, constraint_factor, contrast, kl_values, length_logits

ROWS, TOKENS = 12, 5
OPTIONS = {"kl_limit": 1e-3, "kl_penalty": 20.0, "tau": 0.3}
PLUGINS = [DRPO(DRPO.Options(**OPTIONS)), DisCO(DisCO.Options(**OPTIONS)), DisCO(DisCO.Options(score="Lratio"))]


class TrainerView(RankView):
    kind = "grpo"
    args = SimpleNamespace(max_completion_length=20)


def rows() -> dict[str, torch.Tensor]:
    """Three groups of four rows, one of them with right answers only, and a row without a class."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand((ROWS, TOKENS), generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, TOKENS + 1, (ROWS, 1), generator=generator)
    return {
        "logps": old - 0.1 * torch.rand(old.shape, generator=generator, dtype=torch.float64),
        "old_per_token_logps": old,
        "completion_mask": (torch.arange(TOKENS) < lengths).long(),
        "trl_ext_group_ids": torch.arange(ROWS) // 4,
        "contrast_right": torch.tensor([1, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, math.nan]).double(),
        "contrast_counted": torch.ones(ROWS, dtype=torch.bool),
    }


def step_gradient(plugin: Plugin, batch: dict[str, torch.Tensor], ranks: int, parts: int) -> tuple[float, torch.Tensor]:
    """Returns the loss of a step, and its gradient by every log-probability, from micro-batches of several processes.

    The core averages over the micro-batches of a process, and DDP over processes.
    """
    group = Ranks(ranks)

    def process(rank: int) -> tuple[float, torch.Tensor]:
        own = {name: value.chunk(ranks)[rank] for name, value in batch.items()}
        trainer: Any = TrainerView(group, rank)
        losses = []
        for position in range(parts):
            part = {name: value.chunk(parts)[position] for name, value in own.items()}
            logps = part.pop("logps").clone().requires_grad_()
            losses.append(Loss("train", 0, trainer, part, logps, None, position=position))
        seen = [dataclasses.replace(loss, per_token_logps=loss.per_token_logps.detach()) for loss in losses]
        weights = plugin.step_statistics(step=StepBatch("train", 0, trainer, tuple(seen)))  # type: ignore[attr-defined]
        total = torch.zeros((), dtype=torch.float64)
        for loss in losses:
            knowing = dataclasses.replace(loss, step_statistics={plugin.name: weights})
            total = total + plugin.policy_loss(loss=knowing).values / parts  # type: ignore[attr-defined]
        gradients = torch.autograd.grad(total, [loss.per_token_logps for loss in losses])
        return total.item(), torch.cat(gradients)

    results = group.run(process)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return sum(value for value, _ in results) / ranks, torch.cat([gradient for _, gradient in results]) / ranks


def whole(plugin: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    """The same from the formula, on all rows at once."""
    logps, old, mask = batch["logps"].clone().requires_grad_(), batch["old_per_token_logps"], batch["completion_mask"]
    mask = mask * batch["contrast_counted"].unsqueeze(1)
    temperature = plugin.options.length_temperature if plugin.name == "drpo" else math.inf
    kept = batch["contrast_counted"]
    scores = completion_scores(logps, old, mask, plugin.score)
    logits = length_logits(mask.sum(1), 20, temperature)
    classes, ids = batch["contrast_right"][kept], batch["trl_ext_group_ids"][kept]
    result = contrast(scores.detach()[kept], classes, ids, logits[kept], plugin.tau)
    kl = (kl_values(logps, old) * mask).sum() / mask.sum()
    factor = constraint_factor(kl.detach(), plugin.options.kl_limit, plugin.options.kl_penalty)
    assert factor > 0 and result.mixed == 2
    (gradient,) = torch.autograd.grad(factor * kl - (result.slopes * scores[kept]).sum(), logps)
    return (factor * kl.detach() - result.value).item(), gradient


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda plugin: f"{plugin.name}-{plugin.score}")
@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (1, 3), (2, 1), (3, 2), (2, 3), (12, 1)])
def test_a_step_is_the_formula_on_all_its_rows(plugin: Any, ranks: int, parts: int) -> None:
    """Also where a group lies on several processes, or on several micro-batches of them."""
    value, gradient = step_gradient(plugin, rows(), ranks, parts)
    expected, wanted = whole(plugin, rows())
    assert value == pytest.approx(expected, abs=1e-12) and wanted.abs().max() > 0.05
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_rows_that_are_left_out_count_nowhere() -> None:
    batch = rows()
    batch["contrast_counted"][[0, 4, 5, 6, 7]] = False
    batch["tool_mask"] = batch["contrast_counted"].long().unsqueeze(1).expand(-1, TOKENS)
    fewer = {name: value[batch["contrast_counted"]] for name, value in batch.items()}
    value, gradient = step_gradient(PLUGINS[0], batch, 2, 3)
    expected, wanted = whole(PLUGINS[0], fewer)  # of two prompts, not of three
    assert value == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient[batch["contrast_counted"]], wanted, atol=1e-12, rtol=0)
    assert (gradient[~batch["contrast_counted"]] == 0).all()


def test_the_ratio_to_another_sampler_weighs_the_gradient_of_the_objective_only() -> None:
    ratio = torch.linspace(0, 2, ROWS * TOKENS, dtype=torch.float64).view(ROWS, TOKENS)
    plugin = DisCO(DisCO.Options(kl_penalty=0.0))
    value, plain = step_gradient(plugin, rows(), 1, 1)
    same, weighed = step_gradient(plugin, rows() | {"importance_sampling_ratio": ratio}, 1, 1)
    assert same == pytest.approx(value)
    torch.testing.assert_close(weighed, plain * ratio)


class Gaps(Plugin):
    """Leaves the first row of a round out, and masks the second one away, as TRL does with truncated ones."""

    name = "gaps"
    trainers = ("grpo",)

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        return torch.arange(len(round.group_ids)) > 0

    @hookimpl
    def token_mask(self, round: Any) -> torch.Tensor:
        keep = round.loss_mask != 0
        keep[1] = False
        return keep


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """1, 0.5, 0 and no reward in turn."""
    return [(1.0, 0.5, 0.0, None)[row % 4] for row in range(len(completion_ids))]


def test_classes_of_a_round_and_what_is_shown_of_them(train: Any, plugin: Any, look: str, tmp_path: Any) -> None:
    with trl_ext.enable("drpo", plugin(Gaps), look, drpo={"correct_reward": "length", "correct_threshold": 0.4}):
        trainer = train(rewards=[lambda completion_ids, **kwargs: [0.0] * len(completion_ids), length], max_steps=1)
        (round,) = trainer._trl_ext.plugins["look"].rounds
        views = trainer._trl_ext.plugins["drpo"].inspect(round=round)
    classes, counted = round.batch["contrast_right"], round.batch["contrast_counted"]
    torch.testing.assert_close(classes, torch.tensor([1.0, 1, 0, math.nan] * 2).double(), equal_nan=True)
    assert counted.tolist() == [False, False] + [True] * 6
    spans = {span.row: (span.label, span.value) for span in views.spans}
    assert {row: label for row, (label, _) in spans.items()} == {
        row: ("right", "right", "wrong")[row % 4] for row in range(8) if row % 4 < 3
    }
    assert spans[2][1] is None and spans[4][1] + spans[5][1] == pytest.approx(1) and spans[0][1] == 0
    logs = trainer.state.log_history[0]
    assert logs["drpo/mixed_prompts"] == 0.5  # none of the first group is left that is right


def test_one_update_per_generation_is_said(build: Any) -> None:
    def notes(name: str, **settings: Any) -> str:
        return " ".join(build(**settings)._trl_ext.plan.notes)

    text = "with one update per generation the KL to the policy that sampled is 0 and its constraint never acts"
    with trl_ext.enable("drpo"):
        assert f"drpo: {text}; the authors make 4 updates, as steps_per_generation=4 does" in notes("drpo")
        assert "'digits' alone says what is right (correct_reward), and brevity only logged" in notes("drpo")
        for several in ({"steps_per_generation": 4}, {"num_iterations": 4}):
            assert text not in notes("drpo", **several)
    with trl_ext.enable("disco", disco={"score": "Lratio"}):
        assert "never acts, all ratios are 1 and all wrong answers weigh the same" in notes("disco")


def test_the_way_to_several_updates_where_a_group_lies_on_two_processes(tmp_path: Any) -> None:
    args = tiny_args("grpo", tmp_path)
    args.per_device_train_batch_size = 2  # groups have four rows
    (warning,) = PLUGINS[0].configure(config=Config("grpo", args, ("digits",), ("prompt",), ()))
    assert warning.message.endswith("the authors make 4 updates, as num_iterations=4 does")


def test_what_is_refused(build: Any) -> None:
    with trl_ext.enable("disco"):
        with refused(trl_ext.ConfigError, "disco: every optimizer step must hold whole groups, and with"):
            build(per_device_train_batch_size=2, steps_per_generation=4)
        with refused(trl_ext.ConfigError, "disco replaces the policy loss and does not apply beta=0.1; set beta=0.0"):
            build(beta=0.1)
        build(max_completion_length=None)
    with trl_ext.enable("drpo"), refused(trl_ext.ConfigError, "max_completion_length, which is None.", "Set max_com"):
        build(max_completion_length=None)
    for options, text in (
        ({"negatives": "mean", "tau": 3.0}, "has no temperature; leave tau out"),
        ({"tau": 0.0}, "tau"),
        ({"kl_limit": -1.0}, "kl_limit"),
    ):
        with pytest.raises(trl_ext.OptionError, match=text):
            trl_ext.enable("disco", disco=options)
    with refused(trl_ext.ConfigError, "both claim"):
        trl_ext.enable("disco", "drpo")
    with refused(trl_ext.ConfigError, "'dvao' makes advantages, and the loss of 'drpo' uses none"):
        trl_ext.enable("dvao", "drpo")
