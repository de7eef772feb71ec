"""APO: pairs and judges, rounds without pairs, held-out prompts, other plugins."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.plugins.apo.runs import Longer, equal, go, many_digits, pairs_of, weights
from trl_ext.testing import tiny_data
from trl_ext_hooks import PairLogps, Plugin, UsageError, hookimpl
from trl_ext_plugins.apo.pairs import best_and_worst, wins


def test_pairs_are_best_against_worst() -> None:
    assert best_and_worst(["a", "b", "c"], [1.0, 3.0, 2.0]) == (1, 0)
    assert best_and_worst(["a", "b", "c"], [math.nan, 3.0, 2.0]) == (1, 2)
    assert best_and_worst(["a", "b"], [1.0, 1.0]) is None and best_and_worst(["a", "a"], [0.0, 1.0]) is None
    assert best_and_worst(["a", "b"], [math.nan, math.nan]) is None


def test_a_judge_plays_every_pair() -> None:
    completions = [[[{"content": text}] for text in own] for own in (["a", "abc", "ab", "b"], ["xx", "y", "z", ""])]
    assert wins(Longer().judge, ["p", "q"], completions) == [[0.5, 3.0, 2.0, 0.5], [3.0, 1.5, 1.5, 0.0]]
    with pytest.raises(UsageError, match="expected 0 or 1"):
        wins(lambda prompts, pairs: [7] * len(pairs), ["p"], completions[:1])


def test_a_round_without_pairs_does_not_count(
    finished: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Round 2 of three says nothing: round 3 starts where round 2 did, from the same two outputs."""
    middle = [row["prompt"] for row in tiny_data("grpo", 12)][4:8]

    def sometimes(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        values = many_digits(completions)
        return [0.0 if prompt in middle else value for prompt, value in zip(prompts, values, strict=True)]

    monkeypatch.setattr(sys.modules["apo_rewards"], "many_digits", sometimes)
    folder = go(model, tmp_path / "run")
    assert "round 2 of 3 has no pair with a better side and does not count" in capsys.readouterr().err
    assert pairs_of(folder, 2) == [] and not (folder / "round-2" / "output").exists()
    assert equal(weights(folder / "round-3" / "start"), weights(folder / "round-2" / "start"))
    assert equal(weights(folder / "round-3" / "start"), weights(finished / "round-2" / "start"))
    assert equal(weights(folder), weights(folder / "round-3" / "output"))


@pytest.mark.parametrize("lora", [False, True])
def test_outputs_are_scored_on_prompts_that_no_round_sees(
    model: str, tmp_path: Path, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl_ext.campaign import sampling

    extra: dict[str, Any] = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    extra |= {"learning_rate": 1e-2}
    folder = go(model, tmp_path / "run", {"rounds": 2, "held_out": 4}, **extra)
    history = json.loads((folder / "trl_ext_rounds.json").read_text())
    assert [entry["step"] for entry in history] == [1, 2]
    prompts = tiny_data("grpo", 12)["prompt"]
    for number, entry in enumerate(history, 1):
        read = {}
        for part in ("samples", "held-out-samples"):
            files = sorted((folder / f"round-{number}" / part).glob("*.json"))
            read[part] = [found for file in files for found in json.loads(file.read_text())]
        assert [found["prompt"] for found in read["samples"]] == prompts[4 * (number - 1) : 4 * number]
        assert [found["prompt"] for found in read["held-out-samples"]] == prompts[8:]
        for part, name in (("samples", "apo/start_reward"), ("held-out-samples", "apo/reward")):
            scores = [score for found in read[part] for score in found["scores"]]
            assert entry[name] == pytest.approx(sum(scores) / len(scores)) and len(scores) == 16
        assert entry["apo/pairs"] == len(pairs_of(folder, number))
    released = AutoModelForCausalLM.from_pretrained(folder)
    options = {"num": 4, "temperature": 1.0, "top_p": 1.0, "max_tokens": 6}
    again = sampling.sampler(released, AutoTokenizer.from_pretrained(model), torch.device("cpu"), **options)  # type: ignore[arg-type]
    found = again(prompts[8:10], (42 * 1009 + 1008) * 1_000_003)
    assert found == [entry["completions"] for entry in read["held-out-samples"][:2]]
    monkeypatch.setattr(sampling, "sampler", None)  # a run that goes on has all of it
    go(model, folder, {"rounds": 2, "held_out": 4}, resume_from_checkpoint=True, **extra)
    assert json.loads((folder / "trl_ext_rounds.json").read_text()) == history


@pytest.mark.parametrize("name", ["same", "none"])
def test_a_run_without_any_pair_is_an_error(model: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="no round had a pair with a better side"):
        go(model, tmp_path / "run", {"reward_funcs": [f"apo_rewards.{name}"]})


def test_a_judge_in_place_of_rewards(model: str, tmp_path: Path) -> None:
    folder = go(model, tmp_path / "run", {"reward_funcs": [], "judge": "apo_rewards.Longer", "rounds": 1})
    found = pairs_of(folder, 1)
    assert found and all(len(pair["chosen"][0]["content"]) > len(pair["rejected"][0]["content"]) for pair in found)


def test_rewards_are_weighted_and_may_not_apply(model: str, tmp_path: Path) -> None:
    functions = ["apo_rewards.many_digits", "apo_rewards.none", "apo_rewards.same"]
    folder = go(model, tmp_path / "run", {"reward_funcs": functions, "reward_weights": [2, 1, 10], "rounds": 1})
    entry = json.loads((folder / "round-1" / "samples" / "000000.json").read_text())[0]
    assert entry["scores"] == pytest.approx([2 * v + 10 for v in many_digits(entry["completions"])])


def test_prompts_of_text_and_a_number_per_round(model: str, tmp_path: Path) -> None:
    data = Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(5)]})
    folder = go(model, tmp_path / "run", {"rounds": 2, "prompts_per_round": 3}, train_dataset=data)
    files = [sorted((folder / f"round-{number}" / "samples").glob("*")) for number in (1, 2)]
    prompts = [[entry["prompt"] for file in own for entry in json.loads(file.read_text())] for own in files]
    assert prompts == [["0+0=", "1+1=", "2+2="], ["3+3=", "4+4=", "0+0="]]
    assert all(isinstance(pair["chosen"], str) for pair in pairs_of(folder, 1))


@pytest.mark.slow
def test_with_shared_prefixes_and_another_method(model: str, tmp_path: Path, plugin: Any) -> None:
    class Halves(Plugin):
        name = "halves"
        trainers = ("dpo",)

        @hookimpl
        def pair_logps(self, pairs: Any) -> PairLogps:
            return PairLogps(0.5 * pairs.per_token_logps, 0.5 * pairs.ref_per_token_logps)

    halves = plugin(Halves)
    plain = go(model, tmp_path / "plain", {"rounds": 2}, (halves,), optim="sgd")
    shared = go(model, tmp_path / "shared", {"rounds": 2}, (halves, {"shared-prefix": {"min_gain": 0}}), optim="sgd")
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(shared)[name], value, atol=1e-5, rtol=0)
