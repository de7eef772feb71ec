"""Old and reference log-probabilities, and old entropies, that plugins need and TRL leaves out."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from ...trl_internals import forwards, reference_policy, trainer_state
from ..context import Context


def prepare(context: Context) -> None:
    """Makes the reference policy where a plugin needs one and TRL has none."""
    users = context.plan.needs.get("ref_logps")
    if not users:
        return
    trainer = context.trainer
    context.reference, undo = reference_policy.provide(trainer, users[0])
    context.undo.append(undo)
    # the reference of a trainer that has trained before may be older than its policy
    context.unchecked_reference = trainer.state.global_step == 0
    context.stock_reference = getattr(trainer, "ref_model", None)


def provide(context: Context, output: dict[str, Any]) -> None:
    """Adds the log-probabilities to a finished round."""
    needs, trainer, known = set(context.plan.needs), context.trainer, context.current_round().logps
    if context.kind == "rloo" and context.wants_loss:
        needs.add("old_logps")  # RLOO keeps their sum only, which loss hooks cannot use
    if context.calls.has("hidden_positions"):
        needs.add("old_logps")  # their forward is the one that hidden states are read in
    old, entropies = known.get("old"), context.current_round().old_entropies
    missing_logps = "old_logps" in needs and output.get("old_per_token_logps") is None and old is None
    missing_entropies = "old_entropies" in needs and entropies is None
    if missing_logps or missing_entropies:
        scored = forwards.round_scores(trainer, output, compute_entropy="old_entropies" in needs)
        old, entropies = scored.per_token_logps, scored.entropies
    if "old_logps" in needs and output.get("old_per_token_logps") is None:
        output["old_per_token_logps"] = old
    if "old_entropies" in needs and entropies is not None:
        output["old_entropies"] = entropies.detach() * output["completion_mask"]
    if "ref_logps" in needs:
        if output.get("ref_per_token_logps") is None:
            values = known.get("reference")
            if values is None and context.reference is not None:
                values = forwards.completion_logps(trainer, output, context.reference)
            elif values is None:
                with reference_policy.reference_adapter(trainer):
                    values = forwards.completion_logps(trainer, output)
            output["ref_per_token_logps"] = values
        _check_reference(context, output)


def _check_reference(context: Context, output: dict[str, Any]) -> None:
    """Checks once, before the first update, that the reference is the policy that training starts from.

    Raises:
        ConfigError: It is another one, so a distance from it would pull the policy away from its start.
    """
    trainer = context.trainer
    if not context.unchecked_reference or trainer_state.mode(trainer) != "train":
        return
    context.unchecked_reference = False
    resumed = trainer.state.global_step > 0
    chosen = getattr(trainer, "ref_model", None) is not context.stock_reference  # by the user, after the plugins came
    if resumed or chosen:
        return
    gap, allowed = reference_policy.difference(trainer, output, context.reference)
    if not gap <= allowed:
        users = " and ".join(context.plan.needs["ref_logps"])
        raise ConfigError(
            f"{users} compares the policy with the one that training starts from, and before the first update the "
            f"reference gives other log-probabilities than the policy: they differ by {gap:.2g}, allowed is "
            f"{allowed:g}. {reference_policy.origin(trainer, context.reference)}"
        )
