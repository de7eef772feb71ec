"""The rounds of OTC: rewards, metrics and memory of written rollouts, and what is refused before training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import Scripted, reported, tiny_data
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.otc import falling_coefficient

Rows = list[dict[str, Any]]


Run = Callable[..., tuple[Any, list[Any]]]


REWARDS = [reported("right"), reported("form")]


@pytest.fixture
def scripted(build: Any, look: str) -> Run:
    """Trains on scripted rounds of 8 rows, two prompts of 4; gives the trainer and its rounds."""

    def run(*rounds: Rows, options: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, list[Any]]:
        given = {"rollout_func": Scripted(*rounds), **settings.pop("trainer", {})}
        settings = {"data": tiny_data(rows=2), "shuffle_dataset": False, "rewards": REWARDS} | settings
        with trl_ext.enable(look, otc={"c": 4, "calls_field": "turns", **(options or {})}):
            trainer = build(max_steps=len(rounds), trainer=given, **settings)
            trainer.train()
            return trainer, trainer._trl_ext.plugins["look"].rounds

    return run


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def rollout(turns: int, right: float | None, form: float = 0.0) -> dict[str, Any]:
    return {"turns": turns, "right": right, "form": form}


def solved(*calls: int) -> Rows:
    """Right answers with these calls."""
    return [rollout(m, 1.0) for m in calls]


def failed(*calls: int, form: float = 0.0) -> Rows:
    return [rollout(m, 0.0, form) for m in calls]


FIRST = solved(2, 3, 4) + failed(1, form=0.5) + failed(0, 1, 2, 3, form=0.5)


SECOND = solved(5, 4) + failed(2, 0, form=0.5) + solved(3) + failed(3, 0, 6, form=0.5)


def test_a_round_after_the_other(scripted: Run) -> None:
    _, rounds = scripted(FIRST, SECOND)
    sine = [[math.sin(math.pi * m / (m + n)) for m in range(8)] for n in (1, 2, 3)]
    # the second prompt is unsolved in the first round, so its format rewards stay
    expected = [[1, 0], [sine[1][3], 0], [sine[1][4], 0], [0, 0.5 * sine[1][1]], *([[0, 0.5]] * 4)]
    torch.testing.assert_close(rounds[0].rewards, torch.tensor(expected))
    # in the second one the first prompt was solved with 2 calls, and the second one is by its own 3
    expected = [[sine[1][5], 0], [sine[1][4], 0], [0, 0.5], [0, 0], [1, 0], [0, 0.5], [0, 0], [0, 0.5 * sine[2][6]]]
    torch.testing.assert_close(rounds[1].rewards, torch.tensor(expected))
    # wrong answers without another reward get nothing whatever they call
    assert (rounds[0].rewards[:, 0][3:] == 0).all()
    for round in rounds:
        torch.testing.assert_close(round.advantages, group_normalize(round.rewards.sum(1), round.group_ids, eps=1e-4))


def test_metrics_speak_of_what_was_there_before(scripted: Run) -> None:
    trainer, rounds = scripted(FIRST, SECOND)
    assert logged(trainer, "otc/base/right") == pytest.approx([3 / 8, 3 / 8])
    assert logged(trainer, "otc/base/form") == pytest.approx([2.5 / 8, 2.5 / 8])
    assert logged(trainer, "rewards/right/mean") == pytest.approx([r.rewards[:, 0].mean().item() for r in rounds])
    assert logged(trainer, "rewards/right/mean")[0] < 3 / 8
    assert logged(trainer, "otc/tool_calls_mean") == pytest.approx([16 / 8, 23 / 8])
    assert logged(trainer, "otc/n_mean") == pytest.approx([2.0, 2.5])  # unsolved prompts have none
    assert logged(trainer, "otc/tool_productivity") == pytest.approx([3 / 16, 3 / 23])
    sines = [math.sin(math.pi * m / (m + 2)) for m in (2, 3, 4, 1)]
    assert logged(trainer, "otc/r_tool_mean")[0] == pytest.approx((sum(sines) + 4) / 8)


def test_the_local_form_forgets(scripted: Run) -> None:
    _, rounds = scripted(FIRST, SECOND, options={"n_scope": "local"})
    _, remembered = scripted(FIRST, SECOND)
    torch.testing.assert_close(rounds[0].rewards, remembered[0].rewards)
    assert rounds[1].rewards[1, 0] == 1  # 4 calls are the fewest of this group
    assert not torch.equal(rounds[1].rewards[:4], remembered[1].rewards[:4])
    torch.testing.assert_close(rounds[1].rewards[4:], remembered[1].rewards[4:])


def test_the_memory_helps_where_nobody_is_right(scripted: Run) -> None:
    nobody = failed(0, 1, 2, 4, form=1.0)
    _, rounds = scripted(solved(1, 2, 3, 4) + nobody, nobody + nobody)
    assert rounds[1].rewards[:4, 1].tolist() == pytest.approx(
        [0, 1, math.sin(math.pi * 2 / 3), math.sin(math.pi * 0.8)]
    )
    assert rounds[1].rewards[4:, 1].tolist() == [1, 1, 1, 1]  # never solved
    _, rounds = scripted(nobody + nobody, options={"unsolved": "cos"})
    torch.testing.assert_close(rounds[0].rewards[:4, 1].double(), falling_coefficient(torch.tensor([0, 1, 2, 4]), 4))


def test_groups_with_one_right_answer_and_with_equal_ones(scripted: Run) -> None:
    _, (round,) = scripted(failed(3, 0, 1) + solved(5) + solved(2, 2, 2, 2))
    assert round.rewards[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert (round.advantages[4:] == 0).all() and (round.advantages[:4] != 0).all()


def test_a_group_that_needs_no_call(scripted: Run) -> None:
    _, (round,) = scripted(solved(0, 1, 2) + failed(4) + solved(0, 0, 0, 0))
    expected = [*falling_coefficient(torch.arange(3), 4).tolist(), 0, 1, 1, 1, 1]
    assert round.rewards[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("policy", "expected"), [("literal", -0.5 * math.sin(math.pi * 0.8)), ("spare", -0.5)])
def test_negative_rewards(policy: str, expected: float, scripted: Run) -> None:
    rows = solved(1) + failed(4, form=-0.5) + failed(0, form=-0.5) + failed(1, form=0.5)
    _, (round,) = scripted(rows + rows, options={"negative_rewards": policy})
    assert round.rewards[1, 1].item() == pytest.approx(expected)
    assert round.rewards[2, 1].item() == pytest.approx(0 if policy == "literal" else -0.5)
    assert round.rewards[3, 1].item() == 0.5


def test_a_reward_that_does_not_apply(scripted: Run) -> None:
    """NaN is not right, stays NaN, and does not lower n."""
    rows = [rollout(0, None, 0.4), rollout(2, 1.0, 0.4), rollout(3, 1.0, 0.4), rollout(1, 0.0, 0.4)]
    _, (round,) = scripted(rows + rows)
    assert torch.isnan(round.rewards[0, 0]) and round.rewards[0, 1] == 0  # m = 0 < n = 2
    assert round.rewards[1, 0] == 1 and torch.isfinite(round.advantages).all()


def test_only_some_rewards_are_multiplied_and_rightness_is_read_before(scripted: Run) -> None:
    names = {"apply_to": ["form"], "correct_reward": "right", "correct_threshold": 0.9}
    rows = [rollout(3, 1.0, 0.5), rollout(1, 0.8, 0.5), rollout(4, 1.0, 0.5), rollout(0, 0.0, 0.5)]
    _, (round,) = scripted(rows + rows, options=names)
    assert round.rewards[:4, 0].tolist() == pytest.approx([1, 0.8, 1, 0])
    expected = [0.5 * math.sin(math.pi * m / (m + 3)) for m in (3, 1, 4, 0)]  # 0.8 is not right, so n = 3
    assert round.rewards[:4, 1].tolist() == pytest.approx(expected)


def test_the_form_for_single_trajectories(scripted: Run) -> None:
    _, (round,) = scripted(FIRST, options={"mode": "ppo", "c": 2, "alpha": 2.0})
    coefficients = falling_coefficient(torch.tensor([row["turns"] for row in FIRST]), 2)
    base = torch.tensor([[row["right"], row["form"]] for row in FIRST], dtype=torch.float64)
    torch.testing.assert_close(round.rewards.double(), 2 * base * coefficients.unsqueeze(1), atol=1e-6, rtol=0)


def test_alpha_cancels_in_the_group(scripted: Run) -> None:
    _, (first,) = scripted(FIRST, options={"alpha": 1.0})
    _, (other,) = scripted(FIRST, options={"alpha": 3.0})
    torch.testing.assert_close(other.rewards, 3 * first.rewards)
    torch.testing.assert_close(other.advantages, first.advantages, atol=2e-3, rtol=0)


def test_two_groups_of_one_task_share_their_memory(scripted: Run) -> None:
    data = tiny_data(rows=2).select([0, 0, 1])
    _, (round,) = scripted(solved(4, 4, 4, 4) + solved(2, 3, 3, 3), data=data)
    assert round.rewards[:4, 0].tolist() == pytest.approx([math.sin(math.pi * 4 / 6)] * 4)
    ids = data.add_column("uid", [1, 2, 3])
    _, (round,) = scripted(solved(4, 4, 4, 4) + solved(2, 3, 3, 3), data=ids, options={"id_column": "uid"})
    assert round.rewards[:4, 0].tolist() == [1] * 4


@pytest.mark.parametrize("column", ["seed", "answer"])
def test_one_prompt_with_two_tasks_has_two_numbers(column: str, scripted: Run) -> None:
    """An easy task, and one that takes two calls: at two calls its answers keep their reward."""
    data = tiny_data(rows=1).select_columns("prompt").select([0, 0]).add_column(column, ["1", "2"])
    easy = solved(0, 0, 0, 0)
    trainer, rounds = scripted(easy + solved(2, 2, 3, 2), solved(1, 0, 0, 0) + solved(2, 2, 2, 4), data=data)
    assert logged(trainer, "otc/n_mean") == [1.0, 1.0]
    assert rounds[0].rewards[:, 0].tolist() == pytest.approx([1, 1, 1, 1, 1, 1, math.sin(math.pi * 3 / 5), 1])
    assert rounds[1].rewards[4:, 0].tolist() == pytest.approx([1, 1, 1, math.sin(math.pi * 4 / 6)])
    # asked for, the prompt alone is the task
    _, (first,) = scripted(easy + solved(2, 2, 3, 2), data=data, options={"id_column": "prompt"})
    assert (first.rewards[4:, 0] < 1).all()


def test_evaluation_uses_the_memory_and_leaves_it_alone(build: Any, look: str) -> None:
    data = tiny_data(rows=2)
    script = Scripted(solved(3, 3, 4, 5) + solved(2, 2, 2, 2), [rollout(1, 1.0), rollout(5, 0.0, 1.0)])
    with trl_ext.enable(look, otc={"c": 4, "calls_field": "turns"}):
        trainer = build(
            data=data,
            rewards=REWARDS,
            trainer={"rollout_func": script, "eval_dataset": data},
            num_generations_eval=1,
            max_steps=1,
            shuffle_dataset=False,
        )
        trainer.train()
        session = trainer._trl_ext
        before = dict(session.plugins["otc"].memory._entries)
        trainer.evaluate()
        evaluated = session.plugins["look"].rounds[-1]
        assert session.plugins["otc"].memory._entries == before and sorted(before.values()) == [2, 3]
    assert evaluated.mode == "eval"
    # 1 call beats the remembered 3 and is worth everything; a wrong answer with 5 calls is measured with the 2
    assert evaluated.rewards[0, 0] == 1
    assert evaluated.rewards[1, 1].item() == pytest.approx(math.sin(math.pi * 5 / 7))
    assert logged(trainer, "eval_otc/n_mean") == [pytest.approx((1 + 2) / 2)]


def test_the_memory_survives_a_checkpoint(build: Any, tmp_path: Path, look: str) -> None:
    """The first round solved the prompts with fewer calls than the second one needs."""
    low, high = solved(1, 2, 3, 4) + solved(2, 3, 4, 5), solved(4, 5, 6, 7) + solved(4, 5, 6, 7)

    def run(script: Scripted, resume: str | None = None) -> tuple[Any, list[Any]]:
        with trl_ext.enable(look, otc={"c": 4, "calls_field": "turns"}):
            trainer = build(
                data=tiny_data(rows=2),
                rewards=REWARDS,
                trainer={"rollout_func": script},
                output=tmp_path / "run",
                shuffle_dataset=False,
                save_strategy="steps",
                save_steps=1,
            )
            trainer.train(resume_from_checkpoint=resume)
            return trainer, trainer._trl_ext.plugins["look"].rounds

    whole, rounds = run(Scripted(low, high))
    resumed, after = run(Scripted(high), str(tmp_path / "run" / "checkpoint-1"))
    assert rounds[1].rewards[0, 0].item() == pytest.approx(math.sin(math.pi * 4 / 5))
    assert torch.equal(after[0].rewards, rounds[1].rewards)
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name])


def test_otc_first_then_gdpo(build: Any, look: str) -> None:
    """GDPO normalises each multiplied reward on its own, whatever the order in which the two are named."""
    from trl_ext_plugins.gdpo import gdpo_advantages

    seen = []
    for order in (("otc", "gdpo"), ("gdpo", "otc")):
        with trl_ext.enable(*order, look, otc={"c": 4, "calls_field": "turns"}):
            trainer = build(
                data=tiny_data(rows=2), rewards=REWARDS, trainer={"rollout_func": Scripted(FIRST)}, max_steps=1
            )
            trainer.train()
            (round,) = trainer._trl_ext.plugins["look"].rounds
        seen.append(round)
        expected = gdpo_advantages(round.rewards, torch.ones(2), round.group_ids)
        torch.testing.assert_close(round.advantages, expected)
    assert torch.equal(seen[0].rewards, seen[1].rewards) and 0 < seen[0].rewards[1, 0] < 1


# --- runs that cannot work --------------------------------------------------------------------------------------------


def unloadable(**arguments: Any) -> Any:
    from trl import GRPOTrainer

    return GRPOTrainer(**arguments | {"model": "/no/such/model"})


@pytest.mark.parametrize(
    ("options", "settings", "text"),
    [
        ({}, {}, "otc: max_tool_calling_iterations is not set, so c is unknown. Set otc.c"),
        (
            {"c": 4, "correct_reward": "digit"},
            {},
            "otc: no reward function is called 'digit'. Did you mean 'digits'? Known: brevity, digits.",
        ),
        ({"c": 4, "apply_to": ["digits", "breviti"]}, {}, "called 'breviti'. Did you mean 'brevity'?"),
        ({"c": 4, "id_column": "uid"}, {}, "otc: the training data has no column 'uid'; it has prompt, answer, index"),
        (
            {"c": 4},
            {"trainer": {"rollout_func": lambda prompts, trainer: {}}},
            "otc: completions of a rollout_func hold no tool messages, so no call would be counted. Set otc.calls_fie",
        ),
    ],
)
def test_refused_before_the_model_is_loaded(options: Any, settings: Any, text: str, build: Any) -> None:
    with trl_ext.enable("otc", otc=options), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=unloadable, **settings)
    assert text in str(caught.value)


def test_images_need_an_id(build: Any) -> None:
    data = tiny_data(rows=8).add_column("image", ["x"] * 8)
    with trl_ext.enable("otc", otc={"c": 4}), pytest.raises(trl_ext.ConfigError, match=r"images.*Set otc\.id_column"):
        build(cls=unloadable, data=data)


def test_rloo_must_be_told_what_a_call_is(build: Any) -> None:
    text = r"the RLOO trainer has no tool loop, so no tool message exists\. Set otc\.call_tag\."
    with trl_ext.enable("otc", otc={"c": 4}), pytest.raises(trl_ext.ConfigError, match=text):
        build("rloo")
    with trl_ext.enable("otc", otc={"call_tag": "<call>"}), pytest.raises(trl_ext.ConfigError, match="has no limit of"):
        build("rloo")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"c": 0}, "otc.c: expected int or null, >= 1, got 0"),
        ({"alpha": 0.0}, "otc.alpha: expected float, > 0, got 0.0"),
        ({"call_tag": "<call>", "calls_field": "turns"}, "call_tag and calls_field exclude each other"),
        ({"mode": "dpo"}, "expected 'grpo' or 'ppo'"),
        ({"max_calls": 4}, "plugin 'otc' has no option 'max_calls'"),
    ],
)
def test_wrong_options(options: Any, text: str) -> None:
    with pytest.raises(trl_ext.OptionError) as caught:
        trl_ext.enable("otc", otc=options)
    assert text in str(caught.value)


def test_a_rollout_function_that_does_not_report_its_calls(scripted: Run) -> None:
    with pytest.raises(
        KeyError, match="row 0 has no field 'calls' with its number of tool calls; it has answer"
    ) as caught:
        scripted(FIRST, options={"calls_field": "calls"})
    assert "plugin 'otc'" in "".join(caught.value.__notes__)
