"""SPAE as a plugin: its options and hooks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_ext.shared_prefix import ProbeCost
from trl_ext_hooks import (
    ColumnName,
    Config,
    Curve,
    Need,
    Plugin,
    Recommend,
    Refuse,
    Requirement,
    Round,
    Span,
    TrainerView,
    UsageError,
    Views,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.answers import answer_requirements, row_answer
from trl_ext_hooks.toolkit.callables import load

from .maths import outcome_advantages, saturated_before, spae_advantages, step_of_tokens
from .probing import Probe, StepFinder, Steps, ask_policy, stop_tokens

PROBE = "**Final Answer**\n\\boxed{"


class SPAE(Plugin):
    """SPAE for GRPOTrainer. RLOO works on whole rows and is refused."""

    name = "spae"
    paper = "arXiv 2601.03823"
    bibtex = """@misc{spae2026,
      title = {{Step Potential Advantage Estimation: Harnessing Intermediate Confidence and Correctness for
        Efficient Mathematical Reasoning}},
      eprint = {2601.03823},
      archivePrefix = {arXiv},
      year = {2026},
    }"""
    summary = "probes the policy after every step; damps advantages once it knows the answer, rewards rising potential"
    trainers = ("grpo",)
    needs = ("token_advantages",)
    claims = ("estimator",)

    @dataclass(frozen=True)
    class Options:
        """Options of SPAE."""

        alpha: float = option(0.5, ge=0, le=1, help="damping after saturation, 0 to 1", source="paper, table 2")
        xi: float = option(0.5, ge=0, help="weight of the bonus for rising potentials, 0 to 1", source="paper, table 2")
        eps_sat: float = option(
            0.9, gt=0, lt=1, help="potential above which a step is saturated", source="authors' script"
        )
        num_probes: int = option(
            5, ge=0, help="answers drawn at a step for Conf; 0 = entropies along the right answer", source="paper"
        )
        max_probe_tokens: int = option(10, ge=1, help="tokens of a drawn answer", source="paper and script")
        probe_temperature: float = option(
            0.6, gt=0, help="of drawing only, never of Conf and Acc", source="authors' script"
        )
        probe: str = option(
            PROBE, min_length=1, help="text behind a step that asks for the answer", source="authors' script"
        )
        max_steps_probed: int | None = option(
            None, ge=1, help="probed steps of a row, evenly thinned; all by default", source="ours"
        )
        answer_column: ColumnName = option("answer", help="column of the data with the right answer", source="ours")
        split: Literal["text", "vocab"] = option(
            "text",
            help="find steps in the decoded text, or by vocabulary entries that end in .ĊĊ",
            source="ours; code: vocab",
        )
        thinking_end: str = option("</think>", min_length=1, help="where steps end", source="authors' script")
        filter_zero_variance: bool = option(
            True, help="leave groups of equal rewards out of everything, unprobed", source="paper, pipeline figure"
        )
        tail_mode: Literal["last", "next"] = option(
            "last", help="tokens behind the last step belong to it, or are a step without a bonus", source="ours"
        )
        eps: float = option(1e-8, gt=0, help="added to the deviation over the batch's tokens", source="ours")
        share: Literal["auto", "always", "never"] = option(
            "auto", help="compute what probes of a rollout share once: where exact, or stop, or never", source="ours"
        )
        batch_tokens: int = option(16384, ge=1, help="tokens of one forward of probes, roughly", source="ours")
        prober: str | None = option(
            None,
            help="module:function that answers probes in place of the policy: probes -> (Acc, Conf) each",
            source="ours",
        )

    options: Options

    def start(self) -> None:
        self.steps: list[Steps] = []  # of this process's rows in the last round
        self.kept: torch.Tensor | None = None  # (N,) rows that the last round learns from
        self._last_round = 0.0  # when the last round had its probes
        self._warned: set[str] = set()

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        prober = self.options.prober
        yield from answer_requirements(config, self.options.answer_column, "spae.answer_column")
        yield Recommend("loss_type", "dapo", "paper: a mean over tokens")
        yield Recommend("epsilon_high", 0.28, "paper: DAPO's clipping")
        if prober is None:
            yield Need("whole_parameters")  # processes have different numbers of probes
        else:
            try:
                load(prober)
            except UsageError as error:
                yield Refuse(f"{error}.", "Correct spae.prober.")

    @hookimpl
    def setup(self, trainer: TrainerView) -> None:
        options = self.options
        self._find = StepFinder(
            trainer.tokenizer, options.thinking_end, options.split == "vocab", options.max_steps_probed
        )
        self._prober = load(options.prober) if options.prober else None
        self._stop = stop_tokens(trainer)

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        options = self.options
        outcome, self.kept = outcome_advantages(
            round.total_reward, round.group_ids, filter_zero_variance=options.filter_zero_variance
        )
        self.steps = self._probed(round, self.kept)
        numbers = [
            step_of_tokens(steps.ends, len(ids), options.tail_mode)
            for steps, ids in zip(self.steps, round.completion_ids, strict=True)
        ]
        # How many tokens of each step the loss counts, that of a tail included.
        counts = [
            torch.bincount(number[mask[: len(number)].bool()], minlength=len(steps.ends) + 1).tolist()
            for steps, number, mask in zip(self.steps, numbers, round.loss_mask.cpu(), strict=True)
        ]
        # Every process computes the same from all rows, in the same order.
        rows = round.trainer.gather_objects([(s.potential, count) for s, count in zip(self.steps, counts, strict=True)])
        potential = _padded([values for values, _ in rows], torch.nan)  # (N, K)
        tokens = _padded([count for _, count in rows], 0.0)  # (N, K + 1)
        of_steps = spae_advantages(
            outcome.cpu(),
            self.kept.cpu(),
            potential,
            tokens,
            alpha=options.alpha,
            xi=options.xi,
            eps_sat=options.eps_sat,
            eps=options.eps,
        )[round.local]
        self._log(round, outcome[round.local].cpu(), potential[round.local], tokens[round.local])
        of_tokens = torch.zeros(round.loss_mask.shape, dtype=round.advantages.dtype)
        for row, number in enumerate(numbers):
            of_tokens[row, : len(number)] = of_steps[row, number].to(of_tokens)
        return of_tokens.to(round.loss_mask.device) * round.loss_mask

    @hookimpl
    def keep_rows(self, round: Round) -> torch.Tensor | None:
        return self.kept if self.options.filter_zero_variance else None

    def _probed(self, round: Round, kept: torch.Tensor) -> list[Steps]:
        """Returns the steps of this process's rows with Acc and Conf; none where a row is not probed."""
        if "pixel_values" in round.batch:
            raise ValueError("SPAE probes text, and this batch has images.")
        began, column = time.perf_counter(), self.options.answer_column
        asked = (kept[round.local].cpu() & (round.loss_mask.sum(dim=1) > 0).cpu()).nonzero().flatten().tolist()
        ends: dict[int, list[int]] = {}  # row -> last token of each of its steps
        probes: list[Probe] = []
        suffix = self._find.reader.ids(self.options.probe)
        for row in asked:
            answer, ids = row_answer(round.rows[row], column), round.completion_ids[row]
            target = () if answer is None else tuple(self._find.reader.ids(answer))
            if not target:
                self._warn(f"spae: rows without an answer in the column {column!r} are not probed.")
                continue
            ends[row] = self._find(ids, round.written[row])
            prompt = round.batch["prompt_ids"][row][round.batch["prompt_mask"][row].bool()].tolist()
            for step, end in enumerate(ends[row]):
                probes.append(Probe(round.offset + row, step, (*prompt, *ids[: end + 1], *suffix), target))
        answers, cost = self._answers(round, probes)
        if len(answers) != len(probes):
            raise ValueError(f"the prober answered {len(answers)} of {len(probes)} probes.")
        now = time.perf_counter()
        round.log("probes", len(probes), len(round.rows))
        round.log("no_answer", len(asked) - len(ends), len(asked))
        round.log("probe_runtime", now - began)
        round.log("probe_runtime_share", now - began, now - self._last_round if self._last_round else 0.0)
        round.log("probe_token_ratio", cost.row_tokens, cost.computed_tokens)
        round.log("probe_dense_share", cost.dense_forwards, cost.forwards)
        self._last_round = now
        in_order = iter(answers)
        steps = [Steps()] * len(round.rows)
        for row, tokens in ends.items():
            pairs = [next(in_order) for _ in tokens]
            acc, conf = (tuple(float(pair[side]) for pair in pairs) for side in range(2))
            steps[row] = Steps(tuple(tokens), acc, conf)
        return steps

    def _answers(self, round: Round, probes: Sequence[Probe]) -> tuple[Sequence[tuple[float, float]], ProbeCost]:
        """Returns (Acc, Conf) of every probe, and what they cost."""
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
        """Warns once in a run."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def _log(self, round: Round, outcome: torch.Tensor, potential: torch.Tensor, tokens: torch.Tensor) -> None:
        """Logs what potentials (b, K) say about the rows of this process that were probed."""
        number = (~potential.isnan()).sum(dim=1)
        probed, last = number > 0, torch.arange(potential.shape[1]) == number.unsqueeze(1) - 1
        saturated = saturated_before(potential, self.options.eps_sat)  # (b, K + 1)
        round.log("steps", number[probed])
        round.log("first_potential", potential[:, :1])
        round.log("last_potential", potential[last])
        round.log("tokens_after_saturation", tokens[saturated > 0].sum(), tokens[probed].sum())
        round.log("right_to_wrong", (saturated[:, -1] > 0)[probed & (outcome < 0)].double())

    @hookimpl
    def inspect(self, round: Round) -> Views:
        """Returns steps with their potentials, and curves of Acc, Conf and potential."""
        spans, curves = [], []
        for row, steps in enumerate(self.steps):
            potential, start = steps.potential, 0
            for number, (end, value) in enumerate(zip(steps.ends, potential, strict=True), 1):
                spans.append(Span(row, start, end + 1, f"step {number}", value))
                start = end + 1
            if steps.ends:
                for name, values in (("potential", potential), ("Acc", steps.acc), ("Conf", steps.conf)):
                    curves.append(Curve(row, name, steps.ends, values))
        return Views(spans, curves)


def _padded(rows: Sequence[Sequence[float]], fill: float) -> torch.Tensor:
    """Returns rows of different lengths as one float64 tensor."""
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill)
