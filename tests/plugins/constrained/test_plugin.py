"""The constrained objective as a plugin: what it makes of a round, its state on every process, and its refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import trl_ext
from tests.engine.stages.ranks import Ranks, RankView
from tests.refusals import refused, unloadable
from trl_ext.errors import OptionError
from trl_ext_hooks import Round
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.constrained import Constrained

NAN = math.nan
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = torch.tensor([[0.1, 3.0, 1.0], [0.6, 1.0, NAN], [0.5, 2.0, 0.0], [0.9, 0.0, 0.0], [0.2, 5.0, 1.0], [NAN] * 3])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0])


class Alone:
    """A trainer's view of the only process."""

    process_index, num_processes = 0, 1

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def made(view: Any = None, rewards: torch.Tensor = REWARDS, mode: str = "train") -> Round:
    view = view or Alone()
    count = len(rewards) // view.num_processes
    own = slice(view.process_index * count, (view.process_index + 1) * count)
    generator = torch.Generator().manual_seed(0)
    old, reference = (-torch.rand(len(rewards), 4, generator=generator) for _ in range(2))
    mask = torch.ones(len(rewards), 4, dtype=torch.long)
    mask[1, 2:] = 0
    batch = {"completion_mask": mask, "old_per_token_logps": old, "ref_per_token_logps": reference}
    values: dict[str, Any] = dict.fromkeys(("rows", "prompts", "completions", "completion_ids"), [""] * count)
    values |= {"mode": mode, "step": 0, "num_generations": 3, "tool_mask": None, "fields": {}, "gathered": {}}
    values |= {"offset": own.start, "trainer": view, "group_ids": GROUPS, "rewards": rewards}
    values |= {"reward_names": ("share", "length", "format"), "reward_weights": WEIGHTS}
    values |= {"advantages": torch.zeros(len(rewards)), "gathered_lengths": mask.sum(1)}
    return Round(**values, batch={name: tensor[own] for name, tensor in batch.items()})


def plugin(**options: Any) -> Constrained:
    return Constrained(Constrained.Options(**{"thresholds": {"length": 2.5, "share": 0.4}} | options))


@pytest.mark.parametrize("form", ["equality", "inequality", "unsquashed"])
def test_the_mixture_of_a_round(form: Any) -> None:
    """The KL of a row counts the tokens of the loss, and a reward without a threshold belongs to the objective."""
    round = made()
    gap = round.batch["old_per_token_logps"].double() - round.batch["ref_per_token_logps"].double()
    divergence = (gap * round.loss_mask).sum(1)
    divergence[5] = NAN  # the row without a reward is in no statistic
    near = group_normalize(-divergence, GROUPS).nan_to_num(nan=0.0)
    share, length, format_ = (group_normalize(column.double(), GROUPS).nan_to_num(nan=0.0) for column in REWARDS.T)
    squash = {"equality": math.tanh(0.5), "inequality": 1 / (1 + math.exp(-0.5)), "unsquashed": 0.5}[form]
    factor = 1.0 if form == "unsquashed" else 2 - 2 * squash
    expected = factor * (near + 2 * format_) + squash * (share + 0.5 * length)
    expected[5] = 0.0
    ours = plugin(form=form, initial=0.5).advantages(round)
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=0)
    assert ours.dtype == torch.float32 and expected.abs().max() > 0.5
    without = plugin(form=form, initial=0.5, kl=False).advantages(made())
    torch.testing.assert_close(without.double(), expected - factor * near.masked_fill(REWARDS.isnan().all(1), 0.0))


def test_multipliers_move_once_per_round_of_training() -> None:
    ours = plugin()
    assert not ours.advantages(made(mode="eval")).isnan().any() and ours.mu.tolist() == [0.0, 0.0]
    round = made()
    ours.advantages(round)
    # lengths are 2.2 on average, shares 0.46, and the norm of both is below the bound
    assert ours.mu.tolist() == pytest.approx([0.03, -0.006], abs=1e-6)
    logged = round.metric_log.values
    assert logged["/multiplier/length"] == (0.0, 1.0) and logged["/violation/length"][0] == pytest.approx(-0.3)
    assert logged["/violation/share"][0] == pytest.approx(0.06) and logged["/kl"][1] == 5.0
    before = ours.mu.clone()
    ours.advantages(made(rewards=REWARDS * torch.tensor([NAN, 1.0, 1.0])))
    assert ours.mu[1] == before[1] and ours.mu[0] > before[0]


def test_standardising_over_the_batch_makes_a_rare_signal_as_large_as_others() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0]] * 3 + [[0.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 3.0, 0.0]])
    options = {"thresholds": {"length": 1.0}, "form": "unsquashed", "initial": 1.0, "kl": False}
    plain, ours = (plugin(**options, batch_norm=on).advantages(made(rewards=rewards)) for on in (False, True))
    weighed = ours / 0.5  # by the trainer's weight of that reward
    assert weighed.double().std().item() == pytest.approx(1.0, abs=1e-3) and plain.std() < 0.5 * 0.8


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_number_of_processes_gives_the_same_advantages_and_multipliers(count: int) -> None:
    ranks, whole = Ranks(count), plugin()
    expected = [whole.advantages(made()) for _ in range(2)]

    def work(rank: int) -> Any:
        ours = plugin()
        return [ours.advantages(made(RankView(ranks, rank))) for _ in range(2)], ours.mu, ours.velocity

    for results in ranks.run(work):
        assert not isinstance(results, Exception), results
        found, mu, velocity = results
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert torch.equal(mu, whole.mu) and torch.equal(velocity, whole.velocity)


def test_wrong_settings_are_refused_before_the_model_is_loaded(build: Any) -> None:
    def builds(options: dict[str, Any], **settings: Any) -> None:
        with trl_ext.enable(constrained=options):
            build(cls=unloadable("grpo"), **settings)

    with refused(trl_ext.ConfigError, "constrained: no reward has a threshold. Set one, such as --set constrained."):
        builds({})
    with refused(trl_ext.ConfigError, "no reward function is called 'length'", "Correct constrained.thresholds"):
        builds({"thresholds": {"length": 0.4}})
    with refused(OptionError, "the threshold of digits must be a finite number, got nan."):
        builds({"thresholds": {"digits": NAN}})
    with refused(OptionError, "initial must be from 0 to 5, got -1."):
        builds({"thresholds": {"digits": 0.4}, "form": "unsquashed", "initial": -1.0})


def test_a_second_kl_is_warned_of(build: Any) -> None:
    with trl_ext.enable(constrained={"thresholds": {"digits": 0.4}}):
        assert "beta=0.1 adds the KL to the loss again" in build(beta=0.1)._trl_ext.plan.notes[0]
        assert not build()._trl_ext.plan.notes
    with trl_ext.enable(constrained={"thresholds": {"digits": 0.4}, "kl": False}):
        assert not build(beta=0.1)._trl_ext.plan.notes
