"""Requirements and needs of plugins that a run does not meet: refused before the model is loaded."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

import trl_ext
from tests.refusals import refused, unloadable
from tests.sample_plugins import checking
from trl_ext import ConfigError, PluginError
from trl_ext.catalog.find import resolve
from trl_ext.plan.check import make_plan
from trl_ext.testing import tiny_args, tiny_data
from trl_ext_hooks import (
    Config,
    Need,
    Plugin,
    Recommend,
    Refuse,
    Require,
    Warn,
    hookimpl,
)


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        (
            Require("scale_rewards", ("none",), "it divides by nothing"),
            "checking needs scale_rewards='none', it is 'group'",
        ),
        (Require("beta", (0.1, 0.2), "why"), "checking needs beta=0.1 or 0.2, it is 0.0: why"),
        (Refuse("the moon is full.", "Wait."), "checking: the moon is full. Wait."),
        (Need("column:steps"), "checking: the training data has no column 'steps'; it has prompt, answer, index"),
        (Need("reward:format"), "checking: no reward function is called 'format'. Known: brevity, digits."),
        (Need("reward:digit"), "no reward function is called 'digit'. Did you mean 'digits'? Known: brevity, digits."),
        (Need("tools"), "checking: rollouts must be able to call tools; give the trainer `tools`"),
    ],
)
def test_what_configure_refuses(requirement: Any, expected: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(checking(requirement))), refused(ConfigError, "this run cannot work:", expected):
        build(cls=unloadable("grpo"))


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo"])
def test_split_parameters_are_refused_where_a_plugin_needs_whole_ones(
    kind: str, build: Any, plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = checking(needs=("whole_parameters",), trainers=(kind,))
    with trl_ext.enable(plugin(cls)):
        assert build(kind)._trl_ext.plan.needs == {"whole_parameters": ("checking",)}
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        text = "checking: every process must hold all parameters, and FSDP splits them; use DDP or DeepSpeed stage 2"
        with refused(ConfigError, text):
            build(kind, cls=unloadable(kind))


def test_all_refusals_come_together(build: Any, plugin: Any) -> None:
    cls = checking(Refuse("one.", "Fix."), Refuse("two.", "Fix."), needs=("column:steps", "reward:format"))
    texts = ["- checking: one. Fix.\n", "- checking: two. Fix.\n", "no column 'steps'", "called 'format'"]
    with trl_ext.enable(plugin(cls)), refused(ConfigError, *texts):
        build(cls=unloadable("grpo"))


def test_notes_are_printed_and_do_not_stop(build: Any, plugin: Any, capfd: Any) -> None:
    cls = checking(Warn("mind the gap"), Recommend("beta", 0.5, "paper, table 9"), Recommend("beta", 0.0, "x"))
    with trl_ext.enable(plugin(cls)):
        notes = build()._trl_ext.plan.notes
    assert notes == ("checking: mind the gap", "checking recommends beta=0.5 (paper, table 9); it is 0.0")
    shown = " ".join(capfd.readouterr().err.split())
    assert shown.count("note: checking: mind the gap") == 1 and "recommends beta=0.5" in shown


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        (Require("scale_reward", ("none",), "why"), "asks about the setting 'scale_reward', which GRPOConfig lacks"),
        (Recommend("betta", 1, "x"), "asks about the setting 'betta', which GRPOConfig lacks"),
        (Need("whole_group"), "`configure` needs 'whole_group'. Did you mean 'whole_groups'?"),
        ("text", "`configure` returned 'text', not a requirement"),
    ],
)
def test_a_configure_that_is_wrong_itself(requirement: Any, expected: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(checking(requirement))), refused(PluginError, "plugin 'checking'", expected):
        build(cls=unloadable("grpo"))


def test_a_configure_that_fails_or_forgets_the_list(build: Any, plugin: Any) -> None:
    class Fails(Plugin):
        name = "fails"
        trainers = ("grpo",)

        @hookimpl
        def configure(self, config: Any) -> Any:
            return config.args.no_such_setting

    class Forgets(Plugin):
        name = "forgets"
        trainers = ("grpo",)

        @hookimpl
        def configure(self, config: Any) -> Any:
            return Warn("x")

    for cls, text in ((Fails, "no_such_setting"), (Forgets, "'Warn' object is not iterable")):
        with trl_ext.enable(plugin(cls)), refused(PluginError, f"{cls.name!r} failed in its hook 'configure'", text):
            build(cls=unloadable("grpo"))


def test_configure_cannot_change_the_arguments(build: Any, plugin: Any) -> None:
    class Meddles(Plugin):
        name = "meddles"
        trainers = ("grpo",)

        @hookimpl
        def configure(self, config: Any) -> None:
            config.args.learning_rate = 123.0
            assert config.plugins == ("meddles",) and config.kind == "grpo"
            assert config.reward_names == ("digits", "brevity") and "index" in config.columns

    with trl_ext.enable(plugin(Meddles)):
        assert build().args.learning_rate == 1e-2


@pytest.mark.parametrize(("size", "fits"), [(6, "4 or 8"), (2, "4"), (10, "8 or 12")])
def test_whole_groups_with_a_size_that_splits_them(size: int, fits: str, build: Any, plugin: Any) -> None:
    expected = f"per_device_train_batch_size={size} splits groups of num_generations=4; use {fits}"
    with trl_ext.enable(plugin(checking(needs=("whole_groups",)))), refused(ConfigError, expected):
        build(cls=unloadable("grpo"), per_device_train_batch_size=size, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"per_device_eval_batch_size": 6, "num_generations_eval": 3}, None),
        (
            {"per_device_eval_batch_size": 6},
            "per_device_eval_batch_size=6 splits groups of num_generations=4; use 4 or 8",
        ),
        (
            {"per_device_eval_batch_size": 5, "num_generations_eval": 3},
            "per_device_eval_batch_size=5 splits groups of num_generations_eval=3; use 3 or 6",
        ),
        ({"per_device_eval_batch_size": 6, "eval_strategy": "no"}, None),
    ],
)
def test_whole_groups_in_evaluation(settings: dict[str, int], expected: str | None, plugin: Any, tmp_path: Any) -> None:
    """On several processes TRL takes sizes that put a group on two of them."""
    args = tiny_args("grpo", tmp_path, eval_strategy="steps", eval_steps=1)
    for name, value in settings.items():
        setattr(args, name, value)
    specs = resolve({plugin(checking(needs=("whole_groups",))): None})
    with refused(ConfigError, expected) if expected else contextlib.nullcontext():
        make_plan(specs, Config("grpo", args, ("digits",), ("prompt",), ()))


@pytest.mark.parametrize("need", ["whole_groups", "old_logps", "tools", "reward:x"])
def test_needs_that_pairs_cannot_have(need: str, build: Any, plugin: Any) -> None:
    expected = f"checking: the DPO trainer cannot provide {need!r}; use GRPO or RLOO"
    with trl_ext.enable(plugin(checking(needs=(need,)))), refused(ConfigError, expected):
        build("dpo", cls=unloadable("dpo"))


def test_a_plugin_that_needs_tools(build: Any, plugin: Any) -> None:
    text = "checking: rollouts must be able to call tools; give the trainer `tools`, `environment_factory` or"
    with trl_ext.enable(plugin(checking(needs=("tools",)))):
        with refused(ConfigError, text):
            build(cls=unloadable("grpo"))
        with refused(ConfigError, "call tools, which RLOO does not support; use GRPO"):
            build("rloo", cls=unloadable("rloo"))
        # no chat template is asked for, as a rollout function renders conversations itself
        assert build(trainer={"rollout_func": lambda prompts, trainer: {}})._trl_ext.plan.needs == {
            "tools": ("checking",)
        }


def test_a_chat_template_that_loses_tool_calls(model: str, build: Any, plugin: Any) -> None:
    """Noticed with the tokenizer alone, where TRL loads the model first."""
    from transformers import AutoTokenizer

    def multiply(a: int, b: int) -> int:
        """Multiplies two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        return a * b

    def with_tokenizer_only(**arguments: Any) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(arguments["model"])
        return unloadable("grpo")(**arguments | {"processing_class": tokenizer})

    with trl_ext.enable(plugin(checking(needs=("tools",)))):
        with refused(
            ConfigError, "checking: rollouts", "loses a tool call or its result (a message of the role 'tool')"
        ):
            build(cls=with_tokenizer_only, trainer={"tools": [multiply]})
        with refused(ConfigError, "loses a tool call"):
            build(trainer={"tools": [multiply]})  # the tokenizer of a model that is named


def test_an_attached_plugin_asks_the_built_trainer_for_tools(build: Any, plugin: Any) -> None:
    with refused(ConfigError, "rollouts must be able to call tools"):
        trl_ext.attach(build(), plugin(checking(needs=("tools",))))
    trainer = build(trainer={"rollout_func": lambda prompts, trainer: {}})
    assert trl_ext.attach(trainer, plugin(checking(needs=("tools",)))) is trainer


def test_data_that_cannot_be_asked_for_columns(build: Any, plugin: Any) -> None:
    """Streams do not always know their columns; then the need is not refused before training."""
    stream = tiny_data().to_iterable_dataset()
    with trl_ext.enable(plugin(checking(needs=("column:index",)))):
        assert build(data=stream) is not None
