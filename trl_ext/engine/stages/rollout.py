"""Rows and generation: the hooks `select_rows` and `rollout`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trl_ext_hooks import Generation

from ...errors import PluginError
from ...trl_internals import trainer_state
from ..agreement import together
from ..context import Context
from . import groups, turns
from .passes import Passes


def select_rows(context: Context, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lets plugins replace the rows of a training round. They see the rows of all processes."""
    trainer, view, state = context.trainer, context.view, context.current_round()
    if trainer_state.mode(trainer) != "train":
        return rows
    asked = context.plan.prompts
    if not (context.calls.has("select_rows") or asked):
        return rows
    everything = view.gather_objects(list(rows))
    size = len(everything) // asked if asked else state.num_generations
    group_ids = groups.uniform(len(everything), size)
    if asked:
        _check_drawn(context, everything, size)
    for name, caller in context.calls.chain("select_rows"):
        selected: tuple[list[dict[str, Any]], list[int]] | None = None

        def run(name: str = name, caller: Any = caller, rows: Any = everything, ids: Any = group_ids) -> Any:
            nonlocal selected
            given = {"rows": list(rows), "group_ids": list(ids), "trainer": view}
            selected = _selected(context, name, context.calls.call(name, "select_rows", caller, **given), size)
            return None, None if selected is None else groups.selection_key(*selected)

        _, keys = together(context, run)
        other = next((process for process, key in enumerate(keys) if key != keys[0]), None)
        if other is not None:
            raise PluginError(
                f"plugin {name!r} returned other rows or groups from 'select_rows' on process {other} than on process "
                f"0, expected the same on every process. Seed random numbers alike on all of them, for instance with "
                f"trainer.args.seed, and use nothing that a process has of its own."
            )
        if selected is not None:
            everything, group_ids = selected
    if group_ids != groups.uniform(len(everything), state.num_generations):
        state.group_ids = group_ids
        trainer_state.use_single_rows(trainer)
    start = view.process_index * len(rows)
    return list(everything[start : start + len(rows)])


def _selected(context: Context, name: str, result: Any, size: int) -> tuple[list[dict[str, Any]], list[int]] | None:
    """Returns the rows and groups that a plugin chose on this process, after checking them. None where it keeps them.

    Raises:
        PluginError: They are none for this round.
    """
    if result is None:
        return None
    rows = len(context.current_round().rows) * context.view.num_processes
    problem = groups.wrong_selection(result, rows, size)
    if problem is not None:
        raise PluginError(f"plugin {name!r} {problem}")
    chosen, group_ids = groups.of_selection(result, size)
    if group_ids != groups.uniform(rows, size) and "groups" not in context.plan.plugins[name].claims:
        raise PluginError(f"plugin {name!r} returned groups of its own from 'select_rows' without the claim 'groups'.")
    return chosen, group_ids


def _check_drawn(context: Context, rows: list[dict[str, Any]], size: int) -> None:
    """Checks that the trainer drew as many prompts as a plugin asked for. Equal on every process."""
    if groups.wrong_selection(rows, len(rows), size):
        raise PluginError(
            f"plugin {context.plan.forms_groups!r} asks for {len(rows) // size} prompts per round, each {size} times "
            f"in a row, and {type(context.trainer).__name__} drew others. A class that replaces "
            f"`get_train_dataloader` or its sampler must draw them as TRL does."
        )


def generate(context: Context, prompts: list[Any], stock: Callable[[list[Any]], Generation]) -> Generation:
    """Runs the generation of a round, with the plugins around it."""
    if context.calls.has("rollout"):
        result = Passes(context, prompts, stock).run()
    else:
        with turns.reading(context):
            result = stock(prompts)
    state = context.current_round()
    state.tool_mask, state.fields = result.tool_mask, result.fields
    return result
