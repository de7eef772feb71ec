"""Everything that is checked before a trainer is built."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_ext_hooks import NEEDS, Config, Need, Plugin, Recommend, Refuse, Require, Warn

from ..catalog.declaration import PluginSpec, build_manager
from ..errors import ConfigError, PluginError, near
from .compose import Plan, check_kind, compose
from .settings import _dropped_settings, _setting
from .stages import TOOL_SOURCES


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
