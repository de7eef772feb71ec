"""`trl_ext bench overhead`: a small run of the real measurement."""

import json
import statistics

import pytest

from trl_ext.bench import overhead
from trl_ext.cli import main


@pytest.mark.slow
def test_overhead_compares_every_arm_with_plain_trl(capsys, monkeypatch):
    monkeypatch.setattr(overhead, "ARMS", {"plain TRL": None, "gdpo": "gdpo"})
    assert main.main(["bench", "overhead", "--steps", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(overhead.ARMS)
    assert rows[0]["ratio"] == 1 and rows[0]["ratio_low"] == rows[0]["ratio_high"] == 1
    for row in rows:
        assert row["seconds"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_the_interval_of_a_median():
    assert overhead.interval([2.0] * 9) == (2.0, 2.0)
    values = [float(i) for i in range(101)]
    low, high = overhead.interval(values)
    assert low < statistics.median(values) < high
    # the order statistics of a binomial: 50 -+ 1.96 * sqrt(101) / 2
    assert low == pytest.approx(40, abs=2) and high == pytest.approx(60, abs=2)
