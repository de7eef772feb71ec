"""P3O: Pairwise Proximal Policy Optimization (arXiv 2310.00212).

A reward model trained on comparisons is defined up to a constant per prompt, so a step should depend on differences of
rewards only. P3O takes two completions of a prompt and follows the policy gradient of their difference, with sequence
ratios and clipping, and no critic. V1 clips the two completions separately, V2 their log-ratio difference jointly; the
token-wise form of the authors' later code is the third variant.

Stages: batch_fields (rewards of each row), policy_loss; advantages are not used. Against the authors' code: all pairs
of a group instead of one pair per prompt, so that any `num_generations` works (on-policy and without KL this is RLOO);
rewards are not divided by their running deviation, because that undoes the invariance; only completion tokens count,
where their mask runs one token late; the mean is taken over the pairs of the whole round, so that micro-batches and
processes with fewer valid pairs weigh less; a correction for another sampler (vLLM) weighs gradients as in TRL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext_hooks import Config, Loss, Need, Plugin, PolicyLoss, Requirement, Round, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_pairs
from trl_ext_hooks.toolkit.losses import scale_gradient

Pairwise = tuple[torch.Tensor, torch.Tensor]
"""(P,) values of the first and of the second completion of P pairs."""


@dataclass(frozen=True)
class P3OOptions:
    """Options of P3O. Its KL factor replaces the trainer's `beta`, its clip range the trainer's `epsilon`."""

    variant: Literal["v1", "v2", "v2_token"] = option(
        "v2", help="clip the two completions separately, jointly, or jointly per token", source="authors' later code"
    )
    cliprange: float = option(
        0.2, help="clip range: of each ratio in v1, in nats of the log-ratio in v2; 0.05 .. 0.3", source="authors' code"
    )
    cliprange_ratio: float = option(
        10.0, help="importance weights are clamped to [1/c, c]; 1 .. 10", source="authors' code"
    )
    kl_coef: float = option(
        0.05, help="factor of the KL term inside the reward difference; 0 .. 0.2", source="authors' HH runs"
    )
    kl_source: Literal["current", "rollout"] = option(
        "current", help="policy whose log-ratio to the reference is the KL term", source="authors' code; paper: rollout"
    )
    reward_clip: float | None = option(
        10.0,
        help="rewards are clipped to +- this; null clips nothing and keeps the invariance to large shifts",
        source="authors' code",
    )
    reward_scale: Literal["none", "running", "running_diff"] = option(
        "none",
        help="divide rewards by nothing, by the deviation of all rewards so far, or by that of their differences in "
        "pairs (which keeps the invariance to shifts per prompt)",
        source="ours; authors: running",
    )

    def __post_init__(self) -> None:
        if self.cliprange < 0 or self.cliprange_ratio < 1 or self.kl_coef < 0:
            raise ValueError("cliprange and kl_coef must not be negative, cliprange_ratio must be at least 1")
        if self.reward_clip is not None and self.reward_clip <= 0:
            raise ValueError("reward_clip must be greater than 0, or null")


# --- the mathematics --------------------------------------------------------------------------------------------------


def reward_gap(rewards: Pairwise, scores: Pairwise, kl_coef: float) -> torch.Tensor:
    """q = r1 - r2 - kl_coef * (S1 - S2), without gradient.

    Args:
        rewards: (P,) each.
        scores: (P,) each, sums over completion tokens of log pi - log pi_ref.
    """
    return (rewards[0] - rewards[1] - kl_coef * (scores[0] - scores[1])).detach()


def importance(log_ratio: torch.Tensor, cliprange_ratio: float) -> torch.Tensor:
    """cl(exp(x)): the ratio clamped to [1/c, c], without gradient."""
    return log_ratio.detach().exp().clamp(1 / cliprange_ratio, cliprange_ratio)


def separate_clipping(
    log_ratios: Pairwise, gap: torch.Tensor, cliprange: float, cliprange_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """V1. With w = exp(S - O) per completion, each one is clipped as in PPO and weighed by the other's ratio:

    ( max(-q cl(w2) w1, -q cl(w2) clip(w1)) + max(q cl(w1) w2, q cl(w1) clip(w2)) ) / 2,  clip(w) to 1 +- cliprange.

    Args:
        log_ratios: (P,) each, S - O: policy over sampling policy, summed over the completion.
        gap: (P,) q.

    Returns:
        (P,) loss per pair, and the share of its two sides whose gradient is clipped. A ratio that explodes against q is
        not bounded; V2 bounds it.
    """
    values, clipped = torch.zeros_like(gap), torch.zeros_like(gap)
    for own, other, sign in ((0, 1, -1), (1, 0, 1)):
        weight = sign * gap * importance(log_ratios[other], cliprange_ratio)
        ratio = log_ratios[own].exp()
        free, bound = weight * ratio, weight * ratio.clamp(1 - cliprange, 1 + cliprange)
        values = values + torch.maximum(free, bound) / 2
        clipped = clipped + (bound > free) / 2
    return values, clipped


def joint_clipping(
    log_ratios: Pairwise, old_scores: Pairwise, gap: torch.Tensor, cliprange: float, cliprange_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """V2. With u = cl(w1 w2), D = S1 - S2 and D0 = O1 - O2:

    max(-q u D, -q u clamp(D, D0 - cliprange, D0 + cliprange)) / 2.

    Args:
        log_ratios: (P,) each, S - O.
        old_scores: (P,) each, O: the sums under the sampling policy.
        gap: (P,) q.

    Returns:
        (P,) loss per pair, and 1 where its gradient is clipped.
    """
    weight = -gap * importance(log_ratios[0] + log_ratios[1], cliprange_ratio)
    old, moved = old_scores[0] - old_scores[1], log_ratios[0] - log_ratios[1]
    # the clamp is on D - D0, so that no rounding of large sums decides about it
    free, bound = weight * (old + moved), weight * (old + moved.clamp(-cliprange, cliprange))
    return torch.maximum(free, bound) / 2, (bound > free).to(gap.dtype)


def token_clipping(
    logps: Pairwise, old_logps: Pairwise, masks: Pairwise, gap: torch.Tensor, cliprange: float, cliprange_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token-wise form of V2: log-probabilities of single tokens in place of D, without the 1/2.

    sum_t max(-q u lp1, -q u clamp(lp1, old1 +- cliprange)) + sum_t max(q u lp2, q u clamp(lp2, old2 +- cliprange)).

    Args:
        logps, old_logps, masks: (P, T) each.
        gap: (P,) q.

    Returns:
        (P,) sums, to be divided by the number of tokens of both sides, and how many tokens are clipped.
    """
    moved = [(new - old) * mask for new, old, mask in zip(logps, old_logps, masks, strict=True)]
    weight = -gap * importance(moved[0].sum(1) + moved[1].sum(1), cliprange_ratio)
    values, clipped = torch.zeros_like(gap), torch.zeros_like(gap)
    for side, sign in ((0, 1), (1, -1)):
        factor = sign * weight.unsqueeze(1)
        free = factor * (old_logps[side] + moved[side])
        bound = factor * (old_logps[side] + moved[side].clamp(-cliprange, cliprange))
        values = values + (torch.maximum(free, bound) * masks[side]).sum(1)
        clipped = clipped + ((bound > free) * masks[side]).sum(1)
    return values, clipped


@dataclass
class RunningMoments:
    """Count, mean and sum of squared deviations of all values seen (Chan's update of Welford's method)."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: torch.Tensor) -> None:
        """Adds (n,) finite values."""
        if not len(values):
            return
        values, count = values.double(), len(values)
        mean = values.mean().item()
        total, delta = self.count + count, mean - self.mean
        self.squares += ((values - mean) ** 2).sum().item() + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased, at least 1e-4; 1 before there are two values."""
        return max((self.squares / (self.count - 1)) ** 0.5, 1e-4) if self.count > 1 else 1.0


# --- the plugin -------------------------------------------------------------------------------------------------------


class P3O(Plugin):
    """P3O for GRPOTrainer and RLOOTrainer."""

    name = "p3o"
    paper = "arXiv 2310.00212"
    summary = "replaces the loss by a clipped policy gradient of reward differences between completions of a prompt"
    trainers = ("grpo", "rloo")
    Options = P3OOptions
    needs = ("whole_groups",)
    claims = ("no_advantages",)
    fields = ("p3o_rewards", "p3o_total")
    honours = ("vllm_importance_sampling_correction",)

    options: P3OOptions

    def __init__(self, options: P3OOptions | None = None) -> None:
        super().__init__(options)
        self.moments = RunningMoments()
        self._seen: dict[str, tuple[float, float]] = {}

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        return [Need("ref_logps")] if self.options.kl_coef else []

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """The reward of every row, NaN where it is in no pair, and the pairs (or their tokens) per micro-batch."""
        rewards = (round.rewards.double() * round.reward_weights.double()).nansum(dim=1)  # (N,)
        rewards[torch.isnan(round.rewards).all(dim=1)] = torch.nan
        lengths = round.loss_mask.sum(dim=1)  # (b,)
        written = torch.tensor([len(ids) > 0 for ids in round.completion_ids], device=lengths.device)
        lengths, masked = round.trainer.gather(torch.stack([lengths, (written & (lengths == 0)).long()], dim=1)).T
        rewards[masked.bool()] = torch.nan  # a masked completion is not one of length 0
        keep = ~torch.isnan(rewards)
        first, second = group_pairs(round.group_ids, keep).T
        rewards = self._prepared(rewards, keep, first, second, round.mode)
        weight = lengths if self.options.variant == "v2_token" else torch.full_like(lengths, 0.5, dtype=torch.double)
        total = weight[first].sum() + weight[second].sum()
        parts = round.trainer.num_processes * (round.trainer.args.steps_per_generation if round.mode == "train" else 1)
        return {"p3o_rewards": rewards[round.local], "p3o_total": (total / parts).double()}

    def _prepared(
        self, rewards: torch.Tensor, keep: torch.Tensor, first: torch.Tensor, second: torch.Tensor, mode: str
    ) -> torch.Tensor:
        options = self.options
        if options.reward_clip is not None:
            rewards = rewards.clamp(-options.reward_clip, options.reward_clip)
        if options.reward_scale == "none":
            return rewards
        if mode == "train":
            gaps = rewards[first] - rewards[second]
            # both orders of a pair, so that the deviation does not depend on which one comes first
            self.moments.update(rewards[keep] if options.reward_scale == "running" else torch.cat([gaps, -gaps]))
        return rewards / self.moments.std

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        options, mask = self.options, loss.mask
        logps = scale_gradient(loss.per_token_logps, loss.sampling_ratio).double()
        old = loss.old_per_token_logps.double()
        reference = loss.batch["ref_per_token_logps"].double() if options.kl_coef else torch.zeros_like(old)
        rewards = loss.batch["p3o_rewards"]
        log_ratios, old_scores = ((logps - old) * mask).sum(1), ((old - reference) * mask).sum(1)  # (m,)
        scores = old_scores if options.kl_source == "rollout" else old_scores + log_ratios.detach()
        first, second = group_pairs(loss.group_ids, ~torch.isnan(rewards)).T

        def pairs(rows: torch.Tensor) -> Pairwise:
            return rows[first], rows[second]

        gap = reward_gap(pairs(rewards), pairs(scores), options.kl_coef)
        clip = (options.cliprange, options.cliprange_ratio)
        if options.variant == "v1":
            values, clipped = separate_clipping(pairs(log_ratios), gap, *clip)
        elif options.variant == "v2":
            values, clipped = joint_clipping(pairs(log_ratios), pairs(old_scores), gap, *clip)
        else:
            values, clipped = token_clipping(pairs(logps), pairs(old), pairs(mask), gap, *clip)
        total = max(loss.batch["p3o_total"].item(), 1e-9)  # 0 where the round has no pair, and then all sums are 0
        self._seen = {
            "pairs": (len(gap), 1),
            "reward_gap": (gap.abs().sum().item(), len(gap)),
            "clipped": (clipped.sum().item() / total, 1),
            "log_ratio_max": (log_ratios.detach().abs().max().item(), 1),
        }
        if options.kl_coef:
            self._seen["kl"] = ((old_scores + log_ratios.detach()).sum().item(), len(scores))
        return PolicyLoss((values.sum() / total).to(loss.per_token_logps.dtype))

    @hookimpl
    def loss_metrics(self, loss: Loss) -> dict[str, tuple[float, float]]:
        """Pairs, mean |q|, clipped share, largest |log-ratio| to the sampling policy, mean KL estimate per row."""
        return self._seen

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return vars(self.moments).copy()

    @hookimpl
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments = RunningMoments(**state)
