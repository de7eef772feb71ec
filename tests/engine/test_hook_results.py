"""Results of hooks that stop the first round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

import trl_ext
from tests.refusals import refused
from trl_ext import PluginError, api
from trl_ext.plan.stages import ROUNDS
from trl_ext.testing import digits
from trl_ext_hooks import (
    Generation,
    Logps,
    Plugin,
    PolicyLoss,
    Rewards,
    SelectedRows,
    hookimpl,
)


def returning(hook: str, value: Any, **attributes: Any) -> type[Plugin]:
    """A plugin whose hook returns `value`, or `value(first argument)` when that can be called."""

    def made(self: Any, given: Any) -> Any:
        return value(given) if callable(value) else value

    argument = {"annotate": "rollout", "rewards": "scored", "loss_inputs": "batch", "select_rows": "rows"}
    argument |= {"advantages": "round", "batch_fields": "round", "round_metrics": "round"}
    parameter = argument.get(hook, "loss")
    scope: dict[str, Any] = {"made": made, "hookimpl": hookimpl, "Plugin": Plugin}
    exec(
        f"class Returning(Plugin):\n    name = 'returning'\n    trainers = ('grpo', 'rloo')\n"
        f"    @hookimpl\n    def {hook}(self, {parameter}): return made(self, {parameter})\n",
        scope,
    )
    for key, changed in attributes.items():
        setattr(scope["Returning"], key, changed)
    return scope["Returning"]


def nan_at(count: int) -> Callable[[Any], torch.Tensor]:
    def make(round: Any) -> torch.Tensor:
        out = round.advantages.clone()
        out[:count] = torch.nan
        return out

    return make


NAMES = ("digits", "brevity")
OTHER_NAMES = Rewards(torch.zeros(8, 2), ("digits", "bonus"), torch.ones(2))
CASES: list[Any] = [
    ("select_rows", lambda rows: rows[:3], "returned 3 rows from 'select_rows', expected 8: as many as it got"),
    (
        "select_rows",
        lambda rows: rows[::2] * 2,
        "rows of different prompts in one group from 'select_rows': rows 0 and",
    ),
    ("select_rows", lambda rows: SelectedRows(rows, [0] * 3 + [1] * 5), "rows of different prompts in one group"),
    (
        "select_rows",
        lambda rows: SelectedRows(rows, [0] * 8 + [1]),
        "returned 9 group_ids from 'select_rows', expected 8",
    ),
    ("annotate", [1], "returned list from 'annotate', expected a mapping"),
    ("annotate", {"undeclared": [0] * 8}, "returned 'undeclared' from 'annotate' without declaring it"),
    ("annotate", {"mine": [0] * 3}, "annotated 'mine' with 3 values, expected one for each of 8 rows"),
    ("annotate", {"index": [0] * 8}, "annotated 'index', which is a column of the data already"),
    ("rewards", [[1.0, 2.0]] * 8, "returned list from 'rewards', expected a tensor or Rewards"),
    ("rewards", torch.zeros(8, 3), "returned rewards (8, 3) with 2 weights, expected (8, 2) and 2 for the columns"),
    ("rewards", torch.zeros(8), "returned rewards (8,) with 2 weights, expected (8, 2)"),
    (
        "rewards",
        Rewards(torch.zeros(8, 2), ("digits", "brevity"), torch.ones(3)),
        "with 3 weights, expected (8, 2) and 2",
    ),
    (
        "rewards",
        Rewards(torch.zeros(8, 1), ("digits", "brevity"), torch.ones(2)),
        "returned rewards (8, 1) with 2 weights",
    ),
    ("rewards", OTHER_NAMES, "returned the reward columns digits, bonus from 'rewards', expected digits, brevity."),
    ("advantages", [0.0] * 8, "returned list from 'advantages', expected a tensor"),
    ("advantages", torch.zeros(7), "returned advantages (7,), expected (8,) for the rows of all processes"),
    ("advantages", torch.zeros(8, 3), "returned advantages (8, 3), expected (8,)"),
    ("advantages", torch.zeros(8, 8, 1), "returned advantages (8, 8, 1), expected (8,)"),
    ("advantages", nan_at(3), "returned advantages that are not finite: 3 of 8"),
    ("advantages", lambda round: round.advantages * torch.inf, "returned advantages that are not finite: 8 of 8"),
    ("advantages", torch.zeros(8, dtype=torch.complex64), "returned torch.complex64 from 'advantages', expected real"),
    ("batch_fields", 3, "returned int from 'batch_fields', expected a mapping"),
    ("batch_fields", {"undeclared": torch.zeros(8)}, "'undeclared' from 'batch_fields' without declaring it"),
    ("batch_fields", {"mine": torch.zeros(5)}, "returned (5,) for the batch field 'mine', expected a tensor with 8"),
    ("batch_fields", {"mine": [0.0] * 8}, "returned list for the batch field 'mine', expected a tensor with 8 rows"),
    ("batch_fields", {"advantages": torch.zeros(8)}, "the batch field 'advantages', which the trainer already has"),
    ("round_metrics", {"x": 1.0}, "reported 'x' as 1.0, expected a pair (sum, count)"),
    ("round_metrics", [("x", 1)], "returned list from 'round_metrics', expected a mapping"),
    ("loss_metrics", {"x": (1, 2, 3)}, "reported 'x' as (1, 2, 3), expected a pair (sum, count)"),
    ("loss_inputs", {"advantage": torch.zeros(8)}, "returned 'advantage' from 'loss_inputs'; the batch has prompt_ids"),
    ("loss_inputs", torch.zeros(8), "returned Tensor from 'loss_inputs', expected a mapping"),
    ("loss_inputs", {"advantages": torch.zeros(3)}, "returned torch.float32 (3,) for 'advantages' from 'loss_inputs'"),
    ("loss_inputs", {"completion_mask": torch.ones(8, 8)}, "torch.float32 (8, 8) for 'completion_mask' from"),
    ("loss_inputs", {"advantages": [0.0] * 8}, "list for 'advantages' from 'loss_inputs', expected torch.float32 (8,)"),
    ("loss_terms", {"x": torch.tensor(torch.nan)}, "returned the loss term 'x' that is nan, expected a finite number"),
    ("loss_terms", torch.zeros(()), "returned Tensor from 'loss_terms', expected a mapping"),
    ("loss_terms", {"x": 1.0}, "returned the loss term 'x' as float, expected a 0-d tensor or PolicyLoss"),
    ("loss_terms", {"x": torch.zeros(8)}, "returned the loss term 'x' as shape (8,), expected a 0-d tensor"),
    ("loss_terms", {"x": PolicyLoss(torch.zeros(8, 3))}, "a loss of shape (8, 3), expected a scalar or (8, 8)"),
    ("policy_loss", torch.zeros(()), "returned Tensor from 'policy_loss', expected PolicyLoss"),
    ("policy_loss", PolicyLoss([0.0]), "returned a loss whose values are list, expected a tensor"),  # type: ignore[arg-type]
    ("policy_loss", PolicyLoss(torch.zeros(8, 8), "mean"), "normalisation='mean', expected one of 'trainer', 'tok"),  # type: ignore[arg-type]
    ("policy_loss", PolicyLoss(torch.zeros(8, 8), "share"), "(8, 8) with normalisation='share', expected a scalar"),
    (
        "policy_loss",
        PolicyLoss(torch.tensor(torch.inf)),
        "returned a policy loss that is inf, expected a finite number",
    ),
    ("policy_loss", PolicyLoss(torch.zeros(8, 8)), "the loss of plugin 'returning' has no gradient"),
    ("policy_loss", PolicyLoss(torch.zeros(8, 3)), "returned a loss of shape (8, 3), expected a scalar or (8, 8)"),
]
FIRST = {case[0]: case for case in reversed(CASES)}
WRONG = [pytest.param("grpo", *case, id=f"grpo-{case[0]}-{number}") for number, case in enumerate(CASES)]
WRONG += [pytest.param("rloo", *case, id=f"rloo-{hook}") for hook, case in FIRST.items()]


@pytest.mark.parametrize(("kind", "hook", "value", "expected"), WRONG)
def test_wrong_results_stop_the_first_round(
    kind: str, hook: str, value: Any, expected: str, build: Any, plugin: Any
) -> None:
    cls = returning(hook, value, fields=("mine", "index", "advantages"))
    with trl_ext.enable(plugin(cls)):
        trainer = build(kind)
        with refused(PluginError, expected):
            trainer.train()


def test_grpo_is_told_of_both_shapes_and_rloo_of_one(build: Any, plugin: Any) -> None:
    reference = plugin(returning("advantages", lambda round: round.token_advantages))
    with trl_ext.enable(reference):
        build("grpo", max_steps=1).train()
        with refused(PluginError, "returned advantages (8, 8), expected (8,) for the rows of all processes."):
            build("rloo").train()
    with (
        trl_ext.enable(plugin(returning("advantages", torch.zeros(3)))),
        refused(PluginError, "expected (8,) for the rows of all processes or (8, 8) for this process's tokens"),
    ):
        build().train()


def test_rows_after_tokens(build: Any, plugin: Any) -> None:
    class First(Plugin):
        name = "first"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round: Any) -> torch.Tensor:
            return round.token_advantages

    second = plugin(returning("advantages", torch.zeros(8)))
    expected = (
        "plugin 'returning' returned one advantage per row where an earlier plugin made one per token; return (8, 8)"
    )
    with trl_ext.enable(plugin(First), second), refused(PluginError, expected):
        build().train()


class BadForward(Plugin):
    name = "bad-forward"
    trainers = ROUNDS
    result: Any = None

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Any:
        return type(self).result(compute())


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (lambda logps: logps.per_token_logps, "returned Tensor from 'logps', expected Logps with (8, 8)"),
        (lambda logps: Logps(logps.per_token_logps[:, 1:]), "returned (8, 7) from 'logps', expected Logps with (8, 8)"),
        (
            lambda logps: Logps(logps.per_token_logps, logps.entropies[:3]),
            "returned entropies (3, 8) from 'logps', exp",
        ),
        (
            lambda logps: Logps(logps.per_token_logps.detach(), logps.entropies),
            "returned log-probabilities without grad",
        ),
        (lambda logps: Logps(logps.per_token_logps), "returned no entropies from 'logps', which the policy forward"),
    ],
)
def test_a_wrong_forward(result: Any, expected: str, build: Any, plugin: Any) -> None:
    class Bad(BadForward):
        pass

    Bad.result = staticmethod(result)
    with trl_ext.enable(plugin(Bad)), refused(PluginError, f"plugin 'bad-forward' {expected}"):
        build().train()


class BadRollout(Plugin):
    name = "bad-rollout"
    trainers = ROUNDS

    @hookimpl
    def rollout(self, prompts: Any, generate: Any) -> Any:
        result = generate(prompts)
        return Generation(result.prompt_ids, result.completion_ids[:2], result.completions, extra=result.extra)


def test_a_wrong_rollout(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(BadRollout)):
        trainer = build()
        with refused(PluginError, "'bad-rollout' returned 2 completions from 'rollout', expected a Generation with 8"):
            trainer.train()


def test_what_a_hook_raises_keeps_its_type_and_names_the_plugin(build: Any, plugin: Any) -> None:
    def fail(round: Any) -> None:
        raise ZeroDivisionError("by nothing")

    with trl_ext.enable(plugin(returning("advantages", fail))), pytest.raises(ZeroDivisionError) as caught:
        build().train()
    assert caught.value.__notes__ == ["raised in the hook 'advantages' of the trl_ext plugin 'returning'"]


def test_nothing_is_left_installed_after_an_error_in_training(build: Any, plugin: Any) -> None:
    from trl.trainer import grpo_trainer

    shuffle = grpo_trainer.shuffle_sequence_dict
    bad = returning("loss_terms", {"x": 1.0}, needs=("grouped_order",))
    with trl_ext.enable(plugin(bad)):
        trainer = build()
        with pytest.raises(PluginError):
            trainer.train()
    assert grpo_trainer.shuffle_sequence_dict is shuffle
    assert type(trainer) is GRPOTrainer and api._active is None
    build().train()


def test_a_reward_function_of_wrong_length_fails_loudly(build: Any) -> None:
    def three(completions: Any, **kwargs: Any) -> list[float]:
        return [1.0] * 3

    with trl_ext.enable("gdpo"), pytest.raises((ValueError, RuntimeError)):
        build(rewards=[digits, three]).train()
