"""The reference policy where TRL has none, because its KL factor is 0 and a plugin needs one all the same."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from packaging.version import Version

from ..errors import ConfigError
from .seams import trl_version


def known(trainer: Any) -> bool:
    """Tells whether there is a reference already: TRL computes it, or the policy is a PEFT model."""
    return trainer.args.beta != 0.0 or hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")


def without_adapters(trainer: Any) -> contextlib.AbstractContextManager[Any]:
    """Turns a PEFT policy into its reference inside the block."""
    from trl.trainer.utils import use_adapter

    model = trainer.accelerator.unwrap_model(trainer.model)
    return use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None)


def load(trainer: Any, plugin: str) -> Any:
    """Loads a frozen copy of the policy from where it was loaded, prepared as TRL prepares its own reference.

    Args:
        trainer: GRPO or RLOO with beta = 0 and a policy that is no PEFT model.
        plugin: Who needs it, for the error.

    Raises:
        ConfigError: The policy was made in memory or changed its vocabulary, or its path cannot be loaded.
    """
    from trl.trainer.utils import create_model_from_path

    args = trainer.args
    policy = trainer.accelerator.unwrap_model(trainer.model)
    path = getattr(policy.config, "_name_or_path", "")
    wanted = f"plugin {plugin!r} needs a reference model, a frozen copy of the policy"
    if not path:
        raise ConfigError(
            f"{wanted}, and this policy was made in memory: nothing says where to load it from. Save it with "
            f"save_pretrained and give the trainer the folder, or train a PEFT adapter."
        )
    settings = dict(args.model_init_kwargs or {})
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        settings["device_map"] = None
    settings.setdefault("trust_remote_code", getattr(args, "trust_remote_code", False))
    settings.setdefault("dtype", policy.dtype)
    settings.setdefault("attn_implementation", policy.config._attn_implementation)
    try:
        model = create_model_from_path(path, **settings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{wanted}, which cannot be loaded again from {path!r}: {error}") from error
    there, here = (each.config.get_text_config().vocab_size for each in (model, policy))
    if there != here:
        raise ConfigError(
            f"{wanted}, and the policy has {here} token embeddings where {path!r} has {there}. Save the policy as it "
            f"is now with save_pretrained and start from that folder."
        )
    model.eval().requires_grad_(False)
    _add_head(trainer, model)
    return _prepare(trainer, model)


def _add_head(trainer: Any, model: Any) -> None:
    """Applies TRL's settings of the last layer. The fused head exists from TRL 1.15 on."""
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


def unload(trainer: Any, model: Any) -> None:
    """Takes the copy out of the accelerator's list of models."""
    models = trainer.accelerator._models
    models[:] = [each for each in models if each is not model]
