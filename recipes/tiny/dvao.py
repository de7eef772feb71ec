"""For the comparison of DVAO: two rewards that contradict each other, beside the one that is to be learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_ext.lab.messages import final_text
from trl_ext_hooks import Plugin, Rewards, Round, Scored, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_stats

LIKED = "abwxkl"
"""Half of the twelve letters that the task knows."""


class Conflict(Plugin):
    """Adds a reward for half of the letters, and one that takes it back up to a little noise.

    In a group without a difference in the first reward, the sum of all is the noise. Plain GRPO divides it by its own
    deviation, so that it counts as much as a right answer.
    """

    name = "conflict"
    trainers = ("grpo", "rloo")

    @dataclass(frozen=True)
    class Options:
        noise: float = option(0.02, gt=0, help="standard deviation of the noise", source="ours")

    options: Options

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*names, "liked", "disliked")

    @hookimpl
    def rewards(self, scored: Scored) -> Rewards:
        texts = [final_text(completion) for completion in scored.completions]
        own = torch.tensor([float(text[:1] in LIKED) if text else 0.0 for text in texts])
        liked = scored.trainer.gather(own.to(scored.rewards))  # (N,)
        draw = torch.Generator().manual_seed(1_000_003 * scored.trainer.args.seed + scored.step)
        noise = self.options.noise * torch.randn(len(liked), generator=draw).to(liked)
        return Rewards(
            torch.cat([scored.rewards, liked.unsqueeze(1), (noise - liked).unsqueeze(1)], dim=1),
            (*scored.reward_names, "liked", "disliked"),
            torch.cat([scored.reward_weights, torch.ones_like(scored.reward_weights[:1]).expand(2)]),
        )

    @hookimpl
    def round_metrics(self, round: Round) -> None:
        """Reports the mean size of advantages in groups whose answers are all right or all wrong."""
        silent = group_stats(round.reward("right"), round.group_ids).constant
        if silent.any():
            round.log("advantage", round.advantages[silent].abs())
