"""Checks of a run before its trainer is built: requirements of plugins and the settings of the user."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_ext_hooks import NEEDS, Config, Need, Plugin, Recommend, Refuse, Require, Warn

from ..catalog import options
from ..catalog.declaration import PluginSpec, build_manager, instances, is_known
from ..errors import ConfigError, PluginError, near
from ..trl_internals.distribution import splits_parameters
from .compose import Plan, check_kind, compose
from .settings import dropped_settings, ignored_settings, ignores, setting_of, tokenwise_refusals
from .stages import TOOL_SOURCES


def provided_arguments(
    specs: Sequence[PluginSpec], plugins: Mapping[str, Plugin], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Collects the constructor arguments of a trainer that plugins provide.

    Args:
        specs: The plugins that were asked for.
        plugins: Their instances by name.
        given: The arguments of the caller by name.

    Raises:
        ConfigError: Two plugins, or the caller and a plugin, give the same argument.
        PluginError: A plugin gives anything else.
    """
    provided: dict[str, Any] = {}
    owners = {name: "the caller" for name in TOOL_SOURCES if given.get(name)}
    for spec in compose(specs):
        if "trainer_arguments" not in spec.hooks:
            continue
        plugin = plugins[spec.name]
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
                provided[name] = value
    return provided


def make_plan(specs: Sequence[PluginSpec], config: Config, plugins: Mapping[str, Plugin] | None = None) -> Plan:
    """Makes the plan of a run, with every check that needs no model.

    Args:
        specs: The plugins that were asked for.
        config: The trainer that is about to be built.
        plugins: Their instances by name, which then serve the trainer. New ones by default.

    Raises:
        ConfigError: Lists all refusals of all plugins, each with a way out.
    """
    ordered = compose(specs)
    check_kind(ordered, config.kind)
    plugins = instances(ordered) if plugins is None else plugins
    hooks = {spec.name: spec.hooks for spec in ordered}
    columns = _reward_columns(ordered, plugins, config)
    last = next(reversed(columns), None)
    config = dataclasses.replace(
        config,
        args=copy.copy(config.args),
        reward_names=config.reward_names if last is None else columns[last][1],
        plugins=tuple(spec.name for spec in ordered),
        rewriters=tuple(spec.name for spec in ordered if "rewards" in spec.hooks),
        estimators=tuple(spec.name for spec in ordered if "estimator" in spec.claims),
        fields=tuple(name for spec in ordered for name in spec.cls.fields),
    )
    refusals: list[str] = []
    notes: list[str] = []
    needs: dict[str, list[str]] = {}
    named_by: dict[str, list[str]] = {}  # a need -> the options that name it
    asked: dict[str, list[tuple[str, Require]]] = {}  # a setting -> who requires what of it
    required: dict[str, set[str]] = {spec.name: set() for spec in ordered}  # the settings that a plugin speaks about
    for spec in ordered:
        for need in spec.cls.needs:
            needs.setdefault(need, []).append(spec.name)
        for need, option in options.named_needs(spec.options, spec.name):
            named_by.setdefault(need, []).append(option)
            if spec.name not in needs.setdefault(need, []):
                needs[need].append(spec.name)
        for requirement in _configure(plugins[spec.name], config):
            match requirement:
                case Require(setting, _, _):
                    required[spec.name].add(setting)
                    setting_of(config.args, setting, spec.name)
                    asked.setdefault(setting, []).append((spec.name, requirement))
                case Recommend(setting, value, source):
                    current = setting_of(config.args, setting, spec.name)
                    if current != value and not any(ignores(other, setting) for other in ordered):
                        notes.append(f"{spec.name} recommends {setting}={value!r} ({source}); it is {current!r}")
                case Need(name):
                    if not is_known(name, NEEDS):
                        raise PluginError(f"plugin {spec.name!r}: `configure` needs {name!r}.{near(name, NEEDS)}")
                    if spec.name not in needs.setdefault(name, []):
                        needs[name].append(spec.name)
                case Refuse(what, fix):
                    refusals.append(f"{spec.name}: {what} {fix}")
                case Warn(message):
                    notes.append(f"{spec.name}: {message}")
                case _:
                    raise PluginError(f"plugin {spec.name!r}: `configure` returned {requirement!r}, not a requirement.")
        if "step_statistics" in spec.hooks:
            refusals += _check_steps(spec.name, config)
        if "policy_loss" in spec.claims:
            refusals += dropped_settings(spec, config)
        if "estimator" in spec.claims:
            ignored, defaults = ignored_settings(spec, config, required[spec.name])
            refusals += ignored
            notes += defaults
        if "pair_logps" in spec.hooks and getattr(config.args, "precompute_ref_log_probs", False):
            refusals.append(
                f"{spec.name} rewrites the reference token by token, but precompute_ref_log_probs=True keeps only "
                f"sums; set precompute_ref_log_probs=False"
            )
    for setting, requirements in asked.items():
        refusals += _unmet(setting, getattr(config.args, setting), requirements)
    for need, names in needs.items():
        if need.startswith("reward:"):
            # a plugin that rewrites rewards may also name those that it gets
            names = [name for name in names if need.partition(":")[2] not in columns.get(name, ((), ()))[0]]
        problems = _check_need(need, names, config) if names else []
        if need in named_by:  # an option asked for it, so that is what has to change
            options_of = [option for option in named_by[need] if option.partition(".")[0] in names]
            fix = f". Correct {' and '.join(dict.fromkeys(options_of or named_by[need]))}."
            problems = [refusal.removesuffix(".") + fix for refusal in problems]
        refusals += problems
    refusals += _check_groups(ordered, needs, config)
    weights = getattr(config.args, "reward_weights", None) or ()
    if not all(map(math.isfinite, weights)):
        refusals.append(f"reward_weights={weights!r} must be finite numbers")
    if refusals:
        raise ConfigError("this run cannot work:\n" + "\n".join(f"  - {refusal}" for refusal in refusals))
    return Plan(
        kind=config.kind,
        specs=ordered,
        plugins={spec.name: plugins[spec.name] for spec in ordered},
        needs={need: tuple(names) for need, names in needs.items()},
        notes=tuple(notes),
        required=required,
        reward_columns={name: columns[name][1] for name in columns if "reward_columns" in hooks[name]},
    )


def _unmet(setting: str, value: Any, requirements: Sequence[tuple[str, Require]]) -> list[str]:
    """Returns why a setting does not meet what plugins require of it, or why no value can.

    Args:
        setting: The setting.
        value: Its value.
        requirements: Each plugin with what it requires.
    """
    suits_all = [one for one in requirements[0][1].allowed if all(one in other.allowed for _, other in requirements)]
    if not suits_all:
        texts = [f"{name} needs {' or '.join(map(repr, one.allowed))} ({one.why})" for name, one in requirements]
        return [f"no {setting} suits all plugins: {', '.join(texts)}; leave one out"]
    wanted = " or ".join(map(repr, suits_all))
    return [
        f"{name} needs {setting}={wanted}, it is {value!r}: {one.why}"
        for name, one in requirements
        if value not in one.allowed
    ]


def _reward_columns(
    specs: Sequence[PluginSpec], plugins: Mapping[str, Plugin], config: Config
) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Asks the plugins which reward columns their hook `rewards` returns.

    Returns:
        By plugin with the hook `rewards`, in order, the names that it gets and those that it returns. Nothing where the
        names of the reward functions are unknown.

    Raises:
        PluginError: A plugin returned something else than names.
    """
    columns: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    names = config.reward_names
    if names is None or config.kind == "dpo":
        return columns
    for spec in specs:
        if "rewards" not in spec.hooks:
            if "reward_columns" in spec.hooks:
                raise PluginError(
                    f"plugin {spec.name!r} implements `reward_columns`, and lacks the hook `rewards` that returns them."
                )
            continue
        given = names
        if "reward_columns" in spec.hooks:
            with _blamed(plugins[spec.name], "reward_columns"):
                results = build_manager([plugins[spec.name]]).hook.reward_columns(names=names)
            for result in results:  # none where the hook returned None
                is_list = isinstance(result, list | tuple) and all(isinstance(name, str) and name for name in result)
                if not is_list or not result or len(set(result)) < len(result):
                    raise PluginError(
                        f"plugin {spec.name!r} returned {result!r} from 'reward_columns', expected a tuple of names, "
                        f"at least one and each of them once. It got {', '.join(names)}."
                    )
                names = tuple(result)
        columns[spec.name] = (given, names)
    return columns


def _configure(plugin: Plugin, config: Config) -> list[Any]:
    """Returns the requirements of one plugin."""
    with _blamed(plugin, "configure"):
        results = build_manager([plugin]).hook.configure(config=config)
        return [requirement for requirements in results for requirement in requirements]


@contextlib.contextmanager
def _blamed(plugin: Plugin, hook: str) -> Iterator[None]:
    """Names the plugin and its hook in every error that is raised inside the block."""
    try:
        yield
    except Exception as error:
        raise PluginError(
            f"plugin {plugin.name!r} failed in its hook {hook!r}: {type(error).__name__}: {error}"
        ) from error


def _check_need(need: str, names: list[str], config: Config) -> list[str]:
    """Returns why a run does not meet a need, if it does not.

    Args:
        need: The need.
        names: The plugins that have it.
        config: The run.
    """
    who, args = " and ".join(names), config.args
    kind, _, target = need.partition(":")
    if need == "whole_parameters":
        split = splits_parameters(args)
        if split is None:
            return []
        return [f"{who}: every process must hold all parameters, and {split} splits them; use DDP or DeepSpeed stage 2"]
    if config.kind == "dpo" and kind != "column":
        return [f"{who}: the DPO trainer cannot provide {need!r}; use GRPO or RLOO"]
    if kind == "column" and config.columns is not None and target not in config.columns:
        return [f"{who}: the training data has no column {target!r}; it has {', '.join(config.columns) or 'none'}"]
    if kind == "reward" and config.reward_names is not None and target not in config.reward_names:
        return [f"{who}: no reward function is called {target!r}.{near(target, config.reward_names)}"]
    if need == "tools" and not config.tool_sources:
        if config.kind == "rloo":
            return [f"{who}: rollouts must be able to call tools, which RLOO does not support; use GRPO"]
        return [
            f"{who}: rollouts must be able to call tools; give the trainer `tools`, `environment_factory` or "
            f"`rollout_func`, or add a plugin that does, such as `tools`"
        ]
    if need == "turns" and config.kind != "grpo":
        return [f"{who}: environments need GRPO's tool loop, which {config.kind.upper()} does not support; use GRPO"]
    if need == "token_advantages":
        return tokenwise_refusals(who, config)
    if need == "whole_groups":
        # a process or a micro-batch gets this many consecutive rows, so multiples of the group size keep groups whole
        phases = [("per_device_train_batch_size", "num_generations")]
        if args.eval_strategy != "no":
            group_setting = "num_generations_eval" if args.num_generations_eval else "num_generations"
            phases.append(("per_device_eval_batch_size", group_setting))
        return [
            _split_groups(who, size, getattr(args, size), group, getattr(args, group))
            for size, group in phases
            if getattr(args, size) % getattr(args, group)
        ]
    if need == "grouped_steps":
        return _split_by_steps(who, args)
    return []


def _check_groups(specs: Sequence[PluginSpec], needs: Mapping[str, Sequence[str]], config: Config) -> list[str]:
    """Returns why a plugin cannot have the groups or the number of prompts that it asks for, if so."""
    if config.kind == "dpo":  # `_check_need` has said it
        return []
    former = next((spec.name for spec in specs if "groups" in spec.claims), None)
    refusals = []
    if former and "whole_groups" in needs:
        who = " and ".join(needs["whole_groups"])
        refusals.append(f"{who}: groups must stay whole, and {former} forms groups of any size; leave one of them out")
    if former and "grouped_steps" in needs:
        who, accumulated = " and ".join(needs["grouped_steps"]), config.args.gradient_accumulation_steps
        if accumulated % config.args.steps_per_generation:  # else a step takes all rows of a round
            refusals.append(
                f"{who}: every optimizer step must hold whole groups, and {former} forms groups of any size; set "
                f"steps_per_generation={accumulated}, so that every step takes the whole round"
            )
    counts = {need: names for need, names in needs.items() if need.startswith("prompts:")}
    if len(counts) > 1:
        asked = ", ".join(f"{' and '.join(names)} {need.partition(':')[2]}" for need, names in counts.items())
        return [*refusals, f"the number of prompts of a round is asked for twice: {asked}; leave one of them out"]
    for need, names in counts.items():
        who, count, rows = " and ".join(names), int(need.partition(":")[2]), int(config.args.generation_batch_size)
        if former not in names:
            raise PluginError(f"plugin {names[0]!r} needs {need!r}, which belongs to the claim 'groups'; declare it.")
        if count < 1 or rows % count:
            fits = [number for number in range(1, rows + 1) if rows % number == 0]
            near_count = sorted(sorted(fits, key=lambda number: abs(number - count))[:2])
            refusals.append(
                f"{who}: a round of generation_batch_size={rows} rows cannot have {count} prompts, each equally often; "
                f"use {' or '.join(map(str, near_count))}"
            )
    return refusals


def _check_steps(who: str, config: Config) -> list[str]:
    """Returns the refusal of optimizer steps that take rows of several rounds, as later rounds do not exist yet."""
    args = config.args
    if config.kind == "dpo" or args.steps_per_generation * args.num_iterations % args.gradient_accumulation_steps == 0:
        return []
    return [
        f"{who} looks at all rows of an optimizer step before its losses, and with "
        f"gradient_accumulation_steps={args.gradient_accumulation_steps} a step takes rows of several rounds of "
        f"steps_per_generation={args.steps_per_generation} and num_iterations={args.num_iterations}; make "
        f"steps_per_generation * num_iterations a multiple of gradient_accumulation_steps"
    ]


def _split_by_steps(who: str, args: Any) -> list[str]:
    """Returns the refusal of settings with which an optimizer step takes a part of a group, if they do.

    A process has consecutive rows of a round and takes them in slices. A step that takes all slices of every process
    holds whole groups, on however many processes they lie. One that takes some of them holds whole groups only where
    its slices on each process do.
    """
    rows, group = int(args.per_device_train_batch_size), int(args.num_generations)
    accumulated, slices = int(args.gradient_accumulation_steps), int(args.steps_per_generation)
    # a step may begin at any multiple of this many slices
    taken = math.gcd(accumulated, slices)
    if taken == slices or rows * taken % group == 0:
        return []
    return [
        f"{who}: every optimizer step must hold whole groups, and with steps_per_generation={slices} it takes "
        f"{rows * taken} rows in a row of each process (per_device_train_batch_size={rows} * {taken}), which splits "
        f"groups of num_generations={group}; make that number a multiple of {group}, or set steps_per_generation="
        f"{accumulated} and num_iterations={max(2, slices // accumulated)}, so that every step takes the whole round"
    ]


def _split_groups(who: str, setting: str, size: int, name: str, group: int) -> str:
    """Returns the refusal of a batch size that splits groups, with the nearest sizes that do not."""
    fits = sorted({max(group, size // group * group), (size // group + 1) * group})
    return (
        f"{who}: groups must stay whole, and {setting}={size} splits groups of {name}={group}; use "
        f"{' or '.join(map(str, fits))}"
    )
