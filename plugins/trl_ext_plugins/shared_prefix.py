"""Shared-prefix forward: what the rows of a micro-batch share is computed once, exactly.

All completions of a prompt start with the same tokens, and a dense forward computes these for every one of them, in the
policy, old and reference passes and again in the backward. Here the rows of a micro-batch become a prefix tree, packed
into one row; attention runs over the tree and its parts are merged by their log-sum-exp (`trl_ext.shared_prefix`).
Log-probabilities, entropies and gradients stay the dense ones up to rounding.

Stages: logps. The rows of a group are kept next to each other, so that a micro-batch shares as much as its size allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext.shared_prefix import RefusedError, Report, shared_prefix_logps, shared_prefix_scores
from trl_ext_hooks import (
    Config,
    Logps,
    LogpsCall,
    Loss,
    Need,
    Plugin,
    Requirement,
    ScoredPairs,
    TrainerView,
    Warn,
    hookimpl,
    option,
)


@dataclass(frozen=True)
class SharedPrefixOptions:
    backend: Literal["auto", "flash_attn", "aten", "math"] = option(
        "auto", help="attention kernels: flash_attn on CUDA, aten on a CPU, math anywhere but slow", source="ours"
    )
    min_gain: float = option(
        1.1, help="dense tokens per packed token below which the dense forward runs; 0 packs always", source="ours"
    )
    on_refusal: Literal["error", "dense"] = option(
        "error",
        help="for a model or batch that cannot be shared exactly: stop, or run dense and count it",
        source="ours",
    )
    check: bool = option(True, help="compare with the dense forward the first time a model is used", source="ours")

    def __post_init__(self) -> None:
        if self.min_gain < 0:
            raise ValueError("min_gain must not be negative")


class SharedPrefix(Plugin):
    """Owner of the log-probability forward of GRPO, RLOO and DPO."""

    name = "shared-prefix"
    paper = "none; see trl_ext.shared_prefix"
    summary = "computes what the rows of a micro-batch share once, exactly"
    trainers = ("grpo", "rloo", "dpo")
    Options = SharedPrefixOptions

    options: SharedPrefixOptions

    def __init__(self, options: SharedPrefixOptions | None = None) -> None:
        super().__init__(options)
        self._reports: list[Report] = []
        self._args: Any = None

    @hookimpl
    def setup(self, trainer: TrainerView) -> None:
        self._args = trainer.args

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        found: list[Requirement] = []
        if config.kind == "dpo":
            return found
        found.append(Need("grouped_order"))
        args = config.args
        rows, group = args.per_device_train_batch_size, args.num_generations
        if rows < group:
            found.append(
                Warn(f"a micro-batch holds {rows} of the {group} rows of a group; more rows at once would share more")
            )
        if (args.steps_per_generation or 1) > args.gradient_accumulation_steps:
            found.append(Warn("groups stay together, so an optimizer step sees fewer distinct prompts"))
        if getattr(args, "loss_type", None) == "bnpo":
            found.append(Warn("bnpo averages inside a micro-batch, so keeping groups together changes it a little"))
        return found

    @hookimpl
    def logps(self, call: LogpsCall, compute: Any) -> Logps:
        refusal = self._refusal(call)
        if refusal is not None:
            if self.options.on_refusal == "error":
                raise RefusedError(f"shared-prefix cannot serve this run: {refusal}")
            return compute()
        self._reports = []
        if call.score_mask is not None:
            return self._pairs(call)
        step = call.batch_size or call.input_ids.size(0)
        parts = []
        for start in range(0, call.input_ids.size(0), step):
            rows = slice(start, start + step)
            logps, entropies, report = shared_prefix_logps(
                call.model,
                call.input_ids[rows],
                call.attention_mask[rows],
                call.logits_to_keep,
                compute_entropy=call.compute_entropy,
                **self._settings(call),
            )
            parts.append((logps, entropies))
            self._reports.append(report)
        logps = torch.cat([part[0] for part in parts])
        entropies = torch.cat([part[1] for part in parts if part[1] is not None]) if call.compute_entropy else None
        return Logps(logps, entropies)

    def _pairs(self, call: LogpsCall) -> Logps:
        scores, report = shared_prefix_scores(
            call.model,
            call.input_ids,
            call.attention_mask,
            score_mask=call.score_mask,
            compute_entropy=call.compute_entropy,
            **self._settings(call),
        )
        self._reports.append(report)
        fields = {name: values[:, 1:] for name, values in scores.items()}
        return Logps(fields.pop("log_probs"), fields.pop("entropy", None), extra=fields)

    def _settings(self, call: LogpsCall) -> dict[str, Any]:
        options = self.options
        return {
            "backend": None if options.backend == "auto" else options.backend,
            "min_gain": options.min_gain,
            "on_refusal": options.on_refusal,
            "check": options.check,
            "temperature": getattr(self._args, "temperature", None),
        }

    def _refusal(self, call: LogpsCall) -> str | None:
        """Why TRL's request goes beyond text, or None."""
        if call.extra.get("compute_aux_loss") or call.extra.get("output_router_logits"):
            return "the router's auxiliary loss would count shared tokens once instead of once per row; switch it off"
        images = [
            name for name, value in call.extra.items() if torch.is_tensor(value) or (name == "num_images" and value)
        ]
        if images:
            return f"the batch carries {images[0]}; only text can be shared. Leave the plugin out"
        return None

    @hookimpl
    def loss_metrics(self, loss: Loss) -> dict[str, tuple[float, float]]:
        return self._shares()

    @hookimpl
    def pair_metrics(self, pairs: ScoredPairs) -> dict[str, tuple[float, float]]:
        return self._shares()

    def _shares(self) -> dict[str, tuple[float, float]]:
        """Dense tokens per packed token, and the share of forwards that ran dense."""
        ran = [report for report in self._reports if report.packed]
        metrics = {"dense_share": (float(len(self._reports) - len(ran)), float(len(self._reports)))}
        if ran:
            metrics["token_ratio"] = (float(sum(r.dense_tokens for r in ran)), float(sum(r.packed_tokens for r in ran)))
        return metrics
