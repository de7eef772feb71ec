"""Worker process of `trl_ext train`, one per device, started through accelerate's launcher."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..support import child_errors
from ..support.tables import duration
from . import handover, interrupt
from .command_line import Request, say


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the request in the file `argv[0]` asks for, and returns the exit code.

    Errors are left for the parent to print.
    """
    press = interrupt.Worker()
    try:
        with press.listening():
            try:
                _train(list(sys.argv[1:] if argv is None else argv), press)
            except Exception as error:  # nobody above would see it
                if press.told and not press.waits:  # another process left first
                    return child_errors.note_interruption()
                return child_errors.write_error(error)
    except KeyboardInterrupt:
        return child_errors.note_interruption()
    return 0


def _train(argv: list[str], press: interrupt.Worker) -> None:
    # which deprecated parts of transformers TRL uses is not the user's concern; `python -W` brings the warnings back
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    request = handover.read(Path(argv[0]))

    from .. import api
    from ..campaign import job
    from ..plan import ownership
    from ..trl_internals import arguments, late_refusals, scripts
    from . import display, preflight
    from .progress import Progress

    is_first = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(api.enable_specs(request.specs)) if request.specs else None
        parsed = arguments.parse(request.kind, request.arguments, request.settings)
        late_refusals.check(request.kind, parsed)
        owner = ownership.owner(request.specs)
        if not request.bars and not (is_first and sys.stderr.isatty()):
            display.no_library_bars()
        if is_first:
            say("checking the data" + (" and the reward functions" if request.check_rewards else ""))
            preflight.check(request.kind, parsed, request.specs, _warn, rewards=request.check_rewards)
            say(f"loading the model {parsed[2].model_name_or_path or f'of the task {request.task}'}")
        progress = Progress(request, parsed, lines=not request.bars, interrupt=press)
        stack.callback(progress.close)
        loading_began = time.monotonic()

        def built(trainer: Any) -> None:
            if is_first and progress.trainer is None:
                say(f"the trainer is ready after {duration(time.monotonic() - loading_began)}")
            progress.follow(trainer)
            if request.inspect is not None:
                api.record(trainer, request.inspect)

        if handle is not None:
            handle.on_trainer(built)
        else:
            stack.enter_context(scripts.on_built(request.kind, built))
        try:
            if owner is not None:
                job.start(request.specs, _owned_job(request, parsed))
            elif request.task is None:
                scripts.run_script(request.kind, parsed, save=request.save)
            else:
                _train_on_task(request.task, request, parsed, save=request.save)
        except KeyboardInterrupt:
            progress.interrupted()
            raise


def _train_on_task(task: str, request: Request, parsed: Any, save: bool) -> None:
    """Trains on a task of the lab, as TRL's script does on model and data that are named."""
    from .on_task import build_trainer

    trainer = build_trainer(task, request.kind, parsed, request.sizes, _warn)
    trainer.train(resume_from_checkpoint=parsed[1].resume_from_checkpoint)
    if save:
        trainer.save_model(parsed[1].output_dir)


def _owned_job(request: Request, parsed: Any) -> Any:
    """Returns the run that a plugin owns, on the named model and data or on a task of the lab."""
    if request.task is None:
        from ..campaign.job import from_script

        return from_script(parsed)
    from .on_task import build_job

    return build_job(request.task, parsed, request.sizes, _warn)


def _warn(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
