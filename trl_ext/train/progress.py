"""What a person sees of a run: a line per step, a line per evaluation, and a summary at the end."""

from __future__ import annotations

import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from ..support.tables import duration
from ..trl_internals.arguments import Parsed
from . import log_metrics, summary
from .command_line import Request


class Progress(TrainerCallback):
    """Follows one trainer: prints lines on the main process, and evaluates at the end where it was at the start.

    Args:
        asked: What the user asked for.
        parsed: TRL's arguments.
        lines: Print lines in place of transformers' bars and dictionaries; False leaves those alone.
    """

    def __init__(self, asked: Request, parsed: Parsed, lines: bool) -> None:
        self.asked = asked
        self.parsed = parsed
        self.lines = lines
        self.trainer: Any = None
        self.begun = time.time()
        self.first_step = 0
        self.busy = 0.0
        self._step_began = 0.0

    def follow(self, trainer: Any) -> None:
        """Takes the place of the progress reports of a trainer that was just built."""
        self.trainer = trainer
        if self.lines:
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
        trainer.add_callback(self)
        if self.parsed[1].resume_from_checkpoint is not None:
            _resume(trainer, self.parsed[1].resume_from_checkpoint)

    # --- called by the trainer ---

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.begun = time.time()
        self.first_step = state.global_step
        if self.lines and state.is_world_process_zero and self.first_step:
            print(f"continuing after step {self.first_step}", flush=True)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step_began = time.time()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.busy += time.time() - self._step_began
        if state.global_step >= state.max_steps:
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
            return  # the totals at the end of training
        digits = len(str(state.max_steps))
        where = "held-out " if evaluation else f"step {state.global_step:>{digits}}/{state.max_steps}"
        parts = [
            f"{label} {value:.3f}" for label, value in log_metrics.shown(logs, "eval_" if evaluation else "").items()
        ]
        if not evaluation:
            parts.append(f"left {duration(self._left(state))}")
        print(f"{where:<{2 * digits + 6}}  {'  '.join(parts)}", flush=True)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            summary.report(self.trainer, self.asked, self.parsed, time.time() - self.begun)

    def _left(self, state: TrainerState) -> float:
        done = max(1, state.global_step - self.first_step)
        return self.busy / done * (state.max_steps - state.global_step)


def _resume(trainer: Any, value: Any) -> None:
    """TRL's scripts before 1.15 do not hand the setting on to `train`."""
    train = trainer.train

    def resuming(*args: Any, **kwargs: Any) -> Any:
        if not args:
            kwargs.setdefault("resume_from_checkpoint", value)
        return train(*args, **kwargs)

    trainer.train = resuming
