"""Runs that cannot work: refused before the model is loaded, or stopped in the first round. Nothing stays installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

import trl_ext
from trl_ext import CompatError, ConfigError, PluginError, api
from trl_ext.catalog.find import resolve
from trl_ext.plan.check import make_plan
from trl_ext.testing import digits, tiny_args, tiny_data
from trl_ext.trl_internals import seams
from trl_ext_hooks import (
    Config,
    Generation,
    Logps,
    Need,
    Plugin,
    PolicyLoss,
    Recommend,
    Refuse,
    Require,
    Rewards,
    Warn,
    hookimpl,
)

ROUNDS = ("grpo", "rloo")
CLASSES = {"grpo": GRPOTrainer, "rloo": RLOOTrainer, "dpo": DPOTrainer}


def unloadable(kind: str) -> Callable[..., Any]:
    """A trainer class whose model does not exist: only what is checked before loading can raise something else."""
    return lambda **arguments: CLASSES[kind](**arguments | {"model": "/no/such/model"})


@contextlib.contextmanager
def refused(kind: type[Exception], *texts: str) -> Iterator[None]:
    """The block raises exactly this error with these texts."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.type is kind
    for text in texts:
        assert text in str(caught.value), str(caught.value)


def checking(*requirements: Any, **attributes: Any) -> type[Plugin]:
    class Checking(Plugin):
        name = "checking"
        trainers = ("grpo", "rloo", "dpo")

        @hookimpl
        def configure(self, config: Any) -> Any:
            return requirements

    for key, value in attributes.items():
        setattr(Checking, key, value)
    return Checking


# --- before the model is loaded ---------------------------------------------------------------------------------------


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


class OwnLoss(Plugin):
    name = "own-loss"
    trainers = ROUNDS

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(-loss.advantages * loss.per_token_logps)


DROPPED = [
    ("beta", 0.1),
    ("top_entropy_quantile", 0.5),
    ("off_policy_mask_threshold", 0.5),
    ("entropy_coef", 0.01),
    ("use_adaptive_entropy", True),
    ("delta", 2.0),
    ("importance_sampling_level", "sequence"),
    ("loss_type", "grpo"),
    ("epsilon", 0.3),
    ("epsilon_high", 0.28),
]


@pytest.mark.parametrize(("setting", "value"), DROPPED)
def test_settings_that_a_replaced_loss_would_drop(setting: str, value: Any, build: Any, plugin: Any) -> None:
    from trl import GRPOConfig

    if not hasattr(GRPOConfig(use_cpu=True, bf16=False), setting):
        pytest.skip("this TRL has no such setting")
    expected = f"own-loss replaces the policy loss and does not apply {setting}={value!r}; set {setting}="
    with trl_ext.enable(plugin(OwnLoss)), refused(ConfigError, expected):
        build(cls=unloadable("grpo"), **{setting: value})

    class Honest(OwnLoss):
        name = "honest"
        honours = (setting,)

    with trl_ext.enable(plugin(Honest)):
        assert build(**{setting: value}) is not None


def test_rlos_kl_term_is_no_part_of_the_loss(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(OwnLoss)):
        build("rloo", beta=0.1, max_steps=1).train()


def test_the_correction_for_vllm_is_dropped_only_where_there_is_one(build: Any, plugin: Any) -> None:
    expected = "does not apply vllm_importance_sampling_correction=True; set vllm_importance_sampling_correction=False"
    with trl_ext.enable(plugin(OwnLoss)):
        with refused(ConfigError, expected):
            build(cls=unloadable("grpo"), use_vllm=True)
        for kind, settings in (("grpo", {"vllm_importance_sampling_correction": False}), ("rloo", {})):
            with pytest.raises(Exception, match=r"no/such/model|vllm"):  # what TRL itself says next
                build(kind, cls=unloadable(kind), use_vllm=True, **settings)


def test_a_subclass_of_the_arguments_may_have_other_defaults(plugin: Any) -> None:
    """The user asked for these values by choosing the class."""
    from dataclasses import dataclass

    from trl import GRPOConfig

    @dataclass
    class Mine(GRPOConfig):
        epsilon: float = 0.4

    config = Config("grpo", Mine(use_cpu=True, bf16=False, num_generations=4), ("digits",), ("prompt",), ())
    with refused(ConfigError, "does not apply epsilon=0.4; set epsilon=0.2"):
        make_plan(resolve({plugin(OwnLoss): None}), config)


class WithoutAdvantages(OwnLoss):
    name = "without-advantages"
    claims = ("no_advantages",)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("grpo", "scale_rewards", "batch"),
        ("grpo", "multi_objective_aggregation", "normalize_then_sum"),
        ("rloo", "beta", 0.05),
        ("rloo", "normalize_advantages", True),
        ("rloo", "reward_clip_range", (-1.0, 1.0)),
    ],
)
def test_settings_of_advantages_that_a_loss_leaves_unused(
    kind: str, setting: str, value: Any, build: Any, plugin: Any
) -> None:
    expected = f"without-advantages replaces the policy loss and does not apply {setting}={value!r}; set {setting}="
    with trl_ext.enable(plugin(WithoutAdvantages)):
        with refused(ConfigError, expected):
            build(kind, cls=unloadable(kind), **{setting: value})
        build("grpo", scale_rewards="none")
    settings = {"beta": 0.0} | ({} if kind == "grpo" else {setting: value})
    with trl_ext.enable(plugin(OwnLoss)):
        build(kind, **settings if setting != "beta" else {"beta": value})


def test_what_setup_refuses(build: Any, plugin: Any) -> None:
    events: list[str] = []

    class Late(Plugin):
        name = "late"
        trainers = ROUNDS

        @hookimpl
        def setup(self, trainer: Any) -> Any:
            yield Refuse(f"{trainer.processing_class.eos_token} is not to my taste.", "Take another model.")
            yield Refuse("Nor is the weather.", "Wait.")

        @hookimpl
        def teardown(self) -> None:
            events.append("teardown")

    class Wrong(Plugin):
        name = "wrong"
        trainers = ROUNDS

        @hookimpl
        def setup(self) -> Any:
            return [Warn("x")]

    texts = ["this run cannot work:\n", "  - late: <|im_end|> is not to my taste. Take another model.\n", "late: Nor"]
    with trl_ext.enable(plugin(Late)), refused(ConfigError, *texts):
        build()
    assert events == ["teardown"]
    with trl_ext.enable(plugin(Wrong)), refused(PluginError, "plugin 'wrong': `setup` returned Warn(message='x')"):
        build()


def test_a_plugin_that_needs_tools(build: Any, plugin: Any) -> None:
    text = "checking: rollouts must be able to call tools; give the trainer `tools`, `environment_factory` or"
    with trl_ext.enable(plugin(checking(needs=("tools",)))):
        with refused(ConfigError, text):
            build(cls=unloadable("grpo"))
        with refused(ConfigError, "call tools, which the RLOO trainer has not; use GRPO"):
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


# --- results of hooks -------------------------------------------------------------------------------------------------


def returning(hook: str, value: Any, **attributes: Any) -> type[Plugin]:
    """A plugin whose hook returns `value`, or `value(first argument)` when that can be called."""

    def made(self: Any, given: Any) -> Any:
        return value(given) if callable(value) else value

    argument = {"annotate": "rollout", "rewards": "scored", "loss_inputs": "batch", "select_rows": "rows"}
    argument |= {"advantages": "round", "batch_fields": "round", "round_metrics": "round"}
    parameter = argument.get(hook, "loss")
    scope: dict[str, Any] = {"made": made, "hookimpl": hookimpl, "Plugin": Plugin}
    exec(
        f"class Returning(Plugin):\n    name = 'returning'\n    trainers = ('grpo', 'rloo')\n"
        f"    @hookimpl\n    def {hook}(self, {parameter}): return made(self, {parameter})\n",
        scope,
    )
    for key, changed in attributes.items():
        setattr(scope["Returning"], key, changed)
    return scope["Returning"]


def nan_at(count: int) -> Callable[[Any], torch.Tensor]:
    def make(round: Any) -> torch.Tensor:
        out = round.advantages.clone()
        out[:count] = torch.nan
        return out

    return make


CASES: list[Any] = [
    ("select_rows", lambda rows: rows[:3], "returned 3 rows from 'select_rows', expected 8: as many as it got"),
    ("annotate", [1], "returned list from 'annotate', expected a mapping"),
    ("annotate", {"undeclared": [0] * 8}, "returned 'undeclared' from 'annotate' without declaring it"),
    ("annotate", {"mine": [0] * 3}, "annotated 'mine' with 3 values, expected one for each of 8 rows"),
    ("annotate", {"index": [0] * 8}, "annotated 'index', which is a column of the data already"),
    ("rewards", [[1.0, 2.0]] * 8, "returned list from 'rewards', expected a tensor or Rewards"),
    ("rewards", torch.zeros(8, 3), "returned rewards (8, 3) with 2 weights, expected (8, 2) and 2 for the columns"),
    ("rewards", torch.zeros(8), "returned rewards (8,) with 2 weights, expected (8, 2)"),
    ("rewards", Rewards(torch.zeros(8, 2), ("a", "b"), torch.ones(3)), "with 3 weights, expected (8, 2) and 2"),
    ("rewards", Rewards(torch.zeros(8, 1), ("a", "b"), torch.ones(2)), "returned rewards (8, 1) with 2 weights"),
    ("advantages", [0.0] * 8, "returned list from 'advantages', expected a tensor"),
    ("advantages", torch.zeros(7), "returned advantages (7,), expected (8,) for the rows of all processes"),
    ("advantages", torch.zeros(8, 3), "returned advantages (8, 3), expected (8,)"),
    ("advantages", torch.zeros(8, 8, 1), "returned advantages (8, 8, 1), expected (8,)"),
    ("advantages", nan_at(3), "returned 3 advantages that are not finite"),
    ("advantages", lambda round: round.advantages * torch.inf, "returned 8 advantages that are not finite"),
    ("batch_fields", 3, "returned int from 'batch_fields', expected a mapping"),
    ("batch_fields", {"undeclared": torch.zeros(8)}, "'undeclared' from 'batch_fields' without declaring it"),
    ("batch_fields", {"mine": torch.zeros(5)}, "returned (5,) for the batch field 'mine', expected a tensor with 8"),
    ("batch_fields", {"mine": [0.0] * 8}, "returned list for the batch field 'mine', expected a tensor with 8 rows"),
    ("batch_fields", {"advantages": torch.zeros(8)}, "the batch field 'advantages', which the trainer already has"),
    ("round_metrics", {"x": 1.0}, "reported 'x' as 1.0, expected a pair (sum, count)"),
    ("round_metrics", [("x", 1)], "returned list from 'round_metrics', expected a mapping"),
    ("loss_metrics", {"x": (1, 2, 3)}, "reported 'x' as (1, 2, 3), expected a pair (sum, count)"),
    ("loss_inputs", {"advantage": torch.zeros(8)}, "returned 'advantage' from 'loss_inputs'; the batch has prompt_ids"),
    ("loss_inputs", torch.zeros(8), "returned Tensor from 'loss_inputs', expected a mapping"),
    ("loss_terms", torch.zeros(()), "returned Tensor from 'loss_terms', expected a mapping"),
    ("loss_terms", {"x": 1.0}, "returned the loss term 'x' as float, expected a 0-d tensor or PolicyLoss"),
    ("loss_terms", {"x": torch.zeros(8)}, "returned the loss term 'x' as shape (8,), expected a 0-d tensor"),
    ("loss_terms", {"x": PolicyLoss(torch.zeros(8, 3))}, "a loss of shape (8, 3), expected a scalar or (8, 8)"),
    ("policy_loss", torch.zeros(()), "returned Tensor from 'policy_loss', expected PolicyLoss"),
    ("policy_loss", PolicyLoss(torch.zeros(8, 3)), "returned a loss of shape (8, 3), expected a scalar or (8, 8)"),
]


FIRST = {case[0]: case for case in reversed(CASES)}
WRONG = [pytest.param("grpo", *case, id=f"grpo-{case[0]}-{number}") for number, case in enumerate(CASES)]
WRONG += [pytest.param("rloo", *case, id=f"rloo-{hook}") for hook, case in FIRST.items()]


@pytest.mark.parametrize(("kind", "hook", "value", "expected"), WRONG)
def test_wrong_results_stop_the_first_round(
    kind: str, hook: str, value: Any, expected: str, build: Any, plugin: Any
) -> None:
    cls = returning(hook, value, fields=("mine", "index", "advantages"))
    with trl_ext.enable(plugin(cls)):
        trainer = build(kind)
        with refused(PluginError, expected):
            trainer.train()


def test_grpo_is_told_of_both_shapes_and_rloo_of_one(build: Any, plugin: Any) -> None:
    reference = plugin(returning("advantages", lambda round: round.token_advantages))
    with trl_ext.enable(reference):
        build("grpo", max_steps=1).train()
        with refused(PluginError, "returned advantages (8, 8), expected (8,) for the rows of all processes."):
            build("rloo").train()
    with (
        trl_ext.enable(plugin(returning("advantages", torch.zeros(3)))),
        refused(PluginError, "expected (8,) for the rows of all processes or (8, 8) for this process's tokens"),
    ):
        build().train()


def test_rows_after_tokens(build: Any, plugin: Any) -> None:
    class First(Plugin):
        name = "first"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round: Any) -> torch.Tensor:
            return round.token_advantages

    second = plugin(returning("advantages", torch.zeros(8)))
    expected = (
        "plugin 'returning' returned one advantage per row where an earlier plugin made one per token; return (8, 8)"
    )
    with trl_ext.enable(plugin(First), second), refused(PluginError, expected):
        build().train()


class BadForward(Plugin):
    name = "bad-forward"
    trainers = ROUNDS
    result: Any = None

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Any:
        return type(self).result(compute())


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (lambda logps: logps.per_token_logps, "returned Tensor from 'logps', expected Logps with (8, 8)"),
        (lambda logps: Logps(logps.per_token_logps[:, 1:]), "returned (8, 7) from 'logps', expected Logps with (8, 8)"),
        (lambda logps: Logps(logps.per_token_logps), "returned no entropies from 'logps', which the policy forward"),
    ],
)
def test_a_wrong_forward(result: Any, expected: str, build: Any, plugin: Any) -> None:
    class Bad(BadForward):
        pass

    Bad.result = staticmethod(result)
    with trl_ext.enable(plugin(Bad)), refused(PluginError, f"plugin 'bad-forward' {expected}"):
        build().train()


class BadRollout(Plugin):
    name = "bad-rollout"
    trainers = ROUNDS

    @hookimpl
    def rollout(self, prompts: Any, generate: Any) -> Any:
        result = generate(prompts)
        return Generation(result.prompt_ids, result.completion_ids[:2], result.completions, extra=result.extra)


def test_a_wrong_rollout(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(BadRollout)):
        trainer = build()
        with refused(PluginError, "'bad-rollout' returned 2 completions from 'rollout', expected a Generation with 8"):
            trainer.train()


def test_what_a_hook_raises_keeps_its_type_and_names_the_plugin(build: Any, plugin: Any) -> None:
    def fail(round: Any) -> None:
        raise ZeroDivisionError("by nothing")

    with trl_ext.enable(plugin(returning("advantages", fail))), pytest.raises(ZeroDivisionError) as caught:
        build().train()
    assert caught.value.__notes__ == ["raised in the hook 'advantages' of the trl_ext plugin 'returning'"]


def test_nothing_is_left_installed_after_an_error_in_training(build: Any, plugin: Any) -> None:
    from trl.trainer import grpo_trainer

    shuffle = grpo_trainer.shuffle_sequence_dict
    bad = returning("loss_terms", {"x": 1.0}, needs=("grouped_order",))
    with trl_ext.enable(plugin(bad)):
        trainer = build()
        with pytest.raises(PluginError):
            trainer.train()
    assert grpo_trainer.shuffle_sequence_dict is shuffle
    assert type(trainer) is GRPOTrainer and api._active is None
    build().train()


# --- a reward function of wrong length --------------------------------------------------------------------------------


def test_a_reward_function_of_wrong_length_fails_loudly(build: Any) -> None:
    def three(completions: Any, **kwargs: Any) -> list[float]:
        return [1.0] * 3

    with trl_ext.enable("gdpo"), pytest.raises((ValueError, RuntimeError)):
        build(rewards=[digits, three]).train()


# --- hooks that never fire --------------------------------------------------------------------------------------------


class OwnScores(GRPOTrainer):
    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        return torch.rand(len(prompts), len(self.reward_funcs))


class OwnTrainingLoss(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        return sum(p.sum() for p in model.parameters()) * 0.0


class Terms(Plugin):
    name = "terms"
    trainers = ("grpo",)

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        return None


class Rolls(Plugin):
    name = "rolls"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: Any, generate: Any) -> Any:
        return generate(prompts)


def test_an_override_that_is_in_front_of_ours_is_fine(build: Any, plugin: Any) -> None:
    """Our classes go in front of the user's, so an override below is wrapped like TRL's own method, and named."""
    with (
        trl_ext.enable("gdpo"),
        pytest.warns(UserWarning, match=r"OwnScores\._calculate_rewards replaces TRL's method"),
    ):
        trainer = build(cls=OwnScores)
    with trl_ext.enable("gdpo"), pytest.warns(UserWarning):
        trainer = build(cls=OwnScores)
        trainer.train()
    assert any("gdpo/zero_std/digits" in entry for entry in trainer.state.log_history)


class SkipsScoring(GRPOTrainer):
    """A whole round of its own, which never asks for rewards."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        rows = len(inputs)
        ids = torch.full((rows, 4), 50)
        ones = torch.ones(rows, 4, dtype=torch.long)
        batch = {"prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "completion_mask": ones}
        return {**batch, "advantages": torch.zeros(rows), "num_items_in_batch": ones.sum()}


def test_a_round_that_is_never_scored(build: Any, plugin: Any) -> None:
    with trl_ext.enable("gdpo"), pytest.warns(UserWarning, match=r"SkipsScoring\._generate_and_score_completions"):
        trainer = build(cls=SkipsScoring)
        with refused(PluginError, "SkipsScoring finished a round without scoring it", "so plugins gdpo cannot act"):
            trainer.train()


def test_hooks_that_never_ran_stop_the_run_after_the_first_step(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Rolls)), pytest.warns(UserWarning):
        trainer = build(cls=SkipsScoring)
        with refused(
            PluginError,
            "the first training step ended and these hooks never ran: rolls.rollout.",
            "A subclass that overrides TRL's private methods must call super()",
        ):
            trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_that_bypasses_the_log_probabilities(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Terms)), pytest.warns(UserWarning, match=r"OwnTrainingLoss\._compute_loss"):
        trainer = build(cls=OwnTrainingLoss)
        with refused(PluginError, "computed its loss without TRL's log-probability method, so terms cannot act"):
            trainer.train()


def test_two_replaced_losses(build: Any, plugin: Any) -> None:
    expected = "plugin 'own-loss' replaces the policy loss, and so does OwnTrainingLoss._compute_loss. Leave one out."
    with trl_ext.enable(plugin(OwnLoss)):
        with refused(ConfigError, expected):
            build(cls=OwnTrainingLoss)
        assert build().train() is not None


def test_an_override_that_calls_super_is_no_matter(build: Any, plugin: Any, recwarn: Any) -> None:
    class Polite(GRPOTrainer):
        def _calculate_rewards(self, *args: Any) -> Any:
            return super()._calculate_rewards(*args) * 2

    with trl_ext.enable("gdpo"):
        build(cls=Polite).train()
    assert not [entry for entry in recwarn if "replaces TRL's method" in str(entry.message)]


# --- TRL itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.9.3", "1.17.0", "2.0"])
def test_a_version_outside_the_range(version: str, build: Any, monkeypatch: Any) -> None:
    trainer = build()
    monkeypatch.setattr("trl.__version__", version)
    monkeypatch.delenv(seams.OVERRIDE, raising=False)
    expected = [f"trl {version} is outside the supported range >=1.10,<1.17", f"set {seams.OVERRIDE}=1 to try"]
    for way in (
        lambda: trl_ext.enable("gdpo"),
        lambda: trl_ext.attach(trainer, "gdpo"),
        lambda: trl_ext.extend(GRPOTrainer, "gdpo"),
    ):
        with refused(CompatError, *expected):
            way()
    assert api._active is None and type(trainer) is GRPOTrainer


def test_the_override_of_the_version(build: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("trl.__version__", "1.17.0")
    monkeypatch.setenv(seams.OVERRIDE, "1")
    with pytest.warns(UserWarning, match=r"outside the supported range.* Continuing because"), trl_ext.enable("gdpo"):
        build(max_steps=1).train()
    monkeypatch.setenv(seams.OVERRIDE, "yes")
    with refused(CompatError, "is outside the supported range"):
        trl_ext.enable("gdpo")


def test_a_missing_seam(build: Any, plugin: Any, monkeypatch: Any) -> None:
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    texts = [
        f"trl {seams.trl_version()} cannot be extended",
        "GRPOTrainer._calculate_rewards is missing (needed by: advantages, rewards)",
        "Tested: trl 1.10.0",
    ]
    for way in (lambda: trl_ext.enable("gdpo"), lambda: trl_ext.extend(GRPOTrainer, "gdpo")):
        with refused(CompatError, *texts):
            way()
    assert api._active is None
    trl_ext.enable(plugin(Terms)).disable()  # does not need that one
    monkeypatch.delattr(GRPOTrainer, "_save_checkpoint")
    trl_ext.enable(plugin(Terms)).disable()  # inherited from transformers


def test_a_seam_with_other_parameters(plugin: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, batch: None)
    with refused(CompatError, "GRPOTrainer._compute_loss lacks the parameter 'inputs' (needed by: loss_terms)"):
        trl_ext.enable(plugin(Terms))
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, *args, **kwargs: None)
    trl_ext.enable(plugin(Terms)).disable()


def test_a_missing_function_of_the_module(plugin: Any, monkeypatch: Any) -> None:
    monkeypatch.delattr("trl.trainer.grpo_trainer.shuffle_sequence_dict")
    expected = "trl.trainer.grpo_trainer.shuffle_sequence_dict is missing (needed by: grouped_order)"
    with refused(CompatError, expected):
        trl_ext.enable(plugin(checking(needs=("grouped_order",), trainers=("grpo",))))
    trl_ext.enable("gdpo").disable()


def test_a_seam_that_everything_needs(monkeypatch: Any) -> None:
    monkeypatch.setattr(GRPOTrainer, "training_step", None)
    with refused(CompatError, "GRPOTrainer.training_step is missing (needed by: every plugin)"):
        trl_ext.enable("gdpo")


def test_generation_with_another_layout(build: Any, plugin: Any, monkeypatch: Any) -> None:
    original = GRPOTrainer._generate
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda self, prompts: (*original(self, prompts), None))
    with trl_ext.enable(plugin(Rolls)):
        trainer = build()
        with refused(CompatError, "GRPO generation returned 9 values, expected 8"):
            trainer.train()


def test_another_trainer_class() -> None:
    with refused(ConfigError, "dict is none of TRL's GRPOTrainer, RLOOTrainer and DPOTrainer, nor a subclass"):
        trl_ext.extend(dict, "gdpo")


def test_data_that_cannot_be_asked_for_columns(build: Any, plugin: Any) -> None:
    """Streams do not always know their columns; then the need is not refused before training."""
    stream = tiny_data().to_iterable_dataset()
    with trl_ext.enable(plugin(checking(needs=("column:index",)))):
        assert build(data=stream) is not None
