"""Trainer classes whose loss is not TRL's, and the plugins that rest on TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_ext_hooks import TrainerKind

from ...errors import ConfigError
from ...plan.compose import Plan
from ...trl_internals import seams

_FIX = (
    "Use TRL's own class, let `_compute_loss` call super()._compute_loss and change what that returns, or leave the "
    "plugin out."
)


def resting_plugins(plan: Plan) -> list[str]:
    """Returns the plugins that need TRL's own loss.

    They replace it, leave rows or tokens out of it, give it one advantage per token, or require a `loss_type`.
    """
    names = [*plan.users("policy_loss", "token_weights"), *plan.drops_rows, *plan.needs.get("token_advantages", ())]
    names += [name for name, settings in plan.required.items() if "loss_type" in settings]
    return list(dict.fromkeys(names))


def replaced_loss(cls: type[Any], kind: TrainerKind) -> str | None:
    """Returns the method by which a class replaces the loss of GRPO or RLOO, as `Class._compute_loss`, or None."""
    if kind == "dpo":
        return None
    replaced = seams.overrides(cls, kind, ("policy_loss",))
    return next((name for name in replaced if name.endswith("._compute_loss")), None)


def check(cls: type[Any], plan: Plan) -> None:
    """Refuses plugins that need TRL's own loss where the trainer's class has another one.

    Raises:
        ConfigError: With the class and the plugins.
    """
    method, resting = replaced_loss(cls, plan.kind), resting_plugins(plan)
    if method is None or not resting:
        return
    owners = plan.users("policy_loss")
    if owners:
        raise ConfigError(f"plugin {owners[0]!r} replaces the policy loss, and so does {method}. Leave one out.")
    raise ConfigError(
        f"plugin {', '.join(map(repr, resting))} needs the loss that `loss_type` names, and {method} replaces it by "
        f"another one, which may average otherwise and take one advantage per row only. {_FIX}"
    )


def passed_by(trainer: Any, names: Sequence[str]) -> str:
    """Returns the error of a run whose trainer turned out to compute its loss without TRL's."""
    who = ", ".join(map(repr, names)) or "that makes one advantage per token"
    return f"{type(trainer).__name__} did not call TRL's `_compute_loss` by super(), which plugin {who} needs. {_FIX}"
