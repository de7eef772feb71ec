"""One run of a comparison: builds the trainer, trains it, and writes the record."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import get_peft_config

from trl_ext_hooks import TrainerKind

from .. import api, lab
from ..campaign import job as owned
from ..errors import ConfigError
from ..plan import ownership
from ..support import versions
from ..trl_internals import arguments as trl_arguments
from ..trl_internals import scripts, seams, trainer_state
from . import records
from .processes import Said, Step, Tell
from .records import Job

_BROUGHT = ("model_name_or_path", "dataset_name", "datasets", "reward_funcs", "reward_model_name_or_path")
ROWS = 8
"""Rows of a round that a record keeps."""


class DivergedError(Exception):
    """A training of several has diverged, so that no other can follow it."""


class Watch(TrainerCallback):
    """Reports progress, stops a run that has diverged, and keeps rows of the first and the last round.

    Args:
        tell: Where to report.
        parts: Every trainer is one part of the run, which reports its progress itself.
    """

    def __init__(self, tell: Tell, parts: bool = False) -> None:
        self.tell = tell
        self.parts = parts
        self.trainer: Any = None
        self.calls: Counter[str] = Counter()
        self.names: set[str] = set()
        self.diverged: str | None = None
        self.first: list[dict[str, Any]] = []
        self.last: list[dict[str, Any]] = []

    def follow(self, trainer: Any) -> None:
        self.count_calls()
        self.trainer = trainer
        trainer.add_callback(self)

    def count_calls(self) -> None:
        """Adds up how often hooks were called, of the trainer that it follows now."""
        session = None if self.trainer is None else vars(self.trainer).get("_trl_ext")
        if session is not None:
            self.calls.update({f"{plugin}.{hook}": count for (plugin, hook), count in session.calls.items()})

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.last = sample(trainer_state.logged_round(self.trainer))
        self.first = self.first or self.last
        if state.global_step >= state.max_steps:
            control.should_log = True
            if self.trainer.eval_dataset is not None and args.eval_strategy != "no":
                control.should_evaluate = True
        if not self.parts:
            self.tell(Step(state.global_step, state.max_steps))

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        new = tuple(name for name in logs or () if name not in self.names)
        if new and not self.parts:
            self.names.update(new)
            self.tell(Step(state.global_step, state.max_steps, new))
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value) and self.diverged is None:
                self.diverged = f"{name} was {value} at step {state.global_step}"
                control.should_training_stop = True
                if self.parts:
                    raise DivergedError(self.diverged)


def train(job: Job, tell: Tell) -> None:
    """Does a run and writes its record."""
    began = time.time()
    say = partial(_say, tell)
    with contextlib.ExitStack() as stack:
        settings = job.settings | {
            "seed": job.seed,
            "output_dir": stack.enter_context(tempfile.TemporaryDirectory(prefix="trl_ext-")),
        }
        handle = stack.enter_context(api.enable(job.plugins)) if job.plugins else None
        parsed = trl_arguments.parse(job.kind, [], settings)
        whole = None
        if handle is not None and ownership.owner(handle.specs) is not None:
            watch = Watch(tell, parts=True)
            whole = owned.from_script(parsed) if job.task is None else on_task(job.task, parsed, job.sizes, say)
            whole.listeners.append(lambda step, steps: tell(Step(step, steps)))
            handle.on_trainer(watch.follow)
            with contextlib.suppress(DivergedError):
                owned.start(handle.specs, whole)
        elif job.task is None:
            watch = Watch(tell)
            with scripts.on_built(job.kind, watch.follow):
                scripts.run_script(job.kind, parsed)
        else:
            watch = Watch(tell)
            trainer = build(job.task, job.kind, parsed, job.sizes, say)
            watch.follow(trainer)
            trainer.train()
        trainer = watch.trainer
        watch.count_calls()
        history = trainer.state.log_history if whole is None else whole.history
        records.save(
            job,
            {
                "status": "finished" if watch.diverged is None else "diverged",
                "error": watch.diverged,
                "steps": trainer.state.global_step if whole is None else len(whole.history),
                "seconds": round(time.time() - began, 1),
                "model": parsed[2].model_name_or_path
                or Path(trainer.model.config.name_or_path if whole is None else whole.model).name,
                "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
                "hooks_fired": dict(watch.calls),
                "versions": versions.versions(),
                "identity": job.identity,
                "history": history,
                "completions": {"first": watch.first, "last": watch.last},
            },
        )


def build(
    task: str, kind: TrainerKind, parsed: trl_arguments.Parsed, sizes: Mapping[str, int], say: Callable[[str], None]
) -> Any:
    """A TRL trainer with TRL's arguments on a task of the lab.

    Raises:
        ConfigError: The arguments name a model, data or rewards, which the task brings.
    """
    return seams.trainer_class(kind)(args=parsed[1], **_arguments(task, kind, parsed, sizes, say))


def on_task(
    task: str, parsed: trl_arguments.Parsed, sizes: Mapping[str, int], say: Callable[[str], None]
) -> owned.LocalJob:
    """A run that a plugin owns on a task of the lab; it starts with the task's model and takes the training rows.

    Raises:
        ConfigError: As `build`.
    """
    found = _arguments(task, "dpo", parsed, sizes, say)
    return owned.LocalJob(found["model"], parsed[1], found["train_dataset"], found.get("peft_config"), None)


def _arguments(
    task: str, kind: TrainerKind, parsed: trl_arguments.Parsed, sizes: Mapping[str, int], say: Callable[[str], None]
) -> dict[str, Any]:
    for part in parsed:
        for name in _BROUGHT:
            if getattr(part, name, None):
                raise ConfigError(
                    f"task {task!r} brings its own model, data and rewards, and the settings have "
                    f"{name}={getattr(part, name)!r}. Leave out one of them."
                )
    arguments = lab.trainer_arguments(lab.task(task), kind, seed=parsed[1].seed, say=say, **sizes)
    adapter = get_peft_config(parsed[2])
    if adapter is not None:
        arguments["peft_config"] = adapter
    return arguments


def _say(tell: Tell, text: str) -> None:
    tell(Said(text))


def sample(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A few rows of a round as text and numbers: two completions each of as many prompts as there is room for."""
    seen: dict[str, int] = {}
    kept: list[dict[str, Any]] = []
    for row in rows:
        prompt = as_text(row["prompt"])
        seen[prompt] = seen.get(prompt, 0) + 1
        if seen[prompt] <= 2 and len(kept) < ROWS:
            kept.append({**row, "prompt": prompt, "completion": as_text(row["completion"])})
    return kept


def as_text(value: Any) -> str:
    """A prompt or a completion for people: the content of one message, or `role: content` of several."""
    if isinstance(value, str):
        return value
    if len(value) == 1 and not value[0].get("tool_calls"):
        return _written(value[0].get("content"))
    return "\n".join(f"{message.get('role')}: {_said(message)}" for message in value)


def _said(message: Mapping[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    parts = [_written(message.get("content")), *(f"{call['name']}({call['arguments']})" for call in calls)]
    return " ".join(part for part in parts if part)


def _written(content: Any) -> str:
    """The content of a message: a text, or blocks of which some are images."""
    if isinstance(content, list):
        return "".join(f"[{part['type']}]" if part["type"] != "text" else part["text"] for part in content)
    return str(content or "")
