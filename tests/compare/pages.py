"""The content of a `compare.json`, and a reader of pages that turns drawn curves back into numbers."""

from __future__ import annotations

import html.parser
import math
import re
from typing import Any

import pytest

STEPS = list(range(1, 21))


def curve(offset: float, runs: int = 2) -> dict[str, Any]:
    mean = [offset + 0.5 * math.sin(step / 4) for step in STEPS]
    band = {"low": [value - 0.1 for value in mean], "high": [value + 0.2 for value in mean]} if runs > 1 else {}
    return {"steps": STEPS, "mean": mean, **band, "runs": {str(seed): mean for seed in range(1, runs + 1)}}


def row(text: str, reward: float | None) -> dict[str, Any]:
    return {"prompt": "<say> &", "completion": text, "rewards": {"r": reward}, "advantage": 0.5}


CONTENT: dict[str, Any] = {
    "recipe": "typed",
    "claim": "ours is <better> & faster",
    "paper": "a figure",
    "command": "trl_ext compare typed.yaml",
    "trainer": "grpo",
    "task": "tiny",
    "sizes": {"train_size": 8},
    "model": "m",
    "parameters": 89_000,
    "seeds": [1, 2],
    "paired": True,
    "settings": {"learning_rate": 0.001, "odd": "</script><!-- data -->"},
    "arms": {
        "plain": {"finished": 2, "failed": [], "seconds_per_run": 61.0, "plugins": [], "settings": {}},
        "ours": {
            "finished": 1,
            "failed": [{"seed": 2, "status": "diverged", "error": "loss was nan at step 3"}],
            "seconds_per_run": 3.0,
            "plugins": [{"name": "gdpo", "version": "1.2", "origin": "built in", "options": {"group_eps": 0.1}}],
            "settings": {"beta": 0.5},
        },
    },
    "metrics": [
        {
            "name": "rewards/r/mean",
            "measure": "steps to 0.9",
            "label": "rewards/r/mean: steps to 0.9",
            "better": "lower",
            "level": 0.9,
            "values": {"plain": {"1": 30.0, "2": 50.0}, "ours": {"1": 12.0}},
            "censored": {"plain": [2], "ours": []},
            "estimates": {
                "plain": {"mean": 40.0, "low": 30.0, "high": 50.0},
                "ours": {"mean": 12.0, "low": None, "high": None},
            },
            "comparisons": [
                {"arm": "ours", "against": "plain", "seeds": 1, "difference": None, "verdict": "too few seeds"}
            ],
            "expectations": [{"text": "ours better than plain", "met": None, "detail": "not judged"}],
        }
    ],
    "notes": ["2 seeds are few"],
    "complete": False,
    "met": False,
    "versions": {"trl": "1.16.0", "peft": None},
    "seconds": 9.0,
    "at_once": 2,
    "curves": {
        "rewards/r/mean": {"plain": curve(0.6), "ours": curve(1.4, runs=1)},
        "completions/mean_length": {"plain": curve(-250.0), "ours": curve(1000.0)},
    },
    "completions": {
        "plain/1": {"first": [row("one", 0.0)], "last": [row("two\nlines", 1.0)]},
        "ours/1": {"first": [row("<b>three</b>", None)], "last": [row("four", 1.0), row("five", 0.0)]},
        "plain/2": {"first": [row("six", 0.0)], "last": [row("seven", 1.0)]},
    },
}


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.data = ""
        self.texts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.inside = f"{tag}#{dict(attrs).get('id')}"

    def handle_data(self, data: str) -> None:
        if self.inside == "script#data":
            self.data += data
        elif not self.inside.startswith(("script", "style")):
            self.texts.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


Points = list[tuple[float, float]]


def drawn(text: str) -> dict[str, dict[str, Points]]:
    """Metric -> arm (with `band` before it for bands) -> points, as numbers of the metric, read from the drawing."""
    charts: dict[str, dict[str, Points]] = {}
    name = ""
    for tag, attributes in Reader(text).tags:
        if tag == "svg" and attributes.get("class") == "curves":
            x, y = ([float(n) for n in attributes[f"data-{axis}"].split()] for axis in "xy")
            curves = charts.setdefault(attributes["data-metric"], {})
        if tag == "g" and attributes.get("class") in ("curve", "band"):
            kind, arm = attributes["class"], attributes["data-arm"]
            name = arm if kind == "curve" else f"{kind} {arm}"
        if tag == "path" and name and "clip-path" in attributes:
            pixels = re.findall(r"[ML] (\S+) (\S+)", attributes["d"])
            curves[name] = [(_number(float(a), x), _number(float(b), y)) for a, b in pixels]
            name = ""
    return charts


def _number(pixel: float, scale: list[float]) -> float:
    low, high, start, end = scale
    return low + (pixel - start) / (end - start) * (high - low)


def check_curves(text: str, expected: dict[str, Any]) -> None:
    """Every curve and band of the page goes through the numbers of the JSON, up to a hundredth of a pixel."""
    found = drawn(text)
    assert list(found) == list(expected)
    for metric, arms in expected.items():
        numbers = [value for arm in arms.values() for key in ("mean", "low", "high") for value in arm.get(key, [])]
        close = 1e-4 * max(1.0, max(numbers) - min(numbers))
        for arm, numbers_of in arms.items():
            lines = {arm: [*zip(numbers_of["steps"], numbers_of["mean"], strict=True)]}
            if "low" in numbers_of:
                edge = [*zip(numbers_of["steps"], numbers_of["low"], strict=True)]
                edge += reversed([*zip(numbers_of["steps"], numbers_of["high"], strict=True)])
                lines[f"band {arm}"] = edge
            for name, points in lines.items():
                assert len(found[metric][name]) == len(points)
                for (step, value), (expected_step, expected_value) in zip(found[metric][name], points, strict=True):
                    assert step == pytest.approx(expected_step, abs=0.01)
                    assert value == pytest.approx(expected_value, abs=close)
        assert {name for name in found[metric] if not name.startswith("band ")} == set(arms)
