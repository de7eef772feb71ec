"""Polychromic as a plugin: asks for strategies, and hands the advantages of sets to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext_hooks import Config, Plugin, Refuse, Requirement, Round, Span, UsageError, Views, Warn, hookimpl, option
from trl_ext_hooks.toolkit.callables import call_together, load
from trl_ext_hooks.toolkit.groups import label_ids, subgroup_ids

from .maths import UNNAMED, polychromic_advantages, set_scores


class Polychromic(Plugin):
    name = "polychromic"
    paper = "arXiv 2509.25424"
    bibtex = """@inproceedings{polychromic2026,
      title = {{Polychromic Objectives for Reinforcement Learning}},
      author = {Ibn Hamid, Jubayer and Orney, Ifdita Hasan and Xu, Ellen and Finn, Chelsea and Sadigh, Dorsa},
      booktitle = {International Conference on Learning Representations},
      eprint = {2509.25424},
      archivePrefix = {arXiv},
      year = {2026},
    }"""
    summary = "rewards sets of completions that are good and use different strategies"
    trainers = ("grpo", "rloo")
    claims = ("estimator",)

    @dataclass(frozen=True)
    class Options:
        strategy: str = option(
            help="dotted path of a function that names the strategy of each completion, called as a reward function is"
        )
        set_size: int = option(4, ge=1, help="completions of a set", source="paper")

        def __post_init__(self) -> None:
            load(self.strategy)  # a wrong path is reported before anything else is loaded

    options: Options

    def start(self) -> None:
        self.strategy: Callable[..., Any] = load(self.options.strategy)

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        size, generations = self.options.set_size, config.args.num_generations
        if generations <= size:
            yield Refuse(
                f"num_generations={generations} completions of a prompt have no two sets of {size}, so all advantages "
                f"would be 0.",
                f"Set num_generations above {size}, or polychromic.set_size below {generations}.",
            )
        if size == 1:
            yield Warn("sets of one completion cannot be diverse; advantages are rewards minus the mean of the group")

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        self.names = self.name_strategies(round)
        everywhere = round.trainer.gather_objects(self.names)
        strategies = label_ids(everywhere, missing=UNNAMED).to(round.rewards.device)
        rewards = round.total_reward.to(round.rewards.dtype)
        scores = set_scores(rewards, strategies, round.group_ids, self.options.set_size)
        self.own_scores = scores.own_sets[round.local].tolist()
        named = scores.in_sets & (strategies != UNNAMED)
        kinds = len(subgroup_ids(round.group_ids, strategies)[named].unique())
        round.log("strategies", kinds, len(round.group_ids[scores.in_sets].unique()))
        round.log("set_score", scores.all_sets[scores.in_sets])
        round.log("unnamed", (strategies == UNNAMED)[round.local])
        return polychromic_advantages(rewards, scores)

    def name_strategies(self, round: Round) -> list[Any]:
        """Returns the strategies of this process's rows, None for none. An error stops every process. Collective."""
        given = {"prompts": round.prompts, "completions": round.completions, "completion_ids": round.completion_ids}

        def named() -> list[Any]:
            return checked_names(self.strategy(**given, **round.columns), len(round.rows), self.options.strategy)

        return call_together(round.trainer, named)

    @hookimpl
    def inspect(self, round: Round) -> Views:
        shown = zip(self.names, self.own_scores, round.completion_ids, strict=True)
        return Views(
            [
                Span(row, 0, len(ids), f"strategy {str(name)[:20]}", value=score)
                for row, (name, score, ids) in enumerate(shown)
                if name is not None and len(ids)
            ]
        )


def checked_names(result: Any, rows: int, path: str) -> list[Any]:
    """Returns what a function of strategies returned, if that is one hashable value, or None, for each row."""
    if not isinstance(result, list | tuple) or len(result) != rows:
        got = f"{len(result)} values" if isinstance(result, list | tuple) else type(result).__name__
        raise UsageError(
            f"polychromic.strategy {path!r} returned {got}, expected a list of {rows}: one per completion."
        )
    for row, name in enumerate(result):
        try:
            hash(name)
        except TypeError as error:
            raise UsageError(
                f"polychromic.strategy {path!r} returned {type(name).__name__} for row {row}, expected a text, a "
                f"number or another hashable value, such as a frozenset of tools, or None for no strategy."
            ) from error
    return list(result)
