"""Mistakes that need the data or the reward functions: told by the worker, before a model is loaded."""

import pytest

from trl_ext.train import reward_check, worker
from trl_ext.trl_internals import arguments

from .conftest import write_rows


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test in which a model is loaded."""
    from transformers import AutoModelForCausalLM

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.fixture
def same_process(monkeypatch):
    """Saves the seconds that a new interpreter takes to load torch."""

    def run(folder):
        reward_check.main([str(folder)])
        return "ended with exit code 0"

    monkeypatch.setattr(reward_check, "_run", run)


@pytest.fixture
def work(monkeypatch, capsys, no_model, same_process, handed_over):
    """`work(*argv)` runs the worker in this process and returns what it says on its error stream."""
    monkeypatch.delenv("TRL_EXT_FAILURES", raising=False)

    def run(*argv) -> str:
        code = worker.main([handed_over("--trainer", "grpo", *argv, "--use_cpu", "true", "--bf16", "false")])
        text = capsys.readouterr().err
        assert code == 2 and "Traceback" not in text, text
        return text

    return run


def test_reward_function_of_wrong_length(work, config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards_of_a_worker.py").write_text("def single(completions, **columns):\n    return [1.0]\n")
    path = config(reward_funcs=["rewards_of_a_worker.single"])
    assert "'rewards_of_a_worker.single' returned 1 rewards for 8 completions, expected 8" in work("--config", path)


def test_a_value_that_trl_does_not_know(work, config):
    assert "loss_type='grop'" in work("--config", config(loss_type="grop"))


def test_data_without_the_column_that_a_plugin_needs(work, config, tmp_path):
    file = tmp_path / "curious.py"
    file.write_text(
        "from trl_ext_hooks import Plugin, hookimpl\n"
        "class Curious(Plugin):\n"
        "    name, trainers, needs = 'curious', ('grpo',), ('column:difficulty',)\n"
        "    @hookimpl\n"
        "    def advantages(self, round):\n"
        "        return round.advantages\n"
    )
    text = work("--plugin", str(file), "--config", config())
    assert "curious: the training data has no column 'difficulty'; it has prompt, answer, index" in text


def test_split_parameters_where_a_plugin_needs_whole_ones(work, config, monkeypatch):
    """As accelerate's launcher says to the worker."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    text = work("--plugin", "spae", "--config", config())
    assert "spae: every process must hold all parameters, and FSDP splits them; use DDP or DeepSpeed stage 2" in text


def test_data_without_prompts(work, config, tmp_path):
    folder = write_rows(tmp_path / "questions", train=[{"question": "1+1", "answer": "2"}] * 4)
    text = work("--config", config(dataset_name=folder))
    assert "no column 'prompt', which the GRPO trainer needs; it has question, answer" in text


def test_data_that_cannot_be_loaded(work, config, tmp_path):
    text = work("--config", config(dataset_name=str(tmp_path / "nothing")))
    assert "the training data cannot be loaded: " in text
    text = work("--config", config(dataset_train_split="training"))
    assert "the data cannot be used: there is no split 'training'; there is 'train', 'test'" in text


def test_a_batch_that_trl_refuses(work, config):
    assert "TRL refuses these settings" in work("--config", config(per_device_train_batch_size=3))


def test_a_worker_without_a_parent_tells_its_error(capsys, monkeypatch, handed_over):
    monkeypatch.delenv("TRL_EXT_FAILURES", raising=False)
    monkeypatch.setattr(arguments, "parse", lambda *args: 1 / 0)
    assert worker.main([handed_over("--trainer", "grpo")]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and text.endswith("error: ZeroDivisionError: division by zero\n")
