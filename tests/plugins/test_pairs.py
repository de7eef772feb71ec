"""Built-ins that may be combined really train together, and the table in plugins/README.md says which."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

import trl_ext
from trl_ext import plan
from trl_ext.testing import tiny_trainer
from trl_ext.tools import calculator

OPTIONS = {
    "otc": {"c": 4, "call_tag": "<tool_call>"},
    "tgdpo": {"reward_func": f"{__name__}:even_tokens"},
    "tools": {"functions": ["trl_ext.tools.calculator"]},
}
"""Values of options without which a plugin refuses every run."""

FILE = Path(__file__).parents[2] / "plugins" / "pairs.py"
_spec = importlib.util.spec_from_file_location("pairs", FILE)
pairs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pairs)


def even_tokens(pairs):
    return 1.0 - pairs.batch["input_ids"][:, 1:] % 2


sys.modules[__name__] = types.ModuleType(__name__)
sys.modules[__name__].even_tokens = even_tokens


def test_table_is_current():
    assert pairs.BEGIN + pairs.table() + pairs.END in pairs.README.read_text(), "run `make docs`"


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    pairs.pairs(),
    ids=lambda value: getattr(value, "name", "") or str(value),
)
def test_allowed_pairs_train_and_others_are_refused(left, right, reason, model, tool_model, tmp_path):
    if reason is not None:
        with pytest.raises(trl_ext.ConfigError, match=r"cannot be combined|no trainer"):
            trl_ext.enable(left.name, right.name)
        return
    named = {left.name, right.name}
    for kind in plan.common_trainers([left, right]):
        calling = kind == "grpo" and ("tools" in named or "tools" in (*left.cls.needs, *right.cls.needs))
        given = {"trainer": {"tools": [calculator]}} if calling and "tools" not in named else {}
        with trl_ext.enable({name: OPTIONS.get(name) for name in (left.name, right.name)}):
            trainer = tiny_trainer(kind, tool_model if calling else model, tmp_path / kind, **given)
            trainer.train()
            fired = {name for name, _ in trainer._trl_ext.calls}
        assert fired >= {spec.name for spec in (left, right) if set(spec.hooks) - set(plan.LIFECYCLE)}
        assert trainer.state.global_step == 2
