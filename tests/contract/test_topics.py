"""The pages about one topic each: the plugin of a page conforms, and does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trl_ext
from trl_ext.testing import conformance, tiny_trainer

FOLDER = Path(__file__).parents[2] / "hooks" / "docs"
PLUGINS = {
    code.partition("\n")[0].removeprefix("# "): code
    for page in sorted(FOLDER.glob("*.md"))
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
}


@pytest.mark.parametrize("name", PLUGINS)
def test_plugins_conform(name: str, tmp_path: Path) -> None:
    assert 20 <= len([line for line in PLUGINS[name].splitlines() if line]) <= 40
    (tmp_path / name).write_text(PLUGINS[name])
    checks = conformance(str(tmp_path / name), tmp_path / "runs")
    assert len(checks) > 4
    assert not [check for check in checks if not check.passed]


def test_the_greedy_baseline_is_the_reward_of_the_greedy_completion(model: str, tmp_path: Path) -> None:
    file = tmp_path / "greedy_baseline.py"
    file.write_text(PLUGINS[file.name])
    with trl_ext.enable(str(file)):
        trainer = tiny_trainer("grpo", model, tmp_path / "run", max_steps=1, generation_kwargs={"temperature": 1e-4})
        trainer.train()
    # nearly no temperature, so that sampled completions are greedy ones
    logged = trainer.state.log_history[0]
    assert logged["greedy-baseline/baseline"] == pytest.approx(logged["reward"], abs=1e-5)
    assert list(trainer._logs["advantages"]) == [pytest.approx(0.0, abs=1e-6)] * 8
