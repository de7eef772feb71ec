"""Environments of Gymnasium for TRL's `environment_factory`. An episode is a conversation with calls of one tool.

    from trl_ext.environments import episode_return, gym

    Lake = gym("FrozenLake-v1", actions=["left", "down", "right", "up"], is_slippery=False)
    trainer = GRPOTrainer(
        ..., environment_factory=Lake, reward_funcs=[episode_return], train_dataset=Dataset.from_list(Lake.rows(64))
    )

README.md beside this file is the guide. Needs `pip install "trl_ext[environments]"`.
"""

from __future__ import annotations

from .adapter import gym
from .episode import GymEnvironment
from .observations import minigrid_text, minigrid_view
from .rewards import episode_return, success

__all__ = ["GymEnvironment", "episode_return", "gym", "minigrid_text", "minigrid_view", "success"]
