"""Noise and positions, found by running models that give no hint of them in names or settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from trl_ext.shared_prefix import ModelParts, RefusedError, selfcheck, shared_prefix_logps, traits, why_not_at_all

from .conftest import random_tokens


@pytest.fixture(autouse=True)
def fresh_traits() -> None:
    """Forgets all traits before each test."""
    traits.forget()


def add_noise(module: nn.Module, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Adds to the output of a module what is drawn for it in training."""
    module.register_forward_hook(lambda module, args, output: output + draw(output) if module.training else output)


def test_noise_without_a_name(tiny: Any, groups: Any) -> None:
    model = tiny()
    assert traits.why_noisy(ModelParts.of(model)) is None
    add_noise(model.model.layers[1].mlp, lambda x: 1e-6 * torch.randn_like(x))
    with pytest.raises(RefusedError, match=r"draws random numbers in training in model\.layers\.1\.mlp \(LlamaMLP\)"):
        shared_prefix_logps(model, *groups)
    assert not shared_prefix_logps(model, *groups, on_refusal="dense")[2].packed
    assert shared_prefix_logps(model.eval(), *groups)[2].packed


def test_noise_that_an_adapter_hides_at_first(tiny: Any) -> None:
    """The matrix behind the noise is zero, so that nothing of it shows in the results."""
    model = tiny()
    layer = model.model.layers[0].mlp.down_proj
    layer.delta = nn.Parameter(torch.zeros(48))
    layer.register_forward_hook(lambda module, args, output: output + torch.rand_like(args[0]) @ module.delta[:, None])
    assert "down_proj" in str(traits.why_noisy(ModelParts.of(model)))


def test_noise_of_a_generator_of_its_own(tiny: Any) -> None:
    model = tiny()
    generator = torch.Generator()
    add_noise(model.model.layers[0].mlp, lambda x: 0.1 * torch.randn(x.shape, generator=generator))
    assert "two equal rows of a batch differently" in str(traits.why_noisy(ModelParts.of(model)))


def test_noise_on_embeddings_by_a_hook(tiny: Any) -> None:
    model = tiny()
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    reason = str(traits.why_noisy(ModelParts.of(model)))
    assert "draws random numbers in training in model.embed_tokens" in reason
    assert reason.endswith("Leave out neftune_noise_alpha.")


def test_whole_layers_that_are_dropped_are_no_obstacle(tiny: Any) -> None:
    model = tiny("OPT", word_embed_proj_dim=32, ffn_dim=48, dropout=0.0, layerdrop=0.5)
    assert traits.why_noisy(ModelParts.of(model)) is None


def test_noise_that_no_setting_switches_off_is_told_first(tiny: Any, groups: Any) -> None:
    """Its advice on jitter would not help: the router samples its experts in training."""
    model = tiny("Phimoe", router_jitter_noise=0.1, input_jitter_noise=0.1, num_local_experts=4)
    with pytest.raises(
        RefusedError, match=r"draws random numbers in training in model\.layers\.0\.mlp\.router"
    ) as caught:
        shared_prefix_logps(model, *groups)
    assert "Otherwise turn shared prefixes off" in str(caught.value)
    assert {module.router_jitter_noise for module in model.modules() if hasattr(module, "router_jitter_noise")} == {0.1}
    assert not shared_prefix_logps(model, *groups, on_refusal="dense")[2].packed
    assert why_not_at_all(model.eval()) is None
    assert "draws random numbers" in str(why_not_at_all(model, in_training=True))
    assert not any(module.training for module in model.modules())


def test_named_noise_is_told_with_its_setting(tiny: Any, groups: Any) -> None:
    noisy = {"residual_dropout": 0.1, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    with pytest.raises(RefusedError, match=r"Set residual_dropout=0\.0 in the model's configuration"):
        shared_prefix_logps(tiny("Starcoder2", **noisy), *groups)
    assert shared_prefix_logps(tiny("Starcoder2", **noisy | {"residual_dropout": 0.0}), *groups)[2].packed


def test_draws_without_an_effect_are_no_obstacle(tiny: Any) -> None:
    """DBRX multiplies by random numbers between 1 - 0 and 1 + 0."""
    feed_forward = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    sizes = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 1,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    }
    for epsilon, reason in ((0.0, None), (0.1, "Set moe_jitter_eps=0.0")):
        model = tiny("Dbrx", ffn_config={**feed_forward, "moe_jitter_eps": epsilon}, **sizes)
        assert traits.why_noisy(ModelParts.of(model)) is None
        assert (why_not_at_all(model) is None) == (reason is None)
        assert reason is None or reason in str(why_not_at_all(model))


def test_no_trace(tiny: Any) -> None:
    model = tiny()
    add_noise(model.model.layers[0], lambda x: torch.randn_like(x))
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    traits.why_noisy(ModelParts.of(model))
    traits.positions_are_columns(ModelParts.of(model), 40)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_is_asked_once_per_mode(tiny: Any, groups: Any) -> None:
    model = tiny()
    calls: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    shared_prefix_logps(model, *groups)
    first = len(calls)
    shared_prefix_logps(model, *groups)
    assert len(calls) == first + 1  # the packed row alone
    assert calls.count(True) == 3  # the question about noise, and the two packed rows
    add_noise(model.model.layers[0], lambda x: torch.randn_like(x))
    with pytest.raises(RefusedError, match="draws random numbers"):
        shared_prefix_logps(model, *groups)


GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}
SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "llama_4_scaling_beta": 0.5}
SCALED |= {"original_max_position_embeddings": 32}
# Family, settings, and whether tokens behind padding have the numbers of their columns.
POSITIONS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "rotary": ("Llama", {}, False),
    "learned, by column": ("GPT2", GPT2, True),
    "learned, by real tokens": ("OPT", OPT, False),
    "weights behind the rotation": ("HunYuanDenseV1", {"head_dim": 8}, True),
    "queries scaled by position": ("Ministral3", {"head_dim": 8, "rope_parameters": SCALED}, True),
}


@pytest.mark.parametrize("case", POSITIONS)
def test_padding_on_the_left(case: str, tiny: Any, groups: Any, compare: Any) -> None:
    family, settings, by_column = POSITIONS[case]
    model = tiny(family, initializer_range=0.2, **settings)
    assert traits.positions_are_columns(ModelParts.of(model), groups[0].shape[1]) == by_column
    logps, _, report = shared_prefix_logps(model, *groups, min_gain=0)
    assert report.packed
    difference, gradients = compare(model, *groups, logps)
    assert difference < 2e-5
    assert gradients < 2e-5


def test_subtle_positions_under_autocast(tiny: Any) -> None:
    """The difference is smaller than the rounding of half types. A wrapped forward may switch autocast on itself."""
    model = tiny("HunYuanDenseV1", head_dim=8)
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return original(*args, **kwargs)

    model.forward = forward
    assert traits.positions_are_columns(ModelParts.of(model), 40)
    assert model.forward is forward
    traits.forget()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert traits.positions_are_columns(ModelParts.of(model), 40)


def test_positions_that_matter_only_far_from_the_start(tiny: Any) -> None:
    late = SCALED | {"original_max_position_embeddings": 128}
    model_parts = ModelParts.of(tiny("Ministral3", head_dim=8, rope_parameters=late))
    assert not traits.positions_are_columns(model_parts, 100)
    assert traits.positions_are_columns(model_parts, 140)


def test_without_padding_on_the_left_positions_are_no_question(tiny: Any, padded: Any, compare: Any) -> None:
    rng = random.Random(0)
    prompt = random_tokens(rng, 20)
    batch = padded([(prompt, random_tokens(rng, length)) for length in (4, 7)])
    model = tiny("GPT2", **GPT2)
    calls: list[None] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(None))
    logps, _, report = shared_prefix_logps(model, *batch, check=False)
    assert (len(calls), report.packed) == (1, True)
    assert compare(model, *batch, logps)[0] < 2e-5
    assert shared_prefix_logps(model, *batch)[2].packed


def test_rows_share_less_where_positions_are_columns(tiny: Any, system_prompt: Any, compare: Any) -> None:
    """A system prompt stands in other columns for each prompt of another length."""
    ratios = []
    for model in (tiny(), tiny("GPT2", **GPT2)):
        logps, _, report = shared_prefix_logps(model, *system_prompt)
        assert compare(model, *system_prompt, logps)[0] < 2e-5
        ratios.append(report.token_ratio)
    assert ratios[0] > ratios[1] > 1.5


def test_positions_of_no_known_kind_are_refused(tiny: Any, groups: Any) -> None:
    model = tiny("GPT2", **GPT2)

    def count_backwards(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(args[0].shape[1] - 1, -1, -1)[None]
        return args, kwargs

    model.transformer.register_forward_pre_hook(count_backwards, with_kwargs=True)
    with pytest.raises(RefusedError, match="absolute positions, and behind left padding they are neither"):
        shared_prefix_logps(model, *groups)


def test_sharded_models_are_called_equally_often(tiny: Any, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process must gather the parameters as often as the others, whatever rows it has."""
    monkeypatch.setattr(ModelParts, "is_sharded", property(lambda self: True))
    ids, mask, width = groups
    counts = []
    for rows, gain in ((slice(0, 7), 0), (slice(0, 4), 0), (slice(0, 4), 100)):
        model = tiny()
        calls: list[None] = []
        model.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(None))
        traits.forget()
        selfcheck.forget()
        shared_prefix_logps(model, ids[rows], mask[rows], width, min_gain=gain)
        counts.append(len(calls))
    assert len(set(counts)) == 1
