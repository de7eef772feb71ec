"""VL-DAC: the value network, and episodes from turns."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from trl_ext_hooks import Turns
from trl_ext_plugins.vl_dac.critic import Critic, ValueHead
from trl_ext_plugins.vl_dac.episodes import cut_short, episodes
from trl_ext_plugins.vl_dac.episodes import reported as reported_turns
from trl_ext_plugins.vl_dac.maths import gae, value_loss

NAN = float("nan")

# --- the value network ------------------------------------------------------------------------------------------------


def test_the_head_is_the_same_everywhere_and_takes_no_random_number() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = ValueHead(6, (5, 4), seed=1), ValueHead(6, (5, 4), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert [tuple(p.shape) for p in one.parameters()] == [(5, 6), (5,), (4, 5), (4,), (1, 4), (1,)]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(ValueHead(6, (5, 4), seed=2).parameters()))


def test_values_are_float32_and_end_at_the_states() -> None:
    head = ValueHead(6, (5,), seed=0)
    states = torch.randn(3, 6, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(states)
    assert values.dtype == torch.float32 and values.shape == (3,)
    values.sum().backward()
    assert states.grad is None and all(p.grad is not None for p in head.parameters())
    assert head(torch.zeros(0, 6)).shape == (0,)


def test_gradients_are_averaged_over_processes() -> None:
    """Two processes, of which one has seen no step, end where one with the mean gradient does."""
    made = [Critic(ValueHead(4, (3,), seed=0), 0.1, torch.device("cpu")) for _ in range(3)]
    states = torch.randn(5, 4)
    (made[0].head(states) ** 2).mean().backward()
    sent = torch.cat([p.grad.reshape(-1).clone() for p in made[0].head.parameters()])  # type: ignore[union-attr]
    (0.5 * (made[2].head(states) ** 2).mean()).backward()
    norms = [critic.step(lambda own: sent.clone(), 2) for critic in made[:2]]
    alone = made[2].step(lambda own: own, 1)
    assert norms == pytest.approx([alone, alone])
    for critic in made[1:]:
        for a, b in zip(critic.head.parameters(), made[0].head.parameters(), strict=True):
            torch.testing.assert_close(a, b)
            assert a.grad is None
    assert made[1].state_dict()["optimizer"]["state"]


def test_a_critic_fits_what_it_sees() -> None:
    draw = torch.Generator().manual_seed(0)
    states, returns = torch.randn(16, 8, generator=draw), torch.randn(16, generator=draw)
    critic = Critic(ValueHead(8, (32,), seed=0), 0.02, torch.device("cpu"))
    for _ in range(200):
        value_loss(critic.head(states), torch.zeros(16), returns, None).mean().backward()
        critic.step(lambda own: own, 1)
    assert ((critic.head(states) - returns) ** 2).mean() < 1e-3


def test_a_restored_critic_takes_the_learning_rate_of_the_run() -> None:
    one, other = (Critic(ValueHead(4, (3,), seed=seed), 0.1, torch.device("cpu")) for seed in (0, 1))
    one.head(torch.ones(2, 4)).sum().backward()
    one.step(lambda own: own, 1)
    other.learning_rate = 0.2
    other.load_state_dict(one.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.head.parameters(), other.head.parameters(), strict=True))
    assert other.optimizer.param_groups[0]["lr"] == 0.2


# --- episodes ---------------------------------------------------------------------------------------------------------


def turns(rewards: list[list[float]], done: dict[int, int] | None = None, limit: dict[int, int] | None = None) -> Turns:
    """`done` and `limit`: row -> the turn after which it was so."""
    values = torch.tensor(rewards, dtype=torch.float64)
    index = torch.arange(values.shape[1] + 1)

    def since(ends: dict[int, int] | None) -> torch.Tensor:
        return torch.stack([index > (ends or {}).get(row, 99) for row in range(len(values))])

    return Turns(values, since(done), since(limit), torch.ones(len(values), dtype=torch.bool))


def rows_of(*runs: int, width: int = 12) -> torch.Tensor:
    """Rows with so many runs of one or two tokens each, a token of a tool between them."""
    rows = []
    for count in runs:
        own = [value for k in range(count) for value in ([1] * (1 + k % 2) + [0])]
        rows.append((own + [0] * width)[:width])
    return torch.tensor(rows)


def made(mask: torch.Tensor, found: Turns | None, **changes: Any) -> Any:
    rows = len(mask)
    settings = {
        "cut": torch.zeros(rows, dtype=torch.bool),
        "outcome": torch.zeros(rows).double(),
        "outcome_weight": None,
    }
    return episodes(mask, found, **settings | changes)


def test_episodes_of_different_lengths() -> None:
    found = made(rows_of(3, 1, 2), turns([[1, 2, 3], [4, 0, 0], [5, 6, 0]]))
    assert found.counts.tolist() == [3, 1, 2] and found.rewards.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert found.exists.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert found.last.long().argmax(1).tolist() == [2, 0, 1] and not found.truncated.any()
    assert found.step.amax(1).tolist() == [2, 0, 1] and found.dropped.tolist() == [0, 0, 0]


def test_what_is_said_after_the_end_is_no_step() -> None:
    """Neither after the goal nor after a limit; and what the environment pays then counts for nothing."""
    mask = rows_of(4, 4, 3)
    found = made(mask, turns([[0, 1, -9, 0], [0, 0, 0, 5], [0, 0, 1, 0]], done={0: 1, 2: 2}, limit={1: 2}))
    assert found.counts.tolist() == [2, 3, 3] and found.dropped.tolist() == [2, 1, 0]
    assert found.rewards.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert found.truncated.tolist() == [False, True, False]
    assert (found.step[0] >= 0).sum() == 3 and found.step[0].max() == 1


def test_an_episode_that_is_over_at_once_has_no_step() -> None:
    found = made(rows_of(2, 2), turns([[1, 1], [1, 1]], done={0: -1}))
    assert found.counts.tolist() == [0, 2] and (found.step[0] == -1).all() and found.rewards[0].tolist() == [0, 0]


def test_rows_without_own_tokens() -> None:
    found = made(rows_of(0, 0), None)
    assert found.counts.tolist() == [0, 0] and found.rewards.shape == (2, 0) and found.exists.shape == (2, 0)
    raw, _ = gae(found.rewards, found.rewards, found.last, found.last, torch.zeros(2), gamma=1.0, gae_lambda=1.0)
    assert raw.shape == (2, 0)


def test_an_end_of_its_own_wins_over_a_cut_text() -> None:
    cut = torch.tensor([True, True, False])
    found = made(rows_of(2, 2, 2), turns([[0, 1]] * 3, done={0: 1}, limit={2: 1}), cut=cut)
    assert found.truncated.tolist() == [False, True, True]


def test_a_reward_that_is_no_number_takes_the_row_out() -> None:
    found = made(rows_of(2, 2, 3), turns([[0, NAN, 0], [1, 2, 0], [1, 1, NAN]], done={2: 1}))
    assert found.unscored.tolist() == [True, False, False] and found.counts.tolist() == [0, 2, 2]
    assert found.rewards.isfinite().all() and (found.step[0] == -1).all()
    assert found.dropped.tolist() == [0, 0, 1]


def test_the_outcome_is_paid_at_the_last_step() -> None:
    outcome = torch.tensor([0.5, NAN, 2.0]).double()
    found = made(rows_of(2, 1, 3), turns([[1, 0, 0]] * 3), outcome=outcome)
    assert found.rewards.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]] and not found.unscored.any()  # weight 0
    found = made(rows_of(2, 1, 3), turns([[1, 0, 0]] * 3), outcome=outcome, outcome_weight=2.0)
    assert found.rewards.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 4]] and found.unscored.tolist() == [
        False,
        True,
        False,
    ]
    found = made(rows_of(2, 1, 3), None, outcome=outcome)  # nobody tells step rewards
    assert found.rewards.tolist() == [[0, 0.5, 0], [0, 0, 0], [0, 0, 2]]
    mixed = dataclasses.replace(turns([[1, 0, 0]] * 3), rewarded=torch.tensor([True, True, False]))
    found = made(rows_of(2, 1, 3), mixed, outcome=outcome)
    assert found.rewards[2].tolist() == [1, 0, 2] and found.rewards[0].tolist() == [1, 0, 0]


def test_more_runs_than_turns_are_an_error() -> None:
    with pytest.raises(ValueError, match="a row has 3 runs of its own tokens, and its environment saw 2 turns"):
        made(rows_of(3), turns([[0, 0]]))


def test_what_counts_as_cut() -> None:
    """A call or an answer that nothing follows; not what the model says last, however long it is."""
    said, asked = {"role": "assistant", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}
    answered = {"role": "tool", "content": "y"}
    found = cut_short([[said], [said, asked], [asked, answered], [asked, answered, {**said, "tool_calls": None}], []])
    assert found == [False, True, True, False, False] and cut_short(["text"]) == [False]


def test_a_rollout_func_whose_rows_say_nothing() -> None:
    silent = torch.zeros(2, 3).long()
    told = reported_turns([{"step_rewards": []}] * 2, silent)
    assert told is not None and told.rewards.shape == (2, 1)
    assert made(silent, told).counts.tolist() == [0, 0]
