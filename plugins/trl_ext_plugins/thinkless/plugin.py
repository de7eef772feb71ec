"""The options and the hooks of Thinkless."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks import (
    Config,
    Loss,
    Need,
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
from trl_ext_hooks.toolkit.losses import clipped_surrogate

from .maths import control_tokens, read_mode, sequence_mean_weights, token_mean_weights
from .tokens import token_id

LOSS_TYPES = {"token_mean": "dapo", "sequence_mean": "grpo"}
"""TRL's loss type that averages as each `aggregation` does."""


class Thinkless(Plugin):
    """DeGRPO for GRPOTrainer. RLOO has one ratio per sequence and cannot weigh tokens."""

    name = "thinkless"
    paper = "arXiv 2505.13379"
    bibtex = """@misc{thinkless2025,
      title = {{Thinkless: LLM Learns When to Think}},
      eprint = {2505.13379},
      archivePrefix = {arXiv},
      year = {2025},
      note = {NeurIPS 2025},
    }"""
    summary = "weighs the token that chooses between a short and a long answer apart from all other tokens"
    trainers = ("grpo",)
    fields = ("thinkless_mode", "thinkless_answer", "thinkless_control", "thinkless_advantages")

    @dataclass(frozen=True)
    class Options:
        """The rewards of the two modes are arguments of `mode_reward`."""

        alpha: float | None = option(
            0.001,
            ge=0,
            help="weight of the control token: start with 10 / mean response length. Against one response token it "
            "counts alpha x that length (metric control_weight): at 1 modes separate as in GRPO's token mean, at 10 "
            "sooner, far below 1 they freeze. So 0.001 is for answers of thousands of tokens, 1 for a demo with "
            "answers of 10 to 20. null: plain token mean",
            source="authors' script",
        )
        aggregation: Literal["token_mean", "sequence_mean"] = option(
            "token_mean",
            help="response tokens: one mean over all (needs loss_type=dapo), or one per answer first (loss_type=grpo)",
            source="authors' code; paper: sequence_mean",
        )
        control: Literal["position", "by_id"] = option(
            "position",
            help="what counts as control token: the first token whatever it is, or only where it is one of the two",
            source="authors' code",
        )
        turns: Literal["first", "every"] = option(
            "first", help="with tools: a control token in the model's first turn only, or in every turn", source="ours"
        )
        think: str = option("<think>", help="control token of a long answer", source="paper")
        short: str = option("<short>", help="control token of a direct answer", source="paper")
        close: str = option("</think>", help="token that ends the thinking part of a long answer", source="paper")

        def __post_init__(self) -> None:
            if len({self.think, self.short, self.close}) < 3:
                raise ValueError("think, short and close must be three different tokens")

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        if self.options.alpha is not None:
            aggregation = self.options.aggregation
            why = f"thinkless.aggregation={aggregation} rests on its mean"
            yield Require("loss_type", (LOSS_TYPES[aggregation],), why)
            yield Need("token_advantages")
        yield Require("top_entropy_quantile", (1.0,), "it would drop control tokens")
        yield Recommend("scale_rewards", "none", "authors' script")
        yield Recommend("beta", 0.001, "authors' script")
        if hasattr(config.args, "entropy_coef"):  # not every TRL has it
            yield Recommend("entropy_coef", 0.001, "authors' configuration")

    @hookimpl
    def setup(self, trainer: TrainerView) -> Sequence[Refuse]:
        tokens = {name: getattr(self.options, name) for name in ("think", "short", "close")}
        ids = {name: token_id(trainer.tokenizer, token) for name, token in tokens.items()}
        self.ids = {name: number for name, number in ids.items() if number is not None}
        missing = [token for name, token in tokens.items() if name not in self.ids]
        if missing:
            what = f"the tokenizer has no single token for {', '.join(missing)}, so the model cannot choose a mode."
            fix = (
                "Add them and teach the model to use them with warmup/thinkless.py in the folder that `trl_ext recipes "
                "--path` prints, then train its output."
            )
            return [Refuse(what, fix)]
        if getattr(trainer.processing_class, "chat_template", None) is None:
            return []
        # what the template writes behind the question comes before the model's first token
        question = "a question of trl_ext"
        opening = trainer.render([{"role": "user", "content": question}]).rpartition(question)[2]
        written = next((token for token in tokens.values() if token in opening), None)
        if written is None:
            return []
        what = f"the chat template itself writes {written!r} before the model's first token ({opening!r})."
        fix = "Use a template that leaves the choice to the model, or other chat_template_kwargs."
        return [Refuse(what, fix)]

    @hookimpl
    def annotate(self, rollout: Rollout) -> dict[str, list[str | None]]:
        """Gives reward functions the mode of each row and its answer."""
        for prompt in rollout.prompts:
            if isinstance(prompt, str) and prompt.rstrip().endswith((self.options.think, self.options.short)):
                raise ValueError(f"the prompt {prompt[-60:]!r} writes the control token itself; leave it to the model.")
        modes: list[str | None] = []
        answers: list[str | None] = []
        for completion in rollout.completion_ids:
            mode, start = read_mode(completion, self.ids)
            modes.append(mode)
            if start is None:
                answers.append(None)
            else:
                answers.append(rollout.trainer.tokenizer.decode(completion[start:], skip_special_tokens=True))
        return {"thinkless_mode": modes, "thinkless_answer": answers}

    @hookimpl
    def token_weights(self, round: Round) -> torch.Tensor | None:
        """Returns the weights of the two means, over what other plugins left in the round."""
        alpha, mask = self.options.alpha, round.loss_mask
        self.unweighted = round.token_advantages
        if alpha is None:
            return None
        control = self.control(round)
        if self.options.aggregation == "sequence_mean":
            return sequence_mean_weights(control, mask, alpha)
        n_control, n_tokens = round.trainer.gather(control.sum()).sum(), round.batch["num_items_in_batch"]
        return token_mean_weights(control, mask, alpha, n_control, n_tokens)

    def control(self, round: Round) -> torch.Tensor:
        """Returns (b, T) the control tokens of this process."""
        known = [self.ids["think"], self.ids["short"]] if self.options.control == "by_id" else None
        tools = round.batch.get("tool_mask") if self.options.turns == "every" else None
        return control_tokens(round.batch["completion_ids"], round.loss_mask, known, tools)

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        return {"thinkless_control": self.control(round), "thinkless_advantages": self.unweighted}

    @hookimpl
    def round_metrics(self, round: Round) -> None:
        """Logs the share of long answers, the rate of missing modes, the reward of each mode and control's weight."""
        modes, rewards = round.fields["thinkless_mode"], round.total_reward[round.local]
        round.log("think_share", modes.count("think"), len(modes) - modes.count(None))
        round.log("missing_control", modes.count(None), len(modes))
        for mode in ("think", "short"):
            round.log(f"reward_{mode}", rewards[[row == mode for row in modes]])
        if self.options.alpha is not None:
            n_control = self.control(round).sum()
            round.log("control_weight", self.options.alpha * (round.loss_mask.sum() - n_control), n_control)

    @hookimpl
    def loss_metrics(self, loss: Loss) -> None:
        """Logs the two means that DeGRPO adds, before they are weighed."""
        control = loss.batch["thinkless_control"]
        ratio = torch.exp(loss.per_token_logps.detach() - loss.old_per_token_logps)
        losses = clipped_surrogate(ratio, loss.batch["thinkless_advantages"], *loss.clip_range)
        for name, mask in (("control_loss", control), ("response_loss", loss.mask * ~control)):
            loss.log(name, losses * mask, mask.sum())
