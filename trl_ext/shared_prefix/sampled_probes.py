"""Sampled probes: a model continues many contexts with tokens of its own, on the prefix tree or by `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .log_probs import token_log_probs
from .model_parts import ModelParts, evaluating
from .packing import pack_answers
from .probes import (
    Answers,
    ProbeCost,
    Sharing,
    Tokens,
    answer_logits,
    batches,
    check_probes,
    left_padded,
    tree_is_usable,
)

_BLOCK = 32  # distributions in float64 that exist at any one time


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
    """Continues each context with tokens sampled from the model.

    Token `t` of row `i` is the one in whose interval of the cumulative probabilities `draws[i, t]` falls. So a row is
    continued in the same way in any batch and on any number of processes, and no random generator moves.

    Args:
        model: As in `force_answers`, like all arguments that are not listed here.
        contexts: Token ids of each context.
        draws: (contexts, most tokens) uniform numbers in [0, 1).
        temperature: Of the distribution that is sampled from. Log-probabilities and entropies are at temperature 1.
        stop: Tokens that end an answer. They are not part of it.

    Returns:
        Answers of at most `draws.shape[1]` tokens. Some may be empty.
    """
    model_parts = ModelParts.of(model)
    check_probes(model_parts, contexts, draws)
    sampler = _Sampler(model_parts, contexts, draws, temperature, frozenset(stop), backend)
    for batch in batches(contexts, batch_tokens, shared != "never", reserve=draws.shape[1]):
        rows = list(range(len(contexts)))[batch]
        on_tree = shared != "never"
        if on_tree:
            # Only the contexts matter here. A prediction needs a label, and any label serves.
            packing = pack_answers(contexts[batch], [[0]] * len(rows), model_parts.device)
            on_tree = tree_is_usable(model_parts, packing, shared, backend, sampler.cost)
        if on_tree:
            sampler.sample_on_tree(rows)
        else:
            sampler.sample_by_generate(rows)
    return sampler.answers()


def choose_tokens(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns for each row the token in whose interval of the cumulative probabilities a number in [0, 1) falls.

    Args:
        logits: (B, vocabulary).
        uniform: (B,).
        temperature: The logits are divided by it.

    Returns:
        (B,) token ids.
    """
    tokens = []
    for block, numbers in zip(logits.split(_BLOCK), uniform.to(logits.device).split(_BLOCK), strict=True):
        cumulative = (block.double() / temperature).softmax(-1).cumsum(-1)
        # The last cumulative probability may differ from 1 by rounding, so the numbers are scaled to it.
        target = numbers.double().unsqueeze(1) * cumulative[:, -1:]
        tokens.append(torch.searchsorted(cumulative, target, right=True).squeeze(1))
    return torch.cat(tokens).clamp(max=logits.shape[-1] - 1)


class _Sampler:
    """Answers that grow token by token, and what they are sampled with."""

    def __init__(
        self,
        model_parts: ModelParts,
        contexts: Sequence[Tokens],
        draws: torch.Tensor,
        temperature: float,
        stop: frozenset[int],
        backend: str | None,
    ) -> None:
        self._model_parts = model_parts
        self._contexts = contexts
        self._draws = draws
        self._temperature = temperature
        self._stop = stop
        self._backend = backend
        self._tokens: list[list[int]] = [[] for _ in contexts]
        self._logps: list[list[float]] = [[] for _ in contexts]
        self._entropies: list[list[float]] = [[] for _ in contexts]
        self.cost = ProbeCost()

    def sample_on_tree(self, rows: list[int]) -> None:
        """Runs a forward of the whole tree for each token. Nothing is cached, but what rows share is computed once."""
        for step in range(self._draws.shape[1]):
            if not rows:
                return
            grown = [[*self._contexts[row], *self._tokens[row]] for row in rows]
            logits = answer_logits(self._model_parts, grown, [[0]] * len(rows), "always", self._backend, self.cost)
            rows = self._append(rows, choose_tokens(logits, self._draws[rows, step], self._temperature), logits)

    def sample_by_generate(self, rows: list[int]) -> None:
        """Runs transformers' `generate`, in which each row is computed by itself."""
        inputs = left_padded([self._contexts[row] for row in rows], self._model_parts.device)
        width = inputs["input_ids"].shape[1]
        config = GenerationConfig(
            max_new_tokens=self._draws.shape[1],
            # The processor below leaves a single token, so greedy decoding takes it.
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=sorted(self._stop) or [-1],  # None would mean the model's own
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        model = self._model_parts.model
        generator: Any = model if hasattr(model, "generate") else self._model_parts.causal_lm
        with torch.no_grad(), evaluating(self._model_parts):
            output = generator.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([_ChosenToken(self._draws[rows], width, self._temperature)]),
            )
        new_tokens = output.sequences[:, width:]
        row_tokens = sum(len(self._contexts[row]) for row in rows) + new_tokens.numel()
        self.cost.count(row_tokens, output.sequences.numel(), dense=True, forwards=new_tokens.shape[1])
        # `generate` pads the rows that have ended, so only the others are read on.
        batch_index = {row: index for index, row in enumerate(rows)}
        for step, logits in enumerate(output.logits):
            if not rows:
                return
            indices = [batch_index[row] for row in rows]
            rows = self._append(rows, new_tokens[indices, step], logits[indices])

    def answers(self) -> Answers:
        """Returns the answers as they are now."""
        return Answers(
            self._tokens,
            [torch.tensor(values) for values in self._logps],
            [torch.tensor(values) for values in self._entropies],
            self.cost,
        )

    def _append(self, rows: Sequence[int], tokens: torch.Tensor, logits: torch.Tensor) -> list[int]:
        """Appends a token to each row unless it ends the answer. Returns the rows that continue."""
        logps, entropies = token_log_probs(logits, tokens, entropy=True)
        assert entropies is not None
        continuing = []
        for row, token, logp, entropy in zip(rows, tokens.tolist(), logps.tolist(), entropies.tolist(), strict=True):
            if token not in self._stop:
                self._tokens[row].append(token)
                self._logps[row].append(logp)
                self._entropies[row].append(entropy)
                continuing.append(row)
        return continuing


class _ChosenToken(LogitsProcessor):
    """Leaves in each distribution only the token that its uniform number chooses."""

    def __init__(self, draws: torch.Tensor, width: int, temperature: float) -> None:
        self.draws, self.width, self.temperature = draws, width, temperature

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.width
        tokens = choose_tokens(scores, self.draws[:, step], self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.unsqueeze(1), 0.0)  # type: ignore[return-value]
