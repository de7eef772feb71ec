"""Scoring: the hooks `annotate` and `rewards`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_ext_hooks import Rewards, Rollout, Scored

from ...errors import ConfigError, PluginError, TrlExtError
from ...support.reward_functions import infinite_rewards
from ...trl_internals import rewards, trainer_state
from ..agreement import check_equal, together
from ..calls import as_mapping
from ..context import Context
from . import groups

FINISHING = (
    *("advantages", "mix_advantages", "keep_rows", "token_mask", "token_weights", "batch_fields"),
    "round_metrics",
)
"""The hooks that run when TRL has finished a round."""
HOOKS = ("annotate", "rewards", *FINISHING)
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
    state = context.current_round()
    acting = context.calls.has(*HOOKS) or state.group_ids is not None or bool(state.fields)
    if not (context.recording or acting):
        return stock(rows, prompts, completions, completion_ids)
    if len(rows) != len(completions):
        raise PluginError(
            f"{type(context.trainer).__name__} scored {len(completions)} completions with {len(rows)} rows. A subclass "
            f"that overrides `_generate_and_score_completions` must pass the list of rows on that it got, because "
            f"{context.plan.forms_groups!r} adds rows to it."
        )
    trainer = context.trainer
    rollout = _rollout(context, rows, prompts, completions, completion_ids)
    fields, gathered = _annotate(context, rollout)
    if fields:
        rows = [{**row, **{name: values[i] for name, values in fields.items()}} for i, row in enumerate(rows)]
    with trainer_state.environments_of(trainer, state.source):
        values = stock(rows, prompts, completions, completion_ids)
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
    scored = _without_padding(scored)
    context.show("TRL", scored)
    scored = _rewrite(context, scored)
    state.rollout, state.scored = rollout, scored
    if acting:  # a record alone changes nothing
        rewards.use_columns(trainer, scored.reward_names, scored.reward_weights)
    return scored.rewards


def _without_padding(scored: Scored) -> Scored:
    """Takes the rewards from rows that only fill up a process, so that no statistic counts them."""
    padding = scored.group_ids == groups.PADDING
    if not padding.any():
        return scored
    return dataclasses.replace(scored, rewards=scored.rewards.masked_fill(padding.unsqueeze(1), torch.nan))


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
    trainer, view, state = context.trainer, context.view, context.current_round()
    return Rollout(
        mode=trainer_state.mode(trainer),
        step=trainer.state.global_step,
        num_generations=state.num_generations,
        rows=rows,
        prompts=prompts,
        completions=completions,
        completion_ids=ids,
        tool_mask=state.tool_mask,
        group_ids=groups.ids_of(context, len(rows)),
        offset=view.process_index * len(rows),
        trainer=view,
        turns=groups.turns_of(state.turns, state.source),
        tool_iterations=trainer_state.tool_iterations(trainer),
        data_rows=state.data_rows,
        source=list(range(len(rows))) if state.source is None else list(state.source),
        metric_log=state.log,
    )


def _annotate(context: Context, rollout: Rollout) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    fields: dict[str, Any] = dict(context.current_round().fields)
    gathered = {
        field: context.view.gather(values.to(context.view.device))
        for field, values in fields.items()
        if isinstance(values, torch.Tensor)
    }
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
        planned = context.plan.reward_columns.get(name, scored.reward_names)
        # not inside `together`: the hook may gather, and others may wait for it there
        returned = context.calls.call(name, "rewards", caller, scored=scored)
        result, answers = together(context, functools.partial(_shared, name, returned, scored, planned))
        if any((answer is None) != (answers[0] is None) for answer in answers):
            raise PluginError(
                f"plugin {name!r} returned None from 'rewards' on some processes and rewards on others, expected the "
                f"same on every process."
            )
        if result is None:
            continue
        known = [answer for answer in answers if answer is not None]
        for column in range(len(result.names)):
            check_equal(name, "rewards", [answer[:, column] for answer in known])
        _check_finite(result.values, [f"plugin {name!r}, reward {reward!r}," for reward in result.names], PluginError)
        scored = _without_padding(
            dataclasses.replace(
                scored,
                rewards=result.values.to(scored.rewards),
                reward_names=tuple(result.names),
                reward_weights=result.weights.to(scored.reward_weights),
            )
        )
        context.show(name, scored)
    return scored


def _shared(
    name: str, returned: Any, scored: Scored, planned: tuple[str, ...]
) -> tuple[Rewards | None, torch.Tensor | None]:
    """Returns the rewards that a plugin made on this process, and their values and weights in one tensor (N + 1, F)."""
    result = _rewards_of(name, returned, scored, planned)
    if result is None:
        return None, None
    return result, torch.cat([result.values.cpu(), result.weights.cpu().unsqueeze(0)])


def _rewards_of(name: str, result: Any, scored: Scored, planned: tuple[str, ...]) -> Rewards | None:
    """Returns the rewards that a plugin made on this process, after checking them. None where it keeps them.

    Args:
        name: The plugin.
        result: What its hook `rewards` returned.
        scored: What the hook got.
        planned: The names of the columns that it must return.

    Raises:
        PluginError: They are none for this round.
    """
    if isinstance(result, torch.Tensor):
        result = Rewards(result, scored.reward_names, scored.reward_weights)
    columns = ", ".join(planned)
    if result is None and planned != scored.reward_names:
        raise PluginError(
            f"plugin {name!r} returned None from 'rewards', expected the columns {columns} that its 'reward_columns' "
            f"announced."
        )
    if result is None:
        return None
    if not isinstance(result, Rewards):
        raise PluginError(
            f"plugin {name!r} returned {type(result).__name__} from 'rewards', expected a tensor or Rewards."
        )
    if not isinstance(result.values, torch.Tensor) or not isinstance(result.weights, torch.Tensor):
        raise PluginError(
            f"plugin {name!r} returned Rewards with values of type {type(result.values).__name__} and weights of type "
            f"{type(result.weights).__name__} from 'rewards', expected tensors."
        )
    if tuple(result.names) != planned:
        raise PluginError(
            f"plugin {name!r} returned the reward columns {', '.join(map(str, result.names)) or 'none'} from "
            f"'rewards', expected {columns}. A plugin that adds, drops or renames columns names all that it returns in "
            f"the hook 'reward_columns'."
        )
    expected = (len(scored.group_ids), len(planned))
    if tuple(result.values.shape) != expected or tuple(result.weights.shape) != expected[1:]:
        raise PluginError(
            f"plugin {name!r} returned rewards {tuple(result.values.shape)} with {len(result.weights)} weights, "
            f"expected {expected} and {len(planned)} for the columns {columns}."
        )
    return result
