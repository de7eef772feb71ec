"""What recipes bring beside them: rewards and plugins that one comparison needs."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch

import trl_ext
from trl_ext import lab
from trl_ext.catalog import find
from trl_ext.lab.messages import assistant

TINY = Path(__file__).parents[2] / "recipes" / "tiny"


def part(reference: str) -> Any:
    cls, _, _ = find.find(str(TINY / reference))
    return cls(cls.Options())


def scored(rewards: list[list[float]], weights: list[float], **more: Any) -> Any:
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(seed=3), gather=lambda values: values)
    found = {"rewards": torch.tensor(rewards), "reward_weights": torch.tensor(weights), "trainer": trainer}
    return types.SimpleNamespace(reward_names=("right", "well_formed"), **found, **more)


def totals(state: Any, found: Any) -> torch.Tensor:
    """What is added, and that nothing else changes."""
    assert torch.equal(found.values[:, :2], state.rewards) and found.names[:2] == state.reward_names
    return found.values @ found.weights


def test_the_score_of_modes() -> None:
    (score,) = lab.task(f"{TINY / 'thinkless.py'}:TASK").rewards
    texts = ["<short>7", "<think>+4=7</think>7", "<short>8", "<think>+4=8</think>8", "<think>+4=7", "7", ""]
    assert score([assistant(text) for text in texts], answer=["7"] * 7) == [1.0, 0.5, -1.0, -1.0, -1.0, -1.0, -1.0]


def test_the_shift_is_one_constant_per_prompt_and_step() -> None:
    groups = torch.tensor([0, 0, 1, 1])
    state = scored([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]], [1.0, 1.0], group_ids=groups, step=5)
    plugin = part("p3o.py:Shift")
    shift = totals(state, plugin.rewards(state)) - state.rewards.sum(1)
    assert shift[0] == shift[1] != shift[2] == shift[3] and (shift * 8 == (shift * 8).round()).all()
    assert torch.equal(totals(state, plugin.rewards(state)) - state.rewards.sum(1), shift)
    state.step = 6
    assert not torch.equal(totals(state, plugin.rewards(state)) - state.rewards.sum(1), shift)


def test_the_adversary_keeps_the_order_of_levels() -> None:
    texts = ["b", "a", "c", "aa", "a"]
    rewards = [[1.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
    state = scored(rewards, [3.5, 0.5], completions=[assistant(text) for text in texts])
    right, bait, wrong, malformed, right_bait = totals(state, part("trpa.py:Adversary").rewards(state)).tolist()
    assert right == right_bait == 4.0 > bait > 3.8 > wrong == 0.5 > malformed == 0.0


def test_the_conflict_adds_up_to_a_little_noise() -> None:
    texts = ["a", "d", "", "bb"]
    state = scored([[0.0, 1.0]] * 4, [1.0, 0.0], completions=[assistant(text) for text in texts], step=5)
    found = part("dvao.py:Conflict").rewards(state)
    assert found.values[:, 2].tolist() == [1.0, 0.0, 0.0, 1.0]
    noise = totals(state, found)
    assert noise.abs().min() > 0 and noise.abs().max() < 0.1
    assert found.names[2:] == ("liked", "disliked") and found.weights.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_reinforce_is_its_policy_gradient(build: Any) -> None:
    """Rewards of 1 for everything: one step of SGD follows the gradient of the mean log-probability of completions."""

    def one(completions: list[Any], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    reference = f"{TINY / 'p3o.py'}:Reinforce"
    with trl_ext.enable(reference):
        trainer = build(rewards=[one], max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, beta=0.0)
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        kept: list[Any] = []
        compute = trainer._compute_loss

        def look(model: Any, inputs: Any) -> Any:
            kept.append(inputs)
            return compute(model, inputs)

        trainer._compute_loss = look
        trainer.train()
    fresh, (batch,) = build(beta=0.0).model, kept
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]
    logits = fresh(input_ids=ids, attention_mask=attention).logits[:, -width - 1 : -1]
    chosen = logits.log_softmax(-1).gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    (chosen * batch["completion_mask"]).sum(1).mean().backward()
    for (name, value), parameter in zip(trainer.model.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(value, before[name] + 0.1 * parameter.grad, atol=1e-5, rtol=0)


def test_different_right_letters_are_counted_by_group() -> None:
    task = lab.task(f"{TINY / 'polychromic.py'}:TASK")
    (right,), (row,) = task.rewards, task.rows("train", 1, 0)
    first, second, *_ = row["answers"]
    wrong = next(letter for letter in "abcdwxyzklmn" if letter not in row["answers"])
    texts = [first, first, second, wrong, first + second, "", first, second] + [first] * 8
    columns = {"completions": [assistant(text) for text in texts], "answers": [row["answers"]] * 16}
    assert right(**columns) == [1, 1, 1, 0, 0, 0, 1, 1] + [1] * 8
    assert task.behaviour(**columns) == {"different": [2.0] * 8 + [1.0] * 8}


def test_solver_and_clerk_are_paid_for_their_own_answers() -> None:
    solved, filed = lab.task(f"{TINY / 'dr_mas.py'}:TASK").rewards
    asked = [[{"role": "user", "content": text}] for text in ("3", "3a", "3ab", "3")]
    said = [assistant(text) for text in ("a", "y", "y", "b")]
    columns = {"prompts": asked, "completions": said, "agent": ["solver", "clerk", "clerk", "solver"]}
    assert solved(**columns, answer=["a"] * 4) == [1.0, None, None, 0.0]
    assert filed(**columns, answer=["a"] * 4) == [None, 0.0, 0.0, None]
    columns["completions"] = [assistant(text) for text in ("a", "x", "x", "b")]
    assert filed(**columns, answer=["a"] * 4) == [None, 1.0, 0.0, None]


def test_every_judge_of_the_ensemble_has_one_mistake_of_its_own() -> None:
    true, *judges = lab.task(f"{TINY / 'rm_ensemble.py'}:TASK").rewards
    texts = ["abcdab", "wwabcd", "xaaaaa", "awwwww", "yyyyyy", ""]
    completions = [assistant(text) for text in texts]
    assert true(completions) == [6.0, 2.0, 4.0, -4.0, -6.0, 0.0]
    scores = torch.tensor([judge(completions) for judge in judges])  # of w, x, y and z
    overpaid = scores - torch.tensor(true(completions))
    expected = torch.zeros(4, 6)
    expected[0, 1], expected[1, 2], expected[2, 4] = 18.0, 9.0, 54.0
    assert torch.equal(overpaid, expected)
