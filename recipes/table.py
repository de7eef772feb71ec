"""Tables of results in plugins/README.md and plugins/docs/, from recipes/tiny/results/*.json: `make experiments`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_ext.compare.text_report import interval
from trl_ext.compare.verdicts import statement

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "recipes" / "tiny" / "results"
README = ROOT / "plugins" / "README.md"
PAGES = ROOT / "plugins" / "docs"
BEGIN, END = "<!-- results: written by `make experiments` -->\n", "<!-- end of results -->\n"
ANSWERS = {True: "yes", False: "**no**", None: "**unknown**"}
Record = Mapping[str, Any]


def load() -> list[dict[str, Any]]:
    """Returns the committed results, sorted by name."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


def table(records: list[dict[str, Any]]) -> str:
    """Returns the overview: a row per recipe with its claim, whether it held, and the headline of the paper."""
    lines = ["| recipe | claim | held | in the paper |", "|---|---|---|---|"]
    for record in records:
        name = record["recipe"]
        recipe = f"[{name}](../recipes/tiny/{name}.yaml)"
        pages = ", ".join(f"[{method}](docs/{method}.md#results)" for method in methods(record))
        claim = f"{record['claim']}. {len(record['seeds'])} seeds, numbers in {pages}."
        lines.append(f"| {recipe} | {claim} | {'<br>'.join(_held(record))} | {record['paper']} |")
    return "\n".join(lines) + "\n"


def details(record: Record) -> str:
    """Returns all numbers of one recipe: a table of metrics by arms, then every expectation."""
    name, arms = record["recipe"], list(record["arms"])
    lines = [
        f"`trl_ext compare {name}` ([recipe](../../recipes/tiny/{name}.yaml), task "
        f"`{record['task']}`, {len(record['seeds'])} seeds): {record['claim']}."
        + ("" if _held(record) == ["yes"] else " **This did not hold.**"),
        "",
        f"| mean [95 % interval] | {' | '.join(arms)} |",
        f"|---|{'---|' * len(arms)}",
    ]
    for metric in record["metrics"]:
        lines.append(f"| {metric['label']} | {' | '.join(_number(metric, arm) for arm in arms)} |")
    lines += ["", "| expected | met | |", "|---|---|---|"]
    for metric in record["metrics"]:
        for entry in metric["expectations"]:
            met = ANSWERS[entry["met"]]
            lines.append(f"| {metric['label']}: {entry['text']} | {met} | {entry['detail']}{statement(entry)} |")
    lines += [f"| {failure} | **no** | |" for failure in _failures(record)]
    return "\n".join([*lines, "", f"In the paper: {record['paper']}."]) + "\n"


def methods(record: Record) -> list[str]:
    """Returns the built-in plugins that a recipe uses."""
    plugins = [plugin for arm in record["arms"].values() for plugin in arm["plugins"]]
    return sorted({plugin["name"] for plugin in plugins if plugin["origin"] == "built in"})


def pages(records: list[dict[str, Any]]) -> dict[Path, str]:
    """Returns what every generated block must hold, by the page that holds it."""
    blocks = {README: table(records)}
    for record in records:
        for method in methods(record):
            page = PAGES / f"{method}.md"
            blocks[page] = "\n".join([blocks[page], details(record)] if page in blocks else [details(record)])
    return blocks


def _number(metric: Record, arm: str) -> str:
    never = len(metric["censored"][arm])
    return interval(metric["estimates"][arm]) + (f"; {never} never" if never else "")


def _held(record: Record) -> list[str]:
    """Returns `yes`, or what did not hold."""
    unmet = [
        f"{ANSWERS[entry['met']]}: {entry['text']} ({entry['detail']}){statement(entry)}"
        for metric in record["metrics"]
        for entry in metric["expectations"]
        if not entry["met"]
    ]
    return [*unmet, *_failures(record)] or ["yes"]


def _failures(record: Record) -> list[str]:
    return [
        f"**{arm}, seed {failure['seed']}: {failure['status']}**"
        for arm, content in record["arms"].items()
        for failure in content["failed"]
    ]


if __name__ == "__main__":
    for page, block in pages(load()).items():
        head, rest = page.read_text().split(BEGIN)
        page.write_text(head + BEGIN + block + END + rest.split(END)[1])
