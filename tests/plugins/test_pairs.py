"""Built-ins that may be combined really train together, and the table in plugins/README.md says which."""

import importlib.util
from pathlib import Path

import pytest

import trl_ext
from trl_ext.plan import compose, stages
from trl_ext.testing import tiny_args, tiny_data
from trl_ext.trl_internals import seams

FILE = Path(__file__).parents[2] / "plugins" / "pairs.py"
_spec = importlib.util.spec_from_file_location("pairs", FILE)
pairs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pairs)


def test_table_is_current():
    assert pairs.BEGIN + pairs.table() + pairs.END in pairs.README.read_text(), "run `make docs`"


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    pairs.pairs(),
    ids=lambda value: getattr(value, "name", "") or str(value),
)
def test_allowed_pairs_train_and_others_are_refused(left, right, reason, build, smoke, model, tmp_path):
    if reason is not None:
        with pytest.raises(trl_ext.ConfigError, match=r"cannot be combined|no trainer"):
            trl_ext.enable(left.name, right.name)
        return
    kinds = compose.common_trainers([left, right])
    if kinds == ["dpo"] and seams.trl_version() < seams.Version("1.15"):
        pytest.skip("DPO's forward can be owned from TRL 1.15 on")
    if "run" in (*left.hooks, *right.hooks):
        options, _ = smoke("dpo", left.name, right.name)
        args = tiny_args("dpo", tmp_path / "run")
        trl_ext.run(options, model=model, args=args, train_dataset=tiny_data("grpo", 12))
        assert (tmp_path / "run" / "model.safetensors").is_file()
        return
    for kind in kinds:
        requests, settings = smoke(kind, left.name, right.name)
        with trl_ext.enable(requests):
            trainer = build(kind, **settings)
            trainer.train()
            fired = {name for name, _ in trainer._trl_ext.calls}
        assert fired >= {spec.name for spec in (left, right) if set(spec.hooks) - set(stages.LIFECYCLE)}
        assert trainer.state.global_step == 2
