"""TGDPO: TRL's own loss under the plugin on the authors' numbers."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.trl_internals import seams

pytestmark = pytest.mark.skipif(seams.trl_version() < seams.Version("1.15"), reason="needs the fused head of TRL 1.15")
GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "golden" / "tgdpo.json").read_text())["cases"]


@pytest.mark.parametrize("case", [c for c in GOLDEN if "policy_logits" not in c["inputs"]], ids=lambda c: c["name"])
def test_trl_s_loss_is_the_authors(build: Any, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that return the golden log-probabilities, and everything else real: trainer, loss, plugin, gradient."""
    from trl.trainer.utils import FusedCausalLMOutput

    inputs, settings, expected = case["inputs"], case["hyperparameters"], case["outputs"]
    stacked = {
        name: torch.tensor(inputs[f"{name}_chosen_logps"] + inputs[f"{name}_rejected_logps"], dtype=torch.float64)
        for name in ("policy", "ref", "guide")
    }
    shifted = torch.tensor(inputs["chosen_mask"] + inputs["rejected_mask"])
    mask = torch.cat([torch.zeros(len(shifted), 1, dtype=torch.long), shifted], dim=1)
    logps = {name: values.masked_fill(shifted == 0, 0) for name, values in stacked.items()}
    policy = logps["policy"].requires_grad_()
    module = types.ModuleType("golden_guide")
    module.rewards = lambda pairs: settings["beta"] * (logps["guide"] - logps["ref"])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "golden_guide", module)

    with trl_ext.enable(tgdpo={"reward_func": "golden_guide:rewards", "alpha": settings["alpha"]}):
        trainer = build("dpo", beta=settings["beta"])
        trainer.model.train()

        def answers(values: torch.Tensor) -> Any:
            zeros = torch.zeros_like(values)
            extra = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool(), "label_mask": shifted.bool()}
            return lambda **kwargs: FusedCausalLMOutput(log_probs=values, **extra)

        trainer.model.forward, trainer.ref_model.forward = answers(policy), answers(logps["ref"])
        ids = torch.ones_like(mask)
        batch = {"input_ids": ids, "attention_mask": ids, "completion_mask": mask}
        row = {"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [1]}
        from trl_ext.engine.stages.pairs import KEY, Rows

        loss = trainer.compute_loss(trainer.model, batch | {KEY: Rows([row] * (len(mask) // 2))})
        (gradient,) = torch.autograd.grad(loss, policy)
        metrics = trainer._metrics["train"]
        found = {name: metrics[f"tgdpo/rewards/{name}"][-1] for name in ("chosen", "rejected")}
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-9)
    wanted = torch.tensor(expected["grad_policy_chosen"] + expected["grad_policy_rejected"], dtype=torch.float64)
    torch.testing.assert_close(gradient * (shifted != 0), wanted, atol=1e-9, rtol=1e-7)
    for name, value in found.items():  # without factors, as the authors log them
        official = expected[f"{name}_rewards_sum"]
        assert value == pytest.approx(sum(official) / len(official), abs=1e-9)
