"""After scoring: the hooks `advantages`, `keep_rows`, `batch_fields` and `round_metrics`, and the order of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trl_ext_hooks import Round
from trl_ext_hooks.ops import group_stats, masked_mean

from ...errors import PluginError
from ...trl_internals import forwards, reference_policy, trainer_state
from . import kept_rows

if TYPE_CHECKING:
    from ..host import Session

GROUP_IDS = "trl_ext_group_ids"


def finish(session: Session, output: dict[str, Any]) -> dict[str, Any]:
    """Takes TRL's finished round and returns it as the loss shall see it."""
    output = dict(output)
    _provide_logps(session, output)
    if session.keeps_groups:
        rows = len(output["advantages"])
        start = session.view.process_index * rows
        group = trainer_state.num_generations(session.trainer)
        output[GROUP_IDS] = (torch.arange(start, start + rows) // group).to(output["advantages"].device)
    hooks = ("advantages", "keep_rows", "batch_fields", "round_metrics")
    if not (session.recording or session.has(*hooks)):
        return output
    state = session.current()
    scored = state.scored
    if scored is None:
        users = session.plan.users(*hooks)
        raise PluginError(
            f"{type(session.trainer).__name__} finished a round without scoring it through TRL's reward method, so "
            + (f"plugins {', '.join(users)} cannot act." if users else "it cannot be recorded.")
        )
    advantages = session.view.gather(output["advantages"])  # (N,)
    round = Round(**vars(scored), advantages=advantages, batch=output, hidden_states=state.hidden or {})
    session.seen("TRL", round)
    metrics: dict[str, tuple[float, float]] = {}
    stock = round.advantages
    if session.has("advantages"):
        round = _chain(session, round, metrics)
        if round.advantages is not stock:
            output["advantages"] = round.advantages if round.advantages.dim() == 2 else round.advantages[round.local]
    if session.has("keep_rows") and round.mode == "train":
        round = kept_rows.select(session, round, metrics)
        output = dict(round.batch)
        round = dataclasses.replace(round, batch=output)  # later hooks see the fields of `batch_fields` in it
    if round.advantages is not stock:  # otherwise everything that TRL recorded is true
        _log(session, round)
    for name, fields in session.each("batch_fields", round=round):
        for field, values in session.mapping(name, "batch_fields", fields).items():
            session.owned(name, "batch_fields", field)
            if field in output:
                raise PluginError(f"plugin {name!r} returned the batch field {field!r}, which the trainer already has.")
            if not isinstance(values, torch.Tensor) or (values.dim() > 0 and len(values) != len(round.rows)):
                got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
                raise PluginError(
                    f"plugin {name!r} returned {got} for the batch field {field!r}, expected a tensor with "
                    f"{len(round.rows)} rows or 0-d."
                )
            output[field] = values.detach()
    metrics |= session.collect("round_metrics", round=round)
    session.report(metrics)
    if state.record is not None:
        state.record.finish(round)
    return output


def keep_groups(permutation: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
    """TRL's random order with the rows of each group moved next to each other.

    Groups come in the order of their first row in `permutation`, and the rows of a group in their order there.

    Args:
        permutation: (b,) drawn by TRL's generator.
        batch: With the group of every row.
    """
    first: dict[int, int] = {}
    for group in batch[GROUP_IDS][permutation].tolist():
        first.setdefault(group, len(first))
    rank = [first[group] for group in batch[GROUP_IDS][permutation].tolist()]
    return permutation[torch.tensor(rank).argsort(stable=True)]


def _provide_logps(session: Session, output: dict[str, Any]) -> None:
    """Adds old and reference log-probabilities that plugins need and TRL did not compute."""
    needs, trainer, known = set(session.plan.needs), session.trainer, session.current().logps
    if session.kind == "rloo" and session.wants_loss:
        needs.add("old_logps")  # RLOO keeps their sum only, which loss hooks cannot use
    if session.has("hidden_positions"):
        needs.add("old_logps")  # their forward is the one that hidden states are read in
    if "old_logps" in needs and output.get("old_per_token_logps") is None:
        old = known.get("old")
        output["old_per_token_logps"] = forwards.completion_logps(trainer, output) if old is None else old
    if "ref_logps" in needs and output.get("ref_per_token_logps") is None:
        values = known.get("reference")
        if values is None:
            if session.reference is None:
                with reference_policy.without_adapters(trainer):
                    values = forwards.completion_logps(trainer, output)
            else:
                values = forwards.completion_logps(trainer, output, session.reference)
        output["ref_per_token_logps"] = values


def _chain(session: Session, round: Round, metrics: dict[str, tuple[float, float]]) -> Round:
    rows, tokens = len(round.group_ids), round.batch["completion_mask"].shape
    for name, caller in session.chain("advantages"):
        result = session.call(name, "advantages", caller, round=round)
        if result is None:
            continue
        if not isinstance(result, torch.Tensor):
            raise PluginError(f"plugin {name!r} returned {type(result).__name__} from 'advantages', expected a tensor.")
        tokenwise = result.dim() == 2
        if tuple(result.shape) not in ((rows,), tuple(tokens)) or (tokenwise and session.kind != "grpo"):
            allowed = f"({rows},) for the rows of all processes"
            if session.kind == "grpo":
                allowed += f" or {tuple(tokens)} for this process's tokens"
            raise PluginError(f"plugin {name!r} returned advantages {tuple(result.shape)}, expected {allowed}.")
        if round.advantages.dim() == 2 and not tokenwise:
            raise PluginError(
                f"plugin {name!r} returned one advantage per row where an earlier plugin made one per token; return "
                f"{tuple(tokens)} when `round.advantages` has two dimensions."
            )
        if not torch.isfinite(result).all():
            raise PluginError(
                f"plugin {name!r} returned {int((~torch.isfinite(result)).sum())} advantages that are not finite."
            )
        after = dataclasses.replace(round, advantages=result.detach().to(round.advantages))
        change = _per_row(after) - _per_row(round)
        metrics[f"trl_ext/{name}/advantage_mean"] = (_per_row(after).sum().item(), len(round.rows))
        metrics[f"trl_ext/{name}/advantage_change"] = (change.abs().sum().item(), len(round.rows))
        round = after
        session.seen(name, round)
    return round


def _per_row(round: Round) -> torch.Tensor:
    """(b,) this process's advantages, token-wise ones averaged over the tokens that the loss counts."""
    if round.advantages.dim() == 1:
        return round.advantages[round.local]
    return masked_mean(round.advantages, round.loss_mask, dim=1)


def _log(session: Session, round: Round) -> None:
    """Makes TRL's completions table and its share of groups without signal speak of the advantages really used."""
    used = session.view.gather(_per_row(round))
    trainer_state.replace_logged_advantages(session.trainer, used.tolist())
    strength = used.abs()
    if round.advantages.dim() == 2:
        strength = session.view.gather(round.token_advantages.abs().amax(dim=1))
    silent = strength <= 1e-8  # TRL's own tolerance; a batch mean that is subtracted may leave rounding
    groups = group_stats((~silent).double(), round.group_ids).mean == 0
    trainer_state.replace_last_metric(session.trainer, "frac_reward_zero_std", groups.double().mean().item())
