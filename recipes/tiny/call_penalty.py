"""For the comparison of HDPO and OTC: a penalty for every tool call, coupled with the reward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trl_ext_hooks import Config, Plugin, Requirement, Rewards, Scored, hookimpl, option
from trl_ext_hooks.toolkit.tool_calls import CallCounter


class CallPenalty(Plugin):
    """Takes a constant from the reward for every executed call.

    The penalty is a reward of its own, so that the others are logged as they were.
    """

    name = "call-penalty"
    trainers = ("grpo",)
    counter = CallCounter()

    @dataclass(frozen=True)
    class Options:
        penalty: float = option(0.6, help="what a call costs", source="ours")

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        return self.counter.requirements(config, self.name)

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*names, "call-penalty")

    @hookimpl
    def rewards(self, scored: Scored) -> Rewards:
        cost = -self.options.penalty * self.counter.gather(scored).to(scored.rewards).unsqueeze(1)
        weights = torch.cat([scored.reward_weights, torch.ones_like(scored.reward_weights[:1])])
        return Rewards(torch.cat([scored.rewards, cost], dim=1), (*scored.reward_names, "call-penalty"), weights)
