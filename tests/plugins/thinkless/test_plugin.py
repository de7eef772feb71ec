"""The parts around DeGRPO: rewards of modes, control tokens, and what is refused before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext_plugins.thinkless import add_control_tokens, boxed_match, boxed_reward, mode_reward, warmup_rows
from trl_ext_plugins.thinkless.rewards import boxed

LETTERS = {"think": "T", "short": "S", "close": "E"}
"""Control tokens that the tiny model's alphabet has."""


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- rewards ----------------------------------------------------------------------------------------------------------


def scored(reward: Any, *rows: tuple[str | None, str | None, Any]) -> list[float | None]:
    modes, answers, references = zip(*rows, strict=True)
    return reward(completions=[""] * len(rows), thinkless_mode=modes, thinkless_answer=answers, solution=references)


def test_rewards_of_modes() -> None:
    reward = mode_reward(lambda answer, solution: answer == solution, think=0.8, wrong_think=-0.5, format_error=-2.0)
    rows = [("short", "7", "7"), ("think", "7", "7"), ("short", "8", "7"), ("think", "8", "7")]
    rows += [(None, "7", "7"), ("think", None, "7")]
    assert scored(reward, *rows) == [1.0, 0.8, -1.0, -0.5, -2.0, -2.0]


def test_any_of_several_references_may_match_and_some_rows_cannot_be_told() -> None:
    reward = mode_reward(lambda answer, solution: None if solution is None else answer == solution)
    rows = [("short", "7", ["8", "7"]), ("short", "7", ["8", "9"]), ("short", "7", None), ("think", "7", [None, "7"])]
    assert scored(reward, *rows) == [1.0, -1.0, None, 0.5]


def test_accuracy_is_logged_per_mode() -> None:
    seen: list[tuple[str, float]] = []
    reward = mode_reward(lambda answer, solution: answer == solution)
    reward(
        completions=[""] * 4,
        thinkless_mode=["short", "think", "think", None],
        thinkless_answer=["7", "8", None, None],  # the third one never ended its thoughts
        solution=["7"] * 4,
        log_metric=lambda name, value: seen.append((name, value)),
    )
    wrong = ("thinkless/accuracy_think", 0.0)
    assert seen == [("thinkless/accuracy_short", 1.0), wrong, wrong]


def test_a_reward_of_modes_without_the_plugin_or_the_column() -> None:
    with pytest.raises(ValueError, match="enable that plugin"):
        boxed_reward(completions=["x"], solution=["7"])
    with pytest.raises(ValueError, match="the column 'solution', which the data lacks; it is called with answer"):
        boxed_reward(completions=["x"], thinkless_mode=["short"], thinkless_answer=["7"], answer=["7"])


def test_boxed_answers() -> None:
    assert boxed(r"so \boxed{1} and \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed(r"\boxed{7} then \boxed{8") == "7" and boxed("7") is None
    assert boxed_match(r"it is \boxed{ x + 1 }", "$x+1$") and boxed_match(r"\boxed{7}", r"so \boxed{7}")
    assert not boxed_match("7", "7") and not boxed_match(r"\boxed{8}", "7")


# --- control tokens and warm-up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_control_tokens_are_added_once_as_ordinary_tokens(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_ext.testing import tiny_model

    folder = tiny_model(tmp_path, tie_word_embeddings=tied)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    before = model.get_input_embeddings().weight.detach().clone()
    text = "<think>a</think><short>b"
    assert add_control_tokens(model, tokenizer) == ["<think>", "</think>", "<short>"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 5 and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert model.config.vocab_size == len(tokenizer) == len(before) + 3
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(layer.weight[ids[0]], layer.weight[: len(before)].mean(0))
    assert torch.equal(model.get_input_embeddings().weight[: len(before)], before)
    assert add_control_tokens(model, tokenizer) == []


def test_texts_of_the_warm_up() -> None:
    example = {"prompt": "1+1=", "short": "2", "think": "one and one</think>2"}
    assert warmup_rows(example) == [
        {"prompt": "1+1=", "completion": "<short>2"},
        {"prompt": "1+1=", "completion": "<think>one and one</think>2"},
    ]
    marked = {"prompt": "1+1=", "short": "<short>2", "think": "<think>one and one</think>2"}
    assert warmup_rows(marked) == warmup_rows(example)
    with pytest.raises(ValueError, match="has no '</think>'"):
        warmup_rows(example | {"think": "one and one"})


# --- what is refused --------------------------------------------------------------------------------------------------


def noisy(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) * (n + 1) % 7) / 3 for n, ids in enumerate(completion_ids)]


@pytest.mark.parametrize(
    ("options", "settings_", "expected"),
    [
        ({}, {"loss_type": "grpo"}, "thinkless needs loss_type='dapo', it is 'grpo': thinkless.aggregation=token_mean"),
        ({"aggregation": "sequence_mean"}, {}, "thinkless needs loss_type='grpo', it is 'dapo'"),
        ({}, {"importance_sampling_level": "sequence"}, "thinkless needs importance_sampling_level='token'"),
        (
            {},
            {"top_entropy_quantile": 0.2},
            "thinkless needs top_entropy_quantile=1.0, it is 0.2: it would drop",
        ),
        ({}, {"off_policy_mask_threshold": 0.5}, "thinkless needs off_policy_mask_threshold=None"),
    ],
)
def test_settings_that_do_not_fit(options: Any, settings_: dict[str, Any], expected: str, build: Any) -> None:
    from trl import GRPOConfig, GRPOTrainer

    if not all(hasattr(GRPOConfig, name) for name in settings_):
        pytest.skip("this TRL has no such setting")
    with trl_ext.enable("thinkless", thinkless=options), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=lambda **given_: GRPOTrainer(**given_ | {"model": "/no/such/model"}), **settings_)
    assert expected in str(caught.value)


def test_a_tokenizer_without_the_tokens(build: Any) -> None:
    expected = r"no single token for <think>, <short>, </think>, so the model cannot choose a mode\. Add them and teach"
    with trl_ext.enable("thinkless"), pytest.raises(trl_ext.ConfigError, match=expected):
        build()


@pytest.mark.parametrize("written", ["T", "TE", "S"])
def test_a_template_that_writes_the_mode(written: str, model: str, build: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    opening = "<|im_start|>assistant\n"
    assert tokenizer.chat_template.count(opening) == 1
    tokenizer.chat_template = tokenizer.chat_template.replace(opening, opening + written)
    expected = f"thinkless: the chat template itself writes {written[0]!r} before the model's first token"
    with trl_ext.enable("thinkless", thinkless=LETTERS), pytest.raises(trl_ext.ConfigError) as caught:
        build(trainer={"processing_class": tokenizer})
    assert expected in str(caught.value)


def test_a_prompt_may_name_the_tokens_but_not_end_with_one(build: Any) -> None:
    from datasets import Dataset

    texts = {"fine": ["Take T or S:"] * 8, "written": ["Take T or S: T "] * 8}
    with trl_ext.enable("thinkless", thinkless=LETTERS):
        build(data=Dataset.from_dict({"prompt": texts["fine"]}), rewards=[noisy], max_steps=1).train()
        trainer = build(data=Dataset.from_dict({"prompt": texts["written"]}), rewards=[noisy], max_steps=1)
        with pytest.raises(ValueError, match="writes the control token itself; leave it to the model"):
            trainer.train()


def test_rloo_cannot_weigh_tokens(build: Any) -> None:
    with trl_ext.enable("thinkless"), pytest.raises(trl_ext.ConfigError, match="'thinkless' cannot serve the RLOO"):
        build("rloo")


@pytest.mark.parametrize(("options", "text"), [({"alpha": -1.0}, "alpha"), ({"think": "S", "short": "S"}, "different")])
def test_impossible_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(trl_ext.OptionError, match=text):
        trl_ext.enable("thinkless", thinkless=options)


def test_the_help_says_how_to_choose_alpha(capsys: Any) -> None:
    """A rule, the metric that says whether it is kept, and examples on both ends that keep it."""
    from trl_ext.cli.main import main

    assert main(["show", "thinkless", "--json"]) == 0
    (alpha,) = [entry for entry in json.loads(capsys.readouterr().out)["options"] if entry["name"] == "alpha"]
    assert alpha["default"] == 0.001
    for words in (
        "start with 10 / mean response length",
        "(metric control_weight)",
        "at 10 sooner",
        "thousands of tokens",
    ):
        assert words in alpha["help"]
    assert main(["show", "thinkless"]) == 0
    assert "control_weight" in capsys.readouterr().out
