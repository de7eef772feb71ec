"""The report of a comparison as one HTML file that needs nothing else, with all numbers inside it as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import counted
from ..support import pages
from ..support.tables import duration
from . import plots, verdicts
from .store import plain
from .text_report import COLUMNS, rows, sentences

TEMPLATE = Path(__file__).with_suffix(".html")


def render(content: Mapping[str, Any]) -> str:
    """Returns the page for the content of `compare.json`."""
    color, levels = plots.colors(content["arms"]), plots.levels(content)
    return pages.render(
        TEMPLATE,
        data=plain(content),
        content=content,
        facts=_facts(content),
        headline=verdicts.headline(content),
        statement=verdicts.statement,
        columns=COLUMNS,
        rows=rows(content),
        remarks=[line for line in sentences(content) if not line.startswith("expected: ")],
        colors=color,
        seed_charts=[(metric, plots.seed_chart(metric, color)) for metric in content["metrics"]],
        curve_charts=[
            (name, plots.curve_chart(arms, color, levels.get(name))) for name, arms in content["curves"].items()
        ],
        completions=_completions(content),
        pairs=_pairs,
        duration=duration,
        versions=", ".join(f"{name} {version}" for name, version in content["versions"].items() if version),
    )


def _facts(content: Mapping[str, Any]) -> str:
    """Names trainer, task, size of the model, and numbers of arms and seeds, as far as they are known and the same."""
    size = f", a model of {_parameters(content['parameters'])}" if content["parameters"] else ""
    place = f"task {content['task']}" if content["task"] else content["model"] or "model unknown"
    numbers = counted(len(content["seeds"]), "seed")
    if not content["paired"]:
        numbers = counted(sum(arm["finished"] for arm in content["arms"].values()), "run")
    trainer = (content["trainer"] or "trainer unknown").upper()
    return f"{trainer} on {place}{size}; {counted(len(content['arms']), 'arm')}, {numbers}"


def _parameters(count: int) -> str:
    return f"{count / 1e6:.3g} million parameters" if count >= 1e6 else f"{count / 1e3:.3g} thousand parameters"


def _pairs(values: Mapping[str, Any]) -> str:
    """Writes `name=value, name=value`."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _completions(content: Mapping[str, Any]) -> dict[int, dict[str, list[tuple[str | None, list[Any]]]]]:
    """Returns seed -> round -> rows: the prompt, and what each arm wrote. The prompt is None where arms had others."""
    recorded = {key: rounds for key, rounds in content["completions"].items() if rounds.get("first")}
    by_seed = {}
    for seed in content["seeds"]:
        of_arms = [recorded.get(f"{arm}/{seed}", {}) for arm in content["arms"]]
        if any(of_arms):
            by_seed[seed] = {
                name: _side_by_side([rounds.get(name, []) for rounds in of_arms]) for name in ("last", "first")
            }
    return by_seed


def _side_by_side(columns: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[str | None, list[Any]]]:
    table = []
    for entries in itertools.zip_longest(*columns):
        prompts = {entry["prompt"] for entry in entries if entry}
        cells = [entry and {**entry, "numbers": _numbers(entry)} for entry in entries]
        table.append((prompts.pop() if len(prompts) == 1 else None, cells))
    return table


def _numbers(entry: Mapping[str, Any]) -> str:
    """Writes the rewards and the advantage of a completion."""
    rewards = ", ".join(f"{name} {'-' if v is None else format(v, '.3g')}" for name, v in entry["rewards"].items())
    advantage = entry["advantage"]
    return f"{rewards}; advantage {advantage:+.2f}" if isinstance(advantage, float) else rewards
