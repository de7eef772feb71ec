"""The formulas of SPAE, on tensors.

Letters: `N` rows of all processes, `K` steps of the longest row, `M` tokens of the right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from trl_ext_hooks.toolkit.groups import group_stats

# --- potentials -------------------------------------------------------------------------------------------------------


def confidence(entropies: Sequence[torch.Tensor]) -> float:
    """Conf = 1/N sum_n exp(-(1/L_n) sum_l H[n,l]), in [0, 1]; an empty continuation counts as 0.

    Args:
        entropies: For each of N continuations (L_n,) entropies of the whole vocabulary.
    """
    if not entropies:
        return 0.0
    return sum(float((-values.double().mean()).exp()) if len(values) else 0.0 for values in entropies) / len(entropies)


def correctness(logps: torch.Tensor) -> float:
    """Acc = 1/M sum_m p(y_m | h, y_<m), in [0, 1], from the (M,) log-probabilities of the right answer's tokens."""
    return float(logps.double().exp().mean())


def step_potential(acc: torch.Tensor, conf: torch.Tensor) -> torch.Tensor:
    """Phi = 1.5 Acc Conf + 0.5 Acc - Conf, in [-1, 1]: 1 for sure and right, -1 for sure and wrong, 0 for unsure."""
    return 1.5 * acc * conf + 0.5 * acc - conf


def gains(potential: torch.Tensor) -> torch.Tensor:
    """dPhi[k] = Phi[k] - Phi[k-1], 0 for the first step.

    Args:
        potential: (N, K), NaN behind a row's last step.

    Returns:
        (N, K), NaN where the potential is.
    """
    first = torch.zeros_like(potential[:, :1]) + 0 * potential[:, :1]  # NaN in rows without a step
    return torch.cat([first, potential[:, 1:] - potential[:, :-1]], dim=1)


# --- factors and bonuses ----------------------------------------------------------------------------------------------


def saturation_factor(potential: torch.Tensor, *, alpha: float = 0.5, eps_sat: float = 0.9) -> torch.Tensor:
    """f[k] = 1 - alpha (1 - exp(-C[k])), C[k] = number of steps t < k with Phi[t] > eps_sat.

    Args:
        potential: (N, K), NaN behind a row's last step.

    Returns:
        (N, K + 1); the entry at a row's number of steps counts all of them.
    """
    saturated = (potential > eps_sat).to(potential.dtype)
    before = torch.nn.functional.pad(saturated.cumsum(dim=1), (1, 0))
    return 1 - alpha * (1 - torch.exp(-before))


def shaping(potential: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """g = exp(dN) - mean exp(dN), dN = (dPhi - min) / max(max - min, 1e-8), over all steps of the kept rows.

    Args:
        potential: (N, K), NaN behind a row's last step.
        kept: (N,) booleans.

    Returns:
        (N, K + 1); 0 behind a row's last step and in rows that are not kept.
    """
    delta = gains(potential)
    counted = ~torch.isnan(delta) & kept.unsqueeze(1)
    out = torch.zeros_like(delta)
    if counted.any():
        values = delta[counted]
        lowest, highest = values.min(), values.max()
        grown = ((values - lowest) / (highest - lowest).clamp(min=1e-8)).exp()
        out[counted] = grown - grown.mean()
    return torch.nn.functional.pad(out, (0, 1))


def step_of_tokens(ends: Sequence[int], length: int, tail: Literal["last", "next"] = "last") -> torch.Tensor:
    """The step of each token: k where b[k-1] < j <= b[k].

    Args:
        ends: Last token of each step, ascending.
        length: Tokens of the completion.
        tail: Tokens behind the last step belong to it, or to a step of their own.

    Returns:
        (length,) indices; 0 for all without a step.
    """
    step = torch.searchsorted(torch.tensor(ends, dtype=torch.long), torch.arange(length))
    return step.clamp(max=max(len(ends) - 1, 0)) if tail == "last" else step


# --- advantages -------------------------------------------------------------------------------------------------------


def outcome_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, filter_zero_variance: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = r - mean(group), without a deviation, and the rows that are kept.

    Args:
        rewards: (N,); NaN for a row without any.
        group_ids: (N,).

    Returns:
        (N,) float64, 0 where a row is not kept; (N,) booleans, false in rows of NaN and in groups of equal rewards.
    """
    stats = group_stats(rewards, group_ids)
    kept = ~torch.isnan(rewards)
    if filter_zero_variance:
        kept = kept & ~stats.constant
    return torch.where(kept & ~stats.constant, rewards.double() - stats.mean, 0.0), kept


def spae_advantages(
    outcome: torch.Tensor,
    kept: torch.Tensor,
    potential: torch.Tensor,
    tokens: torch.Tensor,
    *,
    alpha: float = 0.5,
    xi: float = 0.5,
    eps_sat: float = 0.9,
    eps: float = 1e-8,
) -> torch.Tensor:
    """A[i,k] f[i,k] + xi g[i,k], then (A - mean) / (std + eps) over the tokens of kept rows, std with ddof 1.

    Args:
        outcome: (N,).
        kept: (N,) booleans.
        potential: (N, K), NaN behind a row's last step.
        tokens: (N, K + 1) how many tokens that the loss counts each step has.

    Returns:
        (N, K + 1) the advantage of every token of a step; 0 in rows that are not kept, and everywhere where all tokens
        have the same or there is only one.
    """
    factor = saturation_factor(potential, alpha=alpha, eps_sat=eps_sat)
    raw = outcome.unsqueeze(1) * factor + xi * shaping(potential, kept)
    weight = torch.where(kept.unsqueeze(1), tokens.double(), 0.0)
    total = weight.sum()
    counted = raw[weight > 0]
    if total < 2 or counted.max() - counted.min() <= 1e-9:
        return torch.zeros_like(raw)
    mean = (raw * weight).sum() / total
    std = (((raw - mean) ** 2 * weight).sum() / (total - 1)).sqrt()
    return torch.where(kept.unsqueeze(1), (raw - mean) / (std + eps), 0.0)
