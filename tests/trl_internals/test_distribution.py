"""What splits parameters over processes, read from real arguments and from accelerate's environment."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig

from trl_ext.testing import tiny_args
from trl_ext.trl_internals.distribution import splits_parameters


@pytest.fixture
def args(tmp_path: Path) -> Any:
    return tiny_args("grpo", tmp_path)


def deepspeed(stage: int | str) -> Any:
    """Stands for accelerate's plugin, which transformers makes where DeepSpeed is installed."""
    return types.SimpleNamespace(zero_stage=stage)


@pytest.mark.parametrize(
    ("changes", "environment"),
    [
        ({}, {}),
        ({}, {"ACCELERATE_USE_FSDP": "false", "FSDP_VERSION": "2"}),
        ({"deepspeed_plugin": deepspeed(2)}, {"ACCELERATE_USE_DEEPSPEED": "true"}),
        ({"parallelism_config": ParallelismConfig(dp_replicate_size=2)}, {"PARALLELISM_CONFIG_TP_SIZE": "2"}),
        ({}, {"PARALLELISM_CONFIG_TP_SIZE": "2"}),
        ({"model_init_kwargs": {"dtype": "float32"}}, {}),
    ],
    ids=str,
)
def test_every_process_has_all_parameters(
    args: Any, changes: dict[str, Any], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vars(args).update(changes)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert splits_parameters(args) is None


@pytest.mark.parametrize(
    ("changes", "environment", "words"),
    [
        ({"deepspeed_plugin": deepspeed(3)}, {}, "DeepSpeed ZeRO stage 3"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({}, {"ACCELERATE_USE_FSDP": "True"}, "FSDP"),
        ({"parallelism_config": ParallelismConfig(dp_shard_size=2)}, {}, "sharded data parallelism (dp_shard_size=2)"),
        ({"parallelism_config": ParallelismConfig(tp_size=4)}, {}, "tensor parallelism (tp_size=4)"),
        (
            {},
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "tensor parallelism (tp_size=2)",
        ),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"model_init_kwargs": {"tp_plan": "auto"}}, {}, "tensor parallelism (tp_plan in model_init_kwargs)"),
    ],
    ids=str,
)
def test_parameters_are_split(
    args: Any, changes: dict[str, Any], environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vars(args).update(changes)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert splits_parameters(args) == words


def test_fsdp_in_the_arguments(tmp_path: Path) -> None:
    assert splits_parameters(tiny_args("grpo", tmp_path, fsdp=True)) == "FSDP"
