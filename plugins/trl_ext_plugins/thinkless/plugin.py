"""The options and the hooks of Thinkless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks import (
    Config,
    Loss,
    Plugin,
    Recommend,
    Refuse,
    Require,
    Requirement,
    Rollout,
    Round,
    TrainerView,
    hookimpl,
    option,
)

from .degrpo import clipped_surrogate, control_tokens, sequence_mean_weights, token_mean_weights
from .tokens import token_id


@dataclass(frozen=True)
class ThinklessOptions:
    """Options of Thinkless. Rewards of the two modes are arguments of `mode_reward`."""

    alpha: float | None = option(
        0.001,
        help="weight of the control token: start with 10 / mean response length. Against one response token it counts "
        "alpha x that length (metric control_weight): at 1 modes separate as in GRPO's token mean, at 10 sooner, far "
        "below 1 they freeze. So 0.001 is for answers of thousands of tokens, 1 for a demo with answers of 10 to 20. "
        "null: plain token mean",
        source="authors' script",
    )
    aggregation: Literal["token_mean", "sequence_mean"] = option(
        "token_mean",
        help="response tokens: one mean over all (needs loss_type=dapo), or a mean per answer first (loss_type=grpo)",
        source="authors' code; paper: sequence_mean",
    )
    control: Literal["position", "by_id"] = option(
        "position",
        help="what counts as control token: the first token whatever it is, or only where it is one of the two",
        source="authors' code",
    )
    turns: Literal["first", "every"] = option(
        "first", help="with tools: a control token in the first turn of the model only, or in every turn", source="ours"
    )
    think: str = option("<think>", help="control token of a long answer", source="paper")
    short: str = option("<short>", help="control token of a direct answer", source="paper")
    close: str = option("</think>", help="token that ends the thinking part of a long answer", source="paper")

    def __post_init__(self) -> None:
        if self.alpha is not None and self.alpha < 0:
            raise ValueError("alpha must not be negative")
        if len({self.think, self.short, self.close}) < 3:
            raise ValueError("think, short and close must be three different tokens")


class Thinkless(Plugin):
    """DeGRPO for GRPOTrainer. RLOO has one ratio per sequence and cannot weigh tokens."""

    name = "thinkless"
    paper = "arXiv 2505.13379"
    summary = "weighs the token that chooses between a short and a long answer apart from all other tokens"
    trainers = ("grpo",)
    Options = ThinklessOptions
    fields = ("thinkless_mode", "thinkless_answer", "thinkless_control", "thinkless_advantages")

    options: ThinklessOptions

    def __init__(self, options: ThinklessOptions | None = None) -> None:
        super().__init__(options)
        self.ids: dict[str, int] = {}
        self._before: torch.Tensor | None = None

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        args, options = config.args, self.options
        found: list[Requirement] = []
        if options.alpha is not None:
            needed = {"token_mean": "dapo", "sequence_mean": "grpo"}[options.aggregation]
            why = f"thinkless.aggregation={options.aggregation} rests on its mean"
            found.append(Require("loss_type", (needed,), why))
            found.append(Require("importance_sampling_level", ("token",), "each token is weighed on its own"))
        rest = (
            Require("top_entropy_quantile", (1.0,), "it would drop control tokens"),
            Require("off_policy_mask_threshold", (None,), "it would drop control tokens"),
            Recommend("scale_rewards", "none", "authors' script"),
            Recommend("beta", 0.001, "authors' script"),
            Recommend("entropy_coef", 0.001, "authors' configuration"),
        )
        return found + [each for each in rest if hasattr(args, each.setting)]  # not every TRL has them all

    @hookimpl
    def setup(self, trainer: TrainerView) -> Sequence[Refuse]:
        options = self.options
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        tokens = {"think": options.think, "short": options.short, "close": options.close}
        found = {name: token_id(tokenizer, token) for name, token in tokens.items()}
        self.ids = {name: number for name, number in found.items() if number is not None}
        missing = [token for name, token in tokens.items() if name not in self.ids]
        if missing:
            what = f"the tokenizer has no single token for {', '.join(missing)}, so the model cannot choose a mode."
            fix = "Add them and teach the model to use them: python recipes/warmup/thinkless.py, then train its output."
            return [Refuse(what, fix)]
        if getattr(trainer.processing_class, "chat_template", None) is None:
            return []
        question = "a question of trl_ext"
        opening = trainer.render([{"role": "user", "content": question}]).rpartition(question)[2]
        written = [token for token in tokens.values() if token in opening]
        if not written:
            return []
        what = f"the chat template itself writes {written[0]!r} before the model's first token ({opening!r})."
        fix = "Use a template that leaves the choice to the model, or other chat_template_kwargs."
        return [Refuse(what, fix)]

    @hookimpl
    def annotate(self, rollout: Rollout) -> dict[str, list[str | None]]:
        """The mode of each row by its first token, and its answer: what follows `<short>`, or `</think>`."""
        options, ids = self.options, self.ids
        tokenizer = getattr(rollout.trainer.processing_class, "tokenizer", rollout.trainer.processing_class)
        for prompt in rollout.prompts:
            if isinstance(prompt, str) and prompt.rstrip().endswith((options.think, options.short)):
                raise ValueError(f"the prompt {prompt[-60:]!r} writes the control token itself; leave it to the model.")
        modes, answers = [], []
        for completion in rollout.completion_ids:
            first = completion[0] if completion else None
            mode = next((name for name in ("think", "short") if first == ids[name]), None)
            start = None
            if mode == "short":
                start = 1
            elif mode == "think" and ids["close"] in completion:
                start = completion.index(ids["close"]) + 1
            modes.append(mode)
            answers.append(None if start is None else tokenizer.decode(completion[start:], skip_special_tokens=True))
        return {"thinkless_mode": modes, "thinkless_answer": answers}

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor | None:
        self._before = round.token_advantages
        if self.options.alpha is None:
            return None
        control, mask = self._control(round), round.loss_mask
        if self.options.aggregation == "sequence_mean":
            return self._before * sequence_mean_weights(control, mask, self.options.alpha)
        on = round.trainer.gather(control.sum()).sum()
        total = round.batch["num_items_in_batch"]
        return self._before * token_mean_weights(control, mask, self.options.alpha, on, total)

    def _control(self, round: Round) -> torch.Tensor:
        known = [self.ids["think"], self.ids["short"]] if self.options.control == "by_id" else None
        tools = round.batch.get("tool_mask") if self.options.turns == "every" else None
        return control_tokens(round.batch["completion_ids"], round.loss_mask, known, tools)

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        assert self._before is not None
        return {"thinkless_control": self._control(round), "thinkless_advantages": self._before}

    @hookimpl
    def round_metrics(self, round: Round) -> dict[str, tuple[float, float]]:
        """Share of long answers among those with a mode, rate of missing modes, reward per mode, control's weight."""
        modes = round.fields["thinkless_mode"]
        total = (round.rewards * round.reward_weights).nansum(dim=1)[round.local].tolist()
        known = torch.isnan(round.rewards).all(dim=1)[round.local].logical_not().tolist()
        metrics = {
            "think_share": (modes.count("think"), len(modes) - modes.count(None)),
            "missing_control": (modes.count(None), len(modes)),
        }
        for mode in ("think", "short"):
            mine = [reward for reward, m, k in zip(total, modes, known, strict=True) if m == mode and k]
            metrics[f"reward_{mode}"] = (sum(mine), len(mine))
        if self.options.alpha is not None:
            control = self._control(round)
            responses = (round.loss_mask.sum() - control.sum()).item()
            metrics["control_weight"] = (self.options.alpha * responses, control.sum().item())
        return metrics

    @hookimpl
    def loss_metrics(self, loss: Loss) -> dict[str, tuple[float, float]]:
        """The two means that DeGRPO adds, before they are weighed."""
        args, control = loss.trainer.args, loss.batch["thinkless_control"]
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        advantages = loss.batch["thinkless_advantages"]
        losses = clipped_surrogate(
            loss.per_token_logps.detach(), loss.old_per_token_logps, advantages, args.epsilon, high
        )
        response = loss.mask * ~control
        return {
            "control_loss": ((losses * control).sum().item(), control.sum().item()),
            "response_loss": ((losses * response).sum().item(), response.sum().item()),
        }
