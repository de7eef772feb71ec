"""What tokens can be coloured by, and the shade of a value."""

from __future__ import annotations

import dataclasses
import math

import pytest

from trl_ext.inspection.file_format import Recording
from trl_ext.inspection.layers import Layer, layers_of


def test_layers(recorded: Recording) -> None:
    layers = layers_of(recorded)
    assert [(layer.set, layer.short, layer.signed) for layer in layers] == [
        ("advantage", "TRL", True),
        ("advantage", "after gdpo", True),
        ("advantage", "after steps", True),
        ("change by", "gdpo", True),
        ("change by", "steps", True),
        ("other values", "doubt", False),
    ]
    for place, row in enumerate(recorded.rows):
        for stage in range(3):
            assert layers[stage].values[place] == row.token_advantages(stage)
        before, after = row.token_advantages(1), row.token_advantages(2)
        assert layers[4].values[place] == [new - old for old, new in zip(before, after, strict=True)]
        assert layers[5].values[place] == row.values["doubt"]


def test_shades_are_the_root_of_the_share_with_the_sign(recorded: Recording) -> None:
    layer, scale = layers_of(recorded)[2], recorded.scale(2)
    for place, row in enumerate(recorded.rows):
        for value, shade in zip(row.token_advantages(2), layer.shades(place), strict=True):
            assert shade == pytest.approx(math.copysign(math.sqrt(abs(value or 0) / scale), value or 0), abs=1e-3)


def test_values_without_a_sign_are_shares_of_the_range() -> None:
    layer = Layer("n", "other values", "n", False, [[2.0, 3.0], [6.0, None]])
    assert layer.ends == (2.0, 6.0) and layer.shades(0) == [0.0, 0.25] and layer.shades(1) == [1.0, None]
    assert Layer("n", "other values", "n", False, [[2.0]]).shades(0) == [0.5]
    assert Layer("n", "other values", "n", False, [[None]]).shades(0) == [None]


def test_tokens_that_are_not_counted_have_no_shade(recorded: Recording) -> None:
    length = len(recorded.rows[0].ids)
    rows = [dataclasses.replace(recorded.rows[0], mask=[0] * length), *recorded.rows[1:]]
    *counted, other = layers_of(dataclasses.replace(recorded, rows=rows))
    assert all(layer.shades(0) == [None] * length for layer in counted)
    assert None not in other.shades(0)  # another value has nothing to do with the loss


def test_legends(recorded: Recording) -> None:
    for layer in layers_of(recorded):
        legend = layer.legend()
        ramp = legend["ramp"]
        assert ramp == sorted(ramp) and (ramp[0], ramp[-1]) == ((-1.0, 1.0) if layer.signed else (0.0, 1.0))
        assert legend["ends"][1].startswith("+") or not layer.signed
    zeros = Layer("n", "advantage", "n", True, [[0.0, 0.0]]).legend()
    assert zeros["ends"] == ["-1", "+1"] and zeros["ramp"][0] == -1.0
