"""Rows that a plugin makes itself: what the trainer's reward functions and its policy give for them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from trl_ext_hooks import Logps, LogpsCall, UsageError

from ...errors import PluginError
from ...support.reward_functions import infinite_rewards
from ...trl_internals import forwards, rewards, steps, trainer_state
from ...trl_internals.mixins import logps_without_plugins, scores_without_plugins
from ..agreement import agree
from ..context import Context
from . import forward


class OwnRows:
    """Implements what `TrainerView` offers beside the round. Collective, for any number of rows per process."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._data: tuple[Any, list[str], Any] | None = None

    def data(self) -> Any:
        """Returns the training data.

        Raises:
            UsageError: They are a stream.
        """
        trainer = self._context.trainer
        source, columns = trainer.train_dataset, list(self._context.columns)
        # a user may exchange the data between two trainings
        if self._data is None or self._data[0] is not source or self._data[1] != columns:
            self._data = source, columns, trainer_state.training_data(trainer)
        if self._data[2] is None:
            raise UsageError(
                "`trainer.data`: the training data are a stream, so no row can be looked up in them. Load them without "
                "streaming, or leave out the plugin that asks for them."
            )
        return self._data[2]

    def total_steps(self) -> int:
        """Returns how many optimizer steps the training has.

        Raises:
            UsageError: It is not known yet.
        """
        total = steps.total_steps(self._context.kind, self._context.trainer)
        if total is None:
            raise UsageError(
                "`trainer.total_steps`: DPO counts its steps when training begins. Read it in a hook that runs during "
                "training, or set max_steps."
            )
        return total

    def reward_names(self) -> tuple[str, ...]:
        """Returns the names of the reward functions, also in a round whose columns were changed."""
        return rewards.distinct(self._columns()["reward_func_names"])

    def _columns(self) -> dict[str, Any]:
        """Returns the trainer's own reward columns."""
        state = self._context.round
        if state is not None and state.reward_columns is not None:
            return state.reward_columns
        with rewards.own_columns(self._context.trainer) as own:
            return own

    def score(
        self, rows: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """Returns (n, F) rewards."""
        context = self._context
        _check_kind(context, "trainer.score")
        view, trainer = context.view, context.trainer
        given: tuple[list[Any], ...] = (rows, prompts, completions, completion_ids)
        problem = _rows_problem(given)
        if trainer_state.environments(trainer):
            problem = "rollouts use environments, which pay for what was played in them, so other rows have no reward"
        count = 0 if problem else len(rows)
        counts = agree(view, "trainer.score", count, problem)
        columns, width = self._columns(), max(counts)
        names = self.reward_names()
        if not width:
            return torch.zeros(0, len(names), device=view.device)
        example: Any = tuple(values[0] for values in given) if count else None
        if not all(counts):  # a process without rows fills up with one of another process
            example = next(row for row in view.gather_objects([example]) if row is not None)
        filled = [[*values, *[extra] * (width - count)] for values, extra in zip(given, example, strict=True)]
        with rewards.unlogged(trainer, columns):
            scores = scores_without_plugins(trainer, *filled)
        expected = (width * view.num_processes, len(names))
        if tuple(scores.shape) != expected:
            raise PluginError(
                f"trainer.score: {type(trainer).__name__} scored rows as {tuple(scores.shape)}, expected {expected}."
            )
        for name, column in zip(names, scores.T.tolist(), strict=True):
            complaint = infinite_rewards(f"trainer.score: reward function {name!r}", column)
            if complaint:
                raise PluginError(complaint)
        first = view.process_index * width
        return scores[first : first + count]

    def logps(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], grad: bool = False, entropy: bool = False
    ) -> Logps:
        """Returns (n, T) log-probabilities."""
        context = self._context
        _check_kind(context, "trainer.logps")
        view, trainer = context.view, context.trainer
        problem = _ids_problem(prompt_ids, completion_ids)
        count = 0 if problem else len(prompt_ids)
        known = agree(view, "trainer.logps", (count, bool(grad), bool(entropy)), problem)
        if len({wanted[1:] for wanted in known}) > 1:
            raise PluginError("trainer.logps has other values of `grad` or `entropy` on some processes than on others.")
        width, longest = max(each[0] for each in known), max(map(len, completion_ids), default=0)
        if not width:
            empty = torch.zeros(0, 0, device=view.device)
            return Logps(empty, empty if entropy else None)
        filling = [[view.tokenizer.eos_token_id]] * (width - count)
        rows = forwards.padded_rows([*prompt_ids, *filling], [*completion_ids, *filling], view.device)
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        tokens = rows["completion_ids"].shape[1]
        call = LogpsCall(
            kind=context.kind,
            role="policy" if grad else "old",
            model=trainer.model,
            input_ids=ids,
            attention_mask=mask,
            logits_to_keep=tokens,
            score_mask=None,
            batch_size=forwards.rows_at_once(trainer),
            compute_entropy=bool(entropy),
            extra={},
            side=True,
        )

        def dense() -> Logps:
            sizes = {"batch_size": call.batch_size, "compute_entropy": call.compute_entropy}
            return logps_without_plugins(trainer, call.model, ids, mask, tokens, **sizes)

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad() if grad else forwards.scoring(trainer))
            result = forward.logps(context, call, dense)
        scored = mask[:count, -tokens:][:, :longest]

        def cut(values: torch.Tensor) -> torch.Tensor:
            # not multiplied, because a masked token may have no finite value
            return values[:count, :longest].masked_fill(scored == 0, 0.0)

        entropies = cut(result.entropies) if entropy and result.entropies is not None else None
        return Logps(cut(result.per_token_logps), entropies)


def _check_kind(context: Context, call: str) -> None:
    """Refuses a trainer without rounds."""
    if context.kind == "dpo":
        raise UsageError(f"{call} is for GRPO and RLOO. DPO has `trainer.score_pairs`.")


def _rows_problem(given: Sequence[Any]) -> str | None:
    """Returns what is wrong with the arguments of `score`, or None."""
    names = ("rows", "prompts", "completions", "completion_ids")
    for name, values in zip(names, given, strict=True):
        if not isinstance(values, list):
            return f"`{name}` is a {type(values).__name__}, expected a list with one entry for each row"
    lengths = [len(values) for values in given]
    if len(set(lengths)) > 1:
        counted = ", ".join(f"{length} {name}" for name, length in zip(names, lengths, strict=True))
        return f"it got {counted}, expected as many of each"
    for row in given[0]:
        if not isinstance(row, dict):
            return f"a row is a {type(row).__name__}, expected a dict of columns as in `rollout.rows`"
        if row.keys() != given[0][0].keys():
            return f"rows have the columns {sorted(given[0][0])} and {sorted(row)}, expected the same in each"
    return None


def _ids_problem(prompt_ids: Any, completion_ids: Any) -> str | None:
    """Returns what is wrong with the arguments of `logps`, or None."""
    for name, values in (("prompt_ids", prompt_ids), ("completion_ids", completion_ids)):
        if not isinstance(values, list):
            return f"`{name}` is a {type(values).__name__}, expected a list with the token ids of each row"
        for ids in values:
            if not isinstance(ids, list) or not all(isinstance(token, int) and token >= 0 for token in ids):
                return f"`{name}` holds {str(ids)[:60]}, expected a list of token ids"
    if len(prompt_ids) != len(completion_ids):
        return f"it got {len(prompt_ids)} prompts and {len(completion_ids)} completions, expected as many of both"
    return "a prompt is empty, so nothing predicts its first token" if not all(prompt_ids) else None
