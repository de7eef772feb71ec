"""Counting tool calls: messages, tags, and numbers that a rollout reports; what cannot be counted is refused."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from trl_ext import OptionError
from trl_ext.catalog.find import resolve
from trl_ext_hooks import Config, Need, Plugin, Refuse, Rollout, Scored, option
from trl_ext_hooks.toolkit.messages import count_executed_calls, count_tag, count_tool_messages
from trl_ext_hooks.toolkit.tool_calls import CallCounter, CallOptions


def assistant(text: str, *calls: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": [{"function": {"name": name}} for name in calls]}


def answer(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "calculator", "content": text}


COMPLETIONS = [
    [assistant("4")],
    [assistant("", "calculator"), answer("4"), assistant("four")],
    [assistant("", "calculator", "search"), answer("4"), answer("{'error': 'not found'}"), assistant("", "calculator")],
    [assistant("", "calculator")],  # written and never executed
    [],
]


class Device:
    """Stands in for a trainer whose processes hold the same rows."""

    device = torch.device("cpu")
    processing_class = types.SimpleNamespace(batch_decode=lambda ids: [bytes(row).decode() for row in ids])

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor])


def rollout(completions: list[Any], rows: list[dict[str, Any]] | None = None, cls: Any = Rollout, **more: Any) -> Any:
    texts = [completion if isinstance(completion, str) else "" for completion in completions]
    values = {
        "mode": "train",
        "step": 0,
        "num_generations": 1,
        "rows": [{}] * len(completions) if rows is None else rows,
        "prompts": [],
        "completions": completions,
        "completion_ids": [list(text.encode()) for text in texts],
        "tool_mask": None,
        "group_ids": torch.arange(len(completions)),
        "offset": 0,
        "trainer": Device(),
    }
    return cls(**values | more)


def config(kind: str = "grpo", *sources: str) -> Config:
    return Config(kind, None, (), (), (), sources)  # type: ignore[arg-type]


def test_executed_calls_are_messages_of_the_role_tool() -> None:
    assert count_tool_messages(COMPLETIONS).tolist() == [0, 1, 2, 0, 0]
    assert count_tool_messages(["<tool_call> in plain text", ""]).tolist() == [0, 0]
    assert count_tool_messages([]).tolist() == []
    found = rollout(COMPLETIONS).tool_calls
    assert found.dtype == torch.int64 and found.tolist() == [0, 1, 2, 0, 0]


@pytest.mark.parametrize(
    ("iterations", "expected"), [(0, [0, 1, 2, 0, 0]), (1, [0, 1, 2, 1, 0]), (2, [0, 1, 3, 1, 0]), (9, [0, 1, 3, 1, 0])]
)
def test_calls_whose_results_were_taken_back_count(iterations: int, expected: list[int]) -> None:
    """A last message with calls and without results was executed, unless the loop had ended before."""
    assert count_executed_calls(COMPLETIONS, iterations).tolist() == expected
    assert rollout(COMPLETIONS, tool_iterations=iterations).tool_calls.tolist() == expected
    assert count_executed_calls(["text", ""], iterations).tolist() == [0, 0]


def test_a_tag_is_counted_without_overlaps() -> None:
    assert count_tag(["<call>a</call><call>b</call>", "none", ""], "<call>").tolist() == [2, 0, 0]
    assert count_tag(["aaaa"], "aa").tolist() == [2]
    with pytest.raises(ValueError, match="the tag must not be empty"):
        count_tag(["a"], "")


def test_three_ways_to_count() -> None:
    texts = ["<call>1<result>", "", "<call>2<call>3<result>"]
    assert CallCounter().count(rollout(COMPLETIONS)).tolist() == [0, 1, 2, 0, 0]
    assert CallCounter(tag="<call>").count(rollout(texts)).tolist() == [1, 0, 2]
    assert CallCounter(tag="<result>").count(rollout(texts)).tolist() == [1, 0, 1]
    rows = [{"turns": 3}, {"turns": 0}, {"turns": 1.0}]
    assert CallCounter(field="turns").count(rollout(texts, rows)).tolist() == [3, 0, 1]
    assert CallCounter(field="turns").gather(rollout(texts, rows)).tolist() == [3, 0, 1, 3, 0, 1]


def test_a_field_that_a_plugin_annotated_goes_before_one_of_the_rows() -> None:
    more = {"fields": {"turns": torch.tensor([5, 6])}, "gathered": {}, "rewards": torch.zeros(2, 1)}
    more |= {"reward_names": ("a",), "reward_weights": torch.ones(1)}
    scored = rollout(["", ""], [{"turns": 1}, {"turns": 2}], Scored, **more)
    assert CallCounter(field="turns").count(scored).tolist() == [5, 6]


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (
            [{"turns": 1}, {"steps": 1}],
            KeyError,
            "row 1 has no field 'turns' with its number of tool calls; it has steps",
        ),
        ([{"turns": 1}, {"turns": -1}], ValueError, "field 'turns' of row 1 is -1, expected a whole number"),
        ([{"turns": 1}, {"turns": 0.5}], ValueError, "field 'turns' of row 1 is 0.5, expected a whole number"),
    ],
)
def test_a_field_that_holds_no_counts(rows: list[dict[str, Any]], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        CallCounter(field="turns").count(rollout(["", ""], rows))


def test_one_way_only() -> None:
    with pytest.raises(ValueError, match="call_tag and calls_field exclude each other"):
        CallCounter(tag="<call>", field="turns")
    for empty in ({"tag": ""}, {"field": ""}):
        with pytest.raises(ValueError, match="must not be empty"):
            CallCounter(**empty)


class Counting(Plugin):
    name = "counting"
    trainers = ("grpo",)

    @dataclass(frozen=True)
    class Options(CallOptions):
        weight: float = option(1.0, gt=0, help="a factor")

    options: Options


def test_options_that_say_what_a_call_is(plugin: Any) -> None:
    for given, counter in (({}, CallCounter()), ({"call_tag": "<call>"}, CallCounter(tag="<call>"))):
        (spec,) = resolve({plugin(Counting): {"weight": 2, **given}})
        assert spec.options.counter == counter and spec.options.weight == 2
    with pytest.raises(OptionError, match="call_tag and calls_field exclude each other"):
        resolve({plugin(Counting): {"call_tag": "<call>", "calls_field": "turns"}})


def test_runs_in_which_nothing_would_be_counted_are_refused() -> None:
    (found,) = CallCounter().requirements(config("rloo"), "otc")
    assert isinstance(found, Refuse) and "no tool loop" in found.what and found.fix == "Set otc.call_tag."
    (found,) = CallCounter().requirements(config("grpo", "rollout_func"), "hdpo")
    assert isinstance(found, Refuse) and "rollout_func hold no tool messages" in found.what
    assert "hdpo.calls_field" in found.fix and "hdpo.call_tag" in found.fix
    for sources in (("tools",), ("environment_factory",), ("tools", "rollout_func")):
        assert list(CallCounter().requirements(config("grpo", *sources), "otc")) == [Need("tools")]
    assert list(CallCounter().requirements(config("grpo"), "otc")) == []
    for counter in (CallCounter(tag="<call>"), CallCounter(field="turns")):
        assert list(counter.requirements(config("rloo"), "otc")) == []
        assert list(counter.requirements(config("grpo", "rollout_func"), "otc")) == []
