"""A trainer's own state: mode, metrics, logs, tools, columns and folders, read and written for the rest of trl_ext."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trl_ext_hooks.basics import Mode


def mode(trainer: Any) -> Mode:
    return "train" if trainer.model.training else "eval"


def num_generations(trainer: Any) -> int:
    return int(trainer.num_generations if mode(trainer) == "train" else trainer.num_generations_eval)


_GROUP_SIZES = ("num_generations", "num_generations_eval")


@contextlib.contextmanager
def own_group_size(trainer: Any) -> Iterator[None]:
    """Gives the trainer its own number of generations back after the block."""
    own = {name: getattr(trainer, name) for name in _GROUP_SIZES}
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(trainer, name, value)


def use_single_rows(trainer: Any) -> None:
    """Lets TRL take each row of a round for a group of its own. See `own_group_size`.

    vLLM's server then samples a completion for each row, and the advantages, which TRL computes in a matrix of groups
    by rows, fit any number of rows. All of them are 0.
    """
    for name in _GROUP_SIZES:
        setattr(trainer, name, 1)


@contextlib.contextmanager
def drawing(trainer: Any, prompts: int | None) -> Iterator[None]:
    """Lets TRL make a training loader in the block that draws a number of prompts for each round; None for its own.

    TRL repeats each prompt `num_generations` times, and draws as many prompts as then fill the round.
    """
    with own_group_size(trainer):
        if prompts is not None:
            trainer.num_generations = trainer.args.generation_batch_size // prompts
        yield


def tool_sources(trainer: Any) -> tuple[str, ...]:
    """Names the constructor arguments that gave a trainer tools."""
    held = {"tools": "tools", "environment_factory": "environment_factories", "rollout_func": "rollout_func"}
    return tuple(name for name, attribute in held.items() if getattr(trainer, attribute, None))


def tool_iterations(trainer: Any) -> int:
    """How often TRL's tool loop may execute the calls of a row; 0 where a trainer has no tools, and so no loop."""
    return int(trainer.max_tool_calling_iterations) if getattr(trainer, "tools", None) else 0


def environments(trainer: Any) -> list[Any] | None:
    """Returns the environment of each row of the current round, or None if there are none."""
    return getattr(trainer, "environments", None)


def has_router_loss(trainer: Any) -> bool:
    """Whether a trainer adds its model's auxiliary loss for routers. TRL decides by coefficient and configuration."""
    return bool(getattr(trainer, "aux_loss_enabled", False))


def optimizer_callback(run: Callable[[], None]) -> Any:
    """Makes a callback that runs after every step of the trainer's optimizer."""
    return _callback("on_optimizer_step", run)


def step_callback(run: Callable[[], None]) -> Any:
    """Makes a callback that runs before the first micro-batch of every optimizer step."""
    return _callback("on_step_begin", run)


def _callback(event: str, run: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    def happened(self: Any, *args: Any, **kwargs: Any) -> None:
        run()

    return type("Calls", (TrainerCallback,), {event: happened})()


def add_metric(trainer: Any, name: str, value: float) -> None:
    """Adds a value that is already reduced over processes. TRL averages over the logging interval."""
    trainer._metrics[mode(trainer)][name].append(value)


def replace_last_metric(trainer: Any, name: str, value: float) -> None:
    values = trainer._metrics[mode(trainer)].get(name)
    if values:
        values[-1] = value


@contextlib.contextmanager
def only_metrics(trainer: Any, keep: Sequence[str]) -> Iterator[None]:
    """Drops what TRL records inside the block, except for some names."""
    metrics = trainer._metrics[mode(trainer)]
    before = {name: len(values) for name, values in metrics.items()}
    yield
    for name in list(metrics):
        if name not in keep:
            del metrics[name][before.get(name, 0) :]
            if not metrics[name]:
                del metrics[name]


def replace_logged_advantages(trainer: Any, values: list[float]) -> None:
    """Puts the advantages that are really used into the completions table, one float per row of the round."""
    logged = trainer._logs["advantages"]
    for _ in range(min(len(values), len(logged))):
        logged.pop()
    logged.extend(values)


def size_logs(trainer: Any, rows: int) -> None:
    """Makes the completions table as large as a round, at least as TRL makes it. It keeps what fits.

    A round of training replaces what the table held before, so it is emptied first.
    """
    size = max(int(trainer.args.generation_batch_size), rows)
    keep = rows == 0 or mode(trainer) == "eval"

    def sized(values: Any) -> deque[Any]:
        return deque(values if keep else (), maxlen=size)

    for name, values in trainer._logs.items():
        if isinstance(values, deque):
            trainer._logs[name] = sized(values)
        else:
            columns = {key: sized(column) for key, column in values.items()}
            trainer._logs[name] = defaultdict(lambda: deque(maxlen=size), columns if keep else {})


def drop_logged_rows(trainer: Any, drop: Sequence[bool]) -> None:
    """Takes rows of the last round out of the completions table.

    Args:
        trainer: GRPO or RLOO.
        drop: For each row of the round whether it goes.
    """
    for values in trainer._logs.values():
        for column in [values] if isinstance(values, deque) else values.values():
            if len(column) >= len(drop):
                rows = [column.pop() for _ in drop][::-1]
                column.extend(row for row, goes in zip(rows, drop, strict=True) if not goes)


@contextlib.contextmanager
def environments_of(trainer: Any, source: Sequence[int] | None) -> Iterator[None]:
    """Lets reward functions see the environment of each row in the block, where a rollout added rows."""
    own = environments(trainer)
    if not own or source is None:
        yield
        return
    trainer.environments = [own[place] for place in source]
    try:
        yield
    finally:
        trainer.environments = own


def forget_round(trainer: Any) -> None:
    """Lets the next micro-batch begin a new round, whatever is left of the last one."""
    if hasattr(trainer, "_buffered_inputs"):  # DPO generates none
        trainer._step = 0


def prompt_text(trainer: Any, prompt: Any) -> str:
    """Returns a prompt as the trainer gives it to the policy, messages through its chat template."""
    if isinstance(prompt, str):
        return prompt
    return trainer.processing_class.apply_chat_template(
        prompt,
        tools=getattr(trainer, "tools", None) or None,
        chat_template=getattr(trainer, "chat_template", None),
        add_generation_prompt=True,
        tokenize=False,
        **(getattr(trainer, "chat_template_kwargs", None) or {}),
    )


def logged_completions(trainer: Any) -> list[Any]:
    """Returns the completions of the last round, as text or messages."""
    return list(trainer._logs["completion"])


def logged_round(trainer: Any) -> list[dict[str, Any]]:
    """Returns the rows of the last round: `prompt`, `completion`, `advantage`, and `rewards` by name. DPO has none."""
    logs = getattr(trainer, "_logs", None)
    if not logs or "prompt" not in logs:
        return []
    size = len(logs["prompt"])
    columns = {name: [None] * (size - len(values)) + list(values) for name, values in logs["rewards"].items()}
    rewards = [{name: values[row] for name, values in columns.items()} for row in range(size)]
    rows = zip(logs["prompt"], logs["completion"], logs["advantages"], rewards, strict=True)
    return [dict(zip(("prompt", "completion", "advantage", "rewards"), row, strict=True)) for row in rows]


def set_collator(trainer: Any, collator: Any) -> None:
    """Exchanges the collator, and lets TRL find out anew which columns it drops."""
    trainer.data_collator = collator
    forget_columns(trainer)


def training_data(trainer: Any) -> Any:
    """Returns the training data with the columns that the trainer's loader leaves in. None where they are a stream."""
    from datasets import Dataset
    from torch.utils.data import IterableDataset

    data = trainer.train_dataset
    if isinstance(data, Dataset):
        return trainer._remove_unused_columns(data, description="training")
    # a stream of datasets is one of torch's too
    return None if isinstance(data, IterableDataset) else data


def forget_columns(trainer: Any) -> None:
    """Lets TRL find out anew which columns it keeps with `remove_unused_columns`."""
    trainer._signature_columns = None


def checkpoint_folder(trainer: Any, trial: Any) -> str:
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    return os.path.join(trainer._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
