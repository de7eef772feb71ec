"""Real comparisons of a few steps: numbers that repeat, runs that are not repeated, and arms that fail."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import processes

from .conftest import METRIC, ROUNDS, records, result, write_recipe

CLOCK = ("runtime", "per_second", "step_time", "profiling", "total_flos")


def numbers(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The history of a run without clock times."""
    return [{k: v for k, v in entry.items() if not any(word in k for word in CLOCK)} for entry in record["history"]]


@pytest.fixture(scope="module")
def done(task: str, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a finished comparison."""
    folder = tmp_path_factory.mktemp("done")
    path = write_recipe(folder / "small.yaml", task, {"claim": "a comparison of a few steps"})
    environment = os.environ | {"TRL_EXT_CACHE": cache, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["COLUMNS"] = "200"  # so that no name is folded
    command = [sys.executable, "-m", "trl_ext", "compare", path, "--output", str(folder / "out")]
    ran = processes.run(command, env=environment)
    assert ran.returncode == 0, ran.stderr
    (folder / "output.txt").write_text(ran.stdout)
    (folder / "errors.txt").write_text(ran.stderr)
    return folder


def test_what_a_comparison_leaves(done: Path) -> None:
    found = result(done / "out")
    assert found["trainer"] == "grpo" and found["seeds"] == [1, 2] and found["complete"]
    assert list(found["arms"]) == ["plain", "gdpo"]
    assert found["arms"]["plain"]["plugins"] == [] and found["arms"]["plain"]["finished"] == 2
    assert found["arms"]["gdpo"]["plugins"][0]["options"]["group_eps"] == 1e-4
    assert found["settings"]["learning_rate"] == 0.01 and found["versions"]["trl"]
    for name, record in records(done / "out").items():
        assert record["status"] == "finished" and record["steps"] == 3 and record["key"][:10] in name
        fired = record["hooks_fired"]
        assert (fired.get("gdpo.advantages") == 3) == name.startswith("gdpo")
        for round in ("first", "last"):
            rows = record["completions"][round]
            assert len(rows) == 4 and set(rows[0]["rewards"]) == {"digits", "short"}  # two of each of two prompts
    output, errors = ((done / name).read_text() for name in ("output.txt", "errors.txt"))
    assert "mean [95% interval]" in output and "note: 2 seeds are few" in output and "a comparison of a few" in output
    assert "2 arms, 2 seeds: 4 runs to do, each in a process of its own" in errors and "\nno estimate: " in errors
    assert "checking arm 2 of 2: gdpo" in errors and "[1/4] plain, seed 1: starting" in errors
    assert "[4/4]" in errors and " left" in errors and "Traceback" not in errors and "leaked" not in errors
    assert {file.name for file in (done / "out").iterdir()} >= {"compare.html", "compare.png", "compare.json", "runs"}
    assert not list((done / "out/runs").glob("*.log")) and not list((done / "out").rglob("*.part"))


def test_arms_have_the_same_data_and_the_same_first_round(done: Path) -> None:
    found = {(r["arm"], r["seed"]): r["completions"]["first"] for r in records(done / "out").values()}
    for seed in (1, 2):
        for plain, ours in zip(found["plain", seed], found["gdpo", seed], strict=True):
            assert plain["prompt"] == ours["prompt"] and plain["completion"] == ours["completion"]
            assert plain["rewards"] == ours["rewards"]
    assert found["plain", 1] != found["plain", 2]


def test_numbers_are_those_of_the_runs(done: Path) -> None:
    (metric,) = result(done / "out")["metrics"]
    for record in records(done / "out").values():
        logged = [entry[METRIC["name"]] for entry in record["history"] if METRIC["name"] in entry]
        assert len(logged) == 3
        assert metric["values"][record["arm"]][str(record["seed"])] == pytest.approx(sum(logged) / 3)


@pytest.mark.slow
def test_same_seed_same_numbers_in_other_processes_and_at_another_pace(
    done: Path, compare: Any, tmp_path: Path
) -> None:
    code, _, errors = compare(done / "small.yaml", "--output", "again", "--jobs", 1)
    assert code == 0, errors
    first, again = records(done / "out"), records(tmp_path / "again")
    assert list(first) == list(again)  # the same keys, found independently
    for name in first:
        assert numbers(first[name]) == numbers(again[name])
        assert first[name]["completions"] == again[name]["completions"]
    assert result(done / "out")["metrics"] == result(tmp_path / "again")["metrics"]
    assert result(done / "out")["curves"] == result(tmp_path / "again")["curves"]


@pytest.mark.slow
def test_ended_runs_are_not_repeated(done: Path, compare: Any, recipe: Any, tmp_path: Path) -> None:
    out = done / "out"
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in (out / "runs").glob("*.json")}
    missing = next(file for file in before if file.name.startswith("gdpo-2"))
    missing.unlink()
    code, _, errors = compare(done / "small.yaml", "--output", out)
    assert code == 0 and "3 of 4 runs are there already" in errors
    assert "1 run to do" in errors and "from the 3 runs that have ended" in errors
    assert errors.count(": finished in") == 1 and "gdpo, seed 2: finished" in errors
    for file, (moment, content) in before.items():
        if file == missing:
            assert numbers(json.loads(file.read_text())) == numbers(json.loads(content))
        else:
            assert file.stat().st_mtime_ns == moment
    # what is looked at does not belong to a run, and a third seed needs its own runs only
    other = recipe({"metrics": [METRIC, {"name": "reward", "reduce": "max"}]})
    code, output, errors = compare(other, "--output", out, "--seeds", 3)
    assert code == 0 and "4 of 6 runs are there already" in errors and "reward: max" in output
    # a setting does
    code, _, errors = compare(recipe(max_steps=1), "--output", out, "--seeds", 1)
    assert code == 0 and "there already" not in errors


@pytest.mark.slow
def test_a_kill_loses_only_what_ran(recipe: Any, cache: str, tmp_path: Path, compare: Any) -> None:
    path = recipe(max_steps=12)
    environment = os.environ | {"TRL_EXT_CACHE": cache, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "trl_ext", "compare", path, "--output", "out", "--jobs", "2"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out/runs").glob("*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/runs").glob("*.json")}
    assert 1 <= len(kept) < 4
    deadline = time.monotonic() + 30  # its runs notice and end, without records
    while _processes_with(str(tmp_path / "out")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    code, _, errors = compare(path, "--output", "out")
    assert code == 0, errors
    assert " of 4 runs are there already" in errors and len(records(tmp_path / "out")) == 4
    assert all(file.stat().st_mtime_ns == moment for file, moment in kept.items())


def _processes_with(text: str) -> list[int]:
    """Processes that have a file below a folder open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            names = [os.readlink(link) for link in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(name.startswith(text) for name in names):
            found.append(int(process.name))
    return found


@pytest.mark.slow
def test_an_interrupt_ends_everything_and_keeps_what_is_done(recipe: Any, cache: str, tmp_path: Path) -> None:
    path = recipe(max_steps=12)
    environment = os.environ | {"TRL_EXT_CACHE": cache, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "trl_ext", "compare", path, "--output", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts what it runs behind the prompt deaf to Ctrl-C, and so would this be
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out/runs").glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.rstrip().endswith("interrupted") and "Traceback" not in errors
    assert not _processes_with(str(tmp_path / "out"))
    assert all(record["status"] == "finished" for record in records(tmp_path / "out").values())


FAULTY = """
import os, signal
from trl_ext_hooks import Plugin, hookimpl

class Faulty(Plugin):
    name, trainers = "faulty", ("grpo",)

    @hookimpl
    def advantages(self, round):
        {action}
        return round.advantages
"""


@pytest.mark.slow
def test_crashed_arms_are_kept_marked_and_tried_again(recipe: Any, compare: Any, tmp_path: Path) -> None:
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    for name, action in (("faulty", "raise RuntimeError('the dog ate it')"), ("killed", kill)):
        text = FAULTY.format(action=f"if round.step >= 1: {action}").replace('"faulty"', f'"{name}"')
        (tmp_path / f"{name}.py").write_text(text)
    arms = {"plain": None, "faulty": {"plugins": ["faulty.py"]}, "killed": {"plugins": ["killed.py"]}}
    expect = {"arm": "faulty", "is": "better", "against": "plain"}
    path = recipe({"arms": arms, "metrics": [METRIC | {"expect": expect}], "seeds": 1}, plugins={})
    code, output, errors = compare(path, "--output", "out")
    assert code == 1, errors
    assert "crashed: faulty, seed 1: " in output and "RuntimeError: the dog ate it" in output
    assert "crashed: killed, seed 1: a training process was ended by SIGKILL, which the system sends when" in output
    assert "UNKNOWN (not judged, as runs are missing (faulty, seed 1))" in output and "(1 failed)" in output
    found = result(tmp_path / "out")
    assert not found["complete"] and found["arms"]["plain"]["finished"] == 1
    assert [found["arms"][arm]["failed"][0]["status"] for arm in ("faulty", "killed")] == ["crashed"] * 2
    logs = {file.name.partition("-")[0]: file for file in (tmp_path / "out/runs").glob("*.log")}
    assert set(logs) == {"faulty", "killed"} and all(file.name in output for file in logs.values())
    assert "Traceback" in logs["faulty"].read_text() and "the dog ate it" in logs["faulty"].read_text()
    assert "crashed: killed" in (tmp_path / "out/compare.html").read_text()
    (tmp_path / "faulty.py").write_text(FAULTY.format(action="pass"))
    code, output, errors = compare(path, "--output", "out")
    assert code == 1 and "1 of 3 runs are there already" in errors and "faulty, seed 1: finished" in errors
    assert "crashed: killed, seed 1" in output and "crashed: faulty" not in output


@pytest.mark.slow
def test_a_diverged_arm_is_kept_and_marked(recipe: Any, compare: Any, tmp_path: Path) -> None:
    arms = {"calm": None, "wild": {"settings": {"learning_rate": 1e30}}}
    path = recipe({"arms": arms, "seeds": 1}, max_steps=6)
    code, output, errors = compare(path, "--output", "out")
    assert code == 1, errors
    assert "wild, seed 1: diverged in" in errors and "diverged: wild, seed 1: " in output
    assert any(word in output for word in ("loss was nan at step", "grad_norm was nan at step"))
    (kept,) = [record for record in records(tmp_path / "out").values() if record["arm"] == "wild"]
    assert kept["status"] == "diverged" and kept["steps"] < 6
    code, _, errors = compare(path, "--output", "out")
    assert code == 1 and "2 of 2 runs are there already" in errors


@pytest.mark.slow
def test_settings_of_arms_rloo_evaluation_and_identical_curves(recipe: Any, compare: Any, tmp_path: Path) -> None:
    """Two arms that are the same run by another name, and one that is not."""
    same = {"arm": "twice", "is": "identical", "against": "once"}
    other = {"arm": "other", "is": "identical", "against": "once"}
    metric = METRIC | {"name": "eval_rewards/digits/mean", "reduce": "final", "expect": [same, other]}
    arms = {
        "once": None,
        "twice": {"settings": {"num_iterations": 1, "logging_nan_inf_filter": False}},
        "other": {"settings": {"learning_rate": 5.0}},
    }
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    experiment = {"trainer": "rloo", "arms": arms, "metrics": [metric], "seeds": [7], "test_size": 2}
    path = recipe(experiment, plugins={}, **evaluation)
    code, output, errors = compare(path, "--output", "out", "--json", "--record", "kept.json")
    assert code == 1, errors
    found = json.loads(output)
    assert found == json.loads((tmp_path / "kept.json").read_text()) and "curves" not in found
    assert found["trainer"] == "rloo" and found["seeds"] == [7]
    assert [entry["met"] for entry in found["metrics"][0]["expectations"]] == [True, False]
    steps = result(tmp_path / "out")["curves"]["eval_rewards/digits/mean"]["once"]["steps"]
    assert steps == [2, 3]  # and once more after the last step


@pytest.mark.slow
def test_dpo(recipe: Any, compare: Any, tmp_path: Path) -> None:
    arms = {"low": None, "high": {"settings": {"beta": 0.5}}}
    path = recipe(
        {"trainer": "dpo", "arms": arms, "metrics": None, "seeds": 1},
        plugins={},
        num_generations=None,
        max_completion_length=None,
    )
    code, output, errors = compare(path, "--output", "out")
    assert code == 0, errors
    assert "rewards/accuracies: final" in output
    assert result(tmp_path / "out")["completions"] and "side by side" not in (tmp_path / "out/compare.html").read_text()


@pytest.mark.slow
def test_rounds_of_a_plugin_that_owns_the_run(recipe: Any, compare: Any, tmp_path: Path) -> None:
    arms = {
        "plain": {"plugins": {"apo": {"alpha": 0.0}}},
        "apo": {"plugins": ["apo"]},
        "wild": {"plugins": ["apo"], "settings": {"learning_rate": 1e30}},
    }
    metrics = [{"name": "apo/reward", "reduce": {"steps_to": "plain", "window": 1}}, {"name": "apo/pairs"}]
    experiment = {"trainer": "dpo", "arms": arms, "metrics": metrics, "seeds": 1}
    unused = {"num_generations": None, "max_completion_length": None, "beta": None}
    code, output, errors = compare(recipe(experiment, plugins={"apo": ROUNDS}, **unused), "--output", "out")
    assert code == 1, errors
    found = {record["arm"]: record for record in records(tmp_path / "out").values()}
    for arm in ("plain", "apo"):
        assert found[arm]["status"] == "finished" and found[arm]["steps"] == 2
        assert [entry["step"] for entry in found[arm]["history"]] == [1, 2]
        assert found[arm]["hooks_fired"] == {"apo.pair_metrics": 6}  # three steps in each round
    assert found["plain"]["history"][0] == found["apo"]["history"][0]  # the first round does not depend on alpha
    assert found["wild"]["status"] == "diverged" and "was nan at step" in found["wild"]["error"]
    assert result(tmp_path / "out")["metrics"][0]["values"]["plain"]["1"] in (1, 2)
    assert "apo/reward: steps to the end of plain" in output


@pytest.mark.slow
def test_a_file_of_trl_without_a_task(compare: Any, model: str, tmp_path: Path) -> None:
    """Model, data and rewards as `trl grpo` takes them, and no block `experiment:` at all."""
    from trl_ext.testing import tiny_data

    (tmp_path / "data").mkdir()
    tiny_data().to_json(tmp_path / "data/train.jsonl")
    rewards = ["trl_ext.testing.digits", "trl_ext.testing.brevity"]
    named = {"model_name_or_path": model, "dataset_name": str(tmp_path / "data"), "reward_funcs": rewards}
    unused = {"output_dir": "never", "seed": 5}
    path = write_recipe(tmp_path / "own.yaml", None, {"metrics": None, "seeds": 1}, **named, **unused)
    code, output, errors = compare(path)
    assert code == 0, errors
    assert "reward: final" in output and result(tmp_path / "runs/compare/own")["model"] == model
    assert not (tmp_path / "never").exists()
