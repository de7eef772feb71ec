"""Entropies of the policy that sampled: from the forward of the old log-probabilities, never from one more."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext_hooks import Plugin, hookimpl

ROUNDS = ("grpo", "rloo")


class NeedsOld(Plugin):
    name = "needs-old"
    trainers = ROUNDS
    needs = ("old_logps",)


class NeedsEntropies(Plugin):
    name = "needs-entropies"
    trainers = ROUNDS
    needs = ("old_entropies",)
    seen: Any = None

    @hookimpl
    def batch_fields(self, round: Any) -> None:
        self.seen = round

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        self.batch, self.now = loss.batch, loss.entropies.detach()


@pytest.mark.parametrize(
    ("kind", "others", "settings"),
    [
        ("grpo", [], {}),  # a forward of its own, since TRL makes none
        ("grpo", [NeedsOld], {}),  # the forward of the other need
        ("grpo", [], {"num_iterations": 2}),  # TRL's
        ("rloo", [{"shared-prefix": {"min_gain": 0, "check": False}}], {}),  # TRL's, through its owner
    ],
    ids=["alone", "with-old-logps", "grpo", "rloo"],
)
def test_old_entropies_come_with_the_old_log_probabilities(
    kind: str, others: list[Any], settings: dict[str, Any], build: Any, plugin: Any
) -> None:
    def run(cls: type[Plugin]) -> tuple[Any, int]:
        named = [other if isinstance(other, dict) else plugin(other) for other in others]
        forwards: list[int] = []
        with trl_ext.enable(plugin(cls), *named):
            trainer = build(kind, max_steps=1, beta=0.0, **settings)
            trainer.model.base_model.register_forward_hook(lambda *args: forwards.append(1))
            trainer.train()
            return trainer._trl_ext.plugins[cls.name], len(forwards)

    class Nothing(Plugin):
        name = "nothing"
        trainers = ROUNDS

        @hookimpl
        def loss_terms(self, loss: Any) -> None:
            return None

    (mine, count), (_, without) = run(NeedsEntropies), run(Nothing)
    assert count - without == (1 if (kind, others, settings) == ("grpo", [], {}) else 0)
    entropies, mask = mine.seen.old_entropies, mine.seen.batch["completion_mask"]
    assert entropies.shape == mask.shape and (entropies[mask == 1] > 0).all() and (entropies[mask == 0] == 0).all()
    torch.testing.assert_close(mine.batch["old_entropies"], mine.now * mine.batch["completion_mask"], atol=1e-5, rtol=0)
    assert ("old_per_token_logps" in mine.batch) == bool(others or settings)


def test_a_round_without_the_need_names_it(train: Any, plugin: Any) -> None:
    class Forgets(NeedsEntropies):
        name = "forgets"
        needs = ()

    with trl_ext.enable(plugin(Forgets)):
        round = train(max_steps=1)._trl_ext.plugins["forgets"].seen
    with pytest.raises(AttributeError, match="no plugin of this run needs `old_entropies`; declare the need"):
        round.old_entropies  # noqa: B018
