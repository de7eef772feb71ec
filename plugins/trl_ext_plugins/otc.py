"""OTC-PO: optimal tool call-controlled policy optimisation (arXiv 2504.14870).

A reward for the final answer alone makes an agent call tools far more often than it needs. OTC multiplies the reward by
a coefficient in [0, 1]: 1 at the fewest calls with which the prompt is known to be solved, less on both sides. So a
right answer stays worth more than a wrong one, and a needed call costs nothing.

Stages: rewards, with a memory per prompt; then the trainer's own advantages, or another plugin's ("OTC first, then
GDPO"). The authors published no code. Open in the paper and decided here: a prompt that was never solved leaves rewards
alone (`unsolved`), negative rewards are multiplied like others (`negative_rewards`), only executed calls count, and all
processes have one memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from trl_ext_hooks import Config, Need, Plugin, Refuse, Requirement, Scored, Warn, hookimpl, option
from trl_ext_hooks.toolkit.prompt_memory import PromptMemory
from trl_ext_hooks.toolkit.tool_calls import CallCounter


@dataclass(frozen=True)
class OTCOptions:
    """Options of OTC."""

    mode: Literal["grpo", "ppo"] = option(
        "grpo",
        help="coefficient around the fewest calls of the prompt, or falling with every call",
        source="paper, 3.3",
    )
    c: int | None = option(
        None,
        help="most calls that a rollout may make, at least 1; smaller is harsher; default: max_tool_calling_iterations",
        source="paper: 4 for search, 3 for code",
    )
    alpha: float = option(1.0, help="factor of the reward, above 0", source="paper, eq. 7")
    n_scope: Literal["global", "local"] = option(
        "global", help="remember the fewest calls of a prompt from step to step, or look at one group", source="paper"
    )
    unsolved: Literal["neutral", "cos"] = option(
        "neutral", help="for prompts that nobody solved yet: leave rewards alone, or let them fall", source="ours"
    )
    negative_rewards: Literal["literal", "spare"] = option(
        "literal", help="multiply negative rewards too, which shrinks a penalty, or spare them", source="paper: literal"
    )
    apply_to: tuple[str, ...] = option((), help="reward functions that are multiplied; default: all", source="paper")
    correct_reward: str | None = option(
        None, help="reward function that judges the answer; default: the first one", source="ours"
    )
    correct_threshold: float = option(0.0, help="an answer is right when its reward is above this", source="ours")
    id_column: str | None = option(
        None, help="column that tells prompts apart; default: the content of `prompt`", source="ours"
    )
    call_tag: str | None = option(
        None, help="count this text in completions in place of executed calls, for rollouts without tool messages"
    )
    calls_field: str | None = option(None, help="take the number of calls that a rollout_func returns under this name")

    def __post_init__(self) -> None:
        if self.c is not None and self.c < 1:
            raise ValueError("c must be at least 1")
        if self.alpha <= 0:
            raise ValueError("alpha must be greater than 0")
        CallCounter(self.call_tag, self.calls_field)


def falling_coefficient(calls: torch.Tensor, c: float) -> torch.Tensor:
    """Equation 5: r = cos(m * pi / (2m + c)), computed as sin(pi * c / (2 * (2m + c))), which rounds to no less than 0.

    Args:
        calls: (N,) m, tool calls of each rollout.
        c: Most calls of a rollout, at least 0.

    Returns:
        (N,) float64: 1 without a call, even where c = 0 makes the fraction 0/0; 1/2 at m = c.
    """
    m = calls.double()
    return torch.where(m == 0, 1.0, torch.sin(math.pi * c / (2 * (2 * m + c))))


def fewest_calls(calls: torch.Tensor, correct: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The least number of calls among the right rollouts of each row's own prompt or group.

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
    """Equation 6: r = sin(f * pi / (2n)) with f = 2nm / (m + n), which is sin(pi * m / (m + n)).

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
    """Equation 7: alpha * r_tool * r.

    Args:
        rewards: (N,) or (N, K); NaN stays NaN.
        coefficient: (N,) r_tool.
        spare_negative: alpha * (r_tool * max(r, 0) + min(r, 0)) instead, so that calls do not shrink a penalty.

    Returns:
        The shape and dtype of `rewards`.
    """
    r = rewards.double()
    factor = coefficient if r.dim() == 1 else coefficient.unsqueeze(1)
    scaled = factor * r.clamp(min=0) + r.clamp(max=0) if spare_negative else factor * r
    return (alpha * scaled).to(rewards.dtype)


@dataclass(frozen=True)
class _Seen:
    """A round before the multiplication, for its metrics; all (N,) but `base` (N, F) with the names of its columns."""

    names: tuple[str, ...]
    base: torch.Tensor
    calls: torch.Tensor
    correct: torch.Tensor
    n: torch.Tensor
    coefficient: torch.Tensor


class OTC(Plugin):
    """OTC-PO for GRPOTrainer and RLOOTrainer."""

    name = "otc"
    paper = "arXiv 2504.14870"
    summary = "multiplies rewards by a coefficient of the tool calls, 1 at the fewest that solved the prompt"
    trainers = ("grpo", "rloo")
    Options = OTCOptions

    options: OTCOptions

    def __init__(self, options: OTCOptions | None = None) -> None:
        super().__init__(options)
        self.counter = CallCounter(self.options.call_tag, self.options.calls_field)
        self.memory = PromptMemory(merge=min, id_column=self.options.id_column)
        self._seen: _Seen | None = None

    @property
    def _remembers(self) -> bool:
        return self.options.mode == "grpo" and self.options.n_scope == "global"

    def _c(self, args: Any) -> int | None:
        """The paper's c; RLOO has no limit of calls."""
        return getattr(args, "max_tool_calling_iterations", None) if self.options.c is None else self.options.c

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        yield from self.counter.requirements(config, self.name)
        if self._remembers:
            yield from self.memory.requirements(config, "otc.id_column")
        if not self._c(config.args):
            limit = "max_tool_calling_iterations is not set" if config.kind == "grpo" else "RLOO has no limit of calls"
            yield Refuse(f"{limit}, so c is unknown.", "Set otc.c to the most calls of a rollout, such as 4.")
        for name in {self.options.correct_reward, *self.options.apply_to} - {None}:
            yield Need(f"reward:{name}")
        if config.kind == "grpo" and not config.tool_sources and self.counter == CallCounter():
            yield Warn(
                "the trainer has neither tools nor an environment nor a rollout_func, so no call is made and every "
                "reward stays as it is"
            )

    @hookimpl
    def rewards(self, scored: Scored) -> torch.Tensor:
        names, options = scored.reward_names, self.options
        judge = names.index(options.correct_reward) if options.correct_reward else 0
        calls = self.counter.gather(scored)
        correct = scored.rewards[:, judge] > options.correct_threshold  # before the multiplication; NaN is not right
        c = self._c(scored.trainer.args)
        assert c is not None, "configure asks for it"
        if options.mode == "ppo":
            n = torch.full_like(calls, torch.nan, dtype=torch.float64)
            coefficient = falling_coefficient(calls, c)
        else:
            n = self._fewest(scored, calls, correct)
            coefficient = tool_coefficient(calls, n, c, options.unsolved)
        self._seen = _Seen(names, scored.rewards, calls, correct, n, coefficient)
        spare = options.negative_rewards == "spare"
        scaled = scale_rewards(scored.rewards, coefficient, options.alpha, spare_negative=spare)
        if not options.apply_to:
            return scaled
        chosen = torch.tensor([name in options.apply_to for name in names], device=scaled.device)
        return torch.where(chosen, scaled, scored.rewards)

    def _fewest(self, scored: Scored, calls: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
        """(N,) n of every row. A round counts for itself: its own right rollouts lower n before it is used."""
        if not self._remembers:
            return fewest_calls(calls, correct, scored.group_ids)
        keys = self.memory.keys(scored)
        now = fewest_calls(calls, correct, keys)
        n = torch.fmin(self.memory.recall(keys), now)
        self.memory.update(scored, keys, now)
        return n

    @hookimpl
    def round_metrics(self) -> dict[str, tuple[float, float]]:
        """Rewards before the multiplication, and what it was made of; `tool_productivity` is right answers per call."""
        seen = self._seen
        assert seen is not None, "rewards are computed before metrics"
        rows, calls, known = len(seen.calls), seen.calls.sum().item(), ~torch.isnan(seen.n)
        found = {
            "r_tool_mean": (seen.coefficient.sum().item(), rows),
            "n_mean": (seen.n[known].sum().item(), known.sum().item()),
            "tool_calls_mean": (calls, rows),
            "tool_productivity": (seen.correct.sum().item(), max(1, calls)),
        }
        valid = ~torch.isnan(seen.base)
        for k, name in enumerate(seen.names):
            found[f"base/{name}"] = (seen.base[valid[:, k], k].sum().item(), valid[:, k].sum().item())
        return found

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return self.memory.state_dict()

    @hookimpl
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory.load_state_dict(state)
