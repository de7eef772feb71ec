"""SPAE in real runs: with a stub as the prober, and with the policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_ext.testing import tiny_data
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.spae.maths import step_potential

STUB = "probers_of_spae:prober"


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def phi(acc: float, conf: float) -> float:
    return step_potential(torch.tensor(acc).double(), torch.tensor(conf).double()).item()


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
    assert logged(trainer, "spae/rows_kept") == [0.75] * 2


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
    assert logged(every, "spae/rows_kept") == []


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
