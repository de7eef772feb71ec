"""`trl_ext doctor`: findings about this machine."""

import json
from pathlib import Path

import pytest
import yaml

from trl_ext.catalog import declaration
from trl_ext.cli import doctor, main

FINDINGS = {"versions", "system", "environment", "trainers", "devices", "extras", "plugins", "problems"}


def test_doctor_knows_this_machine(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert main.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings) == FINDINGS and findings["problems"] == []
    assert (
        set(findings["versions"]) == {"trl_ext", "python", *doctor.PACKAGES} and None not in findings["system"].values()
    )
    assert set(findings["extras"]) == set(doctor.EXTRAS) and "gdpo" in findings["plugins"]
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


def test_what_libraries_print_stays_out_of_the_json(monkeypatch, capsys):
    def examine():
        print("welcome to a library")
        return {"problems": ["no torch"]}

    monkeypatch.setattr(doctor, "examine", examine)
    assert main.main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"problems": ["no torch"]} and "welcome" in shown.err


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"])
def test_secrets_are_not_printed(name):
    assert not name.startswith(doctor.VARIABLES) and "TRL_EXT_TRACEBACK".startswith(doctor.VARIABLES)


def test_the_issue_form_asks_for_it():
    file = Path(__file__).parents[2] / ".github" / "ISSUE_TEMPLATE" / "bug.yml"
    form = yaml.safe_load(file.read_text())
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    assert form["name"] and form["description"] and len(fields) == 4
    asked = fields["doctor"]
    assert "trl_ext doctor --json" in asked["attributes"]["label"] and asked["validations"]["required"] is True
