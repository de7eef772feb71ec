"""Row selection: the hook `keep_rows`, and what a row that is left out means to the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from trl_ext_hooks import Round

from ...errors import PluginError
from ...trl_internals import losses
from ..context import Context
from . import groups

KEPT = "trl_ext_kept"
SCALE = "trl_ext_kept_scale"


def select(context: Context, round: Round, metrics: dict[str, tuple[float, float]]) -> Round:
    """Asks every plugin which rows of a training round to keep, and takes the others out.

    Rows that only fill up a process go in any case, also in evaluation. Advantages and masks of these rows become 0,
    and the counts that the loss divides by are made again. The attention still sees their tokens, so their
    log-probabilities stay what they are.
    """
    rows = len(round.group_ids)
    kept = round.group_ids != groups.PADDING
    answers = context.calls.each("keep_rows", round=round) if round.mode == "train" else ()
    for name, wanted in answers:
        if not isinstance(wanted, torch.Tensor) or wanted.shape != (rows,) or wanted.dtype != torch.bool:
            got = f"{wanted.dtype} {tuple(wanted.shape)}" if isinstance(wanted, torch.Tensor) else type(wanted).__name__
            raise PluginError(f"plugin {name!r} returned {got} from 'keep_rows', expected booleans ({rows},).")
        kept = kept & wanted.to(kept.device)
        metrics[f"{name}/rows_kept"] = (wanted[round.local].sum().item(), len(round.rows))
    if kept.all():
        return round
    batch = dict(round.batch)
    own = kept[round.local].to(batch["completion_mask"].device)  # (b,)
    tool_mask = batch.get("tool_mask")
    if tool_mask is None:
        tool_mask = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"] = tool_mask * own.unsqueeze(1)
    if "num_items_in_batch" in batch:
        batch["num_items_in_batch"] = context.view.gather((batch["completion_mask"] * batch["tool_mask"]).sum()).sum()
    batch[KEPT] = own
    batch[SCALE] = torch.tensor(rows / max(int(kept.sum()), 1), device=own.device)  # 0-d: reaches every micro-batch
    tokenwise = round.advantages.dim() == 2
    mask = own.unsqueeze(1) if tokenwise else kept.to(round.advantages.device)
    batch["advantages"] = batch["advantages"] * (mask if tokenwise else own)
    lengths = round.lengths * kept.to(round.lengths.device)
    return dataclasses.replace(round, advantages=round.advantages * mask, batch=batch, gathered_lengths=lengths)


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
