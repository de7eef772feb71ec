"""Hidden states that plugins read in the policy's own forwards: the hook `hidden_positions`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trl_ext_hooks import Logps, LogpsCall
from trl_ext_hooks.toolkit.tokens import predicting

from ...errors import CompatError, PluginError
from ...trl_internals import forwards
from ..context import Context


def during(context: Context, call: LogpsCall, dense: Callable[[], Logps]) -> Logps:
    """Runs TRL's forward and keeps the hidden states that plugins name: of a loss, or of the first scoring of a round.

    A forward comes in chunks of rows, so positions are cut like the rows.
    """
    mask = _mask(context, call)
    if mask is None or not context.calls.has("hidden_positions"):
        return dense()
    positions = {
        name: _positions(context, name, caller, mask) for name, caller in context.calls.chain("hidden_positions")
    }
    found: dict[str, list[torch.Tensor]] = {name: [] for name in positions}
    seen = 0

    def see(states: torch.Tensor) -> None:
        nonlocal seen
        rows = slice(seen, seen + len(states))
        if states.shape[1] != call.input_ids.shape[1] or rows.stop > len(mask):
            raise CompatError(
                f"a forward of {tuple(call.input_ids.shape)} tokens gave hidden states of {tuple(states.shape)}, so it "
                f"is not known which state belongs to which token; {', '.join(positions)} cannot act."
            )
        own = predicting(states, call.logits_to_keep)
        for name, where in positions.items():
            found[name].append(own[where[rows].to(own.device)])
        seen = rows.stop

    with forwards.last_hidden_states(context.trainer, see):
        result = dense()
    if seen != len(mask):
        raise CompatError(f"a forward of {len(mask)} rows gave hidden states of {seen}.")
    states = {name: torch.cat(parts).to(context.view.device) for name, parts in found.items()}
    if call.role == "policy":
        assert context.micro_batch is not None
        context.micro_batch.hidden_states = states
    else:
        context.current_round().hidden_states = states
    return result


def _mask(context: Context, call: LogpsCall) -> torch.Tensor | None:
    """Returns the loss mask (B, T) of a forward whose states plugins read, or None for any other forward."""
    if call.role == "policy":
        mask = None if context.micro_batch is None or context.micro_batch.is_side else context.micro_batch.mask
        # a class of the user may score something of its own beside the loss
        fits = mask is not None and mask.shape == (len(call.input_ids), call.logits_to_keep)
        return mask if fits else None
    state = context.round
    if call.role != "old" or state is None or state.hidden_states is not None:
        return None
    mask = call.attention_mask[:, -call.logits_to_keep :]
    if state.tool_mask is None:
        return mask
    if len(mask) != len(state.tool_mask):  # a plugin scores something of its own
        return None
    own = torch.zeros_like(mask)
    for row, written in enumerate(state.tool_mask):
        own[row, : len(written)] = torch.tensor(written, dtype=own.dtype)
    return mask * own


def _positions(context: Context, name: str, caller: object, mask: torch.Tensor) -> torch.Tensor:
    result = context.calls.call(name, "hidden_positions", caller, loss_mask=mask)
    if not isinstance(result, torch.Tensor) or result.shape != mask.shape or result.dtype != torch.bool:
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, torch.Tensor) else type(result).__name__
        raise PluginError(
            f"plugin {name!r} returned {got} from 'hidden_positions', expected booleans {tuple(mask.shape)}."
        )
    return result
