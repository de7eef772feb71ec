"""Forward and backward of completion log-probabilities: TRL's dense path, the shared-prefix path, and PrefixGrouper.

All paths run in one process in alternating order on the same weights and tokens. PrefixGrouper (a package of that name,
if installed) runs as its documentation uses it, splitting the logits of the packed row, and in two better forms that we
gave it: hidden states are split and the head runs on completions only, once TRL's fused head, as in a trainer, and once
plain logits, which on a CPU are faster than TRL's head.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..shared_prefix import ModelCost, flop_ratio, pack, shared_prefix_logps
from ..trl_internals.forwards import add_fused_head

Shape = tuple[int, int, int]
Form = Literal["documented", "fused", "logits"]
DEFAULT_SHAPES: tuple[Shape, ...] = ((256, 8, 64), (1024, 8, 64), (1024, 8, 256), (2048, 8, 128), (512, 16, 128))


@dataclass(frozen=True)
class Row:
    """One shape. Ratios are dense by shared, so that above 1 the shared path is better.

    Attributes:
        prompt_length, group_size, completion_length: P, G and S tokens.
        token_ratio: Dense tokens by packed tokens.
        flop_ratio: The same for floating-point operations, counted from the architecture.
        seconds_dense, seconds_shared: Medians of forward and backward.
        speedup: Their ratio.
        speedup_prefix_grouper: Dense by PrefixGrouper as documented; None where it is not installed.
        speedup_prefix_grouper_fused: Dense by PrefixGrouper with TRL's head on completions only.
        speedup_prefix_grouper_logits: Dense by PrefixGrouper with plain logits of completions only.
        peak_memory_ratio: Most bytes held by tensors in a step above those before it, dense by shared.
        peak_memory_ratio_prefix_grouper: PrefixGrouper as documented by shared.
        peak_memory_ratio_prefix_grouper_fused, peak_memory_ratio_prefix_grouper_logits: The same for the other forms.
        max_logprob_diff: Largest difference of a log-probability to the dense path.
        rel_grad_diff: Norm of the difference of all gradients by the norm of the dense ones.
        pack_share: Share of the step spent on building the tree.
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
    """`1024x8x64` -> (1024, 8, 64): prompt tokens, group size, completion tokens."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"a shape is PROMPTxGROUPxCOMPLETION, such as 1024x8x64; got {text!r}")
    prompt, group, completion = map(int, parts)
    return prompt, group, completion


def default_model() -> nn.Module:
    """Eight layers of Llama, hidden size 512, 8 query and 2 key-value heads, random weights."""
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def load_model(path: str | None) -> nn.Module:
    """The model to measure, with TRL's fused head: a folder or hub id, or the default."""
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
    """Measures every shape; the first round of each is not counted."""
    return [_measure_shape(model, shape, repeats, progress) for shape in shapes]


def _measure_shape(model: nn.Module, shape: Shape, repeats: int, progress: Callable[[str], None]) -> Row:
    prompt, group, completion = shape
    batch = _batch(model, shape)
    packing_share: list[float] = []
    ratio = [1.0]

    def shared() -> torch.Tensor:
        logps, _, report = shared_prefix_logps(model, *batch, completion, temperature=1.0, min_gain=0)
        packing_share.append(report.pack_seconds)
        ratio[0] = report.token_ratio
        return logps

    arms: dict[str, Callable[[], torch.Tensor]] = {"dense": lambda: _dense(model, *batch, completion), "shared": shared}
    if importlib.util.find_spec("prefix_grouper") is not None:
        for form in get_args(Form):
            name = "prefix_grouper" if form == "documented" else f"prefix_grouper_{form}"
            arms[name] = lambda form=form: _prefix_grouper(model, batch[0], shape, form)  # type: ignore[misc]
    weights = torch.randn(group, completion, generator=torch.Generator().manual_seed(1)).to(batch[0].device)
    times: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    memory: dict[str, int] = {}
    for round_number in range(repeats + 1):
        order = list(arms) if round_number % 2 else list(reversed(arms))
        for name in order:
            progress(f"{prompt}x{group}x{completion}: {name}, round {round_number} of {repeats}")
            model.zero_grad(set_to_none=True)
            gc.collect()
            if round_number:
                times[name].append(_timed(lambda name=name: _step(arms[name], weights)))  # type: ignore[misc]
            else:  # the first round warms up, and is looked at
                memory[name] = _peak_bytes(lambda name=name: results.update({name: _keep(model, arms[name], weights)}))  # type: ignore[misc]
    median = {name: statistics.median(values) for name, values in times.items()}

    def faster(name: str) -> float | None:
        return median["dense"] / median[name] if name in arms else None

    def larger(name: str) -> float | None:
        return memory[name] / memory["shared"] if name in arms else None

    return Row(
        prompt_length=prompt,
        group_size=group,
        completion_length=completion,
        token_ratio=ratio[0],
        flop_ratio=flop_ratio(pack(*batch, completion), ModelCost.of(model)),
        seconds_dense=median["dense"],
        seconds_shared=median["shared"],
        speedup=median["dense"] / median["shared"],
        speedup_prefix_grouper=faster("prefix_grouper"),
        speedup_prefix_grouper_fused=faster("prefix_grouper_fused"),
        speedup_prefix_grouper_logits=faster("prefix_grouper_logits"),
        peak_memory_ratio=memory["dense"] / memory["shared"],
        peak_memory_ratio_prefix_grouper=larger("prefix_grouper"),
        peak_memory_ratio_prefix_grouper_fused=larger("prefix_grouper_fused"),
        peak_memory_ratio_prefix_grouper_logits=larger("prefix_grouper_logits"),
        max_logprob_diff=(results["shared"][0] - results["dense"][0]).abs().max().item(),
        rel_grad_diff=_relative(results["shared"][1], results["dense"][1]),
        pack_share=statistics.median(packing_share[1:]) / median["shared"],
    )


def _batch(model: nn.Module, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    prompt, group, completion = shape
    generator = torch.Generator().manual_seed(0)
    size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    shared = torch.randint(size, (1, prompt), generator=generator).expand(group, -1)
    ids = torch.cat([shared, torch.randint(size, (group, completion), generator=generator)], dim=1)
    ids = ids.to(next(model.parameters()).device)
    return ids, torch.ones_like(ids)


def _dense(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, completion: int) -> torch.Tensor:
    labels = ids.clone()
    labels[:, :-completion] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -completion:]


def _prefix_grouper(model: nn.Module, ids: torch.Tensor, shape: Shape, form: Form) -> torch.Tensor:
    from prefix_grouper import PrefixGrouper

    prompt, group, completion = shape
    prefix_mask = ids.new_ones(1, prompt)
    suffix_mask = ids.new_ones(group, completion)
    grouper = PrefixGrouper.from_ungrouped_masks(prefix_mask, suffix_mask, group, padding_mode="right")
    packed = grouper.concat_input(ids[:1, :prompt], prefix_mask, ids[:, prompt:], suffix_mask)
    suffix = torch.arange(prompt, prompt + completion, device=ids.device)
    positions = torch.cat([torch.arange(prompt, device=ids.device), *[suffix] * group])[None]
    inputs: dict[str, Any] = {"position_ids": positions, "use_cache": False, "trl_ext_grouper": grouper}

    def predictors(packed: torch.Tensor) -> torch.Tensor:
        return grouper.split_output(packed, include_prefix_last=1)[2][:, :-1]  # (G, S, ...)

    def keep_predictors(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = predictors(output.last_hidden_state).flatten(0, 1)[None]
        return output

    backbone: Any = model.base_model
    labels = ids[:, prompt:]
    if form == "fused":
        handle = backbone.register_forward_hook(keep_predictors)
        try:
            with _grouped_attention(model):
                output = model(packed, shift_labels=labels.reshape(1, -1), fused_lm_head=True, **inputs)
        finally:
            handle.remove()
        return output.log_probs.reshape(labels.shape)
    with _grouped_attention(model):
        if form == "documented":
            logits = predictors(model(packed, **inputs).logits).float()
        else:
            hidden = backbone(packed, **inputs).last_hidden_state
            logits = model.get_output_embeddings()(predictors(hidden)).float()  # type: ignore[operator]
    return logits.gather(-1, labels[..., None]).squeeze(-1) - logits.logsumexp(-1)


@contextlib.contextmanager
def _grouped_attention(model: nn.Module) -> Iterator[None]:
    """PrefixGrouper's attention over transformers' SDPA, for the time of one forward."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    masks: dict[tuple[int, int], torch.Tensor | None] = {}

    def inner(query: Any, key: Any, value: Any, mask: Any, module: Any, **kwargs: Any) -> Any:
        rows, columns = query.shape[2], key.shape[2]
        if (rows, columns) not in masks:
            causal = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
            masks[rows, columns] = None if rows == columns else causal[None, None]
        return sdpa(module, query, key, value, masks[rows, columns], **kwargs)[0]

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return kwargs.pop("trl_ext_grouper").forward(inner, query, key, value, module, **kwargs), None

    config: Any = model.config
    previous = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("trl_ext_prefix_grouper", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("trl_ext_prefix_grouper", lambda *args, **kwargs: None)
    config._attn_implementation = "trl_ext_prefix_grouper"
    try:
        yield
    finally:
        config._attn_implementation = previous


def _step(arm: Callable[[], torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    logps = arm()
    (logps * weights).sum().backward()
    return logps


def _keep(
    model: nn.Module, arm: Callable[[], torch.Tensor], weights: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logps = _step(arm, weights).detach()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return logps, grads


def _relative(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    difference = sum(((a - b).double() ** 2).sum() for a, b in zip(ours, theirs, strict=True))
    size = sum((b.double() ** 2).sum() for b in theirs)
    return float((difference / size) ** 0.5)


def _timed(run: Callable[[], Any]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that tensors held at once during `run`, above what they held before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def plot(rows: Sequence[Row], path: str) -> None:
    """Speed-up against prompt length, a line per group size and completion length, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.group_size, row.completion_length), []).append(row)
    for (group, completion), line in sorted(lines.items()):
        line.sort(key=lambda row: row.prompt_length)
        x = [row.prompt_length for row in line]
        (drawn,) = axes.plot(x, [row.speedup for row in line], "o-", label=f"G={group}, S={completion}: shared")
        others = [row.speedup_prefix_grouper for row in line if row.speedup_prefix_grouper is not None]
        if len(others) == len(line):
            axes.plot(x, others, "x--", color=drawn.get_color(), label=f"G={group}, S={completion}: PrefixGrouper")
        axes.plot(x, [row.token_ratio for row in line], ":", color=drawn.get_color(), alpha=0.6)
    axes.set(
        xlabel="prompt tokens", ylabel="times faster than dense", title="Forward and backward of log-probabilities"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        sorted({row.prompt_length for row in rows}), [str(x) for x in sorted({r.prompt_length for r in rows})]
    )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="dotted: ratio of tokens", title_fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
