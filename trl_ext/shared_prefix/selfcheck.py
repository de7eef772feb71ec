"""The first-use check: on a small packed batch, the model's packed path against its own dense path.

It guards what no list of refusals can: a model file that treats its attention, its positions or its head in a way
nobody thought of, and kernels that this machine has and ours had not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .errors import MismatchError
from .model_parts import compute_dtype, embedding, evaluating, find_causal_lm, model_device
from .packing import pack

# Differences of log-probabilities and gradients, see `SelfCheck`. Half types round differently on the two paths, and a
# mixture's router may send a token elsewhere for it, so there an average is compared, by how much the values vary.
TOLERANCES = {
    torch.float64: (1e-5, 1e-4),  # the fused head computes in float32
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (0.05, 0.1),
    torch.float16: (0.02, 0.05),
}
_HALF = (torch.bfloat16, torch.float16)
_GRADIENTS = 8
_LARGEST = 1 << 24
_passed: dict[tuple[object, ...], SelfCheck] = {}


@dataclass(frozen=True)
class SelfCheck:
    """What the check found.

    Attributes:
        model: Class of the model.
        backend: The kernels that ran.
        dtype: The type of the comparison, whose tolerances apply.
        logps: Largest difference of a log-probability; in half types the mean difference by the standard deviation
            of the log-probabilities.
        grads: Largest difference of a gradient by the largest gradient, in half types the norm of the difference by
            the norm; None if no gradient could be compared.
        allowed: The tolerances for the two.
    """

    model: str
    backend: str
    dtype: torch.dtype
    logps: float
    grads: float | None
    allowed: tuple[float, float]

    @property
    def ok(self) -> bool:
        """Whether both differences are numbers within their tolerances."""
        return self.logps <= self.allowed[0] and (self.grads is None or self.grads <= self.allowed[1])


def ensure(model: nn.Module, backend: str | None = None, temperature: float | None = None) -> SelfCheck:
    """Runs `self_check` the first time this model class meets these kernels and this type, and remembers a success.

    Raises:
        MismatchError: The packed path differs from the dense path.
    """
    lm = find_causal_lm(model)
    device = model_device(model)
    types = (compute_dtype(model), next(lm.parameters()).dtype)
    key = (type(lm), lm.config.model_type, backend, temperature, *types, device.type)
    if key not in _passed:
        result = self_check(model, backend, temperature)
        if not result.ok:
            grads = "not compared" if result.grads is None else f"{result.grads:.2e} relative"
            raise MismatchError(
                f"{result.model} with the {result.backend!r} kernels in {result.dtype} differs from its own dense "
                f"path: log-probabilities by {result.logps:.2e} (allowed {result.allowed[0]:.0e}), gradients by "
                f"{grads} (allowed {result.allowed[1]:.0e}). Try another backend, or turn shared prefixes off for it."
            )
        _passed[key] = result
    return _passed[key]


def forget() -> None:
    """Forgets all successes, so that the next use checks again."""
    _passed.clear()


def self_check(model: nn.Module, backend: str | None = None, temperature: float | None = None) -> SelfCheck:
    """Compares both paths on two small prompts with branching completions, at the temperature of the call.

    Leaves gradients, random state and training mode as they were; the model runs in evaluation mode, so nothing is
    dropped and nothing is recomputed. Gradients are compared for a few trainable parameters; not for parameters that
    are sharded over processes.
    """
    from .forward import dense_scores, packed_scores

    lm = find_causal_lm(model)
    sharded = any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in lm.parameters())
    target = model if sharded else lm  # a data-parallel wrapper would wait for a backward
    parameters = [] if sharded else _some(lm)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model), torch.random.fork_rng():
        input_ids, attention_mask, width = _batch(embedding(model).shape[0], model_device(model))
        packing = pack(input_ids, attention_mask, width, min_run=2)
        scored = packing.slots < packing.predictors.numel()
        weights = torch.linspace(-1, 1, scored.numel(), device=scored.device).view(scored.shape)
        dense = dense_scores(target, input_ids, attention_mask, scored, temperature=temperature)["log_probs"]
        dense_grads = _grads(dense, weights, parameters)
        scores, entry = packed_scores(target, packing, temperature=temperature, backend=backend)
        packed = scores["log_probs"]
        packed_grads = _grads(packed, weights, parameters)
    dtype = min((entry.dtype or lm.dtype, lm.dtype), key=lambda d: torch.finfo(d).bits)
    return SelfCheck(
        model=type(lm).__name__,
        backend=entry.kernels or "none",
        dtype=dtype,
        logps=_logp_difference(packed.detach()[scored], dense.detach()[scored], dtype in _HALF),
        grads=_grad_difference(packed_grads, dense_grads, dtype in _HALF),
        allowed=TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]),
    )


def _batch(vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two prompts of unequal length, three completions each, two of which part late: ids, mask, completion width."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    prompt_width, width = 9, 8
    rows, masks = [], []
    for length in (9, 6):
        prompt, stem = tokens(length), tokens(4)
        for completion in (stem + tokens(4), stem + tokens(2), tokens(5)):
            left, right = prompt_width - length, width - len(completion)
            rows.append([0] * left + prompt + completion + [0] * right)
            masks.append([0] * left + [1] * (length + len(completion)) + [0] * right)
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device), width


def _some(lm: nn.Module) -> list[nn.Parameter]:
    """A few trainable parameters, evenly over the model, none of them huge."""
    trainable = [p for p in lm.parameters() if p.requires_grad and p.numel() <= _LARGEST]
    step = max(1, len(trainable) // _GRADIENTS)
    return trainable[::step]


def _grads(
    logps: torch.Tensor, weights: torch.Tensor, parameters: list[nn.Parameter]
) -> tuple[torch.Tensor | None, ...]:
    if not parameters:
        return ()
    return torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)


def _logp_difference(ours: torch.Tensor, theirs: torch.Tensor, half: bool) -> float:
    difference = (ours - theirs).abs()
    return float(difference.mean() / theirs.std() if half else difference.max())


def _grad_difference(
    ours: tuple[torch.Tensor | None, ...], theirs: tuple[torch.Tensor | None, ...], half: bool
) -> float | None:
    pairs = [(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    order = 2.0 if half else torch.inf
    difference, size = (
        float(torch.stack([torch.linalg.vector_norm(x, order) for x in xs]).norm(order))
        for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return difference / max(size, 1e-30)
