"""Teams: answers of several agents as rows, without a trainer. Real rollouts are in the tests of Dr. MAS."""

from __future__ import annotations

import types
from typing import Any

import pytest

from trl_ext_hooks import Generation
from trl_ext_hooks.toolkit.teams import FIELDS, Team


class Sampler:
    """Stands for `generate`: says the number of its call and the prompt, as text or as messages."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.asked: list[tuple[list[Any], Any]] = []

    def __call__(self, prompts: list[Any], greedy: bool = False, rows: Any = None) -> Generation:
        self.asked.append((prompts, rows))
        call = len(self.asked)
        texts = [f"{call}:{prompt if isinstance(prompt, str) else prompt[-1]['content']}" for prompt in prompts]
        said = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        ids = [[call, len(text)] for text in texts]
        return Generation([[call]] * len(ids), ids, said, **self.changes)


def context(rows: int = 3) -> Any:
    return types.SimpleNamespace(rows=[{}] * rows, row_numbers=[10 + row for row in range(rows)])


def test_rows_stand_by_trajectory_in_the_order_of_the_questions() -> None:
    sampler = Sampler()
    team = Team(sampler, context())
    assert team.ask("solver", ["a", "b", "c"]) == ["1:a", "1:b", "1:c"]
    assert team.ask("critic", ["d", "e"], rows=[2, 0]) == ["2:d", "2:e"]
    assert team.ask("nobody", [], rows=[]) == []
    team.ask("solver", ["f"], rows=[2])
    assert [rows for _, rows in sampler.asked] == [[0, 1, 2], [2, 0], [], [2]]
    made = team.generation()
    assert made.completions == ["1:a", "2:e", "1:b", "1:c", "2:d", "4:f"] and made.source == [0, 0, 1, 2, 2, 2]
    assert made.prompts == ["a", "e", "b", "c", "d", "f"] and made.prompt_ids == [[1], [2], [1], [1], [2], [4]]
    assert made.fields == {
        "agent": ["solver", "critic", "solver", "solver", "critic", "solver"],
        "trajectory": [10, 10, 11, 12, 12, 12],
    }
    assert set(made.fields) == set(FIELDS) and made.logprobs is None and made.tool_mask is None


def test_messages_masks_and_values_of_plugins_further_inside() -> None:
    changes = {"tool_mask": [[1, 0]] * 2, "logprobs": [[-1.0, -2.0]] * 2, "fields": {"hint": ["x", "y"]}}
    sampler = Sampler(**changes)
    team = Team(sampler, context(2))
    prompts = [[{"role": "user", "content": text}] for text in "ab"]
    assert team.ask("solver", prompts) == ["1:a", "1:b"]
    sampler.changes = changes | {"tool_mask": None, "prompts": ["changed", "changed too"]}
    team.ask("critic", prompts)
    made = team.generation()
    assert made.tool_mask == [[1, 0], [1, 1]] * 2 and made.logprobs == [[-1.0, -2.0]] * 4
    assert made.fields["hint"] == ["x", "x", "y", "y"] and made.prompts == [
        prompts[0],
        "changed",
        prompts[1],
        "changed too",
    ]
    call = [{"role": "assistant", "content": None, "tool_calls": []}]
    assert Team(lambda *args, **more: Generation([[1]], [[1]], [call]), context(1)).ask("solver", ["a"]) == [""]


def test_wrong_questions_say_what_was_expected() -> None:
    team = Team(Sampler(), context())
    with pytest.raises(ValueError, match=r"Team\.ask got 2 prompts for 'solver' and 3 rows.*Name them in `rows`"):
        team.ask("solver", ["a", "b"])
    with pytest.raises(ValueError, match=r"Team\.generation was called before an agent was asked"):
        team.generation()
