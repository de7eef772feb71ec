"""Chains of calculations, from left to right in the last digit: `3+4*7` is 7, then 9.

A model of two layers can know one step by heart. It cannot do several steps at once, unless it writes them down.
Operands are chosen so that all digits are equally likely, so guessing is right one time in ten.
"""

from __future__ import annotations

import dataclasses
import random

_OPERANDS = {"+": "123456789", "*": "379"}


@dataclasses.dataclass(frozen=True)
class Chain:
    """A calculation.

    Attributes:
        first: The first digit.
        operations: Operators with their operands, such as `("+4", "*7")`.
    """

    first: int
    operations: tuple[str, ...]

    @classmethod
    def draw(cls, length: int, random_state: random.Random) -> Chain:
        """Draws a chain of so many operations."""
        operations = []
        for _ in range(length):
            operator = random_state.choice("+*")
            operations.append(operator + random_state.choice(_OPERANDS[operator]))
        return cls(random_state.randrange(10), tuple(operations))

    @property
    def text(self) -> str:
        """The calculation as it is asked."""
        return f"{self.first}{''.join(self.operations)}"

    @property
    def values(self) -> list[int]:
        """The result after every operation."""
        values, value = [], self.first
        for operation in self.operations:
            operand = int(operation[1])
            value = (value + operand if operation[0] == "+" else value * operand) % 10
            values.append(value)
        return values

    @property
    def answer(self) -> str:
        """The last result."""
        return str(self.values[-1])
