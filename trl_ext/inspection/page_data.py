"""The content of the page: every label, share and shade that its script draws, so that it computes nothing itself.

Shades are explained in `layers`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import counted
from .file_format import Recording, Row
from .formatting import chain_of, number, signed, visible
from .layers import Layer, Values, ends_of, layers_of

_COLOURS = 6
"""Colours that the style has for spans."""


@dataclasses.dataclass(frozen=True)
class Scales:
    """What all rows of a round share, so that equal colours and heights mean equal values.

    Attributes:
        last: The layer of the advantages after the last stage.
        reach: The largest magnitude of an advantage of a row.
        colours: Kind of span -> number of its colour.
        curves: Plugin and name of a curve -> its lowest and highest value.
        values: Name of other values -> the lowest and the highest one.
    """

    last: Layer
    reach: float
    colours: dict[str, int]
    curves: dict[tuple[str, str], tuple[float, float]]
    values: dict[str, tuple[float, float]]


def describe(recording: Recording) -> dict[str, Any]:
    """Returns what the page shows of a round."""
    layers = layers_of(recording)
    scales = _scales(recording, layers)
    places = {row.row: place for place, row in enumerate(recording.rows)}
    names = [recording.trainer.upper(), *(visible(plugin["name"]) for plugin in recording.plugins)]
    telling = recording.telling_group()
    groups = []
    for group, members in recording.groups().items():
        groups.append(
            {
                "group": group,
                "open": group == telling,
                "facts": "".join(f" · {visible(name)} {_label(value)}" for name, value in members[0].columns.items()),
                "prompts": [
                    visible("".join(recording.prompts[prompt].tokens))
                    for prompt in _distinct(row.prompt for row in members)
                ],
                "slopes": _slopes(recording, members, scales),
                "table": _table(recording, members, scales),
                "rows": [
                    _row(recording, row, scales)
                    | {"shades": [_compact(layer.shades(places[row.row])) for layer in layers]}
                    for row in members
                ],
            }
        )
    several = f" on {recording.processes} processes" if recording.processes > 1 else ""
    return {
        "round": recording.round,
        "title": f"round {recording.round}: {' → '.join(names)}",
        "names": names,
        "facts": f"Round {recording.round}, before step {recording.step + 1}{several} · "
        f"{counted(len(recording.rows), 'row')} in {counted(len(groups), 'group')} · "
        f"{visible(recording.model)} · trl_ext {visible(recording.trl_ext)}",
        "notes": [visible(note) for note in recording.notes()],
        "stages": [visible(by) for by in recording.advantage_stages],
        "ends": [signed(scales.reach), "0", signed(-scales.reach)],
        "layers": [layer.legend() for layer in layers],
        "layer": len(recording.advantage_stages) - 1,
        "groups": groups,
    }


def _scales(recording: Recording, layers: Sequence[Layer]) -> Scales:
    """Collects what the rows share."""
    rows, stages = recording.rows, range(len(recording.advantage_stages))
    kinds = _distinct(_kind(span) for row in rows for span in row.spans)
    curves: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for curve in row.curves:
            known = [value for value in curve["values"] if value is not None]
            if known:
                curves.setdefault((curve["by"], curve["name"]), []).extend(known)
    return Scales(
        last=layers[stages[-1]],
        reach=max(abs(row.advantage(stage)) for row in rows for stage in stages) or 1.0,
        colours={kind: index % _COLOURS for index, kind in enumerate(kinds)},
        curves={key: (min(values), max(values)) for key, values in curves.items()},
        values={layer.name: layer.ends for layer in layers if not layer.signed},
    )


# --- groups -----------------------------------------------------------------------------------------------------------


def _slopes(recording: Recording, members: Sequence[Row], scales: Scales) -> list[dict[str, Any]]:
    """Returns for each row its advantages after the stages as shares of the largest one, and the sign of the last."""
    slopes = []
    for row in members:
        advantages = [row.advantage(stage) for stage in range(len(recording.advantage_stages))]
        slopes.append(
            {"sign": _sign(advantages[-1]), "shares": [round(value / scales.reach, 4) for value in advantages]}
        )
    return slopes


def _table(recording: Recording, members: Sequence[Row], scales: Scales) -> dict[str, Any]:
    """Returns the table of a group: rewards and totals with their changes, advantages, and what plugins say."""
    stages = recording.reward_stages
    columns = _distinct(name for stage in stages for name in stage.names)
    weights = {name: weight for stage in stages for name, weight in zip(stage.names, stage.weights, strict=True)}
    fields = _distinct(name for row in members for name in row.fields)
    ends = {
        column: ends_of(value for row in recording.rows for value in _history(recording, row, column))
        for column in columns
    }
    table = []
    for row in members:
        cells: list[dict[str, Any]] = [{"texts": [str(len(row.ids))]}]
        for column in columns:
            history = _history(recording, row, column)
            texts = [
                number(value) if column in stage.names else "none" for stage, value in zip(stages, history, strict=True)
            ]
            cells.append({"texts": chain_of(texts), "meter": _share(history[-1], *ends[column])})
        totals = [number(row.total(index, stage.weights)) for index, stage in enumerate(stages)]
        cells.append({"texts": chain_of(totals)})
        for stage in range(len(recording.advantage_stages)):
            advantage = row.advantage(stage)
            cells.append({"texts": [signed(advantage)], "shade": scales.last.shade(advantage)})
        cells += [{"texts": [_label(row.fields[name]) if name in row.fields else ""]} for name in fields]
        table.append({"row": row.row, "cells": cells})
    heads = [visible(name) + ("" if weights[name] == 1 else f" ×{number(weights[name])}") for name in columns]
    advantages = [f"advantage: {visible(by)}" for by in recording.advantage_stages]
    return {"heads": ["row", "tokens", *heads, "total", *advantages, *map(visible, fields)], "rows": table}


def _history(recording: Recording, row: Row, column: str) -> Values:
    """Returns a reward of a row after each stage, None where the stage has no such column."""
    return [
        values[stage.names.index(column)] if column in stage.names else None
        for stage, values in zip(recording.reward_stages, row.rewards, strict=True)
    ]


def _share(value: float | None, low: float, high: float) -> float:
    if value is None:
        return 0.0
    return round((value - low) / (high - low), 3) if high > low else 1.0


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(recording: Recording, row: Row, scales: Scales) -> dict[str, Any]:
    """Returns everything about a row but the shades of its tokens."""
    labels = {}
    for by, values in zip(recording.advantage_stages, row.advantages, strict=True):
        name = f"advantage: {visible(by)}"
        labels[name] = [signed(value) for value in values] if isinstance(values, list) else signed(values)
    labels |= {visible(name): [number(value) for value in values] for name, values in row.values.items()}
    advantages = [row.advantage(stage) for stage in range(len(recording.advantage_stages))]
    names = [visible(by) for by in recording.advantage_stages]
    pills = [
        {"text": f"{by} {signed(value)}", "shade": scales.last.shade(value)}
        for by, value in zip(names, advantages, strict=True)
    ]
    calls = len(row.calls)
    return {
        "row": row.row,
        "kept": row.kept,
        "ids": row.ids,
        "mask": row.mask,
        "tokens": [visible(token) for token in row.tokens],
        "labels": labels,
        "pills": pills,
        "lanes": [[_span(span, scales) for span in lane] for lane in lanes(row.spans)],
        "curves": [curve for entry in row.curves if (curve := _curve(entry, scales)) is not None],
        "values": {visible(name): _range(*scales.values[name]) for name in row.values},
        "calls": [
            {"call": f"{visible(call['name'])}({_label(call['arguments'])})", "result": _label(call["result"])}
            for call in row.calls
        ],
        "calls_head": counted(calls, "tool call"),
    }


def lanes(spans: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns spans in lanes in which none overlaps another. Spans of one kind share a lane where they can."""
    filled: list[list[dict[str, Any]]] = []
    for span in sorted(spans, key=lambda span: (span["start"], -span["end"])):
        fitting = (lane for lane in filled if _kind(lane[0]) == _kind(span) and lane[-1]["end"] <= span["start"])
        lane = next(fitting, None)
        if lane is None:
            filled.append(lane := [])
        lane.append(span)
    return filled


def _span(span: dict[str, Any], scales: Scales) -> dict[str, Any]:
    label, value = visible(span["label"]), span["value"]
    return {
        "start": span["start"],
        "end": span["end"],
        "kind": visible(_kind(span)),
        "colour": scales.colours[_kind(span)],
        "label": label if value is None else f"{label} {number(value)}",
        "by": visible(span["by"]),
        "tip": label if value is None else f"{label} = {number(value)}",
    }


def _curve(curve: dict[str, Any], scales: Scales) -> dict[str, Any] | None:
    """Returns a curve with heights from 0 (top) to 1 on the scale of all rows. None where no row has a value."""
    if (curve["by"], curve["name"]) not in scales.curves:
        return None
    low, high = scales.curves[curve["by"], curve["name"]]

    def height(value: float) -> float:
        return round(0.94 - 0.88 * (value - low) / (high - low), 4) if high > low else 0.5

    return {
        "name": visible(f"{curve['by']}: {curve['name']}"),
        "ends": _range(low, high),
        "zero": height(0.0) if low < 0 < high else None,
        "positions": curve["positions"],
        "heights": [None if value is None else height(value) for value in curve["values"]],
        "labels": [number(value) for value in curve["values"]],
    }


# --- small things -----------------------------------------------------------------------------------------------------


def _kind(span: dict[str, Any]) -> str:
    """Returns what spans have in common that differ in a number only, such as `steps: step 1` and `steps: step 2`."""
    label = re.sub(r"\s*[0-9]+$", "", span["label"])
    return f"{span['by']}: {label}"


def _compact(values: Values) -> Values | float | None:
    """Returns one value for all tokens where they have the same, as most advantages do."""
    return values[0] if len(set(values)) == 1 else values


def _label(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _range(low: float, high: float) -> str:
    return f"{number(low)} … {number(high)}"


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
