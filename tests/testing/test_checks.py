"""The conformance checks: what they find in a plugin."""

from trl_ext.testing import conformance
from trl_ext_hooks import Plugin, hookimpl


def test_check_finds_what_an_author_cannot_see(plugin, tmp_path):
    """A plugin whose numbers depend on the clock of the process, and one that draws from the shared generator."""
    import torch
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
