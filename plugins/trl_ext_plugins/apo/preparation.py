"""Preparation of an APO run: what must hold before it, the rows of each round, and its record in the folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from trl_ext_hooks import Job, UsageError

RECORD = "apo.json"


def check_run(job: Job) -> None:
    """Checks data, model and adapter before anything is loaded.

    Raises:
        UsageError: One of them cannot be used.
    """
    if not hasattr(job.data, "select") or "prompt" not in (job.data.column_names or ()):
        raise UsageError("apo needs data with a column 'prompt' that can be read in any order, not a stream")
    if job.quantized:
        raise UsageError("a quantized model cannot be extrapolated; train in 16 or 32 bits")
    adapter = job.peft_config
    if adapter is not None and (getattr(adapter.peft_type, "value", adapter.peft_type) != "LORA" or adapter.use_dora):
        raise UsageError(
            "apo knows how to extrapolate LoRA adapters; DoRA and learned prompts have no weight change to add up"
        )


def divide(rows: int, rounds: int, per_round: int | None, held_out: int) -> tuple[list[list[int]], list[int]]:
    """Divides the data into the row numbers of each round and the held-out ones at the end.

    Rounds that need more prompts than there are begin again with the first.

    Raises:
        UsageError: There are too few prompts.
    """
    count = rows - held_out
    size = per_round or count // rounds
    if count < 1 or size < 1:
        raise UsageError(f"too few prompts for {rounds} rounds: {max(count, 0)}")
    return [[n % count for n in range(r * size, (r + 1) * size)] for r in range(rounds)], list(range(count, rows))


def begin(job: Job, options: Mapping[str, Any]) -> None:
    """Marks the output folder as that of this run, or goes on with it.

    Raises:
        UsageError: The folder holds a run and the user does not go on with it, or goes on with other settings, or wants
            to go on where there is nothing.
    """
    job.wait()
    file = job.folder / RECORD
    settings = {"options": json.loads(json.dumps(options)), "model": job.model, "seed": job.args.seed}
    settings["prompts"] = hashlib.sha256(json.dumps(list(job.data["prompt"])).encode()).hexdigest()
    recorded = json.loads(file.read_text()) if file.exists() else None
    job.wait()  # until every process has looked
    if recorded is None:
        if job.resume:
            raise UsageError(f"there is no run of apo to go on with in {job.folder}; leave resume_from_checkpoint out")
        if job.is_main:
            job.write(file, json.dumps(settings, indent=1))
    elif not job.resume:
        raise UsageError(
            f"{job.folder} holds rounds of a run of apo. Go on with it by --resume_from_checkpoint true, or choose "
            f"another output_dir"
        )
    elif recorded != settings:
        old, new = recorded | recorded["options"], settings | settings["options"]
        name = next(key for key in new if key != "options" and old.get(key) != new[key])
        raise UsageError(
            f"{job.folder} holds a run with {name}={old.get(name)!r}, and now it is {new[name]!r}. Finished rounds "
            f"cannot be mixed with others: set it back, or choose another output_dir"
        )
    job.wait()
