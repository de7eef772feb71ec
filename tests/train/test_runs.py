"""Real runs through the console script: TRL's scripts, accelerate's launcher and real trainers on a tiny model."""

import json
from pathlib import Path

import pytest
import yaml

from trl_ext.compare import finished_runs

REWARDS = """
import asyncio


def vowels(completions, answer, **columns):
    assert len(answer) == len(completions)
    return [sum(letter in "aeiou" for letter in c[0]["content"]) / 8 for c in completions]


CALLS, LIMIT = 0, asyncio.Semaphore(1)


async def short(completion_ids, log_metric, **columns):
    global CALLS
    CALLS += 1
    log_metric("calls", float(CALLS))

    async def one(ids):
        async with LIMIT:
            await asyncio.sleep(0)
        return 1.0 / (1 + len(ids))

    return list(await asyncio.gather(*(one(ids) for ids in completion_ids)))
"""

PLUGIN = """
from trl_ext_hooks import Plugin, hookimpl

class Counter(Plugin):
    name, trainers = "counter", ("grpo", "rloo")
    rounds = 0

    @hookimpl
    def advantages(self, round):
        self.rounds += round.mode == "train"
        return round.advantages

    @hookimpl
    def round_metrics(self, round):
        return {"rounds": (float(self.rounds), 1.0)}

    @hookimpl
    def state_dict(self):
        return {"rounds": self.rounds}

    @hookimpl
    def load_state_dict(self, state):
        self.rounds = state["rounds"]
"""


@pytest.fixture
def record(tmp_path):
    return lambda folder="out": json.loads((tmp_path / folder / "trl_ext_run.json").read_text())


def test_grpo_with_two_plugins_and_resume(script, config, record, tmp_path):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "counter.py").write_text(PLUGIN)
    path = config(
        reward_funcs=["my_rewards.vowels", "my_rewards.short"],
        plugins={"gdpo": {"group_eps": 0.01}},
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=100,
        per_device_eval_batch_size=8,
    )
    done = script("train", "--plugin", "gdpo", "counter.py", "--config", path, "--set", "gdpo.batch_norm=false")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "FutureWarning" not in done.stderr
    lines = done.stdout.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 2 and all(word in steps[0] for word in ("step 1/2", "vowels", "short", "length", "left 0:0"))
    assert len([line for line in lines if line.startswith("held-out  ")]) == 2
    assert any("held-out prompts, before training and after step 2" in line for line in lines)
    assert (tmp_path / "out/trl_ext_curves.png").read_bytes().startswith(b"\x89PNG")
    content = record()
    assert [plugin["name"] for plugin in content["plugins"]] == ["gdpo", "counter"]
    gdpo, counter = content["plugins"]
    assert gdpo["origin"] == "built in" and counter["origin"] == "counter.py"
    assert gdpo["options"]["group_eps"] == 0.01 and gdpo["options"]["batch_norm"] is False
    assert content["hooks_fired"]["counter"]["advantages"] == content["hooks_fired"]["gdpo"]["advantages"] > 2
    assert content["versions"]["trl"] and content["versions"]["torch"] and content["versions"]["python"]
    assert content["trainer"] == "grpo" and content["processes"] == 1 and content["steps"] == 2
    assert content["command"].startswith("trl_ext train --plugin gdpo counter.py")
    assert content["first"]["calls"] == 3.0  # after two batches of evaluation
    assert content["first"]["step"] == 1 and content["last"]["counter/rounds"] == 2.0
    assert set(content["comparison"]["before"]) == {"vowels", "short", "total reward", "length"}

    resumed = script(
        *("train", "--plugin", "gdpo", "counter.py", "--config", path),
        *("--resume_from_checkpoint", "true", "--max_steps", "3"),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing after step 2" in resumed.stdout and "step 3/3" in resumed.stdout
    assert "step 1/3" not in resumed.stdout
    content = record()
    assert content["steps"] == 3 and content["last"]["counter/rounds"] == 3.0  # the plugin went on counting
    assert content["hooks_fired"]["counter"]["load_state_dict"] == 1

    ours = finished_runs.read(tmp_path / "out")  # as `trl_ext compare FOLDER FOLDER` does
    assert (ours.seed, ours.steps, ours.facts["trainer"]) == (content["seed"], 3, "grpo") and ours.seed is not None
    (tmp_path / "out/trl_ext_run.json").unlink()
    stock = finished_runs.read(tmp_path / "out")
    assert stock.steps >= 2 and stock.history[:2] == ours.history[:2] and "read from checkpoint-" in stock.remark


@pytest.mark.slow
def test_rloo_and_bars_where_they_are_asked_for(script, config, record):
    done = script("train", "--trainer", "rloo", "--config", config(), "--disable_tqdm", "false", TQDM_DISABLE="")
    assert done.returncode == 0, done.stderr
    assert "no plugin is enabled: this is plain TRL (RLOO)" in done.stderr
    assert "2/2" in done.stderr and "step 1/2" not in done.stdout
    content = record()
    assert content["trainer"] == "rloo" and content["plugins"] == [] and content["hooks_fired"] == {}
    assert "no held-out evaluation" in content["comparison"]["source"]


@pytest.mark.slow
def test_dpo(script, config, record, tmp_path):
    done = script("train", "--trainer", "dpo", "--config", config(kind="dpo"))
    assert done.returncode == 0, done.stderr
    assert "step 2/2  loss" in done.stdout and "accuracy" in done.stdout
    assert set(record()["comparison"]["after"]) == {"loss", "accuracy", "margin"}
    assert (tmp_path / "out/model.safetensors").is_file()


TWO = ("--num_processes", "2", "--cpu", "--main_process_port", "0")


@pytest.mark.slow
def test_two_processes_with_groups_across_them(script, config, record):
    """Two rows a process and groups of four: valid only in two processes."""
    path = config(plugins={"gdpo": {}}, per_device_train_batch_size=2)
    done = script("train", "--config", path, *TWO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1/2") == 1 and done.stderr.count("trl_ext on GRPO") == 1
    content = record()
    assert content["processes"] == 2 and content["hooks_fired"]["gdpo"]["advantages"] == 2


@pytest.mark.slow
def test_an_error_in_two_processes_is_told_once(script, config, tmp_path):
    (tmp_path / "counter.py").write_text(PLUGIN.replace("return round.advantages", "return round.advantages[:1]"))
    done = script("train", "--plugin", "counter.py", "--config", config(), *TWO)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert "plugin 'counter' returned advantages (1,), expected" in done.stderr


@pytest.mark.slow
def test_trl_takes_the_same_file_without_the_plugins(script, config, tmp_path):
    path = config(plugins={"gdpo": {}}, use_cpu=True, bf16=False)
    content = yaml.safe_load(Path(path).read_text())
    del content["plugins"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(content))
    done = script("grpo", "--config", "plain.yaml", program="trl")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").is_file()
