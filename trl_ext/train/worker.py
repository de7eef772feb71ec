"""The process that trains: one per device, started by `trl_ext train` through accelerate's launcher."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ..support import child_errors
from . import command_line


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and returns an exit code; errors are left to the parent to tell."""
    try:
        _train(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the last one to see it
        return child_errors.record(error)
    return 0


def _train(argv: list[str]) -> None:
    # what TRL uses of transformers is none of the user's business; `python -W` or PYTHONWARNINGS bring it back
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    args, rest = command_line.Parser().parse_known_args(argv)
    asked = command_line.understand(args, rest)

    from .. import api
    from ..campaign import job
    from ..trl_internals import arguments, scripts
    from . import preflight
    from .progress import Progress

    first = os.environ.get("RANK", "0") == "0"
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(api.enable(asked.plugins)) if asked.plugins else None
        parsed = arguments.parse(asked.kind, asked.arguments, asked.settings)
        owner = job.owner(asked.specs)
        if first:
            fields = {name for spec in asked.specs for name in spec.cls.fields}
            columns = ("prompt",) if owner else None
            preflight.check(asked.kind, parsed, _warn, rewards=not args.no_reward_check, columns=columns, fields=fields)
        progress = Progress(asked, parsed, lines=not _wants_bars(asked))

        def built(trainer: Any) -> None:
            progress.follow(trainer)
            if args.inspect:
                api.record(trainer, args.inspect)

        if handle is not None:
            handle.on_trainer(built)
        else:
            stack.enter_context(scripts.on_built(asked.kind, built))
        if owner is not None:
            job.start(asked.specs, _owned_job(asked, parsed))
        elif asked.task is None:
            scripts.run_script(asked.kind, parsed, save=not args.no_save)
        else:
            _train_on_task(asked.task, asked, parsed, save=not args.no_save)


def _train_on_task(task: str, asked: command_line.Request, parsed: Any, save: bool) -> None:
    """What TRL's script does for model and data that are named, for a task of the lab."""
    from .on_task import build_trainer

    trainer = build_trainer(task, asked.kind, parsed, asked.sizes, _warn)
    trainer.train(resume_from_checkpoint=parsed[1].resume_from_checkpoint)
    if save:
        trainer.save_model(parsed[1].output_dir)


def _owned_job(asked: command_line.Request, parsed: Any) -> Any:
    """The run that a plugin owns, on the model and data that are named or on a task of the lab."""
    if asked.task is None:
        from ..campaign.job import from_script

        return from_script(parsed)
    from .on_task import build_job

    return build_job(asked.task, parsed, asked.sizes, _warn)


def _wants_bars(asked: command_line.Request) -> bool:
    """Whether the user asked for TRL's own progress bars by setting `disable_tqdm: false`."""
    from ..trl_internals import launch

    given = launch.split(asked.kind, asked.arguments, asked.settings).given
    return given.get("disable_tqdm") is False


def _warn(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
