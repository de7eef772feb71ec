"""DPO with rewritten log-probabilities: one process and two agree, ahead of training or live, and after a resume."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from trl_ext.testing import tiny_data, tiny_trainer
from trl_ext.trl_internals import seams

pytestmark = pytest.mark.skipif(seams.trl_version() < seams.Version("1.15"), reason="needs the fused head of TRL 1.15")
SCRIPT = Path(__file__).parent / "scripts" / "pairs.py"
RUNS = ("live", "ahead", "memory", "shared", "resumed")


@pytest.mark.slow
def test_one_and_two_processes_agree(model: str, tmp_path: Path) -> None:
    trained = tiny_trainer("dpo", model, tmp_path / "run", max_steps=4)
    trained.train()
    trained.save_model(str(tmp_path / "guide"))
    tiny_data("dpo", 21).save_to_disk(str(tmp_path / "data"))  # an odd number: the last batch is filled up
    arguments = [model, str(tmp_path / "guide"), str(tmp_path / "data")]
    spec = importlib.util.spec_from_file_location("pairs_script", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    one = script.main(*arguments, tmp_path)
    processes.launch(2, SCRIPT, *arguments, str(tmp_path))
    two = [json.loads((tmp_path / f"report-2-{rank}.json").read_text()) for rank in range(2)]
    assert [report["world"] for report in (one, *two)] == [1, 2, 2]

    def weights(name: str, part: str) -> dict[str, torch.Tensor]:
        return torch.load(tmp_path / f"{name}-{part}.pt")

    for name in RUNS:
        first, second, third = (weights(name, part) for part in ("1-0", "2-0", "2-1"))
        for key, value in first.items():
            assert torch.equal(second[key], third[key]), (name, key)
            torch.testing.assert_close(second[key], value, atol=1e-5, rtol=0)
        for a, b in zip(one[name], two[0][name], strict=True):
            for key in ("loss", "tgdpo/factor/chosen", "tgdpo/rewards/margins", "rewards/margins"):
                if key in a:
                    assert b[key] == pytest.approx(a[key], abs=1e-4), (name, key)
    rounds(tmp_path / "rounds-1", tmp_path / "rounds-2")
    for part in ("1-0", "2-0", "2-1"):
        for key, value in weights("live", part).items():
            assert torch.equal(weights("ahead", part)[key], value)
            assert torch.equal(weights("memory", part)[key], value)
            assert torch.equal(weights("resumed", part)[key], value)


def rounds(one: Path, two: Path) -> None:
    """Two rounds of APO: the same samples, whoever drew them, and the same start and result."""
    for number in (1, 2):
        files = [sorted(folder.glob(f"round-{number}/samples/*.json")) for folder in (one, two)]
        assert len(files[0]) == len(files[1]) == 4
    for a, b in zip(*(sorted(folder.glob("round-1/samples/*.json")) for folder in (one, two)), strict=True):
        assert a.read_text() == b.read_text()
    assert json.loads((one / "round-1/pairs/summary.json").read_text())["pairs"] >= 4
    for name in ("round-1/output", "round-2/start", "."):
        first, second = (load_file(folder / name / "model.safetensors") for folder in (one, two))
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, atol=1e-5, rtol=0)
