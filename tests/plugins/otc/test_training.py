"""OTC in real runs: executed calls, calls counted in the text, and none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused, unloadable
from trl_ext.testing import calls, digits, metrics_of, tiny_data, tiny_trainer
from trl_ext.tools import calculator
from trl_ext_hooks.toolkit.prompt_memory import prompt_key
from trl_ext_plugins.otc import falling_coefficient, tool_coefficient


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def answered(completions: list[Any], **kwargs: Any) -> list[float]:
    """Whether a rollout ends with something that was said rather than called."""
    return [float(bool(completion[-1].get("content"))) for completion in completions]


@pytest.fixture
def calling(tool_model: str, tmp_path: Path) -> Callable[..., Any]:
    """A trainer of which TRL's own loop executes calculator calls."""

    def make(name: str = "run", **settings: Any) -> Any:
        defaults: dict[str, Any] = {"max_completion_length": 150, "max_tool_calling_iterations": 2}
        defaults |= {"generation_kwargs": calls(tool_model, "calculator", likelihood=5.0, expression="6 * 7")}
        defaults |= {"trainer": {"tools": [calculator]}, "rewards": [answered, digits]}
        return tiny_trainer("grpo", tool_model, tmp_path / name, **defaults | settings)

    return make


def test_executed_calls_set_the_rewards(calling: Any, look: str) -> None:
    with trl_ext.enable("otc", look, "shared-prefix"):  # c is max_tool_calling_iterations
        trainer = calling(data=tiny_data(rows=2), max_steps=3, learning_rate=1e-3)
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        rounds = trainer._trl_ext.plugins["look"].rounds
        remembered = trainer._trl_ext.plugins["otc"].memory._entries
    known: dict[int, float] = {}
    for round in rounds:
        base = torch.tensor([answered(round.completions), digits(round.completions)]).T
        keys = [prompt_key(row) for row in round.data_rows]
        counted = round.tool_calls.tolist()
        for key, m, correct in zip(keys, counted, base[:, 0].tolist(), strict=True):
            if correct:
                known[key] = min(known.get(key, math.inf), m)
        n = torch.tensor([known.get(key, math.nan) for key in keys])
        expected = base * tool_coefficient(torch.tensor(counted), n, 2).unsqueeze(1)
        torch.testing.assert_close(round.rewards.double(), expected, atol=1e-6, rtol=0)
        assert len(set(counted)) > 1
    assert remembered == known and len(known) == 2
    frequency = logged(trainer, "tools/call_frequency")
    assert logged(trainer, "otc/tool_calls_mean") == pytest.approx(frequency)
    assert any((value - before[name]).abs().max() > 1e-5 for name, value in trainer.model.named_parameters())


def test_truncated_rollouts_are_only_wrong(calling: Any, look: str) -> None:
    """A call that begins at once and its end are 61 tokens; nothing more fits, and no result does.

    TRL executes the call, and takes its result back.
    """
    with trl_ext.enable("otc", look):
        trainer = calling(max_completion_length=61, mask_truncated_completions=True, max_steps=1, num_generations=8)
        trainer.train()
        (round,) = trainer._trl_ext.plugins["look"].rounds
    ended = torch.tensor([ids[-1] == trainer.processing_class.eos_token_id for ids in round.completion_ids])
    assert not ended.all() and torch.equal(round.loss_mask.sum(1) > 0, ended)
    assert not any(message["role"] == "tool" for completion in round.completions for message in completion)
    executed = [bool(completion[-1].get("tool_calls")) for completion in round.completions]
    assert any(executed) and round.tool_calls.tolist() == executed
    assert round.tool_calls.double().mean().item() == pytest.approx(logged(trainer, "tools/call_frequency")[0])
    assert torch.isfinite(round.advantages).all()


def test_without_a_call_nothing_changes(train: Any, capfd: Any) -> None:
    plain = train(max_steps=3)
    with trl_ext.enable("otc", otc={"c": 4}):
        trainer = train(max_steps=3)
        notes = trainer._trl_ext.plan.notes
    assert len(notes) == 1 and notes[0].startswith("otc: the trainer has neither tools nor an environment")
    assert " ".join(capfd.readouterr().err.split()).count("otc: the trainer has neither tools") == 1
    for name, value in plain.model.named_parameters():
        assert torch.equal(value, dict(trainer.model.named_parameters())[name])
    own = [{key: value for key, value in entry.items() if "otc/" not in key} for entry in metrics_of(trainer)]
    assert own == metrics_of(plain)


def test_calls_in_plain_text_under_rloo(train: Any, look: str) -> None:
    """RLOO has no tools, so a tag is counted; here a letter stands for it."""
    settings = {"max_steps": 2, "beta": 0.0, "learning_rate": 0.05}
    plain = train("rloo", **settings)
    with trl_ext.enable(look, otc={"c": 4, "call_tag": "<<<"}):  # nobody writes that
        silent = train("rloo", **settings)
    for name, value in plain.model.named_parameters():
        assert torch.equal(value, dict(silent.model.named_parameters())[name])
    with trl_ext.enable(look, otc={"c": 2, "call_tag": "a", "mode": "ppo"}):
        trainer = train("rloo", **settings)
        rounds = trainer._trl_ext.plugins["look"].rounds
    for round in rounds:
        texts = trainer.processing_class.batch_decode(round.completion_ids)
        counted = torch.tensor([text.count("a") for text in texts])
        base = torch.tensor(digits(round.completions)).double()
        torch.testing.assert_close(
            round.rewards[:, 0].double(), base * falling_coefficient(counted, 2), atol=1e-6, rtol=0
        )
    assert sum(logged(trainer, "otc/tool_calls_mean")) > 0


class Drawing:
    """An environment that owns its tasks."""

    def reset(self, **row: Any) -> str:
        return "find it"

    def look(self) -> str:
        """Looks."""
        return "seen"


@pytest.mark.parametrize("data", [None, tiny_data(rows=1).select_columns("prompt").select([0] * 16)], ids=["no", "one"])
def test_an_environment_that_owns_its_tasks(data: Any, tool_model: str, tmp_path: Path) -> None:
    given = {"environment_factory": Drawing, "train_dataset": data}
    with trl_ext.enable("otc", otc={"c": 4}), refused(trl_ext.ConfigError, ", or otc.n_scope=local."):
        tiny_trainer("grpo", tool_model, tmp_path, cls=unloadable("grpo"), trainer=given)
    with trl_ext.enable("otc", otc={"c": 4, "n_scope": "local"}):
        trainer = tiny_trainer("grpo", tool_model, tmp_path, trainer=given)
    with refused(trl_ext.ConfigError, "rows of the data are equal"):
        trl_ext.attach(trainer, {"otc": {"c": 4}})
