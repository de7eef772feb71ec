"""DECS as a plugin: edge cases, judges that fail, refusals, options and the company of other plugins."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trl_ext
from tests.refusals import refused, unloadable
from trl_ext.testing import brevity, digits, tiny_data
from trl_ext_hooks import Plugin, UsageError, hookimpl
from trl_ext_hooks.toolkit.judges import JudgeError
from trl_ext_plugins.decs import DECS


def curriculum_of(decs: DECS) -> dict[str, Any]:
    return {name: getattr(decs, name) for name in decs.state}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- edges ------------------------------------------------------------------------------------------------------------


def test_nan_rewards_are_left_out(run: Any, right: Any) -> None:
    def unsure(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
        return [None if row in (1, 12) else value for row, value in enumerate(right(completions, answer))]

    trainer = run(rewards=[unsure], curriculum=False)
    (round,) = trainer.rounds
    assert (round.advantages[[1, 12]] == 0).all()
    assert trainer.decs.chunks[1].verdicts == () and trainer.decs.chunks[0].verdicts
    assert math.isfinite(logged(trainer, "loss")[0])


def test_a_reward_that_scales_stays_binary(run: Any, right: Any) -> None:
    """An overlong penalty lowers the reward of right completions: they stay right above the threshold."""

    def penalised(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
        return [value - 0.01 * row if value else -0.5 for row, value in enumerate(right(completions, answer))]

    plain, scaled = run(curriculum=False).rounds[0], run(curriculum=False, rewards=[penalised]).rounds[0]
    assert torch.equal(plain.advantages, scaled.advantages)
    strict = run(curriculum=False, rewards=[penalised], correct_threshold=0.98).rounds[0]
    assert not torch.equal(plain.advantages, strict.advantages)


def test_the_answer_is_a_column_that_may_have_holes(run: Any) -> None:
    data = tiny_data().select(range(4)).remove_columns("answer")
    data = data.add_column("solution", ["0", None, "4", "  "])

    def right(completions: list[Any], **kwargs: Any) -> list[float]:
        return [0.0 if "no" in message[0]["content"] else 1.0 for message in completions]

    trainer = run(rewards=[right], data=data, answer_column="solution", curriculum=False)
    asked = [bool(chunk.verdicts) for chunk in trainer.decs.chunks]
    assert asked == [True] * 4 + [False] * 12
    assert logged(trainer, "decs/no_answer") == [6 / 10]
    with pytest.raises(trl_ext.ConfigError, match="decs: the training data has no column 'answer'"):
        run(rewards=[right], data=data)


def test_tool_results_neither_cut_nor_break(run: Any, plugin: Any) -> None:
    class Tools(Plugin):
        """The first chunk's words come from a tool, up to and with the first Wait."""

        name = "tools"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
            result = generate(prompts)
            texts = [message[0]["content"] for message in result.completions]
            masks = [[int(i >= text.find("Wait") + 4) for i in range(len(text))] for text in texts]
            return dataclasses.replace(result, tool_mask=masks)

    with_tools = run(curriculum=False, plugins=(plugin(Tools),))
    text = with_tools.rounds[0].completions[0][0]["content"]
    assert with_tools.decs.chunks[0].ends == (text.index(" Hmm"), text.index("</think>"))
    assert len(run(curriculum=False).decs.chunks[0].ends) == 3


def test_no_end_of_thinking_and_nothing_at_all(build: Any, plugin: Any, tokenizer: Any, script: Any) -> None:
    bare = type("Bare", (script,), {"script": [["try\n0\nso Wait, x\ny\nz", "", "Wait", "0"]]})
    with trl_ext.enable(plugin(bare), "decs", decs={"curriculum": False}):
        settings = {"max_completion_length": 32, "per_device_train_batch_size": 4, "max_steps": 1}
        trainer = build(
            rewards=[lambda completions, **kwargs: [1.0] * len(completions)],
            data=tiny_data().select([0]),
            trainer={"processing_class": tokenizer},
            **settings,
        )
        trainer.train()
        chunks = trainer._trl_ext.plugins["decs"].chunks
        (round,) = trainer._trl_ext.plugins["script"].rounds
    assert chunks[0].span == (8, 20)  # the whole text is thinking
    assert [chunk.ends for chunk in chunks[1:]] == [(0,), (4,), (1,)]
    assert (round.advantages[1] == 0).all() and (round.advantages[0, 8:20] < 0).all()


def test_evaluation(build: Any, plugin: Any, tokenizer: Any, script: Any, right: Any) -> None:
    """Whole groups, its own group size, and no step of the curriculum; a group of one has no baseline."""
    with trl_ext.enable(plugin(script), "decs"):
        settings = {"max_completion_length": 64, "max_steps": 1, "per_device_train_batch_size": 16}
        for size, expected in ((2, True), (1, False)):
            extra = {"eval_dataset": tiny_data().select([3]), "processing_class": tokenizer}
            trainer = build(
                rewards=[right], data=tiny_data().select(range(4)), trainer=extra, num_generations_eval=size, **settings
            )
            trainer.train()
            plugins = trainer._trl_ext.plugins
            before = curriculum_of(plugins["decs"])
            trainer.evaluate()
            last = plugins["script"].rounds[-1]
            assert last.mode == "eval" and last.loss_mask.any()
            assert curriculum_of(plugins["decs"]) == before
            assert all(chunk.verdicts for chunk in plugins["decs"].chunks)
            assert "eval_decs/prefix_ratio" in trainer.state.log_history[-1]
            assert (last.advantages == 0).all() or expected


# --- judges that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def unsure(monkeypatch: pytest.MonkeyPatch) -> str:
    """A judge without a verdict on chunks that begin with Wait."""
    module = types.ModuleType("judges_that_fail")

    def judge(questions: Any) -> list[bool | None]:
        return [None if "Wait" in question.text else question.answer in question.text for question in questions]

    def broken(questions: Any) -> list[bool | None]:
        raise KeyError("no such thing")

    module.judge, module.broken = judge, broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_a_judge_without_a_verdict_stops_the_run(run: Any, unsure: str) -> None:
    with pytest.raises(
        JudgeError, match=r"no verdict on \d+ of \d+ texts: it returned None.*decs.on_no_verdict=skip"
    ) as caught:
        run(judge=f"{unsure}:judge")
    assert "trl_ext plugin 'decs'" in "".join(caught.value.__notes__)


def test_or_is_counted_and_its_completions_have_no_span(run: Any, unsure: str) -> None:
    trainer = run(judge=f"{unsure}:judge", on_no_verdict="skip", curriculum=False)
    chunks = trainer.decs.chunks
    assert chunks[0].labels == "acc" and chunks[0].span  # what is missing comes after the answer
    assert chunks[2].verdicts == (False, None) and chunks[2].ratio == 0 and chunks[2].span is None
    assert logged(trainer, "decs/no_verdict")[0] > 0.2


def test_a_judge_that_raises_is_not_hidden(run: Any, unsure: str) -> None:
    with pytest.raises(KeyError, match="no such thing"):
        run(judge=f"{unsure}:broken", on_no_verdict="skip")


def test_a_server_that_is_down(run: Any) -> None:
    down = {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0, "timeout": 2}
    address = "http://127.0.0.1:9/v1/chat/completions"
    with pytest.raises(JudgeError, match=rf"no verdict on .* texts: {address}: ConnectionRefusedError"):
        run(judge=down)
    trainer = run(judge=down, on_no_verdict="skip", max_steps=2)
    assert logged(trainer, "decs/no_verdict") == [1.0, 1.0]
    assert trainer.decs.kappa == 0.0 and not any(chunk.span for chunk in trainer.decs.chunks)


def test_chunks_too_long_for_a_server_are_not_asked_about(run: Any) -> None:
    down = {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0, "timeout": 2}
    trainer = run(judge=down, judge_limit=10, curriculum=False)  # nothing is asked, so nothing fails
    assert {verdict for chunk in trainer.decs.chunks for verdict in chunk.verdicts} == {False}
    assert logged(trainer, "decs/judge_calls") == [0.0]


# --- declarations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [["4"], 0.5, "2 + 2 = 4\n#### 4"])
def test_what_is_no_final_answer_is_refused(answer: Any, build: Any, run: Any) -> None:
    data = tiny_data(rows=4).remove_columns("answer").add_column("answer", [answer] * 4)
    text = "decs: the column 'answer' should hold final answers, and it holds"
    with trl_ext.enable("decs"), refused(trl_ext.ConfigError, text, "set decs.answer_column to its name."):
        build(cls=unloadable("grpo"), data=data)
    stream = data.to_iterable_dataset()  # nothing is known before its rows come
    rewards = [lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))]]
    with refused(UsageError, "the column 'answer' should hold final answers, and it holds"):
        run(data=stream, rewards=rewards)


def test_refused_before_the_model_is_loaded(build: Any) -> None:
    from trl import GRPOTrainer

    def unloadable(**arguments: Any) -> Any:
        return GRPOTrainer(**arguments | {"model": "/no/such/model"})

    wrong = {"correct_reward": "righd", "judge": "no_such_module:judge", "answer_column": "truth"}
    with trl_ext.enable("decs", decs=wrong), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=unloadable, importance_sampling_level="sequence", loss_type="vespo", off_policy_mask_threshold=0.5)
    text = str(caught.value)
    for part in (
        "needs importance_sampling_level='token', it is 'sequence'",
        "needs loss_type='dapo' or 'bnpo' or",
        "needs off_policy_mask_threshold=None, it is 0.5",
        "no reward function is called 'righd'. Known: brevity, digits. Correct decs.correct_reward.",
        "has no column 'truth'",
        "'no_such_module:judge': importing 'no_such_module' failed",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_plus": 1.0}, "r_plus must be greater than r_zero"),
        ({"r_zero": 0.0}, "decs.r_zero: expected float, > 0, got 0.0"),
        ({"eps": 0.0}, "decs.eps: expected float, > 0, got 0.0"),
        ({"kappa_init": 1.0}, "decs.kappa_init: expected float, >= 0, < 1, got 1.0"),
        ({"kappa_lr": -0.1}, "decs.kappa_lr: expected float, >= 0, got -0.1"),
        ({"split_words": []}, "decs.split_words: expected a list of str, not empty"),
        ({"split_words": ["Wait", ""]}, "split_words must not contain an empty text"),
        ({"thinking_end": ""}, "decs.thinking_end: expected str, not empty"),
        ({"correct": "digits"}, "has no option 'correct'. Did you mean 'correct_reward'"),
        ({"correct_above": 0.5}, "has no option 'correct_above'"),
        ({"redundant_reward": "equation 9"}, "'official' or 'eq9'"),
        ({"judge": {"url": "nowhere", "model": "m"}}, "must begin with http"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=message):
        trl_ext.enable("decs", decs=options)


def test_what_several_rewards_mean_is_said(build: Any) -> None:
    with trl_ext.enable("decs"):
        notes = build(rewards=[digits, brevity], loss_type="grpo")._trl_ext.plan.notes
    assert "decs: 'digits', the first reward function, says what is right (decs.correct_reward)" in notes
    assert "decs recommends loss_type='dapo' (paper, eq. 3: a mean over tokens); it is 'grpo'" in notes
    assert any("the others are logged only" in note for note in notes)
    with trl_ext.enable(decs={"correct_reward": "brevity"}):
        notes = build(rewards=[digits, brevity])._trl_ext.plan.notes
    assert not any("first reward function" in note for note in notes)


def test_rloo_is_refused(build: Any) -> None:
    with (
        trl_ext.enable("decs"),
        pytest.raises(trl_ext.ConfigError, match="plugin 'decs' cannot serve the RLOO trainer"),
    ):
        build("rloo")


def test_together_with_shared_prefixes(run: Any) -> None:
    alone = run("easy", kappa_init=0.4, max_steps=2)
    shared = run("easy", kappa_init=0.4, max_steps=2, plugins=("shared-prefix",))
    for key in ("grad_norm", "entropy", "decs/kappa", "decs/prefix_ratio"):
        assert logged(shared, key) == pytest.approx(logged(alone, key), rel=1e-3), key
    assert min(logged(shared, "shared-prefix/token_ratio")) > 1.1


def test_the_recipe_is_a_trl_file_with_known_options() -> None:
    from trl.scripts.grpo import make_parser

    from trl_ext.catalog import find

    recipe = yaml.safe_load((Path(__file__).parents[3] / "recipes" / "decs.yaml").read_text())
    (spec,) = find.resolve(recipe.pop("plugins"))
    assert set(recipe.pop("experiment")) == {"about"}  # which trl_ext takes out, too
    assert spec.cls is DECS
    assert make_parser().set_defaults_with_config(**recipe) == []
