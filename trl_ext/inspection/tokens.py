"""The text of each single token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 4
"""Bytes, and so tokens, of the longest character in UTF-8."""


def decoder(processing_class: Any) -> Callable[[Sequence[int]], str]:
    """Returns a function from token ids to text with special tokens, of a tokenizer or of a processor that has one."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def texts(decode: Callable[[Sequence[int]], str], ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
    """Returns what each token adds to the text.

    A token decoded alone loses the space in front of it with some tokenizers, and is not text at all where a character
    takes several tokens. So a token is decoded together with its neighbour on the left, and its text is the difference.

    Args:
        decode: From `decoder`.
        ids: The tokens.
        before: Tokens in front of them, whose text is left out.

    Returns:
        One text for each token, empty for a token that only begins a character. Joined, they are the decoded text.
    """
    whole = [*before[-_LONGEST:], *ids]
    skipped = len(whole) - len(ids)
    start, done = 0, skipped
    added_texts: list[str] = []
    known = decode(whole[start:done])
    for end in range(skipped + 1, len(whole) + 1):
        text = decode(whole[start:end])
        added = text[len(known) :]
        if added.endswith(_INCOMPLETE) and end - done < _LONGEST and end < len(whole):
            added_texts.append("")
            continue
        added_texts.append(added)
        start, done = done, end
        known = decode(whole[start:done])
    return added_texts
