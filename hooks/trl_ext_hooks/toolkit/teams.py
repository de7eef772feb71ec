"""Teams: rollouts in which several agents answer in turn, with one row for every answer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from ..rollout import Generate, Generation, RolloutContext

FIELDS = ("agent", "trajectory")
"""What a team adds to its rows. A plugin with a team declares `fields = FIELDS` and the claim `groups`."""


class Team:
    """Collects what the agents of a rollout say, for the hook `rollout` of a plugin.

    All agents are the policy that is trained. Their prompts make the difference. Reward functions get the names of
    agents as `agent`, and a number of the rollout as `trajectory`, equal for all answers to one prompt of the round.
    """

    def __init__(self, generate: Generate, context: RolloutContext) -> None:
        self._generate, self._context = generate, context
        self._answers: list[Generation] = []

    def ask(self, agent: str, prompts: list[Any], rows: Sequence[int] | None = None) -> list[str]:
        """Lets an agent answer, and returns its answers as texts.

        Collective: every process asks the same agents in the same order, also one without a prompt for them.

        Args:
            agent: Name of the agent.
            prompts: What it is asked, as text or messages.
            rows: For each prompt the number of the trajectory that it goes on with: the index of its prompt among those
                that the hook got. By default there is a prompt for each of them.
        """
        rows = list(range(len(self._context.rows)) if rows is None else rows)
        if len(rows) != len(prompts):
            raise ValueError(
                f"Team.ask got {len(prompts)} prompts for {agent!r} and {len(rows)} rows, expected a row for each "
                f"prompt. Name them in `rows` where not all trajectories go on."
            )
        result = self._generate(list(prompts), rows=rows)
        numbers = self._context.row_numbers
        added: dict[str, Any] = {"agent": [agent] * len(rows), "trajectory": [numbers[row] for row in rows]}
        asked = list(prompts) if result.prompts is None else result.prompts
        fields = {**result.fields, **added}
        self._answers.append(dataclasses.replace(result, prompts=asked, source=rows, fields=fields))
        return [_text(completion) for completion in result.completions]

    def generation(self) -> Generation:
        """Returns one row for every answer: those of a trajectory behind each other, in the order of the questions."""
        if not self._answers:
            raise ValueError("Team.generation was called before an agent was asked")
        everything = functools.reduce(Generation.joined, self._answers)
        source = everything.source or ()
        return everything.select(sorted(range(len(source)), key=lambda row: source[row]))


def _text(completion: Any) -> str:
    """Returns the last message of a completion as text, nothing where it calls a tool and says nothing."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")
