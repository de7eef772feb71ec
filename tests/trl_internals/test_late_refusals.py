"""What the libraries would refuse only once a model is loaded."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

from trl_ext import ConfigError
from trl_ext.trl_internals import arguments, late_refusals

from ..refusals import refused


@pytest.fixture
def check(model: str, tmp_path: Path) -> Any:
    """`check(kind, **settings)` asks about a run with these settings."""

    def run(kind: Any = "grpo", **settings: Any) -> None:
        values = {"output_dir": str(tmp_path), "model_name_or_path": model, "use_cpu": True, "bf16": False}
        late_refusals.check(kind, arguments.parse(kind, [], values | settings))

    return run


def test_a_usual_run_passes(check: Any) -> None:
    for kind in ("grpo", "rloo", "dpo"):
        check(kind)
    check(
        report_to="none",
        use_peft=True,
        lora_target_modules="all-linear",
        optim="sgd",
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-7},
        attn_implementation="sdpa",
        model_init_kwargs={"dtype": "bfloat16"},
        reward_funcs=["think_format_reward", "get_soft_overlong_punishment", "my.reward"],
        scale_rewards=False,
        vllm_mode="unused",
    )
    check("dpo", loss_type=["sigmoid", "sft"], loss_weights=[1, 1], sync_ref_model=True)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("grpo", {"report_to": "trakio"}, ["report_to='trakio'", "Did you mean 'trackio'?"]),
        ("grpo", {"loss_type": "grop"}, ["loss_type='grop'", "for GRPO. Did you mean 'grpo'?"]),
        ("dpo", {"loss_type": ["sigmoid", "sigmod"]}, ["loss_type='sigmod'", "Did you mean 'sigmoid'"]),
        ("grpo", {"scale_rewards": "grup"}, ["Did you mean 'group'?"]),
        ("grpo", {"learning_rate": -1.0}, ["learning_rate=-1.0: Invalid learning rate"]),
        ("grpo", {"lr_scheduler_type": "cosine_with_min_lr"}, ["cosine_with_min_lr", "min_lr"]),
        ("rloo", {"lr_scheduler_kwargs": {"nope": 1}}, ["lr_scheduler_kwargs={'nope': 1}", "nope"]),
        ("grpo", {"attn_implementation": "spda"}, ["attn_implementation='spda'", "Did you mean 'sdpa'?"]),
        ("grpo", {"model_init_kwargs": {"dtype": "bf16"}}, ["dtype='bf16'", "Did you mean 'bfloat16'?"]),
        ("grpo", {"fp16": True}, ["fp16=True", "Leave fp16 out"]),
        ("grpo", {"load_in_4bit": True}, ["load_in_4bit=True", "Add --use_peft"]),
        ("grpo", {"use_peft": True, "lora_task_type": "CAUSAL"}, ["use_peft=True", "CAUSAL_LM"]),
        ("grpo", {"use_peft": True, "lora_r": 0}, ["use_peft=True", "`r` should be a positive integer"]),
        ("grpo", {"use_peft": True, "sync_ref_model": True, "beta": 0.1}, ["sync_ref_model=True", "use_peft"]),
        ("grpo", {"sync_ref_model": True}, ["beta=0.0"]),
        ("grpo", {"fsdp": "full_shard"}, ["fsdp needs several processes"]),
    ],
    ids=str,
)
def test_refused(kind: str, settings: dict[str, Any], words: list[str], check: Any) -> None:
    with refused(ConfigError, "this run cannot work:\n  - ", *words):
        check(kind, **settings)


MISSING = [
    ({"report_to": "trackio"}, "trackio", ["report_to='trackio'", "pip install trackio", "--report_to none"]),
    ({"report_to": ["wandb", "mlflow"]}, "wandb mlflow", ["pip install wandb", "pip install mlflow"]),
    ({"use_vllm": True, "vllm_mode": "colocat"}, "vllm", ["pip install 'trl[vllm]'", "Did you mean 'colocate'?"]),
    ({"optim": "adamw_bnb_8bit"}, "bitsandbytes", ["optim='adamw_bnb_8bit'", "pip install -U bitsandbytes"]),
    ({"optim": "schedule_free_sgd"}, "schedulefree", ["`pip install schedulefree`. `--optim adamw_torch`"]),
    ({"attn_implementation": "flash_attention_2"}, "flash_attn", ["pip install 'trl_ext[flash-attn]'"]),
    ({"use_liger_kernel": True}, "liger_kernel", ["pip install liger-kernel"]),
    ({"load_in_8bit": True, "use_peft": True}, "bitsandbytes", ["load_in_8bit=True: bitsandbytes is not installed"]),
]


@pytest.mark.parametrize(("settings", "packages", "words"), MISSING, ids=str)
def test_missing_packages(settings: dict[str, Any], packages: str, words: list[str], check: Any, capsys: Any) -> None:
    import importlib.util

    if any(importlib.util.find_spec(package) for package in packages.split()):
        pytest.skip(f"{packages} is installed")
    with refused(ConfigError, *words):
        check(**settings)
    assert "Traceback" not in capsys.readouterr().err


def test_a_reward_of_trl_that_needs_a_package(check: Any, monkeypatch: Any) -> None:
    check(reward_funcs=["accuracy_reward"])
    monkeypatch.setattr("trl.rewards.accuracy_rewards.is_math_verify_available", lambda: False)
    with refused(ConfigError, "reward_funcs: accuracy_reward", "pip install 'trl_ext[math]'"):
        check(reward_funcs=["accuracy_reward"])


def test_the_hub_needs_a_login(check: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(late_refusals, "get_token", lambda: None)
    with refused(ConfigError, "push_to_hub=True", "hf auth login"):
        check(push_to_hub=True)
    check(push_to_hub=True, hub_token="hf_x")


def test_a_device_without_bf16(check: Any, monkeypatch: Any) -> None:
    args = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), bf16=True, fp16=False)
    monkeypatch.setattr(late_refusals, "is_bf16_available", lambda ignore_tpu: False)
    assert "--fp16 true" in "".join(late_refusals._precision("grpo", (None, args, None, None)))
    monkeypatch.setattr(late_refusals, "is_bf16_available", lambda ignore_tpu: True)
    assert not list(late_refusals._precision("grpo", (None, args, None, None)))


def test_files_that_do_not_exist(monkeypatch: Any, tmp_path: Path) -> None:
    def launcher(**values: Any) -> Any:
        return types.SimpleNamespace(**{"config_file": None, "use_deepspeed": False} | values)

    with refused(ConfigError, "--deepspeed x.json: there is no such file"):
        late_refusals.check_files({"deepspeed": "x.json"}, launcher())
    with refused(ConfigError, "--config_file none.yaml: there is no such file"):
        late_refusals.check_files({}, launcher(config_file="none.yaml"))
    (tmp_path / "ds.json").write_text("{}")
    monkeypatch.setattr(late_refusals, "is_deepspeed_available", lambda: False)
    with refused(ConfigError, "DeepSpeed is asked for and not installed", "--accelerate_config fsdp2"):
        late_refusals.check_files({"deepspeed": str(tmp_path / "ds.json")}, launcher())
    monkeypatch.setattr(late_refusals, "is_deepspeed_available", lambda: True)
    late_refusals.check_files({"deepspeed": str(tmp_path / "ds.json"), "learning_rate": 1.0}, launcher())
