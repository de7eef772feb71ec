"""Tasks with real environments: Frozen Lake of Gymnasium, and an empty room of MiniGrid in words and in pictures.

The model calls the tool `act` of `trl_ext.environments.gym`. Gymnasium is needed only when one of these tasks is used.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from ...environments import GymEnvironment, gym, minigrid_view
from ..definition import Row, Shape, Task, WarmUp
from ..messages import episode, user

OVER, BYE = "over", "bye"
LAKE_MOVES = {"left": -1, "down": 4, "right": 1, "up": -4}
HOLES = {5, 7, 11, 12}
ROOM_MOVES = {"left": 0, "right": 1, "forward": 2}
HELD_OUT = 1_000_000
"""The seeds of held-out rows begin here."""


@functools.cache
def lake() -> type[GymEnvironment]:
    """Makes the lake: four by four fields of ice that is not slippery, with four holes. A field is a number."""
    return gym("FrozenLake-v1", actions=list(LAKE_MOVES), is_slippery=False, max_steps=12, over=OVER)


@functools.cache
def room() -> type[GymEnvironment]:
    """Makes the room in words: three by three fields, a start anywhere, the goal in the lower right corner."""
    return gym(
        "minigrid:MiniGrid-Empty-Random-5x5-v0", actions=ROOM_MOVES, observe=minigrid_view, max_steps=10, over=OVER
    )


@functools.cache
def pictured_room() -> type[GymEnvironment]:
    """Makes the same room in pictures from above, with eight by eight pixels for a field, walls included."""
    return gym(
        "minigrid:MiniGrid-Empty-Random-5x5-v0",
        actions=ROOM_MOVES,
        render="image",
        tile_size=8,
        highlight=False,
        observe=no_text,
        max_steps=10,
        over=OVER,
    )


def no_text(observation: Any) -> str:
    """Leaves out the mission, which is the same in every episode of the room."""
    return ""


def make_lake() -> GymEnvironment:
    """Makes an environment of the lake."""
    return lake()()


def make_room() -> GymEnvironment:
    """Makes an environment of the room in words."""
    return room()()


def make_pictured_room() -> GymEnvironment:
    """Makes an environment of the room in pictures."""
    return pictured_room()()


def played(environments: Sequence[GymEnvironment], **columns: Any) -> list[float | None]:
    """Returns the sum of rewards, less a tenth for every action after the end, or None if the environment failed."""
    return [None if episode.failure else episode.total_reward - 0.1 * episode.late_actions for episode in environments]


def behaviour(environments: Sequence[GymEnvironment], **columns: Any) -> dict[str, list[float | None]]:
    """Reports episodes that reached the goal, their actions, and invalid actions."""
    steps = [float(len(episode.step_rewards)) for episode in environments]
    return {
        "reached": [float(episode.success) for episode in environments],
        "steps": list(steps),
        "steps_to_goal": [
            number if episode.success else None for number, episode in zip(steps, environments, strict=True)
        ],
        "invalid": [float(episode.invalid_actions) for episode in environments],
    }


def lake_rows(split: str, size: int, seed: int) -> list[Row]:
    """Repeats the same row, as the lake has one start."""
    return [{"prompt": user("at "), "seed": 0} for _ in range(size)]


def room_rows(split: str, size: int, seed: int) -> list[Row]:
    """Makes a seed for every row, which sets place and direction at the start."""
    first = size * seed + (HELD_OUT if split == "test" else 0)
    return [{"prompt": user("see "), "seed": first + number} for number in range(size)]


def lake_traces(size: int, seed: int) -> list[Row]:
    """Plays random walks that go down or right more often, and avoid nine holes out of ten."""

    def move(draw: random.Random, observation: str) -> str:
        choice = draw.choices(list(LAKE_MOVES), (1, 3, 3, 1))[0]
        if int(observation) + LAKE_MOVES[choice] in HOLES and draw.random() < 0.9:
            return move(draw, observation)
        return choice

    return _traces(lake(), lake_rows("train", size, seed), f"lake {seed}", move)


def room_traces(size: int, seed: int) -> list[Row]:
    """Plays walks in which every move is equally likely."""
    return _traces(room(), room_rows("train", size, seed), f"room {seed}", _any_move)


def pictured_room_traces(size: int, seed: int) -> list[Row]:
    """Plays the same walks, seen from above."""
    return _traces(pictured_room(), room_rows("train", size, seed), f"room {seed}", _any_move)


def _any_move(draw: random.Random, observation: Any) -> str:
    return draw.choice(list(ROOM_MOVES))


def _traces(
    kind: type[GymEnvironment], rows: list[Row], name: str, move: Callable[[random.Random, Any], str]
) -> list[Row]:
    """Plays episodes with the moves that a function chooses."""
    draw, environment = random.Random(name), kind()
    return [
        episode(environment, row, lambda observation: ("act", {"action": move(draw, observation)}), BYE) for row in rows
    ]


_NUMBERS = tuple(str(number) for number in range(10, 16))
_SEEN = ("wall ", "green goal ", " ahead", " left", " right", ", ")

FROZEN_LAKE = Task(
    name="frozen-lake",
    summary="an environment of Gymnasium: over the ice to the other corner, around the holes",
    trainers=("grpo",),
    rows=lake_rows,
    rewards=(played,),
    traces=lake_traces,
    environment=make_lake,
    behaviour=behaviour,
    words=("at ", *LAKE_MOVES, *_NUMBERS, f"\n{OVER}", OVER, BYE),
    shape=Shape(width=48, layers=2, heads=4, feed_forward=96, positions=160),
    warm_up=WarmUp(traces=2048, steps=400, batch_size=32, learning_rate=5e-3),
    max_completion_length=136,
    train_size=256,
    test_size=32,
)

MINIGRID = Task(
    name="minigrid",
    summary="an environment of MiniGrid: to the goal in an empty room, seen in words",
    trainers=("grpo",),
    rows=room_rows,
    rewards=(played,),
    traces=room_traces,
    environment=make_room,
    behaviour=behaviour,
    words=("see ", *ROOM_MOVES, *_SEEN, f"\n{OVER}", OVER, BYE),
    shape=Shape(width=48, layers=2, heads=4, feed_forward=96, positions=256),
    warm_up=WarmUp(traces=2048, steps=200, batch_size=32, learning_rate=5e-3),
    max_completion_length=208,
    train_size=256,
    test_size=64,
)

MINIGRID_VIEW = Task(
    name="minigrid-view",
    summary="an environment of MiniGrid: to the goal in an empty room, seen in pictures",
    trainers=("grpo",),
    rows=room_rows,
    rewards=(played,),
    traces=pictured_room_traces,
    environment=make_pictured_room,
    behaviour=behaviour,
    words=("see ", *ROOM_MOVES, OVER, BYE),
    shape=Shape(architecture="qwen2-vl", width=48, layers=2, heads=4, feed_forward=96, positions=512, picture=40),
    warm_up=WarmUp(traces=1024, steps=150, batch_size=32, learning_rate=5e-3),
    max_completion_length=400,
    train_size=256,
    test_size=64,
)
