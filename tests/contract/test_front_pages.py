"""Pages for a first look: the table of problems, the reasons against a subclass, the glossary."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
from trl import DPOTrainer, GRPOTrainer

from trl_ext.catalog import builtins, find, options
from trl_ext.plan import compose
from trl_ext.trl_internals import seams
from trl_ext_hooks import CLAIMS

ROOT = Path(__file__).parents[2]
PROBLEMS = (
    (ROOT / "plugins" / "README.md").read_text().partition("## Which plugin for my problem")[2].partition("\n## ")[0]
)
WHY = (ROOT / "trl_ext" / "WHY.md").read_text()
GLOSSARY = (ROOT / "trl_ext" / "GLOSSARY.md").read_text()


# --- problems ---------------------------------------------------------------------------------------------------------


def lookup(key: str) -> str:
    """Looks a key up.

    Args:
        key: What to look for.
    """
    return key


class Game:
    """Stands for an environment of the reader."""

    def reset(self) -> None: ...

    def move(self, where: str) -> str:
        """Moves.

        Args:
            where: The direction.
        """
        return where


def test_every_plugin_solves_a_problem_with_a_command_that_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, values in {"my_tools": {"lookup": lookup}, "my_game": {"Game": Game}}.items():
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**values))
    rows = re.findall(r"^\| .+? \| \[([a-z0-9-]+)\]\(docs/\1\.md\) \| `(.+?)` \|$", PROBLEMS, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(builtins.BUILTINS)
    for name, command in rows:
        program, train, flag, *words = shlex.split(command)
        assert (program, train, flag) == ("trl_ext", "train", "--plugin"), command
        plugins = words[: next(number for number, word in enumerate(words) if word.startswith("--"))]
        values = options.parse_set(
            words[words.index("--set") + 1 : words.index("--config")] if "--set" in words else []
        )
        assert set(values) <= set(plugins) and name in plugins, command
        specs = compose.compose(find.resolve({plugin: values.get(plugin, {}) for plugin in plugins}))
        assert compose.common_trainers(specs)[0] == find.find(name)[0].trainers[0], command


# --- subclasses -------------------------------------------------------------------------------------------------------


def test_bodies_changed_where_the_page_says() -> None:
    digests = json.loads((ROOT / "tests" / "data" / "fingerprints.json").read_text())
    rows = re.findall(r"^\| `(GRPO|DPO)Trainer\.(\w+)` \| ([\d., ]+) \|", WHY, re.MULTILINE)
    assert len(rows) > 5
    for trainer, method, said in rows:
        bodies = {version: digests[version][f"{trainer.lower()}.{method}"] for version in digests}
        changed = [new.removesuffix(".0") for old, new in pairwise(bodies) if bodies[old] != bodies[new]]
        assert said.split(", ") == changed, method
    assert len({of["grpo._compute_loss"] for of in digests.values()}) == 1
    listed = ", ".join(version.removesuffix(".0") for version in digests)
    assert " and ".join(listed.rsplit(", ", 1)) in WHY


def test_names_that_the_page_calls_gone_are_gone() -> None:
    if seams.trl_version() < seams.Version("1.16"):
        return
    for name in ("_get_last_hidden_state", "compute_liger_loss", "_chunked_logps"):
        assert f"`GRPOTrainer.{name}`" in WHY and not hasattr(GRPOTrainer, name), name
    for name in ("_compute_loss_liger", "_compute_ref_log_probs"):
        assert f"{name}`" in WHY and not hasattr(DPOTrainer, name), name
    parameters = list(inspect.signature(GRPOTrainer._generate_single_turn).parameters)
    assert parameters[1] == "prompt_ids" and parameters.index("num_generations") == len(parameters) - 2
    assert "compute_entropy" in inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).count("\n")
    assert round(lines, -2) == 600


# --- glossary ---------------------------------------------------------------------------------------------------------


def test_the_glossary_is_short_and_has_the_words_of_the_contract() -> None:
    words = dict(re.findall(r"^\| ([a-z-]+) \| (.+) \|$", GLOSSARY, re.MULTILINE)[1:])
    assert 10 <= len(words) <= 16
    assert {"rollout", "round", "group", "advantage", "micro-batch", "stage", "hook", "plugin", "arm"} <= set(words)
    assert "estimator" in CLAIMS and {"claim", "need", "estimator"} <= set(words)
    assert all(len(meaning) < 110 for meaning in words.values())
