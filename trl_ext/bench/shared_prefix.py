"""Forward and backward of completion log-probabilities: TRL's dense path, the shared-prefix path, and PrefixGrouper.

All paths run in one process in alternating order, on the same weights and tokens. PrefixGrouper takes part if it is
installed.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from ..shared_prefix import ModelCost, flop_ratio, pack, shared_prefix_logps
from ..support.random_state import untouched_torch_state
from ..trl_internals.forwards import add_fused_head
from .costs import peak_bytes, timed
from .prefix_grouper import Form, grouped_logps

Shape = tuple[int, int, int]
"""Prompt tokens, group size and completion tokens."""
DEFAULT_SHAPES: tuple[Shape, ...] = ((256, 8, 64), (1024, 8, 64), (1024, 8, 256), (2048, 8, 128), (512, 16, 128))


@dataclass(frozen=True)
class Row:
    """The measurements of one shape. Ratios are dense by shared: above 1 the shared path is better.

    Attributes:
        prompt_length, group_size, completion_length: P, G and S tokens.
        token_ratio: Dense tokens by packed tokens.
        flop_ratio: The same for floating-point operations, counted from the architecture.
        seconds_dense, seconds_shared: Medians of forward and backward.
        speedup: Their ratio.
        speedup_prefix_grouper: Dense by PrefixGrouper as documented, None where it is not installed.
        speedup_prefix_grouper_fused: Dense by PrefixGrouper with TRL's head on completions only.
        speedup_prefix_grouper_logits: Dense by PrefixGrouper with plain logits of completions only.
        peak_memory_ratio: Most bytes that tensors held in a step, above those before it, dense by shared.
        peak_memory_ratio_prefix_grouper: PrefixGrouper as documented by shared.
        peak_memory_ratio_prefix_grouper_fused, peak_memory_ratio_prefix_grouper_logits: The same for the other forms.
        max_logprob_diff: Largest difference of a log-probability from the dense path.
        rel_grad_diff: Norm of the difference of all gradients, by the norm of the dense ones.
        pack_share: Share of the step that builds the tree.
    """

    prompt_length: int
    group_size: int
    completion_length: int
    token_ratio: float
    flop_ratio: float
    seconds_dense: float
    seconds_shared: float
    speedup: float
    speedup_prefix_grouper: float | None
    speedup_prefix_grouper_fused: float | None
    speedup_prefix_grouper_logits: float | None
    peak_memory_ratio: float
    peak_memory_ratio_prefix_grouper: float | None
    peak_memory_ratio_prefix_grouper_fused: float | None
    peak_memory_ratio_prefix_grouper_logits: float | None
    max_logprob_diff: float
    rel_grad_diff: float
    pack_share: float


def parse_shape(text: str) -> Shape:
    """Reads a shape: `1024x8x64` -> (1024, 8, 64)."""
    numbers = text.split("x")
    if len(numbers) != 3 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ValueError(f"a shape is PROMPTxGROUPxCOMPLETION, such as 1024x8x64; got {text!r}")
    prompt, group, completion = map(int, numbers)
    return prompt, group, completion


def default_model() -> nn.Module:
    """Makes a random Llama of eight layers, hidden size 512, 8 query and 2 key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        attn_implementation="sdpa",
    )
    with untouched_torch_state():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def load_model(path: str | None) -> nn.Module:
    """Loads the model to measure from a folder or hub id, or makes the default one, and gives it TRL's fused head."""
    model: nn.Module
    if path is None:
        model = default_model()
    else:
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        model = loaded.to(device)
    add_fused_head(model)
    return model.train()


def measure(
    model: nn.Module, shapes: Sequence[Shape], repeats: int = 3, progress: Callable[[str], None] = lambda text: None
) -> list[Row]:
    """Measures every shape. The first round of each warms up and is not timed.

    Args:
        model: From `load_model`.
        shapes: What to measure.
        repeats: Timed rounds of every path.
        progress: Called with a line for the user.
    """
    return [_measure_shape(model, shape, repeats, progress) for shape in shapes]


def _measure_shape(model: nn.Module, shape: Shape, repeats: int, progress: Callable[[str], None]) -> Row:
    prompt, group, completion = shape
    batch = make_batch(model, shape)
    pack_seconds: list[float] = []
    token_ratio = 1.0

    def shared() -> torch.Tensor:
        nonlocal token_ratio
        logps, _, report = shared_prefix_logps(model, *batch, completion, temperature=1.0, min_gain=0)
        pack_seconds.append(report.pack_seconds)
        token_ratio = report.token_ratio
        return logps

    arms: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: dense_logps(model, *batch, completion),
        "shared": shared,
    }
    if importlib.util.find_spec("prefix_grouper") is not None:
        for form in get_args(Form):
            name = "prefix_grouper" if form == "documented" else f"prefix_grouper_{form}"
            arms[name] = partial(grouped_logps, model, batch[0], shape, form)
    weights = torch.randn(group, completion, generator=torch.Generator().manual_seed(1)).to(batch[0].device)
    times: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, _Result] = {}
    memory: dict[str, int] = {}
    for round_number in range(repeats + 1):
        # alternating order, so that no path always runs after the same other one
        order = list(arms) if round_number % 2 else list(reversed(arms))
        for name in order:
            progress(f"{prompt}x{group}x{completion}: {name}, round {round_number} of {repeats}")
            model.zero_grad(set_to_none=True)
            gc.collect()
            if round_number:
                times[name].append(timed(partial(_backward, arms[name], weights)))
            else:  # the first round gives memory, log-probabilities and gradients
                memory[name] = peak_bytes(partial(_keep_result, results, name, model, arms[name], weights))
    median = {name: statistics.median(values) for name, values in times.items()}

    def speedup(name: str) -> float | None:
        return median["dense"] / median[name] if name in arms else None

    def memory_ratio(name: str) -> float | None:
        return memory[name] / memory["shared"] if name in arms else None

    return Row(
        prompt_length=prompt,
        group_size=group,
        completion_length=completion,
        token_ratio=token_ratio,
        flop_ratio=flop_ratio(pack(*batch, completion), ModelCost.of(model)),
        seconds_dense=median["dense"],
        seconds_shared=median["shared"],
        speedup=median["dense"] / median["shared"],
        speedup_prefix_grouper=speedup("prefix_grouper"),
        speedup_prefix_grouper_fused=speedup("prefix_grouper_fused"),
        speedup_prefix_grouper_logits=speedup("prefix_grouper_logits"),
        peak_memory_ratio=memory["dense"] / memory["shared"],
        peak_memory_ratio_prefix_grouper=memory_ratio("prefix_grouper"),
        peak_memory_ratio_prefix_grouper_fused=memory_ratio("prefix_grouper_fused"),
        peak_memory_ratio_prefix_grouper_logits=memory_ratio("prefix_grouper_logits"),
        max_logprob_diff=(results["shared"].logps - results["dense"].logps).abs().max().item(),
        rel_grad_diff=_relative_difference(results["shared"].gradients, results["dense"].gradients),
        pack_share=statistics.median(pack_seconds[1:]) / median["shared"],
    )


def make_batch(model: nn.Module, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes random token ids with one prompt for all rows, and their mask, (G, P + S) each."""
    prompt, group, completion = shape
    generator = torch.Generator().manual_seed(0)
    size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    prompts = torch.randint(size, (1, prompt), generator=generator).expand(group, -1)
    ids = torch.cat([prompts, torch.randint(size, (group, completion), generator=generator)], dim=1)
    ids = ids.to(next(model.parameters()).device)
    return ids, torch.ones_like(ids)


def dense_logps(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, completion: int) -> torch.Tensor:
    """Computes log-probabilities of completions as TRL does, (G, S)."""
    labels = ids.clone()
    labels[:, :-completion] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -completion:]


@dataclass(frozen=True)
class _Result:
    """What one forward and backward computed."""

    logps: torch.Tensor
    gradients: list[torch.Tensor]


def _backward(arm: Callable[[], torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Runs forward and backward and returns the log-probabilities."""
    logps = arm()
    (logps * weights).sum().backward()
    return logps


def _keep_result(
    results: dict[str, _Result], name: str, model: nn.Module, arm: Callable[[], torch.Tensor], weights: torch.Tensor
) -> None:
    """Runs forward and backward and puts what they computed into `results`."""
    logps = _backward(arm, weights).detach()
    results[name] = _Result(logps, [weight.grad for weight in model.parameters() if weight.grad is not None])


def _relative_difference(shared: list[torch.Tensor], dense: list[torch.Tensor]) -> float:
    """Returns the norm of a difference of gradients by the norm of the dense ones."""
    difference = sum(((ours - theirs).double() ** 2).sum() for ours, theirs in zip(shared, dense, strict=True))
    size = sum((theirs.double() ** 2).sum() for theirs in dense)
    return float((difference / size) ** 0.5)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns rows as plain values."""
    return [asdict(row) for row in rows]
