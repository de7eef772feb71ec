"""The conformance checks: what they find in a plugin."""

import pytest
import torch

from trl_ext.testing import conformance
from trl_ext_hooks import Plugin, hookimpl


def test_check_finds_what_an_author_cannot_see(plugin, tmp_path):
    """A plugin whose numbers depend on the clock of the process, and one that draws from the shared generator."""
    from transformers import TrainerCallback

    class Drifting(Plugin):
        name = "drifting"
        trainers = ("grpo",)
        rounds = 0.0

        @hookimpl
        def advantages(self, round):
            type(self).rounds += 0.5  # on the class: neither fresh for each trainer nor in the checkpoint
            return round.advantages * type(self).rounds

        @hookimpl
        def rollout(self, prompts, generate):
            return generate(prompts)

    class Draws(Plugin):
        name = "draws"
        trainers = ("grpo",)

        @hookimpl
        def setup(self, trainer):
            class Draw(TrainerCallback):
                def on_train_begin(self, *args, **kwargs):
                    torch.rand(1)

            trainer.add_callback(Draw())

    failed = [entry.name for entry in conformance(plugin(Drifting), tmp_path / "a") if not entry.passed]
    assert failed == [
        "grpo: the same run gives the same numbers",
        "grpo: a resumed run ends where an uninterrupted one does",
    ]
    failed = [entry.name for entry in conformance(plugin(Draws), tmp_path / "b") if not entry.passed]
    assert failed[0] == "grpo: setting it up leaves the random stream alone"


def test_check_says_why_a_plugin_cannot_be_loaded(tmp_path):
    (report,) = conformance(str(tmp_path / "missing.py"), tmp_path)
    assert not report.passed and "does not exist" in report.detail


def failures(checks):
    return {check.name: check.detail for check in checks if not check.passed}


def test_an_error_of_a_hook_is_a_result_with_hook_and_line(plugin, tmp_path):
    class Raises(Plugin):
        name = "raises"
        trainers = ("grpo", "rloo")

        @hookimpl
        def advantages(self, round):
            return round.advantages / round.no_such_field

    found = failures(conformance(plugin(Raises), tmp_path))
    assert list(found) == ["grpo: trains, every hook fires", "rloo: trains, every hook fires"]
    for detail in found.values():
        assert "AttributeError" in detail and "hook 'advantages'" in detail
        assert "test_checks.py:" in detail and "round.no_such_field" in detail


def test_an_error_of_a_reward_function_is_a_result(plugin, tmp_path):
    def breaks(completions, **kwargs):
        return [1 / 0 for _ in completions]

    class Idle(Plugin):
        name = "idle"
        trainers = ("grpo",)

    (detail,) = failures(conformance(plugin(Idle), tmp_path, rewards=[breaks])).values()
    assert "ZeroDivisionError" in detail and "return [1 / 0 for _ in completions]" in detail


def test_what_shows_nothing_does_not_pass(plugin, tmp_path):
    class Nothing(Plugin):
        name = "nothing"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round):
            return None

    class Zero(Plugin):
        name = "zero"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round):
            return torch.zeros_like(round.advantages)

    found = failures(conformance(plugin(Nothing), tmp_path / "a"))
    assert list(found) == ["grpo: it changes what plain TRL does"]
    assert "weights are those of plain TRL" in found["grpo: it changes what plain TRL does"]
    found = failures(conformance(plugin(Zero), tmp_path / "b"))
    assert list(found) == ["grpo: it learns from the data"] and "no gradient" in found["grpo: it learns from the data"]


def test_equal_rewards_are_named_as_the_reason(tmp_path):
    found = failures(conformance("gdpo", tmp_path, rewards=[always_one]))
    assert "The rewards of every group are equal" in found["grpo: it learns from the data"]


def always_one(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.slow
def test_two_processes_find_statistics_of_one_process(tmp_path):
    """A plugin of a file that centres by the mean of its own rows, and one that centres by that of all rows."""
    text = """
from trl_ext_hooks import Plugin, hookimpl
class Centred(Plugin):
    name = "centred"
    trainers = ("grpo",)
    claims = ("estimator",)
    @hookimpl
    def advantages(self, round):
        total = round.total_reward
        return (total - total{rows}.mean()).float()
"""
    for name, rows, failing in (("own", "[round.local]", True), ("all", "", False)):
        (tmp_path / f"{name}.py").write_text(text.format(rows=rows))
        found = failures(conformance(str(tmp_path / f"{name}.py"), tmp_path / name, processes=2))
        assert bool(found) == failing, found
        if failing:
            assert list(found) == ["grpo: 2 processes give the numbers of one"]
