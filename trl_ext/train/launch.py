"""Launch of a training run: early checks, defaults for this machine, and worker processes through accelerate."""

from __future__ import annotations

import dataclasses
import datetime
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..engine.checkpoint import STATE_FILE
from ..errors import ConfigError, counted
from ..plan import ownership
from ..support import child_errors
from ..trl_internals import late_refusals
from ..trl_internals import launch as trl_launch
from . import (
    after_interrupt,
    command_line,
    config_keys,
    handover,
    interrupt,
    output_folder,
    repeat,
    written_run,
)
from .command_line import Request, as_arguments, say

NO_CHECKPOINTS = ("--save_strategy", "no")


def launch(
    request: Request,
    command: Sequence[str],
    demo_settings: Mapping[str, Any] | None = None,
    write_to: str | None = None,
) -> int:
    """Trains in worker processes and returns the exit code.

    Args:
        request: What the user asked for.
        command: The command line of the user, for the record of the run.
        demo_settings: Settings of TRL that replace those of the embedded default, if that is what is trained.
        write_to: A file into which the run is written, instead of training.

    Raises:
        ConfigError: The run cannot work. No process has been started by then.
    """
    if request.config is not None:
        own = [*command_line.BLOCKS, "env", *command_line.file_keys()]
        config_keys.check(request.config, request.kind, request.settings, own, request.specs)
    divided = trl_launch.split(request.kind, request.arguments, request.settings)
    # these may refuse, so they come before anything that takes time
    demo = request.task is None and wants_demo(divided.given)
    defaults: dict[str, Any] = {}
    if demo:
        from . import demo as embedded

        plugins = [spec.name for spec in request.specs]
        embedded.check(request.kind)
        values = embedded.settings(plugins) | dict(demo_settings or {})
        defaults = {name: value for name, value in values.items() if name not in divided.given}
    given = defaults | divided.given
    folder = output_folder.of(given)
    launcher = trl_launch.launch_arguments(request.kind, divided.launch, [], command_line.OWN_OPTIONS)
    late_refusals.check_files(divided.given, launcher)
    if write_to is not None:
        written_run.write(write_to, request, divided)
        return 0
    if request.dry_run:
        from . import dry_run

        if demo:
            defaults |= embedded.places(say)
        return dry_run.run(request, divided, defaults, folder, launcher, embedded.TAKES if demo else "")
    output_folder.check(request, given, folder)
    accelerator = trl_launch.accelerator_found() and not launcher.cpu
    trl_launch.fit_to_machine(launcher, accelerator)
    for_cpu = {} if accelerator else cpu_defaults(divided.given, launcher.mixed_precision)
    if for_cpu:
        listed = ", ".join(f"{name}={str(value).lower()}" for name, value in for_cpu.items())
        say(f"no accelerator is used, so {listed}")
    if demo:
        say("no model and no data are named: training the embedded SmolLM2-135M-Instruct on arithmetic")
        defaults |= embedded.make(say)
    unused = [name for name in divided.given if name.startswith(("lora_", "use_dora", "use_rslora"))]
    if unused and not given.get("use_peft"):
        say(f"use_peft is not set, so all parameters are trained and these have no effect: {', '.join(unused)}")
    if not request.specs:
        say(f"no plugin is enabled: this is plain TRL ({request.kind.upper()})")
    if not request.save and given.get("save_strategy") not in (None, "no"):
        say(f"--no_save also leaves out the checkpoints of save_strategy={given['save_strategy']}")
    for_workers = dataclasses.replace(
        request,
        # the last value of an option counts
        arguments=[*divided.trl, *as_arguments(for_cpu | defaults), *([] if request.save else NO_CHECKPOINTS)],
        bars=given.get("disable_tqdm") is False,
        command=shlex.join(repeat.without_secrets(command)),
        config_to_repeat=repeat.published(written_run.content(request, divided) | {"trainer": request.kind}),
        filled_in=for_cpu | defaults,
        started=datetime.datetime.now().astimezone().isoformat(),
    )
    return _run_workers(for_workers, command, launcher, folder)


def _run_workers(request: Request, command: Sequence[str], launcher: Any, output: Path) -> int:
    """Starts the workers, waits for them, says how an interrupted run goes on, and returns the exit code."""
    first = "interrupted: leaving"
    if request.save_on_interrupt:
        first = "interrupted: saving a checkpoint at the end of this round"
    press = interrupt.Parent(say, first)
    say(f"starting {counted(launcher.num_processes, 'process') if launcher.num_processes else 'the processes'}")
    with tempfile.TemporaryDirectory(prefix="trl_ext-") as folder, press.listening():
        launcher.training_script_args = [str(handover.write(request, Path(folder)))]
        os.environ[child_errors.FOLDER] = folder
        code = trl_launch.launch(launcher)
        interrupted = code != 0 and (press.count > 0 or child_errors.interrupted(folder, code))
        code = child_errors.print_errors(folder, child_errors.INTERRUPTED if interrupted else code)
    if code == 0:
        return 0
    record = after_interrupt.end_record(output, request.started, "interrupted" if interrupted else "failed")
    if interrupted and not launcher.machine_rank:  # the first machine has the record
        owner = ownership.owner(request.specs)
        if owner is not None:
            lines = after_interrupt.owned(output, command)
        else:
            lines = after_interrupt.lines(output, record, command, STATE_FILE if request.specs else None)
        for line in lines:
            say(line)
    return code


def wants_demo(given: Mapping[str, Any]) -> bool:
    """Returns whether the run names neither a model nor data.

    Args:
        given: The settings of TRL that the user set.

    Raises:
        ConfigError: It names one of the two.
    """
    model = given.get("model_name_or_path") is not None
    data = given.get("dataset_name") is not None or bool(given.get("datasets"))
    if model and not data:
        raise ConfigError(
            "the run names a model and no data: add --dataset_name DATASET (a folder, or a dataset of the hub), or "
            "`datasets:` in the YAML file. Leave both out to train the embedded default."
        )
    if data and not model:
        raise ConfigError(
            "the run names data and no model: add --model_name_or_path MODEL (a folder, or a model of the hub). Leave "
            "both out to train the embedded default."
        )
    return not model


def cpu_defaults(given: Mapping[str, Any], mixed_precision: str | None) -> dict[str, Any]:
    """Returns the settings that a run on the CPU needs and the user left open.

    Args:
        given: The settings of TRL that the user set.
        mixed_precision: The setting of accelerate.
    """
    defaults: dict[str, Any] = {}
    if "use_cpu" not in given:
        defaults["use_cpu"] = True
    if not {"bf16", "fp16"} & set(given) and mixed_precision != "bf16":
        defaults["bf16"] = False  # TRL would train in bfloat16 otherwise
    return defaults
