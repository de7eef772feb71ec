"""Finished runs are read from folders of `trl_ext train` and of TRL, and compared without claiming too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trl_ext.cli import main
from trl_ext.compare import finished_runs, plots, side_by_side
from trl_ext.errors import ConfigError

GDPO = [{"name": "gdpo", "version": "1", "origin": "built in", "options": {"group_eps": 0.1}}]
QUIET, LENGTH = "rewards/quiet/mean", "completions/mean_length"


def history(level: float, steps: int = 20) -> list[dict[str, Any]]:
    constant = {"loss": 1.0, LENGTH: 10.0 + level, "epoch": 0.1}
    return [{"step": step, QUIET: level + step / 100} | constant for step in range(1, steps + 1)]


def trained(folder: Path, level: float, seed: int | None = 1, **changes: Any) -> str:
    """A folder as `trl_ext train` leaves it."""
    content = {"trainer": "grpo", "plugins": [], "model": "m", "data": "d", "steps": 20, "seconds": 9.0, "seed": seed}
    folder.mkdir(parents=True)
    (folder / "trl_ext_run.json").write_text(json.dumps(content | {"history": history(level)} | changes))
    return str(folder)


def stock(folder: Path, level: float, done: int = 20, planned: int = 20) -> str:
    """A folder as TRL leaves it, with two checkpoints."""
    for step in (done // 2, done):
        place = folder / f"checkpoint-{step}"
        place.mkdir(parents=True)
        state = {"global_step": step, "max_steps": planned, "log_history": history(level, step)}
        (place / "trainer_state.json").write_text(json.dumps(state))
    return str(folder)


def compared(*arguments: str, names: tuple[str, ...] = ()) -> dict[str, Any]:
    return side_by_side.compare(finished_runs.arms(arguments), names, "trl_ext compare")


def verdict(content: dict[str, Any], name: str = QUIET) -> Any:
    (metric,) = [metric for metric in content["metrics"] if metric["name"] == name]
    return metric["comparisons"][0]


def test_one_run_each_is_shown_without_a_verdict(tmp_path: Path) -> None:
    content = compared(trained(tmp_path / "plain", 0.1), trained(tmp_path / "gdpo", 0.5, plugins=GDPO))
    assert list(content["arms"]) == ["plain", "gdpo"] and content["arms"]["gdpo"]["plugins"] == GDPO
    assert [metric["name"] for metric in content["metrics"]] == [QUIET, LENGTH]
    pair = verdict(content)
    assert pair["verdict"] == "one run, no verdict" and pair["difference"]["mean"] == pytest.approx(0.4)
    assert content["headline"] == f"gdpo against plain: one run, no verdict ({QUIET}, final)"
    assert "one run of plain, gdpo: another seed may turn a difference around" in content["notes"][0]
    assert content["curves"][QUIET]["gdpo"]["mean"][-1] == pytest.approx(0.7)
    assert "low" not in content["curves"][QUIET]["gdpo"] and content["settings"]["model"] == "m"


def test_runs_with_the_same_seeds_are_paired(tmp_path: Path) -> None:
    arms = [f"plain={trained(tmp_path / f'p{seed}', seed / 10, seed)}" for seed in (1, 2, 3)]
    arms += [f"gdpo={trained(tmp_path / f'g{seed}', seed / 10 + 0.05, seed)}" for seed in (3, 1, 2)]
    content = compared(*arms)
    pair = verdict(content)
    # the arms overlap widely: only the pairing shows the difference
    assert content["paired"] and pair["verdict"] == "better" and pair["apart"] is False
    assert pair["difference"]["low"] == pytest.approx(0.05) == pair["difference"]["high"]
    assert verdict(content, LENGTH)["verdict"] == "higher"  # nobody said that long answers are good
    assert any("3 seeds are few" in note for note in content["notes"])
    assert content["headline"] == f"gdpo better than plain ({QUIET}, final)"


@pytest.mark.parametrize("seeds", [(None, None), (1, 1), (4, 5)])
def test_other_runs_are_told_apart_by_intervals_only(tmp_path: Path, seeds: tuple[int | None, int | None]) -> None:
    for number, seed in enumerate(seeds):
        trained(tmp_path / "plain" / f"{number}", number / 10, number + 1)
        trained(tmp_path / "near" / f"{number}", number / 10 + 0.05, seed)
        trained(tmp_path / "far" / f"{number}", number / 10 + 0.5, seed)
    plain, near, far = (str(tmp_path / name) for name in ("plain", "near", "far"))
    content = compared(plain, near)
    assert not content["paired"] and content["arms"]["near"]["finished"] == 2
    assert verdict(content)["verdict"] == "intervals overlap, no verdict"
    assert verdict(compared(plain, far))["verdict"] == "better"
    assert verdict(compared(far, plain), LENGTH)["verdict"] == "lower"
    assert any("not paired by seed" in note and "in 33% of such" in note for note in content["notes"])


def test_runs_of_trl_alone_are_read_from_the_last_checkpoint(tmp_path: Path) -> None:
    content = compared(trained(tmp_path / "ours", 0.1), stock(tmp_path / "stock", 0.3, done=10, planned=20))
    notes = "\n".join(content["notes"])
    assert "read from checkpoint-10, what came after it is not known, step 10 of 20" in notes
    assert "plugins, model and data of stock are not known" in notes
    assert "the arms differ in steps: 20 (ours), 10 (stock)." in notes and "model: " not in notes
    assert content["curves"][QUIET]["stock"]["steps"][-1] == 10


def test_what_else_differs_is_told(tmp_path: Path) -> None:
    left = trained(tmp_path / "a" / "out", 0.1, versions={"trl": "1"})
    right = trained(tmp_path / "b" / "out", 0.1, model="other", status="interrupted", versions={"trl": "2"})
    content = compared(left, right)
    assert list(content["arms"]) == ["a/out", "b/out"]  # equal names get longer
    notes = "\n".join(content["notes"])
    for words in ("differ in model: m (a/out), other (b/out)", "different versions", "interrupted at step 20"):
        assert words in notes
    mixed = compared(f"a={left}", f"b={right}", f"a={trained(tmp_path / 'c', 0.1, 2, plugins=GDPO)}")
    assert any("the runs of a have different plugins" in note for note in mixed["notes"])


def test_metrics_can_be_chosen_and_curves_need_common_steps(tmp_path: Path) -> None:
    sparse = [{"step": step, QUIET: 0.5} for step in (100, 200)]
    runs = [f"a={trained(tmp_path / 'a', 0.1)}", f"a={trained(tmp_path / 'b', 0.1, 2, history=sparse)}"]
    content = compared(*runs, f"c={trained(tmp_path / 'c', 0.2)}", names=(QUIET, "loss"))
    assert [metric["name"] for metric in content["metrics"]] == [QUIET, "loss"]
    assert set(content["curves"][QUIET]) == {"c"} and plots.picture(content).startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"no run has logged a metric called 'los'.*Did you mean 'loss'"):
        compared(*runs, f"c={tmp_path / 'c'}", names=("los",))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["good", "nowhere"], "nowhere: there is no such folder"),
        (["good", "empty"], "empty holds no finished run: neither trl_ext_run.json"),
        (["good", "damaged"], "damaged/trl_ext_run.json is not a record of a run"),
        (["good", "silent"], "silent/trl_ext_run.json holds no log entries"),
        (["good", "again=good"], "is named twice, which would count it as two"),
        (["a=good", "a=other"], "needs two arms, got a"),
        (["good"], "needs two arms, got good"),
        (["good", "other", "--seeds", "2"], "--seeds goes with a recipe"),
        (["gdpo", "--metric", "loss"], "--metric goes with finished runs"),
    ],
)
def test_mistakes_are_told(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(tmp_path / "good", 0.1)
    trained(tmp_path / "other", 0.1)
    trained(tmp_path / "damaged", 0.1)
    (tmp_path / "damaged" / "trl_ext_run.json").write_text("{")
    trained(tmp_path / "silent", 0.1, history=[])
    (tmp_path / "empty").mkdir()
    assert main.main(["compare", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_command_writes_page_picture_and_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [trained(tmp_path / "runs" / name, level) for name, level in (("plain", 0.1), ("gdpo", 0.5))]
    assert main.main(["compare", *runs]) == 0
    shown = capsys.readouterr().out
    assert "gdpo against plain: one run, no verdict" in shown and "note: one run of plain, gdpo" in shown
    folder = tmp_path / "runs" / "compare" / "plain-against-gdpo"
    content = json.loads((folder / "compare.json").read_text())
    assert content["command"].startswith("trl_ext compare ") and content["arms"]["gdpo"]["folders"] == [runs[1]]
    page = (folder / "compare.html").read_text()
    assert "<h1>gdpo against plain: one run, no verdict" in page and "GRPO on m; 2 arms, 1 seed" in page
    assert "paired by seed" in page and "runs at a time" not in page
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
