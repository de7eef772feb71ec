"""The console script `trl_ext`: finds the command and reports errors. Commands are imported when they are called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from .._version import __version__
from ..errors import TrlExtError, near

COMMANDS: dict[str, str] = {
    "train": "train with plugins; takes every option of `trl grpo`, `trl rloo`, `trl dpo` and `accelerate launch`",
    "plugins": "list the plugins that are installed",
    "show": "show one plugin: stages, needs, options with their defaults and sources",
    "inspect": "look at rounds of a run: tokens, rewards and advantages before and after each plugin",
    "check": "check a plugin on a tiny model, in seconds",
    "compare": "compare plugin sets and plain TRL on one recipe, over seeds, with intervals and verdicts",
    "new": "write a package with a working plugin, its tests and its entry point",
    "doctor": "look at versions, devices and extras, and at every part of TRL that is used",
    "bench": "measure: `overhead` of the host, `shared-prefix` forwards, `probes` of SPAE",
}

EXAMPLES = """\
examples:
  trl_ext train --plugin gdpo                                    the embedded demo: a real model, minutes on a CPU
  trl_ext train --plugin gdpo --config run.yaml --learning_rate 1e-6 --num_processes 8
  trl_ext train --plugin my_method.py --set my-method.floor=0.5 --config run.yaml
  trl_ext compare recipes/tiny/gdpo.yaml
  trl_ext show gdpo
  trl_ext inspect --plugin gdpo                                  what it does to one round, as a page
  trl_ext new my-method
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 a check failed, 2 wrong use."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except TrlExtError as error:
        if os.environ.get("TRL_EXT_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look here for `--plugin module:attribute`
    if argv and argv[0] in COMMANDS:
        name, rest = argv[0], argv[1:]
        module = importlib.import_module(f"{__package__}.{name}")
        if hasattr(module, "main"):  # its options are also TRL's, so it parses them itself
            return int(module.main(rest))
        parser = argparse.ArgumentParser(
            prog=f"trl_ext {name}", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(rest)))
    if argv and not argv[0].startswith("-"):
        raise TrlExtError(f"no command is called {argv[0]!r}.{near(argv[0], COMMANDS)}")
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl_ext",
        usage="trl_ext COMMAND [options]",
        description="Post-training methods as plugins for TRL's trainers.\n\ncommands:\n" + listing,
        epilog=EXAMPLES
        + "\n`trl_ext COMMAND --help` explains a command. TRL_EXT_TRACEBACK=1 shows where errors come from.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trl_ext {__version__}")
    parser.parse_args(argv)
    parser.print_help()
    return 0
