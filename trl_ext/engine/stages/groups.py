"""Groups of a round: the rows that `select_rows` chose, and the rows that a rollout added."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trl_ext_hooks import Generation, SelectedRows, Turns
from trl_ext_hooks.toolkit.prompt_memory import prompt_key

from ...trl_internals import generation as trl_generation
from ...trl_internals import trainer_state
from ..context import Context

PADDING = -1
"""The group of a row that only gives a process as many rows as the others have."""
_IMAGES = ("image", "images")


def uniform(rows: int, size: int) -> list[int]:
    """Returns the group of every row where each group has `size` rows."""
    return [row // size for row in range(rows)]


def wrong_selection(result: Any, rows: int, size: int) -> str | None:
    """Returns what is wrong with the rows that `select_rows` of a plugin chose, if anything is.

    Args:
        result: What the hook returned.
        rows: How many rows it got.
        size: The size of every group where the result is a plain list.
    """
    plain = not isinstance(result, SelectedRows)
    chosen = result if plain else result.rows
    group_ids = uniform(rows, size) if plain else result.group_ids
    if not isinstance(chosen, list | tuple):
        return f"returned {type(chosen).__name__} from 'select_rows', expected a list of dataset rows or SelectedRows."
    others = sorted({type(row).__name__ for row in chosen if not isinstance(row, Mapping)})
    if others:
        return f"returned rows of type {', '.join(others)} from 'select_rows', expected dataset rows."
    copies = f"every prompt {size} times in a row"
    if len(chosen) != rows:
        layout = f", {copies}" if plain else ""
        return f"returned {len(chosen)} rows from 'select_rows', expected {rows}: as many as it got{layout}."
    for place, row in enumerate(chosen):
        if row.keys() != chosen[0].keys():
            differing = ", ".join(sorted(map(str, row.keys() ^ chosen[0].keys())))
            return f"returned rows with different columns from 'select_rows': rows 0 and {place} differ in {differing}."
    problem = _wrong_ids(group_ids, rows) or _mixed_prompts(chosen, group_ids)
    if problem is None:
        return None
    way = f" A plain list has {copies}. Return SelectedRows(rows, group_ids) for other groups." if plain else ""
    return f"returned {problem}{way}"


def of_selection(result: SelectedRows | list[dict[str, Any]], size: int) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the rows and groups that a plugin chose, groups numbered in the order in which they come."""
    if not isinstance(result, SelectedRows):
        return [dict(row) for row in result], uniform(len(result), size)
    numbers: dict[int, int] = {}
    group_ids = [numbers.setdefault(group, len(numbers)) for group in result.group_ids]
    return [dict(row) for row in result.rows], group_ids


def _wrong_ids(group_ids: Any, rows: int) -> str | None:
    others = {type(group_ids).__name__}
    if isinstance(group_ids, list | tuple):
        others = {type(each).__name__ for each in group_ids if type(each) is not int}
    if others:
        return f"group_ids of type {', '.join(sorted(others))} from 'select_rows', expected a list of {rows} integers."
    if len(group_ids) != rows:
        return f"{len(group_ids)} group_ids from 'select_rows', expected {rows}, one per row."
    seen: set[int] = set()
    for place, group in enumerate(group_ids):
        if place and group == group_ids[place - 1]:
            continue
        if group in seen:
            return f"rows of the group {group} in several places from 'select_rows', the last from row {place} on."
        seen.add(group)
    return None


def _mixed_prompts(rows: Sequence[Mapping[str, Any]], group_ids: Sequence[int]) -> str | None:
    """Returns what is wrong if rows of a group have different prompts."""
    keys = _Keys()
    for place in range(1, len(rows)):
        if group_ids[place] != group_ids[place - 1] or keys.prompt(rows[place]) == keys.prompt(rows[place - 1]):
            continue
        start = next(other for other in range(place) if group_ids[other] == group_ids[place])
        return (
            f"rows of different prompts in one group from 'select_rows': rows {start} and {place} of the group "
            f"{group_ids[place]} hold {_short(rows[start])} and {_short(rows[place])}."
        )
    return None


def _short(row: Mapping[str, Any]) -> str:
    text = repr(row.get("prompt"))
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Keys:
    """Hashes of rows. Rows that are one object are hashed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], Any] = {}

    def prompt(self, row: Mapping[str, Any]) -> Any:
        """Returns a key of what the policy continues."""
        return self._key(row, False)

    def row(self, row: Mapping[str, Any]) -> Any:
        """Returns a key of all columns."""
        return self._key(row, True)

    def _key(self, row: Mapping[str, Any], everything: bool) -> Any:
        place = (id(row), everything)
        if place not in self._known:
            columns = sorted(row) if everything else [name for name in ("prompt", *_IMAGES) if name in row]
            self._known[place] = prompt_key([_column_key(row[name]) for name in columns])
        return self._known[place]


def _column_key(value: Any) -> Any:
    try:
        return prompt_key(value)
    except TypeError:  # such a value has no canonical form, so nothing can be said about it
        return type(value).__name__


def selection_key(rows: Sequence[Mapping[str, Any]], group_ids: Sequence[int]) -> int:
    """Returns a number that stands for rows and groups, equal on every process for equal rows."""
    keys = _Keys()
    return prompt_key([list(group_ids), [keys.row(row) for row in rows]])


def wrong_generation(result: Any, prompts: int, rows: Sequence[Mapping[str, Any]], may_add: bool) -> str | None:
    """Returns what is wrong with a plugin's generation, if anything is.

    Args:
        result: What the hook `rollout` returned.
        prompts: How many prompts it got.
        rows: The dataset rows of this process.
        may_add: Whether a plugin of the run declares that it forms groups.
    """
    if not isinstance(result, Generation):
        return f"returned {type(result).__name__} from 'rollout', expected a Generation."
    expected = len(result.completion_ids)
    if result.source is None and expected != prompts:
        return (
            f"returned {expected} completions from 'rollout', expected a Generation with {prompts} rows, one per "
            f"prompt. A generation with more rows names the prompt of each one in `source`."
        )
    names = ("prompt_ids", "completions", "tool_mask", "logprobs", "prompts", "source")
    lists: dict[str, Any] = {name: getattr(result, name) for name in names}
    lists |= {f"fields[{name!r}]": values for name, values in result.fields.items()}
    for name, values in lists.items():
        if values is not None and len(values) != expected:
            return f"returned {len(values)} {name} from 'rollout', expected {expected}, one per completion."
    for row, asked in enumerate(result.prompt_ids):
        if not len(asked):
            return f"returned an empty prompt in row {row} from 'rollout', expected token ids."
    for name, tokens in (("tool_mask", result.tool_mask), ("logprobs", result.logprobs)):
        for row, (ids, of_row) in enumerate(zip(result.completion_ids, tokens or (), strict=False)):
            if len(of_row) != len(ids):
                return (
                    f"returned {len(of_row)} values of {name} for the {len(ids)} tokens of row {row} from 'rollout', "
                    f"expected one per token."
                )
    if result.source is None:
        return None
    return _wrong_source(list(result.source), prompts, rows, may_add)


def _wrong_source(source: list[Any], prompts: int, rows: Sequence[Mapping[str, Any]], may_add: bool) -> str | None:
    if not may_add:
        return "returned a `source` from 'rollout' without the claim 'groups'."
    if not all(isinstance(place, int) for place in source) or source != sorted(source):
        return f"returned {source} as `source` from 'rollout', expected integers in ascending order."
    if sorted(set(source)) != list(range(prompts)):
        got = ", ".join(map(str, sorted(set(source))))
        return f"returned rows of the prompts {got} from 'rollout', expected rows of each of 0 to {prompts - 1}."
    if len(source) > prompts and any(name in row for row in rows for name in _IMAGES):
        return "added rows in 'rollout' to prompts with images, which the trainer holds one per prompt."
    return None


def spread(context: Context, prompts: list[Any], result: Generation) -> Generation:
    """Gives every process as many rows as the others where a rollout added some, and each row its group. Collective.

    The rows that fill up repeat the shortest row of the process. No token of theirs counts.
    """
    state, view = context.current_round(), context.view
    source = list(range(len(prompts))) if result.source is None else [int(place) for place in result.source]
    counts = view.gather_objects([len(source)])
    if all(count == len(prompts) for count in counts):
        return dataclasses.replace(result, source=None)
    training = trainer_state.mode(context.trainer) == "train"
    slices = int(context.trainer.args.steps_per_generation) if training else 1
    rows = math.ceil(max(counts) / slices) * slices
    sizes = [len(asked) + len(ids) for asked, ids in zip(result.prompt_ids, result.completion_ids, strict=True)]
    filling = [sizes.index(min(sizes))] * (rows - len(source))
    order = [*range(len(source)), *filling]
    start = view.process_index * len(prompts)
    known = state.group_ids or uniform(len(prompts) * view.num_processes, state.num_generations)
    own = [known[start + place] for place in source] + [PADDING] * len(filling)
    state.group_ids = view.gather_objects(own)
    state.source = [source[row] for row in order]
    # TRL goes on with this list
    state.rows[:] = [dict(state.rows[place]) for place in state.source]
    state.data_rows = [dict((state.data_rows or state.rows)[place]) for place in state.source]
    trainer_state.use_single_rows(context.trainer)
    trainer_state.size_logs(context.trainer, rows * view.num_processes)
    given = prompts if result.prompts is None else result.prompts
    places = state.source if result.prompts is None else order
    masks = result.tool_mask
    if PADDING in state.group_ids:
        masks = masks or [[1] * len(ids) for ids in result.completion_ids]
    return Generation(
        prompt_ids=[result.prompt_ids[row] for row in order],
        completion_ids=[result.completion_ids[row] for row in order],
        completions=[result.completions[row] for row in order],
        tool_mask=masks and [masks[row] for row in range(len(source))] + [[0] * len(masks[row]) for row in filling],
        logprobs=result.logprobs and [result.logprobs[row] for row in order],
        extra=trl_generation.spread_extra(result.extra, state.source, order),
        prompts=[given[place] for place in places],
        fields={name: _taken(values, order) for name, values in result.fields.items()},
    )


def _taken(values: Any, order: list[int]) -> Any:
    return values[order] if isinstance(values, torch.Tensor) else [values[row] for row in order]


def turns_of(turns: Turns | None, source: list[int] | None) -> Turns | None:
    """Returns the turns of the rows that came from `source`."""
    if turns is None or source is None or len(turns.rewards) == len(source):
        return turns
    return Turns(**{name: values[source] for name, values in vars(turns).items()})


def ids_of(context: Context, rows: int) -> torch.Tensor:
    """Returns the group of every row of all processes.

    Args:
        context: The plugins of the trainer.
        rows: Rows of this process.
    """
    state, view = context.current_round(), context.view
    known = state.group_ids or uniform(rows * view.num_processes, state.num_generations)
    return torch.tensor(known, device=view.device)
