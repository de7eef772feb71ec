"""The reference policy where TRL has none, because its KL factor is 0 and a plugin needs one all the same.

It is the policy as it is when the plugins come: a frozen copy of its weights, or of its trained adapter.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from ..errors import ConfigError
from . import forwards, reference_adapters
from .mixins import RoundMixin
from .reference_adapters import ADAPTER
from .seams import trl_version

_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.005, torch.bfloat16: 0.01}
"""What log-probabilities of equal policies may differ by: the largest difference, and in half types the mean one."""


def provide(trainer: Any, plugin: str) -> tuple[Any, Callable[[], None]]:
    """Makes a reference where TRL has none, from the policy as it is now.

    Args:
        trainer: GRPO or RLOO.
        plugin: Who needs it, for the error.

    Returns:
        The frozen copy of the policy, or None where TRL's own reference or an adapter serves, and the undo.

    Raises:
        ConfigError: No copy can be made.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    adapted = forwards.is_peft_model(policy)
    if adapted:
        reference_adapters.check(policy, plugin)
        if ADAPTER in policy.peft_config and trainer.state.global_step == 0:
            return None, reference_adapters.complete(policy)
    if trainer.args.beta != 0.0 or (
        adapted and (ADAPTER in policy.peft_config or reference_adapters.adds_nothing(policy))
    ):
        return None, lambda: None
    if adapted:
        reference_adapters.add_copy(policy, plugin)
        return None, functools.partial(reference_adapters.remove_copy, policy)
    model = _prepare(trainer, _copy_model(trainer, policy, plugin))
    return model, lambda: _unload(trainer, model)


@contextlib.contextmanager
def reference_adapter(trainer: Any) -> Iterator[None]:
    """Turns a PEFT policy into its reference inside the block, without the noise of dropout."""
    from trl.trainer.utils import use_adapter

    model = trainer.accelerator.unwrap_model(trainer.model)
    with _evaluating(trainer.model), use_adapter(model, ADAPTER if ADAPTER in model.peft_config else None):
        yield


def difference(trainer: Any, batch: Mapping[str, Any], reference: Any) -> tuple[float, float]:
    """Compares the policy with its reference on a few rows, in evaluation mode and with TRL's own forward.

    Args:
        trainer: GRPO or RLOO.
        batch: A round, of which one micro-batch is taken.
        reference: The frozen copy, or None where TRL's own reference or an adapter serves.

    Returns:
        The difference of their log-probabilities, the largest one of all processes, and what is allowed.
    """
    size, rows = trainer.args.per_device_train_batch_size, dict(batch)
    if batch.get("pixel_values") is None:  # a row may have any number of images, so a batch with images stays whole
        for name, value in batch.items():
            rows[name] = value[:size] if isinstance(value, torch.Tensor) and value.dim() else value
    model = getattr(trainer, "ref_model", None) if reference is None else reference
    forward = super(RoundMixin, trainer)._get_per_token_logps_and_entropies
    score = functools.partial(forwards.completion_logps, trainer, rows, forward=forward)
    with _evaluating(trainer.model):
        policy = score()
        if model is None:
            with reference_adapter(trainer):
                other = score()
        else:
            other = score(model)
    gaps = (policy - other).abs().float()[rows["completion_mask"].bool()]
    dtype = _coarsest_dtype(trainer)
    if dtype in (torch.float16, torch.bfloat16):
        gap = gaps.mean() if gaps.numel() else gaps.sum()
    else:
        gap = gaps.max() if gaps.numel() else gaps.sum()
    return trainer.accelerator.gather(gap.reshape(1)).max().item(), _TOLERANCES[dtype]


def origin(trainer: Any, reference: Any) -> str:
    """Says where the reference comes from and what to do when it is not the policy, for an error."""
    policy = trainer.accelerator.unwrap_model(trainer.model)
    save = "Save the policy with save_pretrained, and start from that folder"
    own = "or set beta=0.0: the reference is then a copy of the policy as it is"
    if forwards.is_peft_model(policy):
        if ADAPTER in policy.peft_config:
            return (
                f"It is the adapter {ADAPTER!r}. Call delete_adapter({ADAPTER!r}) on the model and set beta=0.0 before "
                f"the trainer is built: the reference is then a copy of the policy as it is."
            )
        return f"It is the model without its adapter. Merge the adapter into the model first, {own}."
    source = getattr(policy.config, "_name_or_path", "") or "nowhere"
    if reference is None:
        return f"TRL loaded it from {source!r}. {save}, {own}."
    return f"It was loaded from {source!r}, because the policy is sharded. {save}."


def _copy_model(trainer: Any, policy: Any, plugin: str) -> Any:
    """A frozen copy of the policy with TRL's last layer."""
    if any(_is_shard(value) for value in policy.parameters()):
        model = _load(trainer, policy, plugin)
    else:
        model = _with_weights_of(policy, plugin, restore_head=getattr(trainer.args, "cast_lm_head_to_fp32", False))
    model.eval().requires_grad_(False)
    _add_head(trainer, model)
    return model


def _is_shard(value: torch.Tensor) -> bool:
    """Whether a process holds a part of a weight only, under DeepSpeed ZeRO-3 or FSDP."""
    return hasattr(value, "ds_id") or hasattr(value, "device_mesh") or value.numel() == 0


def _with_weights_of(policy: Any, plugin: str, restore_head: bool) -> Any:
    """Another model of the policy's class with the same weights on the same devices.

    Args:
        policy: The policy.
        plugin: Who needs it, for the error.
        restore_head: Whether TRL has put the policy's last layer into float32, which the copy gets back.
    """
    layers = (policy.get_input_embeddings(), policy.get_output_embeddings())
    ends = {id(layer.weight) for layer in layers if layer is not None}
    dtype = next((value.dtype for value in policy.parameters() if id(value) not in ends), policy.dtype)
    with torch.device("meta"):  # without first weights, as transformers makes the models that it loads
        model = type(policy)._from_config(
            copy.deepcopy(policy.config), dtype=dtype, attn_implementation=policy.config._attn_implementation
        )
    copies, originals = _tensors(model), _tensors(policy)
    unlike = sorted(
        name
        for name in copies.keys() | originals.keys()
        if name not in copies or name not in originals or copies[name].shape != originals[name].shape
    )
    if unlike:
        raise ConfigError(
            f"plugin {plugin!r} needs a reference model, a frozen copy of the policy, and {type(policy).__name__} "
            f"makes another model from the policy's configuration: {unlike[0]!r} differs. Save the policy with "
            f"save_pretrained and give the trainer the folder, or train a PEFT adapter."
        )
    weights: dict[int, torch.Tensor] = {}
    for name, original in originals.items():
        value = original.detach().clone()
        value = value.to(dtype) if restore_head and id(original) in ends else value
        empty = copies[name]
        weights[id(empty)] = nn.Parameter(value, requires_grad=False) if isinstance(empty, nn.Parameter) else value
    for module in model.modules():  # a weight may stand in several layers
        for slots in (module._parameters, module._buffers):
            slots.update({name: weights[id(empty)] for name, empty in slots.items() if empty is not None})
    placement = getattr(policy, "hf_device_map", None)
    if placement and len(set(placement.values())) > 1:
        from accelerate import dispatch_model

        model = dispatch_model(model, placement)
    return model


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _load(trainer: Any, policy: Any, plugin: str) -> Any:
    """The model from where the policy was loaded, as TRL loads its own reference.

    Raises:
        ConfigError: Nothing says where that is, or it cannot be loaded.
    """
    from trl.trainer.utils import create_model_from_path

    args = trainer.args
    path = getattr(policy.config, "_name_or_path", "")
    wanted = f"plugin {plugin!r} needs a reference model, a frozen copy of the policy"
    if not path:
        raise ConfigError(
            f"{wanted}, and this policy is sharded and was made in memory: nothing says where to load it from. Save it "
            f"with save_pretrained and give the trainer the folder, or train a PEFT adapter."
        )
    settings = dict(args.model_init_kwargs or {})
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None
    settings.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    settings.setdefault("dtype", policy.dtype)
    settings.setdefault("attn_implementation", policy.config._attn_implementation)
    try:
        return create_model_from_path(path, **settings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{wanted}, which cannot be loaded again from {path!r}: {error}") from error


def _add_head(trainer: Any, model: Any) -> None:
    """TRL's settings of the last layer; the fused head exists from TRL 1.15 on."""
    in_float32 = getattr(trainer.args, "cast_lm_head_to_fp32", False)
    if in_float32:
        head = copy.deepcopy(model.get_output_embeddings()).float()  # a copy, because embeddings may share the weight
        head.register_forward_pre_hook(lambda module, inputs: tuple(value.float() for value in inputs))
        model.set_output_embeddings(head)
    if trl_version() >= Version("1.15"):
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model, temperature=trainer.temperature, cast_lm_head_to_fp32=in_float32)


def _prepare(trainer: Any, model: Any) -> Any:
    from trl.models.utils import prepare_deepspeed, prepare_fsdp

    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def _unload(trainer: Any, model: Any) -> None:
    """Takes the copy out of the accelerator's list of models."""
    models = trainer.accelerator._models
    models[:] = [prepared for prepared in models if prepared is not model]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode inside the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _coarsest_dtype(trainer: Any) -> torch.dtype:
    """The type in which the policy computes."""
    automatic = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    dtypes = {value.dtype for value in policy.parameters() if value.dtype in _TOLERANCES} | {automatic or torch.float64}
    return max(dtypes, key=lambda dtype: _TOLERANCES[dtype])
