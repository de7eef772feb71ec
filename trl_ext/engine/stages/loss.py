"""Forward and loss: the hooks `logps`, `loss_inputs`, `policy_loss`, `loss_terms` and `loss_metrics`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trl_ext_hooks import Logps, LogpsCall, Loss, PolicyLoss
from trl_ext_hooks.ops import masked_mean
from trl_ext_hooks.types import loss_mask

from ...errors import PluginError
from ...trl_internals import losses, trainer_state
from . import hidden_states, kept_rows

if TYPE_CHECKING:
    from ..host import Session


def logps(session: Session, call: LogpsCall, dense: Callable[[], Logps]) -> Logps:
    """Runs the owner of the forward, or TRL's, and keeps the result for the loss hooks."""
    result: Logps | None = None

    def compute() -> Logps:
        return hidden_states.during(session, call, dense)

    for name, caller in session.chain("logps"):
        result = session.call(name, "logps", caller, call=call, compute=compute)
        shape = (call.input_ids.size(0), call.logits_to_keep)
        if not isinstance(result, Logps) or tuple(result.per_token_logps.shape) != shape:
            got = tuple(result.per_token_logps.shape) if isinstance(result, Logps) else type(result).__name__
            raise PluginError(
                f"plugin {name!r} returned {got} from 'logps', expected Logps with {shape} log-probabilities."
            )
        if call.compute_entropy and result.entropies is None:
            raise PluginError(
                f"plugin {name!r} returned no entropies from 'logps', which the {call.role} forward asked for."
            )
    if result is None:
        result = compute()
    if call.role == "policy":
        session.policy_logps = result
    elif session.round is not None:
        session.round.logps[call.role] = result.per_token_logps
    return result


def edited(session: Session, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The micro-batch after every plugin's `loss_inputs`; the buffered original stays as it was."""
    if not session.has("loss_inputs"):
        return inputs
    batch = dict(inputs)
    for name, caller in session.chain("loss_inputs"):
        result = session.call(name, "loss_inputs", caller, batch=dict(batch), trainer=session.view)
        changes = session.mapping(name, "loss_inputs", {} if result is None else result)
        unknown = [key for key in changes if key not in batch]
        if unknown:
            raise PluginError(
                f"plugin {name!r} returned {unknown[0]!r} from 'loss_inputs'; the batch has {', '.join(batch)}."
            )
        batch.update(changes)
    return batch


def compute(session: Session, inputs: Mapping[str, Any], stock: Callable[[Mapping[str, Any]], Any]) -> Any:
    """The loss of a micro-batch: TRL's or a plugin's, plus the terms of all plugins."""
    batch = edited(session, inputs)
    replaced = session.has("policy_loss")
    keep = (
        trainer_state.only_metrics(session.trainer, ("entropy", "kl", "aux_loss"))
        if replaced
        else contextlib.nullcontext()
    )
    session.in_loss, session.policy_logps, session.policy_mask = True, None, loss_mask(batch)
    try:
        with keep:
            total = stock(batch)
    finally:
        session.in_loss, session.policy_mask = False, None
    if not replaced:
        total = _weighted(total, batch, losses.loss_unit(session.trainer, session.kind))
    if not session.wants_loss:
        return total
    if session.policy_logps is None:
        raise PluginError(
            f"{type(session.trainer).__name__} computed its loss without TRL's log-probability method, so "
            f"{', '.join(session.plan.users('policy_loss', 'loss_terms', 'loss_metrics'))} cannot act."
        )
    loss = Loss(
        mode=trainer_state.mode(session.trainer),
        step=session.trainer.state.global_step,
        trainer=session.view,
        batch=batch,
        per_token_logps=session.policy_logps.per_token_logps,
        entropies=session.policy_logps.entropies,
        hidden_states=session.policy_hidden,
    )
    aux_loss = session.policy_logps.aux_loss
    session.policy_logps, session.policy_hidden = None, {}
    metrics: dict[str, tuple[float, float]] = {}
    for name, result in session.each("policy_loss", loss=loss):
        if not isinstance(result, PolicyLoss):
            raise PluginError(
                f"plugin {name!r} returned {type(result).__name__} from 'policy_loss', expected PolicyLoss."
            )
        total = _average(session, name, result, loss)
        if aux_loss is not None:
            total = total + losses.router_loss(session.trainer, session.kind, aux_loss)
    for name, terms in session.each("loss_terms", loss=loss):
        for term, value in session.mapping(name, "loss_terms", terms).items():
            if isinstance(value, PolicyLoss):
                scaled = _average(session, name, value, loss)
            elif isinstance(value, torch.Tensor) and value.dim() == 0:
                scaled = value / losses.loss_divisor(session.trainer, session.kind)
            else:
                got = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise PluginError(
                    f"plugin {name!r} returned the loss term {term!r} as {got}, expected a 0-d tensor or PolicyLoss."
                )
            total = total + scaled
            metrics[f"{name}/{term}"] = (scaled.item() * losses.loss_divisor(session.trainer, session.kind), 1)
    metrics |= session.collect("loss_metrics", loss=loss)
    session.report(metrics)
    return total


def _average(session: Session, name: str, result: PolicyLoss, loss: Loss) -> torch.Tensor:
    """The average that a plugin asks for, scaled for accumulation."""
    divisor = losses.loss_divisor(session.trainer, session.kind)
    if result.values.dim() == 0:
        if session.has("keep_rows") and "keep_rows" not in session.plugins[name].honours:
            others = ", ".join(session.plan.users("keep_rows"))
            raise PluginError(
                f"plugin {name!r} returned a scalar from 'policy_loss', and {others} leaves rows out. Return one loss "
                f"per token, or average over the rows where `loss.mask` is not 0 and declare honours = ('keep_rows',)."
            )
        return _weighted(result.values, loss.batch, "micro_batch") / divisor
    if result.values.shape != loss.mask.shape:
        raise PluginError(
            f"plugin {name!r} returned a loss of shape {tuple(result.values.shape)}, expected a scalar or "
            f"{tuple(loss.mask.shape)}."
        )
    if result.normalisation == "trainer":
        total = losses.aggregate(session.trainer, session.kind, result.values, loss.mask, loss.batch)
        return _weighted(total, loss.batch, losses.loss_unit(session.trainer, session.kind))
    if result.normalisation == "token_mean":
        return _weighted(masked_mean(result.values, loss.mask), loss.batch, "micro_batch") / divisor
    return _weighted(masked_mean(result.values, loss.mask, dim=1).mean(), loss.batch, "rows") / divisor


def _weighted(total: torch.Tensor, batch: Mapping[str, Any], unit: losses.LossUnit) -> torch.Tensor:
    factor = kept_rows.weight(batch, unit)
    return total if factor is None else total * factor
