"""The plugins DRPO and DisCO, which share everything but the weights of right answers and the options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext_hooks import (
    Config,
    Loss,
    Plugin,
    PolicyLoss,
    Refuse,
    Requirement,
    RewardName,
    Round,
    Span,
    StepBatch,
    TrainerView,
    Views,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.losses import scale_gradient

from .maths import (
    KlEstimate,
    Score,
    completion_scores,
    constraint_factor,
    contrast,
    group_softmax,
    kl_values,
    length_logits,
)


@dataclass(frozen=True)
class StepWeights:
    """Holds what the losses of an optimizer step share.

    Attributes:
        slopes: By micro-batch of this process, (m,) dJ/ds of its rows.
        offset: J minus the sum of slopes * s. It makes the reported loss the value of the objective.
        factor: Weight of the constraint.
        tokens: Tokens of the step that the loss counts.
        micro_batches: Micro-batches of the step on all processes.
    """

    slopes: tuple[torch.Tensor, ...]
    offset: torch.Tensor
    factor: torch.Tensor
    tokens: torch.Tensor
    micro_batches: int


@dataclass(frozen=True)
class SharedOptions:
    """Options of both methods."""

    correct_reward: RewardName | None = option(
        None, help="reward function that says what is right, by default the first", source="ours"
    )
    correct_threshold: float = option(0.0, help="an answer is right when its reward is above it", source="ours")
    kl_limit: float = option(1e-4, ge=0, help="delta: KL to the sampling policy that is free", source="authors' script")
    kl_penalty: float = option(1e3, ge=0, help="beta: weight of the KL above the limit", source="authors' script")
    kl_estimate: KlEstimate = option(
        "kl", help="signed log-ratio, or the estimate that is never negative", source="authors' script"
    )


class _Contrast(Plugin):
    """What DRPO and DisCO share: classes of answers, the weights of a step, and the loss."""

    trainers = ("grpo", "rloo")
    needs = ("grouped_steps",)
    claims = ("no_advantages", "reward_labels")
    fields = ("contrast_right", "contrast_counted")
    honours = ("vllm_importance_sampling_correction",)

    options: Any
    score: Score = "logL"
    tau: float

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        options, args = self.options, config.args
        names = config.reward_names or ()
        if len(names) > 1:
            judge = options.correct_reward or names[0]
            others = ", ".join(name for name in names if name != judge)
            yield Warn(f"{judge!r} alone says what is right (correct_reward), and {others} only logged")
        updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
        if updates <= 1:
            what = "the KL to the policy that sampled is 0 and its constraint never acts"
            if self.score == "Lratio":
                what += ", all ratios are 1 and all wrong answers weigh the same"
            whole = args.per_device_train_batch_size * args.gradient_accumulation_steps % args.num_generations == 0
            slices = f"steps_per_generation={4 * args.gradient_accumulation_steps}" if whole else "num_iterations=4"
            yield Warn(f"with one update per generation {what}; the authors make 4 updates, as {slices} does")

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        return {"contrast_right": self._right(round), "contrast_counted": self._counted(round)}

    def length_logits(self, lengths: torch.Tensor, trainer: TrainerView) -> torch.Tensor:
        """Returns log w of completions with (N,) tokens: (N,)."""
        return torch.zeros_like(lengths)

    def _right(self, round: Round) -> torch.Tensor:
        """Returns 1 for right and 0 for wrong answers of this process, NaN where there is no reward: (b,)."""
        reward = round.reward(self.options.correct_reward)[round.local].double()
        return torch.where(reward.isnan(), torch.nan, (reward > self.options.correct_threshold).double())

    def _counted(self, round: Round) -> torch.Tensor:
        """Marks the rows of this process that take part, without those that TRL or a plugin masked: (b,) bool."""
        wrote = torch.tensor([len(ids) > 0 for ids in round.completion_ids], device=round.loss_mask.device)
        return round.kept & ~(wrote & (round.loss_mask.sum(1) == 0))

    @hookimpl
    def step_statistics(self, step: StepBatch) -> StepWeights:
        """Computes the objective and the KL over all rows of the step. Collective."""
        options, trainer = self.options, step.trainer
        local = torch.cat([self._columns(loss) for loss in step.micro_batches])  # (rows, 6)
        everything = trainer.gather(local)
        counted = everything[:, 0] == 1
        groups, right, scores, lengths, kl_sums = everything[counted, 1:].T
        result = contrast(scores, right, groups, self.length_logits(lengths, trainer), self.tau)
        tokens = lengths.sum().clamp(min=1)
        kl = kl_sums.sum() / tokens
        step.log("objective", result.value)
        step.log("kl", kl)
        step.log("constraint_active", float(kl > options.kl_limit))
        step.log("mixed_prompts", result.mixed, result.prompts)
        for name, label in (("right", 1), ("wrong", 0)):
            step.log(f"length_{name}", lengths[right == label])
            step.log(f"score_{name}", scores[right == label])
        slopes = torch.zeros_like(everything[:, 0])
        slopes[counted] = result.slopes
        own = slopes[trainer.process_index * len(local) :][: len(local)]
        return StepWeights(
            slopes=own.split([len(loss.mask) for loss in step.micro_batches]),
            offset=result.value - (result.slopes * scores).sum(),
            factor=constraint_factor(kl, options.kl_limit, options.kl_penalty),
            tokens=tokens,
            micro_batches=len(step.micro_batches) * trainer.num_processes,
        )

    def _columns(self, loss: Loss) -> torch.Tensor:
        """Returns what the step has to know of each row of a micro-batch: (m, 6) float64."""
        logps, old, mask = loss.per_token_logps.double(), loss.old_per_token_logps.double(), loss.mask
        kl = (kl_values(logps, old, self.options.kl_estimate) * mask).sum(1)
        scores = completion_scores(logps, old, mask, self.score)
        known = [loss.batch["contrast_counted"], loss.group_ids, loss.batch["contrast_right"]]
        columns = [*known, scores, mask.sum(1), kl]
        return torch.stack([column.double() for column in columns], dim=1)

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        """Computes this micro-batch's share of -J + beta * max(KL - delta, 0) * KL, the bracket without gradient."""
        weights: StepWeights = loss.step_statistics[self.name]
        logps, old, mask = loss.per_token_logps.double(), loss.old_per_token_logps.double(), loss.mask
        corrected = scale_gradient(logps, loss.sampling_ratio)
        scores = completion_scores(corrected, old, mask, self.score)
        gained = (weights.slopes[loss.position] * scores).sum() + weights.offset / weights.micro_batches
        kl = (kl_values(logps, old, self.options.kl_estimate) * mask).sum() / weights.tokens
        # the mean over all micro-batches of the step is then their sum
        share = weights.micro_batches * (weights.factor * kl - gained)
        return PolicyLoss(share.to(loss.per_token_logps.dtype), "share")


class DRPO(_Contrast):
    name = "drpo"
    paper = "arXiv 2510.04474"
    bibtex = """@misc{drpo2025,
      title = {{DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization}},
      eprint = {2510.04474},
      archivePrefix = {arXiv},
      year = {2025},
    }"""
    summary = "raises right answers above wrong ones, and the short right ones most"

    @dataclass(frozen=True)
    class Options(SharedOptions):
        length_temperature: float = option(
            0.1,
            gt=0,
            help="lambda: the smaller, the more a short right answer outweighs a long one; 0.05 .. 1",
            source="authors' script",
        )
        tau: float = option(
            10.0, gt=0, help="the smaller, the more the most likely wrong answer counts", source="authors' script"
        )

    options: Options

    def start(self) -> None:
        self.tau = self.options.tau

    def length_logits(self, lengths: torch.Tensor, trainer: TrainerView) -> torch.Tensor:
        return length_logits(lengths, trainer.args.max_completion_length, self.options.length_temperature)

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        yield from super().configure(config)
        if config.args.max_completion_length is None:
            yield Refuse("lengths are shares of max_completion_length, which is None.", "Set max_completion_length.")

    @hookimpl
    def inspect(self, round: Round) -> Views:
        """Shows the share of each right answer in the pull on its group, which depends on lengths alone."""
        right, counted = round.trainer.gather(torch.stack([self._right(round), self._counted(round)], 1).double()).T
        logits = self.length_logits(round.lengths, round.trainer)
        shares = group_softmax(logits, round.group_ids, (right == 1) & (counted == 1))[round.local]
        labels = {1.0: "right", 0.0: "wrong"}
        rows = enumerate(zip(right[round.local].tolist(), shares.tolist(), round.completion_ids, strict=True))
        return Views(
            [
                Span(row, 0, len(ids), labels[answer], share if answer else None)
                for row, (answer, share, ids) in rows
                if answer in labels and ids
            ]
        )


class DisCO(_Contrast):
    name = "disco"
    paper = "arXiv 2505.12366"
    bibtex = """@misc{disco2025,
      title = {{DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization}},
      eprint = {2505.12366},
      archivePrefix = {arXiv},
      year = {2025},
    }"""
    summary = "raises right answers above wrong ones, as much on hard prompts as on easy ones"

    @dataclass(frozen=True)
    class Options(SharedOptions):
        score: Score = option(
            "logL", help="of a completion: mean log-probability, or mean ratio of its tokens", source="authors' script"
        )
        negatives: Literal["softmax", "mean"] = option(
            "softmax", help="likely wrong answers count more, or all the same (DisCO-b)", source="paper"
        )
        tau: float | None = option(
            None,
            gt=0,
            help="temperature of that softmax; by default 10 for logL and 1 for Lratio",
            source="authors' script",
        )

        def __post_init__(self) -> None:
            if self.negatives == "mean" and self.tau is not None:
                raise ValueError("negatives='mean' has no temperature; leave tau out, or set negatives='softmax'")

    options: Options

    def start(self) -> None:
        self.score = self.options.score
        default = 10.0 if self.score == "logL" else 1.0
        self.tau = math.inf if self.options.negatives == "mean" else self.options.tau or default
