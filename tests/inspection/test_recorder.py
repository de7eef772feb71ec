"""What a recorded round holds: the tokens, and rewards and advantages before and after each plugin."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch

import trl_ext
from trl_ext.inspection import file_format, terminal
from trl_ext.inspection.file_format import Recording
from trl_ext.inspection.recorder import kept_groups, number, plain, runs_of_zeros, tool_calls
from trl_ext.testing import metrics_of, tiny_data
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_plugins.gdpo import gdpo_advantages

GROUPS = torch.arange(12) // 4


def of_rows(recorded: Recording, part: Any) -> list[Any]:
    return [part(row) for row in recorded.rows]


def read(trainer: Any, number: int = 1) -> Recording:
    return file_format.read(Path(trainer.args.output_dir) / "inspect" / f"round-{number}.json")


# --- the content ------------------------------------------------------------------------------------------------------


def test_the_first_rounds_and_no_others(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "inspect").iterdir())
    assert names == ["round-1.json", "round-2.json"]
    first, second = (file_format.read(path) for path in file_format.find(str(folder)))
    assert [(r.round, r.step) for r in (first, second)] == [(1, 0), (2, 1)]
    assert first.trainer == "grpo" and first.processes == 1 and first.num_generations == 4 and first.left_out == 0
    assert [plugin["name"] for plugin in first.plugins] == ["gdpo", "steps"]
    assert first.plugins[0]["options"]["group_eps"] == 1e-4


def test_tokens_and_prompts(recorded: Recording, rounds: ModuleType, run: Any) -> None:
    texts = [rounds.text_of(row) for row in range(12)]
    assert set(texts) == set(rounds.TEXTS)
    assert of_rows(recorded, lambda row: "".join(row.tokens)) == texts
    assert of_rows(recorded, lambda row: row.row) == list(range(12))
    assert of_rows(recorded, lambda row: row.group) == GROUPS.tolist()
    assert all(row.mask == [1] * len(row.ids) for row in recorded.rows)
    tokenizer = run.processing_class
    for row in recorded.rows:
        assert [tokenizer.decode([token]) for token in row.ids] == row.tokens
    assert len(recorded.prompts) == 3 and of_rows(recorded, lambda row: row.prompt) == GROUPS.tolist()
    for row in recorded.rows:
        prompt = recorded.prompts[row.prompt]
        assert "".join(prompt.tokens) == tokenizer.decode(prompt.ids)
        assert f"{row.columns['index']}+{row.columns['index']}=" in "".join(prompt.tokens)
        assert row.columns["answer"] == str(2 * row.columns["index"])


def test_rewards_of_the_functions_and_of_the_plugin(recorded: Recording, rounds: ModuleType) -> None:
    texts = of_rows(recorded, lambda row: "".join(row.tokens))
    columns = list(
        zip(
            rounds.numbers([[{"content": text}] for text in texts]),
            rounds.brief(of_rows(recorded, lambda row: row.ids)),
            strict=True,
        )
    )
    assert [dataclasses.asdict(stage) for stage in recorded.reward_stages] == [
        {"by": "TRL", "names": ["numbers", "brief"], "weights": [1.0, 1.0]},
        {"by": "steps", "names": ["numbers", "brief", "bonus"], "weights": [1.0, 1.0, 0.5]},
    ]
    for row, text, (digits, short) in zip(recorded.rows, texts, columns, strict=True):
        expected = [pytest.approx(digits, rel=1e-5), None if short is None else pytest.approx(short, rel=1e-5)]
        assert row.rewards == [expected, [*expected, pytest.approx(len(text) / 100, rel=1e-5)]]
    assert any(row.rewards[0][1] is None for row in recorded.rows)


def test_advantages_of_trl_and_after_each_plugin(recorded: Recording, rounds: ModuleType) -> None:
    assert recorded.advantage_stages == ["TRL", "gdpo", "steps"]
    last = torch.tensor(of_rows(recorded, lambda row: [float("nan") if v is None else v for v in row.rewards[-1]]))
    weights = torch.tensor([1.0, 1.0, 0.5])
    total = (last * weights).nansum(1).view(3, 4)
    stock = ((total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)).flatten()
    decoupled = gdpo_advantages(last, weights, GROUPS)
    for row in recorded.rows:
        assert row.advantages[0] == pytest.approx(stock[row.row].item(), abs=1e-4)
        assert row.advantages[1] == pytest.approx(decoupled[row.row].item(), abs=1e-4)
        length, middle = len(row.ids), len(row.ids) // 2
        factors = [1.0] * middle + [0.5] * (length - middle)
        assert row.advantages[2] == pytest.approx([row.advantages[1] * factor for factor in factors], rel=1e-5)
        assert row.advantage(2) == pytest.approx(row.advantages[1] * sum(factors) / length, rel=1e-4)
    assert recorded.scale(2) == pytest.approx(decoupled.abs().max().item(), rel=1e-5)
    assert abs(stock - decoupled).max() > 0.1  # the stages can be told apart


def test_what_only_the_plugin_knows(recorded: Recording, rounds: ModuleType) -> None:
    for row in recorded.rows:
        text, length, middle = "".join(row.tokens), len(row.ids), len(row.ids) // 2
        assert row.fields == {"letters": len(text), "note": text[:3], "share": pytest.approx(length / 100)}
        expected = torch.cos(torch.tensor(row.ids).float()).tolist()
        assert list(row.values) == ["doubt"] and row.values["doubt"] == pytest.approx(expected, abs=1e-5)
        assert row.spans == [
            {"by": "steps", "start": 0, "end": middle, "label": "half 1", "value": None},
            {"by": "steps", "start": middle, "end": length, "label": "half 2", "value": middle},
        ]
        assert row.curves == [
            {"by": "steps", "name": "progress", "positions": [0, middle, length - 1], "values": [0.0, None, 1.0]}
        ]


# --- recording is only looking ----------------------------------------------------------------------------------------


def outcome(trainer: Any) -> tuple[dict[str, torch.Tensor], str, torch.Tensor]:
    parameters = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    return parameters, str(metrics_of(trainer)), torch.get_rng_state()


def assert_identical(one: Any, other: Any) -> None:
    for name, value in one[0].items():
        assert torch.equal(other[0][name], value), name
    assert one[1] == other[1] and torch.equal(one[2], other[2])


def test_recording_with_plugins_changes_no_bit(rounds: ModuleType, model: str, tmp_path: Path) -> None:
    settings = {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 6}
    plain = outcome(rounds.train(model, tmp_path / "plain", record=0, **settings))
    watched = rounds.train(model, tmp_path / "watched", record=2, **settings)
    assert_identical(plain, outcome(watched))
    assert not (tmp_path / "plain" / "inspect").exists()
    values = read(watched).rows[0].values  # TRL keeps the old log-probabilities of rounds that serve several steps
    assert list(values) == ["old_per_token_logps", "doubt"] and all(v < 0 for v in values["old_per_token_logps"])


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_plain_trl_is_recorded_without_changing_a_bit(kind: str, build: Any) -> None:
    plain = build(kind, max_steps=2)
    plain.train()
    expected = outcome(plain)
    watched = build(kind, max_steps=2)
    cls = type(watched)
    assert trl_ext.record(watched, rounds=2) is watched
    watched.train()
    assert_identical(expected, outcome(watched))
    found = read(watched, 2)
    assert found.plugins == [] and found.advantage_stages == ["TRL"] and found.trainer == kind
    assert found.reward_stages[0].names == ["digits", "brevity"]
    logged = watched._logs["advantages"]  # of the last round
    assert of_rows(found, lambda row: row.advantages) == [[pytest.approx(value, rel=1e-5)] for value in logged]
    trl_ext.detach(watched)
    assert type(watched) is cls


def test_the_hook_runs_in_recorded_rounds_only(build: Any, plugin: Any) -> None:
    class Looker(Plugin):
        """No method at all: without a recorder there is nothing to call, and that is no error."""

        name = "looker"
        trainers = ("grpo",)
        seen: ClassVar[list[tuple[str, bool]]] = []

        @hookimpl
        def inspect(self, round: Any) -> None:
            self.seen.append((round.mode, torch.is_grad_enabled()))

    reference = plugin(Looker)
    with trl_ext.enable(reference):
        trainer = build(max_steps=2)
        trainer.train()
        assert trainer._trl_ext.calls == {} and trainer._trl_ext.recorder is None
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    with trl_ext.enable(reference) as handle:
        assert handle.record() is handle
        trainer = build(max_steps=3, trainer={"eval_dataset": tiny_data("grpo", 4)}, **evaluated)
        trainer.train()
        assert trainer._trl_ext.calls["looker", "inspect"] == 1
    assert Looker.seen == [("train", False)]
    assert len(file_format.find(trainer.args.output_dir)) == 1


# --- what is left out, and what is special ----------------------------------------------------------------------------


def test_whole_groups_up_to_a_number_of_rows(build: Any) -> None:
    trainer = trl_ext.record(build(per_device_train_batch_size=16, max_steps=1), max_rows=11)
    trainer.train()
    found = read(trainer)
    assert of_rows(found, lambda row: row.row) == list(range(8)) and found.left_out == 8
    assert kept_groups([0, 0, 0, 1, 1], 2) == {0}  # one group in any case
    assert kept_groups([0, 0, 1, 1, 2, 2], 4) == {0, 1}
    assert kept_groups([5], 64) == {5}


def test_older_recordings_are_replaced_and_the_folder_can_be_chosen(build: Any, tmp_path: Path) -> None:
    trl_ext.record(build(max_steps=2), rounds=2, folder=tmp_path / "here").train()
    kept = tmp_path / "here" / "notes.txt"
    kept.write_text("mine")
    assert [path.name for path in file_format.find(str(tmp_path / "here"))] == ["round-1.json", "round-2.json"]
    trl_ext.record(build(max_steps=2), folder=tmp_path / "here").train()
    assert [path.name for path in file_format.find(str(tmp_path / "here"))] == ["round-1.json"] and kept.exists()


class Tools(Plugin):
    """Rollouts with a tool call in the middle."""

    name = "tools"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        def ids(text: str) -> list[int]:
            return trainer.processing_class.convert_tokens_to_ids(list(text))

        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        messages = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "add", "content": "42"},
            {"role": "assistant", "content": "so 42"},
        ]
        return dataclasses.replace(
            generate(prompts),
            completion_ids=[ids("add(1)42so 42") for _ in prompts],
            tool_mask=[[1] * 6 + [0] * 2 + [1] * 5 for _ in prompts],
            completions=[messages for _ in prompts],
        )


@pytest.mark.parametrize("truncated", [False, True])
def test_tool_calls_and_results(truncated: bool, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Tools)) as handle:
        trainer = build(max_steps=1, rewards=[lambda completion_ids, **_: [0.5] * 8],
                        mask_truncated_completions=truncated)  # fmt: skip
        handle.record()
        trainer.train()
    row = read(trainer).rows[0]
    assert row.calls == [{"name": "add", "arguments": {"a": 1}, "result": "42"}]
    assert row.spans == [{"by": "TRL", "start": 6, "end": 8, "label": "tool result", "value": None}]
    # no completion ends with a token that ends it, so with the setting the loss counts none
    assert row.mask == ([0] * 13 if truncated else [1] * 6 + [0] * 2 + [1] * 5)
    assert row.advantage(0) == 0.0


def test_rows_that_the_round_does_not_learn_from(build: Any, plugin: Any) -> None:
    class Second(Plugin):
        name = "second"
        trainers = ("grpo",)

        @hookimpl
        def keep_rows(self, round: Any) -> torch.Tensor:
            return round.group_ids == 1

    with trl_ext.enable(plugin(Second)) as handle:
        handle.record()
        trainer = build(max_steps=1)
        trainer.train()
    found = read(trainer)
    assert of_rows(found, lambda row: row.kept) == [False] * 4 + [True] * 4
    assert of_rows(found, lambda row: set(row.mask)) == [{0}] * 4 + [{1}] * 4
    assert not any(row.spans for row in found.rows)  # they are no tool results
    assert any(row.advantages[0] for row in found.rows[:4])  # what TRL gave them is still to be seen
    out = io.StringIO()
    terminal.show(found, set(range(8)), file=out)
    assert out.getvalue().count("left out: the round does not learn from it") == 4


def test_plain_values() -> None:
    import numpy

    value = {"a": torch.tensor([1.0, float("inf")]), 2: (True, None, numpy.int64(3)), "c": object(), "d": 1 / 3}
    expected = {"a": [1.0, None], "2": [True, None, 3], "c": "<object>", "d": 0.333333}
    assert plain(value) == expected and json.loads(json.dumps(plain(value), allow_nan=False)) == expected
    assert number(float("nan")) is None and number(torch.tensor(12345.678)) == 12345.7
    assert runs_of_zeros([]) == [] and runs_of_zeros([0, 0]) == [(0, 2)]
    assert tool_calls("text") == [] and tool_calls([{"role": "assistant", "content": "hi"}]) == []
    two = [{"tool_calls": [{"name": "a", "arguments": "x"}, {"name": "b", "arguments": None}]},
           {"role": "tool", "content": "1"}]  # fmt: skip
    assert [(call["name"], call["result"]) for call in tool_calls(two)] == [("a", "1"), ("b", None)]
