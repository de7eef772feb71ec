"""Checks of data and reward functions before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trl_ext_hooks import TrainerKind

from ..catalog.declaration import PluginSpec, needed_columns
from ..errors import ConfigError
from ..plan.ownership import owner
from ..support.reward_functions import parameters, reward_functions
from ..trl_internals import arguments as trl_arguments
from ..trl_internals import rewards as trl_rewards
from ..trl_internals import steps
from .reward_check import SKIP, check_rewards, try_in_own_process

__all__ = ["check", "check_rewards"]

_COLUMNS: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": ("prompt",),
    "rloo": ("prompt",),
    "dpo": ("chosen", "rejected"),
}
"""Columns that TRL's trainers need."""


def check(
    kind: TrainerKind,
    parsed: trl_arguments.Parsed,
    specs: Sequence[PluginSpec],
    warn: Callable[[str], None],
    rewards: bool = True,
) -> None:
    """Loads the data, checks what the trainer will find in them, and tries the reward functions.

    Args:
        kind: The trainer.
        parsed: TRL's arguments.
        specs: The plugins of the run.
        warn: Called with a sentence about what may fail later.
        rewards: Whether to look at the reward functions.

    Raises:
        ConfigError: The data cannot be loaded, lacks a split or a column or is too small, or a reward function cannot
            be used.
    """
    names = [] if kind == "dpo" else list(getattr(parsed[0], "reward_funcs", None) or ())
    functions = reward_functions(names)
    _check_weights(parsed, names, specs)
    try:
        splits = trl_arguments.load_splits(parsed)
    except Exception as error:  # whatever the data library raises, with its text
        reasons = [error, error.__cause__] if error.__cause__ is not None else [error]
        texts = [f"{type(reason).__name__}: {reason}" for reason in reasons]
        raise ConfigError(f"the training data cannot be loaded: {' '.join(texts)}") from error
    if splits is None:
        return
    owned = owner(specs) is not None
    # a plugin that owns the run makes its own pairs, and evaluates in its own way
    needed = ("prompt",) if owned else _COLUMNS[kind]
    parts = {"training": _split(parsed, splits, "dataset_train_split")}
    if not owned and parsed[1].eval_strategy != "no":
        parts["evaluation"] = _split(parsed, splits, "dataset_test_split")
    elif not owned and parsed[1].eval_on_start:
        raise ConfigError(
            "eval_on_start=True evaluates before the first step, and with eval_strategy='no' the trainer gets no data "
            "for it. Set --eval_strategy steps (or epoch), or leave eval_on_start out."
        )
    rows = {part: _first_row(part, data, kind, needed) for part, data in parts.items()}
    if not owned and not any("groups" in spec.claims for spec in specs):  # they may draw fewer prompts than TRL
        steps.check_rows(kind, parsed[1], parts["training"])
    if rewards and kind != "dpo":
        for part, row in rows.items():
            kept = trl_arguments.kept_columns(kind, parsed[1], list(row), needed_columns(specs))
            _check_arguments(trl_rewards.of_trl(names) | functions, part, list(row), kept, specs)
        _try_rewards(kind, parsed[1], functions, parts["training"], warn, specs)


def _check_weights(parsed: trl_arguments.Parsed, names: Sequence[str], specs: Sequence[PluginSpec]) -> None:
    """Compares the number of weights with that of reward functions. Environments may bring one more.

    Raises:
        ConfigError: The numbers differ.
    """
    weights = getattr(parsed[1], "reward_weights", None)
    count = len(names) + bool(getattr(parsed[0], "reward_model_name_or_path", None))
    if weights is not None and len(weights) != count and count and not _gives_tools(specs):
        raise ConfigError(
            f"reward_weights has {len(weights)} numbers, and there are {count} reward functions. Give each of them a "
            f"weight, or leave reward_weights out."
        )


def _split(parsed: trl_arguments.Parsed, splits: Any, setting: str) -> Any:
    """Returns a split of the data.

    Args:
        parsed: TRL's arguments.
        splits: All splits by name.
        setting: The setting that names the split.

    Raises:
        ConfigError: There is no such split.
    """
    script, training, _, mixture = parsed
    name = getattr(script, setting)
    if name in splits:
        return splits[name]
    text = f"the data cannot be used: there is no split {name!r}; there is {', '.join(map(repr, splits))}."
    if setting == "dataset_train_split":
        raise ConfigError(f"{text} Name the split to train on with --{setting}.")
    evaluation = str(getattr(training.eval_strategy, "value", training.eval_strategy))
    ways = f"Name another one with --{setting}, or set --eval_strategy no."
    if mixture.datasets:
        ways = "Set --test_split_size, such as 0.1, to divide the mixture, or set --eval_strategy no."
    raise ConfigError(f"{text} eval_strategy={evaluation!r} needs it for evaluation. {ways}")


def _first_row(part: str, data: Any, kind: TrainerKind, needed: Iterable[str]) -> Mapping[str, Any]:
    """Returns the first row of a part of the data.

    Raises:
        ConfigError: There is none, or it lacks a column that the trainer needs.
    """
    row: Mapping[str, Any] | None = next(iter(data.take(1)), None)
    if row is None:
        raise ConfigError(f"the {part} data has no rows.")
    missing = [name for name in needed if name not in row and f"{name}_ids" not in row]
    if missing:
        raise ConfigError(
            f"the {part} data has no column {missing[0]!r}, which the {kind.upper()} trainer needs; it has "
            f"{', '.join(row)}. Rename a column, or choose other data."
        )
    return row


def _check_arguments(
    functions: Mapping[str, Callable[..., Any]],
    part: str,
    columns: Sequence[str],
    kept: Sequence[str],
    specs: Sequence[PluginSpec],
) -> None:
    """Compares what reward functions take with what the trainer will pass.

    Args:
        functions: The functions by name or path.
        part: Which part of the data this is, in a word.
        columns: The columns of the data.
        kept: Those of them that reach reward functions.
        specs: The plugins of the run, which may pass more.

    Raises:
        ConfigError: A function takes what nobody passes, or a column has the name of something that is passed.
    """
    passed = set(trl_rewards.ARGUMENTS)
    available = passed | (set(kept) - set(trl_rewards.NOT_PASSED)) | _found(specs)
    for path, function in functions.items():
        named, required = parameters(function)
        twice = trl_rewards.taken_twice(kept)
        # the trainer replaces a column of one of these names
        hidden = [name for name in kept if name in named & {"trainer_state", "log_extra", "log_metric", "environments"}]
        for name in [twice, *hidden] if twice else hidden:
            raise ConfigError(
                f"the {part} data has a column {name!r}, and reward functions such as {path!r} get an argument of that "
                f"name from the trainer. Rename the column. {SKIP}"
            )
        missing = sorted(required - available)
        if not missing or (_gives_tools(specs) and missing[0] not in columns):
            continue  # rollouts may bring what is missing
        name = missing[0]
        if name in columns and name not in kept:
            fix = f"remove_unused_columns=True drops it. Set --remove_unused_columns false. {SKIP}"
        elif name in ("prompt", "completion"):
            fix = f"The trainer passes {name + 's'!r}: use this name in the function. {SKIP}"
        elif name == "environments":
            fix = f"Nothing gives the trainer an `environment_factory`; add a plugin that does. {SKIP}"
        else:
            fix = (
                f"The {part} data has no such column; it has {', '.join(columns)}. Rename a column, or choose other "
                f"data or another reward function. {SKIP}"
            )
        raise ConfigError(f"reward function {path!r} takes {name!r}, which the trainer will not pass. {fix}")


def _found(specs: Sequence[PluginSpec]) -> set[str]:
    """Returns the names of what plugins find in a rollout and pass to reward functions."""
    return {name for spec in specs for name in spec.cls.fields}


def _gives_tools(specs: Sequence[PluginSpec]) -> bool:
    """Tells whether a plugin gives the trainer tools, environments or rollouts, which pass more to reward functions."""
    return any("trainer_arguments" in spec.hooks for spec in specs)


def _try_rewards(
    kind: TrainerKind,
    args: Any,
    functions: Mapping[str, Callable[..., Any]],
    data: Any,
    warn: Callable[[str], None],
    specs: Sequence[PluginSpec],
) -> None:
    """Calls the user's reward functions on rows as one process has them in training, in whole groups.

    Raises:
        ConfigError: A function does not return one number (or None) per completion.
    """
    if not functions:
        return
    group = int(args.num_generations)
    count = min(int(args.train_batch_size) * int(args.steps_per_generation), 2 * group)
    prompts = list(data.take(-(-count // group)))
    kept = trl_arguments.kept_columns(kind, args, list(prompts[0]), needed_columns(specs))
    rows = [{name: row[name] for name in kept} for row in prompts for _ in range(group)][:count]
    state = {
        "max_steps": steps.planned_steps(kind, args, row_count(data)),
        "num_train_epochs": max(1, round(args.num_train_epochs)),
        "train_batch_size": args.train_batch_size,
    }
    try_in_own_process(list(functions), rows, state, warn, _found(specs))


def row_count(data: Any) -> int | None:
    """Returns the number of rows, None for a stream."""
    try:
        return len(data)
    except TypeError:
        return None
