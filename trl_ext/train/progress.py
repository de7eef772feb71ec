"""Progress of a run: a line per step and per evaluation, and the summary at the end."""

from __future__ import annotations

import time
import weakref
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from ..engine.attach import host_of
from ..support.tables import duration
from ..trl_internals.arguments import Parsed
from ..trl_internals.steps import StepsCheck
from . import log_metrics, summary
from .command_line import Request


class Progress(TrainerCallback):
    """Follows one trainer and prints lines on the main process.

    Where the trainer evaluates before the first step, it also evaluates after the last one.

    Args:
        request: What the user asked for.
        parsed: TRL's arguments.
        lines: Whether to print lines in place of transformers' bars and dictionaries.
    """

    def __init__(self, request: Request, parsed: Parsed, lines: bool) -> None:
        self.request = request
        self.parsed = parsed
        self.lines = lines
        self._trainer: weakref.ref[Any] | None = None
        self._train_began = time.time()
        self._first_step = 0
        self._seconds_in_steps = 0.0
        self._step_began = 0.0

    @property
    def trainer(self) -> Any:
        """The trainer that is followed. Following does not keep it alive: a run may have several, one after another."""
        return None if self._trainer is None else self._trainer()

    def follow(self, trainer: Any) -> None:
        """Replaces the progress reports of a trainer that was just built."""
        self._trainer = weakref.ref(trainer)
        if self.lines:
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
        if host_of(trainer) is None:  # plugins bring this check along
            trainer.add_callback(StepsCheck())
        trainer.add_callback(self)
        if self.parsed[1].resume_from_checkpoint is not None:
            _resume(trainer, self.parsed[1].resume_from_checkpoint)

    # --- called by the trainer ---

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._train_began = time.time()
        self._first_step = state.global_step
        if self.lines and state.is_world_process_zero and self._first_step:
            print(f"continuing after step {self._first_step}", flush=True)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step_began = time.time()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds_in_steps += time.time() - self._step_began
        if state.global_step >= state.max_steps:
            # the last step is logged whatever `logging_steps` is
            control.should_log = True
            if args.eval_on_start and self.trainer.eval_dataset is not None:
                control.should_evaluate = True

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not (self.lines and state.is_world_process_zero and logs):
            return
        evaluation = log_metrics.is_evaluation(logs)
        if not (evaluation or log_metrics.is_training(logs)):
            return  # totals at the end of training
        digits = len(str(state.max_steps))
        where = "held-out " if evaluation else f"step {state.global_step:>{digits}}/{state.max_steps}"
        values = [
            f"{label} {value:.3f}" for label, value in log_metrics.shown(logs, "eval_" if evaluation else "").items()
        ]
        if not evaluation:
            values.append(f"left {duration(self._left(state))}")
        print(f"{where:<{2 * digits + 6}}  {'  '.join(values)}", flush=True)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            summary.write_summary(self.trainer, self.request, self.parsed, time.time() - self._train_began)

    def _left(self, state: TrainerState) -> float:
        """Estimates the seconds that are left."""
        done = max(1, state.global_step - self._first_step)
        return self._seconds_in_steps / done * (state.max_steps - state.global_step)


def _resume(trainer: Any, value: Any) -> None:
    """Hands the setting on to `train`, which TRL's scripts before 1.15 do not."""
    train = trainer.train

    def resuming(*args: Any, **kwargs: Any) -> Any:
        if not args:
            kwargs.setdefault("resume_from_checkpoint", value)
        return train(*args, **kwargs)

    trainer.train = resuming
