"""Progress of a run: what it does at the moment, a line per step and per evaluation, and the summary at the end."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from ..engine.attach import host_of
from ..plan.ownership import owner
from ..trl_internals.arguments import Parsed
from ..trl_internals.steps import StepsCheck, ends_round
from . import log_metrics, output_folder, summary
from .command_line import Request
from .display import Display, left_text
from .interrupt import Worker
from .time_left import EVALUATION, SAVING, STEP, TimeLeft, parts_ahead


class Progress(TrainerCallback):
    """Follows one trainer and prints lines on the main process.

    Where the trainer evaluates before the first step, it also evaluates after the last one.

    Args:
        request: What the user asked for.
        parsed: TRL's arguments.
        lines: Whether to print lines in place of transformers' bars and dictionaries.
        interrupt: Tells of Ctrl-C.
    """

    def __init__(self, request: Request, parsed: Parsed, lines: bool, interrupt: Worker | None = None) -> None:
        self.request = request
        self.parsed = parsed
        self.lines = lines
        self.interrupt = interrupt or Worker()
        self._trainer: weakref.ref[Any] | None = None
        self._display: Display | None = None
        self._train_began = time.time()
        self._first_step = 0
        self._training = False
        self._leaving = False
        self._batches = 0
        self._time = TimeLeft()

    @property
    def trainer(self) -> Any:
        """The trainer that is followed. Following does not keep it alive: a run may have several, one after another."""
        return None if self._trainer is None else self._trainer()

    def follow(self, trainer: Any) -> None:
        """Replaces the progress reports of a trainer that was just built."""
        self._trainer = weakref.ref(trainer)
        self._time = TimeLeft()
        if self.lines:
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
        if host_of(trainer) is None:  # plugins bring this check along
            trainer.add_callback(StepsCheck())
        trainer.add_callback(self)
        _wrap(trainer, "evaluate", self._evaluation_begins, self._evaluation_ended)
        _wrap(trainer, "save_model", self._saving_begins, self._model_saved)
        if self.parsed[1].resume_from_checkpoint is not None:
            _resume(trainer, self.parsed[1].resume_from_checkpoint)

    def interrupted(self) -> None:
        """Writes the record of a training that Ctrl-C ends at once. Called on every process."""
        trainer = self.trainer
        if self._training and trainer is not None and trainer.state.is_world_process_zero:
            self._record("interrupted")

    def close(self) -> None:
        """Ends the display."""
        if self._display is not None:
            self._display.close()
            self._display = None

    # --- called by the trainer ---

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._train_began = time.time()
        self._first_step = state.global_step
        self._training = True
        # until now there was nothing to save, so Ctrl-C left at once
        self.interrupt.waits = self.request.save_on_interrupt
        if not state.is_world_process_zero:
            return
        if self.request.overwrite:
            output_folder.clear(Path(args.output_dir))
        self._record("running")
        if self.lines:
            self.close()
            self._display = Display(bar=sys.stderr.isatty())
            if self._first_step:
                print(f"continuing after step {self._first_step}", flush=True)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._time.begin(STEP)
        if self._display is not None:
            self._display.detail(f"step {state.global_step + 1}/{state.max_steps}")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._time.end(STEP)
        self._show_time(state)
        if state.global_step >= state.max_steps:
            # the last step is logged whatever `logging_steps` is
            control.should_log = True
            if args.eval_on_start and self.trainer.eval_dataset is not None:
                control.should_evaluate = True
        elif (
            self.interrupt.waits
            and ends_round(self.request.kind, args, state.global_step - self._first_step)
            and self.interrupt.agreed(self.trainer.accelerator)
        ):
            # `on_save` leaves
            self._leaving = control.should_save = control.should_log = True

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._batches += 1
        if self._display is not None:
            loader: Any = kwargs.get("eval_dataloader")
            of = f"/{len(loader)}" if hasattr(loader, "__len__") else ""
            self._display.detail(f"evaluating, batch {self._batches}{of}")

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
        of = f"/{state.max_steps}" if state.max_steps >= state.global_step else ""
        where = "held-out " if evaluation else f"step {state.global_step:>{digits}}{of}"
        values = [
            f"{label} {value:.3f}" for label, value in log_metrics.shown(logs, "eval_" if evaluation else "").items()
        ]
        if not evaluation:
            values.append(left_text(*self._left(state, control)))
        print(f"{where:<{2 * digits + 6}}  {'  '.join(values)}", flush=True)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._time.end(SAVING)
        self._show_time(state)
        if not self._leaving:
            return
        trainer = self.trainer
        if state.is_world_process_zero:
            self._summarize("interrupted")
        # a process that leaves takes the others with it, so none leaves before everything is written
        trainer.accelerator.wait_for_everyone()
        if hasattr(trainer, "end"):  # trackers and the process group
            trainer.end()
        raise KeyboardInterrupt

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._training = self.interrupt.waits = False
        if state.is_world_process_zero:
            self._summarize("finished")

    # --- ---

    def _summarize(self, status: str) -> None:
        self.close()
        summary.write_summary(self.trainer, self.request, self.parsed, time.time() - self._train_began, status)

    def _record(self, status: str) -> None:
        summary.write_record(self.trainer, self.request, self.parsed, time.time() - self._train_began, status)

    def _evaluation_begins(self) -> None:
        self._batches = 0
        self._time.begin(EVALUATION)
        step = self.trainer.state.global_step
        self._tell(f"evaluating {f'after step {step}' if step else 'before training'}")

    def _evaluation_ended(self) -> None:
        self._time.end(EVALUATION)

    def _saving_begins(self) -> None:
        self._time.begin(SAVING)
        if self._training:
            self._tell(f"saving checkpoint-{self.trainer.state.global_step}")
        elif self.lines and self.trainer.state.is_world_process_zero:
            self._display = self._display or Display(bar=sys.stderr.isatty())
            self._tell(f"saving the model into {self.trainer.args.output_dir}")

    def _model_saved(self) -> None:
        if not self._training:  # of a checkpoint it is a part
            self._time.end(SAVING)
            self.close()

    def _tell(self, text: str) -> None:
        if self._display is not None:
            self._display.part(text)

    def _show_time(self, state: TrainerState) -> None:
        if self._display is not None:
            self._display.time(self._time.spent, *self._left(state))

    def _left(self, state: TrainerState, control: TrainerControl | None = None) -> tuple[float, bool]:
        """Estimates the seconds that are left, with what the current step still has to do."""
        trainer = self.trainer
        saves = self.request.save and owner(self.request.specs) is None
        ahead = parts_ahead(trainer.args, state, evaluates=trainer.eval_dataset is not None, saves=saves)
        if control is not None:
            ahead[EVALUATION] += bool(control.should_evaluate)
            ahead[SAVING] += bool(control.should_save)
        return self._time.left(ahead)


def _wrap(trainer: Any, name: str, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Calls something before and after a method of one trainer."""
    method = getattr(trainer, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        result = method(*args, **kwargs)
        after()
        return result

    setattr(trainer, name, wrapped)


def _resume(trainer: Any, value: Any) -> None:
    """Hands the setting on to `train`, which TRL's scripts before 1.15 do not."""
    train = trainer.train

    def resuming(*args: Any, **kwargs: Any) -> Any:
        if not args:
            kwargs.setdefault("resume_from_checkpoint", value)
        return train(*args, **kwargs)

    trainer.train = resuming
