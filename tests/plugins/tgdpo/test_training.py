"""TGDPO: real runs with a guide, and their neutral limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

import trl_ext
from trl_ext.testing import conformance, metrics_of, tiny_model, tiny_trainer
from trl_ext.trl_internals import seams

pytestmark = pytest.mark.skipif(seams.trl_version() < seams.Version("1.15"), reason="needs the fused head of TRL 1.15")


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
    assert len(checks) > 5 and not [check for check in checks if not check.passed]
