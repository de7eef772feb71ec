"""SPAE: potentials, factors and bonuses, advantages, and real runs with a stub and with the policy as the prober."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext.testing import brevity, digits, tiny_data
from trl_ext_hooks import Generation, Plugin, hookimpl
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.spae import SPAE, SPAEOptions
from trl_ext_plugins.spae.maths import (
    confidence,
    correctness,
    gains,
    outcome_advantages,
    saturation_factor,
    shaping,
    spae_advantages,
    step_of_tokens,
    step_potential,
)

NAN = math.nan
SEEDS = st.integers(0, 10_000)
UNIT = st.floats(0, 1)


def batch(seed: int, groups: int = 3, size: int = 4, most: int = 5) -> tuple[torch.Tensor, ...]:
    """(rewards (N,), group ids, potentials (N, K), token counts (N, K + 1)) with rows of 0 to K steps."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    rewards = torch.randint(0, 2, (rows,), generator=generator).double()
    rewards[0], rewards[1] = 0.0, 1.0  # one group at least is kept
    potential = 2 * torch.rand(rows, most, generator=generator, dtype=torch.float64) - 1
    steps = torch.randint(0, most + 1, (rows, 1), generator=generator)
    potential[torch.arange(most) >= steps] = NAN
    tokens = torch.randint(1, 6, (rows, most + 1), generator=generator)
    tokens[torch.arange(most + 1) >= steps.clamp(min=1)] = 0
    return rewards, torch.arange(rows) // size, potential, tokens


def finished(seed: int, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(advantages (N, K + 1), kept, token counts, outcome advantages)."""
    rewards, ids, potential, tokens = batch(seed)
    outcome, kept = outcome_advantages(rewards, ids)
    return spae_advantages(outcome, kept, potential, tokens, **settings), kept, tokens, outcome


# --- potentials -------------------------------------------------------------------------------------------------------


def phi(acc: float, conf: float) -> float:
    return step_potential(torch.tensor(acc).double(), torch.tensor(conf).double()).item()


@pytest.mark.parametrize(("acc", "conf", "expected"), [(1, 1, 1), (0, 1, -1), (0, 0, 0), (1, 0, 0.5)])
def test_corners(acc: float, conf: float, expected: float) -> None:
    assert phi(acc, conf) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(UNIT, UNIT, st.floats(0.001, 0.5))
def test_the_potential_rises_with_acc_and_turns_with_conf(acc: float, conf: float, more: float) -> None:
    assert -1 <= phi(acc, conf) <= 1
    assert phi(min(acc + more, 1.0), conf) >= phi(acc, conf)
    change = phi(acc, min(conf + more, 1.0)) - phi(acc, conf)
    if acc < 2 / 3 - 1e-9:
        assert change <= 1e-12
    if acc > 2 / 3 + 1e-9:
        assert change >= -1e-12


def test_confidence_and_correctness() -> None:
    one, two, none = torch.tensor([0.1, 0.3]), torch.tensor([2.0]), torch.tensor([])
    assert confidence([one, two]) == pytest.approx((math.exp(-0.2) + math.exp(-2)) / 2)
    assert confidence([one, none]) == pytest.approx(math.exp(-0.2) / 2)  # an empty continuation is not sure of anything
    assert confidence([none, none]) == confidence([]) == 0.0
    assert correctness(torch.tensor([0.2, 0.9]).log()) == pytest.approx(0.55)
    assert phi(correctness(torch.tensor([0.4]).log()), 0.0) == pytest.approx(0.2)  # all empty: half of Acc


def test_gains() -> None:
    found = gains(torch.tensor([[0.5, 0.7, -0.1], [0.3, NAN, NAN], [NAN, NAN, NAN]]).double())
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.2, -0.8]).double())
    assert found[1, 0] == 0 and torch.isnan(found[1, 1:]).all() and torch.isnan(found[2]).all()
    assert gains(torch.zeros(2, 0)).shape == (2, 0)


# --- factors and bonuses ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, UNIT)
def test_the_factor_is_1_up_to_the_first_saturated_step_and_falls_after_it(seed: int, alpha: float) -> None:
    potential = batch(seed)[2]
    factor = saturation_factor(potential, alpha=alpha, eps_sat=0.5)
    for row, values in zip(factor.tolist(), potential.tolist(), strict=True):
        first = next((k for k, value in enumerate(values) if value > 0.5), len(values))
        assert row[: first + 1] == [1.0] * (first + 1)
        assert all(a >= b for a, b in pairwise(row)) and min(row) >= 1 - alpha
        if first < len(values):
            assert row[first + 1] == pytest.approx(1 - alpha * (1 - math.exp(-1)))


def test_the_factor_counts_up() -> None:
    found = saturation_factor(torch.tensor([[0.95, 0.99, 0.2, 0.91]]), alpha=1.0)
    assert found[0].tolist() == pytest.approx([1, math.exp(-1), math.exp(-2), math.exp(-2), math.exp(-3)])


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_the_bonus_is_the_loop_of_the_formula(seed: int) -> None:
    rewards, ids, potential, _ = batch(seed)
    kept = outcome_advantages(rewards, ids)[1]
    found = shaping(potential, kept)
    steps = {
        (i, k): (potential[i, k] - potential[i, k - 1]).item() if k else 0.0
        for i in range(len(kept))
        for k in range(potential.shape[1])
        if kept[i] and not torch.isnan(potential[i, k])
    }
    if not steps:
        assert (found == 0).all()
        return
    lowest, highest = min(steps.values()), max(steps.values())
    grown = {key: math.exp((value - lowest) / max(highest - lowest, 1e-8)) for key, value in steps.items()}
    mean = sum(grown.values()) / len(grown)
    for i, k in ((i, k) for i in range(len(kept)) for k in range(potential.shape[1] + 1)):
        assert found[i, k].item() == pytest.approx(grown[i, k] - mean if (i, k) in grown else 0.0, abs=1e-12)
    assert found.sum().item() == pytest.approx(0.0, abs=1e-9)


def test_equal_gains_give_no_bonus() -> None:
    potential = torch.tensor([[0.3, NAN], [0.9, NAN]]).double()
    assert (shaping(potential, torch.ones(2).bool()) == 0).all()
    assert (shaping(torch.full((2, 2), NAN), torch.ones(2).bool()) == 0).all()
    assert (shaping(torch.tensor([[0.1, 0.9]]), torch.zeros(1).bool()) == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 19), max_size=8), st.integers(1, 20), st.sampled_from(["last", "next"]))
def test_steps_partition_the_completion(ends: set[int], length: int, tail: Any) -> None:
    own = sorted(end for end in ends if end < length)
    found = step_of_tokens(own, length, tail).tolist()
    for token, step in enumerate(found):
        expected = sum(end < token for end in own)
        assert step == (expected if tail == "next" else min(expected, max(len(own) - 1, 0)))
    assert all(b - a in (0, 1) for a, b in pairwise(found)) and (not found or found[0] == 0)


# --- advantages -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, UNIT, UNIT)
def test_the_batch_is_standard_over_its_tokens(seed: int, alpha: float, xi: float) -> None:
    values, kept, tokens, _ = finished(seed, alpha=alpha, xi=xi)
    assert (values[~kept] == 0).all()
    every = values[kept].repeat_interleave(1).repeat_interleave(tokens[kept].flatten())
    assert every.mean().item() == pytest.approx(0, abs=1e-9)
    assert every.std().item() == pytest.approx(1, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_without_penalty_and_bonus_it_is_the_normalised_mean_baseline(seed: int) -> None:
    values, kept, tokens, outcome = finished(seed, alpha=0.0, xi=0.0)
    repeated = outcome[kept].repeat_interleave(tokens[kept].sum(1))
    expected = (outcome - repeated.mean()) / (repeated.std() + 1e-8)
    for row in torch.nonzero(kept).flatten():
        torch.testing.assert_close(values[row], expected[row].expand_as(values[row]))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(-5, 5))
def test_a_constant_on_the_rewards_of_a_group_changes_nothing(seed: int, constant: float) -> None:
    rewards, ids, potential, tokens = batch(seed)
    moved = rewards + constant * (ids == 0)
    one, other = (spae_advantages(*outcome_advantages(values, ids), potential, tokens) for values in (rewards, moved))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_damping_and_bonus_by_hand() -> None:
    """A right row that checks after it knows, and a wrong one that is sure of nothing."""
    potential = torch.tensor([[0.0, 0.95, 0.95], [0.0, 0.0, NAN]]).double()
    tokens = torch.tensor([[2, 2, 2, 0], [3, 3, 0, 0]])
    values = spae_advantages(torch.tensor([0.5, -0.5]).double(), torch.ones(2).bool(), potential, tokens)
    raw = torch.tensor([[0.5, 0.5, 0.5 * (1 - 0.5 * (1 - math.exp(-1)))], [-0.5, -0.5, -0.5]]).double()
    grown = torch.tensor([1.0, math.e, 1.0, 1.0, 1.0]).double()
    bonus = grown - grown.mean()
    raw += 0.5 * torch.stack([bonus[:3], torch.tensor([bonus[3], bonus[4], 0.0])])
    every = torch.cat([raw[0].repeat_interleave(2), raw[1, :2].repeat_interleave(3)])
    torch.testing.assert_close(values[0, :3], (raw[0] - every.mean()) / (every.std() + 1e-8))
    assert values[0, 1] > values[0, 0] > values[0, 2] > 0 > values[1, 0]


def test_filtered_and_unknown_rows_are_in_no_statistic() -> None:
    rewards, ids, potential, tokens = batch(3)
    rewards[4:8] = 1.0
    rewards[9] = NAN
    outcome, kept = outcome_advantages(rewards, ids)
    assert kept.tolist() == [True] * 4 + [False] * 4 + [True, False, True, True] and (outcome[~kept] == 0).all()
    values = spae_advantages(outcome, kept, potential, tokens)
    expected = spae_advantages(outcome[kept], kept[kept], potential[kept], tokens[kept])
    torch.testing.assert_close(values[kept], expected)
    assert (values[~kept] == 0).all()
    both, all_kept = outcome_advantages(rewards, ids, filter_zero_variance=False)
    assert all_kept.tolist() == [True] * 9 + [False] + [True] * 2 and (both[4:8] == 0).all()
    shaped = spae_advantages(both, all_kept, potential, tokens)
    assert (shaped[4:8] != 0).any()  # trained on shaping alone


def test_nothing_to_normalise() -> None:
    potential, none = torch.full((2, 1), NAN).double(), torch.zeros(2).bool()
    tokens = torch.tensor([[1, 0], [0, 0]])
    outcome = torch.tensor([0.5, -0.5]).double()
    assert (spae_advantages(outcome, none, potential, tokens) == 0).all()  # all groups filtered
    assert (spae_advantages(outcome, ~none, potential, tokens) == 0).all()  # one token
    assert (spae_advantages(outcome, ~none, potential, torch.tensor([[3, 0], [0, 0]])) == 0).all()  # all the same


# --- real runs --------------------------------------------------------------------------------------------------------

STEPS = [
    "so.\n\nit.\n\nok.\n\nsee</think>{a}",
    "so.\n\nno.\n\nthen</think>{a}.\n\nx",
    "hm?\n\nit</think>no",
    "so.\n\nit.\n\nit.\n\nit.\n\nno",
]
SCRIPT = {0: STEPS, 1: STEPS, 2: ["a.\n\nb{a}"] * 4, 3: ["a.\n\nbno", "a.\n\nbno", "c{a}", "d.\n\ne.\n\nf{a}"]}


class Play(Plugin):
    """Plays completions, and keeps rounds and what the model would have said."""

    name = "play"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []
        self.sampled: list[list[list[int]]] = []

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Generation:
        result, tokenizer = generate(prompts), trainer.processing_class
        self.sampled.append(result.completion_ids)
        numbers = [int(prompt[-1]["content"].partition("+")[0]) for prompt in prompts]
        start = trainer.process_index * len(prompts)
        texts = [SCRIPT[n % 4][(start + row) % 4].format(a=2 * n) for row, n in enumerate(numbers)]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        said = [[{"role": "assistant", "content": text}] for text in texts]
        return dataclasses.replace(result, completion_ids=ids, completions=said)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


def right(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [float(str(a) in message[0]["content"]) for message, a in zip(completions, answer, strict=True)]


@pytest.fixture
def tokenizer(model: str) -> Any:
    """A letter a token."""
    return PreTrainedTokenizerFast.from_pretrained(model)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A prober whose Acc and Conf rise with the step, and what it was asked."""
    module = types.ModuleType("probers_of_spae")
    module.asked = []  # type: ignore[attr-defined]

    def prober(probes: Any) -> list[tuple[float, float]]:
        module.asked.extend(probes)  # type: ignore[attr-defined]
        return [(min(0.3 + 0.35 * probe.step, 1.0), 0.98) for probe in probes]

    module.prober = prober  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


STUB = "probers_of_spae:prober"


@pytest.fixture
def run(build: Any, plugin: Any, tokenizer: Any) -> Any:
    def start(*, plugins: tuple[str, ...] = (), method: bool = True, **changes: Any) -> Any:
        options = {key: changes.pop(key) for key in list(changes) if key in SPAEOptions.__dataclass_fields__}
        common = {"rewards": [right], "data": tiny_data().select(range(4)), "shuffle_dataset": False, "max_steps": 1}
        common |= {"max_completion_length": 40, "per_device_train_batch_size": 16, "learning_rate": 0.05}
        common |= {"optim": "sgd", "trainer": {"processing_class": tokenizer} | changes.pop("trainer", {})}
        own = ["spae"] if method else []
        with trl_ext.enable(*plugins, plugin(Play), *own, **({"spae": options} if method else {})):
            trainer = build(**common | changes)
            trainer.train()
            played = trainer._trl_ext.plugins["play"]
            trainer.rounds, trainer.sampled = played.rounds, played.sampled
            trainer.spae = trainer._trl_ext.plugins.get("spae")
        return trainer

    return start


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_a_round_from_end_to_end(run: Any, stub: Any) -> None:
    """Steps, probes and advantages of all rows against a loop over the letters."""
    trainer = run(prober=STUB)
    (round,) = trainer.rounds
    texts = [message[0]["content"] for message in round.completions]
    ends = [
        [i + 2 for i in range(len(text)) if text.startswith(".\n\n", i) and i < (text + "</think>").index("</think>")]
        for text in texts
    ]
    assert [list(own.ends) for own in trainer.spae.steps[:4]] == [ends[0], ends[1], [], ends[3]]
    assert [len(own.ends) for own in trainer.spae.steps] == [3, 2, 0, 4, 3, 2, 0, 4, 0, 0, 0, 0, 1, 1, 0, 2]
    assert [own.ends for own in trainer.spae.steps[8:12]] == [()] * 4  # all right: not probed
    prompt = round.batch["prompt_ids"][0][round.batch["prompt_mask"][0].bool()].tolist()
    encode = trainer.processing_class.encode
    first = stub.asked[0]
    assert (first.row, first.step) == (0, 0)
    assert list(first.context) == prompt + encode("so.\n\n**Final Answer**\n\\boxed{", add_special_tokens=False)
    assert [probe.answer for probe in stub.asked] == [
        tuple(encode(round.rows[probe.row]["answer"], add_special_tokens=False)) for probe in stub.asked
    ]

    total = round.rewards[:, 0].double()
    values, kept = {}, [i for i in range(16) if i // 4 != 2]
    deltas = {}
    for i in kept:
        row = [phi(min(0.3 + 0.35 * k, 1.0), 0.98) for k in range(len(ends[i]))]
        values[i] = row
        deltas |= {(i, k): row[k] - row[k - 1] if k else 0.0 for k in range(len(row))}
    low, high = min(deltas.values()), max(deltas.values())
    grown = {key: math.exp((value - low) / (high - low)) for key, value in deltas.items()}
    mean_grown = sum(grown.values()) / len(grown)
    raw = {}
    for i in kept:
        group = total[i // 4 * 4 : i // 4 * 4 + 4]
        outcome = (total[i] - group.mean()).item()
        for j in range(len(texts[i])):
            step = min(sum(end < j for end in ends[i]), max(len(ends[i]) - 1, 0))
            known = sum(value > 0.9 for value in values[i][:step])
            bonus = grown[i, step] - mean_grown if ends[i] else 0.0
            raw[i, j] = outcome * (1 - 0.5 * (1 - math.exp(-known))) + 0.5 * bonus
    every = torch.tensor(list(raw.values())).double()
    expected = torch.zeros_like(round.advantages)
    for (i, j), value in raw.items():
        expected[i, j] = (value - every.mean()) / (every.std() + 1e-8)
    torch.testing.assert_close(round.advantages, expected, atol=1e-5, rtol=1e-5)
    assert list(trainer._logs["advantages"]) == pytest.approx(
        [sum(expected[i, : len(text)].tolist()) / len(text) for i, text in enumerate(texts)], abs=1e-5
    )
    assert sum(value > 0.9 for value in values[3]) == 2 and any(v < 1 for v in expected[3])


def test_what_a_round_reports(run: Any, stub: Any) -> None:
    trainer = run(prober=STUB, max_steps=2)
    values = [phi(min(0.3 + 0.35 * k, 1.0), 0.98) for k in range(4)]
    assert values[1] < 0.9 < values[2]
    assert logged(trainer, "spae/probes") == [22 / 16] * 2
    assert logged(trainer, "spae/steps") == [22 / 9] * 2
    assert logged(trainer, "spae/first_potential") == pytest.approx([values[0]] * 2)
    counts = [3, 2, 4, 3, 2, 4, 1, 1, 2]
    assert logged(trainer, "spae/last_potential")[0] == pytest.approx(sum(values[n - 1] for n in counts) / 9)
    # of the wrong rows with steps (three with four, two with one) those that have known it
    assert logged(trainer, "spae/right_to_wrong") == [0.5] * 2
    fourth = len("it.\n\n") + len("no")  # the tokens behind the third step, which is saturated
    assert logged(trainer, "spae/tokens_after_saturation")[0] > fourth / 200
    assert len(logged(trainer, "spae/probe_runtime")) == 2
    assert len(logged(trainer, "spae/probe_runtime_share")) == 1  # of the second round, which knows the first one's end
    assert 0 < logged(trainer, "spae/probe_runtime_share")[0] < 1
    assert logged(trainer, "trl_ext/spae/rows_kept") == [0.75] * 2


def test_the_bonus_and_the_penalty_can_be_switched_off(run: Any, stub: Any) -> None:
    """RF-B: the outcome advantage without a deviation, normalised over the batch's tokens."""
    (round,) = run(prober=STUB, alpha=0.0, xi=0.0).rounds
    outcome = group_normalize(round.rewards[:, 0], round.group_ids, scale=False).double()
    lengths = round.loss_mask.sum(1)
    tokens = outcome.repeat_interleave(lengths)
    assert (lengths[8:12] == 0).all()
    expected = (outcome - tokens.mean()) / (tokens.std() + 1e-8)
    torch.testing.assert_close(round.advantages, expected.float().unsqueeze(1) * round.loss_mask)


def test_filtered_groups_leave_no_trace_in_the_loss(run: Any, stub: Any) -> None:
    """The same step as without the prompt that is always answered right."""
    whole = run(prober=STUB)
    fewer = run(prober=STUB, data=tiny_data().select([0, 1, 3]), per_device_train_batch_size=12)
    for name, value in whole.model.named_parameters():
        torch.testing.assert_close(value, dict(fewer.model.named_parameters())[name], atol=1e-6, rtol=0)
    every = run(prober=STUB, filter_zero_variance=False)
    assert (every.rounds[0].advantages[8:12] != 0).any() and every.rounds[0].loss_mask[8:12].any()
    assert [len(own.ends) for own in every.spae.steps[8:12]] == [1] * 4
    assert logged(every, "trl_ext/spae/rows_kept") == []


def test_a_batch_without_any_signal(run: Any, stub: Any) -> None:
    trainer = run(prober=STUB, data=tiny_data().select([2]), per_device_train_batch_size=4, max_steps=2)
    assert stub.asked == []
    assert all((round.advantages == 0).all() for round in trainer.rounds)
    assert logged(trainer, "grad_norm") == [0.0] * 2


def test_the_tail_and_the_padded_width(run: Any, stub: Any) -> None:
    last, after = run(prober=STUB).rounds[0], run(prober=STUB, tail_mode="next").rounds[0]
    end = int(last.loss_mask[0].sum())
    text = last.completions[0][0]["content"]
    border = text.rindex(".\n\n") + 3
    assert len(set(last.advantages[0, border - 5 : end].tolist())) == 1
    assert after.advantages[0, border - 1] != after.advantages[0, border]
    wide = run(prober=STUB, pad_to_multiple_of=64).rounds[0]
    assert wide.advantages.shape[1] == 64 > last.advantages.shape[1]
    torch.testing.assert_close(wide.advantages[:, : last.advantages.shape[1]], last.advantages)
    assert (wide.advantages[:, last.advantages.shape[1] :] == 0).all()


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


def test_nan_rewards_and_truncated_completions(run: Any, stub: Any) -> None:
    def unsure(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
        return [None if row == 1 else value for row, value in enumerate(right(completions, answer))]

    trainer = run(prober=STUB, rewards=[unsure])
    (round,) = trainer.rounds
    assert trainer.spae.steps[1].ends == () and (round.advantages[1] == 0).all() and not round.loss_mask[1].any()
    masked = run(prober=STUB, mask_truncated_completions=True)  # none of these ends with the end of the text
    assert not any(own.ends for own in masked.spae.steps) and (masked.rounds[0].advantages == 0).all()


def test_evaluation(run: Any, build: Any, plugin: Any, tokenizer: Any, stub: Any) -> None:
    with trl_ext.enable(plugin(Play), "spae", spae={"prober": STUB}):
        extra = {"eval_dataset": tiny_data().select([0, 1]), "processing_class": tokenizer}
        settings = {"max_completion_length": 40, "per_device_train_batch_size": 16, "max_steps": 1}
        data = tiny_data().select(range(4))
        trainer = build(rewards=[right], data=data, trainer=extra, num_generations_eval=2, **settings)
        trainer.train()
        trainer.evaluate()
        last = trainer._trl_ext.plugins["play"].rounds[-1]
    assert last.mode == "eval" and last.loss_mask.any(dim=1).all()
    assert "eval_spae/probes" in trainer.state.log_history[-1]


# --- the policy as its own prober -------------------------------------------------------------------------------------


def by_hand(model: Any, context: list[int], answer: list[int]) -> tuple[list[float], list[float]]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1].double()
    p = logits.softmax(-1)
    return [p[i, token].item() for i, token in enumerate(answer)], (-(p * p.log()).sum(-1)).tolist()


@pytest.mark.parametrize("share", ["always", "never"])
def test_acc_and_conf_are_the_policy_s_own(share: str, run: Any, tokenizer: Any) -> None:
    """At temperature 1, though the trainer's is another; the model does not move."""
    trainer = run(num_probes=0, share=share, learning_rate=0.0, temperature=0.5)
    (round,) = trainer.rounds
    model = trainer.model.eval()
    checked = 0
    for row in (0, 1, 3, 15):
        own = trainer.spae.steps[row]
        prompt = round.batch["prompt_ids"][row][round.batch["prompt_mask"][row].bool()].tolist()
        answer = tokenizer.encode(round.rows[row]["answer"], add_special_tokens=False)
        for end, acc, conf in zip(own.ends, own.acc, own.conf, strict=True):
            context = [*prompt, *round.completion_ids[row][: end + 1]]
            context += tokenizer.encode("**Final Answer**\n\\boxed{", add_special_tokens=False)
            p, entropies = by_hand(model, context, answer)
            assert acc == pytest.approx(sum(p) / len(p), abs=1e-5)
            assert conf == pytest.approx(math.exp(-sum(entropies) / len(entropies)), abs=1e-5)
            checked += 1
    assert checked == 3 + 2 + 4 + 2


def test_drawn_answers(run: Any) -> None:
    """The tree and `generate` draw the same, a second run too; another seed draws others."""
    settings = {"num_probes": 3, "max_probe_tokens": 4, "learning_rate": 0.0}
    one, other, again = (run(share=share, **settings) for share in ("always", "never", "always"))
    for left, right_, same in zip(one.spae.steps, other.spae.steps, again.spae.steps, strict=True):
        assert left.conf == pytest.approx(right_.conf, abs=1e-4) and left.acc == pytest.approx(right_.acc, abs=1e-5)
        assert left == same
    assert all(0 < conf < 1 for own in one.spae.steps for conf in own.conf)
    seeded = run(share="always", seed=43, **settings)
    assert [own.conf for own in seeded.spae.steps] != [own.conf for own in one.spae.steps]
    forced = run(num_probes=0, learning_rate=0.0)
    assert forced.spae.steps[0].acc == pytest.approx(one.spae.steps[0].acc, abs=1e-5)
    assert forced.spae.steps[0].conf != pytest.approx(one.spae.steps[0].conf, abs=1e-7)
    assert logged(one, "spae/probe_dense_share") == [0.0] and logged(other, "spae/probe_dense_share") == [1.0]
    assert logged(one, "spae/probe_token_ratio")[0] > 2 > logged(other, "spae/probe_token_ratio")[0]


@pytest.mark.parametrize("share", ["always", "never"])
def test_probing_leaves_no_trace(share: str, run: Any) -> None:
    """What the model would say in later rounds is what it would say without the method: no random number was used."""
    settings = {"max_steps": 3, "learning_rate": 0.0}
    plain = run(method=False, **settings)
    probed = run(num_probes=2, max_probe_tokens=3, share=share, **settings)
    assert len(plain.sampled) == 3 and probed.sampled == plain.sampled
    assert probed.model.training == plain.model.training
    assert all(module.training for module in probed.model.modules())
    for name, value in plain.model.named_parameters():
        assert torch.equal(value, dict(probed.model.named_parameters())[name])


def test_gradients_are_those_of_the_advantages_alone(run: Any, stub: Any) -> None:
    """With a prober that says what the policy says, the step is the same."""
    first = run(num_probes=0)
    told = {
        (row, k): pair
        for row, own in enumerate(first.spae.steps)
        for k, pair in enumerate(zip(own.acc, own.conf, strict=True))
    }
    stub.prober = lambda probes: [told[probe.row, probe.step] for probe in probes]
    second = run(prober=STUB)
    for name, value in first.model.named_parameters():
        assert torch.equal(value, dict(second.model.named_parameters())[name])


def test_a_model_that_cannot_share_is_told_once(run: Any, tmp_path: Path) -> None:
    from trl_ext.testing import tiny_model

    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    model = tiny_model(tmp_path / "model", **window)
    with pytest.warns(UserWarning, match=r"probes do not share their prefixes.*window"):
        trainer = run(num_probes=0, model=model)
    assert logged(trainer, "spae/probe_dense_share") == [1.0]
    with pytest.raises(RuntimeError, match="window"):
        run(num_probes=0, model=model, share="always")


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


# --- declarations -----------------------------------------------------------------------------------------------------


def test_a_prober_that_breaks_its_contract(run: Any, stub: Any) -> None:
    stub.prober = lambda probes: [(1.0, 1.0)]
    with pytest.raises(ValueError, match="the prober answered 1 of 22 probes") as caught:
        run(prober=STUB)
    assert "trl_ext plugin 'spae'" in "".join(caught.value.__notes__)


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
        "'no_such_module:prober' cannot be loaded",
    ):
        assert part in str(caught.value), part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"),
        ({"xi": -0.1}, "xi must not be negative"),
        ({"eps_sat": 1.0}, "eps_sat must lie between"),
        ({"num_probes": -1}, "num_probes must not be negative"),
        ({"max_probe_tokens": 0}, "max_probe_tokens at least 1"),
        ({"max_steps_probed": 0}, "max_steps_probed"),
        ({"probe": ""}, "must not be empty"),
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

    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "spae.yaml").read_text())
    (spec,) = find.resolve(recipe.pop("plugins"))
    assert spec.cls is SPAE
    assert make_parser().set_defaults_with_config(**recipe) == []
