"""OTC: its coefficients, the memory of fewest calls, and real runs with executed and with counted calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_ext
from trl_ext.testing import Scripted, calls, digits, metrics_of, reported, tiny_data, tiny_trainer
from trl_ext.tools import calculator
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_hooks.toolkit.prompt_memory import PromptMemory, prompt_key
from trl_ext_plugins.otc import falling_coefficient, fewest_calls, scale_rewards, tool_coefficient

NAN = math.nan
COUNTS = st.integers(0, 60)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def coefficient(m: int, n: float, c: float = 4, **settings: Any) -> float:
    return tool_coefficient(torch.tensor([m]), tensor(n), c, **settings).item()


# --- the mathematics --------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(COUNTS, st.one_of(COUNTS, st.just(NAN)), st.integers(0, 20))
def test_it_is_the_paper_s_equations(m: int, n: float, c: int) -> None:
    def paper() -> float:
        if math.isnan(n):
            return 1.0
        if m == 0 and n == 0:
            return 1.0
        if n == 0:
            return math.cos(m * math.pi / (2 * m + c))
        f = 2 * n * m / (m + n)
        return math.sin(f * math.pi / (2 * n))

    found = coefficient(m, n, c)
    assert found == pytest.approx(paper(), abs=1e-12)
    assert 0 <= found <= 1


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.integers(0, 20))
def test_the_closed_forms(m: int, c: int) -> None:
    found = falling_coefficient(torch.tensor([m]), c).item()
    if m or c:
        assert found == pytest.approx(math.cos(m * math.pi / (2 * m + c)), abs=1e-12)
    assert 0 <= found <= 1 and falling_coefficient(torch.tensor([0]), c).item() == 1
    if m:
        assert coefficient(m, m, c) == 1
        assert falling_coefficient(torch.tensor([m]), m).item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_one_maximum_at_n(n: int) -> None:
    found = tool_coefficient(torch.arange(40), torch.full((40,), float(n)), 4)
    assert found[0] == 0 and found[n] == 1 and int((found == found.max()).sum()) == 1
    assert (found[: n + 1].diff() > 0).all() and (found[n:].diff() < 0).all()
    assert found[-1] > 0


@pytest.mark.parametrize("c", [1, 3, 4, 20])
def test_without_a_needed_call_every_call_costs(c: int) -> None:
    m = torch.arange(40)
    found = tool_coefficient(m, torch.zeros(40), c)
    assert found[0] == 1 and (found.diff() < 0).all() and (found > 0).all()
    assert torch.equal(found, falling_coefficient(m, c))
    harsher = falling_coefficient(m, c + 1)
    assert (harsher[1:] > found[1:]).all()  # a larger c is milder


def test_the_numbers_of_the_paper_s_example() -> None:
    found = [round(coefficient(m, 1), 3) for m in range(1, 6)]
    assert found == [1, 0.866, 0.707, 0.588, 0.5]
    assert [round(value, 3) for value in falling_coefficient(torch.arange(5), 4).tolist()] == found


def test_prompts_that_nobody_solved() -> None:
    assert [coefficient(m, NAN) for m in (0, 3)] == [1, 1]
    assert [coefficient(m, NAN, unsolved="cos") for m in (0, 3)] == falling_coefficient(
        torch.tensor([0, 3]), 4
    ).tolist()
    assert coefficient(3, 2, unsolved="cos") == coefficient(3, 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(COUNTS, st.booleans(), st.integers(0, 3)), min_size=1, max_size=20))
def test_fewest_calls_is_a_loop_over_right_rollouts(rows: list[tuple[int, bool, int]]) -> None:
    found = fewest_calls(*(torch.tensor(column) for column in zip(*rows, strict=True)))
    for (_, _, group), value in zip(rows, found.tolist(), strict=True):
        right = [m for m, correct, other in rows if correct and other == group]
        assert value == min(right) if right else math.isnan(value)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=6))
def test_what_is_remembered_never_grows(steps: list[list[tuple[int, bool]]]) -> None:
    """And the local form differs exactly where the history is smaller."""

    class Step:
        mode = "train"

    memory, keys, history = PromptMemory(merge=min), torch.zeros(3, dtype=torch.long), math.inf
    for step in steps:
        counted, correct = (torch.tensor(column) for column in zip(*step, strict=True))
        local = fewest_calls(counted, correct, keys)
        n = torch.fmin(memory.recall(keys), local)
        memory.update(Step(), keys, local)  # type: ignore[arg-type]
        value = n[0].item()
        assert math.isnan(value) == math.isinf(min(history, local.nan_to_num(math.inf)[0].item()))
        assert not value > history
        assert (value != local[0].item() and not math.isnan(value)) == (history < local.nan_to_num(math.inf)[0].item())
        history = min(history, torch.tensor(value).nan_to_num(math.inf).item())


def test_rewards_are_scaled_linearly() -> None:
    rewards = torch.tensor([[1.0, 0.2], [0.0, -1.0], [NAN, 0.5]])
    factor = tensor(0.5, 0.25, 0.5)
    found = scale_rewards(rewards, factor)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.1], [0, -0.25], [NAN, 0.25]]), equal_nan=True)
    torch.testing.assert_close(scale_rewards(rewards, factor, 3.0), 3 * found, equal_nan=True)
    spared = scale_rewards(rewards, factor, 2.0, spare_negative=True)
    torch.testing.assert_close(spared, torch.tensor([[1.0, 0.2], [0, -2.0], [NAN, 0.5]]), equal_nan=True)
    assert scale_rewards(rewards[:, 0], factor).shape == (3,) and found.dtype == torch.float32


# --- runs whose rollouts are written down here ------------------------------------------------------------------------


class Look(Plugin):
    """Keeps every finished round."""

    name = "look"
    trainers = ("grpo", "rloo")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


Rows = list[dict[str, Any]]
Run = Callable[..., tuple[Any, list[Any]]]
REWARDS = [reported("right"), reported("form")]


@pytest.fixture
def scripted(build: Any, plugin: Any) -> Run:
    """Trains on scripted rounds of 8 rows, two prompts of 4; gives the trainer and its rounds."""

    def run(*rounds: Rows, options: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, list[Any]]:
        given = {"rollout_func": Scripted(*rounds), **settings.pop("trainer", {})}
        settings = {"data": tiny_data(rows=2), "shuffle_dataset": False, "rewards": REWARDS} | settings
        with trl_ext.enable(plugin(Look), otc={"c": 4, "calls_field": "turns", **(options or {})}):
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


def test_two_groups_of_one_prompt_share_their_memory(scripted: Run) -> None:
    same = tiny_data(rows=1)
    data = type(same).from_dict({**same.to_dict(), "prompt": same["prompt"]})
    from datasets import concatenate_datasets

    twice = concatenate_datasets([data, data])
    _, (round,) = scripted(solved(4, 4, 4, 4) + solved(2, 3, 3, 3), data=twice)
    assert round.rewards[:4, 0].tolist() == pytest.approx([math.sin(math.pi * 4 / 6)] * 4)
    ids = twice.add_column("uid", [1, 2])
    _, (round,) = scripted(solved(4, 4, 4, 4) + solved(2, 3, 3, 3), data=ids, options={"id_column": "uid"})
    assert round.rewards[:4, 0].tolist() == [1] * 4


def test_evaluation_uses_the_memory_and_leaves_it_alone(build: Any, plugin: Any) -> None:
    data = tiny_data(rows=2)
    script = Scripted(solved(3, 3, 4, 5) + solved(2, 2, 2, 2), [rollout(1, 1.0), rollout(5, 0.0, 1.0)])
    with trl_ext.enable(plugin(Look), otc={"c": 4, "calls_field": "turns"}):
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
        before = dict(session.plugins["otc"].memory._numbers)
        trainer.evaluate()
        evaluated = session.plugins["look"].rounds[-1]
        assert session.plugins["otc"].memory._numbers == before and sorted(before.values()) == [2, 3]
    assert evaluated.mode == "eval"
    # 1 call beats the remembered 3 and is worth everything; a wrong answer with 5 calls is measured with the 2
    assert evaluated.rewards[0, 0] == 1
    assert evaluated.rewards[1, 1].item() == pytest.approx(math.sin(math.pi * 5 / 7))
    assert logged(trainer, "eval_otc/n_mean") == [pytest.approx((1 + 2) / 2)]


def test_the_memory_survives_a_checkpoint(build: Any, plugin: Any, tmp_path: Path) -> None:
    """The first round solved the prompts with fewer calls than the second one needs."""
    low, high = solved(1, 2, 3, 4) + solved(2, 3, 4, 5), solved(4, 5, 6, 7) + solved(4, 5, 6, 7)

    def run(script: Scripted, resume: str | None = None) -> tuple[Any, list[Any]]:
        with trl_ext.enable(plugin(Look), otc={"c": 4, "calls_field": "turns"}):
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


def test_otc_first_then_gdpo(build: Any, plugin: Any) -> None:
    """GDPO normalises each multiplied reward on its own, whatever the order in which the two are named."""
    from trl_ext_plugins.gdpo import gdpo_advantages

    seen = []
    for order in (("otc", "gdpo"), ("gdpo", "otc")):
        with trl_ext.enable(*order, plugin(Look), otc={"c": 4, "calls_field": "turns"}):
            trainer = build(
                data=tiny_data(rows=2), rewards=REWARDS, trainer={"rollout_func": Scripted(FIRST)}, max_steps=1
            )
            trainer.train()
            (round,) = trainer._trl_ext.plugins["look"].rounds
        seen.append(round)
        expected = gdpo_advantages(round.rewards, torch.ones(2), round.group_ids)
        torch.testing.assert_close(round.advantages, expected)
    assert torch.equal(seen[0].rewards, seen[1].rewards) and 0 < seen[0].rewards[1, 0] < 1


# --- real tools, and none ---------------------------------------------------------------------------------------------


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


def test_executed_calls_set_the_rewards(calling: Any, plugin: Any) -> None:
    with trl_ext.enable("otc", plugin(Look), "shared-prefix"):  # c is max_tool_calling_iterations
        trainer = calling(data=tiny_data(rows=2), max_steps=3, learning_rate=1e-3)
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        rounds = trainer._trl_ext.plugins["look"].rounds
        remembered = trainer._trl_ext.plugins["otc"].memory._numbers
    known: dict[int, float] = {}
    for round in rounds:
        base = torch.tensor([answered(round.completions), digits(round.completions)]).T
        keys = [prompt_key(row["prompt"]) for row in round.rows]
        counted = [sum(message["role"] == "tool" for message in text) for text in round.completions]
        for key, m, correct in zip(keys, counted, base[:, 0].tolist(), strict=True):
            if correct:
                known[key] = min(known.get(key, math.inf), m)
        n = torch.tensor([known.get(key, NAN) for key in keys])
        expected = base * tool_coefficient(torch.tensor(counted), n, 2).unsqueeze(1)
        torch.testing.assert_close(round.rewards.double(), expected, atol=1e-6, rtol=0)
        assert len(set(counted)) > 1
    assert remembered == known and len(known) == 2
    frequency = logged(trainer, "tools/call_frequency")
    assert all(ours <= trls for ours, trls in zip(logged(trainer, "otc/tool_calls_mean"), frequency, strict=True))
    assert any((value - before[name]).abs().max() > 1e-5 for name, value in trainer.model.named_parameters())


def test_truncated_rollouts_are_only_wrong(calling: Any, plugin: Any) -> None:
    """A call that begins at once and its end are 61 tokens; nothing more fits, and no result does."""
    with trl_ext.enable("otc", plugin(Look)):
        trainer = calling(max_completion_length=61, mask_truncated_completions=True, max_steps=1, num_generations=8)
        trainer.train()
        (round,) = trainer._trl_ext.plugins["look"].rounds
    ended = torch.tensor([ids[-1] == trainer.processing_class.eos_token_id for ids in round.completion_ids])
    assert not ended.all() and torch.equal(round.loss_mask.sum(1) > 0, ended)
    assert (round.tool_calls == 0).all() and logged(trainer, "tools/call_frequency")[0] > 0
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


def test_calls_in_plain_text_under_rloo(train: Any, plugin: Any) -> None:
    """RLOO has no tools, so a tag is counted; here a letter stands for it."""
    settings = {"max_steps": 2, "beta": 0.0, "learning_rate": 0.05}
    plain = train("rloo", **settings)
    with trl_ext.enable(plugin(Look), otc={"c": 4, "call_tag": "<<<"}):  # nobody writes that
        silent = train("rloo", **settings)
    for name, value in plain.model.named_parameters():
        assert torch.equal(value, dict(silent.model.named_parameters())[name])
    with trl_ext.enable(plugin(Look), otc={"c": 2, "call_tag": "a", "mode": "ppo"}):
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
        ({"c": 0}, "c must be at least 1"),
        ({"alpha": 0.0}, "alpha must be greater than 0"),
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
