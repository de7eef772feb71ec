"""HDPO: hierarchical decoupled policy optimisation (arXiv 2604.08545, "Act Wisely", the model Metis).

A penalty on tool calls inside the reward either suppresses calls that are needed or drowns in the variance of accuracy.
HDPO keeps two channels. Accuracy, normalised over all rollouts of a prompt, is GRPO's advantage and loss. Economy,
normalised among the right rollouts of the prompt only, is a second clipped loss, added with its own denominator.

Stages: rewards (weights only), advantages, a loss term. Against the authors' code: a group whose right rollouts called
equally often gives exactly 0, where float32 leaves advantages of up to 0.06; rollouts whose correctness is NaN are left
out of both channels; a group of one (evaluation) gives 0 instead of its raw score; parallel calls of one turn count one
each. The paper's text was not at hand: where README and code differ (the denominator), the code is followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext_hooks import (
    Config,
    Loss,
    Need,
    Plugin,
    PolicyLoss,
    Recommend,
    Refuse,
    Require,
    Requirement,
    Rewards,
    Round,
    Scored,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.groups import group_normalize, group_stats
from trl_ext_hooks.toolkit.losses import masked_mean
from trl_ext_hooks.toolkit.tool_calls import CallCounter

CLIPPED = ("dapo", "bnpo", "grpo", "dr_grpo", "luspo")
"""TRL's loss types that are the clipped surrogate, which the second channel is as well."""
SAME = 1e-8
"""Tool rewards that differ by less are equal; 1 / (T + 1) differs by more up to 10,000 calls."""


@dataclass(frozen=True)
class HDPOOptions:
    """Options of HDPO. The accuracy loss has the weight 1; clipping is the trainer's `epsilon` and `delta`."""

    w_tool: float = option(
        0.15, help="weight of the tool loss; useful: 0.05 to 0.3", source="authors' script and README"
    )
    w_ans: float = option(0.9, help="weight of the correctness reward", source="authors' reward manager")
    w_fmt: float = option(
        0.1, help="weight of the format reward; adds up to 1 with w_ans", source="authors' reward manager"
    )
    correct_reward: str | None = option(
        None, help="reward function that judges the answer; default: the first one", source="ours"
    )
    format_reward: str | None = option(
        None, help="reward function that judges the form, if there is one", source="ours"
    )
    correct_threshold: float = option(
        0.0, help="an answer is right when its reward is above this", source="authors' reward manager"
    )
    eps: float = option(1e-6, help="added to standard deviations", source="authors' code")
    scale_by_std: bool = option(True, help="divide both advantages by their deviation", source="authors' code")
    tool_loss_denominator: Literal["signal", "all"] = option(
        "signal",
        help="average the tool loss over rollouts with a tool advantage, or over all",
        source="authors' code; README: all",
    )
    call_tag: str | None = option(
        None, help="count this text in completions in place of executed calls, for rollouts without tool messages"
    )
    calls_field: str | None = option(None, help="take the number of calls that a rollout_func returns under this name")

    def __post_init__(self) -> None:
        if self.w_tool < 0 or self.w_ans <= 0 or self.w_fmt < 0:
            raise ValueError("w_ans must be greater than 0, w_tool and w_fmt at least 0")
        if abs(self.w_ans + self.w_fmt - 1) > 1e-6:
            raise ValueError(f"w_ans and w_fmt must add up to 1, they give {self.w_ans + self.w_fmt:g}")
        if self.eps <= 0:
            raise ValueError("eps must be greater than 0")
        if self.correct_reward is not None and self.correct_reward == self.format_reward:
            raise ValueError("correct_reward and format_reward must be two reward functions")
        CallCounter(self.call_tag, self.calls_field)


def tool_rewards(calls: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """r_tool = 1 / (T + 1) for right rollouts, 0 for wrong ones: 1 without a call, 1/2 with one, 1/4 with three.

    Args:
        calls: (N,) T, tool calls of each rollout.
        correct: (N,) bool.

    Returns:
        (N,) float64.
    """
    return torch.where(correct, 1 / (calls.double() + 1), 0.0)


def accuracy_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6, scale: bool = True
) -> torch.Tensor:
    """A_acc = (r_acc - mean_group) / (std_group + eps) over all rollouts of a prompt, std with ddof 1.

    Args:
        rewards: (N,) r_acc; NaN rows are left out and give 0.
        group_ids: (N,).
        scale: Whether to divide.

    Returns:
        (N,) float64; exactly 0 for constant groups and groups of one.
    """
    return group_normalize(rewards.double(), group_ids, eps=eps, ddof=1, scale=scale).nan_to_num(nan=0.0)


def tool_advantages(
    calls: torch.Tensor, correct: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6, scale: bool = True
) -> torch.Tensor:
    """A_tool = (r_tool - mean_Q) / (std_Q + eps) over the right rollouts Q of a prompt, std with ddof 1.

    Args:
        calls: (N,).
        correct: (N,) bool.
        group_ids: (N,).
        scale: Whether to divide.

    Returns:
        (N,) float64. Exactly 0 for wrong rollouts, where fewer than two are right, where all right ones called equally
        often, and at the mean of Q; what is not 0 carries the tool signal.
    """
    economy = torch.where(correct, tool_rewards(calls, correct), torch.nan)
    out = group_normalize(economy, group_ids, eps=eps, ddof=1, scale=scale, tol=SAME)
    at_mean = (economy - group_stats(economy, group_ids, tol=SAME).mean).abs() <= SAME
    return torch.where(at_mean, 0.0, out).nan_to_num(nan=0.0)


def importance_ratio(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, mask: torch.Tensor, level: str = "token"
) -> torch.Tensor:
    """rho = exp(log pi - log pi_old) per token, or exp of its mean over the row's counted tokens.

    Args:
        per_token_logps, old_per_token_logps, mask: (m, T).
        level: `"token"` or `"sequence"`, TRL's `importance_sampling_level`.

    Returns:
        (m, T), or (m, 1) per sequence.
    """
    difference = per_token_logps - old_per_token_logps
    return torch.exp(difference if level == "token" else masked_mean(difference, mask, dim=1).unsqueeze(1))


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, delta: float | None = None
) -> torch.Tensor:
    """l = -min(min(rho, delta) * A, clip(rho, 1 - low, 1 + high) * A).

    With delta > 1 + high this is the dual clip of the authors' code, which caps the loss at delta * |A| where A < 0.

    Args:
        ratio: (m, T) or (m, 1).
        advantages: (m, 1) or (m, T), constants.
        delta: Upper bound of the unclipped ratio, or None.
    """
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.min(bounded * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


class HDPO(Plugin):
    """HDPO for GRPOTrainer with tools, environments or a rollout function."""

    name = "hdpo"
    paper = "arXiv 2604.08545"
    summary = "a second clipped loss for few tool calls, among the right answers of a prompt only"
    trainers = ("grpo",)
    Options = HDPOOptions
    needs = ("tools",)
    claims = ("estimator",)
    fields = ("hdpo_tool_advantages", "hdpo_tool_share")

    options: HDPOOptions

    def __init__(self, options: HDPOOptions | None = None) -> None:
        super().__init__(options)
        self.counter = CallCounter(self.options.call_tag, self.options.calls_field)
        self._calls = self._correct = self._unjudged = self._tool = torch.empty(0)  # (N,) of the current round

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        yield from self.counter.requirements(config, self.name)
        names = config.reward_names
        for name in (self.options.correct_reward, self.options.format_reward):
            if name is not None:
                yield Need(f"reward:{name}")
        if names and self.options.correct_reward is None and self.options.format_reward == names[0]:
            yield Refuse(
                f"format_reward is {names[0]!r}, the first reward function, which judges the answer by default.",
                "Set hdpo.correct_reward.",
            )
        yield Require("loss_type", CLIPPED, why="the tool loss is the clipped surrogate, as the accuracy loss must be")
        yield Require("top_entropy_quantile", (1.0,), why="the tool loss counts every token of a rollout")
        yield Require("off_policy_mask_threshold", (None,), why="the mask is made of the accuracy advantages only")
        yield Require(
            "scale_rewards", ("group",), why="HDPO normalises itself; hdpo.scale_by_std=false divides by nothing"
        )
        yield Require("multi_objective_aggregation", ("sum_then_normalize",), why="HDPO has its own two channels")
        yield Recommend("delta", 3.0, "authors' code: dual clip")

    @hookimpl
    def rewards(self, scored: Scored) -> Rewards:
        """Gives the columns the weights of r_acc, and keeps what the tool channel needs before anybody changes it."""
        names, options = scored.reward_names, self.options
        judge = names.index(options.correct_reward) if options.correct_reward else 0
        score = scored.rewards[:, judge]
        self._calls, self._unjudged = self.counter.gather(scored), torch.isnan(score)
        self._correct = score > options.correct_threshold
        weights = scored.reward_weights.clone()
        weights[judge] *= options.w_ans
        if options.format_reward:
            weights[names.index(options.format_reward)] *= options.w_fmt
        return Rewards(scored.rewards, names, weights)

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        rewards = (round.rewards.double() * round.reward_weights.double()).nansum(dim=1)
        rewards = torch.where(self._unjudged, torch.nan, rewards)
        settings: dict[str, Any] = {"eps": self.options.eps, "scale": self.options.scale_by_std}
        self._tool = tool_advantages(self._calls, self._correct, round.group_ids, **settings)
        return accuracy_advantages(rewards, round.group_ids, **settings).to(round.rewards.dtype)

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        """A_tool, and the share of rollouts with a tool signal in what the trainer's loss is averaged over.

        Dividing the tool loss by this share turns the trainer's average over all rollouts into one over those with a
        signal. It is a share of the round's tokens on all processes for `dapo`, and of its rows for losses that average
        rows; `bnpo`, which averages the tokens of a micro-batch, takes the share there.
        """
        kept = round.trainer.gather(round.kept)  # (N,)
        tool = torch.where(kept, self._tool, 0.0)
        signal = (tool != 0).double()
        share = signal.sum() / kept.sum().clamp(min=1)
        if round.trainer.args.loss_type == "dapo":
            local = (round.loss_mask * signal[round.local].unsqueeze(1)).sum()
            share = round.trainer.gather(local).sum() / round.batch["num_items_in_batch"].clamp(min=1)
        return {"hdpo_tool_advantages": tool[round.local].to(round.rewards.dtype), "hdpo_tool_share": share.float()}

    @hookimpl
    def loss_terms(self, loss: Loss) -> dict[str, PolicyLoss]:
        args, advantages = loss.trainer.args, loss.batch["hdpo_tool_advantages"].unsqueeze(1)  # (m, 1)
        ratio = importance_ratio(
            loss.per_token_logps, loss.old_per_token_logps, loss.mask, args.importance_sampling_level
        )
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        values = clipped_surrogate(ratio, advantages, args.epsilon, high, args.delta)
        if "importance_sampling_ratio" in loss.batch:  # vLLM's correction, as in the accuracy loss
            values = values * loss.batch["importance_sampling_ratio"]
        signal = (advantages != 0).to(values.dtype)
        if self.options.tool_loss_denominator == "all":
            share = torch.ones_like(loss.batch["hdpo_tool_share"])
        elif args.loss_type == "bnpo":
            share = masked_mean(signal.expand_as(loss.mask), loss.mask)
        else:
            share = loss.batch["hdpo_tool_share"]
        # without a signal there is nothing to divide: values are 0, and so is the share
        scaled = self.options.w_tool * values * signal / torch.where(share > 0, share, 1.0)
        return {"tool": PolicyLoss(scaled.expand_as(loss.mask))}

    @hookimpl
    def round_metrics(self) -> dict[str, tuple[float, float]]:
        """`tool_rate`: rollouts with a call; `signal`: rollouts with a tool advantage."""
        rows, right = len(self._calls), self._correct
        return {
            "tool_calls_mean": (self._calls.sum().item(), rows),
            "tool_calls_correct": (self._calls[right].sum().item(), right.sum().item()),
            "tool_rate": ((self._calls > 0).sum().item(), rows),
            "correct": (right.sum().item(), rows),
            "signal": ((self._tool != 0).sum().item(), rows),
        }
