"""VL-DAC: formulas against loops and the card's properties, episodes from turns, and real runs with environments."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_ext
from trl_ext import ConfigError, OptionError
from trl_ext.testing import Scripted, digits, metrics_of, reported, tiny_data, tiny_model
from trl_ext_hooks import Plugin, Turns, hookimpl
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.vl_dac import VLDAC
from trl_ext_plugins.vl_dac.critic import Critic, ValueHead
from trl_ext_plugins.vl_dac.episodes import cut_short, episodes
from trl_ext_plugins.vl_dac.episodes import reported as reported_turns
from trl_ext_plugins.vl_dac.maths import (
    clipped_surrogate,
    explained_variance,
    first_tokens,
    gae,
    normalize,
    step_mean_weights,
    step_numbers,
    token_counts,
    value_loss,
)

NAN = float("nan")
SEEDS = st.integers(0, 2**31)


def fixtures_of(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("vl_dac_helpers", Path(__file__).parents[1] / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


call = fixtures_of("conftest.py").tool_call


# --- GAE and normalisation --------------------------------------------------------------------------------------------


def buffer(seed: int, rows: int = 4, most: int = 6) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded with numbers that must not matter."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (rows,), generator=draw)
    last = torch.arange(most) == (lengths - 1).unsqueeze(1)
    values = torch.randn(2, rows, most, generator=draw, dtype=torch.float64)
    limits = last & (torch.rand(rows, 1, generator=draw) < 0.4)
    return {
        "rewards": values[0],
        "values": values[1],
        "done": last,
        "truncated": limits,
        "bootstrap": torch.zeros(rows),
    }


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_is_the_recursion(seed: int, gamma: float, lam: float, limits: bool) -> None:
    """Against a loop over one row at a time, which sees no padding."""
    made = buffer(seed)
    found, returns = gae(**made, gamma=gamma, gae_lambda=lam, time_limits=limits)
    for row, last in enumerate(made["done"].long().argmax(1).tolist()):
        ahead = following = 0.0
        for k in range(last, -1, -1):
            r, v = made["rewards"][row, k].item(), made["values"][row, k].item()
            following = r + gamma * ahead - v + gamma * lam * following
            if limits and made["truncated"][row, k]:
                following = 0.0
            assert found[row, k].item() == pytest.approx(following, abs=1e-9)
            assert returns[row, k].item() == pytest.approx(following + v, abs=1e-9)
            ahead = v


def test_the_two_ends_of_lambda() -> None:
    made = buffer(5) | {"truncated": torch.zeros(4, 6, dtype=torch.bool)}
    made["values"] = torch.zeros_like(made["values"])
    found, _ = gae(**made, gamma=1.0, gae_lambda=1.0)
    inside = made["done"].flip(1).cumsum(1).flip(1) > 0  # up to the last step
    to_go = torch.where(inside, made["rewards"], 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found[inside], to_go[inside])
    made = buffer(5) | {"truncated": torch.zeros(4, 6, dtype=torch.bool)}
    found, _ = gae(**made, gamma=0.9, gae_lambda=0.0)
    ahead = torch.where(made["done"], 0.0, torch.nn.functional.pad(made["values"], (0, 1))[:, 1:])
    torch.testing.assert_close(found, made["rewards"] + 0.9 * ahead - made["values"])


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_row_does_not_reach_another(seed: int) -> None:
    made = buffer(seed)
    before, _ = gae(**made, gamma=0.9, gae_lambda=0.8)
    made["rewards"] = made["rewards"].clone()
    made["rewards"][1] += 7
    after, _ = gae(**made, gamma=0.9, gae_lambda=0.8)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not torch.equal(before[1], after[1])


def test_a_step_at_a_limit_has_no_advantage() -> None:
    one = torch.ones(1, 2, dtype=torch.float64)
    last = torch.tensor([[False, True]])
    kept, returns = gae(one, 3 * one, last, last, torch.zeros(1), gamma=0.5, gae_lambda=0.5)
    assert kept.tolist() == [[1 + 0.5 * 3 - 3, 0.0]] and returns.tolist() == [[2.5, 3.0]]
    kept, returns = gae(one, 3 * one, last, last, torch.zeros(1), gamma=0.5, gae_lambda=0.5, time_limits=False)
    assert kept[0, 1] == -2 and returns[0, 1] == 1


def test_one_step_episodes_with_the_mean_as_value_are_a_batch_normalised_group() -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.25]).double()
    ends = torch.ones(4, 1, dtype=torch.bool)
    mean = rewards.mean().expand(4)
    raw, _ = gae(rewards.unsqueeze(1), mean.unsqueeze(1), ends, ~ends, torch.zeros(4), gamma=0.99, gae_lambda=0.95)
    expected = group_normalize(rewards, torch.zeros(4).long(), eps=1e-8)
    torch.testing.assert_close(normalize(raw.flatten()), expected)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(0, 9))
def test_statistics_are_those_of_all_processes(seed: int, cut: int) -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = [values[:cut], values[cut:]]
    sums: list[list[torch.Tensor]] = [[], []]

    def total(own: torch.Tensor) -> torch.Tensor:  # what the first process sends is added to what the other one sent
        sums[0].append(own)
        return own + sums[1][len(sums[0]) - 1]

    mean = values.mean()
    other = parts[1]
    sums[1] = [torch.stack([torch.tensor(len(other)).double(), other.sum()]), ((other - mean) ** 2).sum()]
    found = normalize(parts[0], total)
    torch.testing.assert_close(found, ((values - mean) / (values.std() + 1e-8))[:cut])


def test_nothing_to_normalise() -> None:
    assert normalize(torch.zeros(0).double()).shape == (0,)
    assert normalize(torch.tensor([3.0]).double()).tolist() == [0.0]
    assert normalize(torch.tensor([0.1, 0.1 + 1e-9, 0.1 - 1e-9]).double()).tolist() == [0.0] * 3  # rounding


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0]).double()
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns, torch.full((3,), 9.0).double()) == pytest.approx(0)
    assert explained_variance(returns, -returns) == pytest.approx(-3)
    assert explained_variance(torch.ones(3).double(), returns).isnan()
    assert explained_variance(torch.zeros(0).double(), torch.zeros(0).double()).isnan()


# --- steps and their means --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=7, max_size=7), min_size=1, max_size=4))
def test_steps_are_the_maximal_runs(rows: list[list[int]]) -> None:
    step = step_numbers(torch.tensor(rows))
    counts, starts = token_counts(step), first_tokens(torch.tensor(rows))
    for row, own in enumerate(rows):
        number, inside = -1, False
        for token, value in enumerate(own):
            number += value == 1 and not inside
            assert step[row, token] == (number if value else -1)
            assert starts[row, token] == (value == 1 and not inside)
            inside = value == 1
        for k in range(number + 1):
            assert (counts[row][step[row] == k] == (step[row] == k).sum()).all()
    assert (counts[step < 0] == 0).all()


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_weights_turn_the_mean_over_tokens_into_a_mean_over_steps(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.rand(4, 9, generator=draw) < 0.6).long()
    mask[0, 0] = 1
    values = torch.randn(4, 9, generator=draw, dtype=torch.float64)
    step = step_numbers(mask)
    means = [values[row][step[row] == k].mean() for row in range(4) for k in range(int(step[row].max()) + 1)]
    weight = step_mean_weights(step, mask.sum(), len(means))
    torch.testing.assert_close((weight * values).sum() / mask.sum(), torch.stack(means).mean())
    torch.testing.assert_close(weight[mask == 1].mean(), torch.tensor(1.0).double())
    assert (step_mean_weights(torch.full((2, 3), -1), 0, 0) == 0).all()


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.01, 1))
def test_the_value_loss_is_never_below_the_square(seed: int, clip: float) -> None:
    now, old, returns = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    square = (now - returns) ** 2
    assert (value_loss(now, old, returns, clip) >= square).all()
    assert torch.equal(value_loss(now, old, returns, None), square)
    assert torch.equal(value_loss(old, old, returns, clip), (old - returns) ** 2)


def test_clipping_and_its_guard_by_hand() -> None:
    ratio = torch.tensor([[1.5, 0.5, 20.0, 1.5, 0.5, 20.0]]).double()
    step = torch.tensor([[0, 0, -1, 1, 1, 1]])
    up, down = torch.ones(1, 6).double(), -torch.ones(1, 6).double()
    found = clipped_surrogate(ratio.log(), up, step, 0.1)
    torch.testing.assert_close(found, -torch.tensor([[1.1, 0.5, 1.1, 1.1, 0.9, 1.1]]).double())
    found = clipped_surrogate(ratio.log(), down, step, 0.1)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.9, 20.0, 1.1, 0.9, 1.1]]).double())
    found = clipped_surrogate(ratio.log(), down, step, 0.1, guard=None)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.9, 20.0, 1.5, 0.9, 20.0]]).double())


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


# --- real runs --------------------------------------------------------------------------------------------------------

SCRIPT = [
    [call("go", pay=1), call("go", pay=0), call("end", pay=2), "bye"],
    ["nothing"],
    [call("go", pay=0.5), "done"],
    [call("crash"), call("go", pay=3), "done"],
    [call("go", pay=1), call("stop"), "bye"],
    [call("go", pay=77), "done"],
    [call("go", pay=1)] * 6,  # more calls than the loop allows
    [call("go", pay=1) + call("go", pay=1), "done"],
]
"""An episode per row: a long one, one without any step of it, ..., one that loses its rewards, and so on."""


class Watch(Plugin):
    """Keeps rounds and micro-batches, and what the policy and the value network are at each step."""

    name = "watch"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []
        self.losses: list[Any] = []
        self.scored: list[Any] = []
        self.heads: list[list[torch.Tensor]] = []
        self.policies: list[list[torch.Tensor]] = []
        self.session: Any = None

    @hookimpl
    def setup(self, trainer: Any) -> None:
        self.policies.append([p.detach().clone() for p in trainer.unwrapped_model.parameters()])

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.losses.append(loss)

    @hookimpl
    def optimizer_step(self, trainer: Any) -> None:
        self.policies.append([p.detach().clone() for p in trainer.unwrapped_model.parameters()])


SMALL = {"head_sizes": [8], "value_warmup_iterations": 0}


@pytest.fixture
def run(build: Any, plugin: Any, tool_model: str, play: Any) -> Callable[..., Any]:
    """Trains on the script; options of the method and settings of the trainer by name."""

    def start(script: list[list[str]] | None = None, resume: str | None = None, **changes: Any) -> Any:
        options = SMALL | {k: changes.pop(k) for k in list(changes) if k in OPTIONS}
        environment = play(SCRIPT if script is None else script)
        held_out = {"eval_dataset": changes.pop("evaluate")} if "evaluate" in changes else {}
        common: dict[str, Any] = {"model": tool_model, "rewards": [digits], "data": tiny_data().select(range(4))}
        common |= {"max_completion_length": 300, "max_tool_calling_iterations": 4, "num_generations": 2, "max_steps": 1}
        common |= {"trainer": {"environment_factory": environment, **held_out}, "optim": "sgd", "learning_rate": 0.05}
        with trl_ext.enable({plugin(Watch): None, "vl-dac": options}):
            trainer = build(**common | changes)
            trainer.train(resume_from_checkpoint=resume)
            plugins = trainer._trl_ext.plugins
            trainer.watch, trainer.method = plugins["watch"], plugins["vl-dac"]
        return trainer

    return start


OPTIONS = set(VLDAC.Options.__dataclass_fields__)


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[f"vl-dac/{key}"] for entry in trainer.state.log_history if f"vl-dac/{key}" in entry]


def test_a_round_from_end_to_end(run: Any) -> None:
    """Episodes, values, GAE and advantages of every row against a loop over the transcripts."""
    trainer = run()
    (round,), scored = trainer.watch.rounds, trainer.method.scored
    found = scored.episodes
    assert found.counts.tolist() == [3, 1, 2, 3, 2, 0, 5, 2]
    assert found.truncated.tolist() == [False, False, False, False, True, False, True, False]
    assert found.unscored.tolist() == [row == 5 for row in range(8)] and found.dropped.tolist() == [
        1,
        0,
        0,
        0,
        1,
        0,
        0,
        0,
    ]
    pays = [[1, 0, 2], [0], [0.5, 0], [0, 3, 0], [1, 0], [], [1, 1, 1, 1, 0], [2, 0]]
    for row, own in enumerate(pays):
        assert found.rewards[row, : len(own)].tolist() == own
    raw = []
    for row, own in enumerate(pays):
        ahead = following = 0.0
        part = []
        for k in reversed(range(len(own))):
            value = scored.values[row, k].item()
            following = own[k] + 0.99 * ahead - value + 0.99 * 0.95 * following
            if k == len(own) - 1 and found.truncated[row]:
                following = 0.0
            part.insert(0, following)
            ahead = value
        raw.append(part)
    flat = torch.tensor([value for part in raw for value in part]).double()
    normal = (flat - flat.mean()) / (flat.std() + 1e-8)
    torch.testing.assert_close(scored.normal[found.exists], normal, atol=1e-6, rtol=0)
    tokens, at = round.advantages, 0
    for row, part in enumerate(raw):
        for k in range(len(part)):
            own = tokens[row][found.step[row] == k]
            assert (
                len(own) > 0 and (own == own[0]).all() and own[0].item() == pytest.approx(normal[at].item(), abs=1e-5)
            )
            at += 1
    assert (tokens[found.step < 0] == 0).all() and (tokens * (1 - round.loss_mask) == 0).all()
    assert logged(trainer, "steps") == [18 / 8] and logged(trainer, "dropped_turns") == [2 / 8]
    assert logged(trainer, "unscored") == [1 / 8] and logged(trainer, "truncated") == [2 / 8]


def test_values_are_read_before_the_first_token_of_a_step(run: Any) -> None:
    """Against a forward of the backbone alone, at the last token that the model has not written itself."""
    trainer = run(learning_rate=0.0)
    (round,), scored, batch = trainer.watch.rounds, trainer.method.scored, trainer.watch.rounds[0].batch
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        states = trainer.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        fresh = ValueHead(states.shape[-1], (8,), trainer.args.seed)  # as it was before its first step
        width = batch["prompt_ids"].shape[1]
        for row, count in enumerate(scored.episodes.counts.tolist()):
            for k in range(count):
                start = int((scored.episodes.step[row] == k).nonzero()[0])
                assert start == 0 or round.loss_mask[row, start - 1] == 0
                expected = fresh(states[row : row + 1, width + start - 1])
                assert scored.values[row, k].item() == pytest.approx(expected.item(), abs=1e-5)


def test_every_token_of_an_action_is_trained_and_no_other(run: Any) -> None:
    """The gradient of the loss by log-probabilities: on the first token too, and nowhere behind the end."""
    trainer = run()
    loss, method = trainer.watch.losses[0], trainer.method
    logps = loss.per_token_logps.detach().clone().requires_grad_()
    values = method.policy_loss(dataclasses.replace(loss, per_token_logps=logps)).values
    (gradient,) = torch.autograd.grad((values * loss.mask).sum(), logps)
    step = loss.batch["vl_dac_step"]
    advantages = loss.advantages
    assert (gradient[(step >= 0) & (advantages.abs() > 1e-3)] != 0).all()
    assert (gradient[step < 0] == 0).all()
    firsts = first_tokens(loss.mask) & (step >= 0)
    assert firsts.sum() == 18
    steps, items = 18, loss.batch["num_items_in_batch"].item()
    row, token = (int(x) for x in firsts.nonzero()[0])
    expected = -advantages[row, token] * items / (steps * token_counts(step)[row, token])
    assert gradient[row, token].item() == pytest.approx(expected.item(), rel=0.05)  # the KL term adds a little


def test_the_loss_is_the_mean_over_steps(run: Any) -> None:
    """The logged loss against a loop over steps: PPO and KL as means over tokens, and the value's."""
    trainer = run(num_iterations=2, max_steps=2, learning_rate=0.5, kl_beta=0.3, value_lr=0.1)
    loss = trainer.watch.losses[1]  # the second epoch, off policy
    step, batch = loss.batch["vl_dac_step"], loss.batch
    lp, old, ref = loss.per_token_logps.detach(), batch["old_per_token_logps"], batch["ref_per_token_logps"]
    assert not torch.equal(lp, old)
    total, errors = [], []
    values = torch.zeros(lp.shape).masked_scatter(
        first_tokens(loss.mask), torch.zeros(int(first_tokens(loss.mask).sum()))
    )
    for row in range(len(step)):
        for k in range(int(step[row].max()) + 1):
            own = step[row] == k
            a, rho = loss.advantages[row][own][0], (lp[row][own] - old[row][own]).exp()
            ppo = torch.maximum(-a * rho, -a * rho.clamp(0.9, 1.1)).mean()
            d = ref[row][own] - lp[row][own]
            total.append(ppo + 0.3 * (d.exp() - d - 1).mean())
            errors.append(own.nonzero()[0])
    assert len(total) == 18 and values.shape == lp.shape
    value = [entry["vl-dac/value_loss"] for entry in trainer.state.log_history if "vl-dac/value_loss" in entry][1]
    expected = torch.stack(total).mean().item() + value
    assert trainer.state.log_history[1]["loss"] == pytest.approx(expected, abs=2e-4)


def test_accumulation_changes_nothing(run: Any) -> None:
    whole = run(per_device_train_batch_size=8)
    parts = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for a, b in zip(whole.watch.policies[-1], parts.watch.policies[-1], strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    for a, b in zip(whole.method.critic.head.parameters(), parts.method.critic.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)  # Adam's first step is the sign of the gradient
    assert not same(whole.watch.policies[0], whole.watch.policies[-1])


def test_step_data_stay_with_their_row(run: Any) -> None:
    """Through shuffling and splitting: fields of a micro-batch belong to its own tokens."""
    trainer = run(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    seen = []
    rounds = trainer.watch.rounds[0]
    whole = {tuple(ids.tolist()): i for i, ids in enumerate(rounds.batch["completion_ids"])}
    scored = trainer.method.scored
    for loss in trainer.watch.losses:
        for i, ids in enumerate(loss.batch["completion_ids"]):
            row = whole[tuple(ids.tolist())]
            assert torch.equal(loss.batch["vl_dac_step"][i], scored.episodes.step[row])
            assert torch.equal(loss.batch["vl_dac_return"][i], scored.episodes.on_tokens(scored.returns)[row].float())
            seen.append(row)
    assert sorted(seen) == list(range(8)) != seen


def test_warm_up_leaves_the_policy_as_it_is(run: Any) -> None:
    """Two rounds of two epochs each: the policy is the same to the bit, and the value network is not."""
    trainer = run(value_warmup_iterations=2, num_iterations=2, max_steps=6, learning_rate=1.0, optim="adamw_torch")
    start, *after = trainer.watch.policies
    assert [same(start, own) for own in after] == [True] * 4 + [False] * 2
    assert logged(trainer, "warming_up") == [1.0, 1.0, 0.0] and logged(trainer, "iterations") == [1, 2, 3]
    fresh = ValueHead(32, (8,), trainer.args.seed)
    assert not same(list(fresh.parameters()), list(trainer.method.critic.head.parameters()))


def test_policy_and_value_have_no_gradient_of_each_other(run: Any) -> None:
    """The policy's loss leaves the value network alone, and the reverse by warm-up."""
    both, alone = run(), run(value_warmup_iterations=1)
    heads = [list(trainer.method.critic.head.parameters()) for trainer in (both, alone)]
    assert same(*heads)
    assert not same(both.watch.policies[0], both.watch.policies[1])
    small, large = run(value_coef=0.1), run(value_coef=100.0)
    assert same(small.watch.policies[-1], large.watch.policies[-1])


def test_the_value_learns_what_episodes_are_worth(run: Any, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "wide", tools=True, initializer_range=0.4)  # states that tell transcripts apart
    script = [[call("go", pay=1), call("end", pay=1), "bye"], [call("go", pay=-1), call("end", pay=0), "bye"]]
    settings = {"per_device_train_batch_size": 2, "max_steps": 60, "num_iterations": 2, "learning_rate": 0.0}
    trainer = run(script, model=model, value_lr=0.01, value_clip=False, kl_beta=0.0, head_sizes=[64], **settings)
    explained, losses = logged(trainer, "explained_variance"), logged(trainer, "value_loss")
    assert explained[0] < 0.1 and max(explained) > 0.3  # untrained states hardly differ, so it learns slowly here
    assert min(losses[-5:]) < 0.9 * losses[0]
    assert "vl-dac/kl" not in metrics_of(trainer)[0]


def test_no_row_has_a_step(run: Any) -> None:
    """Every reward is NaN: a round without anything to learn from, which changes nothing."""
    trainer = run([[call("go", pay=77), "done"]] * 8, kl_beta=0.2)
    assert same(*trainer.watch.policies) and logged(trainer, "without_steps") == [1.0]
    assert "vl-dac/explained_variance" not in metrics_of(trainer)[0]


def test_one_step_in_all(run: Any) -> None:
    trainer = run([["said"], *[[call("go", pay=77), "done"]] * 7])
    assert (trainer.watch.rounds[0].advantages == 0).all() and trainer.state.log_history[0]["loss"] == pytest.approx(
        trainer.state.log_history[0]["vl-dac/value_loss"], abs=1e-6
    )


def test_a_step_without_known_log_probabilities_is_skipped(run: Any) -> None:
    trainer = run()
    loss, method = trainer.watch.losses[0], trainer.method
    old = loss.batch["old_per_token_logps"].clone()
    step = loss.batch["vl_dac_step"]
    row = int((step.amax(1) > 0).nonzero()[0])
    old[row, int((step[row] == 1).nonzero()[0])] = NAN
    values = method.policy_loss(dataclasses.replace(loss, batch=loss.batch | {"old_per_token_logps": old})).values
    assert (values[row][step[row] == 1] == 0).all() and values.isfinite().all()
    assert (values[row][step[row] == 0] != 0).any()
    assert loss.metric_log.values[f"{loss.metric_log.plugin}/skipped_steps"] == (1, 18)


def test_a_value_that_diverged_stops_the_run(run: Any) -> None:
    trainer = run()
    loss, method = trainer.watch.losses[0], trainer.method
    with torch.no_grad():
        next(method.critic.head.parameters()).fill_(NAN)
    with pytest.raises(ValueError, match="the value loss is not finite: values"):
        method.loss_terms(loss)
    with pytest.raises(ValueError, match="values of steps are not finite"):
        method.advantages(trainer.watch.rounds[0])


def test_a_resumed_run_has_the_same_value_network_and_optimizer(run: Any) -> None:
    settings = {
        "max_steps": 4,
        "value_warmup_iterations": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "data": tiny_data(),
    }
    whole = run(**settings)
    again = run(resume=f"{whole.args.output_dir}/checkpoint-2", **settings)
    assert same(whole.watch.policies[-1], again.watch.policies[-1])
    one, other = (trainer.method.state_dict() for trainer in (whole, again))
    assert one["iterations"] == other["iterations"] == 4
    assert one["head"].keys() == other["head"].keys() and same(list(one["head"].values()), list(other["head"].values()))
    for key, state in one["optimizer"]["state"].items():
        assert same(list(state.values()), list(other["optimizer"]["state"][key].values())) and state["step"] == 4
    assert logged(again, "warming_up")[-2:] == [1.0, 0.0]


def test_a_lora_policy_with_checkpointing(run: Any) -> None:
    from peft import LoraConfig

    trainer = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    base = run(learning_rate=0.1)
    settings = {"gradient_checkpointing": True, "learning_rate": 0.1, "num_iterations": 2, "max_steps": 2}
    found = run(trainer={"environment_factory": base.environment_factories[None], **trainer}, **settings)
    torch.testing.assert_close(found.method.scored.values, base.method.scored.values, atol=1e-5, rtol=0)
    assert not same(found.watch.policies[0], found.watch.policies[-1])


def test_evaluation_counts_no_iteration(run: Any) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "per_device_eval_batch_size": 8}
    trainer = run(evaluate=tiny_data().select(range(4)), value_warmup_iterations=1, **settings)
    assert trainer.method.iterations == 2
    assert [round.mode for round in trainer.watch.rounds] == ["train", "eval", "train", "eval"]
    evaluated = [entry for entry in trainer.state.log_history if "eval_vl-dac/steps" in entry]
    assert len(evaluated) == 2 and "eval_vl-dac/value_loss" in evaluated[0]


def test_a_rollout_func_tells_step_rewards(build: Any, tool_model: str) -> None:
    rows = [
        {
            "completion_ids": [40, 41, 42, 43],
            "env_mask": [1, 0, 1, 1],
            "step_rewards": [0.5, 1.0],
            "done": True,
            "score": 3.0,
        },
        {"completion_ids": [40, 41], "env_mask": [1, 1], "step_rewards": [0.0], "done": False, "score": 3.0},
    ]
    rollouts = Scripted(rows * 2)
    with trl_ext.enable({"vl-dac": SMALL}):
        trainer = build(
            model=tool_model, max_steps=1, per_device_train_batch_size=4, num_generations=2,
            rewards=[reported("score")], trainer={"rollout_func": rollouts},
        )  # fmt: skip
        trainer.train()
        found = trainer._trl_ext.plugins["vl-dac"].scored.episodes
    assert found.counts.tolist() == [2, 1, 2, 1] and found.rewards.tolist() == [[0.5, 1], [0, 0]] * 2
    silent = torch.zeros(2, 3).long()
    assert reported_turns([{"step_rewards": []}] * 2, silent).rewards.shape == (2, 1)
    assert made(silent, reported_turns([{"step_rewards": []}] * 2, silent)).counts.tolist() == [0, 0]
    short = [{**row, "step_rewards": [1.0, 1.0]} for row in rows]
    with (
        trl_ext.enable({"vl-dac": SMALL}),
        pytest.raises(ValueError, match="row 1 of the rollout_func has 2 step_rewards"),
    ):
        build(
            model=tool_model, max_steps=1, per_device_train_batch_size=4, num_generations=2,
            rewards=[reported("score")], trainer={"rollout_func": Scripted(short * 2)},
        ).train()  # fmt: skip


def test_tools_without_an_environment_are_scored_by_their_outcome(build: Any, tool_model: str) -> None:
    from trl_ext.testing import calls
    from trl_ext.tools import calculator

    with trl_ext.enable({"vl-dac": SMALL}):
        trainer = build(
            model=tool_model, max_steps=1, trainer={"tools": [calculator]}, max_completion_length=150,
            generation_kwargs=calls(tool_model, "calculator", likelihood=5.0, expression="6 * 7"),
        )  # fmt: skip
        trainer.train()
        found = trainer._trl_ext.plugins["vl-dac"].scored.episodes
    outcome = torch.tensor(list(trainer._logs["rewards"]["digits"])) + torch.tensor(
        list(trainer._logs["rewards"]["brevity"])
    )
    assert found.counts.max() > 1
    torch.testing.assert_close(
        found.rewards.sum(1), torch.where(found.counts > 0, outcome.double(), 0.0), atol=1e-6, rtol=0
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type='dapo', it is 'grpo'"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions=False"),
        ({"beta": 0.1}, "does not apply beta=0.1; set beta=0.0"),
        ({"epsilon": 0.1}, "does not apply epsilon=0.1"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='token'"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 would change the policy while only the value is trained"),
        ({"scale_rewards": "none"}, "scale_rewards='group'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str, build: Any, tool_model: str) -> None:
    from trl_ext.tools import calculator

    with trl_ext.enable({"vl-dac": {"head_sizes": [8]}}), pytest.raises(ConfigError, match=message):
        build(model=tool_model, trainer={"tools": [calculator]}, **settings)


def test_it_needs_something_to_act_on(build: Any) -> None:
    with trl_ext.enable("vl-dac"), pytest.raises(ConfigError, match="rollouts must be able to call tools"):
        build()


@pytest.mark.parametrize(
    "options",
    [
        {"gamma": 1.1},
        {"gae_lambda": -0.1},
        {"clip_eps": 0},
        {"value_coef": 0},
        {"kl_beta": -1},
        {"value_warmup_iterations": -1},
        {"ratio_guard": 1.0},
        {"head_sizes": [0]},
        {"value_lr": 0},
    ],
)
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        trl_ext.enable({"vl-dac": options})


def test_it_is_refused_beside_shared_prefix() -> None:
    with pytest.raises(ConfigError, match="'vl-dac' reads hidden states of the policy's forward"):
        trl_ext.enable("vl-dac", "shared-prefix")
