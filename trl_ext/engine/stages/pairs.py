"""Preference pairs: the hooks `pair_batch`, `pair_logps` and `pair_metrics`, and the dataset rows that they see.

TRL's collator keeps token ids only, and a key that it does not know would reach the model. So the collator is wrapped:
the rows travel with the batch under one key, which is taken out before anything calls a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trl_ext_hooks import Logps, LogpsCall, PairLogps, Pairs, ScoredPairs

from ...errors import ConfigError, PluginError
from ...trl_internals import forwards, trainer_state
from ..calls import as_mapping
from ..context import Context
from . import forward, micro_batches

HOOKS = ("pair_batch", "pair_logps", "pair_metrics")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
KEY = "trl_ext_rows"


class Rows:
    """Dataset rows of a batch, as an object that moving a batch to a device or pinning it leaves alone."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows


class Collator:
    """The trainer's collator, which also lets the rows through.

    Args:
        inner: The collator as it was.
        columns: Names to let through besides the token ids. The list may grow.
    """

    def __init__(self, inner: Callable[[list[dict[str, Any]]], Any], columns: Sequence[str]) -> None:
        self.inner = inner
        self.columns = columns

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for name in self.columns:
            if name not in examples[0]:
                raise ConfigError(
                    f"a row of the data has no column {name!r}, which a plugin needs; it has {', '.join(examples[0])}. "
                    f"Evaluation data need it as well as training data."
                )
        batch = dict(self.inner(examples))
        kept = (*IDS, *self.columns)
        batch[KEY] = Rows([{name: example[name] for name in kept if name in example} for example in examples])
        return batch


def without_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != KEY}


def batch_of(context: Context, inputs: Mapping[str, Any]) -> Pairs:
    """Returns a collated batch as hooks see it."""
    carried = inputs.get(KEY)
    if not isinstance(carried, Rows):
        raise PluginError(
            f"{type(context.trainer).__name__} made a batch without its dataset rows, so "
            f"{', '.join(context.plan.users(*HOOKS))} cannot act. Give the trainer its `data_collator` before the "
            f"plugins are attached."
        )
    return Pairs(
        mode=trainer_state.mode(context.trainer),
        step=context.trainer.state.global_step,
        trainer=context.view,
        batch=without_rows(inputs),
        rows=carried.rows,
    )


class _Forwards:
    """The two forwards of one micro-batch: the reference's, and then the policy's."""

    def __init__(self, context: Context, pairs: Pairs, fields: Mapping[str, Any]) -> None:
        self.context = context
        self.pairs = pairs
        self.fields = fields
        self.policy: torch.Tensor | None = None
        self.reference: Logps | None = None
        self.rewritten: torch.Tensor | None = None
        self.answered = False

    def forward(self, call: LogpsCall, dense: Callable[[], Logps]) -> Logps:
        """Stands in for a forward of policy or reference inside TRL's loss."""
        if call.role == "reference" and self.rewritten is not None:
            assert self.reference is not None
            self.answered = True  # the forward itself ran before the policy's
            return dataclasses.replace(self.reference, per_token_logps=self.rewritten)
        result = forward.logps(self.context, call, dense)
        if call.role == "reference":
            self.reference = result
            return result
        self.policy = result.per_token_logps
        if not self.context.calls.has("pair_logps"):
            return result
        return dataclasses.replace(result, per_token_logps=self._rewrite(result.per_token_logps))

    def scored(self, policy: torch.Tensor, reference: torch.Tensor | None) -> ScoredPairs:
        own = {field.name: getattr(self.pairs, field.name) for field in dataclasses.fields(self.pairs)}
        return ScoredPairs(**own, fields=self.fields, per_token_logps=policy, ref_per_token_logps=reference)

    def _rewrite(self, policy: torch.Tensor) -> torch.Tensor:
        if self.reference is None:
            raise PluginError("the reference was not computed before the policy; report this with your TRL version.")
        reference, masked = self.reference.per_token_logps, ~self.pairs.mask
        gradient = policy.requires_grad
        for name, caller in self.context.calls.chain("pair_logps"):
            result = self.context.calls.call(name, "pair_logps", caller, pairs=self.scored(policy, reference))
            if result is None:
                continue
            _check(name, result, policy, gradient)
            policy = result.per_token_logps.masked_fill(masked, 0.0)
            reference = result.ref_per_token_logps.detach().masked_fill(masked, 0.0)
        self.rewritten = reference
        return policy


def compute(
    context: Context,
    inputs: Mapping[str, Any],
    stock: Callable[[Mapping[str, Any]], Any],
    reference: Callable[[Mapping[str, Any]], Any],
) -> Any:
    """Computes the loss of a micro-batch of pairs.

    Args:
        context: The plugins.
        inputs: The collated batch.
        stock: TRL's loss of a batch.
        reference: TRL's forward of the reference on a batch. Its result is caught on the way.
    """
    batch = micro_batches.edited(context, without_rows(inputs))
    with context.in_loss(batch):
        return _compute(context, inputs, batch, stock, reference)


def _compute(
    context: Context,
    inputs: Mapping[str, Any],
    batch: Mapping[str, Any],
    stock: Callable[[Mapping[str, Any]], Any],
    reference: Callable[[Mapping[str, Any]], Any],
) -> Any:
    if not context.calls.has("logps", *HOOKS):
        return stock(batch)
    if context.calls.has(*HOOKS):
        return _with_hooks(context, inputs, batch, stock, reference)
    with forwards.pair_forwards(context.trainer, lambda call, dense: forward.logps(context, call, dense)):
        return stock(batch)


def _with_hooks(
    context: Context,
    inputs: Mapping[str, Any],
    batch: Mapping[str, Any],
    stock: Callable[[Mapping[str, Any]], Any],
    reference: Callable[[Mapping[str, Any]], Any],
) -> Any:
    pairs = dataclasses.replace(batch_of(context, inputs), batch=batch)
    current = _Forwards(context, pairs, _fields(context, pairs))
    watched = context.calls.has("logps", "pair_logps", "pair_metrics")  # before TRL 1.15 the forward cannot be
    with forwards.pair_forwards(context.trainer, current.forward) if watched else contextlib.nullcontext():
        if context.calls.has("pair_logps"):
            reference(batch)
        result = stock(batch)
    if context.calls.has("pair_logps") and not current.answered:
        raise PluginError(
            f"{type(context.trainer).__name__} took its reference log-probabilities from somewhere else than the "
            f"reference's forward, so {', '.join(context.plan.users('pair_logps'))} changed the policy's alone."
        )
    metrics: dict[str, tuple[float, float]] = {}
    if context.calls.has("pair_metrics"):
        if current.policy is None:
            raise PluginError(f"{type(context.trainer).__name__} computed its loss without TRL's fused forward.")
        raw = None if current.reference is None else current.reference.per_token_logps.detach()
        metrics = context.calls.metrics("pair_metrics", pairs=current.scored(current.policy.detach(), raw))
    context.report_logged(pairs.metric_log, metrics)
    return result


def _fields(context: Context, pairs: Pairs) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, result in context.calls.each("pair_batch", pairs=pairs):
        for field, value in as_mapping(name, "pair_batch", result).items():
            context.calls.check_declared(name, "pair_batch", field)
            found[field] = value
    return found


def _check(name: str, result: Any, policy: torch.Tensor, gradient: bool) -> None:
    if not isinstance(result, PairLogps):
        raise PluginError(f"plugin {name!r} returned {type(result).__name__} from 'pair_logps', expected PairLogps.")
    shapes = {tuple(result.per_token_logps.shape), tuple(result.ref_per_token_logps.shape)}
    if shapes != {tuple(policy.shape)}:
        raise PluginError(
            f"plugin {name!r} returned log-probabilities of shapes {sorted(shapes)} from 'pair_logps', expected "
            f"{tuple(policy.shape)} for both."
        )
    if gradient and not result.per_token_logps.requires_grad:
        raise PluginError(
            f"plugin {name!r} returned policy log-probabilities without a gradient from 'pair_logps', so the model "
            f"would not learn. Compute them from pairs.per_token_logps without `detach`, `item` or `no_grad`."
        )
