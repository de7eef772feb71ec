"""After scoring: the hooks `advantages`, `keep_rows`, `token_weights`, `batch_fields` and `round_metrics`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from trl_ext_hooks import Round
from trl_ext_hooks.basics import loss_mask
from trl_ext_hooks.toolkit.groups import group_stats
from trl_ext_hooks.toolkit.losses import masked_mean

from ...errors import PluginError
from ...trl_internals import row_order, trainer_state
from ..calls import as_mapping
from ..context import Context
from . import foreign, kept_rows, needed_logps


def finish(context: Context, output: dict[str, Any]) -> dict[str, Any]:
    """Takes TRL's finished round and returns it as the loss shall see it."""
    output = dict(output)
    needed_logps.provide(context, output)
    if context.keeps_groups:
        rows = len(output["advantages"])
        start = context.view.process_index * rows
        group = trainer_state.num_generations(context.trainer)
        output[row_order.GROUP_IDS] = (torch.arange(start, start + rows) // group).to(output["advantages"].device)
    hooks = ("advantages", "keep_rows", "token_weights", "batch_fields", "round_metrics")
    state = context.current_round()
    if not (context.recording or context.calls.has(*hooks)):
        if context.calls.has("rollout", "annotate", "rewards"):
            context.report_logged(state.log, {})
        return output
    scored = state.scored
    if scored is None:
        users = context.plan.users(*hooks)
        raise PluginError(
            f"{type(context.trainer).__name__} finished a round without scoring it through TRL's reward method, so "
            + (f"plugins {', '.join(users)} cannot act." if users else "it cannot be recorded.")
        )
    advantages = context.view.gather(output["advantages"])  # (N,)
    lengths = context.view.gather(loss_mask(output).sum(dim=1))  # (N,)
    round = Round(
        **vars(scored),
        advantages=advantages,
        batch=output,
        hidden_states=state.hidden_states or {},
        gathered_lengths=lengths,
    )
    context.show("TRL", round)
    metrics: dict[str, tuple[float, float]] = {}
    stock = round.advantages
    if context.calls.has("advantages"):
        round = _chain(context, round, metrics)
        if round.advantages is not stock:
            output["advantages"] = round.advantages if round.advantages.dim() == 2 else round.advantages[round.local]
    if context.calls.has("keep_rows") and round.mode == "train":
        round = kept_rows.select(context, round, metrics)
        output = dict(round.batch)
        round = dataclasses.replace(round, batch=output)  # later hooks see the fields of `batch_fields` in it
    if context.calls.has("token_weights"):
        round = _weighed(context, round, metrics)
        if round.advantages.dim() == 2:
            output["advantages"] = round.advantages
    if round.advantages is not stock:  # otherwise everything that TRL recorded is true
        _log(context, round)
    for name, fields in context.calls.each("batch_fields", round=round):
        for field, values in as_mapping(name, "batch_fields", fields).items():
            context.calls.check_declared(name, "batch_fields", field)
            if field in output:
                raise PluginError(f"plugin {name!r} returned the batch field {field!r}, which the trainer already has.")
            if not isinstance(values, torch.Tensor) or (values.dim() > 0 and len(values) != len(round.rows)):
                got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
                raise PluginError(
                    f"plugin {name!r} returned {got} for the batch field {field!r}, expected a tensor with "
                    f"{len(round.rows)} rows or 0-d."
                )
            output[field] = values.detach()
    metrics |= context.calls.metrics("round_metrics", round=round)
    context.report_logged(state.log, metrics)
    if state.record is not None:
        state.record.finish(round)
    return output


def _chain(context: Context, round: Round, metrics: dict[str, tuple[float, float]]) -> Round:
    rows, tokens = len(round.group_ids), round.batch["completion_mask"].shape
    for name, caller in context.calls.chain("advantages"):
        result = context.calls.call(name, "advantages", caller, round=round)
        if result is None:
            continue
        if not isinstance(result, torch.Tensor):
            raise PluginError(f"plugin {name!r} returned {type(result).__name__} from 'advantages', expected a tensor.")
        tokenwise = result.dim() == 2
        if tuple(result.shape) not in ((rows,), tuple(tokens)) or (tokenwise and context.kind != "grpo"):
            allowed = f"({rows},) for the rows of all processes"
            if context.kind == "grpo":
                allowed += f" or {tuple(tokens)} for this process's tokens"
            raise PluginError(f"plugin {name!r} returned advantages {tuple(result.shape)}, expected {allowed}.")
        if tokenwise and foreign.replaced_loss(type(context.trainer), context.kind):
            raise PluginError(foreign.passed_by(context.trainer, [name]))
        if round.advantages.dim() == 2 and not tokenwise:
            raise PluginError(
                f"plugin {name!r} returned one advantage per row where an earlier plugin made one per token; return "
                f"{tuple(tokens)} when `round.advantages` has two dimensions."
            )
        if not torch.isfinite(result).all():
            raise PluginError(
                f"plugin {name!r} returned {int((~torch.isfinite(result)).sum())} advantages that are not finite."
            )
        round = _changed(context, name, round, result, metrics)
    return round


def _weighed(context: Context, round: Round, metrics: dict[str, tuple[float, float]]) -> Round:
    tokens = tuple(round.batch["completion_mask"].shape)
    for name, weights in context.calls.each("token_weights", round=round):
        got = tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__
        if got != tokens:
            raise PluginError(f"plugin {name!r} returned {got} from 'token_weights', expected weights {tokens}.")
        if not torch.isfinite(weights).all():
            raise PluginError(
                f"plugin {name!r} returned {int((~torch.isfinite(weights)).sum())} weights that are not finite."
            )
        round = _changed(context, name, round, round.token_advantages * weights, metrics)
    return round


def _changed(
    context: Context, name: str, round: Round, values: torch.Tensor, metrics: dict[str, tuple[float, float]]
) -> Round:
    """Returns the round with the advantages that a plugin made, and reports how much it changed them."""
    after = dataclasses.replace(round, advantages=values.detach().to(round.advantages))
    change = _per_row(after) - _per_row(round)
    metrics[f"trl_ext/{name}/advantage_mean"] = (_per_row(after).sum().item(), len(round.rows))
    metrics[f"trl_ext/{name}/advantage_change"] = (change.abs().sum().item(), len(round.rows))
    context.show(name, after)
    return after


def _per_row(round: Round) -> torch.Tensor:
    """Returns this process's (b,) advantages. Those per token are averaged over the tokens that the loss counts."""
    if round.advantages.dim() == 1:
        return round.advantages[round.local]
    return masked_mean(round.advantages, round.loss_mask, dim=1)


def _log(context: Context, round: Round) -> None:
    """Makes TRL's completions table and its share of groups without signal speak of the advantages really used."""
    used = context.view.gather(_per_row(round))
    trainer_state.replace_logged_advantages(context.trainer, used.tolist())
    strength = used.abs()
    if round.advantages.dim() == 2:
        strength = context.view.gather(round.token_advantages.abs().amax(dim=1))
    silent = strength <= 1e-8  # TRL's own tolerance; a batch mean that is subtracted may leave rounding
    groups = group_stats((~silent).double(), round.group_ids).mean == 0
    trainer_state.replace_last_metric(context.trainer, "frac_reward_zero_std", groups.double().mean().item())
