"""State of the plugins in the checkpoints of a run."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

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
