"""DRPO and DisCO give the same numbers on one process, on two with a group on both, and on three."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import launch, run

SCRIPT = Path(__file__).parent / "scripts" / "drpo_processes.py"


def reports(world: int, model: str, folder: Path) -> list[dict[str, Any]]:
    if world == 1:
        code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import drpo_processes, pathlib; "
        code += f"drpo_processes.main({model!r}, pathlib.Path({str(folder)!r}))"
        run([sys.executable, "-c", code], check=True)
    else:
        launch(world, SCRIPT, model, str(folder))
    return [json.loads((folder / f"report-{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.slow
def test_one_two_and_three_processes_agree(model: str, tmp_path: Path) -> None:
    (one,) = reports(1, model, tmp_path)
    for world in (2, 3):
        others = reports(world, model, tmp_path)
        assert [report["world"] for report in others] == [world] * world
        for name in ("drpo", "disco"):
            agree(name, one[name], others[0][name])
            expected = torch.load(tmp_path / f"{name}-1-0.pt")
            for rank in range(world):
                found = torch.load(tmp_path / f"{name}-{world}-{rank}.pt")
                for key, value in expected.items():
                    torch.testing.assert_close(
                        found[key], value, atol=2e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}"
                    )
        if world == 2:
            assert all(1 in report["drpo"]["groups"][0] for report in others)  # the group on both


def agree(name: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    checked = set()
    for first, second in zip(one["metrics"][:-1], other["metrics"][:-1], strict=True):
        for key in first:
            if key.startswith((f"{name}/", "loss", "grad_norm")):
                assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5), (name, key)
                checked.add(key)
    assert {"loss", "grad_norm", f"{name}/kl", f"{name}/objective", f"{name}/mixed_prompts"} <= checked
    assert {entry[f"{name}/constraint_active"] for entry in one["metrics"][:-1]} == {0.0, 1.0}
    assert max(entry[f"{name}/mixed_prompts"] for entry in one["metrics"][:-1]) > 0
