"""Environments of Gymnasium for TRL's `environment_factory`: an episode is a conversation in which a tool acts.

    from trl_ext.environments import episode_return, gym

    Lake = gym("FrozenLake-v1", actions=["left", "down", "right", "up"], is_slippery=False)
    trainer = GRPOTrainer(
        ..., environment_factory=Lake, reward_funcs=[episode_return], train_dataset=Dataset.from_list(Lake.rows(64))
    )

README.md beside this file is the guide. Needs `pip install "trl_ext[environments]"`.
"""

from __future__ import annotations

from .adapter import GymEnvironment, gym
from .observations import minigrid_text
from .rewards import episode_return, success

__all__ = ["GymEnvironment", "episode_return", "gym", "minigrid_text", "success"]
