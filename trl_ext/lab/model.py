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

from ..errors import ConfigError, counted
from ..support import cache
from . import pictures, trace_tokens, warmup
from . import tokenizer as tokenizers
from .definition import Row, Shape, Task
from .tokenizer import Vocabulary
from .trace_tokens import tokenized, written

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
    traces = written(task, task.traces(task.warm_up.traces, task.warm_up.seed))
    target = cache.cache_folder() / "lab" / f"{task.name}-{_digest(task, vocabulary, traces)}"

    def make(work: Path) -> None:
        steps = task.warm_up.steps
        length = f" ({counted(steps, 'step')} of warm-up)" if steps else ""
        say(f"{task.name}: making the model once, into {target}{length}")
        tokenizer = vocabulary.build()
        tokenizer.save_pretrained(work)
        model = _untrained(task, tokenizer)
        model.config.save_pretrained(work)
        warmup.write_weights(model, work)
        if steps:
            _train(task, work, tokenized(task, tokenizer, json.loads(traces)), say)

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
    modules = (sys.modules[__name__], tokenizers, trace_tokens, warmup, pictures)
    made_from = {
        "vocabulary": dataclasses.asdict(vocabulary),
        "shape": dataclasses.asdict(task.shape),
        "warm_up": dataclasses.asdict(task.warm_up),
        "traces": traces,
        "code": [Path(str(module.__file__)).read_text() for module in modules],
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers", "trl")},
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


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
