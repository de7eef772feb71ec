"""What all tests share: a tiny model on disk, real trainers on it, plugins made on the spot, and a clean slate."""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["RICH_NO_COLOR"] = "1"
os.environ.pop("COLUMNS", None)  # test runners set it, and tables obey it

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import watchdog  # noqa: E402
from trl_ext.testing import tiny_model, tiny_trainer  # noqa: E402

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    watchdog.install(config)


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> None:
    """Takes what lives on by now out of the garbage collector's sight.

    A training collects garbage when it begins. That would walk through all modules and all collected tests each time,
    which took a third of a short run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model."""
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tiny model that knows tool calls."""
    return tiny_model(tmp_path_factory.mktemp("tool_model"), tools=True)


@pytest.fixture
def build(model: str, tmp_path: Path) -> Callable[..., Any]:
    """`build(kind, **settings)` makes a real TRL trainer with an output folder of its own."""
    count = itertools.count()

    def make(kind: str = "grpo", **settings: Any) -> Any:
        settings.setdefault("output", tmp_path / f"run{next(count)}")
        settings.setdefault("model", model)
        return tiny_trainer(kind, **settings)

    return make


@pytest.fixture
def train(build: Callable[..., Any]) -> Callable[..., Any]:
    """`train(kind, **settings)` makes a trainer, trains it and returns it."""

    def run(kind: str = "grpo", **settings: Any) -> Any:
        trainer = build(kind, **settings)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], str]:
    """`plugin(Class)` gives the reference under which a class made in a test can be enabled."""
    count = itertools.count()

    def publish(cls: type) -> str:
        module = types.ModuleType(f"trl_ext_test_module_{next(count)}")
        module.Made = cls  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return f"{module.__name__}:Made"

    return publish


class Track:
    """An environment that pays what its moves say; rewards and ends are known turn by turn."""

    resets = 0
    """Of all instances since the run began: the rows of a round are reset in their order."""
    rows = 1

    def __init__(self) -> None:
        self.step_rewards: list[float] = []
        self.done = self.truncated = False

    def reset(self, **row: Any) -> str:
        self.step_rewards, self.done, self.truncated = [], False, False
        Track.resets += 1
        return f"#{(Track.resets - 1) % Track.rows}#"

    def go(self, pay: float) -> str:
        """
        Makes a step.

        Args:
            pay: The reward of the step

        Returns:
            What there is to see
        """
        self.step_rewards.append(float("nan") if pay == 77 else float(pay))
        return "ok"

    def end(self, pay: float) -> str:
        """
        Makes the last step.

        Args:
            pay: The reward of the step

        Returns:
            What there is to see
        """
        self.step_rewards.append(float(pay))
        self.done = True
        return "over"

    def stop(self) -> str:
        """
        Runs into a limit.

        Returns:
            What there is to see
        """
        self.step_rewards.append(0.0)
        self.truncated = True
        return "over"

    def crash(self) -> str:
        """
        Fails.

        Returns:
            Nothing
        """
        raise RuntimeError("the simulator is gone")


def tool_call(name: str, **arguments: Any) -> str:
    """A call as the tiny model with tools writes it."""
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[str]]], type[Track]]:
    """`play(script)` lets the model of a GRPO trainer say `script[row][turn]`, and "." when a row has said everything.

    Only the sampler is replaced: the tool loop, environments and everything behind them are TRL's. Returns the
    environment, which numbers its rows.
    """
    from trl import GRPOTrainer

    def start(script: list[list[str]]) -> type[Track]:
        monkeypatch.setattr(Track, "resets", 0)
        monkeypatch.setattr(Track, "rows", len(script))

        def say(self: Any, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
            answers = []
            for text in self.processing_class.batch_decode(prompt_ids):
                row, turn = int(text.split("#")[1]), text.count("<|im_start|>assistant") - 1
                said = script[row][turn] if turn < len(script[row]) else "."
                answers.append(self.processing_class(said + "<|im_end|>", add_special_tokens=False)["input_ids"])
            return answers, None

        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", say)
        return Track

    return start


WORDS = ["Wait", "But", "Let", "Therefore", "Alternatively", "so", "the", "answer", "is", "four", "check"]
"""Words that the tokenizers below know as one token, with and without a space; `Hmm` is not among them."""


@pytest.fixture(scope="session")
def byte_level() -> Any:
    """A byte-level BPE tokenizer as Qwen's: `.\\n\\n` and some words are tokens, a character may be several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    merges = []

    def learn(text: str) -> None:
        for end in range(2, len(text) + 1):
            if text[:end] not in vocabulary:
                vocabulary[text[:end]] = len(vocabulary)
                merges.append((text[: end - 1], text[end - 1]))

    for word in [*("Ġ" + word for word in WORDS), *WORDS, ".ĊĊ", "ĊĊ"]:
        learn(word)
    vocabulary["?.ĊĊ"] = len(vocabulary)
    merges.append(("?", ".ĊĊ"))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": ["</think>"]}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="session")
def space_pieces() -> Any:
    """A tokenizer as Llama 2's: words carry their space in front, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    plain = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:=+-*()\\{}!?'", "▁"]
    words = [word for text in WORDS for word in (text, "▁" + text)]
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *plain, *words]
    scores = [(piece, 0.0 if piece in words else -10.0) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which TRL is not as before, and cleans up for the next one."""
    from trl_ext import api
    from trl_ext.trl_internals import seams

    classes = [seams.trainer_class(kind) for kind in ("grpo", "rloo", "dpo")]
    before = [dict(vars(cls)) for cls in classes]
    yield
    left = api._active
    if left is not None:
        left.disable()
    after = [dict(vars(cls)) for cls in classes]
    assert left is None, f"{left!r} was still enabled"
    assert after == before, "a TRL class was changed"
