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
from . import forwards
from .mixins import RoundMixin
from .seams import trl_version

ADAPTER = "ref"
"""TRL's name for the frozen copy of an adapter."""
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.02}
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
    adapted = hasattr(policy, "peft_config")
    if adapted:
        _check_adapters(policy, plugin)
        if ADAPTER in policy.peft_config and trainer.state.global_step == 0:
            return None, _complete_adapter(policy)
    if trainer.args.beta != 0.0 or (adapted and (ADAPTER in policy.peft_config or _adds_nothing(policy))):
        return None, lambda: None
    if adapted:
        _copy_adapter(policy, plugin)
        return None, functools.partial(policy.delete_adapter, ADAPTER)
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
    if hasattr(policy, "peft_config"):
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


# --- adapters ---


def _check_adapters(policy: Any, plugin: str) -> None:
    """Refuses adapters whose training moves the reference too."""
    wanted = f"plugin {plugin!r} needs a reference policy"
    if policy.active_adapter == ADAPTER:
        raise ConfigError(
            f"{wanted}, which TRL keeps in an adapter called {ADAPTER!r}, and the adapter that trains has that name. "
            f"Load it under another name."
        )
    marks = {*policy.peft_config, "prompt_encoder"}
    prefix = getattr(policy.base_model, "prefix", None)
    for name, value in policy.named_parameters():
        held = bool(marks & set(name.split("."))) or (prefix is not None and prefix in name)
        if value.requires_grad and not held:
            raise ConfigError(
                f"{wanted}, which is the model without what training adds, and {name} of the model itself is trained "
                f"as well. Freeze it: a LoRA adapter needs bias='none'."
            )


def _adds_nothing(policy: Any) -> bool:
    """Whether the adapters in use leave the model as it is, as a new LoRA adapter does: its factor B is 0."""
    active = set(policy.base_model.active_adapters) if _is_tuner(policy) else set()
    values = [(name, value) for name, value in policy.named_parameters() if active & set(name.split("."))]
    return bool(values) and all(
        "lora_A" in name
        or "lora_embedding_A" in name
        or (("lora_B" in name or "lora_embedding_B" in name) and value.numel() > 0 and not value.any())
        for name, value in values
    )


def _complete_adapter(policy: Any) -> Callable[[], None]:
    """Copies what TRL's copy of the adapter leaves out: values whose name ends with that of the adapter, as in IA3.

    Returns:
        The undo.
    """
    values = _tensors(policy)
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, value in values.items():
        head, _, last = name.rpartition(".")
        source = values.get(f"{head}.{policy.active_adapter}")
        if last == ADAPTER and source is not None and source.shape == value.shape:
            before.append((value, value.data))
            value.data = source.data.clone()

    def undo() -> None:
        for value, data in before:
            value.data = data

    return undo


def _is_tuner(policy: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTuner

    return isinstance(policy.base_model, BaseTuner)


def _copy_adapter(policy: Any, plugin: str) -> None:
    """Adds a frozen copy of the adapter in use, under TRL's name for it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = f"plugin {plugin!r} needs a reference policy, a frozen copy of the trained adapter"
    active = policy.active_adapter
    if _is_tuner(policy) and len(policy.base_model.active_adapters) > 1:
        raise ConfigError(
            f"{wanted}, and several adapters are active ({', '.join(policy.base_model.active_adapters)}). Merge the "
            f"others into the model first, or combine them with add_weighted_adapter."
        )
    trained = {name: value.requires_grad for name, value in policy.named_parameters()}
    buffers = {name for name, _ in policy.named_buffers()}
    config = copy.deepcopy(policy.peft_config[active])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other ways to begin, such as PiSSA, change the weights of the model
    try:
        policy.add_adapter(ADAPTER, config)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{wanted}, which PEFT cannot add: {error} Merge the adapter into the model with merge_and_unload, and "
            f"give the trainer that model with a new adapter in `peft_config`."
        ) from error
    values = _tensors(policy)
    for name, value in values.items():
        if name in trained:
            value.requires_grad_(trained[name])
        elif name not in buffers:
            source = values[".".join(active if part == ADAPTER else part for part in name.split("."))]
            value.data = source.data.clone()
            value.requires_grad_(False)
    for layer in policy.modules():
        scaling = getattr(layer, "scaling", None) if isinstance(layer, BaseTunerLayer) else None
        if isinstance(scaling, dict) and active in scaling:
            scaling[ADAPTER] = scaling[active]


# --- whole models ---


def _copy_model(trainer: Any, policy: Any, plugin: str) -> Any:
    """A frozen copy of the policy with TRL's last layer."""
    if any(hasattr(value, "ds_id") or hasattr(value, "device_mesh") for value in policy.parameters()):
        model = _load(trainer, policy, plugin)  # a process holds a part of each weight only
    else:
        model = _with_weights_of(policy, plugin, in_half_head=getattr(trainer.args, "cast_lm_head_to_fp32", False))
    model.eval().requires_grad_(False)
    _add_head(trainer, model)
    return model


def _with_weights_of(policy: Any, plugin: str, in_half_head: bool) -> Any:
    """Another model of the policy's class with the same weights on the same devices.

    Args:
        policy: The policy.
        plugin: Who needs it, for the error.
        in_half_head: Whether TRL has put the policy's last layer into float32, which the copy gets back.
    """
    ends = {id(layer.weight) for layer in (policy.get_input_embeddings(), policy.get_output_embeddings()) if layer}
    dtype = next((value.dtype for value in policy.parameters() if id(value) not in ends), policy.dtype)
    devices = {value.device for value in policy.parameters()}
    place = devices.pop() if len(devices) == 1 else torch.device("cpu")
    with place:  # random first weights come fast on the device that has them anyway
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
    for name, original in originals.items():
        value = original.detach().clone()
        copies[name].data = value.to(dtype) if in_half_head and id(original) in ends else value
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


# --- comparison ---


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
