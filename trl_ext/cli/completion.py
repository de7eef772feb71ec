"""`trl_ext completion`: completion of commands, options and names of plugins in bash, zsh and fish."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence

from ..catalog import find, option_names
from ..support.help import Parser

_BASH = """\
_trl_ext() {
    local IFS=$'\\n'
    COMPREPLY=($("$1" completion --words "${COMP_WORDS[@]:0:COMP_CWORD+1}" 2>/dev/null))
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
    return 0
}
complete -o default -F _trl_ext trl_ext
"""
_ZSH = """\
#compdef trl_ext
_trl_ext() {
    local -a found
    found=("${(@f)$("${words[1]}" completion --words "${(@)words[1,CURRENT]}" 2>/dev/null)}")
    if [[ -n "${found[*]}" ]]; then
        compadd -- "${(@)found:#*[=.]}"
        compadd -S '' -- "${(@M)found:#*[=.]}"
    else
        _files
    fi
}
compdef _trl_ext trl_ext
"""
_FISH = """\
function __trl_ext_complete
    set -l given (commandline -opc)
    set -l current (commandline -ct)
    set -l found (trl_ext completion --words $given "$current" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\\n' $found
    else
        __fish_complete_path "$current"
    end
end
complete -c trl_ext -f -a '(__trl_ext_complete)'
"""
SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}
_DESCRIPTION = """\
Prints a script that completes commands, our options, names of plugins, and
options of plugins behind --set. Options of TRL are not completed."""
_EXAMPLES = """\
for every new shell:
  echo 'eval "$(trl_ext completion bash)"' >> ~/.bashrc
  echo 'eval "$(trl_ext completion zsh)"' >> ~/.zshrc
  trl_ext completion fish > ~/.config/fish/completions/trl_ext.fish

In zsh, the line belongs below `autoload -U compinit && compinit`.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: The name of a shell, or `--words` and the words of a command line up to the one that is completed.
    """
    if argv[:1] == ["--words"]:  # the scripts ask so
        print("".join(f"{word}\n" for word in complete(argv[2:])), end="")
        return 0
    print(SCRIPTS[build_parser().parse_args(argv).shell], end="")
    return 0


def build_parser() -> Parser:
    """Makes the parser of the command."""
    parser = Parser("trl_ext completion", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("shell", choices=SCRIPTS, help="the shell that reads the script")
    return parser


def complete(words: Sequence[str]) -> list[str]:
    """Returns what the last word may become. Nothing stands for a file, or for what is not known.

    Args:
        words: The words behind `trl_ext`, the last of which may be empty.
    """
    from .main import COMMANDS

    # bash makes `=` a word of its own. What stands behind that of an assignment is not known
    words = [*words, ""] if words[-1:] == ["="] else words
    behind_equals = words[-2:-1] == ["="]
    *before, current = [word for word in words if word != "="]
    if behind_equals and not before[-1].startswith("-"):
        candidates = []
    elif not before:
        candidates = [*COMMANDS, "--help", "--version"]
    elif before[0] in COMMANDS:
        parsers = _parsers(before[0])
        action, options = _expected(parsers, before[1:])
        candidates = options if current.startswith("-") else _values(action, before, current)
    else:
        candidates = []
    return [candidate for candidate in candidates if candidate.startswith(current) and candidate not in before]


def _parsers(command: str) -> list[argparse.ArgumentParser]:
    """Returns the parsers of a command. `inspect` takes the options of `train` too."""
    module = importlib.import_module(f"{__package__}.{command}")
    if hasattr(module, "build_parser"):
        others = _parsers("train") if command == "inspect" else []
        return [module.build_parser(), *others]
    parser = Parser(f"trl_ext {command}")
    module.add_arguments(parser)
    return [parser]


def _expected(
    parsers: Sequence[argparse.ArgumentParser], words: Sequence[str]
) -> tuple[argparse.Action | None, list[str]]:
    """Returns what the next value is for, if it is known, and the options that may come instead.

    Args:
        parsers: The parsers of the command.
        words: What stands behind the command so far.
    """
    options = {name: action for parser in parsers for name, action in parser._option_string_actions.items()}
    positionals = [action for parser in parsers for action in parser._actions if not action.option_strings]
    takes_values: argparse.Action | None = None
    for index, word in enumerate(words):
        if word.startswith("-"):
            takes_values = options.get(word.partition("=")[0])
        elif takes_values is not None and takes_values.nargs != 0:
            takes_values = takes_values if takes_values.nargs == "+" else None
        elif positionals:
            action = positionals.pop(0)
            if isinstance(action.choices, Mapping) and isinstance(action.choices.get(word), argparse.ArgumentParser):
                return _expected([action.choices[word]], words[index + 1 :])  # a command inside the command
    if takes_values is None or takes_values.nargs == 0:
        takes_values = positionals[0] if positionals else None
    return takes_values, list(options)


def _values(action: argparse.Action | None, before: Sequence[str], current: str) -> list[str]:
    """Returns the values of an option or argument that are known."""
    if action is None:
        return []
    if action.dest == "plugin":
        return sorted(find.known())
    if action.dest == "set":
        return _assignments(before, current)
    return list(action.choices or ())


def _assignments(before: Sequence[str], current: str) -> list[str]:
    """Returns what may stand behind `--set`: the options of the plugins on the line, else the names of all plugins."""
    plugins: list[str] = []
    for index, word in enumerate(before):
        last = [earlier for earlier in before[:index] if earlier.startswith("-")][-1:]
        if last == ["--plugin"] and not word.startswith("-"):
            plugins.append(word)
    if not plugins and "." not in current:
        return [f"{name}." for name in sorted(find.known())]
    # an option belongs to a file or a module by the name that its plugin declares, which is not known here
    names = [name for name in plugins if name.partition(":")[0] == name and not name.endswith(".py")]
    names = names if plugins else [current.partition(".")[0]]
    return [f"{name}.{option}=" for name in names for option in option_names.option_names(name)]
