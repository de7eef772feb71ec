"""Trainer: the running trainer as a plugin sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from .basics import TrainerKind

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
