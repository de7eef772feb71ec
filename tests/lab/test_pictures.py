"""Tasks with pictures: the processor, tokens of traces, and the warm-up."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes
from trl_ext import ConfigError, lab
from trl_ext.lab import pictures
from trl_ext.lab.tokenizer import Vocabulary, tools_of
from trl_ext.lab.trace_tokens import tokenized

TASK = lab.task("minigrid-view")


@pytest.fixture(scope="module")
def folder() -> Path:
    """The model after two steps of warm-up, so that it takes no time."""
    return lab.model_folder(dataclasses.replace(TASK, warm_up=dataclasses.replace(TASK.warm_up, traces=64, steps=2)))


@pytest.mark.slow
def test_tokens_of_traces_are_those_of_the_processor(folder: Path) -> None:
    processor = pictures.processor_of(str(folder), TASK.shape)
    traces = TASK.traces(3, 0)
    rows = tokenized(TASK, Vocabulary.of(TASK).build(), json.loads(json.dumps(traces, default=pictures.as_json)))
    for trace, row in zip(traces, rows, strict=True):
        blocks = [
            {**message, "content": message["content"] or []}
            if not isinstance(message["content"], str)
            else {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in trace["prompt"] + trace["completion"]
        ]
        whole = processor.apply_chat_template(blocks, tools=tools_of(TASK), tokenize=True, return_dict=True)
        assert whole["input_ids"][0] == row["input_ids"]
        image = processor.tokenizer.convert_tokens_to_ids(pictures.PICTURE)
        count = len(row["pictures"])
        assert row["input_ids"].count(image) == pictures.patches(TASK.shape) * count and count >= 2
        learnt = processor.tokenizer.decode([token for token in row["labels"] if token != -100])
        assert pictures.PICTURE not in learnt and "act" in learnt and learnt.endswith("<|end|>")
        batch = pictures.collator(processor)([row])
        assert torch.equal(batch["mm_token_type_ids"][0], torch.tensor(whole["mm_token_type_ids"][0]))
        assert torch.allclose(batch["pixel_values"], torch.as_tensor(whole["pixel_values"]))


@pytest.mark.slow
def test_the_model_sees(folder: Path) -> None:
    """Another picture gives other probabilities, also behind tokens that come later."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder)
    collate = pictures.collator(pictures.processor_of(str(folder), TASK.shape))
    rows = tokenized(
        TASK, Vocabulary.of(TASK).build(), json.loads(json.dumps(TASK.traces(2, 0), default=pictures.as_json))
    )
    batch = collate(rows[:1])
    with torch.no_grad():
        plain = model(**batch).logits[0, -1]
        other = model(**batch | {"pixel_values": batch["pixel_values"].flip(0)}).logits[0, -1]
    assert not torch.allclose(plain, other, atol=1e-6)


@pytest.mark.parametrize(
    "change", [{"picture": 40}, {"architecture": "qwen2-vl"}, {"architecture": "qwen2-vl", "picture": 41}]
)
def test_shapes_that_cannot_see(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"pictures are for `architecture` qwen2-vl, and their size is a multiple"):
        lab.Shape(**change)


def test_without_gymnasium_other_tasks_work_and_these_say_what_to_install() -> None:
    code = """
        import sys
        sys.modules["gymnasium"] = None
        from trl_ext import lab
        assert lab.task("letters").rows("train", 2, 0) and "minigrid" in lab.tasks()
        lab.task("minigrid").traces(2, 0)
    """
    done = processes.run_python(textwrap.dedent(code))
    assert 'gymnasium is not installed: pip install "trl_ext[environments]"' in done.stderr, done.stderr
