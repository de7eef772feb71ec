"""Tasks `line-walk` and `grid-walk`: walks as environments, with a reward for every step.

The model sees where it is and calls a tool to move. The tool returns the new place, or `goal` or `stop` at the end of
the walk. The model must find out where the goal is. After warm-up it walks at random. Besides what TRL asks of an
environment, a walk has `step_rewards`, `done` and `truncated`, as every environment for rewards per step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import episode, user

GOAL, STOP, BYE = "goal", "stop", "bye"


class Walk:
    """What all walks share. The moves of a subclass are methods that return what `_go` returns.

    Attributes:
        step_rewards: The reward of every move so far.
        done: Whether the goal was reached.
        truncated: Whether the moves ran out before that.
        late_moves: How many moves came after the end. They count for nothing.
    """

    most_moves = 8
    wall = 0.0
    """The reward of a move into the border."""

    def __init__(self) -> None:
        self.step_rewards: list[float] = []
        self.done = self.truncated = False
        self.late_moves = 0
        self._place: tuple[int, ...] = ()
        self._goal: tuple[int, ...] = ()
        self._size: tuple[int, ...] = ()

    def reset(self, *, start: Sequence[int], goal: Sequence[int], size: Sequence[int], **columns: Any) -> str:
        """Begins a walk. Places and size are lists of one or two numbers."""
        self.step_rewards = []
        self.done = self.truncated = False
        self.late_moves = 0
        self._place, self._goal, self._size = tuple(start), tuple(goal), tuple(size)
        return _spelled(self._place)

    def _go(self, *delta: int) -> str:
        """Makes a move and returns what is seen then."""
        if self.done or self.truncated:
            self.late_moves += 1
            return STOP
        place = tuple(a + b for a, b in zip(self._place, delta, strict=True))
        inside = all(0 <= a < size for a, size in zip(place, self._size, strict=True))
        self._place = place if inside else self._place
        self.done = self._place == self._goal
        self.step_rewards.append(float(self.done) if inside else self.wall)
        self.truncated = not self.done and len(self.step_rewards) >= self.most_moves
        return GOAL if self.done else STOP if self.truncated else _spelled(self._place)


class Line(Walk):
    """A line of places. The reward is 1 at the goal and 0 elsewhere."""

    def move(self, by: int) -> str:
        """
        Moves along the line.

        Args:
            by: 1 or -1

        Returns:
            The place after the move
        """
        return self._go(1 if by > 0 else -1)


class Grid(Walk):
    """A grid of places. The reward is 1 at the goal, -0.05 for running into the border and 0 elsewhere."""

    most_moves = 6
    wall = -0.05

    def up(self) -> str:
        """
        Moves up.

        Returns:
            The place after the move
        """
        return self._go(0, 1)

    def down(self) -> str:
        """
        Moves down.

        Returns:
            The place after the move
        """
        return self._go(0, -1)

    def left(self) -> str:
        """
        Moves left.

        Returns:
            The place after the move
        """
        return self._go(-1, 0)

    def right(self) -> str:
        """
        Moves right.

        Returns:
            The place after the move
        """
        return self._go(1, 0)


def walked(environments: list[Walk], **columns: Any) -> list[float]:
    """Returns the sum of the rewards of all moves, less a tenth for every move after the end."""
    return [sum(walk.step_rewards) - 0.1 * walk.late_moves for walk in environments]


def behaviour(environments: list[Walk], **columns: Any) -> dict[str, list[float | None]]:
    """Reports walks that reached the goal, and numbers of moves."""
    return {
        "reached": [float(walk.done) for walk in environments],
        "moves": [float(len(walk.step_rewards)) for walk in environments],
        "moves_to_goal": [float(len(walk.step_rewards)) if walk.done else None for walk in environments],
    }


def _spelled(place: Sequence[int]) -> str:
    """Writes a place as its digits."""
    return "".join(map(str, place))


def line_rows(split: str, size: int, seed: int) -> list[Row]:
    """Repeats one walk, from the left end of five places to the right end."""
    return [{"prompt": user("at "), "start": [0], "goal": [4], "size": [5]} for _ in range(size)]


def grid_rows(split: str, size: int, seed: int) -> list[Row]:
    """Draws starts on a grid of three by three, at least two moves from the goal in the upper right corner."""
    random_state = random.Random(f"grid {split} {seed}")
    questions: list[Row] = []
    while len(questions) < size:
        start = [random_state.randrange(3), random_state.randrange(3)]
        if sum(start) <= 2:
            questions.append({"prompt": user("at "), "start": start, "goal": [2, 2], "size": [3, 3]})
    return questions


def _random_walks(walk: Walk, moves: Sequence[tuple[str, dict[str, Any]]], rows: list[Row], seed: int) -> list[Row]:
    """Plays walks in which every move is equally likely."""
    random_state = random.Random(f"walks {type(walk).__name__} {seed}")
    return [episode(walk, row, lambda observation: random_state.choice(moves), BYE) for row in rows]


def line_traces(size: int, seed: int) -> list[Row]:
    """Plays random walks on the line."""
    return _random_walks(Line(), [("move", {"by": 1}), ("move", {"by": -1})], line_rows("train", size, seed), seed)


def grid_traces(size: int, seed: int) -> list[Row]:
    """Plays random walks on the grid."""
    moves: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ("up", "down", "left", "right")]
    return _random_walks(Grid(), moves, grid_rows("train", size, seed), seed)


_WORDS = ("at ", GOAL, STOP, BYE, "-1")

LINE_WALK = Task(
    name="line-walk",
    summary="an environment: from one end of a line to the other, with a reward at the end only",
    trainers=("grpo",),
    rows=line_rows,
    rewards=(walked,),
    traces=line_traces,
    environment=Line,
    behaviour=behaviour,
    words=_WORDS,
    shape=Shape(width=48, layers=2, heads=4, feed_forward=96, positions=128),
    warm_up=WarmUp(traces=2048, steps=200, batch_size=32, learning_rate=5e-3),
    max_completion_length=88,
    train_size=256,
    test_size=32,
)

GRID_WALK = Task(
    name="grid-walk",
    summary="an environment: to a corner of a grid, with a penalty for running into the border",
    trainers=("grpo",),
    rows=grid_rows,
    rewards=(walked,),
    traces=grid_traces,
    environment=Grid,
    behaviour=behaviour,
    words=_WORDS,
    shape=Shape(width=48, layers=2, heads=4, feed_forward=96, positions=128),
    warm_up=WarmUp(traces=2048, steps=200, batch_size=32, learning_rate=5e-3),
    max_completion_length=56,
)
