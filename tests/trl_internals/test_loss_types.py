"""Loss types that TRL accepts, as its trainers compare them."""

from __future__ import annotations

import pytest

from tests import processes
from trl_ext.trl_internals.loss_types import loss_types


def test_they_are_those_of_the_trainers() -> None:
    assert {"grpo", "dapo", "dr_grpo", "bnpo"} <= set(loss_types("grpo"))
    assert {"sigmoid", "hinge", "ipo", "apo_zero", "apo_down"} <= set(loss_types("dpo"))
    assert loss_types("rloo") == ()


@pytest.mark.parametrize("loss_type", loss_types("grpo"))
def test_the_trainer_describes_each_of_them(loss_type: str) -> None:
    from trl import GRPOConfig

    assert f'"{loss_type}"' in (GRPOConfig.__doc__ or "")


def test_reading_them_imports_nothing() -> None:
    code = (
        "import sys; from trl_ext.trl_internals.loss_types import loss_types; print(len(loss_types('dpo')) > 5);"
        "print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    )
    done = processes.run_python(code)
    assert done.stdout.split() == ["True", "[]"], done.stderr
