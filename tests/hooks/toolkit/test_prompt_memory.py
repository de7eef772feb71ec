"""Memory per prompt: keys, merging, evaluation and state; several processes are in tests/plugins."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
import torch

from trl_ext_hooks import Config, Need, Refuse
from trl_ext_hooks.toolkit.prompt_memory import PromptMemory, prompt_key

NAN = torch.nan


class Alone:
    device = torch.device("cpu")

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class Round:
    """What the memory uses of a rollout."""

    def __init__(self, rows: list[dict[str, Any]], mode: str = "train") -> None:
        self.rows, self.mode, self.trainer = rows, mode, Alone()


def prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_key_is_a_number_of_the_content() -> None:
    assert prompt_key(prompt("1+1=")) == prompt_key([{"content": "1+1=", "role": "user"}])  # the order of keys is none
    assert len({prompt_key(value) for value in (prompt("a"), prompt("b"), "a", 1, "1", 1.5, None, [1])}) == 8
    assert all(-(2**63) <= prompt_key(f"{i}") < 2**63 for i in range(100))
    assert min(prompt_key(f"{i}") for i in range(100)) < 0
    code = "from trl_ext_hooks.toolkit.prompt_memory import prompt_key as key; "
    code += "print(key([{'role': 'user', 'content': 'äß'}]))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == prompt_key(prompt("äß"))  # Python's own hash of a text differs between processes


def test_numbers_are_merged_by_prompt() -> None:
    memory = PromptMemory(merge=min)
    rows = [{"prompt": prompt("a")}, {"prompt": prompt("b")}, {"prompt": prompt("a")}, {"prompt": prompt("c")}]
    keys = memory.keys(Round(rows))
    assert keys.dtype == torch.int64 and keys[0] == keys[2] and len(set(keys.tolist())) == 3
    assert torch.isnan(memory.recall(keys)).all() and len(memory) == 0
    memory.update(Round(rows), keys, torch.tensor([4.0, NAN, 3.0, 0.0]))
    torch.testing.assert_close(memory.recall(keys), torch.tensor([3, NAN, 3, 0]).double(), equal_nan=True)
    memory.update(Round(rows), keys, torch.tensor([5, 7, 6, 1]))
    assert memory.recall(keys).tolist() == [3, 7, 3, 0]


def test_rows_are_merged_in_their_order() -> None:
    memory = PromptMemory(merge=lambda old, new: 0.5 * old + new)
    keys = torch.tensor([1, 1, 1])
    memory.update(Round([]), keys, torch.tensor([4.0, 2.0, 1.0]))
    assert memory.recall(keys[:1]).tolist() == [0.5 * (0.5 * 4 + 2) + 1]


def test_evaluation_changes_nothing() -> None:
    memory = PromptMemory(merge=min)
    keys = torch.tensor([1])
    memory.update(Round([]), keys, torch.tensor([4.0]))
    memory.update(Round([], mode="eval"), torch.tensor([1, 2]), torch.tensor([0.0, 0.0]))
    assert memory.recall(torch.tensor([1, 2])).tolist()[0] == 4 and len(memory) == 1


def test_the_state_survives_a_checkpoint() -> None:
    memory = PromptMemory(merge=min)
    keys = torch.tensor([-(2**63), 2**63 - 1, 5])
    memory.update(Round([]), keys, torch.tensor([0.0, 2.0, NAN]))
    buffer = io.BytesIO()
    torch.save(memory.state_dict(), buffer)
    buffer.seek(0)
    other = PromptMemory(merge=min)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other.recall(keys), memory.recall(keys), equal_nan=True)
    assert len(other) == 2
    empty = PromptMemory(merge=min)
    empty.load_state_dict(PromptMemory(merge=min).state_dict())
    assert len(empty) == 0


def test_an_id_column_decides() -> None:
    rows = [{"prompt": "same", "uid": 1}, {"prompt": "same", "uid": 2}, {"prompt": "other", "uid": 1}]
    first, second, third = PromptMemory(min, id_column="uid").keys(Round(rows)).tolist()
    assert first == third != second


def test_what_cannot_tell_prompts_apart() -> None:
    with pytest.raises(KeyError, match="a row has no 'uid' to tell its prompt apart; it has answer, prompt"):
        PromptMemory(min, "uid").keys(Round([{"prompt": "a", "answer": "b"}]))
    with pytest.raises(TypeError, match="column 'prompt' cannot tell prompts apart, it is not JSON"):
        PromptMemory(min).keys(Round([{"prompt": [{"role": "user", "content": torch.zeros(2)}]}]))

    def asked(memory: PromptMemory, *columns: str) -> list[Any]:
        return list(memory.requirements(Config("grpo", None, (), columns, ()), "otc.id_column"))

    assert asked(PromptMemory(min), "prompt", "answer") == []
    assert asked(PromptMemory(min, "uid"), "prompt") == [Need("column:uid")]
    (missing,), (images,) = asked(PromptMemory(min), "environment"), asked(PromptMemory(min), "prompt", "image")
    assert isinstance(missing, Refuse) and "no column 'prompt'" in missing.what and missing.fix == "Set otc.id_column."
    assert isinstance(images, Refuse) and "the data has images" in images.what
    unknown = Config("grpo", None, (), None, ())
    assert list(PromptMemory(min).requirements(unknown, "otc.id_column")) == []
