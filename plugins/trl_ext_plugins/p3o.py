"""P3O: Pairwise Proximal Policy Optimization (arXiv 2310.00212).

A reward model trained on comparisons is defined up to a constant per prompt, so a step should depend on differences of
rewards only. P3O takes two completions of a prompt and follows the policy gradient of their difference, with sequence
ratios and clipping, and no critic. V1 clips the two completions separately, V2 their difference, and the token-wise
form of the authors' later code token by token.

Stages: batch_fields (rewards of each row), policy_loss. Advantages are not used. Against the authors' code, all pairs
of a group count and not one per prompt (on-policy without KL this is RLOO). Rewards are not divided by their deviation,
which would undo the invariance. Only completion tokens count, where the authors' mask runs one token late. The mean is
over the pairs of the whole round, however it is split. A correction for another sampler (vLLM) works as in TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks import Config, Loss, Need, Plugin, PolicyLoss, Requirement, Round, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_pairs
from trl_ext_hooks.toolkit.losses import scale_gradient
from trl_ext_hooks.toolkit.moments import Moments, add_to_moments, running_std

Pairwise = tuple[torch.Tensor, torch.Tensor]
"""(P,) values of the first and of the second completion of P pairs.

S sums log pi - log pi_ref over a completion's tokens, O the same for the policy that sampled, and w is exp(S - O).
"""


def reward_gap(rewards: Pairwise, scores: Pairwise, kl_coef: float) -> torch.Tensor:
    """Returns (P,) q = r1 - r2 - kl_coef * (S1 - S2), without gradient."""
    return (rewards[0] - rewards[1] - kl_coef * (scores[0] - scores[1])).detach()


def importance(log_ratio: torch.Tensor, cliprange_ratio: float) -> torch.Tensor:
    """Returns cl(exp(x)): the ratio clamped to [1/c, c], without gradient."""
    return log_ratio.detach().exp().clamp(1 / cliprange_ratio, cliprange_ratio)


def separate_clipping(
    log_ratios: Pairwise, gap: torch.Tensor, cliprange: float, cliprange_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes V1: each completion is clipped as in PPO and weighed by the other's ratio.

    ( max(-q cl(w2) w1, -q cl(w2) clip(w1)) + max(q cl(w1) w2, q cl(w1) clip(w2)) ) / 2,  clip(w) to 1 +- cliprange.
    A ratio that explodes against q is not bounded here, as in the authors' code. V2 bounds it.

    Returns (P,) losses, and per pair the share of its two sides whose gradient is clipped.
    """
    losses, clipped = torch.zeros_like(gap), torch.zeros_like(gap)
    for side, other, sign in ((0, 1, -1), (1, 0, 1)):
        weight = sign * gap * importance(log_ratios[other], cliprange_ratio)
        ratio = log_ratios[side].exp()
        plain, bounded = weight * ratio, weight * ratio.clamp(1 - cliprange, 1 + cliprange)
        losses = losses + torch.maximum(plain, bounded) / 2
        clipped = clipped + (bounded > plain) / 2
    return losses, clipped


def joint_clipping(
    log_ratios: Pairwise, old_scores: Pairwise, gap: torch.Tensor, cliprange: float, cliprange_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes V2: with u = cl(w1 w2), D = S1 - S2 and D0 = O1 - O2, the difference of both completions is clipped.

    max(-q u D, -q u clamp(D, D0 - cliprange, D0 + cliprange)) / 2.
    Returns (P,) losses, and 1 for each pair whose gradient is clipped.
    """
    weight = -gap * importance(log_ratios[0] + log_ratios[1], cliprange_ratio)
    old, drift = old_scores[0] - old_scores[1], log_ratios[0] - log_ratios[1]
    # the clamp is on D - D0, so that no rounding of large sums decides about it
    plain, bounded = weight * (old + drift), weight * (old + drift.clamp(-cliprange, cliprange))
    return torch.maximum(plain, bounded) / 2, (bounded > plain).to(gap.dtype)


def token_clipping(
    logps: Pairwise, old_logps: Pairwise, masks: Pairwise, gap: torch.Tensor, cliprange: float, cliprange_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes the token-wise form of V2: log-probabilities of single tokens in place of D, without the 1/2.

    sum_t max(-q u lp1, -q u clamp(lp1, old1 +- cliprange)) + sum_t max(q u lp2, q u clamp(lp2, old2 +- cliprange)).

    Log-probabilities and masks are (P, T) per side. Returns (P,) sums, to be divided by the number of tokens of both
    sides, and how many tokens are clipped.
    """
    drifts = [(new - old) * mask for new, old, mask in zip(logps, old_logps, masks, strict=True)]
    weight = -gap * importance(drifts[0].sum(1) + drifts[1].sum(1), cliprange_ratio)
    losses, clipped = torch.zeros_like(gap), torch.zeros_like(gap)
    for side, sign in ((0, 1), (1, -1)):
        factor = sign * weight.unsqueeze(1)
        plain = factor * (old_logps[side] + drifts[side])
        bounded = factor * (old_logps[side] + drifts[side].clamp(-cliprange, cliprange))
        losses = losses + (torch.maximum(plain, bounded) * masks[side]).sum(1)
        clipped = clipped + ((bounded > plain) * masks[side]).sum(1)
    return losses, clipped


class P3O(Plugin):
    """P3O for GRPOTrainer and RLOOTrainer."""

    name = "p3o"
    paper = "arXiv 2310.00212"
    bibtex = """@misc{p3o2023,
      title = {{Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment}},
      eprint = {2310.00212},
      archivePrefix = {arXiv},
      year = {2023},
    }"""
    summary = "replaces the loss by a clipped policy gradient of reward differences between completions of a prompt"
    trainers = ("grpo", "rloo")
    needs = ("whole_groups",)
    claims = ("no_advantages",)
    fields = ("p3o_rewards", "p3o_total")
    honours = ("vllm_importance_sampling_correction",)
    state = ("moments",)

    @dataclass(frozen=True)
    class Options:
        """Options of P3O. Its KL factor replaces the trainer's `beta`, its clip range the trainer's `epsilon`."""

        variant: Literal["v1", "v2", "v2_token"] = option(
            "v2", help="clip completions separately, jointly, or jointly per token", source="authors' later code"
        )
        cliprange: float = option(
            0.2, ge=0, help="range of each ratio in v1, of the log-ratio in v2; 0.05 .. 0.3", source="authors' code"
        )
        cliprange_ratio: float = option(
            10.0, ge=1, help="importance weights are clamped to [1/c, c]; 1 .. 10", source="authors' code"
        )
        kl_coef: float = option(
            0.05, ge=0, help="factor of the KL term inside the reward difference; 0 .. 0.2", source="authors' HH runs"
        )
        kl_source: Literal["current", "rollout"] = option(
            "current", help="policy of the KL term's log-ratio to the reference", source="authors' code; paper: rollout"
        )
        reward_clip: float | None = option(
            10.0, gt=0, help="clips rewards to +- this; null keeps the invariance to any shift", source="authors' code"
        )
        reward_scale: Literal["none", "running", "running_diff"] = option(
            "none", help="divide by the deviation of all rewards or differences so far", source="ours; authors: running"
        )

    options: Options

    def start(self) -> None:
        self.moments: Moments = (0.0, 0.0, 0.0)

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        return [Need("ref_logps")] if self.options.kl_coef else []

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """Carries each row's reward, NaN where it is in no pair, and how many pairs (or tokens) a micro-batch holds."""
        options, rewards, lengths = self.options, round.total_reward, round.lengths  # (N,) each
        # a completion whose tokens TRL or a plugin masked, such as a truncated one, is not one of length 0
        wrote = torch.tensor([len(ids) > 0 for ids in round.completion_ids], device=lengths.device)
        masked = (wrote & (round.loss_mask.sum(1) == 0)) | ~round.kept
        rewards[round.trainer.gather(masked)] = torch.nan
        if options.reward_clip is not None:
            rewards = rewards.clamp(-options.reward_clip, options.reward_clip)
        paired = ~rewards.isnan()
        first, second = group_pairs(round.group_ids, paired).T
        if options.reward_scale != "none":
            if round.mode == "train":
                gaps = rewards[first] - rewards[second]
                # both orders of a pair, so that the deviation does not depend on which one comes first
                values = rewards[paired] if options.reward_scale == "running" else torch.cat([gaps, -gaps])
                self.moments = add_to_moments(self.moments, values)
            rewards = rewards / running_std(self.moments)
        pair_weights = (lengths[first] + lengths[second]).double() if options.variant == "v2_token" else paired[first]
        return {"p3o_rewards": rewards[round.local], "p3o_total": pair_weights.sum().double() / round.micro_batches}

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        """Computes the share of this micro-batch's pairs in the mean over the round's pairs."""
        options, mask, rewards = self.options, loss.mask, loss.batch["p3o_rewards"]
        logps = scale_gradient(loss.per_token_logps, loss.sampling_ratio).double()
        old = loss.old_per_token_logps.double()
        reference = loss.batch["ref_per_token_logps"].double() if options.kl_coef else torch.zeros_like(old)
        log_ratios, old_scores = ((logps - old) * mask).sum(1), ((old - reference) * mask).sum(1)  # (m,)
        scores = old_scores + log_ratios.detach()
        first, second = group_pairs(loss.group_ids, ~rewards.isnan()).T

        def pairs(rows: torch.Tensor) -> Pairwise:
            return rows[first], rows[second]

        kl_scores = old_scores if options.kl_source == "rollout" else scores
        gap = reward_gap(pairs(rewards), pairs(kl_scores), options.kl_coef)
        clip = (options.cliprange, options.cliprange_ratio)
        if options.variant == "v1":
            losses, clipped = separate_clipping(pairs(log_ratios), gap, *clip)
        elif options.variant == "v2":
            losses, clipped = joint_clipping(pairs(log_ratios), pairs(old_scores), gap, *clip)
        else:
            losses, clipped = token_clipping(pairs(logps), pairs(old), pairs(mask), gap, *clip)
        total = loss.batch["p3o_total"].clamp(min=1e-9)  # 0 where the round has no pair, and then all sums are 0
        loss.log("pairs", len(gap))
        loss.log("reward_gap", gap.abs())
        loss.log("clipped", clipped.sum() / total)
        loss.log("log_ratio_max", log_ratios.abs().max())
        if options.kl_coef:
            loss.log("kl", scores)
        return PolicyLoss((losses.sum() / total).to(loss.per_token_logps.dtype), "share")
