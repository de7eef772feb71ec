"""The context of the stages: the plugins of a trainer, the round that is under way, and the micro-batch in its loss."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trl_ext_hooks import Logps, Rollout, Scored, SideBatch, SideRows, Turns
from trl_ext_hooks.basics import MetricLog, Mode, Role, loss_mask

from ..errors import PluginError
from ..plan.compose import Plan
from ..trl_internals import trainer_state
from .calls import HookCalls
from .observer import Recorder, RoundRecord
from .view import View

CORE_METRICS = ("advantage_mean", "advantage_change", "rows_kept")
"""Metrics that the core reports under the name of a plugin: of its advantages, and of the rows that it keeps."""


@dataclasses.dataclass(frozen=True)
class Poll:
    """What one environment reports at one moment. `reward` is None if it reports none."""

    reward: float | None
    done: bool
    truncated: bool


@dataclasses.dataclass
class RoundState:
    """What the stages of one round hand on to each other.

    Attributes:
        num_generations: G of the trainer in this mode.
        rows: The dataset rows of this process, in the list that TRL's round works on.
        group_ids: The group of every row of all processes, where a plugin formed groups. None for TRL's own.
        source: Which of its prompts each row of this process has, where a rollout added rows.
        fields: Values per row that a rollout returned.
        data_rows: The dataset rows before the rollout; TRL writes what a `rollout_func` returns into the rows.
        tool_mask: Per completion token 1 = written by the model, 0 = tool result.
        polls: Readings of the environments while a generation runs, else None.
        turns: The readings as turns, when the generation has ended.
        hidden_states: What plugins asked for, from the first forward that scored the round.
        log: The metrics that hooks log.
        reward_columns: The trainer's own reward columns, which plugins may change until the round ends.
        logps: Log-probabilities of the round by role, as TRL computed them.
        old_entropies: Entropies from the forward of the old ones, where a plugin needs them.
        rollout, scored: The round before and after its rewards.
        record: The record of the round, where it is recorded.
    """

    num_generations: int = 1
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    group_ids: list[int] | None = None
    source: list[int] | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_rows: list[dict[str, Any]] | None = None
    tool_mask: list[list[int]] | None = None
    polls: list[list[Poll]] | None = None
    turns: Turns | None = None
    hidden_states: dict[str, torch.Tensor] | None = None
    log: MetricLog = dataclasses.field(default_factory=MetricLog)
    reward_columns: dict[str, Any] | None = None
    logps: dict[Role, torch.Tensor] = dataclasses.field(default_factory=dict)
    old_entropies: torch.Tensor | None = None
    rollout: Rollout | None = None
    scored: Scored | None = None
    record: RoundRecord | None = None


@dataclasses.dataclass(frozen=True)
class StepRows:
    """The rows of a plugin beside those of the round, in one optimizer step.

    Attributes:
        rows: Those of this process.
        width: Tokens of the longest completion of this process, or of another one where this one has none.
        counts: Numbers of rows, by process.
        tokens: Tokens of the completions, on all processes.
    """

    rows: SideBatch
    width: int
    counts: list[int]
    tokens: int


@dataclasses.dataclass
class StepState:
    """One optimizer step, or one batch of an evaluation, before and between its losses.

    Attributes:
        size: Its micro-batches on this process.
        begun: How many of them have come to their loss.
        batches: The micro-batches after `loss_inputs`, where `step_statistics` has seen them. Otherwise empty.
        statistics: By plugin, what `step_statistics` returned.
        side: By plugin, the rows of `side_batch`.
    """

    size: int
    begun: int = 0
    batches: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    statistics: dict[str, Any] = dataclasses.field(default_factory=dict)
    side: dict[str, StepRows] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class MicroBatch:
    """One micro-batch inside its loss.

    Attributes:
        batch: Its tensors by TRL's names.
        policy: What the policy's forward gave, with its graph. None before that forward.
        hidden_states: What plugins asked for in that forward.
        own_loss_ran: Whether TRL's own loss has been computed inside it.
        statistics: By plugin, what `step_statistics` returned for its optimizer step.
        side: By plugin, its rows of `side_batch`.
        position: Its number in the optimizer step.
        is_side: Whether it holds such rows, and not rows of the round.
    """

    batch: Mapping[str, Any]
    policy: Logps | None = None
    hidden_states: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    own_loss_ran: bool = False
    statistics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    side: Mapping[str, SideRows] = dataclasses.field(default_factory=dict)
    position: int = 0
    is_side: bool = False

    @property
    def mask(self) -> torch.Tensor:
        """(m, T): 1 on the tokens that the loss counts."""
        return loss_mask(self.batch)


class Context:
    """What every stage may use. It knows no stage.

    Attributes:
        trainer: The TRL trainer.
        plan: The checked plan of its plugins.
        view: The trainer as plugins see it.
        calls: The hooks of the plugins.
        round: The round under way, else None.
        micro_batch: The micro-batch inside its loss, else None.
        steps: By mode, the optimizer step under way, where a plugin acts before its losses.
        reference: A frozen copy of the policy, where a plugin needs one and TRL has none.
        unchecked_reference: Whether the first round has yet to compare the policy with its reference.
        stock_reference: The reference model that the trainer had when the plugins came.
        recorder: Who records rounds, if anybody does.
        columns: Columns of the data that plugins need.
        undo: What has to be undone when the plugins are taken off.
    """

    def __init__(self, trainer: Any, plan: Plan) -> None:
        self.trainer = trainer
        self.plan = plan
        self.kind = plan.kind
        self.view = View(trainer, plan.kind)
        self.calls = HookCalls(plan)
        self.round: RoundState | None = None
        self.micro_batch: MicroBatch | None = None
        self.steps: dict[Mode, StepState] = {}
        self.reference: Any = None
        self.unchecked_reference = False
        self.stock_reference: Any = None
        self.recorder: Recorder | None = None
        self.columns: list[str] = []
        self.undo: list[Callable[[], None]] = []
        self.keeps_groups = bool({"whole_groups", "grouped_steps", "grouped_order"} & set(plan.needs))
        self.wants_loss = self.calls.has("policy_loss", "loss_terms", "loss_metrics")
        needs_logps = bool({"old_logps", "old_entropies", "ref_logps"} & set(plan.needs))
        # the KL term of RLOO is part of the rewards, which groups of a plugin divide anew
        needs_kl = plan.kind == "rloo" and bool(plan.forms_groups)
        forward_hooks = ("logps", "hidden_positions", "side_batch", "step_statistics")
        self.watches_logps = self.wants_loss or self.calls.has(*forward_hooks) or needs_logps or needs_kl

    # --- the round and the micro-batch under way ---

    @contextlib.contextmanager
    def new_round(self) -> Iterator[RoundState]:
        """Opens a round for the block."""
        state = RoundState(
            num_generations=trainer_state.num_generations(self.trainer),
            record=None if self.recorder is None else self.recorder.begin(),
        )
        self.round = state
        try:
            yield state
        finally:
            self.round = None

    def current_round(self) -> RoundState:
        """Returns the round under way, in which the caller must be."""
        assert self.round is not None, "a stage ran outside a round"
        return self.round

    @contextlib.contextmanager
    def in_loss(self, batch: Mapping[str, Any], **known: Any) -> Iterator[MicroBatch]:
        """Opens a micro-batch for the block, inside which the policy's forward belongs to it.

        Args:
            batch: Its tensors.
            known: Other attributes of it that are known already.
        """
        current, outer = MicroBatch(batch, **known), self.micro_batch
        self.micro_batch = current
        try:
            yield current
        finally:
            self.micro_batch = outer  # the other one holds the graph

    # --- records and metrics ---

    @property
    def recording(self) -> bool:
        """Whether the round under way is recorded. All processes agree."""
        return self.round is not None and self.round.record is not None

    def show(self, by: str, state: Scored) -> None:
        """Shows rewards or advantages to the record of the round, as `by` left them."""
        if self.round is not None and self.round.record is not None:
            self.round.record.after(by, state)

    def report(self, values: Mapping[str, tuple[float, float]]) -> None:
        """Adds (sum, count) pairs over processes and records each ratio. Collective. Names may differ by process."""
        totals: dict[str, list[float]] = {}
        for local in self.view.gather_objects([dict(values)]):
            for name, (amount, count) in local.items():
                entry = totals.setdefault(name, [0.0, 0.0])
                entry[0] += float(amount)
                entry[1] += float(count)
        for name in sorted(totals):
            amount, count = totals[name]
            if count:
                trainer_state.add_metric(self.trainer, name, amount / count)

    def report_logged(self, logged: MetricLog, returned: Mapping[str, tuple[float, float]]) -> None:
        """Reports what hooks logged and what they returned. Collective.

        Raises:
            PluginError: A plugin did both under one name.
        """
        twice = sorted(logged.values.keys() & returned.keys())
        if twice:
            name, _, key = twice[0].partition("/")
            raise PluginError(
                f"plugin {name!r} logged {key!r} and returned a metric or a loss term of that name too. Report it "
                f"once, or under two names. The core reports {', '.join(CORE_METRICS)} under the name of a plugin."
            )
        self.report({**logged.values, **returned})
