"""Reg-GRPO: regression on the advantage in place of a clipped surrogate (arXiv 2506.07464).

The log-ratio of a completion says how much likelier it has become since it was sampled. Standardised inside the group,
like the advantage, it is a prediction of the advantage, and the loss is the squared error. A completion gains until its
share of the group's log-ratios is that of the advantages, so that nothing has to be clipped.

Stages: batch_fields (rows and sizes of the round), policy_loss. The mean is over the groups of the whole round, however
it is split. A correction for another sampler (vLLM) weighs the gradient as in TRL.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks import (
    Config,
    Loss,
    Plugin,
    PolicyLoss,
    Requirement,
    Round,
    UsageError,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.groups import group_stats
from trl_ext_hooks.toolkit.losses import scale_gradient, sequence_log_ratio

TINY = 1e-12
"""Bounds a deviation from below where no floor does, so that its gradient is 0 and not infinite times 0."""


def group_sums(values: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each row's group, with gradient: (m,) -> (m,)."""
    index = torch.unique(group_ids, return_inverse=True)[1]
    return torch.zeros_like(values).index_add(0, index, values)[index]


def group_deviation(log_ratios: torch.Tensor, group_ids: torch.Tensor, ddof: int = 1) -> torch.Tensor:
    """Returns the standard deviation of each row's group, with gradient: (m,) -> (m,). At least `TINY`."""
    count = group_sums(torch.ones_like(log_ratios), group_ids)
    centred = log_ratios - group_sums(log_ratios, group_ids) / count
    variance = group_sums(centred**2, group_ids) / (count - ddof).clamp(min=1)
    return variance.clamp(min=TINY**2).sqrt()


def predicted_advantages(
    log_ratios: torch.Tensor, group_ids: torch.Tensor, *, std_floor: float = 0.0, eps: float = 1e-4, ddof: int = 1
) -> torch.Tensor:
    """Returns (rho - mean) / (max(std, std_floor) + eps) of every row's group, with gradient: (m,) -> (m,).

    All rho are 0 before the first update of a round. Without a floor the gradient would then be divided by eps.
    """
    count = group_sums(torch.ones_like(log_ratios), group_ids)
    std = group_deviation(log_ratios, group_ids, ddof).clamp(min=std_floor)
    return (log_ratios - group_sums(log_ratios, group_ids) / count) / (std + eps)


def regression_losses(predicted: torch.Tensor, advantages: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Returns (A - predicted)^2 / group size, (m,) each: summed and divided by the number of groups, it is the loss.

    A group with equal advantages prefers no row. Its rows give 0 and have no gradient.
    """
    stats = group_stats(advantages, group_ids)
    return torch.where(stats.constant, 0.0, (advantages - predicted) ** 2 / stats.count)


class RegGRPO(Plugin):
    name = "reg-grpo"
    paper = "arXiv 2506.07464"
    bibtex = """@misc{reggrpo2025,
      title = {{DeepVideo-R1: Video Reinforcement Fine-Tuning via Difficulty-aware Regressive GRPO}},
      eprint = {2506.07464},
      archivePrefix = {arXiv},
      year = {2025},
    }"""
    summary = "replaces the clipped loss by a regression of log-ratios on advantages"
    trainers = ("grpo", "rloo")
    needs = ("whole_groups", "old_logps")
    claims = ("row_advantages",)
    fields = ("reg_grpo_rows", "reg_grpo_groups", "reg_grpo_tokens")
    honours = ("beta", "vllm_importance_sampling_correction")

    @dataclass(frozen=True)
    class Options:
        std_floor: float = option(
            1e-2, ge=0, help="minimum deviation of log-ratios; smaller is a larger first step", source="ours"
        )
        eps: float = option(1e-4, gt=0, help="added to the deviation of log-ratios", source="ours, as TRL")
        reduction: Literal["sum", "mean"] = option(
            "sum", help="log-ratio of a completion: summed over its tokens, or their mean", source="paper"
        )

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        args = config.args
        if args.num_iterations == 1 and (args.steps_per_generation or 1) <= args.gradient_accumulation_steps:
            yield Warn(
                "with one update per rollout all log-ratios are 0, so nothing is regressed and the loss is a policy "
                "gradient divided by the floor; set num_iterations=2 or more"
            )

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """Carries which rows are compared, and how many groups and tokens an average micro-batch of the round has."""
        if round.advantages.dim() == 2:
            raise UsageError("an advantage per token has no log-ratio to be compared with; leave its plugin out.")
        rewarded = ~round.total_reward.isnan()[round.local]
        # a completion whose tokens TRL or a plugin masked, such as a truncated one, is not one of length 0
        wrote = torch.tensor([len(ids) > 0 for ids in round.completion_ids], device=rewarded.device)
        rows = rewarded & round.kept & ~(wrote & (round.loss_mask.sum(1) == 0))
        groups = round.group_ids[round.trainer.gather(rows)].unique().numel()
        return {
            "reg_grpo_rows": rows,
            "reg_grpo_groups": torch.tensor(groups / round.micro_batches, dtype=torch.float64),
            "reg_grpo_tokens": round.lengths.sum().double() / round.micro_batches,
        }

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        """Computes the share of this micro-batch's groups in the mean over the groups of the round."""
        options, batch, mask, rows = self.options, loss.batch, loss.mask, loss.batch["reg_grpo_rows"]
        logps = scale_gradient(loss.per_token_logps, loss.sampling_ratio).double()
        rho = sequence_log_ratio(logps, loss.old_per_token_logps.double(), mask, options.reduction)[rows]
        advantages, group_ids = loss.advantages.squeeze(1)[rows].double(), loss.group_ids[rows]
        predicted = predicted_advantages(rho, group_ids, std_floor=options.std_floor, eps=options.eps)
        errors = regression_losses(predicted, advantages, group_ids)
        total = errors.sum() / batch["reg_grpo_groups"].clamp(min=1e-9)  # 0 where no group can be compared
        std = group_deviation(rho.detach(), group_ids)
        loss.log("error", total)
        loss.log("log_ratio_std", std)
        loss.log("floored", std < options.std_floor)
        if loss.trainer.kind == "grpo" and loss.trainer.args.beta:
            drift = loss.batch["ref_per_token_logps"].double() - loss.per_token_logps.double()
            tokens = batch["reg_grpo_tokens"].clamp(min=1e-9)
            values = torch.expm1(drift) - drift
            if getattr(loss.trainer.args, "use_bias_correction_kl", False):  # as in TRL
                values = values * (loss.per_token_logps - loss.old_per_token_logps).double().exp()
            kl = (values * mask).sum() / tokens
            loss.log("kl", kl)
            total = total + loss.trainer.args.beta * kl
        return PolicyLoss(total.to(loss.per_token_logps.dtype), "share")
