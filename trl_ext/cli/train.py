"""`trl_ext train`: help and arguments. The package `trl_ext.train` does the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..train import command_line

_DESCRIPTION = """\
Trains with plugins. Besides the arguments below it takes every option of `trl
grpo`, `trl rloo` or `trl dpo` (all keys of their YAML files too) and every
option of `accelerate launch`.

A run that names neither a model nor data trains SmolLM2-135M-Instruct on
arithmetic, in minutes on a CPU."""
_EXAMPLES = """\
examples:
  trl_ext train --plugin gdpo
      the embedded model and task; any setting can be changed:
      --max_steps 50 --trainer grpo
  trl_ext train --plugin gdpo --set gdpo.batch_norm=false --config run.yaml \\
      --learning_rate 1e-6
      a YAML file as for `trl grpo`, an option of the plugin, a setting of TRL
  trl_ext train --plugin gdpo my_method.py --config run.yaml \\
      --accelerate_config zero2 --num_processes 8
      two plugins, eight processes with DeepSpeed
  trl_ext train --config gdpo
      a recipe that comes with trl_ext (`trl_ext recipes`): its task, with the
      plugins of its block `plugins:`
  trl_ext train --config run.yaml --resume_from_checkpoint true
      plugins from the block `plugins:` of the file; continues from the last
      checkpoint in output_dir
  trl_ext train --plugin gdpo --config run.yaml --num_processes 8 --dry-run
      checks everything short of loading the model and prints the plan, also
      on a machine without a GPU
  trl_ext train --plugin gdpo --inspect 2
      records the first two rounds; `trl_ext inspect runs/demo-gdpo` shows what
      the plugins did to them

in the YAML file:
  plugins:
    gdpo: {group_eps: 1.0e-4}

The output folder gets trl_ext_run.json (plugins, versions, metrics, how often
each hook ran) and trl_ext_curves.png. A folder with an older run is refused.
Ctrl-C ends a run and prints the command that goes on with it.
"""


def main(argv: Sequence[str], demo_settings: Mapping[str, Any] | None = None) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: Everything after `trl_ext train`.
        demo_settings: Settings of TRL that replace those of the embedded default, if that is what is trained.
    """
    args, rest = build_parser().parse_known_args(argv)
    request = command_line.understand(args, rest)
    command_line.say("loading TRL")
    from ..train import launch
    from ..trl_internals import arguments, seams

    seams.check_version()
    if args.help_trl:
        print(arguments.trl_parser(request.kind).format_help())
        return 0
    return launch.launch(request, ["trl_ext", "train", *argv], demo_settings, args.write_config)


def build_parser() -> command_line.Parser:
    """Makes the parser of our own options."""
    parser = command_line.Parser()
    parser.description, parser.epilog = _DESCRIPTION, _EXAMPLES
    parser.usage = "trl_ext train [--plugin PLUGIN ...] [--config FILE] [TRL options] [accelerate options]"
    parser.add_argument("--help-trl", action="store_true", help="print the options of TRL's trainer and exit")
    return parser
