"""From what a user asked for to checked plugin classes: built-ins, entry points, files and `module:attribute`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pluggy

from trl_ext_hooks import CLAIMS, NEEDS, Plugin, TrainerKind, specs

from . import loading
from . import options as plugin_options
from ._version import __version__
from .errors import ConfigError, OptionError, PluginError, UnknownPluginError, near

GROUP = "trl_ext"
BUILTINS: dict[str, str] = {
    "apo": "trl_ext_plugins.apo:APO",
    "decs": "trl_ext_plugins.decs:DECS",
    "gdpo": "trl_ext_plugins.gdpo:GDPO",
    "hdpo": "trl_ext_plugins.hdpo:HDPO",
    "otc": "trl_ext_plugins.otc:OTC",
    "p3o": "trl_ext_plugins.p3o:P3O",
    "shared-prefix": "trl_ext_plugins.shared_prefix:SharedPrefix",
    "spae": "trl_ext_plugins.spae:SPAE",
    "tgdpo": "trl_ext_plugins.tgdpo:TGDPO",
    "thinkless": "trl_ext_plugins.thinkless:Thinkless",
    "tools": "trl_ext_plugins.tools:Tools",
    "trpa": "trl_ext_plugins.trpa:TRPA",
    "vl-dac": "trl_ext_plugins.vl_dac:VLDAC",
}
HOOKS: tuple[str, ...] = tuple(name for name, value in vars(specs).items() if hasattr(value, "trl_ext_spec"))
IMPLIED = {"policy_loss", "logps", "run"}
"""Claims that a hook of the same name implies."""
KINDS: tuple[TrainerKind, ...] = get_args(TrainerKind)


@dataclasses.dataclass(frozen=True)
class PluginSpec:
    """A plugin that was asked for: its class, its checked options, and where it came from."""

    cls: type[Plugin]
    options: Any
    origin: str
    version: str

    @property
    def name(self) -> str:
        return self.cls.name

    @property
    def hooks(self) -> tuple[str, ...]:
        """The hooks that the plugin implements, in the order of the documentation."""
        return implemented(self.cls)

    @property
    def claims(self) -> set[str]:
        return {*self.cls.claims, *(IMPLIED & set(self.hooks))}

    @property
    def option_values(self) -> dict[str, Any]:
        return dataclasses.asdict(self.options)


def canonical(name: str) -> str:
    """`Shared_Prefix` and `shared-prefix` are the same plugin."""
    return name.lower().replace("_", "-")


def outside() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Installed entry points by plugin name; nothing is imported."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        same = found.setdefault(canonical(point.name), [])
        if point not in same:
            same.append(point)
    return found


def find(reference: str) -> tuple[type[Plugin], str, str]:
    """The plugin class behind a name, a file or `module:attribute`, with its origin and version.

    Raises:
        UnknownPluginError: Nobody provides the name.
        PluginError: It was found and is broken, or two packages provide it.
    """
    if loading.is_file(reference):
        file, attribute = loading.split_file(reference)
        if not file.is_file():
            raise UnknownPluginError(f"plugin file {str(file)!r} does not exist (looked in {Path.cwd()}).")
        return _pick(loading.load_file(file, "plugin", PluginError), attribute, str(file)), str(file), "file"
    if ":" in reference:
        module, _, attribute = reference.partition(":")
        return _pick(_import(module, reference), attribute, module), reference, "module"
    name, points = canonical(reference), outside()
    if name in BUILTINS and name in points:
        raise PluginError(
            f"plugin name {name!r} is built in and also provided by {_providers(points[name])}. "
            f"Ask for the other one as --plugin {points[name][0].value}, or uninstall it."
        )
    if name in BUILTINS:
        module, _, attribute = BUILTINS[name].partition(":")
        return _pick(_import(module, name), attribute, module), "built in", __version__
    if name not in points:
        raise UnknownPluginError(f"no plugin is called {reference!r}.{near(name, {*BUILTINS, *points})}")
    if len(points[name]) > 1:
        raise PluginError(
            f"plugin name {name!r} is provided by {_providers(points[name])}. "
            f"Uninstall one, or choose: --plugin {points[name][0].value}"
        )
    point = points[name][0]
    module, _, attribute = point.value.partition(":")
    dist = point.dist
    cls = _pick(_import(module, f"{name} (entry point of {_providers([point])})"), attribute.strip(), module)
    if canonical(cls.name) != name:
        raise PluginError(
            f"entry point {name!r} of {_providers([point])} leads to a plugin that calls itself {cls.name!r}."
        )
    return cls, dist.name if dist else point.value, dist.version if dist else "unknown"


def resolve(requests: Mapping[str, Mapping[str, Any] | None]) -> tuple[PluginSpec, ...]:
    """Loads what was asked for, in order, with its options.

    Args:
        requests: Reference -> option values, such as `{"gdpo": {"group_eps": 1e-4}, "my_method.py": None}`.
    """
    found: list[PluginSpec] = []
    for reference, values in requests.items():
        cls, origin, version = find(reference)
        if values is not None and not isinstance(values, Mapping):
            raise OptionError(f"options of plugin {cls.name!r} must be a mapping, got {values!r}.")
        if any(spec.name == cls.name for spec in found):
            raise ConfigError(f"plugin {cls.name!r} is asked for twice.")
        built = plugin_options.build(cls.Options, values or {}, cls.name)
        found.append(PluginSpec(cls, built, origin, version))
    return tuple(found)


def merge(
    plugins: Sequence[str], block: Mapping[str, Any] | None, assignments: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """One request per plugin from `--plugin`, the YAML block `plugins:` and `--set`; later ones win.

    `--set` takes the name by which a plugin was asked for, or its own name.
    """
    if block is not None and not isinstance(block, Mapping):
        raise OptionError(f"`plugins:` must be a mapping of plugin names to options, got {block!r}.")
    requests: dict[str, dict[str, Any]] = {}
    for reference, values in [*(block or {}).items(), *((plugin, None) for plugin in plugins)]:
        if values is not None and not isinstance(values, Mapping):
            raise OptionError(f"options of plugin {reference!r} must be a mapping, got {values!r}.")
        key = reference if ":" in reference or reference.endswith(".py") else canonical(reference)
        requests.setdefault(key, {}).update(values or {})
    for name, values in assignments.items():
        owners = [r for r in requests if means(r, name)]
        if not owners:
            raise OptionError(
                f"--set {name}.{next(iter(values))}: plugin {name!r} is not enabled.{near(name, requests)} "
                f"Add it: --plugin {name}"
            )
        requests[owners[0]].update(values)
    return requests


def means(reference: str, name: str) -> bool:
    """Whether a plugin that was asked for by `reference` goes by `name`, its own name or the reference itself."""
    if ":" in reference or reference.endswith(".py"):
        return reference == name or find(reference)[0].name == canonical(name)
    return canonical(reference) == canonical(name)


def build_manager(plugins: Sequence[Plugin] | Sequence[type[Plugin]]) -> pluggy.PluginManager:
    """A fresh pluggy manager that knows the hooks and exactly these plugins."""
    manager = pluggy.PluginManager("trl_ext")
    manager.add_hookspecs(specs)
    for plugin in plugins:
        manager.register(plugin, name=plugin.name)
    manager.check_pending()
    return manager


def implemented(cls: type[Plugin]) -> tuple[str, ...]:
    return tuple(hook for hook in HOOKS if hasattr(getattr(cls, hook, None), "trl_ext_impl"))


def check_plugin(cls: Any, origin: str) -> type[Plugin]:
    """Checks a plugin's declaration.

    Raises:
        PluginError: Naming the attribute or hook, what it holds and what is expected.
    """
    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        raise PluginError(f"{origin}: {cls!r} is not a subclass of trl_ext_hooks.Plugin.")
    where = f"plugin {getattr(cls, 'name', cls.__name__)!r} ({origin})"

    def broken(message: str) -> PluginError:
        return PluginError(f"{where}: {message}")

    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", str(getattr(cls, "name", ""))):
        raise broken("`name` must be lower-case words joined by hyphens, such as 'my-method'.")
    trainers = getattr(cls, "trainers", ())
    if not trainers or isinstance(trainers, str) or not set(trainers) <= set(KINDS):
        raise broken(f"`trainers` must be a tuple with some of {', '.join(KINDS)}; got {trainers!r}.")
    if not dataclasses.is_dataclass(cls.Options):
        raise broken("`Options` must be a dataclass.")
    for attribute in ("claims", "needs", "fields", "honours"):
        if not isinstance(getattr(cls, attribute), tuple):
            raise broken(f"`{attribute}` must be a tuple of strings; got {getattr(cls, attribute)!r}.")
    for attribute, known in (("claims", CLAIMS), ("needs", NEEDS)):
        for entry in getattr(cls, attribute):
            pattern = entry.partition(":")[0] + ":NAME" if ":" in entry else entry
            if pattern not in known:
                raise broken(f"`{attribute}` holds {entry!r}.{near(entry, known)}")
    hooks = set(implemented(cls))
    for name in dir(cls):
        value = getattr(cls, name)
        if hasattr(value, "trl_ext_impl") and name not in HOOKS:
            raise broken(f"{name!r} is marked with @hookimpl and no hook is called so.{near(name, HOOKS)}")
        if name in HOOKS and callable(value) and name not in hooks:
            raise broken(f"the method {name!r} is named like a hook and lacks @hookimpl, so it would never run.")
    if ("state_dict" in hooks) != ("load_state_dict" in hooks):
        raise broken("`state_dict` and `load_state_dict` belong together; implement both.")
    try:
        build_manager([cls])
    except pluggy.PluginValidationError as error:
        raise broken(f"a hook does not fit its specification.\n{error}") from error
    return cls


def _import(module: str, asked: str) -> ModuleType:
    return loading.import_module(module, f"plugin {asked}", PluginError)


def _pick(module: ModuleType, attribute: str, origin: str) -> type[Plugin]:
    if attribute:
        if not hasattr(module, attribute):
            raise PluginError(f"{origin} has no attribute {attribute!r}.{near(attribute, _plugins_in(module))}")
        return check_plugin(getattr(module, attribute), f"{origin}:{attribute}")
    found = _plugins_in(module)
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise PluginError(
            f"{origin} must define one plugin class, found {len(found)} ({listed}). Choose: {origin}:NAME"
        )
    return check_plugin(next(iter(found.values())), origin)


def _plugins_in(module: ModuleType) -> dict[str, type[Plugin]]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Plugin) and value.__module__ == module.__name__
    }


def _providers(points: Sequence[importlib.metadata.EntryPoint]) -> str:
    return " and ".join(f"{p.dist.name} {p.dist.version}" if p.dist else p.value for p in points)
