"""TGDPO: token-level reward guidance for DPO (arXiv 2506.14574).

DPO gives every token of an answer the same coefficient beta. TGDPO multiplies it token by token with a factor made from
a token reward, usually the implicit reward of a model that was trained with DPO before. Good tokens of the chosen
answer and bad tokens of the rejected one then move more, the others less.

Stages: pair_batch (the guidance), pair_logps, pair_metrics. The factors are constants, so weighting the
log-probabilities of policy and reference by them gives the authors' loss. Against their code, factors below 0 are
counted and can be cut off (`min_factor`), values that are not finite stop the run, and a guide's own beta can be given
(`guide_beta`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from trl_ext_hooks import (
    Config,
    Need,
    PairLogps,
    Pairs,
    Plugin,
    Refuse,
    Require,
    Requirement,
    ScoredPairs,
    TrainerView,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.callables import load
from trl_ext_hooks.toolkit.pair_values import check_pair_values, pair_columns

GUIDE, REWARDS = "guide_logps", "token_rewards"


def implicit_rewards(guide: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns r_hat[i,t] = beta * (log pi_hat - log pi_ref), the token reward of a DPO-trained guide, detached.

    Args:
        guide, reference: (2n, T) log-probabilities of the realised tokens.
    """
    return beta * (guide - reference).detach()


def guidance_factors(rewards: torch.Tensor, alpha: float, *, min_factor: float | None = None) -> torch.Tensor:
    """Returns f[i,t] = 1 + alpha * r_hat for chosen rows and 1 - alpha * r_hat for rejected rows.

    Args:
        rewards: (2n, T), the n chosen rows first. Without token reward a factor is 1.
        alpha: 0 gives factors of exactly 1.
        min_factor: Lowest factor. The theory needs f > 0; the authors' code does not enforce it.
    """
    chosen, rejected = rewards.chunk(2)
    factors = torch.cat([1 + alpha * chosen, 1 - alpha * rejected])
    return factors if min_factor is None else factors.clamp(min=min_factor)


def guided_margin(policy: torch.Tensor, reference: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Returns h / beta = sum_t f * (lp - rf) of the chosen row - the same sum of the rejected row.

    The loss is -logsigmoid(h). TRL forms it from the weighted log-probabilities; this is for tests.

    Args:
        policy, reference: (2n, T), 0 outside the completions. A completion without tokens adds 0.
        factors: (2n, T).
    """
    chosen, rejected = (factors * (policy - reference)).sum(dim=1).chunk(2)
    return chosen - rejected


class TGDPO(Plugin):
    """TGDPO for DPOTrainer, with the loss type `sigmoid`."""

    name = "tgdpo"
    paper = "arXiv 2506.14574"
    bibtex = """@misc{tgdpo2025,
      title = {{TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization}},
      eprint = {2506.14574},
      archivePrefix = {arXiv},
      year = {2025},
      note = {ICML 2025},
    }"""
    summary = "weights every token of DPO by a token reward, such as that of a model trained with DPO before"
    trainers = ("dpo",)
    fields = (GUIDE, REWARDS)

    @dataclass(frozen=True)
    class Options:
        """Options of TGDPO. The guidance is exactly one of `guide`, `reward_func` and `reward_columns`."""

        alpha: float = option(
            0.5, ge=0, help="strength of the guidance, 0 (plain DPO) to 2", source="authors; paper: 0.5, 1, 2"
        )
        guide: str | None = option(
            None, help="model or PEFT adapter that was trained with DPO or SimPO on the same data", source="paper"
        )
        reward_func: str | None = option(
            None, help="module:function that takes Pairs and returns (2n, L-1) token rewards", source="ours"
        )
        reward_columns: bool = option(
            False, help="rewards per token from the columns chosen_token_rewards, rejected_token_rewards", source="ours"
        )
        guide_beta: float | None = option(
            None, help="beta of the guide's implicit reward; null takes the trainer's", source="null: authors' code"
        )
        min_factor: float | None = option(
            None, help="lowest factor, 0 to 0.2; null lets factors be negative", source="null: authors' code"
        )
        precompute: bool = option(
            False, help="score all data with the guide before training, once, and then drop the guide", source="ours"
        )

        def __post_init__(self) -> None:
            if (self.guide is not None) + (self.reward_func is not None) + self.reward_columns > 1:
                raise ValueError("guide, reward_func and reward_columns exclude each other; give one")
            if self.guide is None and (self.precompute or self.guide_beta is not None):
                raise ValueError("precompute and guide_beta belong to a guide; other token rewards are used as is")
            if self.reward_func is not None and ":" not in self.reward_func:
                raise ValueError("reward_func must be module:function, such as my_rewards:token_rewards")

    options: Options

    def start(self) -> None:
        self._guide: Any = None
        self._reward: Callable[[Pairs], torch.Tensor] | None = None

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        options, sigmoid = self.options, "the factors belong to the log-sigmoid of the paper's equation"
        yield Require("loss_type", (["sigmoid"],), why=sigmoid)
        yield Require("f_divergence_type", ("reverse_kl",), why=sigmoid)
        yield Require("ld_alpha", (None,), why="two weightings of the same tokens would multiply")
        yield Require("use_weighting", (False,), why="WPO would compute its weights from weighted log-probabilities")
        if {"image", "images"} & set(config.columns or ()):
            yield Refuse("the data hold images, which the guide does not see.", "Use text data.")
        if options.reward_columns:
            yield from (Need(f"column:{side}_{REWARDS}") for side in ("chosen", "rejected"))
        elif options.reward_func is not None:
            try:
                self._reward = load(options.reward_func)
            except ValueError as error:
                yield Refuse(f"reward_func: {error}.", "Correct tgdpo.reward_func, as in module:function.")
        elif options.guide is None:
            fix = "Set tgdpo.guide=FOLDER to a model trained with DPO on these pairs, or reward_func or reward_columns."
            yield Refuse("nothing says which tokens are good.", fix)
        if options.alpha == 0:
            yield Warn("alpha is 0, so this is plain DPO")
        if options.precompute and config.args.sync_ref_model:
            yield Warn("the reference moves during training; the precomputed guide does not")

    @hookimpl
    def setup(self, trainer: TrainerView) -> None:
        if self.options.guide is None:
            return
        self._guide = trainer.frozen_model(self.options.guide)
        if self.options.precompute:
            key = f"{_identity(self.options.guide)} {trainer.unwrapped_model.dtype}"
            trainer.precompute_pairs(GUIDE, self._score, key)
            self._guide = None  # from here on the columns hold what it says

    @hookimpl
    def teardown(self) -> None:
        self._guide = None

    @hookimpl
    def pair_batch(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        name = REWARDS if self.options.guide is None else GUIDE
        if self._reward is not None:
            values = self._reward(pairs)
        else:
            values = pair_columns(pairs, name) if self._guide is None else self._score(pairs)
        check_pair_values(pairs, name, values)
        return {name: values}

    @hookimpl
    def pair_logps(self, pairs: ScoredPairs) -> PairLogps:
        options, reference, rewards = self.options, pairs.ref_per_token_logps, pairs.fields.get(REWARDS)
        assert reference is not None  # `pair_logps` always has it
        if rewards is None:
            beta = pairs.trainer.args.beta if options.guide_beta is None else options.guide_beta
            rewards = implicit_rewards(pairs.fields[GUIDE], reference, beta)
        factors = guidance_factors(rewards.detach(), options.alpha, min_factor=options.min_factor)
        for side, values, mask in zip(("chosen", "rejected"), factors.chunk(2), pairs.mask.chunk(2), strict=True):
            pairs.log(f"factor/{side}", values[mask])
        pairs.log("negative", (factors[pairs.mask] < 0).double())
        return PairLogps(factors * pairs.per_token_logps, factors * reference)

    @hookimpl
    def pair_metrics(self, pairs: ScoredPairs) -> None:
        """Reports DPO's rewards and loss as they are without factors."""
        chosen, rejected = (pairs.trainer.args.beta * pairs.sequence_log_ratios).chunk(2)
        pairs.log("rewards/chosen", chosen)
        pairs.log("rewards/rejected", rejected)
        pairs.log("rewards/margins", chosen - rejected)
        pairs.log("rewards/accuracies", (chosen > rejected).double())
        pairs.log("dpo_loss", -logsigmoid(chosen - rejected))

    def _score(self, pairs: Pairs) -> torch.Tensor:
        return pairs.trainer.score_pairs(self._guide, pairs.batch)


def _identity(path: str) -> str:
    """Names the content of a model: the files of a folder with sizes and times, or the name on the hub."""
    if not os.path.isdir(path):
        return path
    files = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
    return " ".join([os.path.abspath(path), *(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in files)])
