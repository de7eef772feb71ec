"""`trl_ext train --dry-run`: the whole plan, every reason against it, and nothing loaded, launched or written."""

import pytest

from trl_ext.cli import main
from trl_ext.train import demo, estimate, reward_check
from trl_ext.train.demo import model as demo_model
from trl_ext.trl_internals import launch


@pytest.fixture(autouse=True)
def nothing_happens(monkeypatch):
    """Fails a test in which a model is loaded or a process launched; rewards are tried in this process."""
    from transformers import AutoModelForCausalLM

    def never(*args, **kwargs):
        raise AssertionError("a dry run launches and loads nothing")

    def same_process(folder):
        reward_check.main([str(folder)])
        return "ended with exit code 0"

    monkeypatch.setattr(launch, "launch", never)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", never)
    monkeypatch.setattr(reward_check, "_run", same_process)


@pytest.fixture
def dry(capsys, tmp_path):
    """`dry(*argv)` -> exit code and output, with single spaces. Nothing may be written to `out`."""

    def run(*argv, option="--dry-run"):
        code = main.main(["train", *map(str, argv), option])
        text = " ".join(capsys.readouterr().out.split())
        assert not (tmp_path / "out").exists()
        return code, text

    return run


def test_the_plan_of_eight_processes_with_a_gpu_each(dry, config):
    """As on a login node: neither bfloat16, TF32 nor flash-attention is there, and no second process either."""
    path = config(
        plugins={"gdpo": {"group_eps": 0.01}},
        bf16=True,
        tf32=True,
        attn_implementation="flash_attention_2",
        num_processes=8,
        gradient_accumulation_steps=2,
        max_steps=None,
        num_train_epochs=2,
        per_device_train_batch_size=1,
        eval_strategy="steps",
        per_device_eval_batch_size=2,
    )
    code, text = dry("--config", path)
    assert code == 0, text
    assert "gdpo.group_eps 0.01 (default 0.0001)" in text and "gdpo.batch_eps" not in text
    assert "learning_rate 0.01 (default 1e-06)" in text and "max_completion_length 8 (default 512)" in text
    assert "rewards gdpo advantages gdpo" in text
    assert "column prompt the GRPO trainer" in text and "rows at least 4, for the first step" in text
    assert "training rows 16 " in text
    assert "round 4 prompts x 4 = 16 completions (rows)" in text
    assert "1 completion on each of 8 processes; 2 per round, used 1 time" in text
    assert "optimizer step 2 micro-batches; 1 per round run 8 optimizer steps, by num_train_epochs=2" in text
    assert "launcher ok: 8 processes" in text and "No model was loaded and nothing was written." in text


def test_parameters_and_memory_of_a_model_on_disk(dry, config, model):
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(model)
    embeddings = shape.vocab_size * shape.hidden_size
    code, text = dry("--trainer", "grpo", "--config", config(), option="--dry_run")
    assert code == 0
    count = int(text.partition("parameters ")[2].split()[0].replace(",", ""))
    assert count > embeddings
    size = 4 * count / 2**20  # weights, gradients and two numbers of the optimizer, of four bytes each
    assert f"memory {4 * size:.2f} MiB on each process (weights {size:.2f} MiB, gradients {size:.2f} MiB" in text
    code, text = dry("--trainer", "grpo", "--config", config(use_peft=True, lora_r=4))
    trained = int(text.partition(" trained")[0].split()[-1].replace(",", ""))
    assert 0 < trained < count / 2 and f"parameters {count + trained:,}, {trained:,} trained" in text
    assert estimate.bytes_text(3 * 2**29) == "1.50 GiB"


def test_every_reason_is_told_at_once(dry, config, tmp_path):
    path = config(
        plugins={"gdpo": {}},
        reward_funcs=["trl_ext.testing.digits", "trl_ext.testing.no_such"],
        scale_rewards="batch",
        resume_from_checkpoint="nowhere",
    )
    code, text = dry("--config", path)
    assert code == 2 and "This run cannot work:" in text
    assert "nowhere: there is no such folder" in text
    assert "'trl_ext.testing' has no 'no_such'" in text
    code, text = dry("--config", config(plugins={"gdpo": {}}, scale_rewards="batch"))
    assert code == 2 and "set scale_rewards=" in text and "plugins refused, see below" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"per_device_train_batch_size": 3}, "must be divisible by num_generations"),
        ({"dataset_train_split": "training"}, "there is no split 'training'"),
        ({"num_processes": 64}, "the training data has 16 prompts, and a round takes 128"),
    ],
)
def test_a_run_that_cannot_work(dry, config, changes, words):
    code, text = dry("--trainer", "grpo", "--config", config(**changes))
    assert code == 2 and text.count(words) == 1, text


def test_dpo_counts_pairs(dry, config):
    code, text = dry("--trainer", "dpo", "--config", config(kind="dpo", max_steps=None, num_processes=2))
    assert code == 0, text
    assert "column chosen the DPO trainer column rejected the DPO trainer" in text
    assert "8 pairs on each of 2 processes" in text and "reference model" in text


def test_a_task_of_the_lab_and_its_tools(dry, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "experiment: {task: lookup, trainer: grpo, train_size: 32}\nplugins: {otc: {c: 4}}\n"
        f"output_dir: {tmp_path}/out\nper_device_train_batch_size: 8\nnum_generations: 4\n"
    )
    code, text = dry("--config", file)
    assert code == 0, text
    assert "training rows 32" in text and "task lookup ok" in text and "otc" in text


def test_the_demo_is_not_converted(dry, monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "_convert", lambda *_: pytest.fail("converted"))
    code, text = dry("--plugin", "gdpo", "--output_dir", tmp_path / "out")
    assert code == 0, text
    assert "column answer the reward correctness" in text and demo.TAKES in text
    assert "run 25 optimizer steps, by max_steps" in text
