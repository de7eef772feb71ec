"""Settings of TRL that a plugin's loss, or its advantages, leave unused."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
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

_ESTIMATOR_SETTINGS: dict[str, tuple[Any, ...]] = _ADVANTAGE_SETTINGS | {"scale_rewards": ("group",)}
"""The same for a plugin that claims `estimator`. Here "none" asks for something: not to divide."""

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
    return [
        f"{spec.name} replaces the policy loss and does not apply {setting}={value!r}; set {setting}={neutral!r}"
        for setting, value, neutral in _unused(spec, args, settings)
    ]


def ignores(spec: PluginSpec, setting: str) -> bool:
    """Tells whether a setting of TRL's advantages has no effect beside a plugin that makes the advantages."""
    settings = _ESTIMATOR_SETTINGS.keys() - {"beta"}  # which is also a setting of GRPO's loss
    return "estimator" in spec.claims and setting in settings and setting not in spec.cls.honours


def ignored_settings(spec: PluginSpec, config: Config, required: Container[str]) -> tuple[list[str], list[str]]:
    """Returns refusals and notes about settings of TRL's advantages that a plugin which makes them does not apply.

    A value that somebody chose is refused. TRL's own default, such as the `beta` of RLOO, is noted.

    Args:
        spec: The plugin.
        config: The trainer.
        required: Settings about which the plugin says itself what it takes.
    """
    refusals, notes = [], []
    settings = {name: neutral for name, neutral in _ESTIMATOR_SETTINGS.items() if name not in required}
    if config.kind != "rloo":
        settings.pop("beta", None)  # elsewhere it belongs to the loss
    for setting, value, neutral in _unused(spec, config.args, settings):
        what = "the KL term of RLOO's rewards, " if setting == "beta" else ""
        text = f"{spec.name} computes the advantages itself and does not apply {what}{setting}={value!r}"
        if value == _trl_default(config.args, setting):
            notes.append(f"{text}; {setting}={neutral!r} says so")
        else:
            refusals.append(f"{text}; set {setting}={neutral!r}")
    return refusals, notes


def _unused(spec: PluginSpec, args: Any, settings: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any, Any]]:
    """Yields the settings that ask for something the plugin does not apply, each with a value that asks for nothing."""
    for setting, neutral in settings.items():
        if setting in spec.cls.honours or not hasattr(args, setting):
            continue
        value, allowed = getattr(args, setting), neutral or (_trl_default(args, setting),)
        if value not in allowed:
            yield setting, value, allowed[0]


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
