"""The objective of DRPO and DisCO, what it gives each row, and the constraint on the KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks.toolkit.losses import masked_mean

Score = Literal["logL", "Lratio"]
KlEstimate = Literal["kl", "low_var_kl"]


def completion_scores(
    logps: torch.Tensor, old_logps: torch.Tensor, mask: torch.Tensor, score: Score = "logL"
) -> torch.Tensor:
    """Returns s, the mean log-probability of a completion's tokens, or their mean ratio: (N, T) each -> (N,).

    `"logL"` is the mean of log pi, `"Lratio"` that of pi / pi_old. A completion without a token has the score 0.
    """
    return masked_mean(logps if score == "logL" else torch.exp(logps - old_logps), mask, dim=1)


def length_logits(lengths: torch.Tensor, max_length: int, temperature: float) -> torch.Tensor:
    """Returns log w = (1 - L / C) / lambda of completions with (N,) tokens: (N,) float64.

    Args:
        lengths: L, in tokens.
        max_length: C, the longest completion that the run allows, in tokens.
        temperature: lambda. Infinity gives all lengths the same weight.
    """
    return (1 - lengths.double() / max_length) / temperature


def group_softmax(logits: torch.Tensor, group_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Returns the softmax over the chosen rows of each group, 0 on all others: (N,), (N,), (N,) bool -> (N,)."""
    index = torch.unique(group_ids, return_inverse=True)[1]
    highest = torch.full_like(logits, -torch.inf).scatter_reduce(0, index[rows], logits[rows], "amax")
    powers = torch.where(rows, torch.exp(logits - highest[index]), 0.0)
    totals = torch.zeros_like(logits).index_add(0, index, powers)
    return torch.where(rows, powers / totals[index], 0.0)


@dataclass(frozen=True)
class Objective:
    """Holds J of a batch, and what it gives each row.

    Attributes:
        value: J, 0-d.
        slopes: (N,) dJ/ds, above 0 on right answers, below 0 on wrong ones, 0 on rows of no class or of a prompt with
            one class only.
        mixed: Prompts with answers of both classes.
        prompts: All prompts, by which J is divided.
    """

    value: torch.Tensor
    slopes: torch.Tensor
    mixed: int
    prompts: int


def contrast(
    scores: torch.Tensor, right: torch.Tensor, group_ids: torch.Tensor, logits: torch.Tensor, tau: float
) -> Objective:
    """Computes J = (1/P) sum_q [ sum_right w s / sum_right w - tau log mean_wrong exp(s / tau) ].

    The sum runs over the prompts q with right and wrong answers, and P counts all prompts. With tau = infinity the
    second part is the mean of the wrong answers' scores.

    Args:
        scores: s (N,), constants.
        right: (N,) 1 for right, 0 for wrong, NaN for neither.
        group_ids: (N,).
        logits: log w (N,), of which only differences inside a group matter.
        tau: Temperature of the wrong answers. The smaller, the more the most likely one counts.
    """
    groups, index = torch.unique(group_ids, return_inverse=True)

    def count(rows: torch.Tensor) -> torch.Tensor:  # (N,) bool -> (P,)
        return scores.new_zeros(len(groups)).index_add(0, index, rows.to(scores.dtype))

    mixed = (count(right == 1) > 0) & (count(right == 0) > 0)  # (P,)
    raised, lowered = (right == 1) & mixed[index], (right == 0) & mixed[index]
    up = group_softmax(logits.to(scores.dtype), group_ids, raised)
    down = group_softmax(scores / tau, group_ids, lowered)
    value = ((up - down) * scores).sum()
    if math.isfinite(tau):
        # log mean exp(x) = sum p x - sum p log(n p), with p the softmax over the n wrong answers
        value = value + tau * torch.special.xlogy(down, down * count(lowered)[index]).sum()
    prompts = max(len(groups), 1)
    return Objective(value / prompts, (up - down) / prompts, int(mixed.sum()), len(groups))


def kl_values(logps: torch.Tensor, old_logps: torch.Tensor, estimate: KlEstimate = "kl") -> torch.Tensor:
    """Returns an estimate of KL(old || new) per token: log pi_old - log pi, or r - 1 - log r with r = pi / pi_old."""
    difference = logps - old_logps
    return -difference if estimate == "kl" else torch.expm1(difference) - difference


def constraint_factor(kl: torch.Tensor, limit: float, penalty: float) -> torch.Tensor:
    """Returns beta * max(KL - delta, 0), by which the gradient of the KL counts."""
    return penalty * (kl - limit).clamp(min=0)
