"""Rows of plugins beside those of a round: the hook `side_batch`, and the forward that scores its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from trl_ext_hooks import SideBatch, SideRows
from trl_ext_hooks.basics import Mode

from ...errors import PluginError
from ...trl_internals import forwards
from ..agreement import together
from ..context import Context, StepState


def ask(context: Context, step: StepState, mode: Mode) -> None:
    """Asks every plugin for its rows of an optimizer step, and all processes for how many they have. Collective."""
    for name, caller in context.calls.chain("side_batch"):
        rows = SideBatch((), ())

        def run(name: str = name, caller: Any = caller) -> SideBatch:
            nonlocal rows
            arguments = {"trainer": context.view, "mode": mode, "step": context.trainer.state.global_step}
            result = context.calls.call(name, "side_batch", caller, **arguments)
            if result is not None:
                rows = _checked(context, name, result)
            return rows

        counts = together(context, run, lambda rows: (len(rows.prompt_ids), sum(map(len, rows.completion_ids))))
        step.side[name] = rows
        step.side_counts[name] = [count for count, _ in counts], sum(tokens for _, tokens in counts)


def _checked(context: Context, name: str, result: Any) -> SideBatch:
    """Returns a plugin's rows with its tensors on the device of the process.

    Raises:
        PluginError: They are no rows.
    """
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
    return SideBatch(prompts, completions, fields)


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
    shares = {name: _share(len(rows.prompt_ids), step) for name, rows in step.side.items()}
    counts = [count for by_process, _ in step.side_counts.values() for count in by_process]
    if not any(_size(_share(count, step)) for count in counts):
        empty = torch.zeros(0, 0, device=context.view.device)
        return _by_plugin(context, step, shares, empty, empty), None
    prompts = [ids for name, share in shares.items() for ids in step.side[name].prompt_ids[share]]
    completions = [ids for name, share in shares.items() for ids in step.side[name].completion_ids[share]]
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
        rows, last = step.side[name], first + _size(share)
        width = max(map(len, rows.completion_ids), default=0)
        ids = torch.zeros(last - first, width, dtype=torch.long, device=logps.device)
        mask = torch.zeros_like(ids)
        for row, completion in enumerate(rows.completion_ids[share]):
            ids[row, : len(completion)] = torch.tensor(completion)
            mask[row, : len(completion)] = 1
        missing = max(width - logps.shape[1], 0)  # the longest completion may belong to another micro-batch
        counts, tokens = step.side_counts[name]
        parts[name] = SideRows(
            completion_ids=ids,
            mask=mask,
            per_token_logps=pad(logps[first:last], (0, missing))[:, :width] * mask,
            entropies=pad(entropies[first:last], (0, missing))[:, :width] * mask,
            fields={field: values[share] for field, values in rows.fields.items()},
            rows=sum(counts),
            tokens=tokens,
            micro_batches=step.size * context.view.num_processes,
        )
        first = last
    return parts
