"""The formulas of DECS: redundant spans, rewards and advantages per position, the curriculum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks.toolkit.groups import group_normalize

# --- chunks and spans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunks:
    """The chunks of one completion.

    Attributes:
        ends: Where each ends, exclusive, in tokens of the completion.
        verdicts: The judge on each; empty where it was not asked.
    """

    ends: tuple[int, ...]
    verdicts: tuple[bool | None, ...] = ()

    @property
    def first(self) -> int | None:
        """Index of the chunk that first states the answer; None without one, or where a verdict is missing before."""
        decided = next((i for i, verdict in enumerate(self.verdicts) if verdict is not False), None)
        return decided if decided is not None and self.verdicts[decided] else None

    @property
    def span(self) -> tuple[int, int] | None:
        """The redundant tokens, from the end of the necessary prefix to the end of the last chunk; None without any."""
        if self.first is None or self.first == len(self.ends) - 1:
            return None
        return self.ends[self.first], self.ends[-1]

    @property
    def ratio(self) -> float:
        """(index of the first chunk with the answer + 1) / number of chunks; 0 without one."""
        return 0.0 if self.first is None else (self.first + 1) / len(self.ends)

    @property
    def labels(self) -> str:
        """A letter per chunk: a = first with the answer, b = before it, c = without and d = with it afterwards."""
        if self.first is None:
            return "b" * len(self.ends)
        after = ("d" if verdict else "c" for verdict in self.verdicts[self.first + 1 :])
        return "b" * self.first + "a" + "".join(after)


# --- rewards and advantages -------------------------------------------------------------------------------------------


def token_rewards(
    correct: torch.Tensor,
    spans: torch.Tensor,
    lengths: torch.Tensor,
    width: int,
    *,
    r_plus: float = 1.1,
    r_zero: float = 1.0,
    limit: int,
    form: Literal["official", "eq9"] = "official",
) -> torch.Tensor:
    """Rewards of all positions, padding included: 0 in wrong rows, r_plus in right ones, and on a right row's span

    - `official`: r_zero + (r_plus - r_zero) (1 - L / L_max), the authors' code,
    - `eq9`: r_zero - (r_plus - r_zero) L / L_max, equation 9 as printed.

    Args:
        correct: (N,) 1, 0, or NaN for a row without a verdict.
        spans: (N, 2) first redundant token and the one behind the last; equal for no span.
        lengths: (N,) all tokens of a completion, L.
        width: T.
        limit: L_max.

    Returns:
        (N, T) float64, NaN in rows whose `correct` is.
    """
    position = torch.arange(width, device=spans.device)
    redundant = (position >= spans[:, :1]) & (position < spans[:, 1:])  # (N, T)
    relative = (lengths.double() / limit).unsqueeze(1)
    gap = r_plus - r_zero
    lower = r_zero + gap * (1 - relative) if form == "official" else r_zero - gap * relative
    return torch.where(redundant, lower, r_plus) * correct.double().unsqueeze(1)


def position_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Equation 10: A[i,j] = (r[i,j] - mean_group[j]) / (std_group[j] + eps) for each position j, std with ddof 1.

    Rows that have ended at j count with the reward of their padding.

    Args:
        rewards: (N, T) of whole groups.
        group_ids: (N,).

    Returns:
        (N, T); exactly 0 where the rewards of a position are equal or only one is known, and in rows of NaN, which
        count in no statistic.
    """
    return torch.nan_to_num(group_normalize(rewards, group_ids, eps=eps, ddof=1, tol=1e-6))


# --- curriculum -------------------------------------------------------------------------------------------------------


def next_kappa(kappa: float, ratio: float, previous: float, *, lr: float = 0.2, cap: float = 1.0) -> float:
    """Equation 11: kappa + lr (R_m - R_{m-1}), clipped to [0, min(cap, 0.99)].

    Args:
        ratio: R_m, the mean prefix ratio of this round's completions that have one.
        previous: R_{m-1}.
        cap: Share of the sampled prompts that are always answered right.
    """
    return min(max(kappa + lr * (ratio - previous), 0.0), cap, 0.99)


def easy_allowed(kappa: float, mixed: int) -> int:
    """How many prompts that are always answered right may join the mixed ones: floor(kappa mixed / (1 - kappa))."""
    return int(kappa * mixed / (1 - kappa))
