"""The trainer as plugins see it: `TrainerView` over a TRL trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from trl_ext_hooks import Pairs, TrainerKind

from ..trl_internals import frozen_models, trainer_state

Precompute = Callable[[str, Callable[[Pairs], torch.Tensor], str], None]


class View:
    """A `TrainerView`.

    Attributes:
        callbacks: The callbacks that plugins added.
        precompute: Computes values for all pairs of the data. The host sets it, because it knows that stage.
    """

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
