# mypy: disable-error-code="empty-body"
"""Rows and generation: a round before it is scored, and the hooks that choose prompts and surround the sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

from .basics import Logs, Mode
from .plugin import hookspec
from .trainer import TrainerView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SelectedRows:
    """Holds the rows of a round in groups of any size: what `select_rows` may return.

    Rows of a group share a prompt and come one after the other. Two groups may have the same prompt. A plugin that
    forms groups declares the claim `groups`.

    Attributes:
        rows: N dataset rows, as many as the hook got.
        group_ids: (N,) integers: rows of one group have the same number.
    """

    rows: Sequence[Mapping[str, Any]]
    group_ids: Sequence[int]

    @classmethod
    def repeated(cls, prompts: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> SelectedRows:
        """Returns one group per prompt.

        Args:
            prompts: A dataset row for each group.
            counts: The size of each group, 0 to leave the prompt out. They add up to N.
        """
        if len(prompts) != len(counts):
            raise ValueError(f"expected one count per prompt, got {len(counts)} counts for {len(prompts)} prompts")
        places = [place for place, count in enumerate(counts) for _ in range(int(count))]
        return cls([prompts[place] for place in places], places)


@dataclass(frozen=True)
class Generation:
    """Holds what a rollout produced, one entry per prompt (b rows).

    A rollout of the outermost hook may also hold more rows than prompts, such as one per turn of an agent. It then
    names the prompt of every row in `source`, and the plugin declares the claim `groups`. A row belongs to the group of
    its prompt. Processes may add different numbers of rows. The core then adds rows of its own, so that every process
    has as many rows as the others and micro-batches are equally large. These rows repeat a row of the process. They
    have the group -1, no rewards and no part in the loss, in its denominators or in a metric. Reward functions and
    `annotate` get them too.

    Attributes:
        prompt_ids: Token ids of each prompt, unpadded.
        completion_ids: Token ids of each completion, unpadded, tool results included.
        completions: Text or messages, as the reward functions receive them.
        tool_mask: Per completion token, 1 = written by the model and 0 = tool result. None without tools.
        logprobs: Log-probabilities that the sampler reported, or None.
        extra: Further values of TRL's own rollout, such as images. Pass them on unchanged, or let `select` and
            `replaced` take them along. Empty in a generation that was made by hand.
        prompts: Text or messages that take the place of the prompts. Reward functions, later hooks and the table of
            completions then get these. None keeps the prompts of the data, whatever was passed to `generate`.
        source: The index of each row's prompt among the b prompts of this process, in ascending order. Every prompt
            has at least one row. None stands for one row per prompt.
        fields: Values per row, which reach reward functions and later hooks as those of `annotate` do. The plugin
            declares their names in `fields`.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list[Any]
    tool_mask: list[list[int]] | None = None
    logprobs: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    prompts: list[Any] | None = field(default=None, kw_only=True)
    source: Sequence[int] | None = field(default=None, kw_only=True)
    fields: Mapping[str, torch.Tensor | Sequence[Any]] = field(default_factory=dict, kw_only=True)

    def select(self, rows: Sequence[int]) -> Generation:
        """Returns the generation of some rows, in the order of `rows`. A row may be named several times."""
        count = len(self.completion_ids)
        return Generation(**{entry.name: _picked(getattr(self, entry.name), count, rows) for entry in fields(self)})

    def replaced(self, rows: Sequence[int], by: Generation) -> Generation:
        """Returns this generation with other rows in some places: row `rows[i]` becomes row `i` of `by`.

        Raises:
            ValueError: `by` has another number of rows than `rows` names, a row is named twice or does not exist, or
                only one of the two generations has log-probabilities of the sampler.
        """
        count = len(self.completion_ids)
        if len(by.completion_ids) != len(rows) or len(set(rows)) < len(rows) or not set(rows) <= set(range(count)):
            raise ValueError(
                f"Generation.replaced got the rows {list(rows)} and a generation of {len(by.completion_ids)} rows, "
                f"expected as many rows, each of them once, of the {count} that there are"
            )
        if not rows:
            return self
        # the order in which the rows of both stand behind each other
        order = list(range(count))
        for i, row in enumerate(rows):
            order[row] = count + i
        return self.joined(by).select(order)

    def joined(self, other: Generation) -> Generation:
        """Returns the rows of this generation, and behind them those of another one.

        Raises:
            ValueError: Only one of the two generations has log-probabilities of the sampler.
        """
        sizes = (len(self.completion_ids), len(other.completion_ids))
        if not all(sizes):
            return other if sizes[1] else self
        if (self.logprobs is None) != (other.logprobs is None):
            raise ValueError(
                "two generations of which one has `logprobs` cannot become one. Both must come from the same sampler, "
                "or set `logprobs` to None in both."
            )
        first, second = (_with_tool_mask(part, self.tool_mask, other.tool_mask) for part in (self, other))
        return Generation(
            **{
                entry.name: _joined(getattr(first, entry.name), getattr(second, entry.name), sizes)
                for entry in fields(self)
            }
        )


def _with_tool_mask(generation: Generation, *masks: Any) -> Generation:
    """Returns the generation with a tool mask, where one of two generations has one."""
    if generation.tool_mask is not None or all(mask is None for mask in masks):
        return generation
    return replace(generation, tool_mask=[[1] * len(ids) for ids in generation.completion_ids])


def _picked(value: Any, count: int, rows: Sequence[int]) -> Any:
    """Returns the entries of some rows where a value has one for each of `count` rows, else the value."""
    value = _as_list(value)
    if isinstance(value, Mapping):
        return {name: _picked(entry, count, rows) for name, entry in value.items()}
    return [value[row] for row in rows] if isinstance(value, list) and len(value) == count else value


def _as_list(value: Any) -> Any:
    """Returns a tensor as the list of its entries, and other values as they are."""
    return list(value) if hasattr(value, "unbind") else value


def _joined(first: Any, second: Any, sizes: tuple[int, int]) -> Any:
    """Returns the values of two generations behind each other, where they have one for each row."""
    if isinstance(first, Mapping) or isinstance(second, Mapping):
        first, second = first or {}, second or {}
        return {name: _joined(first.get(name), second.get(name), sizes) for name in {**first, **second}}
    values = (_as_list(first), _as_list(second))
    if not any(isinstance(value, list) and len(value) == size for value, size in zip(values, sizes, strict=True)):
        return first if second is None else second
    filled = [[None] * size if value is None else value for value, size in zip(values, sizes, strict=True)]
    return [*filled[0], *filled[1]]


@dataclass(frozen=True)
class RolloutContext(Logs):
    """Tells a `rollout` hook which rows its prompts belong to: n on this process, N on all of them.

    In the first call of a round these are the b rows of this process. Where an outer plugin generates for some rows
    only, they are those rows.

    Attributes:
        mode: `"train"` or `"eval"`.
        step: Optimizer steps taken so far.
        num_generations: G of this mode.
        rows: The dataset row of each prompt, before the rollout.
        group_ids: (N,) integers: rows of one prompt have the same number.
        offset: Index of this process's first prompt among the N.
        row_numbers: For each prompt the number of its row among all rows of the round.
        greedy: Whether an outer plugin asks for greedy completions, such as a baseline. A plugin that samples again
            returns `generate(prompts)` then.
    """

    mode: Mode
    step: int
    num_generations: int
    rows: list[dict[str, Any]]
    group_ids: torch.Tensor
    offset: int
    row_numbers: list[int]
    greedy: bool = False

    @property
    def local(self) -> slice:
        """Selects this process's prompts from a tensor over the N prompts."""
        return slice(self.offset, self.offset + len(self.rows))


@dataclass(frozen=True)
class Turns:
    """Holds what environments reported turn by turn, for plugins with the need `turns`.

    Turn j of a row is the text of its j-th generation (the j-th run of ones in its `tool_mask`), with the tool calls
    that follow up to the next generation or the end. J is the largest number of turns of a row on this process. A row
    that stopped earlier keeps its last values. Environments are read before every generation and at the end. Several
    calls in a turn, failed calls and answers that were too long to keep are therefore counted correctly.

    An environment reports its cumulative reward as a number `total_reward`, or the rewards of its steps as a list
    `step_rewards`. It sets `done` once the episode has ended by itself, and `truncated` once a limit ended it. All four
    attributes are optional. `reset` must set them back, because TRL uses instances again. Reading them must neither
    block nor step the environment, so a time limit for a simulator belongs in the environment's methods.

    Attributes:
        rewards: (b, J) float64: how much the cumulative reward grew in the turn. NaN where it is not finite.
        done, truncated: (b, J + 1) bool: the values before turn j, and at the end.
        rewarded: (b,) bool: whether the environment reports rewards at all. `rewards` is 0 where it does not.
    """

    rewards: torch.Tensor
    done: torch.Tensor
    truncated: torch.Tensor
    rewarded: torch.Tensor


@dataclass(frozen=True)
class Rollout(Logs):
    """Holds a generated round before scoring. Lists have the b local rows.

    Attributes:
        mode: `"train"` or `"eval"`.
        step: Optimizer steps taken so far.
        num_generations: G of this mode. Groups that a plugin formed (claim `groups`) have sizes of their own.
        rows: Dataset rows.
        prompts, completions: Text or messages.
        completion_ids: Token ids of each completion, unpadded.
        tool_mask: See `Generation.tool_mask`.
        group_ids: (N,) integers: rows of one group have the same number. -1 marks rows that the core added to give
            every process as many as the others. Statistics leave them out, because their rewards are NaN.
        offset: Index of this process's first row among the N.
        trainer: The trainer.
        turns: What the environments reported turn by turn, with the need `turns`. None where there are none.
        tool_iterations: How often TRL's tool loop may execute the calls of a row. 0 where it does not run.
        data_rows: The dataset rows as they were before the rollout, without the fields that a `rollout_func` adds to
            `rows`. None in a rollout that was made by hand.
        source: See `Generation.source`: which of the prompts of this process each row has. None in a rollout that was
            made by hand.
    """

    mode: Mode
    step: int
    num_generations: int
    rows: list[dict[str, Any]]
    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    tool_mask: list[list[int]] | None
    group_ids: torch.Tensor
    offset: int
    trainer: TrainerView
    turns: Turns | None = field(default=None, kw_only=True)
    tool_iterations: int = field(default=0, kw_only=True)
    data_rows: list[dict[str, Any]] | None = field(default=None, kw_only=True)
    source: list[int] | None = field(default=None, kw_only=True)

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Returns the b local values of each column of `rows`, as reward functions get them as keyword arguments.

        A callable written like a reward function is called with `prompts=rollout.prompts`,
        `completions=rollout.completions`, `completion_ids=rollout.completion_ids` and `**rollout.columns`.
        """
        reserved = ("prompt", "completion", "completion_ids")  # these three have names of their own
        names = [name for name in self.rows[0] if name not in reserved] if self.rows else []
        return {name: [row[name] for row in self.rows] for name in names}

    @property
    def local(self) -> slice:
        """Selects this process's rows from a tensor over the N rows."""
        return slice(self.offset, self.offset + len(self.rows))

    @property
    def written(self) -> list[list[int]]:
        """Per token of each completion 1 = written by the model, 0 = result of a tool. `tool_mask`, never None."""
        return [[1] * len(ids) for ids in self.completion_ids] if self.tool_mask is None else self.tool_mask

    @property
    def tool_calls(self) -> torch.Tensor:
        """Counts the tool calls of each rollout that TRL executed: (b,) int64.

        These are its messages with the role `tool`, and calls whose results TRL took back because they did not fit.
        Rollouts that are plain text hold no messages. `trl_ext_hooks.toolkit.tool_calls.CallCounter` counts theirs.
        """
        # it imports torch, which this package does not
        from .toolkit.messages import count_executed_calls

        return count_executed_calls(self.completions, self.tool_iterations).to(self.trainer.device)


class Generate(Protocol):
    """Runs the rest of a rollout: the plugins further inside, and finally TRL's generation with its tool loop."""

    def __call__(self, prompts: list[Any], greedy: bool = False, rows: Sequence[int] | None = None) -> Generation:
        """Returns a generation with one row for each prompt. Collective.

        Every process makes the same calls in the same order, and each may pass any number of prompts, also none. The
        core fills shorter lists up and drops what was generated for the filling. If no process has a prompt, nothing is
        generated.

        Args:
            prompts: Text or messages, as the hook got them.
            greedy: Whether the most likely token is taken each time, once per prompt, by the engine that the trainer
                samples with. Other settings, such as a repetition penalty, stay. The random state of the process is as
                before afterwards, so sampling goes on as if nothing had been generated. A call that samples moves it.
            rows: For each prompt the index of the prompt that it stands in for, among those that the hook got. Needed
                where the number is another one and a plugin further inside reads `context`.
        """


Fields = Mapping[str, "torch.Tensor | Sequence[Any]"]
"""Name of a field -> b values."""


@hookspec
def select_rows(
    rows: list[dict[str, Any]], group_ids: list[int], trainer: TrainerView
) -> SelectedRows | list[dict[str, Any]] | None:
    """Replaces the prompts of a training round, before anything is generated. Chained.

    Runs on every process, with the dataset rows of all processes: N rows, every prompt G times in a row, and the group
    of each row. With the need `prompts:COUNT` a round has COUNT prompts, each of them N / COUNT times in a row. Returns
    N rows, the same on every process: a list in the layout that the first plugin got, or `SelectedRows` with groups of
    any size. The core checks them. Each process then keeps its own part. None keeps the rows. GRPO and RLOO, training
    rounds only.

    Advantages of TRL, its metrics, `shared-prefix` and the `group_ids` of all hooks follow groups of any size, and vLLM
    then samples each row on its own. Needs and losses that whole groups in a micro-batch rest on are refused.

    ```python
    class MoreForTheHard(Plugin):
        name = "more-for-the-hard"
        trainers = ("grpo", "rloo")
        needs = ("column:difficulty",)
        claims = ("groups",)

        @hookimpl
        def select_rows(self, rows, group_ids):
            prompts = list({group: row for group, row in zip(group_ids, rows)}.values())
            prompts.sort(key=lambda row: row["difficulty"])
            counts = [2] * (len(prompts) - 1)  # two rows for each prompt, and the rest for the hardest
            return SelectedRows.repeated(prompts, [*counts, len(rows) - sum(counts)])
    ```
    """


@hookspec
def rollout(prompts: list[Any], generate: Generate, trainer: TrainerView, context: RolloutContext) -> Generation:
    """Surrounds the generation of a round. Plugins nest in order, the first one outermost.

    Runs on every process, with its b prompts (a group may lie on two processes). `generate(prompts)` runs the next
    plugin and finally TRL's generation, tools included. It may be called again, for any number of prompts. A plugin
    further inside then gets these prompts. The hook returns one row for each prompt that it got, or more with
    `Generation.source`, which takes the claim `groups`. The core checks them. GRPO and RLOO. Collective.

    TRL's metrics of a round, such as `num_tokens` and those of completions, describe what the hook returns. A
    generation that it throws away leaves no trace in them. Where rows of several generations are mixed, the metrics of
    tools are left out. A hook with an environment generates once, for the prompts that it got: a second episode would
    go on in an environment that was played already. A `rollout_func` cannot be made greedy.

    ```python
    class ThinkHint(Plugin):
        name = "think-hint"
        trainers = ("grpo", "rloo")

        @hookimpl
        def rollout(self, prompts, generate, context):
            result = generate(prompts)
            empty = [i for i, ids in enumerate(result.completion_ids) if len(ids) < 2]
            context.log("empty", len(empty), len(prompts))
            hinted = [[*prompts[i], {"role": "user", "content": "Think first."}] for i in empty]
            return result.replaced(empty, generate(hinted, rows=empty))
    ```
    """


@hookspec
def annotate(rollout: Rollout) -> Fields | None:
    """Adds values per row after generation and before rewards, such as counted tool calls. All plugins.

    Runs on every process. Returns {name: b values}, with names that the plugin declares in `fields`. Reward functions
    receive them as keyword arguments, and later hooks in `fields`. Tensors (b, ...) are also gathered from all
    processes, in `gathered`. None adds nothing. GRPO and RLOO. Collective.

    ```python
    class CountQuestions(Plugin):
        name = "count-questions"
        trainers = ("grpo", "rloo")
        fields = ("questions",)

        @hookimpl
        def annotate(self, rollout):
            return {"questions": torch.tensor([float(str(text).count("?")) for text in rollout.completions])}
    ```
    """
