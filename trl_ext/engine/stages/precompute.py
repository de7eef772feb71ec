"""Values per completion token, computed once for a whole dataset of pairs and kept in its cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import torch

from trl_ext_hooks import Pairs

from ...errors import ConfigError
from ..context import Context
from . import pairs as stage


def add_columns(context: Context, name: str, score: Callable[[Pairs], torch.Tensor], key: str) -> None:
    """Adds `chosen_NAME` and `rejected_NAME` to the trainer's data. See `TrainerView.precompute_pairs`."""
    trainer = context.trainer
    training, evaluation = trainer.train_dataset, trainer.eval_dataset

    def undo() -> None:
        trainer.train_dataset, trainer.eval_dataset = training, evaluation

    sets = {"train": training}
    sets |= evaluation if isinstance(evaluation, dict) else {"eval": evaluation} if evaluation is not None else {}
    made = {label: _with_columns(context, data, label, name, score, key) for label, data in sets.items()}
    trainer.train_dataset = made.pop("train")
    if isinstance(evaluation, dict):
        trainer.eval_dataset = made
    elif evaluation is not None:
        trainer.eval_dataset = made["eval"]
    context.undo.append(undo)
    context.columns += [f"{side}_{name}" for side in ("chosen", "rejected")]


def _with_columns(
    context: Context, data: Any, label: str, name: str, score: Callable[[Pairs], torch.Tensor], key: str
) -> Any:
    from accelerate.utils import broadcast_object_list
    from datasets import Dataset, IterableDataset, concatenate_datasets

    if isinstance(data, IterableDataset) or "chosen_ids" not in data.column_names:
        raise ConfigError(
            f"{name} cannot be computed ahead for the {label} data: they are read as they come, or are not text. Leave "
            f"this to training."
        )
    args, accelerator = context.trainer.args, context.trainer.accelerator
    fingerprint = _digest(data, name, key, args.max_length, args.truncation_mode)
    place = [(fingerprint, data._get_cache_file_path(fingerprint))]
    broadcast_object_list(place, from_process=0)  # data in memory have a folder per process
    fingerprint, file = place[0]
    if all(context.view.gather_objects([os.path.exists(file)])):
        return concatenate_datasets([data, Dataset.from_file(file)], axis=1)
    found = _score(context, data, f"Computing {name} for the {label} data", score)
    columns = {f"{side}_{name}": [row[i] for row in found] for i, side in enumerate(("chosen", "rejected"))}
    if accelerator.is_main_process:
        data.map(
            lambda batch, indices: {column: [values[i] for i in indices] for column, values in columns.items()},
            with_indices=True,
            batched=True,
            remove_columns=data.column_names,
            new_fingerprint=fingerprint,
            cache_file_name=file,
            desc=f"Caching {name} for the {label} data",
        )
    accelerator.wait_for_everyone()
    made = Dataset.from_file(file) if os.path.exists(file) else Dataset.from_dict(columns)  # another machine's cache
    return concatenate_datasets([data, made], axis=1)


def _digest(data: Any, *settings: Any) -> str:
    """Returns a name for values of these token ids.

    The data's own fingerprint will not do, because it changes with every setting of the trainer.
    """
    found = hashlib.sha256(repr(settings).encode())
    for batch in data.select_columns(list(stage.IDS)).with_format("arrow").iter(1000):
        for column in batch.columns:
            for chunk in column.chunks:
                found.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                found.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return found.hexdigest()[:32]


def _score(
    context: Context, data: Any, title: str, score: Callable[[Pairs], torch.Tensor]
) -> list[tuple[list[float], list[float]]]:
    """Returns the values of every row's chosen and rejected tokens, in the order of the data, on all processes."""
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    args, accelerator = context.trainer.args, context.trainer.accelerator
    loader = DataLoader(data, args.per_device_eval_batch_size, collate_fn=context.trainer.data_collator)
    disabled = bool(os.environ.get("TQDM_DISABLE")) or not accelerator.is_main_process
    found: list[tuple[list[float], list[float]]] = []
    for inputs in tqdm(accelerator.prepare(loader), desc=title, disable=disabled):
        pairs = stage.batch_of(context, inputs)
        values = score(pairs)
        if values.shape != pairs.mask.shape:
            raise ConfigError(f"{title}: got values of shape {tuple(values.shape)}, expected {tuple(pairs.mask.shape)}")
        full = torch.cat([values.new_full((len(values), 1), torch.nan), values], dim=1).cpu()  # token 0 has no value
        mask, half = pairs.batch["completion_mask"].bool().cpu(), len(pairs.rows)
        rows = [
            (
                _completion(full[i][mask[i]], len(row["chosen_ids"]), args.truncation_mode),
                _completion(full[i + half][mask[i + half]], len(row["rejected_ids"]), args.truncation_mode),
            )
            for i, row in enumerate(pairs.rows)
        ]
        found += context.view.gather_objects(rows)
    return found[: len(data)]  # the last batch is filled up, so that every process has one


def _completion(kept: torch.Tensor, length: int, truncation: str) -> list[float]:
    """Returns one value per completion token, NaN where truncation cut the token off."""
    missing = [float("nan")] * (length - len(kept))
    return [*missing, *kept.tolist()] if truncation == "keep_end" else [*kept.tolist(), *missing]
