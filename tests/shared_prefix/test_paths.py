"""The two paths without checks: what reaches the head, and which head computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trl_ext.shared_prefix import SharedPrefixError, dense_scores, pack, packed_scores, paths, shared_prefix_logps

LOGPS, GRADS = 5e-6, 1e-5


@pytest.mark.parametrize("head", ["own", "fused", "own, as it is faster", "fused, as there are too many logits"])
def test_entropies_and_their_gradients(
    head: str, tiny: Any, groups: Any, scored_mask: Any, monkeypatch: pytest.MonkeyPatch, add_fused_head: Any
) -> None:
    ids, mask, width = groups
    model = tiny()
    temperature = None if head == "fused" else 0.6
    if "many" in head:
        monkeypatch.setattr(paths, "MOST_LOGITS", 60)
    if head != "own":
        add_fused_head(model, temperature=0.6, outputs=("log_probs", "entropy"))
    logps, entropies, _ = shared_prefix_logps(model, ids, mask, width, compute_entropy=True, temperature=temperature)
    assert entropies is not None
    assert _made_by(logps, "_TokenLogProbs") == head.startswith("own")
    scored = scored_mask(mask, width)
    dense = dense_scores(model, ids, mask, scored, compute_entropy=True, temperature=temperature)
    parameters = list(model.parameters())
    for values, name in ((logps, "log_probs"), (entropies, "entropy")):
        assert float((values - dense[name][:, -width:]).detach().abs().max()) < LOGPS
        assert float(values[~scored[:, -width:]].detach().abs().sum()) == 0.0
    grads = torch.autograd.grad((logps + 0.3 * entropies).sum(), parameters)
    dense_grads = torch.autograd.grad((dense["log_probs"] + 0.3 * dense["entropy"]).sum(), parameters)
    largest = max(float(grad.abs().max()) for grad in dense_grads)
    assert max(float((a - b).abs().max()) for a, b in zip(grads, dense_grads, strict=True)) < GRADS * largest


def _made_by(result: torch.Tensor, function: str) -> bool:
    """Returns whether an autograd function of this name took part in a result."""
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
    scored = mask[:, -width:].bool()
    expected = log_p.gather(-1, ids[:, -width:, None]).squeeze(-1)
    assert torch.allclose(logps[scored], expected[scored], atol=LOGPS)
    assert entropies is not None
    assert torch.allclose(entropies[scored], -(log_p.exp() * log_p).sum(-1)[scored], atol=LOGPS)


def test_the_head_sees_only_scored_predictions(tiny: Any, groups: Any) -> None:
    model = tiny()
    sizes = []
    model.lm_head.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    shared_prefix_logps(model, *groups, check=False)
    assert sizes[-1] == int(groups[1][:, -groups[2] :].sum())  # after a look at the model's positions


def test_entropies_that_the_fused_head_was_not_asked_for(tiny: Any, groups: Any, add_fused_head: Any) -> None:
    model = tiny()
    add_fused_head(model)
    with pytest.raises(ValueError, match="the fused head was added without them"):
        shared_prefix_logps(model, *groups, compute_entropy=True)


def test_a_model_that_never_calls_its_attention_is_an_error(tiny: Any, groups: Any) -> None:
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(SharedPrefixError, match="without calling the attention it was given"):
        shared_prefix_logps(model, *groups, check=False)


def test_the_patch_names_the_kernels_that_ran(tiny: Any, groups: Any) -> None:
    packing = pack(*groups)
    assert packed_scores(tiny(), packing)[1].backend_name == "aten"
    assert packed_scores(tiny(), packing, backend="math")[1].backend_name == "math"
    assert packed_scores(tiny().double(), packing)[1].backend_name == "math"
