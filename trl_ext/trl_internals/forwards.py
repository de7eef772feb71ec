"""Forwards of the policy and of the reference inside TRL's trainers."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from trl_ext_hooks import Logps, LogpsCall
from trl_ext_hooks.basics import Role

from .trainer_state import mode


def is_peft_model(model: Any) -> bool:
    """Tells whether a model is PEFT's, and not one to which transformers itself has added adapters."""
    from accelerate.utils import is_peft_model as check

    return bool(check(model))


def adapters_off(trainer: Any, model: Any) -> bool:
    """Tells whether a PEFT model computes its reference now: with adapters disabled, or with the frozen copy `ref`."""
    base = trainer.accelerator.unwrap_model(model)
    if not is_peft_model(base):
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    if base.active_adapter == "ref":
        return True
    if base.active_peft_config.is_prompt_learning:
        # such an adapter has no layers to disable: PEFT lets the forward of the model inside stand in
        return bool(base.forward == base.base_model.forward)
    layer = next((module for module in base.modules() if isinstance(module, BaseTunerLayer)), None)
    return layer is not None and layer.disable_adapters


@contextlib.contextmanager
def scoring(trainer: Any) -> Iterator[None]:
    """Switches gradients and gradient checkpointing off for the block, as TRL does when it scores completions."""
    from trl.models.utils import disable_gradient_checkpointing

    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        yield


@contextlib.contextmanager
def last_hidden_states(trainer: Any, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Gives `see` the last hidden states (B, L, H) of every forward of the policy in the block, detached.

    TRL calls the backbone as a module, with its fused head and without, and so does generation: the block must be no
    larger than the forward that is meant. Gradient checkpointing runs layers again, and never the backbone.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    policy = policy.get_base_model() if is_peft_model(policy) else policy

    def seen(module: Any, args: Any, output: Any) -> None:
        see(getattr(output, "last_hidden_state", output[0]).detach())

    handle = policy.base_model.register_forward_hook(seen)
    try:
        yield
    finally:
        handle.remove()


_VISION = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def completion_logps(
    trainer: Any, batch: Mapping[str, Any], model: Any = None, forward: Callable[..., Any] | None = None
) -> torch.Tensor:
    """Returns (b, T) log-probabilities of a round's completions, without gradient.

    Args:
        trainer: GRPO or RLOO.
        batch: The round.
        model: The model to score with, by default the policy as it is now.
        forward: TRL's log-probability method without plugins, by default with them.
    """
    return round_scores(trainer, batch, model, forward).per_token_logps


def round_scores(
    trainer: Any,
    batch: Mapping[str, Any],
    model: Any = None,
    forward: Callable[..., Any] | None = None,
    compute_entropy: bool = False,
) -> Logps:
    """Scores a round's completions as TRL does after sampling: without gradient, in forwards of one micro-batch."""
    rows = rows_at_once(trainer)
    with scoring(trainer):
        return scores(trainer, batch, model, forward, batch_size=rows, compute_entropy=compute_entropy)


def scores(
    trainer: Any,
    batch: Mapping[str, Any],
    model: Any = None,
    forward: Callable[..., Any] | None = None,
    batch_size: int | None = None,
    compute_entropy: bool = False,
) -> Logps:
    """Scores the completions of a batch, with gradient where it is enabled.

    Args:
        trainer: GRPO or RLOO.
        batch: Prompts and completions with their masks, by TRL's names.
        model: The model to score with, by default the policy as it is now.
        forward: TRL's log-probability method without plugins, by default with them.
        batch_size: Rows of one forward. None takes all of them.
        compute_entropy: Whether entropies are wanted.
    """
    run = trainer._get_per_token_logps_and_entropies if forward is None else forward
    return Logps(
        *run(
            trainer.model if model is None else model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            batch_size=batch_size,
            compute_entropy=compute_entropy,
            **{name: batch[name] for name in _VISION if batch.get(name) is not None},
        )
    )


def padded_rows(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Returns rows of token ids as TRL's batches hold them: prompts padded left, completions padded right.

    There is at least one column of completions.
    """
    padded: dict[str, torch.Tensor] = {}
    for kind, rows, side in (("prompt", prompt_ids, "left"), ("completion", completion_ids, "right")):
        ids = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
        ones = [torch.ones_like(row) for row in ids]
        padded[f"{kind}_ids"] = pad_sequence(ids, batch_first=True, padding_side=side)
        padded[f"{kind}_mask"] = pad_sequence(ones, batch_first=True, padding_side=side)
    if not padded["completion_ids"].shape[1]:
        padded |= {name: pad(padded[name], (0, 1)) for name in ("completion_ids", "completion_mask")}
    return padded


def vocabulary_size(trainer: Any) -> int:
    """Returns the number of tokens that the policy knows."""
    return int(trainer.accelerator.unwrap_model(trainer.model).config.get_text_config().vocab_size)


def rows_at_once(trainer: Any) -> int:
    """Returns how many rows TRL gives to one forward that scores completions."""
    args = trainer.args
    return int(args.per_device_train_batch_size if mode(trainer) == "train" else args.per_device_eval_batch_size)


def add_fused_head(model: Any) -> None:
    """Gives a model TRL's fused head with log-probabilities and entropies, as GRPOTrainer does (from TRL 1.15)."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy"))


def uses_virtual_tokens(trainer: Any) -> bool:
    """Tells whether the policy is a PEFT model that learns prompt tokens, which the fused forward does not see."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    return is_peft_model(policy) and any(config.is_prompt_learning for config in policy.peft_config.values())


PairForward = Callable[[LogpsCall, Callable[[], Logps]], Logps]
_FUSED = ("mean_logits", "is_top1", "log_sum_sq_probs")


@contextlib.contextmanager
def pair_forwards(trainer: Any, run: PairForward) -> Iterator[None]:
    """Sends DPO's fused forwards of policy and reference in the block through `run(call, TRL's own forward)`.

    DPO calls its models inside one long method, so the forward of the model itself is wrapped; a model that `run` calls
    is called as it was.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    policy = trainer.accelerator.unwrap_model(trainer.model)
    models = [policy.get_base_model() if is_peft_model(policy) else policy]
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        reference = trainer.accelerator.unwrap_model(reference)
        models.append(reference)
    running: list[Any] = []

    def wrap(model: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if running or not kwargs.get("fused_lm_head"):
                return original(*args, **kwargs)
            extra = dict(kwargs)
            ids, mask, labels = (extra.pop(name) for name in ("input_ids", "attention_mask", "labels"))
            scored = labels != -100
            role: Role = "reference" if model is reference or adapters_off(trainer, trainer.model) else "policy"

            def dense() -> Logps:
                out = original(**kwargs)
                values = {name: getattr(out, name) for name in _FUSED if getattr(out, name) is not None}
                return Logps(out.log_probs, out.entropy, out.aux_loss, values)

            call = LogpsCall("dpo", role, model, ids, mask, ids.size(1) - 1, scored, None, role == "policy", extra)
            running.append(model)
            try:
                result = run(call, dense)
            finally:
                running.pop()
            return FusedCausalLMOutput(
                log_probs=result.per_token_logps,
                entropy=result.entropies,
                aux_loss=result.aux_loss,
                label_mask=scored[:, 1:],
                **result.extra,
            )

        return forward

    with contextlib.ExitStack() as stack:
        for model in models:
            own = vars(model).get("forward")
            stack.callback(_restore_forward, model, own)
            model.forward = wrap(model, model.forward)
        yield


def _restore_forward(model: Any, own: Any) -> None:
    if own is None:
        del model.forward
    else:
        model.forward = own
