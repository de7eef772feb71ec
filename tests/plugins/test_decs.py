"""DECS: chunks, spans, rewards and advantages per position, the curriculum, and real runs with all of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import types
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
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_hooks.toolkit.judges import JudgeError
from trl_ext_plugins.decs import DECS, DECSOptions
from trl_ext_plugins.decs.maths import (
    Chunks,
    easy_allowed,
    next_kappa,
    position_advantages,
    token_rewards,
)

NAN = math.nan
SEEDS = st.integers(0, 10_000)


def facts(seed: int, groups: int = 3, size: int = 4, width: int = 12) -> tuple[torch.Tensor, ...]:
    """(correct, spans, lengths, group ids) of random completions, some of them with a span."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size

    def below(high: int) -> torch.Tensor:
        return torch.randint(0, high, (rows,), generator=generator)

    lengths = 2 + below(width - 1)
    correct = (below(3) > 0).double()
    start = below(width) % lengths
    end = start + below(width) % (lengths - start + 1)
    spans = torch.stack([start, end], dim=1) * correct.long().unsqueeze(1)
    return correct, spans, lengths, torch.arange(rows) // size


def advantages(
    correct: torch.Tensor, spans: torch.Tensor, lengths: torch.Tensor, ids: torch.Tensor, width: int, **settings: Any
) -> torch.Tensor:
    """As the plugin puts them together, without the mask."""
    rewards = token_rewards(correct, spans, lengths, width, **{"limit": 16} | settings)
    return position_advantages(rewards, ids)


# --- chunks and spans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "first", "span", "ratio", "labels"),
    [
        ((False, True, False, True), 1, (20, 40), 0.5, "bacd"),
        ((True, True), 0, (10, 20), 0.5, "ad"),
        ((False, True), 1, None, 1.0, "ba"),  # the answer comes last
        ((False, False), None, None, 0.0, "bb"),  # right, but no chunk says so
        ((), None, None, 0.0, "bb"),  # not asked
        ((None, True, True), None, None, 0.0, "bbb"),  # may have been the first
        ((True, None, False), 0, (10, 30), 1 / 3, "acc"),  # what comes after does not matter
        ((False, None), None, None, 0.0, "bb"),
    ],
)
def test_what_verdicts_mean(
    verdicts: tuple[bool | None, ...], first: int | None, span: Any, ratio: float, labels: str
) -> None:
    ends = tuple(10 * (i + 1) for i in range(max(len(verdicts), 2)))
    chunks = Chunks(ends, verdicts)
    assert (chunks.first, chunks.span, chunks.labels) == (first, span, labels)
    assert chunks.ratio == pytest.approx(ratio)


# --- rewards and advantages -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(["official", "eq9"]))
def test_it_is_the_loop_of_the_equations(seed: int, form: Any) -> None:
    correct, spans, lengths, ids = facts(seed)
    found = advantages(correct, spans, lengths, ids, 12, form=form)

    def reward(i: int, j: int) -> float:
        if not correct[i]:
            return 0.0
        if not spans[i, 0] <= j < spans[i, 1]:
            return 1.1
        share = lengths[i].item() / 16
        return 1.0 + 0.1 * (1 - share) if form == "official" else 1.0 - 0.1 * share

    for group, j in itertools.product(range(3), range(12)):
        rows = range(4 * group, 4 * group + 4)
        values = [reward(i, j) for i in rows]
        mean = sum(values) / 4
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
        expected = [(value - mean) / (std + 1e-6) if max(values) - min(values) > 1e-6 else 0.0 for value in values]
        assert found[list(rows), j].tolist() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_without_spans_it_is_grpo_on_the_binary_reward(seed: int) -> None:
    correct, spans, lengths, ids = facts(seed)
    found = advantages(correct, torch.zeros_like(spans), lengths, ids, 12)
    assert torch.equal(found, found[:, :1].expand_as(found))
    torch.testing.assert_close(found[:, 0], group_normalize(1.1 * correct, ids, eps=1e-6))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(["official", "eq9"]))
def test_every_position_sums_to_0(seed: int, form: Any) -> None:
    found = advantages(*facts(seed), 12, form=form)
    assert found.view(3, 4, 12).sum(dim=1).abs().max() < 1e-9


@pytest.mark.parametrize("form", ["official", "eq9"])
def test_a_redundant_row_among_right_ones_loses(form: Any) -> None:
    spans = torch.tensor([[3, 7], [0, 0], [0, 0], [0, 0]])
    found = advantages(torch.ones(4), spans, torch.tensor([8, 6, 5, 8]), torch.zeros(4).long(), 10, form=form)
    assert (found[0, 3:7] < -1).all() and (found[1:, 3:7] > 0).all()
    assert (found[:, :3] == 0).all() and (found[:, 7:] == 0).all()


def test_finished_rows_count_with_their_padding() -> None:
    """A right sibling without a span may end anywhere: the others do not see it."""
    spans, ids = torch.tensor([[3, 7], [0, 0], [0, 0]]), torch.zeros(3).long()
    found = [advantages(torch.ones(3), spans, torch.tensor([8, 9, length]), ids, 10)[:2] for length in (1, 4, 9)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[0][0, 3:7] < 0).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_limit_cancels_where_all_are_right(seed: int) -> None:
    _, spans, lengths, ids = facts(seed)
    right = torch.ones(12)
    near, far = (advantages(right, spans, lengths, ids, 12, limit=limit) for limit in (12, 1012))
    gaps = 0.1 / 1012  # the deviation that the epsilon of 1e-6 stands beside
    torch.testing.assert_close(near, far, atol=3 * 1e-6 / gaps, rtol=0)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(["official", "eq9"]))
def test_only_the_span_has_the_lower_reward(seed: int, form: Any) -> None:
    correct, spans, lengths, _ = facts(seed)
    rewards = token_rewards(correct, spans, lengths, 12, limit=16, form=form)
    position = torch.arange(12)
    inside = (position >= spans[:, :1]) & (position < spans[:, 1:])
    right = (correct == 1).unsqueeze(1)
    assert (rewards[~right.expand_as(rewards)] == 0).all()
    assert (rewards[right & ~inside] == 1.1).all()
    low, high = (1.0, 1.1) if form == "official" else (0.9, 1.0)
    assert ((rewards[right & inside] >= low - 1e-9) & (rewards[right & inside] <= high)).all()


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 20))
def test_a_wider_batch_changes_nothing(seed: int, more: int) -> None:
    narrow, wide = (advantages(*facts(seed), width) for width in (12, 12 + more))
    assert torch.equal(wide[:, :12], narrow)


@pytest.mark.parametrize("size", [3, 6, 7, 9, 10, 12])
def test_equal_rewards_give_exactly_0(size: int) -> None:
    rewards = torch.full((size, 5), 1.1)  # whose mean in float32 is not 1.1
    assert (position_advantages(rewards, torch.zeros(size).long()) == 0).all()


def test_rows_without_a_reward_count_nowhere() -> None:
    spans = torch.tensor([[2, 4], [0, 0], [0, 0], [0, 0]])
    ids, lengths = torch.zeros(4).long(), torch.full((4,), 5)
    found = advantages(torch.tensor([1.0, NAN, 0.0, 1.0]), spans, lengths, ids, 5)
    rest = [0, 2, 3]
    expected = advantages(torch.tensor([1.0, 0.0, 1.0]), spans[rest], lengths[rest], ids[rest], 5)
    torch.testing.assert_close(found[rest], expected)
    assert (found[1] == 0).all()
    assert (advantages(torch.full((4,), NAN), spans, lengths, ids, 5) == 0).all()


def test_a_group_of_one_and_a_group_without_a_right_row_give_nothing() -> None:
    spans, lengths = torch.tensor([[1, 3], [0, 0]]), torch.tensor([4, 4])
    assert (advantages(torch.tensor([1.0, 0.0]), spans, lengths, torch.arange(2), 4) == 0).all()
    assert (advantages(torch.zeros(2), spans, lengths, torch.zeros(2).long(), 4) == 0).all()


def test_one_right_row_keeps_a_positive_advantage_on_its_span() -> None:
    spans = torch.zeros(16, 2).long()
    spans[0] = torch.tensor([1, 3])
    correct = torch.zeros(16)
    correct[0] = 1
    found = advantages(correct, spans, torch.full((16,), 8), torch.zeros(16).long(), 4)
    assert (found[0] > 1).all() and (found[1:] < 0).all()


@pytest.mark.parametrize(("form", "expected"), [("official", 0.2), ("eq9", -0.1)])
def test_the_figures_of_a_mixed_group(form: Any, expected: float) -> None:
    """One wrong row of 16 lowers the mean so far that redundancy costs little: why the curriculum is needed."""
    spans = torch.zeros(16, 2).long()
    spans[0] = torch.tensor([1, 3])
    correct = torch.ones(16)
    correct[1] = 0
    lengths = torch.full((16,), 2)
    found = advantages(correct, spans, lengths, torch.zeros(16).long(), 4, form=form, limit=16)
    assert found[0, 1].item() == pytest.approx(expected, abs=0.05)
    correct[2:5] = 0
    found = advantages(correct, spans, lengths, torch.zeros(16).long(), 4, form=form, limit=16)
    assert found[0, 1] > 0


# --- curriculum -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), max_size=20), st.floats(0, 3))
def test_kappa_stays_between_0_and_its_cap(rounds: list[tuple[float, float]], lr: float) -> None:
    kappa, previous = 0.0, 0.5
    for ratio, cap in rounds:
        kappa, previous = next_kappa(kappa, ratio, previous, lr=lr, cap=cap), ratio
        assert 0 <= kappa <= min(cap, 0.99)
        assert easy_allowed(kappa, 50) >= 0


def test_a_steady_ratio_leaves_kappa_alone() -> None:
    assert next_kappa(0.3, 0.7, 0.7, lr=0.5) == 0.3
    assert next_kappa(0.3, 0.8, 0.7) > 0.3 > next_kappa(0.3, 0.6, 0.7)


@pytest.mark.parametrize(
    ("kappa", "mixed", "allowed"), [(0, 50, 0), (0.5, 7, 7), (0.1, 8, 0), (0.1, 10, 1), (0.99, 1, 98)]
)
def test_doses(kappa: float, mixed: int, allowed: int) -> None:
    assert easy_allowed(kappa, mixed) == allowed


# --- real runs --------------------------------------------------------------------------------------------------------

LONG = "try\n{a}\nso Wait, see\n{a}\nok Hmm, x\ny\nz</think>it is {a}"  # says it, says it again, goes on
SHORT = "try\n{a}\nso</think>it is {a}"
LATE = "try\nit\nso Wait, see\n{a}\nok</think>it is {a}"
SILENT = "try\nit\nso Wait, s\nt\nu</think>{a}"  # right, and no chunk says so
WRONG = "try\nit\nso Wait, s\nt\nu</think>no"

SCRIPTS: dict[str, list[list[str]]] = {
    # four completions for each of four prompts
    "all kinds": [[LONG, SHORT, LATE, SILENT], [LONG, WRONG, SHORT, WRONG], [WRONG] * 4, [LONG, LONG, SHORT, LATE]],
    "easy": [
        [LONG, SHORT, SHORT, SHORT],
        [LONG, WRONG, SHORT, WRONG],
        [LATE, WRONG, LONG, LONG],
        [SHORT, LONG, LONG, LATE],
    ],
}


class Script(Plugin):
    """Plays completions: what prompt `i+i=` is answered with is in the script."""

    name = "script"
    trainers = ("grpo",)
    script = SCRIPTS["all kinds"]

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result, tokenizer = generate(prompts), trainer.processing_class
        start = trainer.process_index * len(prompts)
        texts = []
        for row, prompt in enumerate(prompts):
            number = int(prompt[-1]["content"].partition("+")[0])
            lines = self.script[number % len(self.script)]
            texts.append(lines[(start + row) % len(lines)].format(a=2 * number))
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        said = [[{"role": "assistant", "content": text}] for text in texts]
        return dataclasses.replace(result, completion_ids=ids, completions=said)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


def right(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    texts = [message[0]["content"].rpartition("</think>")[2] for message in completions]
    return [float(text.endswith(str(expected))) for text, expected in zip(texts, answer, strict=True)]


@pytest.fixture
def tokenizer(model: str) -> Any:
    """A letter a token, so that tokens can be counted as letters."""
    return PreTrainedTokenizerFast.from_pretrained(model)


@pytest.fixture
def run(build: Any, plugin: Any, tokenizer: Any) -> Any:
    """Trains with DECS on the script; the prompts come in order, all four in each round."""

    def start(
        script: str = "all kinds", *, resume: str | None = None, plugins: tuple[str, ...] = (), **changes: Any
    ) -> Any:
        options = {key: changes.pop(key) for key in list(changes) if key in DECSOptions.__dataclass_fields__}
        common = {"rewards": [right], "data": tiny_data().select(range(4)), "shuffle_dataset": False, "max_steps": 1}
        common |= {"max_completion_length": 64, "per_device_train_batch_size": 16, "learning_rate": 0.05}
        common |= {"optim": "sgd", "trainer": {"processing_class": tokenizer} | changes.pop("trainer", {})}
        cls = type("Played", (Script,), {"script": SCRIPTS[script]})
        with trl_ext.enable(*plugins, plugin(cls), "decs", decs=options):
            trainer = build(**common | changes)
            trainer.train(resume_from_checkpoint=resume)
            trainer.decs = trainer._trl_ext.plugins["decs"]
            trainer.rounds = trainer._trl_ext.plugins["script"].rounds
        return trainer

    return start


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
    start, end = expected_span(LONG.format(a=2))
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
    assert logged(trainer, "trl_ext/decs/rows_kept") == [0.25] * 2


def test_a_dropped_group_has_no_gradient_and_no_share_in_the_denominator(run: Any) -> None:
    """The same step as on the prompt that stays, alone."""
    whole = run()
    alone = run(data=tiny_data().select([1]), per_device_train_batch_size=4)
    for name, value in whole.model.named_parameters():
        torch.testing.assert_close(value, dict(alone.model.named_parameters())[name], atol=1e-6, rtol=0)
    everything = run(curriculum=False)
    assert logged(whole, "grad_norm") == pytest.approx(logged(alone, "grad_norm"), rel=1e-4)
    assert logged(whole, "grad_norm") != pytest.approx(logged(everything, "grad_norm"), rel=1e-2)


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


def test_rounds_too_small_for_an_easy_prompt_add_up(run: Any) -> None:
    """kappa = 0.2 asks for half a prompt a round with two mixed ones: every second round, or never."""
    settings = {"kappa_init": 0.2, "kappa_lr": 0.0, "max_steps": 6}
    assert [len(groups_kept(round)) for round in run("easy", **settings).rounds] == [2, 3, 2, 3, 2, 3]
    assert [len(groups_kept(round)) for round in run("easy", carry=False, **settings).rounds] == [2] * 6


def test_the_curriculum_can_be_left_out(run: Any) -> None:
    trainer = run(curriculum=False, max_steps=2)
    assert all(groups_kept(round) == [0, 1, 2, 3] for round in trainer.rounds)
    assert logged(trainer, "decs/kappa") == [0.0] * 2 and logged(trainer, "trl_ext/decs/rows_kept") == []


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
    assert resumed.decs.state_dict() == whole.decs.state_dict()
    assert whole.decs.rounds == 4 and whole.decs.kappa not in (0.0, 0.15)
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name])
    state = torch.load(f"{whole.args.output_dir}/checkpoint-1/trl_ext_state.pt", weights_only=True)["plugins"]["decs"]
    assert state["state"].keys() == {"kappa", "ratio", "mixed", "rounds"}


# --- edges ------------------------------------------------------------------------------------------------------------


def test_nan_rewards_are_left_out(run: Any) -> None:
    def unsure(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float | None]:
        return [None if row in (1, 12) else value for row, value in enumerate(right(completions, answer))]

    trainer = run(rewards=[unsure], curriculum=False)
    (round,) = trainer.rounds
    assert (round.advantages[[1, 12]] == 0).all()
    assert trainer.decs.chunks[1].verdicts == () and trainer.decs.chunks[0].verdicts
    assert math.isfinite(logged(trainer, "loss")[0])


def test_a_reward_that_scales_stays_binary(run: Any) -> None:
    """An overlong penalty lowers the reward of right completions: they stay right above the threshold."""

    def penalised(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
        return [value - 0.01 * row if value else -0.5 for row, value in enumerate(right(completions, answer))]

    plain, scaled = run(curriculum=False).rounds[0], run(curriculum=False, rewards=[penalised]).rounds[0]
    assert torch.equal(plain.advantages, scaled.advantages)
    strict = run(curriculum=False, rewards=[penalised], correct_above=0.98).rounds[0]
    assert not torch.equal(plain.advantages, strict.advantages)


def test_the_answer_is_a_column_that_may_have_holes(run: Any) -> None:
    data = tiny_data().select(range(4)).remove_columns("answer")
    data = data.add_column("solution", ["0", None, "4", "  "])

    def right(completions: list[Any], **kwargs: Any) -> list[float]:
        return [0.0 if "no" in message[0]["content"] else 1.0 for message in completions]

    trainer = run(rewards=[right], data=data, answer_column="solution", curriculum=False)
    asked = [bool(chunk.verdicts) for chunk in trainer.decs.chunks]
    assert asked == [True] * 4 + [False] * 12
    assert logged(trainer, "decs/no_answer") == [6 / 10]
    with pytest.raises(trl_ext.ConfigError, match="decs: the training data has no column 'answer'"):
        run(rewards=[right], data=data)


def test_tool_results_neither_cut_nor_break(run: Any, plugin: Any) -> None:
    class Tools(Plugin):
        """The first chunk's words come from a tool, up to and with the first Wait."""

        name = "tools"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
            result = generate(prompts)
            texts = [message[0]["content"] for message in result.completions]
            masks = [[int(i >= text.find("Wait") + 4) for i in range(len(text))] for text in texts]
            return dataclasses.replace(result, tool_mask=masks)

    with_tools = run(curriculum=False, plugins=(plugin(Tools),))
    assert with_tools.decs.chunks[0].ends == (LONG.format(a=0).index(" Hmm"), LONG.format(a=0).index("</think>"))
    assert len(run(curriculum=False).decs.chunks[0].ends) == 3


def test_no_end_of_thinking_and_nothing_at_all(build: Any, plugin: Any, tokenizer: Any) -> None:
    bare = type("Bare", (Script,), {"script": [["try\n0\nso Wait, x\ny\nz", "", "Wait", "0"]]})
    with trl_ext.enable(plugin(bare), "decs", decs={"curriculum": False}):
        settings = {"max_completion_length": 32, "per_device_train_batch_size": 4, "max_steps": 1}
        trainer = build(
            rewards=[lambda completions, **kwargs: [1.0] * len(completions)],
            data=tiny_data().select([0]),
            trainer={"processing_class": tokenizer},
            **settings,
        )
        trainer.train()
        chunks = trainer._trl_ext.plugins["decs"].chunks
        (round,) = trainer._trl_ext.plugins["script"].rounds
    assert chunks[0].span == (8, 20)  # the whole text is thinking
    assert [chunk.ends for chunk in chunks[1:]] == [(0,), (4,), (1,)]
    assert (round.advantages[1] == 0).all() and (round.advantages[0, 8:20] < 0).all()


def test_evaluation(run: Any, build: Any, plugin: Any, tokenizer: Any) -> None:
    """Whole groups, its own group size, and no step of the curriculum; a group of one has no baseline."""
    with trl_ext.enable(plugin(Script), "decs"):
        settings = {"max_completion_length": 64, "max_steps": 1, "per_device_train_batch_size": 16}
        for size, expected in ((2, True), (1, False)):
            extra = {"eval_dataset": tiny_data().select([3]), "processing_class": tokenizer}
            trainer = build(
                rewards=[right], data=tiny_data().select(range(4)), trainer=extra, num_generations_eval=size, **settings
            )
            trainer.train()
            plugins = trainer._trl_ext.plugins
            before = plugins["decs"].state_dict()
            trainer.evaluate()
            last = plugins["script"].rounds[-1]
            assert last.mode == "eval" and last.loss_mask.any()
            assert plugins["decs"].state_dict() == before
            assert all(chunk.verdicts for chunk in plugins["decs"].chunks)
            assert "eval_decs/prefix_ratio" in trainer.state.log_history[-1]
            assert (last.advantages == 0).all() or expected


# --- judges that fail -------------------------------------------------------------------------------------------------


@pytest.fixture
def unsure(monkeypatch: pytest.MonkeyPatch) -> str:
    """A judge without a verdict on chunks that begin with Wait."""
    module = types.ModuleType("judges_that_fail")

    def judge(questions: Any) -> list[bool | None]:
        return [None if "Wait" in question.text else question.answer in question.text for question in questions]

    def broken(questions: Any) -> list[bool | None]:
        raise KeyError("no such thing")

    module.judge, module.broken = judge, broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


def test_a_judge_without_a_verdict_stops_the_run(run: Any, unsure: str) -> None:
    with pytest.raises(
        JudgeError, match=r"no verdict on \d+ of \d+ texts: it returned None.*decs.on_no_verdict=skip"
    ) as caught:
        run(judge=f"{unsure}:judge")
    assert "trl_ext plugin 'decs'" in "".join(caught.value.__notes__)


def test_or_is_counted_and_its_completions_have_no_span(run: Any, unsure: str) -> None:
    trainer = run(judge=f"{unsure}:judge", on_no_verdict="skip", curriculum=False)
    chunks = trainer.decs.chunks
    assert chunks[0].labels == "acc" and chunks[0].span  # what is missing comes after the answer
    assert chunks[2].verdicts == (False, None) and chunks[2].ratio == 0 and chunks[2].span is None
    assert logged(trainer, "decs/no_verdict")[0] > 0.2


def test_a_judge_that_raises_is_not_hidden(run: Any, unsure: str) -> None:
    with pytest.raises(KeyError, match="no such thing"):
        run(judge=f"{unsure}:broken", on_no_verdict="skip")


def test_a_server_that_is_down(run: Any) -> None:
    down = {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0, "timeout": 2}
    with pytest.raises(JudgeError, match=r"no verdict on .* texts: http://127.0.0.1:9/v1/chat/completions: URLError"):
        run(judge=down)
    trainer = run(judge=down, on_no_verdict="skip", max_steps=2)
    assert logged(trainer, "decs/no_verdict") == [1.0, 1.0]
    assert trainer.decs.kappa == 0.0 and not any(chunk.span for chunk in trainer.decs.chunks)


def test_chunks_too_long_for_a_server_are_not_asked_about(run: Any) -> None:
    down = {"url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0, "timeout": 2}
    trainer = run(judge=down, judge_limit=10, curriculum=False)  # nothing is asked, so nothing fails
    assert {verdict for chunk in trainer.decs.chunks for verdict in chunk.verdicts} == {False}
    assert logged(trainer, "decs/judge_calls") == [0.0]


# --- declarations -----------------------------------------------------------------------------------------------------


def test_refused_before_the_model_is_loaded(build: Any) -> None:
    from trl import GRPOTrainer

    def unloadable(**arguments: Any) -> Any:
        return GRPOTrainer(**arguments | {"model": "/no/such/model"})

    wrong = {"correct": "righd", "judge": "no_such_module:judge", "answer_column": "truth"}
    with trl_ext.enable("decs", decs=wrong), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=unloadable, importance_sampling_level="sequence", loss_type="vespo", off_policy_mask_threshold=0.5)
    text = str(caught.value)
    for part in (
        "needs importance_sampling_level='token', it is 'sequence'",
        "needs loss_type='dapo' or 'bnpo' or",
        "needs off_policy_mask_threshold=None, it is 0.5",
        "no reward function is called 'righd'. Known: brevity, digits.",
        "has no column 'truth'",
        "'no_such_module:judge' cannot be loaded",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_plus": 1.0}, "r_plus must be greater than r_zero"),
        ({"r_zero": 0.0}, "r_zero greater than 0"),
        ({"eps": 0.0}, "eps must be greater than 0"),
        ({"kappa_init": 1.0}, "kappa_init at least 0 and below 1"),
        ({"split_words": []}, "must not be empty"),
        ({"redundant_reward": "equation 9"}, "'official' or 'eq9'"),
        ({"judge": {"url": "nowhere", "model": "m"}}, "must begin with http"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=message):
        trl_ext.enable("decs", decs=options)


def test_what_several_rewards_mean_is_said(build: Any) -> None:
    with trl_ext.enable("decs"):
        notes = build(rewards=[digits, brevity], loss_type="grpo")._trl_ext.plan.notes
    assert "decs: 'digits', the first reward function, says what is right (decs.correct)" in notes
    assert "decs recommends loss_type='dapo' (paper, eq. 3: a mean over tokens); it is 'grpo'" in notes
    assert any("the others are logged only" in note for note in notes)
    with trl_ext.enable(decs={"correct": "brevity"}):
        notes = build(rewards=[digits, brevity])._trl_ext.plan.notes
    assert not any("first reward function" in note for note in notes)


def test_rloo_is_refused(build: Any) -> None:
    with (
        trl_ext.enable("decs"),
        pytest.raises(trl_ext.ConfigError, match="plugin 'decs' cannot serve the RLOO trainer"),
    ):
        build("rloo")


def test_together_with_shared_prefixes(run: Any) -> None:
    alone = run("easy", kappa_init=0.4, max_steps=2)
    shared = run("easy", kappa_init=0.4, max_steps=2, plugins=("shared-prefix",))
    for key in ("grad_norm", "entropy", "decs/kappa", "decs/prefix_ratio"):
        assert logged(shared, key) == pytest.approx(logged(alone, key), rel=1e-3), key
    assert min(logged(shared, "shared-prefix/token_ratio")) > 1.1


def test_the_recipe_is_a_trl_file_with_known_options() -> None:
    from trl.scripts.grpo import make_parser

    from trl_ext.catalog import find

    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "decs.yaml").read_text())
    (spec,) = find.resolve(recipe.pop("plugins"))
    assert spec.cls is DECS
    assert make_parser().set_defaults_with_config(**recipe) == []
