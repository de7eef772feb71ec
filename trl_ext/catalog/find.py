"""Look-up of plugins: built-ins, entry points of packages, files and `module:attribute`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_ext_hooks import Plugin

from .._version import __version__
from ..errors import ConfigError, OptionError, PluginError, UnknownPluginError, near
from ..support import imports
from . import options as plugin_options
from .builtins import BUILTINS, GROUP, TRL, canonical
from .declaration import PluginSpec, check_plugin
from .names import check_single, is_place, unknown


def known() -> set[str]:
    """Returns the names of all plugins, built in or of installed packages."""
    return {*BUILTINS, *outside()}


def outside() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Returns the entry points of installed packages by plugin name. Nothing is imported."""
    points_by_name: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        points = points_by_name.setdefault(canonical(point.name), [])
        if point not in points:
            points.append(point)
    return points_by_name


def find(reference: str) -> tuple[type[Plugin], str, str]:
    """Returns the plugin class behind a name, a file or `module:attribute`, with its origin and version.

    Raises:
        UnknownPluginError: No plugin has that name.
        PluginError: The plugin is broken, or two packages provide it.
    """
    if imports.is_file(reference):
        file, attribute = imports.split_file(reference)
        if not file.is_file():
            raise UnknownPluginError(f"plugin file {str(file)!r} does not exist (looked in {Path.cwd()}).")
        return _pick(imports.load_file(file, "plugin", PluginError), attribute, str(file)), str(file), "file"
    if ":" in reference:
        module, _, attribute = reference.partition(":")
        return _pick(_import(module, reference), attribute, module), reference, "module"
    # neither a file nor a module: a built-in name, or the name of an entry point
    name, points = canonical(reference), outside()
    if name in BUILTINS and name in points:
        raise PluginError(
            f"plugin name {name!r} is built in and also provided by {_providers(points[name])}. "
            f"Name the other one by its module, --plugin {points[name][0].value}, or uninstall it."
        )
    if name in BUILTINS:
        module, _, attribute = BUILTINS[name].partition(":")
        return _pick(_import(module, name), attribute, module), "built in", __version__
    if name not in points:
        check_single(reference)
        raise unknown(reference, known())
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
    """Finds the plugins that were asked for, in order, and builds their options.

    Plugins that an option names (`PluginName`) and nobody asked for come last, with default options.

    Args:
        requests: Option values by reference, such as `{"gdpo": {"group_eps": 1e-4}, "my_method.py": None}`.
    """
    specs: list[PluginSpec] = []
    for reference, values in requests.items():
        cls, origin, version = find(reference)
        if values is not None and not isinstance(values, Mapping):
            raise OptionError(f"options of plugin {cls.name!r} must be a mapping, got {values!r}.")
        if any(spec.name == cls.name for spec in specs):
            raise ConfigError(f"plugin {cls.name!r} is asked for twice.")
        built = plugin_options.build(cls.Options, values or {}, cls.name)
        specs.append(PluginSpec(cls, built, origin, version, reference))
    for spec in specs:  # grows meanwhile
        for name, option in plugin_options.named_plugins(spec.options, spec.name):
            if name != TRL and all(other.name != name for other in specs):
                specs.append(_named(name, option))
    return tuple(specs)


def _named(name: str, option: str) -> PluginSpec:
    """Finds a plugin that an option names.

    Raises:
        UnknownPluginError: No plugin has that name.
    """
    try:
        cls, origin, version = find(name)
    except UnknownPluginError as error:
        raise UnknownPluginError(f"{option}: {error} Name a plugin of a file in the run, too.") from error
    return PluginSpec(cls, plugin_options.build(cls.Options, {}, cls.name), origin, version, name)


def merge(
    plugins: Sequence[str], block: Mapping[str, Any] | None, assignments: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Merges `--plugin`, the YAML block `plugins:` and `--set` into option values by reference. Later ones win.

    Args:
        plugins: References of `--plugin`.
        block: The YAML block.
        assignments: Option values of `--set`, by the name that a plugin was asked for by or by its own name.

    Raises:
        OptionError: Options are not a mapping, or belong to a plugin that is not enabled.
    """
    if block is not None and not isinstance(block, Mapping):
        raise OptionError(f"`plugins:` must be a mapping of plugin names to options, got {block!r}.")
    requests: dict[str, dict[str, Any]] = {}
    for reference, values in [*(block or {}).items(), *((plugin, None) for plugin in plugins)]:
        reference = str(reference)  # YAML reads a bare 3 or on as a number and as true
        if values is not None and not isinstance(values, Mapping):
            raise OptionError(f"options of plugin {reference!r} must be a mapping, got {values!r}.")
        check_single(reference)
        key = reference if is_place(reference) else canonical(reference)
        requests.setdefault(key, {}).update(values or {})
    for name, values in assignments.items():
        matches = [reference for reference in requests if means(reference, name)]
        if not matches:
            raise OptionError(
                f"--set {name}.{next(iter(values))}: plugin {name!r} is not enabled.{near(name, requests)} "
                f"Add it: --plugin {name}"
            )
        requests[matches[0]].update(values)
    return requests


def means(reference: str, name: str) -> bool:
    """Returns whether `name` is the plugin behind a reference, by its own name or by the reference itself."""
    if is_place(reference):
        return reference == name or find(reference)[0].name == canonical(name)
    return canonical(reference) == canonical(name)


def _import(module: str, reference: str) -> ModuleType:
    return imports.import_module(module, f"plugin {reference}", PluginError)


def _pick(module: ModuleType, attribute: str, origin: str) -> type[Plugin]:
    """Returns the attribute of a module, or its only plugin class if none is named."""
    if attribute:
        if not hasattr(module, attribute):
            raise PluginError(f"{origin} has no attribute {attribute!r}.{near(attribute, _plugins_in(module))}")
        return check_plugin(getattr(module, attribute), f"{origin}:{attribute}")
    classes = _plugins_in(module)
    if len(classes) != 1:
        listed = ", ".join(classes) or "none"
        raise PluginError(
            f"{origin} must define one plugin class, found {len(classes)} ({listed}). Choose: {origin}:NAME"
        )
    return check_plugin(next(iter(classes.values())), origin)


def _plugins_in(module: ModuleType) -> dict[str, type[Plugin]]:
    """Returns the plugin classes that a module defines, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Plugin) and value.__module__ == module.__name__
    }


def _providers(points: Sequence[importlib.metadata.EntryPoint]) -> str:
    """Names the packages of entry points, with their versions."""
    return " and ".join(f"{point.dist.name} {point.dist.version}" if point.dist else point.value for point in points)
