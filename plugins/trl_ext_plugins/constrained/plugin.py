"""Constrained RLHF: options, checks, state and the hook."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trl_ext_hooks import Config, Need, Plugin, Refuse, Requirement, RewardName, Round, Warn, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_normalize

from .maths import Form, dual_step, mixed_advantages, multipliers, standardized


class Constrained(Plugin):
    name = "constrained"
    paper = "arXiv 2310.04373"
    bibtex = """@inproceedings{moskovitz2024confronting,
      title = {{Confronting Reward Model Overoptimization with Constrained RLHF}},
      author = {Moskovitz, Ted and Singh, Aaditya K. and Strouse, DJ and Sandholm, Tuomas and Salakhutdinov, Ruslan and
        Dragan, Anca D. and McAleer, Stephen},
      booktitle = {International Conference on Learning Representations},
      year = {2024},
      eprint = {2310.04373},
      archivePrefix = {arXiv},
    }"""
    summary = "keeps rewards at thresholds by learning their weights, and stays near the reference otherwise"
    trainers = ("grpo", "rloo")
    claims = ("estimator",)
    state = ("mu", "velocity")

    @dataclass(frozen=True)
    class Options:
        thresholds: dict[RewardName, float] = option(
            {}, help="the mean at which each constrained reward is kept", source="the user's"
        )
        form: Form = option(
            "equality",
            help="keep rewards at the threshold (tanh), or above it (sigmoid, or multipliers that are not squashed)",
            source="paper",
        )
        kl: bool = option(
            True, help="the KL to the reference is part of the objective; needs a reference policy", source="paper"
        )
        lagrange_lr: float = option(0.1, ge=0, help="step size of the multipliers; 0.01 .. 0.1", source="authors' code")
        momentum: float = option(0.1, ge=0, lt=1, help="momentum of their SGD", source="authors' code")
        max_grad_norm: float = option(0.5, gt=0, help="bound of their gradient's norm", source="authors' code")
        initial: float = option(0.0, help="dual variable of every reward at first", source="authors: N(0, 0.01)")
        limit: float = option(
            5.0, gt=0, help="largest dual variable; above 2 a squashed multiplier recovers slowly", source="ours"
        )
        batch_norm: bool = option(
            False, help="standardise every advantage over the batch before mixing", source="ours; authors: on"
        )

        def __post_init__(self) -> None:
            for name, threshold in self.thresholds.items():
                if not math.isfinite(threshold):
                    raise ValueError(f"the threshold of {name} must be a finite number, got {threshold}.")
            lowest = 0.0 if self.form == "unsquashed" else -self.limit
            if not lowest <= self.initial <= self.limit:
                raise ValueError(f"initial must be from {lowest:g} to {self.limit:g}, got {self.initial:g}.")

    options: Options

    def start(self) -> None:
        self.thresholds = torch.tensor(list(self.options.thresholds.values()), dtype=torch.float64)
        self.mu = torch.full_like(self.thresholds, self.options.initial)
        self.velocity = torch.zeros_like(self.mu)

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        options = self.options
        if not options.thresholds:
            yield Refuse("no reward has a threshold.", "Set one, such as --set constrained.thresholds='{length: 0.4}'.")
        if options.kl:
            yield Need("ref_logps")
            yield Need("old_logps")
            if config.kind == "grpo" and config.args.beta:
                yield Warn(
                    f"beta={config.args.beta} adds the KL to the loss again; set beta=0, or constrained.kl=false"
                )

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        options, names = self.options, list(self.options.thresholds)
        columns = [round.reward_index(name) for name in names]
        rewards = round.rewards[:, columns].double()  # (N, K)
        own_weights = round.reward_weights.double()
        parts = group_normalize(round.rewards.double(), round.group_ids)  # (N, F)
        unscored = round.rewards.isnan().all(dim=1)
        divergence = self.divergence(round).masked_fill(unscored | (round.lengths == 0), torch.nan)  # (N,)
        nearness = group_normalize(-divergence, round.group_ids)
        if options.batch_norm:
            parts, nearness = standardized(parts), standardized(nearness)
        weighed = parts * own_weights
        free = [index for index in range(len(round.reward_names)) if index not in columns]
        objective = nearness.nan_to_num(nan=0.0) + weighed[:, free].nansum(dim=1)
        weights = multipliers(self.mu, options.form)
        violations = (rewards.nanmean(dim=0) - self.thresholds.to(rewards)).cpu()
        for index, name in enumerate(names):
            round.log(f"multiplier/{name}", weights[index].item())
            round.log(f"violation/{name}", violations[index])
        if options.kl:
            round.log("kl", divergence[round.local])
        if round.mode == "train":
            self.mu, self.velocity = dual_step(
                self.mu,
                self.velocity,
                violations,
                options.form,
                learning_rate=options.lagrange_lr,
                momentum=options.momentum,
                max_grad_norm=options.max_grad_norm,
                limit=options.limit,
            )
        mixed = mixed_advantages(objective, weighed[:, columns], weights.to(weighed), options.form)
        return mixed.masked_fill(unscored, 0.0).to(round.rewards.dtype)

    def divergence(self, round: Round) -> torch.Tensor:
        """Returns sum_t log pi_old - log pi_ref of every completion: (N,), zeros without the KL. Collective."""
        if not self.options.kl:
            return torch.zeros_like(round.rewards[:, 0])
        gap = round.batch["old_per_token_logps"].double() - round.batch["ref_per_token_logps"].double()
        return round.trainer.gather((gap * round.loss_mask).sum(dim=1))
