"""Rows of a plugin's own: scored by the policy beside those of the round, with the right weight in every split."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, PolicyLoss, SideBatch, hookimpl

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
COMPLETIONS = [[20, 21, 22, 23, 24], [30], [40, 41]]


class Rehearse(Plugin):
    """Learns from its own rows only."""

    name = "rehearse"
    trainers = ("grpo", "rloo")
    rows = 3

    def start(self) -> None:
        self.seen: list[Any] = []
        self.asked: list[tuple[str, int]] = []

    @hookimpl
    def side_batch(self, trainer: Any, mode: str, step: int) -> SideBatch | None:
        self.asked.append((mode, step))
        ids = torch.tensor([[*row, *[0] * (5 - len(row))] for row in COMPLETIONS])
        return (
            SideBatch(PROMPTS[: self.rows], COMPLETIONS[: self.rows], {"ids": ids[: self.rows]}) if self.rows else None
        )

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        side = loss.side[self.name]
        assert side.per_token_logps.shape == side.entropies.shape == side.mask.shape
        if self.rows:  # its own values travel with the rows
            assert torch.equal(side.fields["ids"] * side.mask, side.completion_ids)
        assert ((side.per_token_logps < 0) == (side.mask == 1)).all()
        self.seen.append(side)
        return PolicyLoss(0.0 * (loss.per_token_logps * loss.mask).sum())

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        side = loss.side[self.name]
        rows = -(side.per_token_logps * side.mask).sum(1)
        return {"tokens": side.token_mean(-side.per_token_logps), "rows": 0.1 * side.row_mean(rows)}


def expected(model: str, rate: float) -> tuple[dict[str, torch.Tensor], float]:
    """The parameters after one step of gradient descent on the three rows, and the mean loss of their tokens."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model)
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        rows.append(-logits.log_softmax(-1).gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1))
    tokens = torch.cat(rows).mean()
    (tokens + 0.1 * torch.stack([row.sum() for row in rows]).mean()).backward()
    return {name: p.detach() - rate * p.grad for name, p in policy.named_parameters()}, tokens.item()


SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 1e9}


@pytest.mark.parametrize(
    ("kind", "plugins", "settings"),
    [
        ("grpo", [], SPLIT),
        ("grpo", [{"shared-prefix": {"min_gain": 0}}], SPLIT | {"gradient_accumulation_steps": 4}),
        ("rloo", [], SPLIT | {"beta": 0.0}),
    ],
    ids=["grpo", "shared-prefix", "rloo"],
)
def test_every_token_has_the_same_weight(
    kind: str, plugins: list[Any], settings: dict[str, Any], model: str, train: Any, plugin: Any
) -> None:
    """Three rows in two micro-batches, and in four, of which one then has no row."""
    parameters, mean = expected(model, 0.1)
    with trl_ext.enable(plugin(Rehearse), *plugins):
        trainer = train(kind, max_steps=1, learning_rate=0.1, lr_scheduler_type="constant", **settings)
        seen = trainer._trl_ext.plugins["rehearse"].seen
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(
            value.detach(), parameters[name], atol=2e-6, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert trainer.state.log_history[0]["rehearse/tokens"] == pytest.approx(mean, rel=1e-5)
    parts = settings["gradient_accumulation_steps"]
    assert [len(side.mask) for side in seen] == ([1, 2] if parts == 2 else [0, 1, 1, 1])
    assert {(side.rows, side.tokens, side.micro_batches) for side in seen} == {(3, 8, parts)}


def test_no_row_is_no_forward_and_evaluation_has_rows_too(model: str, build: Any, plugin: Any) -> None:
    class Without(Rehearse):
        name = "without"
        rows = 0

    def run(cls: type[Plugin]) -> tuple[Any, int]:
        with trl_ext.enable(plugin(cls)):
            data = {"eval_dataset": tiny_data().select(range(2))}
            sizes = {"num_generations_eval": 2, "per_device_eval_batch_size": 4, "num_iterations": 2}
            trainer = build(trainer=data, max_steps=2, beta=0.0, **sizes, **SPLIT)
            forwards: list[int] = []
            trainer.model.base_model.register_forward_hook(lambda *args: forwards.append(1))
            trainer.train()
            counted = len(forwards)
            trainer.evaluate()
            return trainer._trl_ext.plugins[cls.name], counted

    (own, more), (none, fewer) = run(Rehearse), run(Without)
    assert more == fewer + 4  # one for each micro-batch
    assert own.asked == none.asked == [("train", 0), ("train", 1), ("eval", 2)]
    assert len(own.seen[-1].mask) == 3 and own.seen[-1].micro_batches == 1
    assert {(len(side.mask), side.rows, float(side.token_mean(side.mask))) for side in none.seen} == {(0, 0, 0.0)}


class Off(Plugin):
    name = "off"
    trainers = ("grpo",)
    answer: Any = None

    @hookimpl
    def side_batch(self) -> Any:
        return self.answer

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        return None


WRONG = [
    ([[1], [2]], "list from 'side_batch', expected a SideBatch or None"),
    (SideBatch([[1], [2]], [[3]]), "2 prompts and 1 completions from 'side_batch', expected as many"),
    (
        SideBatch([[]], [[3]]),
        "the prompt [] in row 0 from 'side_batch', expected at least one token id, each from 0 to 99",
    ),
    (SideBatch([[1], [2]], [[3], []]), "the completion [] in row 1 from 'side_batch'"),
    (SideBatch([[1]], [[3000]]), "the completion [3000] in row 0"),
    (SideBatch([[1]], [torch.tensor([0.5])]), "the completion [0.5] in row 0"),
    (
        SideBatch([[1]], [[3]], {"x": torch.zeros(2)}),
        "(2,) for the field 'x' from 'side_batch', expected a tensor with 1",
    ),
    (SideBatch([[1]], [[3]], {"x": [1]}), "list for the field 'x' from 'side_batch'"),
]


def test_wrong_rows_are_named(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Off)):
        trainer = build(max_steps=1)
        for answer, text in WRONG:
            trainer._trl_ext.plugins["off"].answer = answer
            with refused(trl_ext.PluginError, f"plugin 'off' returned {text}"):
                trainer.train()


def test_rows_whose_loss_nobody_returns_are_refused(build: Any, plugin: Any) -> None:
    class Forgotten(Plugin):
        name = "forgotten"
        trainers = ("grpo",)

        @hookimpl
        def side_batch(self) -> None:
            return None

    with trl_ext.enable(plugin(Forgotten)), refused(trl_ext.PluginError, "'forgotten' supplies rows in its hook"):
        build()
