"""Declarations of plugins, and their checks."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Collection, Sequence
from typing import Any, get_args

import pluggy

from trl_ext_hooks import CLAIMS, NEEDS, Plugin, TrainerKind, specs

from ..errors import PluginError, near
from . import options as plugin_options
from .builtins import TRL

HOOKS: tuple[str, ...] = tuple(name for name, value in vars(specs).items() if hasattr(value, "trl_ext_spec"))
"""All hooks, in the order of the documentation."""
IMPLIED = {"mix_advantages", "policy_loss", "logps", "run"}
"""Claims that a plugin makes by implementing the hook of the same name."""
KINDS: tuple[TrainerKind, ...] = get_args(TrainerKind)


@dataclasses.dataclass(frozen=True)
class PluginSpec:
    """A plugin that was asked for.

    Attributes:
        cls: Its class.
        options: Its checked options.
        origin: Where it came from: a package, a file, or `built in`.
        version: The version of the package, or `file` or `module`.
        reference: How it was asked for: a name, a file or `module:attribute`.
    """

    cls: type[Plugin]
    options: Any
    origin: str
    version: str
    reference: str

    @property
    def name(self) -> str:
        """The name that the plugin declares."""
        return self.cls.name

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that the plugin implements, in the order of the documentation."""
        return implemented(self.cls)

    @property
    def uses(self) -> set[str]:
        """What of the trainer the plugin rests on, by hooks and needs. `state` is saved where `state_dict` is."""
        saved = ("state_dict", "load_state_dict") if self.cls.state else ()
        return {*self.hooks, *self.cls.needs, *saved}

    @property
    def claims(self) -> set[str]:
        """What the plugin takes for itself, by declaration or by a hook."""
        return {*self.cls.claims, *(IMPLIED & set(self.hooks))}

    @property
    def option_values(self) -> dict[str, Any]:
        """The options as plain values."""
        values: dict[str, Any] = _plain(self.options)
        return values

    @property
    def changed_options(self) -> dict[str, Any]:
        """The options that differ from their defaults, as plain values. One without a default always does."""
        defaults = {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(self.options)
        }
        return {
            name: value
            for name, value in self.option_values.items()
            if value is not defaults[name] and value != _plain(defaults[name])
        }

    @property
    def bibtex(self) -> str:
        """What a run with the plugin should cite, as BibTeX entries without the indentation of the code."""
        return inspect.cleandoc(self.cls.bibtex)


def _plain(value: Any) -> Any:
    """Returns dataclasses as mappings. Unlike `dataclasses.asdict` it copies nothing, for options may hold anything."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    return value


def build_manager(plugins: Sequence[Plugin] | Sequence[type[Plugin]]) -> pluggy.PluginManager:
    """Makes a pluggy manager that knows the hooks and exactly these plugins."""
    manager = pluggy.PluginManager("trl_ext")
    manager.add_hookspecs(specs)
    for plugin in plugins:
        manager.register(plugin, name=plugin.name)
    manager.check_pending()
    return manager


def instances(specs: Sequence[PluginSpec]) -> dict[str, Plugin]:
    """Makes one instance of each plugin, by name."""
    return {spec.name: spec.cls(spec.options) for spec in specs}


def needed_columns(specs: Sequence[PluginSpec]) -> set[str]:
    """Returns the columns of the data that plugins need by declaration or by an option."""
    needs = {need for spec in specs for need in spec.cls.needs}
    needs |= {need for spec in specs for need, _ in plugin_options.named_needs(spec.options, spec.name)}
    return {need.partition(":")[2] for need in needs if need.startswith("column:")}


def implemented(cls: type[Plugin]) -> tuple[str, ...]:
    """Returns the hooks that a plugin implements, in the order of the documentation."""
    return tuple(hook for hook in HOOKS if hasattr(getattr(cls, hook, None), "trl_ext_impl"))


def _is_bibtex(text: str) -> bool:
    """Tells whether a text consists of BibTeX entries: `@kind{...}`, with balanced braces."""
    shorter = re.sub(r"\{[^{}]*\}", "", text)
    while shorter != text:  # the innermost braces go first
        text, shorter = shorter, re.sub(r"\{[^{}]*\}", "", shorter)
    return re.fullmatch(r"(\s*@\w+)+\s*", text) is not None


def is_known(entry: str, known: Collection[str]) -> bool:
    """Tells whether a need or a claim is among those that exist, some of which are patterns such as `column:NAME`."""
    kind, colon, value = entry.partition(":")
    if not colon:
        return entry in known
    pattern = next((name for name in known if name.startswith(f"{kind}:")), "")
    return bool(value) and (pattern.endswith(":NAME") or (pattern.endswith(":COUNT") and value.isdigit()))


def check_plugin(cls: Any, origin: str) -> type[Plugin]:
    """Checks a plugin's declaration.

    Args:
        cls: The class. Anything else is refused too.
        origin: Where it came from, for the error.

    Raises:
        PluginError: Names the attribute or hook, what it holds and what is expected.
    """
    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        raise PluginError(f"{origin}: {cls!r} is not a subclass of trl_ext_hooks.Plugin.")
    where = f"plugin {getattr(cls, 'name', cls.__name__)!r} ({origin})"

    def broken(message: str) -> PluginError:
        # every refusal begins with the plugin and where it came from
        return PluginError(f"{where}: {message}")

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", str(getattr(cls, "name", ""))):
        raise broken("`name` must be lower-case words joined by hyphens, such as 'my-method'.")
    if cls.name == TRL:
        raise broken(f"`name` must be another one: {TRL!r} stands for TRL itself.")
    trainers = getattr(cls, "trainers", ())
    if not trainers or isinstance(trainers, str) or not set(trainers) <= set(KINDS):
        raise broken(f"`trainers` must be a tuple with some of {', '.join(KINDS)}; got {trainers!r}.")
    if not dataclasses.is_dataclass(cls.Options):
        raise broken("`Options` must be a dataclass.")
    hints = typing.get_type_hints(cls.Options, include_extras=True)
    for field in dataclasses.fields(cls.Options):
        for bound in field.metadata.get("bounds", {}):
            if not plugin_options.fits(bound, hints[field.name]):
                wanted = "a number" if bound in plugin_options.SIGNS else "a text or a list"
                kind = plugin_options.describe(hints[field.name])
                raise broken(f"the option {field.name!r} has the bound `{bound}`, which fits {wanted}; it is {kind}.")
    for attribute in ("claims", "needs", "fields", "honours", "state"):
        if not isinstance(getattr(cls, attribute), tuple):
            raise broken(f"`{attribute}` must be a tuple of strings; got {getattr(cls, attribute)!r}.")
    for attribute, known in (("claims", CLAIMS), ("needs", NEEDS)):
        # entries such as `column:answer` are known by their pattern, `column:NAME`
        for entry in getattr(cls, attribute):
            if not is_known(entry, known):
                raise broken(f"`{attribute}` holds {entry!r}.{near(entry, known)}")
    entries = cls.bibtex
    if not isinstance(entries, str) or (entries.strip() and not _is_bibtex(entries)):
        raise broken(f"`bibtex` must hold BibTeX entries, such as '@misc{{key, title = {{...}}}}'; got {entries!r}.")
    hooks = set(implemented(cls))
    for name in dir(cls):
        value = getattr(cls, name)
        if hasattr(value, "trl_ext_impl") and name not in HOOKS:
            raise broken(f"{name!r} is marked with @hookimpl, but no hook has that name.{near(name, HOOKS)}")
        if name in HOOKS and callable(value) and name not in hooks:
            raise broken(f"the method {name!r} is named like a hook and lacks @hookimpl, so it would never run.")
    if ("state_dict" in hooks) != ("load_state_dict" in hooks):
        raise broken("`state_dict` and `load_state_dict` belong together; implement both.")
    if cls.state and "state_dict" in hooks:
        raise broken(
            "it declares `state`, which the core saves, and implements `state_dict` too. Keep one of them: `state` for "
            "plain attributes, the two hooks for everything else."
        )
    try:
        build_manager([cls])
    except pluggy.PluginValidationError as error:
        raise broken(f"a hook does not fit its specification.\n{error}") from error
    return cls
