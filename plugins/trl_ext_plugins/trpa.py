"""TRPA: Trust Region Preference Approximation (arXiv 2504.04524).

Rules put every completion on a preference level (1 = format and answer right, larger is worse). Completions of one
prompt on different levels form pairs, and a DPO-like loss on length-averaged log-ratios to a fixed reference is
minimised, with a KL penalty to the policy that sampled them (the trust region). No reward magnitudes, no advantages, no
critic.

Stages: batch_fields (levels), policy_loss. Against the authors' code, pairs, tokens and the fallback are counted over
the whole round, so that splitting it into micro-batches changes nothing. Completions without a token or a level are
left out, where an empty one made their whole batch NaN. A correction for another sampler (vLLM) weighs gradients as in
TRL. With one update per rollout the preference loss is exactly TRL's loss with the advantages -N * dL/d(log-ratio).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

from trl_ext_hooks import Config, Loss, Need, Plugin, PolicyLoss, Requirement, Round, UsageError, Warn, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_pairs
from trl_ext_hooks.toolkit.losses import scale_gradient, sequence_log_ratio

KL_CLAMP = 10.0


def rule_levels(rewards: torch.Tensor, names: Sequence[str], rules: Sequence[dict[str, float]]) -> torch.Tensor:
    """Returns the level of every row by rules on its rewards.

    Args:
        rewards: (N, F); NaN = does not apply.
        names: The F names.
        rules: Per level, best first: the minimum reward by name.

    Returns:
        (N,) 1 + the index of the first rule that is met, `len(rules) + 1` where none is; NaN where a reward that some
        rule names is NaN.
    """
    level = torch.full_like(rewards[:, 0], len(rules) + 1.0)
    for place in range(len(rules), 0, -1):  # the worst first, so that a better level overwrites it
        met = torch.ones_like(level, dtype=torch.bool)
        for name, minimum in rules[place - 1].items():
            met &= rewards[:, names.index(name)] >= minimum
        level[met] = float(place)
    used = sorted({names.index(name) for rule in rules for name in rule})
    level[torch.isnan(rewards[:, used]).any(dim=1)] = torch.nan
    return level


def given_levels(rewards: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the (N,) levels that a reward function gave: 1, 2, 3, ... or NaN; anything else is refused."""
    wrong = rewards[~rewards.isnan() & ((rewards < 1) | (rewards != rewards.round()))]
    if len(wrong):
        raise UsageError(
            f"the reward function {name!r} returned {wrong[0].item():g}, expected a preference level: 1 for the best, "
            f"2, 3, ... for worse ones, or None to leave the completion out."
        )
    return rewards.clone()


def preference_pairs(levels: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Returns all pairs of one group on different levels: (P, 2) row numbers, the better row first.

    Args:
        levels: (N,); NaN rows are in no pair.
        group_ids: (N,).
    """
    pairs = group_pairs(group_ids, ~torch.isnan(levels))
    first, second = levels[pairs[:, 0]], levels[pairs[:, 1]]
    pairs = torch.where((first < second).unsqueeze(1), pairs, pairs.flip(1))
    return pairs[first != second]


def pair_factors(levels: torch.Tensor, pairs: torch.Tensor, beta: float, anisotropy: float) -> torch.Tensor:
    """Returns c = beta * anisotropy where the better row of a pair is on level 1, else beta; (N,), (P, 2) -> (P,)."""
    better = levels[pairs[:, 0]]
    return beta * torch.ones_like(better).masked_fill(better == 1, anisotropy)


def preference_losses(rho: torch.Tensor, pairs: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Returns -log sigmoid(c * (rho_better - rho_worse)) of every pair; (N,), (P, 2) better row first, (P,) -> (P,)."""
    return -logsigmoid(factors * (rho[pairs[:, 0]] - rho[pairs[:, 1]]))


def unary_losses(rho: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Returns the fallback -log sigmoid(+-rho), + on level 1, without beta; (N,) -> one per row that has a level."""
    known = ~torch.isnan(levels)
    sign = torch.where(levels == 1, 1.0, -1.0).to(rho)
    return -logsigmoid(sign * rho)[known]


def trust_region(logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums the k3 estimate exp(d) - d - 1, d = log pi_old - log pi, clamped to +-10, over tokens; (N, T) -> scalar.

    Value and gradient are exactly 0 where both policies agree; a clamped token has no gradient.
    """
    d = old_logps - logps
    return ((torch.expm1(d) - d).clamp(-KL_CLAMP, KL_CLAMP) * mask).sum()


def penalty(kl: torch.Tensor, root: bool) -> torch.Tensor:
    """Returns what the trust region costs: the mean KL, or sqrt(KL + 0.25)."""
    return (kl + 0.25).sqrt() if root else kl


class TRPA(Plugin):
    """TRPA for GRPOTrainer."""

    name = "trpa"
    paper = "arXiv 2504.04524"
    bibtex = """@misc{trpa2025,
      title = {{Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for
        LLM reasoning}},
      eprint = {2504.04524},
      archivePrefix = {arXiv},
      year = {2025},
    }"""
    summary = "replaces the loss by preferences between completions on different levels, inside a trust region"
    trainers = ("grpo",)
    needs = ("whole_groups", "ref_logps")
    claims = ("no_advantages", "reward_labels")
    fields = ("preference_level", "trpa_pairs", "trpa_rows", "trpa_tokens")
    honours = ("vllm_importance_sampling_correction",)

    @dataclass(frozen=True)
    class Options:
        """Options of TRPA. Its `beta` is the factor of the log-ratios, not the trainer's KL factor, which must be 0."""

        beta: float = option(0.1, gt=0, help="factor of a pair's log-ratio gap; 0.05 .. 1", source="main_TRPA.sh")
        anisotropy: float = option(2.5, ge=0, help="extra factor where level 1 wins; 1 .. 4", source="main_TRPA.sh")
        tr_kl_coef: float = option(
            0.001,
            ge=0,
            help="weight of the trust region, felt where rollouts are reused; 0 .. 1",
            source="main_TRPA.sh",
        )
        use_sqrt_trkl: bool = option(False, help="penalise sqrt(KL + 0.25) in place of the KL", source="main_TRPA.sh")
        fallback: Literal["unary", "zero"] = option(
            "unary", help="without pairs: push level 1 up and others down, or learn nothing", source="authors' code"
        )
        ratio_reduction: Literal["mean", "sum"] = option(
            "mean", help="log-ratio of a completion: per token, or summed as in DPO", source="authors' code"
        )
        level_reward: str = option(
            "preference_level", help="reward function that gives levels: 1 is best, None skips a row", source="ours"
        )
        levels: tuple[dict[str, float], ...] = option(
            (),
            help="in place of level_reward: minimum rewards per level, best first, such as {format: 1, accuracy: 1}; "
            "a completion is on the first level whose minimum rewards it reaches, or one below the last",
            source="ours",
        )

        def __post_init__(self) -> None:
            if not all(self.levels):
                raise ValueError("levels must hold mappings of reward names to minimum rewards, got an empty one")

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        options, args = self.options, config.args
        yield from (Need(f"reward:{name}") for name in sorted({name for rule in options.levels for name in rule}))
        if not options.levels:
            yield Need(f"reward:{options.level_reward}")
            names = config.reward_names or ()
            weights = dict(zip(names, args.reward_weights or [1.0] * len(names), strict=False))
            if weights.get(options.level_reward):
                without = [*(weights | {options.level_reward: 0.0}).values()]
                yield Warn(f"a level is no reward; reward_weights={without} keeps it out of the logged `reward`")
        reused = args.num_iterations > 1 or (args.steps_per_generation or 1) > args.gradient_accumulation_steps
        if options.tr_kl_coef and not reused:
            yield Warn("with one update per rollout the trust region does nothing; see num_iterations")

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """Carries each row's level, NaN where it is left out, and what an average micro-batch of the round holds."""
        if self.options.levels:
            levels = rule_levels(round.rewards, round.reward_names, self.options.levels)
        else:
            levels = given_levels(round.reward(self.options.level_reward), self.options.level_reward)
        levels[round.lengths == 0] = torch.nan
        pairs, rows = levels.new_tensor(len(preference_pairs(levels, round.group_ids))), (~levels.isnan()).sum()
        totals = {"trpa_pairs": pairs, "trpa_rows": rows, "trpa_tokens": round.lengths.sum()}
        averages = {name: total.double() / round.micro_batches for name, total in totals.items()}
        return {"preference_level": levels[round.local].double(), **averages}

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        options, batch, mask = self.options, loss.batch, loss.mask
        logps, old = loss.per_token_logps.double(), loss.old_per_token_logps.double()
        reference, levels = batch["ref_per_token_logps"].double(), batch["preference_level"]
        weighed = scale_gradient(logps, loss.sampling_ratio)
        rho = sequence_log_ratio(weighed, reference, mask, options.ratio_reduction)  # (m,)
        pairs, round_pairs = preference_pairs(levels, loss.group_ids), batch["trpa_pairs"]
        if round_pairs:
            factors = pair_factors(levels, pairs, options.beta, options.anisotropy)
            preference = preference_losses(rho, pairs, factors).sum() / round_pairs
            # like the loss, shares of a mean over the round's pairs
            better, worse = (rho[rows].sum() / round_pairs for rows in pairs.T)
            loss.log("margin", better - worse)
            loss.log("log_ratio_better", better)
            loss.log("log_ratio_worse", worse)
        else:
            rows = batch["trpa_rows"].clamp(min=1e-9)
            preference = (options.fallback == "unary") * unary_losses(rho, levels).sum() / rows
        tokens = batch["trpa_tokens"].clamp(min=1e-9)
        kl = trust_region(logps, old, mask) / tokens
        loss.log("pairs", len(pairs))
        loss.log("fallback", float(not round_pairs))
        loss.log("preference_loss", preference)
        loss.log("kl_sampling", kl)
        loss.log("kl_reference", trust_region(logps.detach(), reference, mask) / tokens)
        total = preference + options.tr_kl_coef * penalty(kl, options.use_sqrt_trkl)
        return PolicyLoss(total.to(loss.per_token_logps.dtype), "share")
