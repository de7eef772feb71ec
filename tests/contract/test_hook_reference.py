"""The hook reference says what the code does: headings, examples, and the author's guide really run."""

import inspect
import re
import time
from pathlib import Path

import pytest
import torch

import trl_ext
import trl_ext_hooks
from trl_ext.catalog import declaration
from trl_ext.plan.stages import BUILDING
from trl_ext.testing import conformance, tiny_args, tiny_data, tiny_model, tiny_trainer
from trl_ext.testing.checks import quiet
from trl_ext_hooks import ops, specs

HOOKS = Path(__file__).parents[2] / "hooks"
README = (HOOKS / "README.md").read_text()
BLOCKS = re.compile(r"```python\n(.*?)```", re.DOTALL)

SIGNATURES = {
    "configure": ["config"],
    "trainer_arguments": [],
    "setup": ["trainer"],
    "teardown": ["trainer"],
    "select_rows": ["rows", "trainer"],
    "rollout": ["prompts", "generate", "trainer"],
    "annotate": ["rollout"],
    "rewards": ["scored"],
    "advantages": ["round"],
    "keep_rows": ["round"],
    "batch_fields": ["round"],
    "hidden_positions": ["loss_mask"],
    "logps": ["call", "compute"],
    "loss_inputs": ["batch", "trainer"],
    "policy_loss": ["loss"],
    "loss_terms": ["loss"],
    "optimizer_step": ["trainer"],
    "round_metrics": ["round"],
    "loss_metrics": ["loss"],
    "run": ["job"],
    "pair_batch": ["pairs"],
    "pair_logps": ["pairs"],
    "pair_metrics": ["pairs"],
    "inspect": ["round"],
    "state_dict": [],
    "load_state_dict": ["state"],
}


def test_signatures_are_frozen():
    """Outside plugins rely on these names: changing one is a breaking change and belongs into the changelog."""
    found = {hook: list(inspect.signature(getattr(specs, hook)).parameters) for hook in declaration.HOOKS}
    assert found == SIGNATURES


@pytest.mark.parametrize("hook", declaration.HOOKS)
def test_heading_and_docstring_are_in_the_reference(hook):
    assert f"### {hook}({', '.join(SIGNATURES[hook])})\n" in README, "run `make docs`"
    assert inspect.getdoc(getattr(specs, hook)) in README, "run `make docs`"


@pytest.mark.parametrize("hook", [hook for hook in declaration.HOOKS if hook != "load_state_dict"])
def test_example_trains(hook, model, plugin, tmp_path):
    """Every example is a complete plugin, and its hook runs in a real trainer."""
    (code,) = BLOCKS.findall(inspect.getdoc(getattr(specs, hook)))
    given = {name: getattr(trl_ext_hooks, name) for name in trl_ext_hooks.__all__}
    exec(code, given | {"torch": torch, "time": time, "ops": ops}, made := {})
    (cls,) = made.values()
    assert hook in declaration.implemented(cls)
    data = tiny_data(cls.trainers[0])
    data = data.add_column("difficulty", list(range(len(data))))
    settings = {"scale_rewards": "none"} if hook == "configure" else {}
    if hook == "trainer_arguments":
        model = tiny_model(tmp_path / "model", tools=True)
    if hook == "run":
        trl_ext.run(plugin(cls), model=model, args=tiny_args("dpo", tmp_path), train_dataset=data)
        assert (tmp_path / "model.safetensors").is_file() and (tmp_path / "second-half").is_dir()
        return
    with quiet(), trl_ext.enable(plugin(cls)) as handle:
        if hook == "inspect":  # only called while rounds are recorded
            handle.record()
        trainer = tiny_trainer(
            cls.trainers[0], model, tmp_path, data=data, save_strategy="steps", save_steps=1, **settings
        )
        session = trainer._trl_ext
        trainer.train()
        handle.disable()
    assert session.calls[cls.name, hook] > 0 or hook in BUILDING  # these run before there is a session


def test_the_guide_s_plugin_conforms(tmp_path):
    file = tmp_path / "positives_first.py"
    file.write_text(BLOCKS.findall(README)[0])
    checks = conformance(str(file), tmp_path / "runs")
    assert len(checks) > 4
    assert not [check for check in checks if not check.passed]


def test_the_guide_names_every_attribute():
    shown = ("name", "paper", "summary", "trainers", "Options", "needs", "claims", "fields", "honours", "state")
    for attribute in shown:
        assert f"`{attribute}`" in README
