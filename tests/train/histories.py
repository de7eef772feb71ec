"""Log entries as TRL writes them, and trainers after their runs."""

import types


def training(step, good=0.0, reward=0.0, length=8.0):
    """Returns the entry of a training step."""
    logs = {"loss": 0.1, "rewards/good/mean": good, "rewards/good/std": 0.5, "reward": reward}
    return logs | {"completions/mean_length": length, "step": step}


def evaluation(step, good):
    """Returns the entry of an evaluation."""
    logs = {"eval_loss": 0.1, "eval_rewards/good/mean": good, "eval_reward": good}
    return logs | {"eval_completions/mean_length": 4.0, "step": step}


def finished(folder, history):
    """Returns a trainer after its run, as far as the summary reads it, and its parsed arguments."""
    state = types.SimpleNamespace(log_history=history, global_step=2, max_steps=2)
    accelerator = types.SimpleNamespace(num_processes=1, device="cpu")
    args = types.SimpleNamespace(output_dir=str(folder), seed=3)
    return types.SimpleNamespace(state=state, accelerator=accelerator, args=args), (
        types.SimpleNamespace(dataset_name="data"),
        args,
        types.SimpleNamespace(model_name_or_path="model"),
        types.SimpleNamespace(datasets=[]),
    )
