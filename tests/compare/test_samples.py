"""Which completions a record keeps, and how they are written for people."""

from __future__ import annotations

import collections
import types
from typing import Any

from trl_ext.compare import samples
from trl_ext.trl_internals import trainer_state

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TALK = [
    {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]


def trainer(**rewards: list[Any]) -> Any:
    prompts = [[{"role": "user", "content": f"question {i // 4}"}] for i in range(8)]
    logs = {
        "prompt": collections.deque(prompts),
        "completion": collections.deque([[{"role": "assistant", "content": f"answer {i}"}] for i in range(8)]),
        "advantages": collections.deque([i / 8 for i in range(8)]),
        "rewards": {name: collections.deque(values) for name, values in rewards.items()},
    }
    return types.SimpleNamespace(_logs=logs)


def test_two_completions_of_every_prompt() -> None:
    found = samples.sample(trainer_state.logged_round(trainer(right=[0.0, 1.0] * 4)))
    assert [(row["prompt"], row["completion"]) for row in found] == [
        ("question 0", "answer 0"),
        ("question 0", "answer 1"),
        ("question 1", "answer 4"),
        ("question 1", "answer 5"),
    ]
    assert found[3] == {
        "prompt": "question 1",
        "completion": "answer 5",
        "rewards": {"right": 1.0},
        "advantage": 0.625,
    }


def test_a_reward_that_came_later_belongs_to_the_last_rows() -> None:
    found = trainer_state.logged_round(trainer(right=[0.0] * 8, late=[1.0] * 6))
    assert [row["rewards"]["late"] for row in found] == [None, None, *[1.0] * 6]


def test_a_trainer_without_completions() -> None:
    assert trainer_state.logged_round(types.SimpleNamespace(_logs={})) == []
    assert trainer_state.logged_round(types.SimpleNamespace()) == [] == samples.sample([])


def test_text() -> None:
    assert samples.as_text("plain") == "plain"
    assert samples.as_text([{"role": "assistant", "content": "one message"}]) == "one message"
    assert samples.as_text(TALK).splitlines() == [
        "assistant: Let me see. add({'a': 1, 'b': 2})",
        "tool: 3",
        "assistant: It is 3.",
    ]
    assert samples.as_text(TALK[:1]) == "assistant: Let me see. add({'a': 1, 'b': 2})"
    assert samples.as_text([{"role": "assistant", "content": None}]) == ""
