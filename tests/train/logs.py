"""Log entries as TRL writes them."""

from __future__ import annotations


def training(step: int, good: float = 0.0, reward: float = 0.0, length: float = 8.0) -> dict[str, float]:
    logs = {"loss": 0.1, "rewards/good/mean": good, "rewards/good/std": 0.5, "reward": reward}
    return logs | {"completions/mean_length": length, "step": step}


def evaluation(step: int, good: float) -> dict[str, float]:
    logs = {"eval_loss": 0.1, "eval_rewards/good/mean": good, "eval_reward": good}
    return logs | {"eval_completions/mean_length": 4.0, "step": step}
