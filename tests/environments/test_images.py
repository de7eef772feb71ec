"""Images that a tool returns, in the real GRPOTrainer: which families TRL's loop carries them for, and a whole run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOTrainer

import trl_ext.environments
from trl_ext import lab
from trl_ext.environments import episode_return, gym
from trl_ext.environments.adapter import PICTURES
from trl_ext.testing import metrics_of, tiny_args
from trl_ext.trl_internals import seams

pytestmark = pytest.mark.skipif(seams.trl_version() < PICTURES, reason="pictures need TRL 1.15")
README = (Path(trl_ext.environments.__file__).parent / "README.md").read_text()
CARRIED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
REFUSED = {"llava": "token_type_ids", "idefics3": "token_type_ids", "gemma3": "num_crops"}


@pytest.fixture(scope="module")
def families() -> Any:
    return importlib.import_module("families")


def calling(tokenizer: Any, text: str | None = None) -> dict[str, Any]:
    """Like `trl_ext.testing.calls`, for a tokenizer; `text` is a call as its template writes it."""
    call = json.dumps({"name": "act", "arguments": {"action": "0"}})
    text = f"<tool_call>{call}</tool_call>" if text is None else text
    written, stop = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
    certain = [[[*written, stop][:length], 100.0] for length in range(2, len(written) + 2)]
    return {"sequence_bias": [[[written[0]], 6.0], [[stop], 3.0], *certain]}


@pytest.fixture
def trainer(families: Any, games: Any, tmp_path: Path) -> Any:
    """`trainer(family)` is TRL's trainer with an environment of pictures."""

    def make(family: str, **settings: Any) -> Any:
        folder, processor = families.save(family, tmp_path / "model")
        kind = gym(games.Painted, render="image", image_size=families.SIDE)
        args = tiny_args(
            "grpo",
            tmp_path / "run",
            **{
                "max_completion_length": 300,
                "per_device_train_batch_size": 4,
                "max_tool_calling_iterations": 3,
                "generation_kwargs": calling(processor.tokenizer),
                **settings,
            },
        )
        rows = [{**row, "seed": 3} for row in kind.rows(8, prompt="go ")]
        return GRPOTrainer(
            model=folder,
            processing_class=processor,
            args=args,
            reward_funcs=[episode_return],
            train_dataset=Dataset.from_list(rows),
            environment_factory=kind,
        )

    return make


@pytest.mark.parametrize(
    "family", [CARRIED[0], *(pytest.param(family, marks=pytest.mark.slow) for family in CARRIED[1:])]
)
def test_families_that_trl_carries_images_for(trainer: Any, families: Any, family: str) -> None:
    """Two steps; the forward of the loss gets the pictures of the prompt and of all tool results, and they matter."""
    made = trainer(family)
    before = {name: weight.detach().clone() for name, weight in made.model.named_parameters()}
    seen: list[dict[str, Any]] = []

    def spy(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        if "fused_lm_head" in inputs:  # a forward of the loss; else one of the generation
            seen.append(inputs)

    made.model.register_forward_pre_hook(spy, with_kwargs=True)
    made.train()
    logged = metrics_of(made)
    assert logged[0]["tools/call_frequency"] > 0 and logged[0]["tools/failure_frequency"] == 0
    image = made.processing_class.image_token_id
    patches = (families.SIDE // families.PATCH) ** 2
    assert seen
    for inputs in seen:
        pictures = len(inputs["image_grid_thw"])
        assert (inputs["input_ids"] == image).sum() == pictures * patches
        assert torch.equal(inputs["mm_token_type_ids"], (inputs["input_ids"] == image).long())
    assert max(len(inputs["image_grid_thw"]) for inputs in seen) > 4, "more than the pictures of the four prompts"
    moved = {name for name, weight in made.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("visual" in name for name in moved), "the vision tower learns"


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_transformers_refuses(trainer: Any, family: str) -> None:
    """The day this fails, the table in the guide is out of date, for the better."""
    with pytest.raises(ValueError, match=rf"`model_kwargs` are not used by the model: \['{REFUSED[family]}'\]"):
        trainer(family).train()


def test_the_table_in_the_guide_is_what_was_tried(families: Any) -> None:
    rows = re.findall(r"^\| ([^|]+?) \| (yes|no) \|", README, re.MULTILINE)
    told = {name.replace(" ", "").lower(): result for names, result in rows for name in names.split(",")}
    for family in families.FAMILIES:
        assert told[family] == ("yes" if family in CARRIED else "no"), family
    for family, argument in REFUSED.items():
        (row,) = [
            line
            for line in README.splitlines()
            if line.startswith("| ") and family in line.lower() and "| no |" in line
        ]
        assert argument in row


def test_the_lab_model_trains_on_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the task to a trained model; the untrained model is made to turn right now and then."""
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    task = lab.task("minigrid-view")
    task = dataclasses.replace(task, warm_up=dataclasses.replace(task.warm_up, traces=8, steps=0))
    arguments = lab.trainer_arguments(task, "grpo", train_size=8, test_size=0)
    call = '<tool_call>\n{"name": "act", "arguments": {"action": "right"}}\n</tool_call>'
    args = tiny_args(
        "grpo",
        tmp_path / "run",
        max_completion_length=task.max_completion_length,
        generation_kwargs=calling(arguments["processing_class"].tokenizer, call),
    )
    made = GRPOTrainer(args=args, **arguments)
    made.train()
    logged = metrics_of(made)
    assert logged[-1]["step"] == 2 and logged[0]["behaviour/steps"] > 0 and logged[0]["tools/call_frequency"] > 0
    assert all(weight.isfinite().all() for weight in made.model.parameters())
