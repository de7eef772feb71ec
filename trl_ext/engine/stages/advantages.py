"""After scoring: the hooks from `advantages` to `batch_fields`, and `round_metrics`, in a finished round."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from trl_ext_hooks import Round, Scored
from trl_ext_hooks.basics import loss_mask
from trl_ext_hooks.toolkit.groups import group_stats
from trl_ext_hooks.toolkit.losses import masked_mean

from ...catalog.builtins import TRL
from ...errors import PluginError
from ...trl_internals import estimators, row_order, trainer_state
from ..agreement import check_equal, together
from ..calls import as_mapping
from ..context import Context
from . import foreign, groups, kept_rows, needed_logps, scoring


def finish(context: Context, output: dict[str, Any]) -> dict[str, Any]:
    """Takes TRL's finished round and returns it as the loss shall see it."""
    output = dict(output)
    needed_logps.provide(context, output)
    state = context.current_round()
    if context.keeps_groups:
        rows = len(output["advantages"])
        start = context.view.process_index * rows
        group_ids = groups.ids_of(context, rows)[start : start + rows]
        output[row_order.GROUP_IDS] = group_ids.to(output["advantages"].device)
    if not (context.recording or context.calls.has(*scoring.FINISHING) or state.group_ids is not None):
        if context.calls.has("rollout", "annotate", "rewards"):
            context.report_logged(state.log, {})
        return output
    scored = state.scored
    if scored is None:
        users = context.plan.users(*scoring.FINISHING) or [name for name in [context.plan.forms_groups] if name]
        raise PluginError(
            f"{type(context.trainer).__name__} finished a round without scoring it through TRL's reward method, so "
            + (f"plugins {', '.join(users)} cannot act." if users else "it cannot be recorded.")
        )
    if state.group_ids is not None:
        _own_groups(context, scored, output)
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
    if context.calls.has("advantages", "mix_advantages"):
        round = _chain(context, round, metrics)
        if round.advantages is not stock:
            output["advantages"] = round.advantages if round.advantages.dim() == 2 else round.advantages[round.local]
    if context.calls.has("keep_rows", "token_mask") or state.group_ids is not None:
        if context.calls.has("keep_rows") or state.group_ids is not None:
            round = kept_rows.select(context, round, metrics)
        if context.calls.has("token_mask") and round.mode == "train":
            round = kept_rows.select_tokens(context, round, metrics)
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


def _own_groups(context: Context, scored: Scored, output: dict[str, Any]) -> None:
    """Puts the advantages of groups that a plugin formed into a finished round, and corrects what TRL recorded."""
    trainer, view, state = context.trainer, context.view, context.current_round()
    real = scored.group_ids != groups.PADDING  # (N,)
    kl = None
    if context.kind == "rloo" and trainer.beta:
        mask = output["completion_mask"] * real[scored.local].unsqueeze(1)
        per_token = (state.logps["old"] - state.logps["reference"]) * mask
        kl = view.gather(per_token.sum(dim=1))
        trainer_state.replace_last_metric(trainer, "kl", (kl.sum() / view.gather(mask.sum(dim=1)).sum()).item())
    advantages, silent = estimators.group_advantages(
        trainer, context.kind, scored.rewards, scored.reward_weights, scored.group_ids, kl
    )
    output["advantages"] = advantages[scored.local].to(output["advantages"])
    trainer_state.replace_last_metric(trainer, "frac_reward_zero_std", silent[real].double().mean().item())
    trainer_state.replace_logged_advantages(trainer, advantages.tolist())
    if not real.all():
        trainer_state.drop_logged_rows(trainer, (~real).tolist())
        if "tool_mask" not in output:  # RLOO has none
            output["tool_mask"] = torch.ones_like(output["completion_mask"]) * real[scored.local].unsqueeze(1)


def _chain(context: Context, round: Round, metrics: dict[str, tuple[float, float]]) -> Round:
    """Returns the round with the advantages that the plugins make of TRL's, one after another."""
    estimators = [spec.name for spec in context.plan.specs if "estimator" in spec.claims]
    mixed = context.calls.has("mix_advantages")
    if mixed:
        round = _mixed(context, round, estimators, metrics)
    for name, caller in context.calls.chain("advantages"):
        if mixed and name in estimators:
            continue
        result = _advantages_of(context, name, caller, "advantages", round=round)
        if result is not None:
            round = _changed(context, name, round, result, metrics)
    return round


def _mixed(context: Context, stock: Round, estimators: Sequence[str], metrics: dict[str, tuple[float, float]]) -> Round:
    """Returns the round with what one plugin makes of the advantages of TRL and of every estimator."""
    parts = {TRL: stock}
    for name, caller in context.calls.chain("advantages"):
        if name in estimators:
            result = _advantages_of(context, name, caller, "advantages", round=stock)
            parts[name] = stock if result is None else _changed(context, name, stock, result, metrics)
    tokenwise = any(part.advantages.dim() == 2 for part in parts.values())
    values = {name: part.token_advantages if tokenwise else part.advantages for name, part in parts.items()}
    ((name, caller),) = context.calls.chain("mix_advantages")
    result = _advantages_of(context, name, caller, "mix_advantages", round=stock, parts=values)
    return stock if result is None else _changed(context, name, stock, result, metrics)


def _advantages_of(
    context: Context, name: str, caller: Any, hook: str, round: Round, **arguments: Any
) -> torch.Tensor | None:
    """Returns the advantages that a plugin makes of a round, after checking them on every process. Collective."""
    returned = context.calls.call(name, hook, caller, round=round, **arguments)

    def check() -> tuple[torch.Tensor | None, str | torch.Tensor]:
        if returned is None:
            return None, "None"
        _check(context, name, hook, round, returned)
        return returned, "one advantage per token" if returned.dim() == 2 else returned.cpu()

    result, answers = together(context, check)
    kinds = ["one advantage per row" if isinstance(answer, torch.Tensor) else answer for answer in answers]
    if len(set(kinds)) > 1:
        other = next(process for process, kind in enumerate(kinds) if kind != kinds[0])
        raise PluginError(
            f"plugin {name!r} returned {kinds[0]} from {hook!r} on process 0 and {kinds[other]} on process {other}; "
            f"expected the same on every process."
        )
    check_equal(name, hook, [answer for answer in answers if isinstance(answer, torch.Tensor)])
    return result


def _check(context: Context, name: str, hook: str, round: Round, result: Any) -> None:
    """Checks the advantages that a plugin returned on this process.

    Raises:
        PluginError: They are none for this round.
    """
    rows, tokens = len(round.group_ids), round.batch["completion_mask"].shape
    if not isinstance(result, torch.Tensor):
        raise PluginError(f"plugin {name!r} returned {type(result).__name__} from {hook!r}, expected a tensor.")
    tokenwise = result.dim() == 2
    if tuple(result.shape) not in ((rows,), tuple(tokens)) or (tokenwise and context.kind != "grpo"):
        allowed = f"({rows},) for the rows of all processes"
        if context.kind == "grpo":
            allowed += f" or {tuple(tokens)} for this process's tokens"
        raise PluginError(f"plugin {name!r} returned advantages {tuple(result.shape)}, expected {allowed}.")
    if result.is_complex():
        raise PluginError(f"plugin {name!r} returned {result.dtype} from {hook!r}, expected real numbers.")
    if tokenwise and foreign.replaced_loss(type(context.trainer), context.kind):
        raise PluginError(foreign.passed_by(context.trainer, [name]))
    if round.advantages.dim() == 2 and not tokenwise:
        raise PluginError(
            f"plugin {name!r} returned one advantage per row where an earlier plugin made one per token; return "
            f"{tuple(tokens)} when `round.advantages` has two dimensions."
        )
    if not torch.isfinite(result).all():
        raise PluginError(
            f"plugin {name!r} returned advantages that are not finite: {int((~torch.isfinite(result)).sum())} of "
            f"{result.numel()}."
        )


def _check_weights(name: str, weights: Any, tokens: tuple[int, ...]) -> tuple[torch.Tensor | None, bool]:
    """Returns the weights that a plugin returned on this process, and whether it returned any."""
    if weights is None:
        return None, False
    got = tuple(weights.shape) if isinstance(weights, torch.Tensor) else type(weights).__name__
    if got != tokens:
        raise PluginError(f"plugin {name!r} returned {got} from 'token_weights', expected weights {tokens}.")
    if not torch.isfinite(weights).all():
        raise PluginError(
            f"plugin {name!r} returned weights that are not finite: {int((~torch.isfinite(weights)).sum())} of "
            f"{weights.numel()}."
        )
    return weights, True


def _weighed(context: Context, round: Round, metrics: dict[str, tuple[float, float]]) -> Round:
    tokens = tuple(round.batch["completion_mask"].shape)
    for name, caller in context.calls.chain("token_weights"):
        returned = context.calls.call(name, "token_weights", caller, round=round)
        weights, answers = together(context, functools.partial(_check_weights, name, returned, tokens))
        if not any(answers):
            continue
        if weights is None:  # another process weighs, and every process has to end up with one advantage per token
            weights = torch.ones(tokens, device=round.loss_mask.device)
        round = _changed(context, name, round, round.token_advantages * weights, metrics)
    return round


def _changed(
    context: Context, name: str, round: Round, values: torch.Tensor, metrics: dict[str, tuple[float, float]]
) -> Round:
    """Returns the round with the advantages that a plugin made, and reports how much it changed them."""
    after = dataclasses.replace(round, advantages=values.detach().to(round.advantages))
    real = round.group_ids[round.local] != groups.PADDING  # rows that fill up have no part in a metric
    made, before = _per_row(after)[real], _per_row(round)[real]
    metrics[f"{name}/advantage_mean"] = (made.sum().item(), len(made))
    metrics[f"{name}/advantage_change"] = ((made - before).abs().sum().item(), len(made))
    context.show(name, after)
    return after


def _per_row(round: Round) -> torch.Tensor:
    """Returns this process's (b,) advantages. Those per token are averaged over the tokens that the loss counts."""
    if round.advantages.dim() == 1:
        return round.advantages[round.local]
    return masked_mean(round.advantages, round.loss_mask, dim=1)


def _log(context: Context, round: Round) -> None:
    """Makes TRL's completions table and its share of groups without signal speak of the advantages really used."""
    real = round.group_ids != groups.PADDING  # the table holds no other rows
    used = context.view.gather(_per_row(round))[real]
    trainer_state.replace_logged_advantages(context.trainer, used.tolist())
    strength = used.abs()
    if round.advantages.dim() == 2:
        strength = context.view.gather(round.token_advantages.abs().amax(dim=1))[real]
    silent = strength <= 1e-8  # TRL's own tolerance; a batch mean that is subtracted may leave rounding
    without_signal = group_stats((~silent).double(), round.group_ids[real]).mean == 0
    trainer_state.replace_last_metric(context.trainer, "frac_reward_zero_std", without_signal.double().mean().item())
