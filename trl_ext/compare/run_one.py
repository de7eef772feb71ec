"""One run of a comparison: the trainer is built and trained, and the record is written."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from .. import api
from ..campaign import job
from ..plan import ownership
from ..support import versions
from ..train import on_task
from ..trl_internals import arguments as trl_arguments
from ..trl_internals import scripts, trainer_state
from . import store
from .child_process import Said, Step, Tell
from .runs import Run
from .samples import sample


class DivergedError(Exception):
    """Says that one of several trainings has diverged, so that no other can follow it."""


class Watch(TrainerCallback):
    """Reports progress, stops a run that has diverged, and keeps rows of the first and the last round.

    Args:
        tell: Where to report.
        several: Whether the run trains several times and reports its progress itself.
    """

    def __init__(self, tell: Tell, several: bool = False) -> None:
        self.tell = tell
        self.several = several
        self.trainer: Any = None
        self.calls: Counter[str] = Counter()
        self.names: set[str] = set()
        self.diverged: str | None = None
        self.first: list[dict[str, Any]] = []
        self.last: list[dict[str, Any]] = []

    def follow(self, trainer: Any) -> None:
        """Watches a trainer, instead of the one before."""
        self.count_calls()
        self.trainer = trainer
        trainer.add_callback(self)

    def count_calls(self) -> None:
        """Adds how often hooks were called by the trainer that is watched now."""
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
        if not self.several:
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
        if new and not self.several:
            self.names.update(new)
            self.tell(Step(state.global_step, state.max_steps, new))
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value) and self.diverged is None:
                self.diverged = f"{name} was {value} at step {state.global_step}"
                control.should_training_stop = True
                if self.several:
                    raise DivergedError(self.diverged)


def train(run: Run, tell: Tell) -> None:
    """Does a run and writes its record."""
    began = time.time()

    def say(text: str) -> None:
        tell(Said(text))

    with contextlib.ExitStack() as stack:
        settings = run.settings | {
            "seed": run.seed,
            "output_dir": stack.enter_context(tempfile.TemporaryDirectory(prefix="trl_ext-")),
        }
        handle = stack.enter_context(api.enable(run.plugins)) if run.plugins else None
        parsed = trl_arguments.parse(run.kind, [], settings)
        campaign = None
        if handle is not None and ownership.owner(handle.specs) is not None:
            # a plugin owns the run and builds several trainers, one after the other
            watch = Watch(tell, several=True)
            if run.task is None:
                campaign = job.from_script(parsed)
            else:
                campaign = on_task.build_job(run.task, parsed, run.sizes, say)
            campaign.listeners.append(lambda step, steps: tell(Step(step, steps)))
            handle.on_trainer(watch.follow)
            with contextlib.suppress(DivergedError):
                job.start(handle.specs, campaign)
        elif run.task is None:
            watch = Watch(tell)
            with scripts.on_built(run.kind, watch.follow):
                scripts.run_script(run.kind, parsed)
        else:
            watch = Watch(tell)
            trainer = on_task.build_trainer(run.task, run.kind, parsed, run.sizes, say)
            watch.follow(trainer)
            trainer.train()
        trainer = watch.trainer
        watch.count_calls()
        history = trainer.state.log_history if campaign is None else campaign.history
        model = trainer.model.config.name_or_path if campaign is None else campaign.model
        store.save(
            run,
            {
                "status": "finished" if watch.diverged is None else "diverged",
                "error": watch.diverged,
                "steps": trainer.state.global_step if campaign is None else len(history),
                "seconds": round(time.time() - began, 1),
                "model": parsed[2].model_name_or_path or Path(model).name,
                "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
                "hooks_fired": dict(watch.calls),
                "versions": versions.versions(),
                "identity": run.identity,
                "history": history,
                "completions": {"first": watch.first, "last": watch.last},
            },
        )
