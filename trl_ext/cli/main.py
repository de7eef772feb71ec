"""The console script `trl_ext`: the list of commands, their dispatch, and errors as exit codes."""

from __future__ import annotations

import importlib
import os
import shlex
import sys

from .._version import __version__
from ..errors import TrlExtError, near
from ..support.console import tell
from ..support.help import Parser

COMMANDS: dict[str, str] = {
    "train": "train with plugins; takes all options of `trl` and of accelerate",
    "plugins": "list the plugins that are installed",
    "show": "show a plugin: stages, needs, options with defaults and sources",
    "inspect": "show what each plugin did to tokens, rewards and advantages of a run",
    "check": "check a plugin on a tiny model, in seconds",
    "compare": "compare plugin sets and plain TRL over seeds, with intervals",
    "schema": "print a JSON Schema of the YAML file, for editors",
    "recipes": "list the recipes that come with trl_ext, and what they show",
    "new": "write a package with a working plugin, its tests and its entry point",
    "doctor": "check versions, devices, extras and every part of TRL that is used",
    "bench": "measure the overhead, shared-prefix forwards, or SPAE's probes",
    "completion": "print a script that completes commands in bash, zsh or fish",
}
"""Every command, with its line in the help. A command is a module of this package, imported when it is called."""

_OPTIONS = ("-h", "--help", "--version")
_OF_TRAIN = ("--plugin", "--set", "--config", "--trainer")
"""Options of `trl_ext train` that some put behind `trl_ext`."""

EXAMPLES = """\
examples:
  trl_ext train --plugin gdpo
      the embedded demo: a real model, minutes on a CPU
  trl_ext train --plugin gdpo --config run.yaml --num_processes 8
  trl_ext train --plugin my_method.py --set my-method.eps=0.5 --config run.yaml
  trl_ext compare gdpo
  trl_ext inspect --plugin gdpo
      what the plugin does to one round, as a page
  trl_ext new my-method
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 for success, 1 if something failed, 2 for wrong use."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except TrlExtError as error:
        if os.environ.get("TRL_EXT_TRACEBACK") == "1":
            raise
        tell(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for `--plugin module:attribute`, as a console script does not look here
    if argv and argv[0] in COMMANDS:
        name, rest = argv[0], argv[1:]
        module = importlib.import_module(f"{__package__}.{name}")
        if hasattr(module, "main"):  # it also takes options of TRL, so it parses them itself
            return int(module.main(rest))
        parser = Parser(f"trl_ext {name}")
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(rest)))
    if argv and argv[0] not in _OPTIONS:
        raise TrlExtError(f"no command is called {argv[0]!r}.{_meant(argv) or near(argv[0], COMMANDS)}")
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    parser = Parser(
        "trl_ext",
        usage="trl_ext COMMAND [options]",
        description="Post-training methods as plugins for TRL's trainers.\n\ncommands:\n" + listing,
        epilog=EXAMPLES
        + "\n`trl_ext COMMAND --help` explains a command.\n"
        + "TRL_EXT_TRACEBACK=1 shows where an error comes from.",
    )
    parser.add_argument("--version", action="version", version=f"trl_ext {__version__}")
    parser.parse_args(argv)
    parser.print_help()
    return 0


def _meant(argv: list[str]) -> str:
    """Returns a sentence with the command that was meant, where `train` or a plugin stands first. Else nothing."""
    from ..catalog import find, names

    first, rest = argv[0], argv[1:]
    if first.partition("=")[0] in _OF_TRAIN:
        return f" Write `{shlex.join(['trl_ext', 'train', *argv])}`."
    option = names.option_for(first, find.known())
    if option is None:
        return ""
    look = f" `trl_ext show {first}` shows the plugin." if option == "--plugin" else ""
    return f" Write `{shlex.join(['trl_ext', 'train', option, first, *rest])}`.{look}"
