"""TGDPO: token-level reward guidance for DPO (arXiv 2506.14574).

DPO gives every token of an answer the same coefficient beta. TGDPO multiplies it token by token with a factor made from
a token reward, usually the implicit reward of a model that was trained with DPO before: good tokens of the chosen
answer and bad tokens of the rejected one move more, the others less.

Stages: pair_batch, pair_logps, pair_metrics. The factors are constants, so weighting the log-probabilities of policy
and reference by them gives the authors' loss. Against their code: factors below 0 are counted and can be cut off
(`min_factor`), values that are not finite stop the run, and a guide's own beta can be given (`guide_beta`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
    UsageError,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.tokens import align_tokens

GUIDE, REWARDS = "guide_logps", "token_rewards"


@dataclass(frozen=True)
class TGDPOOptions:
    """Options of TGDPO. The guidance is exactly one of `guide`, `reward_func` and `reward_columns`."""

    alpha: float = option(
        0.5, help="strength of the guidance, 0 (plain DPO) to 2", source="authors' configuration; paper tries 0.5, 1, 2"
    )
    guide: str | None = option(
        None, help="model or PEFT adapter that was trained with DPO or SimPO on the same data", source="paper"
    )
    reward_func: str | None = option(
        None, help="module:function that takes Pairs and returns (2n, L-1) token rewards", source="ours"
    )
    reward_columns: bool = option(
        False,
        help="take token rewards from the columns chosen_token_rewards and rejected_token_rewards, one number per "
        "completion token",
        source="ours",
    )
    guide_beta: float | None = option(
        None, help="beta of the guide's implicit reward; null takes the trainer's", source="null: authors' code"
    )
    min_factor: float | None = option(
        None, help="least factor, 0 to 0.2; null lets factors be negative", source="null: authors' code"
    )
    precompute: bool = option(
        False, help="score all data with the guide before training, once, and then drop the guide", source="ours"
    )

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ValueError("alpha must not be negative")
        if self.sources > 1:
            raise ValueError("guide, reward_func and reward_columns exclude each other; give one")
        if self.guide is None and (self.precompute or self.guide_beta is not None):
            raise ValueError("precompute and guide_beta belong to a guide; token rewards from elsewhere are used as is")
        if self.reward_func is not None and ":" not in self.reward_func:
            raise ValueError("reward_func must be module:function, such as my_rewards:token_rewards")

    @property
    def sources(self) -> int:
        """How many sources of guidance are given."""
        return (self.guide is not None) + (self.reward_func is not None) + self.reward_columns


def implicit_rewards(guide: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """r_hat[i,t] = beta * (log pi_hat - log pi_ref), the token reward of a DPO-trained guide.

    Args:
        guide, reference: (2n, T) log-probabilities of the realised tokens.

    Returns:
        (2n, T), detached.
    """
    return beta * (guide - reference).detach()


def guidance_factors(rewards: torch.Tensor, alpha: float, *, min_factor: float | None = None) -> torch.Tensor:
    """f[i,t] = 1 + alpha * r_hat for chosen rows and 1 - alpha * r_hat for rejected rows.

    Args:
        rewards: (2n, T), the n chosen rows first.
        alpha: 0 gives factors of exactly 1.
        min_factor: Least factor. The theory needs f > 0; the authors' code does not enforce it.

    Returns:
        (2n, T). Without token reward a factor is 1.
    """
    chosen, rejected = rewards.chunk(2)
    factors = torch.cat([1 + alpha * chosen, 1 - alpha * rejected])
    return factors if min_factor is None else factors.clamp(min=min_factor)


def guided_margin(policy: torch.Tensor, reference: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """h / beta = sum_t f * (lp - rf) of the chosen row - the same sum of the rejected row; the loss is -logsigmoid(h).

    What TRL forms of the weighted log-probabilities, written down for tests and metrics.

    Args:
        policy, reference: (2n, T), 0 outside the completions.
        factors: (2n, T).

    Returns:
        (n,). A completion without tokens adds 0.
    """
    chosen, rejected = (factors * (policy - reference)).sum(dim=1).chunk(2)
    return chosen - rejected


class TGDPO(Plugin):
    """TGDPO for DPOTrainer, with the loss type `sigmoid`."""

    name = "tgdpo"
    paper = "arXiv 2506.14574"
    summary = "weights every token of DPO by a token reward, such as that of a model trained with DPO before"
    trainers = ("dpo",)
    Options = TGDPOOptions
    fields = (GUIDE, REWARDS)

    options: TGDPOOptions

    def __init__(self, options: TGDPOOptions | None = None) -> None:
        super().__init__(options)
        self._guide: Any = None
        self._reward: Callable[[Pairs], torch.Tensor] | None = None
        self._factors: torch.Tensor | None = None

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        plain = "the factors belong to the log-sigmoid of the paper's equation"
        found: list[Requirement] = [
            Require("loss_type", (["sigmoid"],), why=plain),
            Require("f_divergence_type", ("reverse_kl",), why=plain),
            Require("ld_alpha", (None,), why="two weightings of the same tokens would multiply"),
            Require("use_weighting", (False,), why="WPO's weights would be computed from weighted log-probabilities"),
        ]
        if not self.options.sources:
            found.append(
                Refuse(
                    "nothing says which tokens are good.",
                    "Give a model that was trained with DPO on these pairs, tgdpo.guide=FOLDER; or tgdpo.reward_func, "
                    "or tgdpo.reward_columns=true.",
                )
            )
        if {"image", "images"} & set(config.columns or ()):
            found.append(Refuse("the data hold images, which the guide does not see.", "Use data of text."))
        if self.options.reward_columns:
            found += [Need(f"column:{side}_{REWARDS}") for side in ("chosen", "rejected")]
        if self.options.reward_func is not None:
            try:
                self._load_reward()
            except (ImportError, AttributeError) as error:
                found.append(Refuse(f"reward_func: {error}.", "Correct tgdpo.reward_func, as in module:function."))
        if self.options.alpha == 0:
            found.append(Warn("alpha is 0, so this is plain DPO"))
        if self.options.precompute and config.args.sync_ref_model:
            found.append(Warn("the reference moves during training; the precomputed guide does not"))
        return found

    @hookimpl
    def setup(self, trainer: TrainerView) -> None:
        if self.options.reward_func is not None:
            self._reward = self._load_reward()
        if self.options.guide is None:
            return
        self._guide = trainer.frozen_model(self.options.guide)
        if self.options.precompute:
            key = f"{_identity(self.options.guide)} {trainer.unwrapped_model.dtype}"
            trainer.precompute_pairs(GUIDE, self._score, key)
            self._guide = None

    @hookimpl
    def teardown(self) -> None:
        self._guide = None

    @hookimpl
    def pair_batch(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        if self._reward is not None:
            name, values = REWARDS, self._reward(pairs)
            if values.shape != pairs.mask.shape:
                raise UsageError(
                    f"tgdpo.reward_func returned {tuple(values.shape)} token rewards, expected "
                    f"{tuple(pairs.mask.shape)}: one row per chosen answer, then one per rejected answer"
                )
        elif self.options.reward_columns or self.options.precompute:
            name = REWARDS if self.options.reward_columns else GUIDE
            values = _from_columns(pairs, name)
        else:
            name, values = GUIDE, self._score(pairs)
        _check_finite(pairs, name, values)
        return {name: values}

    @hookimpl
    def pair_logps(self, pairs: ScoredPairs) -> PairLogps:
        reference = pairs.ref_per_token_logps
        assert reference is not None  # `pair_logps` always has it
        rewards = pairs.fields.get(REWARDS)
        if rewards is None:
            beta = pairs.trainer.args.beta if self.options.guide_beta is None else self.options.guide_beta
            rewards = implicit_rewards(pairs.fields[GUIDE], reference, beta)
        factors = guidance_factors(rewards.detach(), self.options.alpha, min_factor=self.options.min_factor)
        self._factors = factors
        return PairLogps(factors * pairs.per_token_logps, factors * reference)

    @hookimpl
    def pair_metrics(self, pairs: ScoredPairs) -> dict[str, tuple[float, float]]:
        """Factors of both sides, the share below 0, and DPO's rewards and loss without factors."""
        assert self._factors is not None and pairs.ref_per_token_logps is not None
        beta, count = pairs.trainer.args.beta, len(pairs.rows)
        sides = zip(("chosen", "rejected"), self._factors.chunk(2), pairs.mask.chunk(2), strict=True)
        found = {f"factor/{side}": (values[mask].sum().item(), mask.sum().item()) for side, values, mask in sides}
        found["negative"] = ((self._factors[pairs.mask] < 0).sum().item(), pairs.mask.sum().item())
        ratios = pairs.per_token_logps - pairs.ref_per_token_logps
        chosen, rejected = (beta * ratios.sum(dim=1)).chunk(2)
        found["rewards/chosen"], found["rewards/rejected"] = (
            (chosen.sum().item(), count),
            (rejected.sum().item(), count),
        )
        found["rewards/margins"] = ((chosen - rejected).sum().item(), count)
        found["rewards/accuracies"] = ((chosen > rejected).sum().item(), count)
        found["dpo_loss"] = (-torch.nn.functional.logsigmoid(chosen - rejected).sum().item(), count)
        self._factors = None
        return found

    def _score(self, pairs: Pairs) -> torch.Tensor:
        return pairs.trainer.score_pairs(self._guide, pairs.batch)

    def _load_reward(self) -> Callable[[Pairs], torch.Tensor]:
        module, _, name = str(self.options.reward_func).partition(":")
        found: Callable[[Pairs], torch.Tensor] = getattr(importlib.import_module(module), name)
        return found


def _from_columns(pairs: Pairs, name: str) -> torch.Tensor:
    """(2n, L-1) from the columns `chosen_NAME` and `rejected_NAME`, which hold a number per completion token."""
    values: list[Sequence[float]] = []
    for side in ("chosen", "rejected"):
        for row in pairs.rows:
            own, ids = row[f"{side}_{name}"], row[f"{side}_ids"]
            if len(own) != len(ids):
                raise UsageError(
                    f"{side}_{name} has {len(own)} numbers for the {len(ids)} tokens of {_excerpt(pairs, ids)!r}; it "
                    f"needs one per token, the end of the answer included"
                )
            values.append(own)
    return align_tokens(values, pairs.batch["completion_mask"], truncation=pairs.trainer.args.truncation_mode)


def _check_finite(pairs: Pairs, name: str, values: torch.Tensor) -> None:
    bad = (~torch.isfinite(values) & pairs.mask).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        side, n = ("chosen", row) if row < len(pairs.rows) else ("rejected", row - len(pairs.rows))
        raise UsageError(
            f"{name} of pair {n} in this batch ({side}, position {token + 1}) is {values[row, token].item()}; its "
            f"text: {_excerpt(pairs, pairs.batch['input_ids'][row][pairs.batch['attention_mask'][row] != 0])!r}"
        )


def _excerpt(pairs: Pairs, ids: Any) -> str:
    return str(pairs.trainer.processing_class.decode(ids))[:200]


def _identity(path: str) -> str:
    """A name for the content of a model: the files of a folder with sizes and times, or the name on the hub."""
    if not os.path.isdir(path):
        return path
    files = sorted((entry.name, entry.stat()) for entry in os.scandir(path) if entry.is_file())
    return " ".join([os.path.abspath(path), *(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in files)])
