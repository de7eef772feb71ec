"""Which plugin acts at which stage, in which order, and everything that is checked before a trainer is built."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_ext_hooks import NEEDS, Config, Need, Plugin, Recommend, Refuse, Require, TrainerKind, Warn

from .errors import ConfigError, PluginError, near
from .registry import HOOKS, PluginSpec, build_manager

BUILDING = ("trainer_arguments", "configure")
"""Hooks that run before there is a trainer, on instances of their own."""
LIFECYCLE = (*BUILDING, "setup", "teardown", "state_dict", "load_state_dict")
NO_STAGE = (*LIFECYCLE, "inspect")
"""Hooks that are no stage of training: a printed plan leaves them out, and they prove nothing."""
ELSEWHERE = ("run", "optimizer_step")
"""Hooks that run before there is a trainer, or after the training step by which every other one must have run."""
_COMMON = tuple(hook for hook in LIFECYCLE if hook != "trainer_arguments")
_PAIRS = ("pair_batch", "pair_logps", "pair_metrics")
_ROUNDS = tuple(hook for hook in HOOKS if hook not in (*_PAIRS, "run"))
SERVED: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": _ROUNDS,
    "rloo": tuple(hook for hook in _ROUNDS if hook != "trainer_arguments"),
    "dpo": (*_COMMON, "run", "loss_inputs", "logps", "optimizer_step", *_PAIRS),
}
"""The hooks that each trainer calls."""
TOOL_SOURCES = ("tools", "environment_factory", "rollout_func")
"""Constructor arguments of a trainer that let its rollouts call tools; what `trainer_arguments` may give."""
ROUNDS: tuple[TrainerKind, ...] = ("grpo", "rloo")
"""The trainers that train on rounds of generated completions, which can be recorded."""

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
        """(hook, plugins in order) for every hook that somebody implements and that is a stage of training."""
        found = [(h, self.users(h)) for h in SERVED[self.kind] if h not in NO_STAGE]
        return [(hook, names) for hook, names in found if names]


def compose(specs: Sequence[PluginSpec]) -> tuple[PluginSpec, ...]:
    """Orders plugins (the estimator first, then as asked for) and checks their exclusive claims.

    Raises:
        ConfigError: Two plugins claim one resource or one field name, or one makes what another does not use.
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
    without = owners.get("no_advantages")
    for spec in specs:
        if without not in (None, spec.name) and ("advantages" in spec.hooks or "estimator" in spec.claims):
            raise ConfigError(
                f"plugins {without!r} and {spec.name!r} cannot be combined: {spec.name!r} makes advantages, and the "
                f"loss of {without!r} uses none. Leave one out."
            )
    forward = owners.get("logps")
    for spec in specs:
        if forward not in (None, spec.name) and "hidden_positions" in spec.hooks:
            raise ConfigError(
                f"plugins {forward!r} and {spec.name!r} cannot be combined: {spec.name!r} reads hidden states of the "
                f"policy's forward, and {forward!r} runs a forward of its own. Leave one out."
            )
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
        if "trainer_arguments" in spec.hooks and "trainer_arguments" not in SERVED[kind]:
            raise PluginError(
                f"plugin {spec.name!r} declares the {kind.upper()} trainer and gives it tools in its hook "
                f"'trainer_arguments'; only GRPO takes {', '.join(TOOL_SOURCES)}."
            )
        working = [hook for hook in spec.hooks if hook not in LIFECYCLE]
        if working and not any(hook in SERVED[kind] for hook in working):
            raise PluginError(
                f"plugin {spec.name!r} declares the {kind.upper()} trainer, which calls none of its hooks "
                f"({', '.join(working)}). That trainer calls: {', '.join(SERVED[kind])}."
            )


def provided_arguments(specs: Sequence[PluginSpec], given: Mapping[str, Any]) -> dict[str, Any]:
    """What plugins add to the arguments with which a trainer is constructed.

    Args:
        given: The arguments of the caller by name.

    Raises:
        ConfigError: Two plugins, or the caller and a plugin, give the same argument.
        PluginError: A plugin gives something else.
    """
    found: dict[str, Any] = {}
    owners = {name: "the caller" for name in TOOL_SOURCES if given.get(name)}
    for spec in compose(specs):
        if "trainer_arguments" not in spec.hooks:
            continue
        plugin = spec.cls(spec.options)
        with _blamed(plugin, "trainer_arguments"):
            results = build_manager([plugin]).hook.trainer_arguments()
        for result in results:
            if not isinstance(result, Mapping) or not set(result) <= set(TOOL_SOURCES):
                got = f"{', '.join(result)!r}" if isinstance(result, Mapping) else type(result).__name__
                raise PluginError(
                    f"plugin {spec.name!r} returned {got} from 'trainer_arguments', expected a mapping of "
                    f"{', '.join(TOOL_SOURCES)}."
                )
            for name, value in result.items():
                if name in owners:
                    raise ConfigError(
                        f"plugin {spec.name!r} gives the trainer `{name}`, which {owners[name]} gives too. Leave one "
                        f"out."
                    )
                owners[name] = f"plugin {spec.name!r}"
                found[name] = value
    return found


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
                    if spec.name not in needs.setdefault(name, []):
                        needs[name].append(spec.name)
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
    with _blamed(plugin, "configure"):
        return [found for result in build_manager([plugin]).hook.configure(config=config) for found in result]


@contextlib.contextmanager
def _blamed(plugin: Plugin, hook: str) -> Iterator[None]:
    """Names the plugin and the hook of what is raised inside the block."""
    try:
        yield
    except Exception as error:
        raise PluginError(
            f"plugin {plugin.name!r} failed in its hook {hook!r}: {type(error).__name__}: {error}"
        ) from error


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


def _check_need(need: str, names: list[str], config: Config) -> list[str]:
    who, args = " and ".join(names), config.args
    kind, _, target = need.partition(":")
    if config.kind == "dpo" and kind != "column":
        return [f"{who}: the DPO trainer cannot provide {need!r}; use GRPO or RLOO"]
    if kind == "column" and config.columns is not None and target not in config.columns:
        return [f"{who}: the training data has no column {target!r}; it has {', '.join(config.columns) or 'none'}"]
    if kind == "reward" and config.reward_names is not None and target not in config.reward_names:
        return [f"{who}: no reward function is called {target!r}.{near(target, config.reward_names)}"]
    if need == "tools" and not config.tool_sources:
        if config.kind == "rloo":
            return [f"{who}: rollouts must be able to call tools, which the RLOO trainer has not; use GRPO"]
        return [
            f"{who}: rollouts must be able to call tools; give the trainer `tools`, `environment_factory` or "
            f"`rollout_func`, or add a plugin that does, such as `tools`"
        ]
    if need == "turns" and config.kind != "grpo":
        return [f"{who}: environments are stepped in GRPO's tool loop, which {config.kind.upper()} has not; use GRPO"]
    if need == "whole_groups":
        # processes and micro-batches get their rows in runs of these sizes, so multiples keep groups whole on both
        phases = [("per_device_train_batch_size", "num_generations")]
        if args.eval_strategy != "no":
            own = "num_generations_eval" if args.num_generations_eval else "num_generations"
            phases.append(("per_device_eval_batch_size", own))
        return [
            _split_groups(who, setting, getattr(args, setting), name, getattr(args, name))
            for setting, name in phases
            if getattr(args, setting) % getattr(args, name)
        ]
    return []


def _split_groups(who: str, setting: str, size: int, name: str, group: int) -> str:
    fits = sorted({max(group, size // group * group), (size // group + 1) * group})
    return (
        f"{who}: groups must stay whole, and {setting}={size} splits groups of {name}={group}; use "
        f"{' or '.join(map(str, fits))}"
    )
