"""Small plugins for tests of several rooms."""

from __future__ import annotations

from typing import Any

from trl_ext.plan.stages import ROUNDS
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl


class Good(Plugin):
    """A valid declaration without hooks."""

    name = "good"
    trainers = ROUNDS


class OwnLoss(Plugin):
    """Replaces the policy loss."""

    name = "own-loss"
    trainers = ROUNDS

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(-loss.advantages * loss.per_token_logps)


class Terms(Plugin):
    """Has a hook of the loss."""

    name = "terms"
    trainers = ("grpo",)

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        return None


class Rolls(Plugin):
    """Has a hook of generation."""

    name = "rolls"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: Any, generate: Any) -> Any:
        return generate(prompts)


def checking(*requirements: Any, **attributes: Any) -> type[Plugin]:
    """Makes a plugin whose `configure` returns these requirements."""

    class Checking(Plugin):
        name = "checking"
        trainers = ("grpo", "rloo", "dpo")

        @hookimpl
        def configure(self, config: Any) -> Any:
            return requirements

    for key, value in attributes.items():
        setattr(Checking, key, value)
    return Checking
