"""Task `number-line`: a line of numbers as an environment, from one number to the one that is asked for.

The model sees both, as in `3>7`, and calls a tool to move up or down by one. A move that leads nearer pays its share of
the way, and a move that leads away costs as much. The warmed-up model goes the right way a little more often than not.
A reward for the whole episode is the way made in the end, whatever the order of right and wrong moves.
"""

from __future__ import annotations

import random
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import episode, user

NUMBERS, NEAREST, FARTHEST, MOST_MOVES = 10, 3, 6, 8
RIGHT_WAY = 0.65
"""Share of the moves in the traces that lead nearer."""
THERE, LATE, BYE = "there", "late", "bye"


class NumberLine:
    """The environment: numbers from 0 to 9. An episode that arrives pays 1.

    Attributes:
        step_rewards: The reward of every move so far.
        done: Whether the goal was reached or eight moves were made, which is a rule of the task.
        arrived: Whether the goal was reached.
        late_moves: How many moves came after the end. They count for nothing.
    """

    truncated = False

    def __init__(self) -> None:
        self.step_rewards: list[float] = []
        self.done = self.arrived = False
        self.late_moves = 0
        self._at = self._goal = 0
        self._way = 1

    def reset(self, *, start: int, goal: int, **columns: Any) -> str:
        """Begins at one number and asks for another."""
        self.step_rewards = []
        self.done = self.arrived = False
        self.late_moves = 0
        self._at, self._goal, self._way = start, goal, abs(goal - start)
        return self._seen()

    def move(self, by: int) -> str:
        """
        Moves to the next number.

        Args:
            by: 1 or -1

        Returns:
            The number where one is, and the one asked for
        """
        if self.done:
            self.late_moves += 1
            return LATE
        nearer = (by > 0) == (self._goal > self._at)
        self.step_rewards.append((1 if nearer else -1) / self._way)
        self._at = min(max(self._at + (1 if by > 0 else -1), 0), NUMBERS - 1)
        self.arrived = self._at == self._goal
        self.done = self.arrived or len(self.step_rewards) == MOST_MOVES
        return self._seen() if not self.done else THERE if self.arrived else LATE

    def _seen(self) -> str:
        return f"{self._at}>{self._goal}"


def way_made(environments: list[NumberLine], **columns: Any) -> list[float]:
    """Returns the sum of the rewards of all moves."""
    return [sum(line.step_rewards) for line in environments]


def behaviour(environments: list[NumberLine], **columns: Any) -> dict[str, list[float | None]]:
    """Reports episodes that arrived, their moves, the share of moves that led nearer, and moves after the end."""
    moves = [len(line.step_rewards) for line in environments]
    nearer = [sum(reward > 0 for reward in line.step_rewards) for line in environments]
    return {
        "arrived": [float(line.arrived) for line in environments],
        "moves": [float(number) for number in moves],
        "nearer": [right / number if number else None for right, number in zip(nearer, moves, strict=True)],
        "late": [float(line.late_moves) for line in environments],
    }


def rows(split: str, size: int, seed: int) -> list[Row]:
    """Draws two numbers that are three to six apart."""
    random_state = random.Random(f"number line {split} {seed}")
    questions: list[Row] = []
    while len(questions) < size:
        start, goal = random_state.randrange(NUMBERS), random_state.randrange(NUMBERS)
        if NEAREST <= abs(goal - start) <= FARTHEST:
            questions.append({"prompt": user("at "), "start": start, "goal": goal})
    return questions


def traces(size: int, seed: int) -> list[Row]:
    """Plays episodes whose moves lead nearer more often than away."""
    random_state, line = random.Random(f"number line traces {seed}"), NumberLine()

    def choose(observation: str) -> tuple[str, dict[str, Any]]:
        at, goal = observation.split(">")
        right = 1 if goal > at else -1
        return "move", {"by": right if random_state.random() < RIGHT_WAY else -right}

    return [episode(line, row, choose, BYE) for row in rows("train", size, seed)]


NUMBER_LINE = Task(
    name="number-line",
    summary="an environment: to a number that is asked for, one by one, with a reward for every move",
    trainers=("grpo",),
    rows=rows,
    rewards=(way_made,),
    traces=traces,
    environment=NumberLine,
    behaviour=behaviour,
    words=("at ", THERE, LATE, BYE, "-1"),
    shape=Shape(width=48, layers=2, heads=4, feed_forward=96, positions=160),
    warm_up=WarmUp(traces=2048, steps=600, batch_size=32, learning_rate=5e-3),
    max_completion_length=112,
    train_size=256,
    test_size=64,
)
