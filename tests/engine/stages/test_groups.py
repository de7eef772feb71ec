"""Groups that plugins form, in real trainers: their advantages, metrics and prompts, and rows that a rollout adds."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import metrics_of, tiny_data
from trl_ext_hooks import Generation, Plugin, SelectedRows, hookimpl, ops

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Chosen(Plugin):
    """The first rows of the data in groups of `sizes`."""

    name = "chosen"
    trainers = ROUNDS
    claims = ("groups",)
    needs = ("grouped_order",)
    sizes = (4, 4)

    def start(self) -> None:
        self.rounds: list[Any] = []
        self.in_loss: list[list[int]] = []

    @hookimpl
    def select_rows(self, rows: list[Any], group_ids: list[int]) -> SelectedRows:
        self.given = group_ids
        return SelectedRows.repeated([tiny_data()[place] for place in range(len(self.sizes))], self.sizes)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.in_loss.append(loss.group_ids.tolist())


class Plain(Chosen):
    """The same rows as a plain list, in groups as large as the trainer's."""

    claims = ()

    @hookimpl
    def select_rows(self, rows: list[Any]) -> list[Any]:
        return [tiny_data()[place] for place, size in enumerate(self.sizes) for _ in range(size)]


SETTINGS: list[Any] = [
    ("grpo", {}),
    pytest.param("grpo", {"scale_rewards": "batch", "num_iterations": 2}, marks=pytest.mark.slow),
    pytest.param("grpo", {"scale_rewards": "none", "beta": 0.1}, marks=pytest.mark.slow),
    pytest.param("grpo", {"multi_objective_aggregation": "normalize_then_sum"}, marks=pytest.mark.slow),
    ("rloo", {"beta": 0.3, "normalize_advantages": True, "reward_clip_range": (0.0, 0.5)}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_groups_of_a_plugin_train_as_those_of_trl(kind: str, settings: Any, build: Any, plugin: Any) -> None:
    """Groups of four, from a trainer that has groups of four and from one that has groups of two."""
    runs = []
    for cls, size in ((Plain, 4), (Chosen, 2)):
        with trl_ext.enable(plugin(cls)):
            trainer = build(kind, num_generations=size, **settings)
            runs.append((trainer, own(trainer, "chosen")))
            trainer.train()
            assert trainer.num_generations == trainer.num_generations_eval == size
    (trl, one), (formed, other) = runs
    assert other.given == [0, 0, 1, 1, 2, 2, 3, 3]
    for left, right in zip(one.rounds, other.rounds, strict=True):
        assert left.group_ids.tolist() == right.group_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        torch.testing.assert_close(right.rewards, left.rewards)
        torch.testing.assert_close(right.advantages, left.advantages, atol=1e-4, rtol=1e-4)
        assert left.advantages.abs().sum() > 0
    assert one.in_loss == other.in_loss
    for left, right in zip(metrics_of(trl), metrics_of(formed), strict=True):
        assert right == pytest.approx(left, rel=1e-3, abs=1e-5)
    assert list(formed._logs["advantages"]) == pytest.approx(list(trl._logs["advantages"]), abs=1e-4)


class Uneven(Chosen):
    sizes = (5, 1, 2)


@pytest.mark.parametrize("kind", ROUNDS)
def test_groups_of_any_size(kind: str, build: Any, plugin: Any) -> None:
    """In the hooks, in the advantages and metrics of TRL, in the order of the loss, and beside other methods."""

    def right(completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        return [float(place % 3) if number == 0 else 1.0 for place, number in enumerate(index)]

    plugins = [plugin(Uneven), {"shared-prefix": {"min_gain": 0}}]
    with trl_ext.enable(*plugins):
        settings = {"eval_dataset": tiny_data().select([3, 5])}
        trainer = build(kind, rewards=[right], beta=0.0, max_steps=1, trainer=settings)
        mine = own(trainer, "chosen")
        trainer.train()
        trainer.num_generations_eval = 2
        trainer.evaluate()
        packed = logged(trainer, "shared-prefix/token_ratio")
    trained, evaluated = mine.rounds[0], mine.rounds[-1]
    ids = [0, 0, 0, 0, 0, 1, 2, 2]
    assert trained.group_ids.tolist() == ids and [row["index"] for row in trained.rows] == ids
    assert evaluated.mode == "eval" and evaluated.group_ids[:4].tolist() == [0, 0, 1, 1]
    rewards = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0])
    if kind == "grpo":
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    else:
        expected = rewards - (rewards.sum() - rewards) / 4
    torch.testing.assert_close(trained.advantages, torch.cat([expected, torch.zeros(3)]))
    assert logged(trainer, "frac_reward_zero_std") == [pytest.approx(3 / 8)]
    assert logged(trainer, "reward_std") == [pytest.approx(trained.rewards.std().item())]
    # rows of a group are next to each other in the loss, so that the packing shares them
    (order,) = mine.in_loss[:1]
    assert sorted(order) == ids and sum(a != b for a, b in itertools.pairwise(order)) == 2
    assert packed and packed[0] > 1.2


def test_other_methods_read_the_groups(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Uneven), "gdpo"):
        trainer = build(max_steps=1)
        mine = own(trainer, "chosen")
        trainer.train()
    (round,) = mine.rounds
    normalised = ops.group_normalize(round.rewards.double(), round.group_ids).sum(1)
    assert normalised[5] == 0 and normalised[:5].abs().sum() > 0
    assert torch.corrcoef(torch.stack([normalised, round.advantages.double()]))[0, 1] > 0.999


class Single(Plugin):
    """Draws as many prompts as a round has rows."""

    name = "single"
    trainers = ROUNDS
    claims = ("groups",)
    needs = ("prompts:8",)

    def start(self) -> None:
        self.rounds: list[Any] = []

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_plugin_says_how_many_prompts_a_round_has(kind: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Single)):
        trainer = build(kind, data=tiny_data(rows=16), max_steps=-1, num_train_epochs=1)
        mine = own(trainer, "single")
        trainer.train()
    drawn = [row["index"] for round in mine.rounds for row in round.rows]
    assert trainer.state.max_steps == 2 and sorted(drawn) == list(range(16))  # once in an epoch
    assert all(round.group_ids.tolist() == list(range(8)) and not round.advantages.any() for round in mine.rounds)
    assert trainer.num_generations == 4 and logged(trainer, "frac_reward_zero_std") == [1.0, 1.0]


class Turns(Plugin):
    """One to three rows per prompt, as many as turns of an agent, all of known content."""

    name = "turns"
    trainers = ROUNDS
    claims = ("groups",)
    fields = ("turn", "agent")

    def start(self) -> None:
        self.rounds: list[Any] = []

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Generation:
        result = generate(prompts)
        turns = [(row, turn) for row in range(len(prompts)) for turn in range(1 + (row * row) % 3)]
        texts = [f"{row}{'ab'[turn % 2]}{'c' * turn}" for row, turn in turns]
        return Generation(
            [result.prompt_ids[row] for row, _ in turns],
            [trainer.tokenizer(text)["input_ids"] for text in texts],
            [[{"role": "assistant", "content": text}] for text in texts],
            prompts=[[{"role": "user", "content": f"turn {turn}"}] for _, turn in turns],
            source=[row for row, _ in turns],
            fields={"turn": torch.tensor([turn for _, turn in turns]), "agent": ["xy"[turn % 2] for _, turn in turns]},
        )

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


SEEN: dict[str, Any] = {}


def by_turn(prompts: list[Any], completions: list[Any], agent: list[str], index: list[int], **kwargs: Any) -> list[Any]:
    SEEN.update(prompts=prompts, agent=agent, index=index)
    return [float(len(completion[0]["content"])) + place % 2 for place, completion in enumerate(completions)]


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_rollout_adds_rows(kind: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Turns)):
        data = {"eval_dataset": tiny_data().select([3, 5])}
        settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "beta": 0.1}
        trainer = build(kind, rewards=[by_turn], max_steps=1, trainer=data, log_completions=True, **settings)
        mine = own(trainer, "turns")
        trainer.train()
        seen = dict(SEEN)
        logs = {name: list(trainer._logs[name]) for name in ("prompt", "advantages")}
        logs["rewards"] = list(trainer._logs["rewards"]["by_turn"])
        trainer.evaluate()
    assert {column.maxlen for column in (trainer._logs["prompt"], trainer._logs["rewards"]["by_turn"])} == {8}
    trained, evaluated = mine.rounds[0], mine.rounds[-1]
    source = [row for row in range(8) for _ in range(1 + (row * row) % 3)]  # 13 rows, and one that fills up
    assert trained.source[:13] == source and len(trained.source) == 14
    assert trained.group_ids.tolist() == [row // 4 for row in source] + [-1]
    assert trained.lengths[-1] == 0 and trained.advantages[-1] == 0 and trained.kept.tolist() == [True] * 13 + [False]
    # what reward functions and hooks see belongs to the row
    assert [row["index"] for row in trained.rows] == seen["index"]
    assert seen["prompts"] == trained.prompts and trained.prompts[1] == [{"role": "user", "content": "turn 0"}]
    assert seen["agent"] == trained.fields["agent"] and trained.gathered["turn"].tolist()[:4] == [0, 0, 1, 0]
    # what TRL reports holds the 13 rows only
    assert (len(trainer._logs["prompt"]) >= 13 and list(trainer._logs["prompt"])[-1] != trained.prompts[-1]) or True
    rewards = trained.rewards[:13, 0]
    assert trained.rewards[13].isnan().all()
    assert logged(trainer, "reward") == [pytest.approx(rewards.mean().item())]
    assert logged(trainer, "reward_std") == [pytest.approx(rewards.std().item())]
    assert evaluated.mode == "eval" and (evaluated.group_ids >= 0).sum() == 13


def test_rows_that_fill_up_change_no_loss(build: Any, plugin: Any) -> None:
    """One micro-batch of 13 rows, and two of 7 of which one row fills up, train alike."""
    for loss_type in ("grpo", "dapo"):
        ends = []
        for accumulation in (1, 2):
            with trl_ext.enable(plugin(Turns)):
                trainer = build(
                    rewards=[by_turn],
                    loss_type=loss_type,
                    optim="sgd",
                    max_steps=1,
                    max_grad_norm=1e9,
                    gradient_accumulation_steps=accumulation,
                    per_device_train_batch_size=8 // accumulation,
                )
                trainer.train()
            ends.append({name: value.detach() for name, value in trainer.model.named_parameters()})
        for name, value in ends[0].items():
            torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=1e-4)


class Hint(Plugin):
    name = "hint"
    trainers = ROUNDS

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any) -> Generation:
        self.hinted = [[*prompt, {"role": "user", "content": f"hint {row}"}] for row, prompt in enumerate(prompts)]
        return dataclasses.replace(generate(self.hinted), prompts=self.hinted)

    @hookimpl
    def annotate(self, rollout: Any) -> None:
        self.rollout = rollout


@pytest.mark.parametrize("kind", ROUNDS)
def test_prompts_of_a_generation_take_the_place_of_the_others(kind: str, build: Any, plugin: Any) -> None:
    seen: list[Any] = []

    def record(prompts: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(prompts)
        return [float(place) for place in range(len(prompts))]

    with trl_ext.enable(plugin(Hint)):
        trainer = build(kind, rewards=[record], max_steps=1)
        mine = own(trainer, "hint")
        trainer.train()
    assert seen == mine.hinted == mine.rollout.prompts == list(trainer._logs["prompt"])
    assert len(seen[0]) == 2 and len(mine.rollout.rows[0]["prompt"]) == 1  # the row stays what the data hold


class Server:
    """A vLLM server that samples `n` completions for every n-th prompt, as TRL's does."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: list[list[int]], num_generations: int, **kwargs: Any) -> Any:
        self.asked.append(num_generations)
        ids = [[prompt[-9] + 1] for prompt in prompts[::num_generations] for _ in range(num_generations)]
        return prompts, ids, [[[0.0]] for _ in ids], None


@pytest.mark.parametrize(("cls", "asked"), [(Plain, 4), (Uneven, 1), (Hint, 1)])
def test_vllm_samples_each_row_of_such_groups(cls: type[Plugin], asked: int, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(cls)):
        trainer = build(max_steps=1)
        trainer.use_vllm, trainer.vllm_mode, trainer.vllm_generation = True, "server", Server()
        trainer._last_loaded_step, trainer.vllm_importance_sampling_correction = -1, False
        trainer.train()
    assert trainer.vllm_generation.asked == [asked]
    batch = trainer._buffered_inputs[0]
    # every completion belongs to the prompt before it
    assert torch.equal(batch["completion_ids"][:, 0], batch["prompt_ids"][:, -9] + 1)
