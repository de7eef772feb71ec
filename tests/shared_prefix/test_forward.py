"""The packed path through whole models: equal to the dense path, and nothing left changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from trl_ext.shared_prefix import (
    MismatchError,
    ModelCost,
    SharedPrefixError,
    dense_scores,
    flop_ratio,
    forward,
    pack,
    packed_attention,
    packed_scores,
    shared_prefix_logps,
    shared_prefix_scores,
)
from trl_ext.shared_prefix.last_layer import only_rows
from trl_ext.shared_prefix.model_parts import has_fused_head

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


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, 61) for _ in range(n)]


@pytest.fixture
def rollout(padded: Callable[..., Any]) -> Any:
    """A multi-turn rollout: two first turns, each answered by two second turns, each with two third ones."""
    rng = random.Random(5)
    prompt = tokens(rng, 20)
    rows = []
    for _ in range(2):
        first = tokens(rng, 18)
        for _ in range(2):
            second = tokens(rng, 17)
            rows += [(prompt, first + second + tokens(rng, rng.randrange(1, 12))) for _ in range(2)]
    return padded(rows)


@pytest.fixture
def system_prompt(padded: Callable[..., Any]) -> Any:
    """Three prompts that begin with the same system prompt, three completions each."""
    rng = random.Random(6)
    system = tokens(rng, 24)
    rows = []
    for length in (18, 22, 30):
        prompt = system + tokens(rng, length)
        rows += [(prompt, tokens(rng, rng.randrange(3, 10))) for _ in range(3)]
    return padded(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["own head", "fused head"])
def test_families(family: str, fused: bool, tiny: Any, groups: Any, compare: Any) -> None:
    model = tiny(family, **FAMILIES[family])
    if fused:
        add_fused_lm_head(model, temperature=0.7)
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
    """With layer norms: transformers computes RMS norms in float32 whatever the model's type. And without left
    padding, which shifts the dense path's rotary angles, float32 as well."""
    ids, mask, width = rollout
    assert bool(mask[:, :-width].all())
    model = tiny("GPTNeoX").double()
    logps, _, report = shared_prefix_logps(model, ids, mask, width)
    assert report.backend == "math"
    difference, gradients = compare(model, ids, mask, width, logps)
    assert difference < 1e-12
    assert gradients < 1e-12


@pytest.mark.parametrize("head", ["own", "fused", "own, for it is faster", "fused, for logits would be many"])
def test_entropies_and_their_gradients(head: str, tiny: Any, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask, width = groups
    model = tiny()
    temperature = None if head == "fused" else 0.6
    if "many" in head:
        monkeypatch.setattr(forward, "MOST_LOGITS", 60)
    if head != "own":
        add_fused_lm_head(model, temperature=0.6, outputs=("log_probs", "entropy"))
    logps, entropies, _ = shared_prefix_logps(model, ids, mask, width, compute_entropy=True, temperature=temperature)
    assert entropies is not None
    assert _made_by(logps, "_LogProbs") == head.startswith("own")
    scored = mask.bool().clone()
    scored[:, :-width] = False
    dense = dense_scores(model, ids, mask, scored, compute_entropy=True, temperature=temperature)
    parameters = list(model.parameters())
    for ours, name in ((logps, "log_probs"), (entropies, "entropy")):
        theirs = dense[name][:, -width:]
        assert float((ours - theirs).detach().abs().max()) < LOGPS
        assert float(ours[~scored[:, -width:]].detach().abs().sum()) == 0.0
    ours_grads = torch.autograd.grad((logps + 0.3 * entropies).sum(), parameters)
    theirs_grads = torch.autograd.grad((dense["log_probs"] + 0.3 * dense["entropy"]).sum(), parameters)
    largest = max(float(g.abs().max()) for g in theirs_grads)
    assert max(float((a - b).abs().max()) for a, b in zip(ours_grads, theirs_grads, strict=True)) < GRADS * largest


def _made_by(result: torch.Tensor, function: str) -> bool:
    """Whether an autograd function of this name took part in a result."""
    nodes = [result.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            if node.name() == f"{function}Backward":
                return True
            nodes.extend(parent for parent, _ in node.next_functions)
    return False


def test_own_head_is_the_textbook_formula(tiny: Any, groups: Any) -> None:
    ids, mask, width = groups
    model = tiny("Gemma2", head_dim=8, final_logit_softcapping=5.0)
    logps, entropies, _ = shared_prefix_logps(model, ids, mask, width, compute_entropy=True, temperature=0.5)
    log_p = (model(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1] / 0.5).log_softmax(-1)
    keep = mask[:, -width:].bool()
    wanted = log_p.gather(-1, ids[:, -width:, None]).squeeze(-1)
    assert torch.allclose(logps[keep], wanted[keep], atol=LOGPS)
    assert entropies is not None
    assert torch.allclose(entropies[keep], -(log_p.exp() * log_p).sum(-1)[keep], atol=LOGPS)


def test_the_head_sees_only_scored_predictions(tiny: Any, groups: Any) -> None:
    model = tiny()
    sizes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    shared_prefix_logps(model, *groups, check=False)
    assert sizes == [int(groups[1][:, -groups[2] :].sum())]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_feed_forward_sees_only_tokens_that_predict(checkpointing: bool, tiny: Any, groups: Any) -> None:
    model = tiny()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packing = pack(*groups)
    seen: list[list[int]] = []
    for layer in model.model.layers:
        sizes: list[int] = []
        seen.append(sizes)
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(args[0].shape[1]))
    scores, _ = packed_scores(model, packing)
    scores["log_probs"].sum().backward()
    times = 2 if checkpointing else 1
    predicting = len(set(packing.predictors.tolist()))
    assert predicting == packing.packed_tokens - 20 - 16  # of each prompt only the last token predicts
    assert seen == [[packing.packed_tokens] * times, [predicting] * times]
    assert not model.model.layers[1].mlp._forward_hooks
    assert not model.model.layers[1].mlp._forward_pre_hooks


@pytest.mark.parametrize("pair", [False, True])
def test_rows_left_out_come_back_as_zeros(pair: bool) -> None:
    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return (2 * x, "kept") if pair else 2 * x

    module, x = Doubles(), torch.arange(4.0).view(1, 4, 1) + 1
    with only_rows(module, torch.tensor([1, 3]), 4):
        output, other = module(x), module(torch.ones(2, 4, 1))
    assert (output[0] if pair else output).flatten().tolist() == [0.0, 4.0, 0.0, 8.0]
    assert (other[0] if pair else other).sum() == 16  # a call of another shape is left alone
    assert not pair or output[1] == "kept"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_checkpointing(reentrant: bool, fused: bool, tiny: Any, groups: Any) -> None:
    """The backward runs each layer's forward again, after the attention implementation was restored."""
    model = tiny()
    if fused:
        add_fused_lm_head(model)
    weights = torch.linspace(-1, 1, groups[0].shape[0] * groups[2]).view(-1, groups[2])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
            before = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
        model.zero_grad(set_to_none=True)
        logps, _, _ = shared_prefix_logps(model, *groups)
        assert model.config._attn_implementation == "sdpa"
        (logps * weights).sum().backward()
        assert model.config._attn_implementation == "sdpa"
        grads.append([p.grad.clone() for p in model.parameters()])
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == before
    for plain, again in zip(*grads, strict=True):
        assert float((plain - again).abs().max()) < 1e-6


def test_checkpointed_layers_do_run_the_cascade_again(tiny: Any, groups: Any) -> None:
    model = tiny()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packing = pack(*groups)
    with packed_attention(model, packing.layout) as entry:
        hidden = model.model(input_ids=packing.input_ids, position_ids=packing.position_ids).last_hidden_state
    assert entry.layers == 2
    hidden.sum().backward()
    assert entry.layers == 4


def test_two_forwards_before_one_backward(tiny: Any, groups: Any, rollout: Any, compare: Any) -> None:
    model = tiny()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = list(model.parameters())

    def both(packed: bool) -> list[torch.Tensor]:
        total = torch.zeros(())
        for ids, mask, width in (groups, rollout, groups):
            if packed:
                logps, _, report = shared_prefix_logps(model, ids, mask, width)
                assert report.packed
            else:
                scored = mask.bool().clone()
                scored[:, :-width] = False
                logps = dense_scores(model, ids, mask, scored)["log_probs"]
            total = total + logps.pow(2).sum()
        return list(torch.autograd.grad(total, parameters))

    ours, theirs = both(True), both(False)
    largest = max(float(g.abs().max()) for g in theirs)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < GRADS * largest


@pytest.mark.parametrize("fused", [False, True])
def test_lora(fused: bool, tiny: Any, groups: Any, compare: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny()
    if fused:
        add_fused_lm_head(base)
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
def test_bfloat16(autocast: bool, tiny: Any, groups: Any, compare: Any) -> None:
    """As close to float32 as the dense path in bfloat16 is."""
    ids, mask, width = groups
    model = tiny()
    add_fused_lm_head(model)
    exact = shared_prefix_logps(model, *groups)[0].detach()
    if not autocast:
        model = model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logps, _, report = shared_prefix_logps(model, *groups)
        assert report.backend == "aten"
        difference, gradients = compare(model, *groups, logps)
        scored = mask.bool().clone()
        scored[:, :-width] = False
        dense = dense_scores(model, ids, mask, scored)["log_probs"][:, -width:].detach()
    assert difference < 0.05
    assert gradients < 0.05
    assert float((logps - exact).detach().abs().mean()) < 1.5 * float((dense - exact).abs().mean())


def test_accelerate_wrapped_forward(tiny: Any, groups: Any, compare: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = tiny()
    add_fused_lm_head(model)
    AcceleratorState._reset_state(True)  # another test's trainer may have chosen full precision for the process
    try:
        wrapped = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        assert has_fused_head(wrapped)
        logps, _, report = shared_prefix_logps(wrapped, *groups)
        assert report.packed
        assert compare(wrapped, *groups, logps)[0] < 0.05
    finally:
        AcceleratorState._reset_state(True)


def test_distributed_data_parallel(tiny: Any, groups: Any, compare: Any, tmp_path: Any) -> None:
    from torch import distributed

    model = tiny()
    add_fused_lm_head(model)
    alone = shared_prefix_logps(model, *groups)[0]
    wanted = torch.autograd.grad(alone.sum(), list(model.parameters()))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second step fails if the wrapper's reducer missed the first
            model.zero_grad(set_to_none=True)
            logps, _, report = shared_prefix_logps(parallel, *groups)
            assert report.packed
            logps.sum().backward()
            for parameter, grad in zip(model.parameters(), wanted, strict=True):
                assert torch.allclose(parameter.grad, grad, atol=1e-6)
    finally:
        distributed.destroy_process_group()


def test_preference_pairs(tiny: Any) -> None:
    rng = random.Random(3)
    rows = []
    for _ in range(3):
        prompt = tokens(rng, 20)
        rows += [(prompt, tokens(rng, 6)), (prompt, tokens(rng, 4))]
    width = max(len(p) + len(c) for p, c in rows)
    ids, mask, completion = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (p, c) in enumerate(rows):
        ids[i, : len(p + c)] = torch.tensor(p + c)
        mask[i, : len(p + c)] = 1
        completion[i, len(p) : len(p + c)] = 1
    model = tiny()
    add_fused_lm_head(model, outputs=("log_probs", "mean_logits", "is_top1", "log_sum_sq_probs"))
    scores, report = shared_prefix_scores(model, ids, mask, score_mask=completion)
    assert report.packed
    output = model(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(completion == 0, -100), fused_lm_head=True
    )
    assert sorted(scores) == ["is_top1", "log_probs", "log_sum_sq_probs", "mean_logits"]
    for name, values in scores.items():
        assert torch.allclose(values[:, 1:].float(), getattr(output, name).float(), atol=LOGPS), name


def test_three_training_steps_end_at_the_same_parameters(tiny: Any, groups: Any, system_prompt: Any) -> None:
    ends = []
    for packed in (True, False):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
        for ids, mask, width in (groups, system_prompt, groups):
            scored = mask.bool().clone()
            scored[:, :-width] = False
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
    rows = padded([(tokens(rng, 12), tokens(rng, 5)) for _ in range(4)])
    model = tiny()
    logps, _, report = shared_prefix_logps(model, *rows)
    assert not report.packed
    assert report.reason is not None
    assert "fewer than min_gain=1.1" in report.reason
    assert report.backend is None
    assert compare(model, *rows, logps) == (0.0, 0.0)
    assert shared_prefix_logps(model, *rows, min_gain=0)[2].packed


def test_nothing_scored_gives_zeros_with_a_gradient(tiny: Any, groups: Any) -> None:
    ids, mask, width = groups
    mask = mask.clone()
    mask[:, -width:] = 0
    model = tiny()
    add_fused_lm_head(model)
    logps, _, report = shared_prefix_logps(model, ids, mask, width)
    assert report.reason == "no token is scored"
    assert float(logps.detach().abs().sum()) == 0.0
    assert logps.requires_grad


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation_and_dense_forwards_are_untouched(implementation: str, tiny: Any, groups: Any) -> None:
    ids, mask, _ = groups
    model = tiny().eval()
    model.set_attn_implementation(implementation)
    untouched = copy.deepcopy(model)
    shared_prefix_logps(model, *groups)
    assert model.config._attn_implementation == implementation
    assert not model.model._forward_hooks
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompts = {"input_ids": ids[:, :21], "attention_mask": mask[:, :21]}
    assert torch.equal(model.generate(**prompts, **settings), untouched.generate(**prompts, **settings))
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)


def test_nested_configurations_are_restored_after_an_error(tiny: Any, groups: Any) -> None:
    model = tiny()
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    model.model.layers[1].self_attn.config._attn_implementation_internal = "eager"
    model.gradient_checkpointing_enable()
    before = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    packed_scores(model, pack(*groups))
    handle = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError, match="stop"):
        packed_scores(model, pack(*groups))
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert model.model.layers[1].self_attn.config._attn_implementation == "eager"
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == before
    assert not model.model._forward_hooks
    assert model(input_ids=groups[0]).logits.shape[-1] == 61


def test_a_temperature_that_is_not_the_fused_heads_is_found_by_the_first_use_check(tiny: Any, groups: Any) -> None:
    model = tiny()
    add_fused_lm_head(model, temperature=0.5)
    shared_prefix_logps(model, *groups, temperature=0.5)
    with pytest.raises(MismatchError, match="differs from its own dense path"):
        shared_prefix_logps(model, *groups, temperature=0.6)


def test_entropies_that_the_fused_head_was_not_asked_for(tiny: Any, groups: Any) -> None:
    model = tiny()
    add_fused_lm_head(model)
    with pytest.raises(ValueError, match="the fused head was added without them"):
        shared_prefix_logps(model, *groups, compute_entropy=True)


def test_a_model_that_never_calls_its_attention_is_an_error(tiny: Any, groups: Any) -> None:
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(SharedPrefixError, match="without calling the attention it was given"):
        shared_prefix_logps(model, *groups, check=False)


def test_the_report_and_the_arithmetic(tiny: Any, groups: Any) -> None:
    ids, mask, width = groups
    model = tiny()
    _, _, report = shared_prefix_logps(model, *groups)
    packing = pack(*groups)
    assert report.dense_tokens == ids.numel()
    assert report.packed_tokens == 21 + 17 + 6 + 8 + 3 + 8 + 1 + 4
    assert report.token_ratio == report.dense_tokens / report.packed_tokens
    assert report.scored == int(mask[:, -width:].sum())
    assert report.pack_seconds > 0
    cost = ModelCost.of(model)
    assert cost.token == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert cost.prediction == 61 * 32
    assert cost.pair == 2 * 32 * 2
    assert flop_ratio(packing, ModelCost(1, 0, 0)) == pytest.approx(report.token_ratio)
    assert flop_ratio(packing, ModelCost(0, 0, 1)) == packing.dense_pairs / packing.layout.pairs
    assert flop_ratio(packing, cost) > 1


def test_experts_count_as_often_as_they_are_visited(tiny: Any) -> None:
    dense, sparse = (ModelCost.of(tiny("Mixtral", num_local_experts=n, num_experts_per_tok=1)) for n in (1, 4))
    router = 2 * 32 * (4 - 1)
    assert sparse.token == dense.token + router
