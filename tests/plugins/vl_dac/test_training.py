"""VL-DAC in real runs: rounds, losses, warm-up and what the value learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_ext.testing import metrics_of, tiny_model
from trl_ext_plugins.vl_dac.critic import ValueHead
from trl_ext_plugins.vl_dac.maths import first_tokens, token_counts


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


def test_the_value_learns_what_episodes_are_worth(run: Any, tmp_path: Path, call: Any) -> None:
    model = tiny_model(tmp_path / "wide", tools=True, initializer_range=0.4)  # states that tell transcripts apart
    script = [[call("go", pay=1), call("end", pay=1), "bye"], [call("go", pay=-1), call("end", pay=0), "bye"]]
    settings = {"per_device_train_batch_size": 2, "max_steps": 60, "num_iterations": 2, "learning_rate": 0.0}
    trainer = run(script, model=model, value_lr=0.01, value_clip=False, kl_beta=0.0, head_sizes=[64], **settings)
    explained, losses = logged(trainer, "explained_variance"), logged(trainer, "value_loss")
    assert explained[0] < 0.1 and max(explained) > 0.3  # untrained states hardly differ, so it learns slowly here
    assert min(losses[-5:]) < 0.9 * losses[0]
    assert "vl-dac/kl" not in metrics_of(trainer)[0]
