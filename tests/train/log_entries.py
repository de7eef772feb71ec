"""Log entries as TRL writes them."""


def training(step, good=0.0, reward=0.0, length=8.0):
    """Returns the entry of a training step."""
    logs = {"loss": 0.1, "rewards/good/mean": good, "rewards/good/std": 0.5, "reward": reward}
    return logs | {"completions/mean_length": length, "step": step}


def evaluation(step, good):
    """Returns the entry of an evaluation."""
    logs = {"eval_loss": 0.1, "eval_rewards/good/mean": good, "eval_reward": good}
    return logs | {"eval_completions/mean_length": 4.0, "step": step}
