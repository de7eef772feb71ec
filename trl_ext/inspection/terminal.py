"""The view of a recorded round in a terminal: its groups, and the rows of some of them with coloured tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from typing import IO, TYPE_CHECKING, Any

from rich.text import Text

from ..errors import counted
from ..support.console import console as make_console
from ..support.tables import print_table
from .file_format import Recording, Row
from .formatting import chain, number, signed, sparkline, visible

if TYPE_CHECKING:
    from rich.console import Console

_POSITIVE = ((0.66, "white on #2166ac"), (0.33, "black on #67a9cf"), (0.02, "black on #d1e5f0"))
_NEGATIVE = ((0.66, "white on #b35806"), (0.33, "black on #f1a340"), (0.02, "black on #fee0b6"))
"""Least share of the scale, and style. Both colours are set, so that they are legible on any background."""
_NOT_COUNTED = "dim italic"
_MOST_SPANS = 12


def style(value: float | None, scale: float) -> str:
    """Returns the style of a token: blue for a positive advantage, orange for a negative one."""
    if value is None:
        return _NOT_COUNTED
    share = abs(value) / scale
    return next((name for least, name in (_POSITIVE if value > 0 else _NEGATIVE) if share >= least), "")


def show(recording: Recording, rows: Collection[int], file: IO[str] | None = None, color: bool | None = None) -> None:
    """Prints a round: what it is, its groups, and the chosen rows in full.

    Args:
        recording: The round.
        rows: Numbers of the rows.
        file: Standard output by default.
        color: Colours or none, where the stream shall not decide.
    """
    stream = file or sys.stdout
    console = make_console(file=stream, color=color)
    _head(recording, console)
    names, cells = _summary(recording)
    print_table(names, cells, file=stream)
    chosen = {group: [row for row in members if row.row in rows] for group, members in recording.groups().items()}
    chosen = {group: members for group, members in chosen.items() if members}
    if console.color_system and not console.no_color:
        _legend(recording, console)
    for group, members in chosen.items():
        _group(recording, group, members, console)
    others = [str(group) for group in recording.groups() if group not in chosen]
    if others:
        _say(console, f"Other groups: {', '.join(others)}. --group {others[0]} or --group all shows them.")


def _say(console: Console, line: str | Text) -> None:
    console.print(line if isinstance(line, Text) else Text(line), soft_wrap=not console.is_terminal)


def _head(recording: Recording, console: Console) -> None:
    """Prints what the round is."""
    plugins = " → ".join(["TRL", *(plugin["name"] for plugin in recording.plugins)])
    _say(
        console,
        Text.assemble(
            (f"round {recording.round}", "bold"),
            f" before step {recording.step + 1} · {recording.trainer.upper()} · {plugins} · "
            f"{counted(len(recording.rows), 'row')} in {counted(len(recording.groups()), 'group')} · "
            f"{counted(recording.processes, 'process', 'processes')}",
        ),
    )
    _say(console, f"model {recording.model}")
    for note in recording.notes():
        _say(console, note)


def _summary(recording: Recording) -> tuple[list[str], list[list[str]]]:
    """Returns a line for each group: mean rewards as they ended, and the range of the advantages after each stage."""
    last = recording.reward_stages[-1]
    cells = []
    for group, members in recording.groups().items():
        means = []
        for column in range(len(last.names)):
            values = [value for row in members if (value := row.rewards[-1][column]) is not None]
            means.append(number(sum(values) / len(values) if values else None))
        ranges = []
        for stage in range(len(recording.advantage_stages)):
            values = [row.advantage(stage) for row in members]
            ranges.append(f"{signed(min(values))} … {signed(max(values))}")
        cells.append([str(group), f"{members[0].row}-{members[-1].row}", *means, *ranges])
    return ["group", "rows", *last.names, *(f"advantages: {by}" for by in recording.advantage_stages)], cells


def _legend(recording: Recording, console: Console) -> None:
    """Prints which colour stands for which advantage."""
    scale = recording.scale(-1)
    legend = Text("tokens by advantage: ")
    for share in (-1.0, -0.5, -0.1, 0.0, 0.1, 0.5, 1.0):
        legend.append(f" {signed(share * scale)} ", style(share * scale, scale))
    legend.append("  ").append("not counted by the loss", _NOT_COUNTED)
    _say(console, legend)


def _group(recording: Recording, group: int, members: Sequence[Row], console: Console) -> None:
    """Prints the prompt of a group, its table, and its chosen rows."""
    console.print()
    facts = "".join(f" · {name} {visible(str(value))}" for name, value in members[0].columns.items())
    _say(console, Text.assemble((f"group {group}", "bold"), facts))
    for prompt in sorted({row.prompt for row in members}):
        _say(console, Text(visible("".join(recording.prompts[prompt].tokens)), "dim"))
    names, cells = _rows(recording, members)
    print_table(names, cells, file=console.file)
    for row in members:
        _completion(recording, row, console)


def _rows(recording: Recording, members: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Returns a line for each row: rewards and totals with their changes, advantages, and what plugins say."""
    columns = list(dict.fromkeys(name for stage in recording.reward_stages for name in stage.names))
    fields = list(dict.fromkeys(name for row in members for name in row.fields))
    cells = []
    for row in members:
        rewards = []
        for column in columns:
            history = [
                number(values[stage.names.index(column)]) if column in stage.names else "(none)"
                for stage, values in zip(recording.reward_stages, row.rewards, strict=True)
            ]
            rewards.append(chain(history))
        totals = [number(row.total(index, stage.weights)) for index, stage in enumerate(recording.reward_stages)]
        advantages = [signed(row.advantage(stage)) for stage in range(len(recording.advantage_stages))]
        values = [_value(row.fields.get(name)) for name in fields]
        cells.append([str(row.row), str(len(row.ids)), *rewards, chain(totals), *advantages, *values])
    advantages = [f"advantage: {by}" for by in recording.advantage_stages]
    return ["row", "tokens", *columns, "total", *advantages, *fields], cells


def _value(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    text = visible(str(value)).replace("\n", " ")
    return text if len(text) <= 40 else f"{text[:37]}..."


def _completion(recording: Recording, row: Row, console: Console) -> None:
    """Prints the tokens of a row, then its token-wise advantages, tool calls, spans and curves."""
    values, scale = row.token_advantages(-1), recording.scale(-1)
    changes = chain([signed(row.advantage(stage)) for stage in range(len(recording.advantage_stages))])
    left_out = "" if row.kept else "  left out: the round does not learn from it"
    _say(console, Text.assemble((f"row {row.row}", "bold"), f"  {changes}{left_out}"))
    text = Text()
    for token, value in zip(row.tokens, values, strict=True):
        text.append(visible(token).replace("\n", "⏎\n"), style(value, scale))
    console.print(text, soft_wrap=not console.is_terminal)
    if any(isinstance(stage, list) for stage in row.advantages):
        for by, advantage in zip(recording.advantage_stages, row.advantages, strict=True):
            if isinstance(advantage, list):
                in_loss = [value for value, use in zip(advantage, row.mask, strict=True) if use]
                ends = f"{signed(min(in_loss))} … {signed(max(in_loss))}" if in_loss else "nothing is counted"
                _say(console, f"  advantage after {by}: {sparkline(advantage)} {ends}")
    for call in row.calls:
        result = visible(str(call["result"])).replace("\n", " ")
        _say(console, f"  called {visible(call['name'])}({visible(json.dumps(call['arguments']))}): {result}")
    for span in row.spans[:_MOST_SPANS]:
        end = "" if span["value"] is None else f" = {number(span['value'])}"
        inside = visible("".join(row.tokens[span["start"] : span["end"]])).replace("\n", "⏎")
        shown = inside if len(inside) <= 60 else f"{inside[:40]} ... {inside[-15:]}"
        _say(console, f"  {span['by']}: {visible(span['label'])}{end} on {span['start']}-{span['end'] - 1}: {shown}")
    if len(row.spans) > _MOST_SPANS:
        _say(console, f"  and {len(row.spans) - _MOST_SPANS} further spans, see the page")
    for curve in row.curves:
        known = [value for value in curve["values"] if value is not None]
        ends = "no values"
        if known:
            ends = f"{number(min(known))} … {number(max(known))} at {counted(len(known), 'token')}"
        _say(console, f"  {curve['by']}: {visible(curve['name'])} {sparkline(curve['values'])} {ends}")
    console.print()
