"""The time that is left counts steps, evaluations and savings."""

import types

import pytest

from trl_ext.train.display import left_text
from trl_ext.train.time_left import EVALUATION, SAVING, STEP, TimeLeft, parts_ahead


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_every_kind_of_part_counts_with_its_own_mean():
    clock = Clock()
    left = TimeLeft(clock)
    for kind, seconds in ((EVALUATION, 60.0), (STEP, 2.0), (STEP, 4.0), (SAVING, 5.0)):
        left.begin(kind)
        clock.now += seconds
        left.end(kind)
    assert left.spent == 71.0
    assert left.left({STEP: 10, EVALUATION: 2, SAVING: 1}) == (10 * 3.0 + 2 * 60.0 + 5.0, True)


def test_what_was_never_timed_is_told():
    clock = Clock()
    left = TimeLeft(clock)
    left.begin(STEP)
    clock.now += 2.0
    left.end(STEP)
    left.end(EVALUATION)  # it never began
    assert left.left({STEP: 3, EVALUATION: 1, SAVING: 0}) == (6.0, False)
    assert left.left({STEP: 3, EVALUATION: 0, SAVING: 1}) == (6.0, True)
    assert left_text(80, True) == "left 1:20" and left_text(80, False) == "left >1:20"


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({}, 0, (10, 0, 1)),
        ({"eval_strategy": "steps", "eval_steps": 4}, 0, (10, 3, 1)),  # after 4, 8 and 10
        ({"eval_strategy": "steps", "eval_steps": 5}, 5, (5, 1, 1)),
        ({"eval_strategy": "steps", "eval_steps": 1000000, "eval_on_start": True}, 3, (7, 1, 1)),
        ({"save_strategy": "steps", "save_steps": 3}, 6, (4, 0, 3)),  # after 9 and 10, and the model
        ({"eval_strategy": "epoch", "save_strategy": "epoch"}, 5, (5, 1, 2)),
        ({"eval_strategy": "steps", "eval_steps": 4}, 10, (0, 0, 1)),
    ],
)
def test_what_lies_ahead(settings, step, expected):
    defaults = {"eval_strategy": "no", "eval_steps": None, "eval_on_start": False, "save_strategy": "no"}
    args = types.SimpleNamespace(**defaults | {"save_steps": 500} | settings)
    state = types.SimpleNamespace(
        global_step=step,
        max_steps=10,
        epoch=step / 5,
        num_train_epochs=2,
        eval_steps=args.eval_steps,
        save_steps=args.save_steps,
    )
    ahead = parts_ahead(args, state, evaluates=True, saves=True)
    assert (ahead[STEP], ahead[EVALUATION], ahead[SAVING]) == expected
    assert parts_ahead(args, state, evaluates=False, saves=False)[EVALUATION] == 0
