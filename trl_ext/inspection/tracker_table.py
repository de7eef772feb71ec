"""A recorded round as one table, for the trackers to which a run reports."""

from __future__ import annotations

from typing import Any

from .file_format import Recording

NAME = "trl_ext/round"


def table(recording: Recording) -> dict[str, list[Any]]:
    """Returns a line per completion, by column: texts, rewards in the end, and advantages stage by stage."""
    rows = recording.rows
    columns: dict[str, list[Any]] = {
        "step": [recording.step] * len(rows),
        "round": [recording.round] * len(rows),
        "group": [row.group for row in rows],
        "row": [row.row for row in rows],
        "prompt": ["".join(recording.prompts[row.prompt].tokens) for row in rows],
        "completion": ["".join(row.tokens) for row in rows],
    }
    if recording.reward_stages:
        for index, name in enumerate(recording.reward_stages[-1].names):
            columns[f"reward {name}"] = [row.rewards[-1][index] for row in rows]
    for index, plugin in enumerate(recording.advantage_stages):
        columns[f"advantage after {plugin}"] = [row.advantage(index) for row in rows]
    return columns | {"kept": [row.kept for row in rows]}
