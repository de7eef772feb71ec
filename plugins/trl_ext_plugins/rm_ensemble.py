"""Reward-model ensembles: mean, worst case (WCO) and uncertainty-weighted (UWO) optimisation (arXiv 2310.02743).

A policy that is trained on one reward model finds its mistakes. Several models make different ones. Where they disagree
about a completion, at least one of them is wrong, so a conservative combination pays less there.

The named reward columns, of models or of functions, become one. Later plugins and the trainer see that column only. The
variance is divided by the number of models, as in the paper and in the authors' best-of-n code. Their PPO code divides
by one less, which is NaN for a single model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks import (
    Config,
    Plugin,
    Refuse,
    Requirement,
    RewardName,
    Rewards,
    Scored,
    UsageError,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.moments import Moments, add_to_moments, running_std

Objective = Literal["mean", "wco", "uwo"]


def disagreement(scores: torch.Tensor) -> torch.Tensor:
    """Returns the variance over the models of scores (K, N), with divisor K: (N,). NaN entries are left out."""
    return (scores - scores.nanmean(dim=0)).square().nanmean(dim=0)


def combine(scores: torch.Tensor, objective: Objective, coefficient: float = 0.1) -> torch.Tensor:
    """Combines the scores of K models for N completions into one reward each.

    Args:
        scores: (K, N). A model whose score is NaN has no part in that completion.
        objective: The mean, the minimum (WCO), or mean - coefficient * variance (UWO).
        coefficient: The lambda of UWO.

    Returns:
        (N,) NaN where every model gave NaN.
    """
    mean = scores.nanmean(dim=0)
    if objective == "mean":
        return mean
    if objective == "wco":
        return scores.nan_to_num(nan=torch.inf).amin(dim=0).where(~mean.isnan(), torch.nan)
    return mean - coefficient * disagreement(scores)


class RewardModelEnsemble(Plugin):
    name = "rm-ensemble"
    paper = "arXiv 2310.02743"
    bibtex = """@inproceedings{coste2024reward,
      title = {{Reward Model Ensembles Help Mitigate Overoptimization}},
      author = {Coste, Thomas and Anwar, Usman and Kirk, Robert and Krueger, David},
      booktitle = {International Conference on Learning Representations},
      year = {2024},
      eprint = {2310.02743},
      archivePrefix = {arXiv},
    }"""
    summary = "combines several reward models into one reward, which is lower where they disagree"
    trainers = ("grpo", "rloo")
    state = ("moments",)

    @dataclass(frozen=True)
    class Options:
        models: tuple[RewardName, ...] = option(
            (), help="reward functions or models that are combined; default: all", source="ours"
        )
        objective: Objective = option(
            "wco", help="the mean, the minimum, or the mean minus a multiple of the variance", source="ours"
        )
        coefficient: float = option(0.1, ge=0, help="factor of the variance in `uwo`; 0.1 .. 1", source="paper, PPO")
        column: str = option("ensemble", min_length=1, help="name of the reward that takes their place", source="ours")
        standardize: bool = option(
            False,
            help="bring the models to one scale with the mean and deviation of all scores so far",
            source="authors' code",
        )

        def __post_init__(self) -> None:
            twice = [name for name in self.models if self.models.count(name) > 1]
            if twice:
                raise ValueError(f"models names {twice[0]} twice; name each model once.")

    options: Options

    def start(self) -> None:
        self.moments: dict[str, Moments] = {}

    def split(self, names: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Returns the columns that are combined, and the others."""
        models = [name for name in names if not self.options.models or name in self.options.models]
        return models, [name for name in names if name not in models]

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...] | None:
        self.given = names
        rest = self.split(names)[1]
        # `configure` refuses two rewards of one name
        return None if self.options.column in rest else (self.options.column, *rest)

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        if config.reward_names is None:
            return
        models, rest = self.split(self.given)
        if self.options.column in rest:
            yield Refuse(
                f"a reward is called {self.options.column!r} already.", "Set rm-ensemble.column to another name."
            )
        weights = config.args.reward_weights or ()
        # the weights are those of the reward functions, so of these columns only if no plugin rewrites them before
        if config.rewriters[0] == self.name and len(weights) == len(self.given):
            problem = self.unequal(self.given, weights)
            if problem:
                yield Refuse(*problem)
        if len(models) == 1:
            yield Warn(f"{models[0]} is the only model, so nothing is combined")

    def unequal(self, names: tuple[str, ...], weights: Sequence[float]) -> tuple[str, str] | None:
        """Returns what is wrong with the weights of the models, and the way out, or None."""
        of_models = [weights[names.index(name)] for name in self.split(names)[0]]
        if len(set(of_models)) <= 1:
            return None
        return (
            f"the models have the reward_weights {', '.join(f'{weight:g}' for weight in of_models)}, and their "
            f"ensemble takes one weight.",
            "Give all of them that weight in reward_weights.",
        )

    @hookimpl
    def rewards(self, scored: Scored) -> Rewards:
        options, names = self.options, scored.reward_names
        problem = self.unequal(names, scored.reward_weights.tolist())
        if problem:
            raise UsageError(f"{self.name}: {' '.join(problem)}")
        models, rest = self.split(names)
        scores = torch.stack([scored.reward(name) for name in models]).double()  # (K, N)
        for name, values in zip(models, scores, strict=True):
            scored.log(f"model/{name}", values)
        if options.standardize:
            scores = torch.stack([self.scaled(*pair, scored.mode) for pair in zip(models, scores, strict=True)])
        combined = combine(scores, options.objective, options.coefficient)
        scored.log("std", disagreement(scores).sqrt())
        scored.log("penalty", scores.nanmean(dim=0) - combined)
        kept = [scored.reward_index(name) for name in rest]
        weight = scored.reward_weights[names.index(models[0])]
        return Rewards(
            torch.cat([combined.to(scored.rewards).unsqueeze(1), scored.rewards[:, kept]], dim=1),
            (options.column, *rest),
            torch.cat([weight.reshape(1), scored.reward_weights[kept]]),
        )

    def scaled(self, name: str, scores: torch.Tensor, mode: str) -> torch.Tensor:
        """Standardises the scores of one model (N,), those of this round included while it trains."""
        moments = self.moments.get(name, (0.0, 0.0, 0.0))
        if mode == "train":
            moments = self.moments[name] = add_to_moments(moments, scores[~scores.isnan()])
        return (scores - moments[1]) / running_std(moments)
