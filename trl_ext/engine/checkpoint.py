"""State of the plugins in the checkpoints of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from trl_ext_hooks import Plugin

from ..errors import PluginError
from .calls import as_mapping
from .context import Context

STATE_FILE = "trl_ext_state.pt"


def save(context: Context, folder: str) -> None:
    """Writes versions, options and states of all plugins into a checkpoint."""
    entries: dict[str, dict[str, Any]] = {
        spec.name: {"version": spec.version, "options": spec.option_values, "state": None}
        for spec in context.plan.specs
    }
    for name, state in context.calls.each("state_dict"):
        entries[name]["state"] = dict(as_mapping(name, "state_dict", state))
    for name, plugin in context.plan.plugins.items():
        if plugin.state:
            entries[name]["state"] = {attribute: _plain(plugin, attribute) for attribute in plugin.state}
    torch.save({"plugins": entries}, os.path.join(folder, STATE_FILE))


def load(context: Context, checkpoint: str | None) -> None:
    """Gives every plugin its state back, and warns where a checkpoint lacks it or was made with other settings."""
    if checkpoint is None:
        return
    path = os.path.join(checkpoint, STATE_FILE)
    saved = torch.load(path, weights_only=True, map_location="cpu")["plugins"] if os.path.isfile(path) else {}
    for spec in context.plan.specs:
        entry = saved.get(spec.name)
        if entry is None:
            warnings.warn(f"{checkpoint} was saved without plugin {spec.name!r}, which now starts fresh.", stacklevel=2)
        elif entry["options"] != spec.option_values:
            warnings.warn(
                f"plugin {spec.name!r} continues {checkpoint} with other options: {spec.option_values} instead of "
                f"{entry['options']}.",
                stacklevel=2,
            )
    for name in saved.keys() - context.plan.plugins.keys():
        warnings.warn(f"{checkpoint} was saved with plugin {name!r}, which is not enabled now.", stacklevel=2)
    for name, caller in context.calls.chain("load_state_dict"):
        state = saved.get(name, {}).get("state")
        if state is not None:
            context.calls.call(name, "load_state_dict", caller, state=state)
    for name, plugin in context.plan.plugins.items():
        state = saved.get(name, {}).get("state") or {}
        for attribute in plugin.state if name in saved else ():
            if attribute in state:
                _set_attribute(plugin, attribute, state[attribute])
            else:
                warnings.warn(
                    f"{checkpoint} holds no {attribute!r} of plugin {name!r}, which now starts fresh.", stacklevel=2
                )


def check_attributes(plugins: Mapping[str, Plugin]) -> None:
    """Refuses a plugin that lacks an attribute which it declares as its `state`."""
    for name, plugin in plugins.items():
        for attribute in plugin.state:
            if not hasattr(plugin, attribute):
                raise PluginError(
                    f"plugin {name!r} declares the attribute {attribute!r} as its `state` and does not have it. Give "
                    f"it a first value in the method `start`."
                )


def _plain(plugin: Plugin, attribute: str) -> Any:
    """Returns an attribute that the plugin declares as its state.

    Raises:
        PluginError: It holds something that cannot be read back from a checkpoint.
    """

    def check(value: Any) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                check(key)
                check(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                check(entry)
        elif not isinstance(value, torch.Tensor | int | float | str | None):
            raise PluginError(
                f"plugin {plugin.name!r} declares the attribute {attribute!r} as its state, and it holds a "
                f"{type(value).__name__}, expected tensors, numbers, texts, and lists and dicts of them. Implement the "
                f"hooks `state_dict` and `load_state_dict` for it."
            )

    value = getattr(plugin, attribute)
    check(value)
    return value


def _set_attribute(plugin: Plugin, attribute: str, saved: Any) -> None:
    """Sets an attribute to what a checkpoint holds. A tensor goes to the device of the one that it replaces."""
    current = getattr(plugin, attribute)
    on_device = isinstance(saved, torch.Tensor) and isinstance(current, torch.Tensor)
    setattr(plugin, attribute, saved.to(current.device) if on_device else saved)
