"""The stages of a round in real trainers: rows, rollout, fields, rewards, advantages, order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import brevity, digits, metrics_of, tiny_data
from trl_ext.trl_internals.row_order import GROUP_IDS
from trl_ext_hooks import Plugin, Rewards, hookimpl
from trl_ext_hooks.toolkit.groups import group_normalize

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(trainer.model.named_parameters())


def assert_equal_training(one: Any, other: Any) -> None:
    for name, value in parameters(one).items():
        assert torch.equal(value, parameters(other)[name]), name


# --- rows and rollout -------------------------------------------------------------------------------------------------


class OnlyEven(Plugin):
    name = "only-even"
    trainers = ROUNDS
    needs = ("column:index",)

    @hookimpl
    def select_rows(self, rows: list[dict[str, Any]], trainer: Any) -> list[dict[str, Any]]:
        self.seen = [row["index"] for row in rows]
        self.mode = trainer.unwrapped_model.training
        data = tiny_data()
        return [data[2 * (i // 4)] for i in range(len(rows))]


@pytest.mark.parametrize("kind", ROUNDS)
def test_select_rows_replaces_the_prompts_of_training_rounds_only(kind: str, build: Any, plugin: Any) -> None:
    scored: list[list[int]] = []

    def record(completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        scored.append(list(index))
        return [float(i) for i in range(len(index))]

    with trl_ext.enable(plugin(OnlyEven)):
        trainer = build(kind, rewards=[record], trainer={"eval_dataset": tiny_data().select([3, 5])}, max_steps=1)
        trainer.train()
        assert scored == [[0, 0, 0, 0, 2, 2, 2, 2]]
        seen = own(trainer, "only-even").seen
        assert len(seen) == 8 and seen[:4] == [seen[0]] * 4
        scored.clear()
        trainer.evaluate()
    assert scored == [[3, 3, 3, 3, 5, 5, 5, 5]]


class Hint(Plugin):
    name = "hint"
    trainers = ROUNDS
    text = "Z"

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any) -> Any:
        return generate([[*prompt, {"role": "user", "content": self.text}] for prompt in prompts])


class Hint2(Hint):
    name = "hint-2"
    text = "Q"


@pytest.mark.parametrize("kind", ROUNDS)
def test_rollout_edits_prompts_and_the_first_plugin_is_outermost(kind: str, build: Any, plugin: Any) -> None:
    prompts_of_rewards: list[Any] = []

    def record(prompts: list[Any], **kwargs: Any) -> list[float]:
        prompts_of_rewards.extend(prompts)
        return [float(i) for i in range(len(prompts))]

    with trl_ext.enable(plugin(Hint), plugin(Hint2)):
        trainer = build(kind, rewards=[record], max_steps=1)
        trainer.train()
    ids = trainer._buffered_inputs[0]["prompt_ids"]
    texts = trainer.processing_class.batch_decode(ids)
    tail = "user\nZ<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert all(text.endswith(tail) for text in texts)
    assert all(len(prompt) == 1 for prompt in prompts_of_rewards)  # reward functions keep the prompt of the data


class SecondPass(Plugin):
    name = "second-pass"
    trainers = ROUNDS

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any) -> Any:
        self.first = generate(prompts)
        drafts = [completion[0]["content"] for completion in self.first.completions]
        self.second = generate([[{"role": "user", "content": draft}] for draft in drafts])
        return self.second


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_rollout_may_have_two_passes(kind: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(SecondPass)):
        trainer = build(kind, max_steps=1)
        trainer.train()
        passes = own(trainer, "second-pass")
    shown = [text if isinstance(text, str) else text[0]["content"] for text in list(trainer._logs["completion"])]
    assert shown == [completion[0]["content"] for completion in passes.second.completions]
    assert shown != [completion[0]["content"] for completion in passes.first.completions]
    batch = trainer._buffered_inputs[0]
    trained = {
        tuple(row[mask.bool()].tolist())
        for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    }
    assert trained == {tuple(ids) for ids in passes.second.completion_ids}


class Annotator(Plugin):
    name = "annotator"
    trainers = ROUNDS
    fields = ("questions", "label")

    @hookimpl
    def annotate(self, rollout: Any) -> dict[str, Any]:
        self.ids = rollout.completion_ids
        lengths = torch.tensor([float(len(ids)) for ids in rollout.completion_ids])
        return {"questions": lengths, "label": [f"row{i}" for i in range(len(rollout.rows))]}

    @hookimpl
    def rewards(self, scored: Any) -> None:
        self.fields_seen, self.gathered = scored.fields, scored.gathered


@pytest.mark.parametrize("kind", ROUNDS)
def test_fields_reach_reward_functions_and_later_hooks(kind: str, build: Any, plugin: Any) -> None:
    given: dict[str, Any] = {}

    def record(completions: list[Any], questions: list[Any], label: list[str], **kwargs: Any) -> list[float]:
        given.update(questions=questions, label=label)
        return [float(q) for q in questions]

    with trl_ext.enable(plugin(Annotator)):
        trainer = build(kind, rewards=[record], max_steps=1)
        trainer.train()
        mine = own(trainer, "annotator")
    lengths = [float(len(ids)) for ids in mine.ids]
    assert [float(q) for q in given["questions"]] == lengths
    assert given["label"] == [f"row{i}" for i in range(8)]
    assert mine.gathered["questions"].tolist() == lengths and "label" not in mine.gathered
    assert mine.fields_seen["label"] == given["label"]
    assert logged(trainer, "rewards/record/mean") == [pytest.approx(sum(lengths) / 8)]


# --- rewards ----------------------------------------------------------------------------------------------------------


class Triple(Plugin):
    name = "triple"
    trainers = ROUNDS

    @hookimpl
    def rewards(self, scored: Any) -> torch.Tensor:
        self.before = scored.rewards.clone()
        return 3 * scored.rewards


class Swap(Plugin):
    """Drops `brevity`, adds `bonus` with a weight of its own."""

    name = "swap"
    trainers = ROUNDS

    @hookimpl
    def rewards(self, scored: Any) -> Rewards:
        assert scored.reward_names == ("digits", "brevity")
        self.before = scored.rewards.clone()
        bonus = torch.arange(len(scored.rewards)).float() % 3
        return Rewards(torch.stack([scored.rewards[:, 0], bonus], dim=1), ("digits", "bonus"), torch.tensor([1.0, 0.5]))

    @hookimpl
    def round_metrics(self, round: Any) -> dict[str, tuple[float, float]]:
        assert round.reward_names == ("digits", "bonus")
        self.round = round
        return {"bonus": (round.rewards[:, 1].sum().item(), len(round.rewards))}


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("order", ["triple-first", "swap-first"])
def test_rewards_are_chained_logged_and_used(kind: str, order: str, build: Any, plugin: Any) -> None:
    references = [plugin(Triple), plugin(Swap)]
    with trl_ext.enable(*(references if order == "triple-first" else references[::-1])):
        trainer = build(kind, beta=0.0, log_completions=True)
        functions = list(trainer.reward_funcs)
        trainer.train()
        triple, swap = own(trainer, "triple"), own(trainer, "swap")
    if order == "triple-first":
        assert torch.equal(swap.before, 3 * triple.before)
        final = swap.round.rewards
    else:
        final = 3 * triple.before
        assert torch.equal(swap.round.rewards, final)
    assert logged(trainer, "rewards/digits/mean")[-1] == pytest.approx(final[:, 0].mean().item())
    assert logged(trainer, "rewards/bonus/mean")[-1] == pytest.approx(final[:, 1].mean().item())
    assert logged(trainer, "swap/bonus")[-1] == pytest.approx(final[:, 1].mean().item())
    assert not logged(trainer, "rewards/brevity/mean")
    total = final[:, 0] + 0.5 * final[:, 1]
    assert logged(trainer, "reward")[-1] == pytest.approx(total.mean().item())
    if kind == "grpo":
        expected = group_normalize(total, swap.round.group_ids)
        torch.testing.assert_close(swap.round.advantages, expected, atol=1e-5, rtol=0)
    # after the round the trainer has its own functions again
    assert trainer.reward_funcs == functions and trainer.reward_func_names == ["digits", "brevity"]
    assert trainer.reward_weights.tolist() == [1.0, 1.0]


def test_nan_from_a_plugin_means_does_not_apply(build: Any, plugin: Any) -> None:
    class Unscored(Plugin):
        name = "unscored"
        trainers = ("grpo",)

        @hookimpl
        def rewards(self, scored: Any) -> torch.Tensor:
            out = scored.rewards.clone()
            out[2] = torch.nan
            return out

        @hookimpl
        def round_metrics(self, round: Any) -> None:
            self.advantages = round.advantages

    with trl_ext.enable(plugin(Unscored)):
        trainer = build(max_steps=1)
        trainer.train()
        advantages = own(trainer, "unscored").advantages
    assert advantages[2] == 0 and torch.isfinite(advantages).all() and (advantages != 0).sum() > 4


# --- advantages -------------------------------------------------------------------------------------------------------


class MeanOnly(Plugin):
    name = "mean-only"
    trainers = ROUNDS
    claims = ("estimator",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        total = (round.rewards * round.reward_weights).nansum(1)
        self.mine = group_normalize(total, round.group_ids, scale=False)
        return self.mine


class PlusOne(Plugin):
    name = "plus-one"
    trainers = ROUNDS

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        self.before = round.advantages
        return round.advantages + 1


class Twice(Plugin):
    name = "twice"
    trainers = ROUNDS

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        return 2 * round.advantages

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.final, self.batch = round.advantages, round.batch["advantages"]


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_estimator_comes_first_then_the_given_order(kind: str, order: Any, build: Any, plugin: Any) -> None:
    references = [plugin(MeanOnly), plugin(PlusOne), plugin(Twice)]
    with trl_ext.enable(*(references[i] for i in order)):
        trainer = build(kind, max_steps=1)
        trainer.train()
        base, plus, twice = (own(trainer, name) for name in ("mean-only", "plus-one", "twice"))
    added_first = order.index(1) < order.index(2)
    expected = 2 * (base.mine + 1) if added_first else 2 * base.mine + 1
    torch.testing.assert_close(twice.final, expected)
    torch.testing.assert_close(twice.batch, expected)
    torch.testing.assert_close(plus.before, base.mine if added_first else 2 * base.mine)
    change = logged(trainer, "trl_ext/plus-one/advantage_change")
    assert change == [pytest.approx(1.0)]
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.tolist())
    used = trainer._buffered_inputs[0]["advantages"]
    assert sorted(used.tolist()) == pytest.approx(sorted(expected.tolist()))


def test_the_logged_share_of_silent_groups_follows_the_advantages_used(build: Any, plugin: Any) -> None:
    class SilenceFirst(Plugin):
        name = "silence-first"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round: Any) -> torch.Tensor:
            return torch.where(round.group_ids == 0, 0.0, round.advantages)

    plain = build(max_steps=1)
    plain.train()
    with trl_ext.enable(plugin(SilenceFirst)):
        trainer = build(max_steps=1)
        trainer.train()
    assert logged(plain, "frac_reward_zero_std") == [0.0]
    assert logged(trainer, "frac_reward_zero_std") == [0.5]


class Spread(Plugin):
    """The row's advantage on each of its tokens, which must train as the row's advantage does."""

    name = "spread"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        rows = round.advantages[round.local].unsqueeze(1)
        return rows.expand(-1, round.loss_mask.shape[1])


def test_token_wise_copies_of_row_advantages_train_bit_identically(build: Any, plugin: Any) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    plain = build(**settings)
    plain.train()
    with trl_ext.enable(plugin(Spread)):
        trainer = build(**settings, log_completions=True)
        trainer.train()
    assert_equal_training(plain, trainer)
    assert trainer._buffered_inputs[0]["advantages"].dim() == 2
    assert list(trainer._logs["advantages"]) == pytest.approx(list(plain._logs["advantages"]))
    assert logged(trainer, "frac_reward_zero_std") == logged(plain, "frac_reward_zero_std")


class LastToken(Plugin):
    """All credit on the last token that counts."""

    name = "last-token"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        positions = torch.arange(round.loss_mask.shape[1])
        last = positions == round.loss_mask.sum(1, keepdim=True) - 1
        return round.advantages[round.local].unsqueeze(1) * last

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.round = round


class HalveTokens(Plugin):
    name = "halve-tokens"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        assert round.advantages.dim() == 2
        return 0.5 * round.token_advantages


def test_token_wise_advantages_reach_the_loss_and_the_log_shows_their_mean(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(LastToken), plugin(HalveTokens)):
        trainer = build(max_steps=1, log_completions=True)
        trainer.train()
        round = own(trainer, "last-token").round
    assert round.advantages.shape == round.loss_mask.shape
    assert ((round.advantages != 0).sum(1) <= 1).all() and (round.advantages != 0).any()
    means = round.advantages.sum(1) / round.loss_mask.sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(means.tolist())
    batch = trainer._buffered_inputs[0]
    assert (batch["advantages"] * (1 - batch["completion_mask"]) == 0).all()
    plain = build(max_steps=1)
    plain.train()
    assert logged(plain, "grad_norm") != pytest.approx(logged(trainer, "grad_norm"), rel=1e-2)


# --- fields of the batch and the order of rows ------------------------------------------------------------------------


class Carry(Plugin):
    """Fields that can be recomputed from the row that they belong to."""

    name = "carry"
    trainers = ROUNDS
    fields = ("key", "wide", "number")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rows = 0

    @hookimpl
    def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
        ids = round.batch["completion_ids"]
        return {"key": ids.sum(1), "wide": ids[:, :2].float(), "number": torch.tensor(7.0)}

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        ids = loss.batch["completion_ids"]
        assert torch.equal(loss.batch["key"], ids.sum(1))
        assert torch.equal(loss.batch["wide"], ids[:, :2].float())
        assert loss.batch["number"].item() == 7.0
        self.rows += len(ids)


@pytest.mark.parametrize("kind", ROUNDS)
def test_batch_fields_travel_with_their_rows(kind: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Carry)):
        trainer = build(kind, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
        trainer.train()
        assert own(trainer, "carry").rows == 16


class Grouped(Plugin):
    name = "grouped"
    trainers = ROUNDS
    needs = ("grouped_order",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.groups: list[list[int]] = []
        self.prompts: list[torch.Tensor] = []
        self.texts: list[Any] = []

    @hookimpl
    def annotate(self, rollout: Any) -> None:
        self.texts += rollout.completion_ids

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.groups.append(loss.batch[GROUP_IDS].tolist() if GROUP_IDS in loss.batch else [])
        self.prompts.append(loss.batch["prompt_ids"])


class Whole(Grouped):
    name = "whole"
    needs = ("whole_groups",)


class Watcher(Grouped):
    name = "watcher"
    needs = ()


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("cls", [Whole, Grouped])
def test_groups_stay_whole_and_the_random_stream_stays_trls(kind: str, cls: Any, build: Any, plugin: Any) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 3}
    settings |= {"loss_type": "grpo"} if kind == "grpo" else {}
    with trl_ext.enable(plugin(Watcher)):
        plain = build(kind, **settings)
        plain.train()
        before = own(plain, "watcher")
        random = torch.get_rng_state()
    with trl_ext.enable(plugin(cls)):
        trainer = build(kind, **settings)
        trainer.train()
        after = own(trainer, cls.name)
    assert all(len(set(groups)) == 1 and len(groups) == 4 for groups in after.groups)
    assert all((prompts == prompts[0]).all() for prompts in after.prompts)
    assert any(not (prompts == prompts[0]).all() for prompts in before.prompts)
    orders = [tuple(groups[0] for groups in after.groups[i : i + 4]) for i in (0, 4, 8)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len(set(orders)) > 1
    # same draws, so the same completions, and nearly the same parameters
    assert before.texts == after.texts
    assert torch.equal(random, torch.get_rng_state())
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(trainer)[name], value, atol=2e-4, rtol=0)


def test_groups_wider_than_a_micro_batch_stay_in_neighbouring_ones(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Grouped)):
        trainer = build(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
        trainer.train()
        groups = own(trainer, "grouped").groups
    assert all(len(set(pair)) == 1 for pair in groups)
    assert all(groups[i] == groups[i + 1] for i in range(0, 8, 2))


def test_evaluation_is_not_reordered(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Whole)):
        trainer = build(trainer={"eval_dataset": tiny_data().select([3, 5])}, max_steps=1)
        trainer.train()
        mine = own(trainer, "whole")
        mine.groups.clear()
        trainer.evaluate()
    assert mine.groups == [[0, 0, 0, 0, 1, 1, 1, 1]]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_are_sums_over_counts_under_the_plugins_name(build: Any, plugin: Any) -> None:
    class Report(Plugin):
        name = "report"
        trainers = ROUNDS

        @hookimpl
        def round_metrics(self, round: Any) -> dict[str, tuple[float, float]]:
            return {"ratio": (6, 4), "nothing": (0, 0)}

        @hookimpl
        def loss_metrics(self, loss: Any) -> dict[str, tuple[float, float]]:
            return {"rows": (float(len(loss.per_token_logps)), 1)}

    for kind in ROUNDS:
        with trl_ext.enable(plugin(Report)):
            trainer = build(kind, trainer={"eval_dataset": tiny_data().select([0])}, max_steps=2)
            trainer.train()
            trainer.evaluate()
        assert logged(trainer, "report/ratio") == [1.5, 1.5]
        assert logged(trainer, "report/rows") == [8.0, 8.0]
        assert logged(trainer, "eval_report/ratio") == [1.5]
        assert not logged(trainer, "report/nothing")


def test_rewards_and_advantages_see_every_reward_function(build: Any, plugin: Any) -> None:
    class Look(Plugin):
        name = "look"
        trainers = ROUNDS

        @hookimpl
        def rewards(self, scored: Any) -> None:
            self.scored = scored

    with trl_ext.enable(plugin(Look)):
        trainer = build(max_steps=1, reward_weights=[0.25, 4.0])
        trainer.train()
        scored = own(trainer, "look").scored
    assert scored.reward_names == ("digits", "brevity") and scored.reward_weights.tolist() == [0.25, 4.0]
    ids, texts = scored.completion_ids, scored.completions
    expected = torch.tensor([digits(texts), brevity(ids)]).T
    torch.testing.assert_close(scored.rewards, expected)
    assert (scored.num_generations, scored.mode, scored.step, scored.offset) == (4, "train", 0, 0)
    assert scored.group_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert metrics_of(trainer)[0]["reward"] == pytest.approx((scored.rewards @ scored.reward_weights).mean().item())
