"""Preference pairs of a round: completions of the current model, scored, best against worst."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_ext_hooks import Job, UsageError
from trl_ext_hooks.toolkit.callables import load

Score = Callable[[list[dict[str, Any]], list[list[Any]]], list[list[float]]]
"""Dataset rows and the completions of each -> a score per completion, NaN where none applies."""
Judge = Callable[[list[Any], list[list[Any]]], list[int]]
"""Prompts and two completions of each -> 0 or 1, the better one, or -1 for neither."""


def load_judge(path: str) -> Judge:
    """Returns the callable behind `module.name`: a function, or the method `judge` of an object or of a new one.

    Raises:
        ValueError: It does not exist.
    """
    target = load(path, method="judge")
    if isinstance(target, type):
        target = target()
    judge: Judge = getattr(target, "judge", target)
    return judge


def wins(judge: Judge, prompts: Sequence[Any], completions: Sequence[Sequence[Any]]) -> list[list[float]]:
    """Lets every completion play every other one of its prompt: 1 for a win, 0.5 for a draw, added up.

    Raises:
        UsageError: The judge answers with something else than 0, 1 or -1 per pair.
    """
    scores = [[0.0] * len(texts) for texts in completions]
    matches = [
        (row, a, b) for row, texts in enumerate(completions) for a, b in itertools.combinations(range(len(texts)), 2)
    ]
    answers = judge(
        [prompts[row] for row, _, _ in matches], [[completions[r][a], completions[r][b]] for r, a, b in matches]
    )
    if len(answers) != len(matches) or not set(answers) <= {-1, 0, 1}:
        raise UsageError(
            f"the judge answered {answers!r} for {len(matches)} pairs, expected 0 or 1 (the better one) or -1 for each"
        )
    for (row, a, b), answer in zip(matches, answers, strict=True):
        scores[row][a] += (1.0, 0.0)[answer] if answer >= 0 else 0.5
        scores[row][b] += (0.0, 1.0)[answer] if answer >= 0 else 0.5
    return scores


def scorer(job: Job, judge: str | None, functions: Sequence[str], weights: Sequence[float] | None) -> Score:
    """Returns what scores completions: wins before the judge, or else the weighted rewards.

    Raises:
        UsageError: There is no such judge.
    """
    if judge is not None:
        try:
            referee = load_judge(judge)
        except ValueError as error:
            raise UsageError(f"apo.judge={judge!r}: {error}; write module.name") from error
        return lambda rows, completions: wins(referee, [row["prompt"] for row in rows], completions)
    rewards = job.rewards(functions, weights)

    def score(rows: list[dict[str, Any]], completions: list[list[Any]]) -> list[list[float]]:
        flat = [(row, text) for row, texts in zip(rows, completions, strict=True) for text in texts]
        values = iter(rewards([row for row, _ in flat], [text for _, text in flat]))
        return [[next(values) for _ in texts] for texts in completions]

    return score


def best_and_worst(completions: Sequence[Any], scores: Sequence[float]) -> tuple[int, int] | None:
    """Returns the indices of the highest and the lowest score, the first of equal ones; None where that says nothing.

    NaN scores are left out. Equal scores, and best and worst that are the same text, say nothing.
    """
    valid = [index for index, score in enumerate(scores) if not math.isnan(score)]
    if not valid:
        return None
    best, worst = max(valid, key=lambda i: scores[i]), min(valid, key=lambda i: scores[i])
    if scores[best] == scores[worst] or completions[best] == completions[worst]:
        return None
    return best, worst


def sample(
    job: Job,
    place: Path,
    rows: Sequence[dict[str, Any]],
    batch: int,
    seed: int,
    generate: Callable[[], Callable[[list[Any], int], list[list[Any]]]],
    score: Score,
) -> None:
    """Writes completions and scores of all rows into files of `batch` rows each; finished files are kept.

    Each file has a seed of its own, so that it is the same on any number of processes and after a restart. This process
    makes every n-th one.

    Args:
        job: The run.
        place: Folder of the files.
        rows: Dataset rows with `prompt`.
        batch: Rows of a file, which are sampled together.
        seed: Seed of the round.
        generate: Makes the sampler; called only if there is something to sample.
        score: Rows and their completions -> a score each.
    """
    place.mkdir(parents=True, exist_ok=True)
    sampler = None
    for number, start in enumerate(range(0, len(rows), batch)):
        file = place / f"{number:06d}.json"
        if number % job.num_processes != job.process_index or file.exists():
            continue
        sampler = sampler or generate()
        batch_rows = list(rows[start : start + batch])
        completions = sampler([row["prompt"] for row in batch_rows], seed * 1_000_003 + number)
        scores = score(batch_rows, completions)
        content = [
            {"prompt": row["prompt"], "completions": texts, "scores": values}
            for row, texts, values in zip(batch_rows, completions, scores, strict=True)
        ]
        job.write(file, json.dumps(content))


def collect(place: Path, target: Path, expected: int) -> None:
    """Writes the mean score of all sampled files into `summary.json`, and their pairs beside it into `pairs.jsonl`.

    Raises:
        UsageError: There are not the `expected` files, because the processes do not share the folder.
    """
    pairs, scores, files = [], [], sorted(place.glob("*.json"))
    if len(files) != expected:
        raise UsageError(
            f"{place} holds {len(files)} files of samples, and all processes wrote {expected}: output_dir must be a "
            f"folder that all machines share"
        )
    for file in files:
        for entry in json.loads(file.read_text()):
            scores += [value for value in entry["scores"] if not math.isnan(value)]
            chosen = best_and_worst(entry["completions"], entry["scores"])
            if chosen is not None:
                best, worst = (entry["completions"][index] for index in chosen)
                pairs.append({"prompt": entry["prompt"], "chosen": best, "rejected": worst})
    (target / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    mean = sum(scores) / len(scores) if scores else math.nan
    (target / "summary.json").write_text(json.dumps({"pairs": len(pairs), "samples": len(scores), "mean_score": mean}))
