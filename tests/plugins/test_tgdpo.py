"""TGDPO: the properties of the method, its edge cases, and real training runs."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_ext
from trl_ext.testing import conformance, metrics_of, tiny_data, tiny_model, tiny_trainer
from trl_ext.trl_internals import seams
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_plugins.tgdpo import guidance_factors, guided_margin, implicit_rewards

pytestmark = pytest.mark.skipif(seams.trl_version() < seams.Version("1.15"), reason="needs the fused head of TRL 1.15")
GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden" / "tgdpo.json").read_text())["cases"]


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that was trained with plain DPO on the same pairs."""
    folder = tmp_path_factory.mktemp("guide")
    trainer = tiny_trainer("dpo", tiny_model(folder / "start"), folder / "run", max_steps=6)
    trainer.train()
    trainer.save_model(str(folder / "guide"))
    return str(folder / "guide")


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def same(left: Any, right: Any) -> None:
    for (name, a), b in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def tensors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- the mathematics --------------------------------------------------------------------------------------------------


def test_factors_are_affine_in_alpha_and_turn_with_the_side() -> None:
    rewards = tensors(6, 5)
    one, two = guidance_factors(rewards, 0.3), guidance_factors(rewards, 0.6)
    torch.testing.assert_close(two - 1, 2 * (one - 1))
    up = guidance_factors(rewards + 0.1, 0.3)
    assert (up[:3] > one[:3]).all() and (up[3:] < one[3:]).all()
    assert torch.equal(guidance_factors(rewards, 0.0), torch.ones(6, 5, dtype=torch.float64))


def test_a_shift_of_guide_and_reference_changes_nothing() -> None:
    guide, reference = tensors(4, 3), tensors(4, 3, seed=1)
    shift = tensors(4, 3, seed=2)
    torch.testing.assert_close(
        implicit_rewards(guide + shift, reference + shift, 0.1), implicit_rewards(guide, reference, 0.1)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_gradients_at_the_reference_are_the_factors(alpha: float) -> None:
    """-+ beta * f / (2B), so inside a sequence two gradients differ as their factors do."""
    policy = tensors(4, 5).requires_grad_()
    reference, beta = policy.detach().clone(), 0.1
    factors = guidance_factors(implicit_rewards(tensors(4, 5, seed=1), reference, beta), alpha)
    loss = -torch.nn.functional.logsigmoid(beta * guided_margin(policy, reference, factors)).mean()
    (gradient,) = torch.autograd.grad(loss, policy)
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(gradient, sign * beta * factors / 4)
    torch.testing.assert_close(gradient[0, 0] / gradient[0, 1], factors[0, 0] / factors[0, 1])


def test_swapping_the_sides_is_a_mirror_image_for_dpo_only() -> None:
    policy, reference, guide = (tensors(2, 4, seed=seed) for seed in range(3))
    swapped = [x.flip(0) for x in (policy, reference, guide)]

    def margin(policy: Any, reference: Any, guide: Any, alpha: float) -> torch.Tensor:
        return guided_margin(policy, reference, guidance_factors(implicit_rewards(guide, reference, 0.5), alpha))

    torch.testing.assert_close(margin(policy, reference, guide, 0.0), -margin(*swapped, 0.0))
    assert (margin(policy, reference, guide, 1.0) + margin(*swapped, 1.0)).abs() > 1e-2


def test_an_identical_pair_has_a_margin() -> None:
    """2 * alpha * beta^2 * sum(guide's log-ratio * policy's log-ratio), where DPO has 0."""
    policy, reference, guide = (tensors(1, 4, seed=seed).repeat(2, 1) for seed in range(3))
    beta, alpha = 0.1, 0.5
    factors = guidance_factors(implicit_rewards(guide, reference, beta), alpha)
    expected = 2 * alpha * beta**2 * ((guide - reference) * (policy - reference))[0].sum()
    torch.testing.assert_close(beta * guided_margin(policy, reference, factors)[0], expected)


def test_a_least_factor_cuts_what_would_turn_round() -> None:
    rewards = torch.tensor([[-3.0, 1.0], [3.0, -1.0]])
    assert torch.equal(guidance_factors(rewards, 1.0), torch.tensor([[-2.0, 2.0], [-2.0, 2.0]]))
    assert torch.equal(guidance_factors(rewards, 1.0, min_factor=0.2), torch.tensor([[0.2, 2.0], [0.2, 2.0]]))


def test_tokens_outside_and_empty_completions_add_nothing() -> None:
    policy, reference = tensors(4, 3), tensors(4, 3, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    factors = guidance_factors(tensors(4, 3, seed=2), 0.5)
    plain = guided_margin(policy * mask, reference * mask, factors)
    moved = guided_margin(policy * mask, reference * mask, torch.where(mask == 1, factors, 99.0))
    assert torch.equal(plain, moved)
    assert plain[0] == (factors * (policy - reference) * mask)[0].sum()


# --- TRL's own loss on the authors' numbers ---------------------------------------------------------------------------


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


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}])
def test_alpha_zero_is_plain_dpo_bit_for_bit(train: Any, guide: str, settings: dict[str, Any]) -> None:
    plain = train("dpo", max_steps=3, **settings)
    with trl_ext.enable(tgdpo={"guide": guide, "alpha": 0}):
        ours = train("dpo", max_steps=3, **settings)
    same(plain, ours)
    for a, b in zip(metrics_of(plain), metrics_of(ours), strict=True):
        assert a == {key: value for key, value in b.items() if not key.startswith("tgdpo/")}


def test_the_reference_as_guide_is_plain_dpo(train: Any, model: str) -> None:
    plain = train("dpo", max_steps=3)
    with trl_ext.enable(tgdpo={"guide": model, "alpha": 2.0}):
        ours = train("dpo", max_steps=3)
    same(plain, ours)
    assert logged(ours, "tgdpo/factor/chosen") == [1, 1, 1]


def test_a_guide_changes_the_run_and_stays_as_it_is(build: Any, train: Any, guide: str) -> None:
    plain = train("dpo", max_steps=3)
    with trl_ext.enable(tgdpo={"guide": guide}):
        ours = build("dpo", max_steps=3)
        model = ours._trl_ext.plugins["tgdpo"]._guide
        before = {name: value.clone() for name, value in model.state_dict().items()}
        ours.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters()) and not model.training
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), ours.model.parameters(), strict=True))
    assert logged(ours, "tgdpo/rewards/margins")[-1] > 0 and logged(ours, "tgdpo/negative") == [0, 0, 0]
    # a guide that learned the pairs likes the chosen tokens more and the rejected ones less than the reference does
    assert min(logged(ours, "tgdpo/factor/chosen")) > 1 and min(logged(ours, "tgdpo/factor/rejected")) > 1
    assert logged(ours, "loss")[-1] < logged(plain, "loss")[-1]
    for entry in ours.state.log_history[:-1]:  # the loss without factors falls with its margin
        assert entry["tgdpo/dpo_loss"] == pytest.approx(math.log(2), abs=1e-6) or entry["step"] > 1
    assert 0 < logged(ours, "tgdpo/dpo_loss")[-1] < math.log(2)


def test_the_guide_runs_once_per_batch(build: Any, guide: str) -> None:
    with trl_ext.enable(tgdpo={"guide": guide}):
        trainer = build("dpo", max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
        runs: list[int] = []
        trainer._trl_ext.plugins["tgdpo"]._guide.model.register_forward_hook(lambda *_: runs.append(1))
        trainer.train()
    assert len(runs) == 4


def test_the_guide_has_its_own_beta(train: Any, guide: str) -> None:
    with trl_ext.enable(tgdpo={"guide": guide, "alpha": 0.5}):
        one = train("dpo", max_steps=1, beta=0.1)
    with trl_ext.enable(tgdpo={"guide": guide, "alpha": 0.1, "guide_beta": 0.5}):
        other = train("dpo", max_steps=1, beta=0.1)
    (first,), (second,) = logged(one, "tgdpo/factor/chosen"), logged(other, "tgdpo/factor/chosen")
    assert first == pytest.approx(second, abs=1e-6) and first > 1


def test_accumulation_gives_the_same_update(train: Any, guide: str) -> None:
    with trl_ext.enable(tgdpo={"guide": guide}):
        whole = train("dpo", max_steps=2, per_device_train_batch_size=4, optim="sgd", learning_rate=0.1)
        parts = train(
            "dpo",
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            optim="sgd",
            learning_rate=0.1,
        )
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_an_adapter_as_guide(train: Any, model: str, tmp_path: Path) -> None:
    """A LoRA checkpoint guides like the model that it is when merged."""
    lora = {"trainer": {"peft_config": LoraConfig(r=4, target_modules="all-linear")}}
    trained = train("dpo", max_steps=4, **lora)
    trained.save_model(str(tmp_path / "adapter"))
    trained.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "merged")
    runs = []
    for name in ("adapter", "merged"):
        with trl_ext.enable(tgdpo={"guide": str(tmp_path / name)}):
            runs.append(train("dpo", max_steps=2, **lora))
    for a, b in zip(*(logged(run, "tgdpo/factor/rejected") for run in runs), strict=True):
        assert a == pytest.approx(b, abs=1e-6) and abs(a - 1) > 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_with_shared_prefixes_the_numbers_are_the_same(train: Any, guide: str, lora: bool) -> None:
    extra = {"trainer": {"peft_config": LoraConfig(r=4, target_modules="all-linear")}} if lora else {}
    with trl_ext.enable(tgdpo={"guide": guide}):
        plain = train("dpo", max_steps=3, **extra)
    with trl_ext.enable("shared-prefix", tgdpo={"guide": guide}, shared_prefix={"min_gain": 0}):
        shared = train("dpo", max_steps=3, **extra)
    for (name, a), b in zip(plain.model.named_parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert min(logged(shared, "shared-prefix/token_ratio")) > 1


def test_the_plugin_conforms(guide: str, tmp_path: Path) -> None:
    checks = conformance("tgdpo", tmp_path, {"guide": guide})
    assert len(checks) == 5 and not [check for check in checks if not check.passed]


# --- other sources of guidance ----------------------------------------------------------------------------------------


def with_columns(model: str, edit: Any = lambda values: values) -> Dataset:
    """Token rewards +1 for digits, -1 for letters, 0 for the end of the answer."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def add(row: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for side in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)
            ids = whole["input_ids"][len(prompt["input_ids"]) :]
            texts = tokenizer.batch_decode([[i] for i in ids])
            found[f"{side}_token_rewards"] = edit([float(t.isdigit()) - float(t.isalpha()) for t in texts])
        return found

    return tiny_data("dpo").map(add)


def token_rewards(pairs: Any) -> torch.Tensor:
    """The same as a function."""
    texts = [pairs.trainer.processing_class.batch_decode([[i] for i in row]) for row in pairs.batch["input_ids"][:, 1:]]
    values = [[float(len(t) == 1 and t.isdigit()) - float(len(t) == 1 and t.isalpha()) for t in row] for row in texts]
    return torch.tensor(values)


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("my_token_rewards")
    module.token_rewards, module.short = token_rewards, lambda pairs: torch.ones(2, 2)  # type: ignore[attr-defined]
    module.broken = lambda pairs: torch.full(pairs.mask.shape, float("nan"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_token_rewards", module)
    return "my_token_rewards:token_rewards"


@pytest.mark.parametrize("settings", [{}, {"max_length": 24}, {"max_length": 24, "truncation_mode": "keep_end"}])
def test_columns_and_a_function_agree(train: Any, model: str, function: str, settings: dict[str, Any]) -> None:
    with trl_ext.enable(tgdpo={"reward_columns": True, "alpha": 0.9}):
        columns = train("dpo", data=with_columns(model), **settings)
    with trl_ext.enable(tgdpo={"reward_func": function, "alpha": 0.9}):
        called = train("dpo", **settings)
    same(columns, called)
    assert logged(columns, "tgdpo/factor/chosen")[0] > 1.1


@pytest.mark.parametrize("settings", [{}, {"max_length": 24}, {"max_length": 24, "truncation_mode": "keep_end"}])
def test_precomputed_guidance_is_the_same_run(
    build: Any, train: Any, guide: str, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl_ext.trl_internals import frozen_models

    tiny_data("dpo").save_to_disk(str(tmp_path / "data"))
    data = Dataset.load_from_disk(str(tmp_path / "data"))  # data on disk have a cache
    extra = {"trainer": {"eval_dataset": data.select(range(6))}, "eval_strategy": "steps", "eval_steps": 1}
    with trl_ext.enable(tgdpo={"guide": guide}):
        live = train("dpo", data=data, **extra, **settings)
    scored: list[int] = []
    original = frozen_models.score
    monkeypatch.setattr(frozen_models, "score", lambda *a: (scored.append(1), original(*a))[1])
    with trl_ext.enable(tgdpo={"guide": guide, "precompute": True}):
        ahead = build("dpo", data=data, **extra, **settings)
        assert ahead._trl_ext.plugins["tgdpo"]._guide is None
        calls = len(scored)
        ahead.train()
        assert len(scored) == calls >= 3
        build("dpo", data=data, **extra, **settings)
        assert len(scored) == calls, "the second run did not take the first one's cache"
        columns = ahead.train_dataset.column_names
        assert {"chosen_guide_logps", "rejected_guide_logps"} <= set(columns)
    assert "chosen_guide_logps" not in ahead.train_dataset.column_names
    same(live, ahead)
    assert metrics_of(live) == metrics_of(ahead)


def test_another_guide_is_another_cache(build: Any, guide: str, model: str, tmp_path: Path) -> None:
    tiny_data("dpo").save_to_disk(str(tmp_path / "data"))
    data, found = Dataset.load_from_disk(str(tmp_path / "data")), []
    for name in (guide, model):
        with trl_ext.enable(tgdpo={"guide": name, "precompute": True}):
            found.append(build("dpo", data=data).train_dataset[0]["chosen_guide_logps"])
    assert len(found[0]) == len(found[1]) and found[0] != found[1]


def test_scoring_ahead_shows_its_progress(
    build: Any, guide: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE")
    with trl_ext.enable(tgdpo={"guide": guide, "precompute": True}):
        build("dpo", trainer={"eval_dataset": tiny_data("dpo", 4)})
    shown = capfd.readouterr().err
    assert all(f"Computing guide_logps for the {name} data: 100%" in shown for name in ("train", "eval"))


def test_iterable_data_cannot_be_scored_ahead(build: Any, guide: str) -> None:
    with (
        trl_ext.enable(tgdpo={"guide": guide, "precompute": True}),
        pytest.raises(trl_ext.ConfigError, match="cannot be computed ahead for the train data"),
    ):
        build("dpo", data=tiny_data("dpo").to_iterable_dataset())


# --- what cannot work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_type": ["ipo"]}, "loss_type"),
        ({"loss_type": ["sigmoid", "sft"]}, "loss_type"),
        ({"f_divergence_type": "js_divergence"}, "f_divergence_type"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"use_weighting": True}, "use_weighting"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
    ],
)
def test_settings_are_refused(build: Any, guide: str, settings: dict[str, Any], expected: str) -> None:
    with trl_ext.enable(tgdpo={"guide": guide}), pytest.raises(trl_ext.ConfigError, match=expected):
        build("dpo", **settings)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"guide": "x", "reward_columns": True}, "exclude each other"),
        ({"alpha": -1, "guide": "x"}, "tgdpo.alpha: expected float, >= 0, got -1"),
        ({"reward_func": "x"}, "module:function"),
        ({"reward_columns": True, "precompute": True}, "belong to a guide"),
        ({"reward_columns": True, "guide_beta": 0.1}, "belong to a guide"),
    ],
)
def test_options_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=expected):
        trl_ext.enable(tgdpo=options)


def test_a_run_without_guidance(build: Any) -> None:
    with (
        trl_ext.enable("tgdpo"),
        pytest.raises(trl_ext.ConfigError, match=r"nothing says which tokens are good.*tgdpo\.guide=FOLDER"),
    ):
        build("dpo")


def test_a_guide_that_is_not_there(build: Any, tmp_path: Path) -> None:
    with (
        trl_ext.enable(tgdpo={"guide": str(tmp_path / "nothing")}),
        pytest.raises(trl_ext.ConfigError, match="cannot be loaded with its tokenizer"),
    ):
        build("dpo")


def test_another_tokenizer_is_refused(build: Any, guide: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(guide)
    tokenizer.add_tokens(["<more>"])
    AutoModelForCausalLM.from_pretrained(guide).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with (
        trl_ext.enable(tgdpo={"guide": str(tmp_path / "other")}),
        pytest.raises(trl_ext.ConfigError, match=r"another vocabulary \(101 tokens\) than the policy \(100 tokens\)"),
    ):
        build("dpo")


def test_a_function_that_is_not_there(build: Any) -> None:
    with (
        trl_ext.enable(tgdpo={"reward_func": "no_such_module_here:f"}),
        pytest.raises(trl_ext.ConfigError, match="No module named 'no_such_module_here'"),
    ):
        build("dpo")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("short", r"token_rewards have the shape \(2, 2\), expected"),
        ("broken", r"pair 0 in this batch \(chosen, position"),
    ],
)
def test_bad_token_rewards_stop_the_run(build: Any, function: str, name: str, expected: str) -> None:
    with trl_ext.enable(tgdpo={"reward_func": f"my_token_rewards:{name}"}):
        trainer = build("dpo")
        with pytest.raises(ValueError, match=expected) as caught:
            trainer.train()
    assert "tgdpo" in "".join(caught.value.__notes__)
    if name == "broken":
        assert "<|im_start|>user" in str(caught.value)


def test_a_wrong_number_of_token_rewards(build: Any, model: str) -> None:
    with trl_ext.enable(tgdpo={"reward_columns": True}):
        with pytest.raises(trl_ext.ConfigError, match="no column 'chosen_token_rewards'"):
            build("dpo")
        trainer = build("dpo", data=with_columns(model, lambda values: values[1:]))
        with pytest.raises(ValueError, match=r"chosen_token_rewards has \d+ numbers for the \d+ tokens of '"):
            trainer.train()


def test_negative_factors_are_counted_and_cut(train: Any, function: str) -> None:
    with trl_ext.enable(tgdpo={"reward_func": function, "alpha": 2.0}):
        free = train("dpo", max_steps=1)
    with trl_ext.enable(tgdpo={"reward_func": function, "alpha": 2.0, "min_factor": 0.1}):
        cut = train("dpo", max_steps=1)
    assert logged(free, "tgdpo/negative")[0] == 0  # letters are on the rejected side, digits on the chosen one
    assert logged(cut, "tgdpo/negative") == [0]

    class Flipped(Plugin):
        name = "flipped"
        trainers = ("dpo",)

        @hookimpl
        def loss_inputs(self, batch: Any) -> dict[str, Any]:
            return {name: value.roll(len(value) // 2, 0) for name, value in batch.items()}

    module = types.ModuleType("flipped_pairs")
    module.Flipped = Flipped  # type: ignore[attr-defined]
    sys.modules["flipped_pairs"] = module
    try:
        with trl_ext.enable("flipped_pairs:Flipped", tgdpo={"reward_func": function, "alpha": 2.0}):
            turned = train("dpo", max_steps=1)
        with trl_ext.enable("flipped_pairs:Flipped", tgdpo={"reward_func": function, "alpha": 2.0, "min_factor": 0.1}):
            clamped = train("dpo", max_steps=1)
    finally:
        del sys.modules["flipped_pairs"]
    assert logged(turned, "tgdpo/negative")[0] > 0.3
    assert logged(clamped, "tgdpo/negative") == [0] and logged(clamped, "tgdpo/factor/chosen")[0] >= 0.1


def test_alpha_zero_is_said_to_be_plain_dpo(build: Any, guide: str) -> None:
    with trl_ext.enable(tgdpo={"guide": guide, "alpha": 0}):
        trainer = build("dpo")
        assert "tgdpo: alpha is 0, so this is plain DPO" in trainer._trl_ext.plan.notes
