"""State of the plugins in the checkpoints of a run."""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_ext_hooks import Plugin

from ..errors import ConfigError, PluginError
from ..support.files import write_atomically
from .calls import as_mapping
from .context import Context

STATE_FILE = "trl_ext_state.pt"


def save(context: Context, folder: str) -> None:
    """Writes versions, options and states of all plugins into a checkpoint."""
    entries: dict[str, dict[str, Any]] = {
        spec.name: {"version": spec.version, "options": option_texts(spec.option_values), "state": None}
        for spec in context.plan.specs
    }
    for name, state in _states(context):
        entries[name]["state"] = state
    write_atomically(Path(folder) / STATE_FILE, _as_bytes({"plugins": entries}))


def try_out(context: Context, first: bool) -> None:
    """Makes what a checkpoint would hold and reads it back, so that no run dies at its first save or cannot go on.

    Args:
        context: The trainer and its plugins.
        first: Whether no step was trained yet. A plugin may make its state in the first round, so its errors are left
            to the trial after that.

    Raises:
        PluginError: A plugin has a state that cannot be read back.
    """
    args = context.trainer.args
    if args.save_strategy == "no" or not args.should_save:
        return
    # hooks that run in a trial are not counted
    counts = Counter(context.calls.counts)
    try:
        for _ in _states(context):
            pass
    except PluginError:
        raise
    except Exception:  # of a plugin that has no state yet
        if not first:
            raise
    finally:
        context.calls.counts = counts


def _states(context: Context) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the state of every plugin that has one.

    Raises:
        PluginError: It cannot be read back.
    """
    for name, state in context.calls.each("state_dict"):
        yield name, _readable(name, dict(as_mapping(name, "state_dict", state)))
    for name, plugin in context.plan.plugins.items():
        if plugin.state:
            yield name, _readable(name, {attribute: _plain(plugin, attribute) for attribute in plugin.state})


def _as_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _readable(name: str, state: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of a plugin as it is saved: numbers of numpy as numbers of Python.

    Raises:
        PluginError: It cannot be written, or not be read back.
    """
    converted: dict[str, Any] = _without_numpy_numbers(state)
    for key, value in converted.items():
        try:
            torch.load(io.BytesIO(_as_bytes(value)), weights_only=True, map_location="cpu")
        except (pickle.PickleError, TypeError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise PluginError(
                f"plugin {name!r}: {key!r} of its state, a {type(value).__name__}, cannot be read back from a "
                f"checkpoint ({type(error).__name__}: {reason}). Its `state_dict` may return tensors, numbers, texts, "
                f"and lists and dicts of them."
            ) from error
    return converted


def _without_numpy_numbers(value: Any) -> Any:
    """Returns the value, and a new one only if numbers of numpy are in it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        entries = [(_without_numpy_numbers(key), _without_numpy_numbers(entry)) for key, entry in value.items()]
        same = all(new[0] is old[0] and new[1] is old[1] for new, old in zip(entries, value.items(), strict=True))
        return value if same else dict(entries)
    if type(value) in (list, tuple):
        items = [_without_numpy_numbers(entry) for entry in value]
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else type(value)(items)
    return value


def option_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns every option as a text that the next process makes alike, for options may hold functions and more."""
    return {name: option_text(value) for name, value in values.items()}


def option_text(value: Any) -> str:
    """Returns a value as a text without addresses in memory."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{option_text(key)}: {option_text(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(option_text, value)) + "]"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def load(context: Context, checkpoint: str | None) -> None:
    """Gives every plugin its state back, and warns where a checkpoint lacks it or was made with other settings.

    Raises:
        ConfigError: The file cannot be read.
    """
    if checkpoint is None:
        return
    saved = _read(os.path.join(checkpoint, STATE_FILE))
    for spec in context.plan.specs:
        entry = saved.get(spec.name)
        now = option_texts(spec.option_values)
        if entry is None:
            warnings.warn(f"{checkpoint} was saved without plugin {spec.name!r}, which now starts fresh.", stacklevel=2)
        # older checkpoints hold the options themselves
        elif now not in (entry["options"], option_texts(entry["options"])):
            warnings.warn(
                f"plugin {spec.name!r} continues {checkpoint} with other options: {_listed(now)} instead of "
                f"{_listed(entry['options'])}.",
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


def _read(path: str) -> Mapping[str, Any]:
    """Returns what a checkpoint holds of plugins, by name. Nothing where there is no file."""
    if not os.path.isfile(path):
        return {}
    try:
        saved: Mapping[str, Any] = torch.load(path, weights_only=True, map_location="cpu")["plugins"]
    except (pickle.PickleError, RuntimeError, EOFError, LookupError, TypeError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {''.join(reason)}). Resume from an earlier checkpoint, or "
            f"delete this file to start the plugins fresh."
        ) from error
    return saved


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


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

    value = _without_numpy_numbers(getattr(plugin, attribute))
    check(value)
    return value


def _set_attribute(plugin: Plugin, attribute: str, saved: Any) -> None:
    """Sets an attribute to what a checkpoint holds. A tensor goes to the device of the one that it replaces."""
    current = getattr(plugin, attribute)
    on_device = isinstance(saved, torch.Tensor) and isinstance(current, torch.Tensor)
    setattr(plugin, attribute, saved.to(current.device) if on_device else saved)
