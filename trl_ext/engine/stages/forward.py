"""The log-probability forward: the hook `logps`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trl_ext_hooks import Logps, LogpsCall

from ...errors import PluginError
from ..context import Context
from . import hidden_states


def logps(context: Context, call: LogpsCall, dense: Callable[[], Logps]) -> Logps:
    """Runs the owner of the forward, or TRL's, and keeps the result for the round or the micro-batch under way."""
    result: Logps | None = None

    def compute() -> Logps:
        # hooks that read hidden states know the rows of the round, not those of a plugin
        return dense() if call.side else hidden_states.during(context, call, dense)

    for name, caller in context.calls.chain("logps"):
        result = context.calls.call(name, "logps", caller, call=call, compute=compute)
        _check(name, call, result)
    if result is None:
        result = compute()
    if call.side:
        return result
    if call.role == "policy" and context.micro_batch is not None:
        context.micro_batch.policy = result
    elif context.round is not None:
        context.round.logps[call.role] = result.per_token_logps
        if call.role == "old" and result.entropies is not None:
            context.round.old_entropies = result.entropies
    return result


def _check(name: str, call: LogpsCall, result: object) -> None:
    """Checks what the owner of the forward returned.

    Raises:
        PluginError: It is not what was asked for.
    """
    shape = (call.input_ids.size(0), call.logits_to_keep)
    if not isinstance(result, Logps) or tuple(result.per_token_logps.shape) != shape:
        got = tuple(result.per_token_logps.shape) if isinstance(result, Logps) else type(result).__name__
        raise PluginError(
            f"plugin {name!r} returned {got} from 'logps', expected Logps with {shape} log-probabilities."
        )
    if call.compute_entropy and result.entropies is None:
        raise PluginError(
            f"plugin {name!r} returned no entropies from 'logps', which the {call.role} forward asked for."
        )
    if call.compute_entropy and result.entropies is not None and tuple(result.entropies.shape) != shape:
        raise PluginError(
            f"plugin {name!r} returned entropies {tuple(result.entropies.shape)} from 'logps', expected {shape}."
        )
    if call.role == "policy" and torch.is_grad_enabled() and not result.per_token_logps.requires_grad:
        raise PluginError(
            f"plugin {name!r} returned log-probabilities without gradient from 'logps' in the role 'policy', so the "
            f"loss would train nothing. Return what the model computed, not detached."
        )
