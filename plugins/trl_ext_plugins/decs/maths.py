"""Formulas of DECS: redundant spans, rewards and advantages per position, the curriculum.

Axes: `N` rows of all processes, `T` completion tokens. Sources: arXiv 2509.25827 and the authors' code; where they
differ, `trl_ext_plugins.decs` says which one is followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks.toolkit.groups import group_normalize, group_stats

# --- chunks and spans -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunks:
    """The chunks of one completion.

    Attributes:
        ends: Where each chunk ends, exclusive, in tokens of the completion.
        verdicts: The judge's verdict on each chunk; empty where it was not asked.
    """

    ends: tuple[int, ...]
    verdicts: tuple[bool | None, ...] = ()

    @property
    def first(self) -> int | None:
        """Index of the first chunk that states the answer; None without one, or where an earlier verdict is missing."""
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
        """One letter per chunk: a = first with the answer, b = before it, c = without and d = with it afterwards."""
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
    """Returns the reward of every position, padding included: 0 in wrong rows, r_plus in right rows, and on their spans

    - `official`: r_zero + (r_plus - r_zero) (1 - L / L_max), the authors' code,
    - `eq9`: r_zero - (r_plus - r_zero) L / L_max, equation 9 as printed.

    Args:
        correct: (N,) 1, 0, or NaN for a row without a reward.
        spans: (N, 2) the first redundant token and the one behind the last; equal without a span.
        lengths: (N,) L, all tokens of a completion.
        width: T.
        r_plus: Reward of a right row.
        r_zero: Lowest reward of a redundant token in the official form, highest in the other.
        limit: L_max.
        form: Which reward redundant tokens get.

    Returns:
        (N, T) float64, NaN in rows whose `correct` is NaN.
    """
    position = torch.arange(width, device=spans.device)
    redundant = (position >= spans[:, :1]) & (position < spans[:, 1:])  # (N, T)
    relative = (lengths.double() / limit).unsqueeze(1)  # (N, 1)
    gap = r_plus - r_zero
    lower = r_zero + gap * (1 - relative) if form == "official" else r_zero - gap * relative
    return torch.where(redundant, lower, r_plus) * correct.double().unsqueeze(1)


def position_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-6, ddof: int = 1
) -> torch.Tensor:
    """Returns A[i,j] = (r[i,j] - mean_group[j]) / (std_group[j] + eps) for each position j, equation 10.

    Rows that have ended at j count with the reward of their padding.

    Args:
        rewards: (N, T) of whole groups.
        group_ids: (N,).
        eps: Added to the standard deviation.
        ddof: Divisor of the variance is the number of rows minus this.

    Returns:
        (N, T); exactly 0 where the rewards of a position are equal or only one is known, and in rows of NaN, which
        count in no statistic.
    """
    return torch.nan_to_num(group_normalize(rewards, group_ids, eps=eps, ddof=ddof, tol=1e-6))


# --- curriculum -------------------------------------------------------------------------------------------------------


def count_groups(group_ids: torch.Tensor) -> int:
    """Counts the groups of a round (N,). Rows of the group -1 only fill up a process and belong to none."""
    return len(torch.unique(group_ids[group_ids >= 0]))


def easy_and_mixed(correct: torch.Tensor, group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the ids of the groups whose rows are all right, and of those of which only some are.

    Args:
        correct: (N,) 1, 0, or NaN for a row that does not count.
        group_ids: (N,).
    """
    share = group_stats(correct, group_ids).mean  # NaN where nothing is known
    return torch.unique(group_ids[share == 1]), torch.unique(group_ids[(share > 0) & (share < 1)])


def easy_allowed(kappa: float, mixed: int) -> int:
    """Returns how many easy prompts may join the mixed ones: floor(kappa mixed / (1 - kappa)), with kappa below 1."""
    return max(int(kappa * mixed / (1 - kappa)), 0)


def easy_dose(kappa: float, mixed: int, waiting: int = 0) -> tuple[int, int]:
    """Returns how many easy prompts may join a round, and how many mixed prompts wait for the next one.

    In small rounds the floor of `easy_allowed` would always be 0. So mixed prompts add up over rounds until they earn
    an easy one, and start from 0 then. With kappa = 0 nothing changes.

    Args:
        kappa: Share of easy prompts.
        mixed: Mixed prompts of this round.
        waiting: Mixed prompts of earlier rounds that have earned no easy one yet.
    """
    if kappa <= 0:
        return 0, waiting
    allowed = easy_allowed(kappa, mixed + waiting)
    return allowed, 0 if allowed else mixed + waiting


def next_kappa(kappa: float, ratio: float, previous: float, *, lr: float = 0.2, cap: float = 1.0) -> float:
    """Returns kappa + lr (R_m - R_{m-1}), clipped to [0, min(cap, 0.99)], equation 11.

    Args:
        kappa: Share of easy prompts in this round.
        ratio: R_m, the mean prefix ratio of this round's completions that have one.
        previous: R_{m-1}.
        lr: Step size.
        cap: Share of easy prompts among those that were sampled.
    """
    return min(max(kappa + lr * (ratio - previous), 0.0), cap, 0.99)
