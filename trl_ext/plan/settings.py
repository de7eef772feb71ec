"""Settings of TRL that a plugin's loss or estimator leaves unused."""

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
"""Settings of TRL's own policy loss and the values with which they ask for nothing; () = only TRL's default."""

_ADVANTAGE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "scale_rewards": ("group", "none"),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "normalize_advantages": (False,),
    "reward_clip_range": (None,),
    "beta": (0.0,),  # RLOO's KL term is part of the rewards
}
"""The same for settings of TRL's advantages, which a plugin with the claim `no_advantages` leaves unused."""


def _setting(args: Any, setting: str, plugin: str) -> Any:
    if not hasattr(args, setting):
        raise PluginError(f"plugin {plugin!r} asks about the setting {setting!r}, which {type(args).__name__} lacks.")
    return getattr(args, setting)


def _dropped_settings(spec: PluginSpec, config: Config) -> list[str]:
    """A replaced loss drops TRL's own terms, so a user who asked for them must be told."""
    args = config.args
    settings = dict(_LOSS_SETTINGS)
    if config.kind == "rloo":
        del settings["beta"]  # there the KL term is part of the rewards
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
    """The value that TRL itself gives to a setting, whatever a user's subclass of its arguments makes of it."""
    owner = next((cls for cls in type(args).__mro__ if cls.__module__.startswith("trl.")), type(args))
    return next(field.default for field in dataclasses.fields(owner) if field.name == setting)
