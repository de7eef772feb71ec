"""The tiny model of `trl_ext.testing`: what it is told is what it reads."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trl_ext.testing import tiny_model


@pytest.mark.parametrize("tools", [False, True])
def test_every_character_survives_encoding(tmp_path: Path, tools: bool) -> None:
    """However the tokenizer is loaded: transformers rebuilds that of a Qwen2 instead of reading its file."""
    folder = tiny_model(tmp_path, tools=tools)
    text = f"{string.printable[:95]}\n\n it's  12\n<|im_start|>x y<|im_end|>\n"
    loaded = [kind.from_pretrained(folder) for kind in (AutoTokenizer, PreTrainedTokenizerFast)]
    first, second = (tokenizer(text)["input_ids"] for tokenizer in loaded)
    assert first == second and loaded[0].unk_token_id not in first
    assert [tokenizer.decode(first) for tokenizer in loaded] == [text, text]
    chat = loaded[0].apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False)
    assert chat == loaded[0].decode(loaded[0](chat)["input_ids"]) == "<|im_start|>user\na b<|im_end|>\n"
