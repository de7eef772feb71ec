"""Options and hooks of SPAE."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from trl_ext.shared_prefix import ProbeCost
from trl_ext_hooks import (
    Config,
    Curve,
    Need,
    Plugin,
    Recommend,
    Refuse,
    Require,
    Requirement,
    Round,
    Span,
    TrainerView,
    Views,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.judges import JudgeError, load
from trl_ext_hooks.toolkit.segments import Marks, TokenReader, step_ends, thinking_end, thinned, vocabulary_ends

from .maths import outcome_advantages, spae_advantages, step_of_tokens
from .probing import Probe, Steps, ask_policy

PROBE = "**Final Answer**\n\\boxed{"


@dataclass(frozen=True)
class SPAEOptions:
    """Options of SPAE."""

    alpha: float = option(0.5, help="damping after saturation, 0 to 1", source="paper, table 2")
    xi: float = option(0.5, help="weight of the bonus for rising potentials, 0 to 1", source="paper, table 2")
    eps_sat: float = option(0.9, help="potential above which a step is saturated", source="authors' script")
    num_probes: int = option(
        5, help="answers drawn at each step for Conf; 0 takes the entropies along the right answer", source="paper"
    )
    max_probe_tokens: int = option(10, help="tokens of a drawn answer", source="paper and script")
    probe_temperature: float = option(0.6, help="of drawing only, never of Conf and Acc", source="authors' script")
    probe: str = option(PROBE, help="text behind a step that asks for the answer", source="authors' script")
    max_steps_probed: int | None = option(
        None, help="probed steps of a row, evenly thinned; all by default", source="ours"
    )
    answer_column: str = option("answer", help="column of the data with the right answer", source="ours")
    split: Literal["text", "vocab"] = option(
        "text",
        help="find steps in the decoded text, or by vocabulary entries that end in .ĊĊ",
        source="ours; code: vocab",
    )
    thinking_end: str = option("</think>", help="where steps end", source="authors' script")
    filter_zero_variance: bool = option(
        True, help="leave groups of equal rewards out of everything, unprobed", source="paper, pipeline figure"
    )
    tail_mode: Literal["last", "next"] = option(
        "last", help="tokens behind the last step belong to it, or are a step without a bonus", source="ours"
    )
    eps: float = option(1e-8, help="added to the deviation over the batch's tokens", source="ours")
    share: Literal["auto", "always", "never"] = option(
        "auto", help="compute what probes of a rollout share once: where exact, or stop, or never", source="ours"
    )
    batch_tokens: int = option(16384, help="tokens of one forward of probes, roughly", source="ours")
    prober: str | None = option(
        None,
        help="module:function that answers probes in place of the policy: probes -> (Acc, Conf) each",
        source="ours",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.xi < 0 or not 0 < self.eps_sat < 1:
            raise ValueError("alpha must lie in [0, 1], xi must not be negative, eps_sat must lie between 0 and 1")
        if self.num_probes < 0 or self.max_probe_tokens < 1 or self.probe_temperature <= 0:
            raise ValueError("num_probes must not be negative, max_probe_tokens at least 1, probe_temperature above 0")
        if (self.max_steps_probed is not None and self.max_steps_probed < 1) or self.batch_tokens < 1:
            raise ValueError("max_steps_probed and batch_tokens must be at least 1")
        if not self.probe or not self.thinking_end or self.eps <= 0:
            raise ValueError("probe and thinking_end must not be empty, eps must be greater than 0")


class SPAE(Plugin):
    """SPAE for GRPOTrainer. RLOO works on whole rows and is refused."""

    name = "spae"
    paper = "arXiv 2601.03823"
    summary = "probes the policy after every step; damps advantages once it knows the answer, rewards rising potential"
    trainers = ("grpo",)
    Options = SPAEOptions
    claims = ("estimator",)

    options: SPAEOptions

    def __init__(self, options: SPAEOptions | None = None) -> None:
        super().__init__(options)
        self.steps: list[Steps] = []  # of this process's rows in the last round
        self.kept: torch.Tensor | None = None  # (N,) rows that the last round learns from
        self._report: dict[str, tuple[float, float]] = {}
        self._last_round = 0.0
        self._told: set[str] = set()

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        options, args = self.options, config.args
        why = "SPAE has one advantage per token"
        found: list[Requirement] = [
            Need(f"column:{options.answer_column}"),
            Require("importance_sampling_level", ("token",), why),
            Require("loss_type", ("dapo", "bnpo", "grpo", "dr_grpo", "cispo", "sapo"), why),
            Recommend("loss_type", "dapo", "paper: a mean over tokens"),
            Recommend("epsilon_high", 0.28, "paper: DAPO's clipping"),
        ]
        if hasattr(args, "off_policy_mask_threshold"):
            found.append(Require("off_policy_mask_threshold", (None,), why))
        stage3 = getattr(args, "hf_deepspeed_config", None) is not None and args.hf_deepspeed_config.is_zero3()
        if options.prober is None and (getattr(args, "fsdp", None) or stage3):
            found.append(Refuse("probes need all parameters on each process.", "Use DDP or DeepSpeed stage 2."))
        if options.prober is not None:
            try:
                load(options.prober)
            except JudgeError as error:
                found.append(Refuse(str(error), "Correct spae.prober."))
        return found

    @hookimpl
    def setup(self, trainer: TrainerView) -> None:
        options = self.options
        self._reader = TokenReader(trainer.processing_class)
        self._end = Marks(self._reader, [options.thinking_end])
        self._probe = self._reader.ids(options.probe)
        self._step_tokens = vocabulary_ends(trainer.processing_class) if options.split == "vocab" else None
        self._prober = load(options.prober) if options.prober else None
        config = getattr(trainer.unwrapped_model, "generation_config", None)
        stop = [self._reader.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
        self._stop = [i for ids in stop if ids is not None for i in ([ids] if isinstance(ids, int) else ids)]

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        options = self.options
        total = (round.rewards * round.reward_weights).double().nansum(dim=1)
        total = torch.where(torch.isnan(round.rewards).all(dim=1), torch.nan, total)  # (N,)
        outcome, kept = outcome_advantages(total, round.group_ids, filter_zero_variance=options.filter_zero_variance)
        self.kept = kept
        self.steps = self._probed(round, kept)
        steps = [
            step_of_tokens(own.ends, len(ids), options.tail_mode)
            for own, ids in zip(self.steps, round.completion_ids, strict=True)
        ]
        local = [
            (own.potential, torch.bincount(step[mask[: len(step)].bool()], minlength=len(own.ends) + 1).tolist())
            for own, step, mask in zip(self.steps, steps, round.loss_mask.cpu(), strict=True)
        ]
        everything = round.trainer.gather_objects(local)  # every process computes the same from it, in the same order
        most = max(len(potential) for potential, _ in everything)
        potential = _padded([values for values, _ in everything], most, torch.nan)
        tokens = _padded([counts for _, counts in everything], most + 1, 0.0)
        values = spae_advantages(
            outcome.cpu(),
            kept.cpu(),
            potential,
            tokens,
            alpha=options.alpha,
            xi=options.xi,
            eps_sat=options.eps_sat,
            eps=options.eps,
        )[round.local]
        self._describe(outcome[round.local].tolist(), steps, tokens[round.local])
        out = torch.zeros(round.loss_mask.shape, dtype=round.advantages.dtype)
        for row, step in enumerate(steps):
            out[row, : len(step)] = values[row, step].to(out)
        return out.to(round.loss_mask.device) * round.loss_mask

    @hookimpl
    def keep_rows(self, round: Round) -> torch.Tensor | None:
        return self.kept if self.options.filter_zero_variance else None

    def _probed(self, round: Round, kept: torch.Tensor) -> list[Steps]:
        """The steps of this process's rows with Acc and Conf; none where a row is not probed."""
        if "pixel_values" in round.batch:
            raise ValueError("SPAE probes text, and this batch has images.")
        began = time.perf_counter()
        found, probes, unknown = [Steps() for _ in round.rows], [], 0
        asked = (kept[round.local].cpu() & (round.loss_mask.sum(dim=1) > 0).cpu()).tolist()
        prompts = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(round.batch["prompt_ids"], round.batch["prompt_mask"], strict=True)
        ]
        for row, ids in enumerate(round.completion_ids):
            if not asked[row]:
                continue
            answer = round.rows[row].get(self.options.answer_column)
            target = self._reader.ids(str(answer).strip()) if answer is not None else []
            if not target:
                unknown += 1
                continue
            ends = self._ends(ids, None if round.tool_mask is None else round.tool_mask[row])
            found[row] = Steps(tuple(ends))
            for number, end in enumerate(ends):
                context = (*prompts[row], *ids[: end + 1], *self._probe)
                probes.append(Probe(round.offset + row, number, context, tuple(target)))
        if unknown:
            self._warn(f"spae: rows without an answer in the column {self.options.answer_column!r} are not probed.")
        answers, cost = self._answers(round, probes)
        if len(answers) != len(probes):
            raise ValueError(f"the prober answered {len(answers)} of {len(probes)} probes.")
        for probe, (acc, conf) in zip(probes, answers, strict=True):
            row = probe.row - round.offset
            found[row] = replace(found[row], acc=(*found[row].acc, float(acc)), conf=(*found[row].conf, float(conf)))
        now = time.perf_counter()
        self._report = {
            "probes": (len(probes), len(found)),
            "no_answer": (unknown, sum(asked)),
            "probe_runtime": (now - began, 1),
            "probe_runtime_share": (now - began, now - self._last_round if self._last_round else 0.0),
            "probe_token_ratio": (cost.row_tokens, cost.computed_tokens),
            "probe_dense_share": (cost.dense_forwards, cost.forwards),
        }
        self._last_round = now
        return found

    def _ends(self, ids: Sequence[int], free: Sequence[int] | None) -> list[int]:
        """Last token of each step that is probed; what a tool wrote ends none."""
        read = self._reader(ids)
        stop = thinking_end(ids, read, self._end)
        if self._step_tokens is None:
            ends = step_ends(read, stop)
        else:
            ends = [index for index in range(stop) if ids[index] in self._step_tokens]
        ends = [end for end in ends if free is None or free[end]]
        return ends if self.options.max_steps_probed is None else thinned(ends, self.options.max_steps_probed)

    def _answers(self, round: Round, probes: Sequence[Probe]) -> tuple[Sequence[tuple[float, float]], ProbeCost]:
        """(Acc, Conf) of every probe."""
        options = self.options
        if self._prober is not None:
            return self._prober(probes), ProbeCost()
        answers, cost = ask_policy(
            round,
            probes,
            num_probes=options.num_probes,
            max_tokens=options.max_probe_tokens,
            temperature=options.probe_temperature,
            stop=self._stop,
            shared=options.share,
            batch_tokens=options.batch_tokens,
        )
        if cost.refusal is not None:
            self._warn(f"spae: probes do not share their prefixes. {cost.refusal}")
        return answers, cost

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            warnings.warn(message, stacklevel=2)

    def _describe(self, outcome: list[float], steps: Sequence[torch.Tensor], tokens: torch.Tensor) -> None:
        """Metrics of this process's rows."""
        eps_sat = self.options.eps_sat
        probed = [
            (a, own.potential, counts) for a, own, counts in zip(outcome, self.steps, tokens, strict=True) if own.ends
        ]
        saturated = sum(
            float(counts[next((k + 1 for k, phi in enumerate(potential) if phi > eps_sat), len(counts)) :].sum())
            for _, potential, counts in probed
        )
        lost = [max(potential) > eps_sat for a, potential, _ in probed if a < 0]
        self._report |= {
            "steps": (sum(len(potential) for _, potential, _ in probed), len(probed)),
            "first_potential": (sum(potential[0] for _, potential, _ in probed), len(probed)),
            "last_potential": (sum(potential[-1] for _, potential, _ in probed), len(probed)),
            "tokens_after_saturation": (saturated, sum(float(counts.sum()) for _, _, counts in probed)),
            "right_to_wrong": (sum(lost), len(lost)),
        }

    @hookimpl
    def round_metrics(self, round: Round) -> dict[str, tuple[float, float]]:
        return self._report

    @hookimpl
    def inspect(self, round: Round) -> Views:
        """Steps with their potentials, and curves of Acc, Conf and potential."""
        spans, curves = [], []
        for row, own in enumerate(self.steps):
            potential, start = own.potential, 0
            for number, (end, value) in enumerate(zip(own.ends, potential, strict=True), 1):
                spans.append(Span(row, start, end + 1, f"step {number}", value))
                start = end + 1
            if own.ends:
                for name, values in (("potential", potential), ("Acc", own.acc), ("Conf", own.conf)):
                    curves.append(Curve(row, name, own.ends, values))
        return Views(spans, curves)


def _padded(rows: Sequence[Sequence[float]], width: int, fill: float) -> torch.Tensor:
    """(N, width) float64."""
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.float64).reshape(
        len(rows), width
    )
