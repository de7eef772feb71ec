"""Reward functions by dotted path."""

import pytest

from trl_ext import ConfigError
from trl_ext.support import reward_functions


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_rewards.score", ["importing 'no_such_rewards' failed", "PYTHONPATH"]),
        ("trl_ext.testing.digit", ["has no 'digit'", "Did you mean 'digits'?"]),
    ],
)
def test_reward_functions_that_do_not_exist(path, words):
    with pytest.raises(ConfigError) as error:
        reward_functions.reward_functions([path])
    assert all(word in str(error.value) for word in words)


def test_infinite_rewards():
    assert reward_functions.infinite_rewards("reward function 'f'", [1.0, None, float("nan"), 3e38]) is None
    text = reward_functions.infinite_rewards("reward function 'f'", [1.0, float("-inf"), None, float("inf")])
    assert text is not None and text.startswith("reward function 'f' returned -inf for 2 of 4 completions.")
