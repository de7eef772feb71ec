"""The code in the lab's README runs, and its table is that of the tasks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trl_ext import lab

README = (Path(lab.__file__).parent / "README.md").read_text()
SCRIPT, OWN = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_a_task_of_your_own_trains_with_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both blocks as printed, put together: the script trains the task of the other block."""
    (tmp_path / "vowels.py").write_text(OWN)
    assert SCRIPT.count('lab.task("loud-quiet")') == 1 and '`lab.task("vowels.py:VOWEL_TASK")`' in README
    script = SCRIPT.replace('lab.task("loud-quiet")', 'lab.task("vowels.py:VOWEL_TASK")')
    monkeypatch.chdir(tmp_path)
    exec(script, names := {})
    assert "vowels: step 56/60  loss" in capsys.readouterr().out
    history = names["trainer"].state.log_history
    assert history[-1]["step"] == 20 and any("rewards/vowels/mean" in entry for entry in history)


def test_the_table_lists_every_task() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| ([a-z, ]+) \|", README, re.MULTILINE)
    assert rows == [(name, ", ".join(task.trainers)) for name, task in lab.tasks().items()]


def test_every_field_of_a_task_is_documented() -> None:
    for cls in (lab.Task, lab.Shape, lab.WarmUp):
        for name in cls.__dataclass_fields__:
            assert f"\n        {name}: " in (cls.__doc__ or ""), f"{cls.__name__}.{name}"
