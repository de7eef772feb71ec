"""Rollouts that call tools: TRL's own loop with executed Python tools, and tools that come from plugins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext import ConfigError, OptionError, PluginError
from trl_ext.testing import calls, tiny_data, tiny_trainer
from trl_ext.tools import Corpus, answer_accuracy, calculator
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_hooks.toolkit.messages import count_tool_messages


@pytest.fixture
def run(tool_model: str, tmp_path: Path) -> Callable[..., Any]:
    """Trains one step with rollouts that call the calculator."""

    def train(name: str = "calculator", **settings: Any) -> Any:
        defaults: dict[str, Any] = {"max_steps": 1, "max_completion_length": 150, "max_tool_calling_iterations": 2}
        defaults |= {"generation_kwargs": calls(tool_model, name, likelihood=5.0, expression="6 * 7")}
        trainer = tiny_trainer("grpo", tool_model, tmp_path / "run", **defaults | settings)
        trainer.train()
        return trainer

    return train


# --- the tools themselves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1 + 2", "3"), ("12 * (3 + 4)", "84"), (" -7 // 2 ", "-4"), ("7 % 4", "3"), ("1 / 4", "0.25"), ("+2.5", "2.5")],
)
def test_the_calculator(expression: str, value: str) -> None:
    assert calculator(expression) == value


@pytest.mark.parametrize("expression", ["", "2 **", "__import__('os')", "x", "'a' * 9", "True", "9 ** 9", "(1).real"])
def test_the_calculator_calculates_and_does_nothing_else(expression: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        calculator(expression)


def test_the_calculator_is_not_kept_busy() -> None:
    with pytest.raises(ValueError, match="longer than 200 characters"):
        calculator("1+" * 200 + "1")
    with pytest.raises(ZeroDivisionError):
        calculator("1 / 0")


def test_search(tmp_path: Path) -> None:
    file = tmp_path / "corpus.txt"
    file.write_text("The river Rhine is long.\n\nThe river Elbe\nflows north.\n\n\n\nBread is baked.\n")
    corpus = Corpus.read(file)
    assert len(corpus.passages) == 3
    assert corpus.search("where does the ELBE flow?") == "The river Elbe\nflows north."
    assert corpus.search("the river") == "The river Rhine is long."  # the earlier one wins a tie
    assert corpus.search("river, bread") == "Bread is baked."  # a rare word says more
    assert corpus.search("quantum") == corpus.search("") == Corpus([]).search("x") == "nothing found"


def test_both_are_tools_for_transformers() -> None:
    from transformers.utils import get_json_schema

    for tool, argument in ((calculator, "expression"), (Corpus(["a"]).search, "query")):
        schema = get_json_schema(tool)["function"]
        assert schema["name"] == tool.__name__ and list(schema["parameters"]["properties"]) == [argument]


# --- executed calls ---------------------------------------------------------------------------------------------------


class Count(Plugin):
    name = "count"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.seen: list[Any] = []

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.seen.append(round)


@pytest.mark.parametrize("iterations", [1, 2])
def test_calls_that_trl_executed_are_counted(iterations: int, run: Any, plugin: Any) -> None:
    executed = []

    def calculator(expression: str) -> str:
        """Calculates.

        Args:
            expression: What.
        """
        executed.append(expression)
        if len(executed) % 3 == 0:
            raise ValueError("out of order")
        return "42"

    with trl_ext.enable(plugin(Count)):
        trainer = run(trainer={"tools": [calculator]}, max_tool_calling_iterations=iterations)
        (round,) = trainer._trl_ext.plugins["count"].seen
    messages = [message for completion in round.completions for message in completion]
    written = sum(len(message.get("tool_calls") or ()) for message in messages)
    answers = [message["content"] for message in messages if message["role"] == "tool"]
    assert len(answers) > 0 and round.tool_calls.sum().item() == len(executed) and set(executed) == {"6 * 7"}
    if iterations == 1:
        assert len(executed) < written  # calls behind the last iteration were not executed
    else:
        assert len(answers) < len(executed)  # TRL takes results back that do not fit: the model never sees them
    assert "{'error': 'out of order'}" in answers and "42" in answers  # failed calls count
    assert len(set(round.tool_calls.tolist())) > 1
    masked = (round.batch["tool_mask"] == 0).any(1)
    assert torch.equal(masked, count_tool_messages(round.completions) > 0)


def test_an_environment_s_methods_are_counted_too(run: Any, plugin: Any) -> None:
    class Desk:
        def reset(self, **row: Any) -> str | None:
            return " think!"

        def calculator(self, expression: str) -> str:
            """Calculates.

            Args:
                expression: What.
            """
            return calculator(expression)

    with trl_ext.enable(plugin(Count)):
        trainer = run(trainer={"environment_factory": Desk})
        (round,) = trainer._trl_ext.plugins["count"].seen
    contents = {message["content"] for text in round.completions for message in text if message["role"] == "tool"}
    assert contents == {"42"} and round.tool_calls.sum() > 0
    assert round.prompts[0][-1]["content"].endswith(" think!") and not round.rows[0]["prompt"][-1]["content"].endswith(
        "!"
    )


# --- tools from plugins -----------------------------------------------------------------------------------------------


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def giving(result: Any, *kinds: str) -> type[Plugin]:
    class Giving(Plugin):
        name = "giving"
        trainers = kinds or ("grpo",)  # type: ignore[assignment]

        @hookimpl
        def trainer_arguments(self) -> Any:
            if isinstance(result, Exception):
                raise result
            return result

    return Giving


def test_the_plugin_tools_gives_tools_by_name(run: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Count), tools={"functions": ["trl_ext.tools.calculator"]}):
        trainer = run()
        (round,) = trainer._trl_ext.plugins["count"].seen
        assert trainer.tools == [calculator]
    assert round.tool_calls.sum() > 0


def test_environments_and_rollout_functions_by_name(
    tool_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_desk.py").write_text(
        "class Desk:\n"
        "    def reset(self, **row): return None\n"
        "    def look(self) -> str:\n"
        '        """Looks."""\n'
        "        return 'a desk'\n"
        "def rollouts(prompts, trainer):\n"
        "    return {'prompt_ids': [[5]] * 8, 'completion_ids': [[6, 3]] * 8, 'logprobs': None}\n"
    )
    monkeypatch.chdir(tmp_path)
    with trl_ext.enable(tools={"environment": "my_desk.Desk"}):
        trainer = tiny_trainer("grpo", tool_model, tmp_path / "run")
        assert [tool.__name__ for tool in trainer.tools] == ["look"]
    with trl_ext.enable(tools={"rollout_func": "my_desk.rollouts"}):
        trainer = tiny_trainer("grpo", tool_model, tmp_path / "run", max_steps=1)
        trainer.train()
        assert trainer._buffered_inputs[0]["completion_ids"].tolist() == [[6, 3]] * 8


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("calculator", "'calculator' is not a dotted path, such as my_tools.calculator"),
        ("no_such_module.x", "'no_such_module.x': importing 'no_such_module' failed: ModuleNotFoundError"),
        (
            "trl_ext.tools.calculater",
            "'trl_ext.tools' has no function 'calculater'; it has Corpus, answer_accuracy, calculator",
        ),
    ],
)
def test_wrong_paths(path: str, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        trl_ext.enable(tools={"functions": [path]})
    assert text in str(caught.value)


def test_the_plugin_tools_without_tools(build: Any) -> None:
    with trl_ext.enable("tools"), pytest.raises(ConfigError, match=r"tools: no tool is named\. Set tools\.functions"):
        build()


def test_an_argument_has_one_giver(build: Any, plugin: Any, tool_model: str, tmp_path: Path) -> None:
    with (
        trl_ext.enable(plugin(giving({"tools": [multiply]}))),
        pytest.raises(ConfigError, match="plugin 'giving' gives the trainer `tools`, which the caller gives too"),
    ):
        build(trainer={"tools": [multiply]})
    with (
        trl_ext.enable(plugin(giving({"tools": [multiply]})), tools={"functions": ["trl_ext.tools.calculator"]}),
        pytest.raises(ConfigError, match="plugin 'tools' gives the trainer `tools`, which plugin 'giving' gives too"),
    ):
        build()
    with trl_ext.enable(plugin(giving({"tools": [multiply]}))):  # an empty list is nothing
        assert tiny_trainer("grpo", tool_model, tmp_path, trainer={"tools": []}).tools == [multiply]


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            {"callbacks": []},
            "plugin 'giving' returned 'callbacks' from 'trainer_arguments', expected a mapping of tools",
        ),
        ([multiply], "plugin 'giving' returned list from 'trainer_arguments', expected a mapping of tools"),
        (ValueError("no key"), "plugin 'giving' failed in its hook 'trainer_arguments': ValueError: no key"),
    ],
)
def test_a_plugin_that_gives_something_else(result: Any, text: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(giving(result))), pytest.raises(PluginError) as caught:
        build()
    assert text in str(caught.value)


def test_where_nothing_can_be_given(build: Any, plugin: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot be attached to an existing trainer\. Use trl_ext\.enable or"):
        trl_ext.attach(build(), plugin(giving({"tools": [multiply]})))
    with (
        trl_ext.enable(plugin(giving({}, "grpo", "rloo"))),
        pytest.raises(PluginError, match="declares the RLOO trainer and gives it tools"),
    ):
        build("rloo")


def test_extend_gives_them_too(tool_model: str, tmp_path: Path, plugin: Any) -> None:
    from trl import GRPOTrainer

    cls = trl_ext.extend(GRPOTrainer, plugin(giving({"tools": [multiply]})))
    assert tiny_trainer("grpo", tool_model, tmp_path, cls=cls, data=tiny_data()).tools == [multiply]


@pytest.mark.slow
def test_the_conformance_checks_bring_tools_along(plugin: Any, tmp_path: Path) -> None:
    from trl_ext.testing import conformance

    class Economy(Plugin):
        name = "economy"
        trainers = ("grpo",)
        needs = ("tools",)
        called = 0

        @hookimpl
        def rewards(self, scored: Any) -> torch.Tensor:
            calls = scored.trainer.gather(scored.tool_calls)
            type(self).called += int(calls.sum())
            return scored.rewards / (1 + calls.unsqueeze(1))

    checks = conformance(plugin(Economy), tmp_path / "needs")
    assert len(checks) >= 6 and not [check for check in checks if not check.passed]
    assert Economy.called > 0
    checks = conformance("tools", tmp_path / "gives", {"functions": ["trl_ext.tools.calculator"]})
    assert len(checks) >= 5 and not [check for check in checks if not check.passed]


def test_the_reward_reads_the_answer_and_no_tool_s_result(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []

    def accuracy_reward(completions: list[Any], solution: list[str], **kwargs: Any) -> list[float]:
        judged.extend(message["content"] for (message,) in completions)
        return [float(message["content"] == wanted) for (message,), wanted in zip(completions, solution, strict=True)]

    monkeypatch.setattr("trl.rewards.accuracy_reward", accuracy_reward)  # TRL's needs the package math-verify
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "calculator"}}]}
    result = {"role": "tool", "name": "calculator", "content": "42"}
    answer = {"role": "assistant", "content": "42"}
    rollouts = [[call, result, answer], [call, result], [answer], [call, result, call], []]
    assert answer_accuracy(rollouts, solution=["42"] * 5, index=[0] * 5) == [1, 0, 1, 0, 0]
    assert judged == ["42", "", "42", "", ""]


def test_options_of_an_environment_that_is_not_named() -> None:
    with (
        pytest.raises(OptionError, match="environment_options are for an environment, and none is named"),
        trl_ext.enable("tools", tools={"functions": ["trl_ext.tools.calculator"], "environment_options": {"env": "x"}}),
    ):
        pass
