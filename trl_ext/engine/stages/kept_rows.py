"""Selection of rows and tokens: the hooks `keep_rows` and `token_mask`, and what is left out means to the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from trl_ext_hooks import Round

from ...errors import PluginError
from ...trl_internals import losses
from ..agreement import check_equal, together
from ..context import Context
from . import groups

KEPT = "trl_ext_kept"
SCALE = "trl_ext_kept_scale"


def select(context: Context, round: Round, metrics: dict[str, tuple[float, float]]) -> Round:
    """Asks every plugin which rows of a training round to keep, and takes the others out.

    Rows that only fill up a process go in any case, also in evaluation.
    """
    rows = len(round.group_ids)
    kept = round.group_ids != groups.PADDING
    for name, caller in context.calls.chain("keep_rows") if round.mode == "train" else ():
        wanted = _wanted(context, name, "keep_rows", caller, round, (rows,))
        if wanted is None:
            continue
        kept = kept & wanted.to(kept.device)
        metrics[f"{name}/rows_kept"] = (wanted[round.local].sum().item(), len(round.rows))
    return round if kept.all() else _without(context, round, kept, None)


def select_tokens(context: Context, round: Round, metrics: dict[str, tuple[float, float]]) -> Round:
    """Asks every plugin which tokens to keep, and takes the others out of a training round.

    A row that had tokens and has none left is taken out like one that `keep_rows` leaves out.
    """
    counted = round.loss_mask != 0
    left = counted
    for name, caller in context.calls.chain("token_mask"):
        wanted = _wanted(context, name, "token_mask", caller, round, tuple(counted.shape))
        if wanted is None:
            continue
        wanted = wanted.to(counted.device) & counted
        left = left & wanted
        metrics[f"{name}/tokens_kept"] = (wanted.sum().item(), counted.sum().item())
    emptied = counted.any(dim=1) & ~left.any(dim=1)
    # one gather tells every process which rows are left, and whether any token anywhere is left out
    changed, kept = context.view.gather(torch.stack([(left != counted).any(dim=1), round.kept & ~emptied], dim=1)).T
    return _without(context, round, kept, left) if changed.any() else round


def _wanted(
    context: Context, name: str, hook: str, caller: Any, round: Round, shape: tuple[int, ...]
) -> torch.Tensor | None:
    """Returns a plugin's selection after checking it on every process. Collective."""
    result = context.calls.call(name, hook, caller, round=round)

    def check() -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if result is None:
            return None, None
        if not isinstance(result, torch.Tensor) or result.shape != shape or result.dtype != torch.bool:
            got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
            raise PluginError(f"plugin {name!r} returned {got} from {hook!r}, expected booleans {shape}.")
        return result, result.cpu() if hook == "keep_rows" else None

    wanted, answers = together(context, check)
    if hook == "keep_rows" and any(answer is not None for answer in answers):
        everything = torch.ones(shape, dtype=torch.bool)  # what None stands for
        check_equal(name, hook, [everything if answer is None else answer for answer in answers])
    return wanted


def _without(context: Context, round: Round, kept: torch.Tensor, tokens: torch.Tensor | None) -> Round:
    """Takes rows, and tokens of the rows that stay, out of a round.

    Their advantages and masks become 0, and the counts that the loss divides by are made again. The attention still
    sees their tokens, so their log-probabilities stay what they are.

    Args:
        context: The context.
        round: The round.
        kept: (N,) the rows of all processes that stay.
        tokens: (b, T) the tokens of this process that stay. None stands for all that the loss counts.
    """
    batch = dict(round.batch)
    own = kept[round.local].to(batch["completion_mask"].device)  # (b,)
    tool_mask = batch.get("tool_mask")
    if tool_mask is None:
        tool_mask = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"] = tool_mask * own.unsqueeze(1) if tokens is None else tool_mask * tokens
    if "num_items_in_batch" in batch:
        batch["num_items_in_batch"] = context.view.gather((batch["completion_mask"] * batch["tool_mask"]).sum()).sum()
    if not kept.all():
        batch[KEPT] = own
        scale = len(kept) / max(int(kept.sum()), 1)
        batch[SCALE] = torch.tensor(scale, device=own.device)  # 0-d: reaches every micro-batch
    tokenwise = round.advantages.dim() == 2
    mask = own.unsqueeze(1) if tokenwise else kept.to(round.advantages.device)
    batch["advantages"] = batch["advantages"] * (mask if tokenwise else own)
    changed = dataclasses.replace(round, advantages=round.advantages * mask, batch=batch)
    if tokens is None:
        lengths = round.lengths * kept.to(round.lengths.device)
    else:
        lengths = context.view.gather(changed.loss_mask.sum(dim=1))
    return dataclasses.replace(changed, gathered_lengths=lengths)


def weight(batch: Mapping[str, Any], unit: losses.LossUnit) -> torch.Tensor | None:
    """Returns the factor that removes dropped rows from a loss's denominator, or None if nothing has to change.

    With N rows in the round of which K are kept, and k of the m rows of this micro-batch:

    - `tokens`: the loss divides by a count of tokens of the round, which was made again;
    - `rows`: a mean over m rows, of which those left out are 0. N / K gives the mean over kept rows of the round;
    - `micro_batch`: a mean over what the micro-batch keeps. (k / m) (N / K) weighs it by its kept rows, 1 on average.
    """
    if KEPT not in batch or unit == "tokens":
        return None
    scale: torch.Tensor = batch[SCALE]
    return scale if unit == "rows" else scale * batch[KEPT].double().mean().to(scale.dtype)
