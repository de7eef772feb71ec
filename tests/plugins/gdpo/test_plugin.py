"""The declaration of GDPO: conditions, metrics, and what is refused before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import brevity, digits, metrics_of


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def rounds(trainer: Any) -> list[Any]:
    return trainer._trl_ext.plugins["look"].rounds


def test_conditioning_shows_in_the_logged_rewards(train: Any, look: str) -> None:
    rules = [{"target": "brevity", "given": "digits", "threshold": 0.2}]
    plain = train(max_steps=2)
    with trl_ext.enable("gdpo", look, gdpo={"conditions": rules}):
        trainer = train(max_steps=2)
        seen = rounds(trainer)
    for round, shown in zip(seen, logged(trainer, "rewards/brevity/mean"), strict=True):
        correct = round.rewards[:, 0] >= 0.2
        assert (round.rewards[~correct, 1] == 0).all() and (round.rewards[correct, 1] > 0).all()
        assert (~correct).any()
        assert shown == pytest.approx(round.rewards[:, 1].mean().item())
    assert logged(trainer, "rewards/brevity/mean") != logged(plain, "rewards/brevity/mean")
    assert logged(trainer, "rewards/digits/mean")[0] == logged(plain, "rewards/digits/mean")[0]


def test_one_reward_stays_plain_grpo_with_a_note(train: Any, capfd: Any) -> None:
    plain = train(rewards=[digits], max_steps=3)
    capfd.readouterr()
    with trl_ext.enable("gdpo"):
        trainer = train(rewards=[digits], max_steps=3)
        notes = trainer._trl_ext.plan.notes
    assert notes == ("gdpo: one reward function leaves nothing to decouple; advantages stay those of plain GRPO",)
    assert "one reward function leaves nothing to decouple" in " ".join(capfd.readouterr().err.split())
    for name, value in plain.model.named_parameters():
        assert torch.equal(value, dict(trainer.model.named_parameters())[name])
    own = [{k: v for k, v in entry.items() if not k.startswith("gdpo/")} for entry in metrics_of(trainer)]
    assert own == metrics_of(plain)


def test_zero_signal_metrics_count_rows_of_constant_groups(train: Any) -> None:
    def half(index: list[int], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        """Constant for one of the two prompts."""
        first = index[0]
        return [0.3 if i == first else float(n) for n, i in enumerate(index)]

    with trl_ext.enable("gdpo"):
        trainer = train(rewards=[half, brevity], max_steps=1)
    assert logged(trainer, "gdpo/zero_std/half") == [0.5]
    assert logged(trainer, "gdpo/zero_std/brevity") == [1.0]  # every completion has full length
    assert logged(trainer, "frac_reward_zero_std") == [0.5]


def test_rloo_is_refused_before_the_model_is_loaded(build: Any) -> None:
    with trl_ext.enable("gdpo"):
        expected = r"plugin 'gdpo' cannot serve the RLOO trainer; it serves grpo"
        with pytest.raises(trl_ext.ConfigError, match=expected):
            build("rloo", cls=lambda **arguments: _rloo(arguments))


def _rloo(arguments: dict[str, Any]) -> Any:
    from trl import RLOOTrainer

    return RLOOTrainer(**arguments | {"model": "/no/such/model"})


def test_wrong_settings_are_refused_before_the_model_is_loaded(build: Any) -> None:
    from trl import GRPOTrainer

    def unloadable(**arguments: Any) -> Any:
        return GRPOTrainer(**arguments | {"model": "/no/such/model"})

    with (
        trl_ext.enable("gdpo", gdpo={"conditions": [{"target": "length", "given": "digits"}]}),
        pytest.raises(trl_ext.ConfigError) as caught,
    ):
        build(cls=unloadable, reward_weights=[0.0, 0.0])
    text = str(caught.value)
    assert "no reward function is called 'length'. Known: brevity, digits. Correct gdpo.conditions." in text
    assert "all reward_weights are 0. Give at least one reward a weight." in text


@pytest.mark.parametrize("option", ["group_eps", "batch_eps"])
def test_an_epsilon_of_0_is_refused(option: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=f"gdpo.{option}: expected float, > 0, got 0"):
        trl_ext.enable("gdpo", gdpo={option: 0})
