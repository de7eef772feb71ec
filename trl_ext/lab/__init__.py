"""Lab of small language models and tasks with verifiable answers, for offline experiments of minutes on two cores.

    from trl import GRPOConfig, GRPOTrainer
    from trl_ext import lab

    task = lab.task("modes")
    args = GRPOConfig("run", max_completion_length=task.max_completion_length, use_cpu=True, bf16=False)
    GRPOTrainer(args=args, **lab.trainer_arguments(task, "grpo")).train()

A task brings prompts, answers and rewards, and traces on which its model is warmed up before the first use. A task of
your own is a `Task` object. README.md beside this file shows one.
"""

from __future__ import annotations

from .definition import Shape, Task, WarmUp
from .find import task, tasks
from .model import model_folder
from .trainer_arguments import trainer_arguments

__all__ = ["Shape", "Task", "WarmUp", "model_folder", "task", "tasks", "trainer_arguments"]
