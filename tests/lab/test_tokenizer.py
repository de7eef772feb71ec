"""The tokenizer, its chat template and its response template are what TRL asks for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from trl.chat_template_utils import (
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    parse_response,
    supports_tool_calling,
)

from trl_ext import ConfigError, lab
from trl_ext.lab.messages import assistant, call, result, user
from trl_ext.lab.tokenizer import Vocabulary, tools_of


def add(left: int, right: int, note: str) -> int:
    """
    Adds.

    Args:
        left: A number
        right: Another
        note: A text

    Returns:
        The sum
    """
    return left + right


@pytest.fixture(params=lab.tasks())
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """As it comes back from the disk."""
    Vocabulary.of(lab.task(request.param)).build().save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_trl_accepts_the_template(tokenizer: Any) -> None:
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer)
    assert tokenizer.eos_token == "<|end|>" and tokenizer.pad_token_id == 0


def test_text_comes_back(tokenizer: Any) -> None:
    text = "So 3+4=7.\n\nWait <think> \\boxed{7} " + "".join(map(chr, range(32, 127))) + "\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token in tokenizer.decode(tokenizer("é")["input_ids"])


def test_words_stay_in_the_text_that_rewards_see() -> None:
    tokenizer = Vocabulary.of(lab.task("modes")).build()
    ids = tokenizer("<think>+4=7</think>7<|end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids[0]) == "<think>" and len(ids) == 8
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>+4=7</think>7"
    ends = Vocabulary.of(lab.task("checks")).build().tokenize("3+4=7.\n\nWait.\n\n")
    assert ends[-3:] == [".ĊĊ", "Wait", ".ĊĊ"]  # as in the vocabulary of a byte-level BPE


def test_calls_are_written_shortly_and_read_back() -> None:
    task = dataclasses.replace(lab.task("calculator"), tools=(add,))
    tokenizer = Vocabulary.of(task).build()
    tools = tools_of(task)
    message = call("add", left=3, right=-41, note="a b")
    prompt = tokenizer.apply_chat_template(user("?"), tools=tools, add_generation_prompt=True, return_dict=True)
    whole = tokenizer.apply_chat_template([*user("?"), message], tools=tools, return_dict=True)
    ids = whole["input_ids"][len(prompt["input_ids"]) :]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *('<tool_call>Ċ{"name":Ġ"', "add", '",Ġ"arguments":Ġ{"left":Ġ', "3", ',Ġ"right":Ġ', "-", "4", "1"),
        *(',Ġ"note":Ġ"', "a", "Ġ", "b", '"}}Ċ</tool_call>', "<|end|>"),
    ]
    assert parse_response(tokenizer, ids, prefix=prompt["input_ids"], tools=tools) == message
    for broken in (ids[:3] + ids[-2:], ids[:2] + ids[-1:], ids[:-2]):  # no JSON, no end of the call
        parsed = parse_response(tokenizer, broken, prefix=prompt["input_ids"], tools=tools)
        assert "tool_calls" not in parsed and parsed["role"] == "assistant"
    said = tokenizer("=12<|end|>")["input_ids"]
    assert parse_response(tokenizer, said, prefix=prompt["input_ids"], tools=tools) == assistant("=12")[0]


def test_tools_are_listed_with_their_parameters() -> None:
    task = dataclasses.replace(lab.task("calculator"), tools=(add,))
    tokenizer = Vocabulary.of(task).build()
    text = tokenizer.apply_chat_template(user("?"), tools=tools_of(task), tokenize=False)
    assert text == "<|tools|>add(left,right,note)<|end|><|user|>?<|end|>"
    environment = lab.task("grid-walk")
    text = (
        Vocabulary.of(environment).build().apply_chat_template(user("?"), tools=tools_of(environment), tokenize=False)
    )
    assert text == "<|tools|>down()left()right()up()<|end|><|user|>?<|end|>"


def test_what_is_learnt() -> None:
    tokenizer = Vocabulary.of(lab.task("calculator")).build()
    turns = [call("calculate", expression="1+1"), result("calculate", "2"), *assistant("2", prefix="=")]
    encoded = tokenizer.apply_chat_template(user("1+1") + turns, return_dict=True, return_assistant_tokens_mask=True)
    learnt = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    call_text = '<tool_call>\n{"name": "calculate", "arguments": {"expression": "1+1"}}\n</tool_call>'
    assert tokenizer.decode(learnt) == f"{call_text}<|end|>2<|end|>"


def test_impossible_words_are_refused() -> None:
    for word in ("", "a<|end|>"):
        with pytest.raises(ConfigError, match=r"task 'modes': `words` holds"):
            Vocabulary.of(dataclasses.replace(lab.task("modes"), words=(word,)))


def test_words_of_any_alphabet() -> None:
    tokenizer = Vocabulary.of(dataclasses.replace(lab.task("modes"), words=("наш", "a.*b", "a.*"))).build()
    assert tokenizer.decode(tokenizer("нашa.*ba.*axxb")["input_ids"]) == "нашa.*ba.*axxb"
    assert len(tokenizer.tokenize("нашa.*ba.*axxb")) == 7
