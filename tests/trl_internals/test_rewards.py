"""Names of reward functions."""

from __future__ import annotations

import pytest

from trl_ext.trl_internals.rewards import distinct


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ()),
        (["a", "b"], ("a", "b")),
        (["a", "a", "b", "a"], ("a", "a_2", "b", "a_3")),
        (["a", "a", "a_2"], ("a", "a_3", "a_2")),
        (["a_2", "a", "a"], ("a_2", "a", "a_3")),
        (["a_2", "a_2", "a", "a"], ("a_2", "a_2_2", "a", "a_3")),
    ],
)
def test_every_name_occurs_once(given: list[str], expected: tuple[str, ...]) -> None:
    assert distinct(given) == expected
