"""Options and hooks of DECS."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch

from trl_ext_hooks import (
    Config,
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
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.groups import group_stats
from trl_ext_hooks.toolkit.http_judge import HttpJudge
from trl_ext_hooks.toolkit.judges import JudgeError, Question, ask_together, make_judge
from trl_ext_hooks.toolkit.segments import LineBreaks, Marks, Read, TokenReader, chunk_ends, thinking_end

from .maths import Chunks, easy_allowed, next_kappa, position_advantages, token_rewards


@dataclass(frozen=True)
class DECSOptions:
    """Options of DECS."""

    correct: str | None = option(
        None, help="reward function that says whether a completion is right, the first by default", source="ours"
    )
    correct_above: float = option(0.0, help="rewards above it are right", source="authors' code")
    answer_column: str = option("answer", help="column of the data with the right answer", source="ours")
    judge: str | HttpJudge = option(
        "match",
        help="who finds the answer in a chunk: match, math (math-verify), module:function, or {url, model, ...} of a "
        "server",
        source="ours; paper: a fine-tuned 1.5B model behind HTTP",
    )
    on_no_verdict: Literal["stop", "skip"] = option(
        "stop", help="where the judge gives no verdict: stop, or leave the completion without a span", source="ours"
    )
    judge_limit: int = option(
        17990, help="tokens of problem and chunk beyond which a server is not asked: no", source="authors' code"
    )
    r_plus: float = option(1.1, help="reward of a right completion's tokens", source="paper; code: beta 0.1")
    r_zero: float = option(1.0, help="least reward of a right completion's redundant tokens", source="paper")
    redundant_reward: Literal["official", "eq9"] = option(
        "official", help="on redundant tokens: the authors' code, or equation 9 as printed", source="authors' code"
    )
    length_limit: int | None = option(
        None, help="L_max of the redundant reward, max_completion_length by default", source="paper"
    )
    eps: float = option(1e-6, help="added to the deviation of a position", source="authors' code")
    curriculum: bool = option(True, help="limit the prompts that are always answered right", source="paper, eq. 11")
    kappa_lr: float = option(0.2, help="step of kappa, 0.05 to 0.5", source="paper, grid search")
    kappa_init: float = option(0.0, help="share of easy prompts at the start", source="authors' code")
    ratio_init: float = option(0.5, help="R_0, the prefix ratio before the first round", source="authors' code")
    carry: bool = option(
        True, help="mixed prompts of rounds too small for one easy prompt count in the next", source="authors' code"
    )
    split_words: tuple[str, ...] = option(
        ("Wait", "But", "Alternatively", "Hmm", "Let", "Therefore"),
        help="words that begin a chunk, with and without a space in front",
        source="authors' code",
    )
    thinking_end: str = option("</think>", help="where thinking ends", source="authors' code")

    def __post_init__(self) -> None:
        if not self.r_plus > self.r_zero > 0:
            raise ValueError("r_plus must be greater than r_zero, and r_zero greater than 0")
        if self.eps <= 0 or self.kappa_lr < 0 or not 0 <= self.kappa_init < 1:
            raise ValueError("eps must be greater than 0, kappa_lr not negative, kappa_init at least 0 and below 1")
        if not self.split_words or not all(self.split_words) or not self.thinking_end:
            raise ValueError("split_words and thinking_end must not be empty")


class DECS(Plugin):
    """DECS for GRPOTrainer. RLOO works on whole rows and is refused."""

    name = "decs"
    paper = "arXiv 2509.25827"
    summary = "lowers the reward of tokens behind the first right answer, per position, and doses easy prompts"
    trainers = ("grpo",)
    Options = DECSOptions
    claims = ("estimator",)

    options: DECSOptions

    def __init__(self, options: DECSOptions | None = None) -> None:
        super().__init__(options)
        self.kappa = self.options.kappa_init
        self.ratio = self.options.ratio_init
        self.mixed = 0  # prompts of earlier rounds that earned no easy one yet
        self.rounds = 0
        self.chunks: list[Chunks] = []  # of this process's rows in the last round
        self.kept: torch.Tensor | None = None  # (N,) rows that the last round learns from
        self._report: dict[str, tuple[float, float]] = {}

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        options, args = self.options, config.args
        why = "DECS has one advantage per token"
        found: list[Requirement] = [
            Need(f"column:{options.answer_column}"),
            Require("importance_sampling_level", ("token",), why),
            Require("loss_type", ("dapo", "bnpo", "grpo", "dr_grpo", "cispo", "sapo"), why),
            Recommend("loss_type", "dapo", "paper, eq. 3: a mean over tokens"),
        ]
        if hasattr(args, "off_policy_mask_threshold"):
            found.append(Require("off_policy_mask_threshold", (None,), why))
        names = config.reward_names or ()
        if options.correct is not None:
            found.append(Need(f"reward:{options.correct}"))
        elif len(names) > 1:
            found.append(Warn(f"{names[0]!r}, the first reward function, says what is right (decs.correct)"))
        if len(names) > 1:
            found.append(Warn("advantages come from that reward alone; the others are logged only"))
        try:
            make_judge(options.judge)
        except JudgeError as error:
            found.append(Refuse(str(error), "Correct decs.judge."))
        return found

    @hookimpl
    def setup(self, trainer: TrainerView) -> None:
        options = self.options
        self._judge = make_judge(options.judge)
        self._reader = TokenReader(trainer.processing_class)
        words = [form for word in options.split_words for form in (word, " " + word)]
        self._words = Marks(self._reader, words, whole_words=True)
        self._end = Marks(self._reader, [options.thinking_end])
        self._breaks = LineBreaks(self._reader)

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        options, device = self.options, round.rewards.device
        reward = round.rewards[:, self._column(round)].double()  # (N,)
        correct = torch.where(torch.isnan(reward), torch.nan, (reward > options.correct_above).double())
        self.kept = self._select(round, correct)
        self.chunks = self._judged(round, correct)
        facts = torch.tensor(
            [
                [*(chunks.span or (0, 0)), len(ids)]
                for chunks, ids in zip(self.chunks, round.completion_ids, strict=True)
            ],
            device=device,
        )
        facts = round.trainer.gather(facts)  # (N, 3)
        self._learn(round)
        own = torch.isin(round.group_ids, round.group_ids[round.local])  # rows of the groups that have a row here
        rewards = token_rewards(
            correct[own],
            facts[own, :2],
            facts[own, 2],
            round.loss_mask.shape[1],
            r_plus=options.r_plus,
            r_zero=options.r_zero,
            limit=options.length_limit or round.trainer.args.max_completion_length,
            form=options.redundant_reward,
        )
        everything = position_advantages(rewards, round.group_ids[own], eps=options.eps)
        first = int(own[: round.offset].sum())
        return everything[first : first + len(round.rows)].to(round.advantages.dtype) * round.loss_mask

    @hookimpl
    def keep_rows(self, round: Round) -> torch.Tensor | None:
        return self.kept if self.options.curriculum else None

    def _column(self, round: Round) -> int:
        name = self.options.correct or round.reward_names[0]
        if name not in round.reward_names:
            raise ValueError(f"no reward is called {name!r} any more; the round has {', '.join(round.reward_names)}.")
        return round.reward_names.index(name)

    def _select(self, round: Round, correct: torch.Tensor) -> torch.Tensor:
        """(N,) the rows of all mixed prompts and of some easy ones; every row in evaluation and without curriculum."""
        mean = group_stats(correct, round.group_ids).mean
        groups = torch.unique(round.group_ids)
        share = torch.stack([mean[round.group_ids == group][0] for group in groups])  # NaN where nothing is known
        easy, mixed = groups[share == 1], groups[(share > 0) & (share < 1)]
        self._groups = {"easy": len(easy), "mixed": len(mixed), "all": len(groups)}
        self._report = {f"{kind}_prompts": (self._groups[kind], len(groups)) for kind in ("easy", "mixed")}
        if round.mode != "train" or not self.options.curriculum:
            return torch.ones_like(correct, dtype=torch.bool)
        allowed = 0
        if self.kappa > 0:
            self.mixed = len(mixed) + (self.mixed if self.options.carry else 0)
            allowed = easy_allowed(self.kappa, self.mixed)
            self.mixed = 0 if allowed else self.mixed
        # the same draw on every process and after a resume
        generator = torch.Generator().manual_seed(round.trainer.args.seed * 1_000_003 + self.rounds)
        self.rounds += 1
        drawn = torch.randperm(len(easy), generator=generator)[:allowed].to(easy.device)
        self._report["easy_prompts_kept"] = (len(drawn), len(easy))
        return torch.isin(round.group_ids, torch.cat([mixed, easy[drawn]]))

    def _judged(self, round: Round, correct: torch.Tensor) -> list[Chunks]:
        """The chunks of this process's rows, judged where a completion is right and kept."""
        assert self.kept is not None
        asked = ((correct == 1) & self.kept)[round.local].tolist()
        chunks: list[Chunks] = []
        questions: list[tuple[int, Question | None]] = []  # a row and what to ask about one of its chunks, None for no
        unknown = 0
        for row, ids in enumerate(round.completion_ids):
            read = self._reader(ids)
            ends = self._ends(ids, read, None if round.tool_mask is None else round.tool_mask[row])
            chunks.append(Chunks(tuple(ends)))
            answer = round.rows[row].get(self.options.answer_column)
            if asked[row] and answer is not None and str(answer).strip():
                problem = _problem(round.prompts[row])
                for start, stop in pairwise([0, *ends]):
                    question = Question(problem, read.between(start, stop), str(answer))
                    questions.append((row, question if self._worth_asking(question, stop - start) else None))
            else:
                unknown += asked[row]
        began = time.perf_counter()
        put = [question for _, question in questions if question is not None]
        unless = "decs.on_no_verdict=skip" if self.options.on_no_verdict == "stop" else None
        answers, calls = ask_together(round.trainer, self._judge, put, unless=unless)
        given = iter(answers)
        for row, about in questions:
            verdict = False if about is None else next(given)
            chunks[row] = Chunks(chunks[row].ends, (*chunks[row].verdicts, verdict))
        rows = len({row for row, _ in questions})
        self._report |= {
            "judge_runtime": (time.perf_counter() - began, 1),
            "judge_calls": (calls, rows),
            "no_verdict": (sum(answer is None for answer in answers), len(answers)),
            "no_answer": (unknown, rows + unknown),
        }
        return chunks

    def _ends(self, ids: Sequence[int], read: Read, free: Sequence[int] | None) -> list[int]:
        """Where the chunks of a completion end; what a tool wrote neither begins a chunk nor breaks a line."""

        def breaks(token: int) -> bool:
            return (free is None or bool(free[token])) and self._breaks(ids[token])

        starts = [token for token in self._words(ids, read) if free is None or free[token]]
        return chunk_ends(starts, breaks, thinking_end(ids, read, self._end))

    def _worth_asking(self, question: Question, tokens: int) -> bool:
        if isinstance(self.options.judge, HttpJudge):
            tokens += len(self._reader.ids(question.problem))
            if tokens > self.options.judge_limit:
                return False
        return bool(question.text.strip())

    def _learn(self, round: Round) -> None:
        """Moves kappa by this round's prefix ratio."""
        local = torch.tensor(
            [[chunks.ratio for chunks in self.chunks]], dtype=torch.float64, device=round.rewards.device
        )
        ratios = round.trainer.gather(local.T)  # (N, 1)
        known = ratios[ratios > 0]
        if round.mode == "train" and self.options.curriculum and len(known):
            ratio, cap = known.mean().item(), self._groups["easy"] / self._groups["all"]
            self.kappa = next_kappa(self.kappa, ratio, self.ratio, lr=self.options.kappa_lr, cap=cap)
            self.ratio = ratio

    @hookimpl
    def round_metrics(self, round: Round) -> dict[str, tuple[float, float]]:
        """Of this process's rows; judge calls are counted per completion that was judged."""
        judged = [chunks for chunks in self.chunks if chunks.ratio > 0]
        redundant = sum(end - start for start, end in (chunks.span or (0, 0) for chunks in judged))
        tokens = sum(
            len(ids) for chunks, ids in zip(self.chunks, round.completion_ids, strict=True) if chunks.ratio > 0
        )
        return self._report | {
            "prefix_ratio": (sum(chunks.ratio for chunks in judged), len(judged)),
            "redundant_tokens": (redundant, tokens),
            "kappa": (self.kappa, 1),
        }

    @hookimpl
    def inspect(self, round: Round) -> Views:
        """The chunks of every row, in order."""
        names = {"b": "chunk", "a": "first answer", "c": "redundant", "d": "redundant"}
        spans = []
        for row, chunks in enumerate(self.chunks):
            bounds = pairwise([0, *chunks.ends])
            for number, ((start, end), label) in enumerate(zip(bounds, chunks.labels, strict=True), 1):
                if end > start:
                    spans.append(Span(row, start, end, f"{names[label]} {number}"))
        return Views(spans)

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"kappa": self.kappa, "ratio": self.ratio, "mixed": self.mixed, "rounds": self.rounds}

    @hookimpl
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kappa, self.ratio = state["kappa"], state["ratio"]
        self.mixed, self.rounds = state["mixed"], state["rounds"]


def _problem(prompt: Any) -> str:
    """The text of a prompt: of its last message by the user, where it is a conversation."""
    if isinstance(prompt, str):
        return prompt
    content = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
