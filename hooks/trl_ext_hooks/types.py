"""Frozen dataclasses that cross the hook boundary.

Axis letters: `b` rows of a generation round on this process, `N = b * processes` rows of all processes, `G` rows of a
group, `F` reward functions, `m` rows of a micro-batch, `P` padded prompt tokens, `T` padded completion tokens (`T` may
differ between processes). Rows are ordered by process: this process owns rows `offset .. offset + b - 1` of the `N`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

TrainerKind = Literal["grpo", "rloo", "dpo"]
Mode = Literal["train", "eval"]
Role = Literal["policy", "old", "reference"]


# --- before training: what `configure` receives and returns -----------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """A trainer about to be built. `args` is a copy: editing it changes nothing.

    Attributes:
        kind: Which trainer.
        args: The training arguments (`GRPOConfig`, `RLOOConfig` or `DPOConfig`).
        reward_names: Names of the reward functions, none for DPO; None where an environment owns some of them, which
            is known once the trainer is built (`configure` then runs again).
        columns: Columns of the training data, or None where they cannot be known before it is read.
        plugins: Names of all plugins of the run, in the order in which they act.
        tool_sources: What lets rollouts call tools: those of `tools`, `environment_factory` and `rollout_func` that
            the trainer is given.
    """

    kind: TrainerKind
    args: Any
    reward_names: tuple[str, ...] | None
    columns: tuple[str, ...] | None
    plugins: tuple[str, ...]
    tool_sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Require:
    """The setting must have one of the `allowed` values; anything else is refused with `why`."""

    setting: str
    allowed: tuple[Any, ...]
    why: str


@dataclass(frozen=True)
class Recommend:
    """The setting works best with `value`; another one is reported once, with the `source` of the advice."""

    setting: str
    value: Any
    source: str


@dataclass(frozen=True)
class Need:
    """A need that depends on the options, in addition to the plugin's declared `needs`."""

    name: str


@dataclass(frozen=True)
class Refuse:
    """The run cannot work: `what` is wrong, and how to `fix` it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Warn:
    """The run works, but not as the user may expect."""

    message: str


Requirement = Require | Recommend | Need | Refuse | Warn


# --- the running trainer ----------------------------------------------------------------------------------------------


class TrainerView(Protocol):
    """What a plugin may use of the trainer that it serves."""

    @property
    def kind(self) -> TrainerKind: ...
    @property
    def args(self) -> Any:
        """The training arguments; read them, never write them."""

    @property
    def model(self) -> Any:
        """The policy as the trainer calls it (wrapped for distributed training)."""

    @property
    def unwrapped_model(self) -> Any:
        """The policy without distributed wrappers."""

    @property
    def processing_class(self) -> Any:
        """The tokenizer or processor."""

    def render(self, prompt: Any) -> str:
        """The text that the policy continues for a prompt: messages through the chat template, text as it is."""

    @property
    def device(self) -> torch.device: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(b, ...) of each process -> (N, ...) on all, in row order. Collective: every process must call it."""

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The same for a list of picklable values."""

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor of one shape over processes, on all of them. Collective."""

    def add_callback(self, callback: Any) -> None:
        """Add a transformers `TrainerCallback`; it is removed again when the plugin is switched off."""

    def frozen_model(self, path: str) -> Any:
        """A second causal language model for scoring pairs: a checkpoint, or a PEFT adapter (merged into its base).

        It never trains, has no dropout, and is prepared for the devices of the run. One whose tokenizer is not the
        policy's is refused. DPO from TRL 1.15.
        """

    def score_pairs(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """(2n, L-1) log-probabilities of the completion tokens of a batch of pairs under a `frozen_model`.

        No gradient; 0 on every other token.
        """

    def precompute_pairs(self, name: str, score: Callable[[Pairs], torch.Tensor], key: str) -> None:
        """Gives the training and evaluation data the columns `chosen_NAME` and `rejected_NAME`, for use in `setup`.

        Args:
            name: What is computed, such as `guide_logps`.
            score: (2n, L-1) values of a batch; each process is asked for its part of the data.
            key: What the values depend on besides the data and their truncation, such as the path of a model. Values
                of the same data and key are taken from the cache of the data.

        Each column holds one value per completion token, NaN where truncation cuts the token off. Collective.
        """


# --- one generation round ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generation:
    """What a rollout produced, one entry per prompt (b rows).

    Attributes:
        prompt_ids: Token ids of each prompt, unpadded.
        completion_ids: Token ids of each completion, unpadded, tool results included.
        completions: Text or messages, as the reward functions receive them.
        tool_mask: Per completion token 1 = written by the model, 0 = tool result; None without tools.
        logprobs: Log-probabilities reported by the sampler, or None.
        extra: Further values of TRL's own rollout, to be passed on unchanged.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    completions: list[Any]
    tool_mask: list[list[int]] | None = None
    logprobs: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Turns:
    """What environments gave between the turns of the model: for plugins with the need `turns`.

    Turn j of a row is what the model wrote in the j-th generation of a round, the j-th run of ones in its `tool_mask`,
    and the tool calls that this led to, up to the next generation or the end. J is the largest number of turns of a row
    on this process; a row that stopped earlier stays as it was. Environments are read before every generation and at
    the end, so this holds with several calls in a turn, with calls that fail, and where an answer was too long to keep.

    An environment tells its cumulative reward as a number `total_reward`, or the rewards of its steps as a list
    `step_rewards`; that it has ended by itself as `done`, and by a limit as `truncated`. None of them has to exist.

    Attributes:
        rewards: (b, J) float64: how much the cumulative reward grew in the turn; NaN where it is not finite.
        done, truncated: (b, J + 1) bool: as they were before turn j, and at the end.
        rewarded: (b,) bool: whether the environment tells rewards at all; `rewards` is 0 where it does not.
    """

    rewards: torch.Tensor
    done: torch.Tensor
    truncated: torch.Tensor
    rewarded: torch.Tensor


@dataclass(frozen=True)
class Rollout:
    """A generated round before scoring. Lists have the b local rows.

    Attributes:
        mode: `"train"` or `"eval"`.
        step: Optimizer steps taken so far.
        num_generations: G of this mode.
        rows: Dataset rows.
        prompts, completions: Text or messages.
        completion_ids: Token ids of each completion, unpadded.
        tool_mask: See `Generation.tool_mask`.
        group_ids: (N,) which rows share a prompt: equal numbers, equal group.
        offset: Index of this process's first row among the N.
        trainer: The trainer.
        turns: What the environments gave turn by turn, with the need `turns`; None where there are none.
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

    @property
    def local(self) -> slice:
        """Selects this process's rows from a tensor over the N rows."""
        return slice(self.offset, self.offset + len(self.rows))

    @property
    def tool_calls(self) -> torch.Tensor:
        """(b,) int64: executed tool calls of each rollout, that is its messages with the role `tool`.

        Rollouts that are plain text hold no messages: see `trl_ext_hooks.calls.CallCounter`.
        """
        from .ops import count_tool_messages

        return count_tool_messages(self.completions).to(self.trainer.device)


@dataclass(frozen=True)
class Rewards:
    """Rewards (N, F') with their names and weights, where a plugin adds or removes columns."""

    values: torch.Tensor
    names: tuple[str, ...]
    weights: torch.Tensor


@dataclass(frozen=True)
class Scored(Rollout):
    """A scored round.

    Attributes:
        fields: What `annotate` of any plugin returned, by name: b local values.
        gathered: The tensors among them, of all processes: (N, ...).
        rewards: (N, F) float32 of all processes; NaN = this reward does not apply to the row.
        reward_names: The F names.
        reward_weights: (F,).
    """

    fields: Mapping[str, Any]
    gathered: Mapping[str, torch.Tensor]
    rewards: torch.Tensor
    reward_names: tuple[str, ...]
    reward_weights: torch.Tensor


@dataclass(frozen=True)
class Round(Scored):
    """A round with advantages.

    Attributes:
        advantages: What the loss would use now: (N,) one per row of all processes, or (b, T) one per local token.
        batch: The tensors that go to the loss, by TRL's names, b rows, still in group order: `prompt_ids` (b, P),
            `completion_ids`, `completion_mask` (b, T), and where they exist `tool_mask`, `old_per_token_logps`,
            `ref_per_token_logps`.
        hidden_states: By plugin, (n, H) detached: the hidden states that it named in `hidden_positions`, under the
            policy that sampled the round.
    """

    advantages: torch.Tensor
    batch: Mapping[str, Any]
    hidden_states: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def loss_mask(self) -> torch.Tensor:
        """(b, T): 1 on the tokens that the loss counts."""
        return loss_mask(self.batch)

    @property
    def kept(self) -> torch.Tensor:
        """(b,) booleans: the rows of this process that `keep_rows` left in; all of them before it has run."""
        kept: torch.Tensor | None = self.batch.get("trl_ext_kept")
        return self.group_ids[self.local] >= 0 if kept is None else kept

    @property
    def token_advantages(self) -> torch.Tensor:
        """(b, T): the advantages of this process, one per token, 0 on tokens that the loss does not count."""
        rows = self.advantages if self.advantages.dim() == 2 else self.advantages[self.local].unsqueeze(1)
        return rows * self.loss_mask


# --- forward and loss -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogpsCall:
    """One request for completion log-probabilities.

    Attributes:
        kind: The trainer that asks. GRPO and RLOO ask for completions, DPO for pairs.
        role: `"policy"` (with gradient, inside the loss), `"old"` (no gradient, right after sampling) or
            `"reference"`.
        model: The model to call, wrapped as the trainer holds it.
        input_ids, attention_mask: (B, P + T): prompts padded left, completions padded right. For pairs (2n, L) padded
            right, the chosen ones first.
        logits_to_keep: T; for pairs L - 1.
        score_mask: None for completions. For pairs (2n, L), true on the tokens to score.
        batch_size: Rows per forward that the trainer asks for, or None for all at once.
        compute_entropy: Whether entropies are wanted.
        extra: Further arguments, such as image tensors or `compute_aux_loss`.
    """

    kind: TrainerKind
    role: Role
    model: Any
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    logits_to_keep: int
    score_mask: torch.Tensor | None
    batch_size: int | None
    compute_entropy: bool
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Logps:
    """What a forward gives for the tokens to score.

    Attributes:
        per_token_logps: (B, T), 0 on masked tokens.
        entropies: (B, T) where asked for.
        aux_loss: Scalar, or None.
        extra: For pairs, the other per-token values of TRL's fused head by its names, such as `mean_logits`.
    """

    per_token_logps: torch.Tensor
    entropies: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """One micro-batch inside the loss, after the policy's forward.

    Attributes:
        mode, step, trainer: As in `Rollout`.
        batch: The micro-batch by TRL's names (m rows), with every field that `batch_fields` added.
        per_token_logps: (m, T) with gradient.
        entropies: (m, T) or None. TRL's own carry a gradient from TRL 1.15 on.
        hidden_states: By plugin, (n, H) detached: what it named in `hidden_positions`, from this very forward.
    """

    mode: Mode
    step: int
    trainer: TrainerView
    batch: Mapping[str, Any]
    per_token_logps: torch.Tensor
    entropies: torch.Tensor | None
    hidden_states: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def mask(self) -> torch.Tensor:
        """(m, T): 1 on the tokens that the loss counts."""
        return loss_mask(self.batch)

    @property
    def advantages(self) -> torch.Tensor:
        """(m, 1) or (m, T), ready to multiply token values."""
        advantages = self.batch["advantages"]
        return advantages.unsqueeze(1) if advantages.dim() == 1 else advantages

    @property
    def group_ids(self) -> torch.Tensor:
        """(m,) which rows share a prompt: for plugins with the need `whole_groups` or `grouped_order`."""
        ids: torch.Tensor | None = self.batch.get("trl_ext_group_ids")
        if ids is None:
            raise AttributeError("no plugin of this run needs `whole_groups` or `grouped_order`; declare the need")
        return ids

    @property
    def sampling_ratio(self) -> torch.Tensor | None:
        """(m, 1) or (m, T) detached: how much likelier TRL's policy found the tokens than the sampler (vLLM) did.

        TRL multiplies its loss per token by it. None where the policy itself sampled, or the correction is off.
        """
        return self.batch.get("importance_sampling_ratio")

    @property
    def old_per_token_logps(self) -> torch.Tensor:
        """(m, T) under the sampling policy; the detached current ones where the round is on-policy."""
        old = self.batch.get("old_per_token_logps")
        return self.per_token_logps.detach() if old is None else old


@dataclass(frozen=True)
class PolicyLoss:
    """A loss of a micro-batch: the policy loss itself, or a term beside it.

    Attributes:
        values: (m, T) loss per token, or a scalar that already is a mean over the micro-batch.
        normalisation: For (m, T) only: `"trainer"` averages as the trainer's `loss_type` does, `"token_mean"` over the
            micro-batch's tokens, `"sequence_mean"` over each row first.
    """

    values: torch.Tensor
    normalisation: Literal["trainer", "token_mean", "sequence_mean"] = "trainer"


# --- preference pairs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of n preference pairs of DPO, before its forwards. L is the padded length, prompt included.

    Attributes:
        mode, step, trainer: As in `Rollout`.
        batch: Tensors by TRL's names, 2n rows of which the first n are the chosen ones, padded right: `input_ids`,
            `attention_mask`, `completion_mask` (2n, L), and what else the collator made.
        rows: n dataset rows with the columns that plugins need, and where the data are text `prompt_ids`,
            `chosen_ids`, `rejected_ids`.
    """

    mode: Mode
    step: int
    trainer: TrainerView
    batch: Mapping[str, Any]
    rows: list[dict[str, Any]]

    @property
    def mask(self) -> torch.Tensor:
        """(2n, L-1) bool: the tokens that the loss counts; entry t is about token t + 1."""
        mask: torch.Tensor = self.batch["completion_mask"]
        return mask[:, 1:] != 0


@dataclass(frozen=True)
class ScoredPairs(Pairs):
    """Pairs with their log-probabilities.

    Attributes:
        fields: What `pair_batch` of any plugin returned.
        per_token_logps: (2n, L-1) under the policy, 0 where `mask` is false; with gradient in `pair_logps`.
        ref_per_token_logps: (2n, L-1) under the reference; None where only precomputed sums exist, which happens in
            `pair_metrics` only.
    """

    fields: Mapping[str, Any]
    per_token_logps: torch.Tensor
    ref_per_token_logps: torch.Tensor | None


@dataclass(frozen=True)
class PairLogps:
    """Rewritten log-probabilities of policy and reference, (2n, L-1) each."""

    per_token_logps: torch.Tensor
    ref_per_token_logps: torch.Tensor


def loss_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    """1 on the tokens that the loss counts: those of completions that the model wrote."""
    mask: torch.Tensor = batch["completion_mask"]
    tool_mask = batch.get("tool_mask")
    return mask if tool_mask is None else mask * tool_mask


# --- what `trl_ext inspect` shows -------------------------------------------------------------------------------------


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


# --- a run of several trainings ---------------------------------------------------------------------------------------


class Job(Protocol):
    """A whole run, for the plugin that owns it (hook `run`).

    Every method is collective unless it says otherwise. What is finished lies in folders under `folder`, so that a run
    that was killed can go on: see `produce`.
    """

    @property
    def args(self) -> Any:
        """The training arguments of every training; read them, never write them."""

    @property
    def model(self) -> str:
        """The model that the run begins with: a folder or a name on the hub."""

    @property
    def data(self) -> Any:
        """The training data (`datasets.Dataset`)."""

    @property
    def folder(self) -> Path:
        """`output_dir`, absolute."""

    @property
    def resume(self) -> bool:
        """Whether the user asked to go on with what lies in `folder`."""

    @property
    def peft_config(self) -> Any:
        """The adapter that every training adds, or None."""

    @property
    def quantized(self) -> bool: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def process_index(self) -> int: ...
    def wait(self) -> None:
        """Until every process is here."""

    def tell(self, message: str) -> None:
        """Prints a line, on the main process. Not collective."""

    def log(self, metrics: Mapping[str, float], *, step: int, steps: int) -> None:
        """Records numbers of the run as a whole, such as those of a round. Not collective.

        They go into `folder/trl_ext_rounds.json`, and `trl_ext compare` measures them as `PLUGIN/NAME`. A run that goes
        on logs what is finished again, in the same order.

        Args:
            metrics: Name -> number, the same on all processes.
            step: Number of the round, from 1.
            steps: How many there will be.
        """

    def produce(self, name: str, make: Callable[[Path], None], *, everywhere: bool = False) -> Path:
        """`folder/name`, made only if it is not there: `make` fills an empty folder, which then gets the name.

        `make` runs on the main process, or on all of them with `everywhere`. Killed inside it, the next run makes the
        folder anew; killed after it, never again.
        """

    def sampler(
        self, model: str, *, num: int, temperature: float, top_p: float, max_tokens: int
    ) -> Callable[[list[Any], int], list[list[Any]]]:
        """A function of prompts and a seed that gives `num` completions of each prompt, as text or messages.

        The same prompts and seed give the same completions on every process. Not collective, neither itself nor the
        function.
        """

    def rewards(
        self, functions: Sequence[str], weights: Sequence[float] | None = None
    ) -> Callable[[list[dict[str, Any]], list[Any]], list[float]]:
        """A function of dataset rows and one completion of each that gives the weighted sum of their rewards.

        `functions` are TRL's reward functions by name, or `module.function` paths. A row to which none of them applies
        gets NaN. Not collective.
        """

    def train(self, model: str, data: Any, name: str, **settings: Any) -> Path:
        """Trains from `model` with `model` as the reference, and saves the result into `folder/name` (by `produce`).

        The trainer has all plugins of the run. A training that was killed goes on from its last checkpoint.

        Args:
            model: A folder or a name on the hub.
            data: Preference pairs.
            name: Where the result goes. With `peft_config` that is an adapter on `model`.
            settings: Training arguments that differ from `args`.
        """

    def open(self, model: str | Path) -> Any:
        """The model of a folder on the CPU; an adapter is merged into its base, in float32. Not collective."""

    def save(self, model: Any, folder: Path, *, like: str | Path) -> None:
        """Saves a model from `open` with the tokenizer; a merged one in the precision of `like`. Not collective."""

    def finish(self, model: str | Path) -> None:
        """Puts a model into `output_dir` as the result of the run: a copy, or an adapter merged into its base."""


Metric = tuple[float, float]
"""A sum and a count; the core adds both over processes and reports their ratio."""

Generate = Callable[[list[Any]], Generation]
Compute = Callable[[], Logps]
Fields = Mapping[str, "torch.Tensor | Sequence[Any]"]
