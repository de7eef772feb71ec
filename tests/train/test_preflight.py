"""Reward functions, called on empty completions before the model is loaded."""

import pytest

from trl_ext import ConfigError
from trl_ext.train import preflight

ROWS = [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2", "index": 0}] * 2
PLAIN = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def tried(function, rows=ROWS) -> list[str]:
    warnings: list[str] = []
    preflight.check_rewards({"it": function}, rows, warnings.append)
    return warnings


def test_reward_functions_are_called_as_the_trainer_does():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **columns):
        log_metric("name", 1.0)
        log_extra("name", [1, 2])
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, columns=columns)
        return [None, 1]

    assert tried(reward) == [] and seen["columns"] == {"index": [0, 0]}
    assert seen["completions"] == [[{"role": "assistant", "content": ""}]] * 2 and seen["ids"] == [[], []]
    assert tried(reward, PLAIN) == [] and seen["completions"] == ["", ""] and seen["answer"] == ["2", "4"]


def test_asynchronous_reward_functions():
    async def slow(completions, **columns):
        return [0.0] * len(completions)

    class Slow:
        async def __call__(self, completions, **columns):
            return [0.0]

    assert tried(slow) == []
    with pytest.raises(ConfigError, match="returned 1 rewards for 2 completions"):
        tried(Slow())


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (1.0, "returned float for 2 completions, expected a list of 2 numbers"),
        ([0.0] * 3, "returned 3 rewards for 2 completions"),
        (["good", "bad"], "returned 'good', expected a number"),
    ],
)
def test_results_of_a_wrong_kind(result, words):
    with pytest.raises(ConfigError, match=words):
        tried(lambda **columns: result)


def test_an_exception_is_a_warning():
    def picky(completions, **columns):
        return [float(completion[0]["content"]) for completion in completions]

    (warning,) = tried(picky)
    assert "ValueError" in warning and "empty completions" in warning


def test_reward_functions_of_what_plugins_find_are_not_called():
    def reward(completions, found, **columns):
        raise AssertionError("there is no rollout yet")

    preflight.check_rewards({"it": reward}, ROWS, pytest.fail, fields={"found"})
    (warning,) = tried(reward)
    assert "missing 1 required positional argument: 'found'" in warning
