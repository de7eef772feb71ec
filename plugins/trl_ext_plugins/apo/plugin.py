"""The plugin APO: its options, and the rounds of sampling, pairing and training.

Stages: run (the rounds), pair_metrics (a check of the reference).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.nn.functional import logsigmoid

from trl_ext_hooks import (
    Config,
    Job,
    Plugin,
    Refuse,
    Require,
    Requirement,
    ScoredPairs,
    UsageError,
    Warn,
    hookimpl,
    option,
)

from .maths import coefficients, extrapolate
from .pairs import Score, collect, sample, scorer
from .preparation import begin, check_run, divide

ANCHORED = ("apo_zero", "apo_down")
TOLERANCE = 1e-3
"""Mean log-ratio per token up to which the reference counts as the start; rounding of bfloat16 stays below."""
HELD_OUT_SEED = 1008
"""Stands where the number of a round does, so that held-out prompts get the same draws in every round."""


class APO(Plugin):
    """Rounds of DPO with extrapolated starts."""

    name = "apo"
    paper = "arXiv 2410.06293"
    bibtex = """@misc{apo2024,
      title = {{Accelerated Preference Optimization for Large Language Model Alignment}},
      eprint = {2410.06293},
      archivePrefix = {arXiv},
      year = {2024},
    }"""
    summary = (
        "iterative DPO, each round started beyond the last (Accelerated, not TRL's Anchored apo_zero and apo_down)"
    )
    trainers = ("dpo",)

    @dataclass(frozen=True)
    class Options:
        """Options of APO. Learning rate, epochs, batch size and the rest are TRL's, and hold for each round."""

        alpha: float = option(
            0.3,
            lt=1,
            help="how far each start is moved on, 0 (iterative DPO) to 0.6; diverges from 1 on",
            source="paper",
        )
        rounds: int = option(3, ge=1, help="rounds of sampling and training, 2 to 4", source="paper")
        betas: tuple[float, ...] = option(
            (0.01, 0.1, 1.0), help="DPO's beta of each round, or one for all; wins over the trainer's", source="paper"
        )
        reward_funcs: tuple[str, ...] = option(
            (), help="reward functions that score samples: module.function, or TRL's by name", source="ours"
        )
        reward_weights: tuple[float, ...] | None = option(None, help="a weight per reward function", source="ours")
        judge: str | None = option(
            None,
            help="in place of rewards: module.name that is called with prompts and two completions of each, and "
            "answers 0 or 1 for the better one, or -1",
            source="paper: PairRM",
        )
        prompts_per_round: int | None = option(
            None, ge=1, help="null divides the data into as many parts as rounds", source="paper: thirds"
        )
        num_samples: int = option(5, ge=2, help="completions per prompt; best and worst become a pair", source="paper")
        temperature: float = option(0.7, help="of sampling", source="paper")
        top_p: float = option(0.9, help="of sampling", source="paper")
        max_completion_length: int = option(512, help="tokens of a completion", source="ours")
        sample_batch: int = option(8, ge=1, help="prompts that are sampled at once", source="ours")
        held_out: int = option(
            0,
            ge=0,
            help="prompts at the end of the data that no round trains on; the output of every round is scored on them",
            source="ours",
        )

        def __post_init__(self) -> None:
            if len(self.betas) not in (1, self.rounds):
                raise ValueError(
                    f"betas needs one value, or one for each of the {self.rounds} rounds; got {self.betas}"
                )
            if min(self.betas) <= 0:
                raise ValueError("betas must be greater than 0")
            if self.reward_funcs and self.judge is not None:
                raise ValueError("reward_funcs and judge exclude each other; give one")
            if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
                raise ValueError("reward_weights needs one value per reward function")

        def beta(self, index: int) -> float:
            """Returns DPO's beta of a round, counted from 0."""
            return self.betas[index] if len(self.betas) > 1 else self.betas[0]

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        options, losses = self.options, set(config.args.loss_type)
        yield Require("sync_ref_model", (False,), why="the reference of a round is its start and must not drift")
        yield Require("eval_strategy", ("no",), why="a round trains on pairs that it makes itself and has no others")
        yield Require("disable_dropout", (True,), why="dropout would hide whether the reference is the start")
        if not options.reward_funcs and options.judge is None:
            fix = "Set reward functions, apo.reward_funcs=[my_rewards.correct], or a judge, apo.judge=my_judges.Better."
            yield Refuse("nothing says which completions are better.", fix)
        if losses & set(ANCHORED):
            yield Refuse(
                f"loss_type={sorted(losses & set(ANCHORED))} is Anchored Preference Optimization (arXiv 2408.06266), "
                f"another method with the same short name.",
                "For Accelerated Preference Optimization leave loss_type at sigmoid; for the anchored one leave this "
                "plugin out.",
            )
        elif not losses <= {"sigmoid", "ipo", "sppo_hard"}:
            yield Warn("the paper has its rounds with the losses sigmoid, ipo or sppo_hard only")
        if options.alpha < 0:
            yield Warn("an alpha below 0 averages outputs; the method moves starts further")
        if list(options.betas) != sorted(options.betas):
            yield Warn("the paper's betas do not fall from round to round")

    @hookimpl
    def run(self, job: Job) -> None:
        options = self.options
        score = scorer(job, options.judge, options.reward_funcs, options.reward_weights)
        check_run(job)
        round_rows, held_out = divide(len(job.data), options.rounds, options.prompts_per_round, options.held_out)
        begin(job, asdict(options))
        outputs: list[str | Path] = [job.model]  # hat_0, then that of every round that had pairs
        for index, rows in enumerate(round_rows):
            place, title = f"round-{index + 1}", f"round {index + 1} of {options.rounds}"
            start = job.model if len(outputs) == 1 else str(self._start(job, f"{place}/start", outputs))
            pairs = self._sampled(job, place, "pairs", start, rows, index, score)
            summary = json.loads((pairs / "summary.json").read_text())
            job.tell(
                f"{title}: mean score {summary['mean_score']:.4g} of {summary['samples']} samples, "
                f"{summary['pairs']} pairs, beta {options.beta(index)}"
            )
            metrics = {"start_reward": summary["mean_score"], "pairs": summary["pairs"]}
            if summary["pairs"]:
                lines = (pairs / "pairs.jsonl").read_text().splitlines()
                data = job.data.from_list([json.loads(line) for line in lines])
                outputs.append(job.train(start, data, f"{place}/output", beta=options.beta(index)))
                if held_out:
                    scored = self._sampled(job, place, "held-out", str(outputs[-1]), held_out, HELD_OUT_SEED, score)
                    metrics["reward"] = json.loads((scored / "summary.json").read_text())["mean_score"]
                    job.tell(f"{title}: mean score {metrics['reward']:.4g} of its output on held-out prompts")
            else:
                job.tell(f"warning: {title} has no pair with a better side and does not count; the model stays")
            job.log(metrics, step=index + 1, steps=options.rounds)
        if len(outputs) == 1:
            raise UsageError(
                "no round had a pair with a better side, so nothing was trained. Do the reward functions tell "
                "completions apart? More samples or a higher temperature give more different ones."
            )
        job.finish(outputs[-1])
        weights = ", ".join(f"{value:.3g}" for value in coefficients(options.alpha, len(outputs) - 1))
        job.tell(f"the last output is in {job.folder}; the updates of the rounds are in it with weights {weights}")

    @hookimpl
    def pair_metrics(self, pairs: ScoredPairs) -> None:
        """Reports the loss before the first step, which is ln 2 for the sigmoid where the reference is the start."""
        if pairs.mode != "train" or pairs.step > 0:
            return
        ratios = pairs.sequence_log_ratios  # (2n,)
        drift = (ratios.abs() / pairs.mask.sum(dim=1).clamp(min=1)).max().item()
        chosen, rejected = ratios.chunk(2)
        losses = -logsigmoid(pairs.trainer.args.beta * (chosen - rejected))
        if not drift <= TOLERANCE:
            raise RuntimeError(
                f"a round of APO must start at its reference, where the first loss is ln 2 = {math.log(2):.4f}. It is "
                f"{losses.mean().item():.4f}, and log-probabilities differ by {drift:.2g} per token. Does another "
                f"plugin or a callback change the model or the reference before training?"
            )
        pairs.log("first_loss", losses)

    def _start(self, job: Job, name: str, outputs: Sequence[str | Path]) -> Path:
        """Makes the start of a later round: the last output, moved on from the one before it."""

        def make(folder: Path) -> None:
            model, before = job.open(outputs[-1]), job.open(outputs[-2])
            weights = {key: value.data for key, value in model.named_parameters()}  # tied weights come once
            previous = {key: value.data for key, value in before.named_parameters()}
            for key, value in extrapolate(weights, previous, self.options.alpha).items():
                weights[key].copy_(value)
            job.save(model, folder, like=outputs[-1])

        return job.produce(name, make)

    def _sampled(
        self, job: Job, place: str, name: str, model: str, rows: Sequence[int], seed: int, score: Score
    ) -> Path:
        """Samples from a model, scores, and pairs the best with the worst; the result is in `place/name`."""
        options, samples = self.options, job.folder / place / ("samples" if name == "pairs" else f"{name}-samples")

        def load_sampler() -> Any:
            return job.sampler(
                model,
                num=options.num_samples,
                temperature=options.temperature,
                top_p=options.top_p,
                max_tokens=options.max_completion_length,
            )

        if not (job.folder / place / name).exists():
            chosen = [job.data[number] for number in rows]
            sample(job, samples, chosen, options.sample_batch, job.args.seed * 1009 + seed, load_sampler, score)
        job.wait()
        files = math.ceil(len(rows) / options.sample_batch)
        return job.produce(f"{place}/{name}", lambda folder: collect(samples, folder, files))
