"""SPAE as a plugin: edge cases, views, refusals, options and the company of other plugins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trl_ext
from tests.refusals import refused, unloadable
from trl_ext import ConfigError
from trl_ext.testing import brevity, digits, tiny_data
from trl_ext_hooks import Plugin, UsageError, hookimpl
from trl_ext_plugins.spae import SPAE
from trl_ext_plugins.spae.maths import spae_advantages

STUB = "probers_of_spae:prober"


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_fewer_steps_are_evenly_thinned(run: Any, stub: Any) -> None:
    trainer = run(prober=STUB, max_steps_probed=2)
    text = trainer.rounds[0].completions[3][0]["content"]
    every = [i + 2 for i in range(len(text)) if text.startswith(".\n\n", i)]
    assert list(trainer.spae.steps[3].ends) == [every[1], every[3]]
    assert max(probe.step for probe in stub.asked) == 1


def test_steps_by_the_vocabulary(run: Any, stub: Any) -> None:
    """No entry of a vocabulary of letters ends with a whole paragraph."""
    trainer = run(prober=STUB, split="vocab")
    assert stub.asked == [] and logged(trainer, "spae/probes") == [0.0]
    assert (trainer.rounds[0].advantages[0] != 0).any()  # plain outcome advantages


def test_tool_results_end_no_step_and_count_nowhere(run: Any, plugin: Any, stub: Any) -> None:
    class Tools(Plugin):
        """The first paragraph comes from a tool."""

        name = "tools-first"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts: list[Any], generate: Any) -> Any:
            result = generate(prompts)
            masks = [[int(i > 4) for i in range(len(ids))] for ids in result.completion_ids]
            return dataclasses.replace(result, tool_mask=masks)

    trainer = run(prober=STUB, plugins=(plugin(Tools),))
    (round,) = trainer.rounds
    assert len(trainer.spae.steps[0].ends) == 2 and trainer.spae.steps[0].ends[0] > 4
    assert (round.advantages[:, :5] == 0).all()
    own = round.advantages[round.loss_mask.bool()]
    assert own.mean().item() == pytest.approx(0, abs=1e-6) and own.std().item() == pytest.approx(1, abs=1e-5)


def test_rows_without_an_answer_are_not_probed(run: Any, stub: Any) -> None:
    data = tiny_data().select(range(4)).remove_columns("answer").add_column("solution", ["0", None, "4", " "])
    with pytest.warns(UserWarning, match="rows without an answer in the column 'solution' are not probed"):
        trainer = run(
            prober=STUB,
            answer_column="solution",
            data=data,
            rewards=[lambda completions, **kwargs: [float("no" not in m[0]["content"]) for m in completions]],
        )
    assert {probe.row // 4 for probe in stub.asked} == {0}
    assert logged(trainer, "spae/no_answer") == [8 / 12]
    assert (trainer.rounds[0].advantages[4:8].abs().sum(1) > 0).all()  # f = 1, g = 0
    with pytest.raises(trl_ext.ConfigError, match="no column 'answer'"):
        run(prober=STUB, data=data)


def test_nan_rewards_and_truncated_completions(run: Any, stub: Any, right: Any) -> None:
    def unsure(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
        return [None if row == 1 else value for row, value in enumerate(right(completions, answer))]

    trainer = run(prober=STUB, rewards=[unsure])
    (round,) = trainer.rounds
    assert trainer.spae.steps[1].ends == () and (round.advantages[1] == 0).all() and not round.loss_mask[1].any()
    masked = run(prober=STUB, mask_truncated_completions=True)  # none of these ends with the end of the text
    assert not any(own.ends for own in masked.spae.steps) and (masked.rounds[0].advantages == 0).all()


def test_evaluation(build: Any, plugin: Any, tokenizer: Any, stub: Any, scripted: Any, right: Any) -> None:
    with trl_ext.enable(plugin(scripted), "spae", spae={"prober": STUB}):
        extra = {"eval_dataset": tiny_data().select([0, 1]), "processing_class": tokenizer}
        settings = {"max_completion_length": 40, "per_device_train_batch_size": 16, "max_steps": 1}
        data = tiny_data().select(range(4))
        trainer = build(rewards=[right], data=data, trainer=extra, num_generations_eval=2, **settings)
        trainer.train()
        trainer.evaluate()
        last = trainer._trl_ext.plugins["play"].rounds[-1]
    assert last.mode == "eval" and last.loss_mask.any(dim=1).all()
    assert "eval_spae/probes" in trainer.state.log_history[-1]


def test_together_with_shared_prefixes(run: Any) -> None:
    alone, shared = run(num_probes=0), run(num_probes=0, plugins=("shared-prefix",))
    assert logged(shared, "grad_norm") == pytest.approx(logged(alone, "grad_norm"), rel=1e-3)
    assert logged(shared, "spae/last_potential") == pytest.approx(logged(alone, "spae/last_potential"), abs=1e-5)
    assert logged(shared, "shared-prefix/token_ratio")[0] > 1.1


def test_steps_and_potentials_are_there_to_look_at(run: Any, stub: Any) -> None:
    trainer = run(prober=STUB)
    views = trainer.spae.inspect(round=trainer.rounds[0])
    own = trainer.spae.steps[0]
    spans = [span for span in views.spans if span.row == 0]
    assert [(span.start, span.end, span.label) for span in spans] == [
        (a, b + 1, f"step {k}")
        for k, (a, b) in enumerate(zip([0, *(e + 1 for e in own.ends)], own.ends, strict=False), 1)
    ]
    assert [span.value for span in spans] == own.potential
    curves = {curve.name: curve for curve in views.curves if curve.row == 0}
    assert list(curves) == ["potential", "Acc", "Conf"] and list(curves["Acc"].values) == list(own.acc)
    assert not [curve for curve in views.curves if curve.row == 2]  # no step, nothing to draw


def test_potentials_of_other_processes_stay_exact(run: Any, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is normalised is what was measured, in double precision."""
    seen: list[torch.Tensor] = []

    def spy(*args: Any, **settings: Any) -> torch.Tensor:
        seen.append(args[2])
        return spae_advantages(*args, **settings)

    monkeypatch.setattr("trl_ext_plugins.spae.plugin.spae_advantages", spy)
    trainer = run(prober=STUB)
    (potential,) = seen
    for row, steps in enumerate(trainer.spae.steps):
        assert potential[row, : len(steps.ends)].tolist() == steps.potential


# --- declarations -----------------------------------------------------------------------------------------------------


def test_a_prober_that_breaks_its_contract(run: Any, stub: Any) -> None:
    stub.prober = lambda probes: [(1.0, 1.0)]
    with pytest.raises(ValueError, match="the prober answered 1 of 22 probes") as caught:
        run(prober=STUB)
    assert "trl_ext plugin 'spae'" in "".join(caught.value.__notes__)


def test_whole_numbers_stored_as_floats_are_answers(run: Any, stub: Any) -> None:
    """A column of whole numbers with a hole, as data sets store it."""
    data = tiny_data().select(range(4)).remove_columns("answer").add_column("answer", [0.0, None, 4.0, None])
    rewards = [lambda completions, **kwargs: [float("no" not in m[0]["content"]) for m in completions]]
    with pytest.warns(UserWarning, match="rows without an answer"):
        trainer = run(prober=STUB, data=data, rewards=rewards)
    assert {probe.answer for probe in stub.asked} == {tuple(trainer.processing_class.encode("0"))}


@pytest.mark.parametrize("answer", [["4"], 0.5, "2 + 2 = 4\n#### 4"])
def test_what_is_no_final_answer_is_refused(answer: Any, build: Any, run: Any, stub: Any) -> None:
    data = tiny_data(rows=4).remove_columns("answer").add_column("answer", [answer] * 4)
    text = "spae: the column 'answer' should hold final answers, and it holds"
    with trl_ext.enable("spae"), refused(trl_ext.ConfigError, text, "set spae.answer_column to its name."):
        build(cls=unloadable("grpo"), data=data)
    stream = data.to_iterable_dataset()  # nothing is known before its rows come
    rewards = [lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))]]
    with refused(UsageError, "the column 'answer' should hold final answers, and it holds"):
        run(prober=STUB, data=stream, rewards=rewards)


def test_refused_before_the_model_is_loaded(build: Any) -> None:
    from trl import GRPOTrainer

    def unloadable(**arguments: Any) -> Any:
        return GRPOTrainer(**arguments | {"model": "/no/such/model"})

    wrong = {"prober": "no_such_module:prober", "answer_column": "truth"}
    with trl_ext.enable("spae", spae=wrong), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=unloadable, importance_sampling_level="sequence", loss_type="vespo", off_policy_mask_threshold=0.5)
    for part in (
        "needs importance_sampling_level='token', it is 'sequence'",
        "needs loss_type='dapo' or 'bnpo' or",
        "needs off_policy_mask_threshold=None, it is 0.5",
        "has no column 'truth'",
        "'no_such_module:prober': importing 'no_such_module' failed",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "spae.alpha: expected float, >= 0, <= 1, got 1.5"),
        ({"xi": -0.1}, "spae.xi: expected float, >= 0"),
        ({"eps_sat": 1.0}, "spae.eps_sat: expected float, > 0, < 1"),
        ({"num_probes": -1}, "spae.num_probes: expected int, >= 0"),
        ({"max_probe_tokens": 0}, "spae.max_probe_tokens: expected int, >= 1"),
        ({"probe_temperature": 0.0}, "spae.probe_temperature: expected float, > 0"),
        ({"max_steps_probed": 0}, "spae.max_steps_probed: expected int or null, >= 1"),
        ({"batch_tokens": 0}, "spae.batch_tokens: expected int, >= 1"),
        ({"eps": 0.0}, "spae.eps: expected float, > 0"),
        ({"probe": ""}, "spae.probe: expected str, not empty"),
        ({"thinking_end": ""}, "spae.thinking_end: expected str, not empty"),
        ({"tail_mode": "first"}, "'last' or 'next'"),
        ({"share": True}, "'auto' or 'always' or 'never'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=message):
        trl_ext.enable("spae", spae=options)


def test_advice_and_rloo(build: Any) -> None:
    with trl_ext.enable("spae"):
        notes = build(rewards=[digits, brevity], loss_type="grpo")._trl_ext.plan.notes
        assert any("loss_type='dapo'" in note for note in notes) and any("epsilon_high=0.28" in note for note in notes)
        with pytest.raises(trl_ext.ConfigError, match="plugin 'spae' cannot serve the RLOO trainer"):
            build("rloo")


def test_the_recipe_is_a_trl_file_with_known_options() -> None:
    from trl.scripts.grpo import make_parser

    from trl_ext.catalog import find

    recipe = yaml.safe_load((Path(__file__).parents[3] / "recipes" / "spae.yaml").read_text())
    (spec,) = find.resolve(recipe.pop("plugins"))
    assert set(recipe.pop("experiment")) == {"about"}  # which trl_ext takes out, too
    assert spec.cls is SPAE
    assert make_parser().set_defaults_with_config(**recipe) == []


def test_split_parameters_are_refused_before_the_model_is_loaded(
    build: Any, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless something else than the policy answers the probes."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with trl_ext.enable("spae"), refused(ConfigError, "spae: every process must hold all parameters, and FSDP splits"):
        build(cls=unloadable("grpo"))
    with trl_ext.enable("spae", spae={"prober": STUB}), pytest.raises(Exception, match="no/such/model"):
        build(cls=unloadable("grpo"))
