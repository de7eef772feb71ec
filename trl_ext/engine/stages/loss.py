"""The loss of a micro-batch: the hooks `policy_loss`, `loss_terms` and `loss_metrics`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch

from trl_ext_hooks import Loss, PolicyLoss
from trl_ext_hooks.loss import Normalisation
from trl_ext_hooks.toolkit.losses import masked_mean

from ...errors import PluginError
from ...trl_internals import losses, trainer_state
from ..calls import as_mapping
from ..context import Context, MicroBatch
from . import foreign, kept_rows, micro_batches, side_rows


def compute(context: Context, inputs: Mapping[str, Any], stock: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Computes the loss of a micro-batch as the trainer's class does.

    A class of the user stands between this function and `own`, which is what it calls as TRL's loss. So what it adds to
    that loss, or makes of it, stays.
    """
    batch, step = micro_batches.following(context, inputs)
    side, side_logps = side_rows.score(context, step, batch)
    known = {"statistics": step.statistics, "side": side, "position": step.begun - 1}
    with context.in_loss(batch, **known) as micro_batch:
        total = stock(batch)
    if side_logps is not None:
        # the backward pass is then the same on every process, whatever plugins do with their rows
        total = total + 0.0 * side_logps.sum()
    if micro_batch.own_loss_ran:
        return total
    resting = foreign.resting_plugins(context.plan)
    if resting or batch["advantages"].dim() == 2:
        raise PluginError(foreign.passed_by(context.trainer, resting))
    return _with_plugins(context, micro_batch, total)


def own(context: Context, batch: Mapping[str, Any], stock: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What a class of the user gets as TRL's loss: TRL's or a plugin's, plus the terms of all plugins."""
    outer = context.micro_batch
    if outer is None:  # called from elsewhere than the trainer's `_compute_loss`
        return compute(context, batch, lambda batch: own(context, batch, stock))
    outer.own_loss_ran = True
    replaced = context.calls.has("policy_loss")
    keep = (
        trainer_state.only_metrics(context.trainer, ("entropy", "kl", "aux_loss"))
        if replaced
        else contextlib.nullcontext()
    )
    known = {"statistics": outer.statistics, "side": outer.side, "position": outer.position}
    with context.in_loss(batch, **known) as micro_batch, keep:
        total = stock(batch)
    if not replaced:
        total = _weighted(total, batch, losses.loss_unit(context.trainer, context.kind))
    micro_batch.own_loss_ran = True
    return _with_plugins(context, micro_batch, total)


def _with_plugins(context: Context, micro_batch: MicroBatch, total: Any) -> Any:
    """Returns the loss of a micro-batch with what plugins put in its place and add to it."""
    if not context.wants_loss:
        return total
    loss = micro_batches.view(context, micro_batch, trainer_state.mode(context.trainer))
    metrics: dict[str, tuple[float, float]] = {}
    for name, result in context.calls.each("policy_loss", loss=loss):
        if not isinstance(result, PolicyLoss):
            raise PluginError(
                f"plugin {name!r} returned {type(result).__name__} from 'policy_loss', expected PolicyLoss."
            )
        total = _average(context, name, result, loss)
        _check_finite(f"plugin {name!r} returned a policy loss", total)
        if micro_batch.policy is not None and micro_batch.policy.aux_loss is not None:
            total = total + losses.router_loss(context.trainer, context.kind, micro_batch.policy.aux_loss)
    for name, terms in context.calls.each("loss_terms", loss=loss):
        for term, value in as_mapping(name, "loss_terms", terms).items():
            if isinstance(value, PolicyLoss):
                if value.normalisation == "trainer" and value.values.dim() and not micro_batch.own_loss_ran:
                    raise PluginError(foreign.passed_by(context.trainer, [name]))
                scaled = _average(context, name, value, loss)
            elif isinstance(value, torch.Tensor) and value.dim() == 0:
                scaled = value / losses.loss_divisor(context.trainer, context.kind)
            else:
                got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise PluginError(
                    f"plugin {name!r} returned the loss term {term!r} as {got}, expected a 0-d tensor or PolicyLoss."
                )
            _check_finite(f"plugin {name!r} returned the loss term {term!r}", scaled)
            total = total + scaled
            metrics[f"{name}/{term}"] = (scaled.item() * losses.loss_divisor(context.trainer, context.kind), 1)
    if torch.is_grad_enabled() and not total.requires_grad:
        owner = context.plan.users("policy_loss")[0]
        raise PluginError(
            f"the loss of plugin {owner!r} has no gradient, so nothing would be trained. Compute it from "
            f"`loss.per_token_logps`, and do not detach that."
        )
    metrics |= context.calls.metrics("loss_metrics", loss=loss)
    context.report_logged(loss.metric_log, metrics)
    return total


def _average(context: Context, name: str, result: PolicyLoss, loss: Loss) -> torch.Tensor:
    """Averages a loss as its plugin asks, scaled for accumulation."""
    divisor = losses.loss_divisor(context.trainer, context.kind)
    if not isinstance(result.values, torch.Tensor):
        raise PluginError(
            f"plugin {name!r} returned a loss whose values are {type(result.values).__name__}, expected a tensor."
        )
    if result.normalisation not in get_args(Normalisation):
        raise PluginError(
            f"plugin {name!r} returned a loss with normalisation={result.normalisation!r}, expected one of "
            f"{', '.join(map(repr, get_args(Normalisation)))}."
        )
    if result.normalisation == "share":
        if result.values.dim():
            raise PluginError(
                f"plugin {name!r} returned a loss of shape {tuple(result.values.shape)} with normalisation='share', "
                f"expected a scalar."
            )
        return result.values / divisor
    if result.values.dim() == 0:
        if context.plan.drops_rows and "keep_rows" not in context.plan.plugins[name].honours:
            others = ", ".join(context.plan.drops_rows)
            raise PluginError(
                f"plugin {name!r} returned a scalar from 'policy_loss', and {others} leaves rows out. Return one loss "
                f"per token, or average over the rows where `loss.mask` is not 0 and declare honours = ('keep_rows',), "
                f"or divide by what the whole round holds and return it with normalisation='share'."
            )
        return _weighted(result.values, loss.batch, "micro_batch") / divisor
    if result.values.shape != loss.mask.shape:
        raise PluginError(
            f"plugin {name!r} returned a loss of shape {tuple(result.values.shape)}, expected a scalar or "
            f"{tuple(loss.mask.shape)}."
        )
    if result.normalisation == "trainer":
        total = losses.aggregate(context.trainer, context.kind, result.values, loss.mask, loss.batch)
        return _weighted(total, loss.batch, losses.loss_unit(context.trainer, context.kind))
    if result.normalisation == "token_mean":
        return _weighted(masked_mean(result.values, loss.mask), loss.batch, "micro_batch") / divisor
    return _weighted(masked_mean(result.values, loss.mask, dim=1).mean(), loss.batch, "rows") / divisor


def _check_finite(what: str, value: torch.Tensor) -> None:
    if not torch.isfinite(value):
        raise PluginError(
            f"{what} that is {value.item()}, expected a finite number. Guard divisions and logarithms of tokens and "
            f"rows that `loss.mask` leaves out too."
        )


def _weighted(total: torch.Tensor, batch: Mapping[str, Any], unit: losses.LossUnit) -> torch.Tensor:
    factor = kept_rows.weight(batch, unit)
    return total if factor is None else total * factor
