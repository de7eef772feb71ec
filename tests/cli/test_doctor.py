"""`trl_ext doctor`: findings about this machine."""

import json

from trl_ext.catalog import declaration
from trl_ext.cli import main


def test_doctor_knows_this_machine(capsys):
    assert main.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["problems"] == []
    assert set(findings["trainers"]) == set(declaration.KINDS)
    assert findings["versions"]["trl"]
    assert main.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "ready to train" in text
    assert findings["extras"]["flash-attn"] or "pip install 'trl_ext[flash-attn]'" in text


def test_doctor_names_a_missing_seam(monkeypatch, capsys):
    from trl_ext.trl_internals import seams

    monkeypatch.delattr(seams.trainer_class("grpo"), "_calculate_rewards")
    assert main.main(["doctor"]) == 1
    assert "GRPOTrainer._calculate_rewards is missing" in capsys.readouterr().out
