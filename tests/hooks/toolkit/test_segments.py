"""Decoded text with a map back to tokens, and the cuts into chunks and steps, on real tokenizers of three kinds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from trl_ext_hooks.toolkit.segments import (
    LineBreaks,
    Marks,
    TokenReader,
    chunk_ends,
    merge_one_liners,
    step_ends,
    thinking_end,
    thinned,
    vocabulary_ends,
)

TEXT = "so the answer is 四, don’t\nWait, check.\n\nHmm: 2 + 2 = 4 \U0001f600.\n\n</think> four"


@pytest.fixture(params=["byte_level", "space_pieces", "letters"])
def tokenizer(request: Any, model: str) -> Any:
    return (
        PreTrainedTokenizerFast.from_pretrained(model)
        if request.param == "letters"
        else request.getfixturevalue(request.param)
    )


@pytest.fixture
def reader(tokenizer: Any) -> TokenReader:
    return TokenReader(tokenizer)


# --- text and tokens --------------------------------------------------------------------------------------------------


def by_prefixes(reader: TokenReader, ids: list[int], text: str) -> list[int]:
    """The slow way: how much of the text each prefix of the tokens already gives."""
    ends = []
    for count in range(1, len(ids) + 1):
        prefix = reader.tokenizer.decode([*reader.ids("a"), *ids[:count]]).removeprefix("a")
        ends.append(next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(prefix)))
    return ends


def test_the_text_is_the_decoded_text(reader: TokenReader) -> None:
    ids = reader.ids(TEXT)
    read = reader(ids)
    decoded = reader.tokenizer.decode(ids)
    assert read.text.strip() == decoded.strip()
    assert len(read.ends) == len(ids) and read.ends[-1] == len(read.text)
    assert all(a <= b for a, b in pairwise(read.ends))
    assert "".join(read.between(i, i + 1) for i in range(len(ids))) == read.text == read.between(0, len(ids))


def test_every_character_is_in_the_token_that_completes_it(byte_level: Any) -> None:
    reader = TokenReader(byte_level)
    ids = reader.ids("x四\U0001f600y")
    assert len(ids) == 1 + 3 + 4 + 1
    read = reader(ids)
    assert read.ends == (1, 1, 1, 2, 2, 2, 2, 3, 4)
    assert [read.token_at(i) for i in range(4)] == [0, 3, 7, 8]
    assert [read.between(i, i + 1) for i in range(9)] == ["x", "", "", "四", "", "", "", "\U0001f600", "y"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_at_all(data: Any, byte_level: Any) -> None:
    """Sampled tokens need not be valid text: bytes of broken characters, special tokens in the middle."""
    reader = TokenReader(byte_level)
    size = len(byte_level)
    broken = st.integers(0, size - 1) | st.sampled_from([reader.ids("四")[0], reader.ids("四")[1]])
    ids = data.draw(st.lists(broken, max_size=25))
    read = reader(ids)
    assert read.text == byte_level.decode(ids)
    assert read.ends == tuple(max(by_prefixes(reader, ids, read.text)[: i + 1]) for i in range(len(ids)))


def test_a_leading_space_stays(space_pieces: Any) -> None:
    reader = TokenReader(space_pieces)
    assert space_pieces.decode(reader.ids("the answer")) == "the answer"  # the tokenizer drops it
    assert reader(reader.ids("the answer")).text == " the answer"


def test_a_tokenizer_whose_pieces_depend_on_their_neighbours() -> None:
    """Decoding joins with hyphens, but not before a bang: no table of pieces can be right."""

    class Odd:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(letter) for letter in text]

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return "-".join(map(chr, ids)).replace("-!", "!").replace("b!", "B!")

    read = TokenReader(Odd())([ord(letter) for letter in "ab!c"])
    assert read.text == "-a-B!-c"
    assert read.ends == (2, 3, 5, 7)
    assert read.between(2, 3) == "B!"


def test_nothing(reader: TokenReader) -> None:
    assert reader([]).text == "" and reader([]).ends == ()
    assert reader([]).between(0, 0) == "" and reader([]).tokens_of("a") == []


def test_a_processor_is_read_by_its_tokenizer(byte_level: Any) -> None:
    class Processor:
        tokenizer = byte_level

    assert TokenReader(Processor())(byte_level.encode("Wait")).text == "Wait"
    assert vocabulary_ends(Processor()) == vocabulary_ends(byte_level)


# --- marks ------------------------------------------------------------------------------------------------------------


def cut(reader: TokenReader, text: str, words: list[str]) -> list[str]:
    """The text cut before every mark."""
    ids = reader.ids(text)
    read = reader(ids)
    starts = [0, *Marks(reader, words, whole_words=True)(ids, read), len(ids)]
    return [read.between(a, b).strip() for a, b in pairwise(starts) if b > a]


def test_words_are_found_whatever_the_tokens(reader: TokenReader) -> None:
    """`Hmm` is several tokens for all three, the others for some; `Hmmm` and `aHmm` are other words."""
    text = "so Wait, Hmm the. Alternatively check Hmmm aHmm but Let"
    words = [form for word in ("Wait", "Hmm", "Alternatively", "Let") for form in (word, " " + word)]
    assert cut(reader, text, words) == ["so", "Wait,", "Hmm the.", "Alternatively check Hmmm aHmm but", "Let"]


def test_single_tokens_go_by_id_and_others_by_text(byte_level: Any) -> None:
    reader = TokenReader(byte_level)
    marks = Marks(reader, ["Wait", " Wait", "Hmm", " Hmm"], whole_words=True)
    assert marks.ids == {reader.ids("Wait")[0], reader.ids(" Wait")[0]} and marks.on_text == ("Hmm", " Hmm")
    first_of_hmm = reader.ids("Hmm")[0]
    ids = reader.ids("He said H")  # the first token of a word is a common letter
    assert first_of_hmm in ids and marks(ids, reader(ids)) == []


def test_the_end_of_thinking(byte_level: Any, model: str) -> None:
    letters = TokenReader(PreTrainedTokenizerFast.from_pretrained(model))
    for reader in (TokenReader(byte_level), letters):
        mark = Marks(reader, ["</think>"])
        ids = reader.ids("so four</think> four</think>")
        end = thinking_end(ids, reader(ids), mark)
        assert reader(ids).between(0, end) == "so four"
        none = reader.ids("so four")
        assert thinking_end(none, reader(none), mark) == len(none)
        assert thinking_end([], reader([]), mark) == 0
    assert Marks(TokenReader(byte_level), ["</think>"]).ids and not Marks(letters, ["</think>"]).ids


def test_line_breaks_by_id_where_all_are_tokens(byte_level: Any, model: str) -> None:
    reader = TokenReader(byte_level)
    newline, step, bracketed, word = (reader.single(text) for text in ("\n", ".\n\n", "?.\n\n", "Wait"))
    few = LineBreaks(reader, ("\n", "\n\n", ".\n\n"))
    assert few.ids is not None and few(newline) and few(step) and not few(bracketed) and not few(word)
    every = LineBreaks(reader)
    assert every.ids is None  # " \n" is two tokens here, so a newline anywhere in a token counts
    assert every(newline) and every(step) and every(bracketed) and not every(word)
    letters = TokenReader(PreTrainedTokenizerFast.from_pretrained(model))
    assert LineBreaks(letters)(letters.single("\n")) and not LineBreaks(letters)(letters.single("."))


# --- cuts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b|c.d", ["a.b", "|c.d"]),
        ("a|b.c|d", ["a|b.c", "|d"]),  # the last has nothing to be joined to
        ("a|b|c.d|e.f", ["a|b|c.d", "|e.f"]),
        ("a.|b.c", ["a.|b.c"]),  # a break at the end only is not inside
        (".a|b.c", [".a|b.c"]),
        (".a.|b.c", [".a.", "|b.c"]),  # one at each end counts, as in the authors' code
        ("a.b|c", ["a.b", "|c"]),
        ("..|a.b", ["..|a.b"]),
        ("", [""]),
        ("|", ["|"]),
    ],
)
def test_chunks_of_one_line_join_the_next(text: str, expected: list[str]) -> None:
    """`|` begins a chunk, `.` is a line break."""
    starts = [index for index, letter in enumerate(text) if letter == "|"]
    ends = chunk_ends(starts, lambda index: text[index] == ".", len(text))
    assert [text[a:b] for a, b in pairwise([0, *ends])] == expected


def test_each_chunk_is_tested_by_itself() -> None:
    """Two chunks with breaks at their edges do not become one with a break inside by being joined."""
    text = "a.|b|c.d"
    assert merge_one_liners([2, 4, 8], lambda index: text[index] == ".") == [8]


def test_steps_end_in_the_token_of_their_last_character(byte_level: Any, model: str) -> None:
    text = "so four.\n\n(check?.\n\nWait?\n\nfour.\nfour.\n\n\n</think> four.\n\nx"
    for reader in (TokenReader(byte_level), TokenReader(PreTrainedTokenizerFast.from_pretrained(model))):
        ids = reader.ids(text)
        read = reader(ids)
        ends = step_ends(read, thinking_end(ids, read, Marks(reader, ["</think>"])))
        steps = [read.between(a, b) for a, b in pairwise([0, *(end + 1 for end in ends)])]
        assert steps == ["so four.\n\n", "(check?.\n\n", "Wait?\n\nfour.\nfour.\n\n"]
    assert step_ends(read, len(ids))[-1] > ends[-1]


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.sampled_from(["so", " four", ".\n\n", "?.\n\n", "\n\n", "x.", "?", "</think>"]), max_size=30))
def test_steps_on_text_are_those_of_the_vocabulary(parts: list[str], byte_level: Any) -> None:
    """Where `.` and two newlines are one token whenever they stand together."""
    reader = TokenReader(byte_level)
    ids = [token for part in parts for token in reader.ids(part)]
    read = reader(ids)
    stop = thinking_end(ids, read, Marks(reader, ["</think>"]))
    known = vocabulary_ends(byte_level)
    apart = {i for i in range(1, len(ids)) if read.between(i - 1, i) == "." and ids[i] not in known}
    assert known == {reader.ids(".\n\n")[0], reader.ids("?.\n\n")[0]}
    assert set(step_ends(read, stop)) - apart == {i for i in range(stop) if ids[i] in known}


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [9]), (2, [4, 9]), (3, [2, 5, 9]), (10, list(range(10))), (99, None)]
)
def test_thinning_spreads_evenly_and_keeps_the_last(most: int, expected: list[int] | None) -> None:
    assert thinned(range(10), most) == (list(range(10)) if expected is None else expected)
    assert thinned([], most) == []
