"""The stages of a micro-batch in real trainers: log-probabilities, inputs, replaced losses, extra terms, scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext.trl_internals import seams
from trl_ext_hooks import Logps, Plugin, PolicyLoss, hookimpl

ROUNDS = ("grpo", "rloo")
FUSED = seams.trl_version() >= seams.Version("1.15")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def lora(**settings: Any) -> dict[str, Any]:
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)}


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def moved(trainer: Any, build: Any, kind: str = "grpo") -> float:
    fresh = dict(build(kind).model.named_parameters())
    return max((value - fresh[name]).abs().max().item() for name, value in trainer.model.named_parameters())


# --- log-probabilities ------------------------------------------------------------------------------------------------


class Roles(Plugin):
    name = "roles"
    trainers = ("grpo", "rloo", "dpo")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.calls: list[tuple[str, bool]] = []

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Logps:
        result = compute()
        self.calls.append((call.role, result.per_token_logps.requires_grad))
        self.last = call
        return result


STALE = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2}
ROLE_RUNS: list[Any] = [
    pytest.param("grpo", {"max_steps": 2}, ["policy"] * 2, id="grpo"),
    pytest.param("grpo", {"max_steps": 2, "beta": 0.1}, ["reference", "policy"] * 2, id="grpo-kl"),
    pytest.param("grpo", {**STALE, "beta": 0.1}, ["old", "reference"] + ["policy"] * 4, id="grpo-reuse"),
    pytest.param("grpo", {"max_steps": 1, "beta": 0.1, "trainer": "lora"}, ["reference", "policy"], id="grpo-lora"),
    pytest.param("rloo", {"max_steps": 1, "beta": 0.0}, ["old", "policy"], id="rloo"),
    pytest.param("rloo", {"max_steps": 1}, ["old", "reference", "policy"], id="rloo-kl"),
    pytest.param("rloo", {"max_steps": 1, "trainer": "lora"}, ["old", "reference", "policy"], id="rloo-lora"),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), ROLE_RUNS)
def test_the_owner_is_told_the_role_of_every_forward(
    kind: str, settings: dict[str, Any], expected: list[str], build: Any, plugin: Any
) -> None:
    if settings.get("trainer") == "lora":
        settings = {**settings, "trainer": lora()}
    with trl_ext.enable(plugin(Roles)):
        trainer = build(kind, **settings)
        trainer.train()
        calls = own(trainer, "roles").calls
    assert [role for role, _ in calls] == expected
    assert all(gradient == (role == "policy") for role, gradient in calls)


@pytest.mark.skipif(not FUSED, reason="needs the fused head of TRL 1.15")
@pytest.mark.parametrize("setup", ["full", "lora"])
def test_roles_of_pairs_in_training_and_evaluation(setup: str, build: Any, plugin: Any) -> None:
    extra = {"eval_dataset": tiny_data("dpo", 4)} | (lora() if setup == "lora" else {})
    with trl_ext.enable(plugin(Roles)):
        trainer = build("dpo", trainer=extra, max_steps=1)
        trainer.train()
        mine = own(trainer, "roles")
        assert sorted(mine.calls) == [("policy", True), ("reference", False)]
        assert mine.last.kind == "dpo" and mine.last.logits_to_keep == mine.last.input_ids.shape[1] - 1
        mine.calls.clear()
        trainer.evaluate()
        assert sorted(mine.calls) == [("policy", False), ("reference", False)]


@pytest.mark.skipif(not FUSED, reason="needs the fused head of TRL 1.15")
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_pairs_use_the_owners_numbers(factor: float, build: Any, plugin: Any) -> None:
    """Log-probabilities twice as large are a beta twice as large."""

    class Scale(Plugin):
        name = "scale"
        trainers = ("dpo",)

        @hookimpl
        def logps(self, call: Any, compute: Any) -> Logps:
            result = compute()
            return Logps(factor * result.per_token_logps, result.entropies, result.aux_loss, result.extra)

    plain = build("dpo", beta=0.1 * factor)
    plain.train()
    with trl_ext.enable(plugin(Scale)):
        trainer = build("dpo", beta=0.1)
        trainer.train()
    assert_close_training(plain, trainer, 0.0 if factor == 1.0 else 1e-6)
    assert "forward" not in vars(trainer.model) or trainer.model.forward.__qualname__.count("pair_forwards") == 0


class Sharpen(Plugin):
    """An owner whose numbers differ from TRL's; they must be the ones that train."""

    name = "sharpen"
    trainers = ROUNDS

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Logps:
        result = compute()
        return Logps(0.5 * result.per_token_logps, result.entropies, result.aux_loss)


def test_rounds_use_the_owners_numbers(build: Any, plugin: Any) -> None:
    plain = build(max_steps=1, loss_type="grpo", max_grad_norm=1e9)
    plain.train()
    with trl_ext.enable(plugin(Sharpen)):
        trainer = build(max_steps=1, loss_type="grpo", max_grad_norm=1e9)
        trainer.train()
    assert logged(trainer, "grad_norm")[0] == pytest.approx(0.5 * logged(plain, "grad_norm")[0], rel=1e-4)


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


@pytest.mark.parametrize("change", ["made in memory", "other vocabulary", "path is gone"])
def test_a_reference_that_nobody_can_give_is_refused(change: str, model: str, build: Any, plugin: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model)
    expected = "plugin 'needs-reference' needs a reference model, a frozen copy of the policy"
    if change == "made in memory":
        known = {name: value for name, value in policy.config.to_dict().items() if name != "_name_or_path"}
        policy = AutoModelForCausalLM.from_config(AutoConfig.for_model(**known))
        expected += ", and this policy was made in memory: nothing says where to load it from. Save it with"
    elif change == "other vocabulary":
        size = policy.config.vocab_size
        policy.resize_token_embeddings(size + 1)
        expected += f", and the policy has {size + 1} token embeddings where {model!r} has {size}. Save the policy"
    else:
        policy.config._name_or_path = "/no/such/folder"
        expected += ", which cannot be loaded again from '/no/such/folder'"
    classes = {kind: getattr(__import__("trl"), f"{kind.upper()}Trainer") for kind in ROUNDS}
    for kind, cls in classes.items():
        with trl_ext.enable(plugin(NeedsReference)), pytest.raises(trl_ext.ConfigError) as caught:
            build(
                kind,
                beta=0.0,
                cls=lambda cls=cls, **given: cls(**given | {"model": policy}),
                trainer={"processing_class": tokenizer},
            )
        assert expected in str(caught.value)


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


# --- inputs of the loss -----------------------------------------------------------------------------------------------


class HalveNegatives(Plugin):
    name = "halve-negatives"
    trainers = ROUNDS

    @hookimpl
    def loss_inputs(self, batch: Any) -> dict[str, torch.Tensor]:
        advantages = batch["advantages"]
        batch["advantages"] = advantages * 0 + 99  # the copy may be spoiled
        return {"advantages": torch.where(advantages < 0, 0.5 * advantages, advantages)}


class AddOne(Plugin):
    name = "add-one"
    trainers = ROUNDS

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.seen: list[torch.Tensor] = []

    @hookimpl
    def loss_inputs(self, batch: Any) -> dict[str, torch.Tensor]:
        self.seen.append(batch["advantages"].clone())
        return {"advantages": batch["advantages"] + 1}


class Same(Plugin):
    """What the two above do, once per round and so in the other place."""

    name = "same"
    trainers = ROUNDS

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        found = round.advantages
        return torch.where(found < 0, 0.5 * found, found) + 1


@pytest.mark.parametrize("kind", ROUNDS)
def test_loss_inputs_are_chained_on_copies(kind: str, build: Any, plugin: Any) -> None:
    settings = {"num_iterations": 2, "max_steps": 4}
    with trl_ext.enable(plugin(HalveNegatives), plugin(AddOne)):
        trainer = build(kind, **settings)
        trainer.train()
        seen = own(trainer, "add-one").seen
    assert torch.equal(seen[0], seen[1])  # the second pass over the round starts from the same numbers
    with trl_ext.enable(plugin(Same)):
        other = build(kind, **settings)
        other.train()
    assert_close_training(other, trainer, 1e-6)


def test_loss_inputs_of_pairs(build: Any, plugin: Any) -> None:
    class OnlyChosen(Plugin):
        name = "only-chosen"
        trainers = ("dpo",)

        @hookimpl
        def loss_inputs(self, batch: Any) -> dict[str, torch.Tensor]:
            mask = batch["completion_mask"].clone()
            mask[len(mask) // 2 :] = 0
            return {"completion_mask": mask}

    with trl_ext.enable(plugin(OnlyChosen)):
        trainer = build("dpo")
        trainer.train()
    assert logged(trainer, "logps/rejected") == [0.0, 0.0] and logged(trainer, "logps/chosen")[0] < -1


# --- extra terms ------------------------------------------------------------------------------------------------------


class One(Plugin):
    name = "one"
    trainers = ROUNDS

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        return {"constant": torch.tensor(1.0), "half": torch.tensor(0.5)}


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_constant_term_counts_once_whatever_the_accumulation(
    kind: str, accumulation: int, build: Any, plugin: Any
) -> None:
    settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    settings |= {"trainer": {"eval_dataset": tiny_data().select([0])}, "max_steps": 1, "learning_rate": 0.0}
    plain = build(kind, **settings)
    plain.train()
    plain.evaluate()
    with trl_ext.enable(plugin(One)):
        trainer = build(kind, **settings)
        trainer.train()
        trainer.evaluate()
    assert logged(trainer, "loss")[0] - logged(plain, "loss")[0] == pytest.approx(1.5, abs=1e-5)
    assert logged(trainer, "eval_loss")[0] - logged(plain, "eval_loss")[0] == pytest.approx(1.5, abs=1e-5)
    assert logged(trainer, "one/constant") == [1.0] and logged(trainer, "one/half") == [0.5]


class Pull(Plugin):
    """A term with a gradient that is a mean over rows."""

    name = "pull"
    trainers = ROUNDS

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        return {"pull": -(loss.per_token_logps * loss.mask).sum(1).mean()}

    @hookimpl
    def loss_metrics(self, loss: Any) -> dict[str, tuple[float, float]]:
        return {"tokens": (loss.mask.sum().item(), len(loss.mask))}


@pytest.mark.parametrize(("kind", "settings"), [("grpo", {}), ("grpo", {"loss_type": "grpo"}), ("rloo", {})])
def test_terms_train_alike_for_1x8_and_8x1(kind: str, settings: Any, build: Any, plugin: Any) -> None:
    def run(rows: int, *references: str) -> Any:
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows, "max_grad_norm": 1e9}
        with trl_ext.enable(*references):
            trainer = build(kind, max_steps=2, optim="sgd", learning_rate=1e-2, **sizes, **settings)
            trainer.train()
        return trainer

    term = plugin(Pull)
    whole, split = run(8, term), run(1, term)
    assert_close_training(whole, split, 2e-6)
    assert moved(whole, build, kind) > 1e-3
    for key in ("loss", "grad_norm", "pull/pull", "pull/tokens"):
        assert logged(split, key) == pytest.approx(logged(whole, key), rel=1e-4, abs=1e-6), key


def clipped(loss: Any) -> torch.Tensor:
    """(m, T) the stock surrogate with clipping to 0.2."""
    ratio = torch.exp(loss.per_token_logps - loss.old_per_token_logps)
    return -torch.min(ratio * loss.advantages, ratio.clamp(0.8, 1.2) * loss.advantages)


class Again(Plugin):
    """The stock loss once more, one value per token."""

    name = "again"
    trainers = ("grpo",)

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, PolicyLoss]:
        return {"again": PolicyLoss(clipped(loss))}


LOSS_TYPES = ["dapo", "grpo", "bnpo", "dr_grpo", "luspo"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_term_per_token_is_averaged_as_the_trainer_averages(loss_type: str, build: Any, plugin: Any) -> None:
    """The stock loss a second time doubles loss and gradient, for every accumulation and reuse of rounds."""
    settings = {
        "loss_type": loss_type,
        "max_steps": 4,
        "num_iterations": 2,
        "learning_rate": 1e-6,
        "max_grad_norm": 1e9,
    }
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    settings |= {"trainer": {"eval_dataset": tiny_data().select([0, 1])}}
    plain = build(**settings)
    plain.train()
    plain.evaluate()
    with trl_ext.enable(plugin(Again)):
        trainer = build(**settings)
        trainer.train()
        trainer.evaluate()
    assert any(abs(loss) > 1e-3 for loss in logged(plain, "loss"))
    for key in ("loss", "grad_norm", "eval_loss"):
        assert logged(trainer, key) == pytest.approx([2 * value for value in logged(plain, key)], abs=2e-5), key
    assert logged(trainer, "again/again") == pytest.approx(logged(plain, "loss"), abs=1e-5)


def test_terms_of_several_plugins_add_up(build: Any, plugin: Any) -> None:
    plain = build(max_steps=1)
    plain.train()
    with trl_ext.enable(plugin(One), plugin(Pull)):
        trainer = build(max_steps=1)
        trainer.train()
    extra = logged(trainer, "loss")[0] - logged(plain, "loss")[0]
    assert extra == pytest.approx(1.5 + logged(trainer, "pull/pull")[0], rel=1e-5)


def test_gdpo_trains_alike_for_1x8_and_8x1(build: Any) -> None:
    def run(rows: int) -> Any:
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        with trl_ext.enable("gdpo"):
            trainer = build(max_steps=2, optim="sgd", learning_rate=0.1, **sizes)
            trainer.train()
        return trainer

    whole, split = run(8), run(1)
    assert_close_training(whole, split, 2e-6)
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert moved(whole, build) > 1e-3


# --- a replaced loss --------------------------------------------------------------------------------------------------


class Clipped(Plugin):
    name = "clipped"
    trainers = ("grpo",)
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(clipped(loss))


class TokenMean(Plugin):
    name = "token-mean"
    trainers = ("grpo",)
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(clipped(loss), "token_mean")


class SequenceMean(Plugin):
    name = "sequence-mean"
    trainers = ("grpo",)
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(clipped(loss), "sequence_mean")


class Scalar(Plugin):
    name = "scalar"
    trainers = ("grpo",)
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(((clipped(loss) * loss.mask).sum(1) / loss.mask.sum(1)).mean())


REPLACED = [(Clipped, name) for name in ("dapo", "grpo", "bnpo", "dr_grpo")]
REPLACED += [(TokenMean, "bnpo"), (SequenceMean, "grpo"), (Scalar, "grpo")]


@pytest.mark.parametrize(("cls", "loss_type"), REPLACED)
def test_the_stock_loss_as_a_plugin_trains_as_the_stock_loss(
    cls: type[Plugin], loss_type: str, build: Any, plugin: Any
) -> None:
    settings = {"loss_type": loss_type, "num_iterations": 2, "max_steps": 4, "learning_rate": 0.05}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    settings |= {"trainer": {"eval_dataset": tiny_data().select([0, 1])}}
    plain = build(**settings)
    plain.train()
    plain.evaluate()
    with trl_ext.enable(plugin(cls)):
        trainer = build(**settings)
        trainer.train()
        trainer.evaluate()
    assert_close_training(plain, trainer, 1e-5)
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    assert logged(trainer, "eval_loss") == pytest.approx(logged(plain, "eval_loss"), abs=1e-6)
    assert logged(trainer, "entropy") == logged(plain, "entropy")
    # clip ratios of a loss that was not used would mislead
    assert logged(plain, "clip_ratio/region_mean") and not logged(trainer, "clip_ratio/region_mean")


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_replaced_loss_keeps_the_auxiliary_loss_of_a_router(
    kind: str, model: str, build: Any, plugin: Any, tmp_path: Any
) -> None:
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), num_experts_per_tok=2, **shape, **ids)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    cls = getattr(__import__("trl"), f"{kind.upper()}Trainer")
    settings = {"cls": lambda **given: cls(**given | {"model": str(tmp_path / "moe")}), "max_steps": 2, "beta": 0.0}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    settings |= {"router_aux_loss_coef": 5.0}
    plain = build(kind, **settings)
    plain.train()
    with trl_ext.enable(plugin({"grpo": Clipped, "rloo": SequenceRatio}[kind])):
        trainer = build(kind, **settings)
        trainer.train()
    assert logged(plain, "aux_loss") and logged(trainer, "aux_loss") == pytest.approx(
        logged(plain, "aux_loss"), abs=1e-5
    )
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-4) and logged(plain, "loss")[0] > 5
    assert_close_training(plain, trainer, 1e-4)


class SequenceRatio(Plugin):
    """RLOO's own loss."""

    name = "sequence-ratio"
    trainers = ("rloo",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        difference = (loss.per_token_logps - loss.old_per_token_logps) * loss.mask
        ratio, advantages = torch.exp(difference.sum(1)), loss.advantages.squeeze(1)
        return PolicyLoss(-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean())


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloos_own_loss_as_a_plugin_trains_as_rloo(beta: float, build: Any, plugin: Any) -> None:
    """Its KL term is part of the rewards, so a replaced loss keeps it."""
    settings = {"num_iterations": 2, "max_steps": 4, "gradient_accumulation_steps": 2, "beta": beta}
    settings |= {"per_device_train_batch_size": 4}
    plain = build("rloo", **settings)
    plain.train()
    with trl_ext.enable(plugin(SequenceRatio)):
        trainer = build("rloo", **settings)
        trainer.train()
    assert_close_training(plain, trainer, 1e-5)
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)


def test_a_token_loss_of_rloo_adds_up_rows(build: Any, plugin: Any) -> None:
    class Reinforce(Plugin):
        name = "reinforce"
        trainers = ("rloo",)

        @hookimpl
        def policy_loss(self, loss: Any) -> PolicyLoss:
            values = -loss.advantages * loss.per_token_logps
            self.expected = (values * loss.mask).sum(1).mean().item()
            return PolicyLoss(values)

    with trl_ext.enable(plugin(Reinforce)):
        trainer = build("rloo", max_steps=1)
        trainer.train()
        expected = own(trainer, "reinforce").expected
    assert logged(trainer, "loss") == [pytest.approx(expected, abs=1e-6)]


def test_a_replaced_loss_and_extra_terms_add_up(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Clipped), plugin(One)):
        trainer = build(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        trainer.train()
    plain = build(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    plain.train()
    assert logged(trainer, "loss")[0] - logged(plain, "loss")[0] == pytest.approx(1.5, abs=1e-5)


def test_token_wise_advantages_reach_a_replaced_loss(build: Any, plugin: Any) -> None:
    class Rising(Plugin):
        name = "rising"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round: Any) -> torch.Tensor:
            steps = torch.arange(round.loss_mask.shape[1]).float()
            return round.advantages[round.local].unsqueeze(1) * steps

    stock_loss, own_loss = plugin(Rising), plugin(Clipped)
    with trl_ext.enable(stock_loss):
        plain = build(max_steps=2)
        plain.train()
    with trl_ext.enable(stock_loss, own_loss):
        trainer = build(max_steps=2)
        trainer.train()
    assert_close_training(plain, trainer, 1e-6)
