"""What outsiders import from the contract stays importable, under its old names too."""

from __future__ import annotations

import importlib
import sys

import pytest

import trl_ext_hooks
from tests import processes

OLD = {
    "types": "Config Require Need Refuse Warn Requirement TrainerView Generation Turns Rollout Rewards Scored Round "
    "LogpsCall Logps Loss PolicyLoss Pairs ScoredPairs PairLogps loss_mask Span Curve Views Job Metric Generate "
    "Compute Fields TrainerKind Mode Role",
    "ops": "GroupStats group_stats group_normalize group_pairs scale_gradient masked_mean predicting align_tokens "
    "count_tool_messages count_tag",
    "calls": "CallCounter count_tag",
    "memory": "PromptMemory prompt_key",
    "segments": "Marks TokenReader LineBreaks Read chunk_ends step_ends thinking_end thinned vocabulary_ends",
    "judges": "HttpJudge JudgeError Question ask ask_together load make_judge match_judge",
}


@pytest.mark.parametrize("module", OLD)
def test_an_old_module_holds_the_same_objects(module: str) -> None:
    old = importlib.import_module(f"trl_ext_hooks.{module}")
    for name in OLD[module].split():
        value = getattr(old, name)
        home = getattr(value, "__module__", "")
        if home.startswith("trl_ext_hooks"):
            assert value is getattr(sys.modules[home], name) and home != old.__name__


def test_both_ways_to_import_a_module() -> None:
    code = "from trl_ext_hooks import judges, ops; import trl_ext_hooks.segments as segments; print(ops.group_stats)"
    done = processes.run_python(code)
    assert done.stdout.startswith("<function group_stats"), done.stderr


def test_the_short_name_has_every_tensor_function_of_the_toolkit() -> None:
    ops = importlib.import_module("trl_ext_hooks.ops")
    for module in ("groups", "losses", "tokens"):
        toolkit = importlib.import_module(f"trl_ext_hooks.toolkit.{module}")
        public = {name for name, value in vars(toolkit).items() if getattr(value, "__module__", "") == toolkit.__name__}
        assert public <= set(ops.__all__)


def test_every_listed_name_exists() -> None:
    assert all(hasattr(trl_ext_hooks, name) for name in trl_ext_hooks.__all__)
