"""Small models, padded batches and slow but obvious references for the shared-prefix tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from trl_ext.shared_prefix import PrefixTree, dense_scores, selfcheck

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def fresh_checks() -> None:
    """Every test starts with no first-use check passed."""
    selfcheck.forget()


@pytest.fixture
def tiny() -> Callable[..., tf.PreTrainedModel]:
    """`tiny("Llama", **settings)` makes a small random model in training mode."""

    def make(family: str = "Llama", **settings: Any) -> tf.PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(tf, f"{family}Config")(**{**SIZES, **settings})
        return tf.AutoModelForCausalLM.from_config(config).train()

    return make


@pytest.fixture
def padded() -> Callable[..., tuple[torch.Tensor, torch.Tensor, int]]:
    """`padded([(prompt, completion), ...])` gives ids and mask in the trainer's layout, and the completion width."""

    def make(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor, int]:
        left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
        ids, mask = [], []
        for prompt, completion in rows:
            before, behind = left - len(prompt), right - len(completion)
            ids.append([0] * before + [*prompt, *completion] + [0] * behind)
            mask.append([0] * before + [1] * (len(prompt) + len(completion)) + [0] * behind)
        return torch.tensor(ids), torch.tensor(mask), right

    return make


@pytest.fixture
def groups(padded: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two prompts of unequal length with 4 and 3 completions of unequal length, one of them masked."""
    rng = random.Random(1)
    rows = []
    for length, members in ((21, (7, 9, 4, 0)), (17, (9, 2, 5))):
        prompt = tokens(rng, length)
        rows += [(prompt, tokens(rng, n)) for n in members]
    return padded(rows)


@pytest.fixture
def compare() -> Callable[..., tuple[float, float]]:
    """`compare(model, ids, mask, width, logps)`: largest difference of log-probabilities; of gradients, relative."""

    def run(
        model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, width: int, logps: torch.Tensor
    ) -> tuple[float, float]:
        scored = mask.bool().clone()
        scored[:, :-width] = False
        dense = dense_scores(model, ids, mask, scored)["log_probs"][:, -width:]
        weights = torch.linspace(-1, 1, logps.numel()).view(logps.shape).to(logps)
        parameters = [p for p in model.parameters() if p.requires_grad]
        ours = torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)
        theirs = torch.autograd.grad((dense * weights).sum(), parameters, allow_unused=True)
        largest = max(float(b.abs().max()) for b in theirs if b is not None)
        worst = 0.0
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                worst = max(worst, float((a - b).abs().max()) / largest)
        return float((logps - dense).detach().abs().max()), worst

    return run


def tokens(rng: random.Random, n: int) -> list[int]:
    """`n` random token ids, none of them a special one."""
    return [rng.randrange(3, VOCABULARY) for _ in range(n)]


def branching_rows(rng: random.Random, depth: int, letters: int = 4) -> list[list[int]]:
    """Rows of a random tree: every branch is a few tokens of a small alphabet and may end, branch or go on."""
    if depth == 0:
        return [[]]
    rows = []
    for _ in range(rng.randrange(1, 4)):
        stem = [rng.randrange(letters) for _ in range(rng.randrange(0, 7))]
        rows += [stem + tail for tail in branching_rows(rng, depth - 1, letters)]
    return rows


@pytest.fixture
def trees() -> Callable[..., list[list[int]]]:
    """`trees(seed, depth)` gives the rows of one to three random trees."""

    def make(seed: int, depth: int = 4) -> list[list[int]]:
        rng = random.Random(seed)
        rows = [row for _ in range(rng.randrange(1, 4)) for row in branching_rows(rng, rng.randrange(1, depth + 1))]
        rows = rows[:12]
        return rows if any(rows) else [[1, 2]]

    return make


@pytest.fixture
def ancestors() -> Callable[..., torch.Tensor]:
    """`ancestors(tree, bounds)`: (N, N), whether a packed token sees another, from the tree and nothing else."""

    def mask(tree: PrefixTree, bounds: Sequence[int]) -> torch.Tensor:
        place = [(i, d) for i, node in enumerate(tree.nodes) for d in range(node.start, node.end)]
        assert len(place) == bounds[-1]
        above = []
        for i in range(len(tree.nodes)):
            path = {i}
            while tree.nodes[i].parent >= 0:
                i = tree.nodes[i].parent
                path.add(i)
            above.append(path)
        return torch.tensor([[j in above[i] and e <= d for j, e in place] for i, d in place])

    return mask
