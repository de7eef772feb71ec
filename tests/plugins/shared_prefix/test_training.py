"""The shared-prefix plugin on real trainers: the same training as dense TRL, with fewer tokens, or a reason."""

import pytest
import torch
from peft import LoraConfig

import trl_ext
from tests.plugins.shared_prefix.runs import FUSED, NEEDS_FUSED, PACK, assert_same, metric, pair
from trl_ext.shared_prefix import RefusedError
from trl_ext.testing import tiny_model, tiny_trainer
from trl_ext_hooks import Generation, Plugin, hookimpl


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {}),
        ("grpo", {"beta": 0.1, "num_iterations": 2}),
        ("grpo", {"gradient_checkpointing": True, "loss_type": "grpo"}),
        ("grpo", {"importance_sampling_level": "sequence", "loss_type": "dr_grpo"}),
        ("rloo", {}),
        ("rloo", {"beta": 0.0, "num_iterations": 2}),
        pytest.param("dpo", {}, marks=NEEDS_FUSED),
        pytest.param(
            "dpo",
            {"loss_type": ["ipo"], "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
            marks=NEEDS_FUSED,
        ),
    ],
    ids=str,
)
def test_three_steps_equal_plain_trl(train, kind, settings):
    dense, shared = pair(train, kind, max_steps=3, **settings)
    assert_same(dense, shared)
    assert shared.state.global_step == 3


@pytest.mark.parametrize("kind", ["grpo", "rloo", pytest.param("dpo", marks=NEEDS_FUSED)])
def test_lora_and_its_reference(train, kind):
    settings = {"trainer": {"peft_config": LoraConfig(r=4, target_modules="all-linear")}}
    dense, shared = pair(train, kind, beta=0.1, **settings)
    assert_same(dense, shared)


def test_bf16_within_its_rounding(train):
    dense, shared = pair(train, "grpo", bf16=True, max_steps=1)
    assert metric(shared, "entropy")[0] == pytest.approx(metric(dense, "entropy")[0], rel=5e-3)
    assert metric(shared, "grad_norm")[0] == pytest.approx(metric(dense, "grad_norm")[0], rel=5e-2)


def test_tokens_are_saved_and_reported(train):
    with trl_ext.enable("shared-prefix"):
        shared = train("grpo")
    assert min(metric(shared, "shared-prefix/token_ratio")) > 2
    assert metric(shared, "shared-prefix/dense_share") == [0, 0]


def test_too_little_gain_runs_dense_and_says_so(train):
    with trl_ext.enable(shared_prefix={"min_gain": 100}):
        shared = train("grpo")
    assert metric(shared, "shared-prefix/dense_share") == [1, 1]
    assert metric(shared, "shared-prefix/token_ratio") == []


def test_groups_stay_together_over_micro_batches(train):
    """Two groups of four in micro-batches of four: shuffled rows would share less than whole groups do."""
    with trl_ext.enable(PACK):
        whole = train("grpo", per_device_train_batch_size=4, gradient_accumulation_steps=2)
        split = train("grpo", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert min(metric(whole, "shared-prefix/token_ratio")) > min(metric(split, "shared-prefix/token_ratio")) > 1.2


def test_generation_is_left_alone(train):
    dense, shared = pair(train, "grpo", max_steps=1, log_completions=False)
    assert list(dense._logs["completion"]) == list(shared._logs["completion"])
    assert shared.model.config._attn_implementation == dense.model.config._attn_implementation


def test_tool_results_and_a_late_branch(train, plugin):
    """Rollouts that share a prompt and a first turn, with a masked tool result inside."""

    class Turns(Plugin):
        name = "turns"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts, generate):
            plain = generate(prompts)
            first, result = [40, 41, 42, 43], [50, 51, 52]
            ids = [[*first, *result, 60 + row % 4, 61 + row % 3] for row in range(len(prompts))]
            mask = [[1] * 4 + [0] * 3 + [1] * 2 for _ in prompts]
            return Generation(plain.prompt_ids, ids, plain.completions, tool_mask=mask, extra=plain.extra)

    sgd = {"optim": "sgd", "learning_rate": 1.0}  # Adam makes a step of the rounding of a gradient that is almost 0
    dense, shared = pair(train, "grpo", plugins=(plugin(Turns),), max_steps=3, **sgd)
    assert_same(dense, shared)
    assert min(metric(shared, "shared-prefix/token_ratio")) > 3


def test_plugins_see_the_shared_forward(train, plugin):
    """Loss hooks get log-probabilities and entropies of the packed row, with gradients."""

    class Bonus(Plugin):
        name = "bonus"
        trainers = ("grpo",)

        @hookimpl
        def loss_terms(self, loss):
            logps = (loss.per_token_logps * loss.mask).sum() / loss.mask.sum()
            entropies = loss.entropies if FUSED else loss.entropies.detach()  # TRL's had no gradient before
            entropy = (entropies * loss.mask).sum() / loss.mask.sum()
            return {"both": 0.1 * logps - 0.1 * entropy}

    dense, shared = pair(train, "grpo", plugins=(plugin(Bonus),))
    assert_same(dense, shared, 2e-4)  # the bonus is small, and Adam takes its rounding for a gradient


def test_a_model_that_cannot_be_shared_stops_the_run_or_runs_dense(tmp_path):
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    trainer = tiny_trainer("grpo", tiny_model(tmp_path / "model", **window), tmp_path / "run")
    trl_ext.attach(trainer, "shared-prefix")
    with pytest.raises(RefusedError, match="window") as caught:
        trainer.train()
    assert "shared-prefix" in "".join(caught.value.__notes__)
    trl_ext.detach(trainer)
    trl_ext.attach(trainer, shared_prefix={"on_refusal": "dense"})
    trainer.train()
    assert metric(trainer, "shared-prefix/dense_share")[-1] == 1


def test_images_and_router_losses_are_refused(build):
    from trl_ext_hooks import LogpsCall
    from trl_ext_plugins.shared_prefix import SharedPrefix

    ids = torch.ones(2, 4, dtype=torch.long)
    for extra, reason in (
        ({"pixel_values": torch.ones(1)}, "only text"),
        ({"num_images": [0, 1]}, "only text"),
        ({"token_type_ids": torch.tensor([0, 1])}, "only text"),
        ({"alora_offsets": [3, 4]}, "alora_offsets"),
        ({"compute_aux_loss": True}, "router_aux_loss_coef=0.0"),
    ):
        call = LogpsCall("grpo", "policy", None, ids, ids, 2, None, None, False, extra)
        with pytest.raises(RefusedError, match=reason):
            SharedPrefix().logps(call, lambda: None)
        assert SharedPrefix(SharedPrefix.Options(on_refusal="dense")).logps(call, lambda: "dense") == "dense"
