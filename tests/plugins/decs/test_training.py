"""DECS in real runs: a round from end to end, and the curriculum."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from trl_ext.testing import tiny_data
from trl_ext_plugins.decs import DECS
from trl_ext_plugins.decs.maths import position_advantages, token_rewards


def curriculum_of(decs: DECS) -> dict[str, Any]:
    return {name: getattr(decs, name) for name in decs.state}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def expected_span(text: str) -> tuple[int, int] | None:
    """By hand: from the second chunk, or the third, to the end of thinking; a letter is a token."""
    thinking = text.partition("</think>")[0]
    cut = thinking.find(" Wait") if text.startswith("try\n") and not text.startswith("try\nit") else -1
    return (cut, len(thinking)) if cut > 0 else None


def test_a_round_from_end_to_end(run: Any) -> None:
    """Spans, lengths and advantages of all rows, against a loop over the letters."""
    trainer = run(curriculum=False)
    (round,) = trainer.rounds
    texts = [completion[0]["content"] for completion in round.completions]
    chunks = trainer.decs.chunks
    spans = [expected_span(text) if reward else None for text, reward in zip(texts, round.rewards[:, 0], strict=True)]
    assert [chunk.span for chunk in chunks] == spans
    assert sum(span is not None for span in spans) == 1 + 1 + 0 + 2
    assert [chunks[i].labels for i in (0, 1, 2, 3, 5)] == ["adc", "a", "ba", "bb", "bb"]
    lengths = torch.tensor([len(text) for text in texts])
    assert lengths.tolist() == [len(ids) for ids in round.completion_ids]
    rewards = token_rewards(
        round.rewards[:, 0], torch.tensor([s or (0, 0) for s in spans]), lengths, int(lengths.max()), limit=64
    )
    expected = position_advantages(rewards, round.group_ids) * round.loss_mask
    torch.testing.assert_close(round.advantages, expected.float())
    first, end = spans[12]  # the group in which all are right
    assert (round.advantages[12, first:end] < 0).any() and (round.advantages[14][round.loss_mask[14] == 1] >= 0).all()
    answer = texts[12].index("</think>")
    assert (round.advantages[12, answer:] == 0).all()  # no token of the answer is ever redundant
    assert logged(trainer, "decs/prefix_ratio") == pytest.approx(
        [(1 / 3 + 1 + 1 + 1 / 3 + 1 + 1 / 3 + 1 / 3 + 1 + 1) / 9]
    )
    redundant = sum(end - start for start, end in filter(None, spans))
    assert logged(trainer, "decs/redundant_tokens")[0] == pytest.approx(
        redundant / sum(len(text) for text, chunk in zip(texts, chunks, strict=True) if chunk.ratio)
    )


def test_chunks_are_there_to_look_at(run: Any) -> None:
    trainer = run(curriculum=False)
    (round,) = trainer.rounds
    views = trainer.decs.inspect(round=round)
    shown = [(span.row, span.label, span.start, span.end) for span in views.spans if span.row in (0, 2)]
    (a, b, c), (d, e) = trainer.decs.chunks[0].ends, trainer.decs.chunks[2].ends
    assert shown == [
        (0, "first answer 1", 0, a),
        (0, "redundant 2", a, b),
        (0, "redundant 3", b, c),
        (2, "chunk 1", 0, d),
        (2, "first answer 2", d, e),
    ]


def test_the_printed_equation_too(run: Any) -> None:
    official, printed = (run(curriculum=False, redundant_reward=form).rounds[0] for form in ("official", "eq9"))
    start, end = expected_span(official.completions[4][0]["content"])
    assert (printed.advantages[4, start:end] < official.advantages[4, start:end]).all()
    assert torch.equal(printed.advantages[4, :start], official.advantages[4, :start])


def test_the_judge_is_asked_about_right_completions_once_each(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("judges_of_decs")
    asked: list[Any] = []

    def judge(questions: Any) -> list[bool]:
        asked.append(list(questions))
        return [question.answer in question.text for question in questions]

    module.judge = judge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    trainer = run(curriculum=False, judge="judges_of_decs:judge")
    (questions,) = asked  # one call
    assert len(questions) == len(set(questions))
    assert {question.problem for question in questions} == {"0+0=", "1+1=", "3+3="}  # "2+2=" is always answered wrong
    assert {question.answer for question in questions} == {"0", "2", "6"}
    assert not any("</think>" in question.text for question in questions)
    chunks = sum(len(chunk.verdicts) for chunk in trainer.decs.chunks)
    assert chunks == 3 + 1 + 2 + 2 + 3 + 1 + 3 + 3 + 1 + 2 > len(questions)
    assert logged(trainer, "decs/judge_calls") == [len(questions) / 10]


# --- the curriculum in real runs --------------------------------------------------------------------------------------


def groups_kept(round: Any) -> list[int]:
    return round.group_ids[round.loss_mask.sum(1) > 0].unique().tolist()


def test_without_easy_prompts_at_first(run: Any) -> None:
    """kappa starts at 0: mixed prompts stay, what is always right or always wrong goes, and R moves kappa."""
    trainer = run(max_steps=2)
    for round in trainer.rounds:
        assert groups_kept(round) == [1]
        assert (round.advantages[round.group_ids != 1] == 0).all()
        assert round.batch["num_items_in_batch"] == round.loss_mask.sum() < round.batch["completion_mask"].sum()
    ratio = (1 / 3 + 1) / 2  # of the two right completions of the prompt that stayed
    assert trainer.decs.ratio == pytest.approx(ratio)
    assert logged(trainer, "decs/kappa") == pytest.approx([0.2 * (ratio - 0.5)] * 2)
    assert logged(trainer, "decs/easy_prompts") == [0.5] * 2 and logged(trainer, "decs/mixed_prompts") == [0.25] * 2
    assert logged(trainer, "decs/easy_prompts_kept") == [0.0] * 2
    assert logged(trainer, "decs/rows_kept") == [0.25] * 2


def test_a_dropped_group_has_no_gradient_and_no_share_in_the_denominator(run: Any) -> None:
    """The same step as on the prompt that stays, alone."""
    whole = run()
    alone = run(data=tiny_data().select([1]), per_device_train_batch_size=4)
    for name, value in whole.model.named_parameters():
        torch.testing.assert_close(value, dict(alone.model.named_parameters())[name], atol=1e-6, rtol=0)
    everything = run(curriculum=False)
    assert logged(whole, "grad_norm") == pytest.approx(logged(alone, "grad_norm"), rel=1e-4)
    assert logged(whole, "grad_norm") != pytest.approx(logged(everything, "grad_norm"), rel=1e-2)


@pytest.mark.slow
def test_easy_prompts_are_dosed(run: Any) -> None:
    """Two mixed prompts and kappa = 0.35 leave room for one of the two easy ones, drawn anew each round."""
    trainer = run("easy", kappa_init=0.35, kappa_lr=0.0, max_steps=6)
    kept = [groups_kept(round) for round in trainer.rounds]
    assert all(len(groups) == 3 and {1, 2} < set(groups) for groups in kept)
    assert {0, 3} < {group for groups in kept for group in groups}
    assert logged(trainer, "decs/easy_prompts_kept") == [0.5] * 6
    again = run("easy", kappa_init=0.35, kappa_lr=0.0, max_steps=6)
    assert [groups_kept(round) for round in again.rounds] == kept
    other = run("easy", kappa_init=0.35, kappa_lr=0.0, max_steps=6, seed=1)
    assert [groups_kept(round) for round in other.rounds] != kept


@pytest.mark.slow
def test_rounds_too_small_for_an_easy_prompt_add_up(run: Any) -> None:
    """kappa = 0.2 asks for half a prompt a round with two mixed ones: every second round, or never."""
    settings = {"kappa_init": 0.2, "kappa_lr": 0.0, "max_steps": 6}
    assert [len(groups_kept(round)) for round in run("easy", **settings).rounds] == [2, 3, 2, 3, 2, 3]
    assert [len(groups_kept(round)) for round in run("easy", carry=False, **settings).rounds] == [2] * 6


def test_the_curriculum_can_be_left_out(run: Any) -> None:
    trainer = run(curriculum=False, max_steps=2)
    assert all(groups_kept(round) == [0, 1, 2, 3] for round in trainer.rounds)
    assert logged(trainer, "decs/kappa") == [0.0] * 2 and logged(trainer, "decs/rows_kept") == []


def test_a_round_without_a_usable_completion_leaves_kappa_alone(run: Any) -> None:
    trainer = run(
        judge="trl_ext_plugins.decs.maths:easy_allowed",
        kappa_init=0.3,
        data=tiny_data().select([2]),
        per_device_train_batch_size=4,
        max_steps=2,
    )
    assert trainer.decs.kappa == 0.3 and trainer.decs.ratio == 0.5
    assert all(groups_kept(round) == [] for round in trainer.rounds)
    assert logged(trainer, "loss") == [0.0] * 2 and logged(trainer, "grad_norm") == [0.0] * 2


def test_kappa_is_capped_by_the_share_of_easy_prompts(run: Any) -> None:
    assert run("easy", kappa_init=0.9).decs.kappa == 0.5  # two of four
    assert run("easy", kappa_init=0.0, ratio_init=1.0).decs.kappa == 0.0


def test_a_resumed_run_continues_the_curriculum(run: Any) -> None:
    """kappa, R, the mixed prompts that wait, and the next draw are all in the checkpoint."""
    settings = {"kappa_init": 0.15, "ratio_init": 0.4, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    whole = run("easy", **settings)
    resumed = run("easy", resume=f"{whole.args.output_dir}/checkpoint-1", **settings)
    assert [groups_kept(round) for round in resumed.rounds] == [groups_kept(round) for round in whole.rounds[1:]]
    assert curriculum_of(resumed.decs) == curriculum_of(whole.decs)
    assert whole.decs.rounds == 4 and whole.decs.kappa not in (0.0, 0.15)
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name])
    state = torch.load(f"{whole.args.output_dir}/checkpoint-1/trl_ext_state.pt", weights_only=True)["plugins"]["decs"]
    assert state["state"].keys() == {"kappa", "ratio", "mixed", "rounds"}
