"""Tools that rollouts can call, for TRL's `tools=[...]`: a calculator, a search over texts, and a reward.

from trl_ext.tools import Corpus, calculator
trainer = GRPOTrainer(..., tools=[calculator, Corpus(passages).search])
"""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_OPERATIONS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculator(expression: str) -> str:
    """Calculates the value of an arithmetic expression.

    Args:
        expression: Numbers, parentheses and the operators + - * / // %, such as "12 * (3 + 4)".

    Returns:
        The value.
    """
    if len(expression) > 200:
        raise ValueError("the expression is longer than 200 characters")
    return str(_value(ast.parse(expression.strip(), mode="eval").body))


def _value(node: ast.AST) -> float:
    """Evaluates a syntax tree of numbers and operators."""
    match node:
        case ast.Constant(int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](_value(left), _value(right))
        case ast.UnaryOp(operation, operand) if type(operation) in _OPERATIONS:
            return _OPERATIONS[type(operation)](_value(operand))
    raise ValueError(f"{ast.unparse(node)!r} is not arithmetic")


class Corpus:
    """Texts to be searched. The bound method `search` is the tool.

    Args:
        passages: The texts.
    """

    def __init__(self, passages: Iterable[str]) -> None:
        self.passages = [passage.strip() for passage in passages if passage.strip()]
        self._words = [Counter(_words(passage)) for passage in self.passages]
        self._passages_with = Counter(word for words in self._words for word in words)

    @classmethod
    def read(cls, path: str | Path) -> Corpus:
        """Makes a corpus of the paragraphs of a text file, which empty lines separate."""
        return cls(Path(path).read_text(encoding="utf-8").split("\n\n"))

    def search(self, query: str) -> str:
        """Finds the passage that fits a query best.

        Args:
            query: A few words to look for.

        Returns:
            The passage, or a note that nothing fits.
        """
        wanted = set(_words(query))
        # a rare word counts more than a common one, and the earlier passage wins a tie
        scores = [sum(1 / self._passages_with[word] for word in wanted if word in words) for words in self._words]
        best = max(range(len(scores)), key=scores.__getitem__, default=None)
        return "nothing found" if best is None or scores[best] == 0 else self.passages[best]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def answer_accuracy(completions: list[list[dict[str, Any]]], **kwargs: Any) -> list[float | None]:
    """Applies TRL's `accuracy_reward` to the last message of a rollout.

    By itself it reads the first message, which may be a tool call. A rollout that ends with a tool's result gave no
    answer.
    """
    from trl.rewards import accuracy_reward

    silence = {"role": "assistant", "content": ""}
    last = [
        completion[-1] if completion and completion[-1]["role"] == "assistant" else silence
        for completion in completions
    ]
    return accuracy_reward(completions=[[message] for message in last], **kwargs)
