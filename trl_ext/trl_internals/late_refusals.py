"""What TRL, transformers and accelerate refuse only once a model is loaded, or later, asked of them before.

The libraries themselves are asked: their tables of trackers and optimizers, their checks of installed packages, and the
values that the code of a trainer tells apart. Nothing here knows a list of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
import trl
from accelerate.utils import is_bf16_available, is_deepspeed_available
from huggingface_hub import get_token
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.training_args import ParallelMode
from transformers.utils.import_utils import is_bitsandbytes_available, is_liger_kernel_available
from trl.import_utils import is_vllm_available

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError, near
from .accepted_values import accepted
from .arguments import Parsed
from .rewards import of_trl
from .seams import trainer_class


def check(kind: TrainerKind, parsed: Parsed, elsewhere: bool = False) -> None:
    """Refuses values that the libraries would refuse later.

    Args:
        kind: The trainer.
        parsed: The arguments of TRL.
        elsewhere: Whether another machine will train, so that nothing that depends on the device is asked here.

    Raises:
        ConfigError: Lists all refusals, each with a way out.
    """
    checks = [find for find in _CHECKS if not (elsewhere and find in (_precision, _sharding, _loading))]
    refusals = [refusal for find in checks for refusal in find(kind, parsed)]
    if refusals:
        raise ConfigError("this run cannot work:\n" + "\n".join(f"  - {refusal}" for refusal in refusals))


def check_files(given: Mapping[str, Any], launcher: Any) -> None:
    """Refuses files of TRL and accelerate that do not exist, and DeepSpeed where it is not installed.

    Args:
        given: The settings of TRL that the user set.
        launcher: The arguments of accelerate's launcher.

    Raises:
        ConfigError: A file or DeepSpeed is missing.
    """
    # these settings of TRL also take JSON itself
    named = {name: value for name, value in given.items() if str(value).endswith((".json", ".yaml", ".yml"))}
    named = {name: value for name, value in named.items() if name in ("deepspeed", "fsdp_config", "accelerator_config")}
    named |= {name: value for name, value in vars(launcher).items() if name.endswith(("_file", "hostfile")) and value}
    for name, value in named.items():
        if not os.path.isfile(value):
            raise ConfigError(f"--{name} {value}: there is no such file (looked in {os.getcwd()}).")
    if (given.get("deepspeed") or launcher.use_deepspeed) and not is_deepspeed_available():
        raise ConfigError(
            "DeepSpeed is asked for and not installed: pip install deepspeed. FSDP needs no package: "
            "--accelerate_config fsdp2"
        )


def _trackers(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    for name in parsed[1].report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = [*INTEGRATION_TO_CALLBACK, "all", "none"]
            yield f"report_to={name!r}: transformers knows no such tracker.{near(name, known)}"
        elif name not in get_available_reporting_integrations():
            # a callback first says what is missing; some then end what never began, which would print a traceback
            callback = type(name, (INTEGRATION_TO_CALLBACK[name],), {"__del__": lambda self: None})
            try:
                callback()
            except (ImportError, RuntimeError) as error:
                yield f"report_to={name!r}: {_text(error)}. `--report_to none` trains without a tracker"


def _vllm(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    if getattr(parsed[1], "use_vllm", False) and not is_vllm_available():
        yield (
            "use_vllm=True: vLLM is not installed. Install it with pip install 'trl[vllm]', or leave use_vllm out, and "
            "transformers generates the completions"
        )


def _unknown_values(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    args = parsed[1]
    for name, known in accepted(kind).items():
        given = getattr(args, name, None)
        if name.startswith("vllm_") and not args.use_vllm:
            continue
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str) and value not in known:
                where = f"TRL {trl.__version__} has no such value for {kind.upper()}"
                yield f"{name}={value!r}: {where}.{near(value, known)}"


def _optimizer(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    args = parsed[1]
    name = getattr(args.optim, "value", args.optim)
    try:
        trainer_class(kind).get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError, TypeError) as error:
        # GaLore, APOLLO and LOMO are found by now and go on with the model, which is not loaded yet
        if not str(error).startswith("You need to pass a"):
            yield f"optim={name!r}: {_text(error)}. `--optim adamw_torch` needs no package"


def _schedule(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    args = parsed[1]
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    except (ValueError, TypeError) as error:
        yield f"learning_rate={args.learning_rate!r}: {_text(error)}"
        return
    try:
        steps = args.max_steps if args.max_steps > 0 else 100
        transformers.get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError) as error:
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        yield f"lr_scheduler_type={schedule!r} with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}: {_text(error)}"


def _precision(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    args = parsed[1]
    device = args.device.type
    if args.fp16 and device == "cpu":
        yield "fp16=True: accelerate trains in fp16 on accelerators only, and this run uses the CPU. Leave fp16 out"
    if args.bf16 and device not in ("cpu", "xpu", "hpu") and not is_bf16_available(ignore_tpu=True):
        yield "bf16=True: this device cannot compute in bf16. Set --fp16 true, or --bf16 false"


def _sharding(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    args = parsed[1]
    if args.fsdp and not args.fsdp_config.get("xla") and args.parallel_mode != ParallelMode.DISTRIBUTED:
        yield "fsdp needs several processes, and this run has one. Set --num_processes, or leave fsdp out"


def _loading(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    args, model = parsed[1], parsed[2]
    loading = dict(getattr(args, "model_init_kwargs", None) or {})
    dtype = loading.get("dtype", model.dtype)
    known = next(field.metadata.get("choices") for field in dataclasses.fields(model) if field.name == "dtype")
    if isinstance(dtype, str) and known and dtype not in known:
        yield f"dtype={dtype!r}: TRL loads no model in this type.{near(dtype, known)}"
    if args.use_liger_kernel and not is_liger_kernel_available():
        yield "use_liger_kernel=True: Liger is not installed: pip install liger-kernel, or leave use_liger_kernel out"
    attention = loading.get("attn_implementation", model.attn_implementation)
    if isinstance(attention, str):
        yield from _attention(attention, model.model_name_or_path, model.model_revision, args.trust_remote_code)


def _attention(name: str, path: str | None, revision: str, trust: bool) -> Iterator[str]:
    """Builds the model without its weights, where transformers checks the implementation of its attention."""
    known = ["eager", *transformers.AttentionInterface().valid_keys()]
    if name not in known and "/" not in name and "|" not in name:  # the others name a kernel of the hub
        yield f"attn_implementation={name!r}: transformers has no such implementation.{near(name, known)}"
        return
    if path is None or name == "eager":
        return
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust, attn_implementation=name
        )
    except OSError:  # there is no such model, which loading it says as well
        return
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        return  # code of the hub
    try:
        with torch.device("meta"):
            architecture(config)
    except (ImportError, ValueError) as error:
        package = "pip install 'trl_ext[flash-attn]', or " if name == "flash_attention_2" else ""
        yield f"attn_implementation={name!r}: {_text(error)}. {package}`--attn_implementation sdpa` needs no package"


def _adapters(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    args, model = parsed[1], parsed[2]
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if getattr(model, name)]
    for name in bits:
        if not is_bitsandbytes_available():
            yield f"{name}=True: bitsandbytes is not installed: pip install bitsandbytes, or leave {name} out"
        if not model.use_peft:
            yield f"{name}=True: a quantized model can only train adapters. Add --use_peft, or leave {name} out"
    try:
        adapter = trl.get_peft_config(model)
        if adapter is not None:
            _try_adapter(adapter)
    except (ImportError, ValueError, TypeError) as error:
        yield f"use_peft=True: {_text(error)}"
        return
    if not getattr(args, "sync_ref_model", False):
        return
    if adapter is not None:
        yield (
            "sync_ref_model=True: with adapters there is no reference model to update. Leave out sync_ref_model or "
            "use_peft"
        )
    if kind != "dpo" and args.beta == 0:
        yield "sync_ref_model=True: with beta=0.0 there is no reference model to update. Leave it out, or set --beta"


def _try_adapter(adapter: Any) -> None:
    """Puts an adapter into a model of one layer, where PEFT checks its numbers."""
    from peft import inject_adapter_in_model

    adapter = copy.copy(adapter)
    adapter.target_modules, adapter.target_parameters, adapter.modules_to_save = {"0"}, None, None
    inject_adapter_in_model(adapter, torch.nn.Sequential(torch.nn.Linear(2, 2)))


def _hub(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    args = parsed[1]
    if args.push_to_hub and not (args.hub_token or get_token()):
        yield "push_to_hub=True: nobody is logged in. Run `hf auth login`, set HF_TOKEN, or leave push_to_hub out"


def _rewards(kind: TrainerKind, parsed: Parsed) -> Iterator[str]:
    names = getattr(parsed[0], "reward_funcs", None) or ()
    for name, function in of_trl(names).items():
        entries = inspect.signature(function).parameters.values()
        required = [entry.name for entry in entries if entry.default is entry.empty and entry.kind != entry.VAR_KEYWORD]
        try:
            function(**{name: [] for name in required})  # the package that it needs comes before the rows
        except ImportError as error:
            yield f"reward_funcs: {name}: {_text(error)}: pip install 'trl_ext[math]'"


def _text(error: Exception) -> str:
    """Returns what a library says, without a full stop at its end or in a command."""
    return str(error).replace(".`", "`").rstrip(". ")


_CHECKS: tuple[Callable[[TrainerKind, Parsed], Iterator[str]], ...] = (
    _trackers,
    _vllm,
    _unknown_values,
    _optimizer,
    _schedule,
    _precision,
    _sharding,
    _loading,
    _adapters,
    _hub,
    _rewards,
)
