"""`trl_ext recipes`: the recipes that come with trl_ext, as a list or as files to copy."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Lists the recipes that come with trl_ext: YAML files for `trl_ext compare` and
`trl_ext train --config`, which find them by name. With a name it prints the
file, so that a copy can be changed."""
_EPILOG = """\
examples:
  trl_ext recipes
  trl_ext compare gdpo --seeds 2        # two seeds of a tiny recipe
  trl_ext train --config gdpo           # one run with its plugins
  trl_ext recipes gdpo > mine.yaml      # a copy to change
  trl_ext recipes --path                # the folder of all recipes

A file in the current folder wins over a recipe of the same name."""
_NOTES = (
    "tiny, environment: small models. The time is that of `trl_ext compare` with one run per core, {cores} here, from "
    "the seconds that the recipe states.",
    "paper: the scale of the paper, for GPUs. These were not run here.",
    "The guide to every key of a recipe is {guide}.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this recipe")
    parser.add_argument("--path", action="store_true", help="print where the recipe is, or the folder of all")
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from ..catalog import recipes
    from ..errors import ConfigError, OptionError, near

    if args.json and (args.path or args.name):
        raise OptionError("--json prints the whole list. Leave out the name and --path.")
    if args.name is not None:
        known = recipes.recipes()
        if args.name not in known:
            raise ConfigError(f"no recipe is called {args.name!r}.{near(args.name, known)}")
        _, file = known[args.name]
        print(file if args.path else file.read_text(), end="\n" if args.path else "")
        return 0
    if args.path:
        print(recipes.folder())
        return 0
    entries = listing()
    if args.json:
        print(json.dumps(entries, indent=2))
        return 0
    cores = os.cpu_count() or 1
    width = shutil.get_terminal_size().columns
    longest = max(len(entry["name"]) for entry in entries)
    for entry in entries:
        facts = (entry["kind"], _plugins(entry), _time(entry, cores))
        print(textwrap.fill(f"{entry['name']:<{longest}}  {', '.join(facts)}", width, subsequent_indent="    "))
        print(textwrap.fill(_shows(entry), width, initial_indent="    ", subsequent_indent="    "))
    print()
    for note in _NOTES:
        print(textwrap.fill(note.format(cores=cores, guide=recipes.folder() / "README.md"), width))
    return 0


def listing() -> list[dict[str, Any]]:
    """Describes every recipe, from its file and from its recorded result."""
    from ..catalog import recipes
    from ..compare import recipe as reader
    from ..support import imports

    entries = []
    for name, (kind, file) in recipes.recipes().items():
        recipe = reader.read(str(file))
        references = dict.fromkeys(reference for arm in recipe.arms.values() for reference in arm.plugins)
        result = file.parent / "results" / f"{file.stem}.json"
        entries.append(
            {
                "name": name,
                "kind": kind,
                "plugins": [reference for reference in references if not imports.is_file(reference)],
                "about": recipe.about or recipe.claim,
                "runs": len(recipe.arms) * len(recipe.seeds),
                "seconds_per_run": recipe.seconds_per_run,
                "held": _held(result) if result.is_file() else None,
                "path": str(file),
            }
        )
    return entries


def _held(result: Path) -> bool:
    """Returns whether every expectation of a recipe was met in the result that comes with it."""
    return bool(json.loads(result.read_text())["met"])


def _plugins(entry: dict[str, Any]) -> str:
    names = entry["plugins"]
    return f"plugin{'s' * (len(names) > 1)} {' and '.join(names)}" if names else "no plugin"


def _time(entry: dict[str, Any], cores: int) -> str:
    """Says how long a comparison takes on this machine."""
    from ..compare.estimate import roughly

    if entry["seconds_per_run"] is None:
        return "time not measured"
    whole = entry["seconds_per_run"] * entry["runs"] / min(cores, entry["runs"])
    return f"about {roughly(whole)} ({entry['runs']} runs)"


def _shows(entry: dict[str, Any]) -> str:
    """Returns the sentence about a recipe, with a warning where no recorded result bears it out."""
    if entry["held"] is None and entry["kind"] != "paper":
        return f"{entry['about']} (expected, no result is recorded)"
    return f"NOT AS EXPECTED: {entry['about']}" if entry["held"] is False else str(entry["about"])
