"""Values that the code of a trainer tells apart."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ext.trl_internals import arguments
from trl_ext.trl_internals.accepted_values import accepted, accepted_values

CODE = """
class Trainer:
    def loss(self, level):
        if self.loss_type == "a":
            pass
        elif self.loss_type in ["b", "c"]:
            pass
        else:
            raise ValueError("unknown")
        if self.loss_type == "d":
            pass
        else:
            raise ValueError("unknown")
        if level == "low":
            pass
        else:
            raise ValueError("unknown")
        if self.free == "a":
            pass
        elif self.free == "b":
            pass
        if self.mixed == "a":
            pass
        elif self.other == "b":
            pass
        else:
            raise ValueError("unknown")
        if self.size == 3:
            pass
        else:
            raise ValueError("unknown")
        if self.more == "a" and level:
            pass
        else:
            raise ValueError("unknown")
"""


def test_only_chains_that_refuse_the_rest_count() -> None:
    assert accepted_values(CODE) == {"loss_type": {"a", "b", "c", "d"}, "level": {"low"}}


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo"])
def test_defaults_and_documented_values_of_the_installed_trl_are_accepted(kind: Any) -> None:
    settings = arguments.trl_parser(kind).settings()
    values = accepted(kind)
    for name in values.keys() & settings.keys():
        default = settings[name].default
        texts = default if isinstance(default, list) else [] if default is None else [default]
        assert set(texts) <= values[name]
        assert set(settings[name].choices or ()) <= values[name]
    if kind != "rloo":
        assert "loss_type" in values
