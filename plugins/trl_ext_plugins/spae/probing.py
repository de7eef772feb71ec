"""Asking the policy for its answer at the end of every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.shared_prefix import ProbeCost, force_answers, sample_answers
from trl_ext_hooks import Round

from .maths import confidence, correctness, step_potential


@dataclass(frozen=True)
class Probe:
    """One question to the policy.

    Attributes:
        row: Row of all processes.
        step: Which step of the row.
        context: Token ids of prompt, completion up to the step's end, and probe text.
        answer: Token ids of the right answer.
    """

    row: int
    step: int
    context: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Steps:
    """The probed steps of one completion: last tokens, Acc, Conf."""

    ends: tuple[int, ...] = ()
    acc: tuple[float, ...] = ()
    conf: tuple[float, ...] = ()

    @property
    def potential(self) -> list[float]:
        """Phi of each step."""
        return step_potential(torch.tensor(self.acc).double(), torch.tensor(self.conf).double()).tolist()


def ask_policy(
    round: Round,
    probes: Sequence[Probe],
    *,
    num_probes: int,
    max_tokens: int,
    temperature: float,
    stop: Sequence[int],
    **settings: Any,
) -> tuple[list[tuple[float, float]], ProbeCost]:
    """(Acc, Conf) of every probe, from the policy as it is now.

    Args:
        num_probes: Answers drawn for Conf; 0 takes the entropies along the right answer.
        max_tokens, temperature, stop: Of drawn answers.
        settings: Of `force_answers` and `sample_answers`.
    """
    model, contexts = round.trainer.unwrapped_model, [probe.context for probe in probes]
    forced = force_answers(model, contexts, [probe.answer for probe in probes], **settings)
    acc = [correctness(logps) for logps in forced.logps]
    if not num_probes:
        return [(a, confidence([values])) for a, values in zip(acc, forced.entropies, strict=True)], forced.cost
    drawn = sample_answers(
        model,
        [context for context in contexts for _ in range(num_probes)],
        draws(round, probes, num_probes, max_tokens),
        temperature=temperature,
        stop=stop,
        **settings,
    )
    starts = range(0, len(drawn.entropies), num_probes)
    conf = [confidence(drawn.entropies[start : start + num_probes]) for start in starts]
    return list(zip(acc, conf, strict=True)), forced.cost + drawn.cost


def draws(round: Round, probes: Sequence[Probe], num_probes: int, most: int) -> torch.Tensor:
    """(probes * num_probes, most) numbers that depend on the seed, the step of training, the row and the step of the
    row, and not on the process or on any random state."""
    seed = f"{round.trainer.args.seed} {round.mode} {round.step}"
    numbers = []
    for probe in probes:
        for number in range(num_probes):
            generator = random.Random(f"{seed} {probe.row} {probe.step} {number}")
            numbers.append([generator.random() for _ in range(most)])
    return torch.tensor(numbers, dtype=torch.float64).reshape(-1, most)
