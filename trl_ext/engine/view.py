"""The trainer as plugins see it: `TrainerView` over a TRL trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch

from trl_ext_hooks import Logps, Pairs, TrainerKind

from ..trl_internals import frozen_models, trainer_state

Precompute = Callable[[str, Callable[[Pairs], torch.Tensor], str], None]


class OwnRows(Protocol):
    """Does what a `TrainerView` offers beside the round, and knows the stages."""

    def data(self) -> Any: ...
    def total_steps(self) -> int: ...
    def reward_names(self) -> tuple[str, ...]: ...
    def score(
        self, rows: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor: ...
    def logps(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], grad: bool = False, entropy: bool = False
    ) -> Logps: ...


class View:
    """A `TrainerView`.

    Attributes:
        own_rows: Scores rows of a plugin's own. The host sets it, like `precompute`.
        callbacks: The callbacks that plugins added.
        precompute: Computes values for all pairs of the data. The host sets it, because it knows that stage.
    """

    own_rows: OwnRows
    precompute: Precompute

    def __init__(self, trainer: Any, kind: TrainerKind) -> None:
        self._trainer = trainer
        self._kind: TrainerKind = kind
        self.callbacks: list[Any] = []

    @property
    def kind(self) -> TrainerKind:
        return self._kind

    @property
    def args(self) -> Any:
        return self._trainer.args

    @property
    def model(self) -> Any:
        return self._trainer.model_wrapped if self._trainer.model_wrapped is not None else self._trainer.model

    @property
    def unwrapped_model(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    @property
    def processing_class(self) -> Any:
        return self._trainer.processing_class

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    def render(self, prompt: Any) -> str:
        return trainer_state.prompt_text(self._trainer, prompt)

    @property
    def has_router_loss(self) -> bool:
        return trainer_state.has_router_loss(self._trainer)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self._trainer.accelerator.device)

    @property
    def num_processes(self) -> int:
        return int(self._trainer.accelerator.num_processes)

    @property
    def process_index(self) -> int:
        return int(self._trainer.accelerator.process_index)

    @property
    def data(self) -> Any:
        return self.own_rows.data()

    @property
    def total_steps(self) -> int:
        return self.own_rows.total_steps()

    @property
    def learning_rate(self) -> float:
        optimizer = self._trainer.optimizer
        return float(self.args.learning_rate if optimizer is None else optimizer.param_groups[0]["lr"])

    @property
    def reward_names(self) -> tuple[str, ...]:
        return self.own_rows.reward_names()

    def score(
        self, rows: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]
    ) -> torch.Tensor:
        return self.own_rows.score(rows, prompts, completions, completion_ids)

    def logps(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], grad: bool = False, entropy: bool = False
    ) -> Logps:
        return self.own_rows.logps(prompt_ids, completion_ids, grad, entropy)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self._trainer.accelerator.gather(tensor))

    def gather_objects(self, values: list[Any]) -> list[Any]:
        from accelerate.utils import gather_object

        return cast(list[Any], gather_object(values))

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self._trainer.accelerator.reduce(tensor, reduction="sum"))

    def add_callback(self, callback: Any) -> None:
        self._trainer.add_callback(callback)
        self.callbacks.append(callback)

    def frozen_model(self, path: str) -> Any:
        return frozen_models.load(self._trainer, path)

    def score_pairs(self, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
        return frozen_models.score(self._trainer, model, batch)

    def precompute_pairs(self, name: str, score: Callable[[Pairs], torch.Tensor], key: str) -> None:
        self.precompute(name, score, key)
