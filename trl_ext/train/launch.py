"""Launch of a training run: early checks, defaults for this machine, and worker processes through accelerate."""

from __future__ import annotations

import dataclasses
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..support import child_errors
from ..trl_internals import late_refusals
from ..trl_internals import launch as trl_launch
from ..trl_internals.arguments import resume_value
from . import command_line, config_keys, handover, repeat, written_run
from .command_line import Request, as_arguments, say


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
    if not any("run" in spec.hooks for spec in request.specs):  # a plugin that owns its run also resumes it
        check_resume(divided.given)
    # these may refuse, so they come before anything that takes time
    demo = request.task is None and wants_demo(divided.given)
    launcher = trl_launch.launch_arguments(request.kind, divided.launch, [], command_line.OWN_OPTIONS)
    late_refusals.check_files(divided.given, launcher)
    if write_to is not None:
        written_run.write(write_to, request, divided)
        return 0
    accelerator = trl_launch.accelerator_found() and not launcher.cpu
    trl_launch.fit_to_machine(launcher, accelerator)
    defaults = {} if accelerator else cpu_defaults(divided.given, launcher.mixed_precision)
    if defaults:
        listed = ", ".join(f"{name}={str(value).lower()}" for name, value in defaults.items())
        say(f"no accelerator is used, so {listed}")
    if demo:
        from . import demo as embedded

        say("no model and no data are named: training the embedded SmolLM2-135M-Instruct on arithmetic")
        values = embedded.settings(request.kind, [spec.name for spec in request.specs], say)
        values |= dict(demo_settings or {})
        defaults |= {name: value for name, value in values.items() if name not in divided.given}
    settings = defaults | divided.given
    unused = [name for name in divided.given if name.startswith(("lora_", "use_dora", "use_rslora"))]
    if unused and not settings.get("use_peft"):
        say(f"use_peft is not set, so all parameters are trained and these have no effect: {', '.join(unused)}")
    if not request.specs:
        say(f"no plugin is enabled: this is plain TRL ({request.kind.upper()})")
    for_workers = dataclasses.replace(
        request,
        arguments=[*divided.trl, *as_arguments(defaults)],
        bars=settings.get("disable_tqdm") is False,
        command=shlex.join(repeat.without_secrets(command)),
        config_to_repeat=repeat.published(written_run.content(request, divided)),
        filled_in=defaults,
    )
    with tempfile.TemporaryDirectory(prefix="trl_ext-") as folder:
        launcher.training_script_args = [str(handover.write(for_workers, Path(folder)))]
        os.environ[child_errors.FOLDER] = folder
        return child_errors.print_errors(folder, trl_launch.launch(launcher))


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


def check_resume(given: Mapping[str, Any]) -> None:
    """Refuses to resume from a checkpoint that does not exist.

    Args:
        given: The settings of TRL that the user set.

    Raises:
        ConfigError: There is no checkpoint.
    """
    from transformers.trainer_utils import get_last_checkpoint

    value = resume_value(given.get("resume_from_checkpoint"))
    if value is None:
        return
    output = str(given.get("output_dir") or "trainer_output")
    if value is True and not (os.path.isdir(output) and get_last_checkpoint(output)):
        raise ConfigError(
            f"there is no checkpoint to resume from in {output!r}. Set --output_dir to the folder of the run, name a "
            f"checkpoint with --resume_from_checkpoint PATH, or leave the option out to start anew."
        )
    if isinstance(value, str) and not os.path.isdir(value):
        raise ConfigError(f"--resume_from_checkpoint {value}: there is no such folder (looked in {Path.cwd()}).")
