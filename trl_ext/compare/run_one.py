"""One run of a comparison: the trainer is built and trained, and the record is written."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
import weakref
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

    What the record of the run needs is kept as plain values, so that a trainer goes when its training has ended.

    Args:
        tell: Where to report.
        several: Whether the run trains several times and reports its progress itself.

    Attributes:
        state: The state of the last trainer.
        parameters: The number of parameters of its model.
        model: The name or path of its model.
    """

    def __init__(self, tell: Tell, several: bool = False) -> None:
        self.tell = tell
        self.several = several
        self.state: Any = None
        self.parameters = 0
        self.model = ""
        self._trainer: weakref.ref[Any] | None = None
        self._counts: list[Counter[tuple[str, str]]] = []
        self.names: set[str] = set()
        self.diverged: str | None = None
        self.first: list[dict[str, Any]] = []
        self.last: list[dict[str, Any]] = []

    @property
    def trainer(self) -> Any:
        """The trainer that is watched. Watching does not keep it alive."""
        return None if self._trainer is None else self._trainer()

    @property
    def calls(self) -> dict[str, int]:
        """How often each hook of each plugin was called by all trainers so far."""
        return {f"{plugin}.{hook}": count for (plugin, hook), count in sum(self._counts, Counter()).items()}

    def follow(self, trainer: Any) -> None:
        """Watches a trainer, instead of the one before."""
        self._trainer = weakref.ref(trainer)
        self.state = trainer.state
        self.parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        self.model = trainer.model.config.name_or_path
        host = vars(trainer).get("_trl_ext")
        if host is not None:
            self._counts.append(host.calls)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.state = state

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
        history = watch.state.log_history if campaign is None else campaign.history
        model = watch.model if campaign is None else campaign.model
        store.save(
            run,
            {
                "status": "finished" if watch.diverged is None else "diverged",
                "error": watch.diverged,
                "steps": watch.state.global_step if campaign is None else len(history),
                "seconds": round(time.time() - began, 1),
                "model": parsed[2].model_name_or_path or Path(model).name,
                "parameters": watch.parameters,
                "hooks_fired": watch.calls,
                "versions": versions.versions(),
                "identity": run.identity,
                "history": history,
                "completions": {"first": watch.first, "last": watch.last},
            },
        )
