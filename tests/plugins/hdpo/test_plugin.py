"""The rounds of HDPO: what each channel gets, and what is refused before training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused
from trl_ext.testing import Scripted, reported, tiny_args, tiny_data
from trl_ext_hooks import Config, Warn
from trl_ext_plugins.hdpo import (
    HDPO,
    accuracy_advantages,
)

Run = Callable[..., tuple[Any, list[Any]]]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same_weights(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_both_channels_of_a_round(scripted: Run, mixed: Any) -> None:
    trainer, (round,) = scripted(mixed)
    weights = torch.tensor([0.9, 0.1], dtype=torch.float64)
    expected = accuracy_advantages((round.rewards.double() * weights).sum(1), round.group_ids)
    torch.testing.assert_close(round.advantages.double(), expected, atol=1e-5, rtol=0)
    tool = round.batch["hdpo_tool_advantages"]
    third = torch.tensor([1, 1 / 3, 1 / 3])
    torch.testing.assert_close(tool[:3], (third - third.mean()) / (third.std() + 1e-6), atol=1e-5, rtol=0)
    assert tool[4].item() == pytest.approx(math.sqrt(0.5), abs=1e-4) and tool[5] == -tool[4]
    assert tool[[3, 6, 7]].tolist() == [0, 0, 0]
    # tokens that the model wrote, of rollouts with a signal and of all
    written = [3, 4, 3, 2, 3, 3, 2, 3]
    assert round.loss_mask.sum(1).tolist() == written
    assert round.batch["hdpo_tool_share"].item() == pytest.approx(16 / 23)
    assert logged(trainer, "reward")[0] == pytest.approx((0.9 * 5 + 0.1 * 6) / 8)
    assert logged(trainer, "rewards/right/mean")[0] == pytest.approx(5 / 8)
    for key, value in (("signal", 5 / 8), ("correct", 5 / 8), ("tool_rate", 6 / 8), ("tool_calls_mean", 17 / 8)):
        assert logged(trainer, f"hdpo/{key}") == [pytest.approx(value)], key
    assert logged(trainer, "hdpo/tool_calls_correct") == [pytest.approx(9 / 5)]


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo"])
@pytest.mark.parametrize("right", [(), (2,)], ids=["nobody", "one"])
def test_without_a_pair_of_right_answers(right: tuple[int, ...], loss_type: str, scripted: Run, rollout: Any) -> None:
    rows = [rollout(m, float(m in right), 1.0 if right else m % 2, 3 + m % 3) for m in range(8)]
    trainer, (round,) = scripted(rows, loss_type=loss_type)
    assert (round.batch["hdpo_tool_advantages"] == 0).all() and round.batch["hdpo_tool_share"] == 0
    assert logged(trainer, "hdpo/tool") == [0.0]
    plain, _ = scripted(rows, loss_type=loss_type, options={"w_tool": 0.0})
    same_weights(plain, trainer, 0.0)
    assert (round.advantages[:4] != 0).any()  # forms, or the right one, are still told apart


def test_correctness_that_does_not_apply(scripted: Run, mixed: Any, rollout: Any) -> None:
    """Such a rollout is neither right nor wrong: it is in no statistic, and has no advantage."""
    rows = [rollout(0, None), rollout(1, 1.0), rollout(3, 1.0), rollout(2, 0.0)]
    _, (round,) = scripted(rows + mixed[4:])
    assert round.advantages[0] == 0 and round.batch["hdpo_tool_advantages"][0] == 0
    valid = torch.tensor([1.0, 1.0, 0.1])
    torch.testing.assert_close(round.advantages[1:4], (valid - valid.mean()) / (valid.std() + 1e-6), atol=1e-5, rtol=0)
    assert round.batch["hdpo_tool_advantages"][1] > 0 > round.batch["hdpo_tool_advantages"][2]


def test_a_form_that_does_not_apply_counts_nothing(scripted: Run, mixed: Any, rollout: Any) -> None:
    rows = [rollout(0, 1.0, None), rollout(1, 1.0), rollout(3, 0.0), rollout(2, 0.0)]
    _, (round,) = scripted(rows + mixed[4:])
    values = torch.tensor([0.9, 1.0, 0.1, 0.1])
    torch.testing.assert_close(
        round.advantages[:4], (values - values.mean()) / (values.std() + 1e-6), atol=1e-5, rtol=0
    )


def test_more_rewards_join_the_accuracy_channel_by_their_weights(scripted: Run, mixed: Any, common: Any) -> None:
    third = reported("turns")
    _, (round,) = scripted(
        mixed, rewards=[third, *common["rewards"]], reward_weights=[0.01, 2.0, 1.0], options={"correct_reward": "right"}
    )
    assert round.reward_weights.tolist() == pytest.approx([0.01, 1.8, 0.1])
    total = (round.rewards.double() * torch.tensor([0.01, 1.8, 0.1])).sum(1)
    torch.testing.assert_close(
        round.advantages.double(), accuracy_advantages(total, round.group_ids), atol=1e-5, rtol=0
    )
    _, (plain,) = scripted(mixed)
    assert torch.equal(round.batch["hdpo_tool_advantages"], plain.batch["hdpo_tool_advantages"])


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [0.9, 0.1]),
        ({"correct_reward": "right"}, [0.9, 0.1]),
        ({"correct_reward": "form"}, [0.1, 0.9]),
        ({"w_ans": 0.75, "w_fmt": 0.25}, [0.75, 0.25]),
        ({"w_ans": 1.0, "w_fmt": 0.0}, [1.0, 1.0]),  # the trainer's own
    ],
)
def test_the_other_one_of_two_rewards_is_the_form(
    options: Any, weights: Any, scripted: Run, mixed: Any, capfd: Any
) -> None:
    _, (round,) = scripted(mixed, options={"format_reward": None, **options})
    assert round.reward_weights.tolist() == pytest.approx(weights)
    total = (round.rewards.double() * torch.tensor(weights).double()).sum(1)
    torch.testing.assert_close(
        round.advantages.double(), accuracy_advantages(total, round.group_ids), atol=1e-5, rtol=0
    )
    form = "form" if options.get("correct_reward") != "form" else "right"
    said = f"hdpo: {form!r} counts {options.get('w_fmt', 0.1):g}, as the reward of the form (hdpo.format_reward);"
    assert (said in " ".join(capfd.readouterr().err.split())) == (weights != [1.0, 1.0])


def test_the_weight_of_a_third_reward_must_be_clear(build: Any, common: Any) -> None:
    three = [*common["rewards"], reported("turns")]
    text = "hdpo: 'form' would count 1, and the reward of the answer 0.9. Set hdpo.format_reward if it judges the form,"
    with trl_ext.enable(hdpo={"calls_field": "turns"}):
        with refused(trl_ext.ConfigError, text):
            build(cls=unloadable, trainer=ROLLOUT, rewards=three)
        assert build(trainer=ROLLOUT, rewards=three, reward_weights=[1.0, 0.1, 0.5])  # said by the user
    with trl_ext.enable(hdpo={"calls_field": "turns", "w_ans": 1.0, "w_fmt": 0.0}):
        assert build(trainer=ROLLOUT, rewards=three)
    with (
        trl_ext.enable(hdpo={"calls_field": "turns", "format_reward": "form"}),
        refused(trl_ext.ConfigError, "hdpo: 'turns' would count 1, and the reward of the answer 0.9."),
    ):
        build(cls=unloadable, trainer=ROLLOUT, rewards=three)


def test_a_threshold_of_the_score(scripted: Run, mixed: Any, rollout: Any) -> None:
    rows = [rollout(0, 0.4), rollout(1, 0.6), rollout(2, 0.9), rollout(3, 0.5)]
    _, (round,) = scripted(rows + mixed[4:], options={"correct_threshold": 0.5})
    assert [value != 0 for value in round.batch["hdpo_tool_advantages"][:4].tolist()] == [False, True, True, False]


def test_a_group_of_one_in_evaluation_gives_nothing(
    build: Any, look: str, mixed: Any, common: Any, counted: Any
) -> None:
    data = tiny_data(rows=2)
    with trl_ext.enable(look, hdpo=counted):
        extra = {"rollout_func": Scripted(mixed, mixed[:2]), "eval_dataset": data}
        trainer = build(trainer=extra, num_generations_eval=1, data=data, **common)
        trainer.train()
        trainer.evaluate()
        last = trainer._trl_ext.plugins["look"].rounds[-1]
    assert last.mode == "eval" and last.advantages.tolist() == [0, 0]
    assert last.batch["hdpo_tool_advantages"].tolist() == [0, 0] and logged(trainer, "eval_hdpo/tool") == [0]


def test_evaluation_of_whole_groups(build: Any, look: str, mixed: Any, common: Any, counted: Any) -> None:
    data = tiny_data(rows=2)
    with trl_ext.enable(look, hdpo=counted):
        trainer = build(trainer={"rollout_func": Scripted(mixed), "eval_dataset": data}, data=data, **common)
        trainer.train()
        trainer.evaluate()
        first, last = trainer._trl_ext.plugins["look"].rounds
    assert torch.equal(first.batch["hdpo_tool_advantages"], last.batch["hdpo_tool_advantages"])
    assert torch.equal(first.batch["hdpo_tool_share"], last.batch["hdpo_tool_share"])
    assert math.isfinite(logged(trainer, "eval_loss")[0])


def test_otc_beside_hdpo_changes_accuracy_only(scripted: Run, mixed: Any) -> None:
    """HDPO reads correctness before OTC multiplies where it is named first, and warns where it is not."""
    _, (plain,) = scripted(mixed, options={"correct_threshold": 0.9})
    other = {"otc": {"c": 4, "calls_field": "turns"}}
    _, (both,) = scripted(mixed, options={"correct_threshold": 0.9}, also=[other])
    assert (both.rewards[:, 0] < 0.9)[plain.rewards[:, 0] == 1].any()
    assert torch.equal(both.batch["hdpo_tool_advantages"], plain.batch["hdpo_tool_advantages"])
    assert not torch.equal(both.advantages, plain.advantages)
    config = Config("grpo", tiny_args("grpo", "unused"), None, None, (), rewriters=("otc", "hdpo"))
    notes = [answer.message for answer in HDPO().configure(config) if isinstance(answer, Warn)]
    assert any(note.startswith("otc rewrites rewards before hdpo judges") for note in notes)


def test_truncated_rollouts_can_be_masked(scripted: Run, mixed: Any) -> None:
    """No scripted completion ends its turn but those made so; the others lose their tokens in both channels."""
    end = 3
    rows = [
        {**row, "completion_ids": [*row["completion_ids"][:-1], end]} if i % 2 else row for i, row in enumerate(mixed)
    ]
    trainer, (round,) = scripted(rows, mask_truncated_completions=True)
    assert trainer.processing_class.eos_token_id == end
    written = round.loss_mask.sum(1)
    assert written[::2].tolist() == [0] * 4 and (written[1::2] > 0).all()
    signal = round.batch["hdpo_tool_advantages"] != 0
    assert round.batch["hdpo_tool_share"].item() == pytest.approx(
        (written * signal).sum().item() / written.sum().item()
    )
    assert math.isfinite(logged(trainer, "loss")[0])


# --- runs that cannot work --------------------------------------------------------------------------------------------


def unloadable(**arguments: Any) -> Any:
    from trl import GRPOTrainer

    return GRPOTrainer(**arguments | {"model": "/no/such/model"})


ROLLOUT = {"rollout_func": lambda prompts, trainer: {}}


@pytest.mark.parametrize(
    ("options", "settings", "text"),
    [
        ({}, {"trainer": {}}, "hdpo: rollouts must be able to call tools; give the trainer `tools`"),
        (
            {"calls_field": None},
            {},
            "a rollout_func hold no tool messages, so no call would be counted. Set hdpo.calls_field",
        ),
        ({"correct_reward": "digit"}, {}, "called 'digit'. Did you mean 'digits'? Known: brevity, digits."),
        ({"format_reward": "form"}, {}, "hdpo: no reward function is called 'form'. Known: brevity, digits."),
        (
            {"format_reward": "digits"},
            {},
            "format_reward is 'digits', the first reward function, which judges the answer",
        ),
        (
            {},
            {"loss_type": "cispo", "epsilon_high": 5.0},
            "hdpo needs loss_type='dapo' or 'bnpo' or 'grpo' or 'dr_grpo'",
        ),
        ({}, {"top_entropy_quantile": 0.2}, "hdpo needs top_entropy_quantile=1.0, it is 0.2"),
        ({}, {"off_policy_mask_threshold": 0.5}, "hdpo needs off_policy_mask_threshold=None, it is 0.5"),
        ({}, {"scale_rewards": "none"}, "hdpo needs scale_rewards='group', it is 'none': HDPO normalises itself"),
        ({}, {"multi_objective_aggregation": "normalize_then_sum"}, "hdpo needs multi_objective_aggregation="),
    ],
)
def test_refused_before_the_model_is_loaded(options: Any, settings: Any, text: str, build: Any) -> None:
    given = {"calls_field": "turns", **options}
    with trl_ext.enable("hdpo", hdpo=given), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=unloadable, **{"trainer": ROLLOUT, **settings})
    assert text in str(caught.value)


def test_other_estimators_and_trainers_are_refused(build: Any) -> None:
    with pytest.raises(trl_ext.ConfigError, match="both claim estimator"):
        trl_ext.enable("hdpo", "gdpo")
    with (
        trl_ext.enable("hdpo"),
        pytest.raises(trl_ext.ConfigError, match="cannot serve the RLOO trainer; it serves grpo"),
    ):
        build("rloo")


def test_the_authors_dual_clip_is_recommended(build: Any) -> None:
    with trl_ext.enable(hdpo={"calls_field": "turns", "format_reward": "brevity"}):
        notes = build(trainer=ROLLOUT)._trl_ext.plan.notes
        assert notes == ("hdpo recommends delta=3.0 (authors' code: dual clip); it is None",)
        assert build(trainer=ROLLOUT, delta=3.0)._trl_ext.plan.notes == ()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"w_tool": -0.1}, "hdpo.w_tool: expected float, >= 0, got -0.1"),
        ({"w_ans": 0.5}, "w_ans and w_fmt must add up to 1, they give 0.6"),
        ({"w_ans": 0}, "hdpo.w_ans: expected float, > 0, got 0"),
        ({"eps": 0}, "hdpo.eps: expected float, > 0, got 0"),
        ({"correct_reward": "a", "format_reward": "a"}, "must be two reward functions"),
        ({"call_tag": "<call>", "calls_field": "turns"}, "call_tag and calls_field exclude each other"),
        ({"tool_loss_denominator": "some"}, "expected 'signal' or 'all'"),
    ],
)
def test_wrong_options(options: Any, text: str) -> None:
    with pytest.raises(trl_ext.OptionError) as caught:
        trl_ext.enable("hdpo", hdpo=options)
    assert text in str(caught.value)
