"""TRPA: Trust Region Preference Approximation (arXiv 2504.04524).

Rules put every completion on a preference level (1 = format and answer right, larger is worse). Completions of one
prompt on different levels form pairs, and a DPO-like loss on length-averaged log-ratios to a fixed reference is
minimised, with a KL penalty to the policy that sampled them (the trust region). No reward magnitudes, no advantages, no
critic.

Stages: batch_fields (levels), policy_loss. Against the authors' code: pairs, tokens and the fallback are counted over
the whole round, not over a micro-batch, so that splitting it changes nothing; completions without a token or a level
are left out, where an empty one made their whole batch NaN; a correction for another sampler (vLLM) weighs gradients as
in TRL. With one update per rollout the preference loss is exactly TRL's loss with the advantages -N * dL/d(log-ratio).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

from trl_ext_hooks import Config, Loss, Need, Plugin, PolicyLoss, Requirement, Round, Warn, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_pairs
from trl_ext_hooks.toolkit.losses import masked_mean, scale_gradient

KL_CLAMP = 10.0


@dataclass(frozen=True)
class TRPAOptions:
    """Options of TRPA. Its `beta` is the factor of the log-ratios, not the trainer's KL factor, which must be 0."""

    beta: float = option(0.1, help="factor of the log-ratio difference of a pair; 0.05 .. 1", source="main_TRPA.sh")
    anisotropy: float = option(
        2.5, help="extra factor of the pairs whose better side is on level 1; 1 .. 4", source="main_TRPA.sh"
    )
    tr_kl_coef: float = option(
        0.001,
        help="weight of the KL to the sampling policy; felt only with several updates per rollout; 0 .. 1",
        source="main_TRPA.sh",
    )
    use_sqrt_trkl: bool = option(False, help="penalise sqrt(KL + 0.25) in place of the KL", source="main_TRPA.sh")
    fallback: Literal["unary", "zero"] = option(
        "unary",
        help="a round without any pair: push rows on level 1 up and all others down, or learn nothing",
        source="authors' code",
    )
    ratio_reduction: Literal["mean", "sum"] = option(
        "mean", help="log-ratio of a completion: per token, or summed as in DPO", source="authors' code"
    )
    level_reward: str = option(
        "preference_level",
        help="reward function that returns the level: 1 is best, None leaves the completion out",
        source="ours",
    )
    levels: tuple[dict[str, float], ...] = option(
        (),
        help="in place of level_reward: one rule per level, best first, such as {format: 1, accuracy: 1} with names of "
        "reward functions; a completion is on the first level whose rewards it reaches, or one below the last",
        source="ours",
    )

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.anisotropy <= 0 or self.tr_kl_coef < 0:
            raise ValueError("beta and anisotropy must be greater than 0, tr_kl_coef must not be negative")
        for rule in self.levels:
            if not rule or not all(isinstance(least, int | float) for least in rule.values()):
                raise ValueError(f"levels must hold mappings of reward names to the least reward, got {rule!r}")


# --- the mathematics --------------------------------------------------------------------------------------------------


def rule_levels(rewards: torch.Tensor, names: Sequence[str], rules: Sequence[dict[str, float]]) -> torch.Tensor:
    """The level of every row by rules on its rewards.

    Args:
        rewards: (N, F); NaN = does not apply.
        names: The F names.
        rules: Per level, best first: the least reward by name.

    Returns:
        (N,) 1 + the index of the first rule that is met, `len(rules) + 1` where none is; NaN where a reward that some
        rule names is NaN.
    """
    level = torch.full_like(rewards[:, 0], len(rules) + 1.0)
    for place in range(len(rules), 0, -1):
        met = torch.ones_like(level, dtype=torch.bool)
        for name, least in rules[place - 1].items():
            met &= rewards[:, names.index(name)] >= least
        level[met] = float(place)
    used = sorted({names.index(name) for rule in rules for name in rule})
    level[torch.isnan(rewards[:, used]).any(dim=1)] = torch.nan
    return level


def log_ratio(
    logps: torch.Tensor, ref_logps: torch.Tensor, mask: torch.Tensor, reduction: Literal["mean", "sum"] = "mean"
) -> torch.Tensor:
    """rho[i] = mean (or sum) over completion tokens of log pi - log pi_ref; all (N, T) -> (N,). 0 without a token."""
    if reduction == "mean":
        return masked_mean(logps - ref_logps, mask, dim=1)
    return ((logps - ref_logps) * mask).sum(dim=1)


def preference_pairs(levels: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """All pairs of one group on different levels.

    Args:
        levels: (N,); NaN rows are in no pair.
        group_ids: (N,).

    Returns:
        (P, 2) row numbers, the better row first.
    """
    pairs = group_pairs(group_ids, ~torch.isnan(levels))
    first, second = levels[pairs[:, 0]], levels[pairs[:, 1]]
    pairs = torch.where((first < second).unsqueeze(1), pairs, pairs.flip(1))
    return pairs[first != second]


def pair_factors(levels: torch.Tensor, pairs: torch.Tensor, beta: float, anisotropy: float) -> torch.Tensor:
    """c = beta * anisotropy where the better row of a pair is on level 1, else beta; (N,), (P, 2) -> (P,)."""
    better = levels[pairs[:, 0]]
    return beta * torch.ones_like(better).masked_fill(better == 1, anisotropy)


def preference_losses(rho: torch.Tensor, pairs: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(c * (rho_better - rho_worse)).

    Args:
        rho: (N,) log-ratios.
        pairs: (P, 2), the better row first.
        factors: (P,) c.

    Returns:
        (P,) one loss per pair.
    """
    return -logsigmoid(factors * (rho[pairs[:, 0]] - rho[pairs[:, 1]]))


def unary_losses(rho: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The fallback -log sigmoid(+-rho), + on level 1, without beta; (N,) -> one loss per row that has a level."""
    known = ~torch.isnan(levels)
    sign = torch.where(levels == 1, 1.0, -1.0).to(rho)
    return -logsigmoid(sign * rho)[known]


def trust_region(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of the k3 estimate exp(d) - d - 1, d = log pi_old - log pi, clamped to +-10; (N, T) -> scalar.

    Value and gradient are exactly 0 where both policies agree; a clamped token has no gradient.
    """
    d = old_logps - logps
    return ((torch.expm1(d) - d).clamp(-KL_CLAMP, KL_CLAMP) * mask).sum()


# --- the plugin -------------------------------------------------------------------------------------------------------


class TRPA(Plugin):
    """TRPA for GRPOTrainer."""

    name = "trpa"
    paper = "arXiv 2504.04524"
    summary = "replaces the loss by preferences between completions on different levels, inside a trust region"
    trainers = ("grpo",)
    Options = TRPAOptions
    needs = ("whole_groups", "ref_logps")
    claims = ("no_advantages",)
    fields = ("preference_level", "trpa_pairs", "trpa_rows", "trpa_tokens")
    honours = ("vllm_importance_sampling_correction",)

    options: TRPAOptions

    def __init__(self, options: TRPAOptions | None = None) -> None:
        super().__init__(options)
        self._seen: dict[str, tuple[float, float]] = {}

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        options, args = self.options, config.args
        named = {name for rule in options.levels for name in rule} or {options.level_reward}
        found: list[Requirement] = [Need(f"reward:{name}") for name in sorted(named)]
        names = config.reward_names or ()
        weights = args.reward_weights or [1.0] * len(names)
        if not options.levels and options.level_reward in names and len(weights) == len(names):
            place = names.index(options.level_reward)
            if weights[place]:
                weights = [*weights[:place], 0.0, *weights[place + 1 :]]
                found.append(
                    Warn(f"a level is no reward; reward_weights={weights} keeps it out of the logged `reward`")
                )
        if options.tr_kl_coef and args.num_iterations == 1 and not _reuses(args):
            found.append(Warn("with one update per rollout the trust region does nothing; see num_iterations"))
        return found

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """The level of every row, NaN where it is left out, and what an average micro-batch of the round holds."""
        levels = self._levels(round).double()  # (N,)
        lengths = round.trainer.gather(round.loss_mask.sum(dim=1))  # (N,)
        levels[lengths == 0] = torch.nan
        pairs = preference_pairs(levels, round.group_ids)
        parts = round.trainer.num_processes * (round.trainer.args.steps_per_generation if round.mode == "train" else 1)

        def average(amount: torch.Tensor | int) -> torch.Tensor:
            return torch.as_tensor(amount, device=levels.device).double() / parts

        return {
            "preference_level": levels[round.local],
            "trpa_pairs": average(len(pairs)),
            "trpa_rows": average((~torch.isnan(levels)).sum()),
            "trpa_tokens": average(lengths.sum()),
        }

    def _levels(self, round: Round) -> torch.Tensor:
        if self.options.levels:
            return rule_levels(round.rewards, round.reward_names, self.options.levels)
        levels = round.rewards[:, round.reward_names.index(self.options.level_reward)].clone()
        wrong = levels[~torch.isnan(levels) & ((levels < 1) | (levels != levels.round()))]
        if len(wrong):
            raise ValueError(
                f"the reward function {self.options.level_reward!r} returned {wrong[0].item():g}, expected a "
                f"preference level: 1 for the best, 2, 3, ... for worse ones, or None to leave the completion out."
            )
        return levels

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        options, batch, mask = self.options, loss.batch, loss.mask
        logps, old = loss.per_token_logps.double(), loss.old_per_token_logps.double()
        reference, levels = batch["ref_per_token_logps"].double(), batch["preference_level"]
        rho = log_ratio(scale_gradient(logps, loss.sampling_ratio), reference, mask, options.ratio_reduction)  # (m,)
        pairs = preference_pairs(levels, loss.group_ids)
        fallback = not batch["trpa_pairs"]
        if not fallback:
            factors = pair_factors(levels, pairs, options.beta, options.anisotropy)
            preference = preference_losses(rho, pairs, factors).sum() / batch["trpa_pairs"]
        elif options.fallback == "unary":
            preference = unary_losses(rho, levels).sum() / batch["trpa_rows"].clamp(min=1e-9)
        else:
            preference = 0 * rho.sum()
        kl = trust_region(logps, old, mask) / batch["trpa_tokens"].clamp(min=1e-9)
        to_reference = trust_region(logps.detach(), reference, mask) / batch["trpa_tokens"].clamp(min=1e-9)
        seen = {"pairs": len(pairs), "fallback": fallback, "preference_loss": preference.detach()}
        seen |= {"kl_sampling": kl.detach(), "kl_reference": to_reference}
        if not fallback:  # like the loss, shares of a mean over the round's pairs
            better, worse = (rho.detach()[rows].sum() / batch["trpa_pairs"] for rows in pairs.T)
            seen |= {"margin": better - worse, "log_ratio_better": better, "log_ratio_worse": worse}
        self._seen = {name: (float(value), 1) for name, value in seen.items()}
        penalty = (kl + 0.25).sqrt() if options.use_sqrt_trkl else kl
        return PolicyLoss((preference + options.tr_kl_coef * penalty).to(loss.per_token_logps.dtype))

    @hookimpl
    def loss_metrics(self, loss: Loss) -> dict[str, tuple[float, float]]:
        """Pairs, share of micro-batches in a fallback, log-ratios of better and worse rows, KL to both policies."""
        return self._seen


def _reuses(args: object) -> bool:
    """Whether an optimizer step uses only a part of a round, so that later steps are off-policy."""
    steps: int = getattr(args, "steps_per_generation", None) or 1
    accumulation: int = getattr(args, "gradient_accumulation_steps", 1)
    return steps > accumulation
