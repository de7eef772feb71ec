"""The plugin: measurements and their archive, gradients of single rewards, and the weights that follow from both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext_hooks import (
    Config,
    Loss,
    Need,
    Plugin,
    Refuse,
    Require,
    Requirement,
    Rewards,
    Round,
    Scored,
    TrainerView,
    UsageError,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.losses import clipped_surrogate, importance_ratio

from .maths import (
    clipped_gradients,
    contribution,
    front,
    influences,
    moved_weights,
    multiplier,
    single_advantages,
)


class DynamicWeights(Plugin):
    """Dynamic reward weighting for GRPOTrainer and RLOOTrainer."""

    name = "dynamic-weights"
    paper = "arXiv 2509.11452"
    bibtex = """@misc{dynamicweights2025,
      title = {{Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting}},
      eprint = {2509.11452},
      archivePrefix = {arXiv},
      year = {2025},
    }"""
    summary = "moves the weights of several rewards during training, by hypervolume or by gradients"
    trainers = ("grpo", "rloo")
    fields = ("dynamic_weights_advantages",)
    state = ("weights", "influence", "reference", "units", "archive", "factor", "moments")

    @dataclass(frozen=True)
    class Options:
        way: Literal["hypervolume", "gradient"] = option(
            "hypervolume", help="multiply advantages after a gain of hypervolume, or move weights", source="ours"
        )
        measure: Literal["train", "eval"] = option(
            "train",
            help="hypervolume: measure the rewards of each training round, or of evaluations",
            source="ours; authors: validation after every step",
        )
        normalise: bool = option(
            True, help="hypervolume: measure in deviations of the reward in the first measurement", source="ours"
        )
        regularization: float = option(
            1e-5, gt=0, help="gradient: weights move by learning rate / this", source="authors' code"
        )
        parameters: str = option(
            "",
            help="gradient: regular expression of the names of parameters to look at; empty = all that train",
            source="ours; authors: layers 10 to 25 of Qwen3-8B",
        )

        def __post_init__(self) -> None:
            try:
                re.compile(self.parameters)
            except re.error as error:
                raise ValueError(f"parameters={self.parameters!r} is not a regular expression: {error}") from error

    options: Options

    def start(self) -> None:
        # the gradient way: weights (K,) that add up to 1, and what moved them last
        self.weights: list[float] | None = None
        self.influence: list[float] | None = None
        # the hypervolume way: the first measurement, what counts as 1 of each objective, the front and the factor
        self.reference: list[float] | None = None
        self.units: list[float] = []
        self.archive: list[list[float]] = []
        self.factor = 1.0
        self.moments: list[list[float]] | None = None  # of evaluations that no training round has used yet
        self._gradients: torch.Tensor | None = None  # (K, P), summed over tokens of this process since the last step
        self._tokens = 0.0

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        if self.options.way == "gradient":
            yield from self._gradient_requirements(config)
        elif self.options.measure == "eval":
            if config.args.eval_strategy == "no":
                yield Refuse(
                    'dynamic-weights.measure="eval" needs evaluations, and eval_strategy is "no".',
                    'Set eval_strategy="steps" and eval_steps, or dynamic-weights.measure="train".',
                )
            elif not config.args.eval_on_start:
                yield Warn("the first evaluation is the reference; eval_on_start=True takes it before training")

    def _gradient_requirements(self, config: Config) -> Iterator[Requirement]:
        args = config.args
        yield Need("whole_parameters")
        yield Require("fp16", (False,), why="its loss scale does not reach the gradients of single rewards; use bf16")
        if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            yield Refuse(
                "reentrant checkpointing allows one backward pass per forward, and every reward takes one.",
                "Set gradient_checkpointing_kwargs={'use_reentrant': False}, or gradient_checkpointing=False.",
            )
        weights = args.reward_weights or ()
        if any(weight < 0 for weight in weights) or (weights and not any(weights)):
            yield Refuse(
                f"reward_weights={list(weights)} must not be negative, and one must be above 0.",
                "Turn the reward around instead of its weight.",
            )
        if config.reward_names is not None and len(config.reward_names) == 1:
            yield Warn("one reward function has nobody to share the weight with; weights stay as they are")
        rate = args.learning_rate / self.options.regularization
        if rate > 1:
            yield Warn(
                f"learning_rate={args.learning_rate:g} / dynamic-weights.regularization="
                f"{self.options.regularization:g} is {rate:g}, so one step may move all weight to one reward; the "
                f"authors have 0.1"
            )

    @hookimpl
    def setup(self, trainer: TrainerView) -> list[Refuse]:
        """Finds the parameters of the gradient way."""
        named = [(name, value) for name, value in trainer.unwrapped_model.named_parameters() if value.requires_grad]
        self._parameters = [value for name, value in named if re.search(self.options.parameters, name)]
        if self._parameters:
            return []
        return [
            Refuse(
                f"no parameter that trains has a name with dynamic-weights.parameters={self.options.parameters!r}.",
                f"Names look like {named[0][0] if named else 'nothing, as none trains'}.",
            )
        ]

    # --- by hypervolume ---

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor | None:
        if self.options.way == "gradient":
            self._log_weights(round)
            return None
        if (round.mode == "eval") == (self.options.measure == "eval"):
            self._collect(round.rewards)
        if round.mode == "eval":
            return None
        if self.moments is not None:
            self._measured(round, torch.tensor(self.moments, dtype=torch.float64))
            self.moments = None
        round.log("factor", self.factor)
        return round.advantages * self.factor

    def _collect(self, rewards: torch.Tensor) -> None:
        """Adds count, sum and sum of squares of each reward (N, K) to the moments."""
        values, valid = rewards.double(), ~rewards.isnan()
        moments = torch.stack([valid.double(), values.nan_to_num(), values.nan_to_num().square()]).sum(dim=1)  # (3, K)
        before = 0.0 if self.moments is None else moments.new_tensor(self.moments)
        self.moments = (moments + before).tolist()

    def _measured(self, round: Round, moments: torch.Tensor) -> None:
        """Compares a measurement with those before it. One without a value of some objective is passed over."""
        count, total, squares = moments  # (K,) each
        if not bool((count > 0).all()):
            return
        means = total / count
        # rewards with a negative weight are the better the smaller they are
        sign = torch.where(round.reward_weights.cpu() < 0, -1.0, 1.0).double()
        if self.reference is None:
            spread = (squares / count - means.square()).clamp(min=0.0).sqrt()
            # a mean of squares is off by rounding, so a reward without spread is told by its size
            known = spread > 1e-6 * means.abs().clamp(min=1.0)
            self.units = torch.where(known & torch.tensor(self.options.normalise), spread, 1.0).tolist()
        point: list[float] = (sign * means / torch.tensor(self.units, dtype=torch.float64)).tolist()
        for name, value in zip(round.reward_names, means.tolist(), strict=True):
            round.log(f"objective/{name}", value)
        if self.reference is None:
            self.reference = point
            return
        gain = contribution(point, self.archive, self.reference)
        self.factor = multiplier(gain)
        if gain > 0:
            self.archive = [list(corner) for corner in front([*self.archive, point])]
        round.log("contribution", gain)
        round.log("front", len(self.archive))

    # --- by gradients ---

    @hookimpl
    def rewards(self, scored: Scored) -> Rewards | None:
        if self.options.way != "gradient" or scored.mode != "train":
            return None  # evaluations keep the trainer's weights, so that they can be compared
        total = scored.reward_weights.double().sum()
        if self.weights is None:
            self.weights = (scored.reward_weights.double() / total).tolist()
        weights = total * torch.tensor(self.weights, dtype=torch.float64, device=total.device)
        return Rewards(scored.rewards, scored.reward_names, weights.to(scored.reward_weights.dtype))

    def _log_weights(self, round: Round) -> None:
        for label, values in (("weight", self.weights), ("influence", self.influence)):
            if values is not None:
                for name, value in zip(round.reward_names, values, strict=True):
                    round.log(f"{label}/{name}", value)

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        if self.options.way != "gradient" or round.mode != "train":
            return {}
        rloo = round.trainer.kind == "rloo"
        scale = "none" if rloo else round.trainer.args.scale_rewards
        single = single_advantages(round.rewards, round.group_ids, scale=scale, leave_one_out=rloo)
        return {"dynamic_weights_advantages": single[round.local]}

    @hookimpl
    def loss_terms(self, loss: Loss) -> dict[str, Any]:
        """Adds up the gradient of the policy loss under each reward alone. The loss stays as it is."""
        if self.options.way != "gradient" or loss.mode != "train":
            return {}
        ratio = importance_ratio(loss.per_token_logps, loss.old_per_token_logps, loss.mask)
        rows = []
        for advantages in loss.batch["dynamic_weights_advantages"].T:  # (m,)
            surrogate = clipped_surrogate(ratio, advantages.unsqueeze(1), *loss.clip_range)
            if loss.sampling_ratio is not None:
                surrogate = surrogate * loss.sampling_ratio
            alone = (surrogate * loss.mask).sum()
            parts = torch.autograd.grad(
                alone, self._parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([part.float().flatten() for part in parts]))
        gradients = torch.stack(rows)
        self._gradients = gradients if self._gradients is None else self._gradients.add_(gradients)
        self._tokens += float(loss.mask.sum())
        return {}

    @hookimpl
    def optimizer_step(self, trainer: TrainerView) -> None:
        if self.options.way != "gradient":
            return
        assert self._gradients is not None and self.weights is not None  # every step has a loss, and that a round
        # gradients and not their products are added up, so that processes and micro-batches change no number
        gradients = trainer.reduce(self._gradients)
        tokens = trainer.reduce(self._gradients.new_tensor(self._tokens)).clamp(min=1)
        self._gradients, self._tokens = None, 0.0
        influence = influences(clipped_gradients(gradients / tokens, trainer.args.max_grad_norm)).double().cpu()
        if not torch.isfinite(influence).all():
            raise UsageError(
                f"gradients of single rewards are not finite (influences {influence.tolist()}), so the training has "
                f"diverged. Lower learning_rate."
            )
        before = torch.tensor(self.weights, dtype=torch.float64)
        rate = trainer.learning_rate / self.options.regularization
        self.weights, self.influence = moved_weights(before, influence, rate).tolist(), influence.tolist()
