"""APO: the rounds on real models, with full weights and with adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.plugins.apo.runs import equal, go, many_digits, pairs_of, weights
from trl_ext.testing import tiny_args, tiny_data, tiny_model
from trl_ext_hooks import Plugin, UsageError, hookimpl
from trl_ext_plugins.apo.maths import coefficients
from trl_ext_plugins.apo.pairs import best_and_worst


def test_starts_outputs_and_what_is_released(finished: Path, model: str) -> None:
    outputs = [weights(model), *(weights(finished / f"round-{n}" / "output") for n in (1, 2, 3))]
    for number in (2, 3):
        new, old, start = outputs[number - 1], outputs[number - 2], weights(finished / f"round-{number}" / "start")
        for name, value in new.items():
            torch.testing.assert_close(start[name], value + 0.3 * (value - old[name]), atol=1e-7, rtol=1e-6)
            assert start[name].dtype is value.dtype
        before = weights(model if number == 2 else finished / f"round-{number - 1}" / "start")
        wrong = {name: value + 0.3 * (value - before[name]) for name, value in new.items()}
        same = all(torch.allclose(start[name], value, atol=1e-7) for name, value in wrong.items())
        assert same == (number == 2), "the anchor is the output of the round before, not its start"
        assert not equal(start, new)
    assert equal(weights(finished), outputs[3])
    assert (finished / "model.safetensors").read_bytes() == (finished / "round-3/output/model.safetensors").read_bytes()
    reply = AutoModelForCausalLM.from_pretrained(finished)
    assert len(AutoTokenizer.from_pretrained(finished)) == reply.config.vocab_size


def test_samples_come_from_the_start_and_pairs_from_their_scores(finished: Path, model: str) -> None:
    for number, begin in ((1, model), (2, str(finished / "round-2" / "start"))):
        files = sorted((finished / f"round-{number}" / "samples").glob("*.json"))
        assert len(files) == 2  # four prompts of a round, two at once
        entries = [entry for file in files for entry in json.loads(file.read_text())]
        expected = [row["prompt"] for row in tiny_data("grpo", 12)][4 * (number - 1) : 4 * number]
        assert [entry["prompt"] for entry in entries] == expected
        for entry in entries:
            assert entry["scores"] == many_digits(entry["completions"])
        for pair, entry in zip(pairs_of(finished, number), entries, strict=True):
            best, worst = best_and_worst(entry["completions"], entry["scores"]) or (0, 0)
            assert pair["chosen"] == entry["completions"][best] and pair["rejected"] == entry["completions"][worst]
        from trl_ext.campaign.sampling import sampler

        options = {"num": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 6}
        loaded = AutoModelForCausalLM.from_pretrained(begin)
        again = sampler(loaded, AutoTokenizer.from_pretrained(model), torch.device("cpu"), **options)  # type: ignore[arg-type]
        seed = (42 * 1009 + number - 1) * 1_000_003
        assert again([entry["prompt"] for entry in entries[:2]], seed) == [e["completions"] for e in entries[:2]]


@pytest.mark.slow
def test_alpha_zero_is_iterative_dpo(model: str, tmp_path: Path) -> None:
    """Against rounds by hand with TRL alone, on the same pairs: bit for bit."""
    from trl import DPOTrainer

    folder = go(model, tmp_path / "run", {"alpha": 0.0})
    start = model
    for number in (1, 2, 3):
        trainer = DPOTrainer(
            model=start,
            ref_model=AutoModelForCausalLM.from_pretrained(start),
            args=tiny_args("dpo", tmp_path / "hand", learning_rate=1e-3, per_device_train_batch_size=2, beta=0.1),
            train_dataset=Dataset.from_list(pairs_of(folder, number)),
        )
        trainer.train()
        start = str(tmp_path / f"hand-{number}")
        trainer.save_model(start)
        assert equal(weights(start), weights(folder / f"round-{number}" / "output")), number
    assert equal(weights(start), weights(folder))


def test_the_first_output_does_not_depend_on_alpha(finished: Path, model: str, tmp_path: Path) -> None:
    other = go(model, tmp_path / "run", {"alpha": 0.6, "rounds": 3})
    assert equal(weights(finished / "round-1" / "output"), weights(other / "round-1" / "output"))
    assert not equal(weights(finished / "round-2" / "output"), weights(other / "round-2" / "output"))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.slow
def test_every_round_starts_at_its_reference_with_its_beta(
    model: str, tmp_path: Path, watch: str, watched: list[Any], lora: bool, precompute: bool
) -> None:
    extra = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    go(model, tmp_path / "run", {"betas": [0.05, 0.1, 0.2]}, (watch,), precompute_ref_log_probs=precompute, **extra)
    assert [entry["beta"] for entry in watched] == [0.05, 0.1, 0.2]
    for entry in watched:
        first, second = entry["logs"][:2]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) == first["apo/first_loss"]
        assert second["loss"] != first["loss"] and "apo/first_loss" not in second


def test_a_reference_that_is_not_the_start_stops_the_run(model: str, tmp_path: Path, plugin: Any) -> None:
    class Spoils(Plugin):
        name = "spoils"
        trainers = ("dpo",)

        @hookimpl
        def setup(self, trainer: Any) -> None:
            with torch.no_grad():
                for value in trainer.unwrapped_model.parameters():
                    value.add_(0.02 * torch.randn(value.shape))

    with pytest.raises(RuntimeError, match=r"must start at its reference, where the first loss is ln 2 = 0\.6931"):
        go(model, tmp_path / "run", plugins=(plugin(Spoils),))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    tied = tiny_model(tmp_path / "model", tie_word_embeddings=True)
    folder = go(tied, tmp_path / "run", {"rounds": 2})
    start = AutoModelForCausalLM.from_pretrained(folder / "round-2" / "start")
    assert start.lm_head.weight is start.model.embed_tokens.weight
    name = "model.embed_tokens.weight"
    new, old = weights(folder / "round-1" / "output")[name], weights(tied)[name]
    torch.testing.assert_close(weights(folder / "round-2" / "start")[name], new + 0.3 * (new - old))
    assert all(value.requires_grad for value in start.parameters())


def changes(folder: Path) -> dict[str, torch.Tensor]:
    """The change of every weight by an adapter on disk, scaling * B @ A, by the base's names."""
    factors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            own = name.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight"
            found[own] = config["lora_alpha"] / config["r"] * factors[name.replace("lora_A", "lora_B")] @ a
    return found


@pytest.mark.slow
def test_adapters_extrapolate_the_change_of_the_weights(model: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear")
    folder = go(model, tmp_path / "run", {"alpha": 0.5}, peft_config=lora, learning_rate=1e-2)
    base = weights(model)
    deltas = [changes(folder / f"round-{number}" / "output") for number in (1, 2, 3)]
    for number in (2, 3):
        start = weights(folder / f"round-{number}" / "start")
        factor = coefficients(0.5, number)  # of a round that adds nothing yet
        for name, value in start.items():
            expected = base[name] + sum(
                (c * delta[name] for c, delta in zip(factor[:-1], deltas, strict=False) if name in delta),
                torch.zeros_like(value),
            )
            torch.testing.assert_close(value, expected, atol=2e-6, rtol=0)
        adapter = json.loads((folder / f"round-{number}" / "output" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(folder / f"round-{number}" / "start")
        assert adapter["r"] == 2  # it does not grow
    released = weights(folder)
    start = weights(folder / "round-3" / "start")
    assert max(delta.abs().max() for delta in deltas[2].values()) > 1e-4
    for name, value in released.items():
        torch.testing.assert_close(value, start[name] + deltas[2].get(name, 0), atol=2e-6, rtol=0)
    reply = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(reply, "peft_config") and reply.dtype is torch.float32


@pytest.mark.slow
def test_weights_trained_in_full_beside_an_adapter(model: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    folder = go(model, tmp_path / "run", {"rounds": 2}, peft_config=lora, learning_rate=1e-2)
    name = "model.layers.0.mlp.down_proj.weight"
    saved = load_file(folder / "round-1" / "output" / "adapter_model.safetensors")[f"base_model.model.{name}"]
    old = weights(model)[name]
    assert not torch.equal(saved, old)
    torch.testing.assert_close(weights(folder / "round-2" / "start")[name], saved + 0.3 * (saved - old))


@pytest.mark.parametrize("kind", ["dora", "prompt"])
def test_other_adapters_are_refused(model: str, tmp_path: Path, kind: str) -> None:
    from peft import PromptTuningConfig

    config = LoraConfig(use_dora=True) if kind == "dora" else PromptTuningConfig(task_type="CAUSAL_LM")
    with pytest.raises(UsageError, match="LoRA adapters; DoRA and learned prompts"):
        go(model, tmp_path / "run", peft_config=config)
    assert not (tmp_path / "run").exists()
