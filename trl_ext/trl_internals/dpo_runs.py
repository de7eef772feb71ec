"""Models and DPO trainers of a run that trains several times, made as TRL's script makes them."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..errors import ConfigError
from .arguments import Parsed


def script_arguments(parsed: Parsed) -> dict[str, Any]:
    """Returns what TRL's DPO script gives its trainer, besides the data."""
    from trl import get_peft_config, get_quantization_config

    _, training, model, _ = parsed
    settings = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    training.model_init_kwargs = settings | dict(training.model_init_kwargs or {})
    return {
        "model": model.model_name_or_path,
        "args": training,
        "peft_config": get_peft_config(model),
        "quantization_config": get_quantization_config(model),
    }


def load(path: str, args: Any, **settings: Any) -> Any:
    """Loads a causal language model as the trainer would."""
    from trl.trainer.utils import create_model_from_path

    own = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    return create_model_from_path(path, **own | settings)


def trainer(model: str, args: Any, data: Any, output: Path, settings: dict[str, Any], **objects: Any) -> Any:
    """Builds a DPO trainer that starts at a model and has it as the reference.

    The reference of a full fine-tuning is loaded here, because TRL would load one by the name in the model's config.
    With an adapter the model without it is the reference; with precomputed values it is the model before training.
    """
    from trl import DPOTrainer

    own = copy.copy(args)
    own.output_dir, own.resume_from_checkpoint, own.push_to_hub = str(output), None, False
    for name, value in settings.items():
        if not hasattr(own, name):
            raise ConfigError(f"{type(own).__name__} has no setting {name!r}.")
        setattr(own, name, value)
    explicit = objects.get("peft_config") is None and not own.precompute_ref_log_probs
    reference = load(model, own) if explicit else None
    return DPOTrainer(model=model, ref_model=reference, args=own, train_dataset=data, **objects)


class _AtTheEndError(BaseException):
    """Leaves a training that has nothing more to do."""


class _NoStepMore(TrainerCallback):
    """Leaves a training that goes on from its own last step: transformers' loop would do one more before it looks."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _AtTheEndError


def train(made: Any, checkpoint: str | None) -> None:
    """Trains, from a checkpoint if there is one. From a checkpoint of the last step it takes only the weights."""
    if checkpoint is not None:
        made.add_callback(_NoStepMore())
    with contextlib.suppress(_AtTheEndError):
        made.train(resume_from_checkpoint=checkpoint)


def last_checkpoint(folder: Path, state_file: str) -> str | None:
    """Returns the last complete checkpoint, and removes one that a kill left half written."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(path)
            continue
        if (path / state_file).is_file():  # the last file that is written
            return str(path)
        shutil.rmtree(path)
    return None


def is_adapter(path: str | Path) -> bool:
    return os.path.isfile(os.path.join(path, "adapter_config.json"))


def open_model(path: str | Path, args: Any) -> Any:
    """Loads a model on the CPU in the precision of its files. An adapter is merged into its base in float32."""
    if not is_adapter(path):
        return load(str(path), args, dtype="auto")
    from peft import PeftConfig, PeftModel

    base = load(str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path), args, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(path)).merge_and_unload()
