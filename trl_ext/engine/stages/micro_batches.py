"""Before the losses of an optimizer step: the hooks `loss_inputs` and `step_statistics`, and when `side_batch` runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trl_ext_hooks import Loss, StepBatch
from trl_ext_hooks.basics import MetricLog, Mode

from ...errors import PluginError
from ...support.random_state import untouched_random_state
from ...trl_internals import forwards, steps, trainer_state
from ..calls import as_mapping
from ..context import Context, MicroBatch, StepState
from . import side_rows

HOOKS = ("side_batch", "step_statistics")
"""The hooks that run once per optimizer step, before its first loss."""


def following(context: Context, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], StepState]:
    """Returns the micro-batch whose loss comes now, as plugins edited it, with the optimizer step that it belongs to.

    The first micro-batch of a step opens the step. Without a plugin that acts once per step, each is its own.
    """
    if not context.calls.has(*HOOKS):
        return edited(context, inputs), StepState(size=1, begun=1)
    mode = trainer_state.mode(context.trainer)
    step = context.steps.get(mode)
    if step is None or step.begun == step.size:
        step = _opened(context, inputs, mode)
    step.begun += 1
    batch = step.batches[step.begun - 1] if step.batches else edited(context, inputs)
    return batch, step


def edited(context: Context, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the micro-batch after every plugin's `loss_inputs`. The buffered original stays as it was."""
    if not context.calls.has("loss_inputs"):
        return inputs
    batch = dict(inputs)
    for name, caller in context.calls.chain("loss_inputs"):
        result = context.calls.call(name, "loss_inputs", caller, batch=dict(batch), trainer=context.view)
        changes = as_mapping(name, "loss_inputs", {} if result is None else result)
        unknown = [key for key in changes if key not in batch]
        if unknown:
            raise PluginError(
                f"plugin {name!r} returned {unknown[0]!r} from 'loss_inputs'; the batch has {', '.join(batch)}."
            )
        for key, value in changes.items():
            _check_entry(name, key, value, batch)
        batch.update(changes)
    return batch


def _check_entry(name: str, key: str, value: Any, batch: Mapping[str, Any]) -> None:
    """Checks an entry that `loss_inputs` puts in the place of a tensor.

    Raises:
        PluginError: It is no tensor of that shape and kind. Advantages may be one per row or one per token.
    """
    before = batch[key]
    if not isinstance(before, torch.Tensor):
        return
    shapes = {tuple(before.shape)}
    if key == "advantages":
        shapes |= {(len(before),), tuple(batch["completion_mask"].shape)}
    tensor = isinstance(value, torch.Tensor)
    if tensor and tuple(value.shape) in shapes and value.is_floating_point() == before.is_floating_point():
        return
    got = f"{value.dtype} {tuple(value.shape)}" if tensor else type(value).__name__
    raise PluginError(
        f"plugin {name!r} returned {got} for {key!r} from 'loss_inputs', expected {before.dtype} "
        f"{' or '.join(map(str, sorted(shapes)))}."
    )


def _opened(context: Context, inputs: Mapping[str, Any], mode: Mode) -> StepState:
    """Begins the optimizer step whose first micro-batch is `inputs`. Collective."""
    trainer, training = context.trainer, mode == "train"
    step = context.steps[mode] = StepState(size=steps.micro_batches_of_step(trainer) if training else 1)
    if context.calls.has("side_batch"):
        side_rows.ask(context, step, mode)
    if context.calls.has("step_statistics"):
        batches = steps.batches_of_step(trainer, inputs) if training else [inputs]
        step.batches = [edited(context, batch) for batch in batches]
        step.statistics = _statistics(context, step, mode)
    return step


def _statistics(context: Context, step: StepState, mode: Mode) -> dict[str, Any]:
    """Scores all micro-batches of a step without gradient, and lets plugins look at them. Collective."""
    log = MetricLog()
    with untouched_random_state():
        scored = []
        for position, batch in enumerate(step.batches):
            with forwards.scoring(context.trainer), context.in_loss(batch, position=position) as micro_batch:
                forwards.scores(context.trainer, batch, compute_entropy=True)
            scored.append(view(context, micro_batch, mode))
        seen = StepBatch(
            mode=mode,
            step=context.trainer.state.global_step,
            trainer=context.view,
            micro_batches=tuple(scored),
            metric_log=log,
        )
        statistics = dict(context.calls.each("step_statistics", step=seen))
    context.report_logged(log, {})
    return statistics


def view(context: Context, micro_batch: MicroBatch, mode: Mode) -> Loss:
    """Returns a micro-batch after its forward as plugins see it."""
    policy = micro_batch.policy
    if policy is None:
        users = context.plan.users("policy_loss", "loss_terms", "loss_metrics", *HOOKS)
        raise PluginError(
            f"{type(context.trainer).__name__} computed its loss without TRL's log-probability method, so "
            f"{', '.join(users)} cannot act."
        )
    return Loss(
        mode=mode,
        step=context.trainer.state.global_step,
        trainer=context.view,
        batch=micro_batch.batch,
        per_token_logps=policy.per_token_logps,
        entropies=policy.entropies,
        hidden_states=micro_batch.hidden_states,
        step_statistics=micro_batch.statistics,
        side=micro_batch.side,
        position=micro_batch.position,
    )
