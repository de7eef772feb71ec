"""Warm-up: supervised training of a small model in a process of its own, `python -m trl_ext.lab.warmup JOB`.

The job is a JSON file with the folder of the model, the settings and the tokenized traces. The trained weights replace
those in the folder. Progress is printed on standard output, line by line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..support.cache import system_error
from . import pictures
from .definition import Shape

NOT_WRITTEN = 74
"""Exit code if the weights could not be written. The last line of standard error is then the system's error number."""


def train(job: dict[str, Any], scratch: str) -> Any:
    """Trains with TRL's SFTTrainer and returns the model."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        PrinterCallback,
        ProgressCallback,
        Trainer,
    )
    from trl import SFTTrainer

    torch.set_num_threads(1)  # sums in another order would give other weights
    config = _config(job["settings"], scratch)
    if "pictures" in job["rows"][0]:  # SFTTrainer takes pictures only with messages, not with tokens and labels
        config.remove_unused_columns = False
        trainer = Trainer(
            model=AutoModelForImageTextToText.from_pretrained(job["model"], dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(job["rows"]),
            data_collator=pictures.collator(pictures.processor_of(job["model"], Shape(**job["shape"]))),
        )
    else:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list(job["rows"]),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_progress_lines())
    trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)


def _config(settings: dict[str, Any], scratch: str) -> Any:
    """Returns the training arguments."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=scratch,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(1, settings["steps"] // 20),
        weight_decay=0.0,
        seed=settings["seed"],
        data_seed=settings["seed"],
        max_length=None,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        full_determinism=False,
        logging_steps=max(1, settings["steps"] // 8),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def write_weights(model: Any, folder: Path) -> None:
    """Writes the weights as transformers names them, without the head, which is tied to the embedding."""
    from safetensors.torch import save_file

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _progress_lines() -> Any:
    """Makes the callback that prints a line per log entry."""
    from transformers import TrainerCallback

    class ProgressLines(TrainerCallback):
        began = time.time()

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.time()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                seconds_left = (time.time() - self.began) / state.global_step * (state.max_steps - state.global_step)
                width = len(str(state.max_steps))
                print(
                    f"step {state.global_step:>{width}}/{state.max_steps}  loss {float(logs['loss']):.3f}  "
                    f"left {seconds_left:.0f} s",
                    flush=True,
                )

    return ProgressLines()


def main(job_file: str) -> int:
    """Runs a job and returns the exit code."""
    job = json.loads(Path(job_file).read_text())
    with tempfile.TemporaryDirectory(prefix="trl_ext-warm-up-") as scratch:
        model = train(job, scratch)
    try:
        write_weights(model, Path(job["model"]))
    except Exception as error:
        number = system_error(error)
        if number is None:
            raise
        print(number, file=sys.stderr)
        return NOT_WRITTEN
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
