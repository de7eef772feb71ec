"""Memory per prompt: keys, merging, evaluation and state; several processes are in tests/plugins."""

from __future__ import annotations

import datetime
import decimal
import io
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests import processes
from trl_ext.testing import tiny_args
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
        self.rows, self.mode, self.trainer, self.data_rows = rows, mode, Alone(), None


def prompt(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_key_is_a_number_of_the_content() -> None:
    assert prompt_key(prompt("1+1=")) == prompt_key([{"content": "1+1=", "role": "user"}])  # the order of keys is none
    assert len({prompt_key(value) for value in (prompt("a"), prompt("b"), "a", 1, "1", 1.5, None, [1])}) == 8
    assert all(-(2**63) <= prompt_key(f"{i}") < 2**63 for i in range(100))
    assert min(prompt_key(f"{i}") for i in range(100)) < 0
    code = "from trl_ext_hooks.toolkit.prompt_memory import prompt_key as key; "
    code += "print(key([{'role': 'user', 'content': 'äß'}]))"
    other = processes.run_python(code, check=True)
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


def test_rules_that_forget_or_keep_lists() -> None:
    keys = torch.tensor([1, 1, 2])
    beta = PromptMemory(
        lambda known, new: [new[1] * known[0] + new[0], new[1] * known[1] + 1 - new[0]], start=[0.5, 0.5]
    )
    values = torch.tensor(
        [[1, 0.9], [0, 0.5], [NAN, 0.9]], dtype=torch.float64
    )  # a reward, and how much of the past is kept
    beta.update(Round([]), keys, values)
    first = [0.9 * 0.5 + 1, 0.9 * 0.5]
    assert beta.recall(torch.tensor([1, 2])).tolist() == [[0.5 * first[0], 0.5 * first[1] + 1], [0.5, 0.5]]
    last = PromptMemory(lambda known, new: [*known, new][-3:], start=[])
    for number in range(5):
        last.update(Round([]), torch.tensor([7]), torch.tensor([float(number)]))
    assert last.get(7) == [2, 3, 4] and last.get(8, "new") == "new"
    with pytest.raises(ValueError, match=r"entries of several shapes \(a list of 0, a list of 3\), expected one"):
        last.recall(torch.tensor([7, 8]))
    assert last.recall(torch.tensor([7, 8]), [0.0, 0.0, 0.0]).shape == (2, 3)


def test_entries_that_a_plugin_sets_itself() -> None:
    memory = PromptMemory(id_column="uid")
    key = memory.key({"uid": 5})
    assert key == memory.keys(Round([{"uid": 5}])).item()
    memory[key] = torch.tensor([1, 2])
    memory[8] = 3
    memory[9] = []
    assert memory.get(key) == [1.0, 2.0] and memory.get(8) == 3.0 and len(memory) == 3
    other = PromptMemory(id_column="uid")
    buffer = io.BytesIO()
    torch.save(memory.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert [other.get(each) for each in (key, 8, 9)] == [[1.0, 2.0], 3.0, []]
    with pytest.raises(TypeError, match="remembers numbers and lists of numbers, got 'much'"):
        memory[1] = "much"  # type: ignore[assignment]
    with pytest.raises(TypeError, match="needs a `merge` rule"):
        memory.update(Round([]), torch.tensor([1]), torch.tensor([1.0]))


def test_a_checkpoint_of_numbers_is_as_it_was() -> None:
    """Earlier versions knew numbers only, and can read a state of numbers."""
    memory = PromptMemory(min)
    memory.load_state_dict({"keys": torch.tensor([3, -4]), "numbers": torch.tensor([1.5, 2.0]).double()})
    assert (memory.get(3), memory.get(-4)) == (1.5, 2.0)
    assert {name: values.tolist() for name, values in memory.state_dict().items()} == {
        "keys": [3, -4],
        "numbers": [1.5, 2.0],
    }


def test_an_id_column_decides() -> None:
    rows = [{"prompt": "same", "uid": 1}, {"prompt": "same", "uid": 2}, {"prompt": "other", "uid": 1}]
    first, second, third = PromptMemory(min, id_column="uid").keys(Round(rows)).tolist()
    assert first == third != second


def test_a_task_is_a_row_with_all_its_columns() -> None:
    memory, given = PromptMemory(min), [{"prompt": "same", "seed": 1}, {"prompt": "same", "seed": 2}]
    first, second = memory.keys(Round(given)).tolist()
    assert first != second and memory.keys(Round([dict(reversed(given[0].items()))])).tolist() == [first]
    seen = Round([{**row, "turns": turns} for row, turns in zip(given, (5, 7), strict=True)])
    seen.data_rows = given  # without what a rollout_func reports
    assert memory.keys(seen).tolist() == [first, second]
    assert PromptMemory(min, "turns").keys(seen).tolist() == [prompt_key(5), prompt_key(7)]


def test_keys_of_what_data_sets_hold() -> None:
    day = datetime.date(2024, 1, 2)
    values = [day, datetime.datetime(2024, 1, 2), decimal.Decimal("1.5"), b"a", b"b", np.arange(3), torch.ones(2)]
    values += [Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), "red"), Image.new("RGB", (1, 4))]
    assert len({prompt_key(value) for value in values}) == len(values)
    assert prompt_key({"day": day}) == prompt_key({"day": datetime.date(2024, 1, 2)})
    assert prompt_key(np.int64(3)) == prompt_key(3) and prompt_key(np.arange(3)) == prompt_key([0, 1, 2])


def test_what_cannot_tell_tasks_apart() -> None:
    with pytest.raises(KeyError, match="a row has no 'uid' to tell its task apart; it has answer, prompt"):
        PromptMemory(min, "uid").keys(Round([{"prompt": "a", "answer": "b"}]))
    for memory, what in ((PromptMemory(min), "a row of the data"), (PromptMemory(min, "prompt"), "column 'prompt'")):
        with pytest.raises(TypeError, match=f"{what} cannot tell tasks apart: object is not JSON"):
            memory.keys(Round([{"prompt": [{"role": "user", "content": object()}]}]))


ENV, ROLLOUT = "environment_factory", "rollout_func"


@pytest.mark.parametrize(
    ("data", "sources", "settings", "refusal"),
    [
        ({"prompt": ["a", "b"], "answer": ["1", "1"]}, (ENV,), {}, None),
        ({"prompt": ["a", "a"], "seed": [1, 2]}, (ENV,), {}, None),
        ({"seed": [1, 2]}, (ENV,), {}, None),
        ({"prompt": ["a", "b", "a"]}, (ENV,), {}, "rows of the data are equal"),
        ({"prompt": [""] * 4}, (ENV, "tools"), {}, "rows of the data are equal"),
        ({"prompt": ["a", "a"], "seed": [1, 2]}, (ENV,), {"remove_unused_columns": True}, "rows of the data are equal"),
        ({"environment": ["a", "b"]}, (ENV,), {}, "the environment owns the data"),
        (None, (ENV,), {}, "the environment owns the data"),
        ({"prompt": ["a", "a"]}, (ROLLOUT,), {}, "rows of the data are equal"),
        ({"prompt": ["a", "b", "a"]}, (ROLLOUT,), {}, None),  # a rollout_func gets the prompt alone
        ({"prompt": ["a"]}, (ROLLOUT,), {}, None),
        ({"prompt": ["a", "a"]}, ("tools",), {}, None),
        ({"prompt": ["a", "a"]}, (), {}, None),
        (None, (), {}, None),
        ({"prompt": ["a"], "image": ["x"]}, (), {}, "the data has images"),
    ],
)
def test_tasks_that_lie_outside_the_data(data: Any, sources: Any, settings: Any, refusal: Any, tmp_path: Any) -> None:
    table = None if data is None else Dataset.from_dict(data)
    columns = None if table is None else tuple(table.column_names)
    config = Config("grpo", tiny_args("grpo", tmp_path, **settings), (), columns, (), sources, data=table)
    asked = list(PromptMemory(min).requirements(config, "otc.id_column", "otc.n_scope=local"))
    if refusal is None:
        assert asked == []
    else:
        (found,) = asked
        assert isinstance(found, Refuse) and refusal in found.what
        assert "otc.id_column" in found.fix and found.fix.endswith(", or otc.n_scope=local.")
    assert list(PromptMemory(min, "uid").requirements(config, "otc.id_column")) == [Need("column:uid")]
