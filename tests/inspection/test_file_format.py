"""Files of rounds: they come back as they were written, and every file that does not fit is refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from trl_ext import ConfigError
from trl_ext.inspection import file_format
from trl_ext.inspection.file_format import Recording


def assert_refused(file: Path, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        file_format.read(file)
    assert all(word in str(caught.value) for word in [str(file), *words]), caught.value


def test_a_round_comes_back_and_leaves_no_other_file(recorded: Recording, tmp_path: Path) -> None:
    path = file_format.write(recorded, tmp_path)
    assert path == tmp_path / "round-1.json" and list(tmp_path.iterdir()) == [path]
    assert file_format.read(path) == recorded


def test_rounds_are_found_in_order(recorded: Recording, tmp_path: Path) -> None:
    for number in (10, 2, 1):
        file_format.write(dataclasses.replace(recorded, round=number), tmp_path)
    (tmp_path / "round-x.json").write_text("{}")
    assert [path.name for path in file_format.find(str(tmp_path))] == ["round-1.json", "round-2.json", "round-10.json"]


def test_advantages_and_totals_of_a_row(recorded: Recording) -> None:
    row = dataclasses.replace(
        recorded.rows[0], mask=[1, 0, 1], advantages=[0.5, [1.0, 9.0, 3.0]], rewards=[[2.0, None], [None, None]]
    )
    assert row.advantage(0) == 0.5 and row.advantage(1) == 2.0
    assert row.token_advantages(0) == [0.5, None, 0.5] and row.token_advantages(1) == [1.0, None, 3.0]
    assert row.total(0, [0.5, 7.0]) == 1.0 and row.total(1, [0.5, 7.0]) is None


def spoil(content: dict[str, Any], change: str) -> Any:
    row = content["rows"][0]
    match change:
        case "newer":
            return content | {"format": 2, "trl_ext": "9.0"}
        case "no rows":
            return content | {"rows": []}
        case "no stages":
            row["advantages"] = []
            return content | {"rows": [row], "advantage_stages": []}
        case "other key":
            return content | {"unknown": 1}
        case "less":
            del content["prompts"]
        case "tokens":
            row["tokens"].pop()
        case "prompt":
            row["prompt"] = 9
        case "rewards":
            row["rewards"][0].pop()
        case "advantages":
            row["advantages"][2].pop()
        case "span":
            row["spans"][0]["end"] = 999
        case "span keys":
            del row["spans"][0]["end"]
        case "curve":
            row["curves"][0]["values"].pop()
        case "row":
            content["rows"][0] = 3
    return content


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("newer", ["was written by trl_ext 9.0 in format 2. This trl_ext", "reads formats up to 1", "--upgrade"]),
        ("no rows", ["is damaged: it has no rows. Record the round again."]),
        ("no stages", ["is damaged: it has no rewards or no advantages"]),
        ("other key", ["is damaged: TypeError", "unknown"]),
        ("less", ["is damaged: KeyError: 'prompts'"]),
        ("tokens", ["is damaged: row 0 has 42 token ids and another number of texts"]),
        ("prompt", ["row 0 has prompt 9 of 3"]),
        ("rewards", ["row 0 has rewards for other columns"]),
        ("advantages", ["row 0 has advantages for other stages or tokens"]),
        ("span", ["row 0 has a span outside its"]),
        ("span keys", ["is damaged: KeyError: 'end'"]),
        ("curve", ["row 0 has a curve with fewer values"]),
        ("row", ["is damaged: TypeError"]),
    ],
)
def test_damaged_files_and_those_of_a_newer_version(
    change: str, words: list[str], folder: Path, tmp_path: Path
) -> None:
    content = json.loads((folder / "inspect" / "round-1.json").read_text())
    (tmp_path / "round-1.json").write_text(json.dumps(spoil(content, change)))
    assert_refused(tmp_path / "round-1.json", words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ["is not a recorded round (invalid JSON: "]),
        ("[]", ["is not a recorded round (it has no number `format`)", "--inspect 2"]),
        ('{"rows": []}', ["is not a recorded round (it has no number `format`)"]),
        ("\udcff", ["is not a recorded round (invalid JSON: "]),
    ],
)
def test_other_files(content: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "some.json").write_bytes(content.encode(errors="surrogateescape"))
    assert_refused(tmp_path / "some.json", words)
