"""Scoring: the hooks `annotate` and `rewards`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_ext_hooks import Rewards, Rollout, Scored

from ...errors import ConfigError, PluginError, TrlExtError
from ...support.reward_functions import infinite_rewards
from ...trl_internals import rewards, trainer_state
from ..calls import as_mapping
from ..context import Context

HOOKS = (
    "annotate",
    "rewards",
    "advantages",
    "keep_rows",
    "token_mask",
    "token_weights",
    "batch_fields",
    "round_metrics",
)
"""The hooks that need a scored round."""


def score(
    context: Context,
    rows: list[dict[str, Any]],
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    stock: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Annotates the rollout, runs the reward functions, and lets plugins rewrite the rewards of all processes."""
    acting = context.calls.has(*HOOKS)
    if not (context.recording or acting):
        return stock(rows, prompts, completions, completion_ids)
    rollout = _rollout(context, rows, prompts, completions, completion_ids)
    fields, gathered = _annotate(context, rollout)
    if fields:
        rows = [{**row, **{name: values[i] for name, values in fields.items()}} for i, row in enumerate(rows)]
    values = stock(rows, prompts, completions, completion_ids)
    trainer = context.trainer
    names, weights = rewards.reward_names(trainer), rewards.reward_weights(trainer)
    expected = (len(rollout.group_ids), len(names))
    if tuple(values.shape) != expected:
        raise PluginError(
            f"{type(trainer).__name__} scored a round as {tuple(values.shape)}, expected {expected}: rows of all "
            f"processes by reward functions."
        )
    if acting:
        _check_finite(values, [f"reward function {name!r}" for name in names], ConfigError)
    scored = Scored(
        **vars(rollout), fields=fields, gathered=gathered, rewards=values, reward_names=names, reward_weights=weights
    )
    context.show("TRL", scored)
    scored = _rewrite(context, scored)
    state = context.current_round()
    state.rollout, state.scored = rollout, scored
    if acting:  # a record alone changes nothing
        rewards.use_columns(trainer, scored.reward_names, scored.reward_weights)
    return scored.rewards


def _check_finite(values: torch.Tensor, sources: Sequence[str], error: type[TrlExtError]) -> None:
    """Refuses infinite rewards (N, F), which TRL would turn into advantages of 0 for whole groups. NaN is allowed.

    Raises:
        error: Naming the first source, one per column, of an infinite reward. Equal on every process.
    """
    if not values.isinf().any():
        return
    for source, column in zip(sources, values.T.tolist(), strict=True):
        complaint = infinite_rewards(source, column)
        if complaint:
            raise error(complaint)


def _rollout(
    context: Context, rows: list[dict[str, Any]], prompts: list[Any], completions: list[Any], ids: list[list[int]]
) -> Rollout:
    trainer, view = context.trainer, context.view
    group = trainer_state.num_generations(trainer)
    total = len(rows) * view.num_processes
    return Rollout(
        mode=trainer_state.mode(trainer),
        step=trainer.state.global_step,
        num_generations=group,
        rows=rows,
        prompts=prompts,
        completions=completions,
        completion_ids=ids,
        tool_mask=context.current_round().tool_mask,
        group_ids=torch.arange(total, device=view.device) // group,
        offset=view.process_index * len(rows),
        trainer=view,
        turns=context.current_round().turns,
        tool_iterations=trainer_state.tool_iterations(trainer),
        data_rows=context.current_round().data_rows,
        metric_log=context.current_round().log,
    )


def _annotate(context: Context, rollout: Rollout) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    fields: dict[str, Any] = {}
    gathered: dict[str, torch.Tensor] = {}
    for name, result in context.calls.each("annotate", rollout=rollout):
        for field, values in as_mapping(name, "annotate", result).items():
            context.calls.check_declared(name, "annotate", field)
            if rollout.rows and field in rollout.rows[0]:
                raise PluginError(f"plugin {name!r} annotated {field!r}, which is a column of the data already.")
            if len(values) != len(rollout.rows):
                raise PluginError(
                    f"plugin {name!r} annotated {field!r} with {len(values)} values, expected one for each of "
                    f"{len(rollout.rows)} rows."
                )
            fields[field] = values
            if isinstance(values, torch.Tensor):
                gathered[field] = context.view.gather(values.to(context.view.device))
    return fields, gathered


def _rewrite(context: Context, scored: Scored) -> Scored:
    for name, caller in context.calls.chain("rewards"):
        result = context.calls.call(name, "rewards", caller, scored=scored)
        if result is None:
            continue
        if isinstance(result, torch.Tensor):
            result = Rewards(result, scored.reward_names, scored.reward_weights)
        if not isinstance(result, Rewards):
            raise PluginError(
                f"plugin {name!r} returned {type(result).__name__} from 'rewards', expected a tensor or Rewards."
            )
        expected = (len(scored.group_ids), len(result.names))
        if tuple(result.values.shape) != expected or len(result.weights) != len(result.names):
            raise PluginError(
                f"plugin {name!r} returned rewards {tuple(result.values.shape)} with {len(result.weights)} weights, "
                f"expected {expected} and {len(result.names)} for the columns {', '.join(result.names)}."
            )
        _check_finite(result.values, [f"plugin {name!r}, reward {reward!r}," for reward in result.names], PluginError)
        scored = dataclasses.replace(
            scored,
            rewards=result.values.to(scored.rewards),
            reward_names=tuple(result.names),
            reward_weights=result.weights.to(scored.reward_weights),
        )
        context.show(name, scored)
    return scored
