"""The content of the page: labels, shares and shades as the terminal would write them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from trl_ext.inspection import page_data
from trl_ext.inspection.file_format import Recording
from trl_ext.inspection.formatting import number, signed
from trl_ext.inspection.layers import layers_of


@pytest.fixture(scope="module")
def content(recorded: Recording) -> dict[str, Any]:
    return page_data.describe(recorded)


def texts(value: Any) -> Iterator[str]:
    """Every text inside a value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for entry in pair for text in texts(entry))
    elif isinstance(value, list):
        yield from (text for entry in value for text in texts(entry))


def changed(recorded: Recording, place: int, **changes: Any) -> Recording:
    rows = list(recorded.rows)
    rows[place] = dataclasses.replace(rows[place], **changes)
    return dataclasses.replace(recorded, rows=rows)


def test_the_head(recorded: Recording, content: dict[str, Any]) -> None:
    assert content["title"] == "round 1: GRPO → gdpo → steps" and content["names"] == ["GRPO", "gdpo", "steps"]
    assert content["facts"].startswith("Round 1, before step 1 · 12 rows in 3 groups · ")
    assert content["stages"] == ["TRL", "gdpo", "steps"] and content["notes"] == []
    several = page_data.describe(dataclasses.replace(recorded, processes=2, left_out=3))
    assert "before step 1 on 2 processes · " in several["facts"]
    assert several["notes"] == ["not recorded: 3 further rows of the round."]


def test_the_table_says_what_the_terminal_says(recorded: Recording, content: dict[str, Any]) -> None:
    table, row = content["groups"][0]["table"], recorded.rows[0]
    assert table["heads"][:6] == ["row", "tokens", "numbers", "brief", "bonus ×0.5", "total"]
    cells = table["rows"][0]["cells"]
    digits, brief, bonus = (number(value) for value in row.rewards[1])
    assert [cell["texts"] for cell in cells[:4]] == [[str(len(row.ids))], [digits], [brief], ["none", bonus]]
    assert cells[4]["texts"] == [number(row.total(stage, recorded.reward_stages[stage].weights)) for stage in range(2)]
    assert [cell["texts"] for cell in cells[5:8]] == [[signed(row.advantage(stage))] for stage in range(3)]
    assert all(0 <= cell["meter"] <= 1 for cell in cells[1:4]) and cells[2]["meter"] == 0.0  # the reward is null
    assert all(-1 <= cell["shade"] <= 1 for cell in cells[5:8])


def test_slopes_are_shares_of_the_largest_advantage(recorded: Recording, content: dict[str, Any]) -> None:
    shares = [share for group in content["groups"] for slope in group["slopes"] for share in slope["shares"]]
    assert max(map(abs, shares)) == 1.0
    reach = max(abs(row.advantage(stage)) for row in recorded.rows for stage in range(3))
    assert content["ends"] == [signed(reach), "0", signed(-reach)]
    for row, slope in zip(recorded.rows[:4], content["groups"][0]["slopes"], strict=True):
        assert slope["sign"] == (row.advantage(2) > 0) - (row.advantage(2) < 0)


def test_the_group_that_opens_is_the_telling_one(recorded: Recording, content: dict[str, Any]) -> None:
    assert [group["open"] for group in content["groups"]] == [True, False, False]
    for place in range(4):
        recorded = changed(recorded, place, advantages=[0.0, 0.0, 0.0])
    assert [group["open"] for group in page_data.describe(recorded)["groups"]] == [False, True, False]


def test_spans_curves_and_labels_of_a_row(recorded: Recording, content: dict[str, Any]) -> None:
    row, entry = recorded.rows[0], content["groups"][0]["rows"][0]
    (lane,) = entry["lanes"]
    assert [span["label"] for span in lane] == ["half 1", f"half 2 {number(row.spans[1]['value'])}"]
    assert {span["kind"] for span in lane} == {"steps: half"} and {span["colour"] for span in lane} == {0}
    assert lane[1]["tip"] == f"half 2 = {number(row.spans[1]['value'])}" and lane[1]["by"] == "steps"
    (curve,) = entry["curves"]
    assert curve["name"] == "steps: progress" and curve["ends"] == "0 … 1" and curve["zero"] is None
    assert len(curve["positions"]) == len(curve["heights"]) == len(curve["labels"])
    known = [height for height in curve["heights"] if height is not None]
    assert known == [0.94, 0.06] and None in curve["heights"]  # from the bottom to the top, with a gap
    assert entry["labels"]["advantage: TRL"] == signed(row.advantages[0])
    assert entry["labels"]["advantage: steps"] == [signed(value) for value in row.advantages[2]]
    assert entry["labels"]["doubt"] == [number(value) for value in row.values["doubt"]]


def test_lanes_hold_no_overlap_and_keep_kinds_together() -> None:
    def span(start: int, end: int, label: str) -> dict[str, Any]:
        return {"by": "p", "start": start, "end": end, "label": label, "value": None}

    spans = [span(0, 4, "step 1"), span(2, 3, "tool"), span(4, 6, "step 2"), span(5, 8, "step 3"), span(4, 5, "tool")]
    lanes = [[entry["label"] for entry in lane] for lane in page_data.lanes(spans)]
    assert lanes == [["step 1", "step 2"], ["tool", "tool"], ["step 3"]]


def test_nothing_invisible_reaches_the_page(recorded: Recording) -> None:
    evil = "\x1b[2J\u202e\x07"
    span = {"by": evil, "start": 0, "end": 1, "label": evil, "value": None}
    call = {"name": evil, "arguments": {"x": evil}, "result": evil}
    length = len(recorded.rows[0].ids)
    spoiled = changed(
        recorded, 0, tokens=[evil] * length, spans=[span], calls=[call], columns={evil: evil}, fields={evil: evil}
    )
    content = page_data.describe(spoiled)
    shown = list(texts(content))
    assert not [text for text in shown for character in "\x1b\u202e\x07" if character in text]
    assert "␛[2J\\u202e␇" in shown and content["groups"][0]["facts"] == " · ␛[2J\\u202e␇ ␛[2J\\u202e␇"


def test_equal_shades_are_written_once(recorded: Recording, content: dict[str, Any]) -> None:
    shades = content["groups"][0]["rows"][0]["shades"]
    trl, _, steps = shades[:3]
    assert trl == layers_of(recorded)[0].shades(0)[0] and steps == layers_of(recorded)[2].shades(0)
    empty = changed(recorded, 0, tokens=[], ids=[], mask=[], values={}, spans=[], curves=[], advantages=[0.0, 0.0, []])
    assert page_data.describe(empty)["groups"][0]["rows"][0]["shades"][:3] == [[], [], []]


def test_values_of_plugins(recorded: Recording) -> None:
    fields = {"share": 0.123456, "count": 12345, "yes": True, "list": [1, "a"], "text": "as it is"}
    content = page_data.describe(changed(recorded, 0, fields=fields))
    table = content["groups"][0]["table"]
    assert [cell["texts"] for cell in table["rows"][0]["cells"][8:13]] == [
        ["0.123"], ["12345"], ["true"], ['[1, "a"]'], ["as it is"],
    ]  # fmt: skip
