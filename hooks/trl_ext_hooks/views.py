# mypy: disable-error-code="empty-body"
"""What `trl_ext inspect` shows of a plugin: spans and curves, and the hook that returns them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .plugin import hookspec
from .scoring import Round


@dataclass(frozen=True)
class Span:
    """Tokens of a completion that belong together: a step, a redundant stretch, a tool call.

    Attributes:
        row: Local row, 0 to b - 1.
        start, end: The tokens `start` to `end - 1` of the completion, as positions in `completion_ids`.
        label: A word or two. Spans whose labels differ only in a number at the end (`step 1`, `step 2`) look alike.
        value: A number to print at the label, such as a reward of the step.
    """

    row: int
    start: int
    end: int
    label: str
    value: float | None = None


@dataclass(frozen=True)
class Curve:
    """Values along a completion: a probe at every step, a potential, a weight per token.

    Attributes:
        row: Local row, 0 to b - 1.
        name: What is drawn; curves of one name share a scale.
        positions: Positions in `completion_ids`, ascending.
        values: One per position; NaN leaves a gap.
    """

    row: int
    name: str
    positions: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Views:
    """What a plugin alone knows about the rows of a round; rows may have any number of spans and curves."""

    spans: Sequence[Span] = ()
    curves: Sequence[Curve] = ()


@hookspec
def inspect(round: Round) -> Views | None:
    """Returns spans and curves of a finished round for `trl_ext inspect`. All plugins. GRPO and RLOO.

    Called only while a run records rounds (`trl_ext train --inspect N`, `Handle.record`), on every process, after
    `round_metrics`. Tokens, masks, fields, tool results, and rewards and advantages before and after each plugin are
    recorded without it: return what only the plugin knows, for the local rows. It is not part of the method: nothing
    that it does may reach training, it runs without gradients, and the random state is restored after it.

    ```python
    class Halves(Plugin):
        name = "halves"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round):
            position = torch.arange(round.loss_mask.shape[1], device=round.loss_mask.device)
            self.first = position < round.loss_mask.sum(1, keepdim=True) / 2  # (b, T)
            return torch.where(self.first, round.token_advantages, 0.5 * round.token_advantages)

        @hookimpl
        def inspect(self, round):
            spans, curves = [], []
            for row, ids in enumerate(round.completion_ids):
                middle = int(self.first[row].sum())
                if 0 < middle < len(ids):
                    spans += [Span(row, 0, middle, "half 1", value=1.0), Span(row, middle, len(ids), "half 2", 0.5)]
                curves.append(Curve(row, "share read", range(len(ids)), [(i + 1) / len(ids) for i in range(len(ids))]))
            return Views(spans, curves)
    ```
    """
