"""The estimate before a comparison: from runs that have ended, else from the recipe, and where it comes from."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from trl_ext.compare.estimate import estimate, roughly
from trl_ext.compare.runs import Run

from .typed import recipe, record


def run(arm: str, seed: int) -> Run:
    return Run(arm, seed, "grpo", {}, {}, None, {}, {"arm": arm}, ".")


RUNS = [run(arm, seed) for seed in (1, 2, 3) for arm in ("plain", "ours")]


def test_nothing_is_guessed() -> None:
    found = estimate(recipe(), {})
    assert found.total(RUNS, 2) is None and "states no `seconds_per_run`, and no run has ended" in found.source


def test_the_recipe_states_it() -> None:
    found = estimate(dataclasses.replace(recipe(), seconds_per_run=30.0), {})
    assert found.total(RUNS, 2) == pytest.approx(90.0) and found.total(RUNS[:1], 8) == pytest.approx(30.0)
    assert found.source == "the 30 s that the recipe states for a run"


def test_runs_of_this_machine_count_more_and_failed_ones_do_not() -> None:
    stated = dataclasses.replace(recipe(), seconds_per_run=30.0)
    ended: dict[Run, Any] = {run("plain", 8): record(1.0) | {"seconds": 10.0}}
    assert estimate(stated, ended).seconds == {"plain": 10.0, "ours": 10.0}
    ended[run("ours", 8)] = record(1.0, status="diverged") | {"seconds": 1.0}
    ended[run("ours", 9)] = record(1.0) | {"seconds": 20.0}
    found = estimate(stated, ended)
    assert found.seconds == {"plain": 10.0, "ours": 20.0} and found.total(RUNS, 1) == pytest.approx(90.0)
    assert found.source == "the 2 runs that have ended"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (40, "40 s"), (559, "9 min"), (5900, "98 min"), (9000, "2.5 h")]
)
def test_no_more_digits_than_it_deserves(seconds: float, text: str) -> None:
    assert roughly(seconds) == text
