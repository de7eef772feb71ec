"""DECS as a plugin: its options and hooks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch

from trl_ext_hooks import (
    ColumnName,
    Config,
    Plugin,
    Recommend,
    Refuse,
    Requirement,
    RewardName,
    Round,
    Span,
    TrainerView,
    Views,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.answers import answer_requirements, row_answer
from trl_ext_hooks.toolkit.http_judge import HttpJudge
from trl_ext_hooks.toolkit.judges import JudgeError, ask_together, make_judge

from .judging import Cutter, questions
from .maths import Chunks, count_groups, easy_and_mixed, easy_dose, next_kappa, position_advantages, token_rewards


class DECS(Plugin):
    """DECS for GRPOTrainer. RLOO works on whole rows and is refused."""

    name = "decs"
    paper = "arXiv 2509.25827"
    bibtex = """@misc{decs2025,
      title = {{Overthinking Reduction with Decoupled Rewards and Curriculum Data Scheduling}},
      eprint = {2509.25827},
      archivePrefix = {arXiv},
      year = {2025},
      note = {ICLR 2026},
    }"""
    summary = "lowers the reward of tokens behind the first right answer, per position, and doses easy prompts"
    trainers = ("grpo",)
    needs = ("token_advantages",)
    claims = ("estimator", "reward_labels")
    state = ("kappa", "ratio", "mixed", "rounds")

    @dataclass(frozen=True)
    class Options:
        """Options of DECS."""

        correct_reward: RewardName | None = option(
            None, help="reward that says whether a completion is right, the first by default", source="ours"
        )
        correct_threshold: float = option(0.0, help="a completion is right above it", source="authors' code")
        answer_column: ColumnName = option("answer", help="column of the data with the right answer", source="ours")
        judge: str | HttpJudge = option(
            "match",
            help="what finds the answer in a chunk: match, math (math-verify), module:function, or {url, model, ...} "
            "of a server",
            source="ours; paper: a fine-tuned 1.5B model behind HTTP",
        )
        on_no_verdict: Literal["stop", "skip"] = option(
            "stop", help="without a verdict: stop, or leave the completion without a span", source="ours"
        )
        judge_limit: int = option(
            17990, help="tokens of problem and chunk above which a server is not asked: no", source="authors' code"
        )
        r_plus: float = option(1.1, help="reward of a right completion's tokens", source="paper; code: beta 0.1")
        r_zero: float = option(1.0, gt=0, help="lowest reward of a right completion's redundant tokens", source="paper")
        redundant_reward: Literal["official", "eq9"] = option(
            "official", help="on redundant tokens: the authors' code, or equation 9 as printed", source="authors' code"
        )
        length_limit: int | None = option(
            None, help="L_max of the redundant reward, max_completion_length by default", source="paper"
        )
        eps: float = option(1e-6, gt=0, help="added to the deviation of a position", source="authors' code")
        curriculum: bool = option(True, help="limit the prompts that are always answered right", source="paper, eq. 11")
        kappa_lr: float = option(0.2, ge=0, help="step of kappa, 0.05 to 0.5", source="paper, grid search")
        kappa_init: float = option(0.0, ge=0, lt=1, help="share of easy prompts at the start", source="authors' code")
        ratio_init: float = option(0.5, help="R_0, the prefix ratio before the first round", source="authors' code")
        carry: bool = option(
            True, help="mixed prompts of rounds too small for an easy one count in the next", source="authors' code"
        )
        split_words: tuple[str, ...] = option(
            ("Wait", "But", "Alternatively", "Hmm", "Let", "Therefore"),
            min_length=1,
            help="words that begin a chunk, with and without a space in front",
            source="authors' code",
        )
        thinking_end: str = option("</think>", min_length=1, help="where thinking ends", source="authors' code")

        def __post_init__(self) -> None:
            if self.r_plus <= self.r_zero:
                raise ValueError("r_plus must be greater than r_zero")
            if not all(self.split_words):
                raise ValueError("split_words must not contain an empty text")

    options: Options

    def start(self) -> None:
        self.kappa, self.ratio = self.options.kappa_init, self.options.ratio_init
        self.mixed = 0  # prompts of earlier rounds that have earned no easy one yet
        self.rounds = 0
        self.chunks: list[Chunks] = []  # of this process's rows in the last round
        self.kept: torch.Tensor | None = None  # (N,) rows that the last round learns from

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        yield Recommend("loss_type", "dapo", "paper, eq. 3: a mean over tokens")
        yield from answer_requirements(config, self.options.answer_column, "decs.answer_column")
        names = config.reward_names or ()
        if len(names) > 1:
            if self.options.correct_reward is None:
                yield Warn(f"{names[0]!r}, the first reward function, says what is right (decs.correct_reward)")
            yield Warn("advantages come from that reward alone; the others are logged only")
        try:
            make_judge(self.options.judge)
        except JudgeError as error:
            yield Refuse(str(error), "Correct decs.judge.")

    @hookimpl
    def setup(self, trainer: TrainerView) -> None:
        self._judge = make_judge(self.options.judge)
        self._cutter = Cutter(trainer.tokenizer, self.options.split_words, self.options.thinking_end)

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        options = self.options
        reward = round.reward(options.correct_reward).double()  # (N,)
        correct = torch.where(reward.isnan(), torch.nan, (reward > options.correct_threshold).double())
        easy, mixed = easy_and_mixed(correct, round.group_ids)
        self.kept = self._choose(round, easy, mixed)
        self.chunks = self._judged(round, (correct == 1) & self.kept)
        # Four numbers of a row say all about its rewards, whatever the padded width on its process.
        local = [
            [*(chunks.span or (0, 0)), len(ids), chunks.ratio]
            for chunks, ids in zip(self.chunks, round.completion_ids, strict=True)
        ]
        facts = round.trainer.gather(torch.tensor(local, dtype=torch.float64, device=reward.device))  # (N, 4)
        self._learn(round, facts[:, 3], len(easy))
        here = torch.isin(round.group_ids, round.group_ids[round.local])  # rows of the groups that have a row here
        rewards = token_rewards(
            correct[here],
            facts[here, :2],
            facts[here, 2],
            round.loss_mask.shape[1],
            r_plus=options.r_plus,
            r_zero=options.r_zero,
            limit=options.length_limit or round.trainer.args.max_completion_length,
            form=options.redundant_reward,
        )
        of_groups = position_advantages(rewards, round.group_ids[here], eps=options.eps)
        first = int(here[: round.offset].sum())
        return of_groups[first : first + len(round.rows)].to(round.advantages.dtype) * round.loss_mask

    @hookimpl
    def keep_rows(self, round: Round) -> torch.Tensor | None:
        return self.kept if self.options.curriculum else None

    def _choose(self, round: Round, easy: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """Returns (N,) the rows of all mixed prompts and of some easy ones; every row in evaluation."""
        prompts = count_groups(round.group_ids)
        round.log("easy_prompts", len(easy), prompts)
        round.log("mixed_prompts", len(mixed), prompts)
        if round.mode != "train" or not self.options.curriculum:
            return torch.ones_like(round.group_ids, dtype=torch.bool)
        waiting = self.mixed if self.options.carry else 0
        allowed, self.mixed = easy_dose(self.kappa, len(mixed), waiting)
        # the same draw on every process and after a resume
        generator = torch.Generator().manual_seed(round.trainer.args.seed * 1_000_003 + self.rounds)
        self.rounds += 1
        drawn = torch.randperm(len(easy), generator=generator)[:allowed].to(easy.device)
        round.log("easy_prompts_kept", len(drawn), len(easy))
        return torch.isin(round.group_ids, torch.cat([mixed, easy[drawn]]))

    def _judged(self, round: Round, asked: torch.Tensor) -> list[Chunks]:
        """Cuts the rows of this process into chunks, and has those of the `asked` rows (N,) judged. Collective."""
        options, began = self.options, time.perf_counter()
        limit = options.judge_limit if isinstance(options.judge, HttpJudge) else None
        chunks: list[Chunks] = []
        to_judge = {}  # row -> what to ask about each of its chunks
        for row, is_asked in enumerate(asked[round.local].tolist()):
            ends, texts = self._cutter(round.completion_ids[row], round.written[row])
            chunks.append(Chunks(tuple(ends)))
            answer = row_answer(round.rows[row], options.answer_column) if is_asked else None
            if answer is not None:
                to_judge[row] = list(questions(self._cutter, round.prompts[row], answer, ends, texts, limit))
        put = [question for row in to_judge.values() for question in row if question is not None]
        unless = "decs.on_no_verdict=skip" if options.on_no_verdict == "stop" else None
        verdicts, calls = ask_together(round.trainer, self._judge, put, unless=unless)
        in_order = iter(verdicts)
        for row, about in to_judge.items():
            chunks[row] = replace(chunks[row], verdicts=tuple(False if q is None else next(in_order) for q in about))
        round.log("judge_runtime", time.perf_counter() - began)
        round.log("judge_calls", calls, len(to_judge))
        round.log("no_verdict", verdicts.count(None), len(verdicts))
        rows_asked = int(asked[round.local].sum())
        round.log("no_answer", rows_asked - len(to_judge), rows_asked)
        return chunks

    def _learn(self, round: Round, ratios: torch.Tensor, easy: int) -> None:
        """Moves kappa by the prefix ratios (N,) of this round, of which 0 means none."""
        known = ratios[ratios > 0]
        if round.mode == "train" and self.options.curriculum and len(known):
            ratio, cap = known.mean().item(), easy / count_groups(round.group_ids)
            self.kappa = next_kappa(self.kappa, ratio, self.ratio, lr=self.options.kappa_lr, cap=cap)
            self.ratio = ratio
        round.log("kappa", self.kappa)
        judged = [(c, len(ids)) for c, ids in zip(self.chunks, round.completion_ids, strict=True) if c.ratio > 0]
        spans = [chunks.span or (0, 0) for chunks, _ in judged]
        round.log("prefix_ratio", sum(chunks.ratio for chunks, _ in judged), len(judged))
        round.log("redundant_tokens", sum(end - start for start, end in spans), sum(length for _, length in judged))

    @hookimpl
    def inspect(self, round: Round) -> Views:
        """Returns the chunks of every row, in order."""
        names = {"b": "chunk", "a": "first answer", "c": "redundant", "d": "redundant"}
        spans = []
        for row, chunks in enumerate(self.chunks):
            bounds = pairwise([0, *chunks.ends])
            for number, ((start, end), label) in enumerate(zip(bounds, chunks.labels, strict=True), 1):
                if end > start:
                    spans.append(Span(row, start, end, f"{names[label]} {number}"))
        return Views(spans)
