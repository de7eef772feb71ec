"""Rows and generation: the hooks `select_rows` and `rollout`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl_ext_hooks import Generation

from ...errors import PluginError
from ...trl_internals import trainer_state
from ..context import Context
from . import turns
from .passes import Passes


def select_rows(context: Context, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lets plugins replace the rows of a training round. They see the rows of all processes."""
    if not context.calls.has("select_rows") or trainer_state.mode(context.trainer) != "train":
        return rows
    everything = context.view.gather_objects(list(rows))
    for name, caller in context.calls.chain("select_rows"):
        selected = context.calls.call(name, "select_rows", caller, rows=list(everything), trainer=context.view)
        if selected is None:
            continue
        if len(selected) != len(everything):
            raise PluginError(
                f"plugin {name!r} returned {len(selected)} rows from 'select_rows', expected {len(everything)}: as "
                f"many as it got, every prompt num_generations times in a row."
            )
        everything = list(selected)
    start = context.view.process_index * len(rows)
    return everything[start : start + len(rows)]


def generate(context: Context, prompts: list[Any], stock: Callable[[list[Any]], Generation]) -> Generation:
    """Runs the generation of a round, with the plugins around it."""
    if context.calls.has("rollout"):
        result = Passes(context, prompts, stock).run()
    else:
        with turns.reading(context):
            result = stock(prompts)
    context.current_round().tool_mask = result.tool_mask
    return result
