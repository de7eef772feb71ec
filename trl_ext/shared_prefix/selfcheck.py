"""First-use check: compares a model's packed path with its own dense path on a small batch.

It guards against what no list of refusals can name: a model file that treats its attention, its positions or its head
in an unforeseen way, an adapter that reads the tokens of its rows, and kernels that behave differently on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .comparison import coarser, compared_parameters, gradient_difference, gradients, logp_difference, tolerances
from .errors import MismatchError, RefusedError, SharedPrefixError
from .model_parts import ModelParts, evaluating, untouched_random_state
from .packing import pack
from .paths import dense_scores, packed_scores

_passed: dict[tuple[object, ...], SelfCheck] = {}
_config_texts: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


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
    model: nn.Module | ModelParts,
    backend: str | None = None,
    temperature: float | None = None,
    *,
    padded: bool = True,
    by_column: bool = False,
    sample: Sequence[int] = (),
) -> SelfCheck:
    """Runs `self_check` when a kind of model first meets these kernels and dtypes, and remembers that it passed.

    Models are of one kind if class, configuration, wrappers and adapters are the same.

    Raises:
        MismatchError: The packed path differs from the dense path.
    """
    model_parts = ModelParts.of(model)
    causal_lm = model_parts.causal_lm
    if causal_lm not in _config_texts:
        _config_texts[causal_lm] = causal_lm.config.to_json_string()
    dtypes = (model_parts.compute_dtype, next(causal_lm.parameters()).dtype)
    kind = (type(causal_lm), _config_texts[causal_lm], *_wrappers(model_parts))
    key = (*kind, backend, temperature, padded, by_column, *dtypes, model_parts.device.type)
    if key not in _passed:
        result = self_check(model_parts, backend, temperature, padded=padded, by_column=by_column, sample=sample)
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
    _config_texts.clear()


def self_check(
    model: nn.Module | ModelParts,
    backend: str | None = None,
    temperature: float | None = None,
    *,
    padded: bool = True,
    by_column: bool = False,
    sample: Sequence[int] = (),
) -> SelfCheck:
    """Compares both paths on two small prompts with branching completions, at the temperature given.

    The model runs in evaluation mode, so no dropout and no recomputation takes part. Its gradients, its training mode
    and the random state are as before when the check returns. Gradients are compared for a few trainable parameters,
    and not at all if parameters are sharded over processes.

    Args:
        model: As in `shared_prefix_logps`, like `backend` and `temperature`.
        padded: Whether one prompt is padded on the left.
        by_column: As in `pack`.
        sample: Tokens that end each prompt, such as those before a completion of the run.
    """
    model_parts = ModelParts.of(model)
    called = model_parts.to_check()
    parameters = compared_parameters(model_parts)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        evaluating(model_parts),
        untouched_random_state(model_parts),
    ):
        endings = [*_tokens_of_adapters(model_parts), *sample]
        input_ids, attention_mask, width = _check_batch(_plain_tokens(model_parts), endings, padded)
        input_ids, attention_mask = input_ids.to(model_parts.device), attention_mask.to(model_parts.device)
        packing = pack(input_ids, attention_mask, width, min_run=2, by_column=by_column)
        scored = packing.slots < packing.predictors.numel()
        # Distinct weights, so that an exchange of two tokens shows in the gradients.
        weights = torch.linspace(-1, 1, scored.numel(), device=scored.device).view(scored.shape)
        dense = dense_scores(called, input_ids, attention_mask, scored, temperature=temperature)["log_probs"]
        dense_grads = gradients(dense, weights, parameters)
        try:
            scores, patch = packed_scores(called, packing, temperature=temperature, backend=backend)
        except (SharedPrefixError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # The dense path has just served the same rows, so packing is what the model cannot take.
            raise RefusedError(
                f"{model_parts.class_name} cannot run on a packed row ({type(error).__name__}: {error}). Turn shared "
                "prefixes off for it."
            ) from error
        packed = scores["log_probs"]
        packed_grads = gradients(packed, weights, parameters)
    # The coarser of the two dtypes sets the tolerance: under autocast that of the attention, else the model's own.
    model_dtype = model_parts.causal_lm.dtype
    dtype = coarser(patch.dtype or model_dtype, model_dtype)
    return SelfCheck(
        model=model_parts.class_name,
        backend=patch.backend_name or "none",
        dtype=dtype,
        logps=logp_difference(packed.detach()[scored], dense.detach()[scored], dtype),
        grads=gradient_difference(packed_grads, dense_grads, dtype),
        allowed=tolerances(dtype),
    )


def _wrappers(model_parts: ModelParts) -> tuple[str, ...]:
    """Describes what is around the causal LM: the classes of the wrappers, and their adapters."""
    descriptions = []
    for module in model_parts.to_check().modules:
        if module is model_parts.causal_lm:
            break
        descriptions.append(type(module).__name__)
    descriptions += [f"{name}: {config}" for name, config in model_parts.adapters.items()]
    return tuple(descriptions)


def _tokens_of_adapters(model_parts: ModelParts) -> list[int]:
    """Returns the tokens that adapters name in their configurations. They may look for them in the rows."""
    tokens: list[int] = []
    for config in model_parts.adapters.values():
        for name, value in vars(config).items():
            if "token" in name and isinstance(value, list) and value and all(type(token) is int for token in value):
                tokens += value
    return tokens


def _plain_tokens(model_parts: ModelParts) -> list[int]:
    """Returns the ids of the model's vocabulary without those that stand for images or sounds."""
    special: set[int] = set()
    config = model_parts.causal_lm.config
    if config is not model_parts.text_config:
        special = {
            value
            for name, value in vars(config).items()
            if name.endswith(("token_id", "token_index")) and isinstance(value, int)
        }
    return [token for token in range(model_parts.vocabulary) if token not in special]


def _check_batch(vocabulary: Sequence[int], endings: list[int], padded: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns token ids, attention mask and width of the completions of the batch to compare on.

    It has two prompts with three completions each, two of which part late. The prompts end in the tokens given.
    """
    generator = torch.Generator().manual_seed(0)

    def random_tokens(count: int) -> list[int]:
        """Returns token ids of the model's vocabulary."""
        return [vocabulary[i] for i in torch.randint(len(vocabulary), (count,), generator=generator).tolist()]

    prompt_width, width = 9 + len(endings), 8
    rows, masks = [], []
    for length in (9, 6 if padded else 9):
        prompt, stem = random_tokens(length) + endings, random_tokens(4)
        for completion in (stem + random_tokens(4), stem + random_tokens(2), random_tokens(5)):
            left, right = prompt_width - len(prompt), width - len(completion)
            rows.append([0] * left + prompt + completion + [0] * right)
            masks.append([0] * left + [1] * (len(prompt) + len(completion)) + [0] * right)
    return torch.tensor(rows), torch.tensor(masks), width
