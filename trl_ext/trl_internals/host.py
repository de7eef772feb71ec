"""What the mixins of a trainer call: a Protocol that the engine implements.

The mixins know TRL's private methods. A host knows plugins. Neither knows the other's inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from trl_ext_hooks import Generation, Logps, LogpsCall, TrainerKind


class Host(Protocol):
    """The plugins of one trainer, as its overridden methods see them. `stock` is always TRL's own method."""

    @property
    def kind(self) -> TrainerKind: ...
    @property
    def reference(self) -> Any:
        """The frozen copy of the policy that plugins need and TRL lacks, or None."""

    @property
    def columns(self) -> list[str]:
        """Columns of the data that TRL would drop and plugins need."""

    @property
    def prompts(self) -> int | None:
        """How many prompts a round of training has, where a plugin says so."""

    @property
    def in_loss(self) -> bool:
        """Whether a micro-batch is inside its loss."""

    @property
    def watches_logps(self) -> bool:
        """Whether a plugin uses the log-probability forward."""

    @property
    def needs_old_entropies(self) -> bool:
        """Whether the forward that scores a round after sampling has to return entropies."""

    # every trainer
    def step_ended(self) -> None: ...
    def save(self, folder: str) -> None: ...
    def load(self, checkpoint: str | None) -> None: ...
    def complete_card(self, folder: str) -> None:
        """Adds the plugins to the model card in a folder."""

    # GRPO and RLOO
    def round(self, rows: list[dict[str, Any]], stock: Callable[[Any], dict[str, Any]]) -> dict[str, Any]: ...
    def generate(self, prompts: list[Any], stock: Callable[[list[Any]], Generation]) -> Generation: ...
    def turn_begins(self) -> None: ...
    def score(
        self,
        rows: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        stock: Callable[..., Any],
    ) -> Any: ...
    def logps(self, call: LogpsCall, stock: Callable[[], Logps]) -> Logps: ...
    def loss(self, inputs: Mapping[str, Any], stock: Callable[[Mapping[str, Any]], Any]) -> Any: ...
    def own_loss(self, inputs: Mapping[str, Any], stock: Callable[[Mapping[str, Any]], Any]) -> Any:
        """The loss that TRL's own class computes, inside `loss`."""

    # DPO
    def pair_loss(
        self,
        inputs: Mapping[str, Any],
        stock: Callable[[Mapping[str, Any]], Any],
        reference: Callable[[Mapping[str, Any]], Any],
    ) -> Any: ...
    def without_rows(self, inputs: Mapping[str, Any]) -> dict[str, Any]: ...
