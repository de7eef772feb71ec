"""Which plugin acts at which stage, in which order, and everything that is checked before a trainer is built."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from trl_ext_hooks import NEEDS, Config, Need, Plugin, Recommend, Refuse, Require, TrainerKind, Warn

from .errors import ConfigError, PluginError, near
from .registry import HOOKS, PluginSpec, build_manager

LIFECYCLE = ("configure", "setup", "teardown", "state_dict", "load_state_dict")
_PAIRS = ("pair_batch", "pair_logps", "pair_metrics")
_ROUNDS = tuple(hook for hook in HOOKS if hook not in _PAIRS)
SERVED: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": _ROUNDS,
    "rloo": _ROUNDS,
    "dpo": (*LIFECYCLE, "loss_inputs", "logps", *_PAIRS),
}
"""The hooks that each trainer calls."""

_LOSS_SETTINGS: dict[str, tuple[Any, ...]] = {
    "beta": (0.0,),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "entropy_coef": (0.0, None),
    "use_adaptive_entropy": (False,),
    "delta": (None,),
    "importance_sampling_level": ("token",),
    "use_vllm": (False,),
}
"""Settings of TRL's own policy loss and the values with which they do nothing."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked composition of one trainer.

    Attributes:
        kind: The trainer.
        specs: The plugins in the order in which they act.
        needs: What the core has to provide, with the plugins that ask for it.
        notes: Warnings and recommendations, ready to print.
    """

    kind: TrainerKind
    specs: tuple[PluginSpec, ...]
    needs: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    def users(self, *hooks: str) -> list[str]:
        """Plugins that implement one of the hooks and are served by this trainer."""
        return [s.name for s in self.specs if any(hook in s.hooks and hook in SERVED[self.kind] for hook in hooks)]

    def columns(self) -> list[str]:
        """The columns of the data that plugins need."""
        return [need.partition(":")[2] for need in self.needs if need.startswith("column:")]

    def stages(self) -> list[tuple[str, list[str]]]:
        """(hook, plugins in order) for every hook that somebody implements, lifecycle hooks left out."""
        found = [(h, self.users(h)) for h in SERVED[self.kind] if h not in LIFECYCLE]
        return [(hook, names) for hook, names in found if names]


def compose(specs: Sequence[PluginSpec]) -> tuple[PluginSpec, ...]:
    """Orders plugins (the estimator first, then as asked for) and checks their exclusive claims.

    Raises:
        ConfigError: Two plugins claim one resource or one field name.
    """
    owners: dict[str, str] = {}
    for spec in specs:
        for claim in (*sorted(spec.claims), *(f"field {name!r}" for name in spec.cls.fields)):
            if claim in owners:
                raise ConfigError(
                    f"plugins {owners[claim]!r} and {spec.name!r} cannot be combined: both claim {claim}. Leave "
                    f"one out."
                )
            owners[claim] = spec.name
    return tuple(sorted(specs, key=lambda spec: "estimator" not in spec.claims))


def common_trainers(specs: Sequence[PluginSpec]) -> list[TrainerKind]:
    """The trainers that every plugin serves.

    Raises:
        ConfigError: There is none.
    """
    kinds = [kind for kind in SERVED if all(kind in spec.cls.trainers for spec in specs)]
    if not kinds:
        listed = "; ".join(f"{spec.name}: {', '.join(spec.cls.trainers)}" for spec in specs)
        raise ConfigError(f"no trainer is served by all plugins ({listed}). Leave one out.")
    return kinds


def why_apart(left: PluginSpec, right: PluginSpec) -> str | None:
    """Why two plugins cannot be in one run, by their declarations; None if they can."""
    try:
        common_trainers(compose([left, right]))
    except ConfigError as error:
        return str(error)
    return None


def check_kind(specs: Sequence[PluginSpec], kind: TrainerKind) -> None:
    """Refuses a trainer that a plugin cannot serve."""
    for spec in specs:
        if kind not in spec.cls.trainers:
            raise ConfigError(
                f"plugin {spec.name!r} cannot serve the {kind.upper()} trainer; it serves "
                f"{', '.join(spec.cls.trainers)}. "
                f"Use one of these trainers, or leave the plugin out."
            )
        working = [hook for hook in spec.hooks if hook not in LIFECYCLE]
        if working and not any(hook in SERVED[kind] for hook in working):
            raise PluginError(
                f"plugin {spec.name!r} declares the {kind.upper()} trainer, which calls none of its hooks "
                f"({', '.join(working)}). That trainer calls: {', '.join(SERVED[kind])}."
            )


def make_plan(specs: Sequence[PluginSpec], config: Config) -> Plan:
    """Runs every check that needs no model.

    Raises:
        ConfigError: With all refusals of all plugins, each with the way out.
    """
    ordered = compose(specs)
    check_kind(ordered, config.kind)
    config = dataclasses.replace(config, args=copy.copy(config.args), plugins=tuple(s.name for s in ordered))
    refusals: list[str] = []
    notes: list[str] = []
    needs: dict[str, list[str]] = {}
    for spec in ordered:
        for need in spec.cls.needs:
            needs.setdefault(need, []).append(spec.name)
        plugin = spec.cls(spec.options)
        for requirement in _configure(plugin, config):
            match requirement:
                case Require(setting, allowed, why):
                    value = _setting(config.args, setting, spec.name)
                    if value not in allowed:
                        wanted = " or ".join(map(repr, allowed))
                        refusals.append(f"{spec.name} needs {setting}={wanted}, it is {value!r}: {why}")
                case Recommend(setting, value, source):
                    current = _setting(config.args, setting, spec.name)
                    if current != value:
                        notes.append(f"{spec.name} recommends {setting}={value!r} ({source}); it is {current!r}")
                case Need(name):
                    if (name.partition(":")[0] + ":NAME" if ":" in name else name) not in NEEDS:
                        raise PluginError(f"plugin {spec.name!r}: `configure` needs {name!r}.{near(name, NEEDS)}")
                    needs.setdefault(name, []).append(spec.name)
                case Refuse(what, fix):
                    refusals.append(f"{spec.name}: {what} {fix}")
                case Warn(message):
                    notes.append(f"{spec.name}: {message}")
                case _:
                    raise PluginError(f"plugin {spec.name!r}: `configure` returned {requirement!r}, not a requirement.")
        if "policy_loss" in spec.claims:
            refusals += _dropped_settings(spec, config)
        if "pair_logps" in spec.hooks and getattr(config.args, "precompute_ref_log_probs", False):
            refusals.append(
                f"{spec.name} rewrites the reference token by token, and precompute_ref_log_probs=True keeps sums "
                f"only; set precompute_ref_log_probs=False"
            )
    for need, names in needs.items():
        refusals += _check_need(need, names, config)
    if refusals:
        raise ConfigError("this run cannot work:\n" + "\n".join(f"  - {refusal}" for refusal in refusals))
    return Plan(config.kind, ordered, {need: tuple(names) for need, names in needs.items()}, tuple(notes))


def _configure(plugin: Plugin, config: Config) -> list[Any]:
    try:
        return [found for result in build_manager([plugin]).hook.configure(config=config) for found in result]
    except Exception as error:
        raise PluginError(
            f"plugin {plugin.name!r} failed in its hook 'configure': {type(error).__name__}: {error}"
        ) from error


def _setting(args: Any, setting: str, plugin: str) -> Any:
    if not hasattr(args, setting):
        raise PluginError(f"plugin {plugin!r} asks about the setting {setting!r}, which {type(args).__name__} lacks.")
    return getattr(args, setting)


def _dropped_settings(spec: PluginSpec, config: Config) -> list[str]:
    """A replaced loss drops TRL's own terms, so a user who asked for them must be told."""
    return [
        f"{spec.name} replaces the policy loss and does not apply {setting}={getattr(config.args, setting)!r}; "
        f"set {setting}={neutral[0]!r}"
        for setting, neutral in _LOSS_SETTINGS.items()
        if setting not in spec.cls.honours
        and getattr(config.args, setting, neutral[0]) not in neutral
        and not (setting == "beta" and config.kind == "rloo")  # there the KL term is part of the rewards
    ]


def _check_need(need: str, names: list[str], config: Config) -> list[str]:
    who, args = " and ".join(names), config.args
    kind, _, target = need.partition(":")
    if config.kind == "dpo" and kind != "column":
        return [f"{who}: the DPO trainer cannot provide {need!r}; use GRPO or RLOO"]
    if kind == "column" and config.columns is not None and target not in config.columns:
        return [f"{who}: the training data has no column {target!r}; it has {', '.join(config.columns) or 'none'}"]
    if kind == "reward" and config.reward_names is not None and target not in config.reward_names:
        listed = ", ".join(config.reward_names) or "none"
        return [f"{who}: no reward function is called {target!r}; the run has {listed}"]
    if need == "whole_groups":
        size, group = args.per_device_train_batch_size, args.num_generations
        if size % group:
            fits = sorted({max(group, size // group * group), (size // group + 1) * group})
            return [
                f"{who}: groups must stay whole, and per_device_train_batch_size={size} splits groups of "
                f"num_generations={group}; use {' or '.join(map(str, fits))}"
            ]
    return []
