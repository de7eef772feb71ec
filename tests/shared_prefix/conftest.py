"""Small models, padded batches and slow but obvious references for the shared-prefix tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as tf
import trl.trainer.utils
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
    """Forgets all first-use checks before each test."""
    selfcheck.forget()


@pytest.fixture
def tiny() -> Callable[..., tf.PreTrainedModel]:
    """Returns `tiny("Llama", **settings)`, which makes a small random model in training mode."""

    def make(family: str = "Llama", **settings: Any) -> tf.PreTrainedModel:
        torch.manual_seed(0)
        config = getattr(tf, f"{family}Config")(**{**SIZES, **settings})
        return tf.AutoModelForCausalLM.from_config(config).train()

    return make


@pytest.fixture
def add_fused_head() -> Callable[..., None]:
    """Returns `add_fused_head(model, **settings)`, which skips the test if TRL has no fused head (before 1.15)."""

    def add(model: nn.Module, **settings: Any) -> None:
        add_fused_lm_head = getattr(trl.trainer.utils, "add_fused_lm_head", None)
        if add_fused_lm_head is None:
            pytest.skip(f"TRL {trl.__version__} has no fused head")
        add_fused_lm_head(model, **settings)

    return add


@pytest.fixture
def padded() -> Callable[..., tuple[torch.Tensor, torch.Tensor, int]]:
    """Returns `padded([(prompt, completion), ...])`, which pads rows as the trainer does.

    It returns token ids, attention mask and the width of the completions.
    """

    def make(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[torch.Tensor, torch.Tensor, int]:
        left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
        ids, mask = [], []
        for prompt, completion in rows:
            before, after = left - len(prompt), right - len(completion)
            ids.append([0] * before + [*prompt, *completion] + [0] * after)
            mask.append([0] * before + [1] * (len(prompt) + len(completion)) + [0] * after)
        return torch.tensor(ids), torch.tensor(mask), right

    return make


@pytest.fixture
def groups(padded: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns two prompts of unequal length with 4 and 3 completions of unequal length, one of them empty."""
    rng = random.Random(1)
    rows = []
    for prompt_length, completion_lengths in ((21, (7, 9, 4, 0)), (17, (9, 2, 5))):
        prompt = random_tokens(rng, prompt_length)
        rows += [(prompt, random_tokens(rng, length)) for length in completion_lengths]
    return padded(rows)


@pytest.fixture
def rollout(padded: Callable[..., Any]) -> Any:
    """Returns a multi-turn rollout: two first turns, each with two second turns, each with two third turns."""
    rng = random.Random(5)
    prompt = random_tokens(rng, 20)
    rows = []
    for _ in range(2):
        first = random_tokens(rng, 18)
        for _ in range(2):
            second = random_tokens(rng, 17)
            rows += [(prompt, first + second + random_tokens(rng, rng.randrange(1, 12))) for _ in range(2)]
    return padded(rows)


@pytest.fixture
def system_prompt(padded: Callable[..., Any]) -> Any:
    """Returns three prompts that begin with the same system prompt, with three completions each."""
    rng = random.Random(6)
    system = random_tokens(rng, 24)
    rows = []
    for length in (18, 22, 30):
        prompt = system + random_tokens(rng, length)
        rows += [(prompt, random_tokens(rng, rng.randrange(3, 10))) for _ in range(3)]
    return padded(rows)


@pytest.fixture
def scored_mask() -> Callable[..., torch.Tensor]:
    """Returns `scored_mask(mask, width)`, which marks the real tokens of the completions."""

    def make(mask: torch.Tensor, width: int) -> torch.Tensor:
        scored = mask.bool().clone()
        scored[:, :-width] = False
        return scored

    return make


@pytest.fixture
def compare(scored_mask: Callable[..., torch.Tensor]) -> Callable[..., tuple[float, float]]:
    """Returns `compare(model, ids, mask, width, logps)`, which compares with the dense path.

    It returns the largest difference of a log-probability, and that of a gradient relative to the largest gradient.
    """

    def run(
        model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, width: int, logps: torch.Tensor
    ) -> tuple[float, float]:
        dense = dense_scores(model, ids, mask, scored_mask(mask, width))["log_probs"][:, -width:]
        weights = torch.linspace(-1, 1, logps.numel()).view(logps.shape).to(logps)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)
        dense_grads = torch.autograd.grad((dense * weights).sum(), parameters, allow_unused=True)
        largest = max(float(grad.abs().max()) for grad in dense_grads if grad is not None)
        largest_difference = 0.0
        for grad, dense_grad in zip(grads, dense_grads, strict=True):
            assert (grad is None) == (dense_grad is None)
            if grad is not None and dense_grad is not None:
                largest_difference = max(largest_difference, float((grad - dense_grad).abs().max()) / largest)
        return float((logps - dense).detach().abs().max()), largest_difference

    return run


def random_tokens(rng: random.Random, count: int) -> list[int]:
    """Returns random token ids, none of them a special one."""
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def branching_rows(rng: random.Random, depth: int, letters: int = 4) -> list[list[int]]:
    """Returns the rows of a random tree, whose branches are a few tokens of a small alphabet each."""
    if depth == 0:
        return [[]]
    rows = []
    for _ in range(rng.randrange(1, 4)):
        stem = [rng.randrange(letters) for _ in range(rng.randrange(0, 7))]
        rows += [stem + tail for tail in branching_rows(rng, depth - 1, letters)]
    return rows


@pytest.fixture
def trees() -> Callable[..., list[list[int]]]:
    """Returns `trees(seed, depth)`, which makes the rows of one to three random trees."""

    def make(seed: int, depth: int = 4) -> list[list[int]]:
        rng = random.Random(seed)
        rows = [row for _ in range(rng.randrange(1, 4)) for row in branching_rows(rng, rng.randrange(1, depth + 1))]
        rows = rows[:12]
        return rows if any(rows) else [[1, 2]]

    return make


@pytest.fixture
def ancestors() -> Callable[..., torch.Tensor]:
    """Returns `ancestors(tree, bounds)`, which says for each packed token which others it sees.

    The mask (N, N) is derived from the tree and nothing else.
    """

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


PROBE_TEXT = [7, 8, 9, 11]


@pytest.fixture
def probe_rows() -> Callable[..., tuple[list[list[int]], list[list[int]]]]:
    """Returns `probe_rows(seed, rollouts, steps, length)`, which makes contexts and an answer for each.

    The contexts are steps of a few rollouts of one prompt, each followed by the text of a probe. Answers have 1 to 4
    tokens.
    """

    def make(
        seed: int = 0, rollouts: int = 3, steps: int = 4, length: int = 60
    ) -> tuple[list[list[int]], list[list[int]]]:
        rng = random.Random(seed)
        prompt = random_tokens(rng, 20)
        contexts, answers = [], []
        for _ in range(rollouts):
            completion = random_tokens(rng, length)
            answer = random_tokens(rng, rng.randrange(1, 5))
            for end in sorted(rng.sample(range(length), steps)):
                contexts.append([*prompt, *completion[: end + 1], *PROBE_TEXT])
                answers.append(answer)
        return contexts, answers

    return make


@pytest.fixture
def by_hand() -> Callable[..., tuple[list[float], list[float]]]:
    """Returns `by_hand(model, context, answer)`, which computes log-probabilities and entropies of one row.

    It takes one forward of that row alone and the textbook formulas.
    """

    def compute(model: nn.Module, context: list[int], answer: list[int]) -> tuple[list[float], list[float]]:
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1].double()
        p = logits.softmax(-1)
        logps = [p[i, token].log().item() for i, token in enumerate(answer)]
        return logps, (-(p * p.log()).sum(-1)).tolist()

    return compute
