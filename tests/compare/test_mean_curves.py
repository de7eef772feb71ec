"""Mean curves with their bands, from records typed by hand."""

from __future__ import annotations

import pytest

from trl_ext.compare.mean_curves import collect

from .typed import SEEDS, metric, recipe, record, records


def test_curves_hold_means_and_bands_and_are_thinned() -> None:
    asked = recipe(metric())
    made = records([record(*[float(s)] * 300) for s in SEEDS], [record(1.0, 2.0), *[record(3.0, 4.0)] * 4, record(9.0)])
    found = collect(asked, made)["reward"]
    assert found["plain"]["steps"] == list(range(2, 301, 2)) and set(found["plain"]["mean"]) == {3.5}
    assert found["plain"]["low"][0] < 3.5 < found["plain"]["high"][0]
    assert found["plain"]["runs"]["4"] == [4.0] * 150
    assert found["ours"]["steps"] == [1]  # the steps that all runs have
    made["ours", 6] = record(9.0, 9.0, status="diverged")
    found = collect(asked, made)["reward"]
    assert found["ours"]["steps"] == [1, 2] and found["ours"]["mean"][1] == pytest.approx(3.6)
