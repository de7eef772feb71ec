"""Formulas of SPAE: potentials of steps, damping and bonus, advantages.

Axes: `N` rows of all processes, `K` steps of the longest row, `M` tokens of the right answer. Source: arXiv 2601.03823,
whose training code is not public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from trl_ext_hooks.toolkit.groups import group_stats

# --- potentials -------------------------------------------------------------------------------------------------------


def confidence(entropies: Sequence[torch.Tensor]) -> float:
    """Returns Conf = 1/C sum_n exp(-(1/L_n) sum_l H[n,l]), in [0, 1]; an empty continuation counts as 0.

    Args:
        entropies: For each of C continuations (L_n,) entropies H of the whole vocabulary.
    """
    if not entropies:
        return 0.0
    return sum(float((-values.double().mean()).exp()) if len(values) else 0.0 for values in entropies) / len(entropies)


def correctness(logps: torch.Tensor) -> float:
    """Returns Acc = 1/M sum_m p(y_m | h, y_<m), in [0, 1], from the right answer's log-probabilities (M,)."""
    return float(logps.double().exp().mean())


def step_potential(acc: torch.Tensor, conf: torch.Tensor) -> torch.Tensor:
    """Returns Phi = 1.5 Acc Conf + 0.5 Acc - Conf, in [-1, 1].

    Phi is 1 for an answer that is sure and right, -1 for one that is sure and wrong, 0 for an unsure one.
    """
    return 1.5 * acc * conf + 0.5 * acc - conf


def gains(potential: torch.Tensor) -> torch.Tensor:
    """Returns dPhi[k] = Phi[k] - Phi[k-1], 0 for the first step.

    Args:
        potential: (N, K), NaN behind a row's last step.

    Returns:
        (N, K), NaN where the potential is.
    """
    first = 0 * potential[:, :1]  # NaN in rows without a step
    return torch.cat([first, potential[:, 1:] - potential[:, :-1]], dim=1)


# --- factors and bonuses ----------------------------------------------------------------------------------------------


def saturated_before(potential: torch.Tensor, eps_sat: float) -> torch.Tensor:
    """Returns C[k], the number of steps t < k with Phi[t] > eps_sat.

    Args:
        potential: (N, K), NaN behind a row's last step.
        eps_sat: Potential above which a step is saturated.

    Returns:
        (N, K + 1); the entry at a row's number of steps counts all of them.
    """
    saturated = (potential > eps_sat).to(potential.dtype)
    return torch.nn.functional.pad(saturated.cumsum(dim=1), (1, 0))


def saturation_factor(potential: torch.Tensor, *, alpha: float = 0.5, eps_sat: float = 0.9) -> torch.Tensor:
    """Returns f[k] = 1 - alpha (1 - exp(-C[k])), (N, K + 1), with C of `saturated_before`."""
    return 1 - alpha * (1 - torch.exp(-saturated_before(potential, eps_sat)))


def shaping(potential: torch.Tensor, kept: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """Returns g = exp(dN) - mean exp(dN), dN = (dPhi - min) / max(max - min, eps), over all steps of the kept rows.

    Args:
        potential: (N, K), NaN behind a row's last step.
        kept: (N,) booleans.
        eps: Smallest range of the gains that is divided by.

    Returns:
        (N, K + 1); 0 behind a row's last step and in rows that are not kept.
    """
    delta = gains(potential)
    counted = ~torch.isnan(delta) & kept.unsqueeze(1)
    out = torch.zeros_like(delta)
    if counted.any():
        values = delta[counted]
        lowest, highest = values.min(), values.max()
        grown = ((values - lowest) / (highest - lowest).clamp(min=eps)).exp()
        out[counted] = grown - grown.mean()
    return torch.nn.functional.pad(out, (0, 1))


def step_of_tokens(ends: Sequence[int], length: int, tail: Literal["last", "next"] = "last") -> torch.Tensor:
    """Returns the step of each token j: k where b[k-1] < j <= b[k].

    Args:
        ends: b, the last token of each step, ascending.
        length: Tokens of the completion.
        tail: Whether tokens behind the last step belong to it, or to a step of their own.

    Returns:
        (length,) indices; all 0 without a step.
    """
    step = torch.searchsorted(torch.tensor(ends, dtype=torch.long), torch.arange(length))
    return step.clamp(max=max(len(ends) - 1, 0)) if tail == "last" else step


# --- advantages -------------------------------------------------------------------------------------------------------


def outcome_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, filter_zero_variance: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A = r - mean(group), not divided by a deviation, and the rows that are kept.

    Args:
        rewards: (N,); NaN for a row without any.
        group_ids: (N,).
        filter_zero_variance: Whether rows of groups with equal rewards are left out. Their A is 0 in any case.

    Returns:
        (N,) float64, 0 where a row is not kept; (N,) booleans, false in rows of NaN and where rows are left out.
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
    eps_gain: float = 1e-8,
    ddof: int = 1,
) -> torch.Tensor:
    """Returns A f + xi g of every step, normalised over the tokens of kept rows: (A - mean) / (std + eps).

    Args:
        outcome: (N,) A of each row.
        kept: (N,) booleans.
        potential: (N, K), NaN behind a row's last step.
        tokens: (N, K + 1) number of tokens of each step that the loss counts.
        alpha, eps_sat: Of `saturation_factor`.
        xi: Weight of `shaping`.
        eps: Added to the standard deviation.
        eps_gain: `eps` of `shaping`.
        ddof: Divisor of the variance is the number of tokens minus this.

    Returns:
        (N, K + 1) the advantage of every token of a step. It is 0 in rows that are not kept, and everywhere if there is
        only one token or all tokens have the same value.
    """
    factor = saturation_factor(potential, alpha=alpha, eps_sat=eps_sat)
    raw = outcome.unsqueeze(1) * factor + xi * shaping(potential, kept, eps=eps_gain)
    weight = torch.where(kept.unsqueeze(1), tokens.double(), 0.0)
    total = weight.sum()
    counted = raw[weight > 0]
    if total < 2 or counted.max() - counted.min() <= 1e-9:
        return torch.zeros_like(raw)
    mean = (raw * weight).sum() / total
    std = (((raw - mean) ** 2 * weight).sum() / (total - ddof)).sqrt()
    return torch.where(kept.unsqueeze(1), (raw - mean) / (std + eps), 0.0)
