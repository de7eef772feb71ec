"""The report of a comparison in words: the table of numbers, and the sentences after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import verdicts

COLUMNS = ("metric", "arm", "mean [95% interval]", "difference", "verdict")


def number(value: float | None) -> str:
    """Writes a number for a table: three digits, and whole steps."""
    if value is None:
        return "?"
    return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def interval(estimate: Mapping[str, float | None] | None, signed: bool = False) -> str:
    """Writes a mean with its interval: `331 [290, 372]`."""
    if estimate is None:
        return "none"
    mean = number(estimate["mean"])
    mean = f"+{mean}" if signed and (estimate["mean"] or 0) > 0 else mean
    return mean if estimate["low"] is None else f"{mean} [{number(estimate['low'])}, {number(estimate['high'])}]"


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Returns the cells under `COLUMNS`, a row for each metric and arm."""
    table = []
    for metric in summary["metrics"]:
        label = metric["label"]
        pairs = {entry["arm"]: entry for entry in reversed(metric["comparisons"])}
        for arm, estimate in metric["estimates"].items():
            never = len(metric["censored"][arm])
            failed = len(summary["arms"][arm]["failed"])
            remark = f" ({never} never)" if never else ""
            remark += f" ({failed} failed)" if failed else ""
            pair = pairs.get(arm)
            verdict, change = "", ""
            if pair is not None:
                change = interval(pair["difference"], signed=True) if pair["difference"] else ""
                verdict = verdicts.say(pair)
            table.append([label, arm, interval(estimate) + remark, change, verdict])
            label = ""
    return table


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """Returns what a reader needs after the table: a claim that is not the title, expectations, failed runs, notes."""
    lines = []
    if summary["claim"] and summary["claim"] != verdicts.headline(summary):
        lines.append(f"claimed, and not shown by these runs: {summary['claim']}")
    for metric in summary["metrics"]:
        for entry in metric["expectations"]:
            answer = {True: "yes", False: "NO", None: "UNKNOWN"}[entry["met"]]
            told = verdicts.statement(entry)
            lines.append(f"expected: {metric['label']}: {entry['text']}: {answer} ({entry['detail']}){told}")
    for name, arm in summary["arms"].items():
        lines += [f"{failed['status']}: {name}, seed {failed['seed']}: {failed['error']}" for failed in arm["failed"]]
    return lines + [f"note: {note}" for note in summary["notes"]]
