"""APO: what a kill leaves behind, and runs that go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainerCallback

from tests.plugins.apo.runs import OPTIONS, equal, functions, go, weights
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, UsageError, hookimpl


class Killed(BaseException):
    """What cannot be caught by mistake."""


class Mortal(Plugin):
    """Lets `mortal` know of every step."""

    name = "mortal"
    trainers = ("dpo",)
    at: Any = None

    @hookimpl
    def setup(self, trainer: Any) -> None:
        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                Mortal.at(f"before step {state.global_step + 1} of {args.output_dir}")

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                Mortal.at(f"did step {state.global_step} of {args.output_dir}")

        trainer.add_callback(Steps())


def mortal(model: str, folder: Path, diary: Path, options: dict[str, Any], settings: dict[str, Any], tell: Any) -> None:
    """A run that kills its own process before each file or folder gets its name and before each step, once each."""
    from trl_ext.campaign import sampling

    sys.modules["apo_rewards"] = functions()
    rename, replace, original = Path.rename, os.replace, sampling.sampler

    def at(event: str) -> None:
        known = diary.exists() and event in diary.read_text().splitlines()
        with diary.open("a") as stream:
            print(event, file=stream)
        if event.startswith("before") and not known:
            os.kill(os.getpid(), signal.SIGKILL)

    def released(target: Path) -> bool:
        # one of the files that are copied at the end is enough
        return target.parent == folder and target.name not in ("apo.json", "trl_ext_rounds.json", "model.safetensors")

    def move(self: Path, target: Path) -> Path:
        if folder not in target.parents or released(target):
            return rename(self, target)
        at(f"before {target}")
        rename(self, target)
        at(f"did {target}")
        return Path(target)

    def move_file(source: Any, target: Any) -> None:
        path = Path(target)
        # a checkpoint that a kill leaves unfinished is made again, steps included, so only the run's own files count
        if folder not in path.parents or path.suffix != ".json" or released(path):
            return replace(source, target)
        at(f"before {target}")
        replace(source, target)
        at(f"did {target}")

    def counted(*args: Any, **kwargs: Any) -> Any:
        sample = original(*args, **kwargs)
        return lambda prompts, seed: (at(f"sample {seed}"), sample(prompts, seed))[1]

    Mortal.at, Path.rename, sampling.sampler = at, move, counted  # type: ignore[method-assign,assignment]
    os.replace = move_file  # type: ignore[assignment]
    go(
        model,
        folder,
        options,
        (f"{__name__}:Mortal",),
        resume_from_checkpoint=(folder / "apo.json").exists() or None,
        **settings,
    )


@pytest.mark.slow
def test_a_kill_anywhere_repeats_nothing(model: str, tmp_path: Path) -> None:
    """SIGKILL before every file gets its name and before every step, one after the other, until the run ends."""
    from trl_ext.compare import child_process

    options, settings = {"rounds": 2, "held_out": 2}, {"save_strategy": "steps", "save_steps": 1}
    whole = go(model, tmp_path / "whole", options, **settings)
    folder, diary, kills = tmp_path / "run", tmp_path / "diary", 0
    while True:
        child = child_process.start(mortal, model, folder, diary, options, settings, log=str(tmp_path / "log"))
        message = child.receive()
        if isinstance(message, child_process.Result):
            break
        assert isinstance(message, child_process.Failure) and "SIGKILL" in message.message, message
        kills += 1
    lines = diary.read_text().splitlines()
    assert kills == len({line for line in lines if line.startswith("before")}) >= 18
    done = [line for line in lines if line.startswith("did") and "trl_ext_rounds.json" not in line]
    assert len(done) == len(set(done)), "something finished was made again"
    assert sum("did step" in line for line in done) == 4
    sampled = [line for line in lines if line.startswith("sample")]
    # three batches in each round, and the held-out one of both; each is at most once cut off before it has its name
    assert len(set(sampled)) == 7 and len(sampled) <= 16
    for name in ("round-1/output", "round-2/start", "round-2/output", "."):
        assert equal(weights(folder / name), weights(whole / name)), name
    assert (folder / "trl_ext_rounds.json").read_text() == (whole / "trl_ext_rounds.json").read_text()


class Bomb(TrainerCallback):
    steps: list[int] = []  # noqa: RUF012  of all trainers
    left = 10**9

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Bomb.steps.append(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Bomb.left -= 1
        if Bomb.left < 0:
            raise Killed


class Bombs(Plugin):
    name = "bombs"
    trainers = ("dpo",)

    @hookimpl
    def setup(self, trainer: Any) -> None:
        trainer.add_callback(Bomb())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.slow
def test_a_kill_in_the_middle_of_training_goes_on_from_a_checkpoint(
    model: str, tmp_path: Path, plugin: Any, lora: bool
) -> None:
    extra: dict[str, Any] = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    extra |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    bombs = (plugin(Bombs),)
    try:
        Bomb.left = 10**9
        whole = go(model, tmp_path / "whole", {"rounds": 2}, bombs, **extra)
        Bomb.steps.clear()
        Bomb.left = 2  # dies at the start of step 3 of round 1
        with pytest.raises(Killed):
            go(model, tmp_path / "cut", {"rounds": 2}, bombs, **extra)
        newest = tmp_path / "cut" / "round-1" / "output-checkpoints" / "checkpoint-2"
        (newest / "trainer_state.json").write_text("{")  # as if the kill came while this was being written
        Bomb.left = 10**9
        cut = go(model, tmp_path / "cut", {"rounds": 2}, bombs, resume_from_checkpoint=True, **extra)
    finally:
        Bomb.left = 10**9
    assert Bomb.steps == [1, 2, 2, 3, 1, 2, 3]
    assert equal(weights(whole), weights(cut))


@pytest.mark.slow
def test_sigkill_and_the_command_line(model: str, tmp_path: Path) -> None:
    """Real processes: killed without warning in round 2, then `--resume_from_checkpoint true`."""
    (tmp_path / "apo_rewards.py").write_text(
        "def many_digits(completions, **columns):\n"
        "    texts = [c[0]['content'] for c in completions]\n"
        "    return [sum(t.isdigit() for t in text) + 0.01 * len(set(text)) for text in texts]\n"
    )
    tiny_data("grpo", 8).to_json(tmp_path / "data" / "train.jsonl")
    command = [sys.executable, "-m", "trl_ext", "train", "--plugin", "apo", "--model_name_or_path", model]
    command += ["--dataset_name", str(tmp_path / "data"), "--max_steps", "2", "--learning_rate", "1e-3"]
    command += ["--per_device_train_batch_size", "2", "--save_steps", "1", "--report_to", "none", "--set"]
    command += [f"apo.{k}={json.dumps(v)}" for k, v in (OPTIONS | {"rounds": 2}).items()]
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(str(root / part) for part in (".", "hooks", "plugins"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}

    def start(output: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--output_dir", output, *more],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    cut = start("cut")
    deadline = time.time() + 120
    while not (tmp_path / "cut" / "round-2" / "start").exists():
        assert cut.poll() is None and time.time() < deadline, cut.communicate()[0][-3000:]
        time.sleep(0.05)
    os.killpg(cut.pid, signal.SIGKILL)
    cut.wait()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut" / "round-1").rglob("*") if file.is_file()}

    resumed = start("cut", "--resume_from_checkpoint", "true")
    said = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, said[-3000:]
    assert "round 2 of 2: mean score" in said and "weights 1.3, 1" in said
    whole = go(model, tmp_path / "whole", {"rounds": 2}, train_dataset=tiny_data("grpo", 8))
    assert equal(weights(tmp_path / "cut"), weights(whole))
    assert kept == {file: file.stat().st_mtime_ns for file in kept}, "round 1 was touched again"


def test_other_settings_cannot_go_on_with_a_run(finished: Path, model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds a run with alpha=0\.3, and now it is 0\.4"):
        go(model, finished, {"alpha": 0.4}, resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="holds a run with prompts="):
        go(model, finished, resume_from_checkpoint=True, train_dataset=tiny_data("grpo", 24).select(range(12, 24)))
    with pytest.raises(UsageError, match="holds rounds of a run of apo"):
        go(model, finished)
    with pytest.raises(UsageError, match="there is no run of apo to go on with"):
        go(model, tmp_path / "new", resume_from_checkpoint=True)
