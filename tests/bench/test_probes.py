"""`trl_ext bench probes`: a small run of the real measurement."""

import json

import pytest

from trl_ext.bench import probes
from trl_ext.cli import main


@pytest.mark.slow
def test_probes_are_compared_with_and_without_the_tree(capsys, monkeypatch):
    plain, shared, alone = list(probes.ARMS)[:3]  # the other two draw answers, which is tested with the probes
    monkeypatch.setattr(probes, "ARMS", {name: probes.ARMS[name] for name in (plain, shared, alone)})
    assert main.main(["bench", "probes", "--steps", "1", "--length", "64", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [plain, shared, alone] and rows[plain]["share"] == 0
    assert rows[shared]["token_ratio"] > 1.5 > 1.01 > rows[alone]["token_ratio"] > 0.5  # padding
    assert rows[shared]["seconds"] > 0 and rows[shared]["share"] < 1
