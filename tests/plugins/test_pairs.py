"""Built-ins that may be combined really train together, and the list in plugins/README.md says which may not.

Two plugins work together where each does its part in the run of both: what it waits for happens, and the run is another
one without it.
"""

from __future__ import annotations

import importlib.util
import math
import re
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
    "constrained": ("constrained/advantage_change", 0.0, math.inf),
    "decs": ("decs/redundant_tokens", 0.0, 1.0),
    "disco": ("disco/mixed_prompts", 0.0, math.inf),
    "dr-mas": ("dr-mas/advantage_change", 0.0, math.inf),
    "drpo": ("drpo/mixed_prompts", 0.0, math.inf),
    "dvao": ("dvao/advantage_change", 0.0, math.inf),
    "dynamic-weights": ("dynamic-weights/advantage_change", 0.0, math.inf),
    "gdpo": ("gdpo/advantage_change", 0.0, math.inf),
    "hdpo": ("hdpo/signal", 0.0, math.inf),
    "otc": ("otc/r_tool_mean", -1.0, 1.0),
    "p3o": ("p3o/pairs", 0.0, math.inf),
    "polychromic": ("polychromic/advantage_change", 0.0, math.inf),
    "reg-grpo": ("reg-grpo/log_ratio_std", 1e-9, math.inf),
    "rm-ensemble": ("rm-ensemble/penalty", 0.0, math.inf),
    "shared-prefix": ("shared-prefix/token_ratio", 1.0, math.inf),
    "spae": ("spae/probes", 0.0, math.inf),
    "tgdpo": ("tgdpo/factor/chosen", 1.0, math.inf),
    "thinkless": ("thinkless/advantage_change", 0.0, math.inf),
    "tools": ("tools/call_frequency", 0.0, math.inf),
    "trpa": ("trpa/pairs", 0.0, math.inf),
    "verl-rank": ("verl-rank/advantage_change", 0.0, math.inf),
    "vl-dac": ("vl-dac/steps", 1.0, math.inf),
}
"""The metric of each plugin that says it had something to act on in a step: strictly between the two numbers."""
ROUNDS = {"verl-rank": 4}
"""Rounds of a run, where a plugin does not act on the second one for sure. Others take two."""
EXACT = "shared-prefix"
"""Changes no number. Without it a run is the same up to rounding."""
GIVES = "tools"
"""Gives the trainer what the others act on. It has no effect but the calls."""


def test_list_is_current_and_fits_a_terminal() -> None:
    assert pairs.BEGIN + pairs.listing() + pairs.END in pairs.README.read_text(), "run `make docs`"
    assert max(map(len, pairs.listing().splitlines())) <= pairs.WIDTH


def test_each_pair_stands_under_both_names() -> None:
    entries = " ".join(pairs.listing().split()).split("- **")[1:]
    listed = {entry.partition("**")[0]: set(re.findall(r"[\w-]+", entry.partition("): ")[2])) for entry in entries}
    excluded = [
        case for case in pairs.pairs() if case[2] is not None and set(case[0].cls.trainers) & set(case[1].cls.trainers)
    ]
    assert excluded
    for left, right, _ in excluded:
        assert right.name in listed[left.name] and left.name in listed[right.name]
    for left, right, _ in ALLOWED:
        assert right not in listed[left] and left not in listed[right]


def refused() -> list[Any]:
    """Returns the pairs that exclude each other. The suite asks for one of each reason, and `make slow` for all."""
    reasons = set()
    cases = []
    for left, right, reason in pairs.pairs():
        if reason is not None:
            text = pairs.without_names(reason, left.name, right.name)
            marks = [pytest.mark.slow] if text in reasons else []
            cases.append(pytest.param(left.name, right.name, marks=marks))
            reasons.add(text)
    return cases


@pytest.mark.parametrize(("left", "right"), refused())
def test_other_pairs_are_refused(left: str, right: str) -> None:
    with pytest.raises(trl_ext.ConfigError, match=r"cannot be combined|no trainer"):
        trl_ext.enable({name: pairs.GIVEN.get(name, {}) for name in (left, right)})


ALLOWED: list[Any] = [
    (left.name, right.name, kind)
    for left, right, reason in pairs.pairs()
    if reason is None
    for kind in compose.common_trainers([left, right])
]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(trainer: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters()])


Case = tuple[str, str, str]
"""Two plugins and the trainer on which they run together."""


def covering(cases: list[Case]) -> list[Case]:
    """Returns few cases in which every plugin has a part on each of its trainers. Equal cases give an equal choice.

    Plugins with few partners come first and take a partner that has no part yet, so that pairs rarely overlap. Nobody
    takes the giver of tools, whose completions are long. It takes a partner itself.
    """
    partners: dict[tuple[str, str], dict[str, Case]] = {}
    for left, right, kind in cases:
        partners.setdefault((left, kind), {})[right] = (left, right, kind)
        partners.setdefault((right, kind), {})[left] = (left, right, kind)
    uses = dict.fromkeys(partners, 0)
    chosen = []
    for place in sorted(partners, key=lambda place: (len(partners[place]), place)):
        if uses[place]:
            continue
        kind = place[1]
        best = min(
            partners[place], key=lambda other: (other == GIVES, uses[other, kind], len(partners[other, kind]), other)
        )
        uses[place] += 1
        uses[best, kind] += 1
        chosen.append(partners[place][best])
    return chosen


# the parts of a mix decide what it does, and it has tests of its own
CASES = [case for case in ALLOWED if not {"apo", "mix"} & set(case)]
COVERING = covering(CASES)
TRAINED = [
    # a few pairs in each run of the suite, and all of them with `make slow`
    pytest.param(*case, marks=[] if case in COVERING else [pytest.mark.slow])
    for case in CASES
]


def test_every_run_of_the_suite_trains_each_plugin_beside_another() -> None:
    places = {(name, kind) for *names, kind in CASES for name in names}
    assert {(name, kind) for *names, kind in COVERING for name in names} == places
    assert {name for name, _ in places} == set(TRIGGERS) == set(specs()) - {"apo", "mix"}
    assert len(COVERING) < min(len(places), len(CASES) / 2)
    assert covering(CASES[::-1]) == COVERING


@pytest.mark.parametrize(("left", "right", "kind"), TRAINED)
def test_each_of_two_plugins_does_its_part(left: str, right: str, kind: str, build: Any, smoke: Any) -> None:
    if kind == "dpo" and seams.trl_version() < seams.Version("1.15"):
        pytest.skip("DPO's forward can be owned from TRL 1.15 on")
    requests, settings = smoke(kind, left, right)
    steps = ROUNDS.get(left, ROUNDS.get(right, 2)) * settings.get("num_iterations", 1)

    def run(*names: str) -> Any:
        with trl_ext.enable({name: requests[name] for name in names}):
            trainer = build(kind, max_steps=steps, **settings)
            trainer.train()
            trainer.fired = {name for name, _ in trainer._trl_ext.calls}
        assert trainer.state.global_step == steps
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
