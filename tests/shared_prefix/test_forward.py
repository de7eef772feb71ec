"""The shared-prefix forward through whole models equals the dense path: values, gradients and training steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import processes
from trl_ext.shared_prefix import (
    RefusedError,
    dense_scores,
    has_fused_head,
    shared_prefix_logps,
    shared_prefix_scores,
)

LOGPS, GRADS = 5e-6, 1e-5
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Gemma2": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8, "sliding_window": 64},
    "Phi3": {},
    "Olmo2": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": MOE,
    "DeepseekV3": LATENT,
    "Cohere": {},
    "GPTNeoX": {},
}


def random_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, 61) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["own head", "fused head"])
def test_families(family: str, fused: bool, tiny: Any, groups: Any, compare: Any, add_fused_head: Any) -> None:
    model = tiny(family, **FAMILIES[family])
    if fused:
        add_fused_head(model, temperature=0.7)
    logps, _, report = shared_prefix_logps(model, *groups)
    assert report.packed
    difference, gradients = compare(model, *groups, logps)
    assert difference < LOGPS
    assert gradients < GRADS


@pytest.mark.parametrize("batch", ["groups", "rollout", "system_prompt"])
def test_trees_of_every_depth(batch: str, tiny: Any, compare: Any, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(batch)
    model = tiny()
    logps, _, report = shared_prefix_logps(model, *rows)
    assert report.levels == {"groups": 2, "rollout": 4, "system_prompt": 3}[batch]
    assert report.token_ratio > 1.5
    difference, gradients = compare(model, *rows, logps)
    assert difference < LOGPS
    assert gradients < GRADS


def test_float64_agrees_to_the_last_digits(tiny: Any, rollout: Any, compare: Any) -> None:
    """Uses a model and a batch in which nothing is computed in float32.

    transformers computes RMS norms in float32 whatever the model's dtype, so the model has layer norms. Left padding
    would shift the rotary angles of the dense path, which are float32 as well, so the batch has none.
    """
    ids, mask, width = rollout
    assert bool(mask[:, :-width].all())
    model = tiny("GPTNeoX").double()
    logps, _, report = shared_prefix_logps(model, ids, mask, width)
    assert report.backend == "math"
    difference, gradients = compare(model, ids, mask, width, logps)
    assert difference < 1e-12
    assert gradients < 1e-12


@pytest.mark.parametrize("fused", [False, True])
def test_lora(fused: bool, tiny: Any, groups: Any, compare: Any, add_fused_head: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny()
    if fused:
        add_fused_head(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    assert has_fused_head(model) == fused
    logps, _, report = shared_prefix_logps(model, *groups)
    assert report.packed
    difference, gradients = compare(model, *groups, logps)
    assert difference < LOGPS
    assert gradients < GRADS
    with model.disable_adapter(), torch.no_grad():  # the reference role
        reference, _, report = shared_prefix_logps(model, *groups)
        assert report.packed
    assert float((reference - logps).detach().abs().max()) > 1e-3
    assert base.config._attn_implementation == "sdpa"


def test_no_grad_and_inference_mode(tiny: Any, groups: Any) -> None:
    model = tiny()
    logps, _, _ = shared_prefix_logps(model, *groups)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            old, _, report = shared_prefix_logps(model, *groups)
        assert report.packed
        assert not old.requires_grad
        assert torch.equal(old, logps)


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast: bool, tiny: Any, groups: Any, compare: Any, scored_mask: Any, add_fused_head: Any) -> None:
    """Compares with float32: the packed path is about as close to it as the dense path in bfloat16."""
    ids, mask, width = groups
    model = tiny()
    add_fused_head(model)
    exact = shared_prefix_logps(model, *groups)[0].detach()
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logps, _, report = shared_prefix_logps(model, *groups)
        assert report.backend == "aten"
        difference, gradients = compare(model, *groups, logps)
        dense = dense_scores(model, ids, mask, scored_mask(mask, width))["log_probs"][:, -width:].detach()
    assert difference < 0.05
    assert gradients < 0.05
    assert float((logps - exact).detach().abs().mean()) < 1.5 * float((dense - exact).abs().mean())


@pytest.mark.parametrize("fused", [False, True])
def test_soft_capped_scores_under_autocast(
    fused: bool, tiny: Any, groups: Any, compare: Any, add_fused_head: Any
) -> None:
    """Keeps autocast out of the kernels, whose dtypes would no longer match."""
    model = tiny("Gemma2", head_dim=8)
    if fused:
        add_fused_head(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps, _, report = shared_prefix_logps(model, *groups)
        assert report.backend == "math"
        difference, gradients = compare(model, *groups, logps)
    assert difference < 0.05
    assert gradients < 0.05


def test_accelerate_wrapped_forward(tiny: Any, groups: Any, compare: Any, add_fused_head: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = tiny()
    add_fused_head(model)
    AcceleratorState._reset_state(True)  # another test's trainer may have chosen full precision for the process
    try:
        wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        assert has_fused_head(wrapped)
        logps, _, report = shared_prefix_logps(wrapped, *groups)
        assert report.packed
        assert compare(wrapped, *groups, logps)[0] < 0.05
    finally:
        AcceleratorState._reset_state(True)


UNDER_DDP = """
import sys
import torch
from torch import distributed, nn
from trl.trainer.utils import add_fused_lm_head
from trl_ext.shared_prefix import shared_prefix_logps

folder = sys.argv[1]
model, groups, expected = torch.load(f"{folder}/case.pt", weights_only=False)
add_fused_lm_head(model)
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
parallel = nn.parallel.DistributedDataParallel(model)
for _ in range(2):  # the second step fails if the wrapper's reducer missed the first
    model.zero_grad(set_to_none=True)
    logps, _, report = shared_prefix_logps(parallel, *groups)
    assert report.packed
    logps.sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, grad, atol=1e-6)
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_distributed_data_parallel(tiny: Any, groups: Any, tmp_path: Path, add_fused_head: Any) -> None:
    model, plain = tiny(), tiny()
    add_fused_head(model)
    expected = torch.autograd.grad(shared_prefix_logps(model, *groups)[0].sum(), list(model.parameters()))
    torch.save((plain, groups, expected), tmp_path / "case.pt")
    # A process of its own: gloo's last thread may wait for the interpreter while the interpreter waits for that thread.
    processes.run_python(UNDER_DDP, str(tmp_path), check=True)


def test_preference_pairs(tiny: Any, add_fused_head: Any) -> None:
    rng = random.Random(3)
    rows = []
    for _ in range(3):
        prompt = random_tokens(rng, 20)
        rows += [(prompt, random_tokens(rng, 6)), (prompt, random_tokens(rng, 4))]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, mask, completion = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate(rows):
        length = len(prompt + answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        mask[row, :length] = 1
        completion[row, len(prompt) : length] = 1
    model = tiny()
    add_fused_head(model, outputs=("log_probs", "mean_logits", "is_top1", "log_sum_sq_probs"))
    scores, report = shared_prefix_scores(model, ids, mask, score_mask=completion)
    assert report.packed
    output = model(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(completion == 0, -100), fused_lm_head=True
    )
    assert sorted(scores) == ["is_top1", "log_probs", "log_sum_sq_probs", "mean_logits"]
    for name, values in scores.items():
        assert torch.allclose(values[:, 1:].float(), getattr(output, name).float(), atol=LOGPS), name


def test_three_training_steps_end_at_the_same_parameters(
    tiny: Any, groups: Any, system_prompt: Any, scored_mask: Any
) -> None:
    ends = []
    for packed in (True, False):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        for ids, mask, width in (groups, system_prompt, groups):
            scored = scored_mask(mask, width)
            if packed:
                logps = shared_prefix_logps(model, ids, mask, width)[0]
            else:
                logps = dense_scores(model, ids, mask, scored)["log_probs"][:, -width:]
            loss = -(logps * torch.linspace(-1, 1, logps.numel()).view(logps.shape)).sum() / scored.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    assert max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True)) < 2e-5


def test_below_the_minimum_gain_the_dense_path_runs_and_says_so(tiny: Any, padded: Any, compare: Any) -> None:
    rng = random.Random(0)
    rows = padded([(random_tokens(rng, 12), random_tokens(rng, 5)) for _ in range(4)])
    model = tiny()
    logps, _, report = shared_prefix_logps(model, *rows)
    assert not report.packed
    assert report.reason is not None
    assert "fewer than min_gain=1.1" in report.reason
    assert report.backend is None
    assert compare(model, *rows, logps) == (0.0, 0.0)
    assert shared_prefix_logps(model, *rows, min_gain=0)[2].packed


def test_nothing_scored_gives_zeros_with_a_gradient(tiny: Any, groups: Any, add_fused_head: Any) -> None:
    ids, mask, width = groups
    mask = mask.clone()
    mask[:, -width:] = 0
    model = tiny()
    add_fused_head(model)
    logps, _, report = shared_prefix_logps(model, ids, mask, width)
    assert report.reason == "no token is scored"
    assert float(logps.detach().abs().sum()) == 0.0
    assert logps.requires_grad


def test_the_report_describes_the_batch(tiny: Any, groups: Any) -> None:
    ids, mask, width = groups
    _, _, report = shared_prefix_logps(tiny(), *groups)
    assert report.dense_tokens == ids.numel()
    # Each prompt once, and each completion without its last token.
    assert report.packed_tokens == 21 + 17 + 6 + 8 + 3 + 8 + 1 + 4
    assert report.token_ratio == report.dense_tokens / report.packed_tokens
    assert report.scored == int(mask[:, -width:].sum())
    assert report.pack_seconds > 0


def test_refusal_raises_or_is_reported(tiny: Any, groups: Any, compare: Any) -> None:
    model = tiny("Mistral", sliding_window=12)
    with pytest.raises(RefusedError, match="MistralForCausalLM has sliding attention over 12 tokens"):
        shared_prefix_logps(model, *groups)
    logps, _, report = shared_prefix_logps(model, *groups, on_refusal="dense")
    assert not report.packed
    assert report.reason is not None
    assert "sliding attention over 12 tokens" in report.reason
    assert compare(model, *groups, logps) == (0.0, 0.0)


def test_rows_that_cannot_be_packed_run_dense(tiny: Any, padded: Any, compare: Any) -> None:
    rng = random.Random(0)
    prompt = random_tokens(rng, 20)
    batch = padded([(prompt, random_tokens(rng, 4)), (prompt, random_tokens(rng, 6)), ([], random_tokens(rng, 5))])
    model = tiny()
    with pytest.raises(RefusedError, match="Is its prompt empty"):
        shared_prefix_logps(model, *batch)
    logps, _, report = shared_prefix_logps(model, *batch, on_refusal="dense")
    assert not report.packed
    assert report.reason is not None
    assert "Is its prompt empty" in report.reason
    assert (report.dense_tokens, report.packed_tokens, report.token_ratio) == (batch[0].numel(), 0, 1.0)
    assert compare(model, *batch, logps)[0] == 0.0


def test_pairs_with_an_empty_prompt(tiny: Any, padded: Any) -> None:
    rng = random.Random(0)
    first = random_tokens(rng, 20)
    ids, mask, _ = padded([([], [*first, 5, 6]), ([], [*first, 7])])
    model = tiny()
    scores, report = shared_prefix_scores(model, ids, mask, score_mask=mask)
    assert report.packed
    dense, _ = shared_prefix_scores(model, ids, mask, score_mask=mask, min_gain=100)
    torch.testing.assert_close(scores["log_probs"], dense["log_probs"], atol=2e-5, rtol=0)
    assert (scores["log_probs"][:, 0] == 0).all()


def test_wrong_arguments_are_no_refusals(tiny: Any, groups: Any) -> None:
    ids, mask, width = groups
    for arguments in ((ids, mask[:, 1:], width), (ids, mask, 0)):
        with pytest.raises(ValueError, match="must"):
            shared_prefix_logps(tiny(), *arguments, on_refusal="dense")
    with pytest.raises(ValueError, match="logits_to_keep must be"):
        shared_prefix_scores(tiny(), ids, mask)
