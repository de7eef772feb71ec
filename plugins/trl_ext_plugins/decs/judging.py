"""Chunks of completions: where they end, and what the judge is asked about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from trl_ext_hooks.toolkit.judges import Question
from trl_ext_hooks.toolkit.segments import LineBreaks, Marks, TokenReader, chunk_ends, thinking_end


class Cutter:
    """Cuts the thinking of completions into chunks.

    Args:
        tokenizer: Of the run.
        words: Words that begin a chunk, with and without a space in front.
        thinking_mark: Where thinking ends.
    """

    def __init__(self, tokenizer: Any, words: Sequence[str], thinking_mark: str) -> None:
        self.reader = TokenReader(tokenizer)
        forms = [form for word in words for form in (word, " " + word)]
        self._words = Marks(self.reader, forms, whole_words=True)
        self._thinking_mark = Marks(self.reader, [thinking_mark])
        self._is_break = LineBreaks(self.reader)

    def __call__(self, ids: Sequence[int], written: Sequence[int]) -> tuple[list[int], list[str]]:
        """Returns where each chunk ends, exclusive, and the text of each.

        Args:
            ids: Tokens of a completion.
            written: 1 on tokens that the model wrote; others neither begin a chunk nor break a line.
        """
        read = self.reader(ids)
        starts = [token for token in self._words(ids, read) if written[token]]
        # Cut at the end of thinking first, so that the answer behind it is never redundant.
        stop = thinking_end(ids, read, self._thinking_mark)
        ends = chunk_ends(starts, lambda token: bool(written[token]) and self._is_break(ids[token]), stop)
        return ends, [read.between(start, end) for start, end in pairwise([0, *ends])]


def questions(
    cutter: Cutter, prompt: Any, answer: str, ends: Sequence[int], texts: Sequence[str], limit: int | None
) -> Iterator[Question | None]:
    """Yields what to ask about each chunk of a completion; None stands for a chunk that does not state the answer.

    Nothing is asked about a chunk without text, or where problem and chunk have more than `limit` tokens.
    """
    problem = problem_text(prompt)
    room = None if limit is None else limit - len(cutter.reader.ids(problem))
    for (start, end), text in zip(pairwise([0, *ends]), texts, strict=True):
        fits = room is None or end - start <= room
        yield Question(problem, text, answer) if fits and text.strip() else None


def problem_text(prompt: Any) -> str:
    """Returns the text of a prompt: of its last message by the user, where it is a conversation."""
    if isinstance(prompt, str):
        return prompt
    content = next((message["content"] for message in reversed(prompt) if message["role"] == "user"), "")
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
