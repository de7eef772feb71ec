"""HDPO: hierarchical decoupled policy optimisation (arXiv 2604.08545, "Act Wisely", the model Metis).

A penalty on tool calls inside the reward suppresses calls that are needed, or drowns in the variance of accuracy. HDPO
keeps two channels. Accuracy, normalised over all rollouts of a prompt, is GRPO's advantage and loss. Economy,
normalised over the right rollouts of the prompt only, is a second clipped loss with a denominator of its own.

Differences from the authors' code: a group whose right rollouts called equally often gives exactly 0, where float32
leaves advantages of up to 0.06. Rollouts whose correctness is NaN are left out of both channels. A group of one
(evaluation) gives 0 instead of its raw score. Parallel calls of one turn count one each. Where the authors' README and
code differ, in the denominator, the code is followed. The paper itself was not available.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks import (
    Config,
    Loss,
    Plugin,
    PolicyLoss,
    Recommend,
    Refuse,
    Require,
    Requirement,
    RewardName,
    Rewards,
    Round,
    Scored,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.groups import group_normalize, group_stats
from trl_ext_hooks.toolkit.losses import clipped_surrogate, importance_ratio, masked_mean
from trl_ext_hooks.toolkit.tool_calls import CallOptions

CLIPPED = ("dapo", "bnpo", "grpo", "dr_grpo", "luspo")
"""TRL's loss types that are the clipped surrogate, as the second channel is."""
SAME = 1e-8
"""Tool rewards that differ by less are equal; 1 / (T + 1) differs by more up to 10,000 calls."""


def tool_rewards(calls: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """Returns r_tool = 1 / (T + 1) for right rollouts with T calls and 0 for wrong ones; all (N,), float64."""
    return torch.where(correct, 1 / (calls.double() + 1), 0.0)


def accuracy_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6, scale: bool = True
) -> torch.Tensor:
    """Returns A_acc = (r_acc - mean_group) / (std_group + eps) over all rollouts of a prompt, std with ddof 1.

    All (N,), float64. `scale` says whether to divide. NaN rewards are left out and give 0. Constant groups and groups
    of one give exactly 0.
    """
    return group_normalize(rewards.double(), group_ids, eps=eps, ddof=1, scale=scale).nan_to_num(nan=0.0)


def tool_advantages(
    calls: torch.Tensor, correct: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6, scale: bool = True
) -> torch.Tensor:
    """Returns A_tool = (r_tool - mean_Q) / (std_Q + eps) over the right rollouts Q of a prompt, std with ddof 1.

    All (N,), float64. `scale` says whether to divide. Exactly 0 for wrong rollouts, where fewer than two are right,
    where all right ones called equally often, and at the mean of Q. What is not 0 carries the tool signal.
    """
    economy = torch.where(correct, tool_rewards(calls, correct), torch.nan)
    out = group_normalize(economy, group_ids, eps=eps, ddof=1, scale=scale, tol=SAME)
    # a rollout at the mean has no signal, and rounding must not give it one
    at_mean = (economy - group_stats(economy, group_ids, tol=SAME).mean).abs() <= SAME
    return torch.where(at_mean, 0.0, out).nan_to_num(nan=0.0)


def round_share(
    signal: torch.Tensor, kept: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor | None
) -> torch.Tensor:
    """Returns the share of the rollouts with a tool signal in what the trainer's loss is averaged over.

    Dividing the tool loss by it turns the trainer's average over all rollouts into one over those with a signal.

    Args:
        signal, kept, lengths: (N,): has a tool signal, takes part in the loss, and tokens that the loss counts.
        tokens: What the loss divides by if it averages tokens; None if it averages rows.
    """
    if tokens is None:
        return (signal & kept).double().sum() / kept.sum().clamp(min=1)
    return (lengths * (signal & kept).double()).sum() / tokens.clamp(min=1)


class HDPO(Plugin):
    """HDPO for GRPOTrainer with tools, environments or a rollout function."""

    name = "hdpo"
    paper = "arXiv 2604.08545"
    bibtex = """@misc{hdpo2026,
      title = {{Act Wisely: Cultivating Meta-Cognitive Tool Use in Agentic Multimodal Models}},
      eprint = {2604.08545},
      archivePrefix = {arXiv},
      year = {2026},
    }"""
    summary = "a second clipped loss for few tool calls, among the right answers of a prompt only"
    trainers = ("grpo",)
    needs = ("tools",)
    claims = ("estimator",)
    fields = ("hdpo_tool_advantages", "hdpo_tool_share")

    @dataclass(frozen=True)
    class Options(CallOptions):
        """The accuracy loss has the weight 1. Clipping is the trainer's `epsilon` and `delta`."""

        w_tool: float = option(0.15, ge=0, help="weight of the tool loss, 0.05 to 0.3", source="authors' script")
        w_ans: float = option(0.9, gt=0, help="weight of the correctness reward", source="authors' code")
        w_fmt: float = option(0.1, ge=0, help="weight of the format reward, 1 - w_ans", source="authors' code")
        correct_reward: RewardName | None = option(None, help="judges the answer, by default the first", source="ours")
        format_reward: RewardName | None = option(None, help="judges the form, of two the other one", source="ours")
        correct_threshold: float = option(0.0, help="a reward above it is a right answer", source="authors' code")
        eps: float = option(1e-6, gt=0, help="added to standard deviations", source="authors' code")
        scale_by_std: bool = option(True, help="divide both advantages by their deviation", source="authors' code")
        tool_loss_denominator: Literal["signal", "all"] = option(
            "signal", help="average the tool loss over rollouts with a tool advantage, or all", source="authors' code"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            if abs(self.w_ans + self.w_fmt - 1) > 1e-6:
                raise ValueError(f"w_ans and w_fmt must add up to 1, they give {self.w_ans + self.w_fmt:g}")
            if self.correct_reward is not None and self.correct_reward == self.format_reward:
                raise ValueError("correct_reward and format_reward must be two reward functions")

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        yield from self.options.counter.requirements(config, self.name)
        yield from self.check_weights(config)
        earlier = config.rewriters[: config.rewriters.index(self.name)] if self.name in config.rewriters else ()
        if earlier:
            yield Warn(
                f"{', '.join(earlier)} rewrites rewards before hdpo judges the answers by them; name hdpo first if it "
                f"should judge by what the reward functions return"
            )
        yield Require("loss_type", CLIPPED, "the tool loss is the clipped surrogate, as the accuracy loss must be")
        yield Require("top_entropy_quantile", (1.0,), "the tool loss counts every token of a rollout")
        yield Require("off_policy_mask_threshold", (None,), "the mask is made of the accuracy advantages only")
        yield Require("scale_rewards", ("group",), "HDPO normalises itself; hdpo.scale_by_std=false divides by nothing")
        yield Require("multi_objective_aggregation", ("sum_then_normalize",), "HDPO has its own two channels")
        yield Recommend("delta", 3.0, "authors' code: dual clip")

    def form(self, names: Sequence[str]) -> str | None:
        """Returns the reward that judges the form: the named one, or else the other one of two rewards."""
        options = self.options
        if options.format_reward is not None or len(names) != 2 or options.w_fmt == 0:
            return options.format_reward
        return names[0] if options.correct_reward == names[1] else names[1]

    def check_weights(self, config: Config) -> Iterator[Requirement]:
        """Yields what is unclear about the weights of rewards that are neither the answer's nor the form's."""
        names, options, keep = config.reward_names or (), self.options, "hdpo.w_ans=1 and hdpo.w_fmt=0"
        form = self.form(names)
        if form is not None and options.format_reward is None:
            yield Warn(
                f"{form!r} counts {options.w_fmt:g}, as the reward of the form (hdpo.format_reward); {keep} keep the "
                f"trainer's weights"
            )
        correct = options.correct_reward or (names[0] if names else None)
        if correct is not None and options.format_reward == correct:
            what = f"format_reward is {correct!r}, the first reward function, which judges the answer by default."
            yield Refuse(what, "Set hdpo.correct_reward.")
        others = [name for name in names if name not in (correct, form)]
        if others and options.w_ans != 1 and config.args.reward_weights is None:
            yield Refuse(
                f"{others[0]!r} would count 1, and the reward of the answer {options.w_ans:g}.",
                f"Set hdpo.format_reward if it judges the form, or reward_weights, or {keep} for equal weights.",
            )

    @hookimpl
    def rewards(self, scored: Scored) -> Rewards:
        """Makes the tool channel before later plugins change the rewards, and weighs those of the accuracy channel."""
        options = self.options
        score, calls = scored.reward(options.correct_reward), options.counter.gather(scored)
        correct, self.unjudged = score > options.correct_threshold, score.isnan()  # (N,)
        self.tool = tool_advantages(calls, correct, scored.group_ids, eps=options.eps, scale=options.scale_by_std)
        scored.log("tool_calls_mean", calls)
        scored.log("tool_calls_correct", calls[correct])
        scored.log("tool_rate", calls > 0)
        scored.log("correct", correct)
        scored.log("signal", self.tool != 0)
        weights = scored.reward_weights.clone()
        weights[scored.reward_index(options.correct_reward)] *= options.w_ans
        form = self.form(scored.reward_names)
        if form is not None:
            weights[scored.reward_index(form)] *= options.w_fmt
        return Rewards(scored.rewards, scored.reward_names, weights)

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        rewards = round.total_reward.masked_fill(self.unjudged, torch.nan)
        options = self.options
        advantages = accuracy_advantages(rewards, round.group_ids, eps=options.eps, scale=options.scale_by_std)
        return advantages.to(round.rewards.dtype)

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """Carries A_tool to the loss, and the share of rollouts with a tool signal; see `round_share`."""
        kept = round.trainer.gather(round.kept)  # (N,)
        tokens = round.batch["num_items_in_batch"] if round.trainer.args.loss_type == "dapo" else None
        share = round_share(self.tool != 0, kept, round.lengths, tokens)
        tool = torch.where(kept, self.tool, 0.0)[round.local].to(round.rewards.dtype)
        return {"hdpo_tool_advantages": tool, "hdpo_tool_share": share.float()}

    @hookimpl
    def loss_terms(self, loss: Loss) -> dict[str, PolicyLoss]:
        args, advantages = loss.trainer.args, loss.batch["hdpo_tool_advantages"].unsqueeze(1)  # (m, 1)
        old, level = loss.old_per_token_logps, args.importance_sampling_level
        ratio = importance_ratio(loss.per_token_logps, old, loss.mask, level)
        values = clipped_surrogate(ratio, advantages, *loss.clip_range, args.delta)
        if loss.sampling_ratio is not None:  # as TRL does in the accuracy loss
            values = values * loss.sampling_ratio
        signal, share = (advantages != 0).to(values.dtype), loss.batch["hdpo_tool_share"]
        if self.options.tool_loss_denominator == "all":
            share = torch.ones_like(share)
        elif args.loss_type == "bnpo":  # which averages the tokens of a micro-batch
            share = masked_mean(signal.expand_as(loss.mask), loss.mask)
        # without a signal there is nothing to divide: values are 0, and so is the share
        scaled = self.options.w_tool * values * signal / torch.where(share > 0, share, 1.0)
        return {"tool": PolicyLoss(scaled.expand_as(loss.mask))}
