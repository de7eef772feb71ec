"""The report of a comparison: one HTML file that needs nothing else, with all numbers inside it as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..support.tables import duration
from . import charts
from .curves import COLORS, levels
from .records import plain
from .results import COLUMNS, rows, sentences

TEMPLATE = Path(__file__).with_name("page.html")


def render(found: Mapping[str, Any]) -> str:
    """The page for the content of `compare.json`."""
    classes = {arm: f"arm{index}" for index, arm in enumerate(found["arms"])}
    colors = zip(classes.values(), itertools.cycle(COLORS), strict=False)
    body = [
        _head(found),
        "<h2>Results</h2>",
        _results(found, classes),
        "<h2>Curves</h2>",
        _curves(found, classes),
        *_completions(found, classes),
        "<h2>How this was made</h2>",
        _made(found),
    ]
    data = json.dumps(plain(found), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "title": escape(f"{found['recipe']}: {' against '.join(found['arms'])}"),
        "colors": "\n".join(f".{name} {{ --color: {color}; }}" for name, color in colors),
        "body": "\n".join(body),
        "data": data,
    }
    page = TEMPLATE.read_text()
    for name, text in parts.items():  # the data last: it may hold anything
        page = page.replace(f"<!-- {name} -->", text, 1)
    return page


def _head(found: Mapping[str, Any]) -> str:
    size = f", a model of {_parameters(found['parameters'])}" if found["parameters"] else ""
    where = f"task {found['task']}" if found["task"] else found["model"] or "model unknown"
    seeds = len(found["seeds"])
    facts = f"{found['trainer'].upper()} on {where}{size}; {len(found['arms'])} arms, {seeds} seeds"
    chips = [
        f'<div class="chip {kind}"><b>{word}</b>{escape(metric["label"])}: {escape(entry["text"])} '
        f'<span class="soft">({escape(entry["detail"])})</span></div>'
        for metric in found["metrics"]
        for entry in metric["expectations"]
        for kind, word in [_ANSWERS[entry["met"]]]
    ]
    paper = f'<p class="soft">In the paper: {escape(found["paper"])}</p>' if found["paper"] else ""
    title = escape(found["claim"] or found["recipe"])
    return f'<h1>{title}</h1><p class="soft">{escape(facts)}</p>{paper}<div class="chips">{"".join(chips)}</div>'


def _parameters(count: int) -> str:
    return f"{count / 1e6:.3g} million parameters" if count >= 1e6 else f"{count / 1e3:.3g} thousand parameters"


_ANSWERS = {True: ("yes", "as expected"), False: ("no", "not as expected"), None: ("", "unknown")}


def _results(found: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    lines = []
    for row in rows(found):
        metric, arm, *numbers, verdict = row
        kind = verdict.partition(" ")[0] if verdict.startswith(("better", "worse")) else ""
        cells = "".join(f'<td class="number">{escape(cell)}</td>' for cell in numbers)
        lines.append(
            f"<tr><td>{escape(metric)}</td><td>{escape(arm)}</td>{cells}<td class='{kind}'>{escape(verdict)}</td></tr>"
        )
    remarks = [line for line in sentences(found) if not line.startswith("expected: ")]
    figures = [
        f"<figure><figcaption>{escape(metric['label'])}</figcaption>{charts.dots(metric, classes)}</figure>"
        for metric in found["metrics"]
    ]
    return (
        _table(COLUMNS, lines)
        + "".join(f'<p class="soft">{escape(line)}</p>' for line in remarks)
        + '<p class="soft">Intervals: 95%, bootstrap over seeds; differences are paired by seed. Dots are seeds.</p>'
        + f'<div class="panels">{"".join(figures)}</div>'
    )


def _curves(found: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    if not found["curves"]:
        return "<p>No run has finished.</p>"
    marked = levels(found)
    figures = [
        f"<figure><figcaption>{escape(name)}</figcaption>{chart}</figure>"
        for name, arms in found["curves"].items()
        for chart in [charts.curves(name, arms, classes, marked.get(name))]
    ]
    key = "".join(f'<span class="{color}">{escape(arm)}</span>' for arm, color in classes.items())
    what = "lines are means over seeds, bands their 95% intervals" if len(found["seeds"]) > 1 else "one seed"
    return f'<p class="soft">{what}</p><div class="key">{key}</div><div class="panels">{"".join(figures)}</div>'


def _completions(found: Mapping[str, Any], classes: Mapping[str, str]) -> Iterable[str]:
    """Rows of the first and the last round, arm beside arm, for every seed."""
    kept = {key: rounds for key, rounds in found["completions"].items() if rounds.get("first")}
    if not kept:
        return
    yield "<h2>Completions side by side</h2>"
    seeds = [seed for seed in found["seeds"] if any(f"{arm}/{seed}" in kept for arm in classes)]
    rounds = {"last": "last step", "first": "first step"}
    yield (
        '<div class="choose"><label>seed <select>'
        + "".join(f"<option>{seed}</option>" for seed in seeds)
        + "</select></label><label>round <select>"
        + "".join(f'<option value="{name}">{text}</option>' for name, text in rounds.items())
        + "</select></label></div>"
    )
    for index, (seed, name) in enumerate(itertools.product(seeds, rounds)):
        columns = {arm: kept.get(f"{arm}/{seed}", {}).get(name, []) for arm in classes}
        hidden = " hidden" if index else ""
        yield f'<div class="wide" data-rows="{seed}/{name}"{hidden}>{_side_by_side(columns, classes)}</div>'


def _side_by_side(columns: Mapping[str, Sequence[Mapping[str, Any]]], classes: Mapping[str, str]) -> str:
    lines = []
    for entries in itertools.zip_longest(*columns.values()):
        prompts = {entry["prompt"] for entry in entries if entry}
        same = prompts.pop() if len(prompts) == 1 else None  # plugins may choose other prompts
        cells = [f"<td><pre>{escape(same or '')}</pre></td>"]
        for entry in entries:
            cells.append(f"<td>{_completion(entry, same is None) if entry else ''}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f'<th class="name {classes[arm]}">{escape(arm)}</th>' for arm in columns)
    return f'<table class="rows"><tr><th>prompt</th>{heads}</tr>{"".join(lines)}</table>'


def _completion(entry: Mapping[str, Any], with_prompt: bool) -> str:
    prompt = f'<pre class="soft">{escape(entry["prompt"])}</pre>' if with_prompt else ""
    rewards = ", ".join(f"{name} {'-' if v is None else format(v, '.3g')}" for name, v in entry["rewards"].items())
    advantage = entry["advantage"]
    extra = f"; advantage {advantage:+.2f}" if isinstance(advantage, float) else ""
    return f'{prompt}<pre>{escape(entry["completion"])}</pre><div class="soft rewards">{escape(rewards + extra)}</div>'


def _made(found: Mapping[str, Any]) -> str:
    arms = [
        f"<tr><td>{escape(name)}</td><td>{escape(_plugins(arm['plugins']))}</td>"
        f"<td>{escape(_pairs(arm['settings']) or 'none')}</td><td>{arm['finished']}</td>"
        f'<td class="number">{"" if arm["seconds_per_run"] is None else duration(arm["seconds_per_run"])}</td></tr>'
        for name, arm in found["arms"].items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    settings = [f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in found["settings"].items()]
    sizes = f" ({_pairs(found['sizes'])})" if found["sizes"] else ""
    return (
        f"<p><code>{escape(found['command'])}</code></p>"
        + _table(("arm", "plugins", "settings of its own", "finished runs", "time per run"), arms)
        + f"<p>Seeds {', '.join(map(str, found['seeds']))}. Data {escape(found['task'] or 'of the settings')}"
        f"{escape(sizes)}. {found['at_once']} runs at a time.</p><p>{escape(versions)}</p>"
        + f"<details open><summary>settings of all arms</summary>{_table(('setting', 'value'), settings)}</details>"
    )


def _plugins(plugins: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(f"{p['name']} {p['version']} ({_pairs(p['options']) or 'no options'})" for p in plugins) or "none"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _table(columns: Sequence[str], lines: Sequence[str]) -> str:
    heads = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'
