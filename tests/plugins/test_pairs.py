"""Built-ins that may be combined really train together, and the table in plugins/README.md says which.

Two plugins work together where each does its part in the run of both: what it waits for happens, and the run is another
one without it.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import trl_ext
from trl_ext.plan import compose, stages
from trl_ext.testing import tiny_args, tiny_data
from trl_ext.trl_internals import seams

FILE = Path(__file__).parents[2] / "plugins" / "pairs.py"
_spec = importlib.util.spec_from_file_location("pairs", FILE)
assert _spec and _spec.loader
pairs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pairs)

TRIGGERS = {
    "decs": ("decs/redundant_tokens", 0.0, 1.0),
    "dr-mas": ("dr-mas/advantage_change", 0.0, math.inf),
    "dvao": ("dvao/advantage_change", 0.0, math.inf),
    "gdpo": ("gdpo/advantage_change", 0.0, math.inf),
    "hdpo": ("hdpo/signal", 0.0, math.inf),
    "otc": ("otc/r_tool_mean", -1.0, 1.0),
    "p3o": ("p3o/pairs", 0.0, math.inf),
    "polychromic": ("polychromic/advantage_change", 0.0, math.inf),
    "shared-prefix": ("shared-prefix/token_ratio", 1.0, math.inf),
    "spae": ("spae/probes", 0.0, math.inf),
    "tgdpo": ("tgdpo/factor/chosen", 1.0, math.inf),
    "thinkless": ("thinkless/advantage_change", 0.0, math.inf),
    "tools": ("tools/call_frequency", 0.0, math.inf),
    "trpa": ("trpa/pairs", 0.0, math.inf),
    "vl-dac": ("vl-dac/steps", 1.0, math.inf),
}
"""The metric of each plugin that says it had something to act on in a step: strictly between the two numbers."""
LIKE_GDPO = {"dr-mas", "dvao", "polychromic"}
"""Estimators that act where `gdpo` does, and nowhere else."""
EXACT = "shared-prefix"
"""Changes no number. Without it a run is the same up to rounding."""
GIVES = "tools"
"""Gives the trainer what the others act on. It has no effect but the calls."""


def test_table_is_current() -> None:
    assert pairs.BEGIN + pairs.table() + pairs.END in pairs.README.read_text(), "run `make docs`"


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [case for case in pairs.pairs() if case[2] is not None],
    ids=lambda value: getattr(value, "name", "") or "refused",
)
def test_other_pairs_are_refused(left: Any, right: Any, reason: str) -> None:
    with pytest.raises(trl_ext.ConfigError, match=r"cannot be combined|no trainer"):
        trl_ext.enable(left.name, right.name)


ALLOWED = [
    (left.name, right.name, kind)
    for left, right, reason in pairs.pairs()
    if reason is None
    for kind in compose.common_trainers([left, right])
]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(trainer: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters()])


TRAINED = [
    # every fourth pair in each run of the suite, and all of them with `make slow`
    pytest.param(*case, marks=[pytest.mark.slow] if LIKE_GDPO & set(case) or number % 4 else [])
    for number, case in enumerate(ALLOWED)
    if not {"apo", "mix"} & set(case)  # the parts of a mix decide what it does, and it has tests of its own
]


@pytest.mark.parametrize(("left", "right", "kind"), TRAINED)
def test_each_of_two_plugins_does_its_part(left: str, right: str, kind: str, build: Any, smoke: Any) -> None:
    if kind == "dpo" and seams.trl_version() < seams.Version("1.15"):
        pytest.skip("DPO's forward can be owned from TRL 1.15 on")
    requests, settings = smoke(kind, left, right)

    def run(*names: str) -> Any:
        with trl_ext.enable({name: requests[name] for name in names}):
            trainer = build(kind, **settings)
            trainer.train()
            trainer.fired = {name for name, _ in trainer._trl_ext.calls}
        assert trainer.state.global_step == 2
        return trainer

    both = run(left, right)
    hooks = {name: set(both_spec.hooks) for name, both_spec in specs().items() if name in (left, right)}
    assert both.fired >= {name for name, implemented in hooks.items() if implemented - set(stages.LIFECYCLE)}
    for name, other in ((left, right), (right, left)):
        metric, above, below = TRIGGERS[name]
        values = logged(both, metric)
        assert any(above < value < below for value in values), f"{name} had nothing to act on: {metric} {values}"
        if name == GIVES:
            continue
        change = (parameters(both) - parameters(run(other))).abs().max().item()
        assert change < 1e-3 if name == EXACT else change > 1e-5, f"without {name}, parameters differ by {change}"


def specs() -> dict[str, Any]:
    return {spec.name: spec for left, right, _ in pairs.pairs() for spec in (left, right)}


@pytest.mark.parametrize(
    "name", [left if right == "apo" else right for left, right, _ in ALLOWED if "apo" in (left, right)]
)
def test_each_part_of_a_run_that_a_plugin_owns(
    name: str, model: str, smoke: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """APO makes the pairs of DPO trainings, in which the other plugin does its part."""
    if seams.trl_version() < seams.Version("1.15"):
        pytest.skip("DPO's forward can be owned from TRL 1.15 on")
    requests, _ = smoke("dpo", "apo", name)

    def run(*names: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / "-".join(names)
        options = {name: requests[name] for name in names}
        trl_ext.run(options, model=model, args=tiny_args("dpo", folder), train_dataset=tiny_data("grpo", 12))
        return load_file(folder / "model.safetensors")

    both, alone = run("apo", name), run("apo")
    change = max((both[key] - alone[key]).abs().max().item() for key in both)
    assert change < 1e-3 if name == EXACT else change > 1e-5
