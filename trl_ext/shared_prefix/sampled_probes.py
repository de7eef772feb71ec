"""Drawn answers: a model continues many contexts by tokens of its own, on the prefix tree or by `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .log_probs import log_probs
from .model_parts import evaluating, find_causal_lm, model_device
from .probes import Answers, ProbeCost, Sharing, Tokens, answer_logits, batches, check, left_padded, packed_rows, usable

_BLOCK = 32  # distributions in float64 at a time


def sample_answers(
    model: nn.Module,
    contexts: Sequence[Tokens],
    draws: torch.Tensor,
    *,
    temperature: float = 1.0,
    stop: Sequence[int] = (),
    shared: Sharing = "auto",
    batch_tokens: int = 16384,
    backend: str | None = None,
) -> Answers:
    """Continues each context by tokens of the model.

    Token t of row i is the one in whose part of the cumulated probabilities `draws[i, t]` falls, so a row is continued
    alike in any batch, on any number of processes, and no random generator moves.

    Args:
        draws: (rows, most tokens) uniform numbers in [0, 1).
        temperature: Of the distribution that is drawn from. Log-probabilities and entropies stay at 1.
        stop: Tokens that end an answer; they are not part of it.

    Returns:
        Answers of at most `draws.shape[1]` tokens, some of them empty. Other arguments as in `force_answers`.
    """
    check(model, contexts, draws)
    cost = ProbeCost()
    found = _Sample([[] for _ in contexts], [[] for _ in contexts], [[] for _ in contexts])
    for batch in batches(contexts, batch_tokens, shared != "never", spare=draws.shape[1]):
        rows = list(range(len(contexts)))[batch]
        on_tree = shared != "never"
        if on_tree:
            packing = packed_rows(contexts[batch], [[0]] * len(rows), model_device(model))
            on_tree = usable(model, packing, shared, backend, cost)
        grow = _grown_on_the_tree if on_tree else _generated
        grow(model, contexts, rows, draws, temperature, frozenset(stop), found, cost, backend)
    return Answers(
        found.tokens,
        [torch.tensor(values) for values in found.logps],
        [torch.tensor(values) for values in found.entropies],
        cost,
    )


@dataclass
class _Sample:
    """Answers while they grow."""

    tokens: list[list[int]]
    logps: list[list[float]]
    entropies: list[list[float]]

    def add(self, rows: Sequence[int], tokens: torch.Tensor, logits: torch.Tensor, stop: frozenset[int]) -> list[int]:
        """Appends a token to each row, except where it ends the answer; returns the rows that go on."""
        logps, entropies = log_probs(logits, tokens, 1.0, entropy=True)
        assert entropies is not None
        going = []
        for row, token, logp, entropy in zip(rows, tokens.tolist(), logps.tolist(), entropies.tolist(), strict=True):
            if token not in stop:
                self.tokens[row].append(token)
                self.logps[row].append(logp)
                self.entropies[row].append(entropy)
                going.append(row)
        return going


def draw(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B,) the token of each row in whose part of the cumulated probabilities a number in [0, 1) falls.

    Args:
        logits: (B, vocabulary).
        uniform: (B,).
    """
    chosen = []
    for part, number in zip(logits.split(_BLOCK), uniform.to(logits.device).split(_BLOCK), strict=True):
        cumulated = (part.double() / temperature).softmax(-1).cumsum(-1)
        target = number.double().unsqueeze(1) * cumulated[:, -1:]
        chosen.append(torch.searchsorted(cumulated, target, right=True).squeeze(1))
    return torch.cat(chosen).clamp(max=logits.shape[-1] - 1)


def _grown_on_the_tree(
    model: nn.Module,
    contexts: Sequence[Tokens],
    rows: list[int],
    draws: torch.Tensor,
    temperature: float,
    stop: frozenset[int],
    found: _Sample,
    cost: ProbeCost,
    backend: str | None,
) -> None:
    """A forward of the whole tree for each token: no cache, and what the rows share stays computed once."""
    for step in range(draws.shape[1]):
        if not rows:
            return
        grown = [[*contexts[row], *found.tokens[row]] for row in rows]
        logits = answer_logits(model, grown, [[0]] * len(rows), "always", backend, cost)
        rows = found.add(rows, draw(logits, draws[rows, step], temperature), logits, stop)


class _Drawn(LogitsProcessor):
    """Leaves of each distribution the token that its uniform number chooses."""

    def __init__(self, draws: torch.Tensor, width: int, temperature: float) -> None:
        self.draws, self.width, self.temperature = draws, width, temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        chosen = draw(scores, self.draws[:, input_ids.shape[1] - self.width], self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)  # type: ignore[return-value]


def _generated(
    model: nn.Module,
    contexts: Sequence[Tokens],
    rows: list[int],
    draws: torch.Tensor,
    temperature: float,
    stop: frozenset[int],
    found: _Sample,
    cost: ProbeCost,
    backend: str | None,
) -> None:
    """transformers' `generate`, each row for itself."""
    inputs = left_padded([contexts[row] for row in rows], model_device(model))
    width = inputs["input_ids"].shape[1]
    config = GenerationConfig(
        max_new_tokens=draws.shape[1],
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(stop) or [-1],  # None would be the model's own
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad(), evaluating(model):
        own: Any = model if hasattr(model, "generate") else find_causal_lm(model)
        output = own.generate(
            **inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([_Drawn(draws[rows], width, temperature)]),
        )
    new = output.sequences[:, width:]
    tokens = sum(len(contexts[row]) for row in rows) + new.numel()
    cost.count(tokens, output.sequences.numel(), dense=True, forwards=new.shape[1])
    going = {row: index for index, row in enumerate(rows)}
    for step, logits in enumerate(output.logits):
        index = list(going.values())
        if not index:
            return
        alive = found.add(list(going), new[index, step], logits[index], stop)
        going = {row: going[row] for row in alive}
