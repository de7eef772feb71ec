"""The warmed-up model of a task: its name, traces that do not fit, and a cache that cannot be written."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext import ConfigError, lab
from trl_ext.lab import Shape, WarmUp, warmup
from trl_ext.lab import model as making
from trl_ext.lab.messages import assistant, user
from trl_ext.support import cache

Untrained = Callable[[str], lab.Task]
TINY = Shape(width=32, layers=1, heads=2, feed_forward=64, positions=32)


def echo(**settings: Any) -> lab.Task:
    """A task whose traces answer every digit with itself, and a very small warm-up."""
    return dataclasses.replace(
        lab.task("loud-quiet"),
        name="echo",
        traces=lambda size, seed: [
            {"prompt": user(f"code {number % 10}"), "completion": assistant(str(number % 10))} for number in range(size)
        ],
        shape=TINY,
        warm_up=WarmUp(**{"traces": 64, "steps": 40, "batch_size": 16, "learning_rate": 2e-2} | settings),
    )


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_same_settings_give_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another cache, with other random numbers, and as one of two processes of a run."""
    said: list[str] = []
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "one"))
    one = lab.model_folder(echo(), said.append)
    assert said[0] == f"echo: making the model once, into {one} (40 steps of warm-up)"
    assert "step 40/40  loss 0." in said[-1] and said[-1].endswith("left 0 s")
    assert lab.model_folder(echo(), pytest.fail) == one  # found, and nothing to say
    assert sorted(entry.name for entry in one.parent.iterdir()) == [one.name, f"{one.name}.lock"]

    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "two"))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)  # a warm-up that took part would wait for the other process
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    two = lab.model_folder(echo(), said.append)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert two != one and two.name == one.name and weights(two) == weights(one)

    tokenizer, model = AutoTokenizer.from_pretrained(two), AutoModelForCausalLM.from_pretrained(two)
    prompt = tokenizer.apply_chat_template(user("code 7"), add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "7<|end|>"  # learnt, and stops by itself
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.dtype == torch.float32


def test_whatever_the_weights_depend_on_is_in_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    base = echo(steps=0)
    names = [lab.model_folder(base, lambda line: None).name]
    changed = [
        dataclasses.replace(base, shape=dataclasses.replace(TINY, width=64)),
        dataclasses.replace(base, shape=dataclasses.replace(TINY, architecture="llama")),
        dataclasses.replace(base, words=("code ", "codes ")),
        dataclasses.replace(base, traces=lambda size, seed: base.traces(size, seed)[::-1]),
        echo(steps=0, seed=1),
        echo(steps=0, learning_rate=1e-2),
        dataclasses.replace(base, name="echoes"),
    ]
    names += [lab.model_folder(task, lambda line: None).name for task in changed]
    for module in ("torch", "trl"):
        real = making.importlib.metadata.version
        monkeypatch.setattr(
            making.importlib.metadata,
            "version",
            lambda name, other=module, real=real: real(name) + "+" * (name == other),
        )
        names.append(lab.model_folder(base, lambda line: None).name)
    assert len(set(names)) == len(names)
    same = [dataclasses.replace(base, summary="other"), dataclasses.replace(base, test_size=3)]
    assert {lab.model_folder(task, pytest.fail).name for task in same} == {names[-1]}


def test_every_shape_is_a_model_of_transformers(untrained: Untrained) -> None:
    for architecture in ("qwen3", "llama"):
        task = dataclasses.replace(
            untrained("modes"), shape=dataclasses.replace(TINY, architecture=architecture, layers=2)
        )
        model = AutoModelForCausalLM.from_pretrained(lab.model_folder(task, lambda line: None))
        assert model.config.model_type == architecture and model.config.num_hidden_layers == 2


def test_many_ask_and_one_makes(untrained: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    said: list[str] = []
    found: list[Path] = []
    task = untrained("letters")
    threads = [threading.Thread(target=lambda: found.append(lab.model_folder(task, said.append))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1 and len(said) == 1


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ({"prompt": user("code 1"), "completion": assistant("é")}, "trace 1 has characters that are not tokens"),
        (
            {"prompt": user("code 1"), "completion": assistant("1" * 8)},
            r"trace 1 has 9 tokens after the prompt, more t",
        ),
        ({"prompt": user("1" * 40), "completion": assistant("1")}, r"more than `shape.positions` \(32\)"),
        ({"prompt": user("code 1")}, r"trace 1 must have `prompt` and `completion`; it has \['prompt'\]"),
        ({"prompt": user("code 1"), "completion": user("1")}, "begins with a message of the assistant"),
        (
            {"prompt": user("code 1"), "completion": {1, 2}},
            "must be made of texts, numbers, lists, dictionaries and images",
        ),
    ],
)
def test_traces_that_do_not_fit_are_refused(trace: dict[str, Any], message: str) -> None:
    good = {"prompt": user("code 1"), "completion": assistant("1")}
    task = dataclasses.replace(echo(), traces=lambda size, seed: [good, trace])
    with pytest.raises(ConfigError, match=rf"task 'echo': .*{message}"):
        lab.model_folder(task, lambda line: None)


def test_a_warm_up_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError('this torch is broken')\n")
    monkeypatch.syspath_prepend(tmp_path)  # the process that trains finds what this one finds
    with pytest.raises(ConfigError, match=r"task 'echo': the warm-up failed\.\n[\s\S]*this torch is broken"):
        lab.model_folder(echo(steps=1), lambda line: None)


def test_a_cache_that_cannot_be_written(untrained: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot write into the cache folder .*file/lab: .*TRL_EXT_CACHE"):
        lab.model_folder(untrained("modes"), lambda line: None)


def test_a_disk_that_is_full_before(untrained: Untrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: cache.shutil._ntuple_diskusage(9, 8, 2**20))
    with pytest.raises(ConfigError, match=r"16 MiB are needed and 1 MiB are free\. .*TRL_EXT_CACHE"):
        lab.model_folder(untrained("modes"), lambda line: None)
    assert not [entry for entry in (tmp_path / "lab").iterdir() if entry.is_dir()]


def test_weights_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the process that trains does when files may not be longer than 1 KiB, and what becomes of it."""
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"model": str(tmp_path)}))
    monkeypatch.setattr(warmup, "train", lambda job, scratch: torch.nn.Linear(1000, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        code = warmup.main(str(job))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    written = capsys.readouterr().err
    assert code == warmup.NOT_WRITTEN and written == f"{errno.EFBIG}\n"

    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho warning >&2\necho {written.strip()} >&2\nexit {code}\n")
    python.chmod(0o755)
    monkeypatch.setattr(making.sys, "executable", str(python))
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"cannot write into the cache folder .*/lab: File too large\."):
        lab.model_folder(echo(steps=1), lambda line: None)
    assert [entry.suffix for entry in (tmp_path / "cache" / "lab").iterdir()] == [".lock"]
