"""Calculations from left to right in the last digit: `3+4*7` is 7, then 9.

One step is easy to know by heart. Several steps in one go are beyond a model of two layers, and easy when it writes the
steps down. Operands are such that no digit is more likely than another, so guessing is right one time in ten.
"""

from __future__ import annotations

import dataclasses
import random

_OPERANDS = {"+": "123456789", "*": "379"}


@dataclasses.dataclass(frozen=True)
class Chain:
    """A calculation: its first digit, and operators with their operands such as `("+4", "*7")`."""

    first: int
    operations: tuple[str, ...]

    @classmethod
    def draw(cls, length: int, random_state: random.Random) -> Chain:
        operations = []
        for _ in range(length):
            operator = random_state.choice("+*")
            operations.append(operator + random_state.choice(_OPERANDS[operator]))
        return cls(random_state.randrange(10), tuple(operations))

    @property
    def text(self) -> str:
        return f"{self.first}{''.join(self.operations)}"

    @property
    def values(self) -> list[int]:
        """What every operation leads to."""
        found, value = [], self.first
        for operation in self.operations:
            operand = int(operation[1])
            value = (value + operand if operation[0] == "+" else value * operand) % 10
            found.append(value)
        return found

    @property
    def answer(self) -> str:
        return str(self.values[-1])
