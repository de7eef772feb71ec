"""The running trainer as a plugin sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from .basics import TrainerKind

if TYPE_CHECKING:
    import torch

    from .pairs import Pairs


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

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, also where `processing_class` is a processor that holds one."""

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
