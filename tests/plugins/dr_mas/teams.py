"""A team of two agents on the tiny model, and rewards of different scale for them."""

from __future__ import annotations

from typing import Any

from trl_ext_hooks import Generation, Plugin, hookimpl
from trl_ext_hooks.toolkit import teams


class Pair(Plugin):
    """A solver answers, a verifier looks at the answer, and the solver corrects some of them."""

    name = "pair"
    trainers = ("grpo", "rloo")
    claims = ("groups",)
    fields = teams.FIELDS
    corrected: frozenset[int] = frozenset({1, 3, 5, 7})
    """Numbers of the rows that the solver corrects."""

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, context: Any) -> Generation:
        team = teams.Team(generate, context)
        answers = team.ask("solver", prompts)
        checks = [
            [*prompt, {"role": "user", "content": f"Is {text} right?"}]
            for prompt, text in zip(prompts, answers, strict=True)
        ]
        self.verdicts = team.ask("verifier", checks)
        again = [row for row, number in enumerate(context.row_numbers) if number in self.corrected]
        team.ask("solver", [[{"role": "user", "content": f"Correct {answers[row]}"}] for row in again], rows=again)
        return team.generation()


def by_agent(completion_ids: list[list[int]], agent: list[str], trajectory: list[int], **columns: Any) -> list[float]:
    """Small differences for the solver, large ones with another mean for the verifier."""
    values = [float((sum(ids) + 3 * number) % 7) for ids, number in zip(completion_ids, trajectory, strict=True)]
    return [value / 10 if who == "solver" else 20 + 5 * value for value, who in zip(values, agent, strict=True)]
