"""Settings of TRL that a plugin's loss leaves unused."""

from __future__ import annotations

import dataclasses
from typing import Any

from trl_ext_hooks import Config

from ..catalog.declaration import PluginSpec
from ..errors import PluginError

_LOSS_SETTINGS: dict[str, tuple[Any, ...]] = {
    "beta": (0.0,),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "entropy_coef": (0.0, None),
    "use_adaptive_entropy": (False,),
    "delta": (None,),
    "importance_sampling_level": ("token",),
    "vllm_importance_sampling_correction": (False,),
    "loss_type": (),
    "epsilon": (),
    "epsilon_high": (),
}
"""Settings of TRL's own policy loss, with the values at which they do nothing. () means TRL's default only."""

_ADVANTAGE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "scale_rewards": ("group", "none"),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "normalize_advantages": (False,),
    "reward_clip_range": (None,),
    "beta": (0.0,),  # the KL term of RLOO is part of the rewards
}
"""The same for settings of TRL's advantages, which a plugin that claims `no_advantages` leaves unused."""


_TOKENWISE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "importance_sampling_level": ("token",),
    "loss_type": ("dapo", "bnpo", "grpo", "dr_grpo", "cispo", "sapo"),
    "off_policy_mask_threshold": (None,),
}
"""Settings with which GRPO's loss takes one advantage per token, where TRL has the setting."""


def setting_of(args: Any, setting: str, plugin: str) -> Any:
    """Returns the value of a setting that a plugin asks about."""
    if not hasattr(args, setting):
        raise PluginError(f"plugin {plugin!r} asks about the setting {setting!r}, which {type(args).__name__} lacks.")
    return getattr(args, setting)


def dropped_settings(spec: PluginSpec, config: Config) -> list[str]:
    """Refuses settings of the user that a replaced loss would silently drop."""
    args = config.args
    settings = dict(_LOSS_SETTINGS)
    if config.kind == "rloo":
        del settings["beta"]  # the KL term of RLOO is part of the rewards
    if not getattr(args, "use_vllm", False):
        del settings["vllm_importance_sampling_correction"]
    if "no_advantages" in spec.claims:
        settings |= _ADVANTAGE_SETTINGS
    refusals = []
    for setting, neutral in settings.items():
        if setting in spec.cls.honours or not hasattr(args, setting):
            continue
        value, allowed = getattr(args, setting), neutral or (_trl_default(args, setting),)
        if value not in allowed:
            refusals.append(
                f"{spec.name} replaces the policy loss and does not apply {setting}={value!r}; set "
                f"{setting}={allowed[0]!r}"
            )
    return refusals


def _trl_default(args: Any, setting: str) -> Any:
    """Returns TRL's own default of a setting, whatever a user's subclass of its arguments makes of it."""
    owner = next((cls for cls in type(args).__mro__ if cls.__module__.startswith("trl.")), type(args))
    return next(field.default for field in dataclasses.fields(owner) if field.name == setting)


def tokenwise_refusals(who: str, config: Config) -> list[str]:
    """Returns what keeps the trainer's loss from taking one advantage per token.

    Args:
        who: The plugins that need it.
        config: The trainer.
    """
    if config.kind == "rloo":
        return [f"{who}: the loss must take one advantage per token, and RLOO takes one per row; use GRPO"]
    return [
        f"{who} needs {setting}={' or '.join(map(repr, allowed))}, it is {getattr(config.args, setting)!r}: the loss "
        f"must take one advantage per token"
        for setting, allowed in _TOKENWISE_SETTINGS.items()
        if hasattr(config.args, setting) and getattr(config.args, setting) not in allowed
    ]
