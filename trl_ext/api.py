"""Switching plugins on and off: for every trainer that is built, for one trainer, or as a class."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from trl_ext_hooks import Config, TrainerKind

from .campaign import job
from .catalog import declaration, find
from .catalog.declaration import PluginSpec
from .errors import CompatError, ConfigError
from .plan import show
from .plan.check import make_plan, provided_arguments
from .plan.compose import Plan, check_kind, common_trainers, compose
from .plan.stages import ROUNDS, TOOL_SOURCES
from .trl_internals import generation, rewards, seams, trainer_state

T = TypeVar("T")
_active: Handle | None = None


def enable(*plugins: str | Mapping[str, Any], **options: Mapping[str, Any]) -> Handle:
    """Gives every TRL trainer built from now on these plugins, whatever was imported before.

    Args:
        plugins: Names, `file.py` paths or `module:attribute`, or mappings of them to options.
        options: Plugin names with their options; naming a plugin here enables it.

    Returns:
        A handle. `handle.disable()`, or leaving a `with` block, undoes everything.

    Raises:
        TrlExtError: A plugin, an option, a combination or the installed TRL cannot work.

    Example:
        >>> import trl_ext
        >>> with trl_ext.enable("gdpo", gdpo={"group_eps": 1e-4}) as handle:
        ...     print(handle)
        <trl_ext: gdpo on grpo>
    """
    global _active
    if _active is not None:
        raise ConfigError(f"{_active!r} is already enabled. Name all plugins in one call, or disable it first.")
    handle = Handle(_resolve(plugins, options))
    handle._install()
    _active = handle
    return handle


def attach(trainer: T, *plugins: str | Mapping[str, Any], **options: Mapping[str, Any]) -> T:
    """Gives one built trainer these plugins, and returns it. Undo: `detach(trainer)`. Arguments as in `enable`."""
    specs = _resolve(plugins, options)
    session = getattr(trainer, "_trl_ext", None)
    if session is not None and not session.plan.specs:
        raise ConfigError(f"this {type(trainer).__name__} is being recorded already. Attach first, then record.")
    kind = _check_class(type(trainer), specs)
    late = [spec.name for spec in specs if "trainer_arguments" in spec.hooks]
    if late:
        raise ConfigError(
            f"plugin {late[0]!r} gives a trainer what it is built with, and this one is built already. Use "
            f"trl_ext.enable or trl_ext.extend."
        )
    plan = make_plan(specs, _config_of_trainer(trainer, kind))
    _put_in_front(trainer, plan)
    return trainer


def detach(trainer: Any) -> None:
    """Takes all plugins off a trainer and gives it its class back."""
    session = vars(trainer).get("_trl_ext")
    if session is None:
        raise ConfigError(f"this {type(trainer).__name__} has no plugins.")
    try:
        session.teardown()
    finally:
        trainer.__class__ = type(trainer)._trl_ext_original
        del trainer._trl_ext


def extend(trainer_class: type[T], *plugins: str | Mapping[str, Any], **options: Mapping[str, Any]) -> type[T]:
    """A subclass of a TRL trainer whose instances have these plugins. Arguments as in `enable`."""
    specs = compose(_resolve(plugins, options))
    _check_class(trainer_class, specs)

    @functools.wraps(trainer_class.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _construct(specs, trainer_class.__init__, self, args, kwargs)

    return type(
        trainer_class.__name__, (trainer_class,), {"__init__": __init__, "__module__": trainer_class.__module__}
    )


def record(trainer: T, rounds: int = 1, folder: str | Path | None = None, max_rows: int = 64) -> T:
    """Writes the first training rounds of a trainer, with or without plugins, for `trl_ext inspect`; returns it.

    Recording changes no number of the run. Plugins come first: record what `attach` or `enable` made.

    Args:
        trainer: A built GRPOTrainer or RLOOTrainer.
        rounds: How many rounds.
        folder: Where `round-1.json`, ... are written; `<output_dir>/inspect` by default. Older ones are replaced.
        max_rows: Rows of a round that are kept, in whole groups.

    Raises:
        ConfigError: The trainer has no rounds, is recorded already, or an argument cannot be.
    """
    from .inspection.file_format import FOLDER
    from .inspection.recorder import Recorder

    if rounds < 1 or max_rows < 1:
        raise ConfigError(f"`rounds` and `max_rows` must be at least 1, got {rounds} and {max_rows}.")
    session = getattr(trainer, "_trl_ext", None)
    kind = session.plan.kind if session is not None else _check_class(type(trainer), ())
    if kind not in ROUNDS:
        raise ConfigError(f"the {kind.upper()} trainer generates no rounds to record; GRPO and RLOO do.")
    if session is None:
        seams.check_seams(kind, {"inspect"})
        _put_in_front(trainer, Plan(kind, (), {}, ()))
        session = vars(trainer)["_trl_ext"]
    if session.recorder is not None:
        raise ConfigError(f"this {type(trainer).__name__} is being recorded already.")
    target = Path(session.trainer.args.output_dir) / FOLDER if folder is None else Path(folder)
    session.recorder = Recorder(session, target, rounds, max_rows)
    return trainer


class Handle:
    """Plugins enabled for every trainer; see `enable`."""

    def __init__(self, specs: tuple[PluginSpec, ...]) -> None:
        self.specs = compose(specs)
        self.kinds = common_trainers(specs)
        self._trainers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []
        self._listeners: list[Callable[[Any], None]] = []

    def __repr__(self) -> str:
        return f"<trl_ext: {', '.join(spec.name for spec in self.specs)} on {', '.join(self.kinds)}>"

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    @property
    def trainers(self) -> list[Any]:
        """The living trainers that got the plugins."""
        return list(self._trainers)

    def disable(self) -> None:
        """Restores TRL's classes and every trainer built meanwhile. Calling it again does nothing."""
        global _active
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        if _active is self:
            _active = None
        with contextlib.ExitStack() as stack:  # one failing teardown must not keep the others from running
            for trainer in self.trainers:
                if "_trl_ext" in vars(trainer):
                    stack.callback(detach, trainer)

    def on_trainer(self, listener: Callable[[Any], None]) -> None:
        """Calls `listener(trainer)` for every trainer that gets the plugins."""
        self._listeners.append(listener)

    def record(self, rounds: int = 1, max_rows: int = 64) -> Handle:
        """Records every trainer that gets the plugins, each into its output folder; see `trl_ext.record`."""
        if not set(self.kinds) & set(ROUNDS):
            raise ConfigError(f"{self!r} serves no trainer with rounds to record; GRPO and RLOO have them.")

        def start(trainer: Any) -> None:
            if trainer._trl_ext.kind in ROUNDS:
                record(trainer, rounds, max_rows=max_rows)
            else:
                warnings.warn(f"this {type(trainer).__name__} generates no rounds: it is not recorded.", stacklevel=4)

        for trainer in self.trainers:
            start(trainer)
        self.on_trainer(start)
        return self

    def _install(self) -> None:
        seams.check_version()
        problems: list[CompatError] = []
        for kind in self.kinds:
            try:
                seams.check_seams(kind, _users(self.specs))
            except CompatError as error:
                problems.append(error)
        if len(problems) == len(self.kinds):  # a trainer that cannot be served is refused when it is built
            raise problems[0]
        for kind in declaration.KINDS:
            self._undo.append(_wrap_init(seams.trainer_class(kind), self))

    def _built(self, trainer: Any) -> None:
        self._trainers.add(trainer)
        for listener in self._listeners:
            listener(trainer)


def _wrap_init(owner: type[Any], handle: Handle) -> Callable[[], None]:
    """Wraps the constructor of a TRL trainer; returns the undo."""
    original = owner.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _construct(handle.specs, original, self, args, kwargs)
        handle._built(self)

    owner.__init__ = __init__

    def undo() -> None:
        if owner.__init__ is not __init__:
            raise ConfigError(
                f"{owner.__name__}.__init__ was wrapped again after trl_ext.enable; undo that wrap first, then disable."
            )
        owner.__init__ = original

    return undo


def _construct(
    specs: tuple[PluginSpec, ...], original: Callable[..., None], trainer: Any, args: Any, kwargs: Any
) -> None:
    kind = _check_class(type(trainer), specs)
    signature = inspect.signature(original)
    bound: dict[str, Any] = {}
    for name, value in signature.bind_partial(trainer, *args, **kwargs).arguments.items():
        variadic = signature.parameters[name].kind
        if variadic is inspect.Parameter.VAR_KEYWORD:
            bound |= value
        elif variadic is not inspect.Parameter.VAR_POSITIONAL:
            bound[name] = value
    provided = provided_arguments(specs, bound)
    kwargs, bound = {**kwargs, **provided}, {**bound, **provided}
    config, plan = None, None
    if bound.get("args") is not None:  # without arguments TRL makes its own, and the plan waits for them
        config = _config_of_arguments(kind, bound)
        plan = make_plan(specs, config)
        if "tools" in plan.needs and not generation.renders_tool_calls(bound):
            raise ConfigError(
                f"{' and '.join(plan.needs['tools'])}: rollouts must be able to call tools, and the chat template of "
                f"this model loses a tool call or its result (a message of the role 'tool'). Use a model that was "
                f"trained with tools, such as Qwen/Qwen3-0.6B, or set the chat_template of the processing_class."
            )
    original(trainer, *args, **kwargs)
    if config is None or plan is None:
        plan = make_plan(specs, _config_of_trainer(trainer, kind))
    elif config.reward_names is None:
        plan = make_plan(specs, dataclasses.replace(config, reward_names=rewards.reward_names(trainer)))
    _put_in_front(trainer, plan)


def _check_class(cls: type[Any], specs: tuple[PluginSpec, ...]) -> TrainerKind:
    seams.check_version()
    kind = seams.kind_of(cls)
    if kind is None:
        raise ConfigError(f"{cls.__name__} is none of TRL's GRPOTrainer, RLOOTrainer and DPOTrainer, nor a subclass.")
    if hasattr(cls, "_trl_ext_original"):
        raise ConfigError(f"this {cls.__name__} already has plugins. Name all of them in one call.")
    check_kind(specs, kind)
    job.check_running(specs)
    seams.check_seams(kind, _users(specs))
    return kind


def _put_in_front(trainer: Any, plan: Plan) -> None:
    """Gives the instance a class with our mixin in front, and sets the plugins up."""
    from .engine.host import Session
    from .trl_internals.mixins import MIXINS

    cls = type(trainer)
    if "_trl_ext" in vars(trainer):
        raise ConfigError(f"this {cls.__name__} already has plugins. Name all of them in one call.")
    session = Session(trainer, plan)
    namespace = {"_trl_ext_original": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    trainer._trl_ext = session
    trainer.__class__ = type(cls.__name__, (MIXINS[plan.kind], cls), namespace)
    try:
        session.setup()
    except BaseException:
        detach(trainer)
        raise
    if plan.specs and trainer.accelerator.is_main_process:
        show.print_plan(plan)


def _resolve(
    plugins: tuple[str | Mapping[str, Any], ...], options: Mapping[str, Mapping[str, Any]]
) -> tuple[PluginSpec, ...]:
    requests: dict[str, Any] = {}
    for plugin in plugins:
        for reference, values in ({plugin: None} if isinstance(plugin, str) else plugin).items():
            requests[reference] = values
    for name, values in options.items():
        same = [r for r in requests if find.means(r, name)]
        requests[same[0] if same else name] = values
    if not requests:
        raise ConfigError("name at least one plugin, for example trl_ext.enable('gdpo').")
    return find.resolve(requests)


def _users(specs: tuple[PluginSpec, ...]) -> set[str]:
    return {entry for spec in specs for entry in (*spec.hooks, *spec.cls.needs)}


def _config_of_arguments(kind: TrainerKind, bound: Mapping[str, Any]) -> Config:
    functions = bound.get("reward_funcs") or ()
    functions = functions if isinstance(functions, list | tuple) else [functions]
    names = None if bound.get("environment_factory") is not None else tuple(map(rewards.reward_name, functions))
    sources = tuple(name for name in TOOL_SOURCES if bound.get(name))
    return Config(kind, bound["args"], names, _columns(bound.get("train_dataset")), (), sources)


def _config_of_trainer(trainer: Any, kind: TrainerKind) -> Config:
    names, columns = rewards.reward_names(trainer), _columns(trainer.train_dataset)
    return Config(kind, trainer.args, names, columns, (), trainer_state.tool_sources(trainer))


def _columns(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "column_names", None)
    return tuple(names) if isinstance(names, list) else None
