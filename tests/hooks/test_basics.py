"""The log of metrics: what is summed, what is counted, and under which name."""

from __future__ import annotations

import math

import pytest
import torch

from trl_ext_hooks.basics import MetricLog

NAN = math.nan


def logged(*arguments: object) -> tuple[float, float]:
    log = MetricLog("mine")
    log.add("value", *arguments)  # type: ignore[arg-type]
    return log.values["mine/value"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((torch.tensor([1.0, NAN, 4.0]),), (5.0, 2.0)),
        ((torch.tensor([[True, False], [True, True]]),), (3.0, 4.0)),
        ((torch.tensor([2, 3]),), (5.0, 2.0)),
        ((torch.tensor([]),), (0.0, 0.0)),
        ((torch.tensor([NAN]),), (0.0, 0.0)),
        ((torch.tensor([1.0, 2.0], requires_grad=True), 10), (3.0, 10.0)),
        ((torch.tensor(6.0), torch.tensor(4)), (6.0, 4.0)),
        ((0.5,), (0.5, 1.0)),
        ((True,), (1.0, 1.0)),
        ((3, 0), (3.0, 0.0)),
    ],
)
def test_sums_and_counts(arguments: tuple[object, ...], expected: tuple[float, float]) -> None:
    assert logged(*arguments) == expected


def test_one_name_adds_up_and_plugins_stay_apart() -> None:
    log = MetricLog("one")
    log.add("value", torch.tensor([1.0, 2.0]))
    log.add("value", 3.0)
    log.of("other").add("value", 10.0)
    assert log.values == {"one/value": (6.0, 3.0), "other/value": (10.0, 1.0)}


@pytest.mark.parametrize("wrong", ["much", [1.0], None])
def test_what_is_no_number_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match=f"from a tensor or a number, got {type(wrong).__name__}"):
        logged(wrong)
