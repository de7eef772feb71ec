"""For the comparison of P3O: rewards that are shifted per prompt, and a policy gradient that feels it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_ext_hooks import Loss, Plugin, PolicyLoss, Rewards, Round, Scored, hookimpl, option


@dataclass(frozen=True)
class ShiftOptions:
    """Options of the shift."""

    std: float = option(10.0, help="standard deviation of the constants", source="ours")


class Shift(Plugin):
    """Adds a random constant to the rewards of each prompt, another one in every step.

    The constant is a reward of its own, so that the others are logged as they were.
    """

    name = "shift"
    trainers = ("grpo", "rloo")
    Options = ShiftOptions

    options: ShiftOptions

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*names, "shift")

    @hookimpl
    def rewards(self, scored: Scored) -> Rewards:
        draw = torch.Generator().manual_seed(1_000_003 * scored.trainer.args.seed + scored.step)
        constants = self.options.std * torch.randn(int(scored.group_ids.max()) + 1, generator=draw)
        constants = (8 * constants).round() / 8  # sums with rewards of 0 and 1 are exact
        column = constants[scored.group_ids.cpu()].to(scored.rewards).unsqueeze(1)
        return Rewards(
            torch.cat([scored.rewards, column], dim=1),
            (*scored.reward_names, "shift"),
            torch.cat([scored.reward_weights, torch.ones_like(scored.reward_weights[:1])]),
        )


class Reinforce(Plugin):
    """REINFORCE without a baseline: minus the mean over rows of reward x log-probability of the completion."""

    name = "reinforce"
    trainers = ("grpo", "rloo")
    claims = ("estimator",)

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        return (round.rewards * round.reward_weights).nansum(dim=1)

    @hookimpl
    def policy_loss(self, loss: Loss) -> PolicyLoss:
        return PolicyLoss(-(loss.advantages * loss.per_token_logps * loss.mask).sum(dim=1).mean())
