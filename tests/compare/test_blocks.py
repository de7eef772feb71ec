"""Blocks: what a file may hold, and what is said about what it may not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, ValidationError, model_validator

from trl_ext import ConfigError
from trl_ext.compare.blocks import Block, Count, Number, explain


class Inner(Block):
    share: Number = Field(validation_alias="is", description="a share such as 0.5")
    rows: Count = 1


class Outer(Block):
    text: str = ""
    inner: list[Inner] = Field(default_factory=list)
    later: dict[str, Any] = Field(default_factory=lambda read: {"text": read["text"]})

    @model_validator(mode="after")
    def _refuse(self) -> Outer:
        if self.text == "bad":
            raise ConfigError("`bad` cannot be.")
        return self


def read(content: Any) -> Outer:
    return Outer.model_validate(content, context={})


def mistakes(content: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        read(content)
    return explain(caught.value, "a.yaml", "block").splitlines()


def test_values_defaults_and_numbers_as_text() -> None:
    block = read({"text": "t", "inner": [{"is": "1e-3"}, {"is": 2, "rows": 3}]})
    assert [(inner.share, inner.rows) for inner in block.inner] == [(1e-3, 1), (2.0, 3)]
    assert block.later == {"text": "t"} and read(None) == Outer()
    assert Inner(share=0.5) == Inner.model_validate({"is": 0.5}, context={})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (3, ["a.yaml: block: expected a mapping, got 3."]),
        ({"txt": 1}, ["a.yaml: block: there is no key 'txt'. Did you mean 'text'? Known: inner, later, text."]),
        ({"text": 1}, ["a.yaml: block.text: expected text, got 1."]),
        ({"text": "bad"}, ["a.yaml: block: `bad` cannot be."]),
        ({"inner": {}}, ["a.yaml: block.inner: expected a list, got {}."]),
        ({"inner": [{}]}, ["a.yaml: block.inner[0]: `is` is missing, a share such as 0.5."]),
        ({"inner": [{"share": 1}]}, ["a.yaml: block.inner[0]: there is no key 'share'. Known: is, rows."]),
        ({"inner": [{"is": True}]}, ["a.yaml: block.inner[0].is: expected a number, got True."]),
        ({"inner": [{"is": "nan"}]}, ["a.yaml: block.inner[0].is: expected a finite number, got 'nan'."]),
        (
            {"inner": [{"is": 1, "rows": "2"}, {"is": 1, "rows": 0}, {"is": 1, "rows": True}, {"is": 1, "rows": 1.0}]},
            [
                "a.yaml: block.inner[0].rows: expected a whole number, got '2'.",
                "a.yaml: block.inner[1].rows: expected a number of at least 1, got 0.",
                "a.yaml: block.inner[2].rows: expected a whole number, got True.",
                "a.yaml: block.inner[3].rows: expected a whole number, got 1.0.",
            ],
        ),
    ],
    ids=str,
)
def test_mistakes(content: Any, expected: list[str]) -> None:
    assert mistakes(content) == expected
