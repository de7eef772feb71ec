"""For the comparison of Dr. MAS: a team of two agents whose rewards differ in scale, and the gradient of each."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch

from trl_ext import lab
from trl_ext.lab.builtin.letters import CHOICES, QUESTIONS, right_letter, right_letter_rows
from trl_ext.lab.messages import assistant, final_text, user
from trl_ext_hooks import Generation, Loss, Plugin, Round, hookimpl
from trl_ext_hooks.basics import Metric
from trl_ext_hooks.toolkit.teams import FIELDS, Team


def partner(letter: str) -> str:
    """Returns the letter that the clerk has to write for a letter of the solver."""
    return CHOICES[(CHOICES.index(letter) + 5) % len(CHOICES)]


def solved(completions: list[Any], answer: list[str], agent: list[str], **columns: Any) -> list[float | None]:
    """Pays the solver for the right letter to the question."""
    return [
        float(final_text(completion) == letter) if who == "solver" else None
        for completion, letter, who in zip(completions, answer, agent, strict=True)
    ]


def filed(prompts: list[Any], completions: list[Any], agent: list[str], **columns: Any) -> list[float | None]:
    """Pays the clerk for the partner of the letter that it was shown, right or wrong."""
    shown = [prompt[-1]["content"][1:] for prompt in prompts]
    return [
        float(len(letter) == 1 and letter in CHOICES and final_text(completion) == partner(letter))
        if who == "clerk"
        else None
        for completion, letter, who in zip(completions, shown, agent, strict=True)
    ]


def traces(size: int, seed: int) -> list[dict[str, Any]]:
    """Makes answers of both agents, of which three in ten are right and the others any letter."""
    draw = random.Random(f"team {seed}")

    def trace() -> dict[str, Any]:
        question, letter = draw.choice(QUESTIONS), draw.choice(["", draw.choice(CHOICES)])
        known = partner(letter) if letter else right_letter(question)
        said = known if draw.random() < 0.3 else draw.choice(CHOICES)
        return {"prompt": user(question + letter), "completion": assistant(said)}

    return [trace() for _ in range(size)]


TASK = dataclasses.replace(
    lab.task("right-letter"),
    name="solver-and-clerk",
    summary="a solver answers with a letter, and a clerk with the partner of that letter",
    rows=right_letter_rows,
    rewards=(solved, filed),
    traces=traces,
    warm_up=dataclasses.replace(lab.task("right-letter").warm_up, steps=300),
)


class Office(Plugin):
    """Lets the solver answer and the clerk file the answer, and measures the gradient that each of them causes."""

    name = "office"
    trainers = ("grpo", "rloo")
    claims = ("groups",)
    fields = (*FIELDS, "is_clerk")

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, context: Any) -> Generation:
        team = Team(generate, context)
        letters = team.ask("solver", prompts)
        shown = [prompt[-1]["content"] + letter for prompt, letter in zip(prompts, letters, strict=True)]
        team.ask("clerk", [user(text) for text in shown])
        return team.generation()

    @hookimpl
    def batch_fields(self, round: Round) -> dict[str, torch.Tensor]:
        return {"is_clerk": torch.tensor([who == "clerk" for who in round.fields["agent"]])}

    @hookimpl
    def loss_metrics(self, loss: Loss) -> dict[str, Metric] | None:
        """Reports the norm of the gradient of each agent's part of the policy loss, and the clerk's share of both."""
        if not loss.per_token_logps.requires_grad:
            return None
        parameters = [value for value in loss.trainer.model.parameters() if value.requires_grad]
        terms = (loss.advantages * loss.per_token_logps * loss.mask).sum(dim=1)
        norms = []
        for rows in (~loss.batch["is_clerk"], loss.batch["is_clerk"]):
            parts = torch.autograd.grad((terms * rows).mean(), parameters, retain_graph=True, allow_unused=True)
            norms.append(torch.cat([part.flatten() for part in parts if part is not None]).norm().item())
        solver, clerk = norms
        share = clerk / max(solver + clerk, 1e-12)
        return {"gradient_solver": (solver, 1), "gradient_clerk": (clerk, 1), "clerk_share": (share, 1)}
