"""Dr. MAS: advantages of every agent of a team by its own rewards (arXiv 2602.08847).

In a rollout of several agents each answer is a row, and GRPO normalises all rows of a prompt together. Agents whose
rewards have another mean or another scale then get advantages of the wrong size. Dr. MAS normalises the rows of every
agent among themselves.

The agent of a row comes from a rollout with a team, or from any other column of a few values, such as a language.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext_hooks import Config, Need, Plugin, Refuse, Requirement, Round, UsageError, Warn, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_normalize, group_stats, label_ids, subgroup_ids

NAMED = 16
"""Agents that have metrics of their own, in the order in which they come."""


def normalised(
    rewards: torch.Tensor, ids: torch.Tensor, *, eps: float = 1e-6, scale: bool = True, alone: str = "zero"
) -> torch.Tensor:
    """Returns (r - mean) / (std + eps) inside the groups of `ids`: (N,) float64, NaN where the reward is.

    Args:
        rewards: (N,), NaN entries are left out.
        ids: (N,) integers.
        eps: Added to the standard deviation, which has the divisor n - 1.
        scale: Whether to divide.
        alone: A group of one row gives `zero`, or with `reward` its reward minus 0, divided by 1 + eps, as the authors.
    """
    values = rewards.double()
    out = group_normalize(values, ids, scale=scale, eps=eps)
    if alone == "reward":
        out = torch.where(group_stats(values, ids).count == 1, values / (1 + eps) if scale else values, out)
    return out


def agent_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, agents: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """Returns the rewards (N,), normalised over the rows of the same group and agent, each row counting once.

    `settings` are those of `normalised`. Rows of a NaN reward have 0.
    """
    return normalised(rewards, subgroup_ids(group_ids, agents), **settings).nan_to_num(nan=0.0)


def trajectory_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, trajectories: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """Returns what Dr. MAS is compared with: mean rewards of trajectories, normalised over those of a group (N,).

    Every row has the advantage of its trajectory, and every trajectory counts once, however many rows it has.
    """
    ids = subgroup_ids(group_ids, trajectories)
    mean = group_stats(rewards, ids).mean
    order = torch.arange(len(ids), device=ids.device)
    place = torch.unique(ids, return_inverse=True)[1]
    first = torch.full_like(order, len(ids)).scatter_reduce(0, place, order, "amin")[place] == order
    one_each = normalised(torch.where(first, mean, torch.nan), group_ids, **settings)
    return group_stats(one_each, ids).mean.nan_to_num(nan=0.0)


class DrMAS(Plugin):
    name = "dr-mas"
    paper = "arXiv 2602.08847"
    bibtex = """@misc{drmas2026,
      title = {{Dr. MAS: Stable Reinforcement Learning for Multi-Agent LLM Systems}},
      eprint = {2602.08847},
      archivePrefix = {arXiv},
      year = {2026},
    }"""
    summary = "normalises the rewards of every agent of a team, or of every value of a column, on their own"
    trainers = ("grpo", "rloo")
    claims = ("estimator",)

    @dataclass(frozen=True)
    class Options:
        column: str = option(
            "agent", help="column or field that names the agent of a row, or its task, tool, language", source="ours"
        )
        normalise: Literal["prompt", "batch", "trajectory"] = option(
            "prompt",
            help="compare an agent's rows of a prompt, or of the whole round; `trajectory` is the paper's baseline",
            source="paper",
        )
        trajectory_column: str = option(
            "trajectory", help="column or field that numbers rollouts, read for the baseline only", source="ours"
        )
        scale_by_std: bool = option(True, help="divide by the standard deviation", source="paper")
        eps: float = option(1e-6, gt=0, help="added to the standard deviation", source="authors' code")
        alone: Literal["zero", "reward"] = option(
            "zero", help="advantage of an agent's only row of a prompt: 0, or its reward as it is", source="ours"
        )

    options: Options

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the options name and the method reads."""
        options = self.options
        return (options.column, *([options.trajectory_column] if options.normalise == "trajectory" else []))

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        for name, setting in zip(self.columns, ("column", "trajectory_column"), strict=False):
            if name in config.fields or "rollout_func" in config.tool_sources:
                continue
            if config.columns is not None and name not in config.columns:
                yield Refuse(
                    f"nothing gives rows a value {name!r}: the training data have {', '.join(config.columns)}, and no "
                    f"plugin of the run has it in its `fields`.",
                    f"Add a plugin whose rollout has a team of agents, or set dr-mas.{setting} to a column.",
                )
                continue
            yield Need(f"column:{name}")
            if config.columns is not None and self.options.normalise == "prompt":
                yield Warn(
                    f"all rows of a prompt have the same value in the column {name!r}, so advantages stay those of "
                    f"GRPO; dr-mas.normalise=batch compares the rows of equal values in the whole round"
                )

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        options, rewards = self.options, round.total_reward
        settings: dict[str, Any] = {"eps": options.eps, "scale": options.scale_by_std, "alone": options.alone}
        named, *others = (self.labels(round, name) for name in self.columns)
        agents = label_ids(named).to(rewards.device)
        groups = torch.zeros_like(round.group_ids) if options.normalise == "batch" else round.group_ids
        if options.normalise == "trajectory":
            out = trajectory_advantages(rewards, groups, label_ids(others[0]).to(rewards.device), **settings)
        else:
            out = agent_advantages(rewards, groups, agents, **settings)
        self.report(round, named, agents, out)
        return out

    def labels(self, round: Round, name: str) -> list[str]:
        """Returns the values of a column, of the rows of all processes, as texts. Collective."""
        values = round.columns.get(name)
        everywhere = round.trainer.gather_objects(
            [None] * len(round.rows) if values is None else [_text(value) for value in values]
        )
        if None in everywhere:
            known = ", ".join(round.columns)
            raise UsageError(f"rows of this round have no value {name!r}, which dr-mas reads; they have {known}.")
        return everywhere

    def report(self, round: Round, names: Sequence[str], agents: torch.Tensor, advantages: torch.Tensor) -> None:
        """Logs how many agents there are, and of each one its rewards and the size of its advantages."""
        real = round.group_ids >= 0
        round.log("agents", float(len(agents[real].unique())))
        round.log("alone", (group_stats(round.total_reward, subgroup_ids(round.group_ids, agents)).count == 1)[real])
        for number, name in enumerate(list(dict.fromkeys(names))[:NAMED]):
            rows = real & (agents == number)
            round.log(f"reward/{name}", round.total_reward[rows])
            round.log(f"advantage_size/{name}", advantages[rows].abs())


def _text(value: Any) -> str:
    """Returns a value of a column as text, numbers in tensors as those of lists."""
    return str(value.item() if getattr(value, "ndim", None) == 0 else value)
