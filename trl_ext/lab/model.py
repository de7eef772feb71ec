"""Warmed-up model of a task: made once and kept in the cache, under a hash of everything that it depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..support import cache
from . import pictures, warmup
from . import tokenizer as tokenizers
from .definition import Row, Shape, Task
from .tokenizer import UNKNOWN, Vocabulary, tools_of

_LAUNCHER = ("ACCELERATE_", "FSDP_", "LOCAL_", "MASTER_", "NODE_", "OMPI_", "PMI_", "TORCHELASTIC_")
"""Prefixes of environment variables that would make the warm-up a part of the run that asks for it."""


def model_folder(task: Task, say: Callable[[str], None] = print) -> Path:
    """Returns a folder with the warmed-up model of a task and its tokenizer, for transformers to load.

    The first call trains the model, on one core in about a minute. It does so in a process of its own, which touches
    neither random numbers nor devices nor the process group of the caller. Later calls find the model in the cache.
    Equal vocabulary, shape, traces, settings and versions lead to the same folder, and on one machine to the same
    weights.

    Args:
        task: The task.
        say: Called with lines for the user.

    Raises:
        ConfigError: The traces do not fit the task, or the cache cannot be written.
    """
    vocabulary = Vocabulary.of(task)
    traces = _json(task.traces(task.warm_up.traces, task.warm_up.seed), task)
    target = cache.cache_folder() / "lab" / f"{task.name}-{_digest(task, vocabulary, traces)}"

    def make(work: Path) -> None:
        steps = task.warm_up.steps
        say(f"{task.name}: making the model once, into {target}" + (f" ({steps} steps of warm-up)" if steps else ""))
        tokenizer = vocabulary.build()
        tokenizer.save_pretrained(work)
        model = _untrained(task, tokenizer)
        model.config.save_pretrained(work)
        warmup.write_weights(model, work)
        if steps:
            _train(task, work, _tokenized(task, tokenizer, json.loads(traces)), say)

    return cache.kept(target, make, needed=16 * 2**20)


def configuration(shape: Shape, tokenizer: Any) -> Any:
    """Returns the configuration of transformers for a shape and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if shape.picture:
        return pictures.configuration(shape, tokenizer)
    families = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config, model = families[shape.architecture]
    return config(
        architectures=[model.__name__],
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _untrained(task: Task, tokenizer: Any) -> Any:
    """Makes the model with random weights, without touching the random numbers of the caller."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto_class = AutoModelForImageTextToText if task.shape.picture else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.warm_up.seed)
        return auto_class.from_config(configuration(task.shape, tokenizer), dtype=torch.float32)


def _digest(task: Task, vocabulary: Vocabulary, traces: str) -> str:
    """Hashes everything that determines the weights."""
    made_from = {
        "vocabulary": dataclasses.asdict(vocabulary),
        "shape": dataclasses.asdict(task.shape),
        "warm_up": dataclasses.asdict(task.warm_up),
        "traces": traces,
        "code": [
            Path(str(module.__file__)).read_text() for module in (sys.modules[__name__], tokenizers, warmup, pictures)
        ],
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "trl")},
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def _json(traces: list[Row], task: Task) -> str:
    """Writes traces as JSON, pictures included."""
    try:
        return json.dumps(traces, default=pictures.as_json)
    except TypeError as error:
        raise task.broken(f"traces must be made of texts, numbers, lists, dictionaries and images: {error}") from error


def _tokenized(task: Task, tokenizer: Any, traces: list[Row]) -> list[Row]:
    """Tokenizes the traces, with the label -100 on all that is not learnt: prompts, prefixes and results of tools."""
    rows = []
    tools = tools_of(task) or None
    unknown = tokenizer.convert_tokens_to_ids(UNKNOWN)
    for number, trace in enumerate(traces):
        if not {"prompt", "completion"} <= set(trace):
            raise task.broken(f"trace {number} must have `prompt` and `completion`; it has {sorted(trace)}.")
        prompt = tokenizer.apply_chat_template(
            trace["prompt"], tools=tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        whole = tokenizer.apply_chat_template(
            trace["prompt"] + trace["completion"], tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learnt = whole["input_ids"], whole["assistant_masks"]
        if task.shape.picture:
            prompt, _ = pictures.expanded(prompt, prompt, task.shape, tokenizer)
            ids, learnt = pictures.expanded(ids, learnt, task.shape, tokenizer)
        if unknown in ids:
            raise task.broken(
                f"trace {number} has characters that are not tokens; add them to `words`: "
                f"{trace['prompt'] + trace['completion']}"
            )
        if ids[: len(prompt)] != prompt:
            raise task.broken(f"trace {number} must have a completion that begins with a message of the assistant.")
        if len(ids) - len(prompt) > task.max_completion_length:
            raise task.broken(
                f"trace {number} has {len(ids) - len(prompt)} tokens after the prompt, more than "
                f"`max_completion_length` ({task.max_completion_length})."
            )
        if len(ids) > task.shape.positions:
            raise task.broken(
                f"trace {number} has {len(ids)} tokens, more than `shape.positions` ({task.shape.positions})."
            )
        labels = [
            token if index >= len(prompt) and learn else -100
            for index, (token, learn) in enumerate(zip(ids, learnt, strict=True))
        ]
        rows.append({"input_ids": ids, "labels": labels})
        if task.shape.picture:
            rows[-1]["pictures"] = pictures.in_order(trace["prompt"] + trace["completion"])
    return rows


def _train(task: Task, folder: Path, rows: list[Row], say: Callable[[str], None]) -> None:
    """Runs `trl_ext.lab.warmup` on the folder, with one thread, on the CPU, outside any process group."""
    with tempfile.TemporaryDirectory(prefix="trl_ext-warm-up-") as scratch:
        job = Path(scratch) / "job.json"
        content = {"settings": dataclasses.asdict(task.warm_up), "shape": dataclasses.asdict(task.shape)}
        job.write_text(json.dumps(content | {"rows": rows, "model": str(folder)}))
        with (Path(scratch) / "errors.txt").open("w+") as errors:
            child = subprocess.Popen(
                [sys.executable, "-m", warmup.__name__, str(job)],
                env=_environment(os.environ),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    say(f"{task.name}: {line.rstrip()}")
                code = child.wait()
            finally:
                child.kill()
            errors.seek(0)
            error_text = errors.read().strip()
    if code == warmup.NOT_WRITTEN:
        raise OSError(int(error_text.splitlines()[-1]), "the weights cannot be written")
    if code:
        raise ConfigError(f"task {task.name!r}: the warm-up failed.\n{error_text[-2000:]}")


def _environment(given: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables of the warm-up: those of the caller without its process group."""
    variables = {
        name: value
        for name, value in given.items()
        if not name.startswith(_LAUNCHER) and name not in ("RANK", "WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
    }
    variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return variables | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
