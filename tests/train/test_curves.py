"""The picture of a run."""

import pytest

from trl_ext.train.curves import draw, smooth

from .histories import evaluation, training


def test_smoothing_keeps_constants_ends_and_length():
    assert smooth([2.0] * 30) == [2.0] * 30
    values = [float(i) for i in range(30)]
    assert smooth(values) == pytest.approx(values)
    assert smooth([1.0, 5.0]) == [1.0, 5.0]


def test_picture():
    history = [evaluation(0, 0.1), *(training(i, i / 20, i / 20) for i in range(1, 20)), evaluation(19, 0.8)]
    content = draw(history, "a title with $signs$ and $")
    assert content is not None and content.startswith(b"\x89PNG")
    assert draw([training(1)], "a title") is None
