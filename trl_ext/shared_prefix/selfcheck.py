"""First-use check: compares a model's packed path with its own dense path on a small batch.

It guards against what no list of refusals can name: a model file that treats its attention, its positions or its head
in an unforeseen way, and kernels that behave differently on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .errors import MismatchError
from .model_parts import ModelParts, evaluating
from .packing import pack
from .paths import dense_scores, packed_scores

# Tolerances for the differences of log-probabilities and of gradients, see `SelfCheck`. Half types round differently on
# the two paths, and the router of a mixture may then send a token to other experts. So in half types an average is
# compared, relative to how much the values vary.
TOLERANCES = {
    torch.float64: (1e-5, 1e-4),  # not tighter, as the fused head computes in float32
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (0.05, 0.1),
    torch.float16: (0.02, 0.05),
}
_HALF = (torch.bfloat16, torch.float16)
_COMPARED_PARAMETERS = 8
_LARGEST_PARAMETER = 1 << 24
_passed: dict[tuple[object, ...], SelfCheck] = {}


@dataclass(frozen=True)
class SelfCheck:
    """Result of one comparison.

    Attributes:
        model: Class of the model.
        backend: The kernels that ran.
        dtype: The dtype of the comparison, whose tolerances apply.
        logps: Largest difference of a log-probability. In half types, the mean difference divided by the standard
            deviation of the log-probabilities.
        grads: Largest difference of a gradient, divided by the largest gradient. In half types, the norm of the
            difference divided by the norm of the gradients. None if no gradient could be compared.
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
        """Returns whether both differences are within their tolerances. NaN never is."""
        return self.logps <= self.allowed[0] and (self.grads is None or self.grads <= self.allowed[1])


def check_first_use(
    model: nn.Module | ModelParts, backend: str | None = None, temperature: float | None = None
) -> SelfCheck:
    """Runs `self_check` when a model class first meets these kernels and dtypes, and remembers that it passed.

    Raises:
        MismatchError: The packed path differs from the dense path.
    """
    model_parts = ModelParts.of(model)
    causal_lm = model_parts.causal_lm
    dtypes = (model_parts.compute_dtype, next(causal_lm.parameters()).dtype)
    device_type = model_parts.device.type
    key = (type(causal_lm), causal_lm.config.model_type, backend, temperature, *dtypes, device_type)
    if key not in _passed:
        result = self_check(model_parts, backend, temperature)
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
    """Forgets which checks have passed, so that the next use checks again."""
    _passed.clear()


def self_check(
    model: nn.Module | ModelParts, backend: str | None = None, temperature: float | None = None
) -> SelfCheck:
    """Compares both paths on two small prompts with branching completions, at the temperature given.

    The model runs in evaluation mode, so no dropout and no recomputation takes part. Its gradients, its training mode
    and the random state are as before when the check returns. Gradients are compared for a few trainable parameters,
    and not at all if parameters are sharded over processes.
    """
    model_parts = ModelParts.of(model)
    if model_parts.is_sharded:
        # Only the wrapper can gather the parameters for a forward.
        called, parameters = model_parts, []
    else:
        # A data-parallel wrapper would wait for a backward that never comes, so the model inside is called.
        called, parameters = model_parts.unwrapped(), _compared_parameters(model_parts.causal_lm)
    # Named one by one, because torch warns where several devices are left to it.
    forked = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model_parts), forked:
        input_ids, attention_mask, width = _check_batch(model_parts.embedding_weight.shape[0], model_parts.device)
        packing = pack(input_ids, attention_mask, width, min_run=2)
        scored = packing.slots < packing.predictors.numel()
        # Distinct weights, so that an exchange of two tokens shows in the gradients.
        weights = torch.linspace(-1, 1, scored.numel(), device=scored.device).view(scored.shape)
        dense = dense_scores(called, input_ids, attention_mask, scored, temperature=temperature)["log_probs"]
        dense_grads = _gradients(dense, weights, parameters)
        scores, patch = packed_scores(called, packing, temperature=temperature, backend=backend)
        packed = scores["log_probs"]
        packed_grads = _gradients(packed, weights, parameters)
    # The coarser of the two dtypes sets the tolerance: under autocast that of the attention, else the model's own.
    model_dtype = model_parts.causal_lm.dtype
    dtype = min((patch.dtype or model_dtype, model_dtype), key=lambda dtype: torch.finfo(dtype).bits)
    return SelfCheck(
        model=model_parts.class_name,
        backend=patch.backend_name or "none",
        dtype=dtype,
        logps=_logp_difference(packed.detach()[scored], dense.detach()[scored], dtype in _HALF),
        grads=_gradient_difference(packed_grads, dense_grads, dtype in _HALF),
        allowed=TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]),
    )


def _check_batch(vocabulary: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns token ids, attention mask and width of the completions of the batch to compare on.

    It has two prompts of unequal length with three completions each, two of which part late.
    """
    generator = torch.Generator().manual_seed(0)

    def random_tokens(count: int) -> list[int]:
        """Returns token ids of the model's vocabulary."""
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    prompt_width, width = 9, 8
    rows, masks = [], []
    for length in (9, 6):
        prompt, stem = random_tokens(length), random_tokens(4)
        for completion in (stem + random_tokens(4), stem + random_tokens(2), random_tokens(5)):
            left, right = prompt_width - length, width - len(completion)
            rows.append([0] * left + prompt + completion + [0] * right)
            masks.append([0] * left + [1] * (length + len(completion)) + [0] * right)
    return torch.tensor(rows, device=device), torch.tensor(masks, device=device), width


def _compared_parameters(causal_lm: nn.Module) -> list[nn.Parameter]:
    """Returns a few trainable parameters, spread evenly over the model, none of them huge."""
    trainable = [p for p in causal_lm.parameters() if p.requires_grad and p.numel() <= _LARGEST_PARAMETER]
    step = max(1, len(trainable) // _COMPARED_PARAMETERS)
    return trainable[::step]


def _gradients(
    logps: torch.Tensor, weights: torch.Tensor, parameters: list[nn.Parameter]
) -> tuple[torch.Tensor | None, ...]:
    """Returns the gradients of the weighted log-probabilities, None for a parameter without influence."""
    if not parameters:
        return ()
    return torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)


def _logp_difference(packed: torch.Tensor, dense: torch.Tensor, half: bool) -> float:
    """Returns `SelfCheck.logps`."""
    difference = (packed - dense).abs()
    return float(difference.mean() / dense.std() if half else difference.max())


def _gradient_difference(
    packed: tuple[torch.Tensor | None, ...], dense: tuple[torch.Tensor | None, ...], half: bool
) -> float | None:
    """Returns `SelfCheck.grads`."""
    pairs = [(a.float(), b.float()) for a, b in zip(packed, dense, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    order = 2.0 if half else torch.inf
    difference, size = (
        float(torch.stack([torch.linalg.vector_norm(x, order) for x in tensors]).norm(order))
        for tensors in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return difference / max(size, 1e-30)
