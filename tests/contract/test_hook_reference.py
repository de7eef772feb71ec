"""The reference says what the code does: it is current and complete, and every hook's example trains."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import trl_ext
import trl_ext_hooks
from trl_ext.catalog import declaration
from trl_ext.plan.stages import BUILDING
from trl_ext.support.quiet import quiet
from trl_ext.testing import tiny_args, tiny_data, tiny_model, tiny_trainer
from trl_ext_hooks import Plugin, ops, specs, toolkit

HOOKS = Path(__file__).parents[2] / "hooks"
REFERENCE = (HOOKS / "REFERENCE.md").read_text()
BLOCKS = re.compile(r"```python\n(.*?)```", re.DOTALL)
HEADING = re.compile(r"^#+ (?:class )?`(.+)`$", re.MULTILINE)
SECTIONS = dict(
    zip(HEADING.findall(REFERENCE), re.split(r"^#+ (?:class )?`.+`$", REFERENCE, flags=re.M)[1:], strict=True)
)

SIGNATURES = {
    "configure": ["config"],
    "trainer_arguments": [],
    "reward_columns": ["names"],
    "setup": ["trainer"],
    "teardown": ["trainer"],
    "select_rows": ["rows", "group_ids", "trainer"],
    "rollout": ["prompts", "generate", "trainer", "context"],
    "annotate": ["rollout"],
    "rewards": ["scored"],
    "advantages": ["round"],
    "mix_advantages": ["round", "parts"],
    "keep_rows": ["round"],
    "token_mask": ["round"],
    "token_weights": ["round"],
    "batch_fields": ["round"],
    "hidden_positions": ["loss_mask"],
    "logps": ["call", "compute"],
    "loss_inputs": ["batch", "trainer"],
    "side_batch": ["trainer", "mode", "step"],
    "step_statistics": ["step"],
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
STAGES = ("setup", "rollout", "scoring", "loss", "pairs", "views", "campaign")


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", HOOKS / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_what_the_generator_writes() -> None:
    assert generator().page() == REFERENCE, "run `make docs`"


def test_signatures_are_frozen() -> None:
    """Outside plugins rely on these names: changing one is a breaking change and belongs into the changelog."""
    signatures = {hook: list(inspect.signature(getattr(specs, hook)).parameters) for hook in declaration.HOOKS}
    assert signatures == SIGNATURES


@pytest.mark.parametrize("hook", declaration.HOOKS)
def test_a_hook_has_its_signature_and_its_example_on_the_page(hook: str) -> None:
    code, example = (
        BLOCKS.findall(SECTIONS[hook]) if hook != "load_state_dict" else [*BLOCKS.findall(SECTIONS[hook]), ""]
    )
    (function,) = ast.parse(f"{code.rstrip()}: ...").body
    assert isinstance(function, ast.FunctionDef) and function.name == hook
    assert [argument.arg for argument in function.args.args] == SIGNATURES[hook]
    assert function.returns is not None
    assert example in inspect.getdoc(getattr(specs, hook))


def test_every_public_name_has_a_section() -> None:
    assert set(trl_ext_hooks.__all__) <= SECTIONS.keys()
    for name in trl_ext_hooks.__all__:
        value = getattr(trl_ext_hooks, name)
        home = importlib.import_module(getattr(value, "__module__", "typing"))
        if inspect.isclass(value) and home.__name__.startswith("trl_ext_hooks"):
            for member in vars(value):
                assert member.startswith("_") or member in SECTIONS[name], f"{name}.{member}"


def test_every_public_name_of_a_stage_has_a_section() -> None:
    for stage in (*STAGES, "plugin", "trainer", "basics"):
        names = public(importlib.import_module(f"trl_ext_hooks.{stage}"))
        assert names and names <= SECTIONS.keys()


def test_every_public_function_of_the_toolkit_has_a_section() -> None:
    modules = [module.name for module in pkgutil.iter_modules(toolkit.__path__)]
    assert {"groups", "losses", "tokens"} <= set(modules)
    for module in modules:
        names = public(importlib.import_module(f"{toolkit.__name__}.{module}"))
        assert names and {f"{module}.{name}" for name in names} <= SECTIONS.keys()


def public(module: ModuleType) -> set[str]:
    """Returns the public functions and classes that a module defines."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }


def test_every_heading_has_an_anchor_of_its_own() -> None:
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", REFERENCE, flags=re.DOTALL), re.MULTILINE)
    anchors = [generator().anchor(heading) for heading in headings]
    assert len(set(anchors)) == len(anchors) > 100


# --- the docstrings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", declaration.HOOKS)
def test_a_docstring_begins_with_a_verb_and_says_where_the_hook_runs(hook: str) -> None:
    text = " ".join(BLOCKS.sub("", inspect.getdoc(getattr(specs, hook)) or "").split())
    assert re.match(r"[A-Z][a-z]+s ", text)
    assert re.search(r"\bRuns (on|once on|in|inside|for) ", text)
    assert ";" not in text
    result = inspect.signature(getattr(specs, hook)).return_annotation
    if result.endswith("| None"):
        assert re.search(r"\bNone [a-z]+s ", text), "say what None means"


# --- the examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [hook for hook in declaration.HOOKS if hook != "load_state_dict"])
def test_example_trains(hook: str, model: str, plugin: Any, tmp_path: Path) -> None:
    """Every example is a complete plugin, and its hook runs in a real trainer."""
    (code,) = BLOCKS.findall(inspect.getdoc(getattr(specs, hook)) or "")
    names = {name: getattr(trl_ext_hooks, name) for name in trl_ext_hooks.__all__}
    exec(code, names := names | {"torch": torch, "time": time, "ops": ops, "__name__": "example"})
    (cls,) = [value for value in names.values() if getattr(value, "__module__", "") == "example"]
    assert issubclass(cls, Plugin)
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
        host = trainer._trl_ext
        trainer.train()
        handle.disable()
    assert host.calls[cls.name, hook] > 0 or hook in BUILDING  # these run before there is a host
