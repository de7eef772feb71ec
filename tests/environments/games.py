"""Environments that misbehave, each at a step that its seed says. Imported by name, here and in worker processes."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import gymnasium
import numpy


class Counting(gymnasium.Env[Any, Any]):
    """Counts its steps from the seed on; ends, with reward 1, after as many steps as the seed says."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Discrete(1000)

    def __init__(self) -> None:
        self.seed = self.taken = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.seed, self.taken = seed or 0, 0
        return self.seed, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.taken += 1
        over = self.taken == self.seed
        if over:
            self.happens()
        return self.seed + self.taken, self.reward(over), over, False, {}

    def happens(self) -> None:
        """What else happens at the last step."""

    def reward(self, over: bool) -> float:
        return float(over)


class Raising(Counting):
    def happens(self) -> None:
        raise KeyError("a broken wall")


class Dying(Counting):
    def happens(self) -> None:
        os.abort()


class Exiting(Counting):
    def happens(self) -> None:
        os._exit(3)


class Leaving(Counting):
    def happens(self) -> None:
        sys.exit(2)


class Answering(Counting):
    """Gives back what it is told, with an observation and `info`."""

    def __init__(self, *answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def step(self, action: int) -> Any:
        return (0, *self.answer, {})


class Hanging(Counting):
    def happens(self) -> None:
        time.sleep(600)


class Chatty(Counting):
    def happens(self) -> None:
        print("hello from the environment")


class NaN(Counting):
    def reward(self, over: bool) -> float:
        return float("nan") if over else 0.5


class Broken(Counting):
    """Cannot be reset from seed 13, and not the first time from seed 7."""

    tries = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict[str, Any]]:
        Broken.tries += 1
        if seed == 13 or (seed == 7 and Broken.tries == 1):
            raise ConnectionError("no server")
        return super().reset(seed=seed)


class Painted(Counting):
    """Has a picture, whose brightness is the observation."""

    render_mode = "rgb_array"

    def render(self) -> Any:
        return numpy.full((4, 6, 3), self.seed + self.taken, numpy.uint8)


class Told(Counting):
    """Says in `info` that it did not succeed."""

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return (*super().step(action)[:4], {"is_success": False})
