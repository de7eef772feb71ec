"""The shared-prefix plugin on real trainers: the same training as dense TRL, with fewer tokens, or a reason."""

import contextlib

import pytest
import torch
from peft import LoraConfig

import trl_ext
from trl_ext.shared_prefix import RefusedError
from trl_ext.testing import metrics_of, tiny_model, tiny_trainer
from trl_ext.trl_internals import seams
from trl_ext_hooks import Generation, Plugin, hookimpl

PACK = {"shared-prefix": {"min_gain": 0}}
FUSED = seams.trl_version() >= seams.Version("1.15")
NEEDS_FUSED = pytest.mark.skipif(not FUSED, reason="the forward of DPO can be owned from TRL 1.15 on")


def pair(train, kind, *, plugins=(), **settings):
    """The same run dense and shared."""
    torch.manual_seed(0)  # before TRL 1.15 an adapter is made before the trainer seeds
    with trl_ext.enable(*plugins) if plugins else contextlib.nullcontext():
        dense = train(kind, **settings)
    torch.manual_seed(0)
    with trl_ext.enable(*plugins, PACK):
        shared = train(kind, **settings)
    return dense, shared


def assert_same(dense, shared, tolerance=5e-5):
    """Parameters after Adam steps with a large learning rate, where rounding shows most, and every metric of TRL."""
    for (name, a), b in zip(dense.model.named_parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    for left, right in zip(metrics_of(dense), metrics_of(shared), strict=True):
        for key, value in left.items():
            if isinstance(value, float):
                assert right[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


def metric(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


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
    assert_same(dense, shared)


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
    for extra, reason in (({"pixel_values": torch.ones(1)}, "only text"), ({"compute_aux_loss": True}, "router")):
        call = LogpsCall("grpo", "policy", None, ids, ids, 2, None, None, False, extra)
        with pytest.raises(RefusedError, match=reason):
            SharedPrefix().logps(call, lambda: None)
        assert SharedPrefix(SharedPrefix.Options(on_refusal="dense")).logps(call, lambda: "dense") == "dense"


def test_small_micro_batches_and_bnpo_are_told(build):
    with trl_ext.enable("shared-prefix"):
        trainer = build("grpo", per_device_train_batch_size=2, gradient_accumulation_steps=4, loss_type="bnpo")
        notes = " ".join(trainer._trl_ext.plan.notes)
    assert "holds 2 of the 4 rows" in notes and "bnpo" in notes


def test_bad_options():
    with pytest.raises(trl_ext.OptionError, match="'auto' or 'flash_attn'"):
        trl_ext.enable(shared_prefix={"backend": "cuda"})
    with pytest.raises(trl_ext.OptionError, match=">= 0, got -1"):
        trl_ext.enable(shared_prefix={"min_gain": -1})
