"""Texts of single tokens, for the kinds of tokenizers that models use."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_ext.inspection.tokens import decoder, texts

TEXT = "Hi  you\n\n到着 🚂 zażółć"


def byte_level() -> Any:
    """One token per byte, as in GPT-2's and Qwen's tokenizers before merges: characters take up to four tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def metaspace() -> Any:
    """Pieces with a mark for the space in front of them, as in Llama's and Gemma's, which loses its space alone."""
    words = ["<unk>", "▁one", "▁two", "▁", "s", "!"]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_a_character_of_several_tokens_belongs_to_its_last_one() -> None:
    tokenizer = byte_level()
    ids = tokenizer(TEXT)["input_ids"]
    found = texts(decoder(tokenizer), ids)
    assert len(found) == len(ids) == len(TEXT.encode()) and "".join(found) == TEXT
    at = len(b"Hi  you\n\n")
    assert found[at : at + 3] == ["", "", "到"]
    train = len("Hi  you\n\n到着 ".encode())
    assert found[train : train + 4] == ["", "", "", "🚂"]


def test_special_tokens_are_texts() -> None:
    tokenizer = byte_level()
    assert texts(decoder(tokenizer), tokenizer("a")["input_ids"] + [tokenizer.eos_token_id]) == ["a", "<end>"]


def test_bytes_that_are_no_text_come_out_in_the_end() -> None:
    tokenizer = byte_level()
    broken = tokenizer("🚂")["input_ids"][:2]
    letters = tokenizer("ab")["input_ids"]
    for ids in (broken, broken + letters, broken * 5 + letters):
        found = texts(decoder(tokenizer), ids)
        assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
    assert texts(decoder(tokenizer), []) == []


def test_the_space_in_front_of_a_piece_is_kept() -> None:
    tokenizer = metaspace()
    decode = decoder(tokenizer)
    assert [decode([i]) for i in (1, 2)] == ["one", "two"]  # alone they have none
    assert texts(decode, [1, 4, 2, 5]) == ["one", "s", " two", "!"]
    assert texts(decode, [1, 2], before=[2, 5]) == [" one", " two"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_processor_s_tokenizer_is_found(wrapped: bool) -> None:
    class Processor:
        tokenizer = byte_level()

    processing = Processor() if wrapped else Processor.tokenizer
    assert decoder(processing)([Processor.tokenizer.convert_tokens_to_ids("a")]) == "a"
