"""From curves to numbers, typed by hand."""

from __future__ import annotations

import math

import pytest

from trl_ext.compare.measures import Measure, Value, series

STEPS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
RISING = [0.0, 0.1, 0.9, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (Measure("final"), Value(1.0)),  # a tenth of ten values
        (Measure("final", window=4), Value(0.95)),
        (Measure("final", window=100), Value(0.6)),
        (Measure("mean"), Value(0.6)),
        (Measure("max"), Value(1.0)),
        (Measure("min"), Value(0.0)),
        (Measure("steps_to", 0.6, 1), Value(3)),
        (Measure("steps_to", 0.6, 3), Value(7)),  # (0.4 + 0.6 + 0.8) / 3; the single 0.9 does not count
        (Measure("steps_to", 0.6), Value(8)),  # (0.2 + 0.4 + 0.6 + 0.8 + 1.0) / 5
        (Measure("steps_to", 1.0, 3), Value(10)),
        (Measure("steps_to", 1.1, 1), Value(21, censored=True)),  # the run had 20 steps
        (Measure("steps_down_to", 0.05, 1), Value(1)),
        (Measure("steps_down_to", 0.4, 3), Value(3)),
        (Measure("steps_down_to", -1.0, 3), Value(21, censored=True)),
        (Measure("steps_to", 0.0, 11), Value(21, censored=True)),  # never that many values
    ],
)
def test_measures(measure: Measure, expected: Value) -> None:
    found = measure.of(STEPS, RISING, last_step=20)
    assert found.value == pytest.approx(expected.value) and found.censored == expected.censored


def test_steps_are_those_of_the_log() -> None:
    assert Measure("steps_to", 0.5, 2).of([10, 20, 30], [0.0, 0.6, 0.6], 30) == Value(30.0)


def test_the_end_of_a_run_is_a_level() -> None:
    measure = Measure("steps_to", window=2, arm="other")
    level = measure.end([0.0, 0.3, 0.5])
    assert level == 0.4 and measure.to(level) == Measure("steps_to", 0.4, 2)
    assert measure.to(level).of(STEPS, RISING, 10) == Value(3.0)  # (0.1 + 0.9) / 2
    assert Measure("steps_to", arm="other").end([9.0, 1.0, 1.0, 1.0, 1.0, 1.0]) == 1.0


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        (Measure("final"), "final"),
        (Measure("final", window=4), "final 4"),
        (Measure("steps_to", 0.9), "steps to 0.9"),
        (Measure("steps_down_to", 2.0), "steps down to 2"),
        (Measure("steps_to", arm="plain"), "steps to the end of plain"),
    ],
)
def test_words(measure: Measure, text: str) -> None:
    assert str(measure) == text and measure.counts_steps == text.startswith("steps")


def test_a_series_leaves_out_what_is_missing() -> None:
    history = [
        {"step": 1, "reward": 0.5},
        {"step": 1, "eval_reward": 0.7},
        {"step": 2, "reward": None},
        {"step": 3, "reward": math.nan},
        {"step": 4, "reward": 1},
    ]
    assert series(history, "reward") == ([1, 4], [0.5, 1.0])
    assert series(history, "other") == ([], [])
