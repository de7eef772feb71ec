"""Trainer: the running trainer as a plugin sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from .basics import Logps, TrainerKind

if TYPE_CHECKING:
    import torch


class TrainerView(Protocol):
    """Offers what a plugin may use of the trainer that it serves."""

    @property
    def kind(self) -> TrainerKind:
        """Tells which trainer it is."""

    @property
    def args(self) -> Any:
        """Returns the training arguments. Read them, never write them."""

    @property
    def model(self) -> Any:
        """Returns the policy as the trainer calls it, wrapped for distributed training."""

    @property
    def unwrapped_model(self) -> Any:
        """Returns the policy without distributed wrappers."""

    @property
    def processing_class(self) -> Any:
        """Returns the tokenizer or processor."""

    @property
    def tokenizer(self) -> Any:
        """Returns the tokenizer, also where `processing_class` is a processor that holds one."""

    def render(self, prompt: Any) -> str:
        """Returns the text that the policy continues for a prompt.

        Messages pass through the chat template. Text stays as it is.
        """

    @property
    def has_router_loss(self) -> bool:
        """Tells whether the trainer adds the auxiliary loss of a mixture of experts to its loss."""

    @property
    def device(self) -> torch.device:
        """Returns the device of this process."""

    @property
    def num_processes(self) -> int:
        """Counts the processes of the run."""

    @property
    def process_index(self) -> int:
        """Returns the number of this process, from 0."""

    @property
    def data(self) -> Any:
        """Returns the training data, with the columns of the rows that hooks get: `len(data)` rows, `data[i]` a row.

        `select_rows` may return such rows.

        Raises:
            UsageError: The data are a stream, whose rows are known only once they come.
        """

    @property
    def total_steps(self) -> int:
        """Returns how many optimizer steps the whole training has, those before a resume included.

        Raises:
            UsageError: DPO counts them only when training begins.
        """

    @property
    def learning_rate(self) -> float:
        """Returns the learning rate of the next optimizer step, in the hook `optimizer_step` that of the step itself.

        It is that of the first parameter group. Before training it is the one of `args`.
        """

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Returns the names of the F reward functions, each of them once. DPO has none."""

    def score(
        self, rows: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        """Returns what the trainer's reward functions give for rows outside the batch: (n, F). GRPO and RLOO.

        Each process gets the scores of its own n rows, and n may differ, also be 0. All reward functions run, reward
        models and asynchronous ones too. Nothing that they log is kept. NaN = does not apply. The columns are those of
        `reward_names`: the hook `rewards` rewrites whole rounds and has no part in them. Collective.

        Where the numbers of rows differ between processes, the shorter lists are filled up with copies of a row, whose
        scores are dropped. Rewards that look at the other rows of a batch see only these rows. In environments there is
        nothing to score, since they pay for what was played in them.

        Args:
            rows: Dataset rows, whose columns the reward functions get. Fields of `annotate` that they need belong in
                them too.
            prompts, completions: Text or messages.
            completion_ids: Token ids of each completion, unpadded.

        Raises:
            PluginError: The lists do not fit, a score is infinite, or the rollouts use environments.
        """

    def logps(
        self,
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        grad: bool = False,
        entropy: bool = False,
    ) -> Logps:
        """Returns the policy's log-probabilities of completions: (n, T), padded right with 0. GRPO and RLOO.

        Each process gets those of its own n rows, and n may differ, also be 0. T is the length of its longest
        completion. The plugin that owns the forward (hook `logps`) computes them, else TRL's forward, in chunks of the
        batch size per device and with the sampling temperature. Text only. Collective.

        Args:
            prompt_ids, completion_ids: Token ids, unpadded. A completion may be empty, a prompt may not.
            grad: Whether they carry gradients. Let them enter the loss on every process, also where n is 0: their sum
                is then a 0 that belongs to the graph, which sharded models need.
            entropy: Whether the entropies are computed too, (n, T).

        Raises:
            PluginError: The lists do not fit.
        """

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the (b, ...) tensors of all processes as one (N, ...) on each, in row order. Collective."""

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """Returns the lists of all processes, of picklable values, as one list on each, in row order. Collective."""

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the sum of a tensor over processes, on each of them. All tensors have one shape. Collective."""

    def add_callback(self, callback: Any) -> None:
        """Adds a transformers `TrainerCallback`. It is removed when the plugin is switched off."""

    def frozen_model(self, path: str) -> Any:
        """Loads a second causal language model for scoring pairs. DPO from TRL 1.15.

        It never trains, has no dropout, and is prepared for the devices of the run.

        Args:
            path: A folder or a name on the hub. A PEFT adapter is merged into its base.

        Raises:
            ConfigError: The model cannot be loaded, or its vocabulary is not the policy's.
        """

    def score_pairs(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        """Returns the log-probabilities of the completion tokens of a batch of pairs under a `frozen_model`.

        Args:
            model: What `frozen_model` returned.
            batch: A batch of pairs, such as `Pairs.batch`.

        Returns:
            (2n, L-1), without gradient, 0 on every other token.
        """

    def precompute_pairs(self, name: str, score: Callable[[Any], torch.Tensor], key: str) -> None:
        """Adds the columns `chosen_NAME` and `rejected_NAME` to the training and evaluation data. Collective.

        Call it in `setup`. Each column holds one value per completion token, NaN where truncation cuts the token off.

        Args:
            name: What is computed, such as `guide_logps`.
            score: A function that returns (2n, L-1) values of `Pairs`. Each process scores its part of the data.
            key: What the values depend on besides the data and their truncation, such as the path of a model. The cache
                of the data supplies values of the same data and key.
        """
