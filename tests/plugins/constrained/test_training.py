"""Constrained RLHF in real trainers: its limit, its multipliers over generations and restarts, and two processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import brevity, digits
from trl_ext.testing.distributed import compare

FIXED = {"form": "unsquashed", "initial": 1.0, "lagrange_lr": 0.0, "kl": False}
"""One constraint whose multiplier stays at 1, so that its advantage is all there is."""


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same(one: Any, other: Any, limit: float = 0.0) -> None:
    for ours, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=limit, rtol=0)


def test_a_multiplier_that_stays_at_one_is_grpo(train: Any) -> None:
    common = {"rewards": [digits], "optim": "sgd", "learning_rate": 0.5}
    plain = train(**common)
    with trl_ext.enable(constrained={"thresholds": {"digits": 0.1}} | FIXED):
        ours = train(**common)
    assert_same(plain, ours, 1e-6)
    assert logged(ours, "constrained/multiplier/digits") == [1.0, 1.0] and max(logged(plain, "grad_norm")) > 1e-3


def test_one_update_for_every_generation_and_a_resume(build: Any, look: str) -> None:
    """Two optimizer steps and two passes for each generation: eight steps, two updates of the multipliers."""
    common = {"num_iterations": 2, "per_device_train_batch_size": 4, "steps_per_generation": 2, "max_steps": 8}
    common |= {"save_strategy": "steps", "save_steps": 4, "learning_rate": 0.05}
    options = {"thresholds": {"brevity": 0.5, "digits": 0.0}, "initial": 0.3}
    with trl_ext.enable("constrained", look, constrained=options):
        whole = build(**common)
        whole.train()
        rounds, ours = whole._trl_ext.plugins["look"].rounds, whole._trl_ext.plugins["constrained"]
        resumed = build(**common)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-4")
        theirs = resumed._trl_ext.plugins["constrained"]
        assert len(rounds) == 2 and whole._trl_ext.calls["constrained", "advantages"] == 2
    means = [round.rewards.double().mean(0) - torch.tensor([0.0, 0.5]) for round in rounds]  # digits, brevity
    first, second = (logged(whole, f"constrained/violation/{name}") for name in ("digits", "brevity"))
    assert first == pytest.approx([mean[0].item() for mean in means], abs=1e-5)
    assert second == pytest.approx([mean[1].item() for mean in means], abs=1e-5)
    before, after = logged(whole, "constrained/multiplier/brevity")
    assert before == pytest.approx(math.tanh(0.3), abs=1e-4) and after > before + 0.02
    assert torch.equal(ours.mu, theirs.mu) and torch.equal(ours.velocity, theirs.velocity) and ours.mu.abs().min() > 0
    assert_same(whole, resumed)
    # before the first update the policy is its own reference, and afterwards it is not
    kl = logged(whole, "constrained/kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and abs(kl[1]) > 1e-5


def test_two_steps_of_rloo_with_its_own_penalty_replaced(train: Any) -> None:
    with trl_ext.enable(constrained={"thresholds": {"digits": 0.3}, "form": "inequality"}):
        trainer = train("rloo", beta=0.0)
    assert trainer.state.global_step == 2 and logged(trainer, "constrained/advantage_change")[0] > 0.1
    assert abs(logged(trainer, "constrained/kl")[1]) > 0


@pytest.mark.slow
def test_one_and_two_processes_agree(model: str, tmp_path: Path) -> None:
    options = {"thresholds": {"digits": 0.3, "brevity": 0.3}, "initial": 0.3}
    settings = {"rewards": [digits, brevity], "max_steps": 3}
    compare(2, "grpo", model, tmp_path, {"constrained": options}, settings)
