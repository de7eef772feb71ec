"""Choosing kernels, and the reasons of those that cannot serve."""

from __future__ import annotations

import pytest
import torch

from trl_ext.shared_prefix import RefusedError, choose_backend
from trl_ext.shared_prefix.backends import get_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("dtype", "softcap", "expected"),
    [
        (torch.float32, False, "aten"),
        (torch.bfloat16, False, "aten"),
        (torch.float64, False, "math"),
        (torch.float16, False, "math"),
        (torch.float32, True, "math"),
    ],
)
def test_automatic_choice_on_a_cpu(dtype: torch.dtype, softcap: bool, expected: str) -> None:
    assert choose_backend(CPU, dtype, softcap=softcap).name == expected


def test_the_choice_can_be_overridden() -> None:
    assert choose_backend(CPU, torch.float32, name="math").name == "math"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "softcap", "message"),
    [
        ("triton", CPU, torch.float32, False, "no shared-prefix backend 'triton'. Known: flash_attn, aten, math"),
        ("aten", CPU, torch.float64, False, "'aten' cannot run here: it computes in float32 or bfloat16"),
        ("aten", CPU, torch.float32, True, "no soft-capping"),
        ("aten", CUDA, torch.float32, False, "its operators are for the CPU"),
        ("flash_attn", CPU, torch.bfloat16, False, "its kernels are for CUDA, but the model is on cpu"),
        ("flash_attn", CUDA, torch.float32, False, "load the model in bfloat16"),
        ("math", CPU, torch.int64, False, "is not a floating-point dtype"),
    ],
)
def test_what_cannot_run_says_why(
    name: str, device: torch.device, dtype: torch.dtype, softcap: bool, message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        choose_backend(device, dtype, softcap=softcap, name=name)


def test_without_the_package_a_gpu_gets_every_reason() -> None:
    with pytest.raises(
        RefusedError, match=r"flash_attn: the package cannot be imported.*aten: its operators.*backend='math'"
    ):
        choose_backend(CUDA, torch.bfloat16, head_dim=64)


def test_head_widths_that_the_kernels_lack() -> None:
    reason = get_backend("flash_attn").why_not(CUDA, torch.bfloat16, 20, False)
    assert reason is not None
    assert "multiples of 8" in reason
