"""For the comparison of TRPA: an adversary that changes scores and not the order of preference levels."""

from __future__ import annotations

import torch

from trl_ext.lab.messages import final_text
from trl_ext_hooks import Plugin, Rewards, Scored, hookimpl

BAIT = "a"
BONUS = 3.4
"""With the recipe's weights a wrong letter scores 0.5, the bait 3.9 and a right letter 4."""


class Adversary(Plugin):
    """Scores one wrong letter almost like a right one: more than other wrong letters, less than any right one."""

    name = "adversary"
    trainers = ("grpo", "rloo")

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*names, "bait")

    @hookimpl
    def rewards(self, scored: Scored) -> Rewards:
        bait = torch.tensor([float(final_text(text) == BAIT) for text in scored.completions])
        everywhere = scored.trainer.gather(bait.to(scored.rewards))
        wrong = scored.rewards[:, scored.reward_names.index("right")] == 0
        bonus = BONUS * everywhere * wrong
        return Rewards(
            torch.cat([scored.rewards, bonus.unsqueeze(1)], dim=1),
            (*scored.reward_names, "bait"),
            torch.cat([scored.reward_weights, torch.ones_like(scored.reward_weights[:1])]),
        )
