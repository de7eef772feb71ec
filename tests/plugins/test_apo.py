"""APO: the mathematics, the rounds on real models and trainers, what a kill leaves behind, and what cannot work."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import trl_ext
from trl_ext.testing import conformance, tiny_args, tiny_data, tiny_model
from trl_ext.trl_internals import seams
from trl_ext_hooks import PairLogps, Plugin, UsageError, hookimpl
from trl_ext_plugins.apo.maths import coefficients, extrapolate, momentum
from trl_ext_plugins.apo.pairs import best_and_worst, collect, wins

pytestmark = pytest.mark.skipif(seams.trl_version() < seams.Version("1.15"), reason="needs the fused head of TRL 1.15")


def many_digits(completions: list[Any], **columns: Any) -> list[float]:
    """More digits and different letters, so that samples seldom tie."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(t.isdigit() for t in text) + 0.01 * len(set(text)) for text in texts]


class Longer:
    """A judge: the longer one is better."""

    def judge(self, prompts: list[Any], pairs: list[list[Any]]) -> list[int]:
        lengths = [[len(c[0]["content"]) for c in pair] for pair in pairs]
        return [-1 if a == b else int(b > a) for a, b in lengths]


@pytest.fixture(autouse=True)
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("apo_rewards")
    module.many_digits, module.Longer = many_digits, Longer  # type: ignore[attr-defined]
    module.same = lambda completions, **columns: [1.0] * len(completions)  # type: ignore[attr-defined]
    module.none = lambda completions, **columns: [None] * len(completions)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apo_rewards", module)


OPTIONS = {
    "reward_funcs": ["apo_rewards.many_digits"],
    "betas": [0.1],
    "rounds": 3,
    "num_samples": 4,
    "sample_batch": 2,
    "max_completion_length": 6,
    "temperature": 1.0,
    "top_p": 1.0,
}


def go(
    model: str, folder: Path, options: dict[str, Any] | None = None, plugins: tuple[Any, ...] = (), **settings: Any
) -> Path:
    """A run of rounds on the tiny model; returns its folder."""
    arguments = {name: settings.pop(name) for name in ("peft_config", "train_dataset") if name in settings}
    arguments.setdefault("train_dataset", tiny_data("grpo", 12))
    args = tiny_args("dpo", folder, **{"learning_rate": 1e-3, "per_device_train_batch_size": 2, **settings})
    trl_ext.run("apo", *plugins, model=model, args=args, **arguments, apo=OPTIONS | (options or {}))
    return folder


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def pairs_of(folder: Path, number: int) -> list[dict[str, Any]]:
    lines = (folder / f"round-{number}" / "pairs" / "pairs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with alpha 0.3."""
    module = types.ModuleType("apo_rewards")
    module.many_digits = many_digits  # type: ignore[attr-defined]
    sys.modules["apo_rewards"] = module
    return go(model, tmp_path_factory.mktemp("apo") / "run")


# --- the mathematics --------------------------------------------------------------------------------------------------


def test_three_forms_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, dtype=torch.float64, generator=generator)
    updates = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    alpha = 0.4
    start = previous = buffered = reference
    velocity = torch.zeros_like(reference)
    for index, update in enumerate(updates):
        new = start + update
        closed = reference + (torch.tensor(coefficients(alpha, index + 1)).unsqueeze(1) * updates[: index + 1]).sum(0)
        torch.testing.assert_close(new, closed)
        start, previous = extrapolate({"w": new}, {"w": previous}, alpha)["w"], new
        buffered, velocity = momentum(buffered, buffered + update, velocity, alpha)
        torch.testing.assert_close(start, buffered)
    assert coefficients(0.3, 3) == pytest.approx([1.39, 1.3, 1.0])


def test_extrapolation_keeps_shape_precision_and_what_is_no_number() -> None:
    new = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "steps": torch.tensor([3])}
    old = {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "steps": torch.tensor([1])}
    found = extrapolate(new, old, 0.5)
    assert found["w"].dtype is torch.bfloat16 and found["w"].shape == (2, 3) and found["steps"].item() == 3
    assert equal(extrapolate(new, new, 0.5), new) and equal(extrapolate(new, old, 0.0), new)


def test_small_updates_of_bfloat16_are_rounded_once() -> None:
    old = torch.full((64,), 1.0, dtype=torch.bfloat16)
    new = old.clone()
    new[::2] = 1.0078125  # the next number
    found = extrapolate({"w": new}, {"w": old}, 0.6)["w"]
    exact = (new.double() + 0.6 * (new.double() - old.double())).to(torch.bfloat16)
    assert torch.equal(found, exact) and found[0] > new[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_not_extrapolated(value: float) -> None:
    with pytest.raises(ValueError, match="w holds values that are not finite"):
        extrapolate({"w": torch.tensor([value])}, {"w": torch.tensor([1.0])}, 0.3)
    with pytest.raises(ValueError, match="other names"):
        extrapolate({"w": torch.ones(1)}, {"v": torch.ones(1)}, 0.3)
    with pytest.raises(ValueError, match="has shape"):
        extrapolate({"w": torch.ones(1)}, {"w": torch.ones(2)}, 0.3)


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


# --- full fine-tuning -------------------------------------------------------------------------------------------------


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


class Watch(Plugin):
    """Keeps what every trainer of a run was given and logged."""

    name = "watch"
    trainers = ("dpo",)
    seen: list[Any] = []  # noqa: RUF012  of all trainers

    @hookimpl
    def setup(self, trainer: Any) -> None:
        self.seen.append({"beta": trainer.args.beta, "logs": []})
        trainer.add_callback(Listen(self.seen[-1]))


class Listen(TrainerCallback):
    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entry["logs"].append(dict(logs))


@pytest.fixture
def watch(plugin: Any) -> Iterator[str]:
    Watch.seen.clear()
    yield plugin(Watch)
    Watch.seen.clear()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("precompute", [False, True])
def test_every_round_starts_at_its_reference_with_its_beta(
    model: str, tmp_path: Path, watch: str, lora: bool, precompute: bool
) -> None:
    extra = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    go(model, tmp_path / "run", {"betas": [0.05, 0.1, 0.2]}, (watch,), precompute_ref_log_probs=precompute, **extra)
    assert [entry["beta"] for entry in Watch.seen] == [0.05, 0.1, 0.2]
    for entry in Watch.seen:
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


# --- adapters ---------------------------------------------------------------------------------------------------------


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


# --- kills ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What cannot be caught by mistake."""


class Mortal(Plugin):
    """Lets `mortal` know of every step."""

    name = "mortal"
    trainers = ("dpo",)
    at: Any = None

    @hookimpl
    def setup(self, trainer: Any) -> None:
        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                Mortal.at(f"before step {state.global_step + 1} of {args.output_dir}")

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                Mortal.at(f"did step {state.global_step} of {args.output_dir}")

        trainer.add_callback(Steps())


def mortal(model: str, folder: Path, diary: Path, options: dict[str, Any], settings: dict[str, Any], tell: Any) -> None:
    """A run that kills its own process before each file or folder gets its name and before each step, once each."""
    from trl_ext.campaign import sampling

    module = types.ModuleType("apo_rewards")
    module.many_digits = many_digits  # type: ignore[attr-defined]
    sys.modules["apo_rewards"] = module
    rename, replace, original = Path.rename, os.replace, sampling.sampler

    def at(event: str) -> None:
        known = diary.exists() and event in diary.read_text().splitlines()
        with diary.open("a") as stream:
            print(event, file=stream)
        if event.startswith("before") and not known:
            os.kill(os.getpid(), signal.SIGKILL)

    def move(self: Path, target: Path) -> Path:
        released = target.parent == folder and target.name not in (
            "apo.json",
            "model.safetensors",
        )
        if folder not in target.parents or released:  # one of the files that are copied at the end is enough
            return rename(self, target)
        at(f"before {target}")
        rename(self, target)
        at(f"did {target}")
        return Path(target)

    def move_file(source: Path, target: Path) -> None:
        if target != folder / "trl_ext_rounds.json":
            return replace(source, target)
        at(f"before {target}")
        replace(source, target)
        at(f"did {target}")

    def counted(*args: Any, **kwargs: Any) -> Any:
        sample = original(*args, **kwargs)
        return lambda prompts, seed: (at(f"sample {seed}"), sample(prompts, seed))[1]

    Mortal.at, Path.rename, sampling.sampler = at, move, counted  # type: ignore[method-assign,assignment]
    os.replace = move_file  # type: ignore[assignment]
    go(
        model,
        folder,
        options,
        (f"{__name__}:Mortal",),
        resume_from_checkpoint=(folder / "apo.json").exists() or None,
        **settings,
    )


def test_a_kill_anywhere_repeats_nothing(model: str, tmp_path: Path) -> None:
    """SIGKILL before every file gets its name and before every step, one after the other, until the run ends."""
    from trl_ext.compare import child_process

    options, settings = {"rounds": 2, "held_out": 2}, {"save_strategy": "steps", "save_steps": 1}
    whole = go(model, tmp_path / "whole", options, **settings)
    folder, diary, kills = tmp_path / "run", tmp_path / "diary", 0
    while True:
        child = child_process.start(mortal, model, folder, diary, options, settings, log=str(tmp_path / "log"))
        message = child.receive()
        if isinstance(message, child_process.Result):
            break
        assert isinstance(message, child_process.Failure) and "SIGKILL" in message.message, message
        kills += 1
    lines = diary.read_text().splitlines()
    assert kills == len({line for line in lines if line.startswith("before")}) >= 18
    done = [line for line in lines if line.startswith("did") and "trl_ext_rounds.json" not in line]
    assert len(done) == len(set(done)), "something finished was made again"
    assert sum("did step" in line for line in done) == 4
    sampled = [line for line in lines if line.startswith("sample")]
    # three batches in each round, and the held-out one of both; each is at most once cut off before it has its name
    assert len(set(sampled)) == 7 and len(sampled) <= 16
    for name in ("round-1/output", "round-2/start", "round-2/output", "."):
        assert equal(weights(folder / name), weights(whole / name)), name
    assert (folder / "trl_ext_rounds.json").read_text() == (whole / "trl_ext_rounds.json").read_text()


class Bomb(TrainerCallback):
    steps: list[int] = []  # noqa: RUF012  of all trainers
    left = 10**9

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Bomb.steps.append(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Bomb.left -= 1
        if Bomb.left < 0:
            raise Killed


class Bombs(Plugin):
    name = "bombs"
    trainers = ("dpo",)

    @hookimpl
    def setup(self, trainer: Any) -> None:
        trainer.add_callback(Bomb())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.slow
def test_a_kill_in_the_middle_of_training_goes_on_from_a_checkpoint(
    model: str, tmp_path: Path, plugin: Any, lora: bool
) -> None:
    extra: dict[str, Any] = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if lora else {}
    extra |= {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    bombs = (plugin(Bombs),)
    try:
        Bomb.left = 10**9
        whole = go(model, tmp_path / "whole", {"rounds": 2}, bombs, **extra)
        Bomb.steps.clear()
        Bomb.left = 2  # dies at the start of step 3 of round 1
        with pytest.raises(Killed):
            go(model, tmp_path / "cut", {"rounds": 2}, bombs, **extra)
        newest = tmp_path / "cut" / "round-1" / "output-checkpoints" / "checkpoint-2"
        (newest / "trainer_state.json").write_text("{")  # as if the kill came while this was being written
        Bomb.left = 10**9
        cut = go(model, tmp_path / "cut", {"rounds": 2}, bombs, resume_from_checkpoint=True, **extra)
    finally:
        Bomb.left = 10**9
    assert Bomb.steps == [1, 2, 2, 3, 1, 2, 3]
    assert equal(weights(whole), weights(cut))


@pytest.mark.slow
def test_sigkill_and_the_command_line(model: str, tmp_path: Path) -> None:
    """Real processes: killed without warning in round 2, then `--resume_from_checkpoint true`."""
    (tmp_path / "apo_rewards.py").write_text(
        "def many_digits(completions, **columns):\n"
        "    texts = [c[0]['content'] for c in completions]\n"
        "    return [sum(t.isdigit() for t in text) + 0.01 * len(set(text)) for text in texts]\n"
    )
    tiny_data("grpo", 8).to_json(tmp_path / "data" / "train.jsonl")
    command = [sys.executable, "-m", "trl_ext", "train", "--plugin", "apo", "--model_name_or_path", model]
    command += ["--dataset_name", str(tmp_path / "data"), "--max_steps", "2", "--learning_rate", "1e-3"]
    command += ["--per_device_train_batch_size", "2", "--save_steps", "1", "--report_to", "none", "--set"]
    command += [f"apo.{k}={json.dumps(v)}" for k, v in (OPTIONS | {"rounds": 2}).items()]
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / part) for part in (".", "hooks", "plugins"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}

    def start(output: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--output_dir", output, *more],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    cut = start("cut")
    deadline = time.time() + 120
    while not (tmp_path / "cut" / "round-2" / "start").exists():
        assert cut.poll() is None and time.time() < deadline, cut.communicate()[0][-3000:]
        time.sleep(0.05)
    os.killpg(cut.pid, signal.SIGKILL)
    cut.wait()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut" / "round-1").rglob("*") if file.is_file()}

    resumed = start("cut", "--resume_from_checkpoint", "true")
    said = resumed.communicate(timeout=120)[0]
    assert resumed.returncode == 0, said[-3000:]
    assert "round 2 of 2: mean score" in said and "weights 1.3, 1" in said
    whole = go(model, tmp_path / "whole", {"rounds": 2}, train_dataset=tiny_data("grpo", 8))
    assert equal(weights(tmp_path / "cut"), weights(whole))
    assert kept == {file: file.stat().st_mtime_ns for file in kept}, "round 1 was touched again"


def test_other_settings_cannot_go_on_with_a_run(finished: Path, model: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds a run with alpha=0\.3, and now it is 0\.4"):
        go(model, finished, {"alpha": 0.4}, resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="holds a run with prompts="):
        go(model, finished, resume_from_checkpoint=True, train_dataset=tiny_data("grpo", 24).select(range(12, 24)))
    with pytest.raises(UsageError, match="holds rounds of a run of apo"):
        go(model, finished)
    with pytest.raises(UsageError, match="there is no run of apo to go on with"):
        go(model, tmp_path / "new", resume_from_checkpoint=True)


# --- rounds without pairs, judges, other plugins ----------------------------------------------------------------------


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


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_a_trainer_alone_cannot_have_it(build: Any) -> None:
    with (
        trl_ext.enable(apo=OPTIONS),
        pytest.raises(trl_ext.ConfigError, match=r"'apo' trains several times and owns the whole run.*trl_ext\.run"),
    ):
        build("dpo")


def test_a_run_without_an_owner(model: str, tmp_path: Path) -> None:
    with pytest.raises(trl_ext.ConfigError, match="none of the plugins shared-prefix owns a run"):
        trl_ext.run("shared-prefix", model=model, args=tiny_args("dpo", tmp_path), train_dataset=tiny_data("dpo"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss_type": ["apo_zero"]}, r"Anchored Preference Optimization \(arXiv 2408.06266\), another method"),
        ({"loss_type": ["sigmoid", "apo_down"]}, "Anchored"),
        ({"sync_ref_model": True}, "sync_ref_model=False"),
        ({"disable_dropout": False}, "disable_dropout=True"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy"),
    ],
)
def test_settings_are_refused_before_anything_is_loaded(
    model: str, tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    with pytest.raises(trl_ext.ConfigError, match=expected):
        go(model, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "round-1").exists()


@pytest.mark.parametrize("command", [["plugins"], ["show", "apo"]])
def test_the_other_method_of_that_name_is_named(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from trl_ext.cli import main

    assert main.main(command) == 0
    assert "not TRL's Anchored apo_zero and apo_down" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": 1.0}, "alpha must be below 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"rounds": 4, "betas": [0.1, 0.2, 0.3]}, "one for each of the 4 rounds"),
        ({"betas": [0.0]}, "greater than 0"),
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"held_out": -1}, "held_out at least 0"),
        ({"judge": "x.y"}, "exclude each other"),
        ({"reward_weights": [1.0, 2.0]}, "one value per reward function"),
    ],
)
def test_options_are_checked(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=expected):
        trl_ext.enable(apo=OPTIONS | options)


def test_odd_options_are_told(model: str, tmp_path: Path, watch: str) -> None:
    from trl_ext.catalog import find
    from trl_ext.plan import check as plan_check
    from trl_ext_hooks import Config

    specs = find.resolve({"apo": OPTIONS | {"alpha": -0.1, "betas": [1.0, 0.1, 0.1]}})
    notes = plan_check.make_plan(specs, Config("dpo", tiny_args("dpo", tmp_path), (), None, ())).notes
    assert any("averages outputs" in note for note in notes) and any("do not fall" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "error", "expected"),
    [
        ({"reward_funcs": []}, trl_ext.ConfigError, "nothing says which completions are better"),
        ({"reward_funcs": ["nothing"]}, trl_ext.ConfigError, "neither a path such as"),
        ({"reward_funcs": ["apo_rewards.many"]}, trl_ext.ConfigError, "has no 'many'"),
        ({"reward_funcs": [], "judge": "apo_rewards.No"}, UsageError, "apo.judge='apo_rewards.No'"),
        ({"rounds": 20}, UsageError, "12 prompts are too few for 20 rounds"),
        ({"held_out": 11}, UsageError, "1 prompts are too few for 3 rounds"),
        ({"held_out": 13, "prompts_per_round": 2}, UsageError, "0 prompts are too few for 3 rounds"),
    ],
)
def test_what_is_missing_is_told_first(
    model: str, tmp_path: Path, options: dict[str, Any], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        go(model, tmp_path / "run", options)
    assert not (tmp_path / "run" / "apo.json").exists()


def test_streams_and_data_without_prompts(model: str, tmp_path: Path) -> None:
    for data in (tiny_data("grpo").to_iterable_dataset(), Dataset.from_dict({"text": ["a"]})):
        with pytest.raises(UsageError, match="column 'prompt' that can be read in any order"):
            go(model, tmp_path / "run", train_dataset=data)


def test_samples_that_other_machines_keep_are_noticed(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds 2 files of samples, and all processes wrote 3"):
        collect(finished / "round-1" / "samples", tmp_path, 3)


def test_conformance_says_what_it_did_not_look_at(tmp_path: Path) -> None:
    checks = conformance("apo", tmp_path)
    assert [check.name for check in checks] == ["declaration", "runs"] and "not looked at" in checks[1].detail
