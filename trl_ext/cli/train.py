"""`trl_ext train`: checks everything that can be checked early, then starts the workers through accelerate."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..support import child_errors
from ..train import command_line

if TYPE_CHECKING:
    from ..trl_internals.launch import Split

_OWN = ("--plugin", "--set", "--config", "--trainer", "--no_reward_check", "--inspect", "--no_save", "--help-trl")
_DESCRIPTION = """\
Trains with plugins. Besides the arguments below it takes every option of `trl grpo`, `trl rloo` or `trl dpo` (all
keys of their YAML files too) and every option of `accelerate launch`.

Where a run names neither a model nor data, it trains SmolLM2-135M-Instruct on arithmetic: minutes on a CPU."""
_EXAMPLES = """\
examples:
  trl_ext train --plugin gdpo
      the embedded model and task; any setting can be changed: --max_steps 50 --trainer grpo
  trl_ext train --plugin gdpo --set gdpo.batch_norm=false --config run.yaml --learning_rate 1e-6
      a YAML file as for `trl grpo`, one option of the plugin, one setting of TRL
  trl_ext train --plugin gdpo my_method.py --config run.yaml --accelerate_config zero2 --num_processes 8
      two plugins, eight processes with DeepSpeed
  trl_ext train --config recipes/tiny/gdpo.yaml
      the task of a recipe of `trl_ext compare`, with the plugins of its block `plugins:`
  trl_ext train --config run.yaml --resume_from_checkpoint true
      plugins from the block `plugins:` of the file; continues from the last checkpoint in output_dir
  trl_ext train --plugin gdpo --inspect 2
      records the first two rounds; `trl_ext inspect runs/demo-gdpo` shows what the plugins did to them

in the YAML file:
  plugins:
    gdpo: {group_eps: 1.0e-4}

The output folder gets trl_ext_run.json (plugins, versions, metrics, how often each hook ran) and trl_ext_curves.png.
"""


def main(argv: Sequence[str], demo_settings: Mapping[str, Any] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Everything after `trl_ext train`.
        demo_settings: Settings of TRL that replace those of the embedded default, where it is trained.
    """
    parser = command_line.Parser()
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.usage = "trl_ext train [--plugin PLUGIN ...] [--config FILE] [TRL options] [accelerate options]"
    parser.add_argument("--help-trl", action="store_true", help="print the options of TRL's trainer and exit")
    args, rest = parser.parse_known_args(argv)
    asked = command_line.understand(args, rest)
    say("loading TRL")
    from ..trl_internals import arguments as trl_arguments
    from ..trl_internals import launch as trl_launch
    from ..trl_internals import seams

    seams.check_version()
    if args.help_trl:
        print(trl_arguments.trl_parser(asked.kind).format_help())
        return 0
    divided = trl_launch.split(asked.kind, asked.arguments, asked.settings)
    if not any("run" in spec.hooks for spec in asked.specs):  # such a plugin knows what its run leaves behind
        check_resume(divided.given)
    demo = asked.task is None and wants_demo(divided.given)  # may refuse, so it comes before anything that takes time
    launch = trl_launch.launch_arguments(asked.kind, divided.launch, [], _OWN)
    accelerator = trl_launch.accelerator_found() and not launch.cpu
    trl_launch.fit_to_machine(launch, accelerator)
    defaults = {} if accelerator else cpu_defaults(divided, launch.mixed_precision)
    if defaults:
        listed = ", ".join(f"{name}={str(value).lower()}" for name, value in defaults.items())
        say(f"no accelerator is used, so {listed}")
    if demo:
        from ..train import demo as embedded

        say("no model and no data are named: training the embedded SmolLM2-135M-Instruct on arithmetic")
        values = embedded.settings(asked.kind, [spec.name for spec in asked.specs], say) | dict(demo_settings or {})
        defaults |= {name: value for name, value in values.items() if name not in divided.given}
    if not asked.specs:
        say(f"no plugin is enabled: this is plain TRL ({asked.kind.upper()})")
    launch.training_script_args = [*command_line.forwarded(args, asked), *divided.trl, *as_arguments(defaults)]
    os.environ[command_line.COMMAND] = shlex.join(["trl_ext", "train", *argv])
    with tempfile.TemporaryDirectory(prefix="trl_ext-") as folder:
        os.environ[child_errors.FOLDER] = folder
        code = trl_launch.launch(launch)
        return child_errors.tell(folder, code)


def wants_demo(given: Mapping[str, Any]) -> bool:
    """Whether the run names neither model nor data.

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


def cpu_defaults(divided: Split, mixed_precision: str | None) -> dict[str, Any]:
    """What TRL needs on a CPU and the user left open: it would train in bfloat16 otherwise."""
    defaults: dict[str, Any] = {}
    if "use_cpu" not in divided.given:
        defaults["use_cpu"] = True
    if not {"bf16", "fp16"} & set(divided.given) and mixed_precision != "bf16":
        defaults["bf16"] = False
    return defaults


def check_resume(given: Mapping[str, Any]) -> None:
    """Refuses to resume from what is not there, before anything is loaded."""
    from transformers.trainer_utils import get_last_checkpoint

    from ..trl_internals.arguments import resume_value

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


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Settings as arguments of TRL's parser."""
    arguments: list[str] = []
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in items)]
    return arguments


def say(message: str) -> None:
    print(f"trl_ext: {message}", file=sys.stderr, flush=True)
