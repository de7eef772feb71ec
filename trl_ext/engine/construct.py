"""Building a trainer with plugins: the checks before TRL's constructor, the constructor, and what comes after it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_ext_hooks import Config, Plugin, TrainerKind

from ..catalog.declaration import PluginSpec, instances
from ..errors import ConfigError
from ..plan.check import make_plan, provided_arguments
from ..plan.compose import Plan, check_kind
from ..plan.ownership import check_owned
from ..plan.show import print_plan
from ..plan.stages import TOOL_SOURCES
from ..trl_internals import arguments, generation, reference_adapters, rewards, seams, steps, trainer_state
from .attach import has_plugins, put_in_front
from .stages import foreign


def construct(
    specs: tuple[PluginSpec, ...], original: Callable[..., None], trainer: Any, args: Any, kwargs: Any
) -> None:
    """Runs a trainer's constructor with plugins.

    Args:
        specs: The plugins.
        original: The constructor.
        trainer: The object that is being constructed.
        args: The caller's positional arguments.
        kwargs: The caller's keyword arguments.
    """
    kind = check_class(type(trainer), specs)
    plugins = instances(specs)
    signature = inspect.signature(original)
    bound: dict[str, Any] = {}
    for name, value in signature.bind_partial(trainer, *args, **kwargs).arguments.items():
        variadic = signature.parameters[name].kind
        if variadic is inspect.Parameter.VAR_KEYWORD:
            bound |= value
        elif variadic is not inspect.Parameter.VAR_POSITIONAL:
            bound[name] = value
    provided = provided_arguments(specs, plugins, bound)
    kwargs, bound = {**kwargs, **provided}, {**bound, **provided}
    config, plan = None, None
    if bound.get("args") is not None:  # without arguments TRL makes its own, and the plan waits for them
        config, plan = plan_of_arguments(kind, type(trainer), specs, plugins, bound)
    original(trainer, *args, **kwargs)
    if config is None or plan is None:
        _check_device(trainer.args)
        plan = make_plan(specs, _config_of_trainer(trainer, kind), plugins)
    elif config.reward_names is None:
        config = dataclasses.replace(config, reward_names=rewards.reward_names(trainer))
        plan = make_plan(specs, config, plugins)
    _start(trainer, plan)


def plan_of_arguments(
    kind: TrainerKind,
    cls: type[Any],
    specs: tuple[PluginSpec, ...],
    plugins: Mapping[str, Plugin],
    bound: Mapping[str, Any],
) -> tuple[Config, Plan]:
    """Checks what a trainer is about to be built with, and returns what plugins see of it and their plan.

    Args:
        kind: The kind of the trainer.
        cls: Its class.
        specs: The plugins.
        plugins: Their instances by name.
        bound: The arguments of the constructor by name, with those that plugins provide.

    Raises:
        ConfigError: The run cannot work. No model has been loaded by then.
    """
    _check_device(bound["args"])
    config = _config_of_arguments(kind, bound)
    plan = make_plan(specs, config, plugins)
    steps.check_rows(kind, config.args, bound.get("train_dataset"), cls, plan.prompts)
    if kind != "dpo" and rewards.calls_them(kind, cls, _functions(bound)):
        kept = arguments.kept_columns(kind, config.args, config.columns or (), plan.columns())
        rewards.check_columns(kept)
    if "tools" in plan.needs and not generation.renders_tool_calls(bound):
        raise ConfigError(
            f"{' and '.join(plan.needs['tools'])}: rollouts must be able to call tools, and the chat template of "
            f"this model loses a tool call or its result (a message of the role 'tool'). Use a model that was "
            f"trained with tools, such as Qwen/Qwen3-0.6B, or set the chat_template of the processing_class."
        )
    if "ref_logps" in plan.needs:
        reference_adapters.check_config(bound.get("peft_config"), plan.needs["ref_logps"][0])
    foreign.check(cls, plan)
    return config, plan


def attach_to(trainer: Any, specs: tuple[PluginSpec, ...]) -> None:
    """Gives plugins to a trainer that exists."""
    kind = check_class(type(trainer), specs)
    late = [spec.name for spec in specs if "trainer_arguments" in spec.hooks]
    if late:
        raise ConfigError(
            f"plugin {late[0]!r} supplies constructor arguments, so it cannot be attached to an existing trainer. Use "
            f"trl_ext.enable or trl_ext.extend."
        )
    _check_device(trainer.args)
    plan = make_plan(specs, _config_of_trainer(trainer, kind))
    steps.check_rows(kind, trainer.args, trainer.train_dataset, type(trainer), plan.prompts)
    _start(trainer, plan)


def _start(trainer: Any, plan: Plan) -> None:
    put_in_front(trainer, plan)
    if trainer.accelerator.is_main_process:
        print_plan(plan)


def check_class(cls: type[Any], specs: tuple[PluginSpec, ...]) -> TrainerKind:
    """Returns the kind of a trainer class. Refuses one that the plugins or this TRL cannot serve."""
    seams.check_version()
    kind = seams.kind_of(cls)
    if kind is None:
        raise ConfigError(f"{cls.__name__} is none of TRL's GRPOTrainer, RLOOTrainer and DPOTrainer, nor a subclass.")
    if has_plugins(cls):
        raise ConfigError(
            f"this {cls.__name__} already has plugins. Name all of them in one call, after trl_ext.detach(trainer)."
        )
    check_kind(specs, kind)
    check_owned(specs)
    seams.check_seams(kind, users(specs))
    return kind


def _check_device(args: Any) -> None:
    """Refuses devices on which plugins cannot compute."""
    if args is not None and args.device.type == "mps":
        raise ConfigError(
            "plugins compute rewards and advantages in float64, which Apple's MPS device does not have. Set "
            "use_cpu=True in the training arguments."
        )


def users(specs: tuple[PluginSpec, ...]) -> set[str]:
    """Returns the hooks and needs of plugins, which decide what of TRL must be there."""
    return {use for spec in specs for use in spec.uses}


def _functions(bound: Mapping[str, Any]) -> Sequence[Any]:
    functions = bound.get("reward_funcs") or ()
    return functions if isinstance(functions, list | tuple) else [functions]


def _config_of_arguments(kind: TrainerKind, bound: Mapping[str, Any]) -> Config:
    functions = _functions(bound)
    by_environment = bound.get("environment_factory") is not None
    names = None if by_environment else rewards.distinct(map(rewards.reward_name, functions))
    sources = tuple(name for name in TOOL_SOURCES if bound.get(name))
    data = bound.get("train_dataset")
    return Config(kind, bound["args"], names, _columns(data), (), sources, data=_readable(data))


def _config_of_trainer(trainer: Any, kind: TrainerKind) -> Config:
    names, columns = rewards.reward_names(trainer), _columns(trainer.train_dataset)
    sources, data = trainer_state.tool_sources(trainer), _readable(trainer.train_dataset)
    return Config(kind, trainer.args, names, columns, (), sources, data=data)


def _columns(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "column_names", None)
    return tuple(names) if isinstance(names, list) else None


def _readable(data: Any) -> Any:
    """Returns data whose stored rows are what the trainer gets; None for a stream, or where rows are transformed."""
    from datasets import Dataset

    return data if isinstance(data, Dataset) and data.format["type"] != "custom" else None
