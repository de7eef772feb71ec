"""Probes: where the steps of a completion end, and the policy's answer at the end of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext.shared_prefix import ProbeCost, force_answers, sample_answers
from trl_ext_hooks import Round, TrainerView
from trl_ext_hooks.toolkit.segments import Marks, TokenReader, step_ends, thinking_end, thinned, vocabulary_ends

from .maths import confidence, correctness, step_potential


@dataclass(frozen=True)
class Probe:
    """One question to the policy.

    Attributes:
        row: Row of all processes.
        step: Index of the step in its row.
        context: Token ids of prompt, completion up to the step's end, and probe text.
        answer: Token ids of the right answer.
    """

    row: int
    step: int
    context: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Steps:
    """The probed steps of one completion.

    Attributes:
        ends: Last token of each step.
        acc, conf: Acc and Conf at its end.
    """

    ends: tuple[int, ...] = ()
    acc: tuple[float, ...] = ()
    conf: tuple[float, ...] = ()

    @property
    def potential(self) -> list[float]:
        """Phi of each step."""
        return step_potential(torch.tensor(self.acc).double(), torch.tensor(self.conf).double()).tolist()


class StepFinder:
    """Finds the steps of completions.

    Args:
        tokenizer: Of the run.
        thinking_mark: Where thinking, and with it the last step, ends.
        by_vocabulary: Whether a step ends at a token whose entry in the vocabulary says so, or where the text does.
        most: Steps of a row at most, evenly thinned; None for all.
    """

    def __init__(self, tokenizer: Any, thinking_mark: str, by_vocabulary: bool, most: int | None) -> None:
        self.reader = TokenReader(tokenizer)
        self._thinking_mark = Marks(self.reader, [thinking_mark])
        self._step_tokens = vocabulary_ends(tokenizer) if by_vocabulary else None
        self._most = most

    def __call__(self, ids: Sequence[int], written: Sequence[int]) -> list[int]:
        """Returns the last token of each step.

        Args:
            ids: Tokens of a completion.
            written: 1 on tokens that the model wrote; the others end no step.
        """
        read = self.reader(ids)
        stop = thinking_end(ids, read, self._thinking_mark)
        if self._step_tokens is None:
            ends = step_ends(read, stop)
        else:
            ends = [index for index in range(stop) if ids[index] in self._step_tokens]
        ends = [end for end in ends if written[end]]
        return ends if self._most is None else thinned(ends, self._most)


def stop_tokens(trainer: TrainerView) -> list[int]:
    """Returns the ids of the tokens that end an answer."""
    config = getattr(trainer.unwrapped_model, "generation_config", None)
    sources = [trainer.tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    return [token for ids in sources if ids is not None for token in ([ids] if isinstance(ids, int) else ids)]


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
    """Returns (Acc, Conf) of every probe from the policy as it is now, and what that cost.

    Args:
        round: The round of the probes.
        probes: The probes.
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
    """Returns (probes * num_probes, most) uniform numbers for sampling.

    They depend on the seed, the step of training, the row and the step of the row, and neither on the process nor on
    any random state.
    """
    seed = f"{round.trainer.args.seed} {round.mode} {round.step}"
    numbers = []
    for probe in probes:
        for number in range(num_probes):
            generator = random.Random(f"{seed} {probe.row} {probe.step} {number}")
            numbers.append([generator.random() for _ in range(most)])
    return torch.tensor(numbers, dtype=torch.float64).reshape(-1, most)
