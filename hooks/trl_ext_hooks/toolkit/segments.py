"""Segments of completions: decoded text with a map back to tokens, and cuts into chunks and steps.

    reader = TokenReader(tokenizer)
    read = reader(completion_ids)
    read.text, read.ends                     # the text, and where the text of each token ends
    read.tokens_of(r"\\.\\n\\n")               # which tokens hold the matches: (first, last) of each

Methods cut completions at words or line breaks and then work on tokens. Whether a word is one token depends on the
tokenizer. So cuts are found on token ids where that is exact, and on decoded text everywhere else. A tokenizer is
anything with the methods `encode` and `decode` of transformers.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

_BROKEN = "\ufffd"  # what a part of a character decodes to


@dataclass(frozen=True)
class Read:
    """Tokens as text.

    Attributes:
        text: All tokens decoded, special ones included.
        ends: For each token the number of characters up to its end. A token that holds only the first bytes of a
            character ends before it: the character belongs to the token that completes it.
    """

    text: str
    ends: tuple[int, ...]

    def token_at(self, character: int) -> int:
        """Returns the token that holds a character of the text."""
        return bisect_right(self.ends, character)

    def tokens_of(self, pattern: str | re.Pattern[str]) -> list[tuple[int, int]]:
        """Returns for each match of a pattern the tokens that hold its first and its last character."""
        matches = (match.span() for match in re.finditer(pattern, self.text))
        return [(self.token_at(start), self.token_at(end - 1)) for start, end in matches if end > start]

    def between(self, start: int, end: int) -> str:
        """Returns the text of the tokens `start .. end - 1`."""
        first = self.ends[start - 1] if start else 0
        return self.text[first : self.ends[end - 1]] if end > start else ""


class TokenReader:
    """Decodes tokens with a map from characters back to tokens.

    Some tokenizers drop a leading space, so tokens are decoded behind an anchor token. The text of each token is looked
    up once and remembered, so reading takes one decode of the whole and one look-up per token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
        self._anchor: int = self.ids("a")[-1]
        self._before = self._decode([self._anchor])
        self._pieces: dict[int, str] = {}

    def __call__(self, ids: Sequence[int]) -> Read:
        ids = list(ids)
        text, pieces = self._behind_anchor(ids), self._split(ids)
        ends = accumulate(len(piece) for piece in pieces) if "".join(pieces) == text else self._prefixes(ids, text)
        return Read(text, tuple(ends))

    def ids(self, text: str) -> list[int]:
        """Returns the token ids of a text, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def single(self, text: str) -> int | None:
        """Returns the id of a text that is one token and decodes to itself, or None."""
        ids = self.ids(text)
        return ids[0] if len(ids) == 1 and self.piece(ids[0]) == text else None

    def piece(self, token: int) -> str:
        """Returns the text of one token."""
        if token not in self._pieces:
            self._pieces[token] = self._behind_anchor([token])
        return self._pieces[token]

    def _split(self, ids: list[int]) -> list[str]:
        """Returns the text of each token.

        The bytes of one character may lie in several tokens. A token that is text by itself begins and ends with whole
        characters. So the tokens between two such tokens can be decoded together, apart from the rest.
        """
        pieces: list[str] = []
        start = 0
        while start < len(ids):
            end = start
            while end < len(ids) and _BROKEN in self.piece(ids[end]):
                end += 1
            if end == start:
                pieces.append(self.piece(ids[start]))
                start += 1
                continue
            text = self._behind_anchor(ids[start:end])
            pieces += [text[a:b] for a, b in pairwise([0, *self._prefixes(ids[start:end], text)])]
            start = end
        return pieces

    def _prefixes(self, ids: list[int], text: str) -> list[int]:
        """Returns where each token's text ends by decoding every prefix. Exact, and slow for many tokens."""
        ends: list[int] = []
        for count in range(1, len(ids)):
            prefix = self._behind_anchor(ids[:count])
            equal = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), len(prefix))
            ends.append(max(min(equal, len(text)), ends[-1] if ends else 0))
        return [*ends, len(text)] if ids else []

    def _behind_anchor(self, ids: list[int]) -> str:
        text = self._decode([self._anchor, *ids])
        return text[len(self._before) :] if text.startswith(self._before) else self._decode(ids)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


class Marks:
    """Finds the tokens at which one of several strings begins: by id where a string is one token, else on the text.

    Args:
        reader: Reader of the tokenizer.
        strings: What to look for.
        whole_words: Whether to leave out what is part of a longer word. Applies to the text only.
    """

    def __init__(self, reader: TokenReader, strings: Sequence[str], *, whole_words: bool = False) -> None:
        singles = {text: reader.single(text) for text in strings}
        self.ids = frozenset(token for token in singles.values() if token is not None)
        self.on_text = tuple(text for text, token in singles.items() if token is None)
        self._pattern = re.compile("|".join(_escaped(text, whole_words) for text in self.on_text))

    def __call__(self, ids: Sequence[int], read: Read) -> list[int]:
        """Returns the indices of the tokens, ascending."""
        indices = {index for index, token in enumerate(ids) if token in self.ids}
        if self.on_text:
            indices |= {first for first, _ in read.tokens_of(self._pattern)}
        return sorted(indices)


def _escaped(text: str, whole_words: bool) -> str:
    before = r"(?<!\w)" if whole_words and text[0].isalnum() else ""
    return before + re.escape(text) + (r"(?!\w)" if whole_words and text[-1].isalnum() else "")


class LineBreaks:
    """Tells whether a token is a line break: one of `strings` or, if these are not all single tokens, any newline."""

    STRINGS = ("\n", " \n", "\n\n", " \n\n", ".\n", ".\n\n")

    def __init__(self, reader: TokenReader, strings: Sequence[str] = STRINGS) -> None:
        singles = [reader.single(text) for text in strings]
        self.ids = None if None in singles else frozenset(singles)
        self._reader = reader

    def __call__(self, token: int) -> bool:
        return "\n" in self._reader.piece(token) if self.ids is None else token in self.ids


def thinking_end(ids: Sequence[int], read: Read, mark: Marks) -> int:
    """Returns the index of the first token of the first mark, or the number of tokens where there is none."""
    return next(iter(mark(ids, read)), len(ids))


def merge_one_liners(ends: Sequence[int], breaks: Callable[[int], bool]) -> list[int]:
    """Joins every segment without an inner line break to the next one. The last segment stays as it is.

    It has one if a break comes after its first and one before its last token that is not itself a break.

    Args:
        ends: Where each segment ends, exclusive; the first begins at 0.
        breaks: Whether a token is a line break.
    """
    kept_ends = []
    for number, (start, end) in enumerate(pairwise([0, *ends])):
        is_break = [breaks(token) for token in range(start, end)]
        plain = [token for token, flag in enumerate(is_break) if not flag]
        has_inner_break = bool(plain) and any(is_break[plain[0] :]) and any(is_break[: plain[-1]])
        if has_inner_break or number == len(ends) - 1:
            kept_ends.append(end)
    return kept_ends


def chunk_ends(starts: Sequence[int], breaks: Callable[[int], bool], length: int) -> list[int]:
    """Cuts tokens `0 .. length - 1` before every index of `starts`, and joins chunks of one line to the next chunk.

    Returns:
        Where each chunk ends, exclusive; at least one.
    """
    cuts = sorted({start for start in starts if 0 < start < length})
    return merge_one_liners([*cuts, length], breaks)


def step_ends(read: Read, stop: int, pattern: str = r"\.\n\n") -> list[int]:
    """Returns the tokens that end a step: those with the last character of a match, before the token `stop`.

    Args:
        read: The completion.
        stop: Where steps end.
        pattern: What ends a step.

    Returns:
        Indices, inclusive and ascending.
    """
    return sorted({last for _, last in read.tokens_of(pattern) if last < stop})


def vocabulary_ends(tokenizer: Any, suffix: str = ".ĊĊ") -> frozenset[int]:
    """Returns the ids of tokens whose entry in the vocabulary ends so.

    Byte-level vocabularies write `.\\n\\n` as `.ĊĊ`.
    """
    vocabulary = getattr(tokenizer, "tokenizer", tokenizer).get_vocab()
    return frozenset(token for text, token in vocabulary.items() if text.endswith(suffix))


def thinned(ends: Sequence[int], most: int) -> list[int]:
    """Returns at most `most` of the steps, evenly spread, the last one always among them."""
    if len(ends) <= most:
        return list(ends)
    return [ends[(number + 1) * len(ends) // most - 1] for number in range(most)]
