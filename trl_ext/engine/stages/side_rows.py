"""Rows of plugins beside those of a round: the hook `side_batch`, and the forward that scores its rows."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from trl_ext_hooks import SideBatch, SideRows
from trl_ext_hooks.basics import Mode

from ...errors import PluginError
from ...trl_internals import forwards
from ..agreement import together
from ..context import Context, StepRows, StepState


def ask(context: Context, step: StepState, mode: Mode) -> None:
    """Asks every plugin for its rows of an optimizer step, and all processes for how many they have. Collective."""
    for name, caller in context.calls.chain("side_batch"):
        returned = context.calls.call(
            name, "side_batch", caller, trainer=context.view, mode=mode, step=context.trainer.state.global_step
        )
        rows, layouts = together(context, functools.partial(_checked, context, name, returned))
        own = layouts[context.view.process_index]
        step.side[name] = StepRows(
            rows=_filled(name, rows, layouts, context.view.device),
            width=next((layout.width for layout in [own, *layouts] if layout.rows), 0),
            counts=[layout.rows for layout in layouts],
            tokens=sum(layout.tokens for layout in layouts),
        )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What processes have to know of each other's rows: numbers, and shapes and types of the fields."""

    rows: int
    tokens: int
    width: int
    fields: dict[str, tuple[tuple[int, ...], torch.dtype]]

    @classmethod
    def of(cls, batch: SideBatch) -> _Layout:
        lengths = [len(ids) for ids in batch.completion_ids]
        fields = {name: (tuple(values.shape[1:]), values.dtype) for name, values in batch.fields.items()}
        return cls(len(lengths), sum(lengths), max(lengths, default=0), fields)


def _filled(name: str, rows: SideBatch, layouts: Sequence[_Layout], device: torch.device) -> SideBatch:
    """Gives a process without rows the fields of the others, without rows, so that a plugin needs no special case.

    Raises:
        PluginError: Processes with rows have different fields. Equal on every process.
    """
    given = [(process, layout) for process, layout in enumerate(layouts) if layout.rows]
    if not given:
        return rows
    (first, known), *others = given
    for process, layout in others:
        if layout.fields.keys() != known.fields.keys():
            names = [", ".join(sorted(which.fields)) or "none" for which in (known, layout)]
            raise PluginError(
                f"plugin {name!r} returned the fields {names[0]} from 'side_batch' on process {first} and {names[1]} "
                f"on process {process}; expected the same on every process with rows."
            )
    if rows.prompt_ids:
        return rows
    empty = {
        field: torch.zeros(0, *shape, dtype=dtype, device=device) for field, (shape, dtype) in known.fields.items()
    }
    return SideBatch((), (), empty)


def _checked(context: Context, name: str, result: Any) -> tuple[SideBatch, _Layout]:
    """Returns a plugin's rows, with its tensors on the device of the process, and what others have to know of them.

    Raises:
        PluginError: They are no rows.
    """
    if result is None:
        result = SideBatch((), ())
    where = f"plugin {name!r} returned"
    if not isinstance(result, SideBatch):
        raise PluginError(f"{where} {type(result).__name__} from 'side_batch', expected a SideBatch or None.")
    rows, vocabulary = len(result.prompt_ids), forwards.vocabulary_size(context.trainer)
    if len(result.completion_ids) != rows:
        raise PluginError(
            f"{where} {rows} prompts and {len(result.completion_ids)} completions from 'side_batch', expected as many."
        )
    prompts, completions = (
        [_token_ids(f"{where} the {kind}", ids, row, vocabulary) for row, ids in enumerate(sequences)]
        for kind, sequences in (("prompt", result.prompt_ids), ("completion", result.completion_ids))
    )
    for field, values in result.fields.items():
        if not isinstance(values, torch.Tensor) or values.dim() == 0 or len(values) != rows:
            got = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
            raise PluginError(
                f"{where} {got} for the field {field!r} from 'side_batch', expected a tensor with {rows} rows."
            )
    fields = {field: values.detach().to(context.view.device) for field, values in result.fields.items()}
    checked = SideBatch(prompts, completions, fields)
    return checked, _Layout.of(checked)


def _token_ids(what: str, ids: Any, row: int, vocabulary: int) -> list[int]:
    """Returns the ids of a prompt or a completion as a list, given as a list, a tensor or an array."""
    numbers = ids.tolist() if hasattr(ids, "tolist") else ids
    fits = isinstance(numbers, Sequence) and len(numbers) > 0
    if not fits or not all(isinstance(number, int) and 0 <= number < vocabulary for number in numbers):
        raise PluginError(
            f"{what} {numbers!r} in row {row} from 'side_batch', expected at least one token id, each from 0 to "
            f"{vocabulary - 1}."
        )
    return list(numbers)


def score(
    context: Context, step: StepState, batch: Mapping[str, Any]
) -> tuple[dict[str, SideRows], torch.Tensor | None]:
    """Scores the rows of the micro-batch whose loss comes now. Collective.

    Args:
        context: The context.
        step: The optimizer step.
        batch: The rows of the round in this micro-batch.

    Returns:
        By plugin its rows, and the log-probabilities of all of them, or None if no process has such a row now.
    """
    if not step.side:
        return {}, None
    shares = {name: _share(len(own.rows.prompt_ids), step) for name, own in step.side.items()}
    counts = [count for own in step.side.values() for count in own.counts]
    if not any(_size(_share(count, step)) for count in counts):
        empty = torch.zeros(0, 0, device=context.view.device)
        return _by_plugin(context, step, shares, empty, empty), None
    prompts = [ids for name, share in shares.items() for ids in step.side[name].rows.prompt_ids[share]]
    completions = [ids for name, share in shares.items() for ids in step.side[name].rows.completion_ids[share]]
    if not prompts:  # this process runs the forward of the others too, on a row that no plugin sees
        prompts = completions = [[int(batch["prompt_ids"][0, -1])]]
    rows = forwards.padded_rows(prompts, completions, context.view.device)
    with context.in_loss(rows, is_side=True) as micro_batch:
        forwards.scores(context.trainer, rows, context.view.model, compute_entropy=True)
    policy = micro_batch.policy
    assert policy is not None and policy.entropies is not None
    return _by_plugin(context, step, shares, policy.per_token_logps, policy.entropies), policy.per_token_logps


def _share(rows: int, step: StepState) -> slice:
    """Selects the rows of the micro-batch whose loss comes now, of the rows of a process in the step."""
    index = step.begun - 1
    return slice(index * rows // step.size, (index + 1) * rows // step.size)


def _size(share: slice) -> int:
    return int(share.stop - share.start)


def _by_plugin(
    context: Context,
    step: StepState,
    shares: Mapping[str, slice],
    logps: torch.Tensor,
    entropies: torch.Tensor,
) -> dict[str, SideRows]:
    """Gives every plugin its part of the rows that were scored together, in its own width."""
    parts, first = {}, 0
    for name, share in shares.items():
        own, last = step.side[name], first + _size(share)
        rows, width = own.rows, own.width
        ids = torch.zeros(last - first, width, dtype=torch.long, device=logps.device)
        mask = torch.zeros_like(ids)
        for row, completion in enumerate(rows.completion_ids[share]):
            ids[row, : len(completion)] = torch.tensor(completion)
            mask[row, : len(completion)] = 1
        missing = max(width - logps.shape[1], 0)  # the longest completion may belong to another micro-batch
        parts[name] = SideRows(
            completion_ids=ids,
            mask=mask,
            per_token_logps=pad(logps[first:last], (0, missing))[:, :width] * mask,
            entropies=pad(entropies[first:last], (0, missing))[:, :width] * mask,
            fields={field: values[share] for field, values in rows.fields.items()},
            rows=sum(own.counts),
            tokens=own.tokens,
            micro_batches=step.size * context.view.num_processes,
        )
        first = last
    return parts
