"""The view in a terminal and in a pipe."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import pytest

from trl_ext.inspection import formatting, terminal
from trl_ext.inspection.file_format import Recording

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal in which every row of a table has one line."""
    monkeypatch.setenv("COLUMNS", "200")


def shown(recording: Recording, rows: Any, color: bool = False) -> str:
    stream = io.StringIO()
    terminal.show(recording, set(rows), file=stream, color=color)
    return stream.getvalue()


def changed(recorded: Recording, place: int, **changes: Any) -> Recording:
    rows = list(recorded.rows)
    rows[place] = dataclasses.replace(rows[place], **changes)
    return dataclasses.replace(recorded, rows=rows)


def test_a_pipe_gets_plain_text(recorded: Recording, rounds: Any) -> None:
    out = shown(recorded, range(4))
    assert "\x1b" not in out
    assert "round 1 before step 1 · GRPO · TRL → gdpo → steps · 12 rows in 3 groups · 1 process" in out
    for row in range(4):
        value = recorded.rows[row]
        advantages = [formatting.signed(value.advantage(stage)) for stage in range(3)]
        assert f"row {row}  {' → '.join(advantages)}\n" in out
        assert rounds.text_of(row).replace("\n", "⏎\n") in out
    assert "advantages: TRL" in out and "advantage: steps" in out and "bonus" in out and "letters" in out
    assert "Other groups: 1, 2. --group 1 or --group all shows them." in out
    assert "steps: half 1 on 0-" in out and "steps: half 2 = " in out and "steps: progress" in out
    assert "row 4" not in out


def test_the_table_of_a_group_has_every_change(recorded: Recording) -> None:
    out = shown(recorded, [0, 1])
    row = recorded.rows[0]
    cells = re.split(r"\s{2,}", next(line for line in out.splitlines() if re.match(r"0 +\d+ ", line)).strip())
    digits, short, bonus = (formatting.number(value) for value in row.rewards[1])
    weights = [stage.weights for stage in recorded.reward_stages]
    totals = [formatting.number(row.total(stage, weights[stage])) for stage in range(2)]
    assert cells[:5] == ["0", str(len(row.ids)), digits, short, f"(none) → {bonus}"]
    assert cells[5] == " → ".join(totals)
    assert cells[6:9] == [formatting.signed(row.advantage(stage)) for stage in range(3)]
    assert cells[9:] == [
        formatting.number(row.fields["letters"]),
        row.fields["note"],
        formatting.number(row.fields["share"]),
    ]


def test_tokens_are_coloured_by_the_last_advantage(recorded: Recording) -> None:
    row = max(recorded.rows, key=lambda row: row.advantage(-1))
    low = min(recorded.rows, key=lambda row: row.advantage(-1))
    assert row.advantage(-1) > 0 > low.advantage(-1)
    out = shown(recorded, [row.row, low.row], color=True)
    assert ESCAPES.sub("", out).count("tokens by advantage") == 1
    assert "48;2;33;102;172" in out and ("48;2;179;88;6" in out or "48;2;241;163;64" in out)
    scale = recorded.scale(-1)
    styles = [terminal.style(value * scale, scale) for value in (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)]
    assert len(set(styles)) == 7 and styles[3] == "" and terminal.style(None, scale) == "dim italic"
    quiet = dataclasses.replace(row, mask=[0] * len(row.ids))
    place = recorded.rows.index(row)
    assert "\x1b[2;3m" in shown(changed(recorded, place, mask=quiet.mask), [row.row], color=True)


def test_model_output_cannot_steer_the_terminal(recorded: Recording) -> None:
    tokens = ["\x1b[2J", "\x9b31m", "\u202e", "[bold]", "\ud800", "\x07", "a\tb"]
    length = len(tokens)
    value = changed(
        recorded, 0, tokens=tokens, ids=[1] * length, mask=[1] * length, advantages=[0.5, 0.5, [0.5] * length],
        values={}, spans=[{"by": "p", "start": 0, "end": 1, "label": "\x1b[1m", "value": None}], curves=[],
        fields={"letters": "\x1b[1m"}, calls=[{"name": "\x1b", "arguments": {"x": "\x1b"}, "result": "\x1b"}],
    )  # fmt: skip
    out = shown(value, [0])
    assert "\x1b" not in out and "\x9b" not in out and "\u202e" not in out and "\x07" not in out
    assert "␛[2J\\u009b31m\\u202e[bold]\\ud800␇a " in out  # a tab becomes spaces
    out.encode()  # a lone surrogate would fail here


def test_long_lists_of_spans_are_cut(recorded: Recording) -> None:
    many = [{"by": "p", "start": 0, "end": 1, "label": f"step {i}", "value": None} for i in range(40)]
    out = shown(changed(recorded, 0, spans=many), [0])
    assert "p: step 11 on 0-0" in out and "step 12 " not in out and "and 28 further spans, see the page" in out


def test_what_is_left_out_and_what_did_nothing(recorded: Recording) -> None:
    lazy = {"name": "lazy", "version": "1", "options": {}, "hooks": ["advantages"], "claims": []}
    free = lazy | {"name": "free", "hooks": [], "claims": ["no_advantages"]}
    plugins = [*recorded.plugins, lazy, free]
    out = shown(dataclasses.replace(recorded, left_out=52, plugins=plugins), [0])
    assert "free trains without advantages: those of this round are not used." in out
    assert "not recorded: 52 further rows of the round." in out
    assert "lazy left the advantages of this round as they were." in out and "steps left" not in out


@pytest.mark.parametrize(
    ("value", "expected"), [(None, "-"), (0.0, "0"), (1e-17, "~0"), (0.123456, "+0.123"), (-3.0, "-3")]
)
def test_signed(value: float | None, expected: str) -> None:
    assert formatting.signed(value) == expected


def test_sparkline() -> None:
    assert formatting.sparkline([0.0, 0.5, 1.0]) == "▁▅█" and formatting.sparkline([None, None]) == ""
    assert formatting.sparkline([1.0, None, 1.0]) == "▁ ▁"
    assert formatting.sparkline([-2.4748, -2.4711]) == "▁▁" and formatting.sparkline([10000.4, 9999.6]) == "▁▁"
    assert len(formatting.sparkline([float(i) for i in range(1000)])) <= 60
    assert formatting.chain(["1", "1", "2", "2", "1"]) == "1 → 2 → 1"
