"""The host of one trainer's plugins: it prepares them, passes TRL's calls to the stages, and takes them off."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trl_ext_hooks import Generation, Logps, LogpsCall, Plugin, Refuse

from ..errors import ConfigError, PluginError
from ..plan.compose import Plan
from ..support.random_state import untouched_random_state
from ..trl_internals import forwards, losses, rewards, row_order, seams, steps, trainer_state
from . import checkpoint, model_card
from .context import Context
from .observer import Recorder
from .stages import (
    advantages,
    foreign,
    forward,
    loss,
    micro_batches,
    needed_logps,
    own_rows,
    pairs,
    precompute,
    rollout,
    scoring,
    turns,
)
from .view import View


class PluginHost:
    """The plugins of one trainer at work. It implements `trl_internals.host.Host`.

    Attributes:
        context: What the stages share.
    """

    def __init__(self, trainer: Any, plan: Plan) -> None:
        self.context = Context(trainer, plan)
        self.context.view.own_rows = own_rows.OwnRows(self.context)
        self.context.view.precompute = functools.partial(precompute.add_columns, self.context)
        self.kind = plan.kind
        self._fired = False
        self._own_loss_ran = plan.kind == "dpo"
        _check_trainer(self.context)
        checkpoint.check_attributes(plan.plugins)

    # --- what others may look at ---

    @property
    def plan(self) -> Plan:
        return self.context.plan

    @property
    def plugins(self) -> Mapping[str, Plugin]:
        return self.context.plan.plugins

    @property
    def view(self) -> View:
        return self.context.view

    @property
    def calls(self) -> Counter[tuple[str, str]]:
        """How often each hook of each plugin ran."""
        return self.context.calls.counts

    @property
    def reference(self) -> Any:
        return self.context.reference

    @property
    def recorder(self) -> Recorder | None:
        return self.context.recorder

    # --- life ---

    def setup(self) -> None:
        """Provides what plugins need and prepares them.

        Raises:
            ConfigError: With what they refuse now that the trainer is there.
        """
        context, trainer = self.context, self.context.trainer
        context.columns = context.plan.columns()
        if context.columns:
            trainer_state.forget_columns(trainer)
            context.undo.append(lambda: trainer_state.forget_columns(trainer))
        if context.calls.has(*pairs.HOOKS):
            collator = trainer.data_collator
            trainer_state.set_collator(trainer, pairs.Collator(collator, context.columns))
            context.undo.append(lambda: trainer_state.set_collator(trainer, collator))
        if context.keeps_groups:
            # also undone when a trainer is dropped with its plugins on
            release = weakref.finalize(trainer, row_order.keep_groups_together(context.kind))
            release.atexit = False
            context.undo.append(release)
        if context.plan.forms_groups:
            context.undo.append(lambda: trainer_state.size_logs(trainer, 0))
        context.view.add_callback(steps.StepsCheck())
        if context.plan.specs:
            # what a stopped training left of its round was made without these plugins
            trainer_state.forget_round(trainer)
            context.undo.append(lambda: trainer_state.forget_round(trainer))
        refusals: list[str] = []
        with untouched_random_state():
            needed_logps.prepare(context)
            if context.calls.has(*micro_batches.HOOKS):
                # a training that was stopped inside a step leaves its step behind
                context.view.add_callback(trainer_state.step_callback(context.steps.clear))
            if context.calls.has("optimizer_step"):
                context.view.add_callback(trainer_state.optimizer_callback(self._optimizer_stepped))
            for name, answers in context.calls.each("setup", trainer=context.view):
                for refusal in answers:
                    if not isinstance(refusal, Refuse):
                        raise PluginError(f"plugin {name!r}: `setup` returned {refusal!r}, expected `Refuse`s or None.")
                    refusals.append(f"  - {name}: {refusal.what} {refusal.fix}")
        if refusals:
            raise ConfigError("this run cannot work:\n" + "\n".join(refusals))
        with untouched_random_state():
            checkpoint.try_out(context, first=True)

    def teardown(self) -> None:
        """Undoes `setup`, all of it, whatever a part of it raises."""
        context = self.context
        with contextlib.ExitStack() as stack:
            context.reference = None
            for undo in context.undo:
                stack.callback(undo)
            for callback in context.view.callbacks:
                stack.callback(context.trainer.remove_callback, callback)
            for name, caller in reversed(context.calls.chain("teardown")):
                stack.callback(context.calls.call, name, "teardown", caller, trainer=context.view)

    def record(self, recorder: Recorder) -> None:
        """Lets `recorder` see the rounds that begin from now on."""
        self.context.recorder = recorder

    def _optimizer_stepped(self) -> None:
        for name, caller in self.context.calls.chain("optimizer_step"):
            self.context.calls.call(name, "optimizer_step", caller, trainer=self.context.view)

    # --- called by the mixins: every trainer ---

    @property
    def columns(self) -> list[str]:
        return self.context.columns

    @property
    def prompts(self) -> int | None:
        return self.context.plan.prompts

    @property
    def in_loss(self) -> bool:
        return self.context.micro_batch is not None

    @property
    def watches_logps(self) -> bool:
        return self.context.watches_logps

    @property
    def needs_old_entropies(self) -> bool:
        return self.context.round is not None and "old_entropies" in self.plan.needs

    def step_ended(self) -> None:
        """Checks after the first training step that every hook of every plugin has run.

        Raises:
            PluginError: Naming those that did not.
        """
        if self._fired:
            return
        silent = self.context.calls.silent()
        if silent:
            raise PluginError(
                f"the first training step ended and these hooks never ran: {', '.join(silent)}. "
                f"{type(self.context.trainer).__name__} does not pass through the methods that call them, so training "
                f"would go on without the method. A subclass that overrides TRL's private methods must call super()."
            )
        checkpoint.try_out(self.context, first=False)
        resting = foreign.resting_plugins(self.plan)
        if resting and not self._own_loss_ran:
            raise PluginError(foreign.passed_by(self.context.trainer, resting))
        self._fired = True

    def save(self, folder: str) -> None:
        checkpoint.save(self.context, folder)

    def load(self, folder: str | None) -> None:
        checkpoint.load(self.context, folder)

    def complete_card(self, folder: str) -> None:
        model_card.complete(Path(folder), self.plan)

    # --- called by the mixins: GRPO and RLOO ---

    def round(self, rows: list[dict[str, Any]], stock: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Runs TRL's round on the selected rows, and returns it as the loss shall see it."""
        trainer = self.context.trainer
        # plugins may change reward columns and groups, which TRL reads from the trainer until its round ends
        with (
            self.context.new_round() as state,
            rewards.own_columns(trainer) as state.reward_columns,
            trainer_state.own_group_size(trainer),
        ):
            state.rows = rows
            state.rows = rollout.select_rows(self.context, rows)
            state.data_rows = [dict(row) for row in state.rows]
            output = stock(state.rows)
            return advantages.finish(self.context, output)

    def generate(self, prompts: list[Any], stock: Callable[[list[Any]], Generation]) -> Generation:
        return rollout.generate(self.context, prompts, stock)

    def turn_begins(self) -> None:
        turns.read(self.context)

    def score(
        self,
        rows: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        stock: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        return scoring.score(self.context, rows, prompts, completions, completion_ids, stock)

    def logps(self, call: LogpsCall, stock: Callable[[], Logps]) -> Logps:
        return forward.logps(self.context, call, stock)

    def loss(self, inputs: Mapping[str, Any], stock: Callable[[Mapping[str, Any]], Any]) -> Any:
        return loss.compute(self.context, inputs, stock)

    def own_loss(self, inputs: Mapping[str, Any], stock: Callable[[Mapping[str, Any]], Any]) -> Any:
        self._own_loss_ran = True
        return loss.own(self.context, inputs, stock)

    # --- called by the mixins: DPO ---

    def pair_loss(
        self,
        inputs: Mapping[str, Any],
        stock: Callable[[Mapping[str, Any]], Any],
        reference: Callable[[Mapping[str, Any]], Any],
    ) -> Any:
        return pairs.compute(self.context, inputs, stock, reference)

    def without_rows(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return pairs.without_rows(inputs)


def _check_trainer(context: Context) -> None:
    """Refuses, or warns of, what only the built trainer shows."""
    trainer, plan, calls = context.trainer, context.plan, context.calls
    users = {*(use for spec in plan.specs for use in spec.uses), *plan.needs}
    replaced = seams.overrides(type(trainer), plan.kind, users)
    foreign.check(type(trainer), plan)
    if replaced:
        warnings.warn(
            f"{', '.join(replaced)} replaces TRL's method without calling it; plugins act on its results.",
            stacklevel=3,
        )
    forward_users = plan.users("logps", "pair_logps", "pair_metrics") if plan.kind == "dpo" else []
    if forward_users and forwards.uses_virtual_tokens(trainer):
        raise ConfigError(
            f"plugin {forward_users[0]!r} needs the token ids in the forward, and this PEFT adapter replaces them by "
            f"learned prompt tokens. Use another kind of adapter, such as LoRA."
        )
    term = losses.adds_to_loss(trainer)
    scaled = plan.drops_rows and losses.loss_unit(trainer, plan.kind) != "tokens"
    if term and scaled and not calls.has("policy_loss"):
        raise ConfigError(
            f"plugin {plan.drops_rows[0]!r} leaves rows out, for which this loss is scaled, and {term} would "
            f"be scaled with it. Switch that off, or set loss_type='dapo', which needs no scale."
        )
