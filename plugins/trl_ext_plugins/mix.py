"""Mix: adds up the advantages of several estimators, each with its weight.

The parts are plugins of the same run, with their own options, state and metrics. Each of them sees the round as TRL
left it, and rollouts, rewards and log-probabilities are made once for all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from trl_ext_hooks import Config, Plugin, PluginName, Refuse, Requirement, Round, Warn, hookimpl, option

STOCK = "trl"
"""The part that holds TRL's own advantages."""


class Mix(Plugin):
    name = "mix"
    summary = "adds up the advantages of several estimators, each with its weight"
    trainers = ("grpo", "rloo")

    @dataclass(frozen=True)
    class Options:
        weights: dict[PluginName, float] = option(
            {}, help="weight of every estimator, and of TRL's own advantages as `trl`, not scaled", source="ours"
        )

        def __post_init__(self) -> None:
            wrong = [name for name, weight in self.weights.items() if not (math.isfinite(weight) and weight >= 0)]
            if wrong:
                raise ValueError(f"the weight of {wrong[0]} must be a number from 0 up, got {self.weights[wrong[0]]}.")
            if self.weights and not any(self.weights.values()):
                raise ValueError("one of the weights must be above 0.")

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        weights, estimators = self.options.weights, config.estimators
        if not weights:
            yield Refuse("nothing has a weight.", "Set it, such as --set mix.weights='{gdpo: 0.7, dvao: 0.3}'.")
            return
        for name in weights:
            if name not in (STOCK, *estimators):
                known = ", ".join([*estimators, STOCK])
                yield Refuse(f"{name} has a weight and makes no advantages of its own.", f"These do: {known}.")
        for name in estimators:
            if name not in weights:
                yield Refuse(
                    f"{name} makes advantages and has no weight.", "Give it one in `weights`, or leave it out."
                )
        if sum(weight > 0 for weight in weights.values()) == 1:
            yield Warn("only one part has a weight above 0, so there is nothing to mix")

    @hookimpl
    def mix_advantages(self, round: Round, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weights = self.options.weights
        for name, weight in weights.items():
            values = parts[name][round.local] if parts[name].dim() == 1 else parts[name][round.loss_mask > 0]
            round.log(f"weight/{name}", weight)
            round.log(f"mean/{name}", values)
            round.log(f"size/{name}", values.abs())
        return torch.stack([weight * parts[name] for name, weight in weights.items()]).sum(dim=0)
