"""Shared-prefix forward: what the rows of a micro-batch share is computed once, exactly.

All completions of a prompt start with the same tokens, and a dense forward computes these for every one of them, in the
policy, old and reference passes and again in the backward. Here the rows of a micro-batch become a prefix tree, packed
into one row; attention runs over the tree and its parts are merged by their log-sum-exp (`trl_ext.shared_prefix`).
Log-probabilities, entropies and gradients stay the dense ones up to rounding.

Stages: logps. The rows of a group are kept next to each other, so that a micro-batch shares as much as its size allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext.shared_prefix import RefusedError, Report, shared_prefix_logps, shared_prefix_scores, why_not_at_all
from trl_ext_hooks import (
    Config,
    Logps,
    LogpsCall,
    Loss,
    Need,
    Plugin,
    Refuse,
    Requirement,
    ScoredPairs,
    TrainerView,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.loss import Compute

_ROUTER_LOSS = (
    "the router's auxiliary loss would count shared tokens once instead of once per row. Set router_aux_loss_coef=0.0 "
    "in the trainer's arguments, which also trains without that loss."
)
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


class SharedPrefix(Plugin):
    """Owner of the log-probability forward of GRPO, RLOO and DPO."""

    name = "shared-prefix"
    paper = "none; see trl_ext.shared_prefix"
    summary = "computes what the rows of a micro-batch share once, exactly"
    trainers = ("grpo", "rloo", "dpo")

    @dataclass(frozen=True)
    class Options:
        """Options of the shared-prefix forward."""

        backend: Literal["auto", "flash_attn", "aten", "math"] = option(
            "auto", help="attention kernels: flash_attn on CUDA, aten on a CPU, math anywhere but slow", source="ours"
        )
        min_gain: float = option(
            1.1,
            ge=0,
            help="dense tokens per packed token below which the dense forward runs; 0 packs always",
            source="ours",
        )
        on_refusal: Literal["error", "dense"] = option(
            "error",
            help="for a model or batch that cannot be shared exactly: stop, or run dense and count it",
            source="ours",
        )
        check: bool = option(True, help="compare with the dense forward the first time a model is used", source="ours")

    options: Options

    def start(self) -> None:
        self._forwards: list[Report | None] = []  # None for a forward that TRL ran
        self._temperature: float | None = None

    @hookimpl
    def setup(self, trainer: TrainerView) -> Iterator[Refuse]:
        self._temperature = getattr(trainer.args, "temperature", None)
        if self.options.on_refusal == "dense":
            return
        way_out = "Or set shared-prefix.on_refusal=dense, which runs what cannot be shared as TRL does."
        if trainer.has_router_loss:
            yield Refuse(_ROUTER_LOSS, way_out)
        # What only a batch can show is refused when it comes.
        reason = why_not_at_all(trainer.model, in_training=True, run=self.options.check and not _is_deferred(trainer))
        if reason is not None:
            yield Refuse(f"{reason.rstrip('.')}.", way_out)

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        if getattr(config.args, "neftune_noise_alpha", None) and self.options.on_refusal == "error":
            yield Refuse(
                "NEFTune gives the embeddings of each row noise of their own, which rows would share.",
                "Leave out neftune_noise_alpha, or set shared-prefix.on_refusal=dense.",
            )
        if config.kind == "dpo":
            return
        yield Need("grouped_order")
        args = config.args
        rows, group = args.per_device_train_batch_size, args.num_generations
        if rows < group:
            yield Warn(f"a micro-batch holds {rows} of the {group} rows of a group; more rows at once would share more")
        round_steps, step_size = args.steps_per_generation or 1, args.gradient_accumulation_steps
        if step_size % round_steps:
            yield Warn(
                f"groups stay together, so the rows of a round of {round_steps} micro-batches are dealt to optimizer "
                f"steps of {step_size} in another way than by TRL, and a step sees fewer distinct prompts"
            )
        if getattr(args, "loss_type", None) == "bnpo":
            yield Warn("bnpo averages inside a micro-batch, so keeping groups together changes it a little")

    @hookimpl
    def logps(self, call: LogpsCall, compute: Compute) -> Logps:
        if call.role == "policy" and not call.side:
            self._forwards = []  # a reference scores the pairs of a micro-batch after the policy
        # rows of another plugin are none of the micro-batch that is reported
        forwards = [] if call.side else self._forwards
        refusal = _refusal(call)
        if refusal is not None:
            if self.options.on_refusal == "error":
                raise RefusedError(f"shared-prefix cannot serve this run: {refusal}")
            forwards.append(None)
            return compute()
        if call.score_mask is not None:
            return self._pairs(call)
        step = call.batch_size or call.input_ids.size(0)
        logps, entropies = [], []
        for start in range(0, call.input_ids.size(0), step):
            rows = slice(start, start + step)
            part_logps, part_entropies, report = shared_prefix_logps(
                call.model,
                call.input_ids[rows],
                call.attention_mask[rows],
                call.logits_to_keep,
                compute_entropy=call.compute_entropy,
                **self._settings(),
            )
            logps.append(part_logps)
            if part_entropies is not None:
                entropies.append(part_entropies)
            forwards.append(report)
        return Logps(torch.cat(logps), torch.cat(entropies) if call.compute_entropy else None)

    def _pairs(self, call: LogpsCall) -> Logps:
        scores, report = shared_prefix_scores(
            call.model,
            call.input_ids,
            call.attention_mask,
            score_mask=call.score_mask,
            compute_entropy=call.compute_entropy,
            **self._settings(),
        )
        self._forwards.append(report)
        fields = {name: values[:, 1:] for name, values in scores.items()}  # the first token has no prediction
        return Logps(fields.pop("log_probs"), fields.pop("entropy", None), extra=fields)

    def _settings(self) -> dict[str, Any]:
        options = self.options
        return {
            "backend": None if options.backend == "auto" else options.backend,
            "min_gain": options.min_gain,
            "on_refusal": options.on_refusal,
            "check": options.check,
            "temperature": self._temperature,
        }

    @hookimpl
    def loss_metrics(self, loss: Loss) -> None:
        self._log(loss)

    @hookimpl
    def pair_metrics(self, pairs: ScoredPairs) -> None:
        self._log(pairs)

    def _log(self, batch: Loss | ScoredPairs) -> None:
        """Reports dense tokens per packed token, and the share of forwards that ran dense."""
        packed = [report for report in self._forwards if report is not None and report.packed]
        batch.log("dense_share", len(self._forwards) - len(packed), len(self._forwards))
        batch.log("token_ratio", sum(r.dense_tokens for r in packed), sum(r.packed_tokens for r in packed))


def _is_deferred(trainer: TrainerView) -> bool:
    """Returns whether the model cannot run before training has prepared it: its parameters are, or will be, sharded."""
    args = trainer.args
    return bool(args.deepspeed or args.fsdp or getattr(args, "deepspeed_plugin", None)) or trainer.num_processes > 1


def _refusal(call: LogpsCall) -> str | None:
    """Returns why TRL's request goes beyond text, or None."""
    if call.extra.get("compute_aux_loss") or call.extra.get("output_router_logits"):
        return _ROUTER_LOSS
    for name, value in call.extra.items():
        # Types of tokens say which ones stand for an image. All of them are 0 in a batch of text.
        is_text = name in _TOKEN_TYPES and torch.is_tensor(value) and not value.any()
        is_data = torch.is_tensor(value) or (isinstance(value, (list, tuple)) and any(value))
        if is_data and not is_text:
            return f"the batch carries {name}; only text can be shared. Leave the plugin out"
    return None
