"""OTC-PO: optimal tool call-controlled policy optimisation (arXiv 2504.14870).

A reward for the final answer alone makes an agent call tools far more often than it needs. OTC multiplies the reward by
a coefficient in [0, 1]. It is 1 at the fewest calls with which the prompt is known to be solved, and less on both
sides. So a right answer stays worth more than a wrong one, and a needed call costs nothing.

The trainer's own advantages follow, or those of another plugin ("OTC first, then GDPO"). The authors published no code.
The paper leaves four things open, and they are decided here: a prompt that was never solved leaves rewards alone
(`unsolved`), negative rewards are multiplied like others (`negative_rewards`), only executed calls count, and all
processes share one memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext_hooks import (
    ColumnName,
    Config,
    Plugin,
    Refuse,
    Requirement,
    RewardName,
    Scored,
    Warn,
    hookimpl,
    option,
)
from trl_ext_hooks.toolkit.prompt_memory import PromptMemory
from trl_ext_hooks.toolkit.tool_calls import CallCounter, CallOptions


def falling_coefficient(calls: torch.Tensor, c: float) -> torch.Tensor:
    """Returns r = cos(m * pi / (2m + c)) of m calls, equation 5: 1 without a call, 1/2 at m = c.

    It is computed as sin(pi * c / (2 * (2m + c))), which rounds to no less than 0.

    Args:
        calls: (N,) m, tool calls of each rollout.
        c: Most calls of a rollout, at least 0.

    Returns:
        (N,) float64; 1 at m = 0 even where c = 0 makes the fraction 0/0.
    """
    m = calls.double()
    return torch.where(m == 0, 1.0, torch.sin(math.pi * c / (2 * (2 * m + c))))


def fewest_calls(calls: torch.Tensor, correct: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the least number of calls among the right rollouts of each row's own prompt or group.

    Args:
        calls: (N,).
        correct: (N,) bool.
        ids: (N,) equal numbers, equal prompt.

    Returns:
        (N,) float64; NaN where no rollout is right.
    """
    index = torch.unique(ids, return_inverse=True)[1]
    counted = torch.where(correct, calls.double(), torch.inf)
    least = counted.new_full((len(calls),), torch.inf).scatter_reduce_(0, index, counted, "amin")[index]
    return torch.where(torch.isinf(least), torch.nan, least)


def tool_coefficient(
    calls: torch.Tensor, n: torch.Tensor, c: float, unsolved: Literal["neutral", "cos"] = "neutral"
) -> torch.Tensor:
    """Returns r = sin(f * pi / (2n)) with f = 2nm / (m + n), equation 6, which is sin(pi * m / (m + n)).

    It is 1 at m = n alone, 0 at m = 0 < n, and falls towards 0 as m grows. For n = 0 it is `falling_coefficient`.

    Args:
        calls: (N,) m.
        n: (N,) fewest calls with which the prompt was solved; NaN = never.
        c: Most calls of a rollout.
        unsolved: For n = NaN, which the paper leaves open: 1, or `falling_coefficient`.

    Returns:
        (N,) float64 in [0, 1].
    """
    m = calls.double()
    falling = falling_coefficient(calls, c)
    known = torch.where(n > 0, torch.sin(math.pi * m / (m + n)), falling)  # NaN > 0 is false
    return torch.where(torch.isnan(n), 1.0, known) if unsolved == "neutral" else known


def scale_rewards(
    rewards: torch.Tensor, coefficient: torch.Tensor, alpha: float = 1.0, *, spare_negative: bool = False
) -> torch.Tensor:
    """Returns alpha * r_tool * r, equation 7, in the shape and dtype of the rewards.

    Args:
        rewards: (N,) or (N, K); NaN stays NaN.
        coefficient: (N,) r_tool.
        spare_negative: alpha * (r_tool * max(r, 0) + min(r, 0)) instead, so that calls do not shrink a penalty.
    """
    r = rewards.double()
    factor = coefficient if r.dim() == 1 else coefficient.unsqueeze(1)
    scaled = factor * r.clamp(min=0) + r.clamp(max=0) if spare_negative else factor * r
    return (alpha * scaled).to(rewards.dtype)


class OTC(Plugin):
    """OTC-PO for GRPOTrainer and RLOOTrainer."""

    name = "otc"
    paper = "arXiv 2504.14870"
    bibtex = """@misc{otc2025,
      title = {{Acting Less is Reasoning More! Teaching Model to Act Efficiently}},
      eprint = {2504.14870},
      archivePrefix = {arXiv},
      year = {2025},
      note = {first version: OTC: Optimal Tool Calls via Reinforcement Learning},
    }"""
    summary = "multiplies rewards by a coefficient of the tool calls, 1 at the fewest that solved the prompt"
    trainers = ("grpo", "rloo")

    @dataclass(frozen=True)
    class Options(CallOptions):
        mode: Literal["grpo", "ppo"] = option(
            "grpo",
            help="coefficient around the fewest calls of the prompt, or falling with every call",
            source="paper, 3.3",
        )
        c: int | None = option(
            None,
            ge=1,
            help="most calls that a rollout may make; smaller is harsher; default: max_tool_calling_iterations",
            source="paper: 4 for search, 3 for code",
        )
        alpha: float = option(1.0, gt=0, help="factor of the reward", source="paper, eq. 7")
        n_scope: Literal["global", "local"] = option(
            "global", help="remember the fewest calls of a prompt between steps, or look at one group", source="paper"
        )
        unsolved: Literal["neutral", "cos"] = option(
            "neutral", help="for prompts that nobody solved yet: leave rewards alone, or let them fall", source="ours"
        )
        negative_rewards: Literal["literal", "spare"] = option(
            "literal", help="multiply negative rewards too, which shrinks a penalty, or spare them", source="paper"
        )
        apply_to: tuple[RewardName, ...] = option(
            (), help="reward functions that are multiplied; default: all", source="paper"
        )
        correct_reward: RewardName | None = option(
            None, help="reward function that judges the answer; default: the first one", source="ours"
        )
        correct_threshold: float = option(0.0, help="an answer is right when its reward is above this", source="ours")
        id_column: ColumnName | None = option(
            None, help="column that tells tasks apart; default: all columns of the row", source="ours"
        )

    options: Options

    def start(self) -> None:
        self.memory = PromptMemory(merge=min, id_column=self.options.id_column)
        self.remembers = self.options.mode == "grpo" and self.options.n_scope == "global"

    def most_calls(self, args: Any) -> int | None:
        """Returns the paper's c. RLOO has no limit of calls to take it from."""
        return getattr(args, "max_tool_calling_iterations", None) if self.options.c is None else self.options.c

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        counter = self.options.counter
        yield from counter.requirements(config, self.name)
        if self.remembers:
            yield from self.memory.requirements(config, "otc.id_column", "otc.n_scope=local")
        if not self.most_calls(config.args):
            limit = "max_tool_calling_iterations is not set" if config.kind == "grpo" else "RLOO has no limit of calls"
            yield Refuse(f"{limit}, so c is unknown.", "Set otc.c to the most calls of a rollout, such as 4.")
        if config.kind == "grpo" and not config.tool_sources and counter == CallCounter():
            yield Warn(
                "the trainer has neither tools nor an environment nor a rollout_func, so no call is made and every "
                "reward stays as it is"
            )

    @hookimpl
    def rewards(self, scored: Scored) -> torch.Tensor:
        options, c = self.options, self.most_calls(scored.trainer.args)
        assert c is not None, "configure asks for it"
        calls = options.counter.gather(scored)
        correct = scored.reward(options.correct_reward) > options.correct_threshold  # NaN is not right
        if options.mode == "ppo":
            n, coefficient = torch.full_like(calls, torch.nan, dtype=torch.float64), falling_coefficient(calls, c)
        else:
            n = self.fewest(scored, calls, correct)
            coefficient = tool_coefficient(calls, n, c, options.unsolved)
        for name in scored.reward_names:
            scored.log(f"base/{name}", scored.reward(name))
        scored.log("r_tool_mean", coefficient)
        scored.log("n_mean", n)
        scored.log("tool_calls_mean", calls)
        scored.log("tool_productivity", correct.sum(), calls.sum().clamp(min=1))
        spare = options.negative_rewards == "spare"
        scaled = scale_rewards(scored.rewards, coefficient, options.alpha, spare_negative=spare)
        chosen = [not options.apply_to or name in options.apply_to for name in scored.reward_names]
        return torch.where(torch.tensor(chosen, device=scaled.device), scaled, scored.rewards)

    def fewest(self, scored: Scored, calls: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
        """Returns (N,) n of every row. The round's own right rollouts lower n before it is used. Collective."""
        if not self.remembers:
            return fewest_calls(calls, correct, scored.group_ids)
        keys = self.memory.keys(scored)
        now = fewest_calls(calls, correct, keys)
        n = torch.fmin(self.memory.recall(keys), now)
        self.memory.update(scored, keys, now)
        return n

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    @hookimpl
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state)
