"""Switching plugins on and off: for every trainer that is built, for one trainer, or as a class."""

from __future__ import annotations

import atexit
import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from .catalog import declaration, find
from .catalog.declaration import PluginSpec
from .engine.attach import host_of, put_in_front, take_off
from .engine.construct import attach_to, check_class, construct, users
from .errors import CompatError, ConfigError
from .inspection.file_format import FOLDER
from .inspection.recorder import Recorder
from .plan.compose import Plan, common_trainers, compose
from .plan.overview import Overview
from .plan.ownership import owner
from .plan.stages import ROUNDS
from .trl_internals import seams
from .trl_internals.other_trainers import Watch

T = TypeVar("T")
_active: Handle | None = None


def enable(*plugins: str | Mapping[str, Any], **options: Mapping[str, Any]) -> Handle:
    """Gives every TRL trainer built from now on these plugins, whatever was imported before.

    Called again with the same plugins and options, it returns the same handle. Every call counts: leaving a `with`
    block takes back one of them, and `disable` takes back all. So a block inside another leaves the outer one on.

    Args:
        plugins: Names, `file.py` paths or `module:attribute`, or mappings of them to options.
        options: Plugin names with their options; naming a plugin here enables it.

    Returns:
        A handle. `handle.disable()`, `trl_ext.disable()`, or leaving a `with` block, undoes everything.

    Raises:
        TrlExtError: A plugin, an option, a combination or the installed TRL cannot work, or others are enabled.

    Example:
        >>> import trl_ext
        >>> with trl_ext.enable("gdpo", gdpo={"group_eps": 1e-4}) as handle:
        ...     print(handle)
        <trl_ext: gdpo on grpo>
    """
    return enable_specs(_resolve(plugins, options))


def enable_specs(specs: tuple[PluginSpec, ...]) -> Handle:
    """Does the same for plugins that are found already, with their options."""
    global _active
    if _active is not None:
        asked = compose(specs)
        difference = _difference(_active.specs, asked)
        if difference:
            raise ConfigError(
                f"{_active!r} is already enabled, and {difference}. To switch, call trl_ext.disable() first. To "
                f"combine plugins, name all of them in one call after it."
            )
        _active._requests += 1
        return _active
    handle = Handle(specs)
    try:
        handle._install()
    except BaseException:
        handle.disable()  # a part of it may be in place
        raise
    _active = handle
    return handle


def disable() -> None:
    """Undoes `enable`, also where its handle was not kept. Does nothing if no plugins are enabled."""
    if _active is not None:
        _active.disable()


def attach(trainer: T, *plugins: str | Mapping[str, Any], **options: Mapping[str, Any]) -> T:
    """Gives one built trainer these plugins, and returns it. Undo: `detach(trainer)`. Arguments as in `enable`."""
    specs = _resolve(plugins, options)
    host = host_of(trainer)
    if host is not None and not host.plan.specs:
        raise ConfigError(f"this {type(trainer).__name__} is being recorded already. Attach first, then record.")
    attach_to(trainer, specs)
    return trainer


def detach(trainer: Any) -> None:
    """Takes all plugins off a trainer and gives it its class back."""
    take_off(trainer)


def extend(trainer_class: type[T], *plugins: str | Mapping[str, Any], **options: Mapping[str, Any]) -> type[T]:
    """Makes a subclass of a TRL trainer whose instances have these plugins. Arguments as in `enable`."""
    specs = compose(_resolve(plugins, options))
    check_class(trainer_class, specs)

    @functools.wraps(trainer_class.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(specs, trainer_class.__init__, self, args, kwargs)

    return type(
        trainer_class.__name__, (trainer_class,), {"__init__": __init__, "__module__": trainer_class.__module__}
    )


def record(trainer: T, rounds: int = 1, folder: str | Path | None = None, max_rows: int = 64) -> T:
    """Writes the first training rounds of a trainer for `trl_ext inspect`, and returns the trainer.

    The trainer may have plugins or none. Recording changes no number of the run. Attach plugins first, then record.

    Args:
        trainer: A built GRPOTrainer or RLOOTrainer.
        rounds: How many rounds.
        folder: Where `round-1.json`, ... are written; `<output_dir>/inspect` by default. Older ones are replaced.
        max_rows: Rows of a round that are kept, in whole groups.

    Raises:
        ConfigError: The trainer has no rounds, is recorded already, or an argument cannot be.
    """
    if rounds < 1 or max_rows < 1:
        raise ConfigError(f"`rounds` and `max_rows` must be at least 1, got {rounds} and {max_rows}.")
    host = host_of(trainer)
    kind = host.kind if host is not None else check_class(type(trainer), ())
    if kind not in ROUNDS:
        raise ConfigError(f"the {kind.upper()} trainer generates no rounds to record; GRPO and RLOO do.")
    if host is None:
        seams.check_seams(kind, {"inspect"})
        host = put_in_front(trainer, Plan(kind, (), {}, {}, ()))
    if host.recorder is not None:
        raise ConfigError(f"this {type(trainer).__name__} is being recorded already.")
    target = Path(host.view.args.output_dir) / FOLDER if folder is None else Path(folder)
    host.record(Recorder(host.context, target, rounds, max_rows))
    return trainer


class Handle:
    """Plugins that are enabled for every trainer. See `enable`.

    In a notebook it shows its plan, the options that differ from their defaults, and how often hooks ran. `describe`
    returns the same as text.
    """

    def __init__(self, specs: tuple[PluginSpec, ...]) -> None:
        self.specs = compose(specs)
        self.kinds = common_trainers(specs)
        self._watch = Watch(" and ".join(spec.name for spec in self.specs))
        self._trainers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []
        self._listeners: list[Callable[[Any], None]] = []
        self._requests = 1  # calls of `enable` that no `with` block has taken back

    def __repr__(self) -> str:
        return f"<trl_ext: {', '.join(spec.name for spec in self.specs)} on {', '.join(self.kinds)}>"

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._requests -= 1
        if self._requests > 0:
            return
        if error is not None:  # which says enough
            self._watch.served = True
        self.disable()

    def describe(self) -> str:
        """Returns as text who acts at each stage, how often, and which options differ from their defaults.

        What ran is counted over the living trainers of this process.
        """
        return self._overview().text()

    def _repr_html_(self) -> str:
        """Returns the same as HTML. Notebooks call it."""
        return self._overview().html()

    def _overview(self) -> Overview:
        hosts = [host for host in map(host_of, self.trainers) if host is not None]
        return Overview(self.specs, self.kinds, bool(self._undo), [host.calls for host in hosts])

    @property
    def trainers(self) -> list[Any]:
        """The living trainers that have the plugins."""
        return list(self._trainers)

    def disable(self) -> None:
        """Restores TRL's classes and every trainer built meanwhile. Calling it again does nothing.

        Warns if no trainer took the plugins.
        """
        global _active
        self._say_if_unused()
        self._requests = 0
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        if _active is self:
            _active = None
        with contextlib.ExitStack() as stack:  # one failing teardown must not keep the others from running
            for trainer in self.trainers:
                if host_of(trainer) is not None:
                    stack.callback(detach, trainer)

    def on_trainer(self, listener: Callable[[Any], None]) -> None:
        """Calls `listener(trainer)` for every trainer that gets the plugins."""
        self._listeners.append(listener)

    def record(self, rounds: int = 1, max_rows: int = 64) -> Handle:
        """Records every trainer that gets the plugins, each into its own output folder. See `trl_ext.record`."""
        if not set(self.kinds) & set(ROUNDS):
            raise ConfigError(f"{self!r} serves no trainer with rounds to record; GRPO and RLOO have them.")

        def start(trainer: Any) -> None:
            if seams.kind_of(type(trainer)) in ROUNDS:
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
                seams.check_seams(kind, users(self.specs))
            except CompatError as error:
                problems.append(error)
        if len(problems) == len(self.kinds):  # a trainer that cannot be served is refused when it is built
            raise problems[0]
        classes = [seams.trainer_class(kind) for kind in declaration.KINDS]
        self._watch.begin(classes)
        self._undo.append(self._watch.end)
        atexit.register(self._say_if_unused)  # for a handle that is never disabled
        self._undo.append(lambda: atexit.unregister(self._say_if_unused))
        for cls in classes:
            self._undo.append(_wrap_init(cls, self))

    def _say_if_unused(self) -> None:
        if self._undo and not self._watch.served and owner(self.specs) is None:
            warnings.warn(
                f"trl_ext: no trainer of this process took {self._watch.plugins}. Plugins act on a GRPOTrainer, "
                f"RLOOTrainer or DPOTrainer, or a subclass, that is built while they are enabled; for a trainer that "
                f"exists already use trl_ext.attach.",
                stacklevel=3,
            )

    def _built(self, trainer: Any) -> None:
        self._trainers.add(trainer)
        for listener in self._listeners:
            listener(trainer)


def _difference(enabled: tuple[PluginSpec, ...], asked: tuple[PluginSpec, ...]) -> str:
    """Returns what tells two sets of plugins in their order apart, or nothing if they are the same."""
    names = [spec.name for spec in asked]
    if names != [spec.name for spec in enabled]:
        return f"{' and '.join(names)} {'were' if len(names) > 1 else 'was'} asked for"
    differences = []
    for old, new in zip(enabled, asked, strict=True):
        if old.cls is not new.cls:
            differences.append(f"{new.name} is another class now, for example because its file was edited")
        elif old.options != new.options:
            was, wanted = old.option_values, new.option_values
            differences += [
                f"{new.name}.{name} is {was[name]!r} and was asked for as {value!r}"
                for name, value in wanted.items()
                if value is not was[name] and value != was[name]
            ]
    return ", ".join(differences)


def _wrap_init(owner: type[Any], handle: Handle) -> Callable[[], None]:
    """Wraps the constructor of a TRL trainer, and returns the undo."""
    original = owner.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        with handle._watch.serving(self):
            construct(handle.specs, original, self, args, kwargs)
        handle._built(self)

    owner.__init__ = __init__

    def undo() -> None:
        if owner.__init__ is not __init__:
            raise ConfigError(
                f"{owner.__name__}.__init__ was wrapped again after trl_ext.enable; undo that wrap first, then disable."
            )
        owner.__init__ = original

    return undo


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
