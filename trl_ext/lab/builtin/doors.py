"""Task `doors`: a row of doors as an environment. Every door has a sign, every sign a key, and every open door pays.

The model sees the sign of the door before it and calls a tool to try a key. The tool returns the sign of the door that
is then before it, which is the same one if the key was wrong, or `out` or `late` at the end. The warmed-up model has a
faint idea of which key belongs to a sign. A reward for the whole episode mixes right and wrong keys of up to eight
tries, and a reward per step does not.
"""

from __future__ import annotations

import random
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import episode, user

KEYS = {"a": 3, "b": 1, "c": 4, "d": 2}
"""The key of a door, by its sign."""
DOORS, MOST_TRIES = 6, 8
OUT, LATE, BYE = "out", "late", "bye"


class Doors:
    """The environment. Every open door pays one sixth, so an episode pays 1 if all six are open.

    Attributes:
        step_rewards: The reward of every try so far.
        done: Whether all doors are open or eight keys were tried. The number of tries is a rule of the task, which the
            model can count, so the episode is not truncated.
        opened: How many doors are open.
        late_tries: How many keys were tried after the end. They count for nothing.
    """

    truncated = False

    def __init__(self) -> None:
        self.step_rewards: list[float] = []
        self.done = False
        self.opened = self.late_tries = 0
        self._signs = ""

    def reset(self, *, signs: str, **columns: Any) -> str:
        """Begins before the first door. `signs` has a letter for each door."""
        self.step_rewards = []
        self.done = False
        self.opened = self.late_tries = 0
        self._signs = signs
        return signs[0]

    def turn(self, key: int) -> str:
        """
        Tries a key at the door.

        Args:
            key: 1 to 4

        Returns:
            The sign of the door that comes now
        """
        if self.done:
            self.late_tries += 1
            return LATE
        fits = KEYS[self._signs[self.opened]] == key
        self.opened += fits
        self.step_rewards.append(fits / DOORS)
        self.done = self.opened == DOORS or len(self.step_rewards) == MOST_TRIES
        if not self.done:
            return self._signs[self.opened]
        return OUT if self.opened == DOORS else LATE


def opened(environments: list[Doors], **columns: Any) -> list[float]:
    """Returns the share of open doors, which is the sum of the rewards of all tries."""
    return [doors.opened / DOORS for doors in environments]


def behaviour(environments: list[Doors], **columns: Any) -> dict[str, list[float | None]]:
    """Reports episodes in which all doors opened, keys tried, the share that fitted, and keys tried after the end."""
    tries = [len(doors.step_rewards) for doors in environments]
    return {
        "out": [float(doors.opened == DOORS) for doors in environments],
        "tries": [float(number) for number in tries],
        "fitted": [
            doors.opened / number if number else None for doors, number in zip(environments, tries, strict=True)
        ],
        "late": [float(doors.late_tries) for doors in environments],
    }


def rows(split: str, size: int, seed: int) -> list[Row]:
    """Draws six signs for each row."""
    random_state = random.Random(f"doors {split} {seed}")
    return [{"prompt": user("door "), "signs": "".join(random_state.choices("abcd", k=DOORS))} for _ in range(size)]


def traces(size: int, seed: int) -> list[Row]:
    """Plays episodes that try the right key twice as often as any other."""
    random_state, doors = random.Random(f"doors traces {seed}"), Doors()
    keys = list(KEYS.values())

    def choose(observation: str) -> tuple[str, dict[str, Any]]:
        return "turn", {"key": random_state.choice([*keys, KEYS[observation]])}

    return [episode(doors, row, choose, BYE) for row in rows("train", size, seed)]


ROW_OF_DOORS = Task(
    name="doors",
    summary="an environment: a row of doors, each with a sign that tells its key, with a reward for every door",
    trainers=("grpo",),
    rows=rows,
    rewards=(opened,),
    traces=traces,
    environment=Doors,
    behaviour=behaviour,
    words=("door ", OUT, LATE, BYE),
    shape=Shape(width=48, layers=2, heads=4, feed_forward=96, positions=128),
    warm_up=WarmUp(traces=2048, steps=1000, batch_size=32, learning_rate=5e-3),
    max_completion_length=88,
    train_size=256,
    test_size=32,
)
