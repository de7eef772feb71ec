"""Writes the table of results in plugins/README.md from recipes/tiny/results/*.json: the end of `make experiments`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trl_ext.compare.text_report import interval

ROOT = Path(__file__).parents[1]
RECIPES, RESULTS = ROOT / "recipes" / "tiny", ROOT / "recipes" / "tiny" / "results"
README = ROOT / "plugins" / "README.md"
BEGIN, END = "<!-- results: written by `make experiments` -->\n", "<!-- end of results -->\n"


def table(found: list[dict[str, Any]]) -> str:
    """A row per recipe: what it shows, its numbers, whether that was expected, and the paper's own headline."""
    lines = ["| recipe | numbers (mean [95% interval]) | expected | in the paper |", "|---|---|---|---|"]
    for result in found:
        name, task = result["recipe"], f"task `{result['task']}`, {len(result['seeds'])} seeds"
        first = f"[{name}](../recipes/tiny/{name}.yaml): {result['claim']}<br>{task}"
        numbers, expected = [], []
        for metric in result["metrics"]:
            arms = [f"{arm} {interval(value)}" for arm, value in metric["estimates"].items()]
            never = [f"{len(seeds)} {arm} never" for arm, seeds in metric["censored"].items() if seeds]
            numbers.append(f"{metric['label']}: {'; '.join([*arms, *never])}")
            for entry in metric["expectations"]:
                answer = {True: "yes", False: "**no**", None: "**unknown**"}[entry["met"]]
                expected.append(f"{entry['text']}: {answer} ({entry['detail']})")
        for arm, content in result["arms"].items():
            expected += [f"**{arm}, seed {failed['seed']}: {failed['status']}**" for failed in content["failed"]]
        lines.append(f"| {first} | {'<br>'.join(numbers)} | {'<br>'.join(expected)} | {result['paper']} |")
    return "\n".join(lines) + "\n"


def load() -> list[dict[str, Any]]:
    """The committed results, by name."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    head, rest = README.read_text().split(BEGIN)
    README.write_text(head + BEGIN + table(load()) + END + rest.split(END)[1])
