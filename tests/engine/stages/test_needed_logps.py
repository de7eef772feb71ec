"""Old and reference log-probabilities that plugins need and TRL leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused
from trl_ext_hooks import Plugin, hookimpl

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def lora(**settings: Any) -> dict[str, Any]:
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)}


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


class Needy(Plugin):
    name = "needy"
    trainers = ROUNDS

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.seen: list[dict[str, torch.Tensor]] = []

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        names = ("old_per_token_logps", "ref_per_token_logps", "old_logps", "completion_mask")
        found = {name: loss.batch[name].clone() for name in names if name in loss.batch}
        found["policy"], found["property"] = loss.per_token_logps.detach(), loss.old_per_token_logps
        self.seen.append(found)


class NeedsOld(Needy):
    name = "needs-old"
    needs = ("old_logps",)


class NeedsReference(Needy):
    name = "needs-reference"
    needs = ("ref_logps",)


def test_grpo_gets_the_old_log_probabilities_that_trl_leaves_out(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(NeedsOld)):
        trainer = build(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2)
        trainer.train()
        seen = own(trainer, "needs-old").seen
    assert len(seen) == 4
    for batch in seen:  # on-policy: before the optimizer moves, old and current ones agree
        torch.testing.assert_close(batch["old_per_token_logps"], batch["policy"], atol=1e-5, rtol=0)
        assert (batch["old_per_token_logps"] != 0).any()


@pytest.mark.parametrize("kind", ROUNDS)
def test_old_log_probabilities_stay_those_of_sampling(kind: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(NeedsOld)):
        trainer = build(kind, num_iterations=2, max_steps=2, learning_rate=0.1)
        trainer.train()
        first, second = own(trainer, "needs-old").seen
    assert torch.equal(first["old_per_token_logps"], second["old_per_token_logps"])
    torch.testing.assert_close(first["policy"], first["old_per_token_logps"], atol=1e-5, rtol=0)
    assert (second["policy"] - second["old_per_token_logps"]).abs().max() > 1e-3
    assert torch.equal(second["property"], second["old_per_token_logps"])


def test_rloo_loss_hooks_get_old_log_probabilities_without_asking(build: Any, plugin: Any) -> None:
    """RLOO keeps only their sums; a loss hook that took the current ones for old ones would be wrong in silence."""
    with trl_ext.enable(plugin(Needy)):
        trainer = build("rloo", num_iterations=2, max_steps=2, learning_rate=0.1)
        trainer.train()
        first, second = own(trainer, "needy").seen
    for batch in (first, second):
        sums = (batch["property"] * batch["completion_mask"]).sum(1)
        torch.testing.assert_close(sums, batch["old_logps"], atol=1e-5, rtol=0)
    assert (second["policy"] - second["property"]).abs().max() > 1e-3


def test_rloo_pays_for_no_second_forward(build: Any, plugin: Any) -> None:
    def forwards(reference: str) -> int:
        with trl_ext.enable(reference):
            trainer = build("rloo", max_steps=1)
            count = []
            trainer.model.base_model.register_forward_hook(lambda *a: count.append(1))
            trainer.train()
        return len(count)

    class Nothing(Plugin):
        name = "nothing"
        trainers = ("rloo",)

    assert forwards(plugin(NeedsOld)) == forwards(plugin(Nothing))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param("grpo", {"beta": 0.05}, id="grpo-kl"),
        pytest.param("rloo", {"beta": 0.05}, id="rloo-kl"),
        pytest.param("grpo", {"beta": 0.0, "trainer": "lora"}, id="grpo-lora-no-kl"),
        pytest.param("rloo", {"beta": 0.0, "trainer": "lora"}, id="rloo-lora-no-kl"),
        pytest.param("rloo", {"beta": 0.05, "trainer": "lora"}, id="rloo-lora-kl"),
    ],
)
def test_reference_log_probabilities(kind: str, settings: dict[str, Any], build: Any, plugin: Any) -> None:
    if settings.get("trainer") == "lora":
        settings = {**settings, "trainer": lora()}
    with trl_ext.enable(plugin(NeedsReference)):
        trainer = build(kind, max_steps=3, learning_rate=0.2, gradient_accumulation_steps=2, **settings)
        trainer.train()
        seen = own(trainer, "needs-reference").seen
    assert len(seen) == 6
    for batch in seen[:2]:  # nothing was trained yet
        torch.testing.assert_close(batch["ref_per_token_logps"], batch["policy"], atol=1e-5, rtol=0)
    assert (seen[-1]["ref_per_token_logps"] - seen[-1]["policy"]).abs().max() > 1e-3
    # and it is the untrained model, whose log-probabilities of the last micro-batch we compute ourselves
    fresh = build(kind).model
    batch = trainer._buffered_inputs[-1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logits = fresh(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    found, mask = batch["ref_per_token_logps"], batch["completion_mask"]
    torch.testing.assert_close(found * mask, expected * mask, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_reference_of_our_own_is_the_one_that_trl_would_load(kind: str, build: Any, plugin: Any) -> None:
    """Without a KL term TRL loads no reference; the one that is loaded instead gives the same numbers, also resumed."""
    settings = {"max_steps": 2, "learning_rate": 0.05, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    with trl_ext.enable(plugin(NeedsReference)):
        ours = build(kind, beta=0.0, **settings)
        assert ours.ref_model is None and ours._trl_ext.reference in ours.accelerator._models
        assert not any(value.requires_grad for value in ours._trl_ext.reference.parameters())
        ours.train()
        theirs = build(kind, beta=1e-9, **settings)
        assert theirs._trl_ext.reference is None
        theirs.train()
        resumed = build(kind, beta=0.0, **settings)
        resumed.train(resume_from_checkpoint=f"{ours.args.output_dir}/checkpoint-1")
        found, expected, again = (own(trainer, "needs-reference").seen for trainer in (ours, theirs, resumed))
        reference = ours._trl_ext.reference
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["ref_per_token_logps"], other["ref_per_token_logps"], atol=1e-6, rtol=0)
    for batch in again:  # the reference is the model that training began with, not the checkpoint
        assert (batch["ref_per_token_logps"] - batch["policy"]).abs().max() > 1e-3
    assert reference not in ours.accelerator._models and "_trl_ext" not in vars(ours)


def test_a_reference_of_our_own_leaves_the_random_stream_alone(build: Any, plugin: Any) -> None:
    plain = build(max_steps=2)
    plain.train()
    with trl_ext.enable(plugin(NeedsReference)):
        trainer = build(max_steps=2)
        trainer.train()
    assert list(trainer._logs["completion"]) == list(plain._logs["completion"])
    assert_close_training(plain, trainer, 1e-6)


@pytest.mark.parametrize("change", ["made in memory", "other vocabulary", "path is gone", "other weights"])
def test_a_reference_of_our_own_is_the_policy_and_not_the_folder_that_it_names(
    change: str, model: str, build: Any, plugin: Any
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model)
    if change == "made in memory":
        known = {name: value for name, value in policy.config.to_dict().items() if name != "_name_or_path"}
        policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
    elif change == "other vocabulary":
        policy.resize_token_embeddings(policy.config.vocab_size + 1)
    elif change == "path is gone":
        policy.config._name_or_path = "/no/such/folder"
    else:
        with torch.no_grad():
            for value in policy.parameters():
                value.add_(0.1 * torch.randn_like(value))
    given = {"model": policy, "processing_class": AutoTokenizer.from_pretrained(model)}
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with trl_ext.enable(plugin(NeedsReference)):
        trainer = build(beta=0.0, trainer=given, max_steps=2, learning_rate=0.2)
        trainer.train()
        first, second = own(trainer, "needs-reference").seen
        kept = trainer._trl_ext.reference.state_dict()
    torch.testing.assert_close(first["ref_per_token_logps"], first["policy"], atol=1e-6, rtol=0)
    assert (second["ref_per_token_logps"] - second["policy"]).abs().max() > 1e-2
    assert all(torch.equal(kept[name], value) for name, value in before.items())


def test_a_model_that_its_configuration_does_not_make(model: str, build: Any, plugin: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 64, bias=True)
    given = {"model": policy, "processing_class": AutoTokenizer.from_pretrained(model)}
    text = "makes another model from the policy's configuration: 'model.layers.0.mlp.up_proj.bias' differs. Save the"
    with trl_ext.enable(plugin(NeedsReference)), refused(trl_ext.ConfigError, "plugin 'needs-reference'", text):
        build(beta=0.0, trainer=given)


def other_weights(model: str) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for value in policy.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return {"model": policy, "processing_class": AutoTokenizer.from_pretrained(model)}


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_reference_that_is_not_the_first_policy_stops_the_run(kind: str, model: str, build: Any, plugin: Any) -> None:
    """With a KL term TRL loads the folder that the model names, whatever the weights are."""
    texts = [
        "needs-reference compares the policy with the one that training starts from",
        "before the first update the reference gives other log-probabilities than the policy: they differ by",
        f"allowed is 0.001. TRL loaded it from {model!r}. Save the policy with save_pretrained, and start from that",
    ]
    with trl_ext.enable(plugin(NeedsReference)):
        trainer = build(kind, beta=0.05, trainer=other_weights(model))
        with refused(trl_ext.ConfigError, *texts):
            trainer.train()


def test_the_advice_for_a_wrong_reference_works(model: str, tmp_path: Any, build: Any, plugin: Any) -> None:
    given = other_weights(model)
    folder = tmp_path / "saved"
    given["model"].save_pretrained(folder)
    given["processing_class"].save_pretrained(folder)
    with trl_ext.enable(plugin(NeedsReference)):
        build(beta=0.05, model=str(folder), max_steps=1).train()
        build(beta=0.0, trainer=given, max_steps=1).train()


def test_a_reference_that_the_user_chose_is_left_alone(model: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(NeedsReference)):
        trainer = build(beta=0.05, max_steps=1)
        trainer.ref_model = build(beta=0.05, trainer=other_weights(model)).model
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_trainer_that_has_trained_may_be_away_from_its_reference(build: Any, plugin: Any) -> None:
    trainer = build(beta=0.05, max_steps=2, learning_rate=0.2)
    trainer.train()
    trl_ext.attach(trainer, plugin(NeedsReference))
    trainer.train()
    assert (gap_of(own(trainer, "needs-reference").seen[0])) > 1e-2


def test_a_reference_made_after_a_training_is_the_policy_of_that_moment(build: Any, plugin: Any) -> None:
    trainer = build(beta=0.0, max_steps=2, learning_rate=0.2)
    trainer.train()
    trl_ext.attach(trainer, plugin(NeedsReference))
    trainer.train()
    assert gap_of(own(trainer, "needs-reference").seen[0]) < 1e-5


def gap_of(batch: dict[str, torch.Tensor]) -> float:
    difference = (batch["ref_per_token_logps"] - batch["policy"]) * batch["completion_mask"]
    return difference.abs().max().item()


def test_a_reference_of_our_own_with_a_head_in_float32(build: Any, plugin: Any) -> None:
    if not hasattr(build().args, "cast_lm_head_to_fp32"):
        pytest.skip("this TRL has no such setting")
    settings = {"cast_lm_head_to_fp32": True, "max_steps": 1, "model_init_kwargs": {"dtype": "bfloat16"}}
    for beta in (0.0, 1e-9):
        with trl_ext.enable(plugin(NeedsReference)):
            trainer = build(beta=beta, **settings)
            assert beta or next(trainer._trl_ext.reference.parameters()).dtype == torch.bfloat16
            trainer.train()
            (batch,) = own(trainer, "needs-reference").seen
        # nothing was trained yet, so a head in bfloat16 would show
        torch.testing.assert_close(batch["ref_per_token_logps"], batch["policy"], atol=1e-6, rtol=0)
