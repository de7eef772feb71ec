"""The picture of a run."""

import pytest

from trl_ext.train.curves import draw, smooth

from .histories import evaluation, training


def test_smoothing_keeps_constants_ends_and_length():
    assert smooth([2.0] * 30) == [2.0] * 30
    values = [float(i) for i in range(30)]
    assert smooth(values) == pytest.approx(values)
    assert smooth([1.0, 5.0]) == [1.0, 5.0]


def test_picture(tmp_path):
    history = [evaluation(0, 0.1), *(training(i, i / 20, i / 20) for i in range(1, 20)), evaluation(19, 0.8)]
    assert draw(history, tmp_path / "curves.png", "a title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not draw([training(1)], tmp_path / "none.png", "a title")
    assert not (tmp_path / "none.png").exists()
