"""Traits: how a model treats random numbers and positions, found by running it on a few tokens.

No list of names can tell them. A model may draw noise through a function, a hook or an adapter, and it may use
positions in other ways than by their differences. Each trait is asked for once per model and mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .comparison import Result, coarser, compared_parameters, gradients, same
from .errors import RefusedError
from .model_parts import ModelParts, evaluating, random_states, training, untouched_random_state
from .packing import Packing
from .refusals import named_noise, named_noise_off, names_noise, why_not

_TOKENS = 16  # of a row that a model is asked about
_NARROWEST, _WIDEST = 64, 4096
_SHIFT_PER_TOLERANCE = 256
_noise: WeakKeyDictionary[nn.Module, dict[int, str | None]] = WeakKeyDictionary()
_positions: WeakKeyDictionary[nn.Module, dict[int, bool]] = WeakKeyDictionary()


def forget() -> None:
    """Forgets all traits, so that the next use asks the models again."""
    _noise.clear()
    _positions.clear()


def why_not_at_all(
    model: nn.Module | ModelParts,
    packing: Packing | None = None,
    *,
    in_training: bool = False,
    run: bool = True,
) -> str | None:
    """Returns why shared prefixes cannot serve this model, by its names as `why_not` does, and by running it.

    Args:
        model: As in `why_not`, like all arguments that are not listed here.
        packing: The batch, if there is one.
        in_training: Whether to take all modules for being in training mode, in place of the present one.
        run: Whether to run the model on a few tokens, to look for noise without a name. Sharded models are not run.
    """
    reason = why_not(model, packing, in_training=in_training)
    if not run:
        return reason
    try:
        model_parts = ModelParts.of(model)
        named = named_noise(model_parts, in_training)
    except RefusedError:
        return reason
    if reason == named and not model_parts.is_sharded:
        # Nothing else stands in the way. Noise that no setting switches off is told first.
        with training(model_parts) if in_training else nullcontext():
            noise = why_noisy(model_parts)
        if noise is not None:
            return f"{model_parts.class_name} {noise}"
    return reason


def why_noisy(model_parts: ModelParts) -> str | None:
    """Returns why the model's noise forbids sharing in its present mode, or None if it draws none.

    Noise that modules name is left out, as `why_not` tells of it.

    On the dense path, every row draws noise of its own. On the packed path, rows would share that of shared tokens.
    A model that draws one number for a whole layer (LayerDrop) is no obstacle, as its rows share it anyway.
    """
    if not any(module.training for module in model_parts.modules):
        return None
    known = _noise.setdefault(model_parts.causal_lm, {})
    mode = _fingerprint(model_parts)
    if mode not in known:
        known[mode] = _find_noise(model_parts)
    return known[mode]


def positions_are_columns(model_parts: ModelParts, width: int) -> bool:
    """Returns whether tokens must be packed with their columns in the padded batch as positions.

    Most models are indifferent to how much padding is on the left of a row, as only the difference of two positions
    matters. Others give tokens the numbers of their columns, and a token behind padding then differs from the same
    token without. A third kind counts the real tokens, which is what packing does by itself.

    Args:
        model_parts: The model.
        width: Columns of the padded batch.

    Raises:
        RefusedError: The model's positions follow neither columns nor real tokens.
    """
    if model_parts.is_sharded:
        width = _WIDEST  # all processes must call the model equally often, whatever their batches
    known = _positions.setdefault(model_parts.causal_lm, {})
    rounded = max(_NARROWEST, 1 << (width - 1).bit_length())
    limit = getattr(model_parts.text_config, "max_position_embeddings", None)
    if isinstance(limit, int) and rounded > limit:
        rounded = max(min(width, limit), _TOKENS + 1)
    if rounded not in known:
        known[rounded] = _find_positions(model_parts, rounded)
    return known[rounded]


def _find_noise(model_parts: ModelParts) -> str | None:
    """Runs two equal rows and looks for modules that draw random numbers."""
    called = model_parts.to_check()
    rows = _row(model_parts).expand(2, -1)
    with (
        named_noise_off(model_parts),
        untouched_random_state(model_parts),
        torch.no_grad(),
    ):
        with _drawing_modules(called) as drawing:
            logits, dtype = _logits(called, rows)
        if drawing and all(names_noise(module) for _, module in drawing):
            # Some modules draw even where their noise is set to 0. Then other numbers change nothing at all.
            again, _ = _logits(called, rows)
            drawing = [] if torch.equal(logits, again) else drawing
    culprits = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in drawing
        if not hasattr(module, "layerdrop")
    ]
    first, second = (Result(row.float(), (), dtype) for row in logits)
    if culprits:
        what = f"draws random numbers in training in {culprits[0]}"
    elif not same(first, second):
        what = "treats two equal rows of a batch differently in training"
    else:
        return None
    return (
        f"{what}: each row has noise of its own, but shared tokens would have theirs in common. {_way_out(model_parts)}"
    )


def _way_out(model_parts: ModelParts) -> str:
    """Returns how to get rid of noise."""
    if getattr(model_parts.embeddings, "neftune_noise_alpha", None):
        return "Leave out neftune_noise_alpha."
    return "If a setting of the model switches this off, set it. Otherwise turn shared prefixes off."


def _find_positions(model_parts: ModelParts, width: int) -> bool:
    """Runs one row at two positions, and if that makes a difference, behind padding as well."""
    shift = width - _TOKENS
    row = _row(model_parts)
    depths = torch.arange(_TOKENS, device=row.device)[None]
    called = model_parts.to_check()
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model_parts), untouched_random_state(model_parts):
        at_start = _ask(called, row, position_ids=depths)
        # A small shift shows subtle differences, a large one what begins further on. Rounding grows with the positions.
        shifts = {min(shift, _NARROWEST), shift}
        if not _scaled_by_position(model_parts, width) and all(
            same(at_start, _ask(called, row, position_ids=depths + by), _slack(by)) for by in shifts
        ):
            return False
        padding = min(shift, _NARROWEST) if model_parts.is_sharded else shift
        behind_padding = torch.cat([row.new_zeros(1, padding), row], 1)
        mask = torch.cat([row.new_zeros(1, padding), torch.ones_like(row)], 1)
        padded = _ask(called, behind_padding, attention_mask=mask)
        # Ambiguous answers mean columns, which is what transformers counts by default.
        if same(padded, _ask(called, row, position_ids=depths + padding), _slack(padding)):
            return True
        if same(padded, at_start, _slack(padding)):
            return False
    raise RefusedError(
        f"Shared prefixes refused: {model_parts.class_name} has absolute positions, and behind left padding they are "
        "neither the columns nor the numbers of the real tokens. Use prompts of equal length, or turn shared prefixes "
        "off for it."
    )


def _slack(shift: int) -> float:
    """Returns how many times the tolerances two results may differ whose positions are so far apart."""
    return 2 + shift / _SHIFT_PER_TOLERANCE


def _scaled_by_position(model_parts: ModelParts, width: int) -> bool:
    """Returns whether queries are scaled by their position (Llama 4, Ministral 3) anywhere in a batch of this width.

    In half types the scale hardly differs from rounding, so it cannot be seen in the results.
    """
    parameters = getattr(model_parts.text_config, "rope_parameters", None) or {}
    if not isinstance(parameters, dict) or not parameters.get("llama_4_scaling_beta"):
        return False
    return bool(width > parameters.get("original_max_position_embeddings", 0))


def _row(model_parts: ModelParts) -> torch.Tensor:
    """Returns one row of random tokens, (1, tokens)."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model_parts.vocabulary, (1, _TOKENS), generator=generator).to(model_parts.device)


def _logits(called: ModelParts, input_ids: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.dtype]:
    """Returns the logits of the model's own head for the last tokens, (B, tokens, vocabulary), and the dtype of these.

    The dtype is that of the computation. A wrapper may have switched autocast on inside, and widened the logits again.
    """
    mask = arguments.pop("attention_mask", torch.ones_like(input_ids))
    dtypes = [called.causal_lm.dtype]
    handle = called.embeddings.register_forward_hook(lambda *_: dtypes.append(called.compute_dtype))
    try:
        output = called.model(
            input_ids=input_ids,
            attention_mask=mask,
            use_cache=False,
            **arguments,
            **called.text_only_arguments(input_ids),
        )
    finally:
        handle.remove()
    return output.logits[:, -_TOKENS:], reduce(coarser, dtypes)


def _ask(called: ModelParts, input_ids: torch.Tensor, **arguments: torch.Tensor) -> Result:
    """Returns the log-probabilities that a row gives and gradients of a few parameters."""
    with _without_autocast(called) as called:
        logits, dtype = _logits(called, input_ids, **arguments)
    tokens = input_ids[:, -_TOKENS:].to(logits.device)
    values = logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    weights = torch.linspace(-1, 1, values.numel(), device=values.device).view(values.shape)
    return Result(values.detach(), gradients(values, weights, compared_parameters(called)), dtype)


@contextmanager
def _without_autocast(called: ModelParts) -> Iterator[ModelParts]:
    """Yields the model without autocast where all of its parameters are wide, as rounding hides subtle differences.

    The forward of the class is called, as a wrapper of it may switch autocast on again.
    """
    causal_lm = called.causal_lm
    wide = all(parameter.dtype in (torch.float32, torch.float64) for parameter in causal_lm.parameters())
    if called.is_sharded or not wide:
        yield called
        return
    replaced = vars(causal_lm).get("forward")
    try:
        vars(causal_lm).pop("forward", None)
        with torch.autocast(called.device.type, enabled=False):
            yield called.of_causal_lm()
    finally:
        if replaced is not None:
            causal_lm.forward = replaced


@contextmanager
def _drawing_modules(called: ModelParts) -> Iterator[list[tuple[str, nn.Module]]]:
    """Collects the modules in which a random generator moves while the context is open, the innermost ones only."""
    drawing: list[tuple[str, nn.Module]] = []
    states: list[list[torch.Tensor]] = []

    def before(module: nn.Module, args: Any) -> None:
        """Notes the state of the generators."""
        states.append(random_states(called))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        """Compares the state, then hides the movement from the modules around."""
        before_call, now = states.pop(), random_states(called)
        if any(not torch.equal(a, b) for a, b in zip(before_call, now, strict=True)):
            drawing.append((names[module], module))
            # What an inner module draws is no drawing of the outer one.
            states[:] = [now for _ in states]

    names = {module: name for name, module in called.model.named_modules()}
    handles = []
    for module in names:
        # First before and last after everything else, so that the draws of other hooks are inside.
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield drawing
    finally:
        for handle in handles:
            handle.remove()


def _fingerprint(model_parts: ModelParts) -> int:
    """Returns a number that changes with what may switch noise on: modes, hooks and adapters."""
    return hash(
        tuple(
            (
                module.training,
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                str(vars(module).get("_active_adapter")),
                vars(module).get("_disable_adapters"),
            )
            for module in model_parts.modules
        )
    )
