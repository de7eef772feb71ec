"""`trl_ext check`: a line for every check."""

import json

import pytest

from trl_ext import ConfigError
from trl_ext.cli import check, main


def test_check_reports_every_check(package, capsys):
    file = str(package / "trl_ext_my_method.py")
    assert main.main(["check", "--plugin", file, "--set", "my-method.eps=1e-3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report) == 9 and all(entry["passed"] for entry in report)
    assert "advantages" in report[-1]["detail"] and " ms and " in report[-1]["detail"]


def test_rows_rewards_and_settings_of_ones_own(package, tmp_path, monkeypatch, capsys):
    """They reach the run: two rewards by path, a column by name, and rounds that are learned from twice."""
    (tmp_path / "my_rewards.py").write_text(
        "def level(completions, difficulty, **kwargs):\n"
        "    assert set(difficulty) <= {1, 2}\n"
        "    return [len(c) * 0.01 * d for c, d in zip(completions, difficulty)]\n"
        "def letters(completions, **kwargs):\n    return [float(len(set(text))) for text in completions]\n"
    )
    rows = [{"prompt": f"{i}?", "difficulty": 1 + i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    command = ["check", "--plugin", str(package / "trl_ext_my_method.py"), "--rows", "rows.jsonl", "--json"]
    command += ["--rewards", "my_rewards:level", "my_rewards:letters", "--num_iterations", "2", "--trainer", "grpo"]
    assert main.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    (trained,) = [entry["detail"] for entry in report if "trains" in entry["name"]]
    assert trained.count(",") == 3  # four steps, as each round is learned from twice


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question": "1"}', r"expected the column `prompt`, found the columns question\."),
        ("", "found the columns none, as the file is empty"),
        ('{"prompt": "1"}\n{', "line 2: invalid JSON"),
        ("[1]", "line 1: list, expected an object of columns"),
    ],
)
def test_rows_that_cannot_be_read(text, words, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        check.read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--num_iteratons", "2"], "Did you mean --num_iterations"),
        (["--model_name_or_path", "x"], "`model_name_or_path` is no argument of training"),
        (["--num_iterations", "two"], "invalid int value: 'two'"),
        (["--rewards", "accurcy_reward"], "Did you mean 'accuracy_reward'"),
        (["--rows", "nowhere.jsonl"], "there is no such file"),
    ],
)
def test_options_that_cannot_be(option, words, capsys):
    assert main.main(["check", "--plugin", "gdpo", *option]) == 2
    assert words in capsys.readouterr().err
