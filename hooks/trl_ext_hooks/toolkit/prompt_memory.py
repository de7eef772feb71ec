"""What a method remembers about each prompt from step to step."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..rollout import Rollout
from ..setup import Config, Need, Refuse, Requirement


def prompt_key(value: Any) -> int:
    """Returns a signed 64-bit number for a JSON value: a hash of its canonical form, equal in every process and run.

    Raises:
        TypeError: The value is not JSON, such as an image.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


class PromptMemory:
    """Remembers one number per prompt, the same on all processes, kept in checkpoints and frozen in evaluation.

    A prompt is a row of the data: the value of `id_column`, or else the column `prompt` as the data hold it. What an
    environment or a plugin makes of it afterwards does not matter. Every process sees the rows of all processes. So a
    group that lies on several, or two groups of one prompt, are merged alike everywhere.

        memory = PromptMemory(merge=min)
        keys = memory.keys(rollout)                 # (N,), collective
        before = memory.recall(keys)                # (N,), NaN where the prompt is new
        memory.update(rollout, keys, values)        # NaN values are left out, and evaluation changes nothing

    Args:
        merge: Joins the remembered and the new number. Rows are merged in their order, so that every process gets the
            same numbers even where the order matters.
        id_column: Column that tells prompts apart, or None.
    """

    def __init__(self, merge: Callable[[float, float], float], id_column: str | None = None) -> None:
        self.merge = merge
        self.id_column = id_column
        self._numbers: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def requirements(self, config: Config, option: str) -> Iterator[Requirement]:
        """Yields for `configure` what refuses data that do not tell prompts apart.

        Args:
            config: As `configure` gets it.
            option: Full name of the option that holds the column, for the error.
        """
        if self.id_column is not None:
            yield Need(f"column:{self.id_column}")
        elif config.columns is not None and "prompt" not in config.columns:
            yield Refuse("the training data has no column 'prompt' to tell prompts apart.", f"Set {option}.")
        elif config.columns is not None and {"image", "images"} & set(config.columns):
            yield Refuse(
                "the data has images, and the text of a prompt may belong to several of them.", f"Set {option}."
            )

    def keys(self, rollout: Rollout) -> torch.Tensor:
        """Returns the (N,) int64 key of the prompt of every row of all processes. Collective."""
        column = self.id_column or "prompt"
        keys = [self._key(row, column) for row in rollout.rows]
        return rollout.trainer.gather(torch.tensor(keys, dtype=torch.int64, device=rollout.trainer.device))

    def recall(self, keys: torch.Tensor) -> torch.Tensor:
        """Returns the (N,) float64 remembered numbers; NaN for prompts of which nothing is known."""
        numbers = [self._numbers.get(key, torch.nan) for key in keys.tolist()]
        return torch.tensor(numbers, dtype=torch.float64, device=keys.device)

    def update(self, rollout: Rollout, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Merges (N,) values, NaN ones left out, in the order of the rows. Does nothing in evaluation."""
        if rollout.mode != "train":
            return
        for key, value in zip(keys.tolist(), values.tolist(), strict=True):
            if not math.isnan(value):
                known = self._numbers.get(key)
                self._numbers[key] = float(value if known is None else self.merge(known, value))

    def state_dict(self) -> dict[str, Any]:
        """Returns everything remembered, for a plugin's `state_dict`."""
        keys = torch.tensor(list(self._numbers), dtype=torch.int64)
        return {"keys": keys, "numbers": torch.tensor(list(self._numbers.values()), dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        self._numbers = dict(zip(state["keys"].tolist(), state["numbers"].tolist(), strict=True))

    @staticmethod
    def _key(row: Mapping[str, Any], column: str) -> int:
        if row.get(column) is None:
            raise KeyError(f"a row has no {column!r} to tell its prompt apart; it has {', '.join(sorted(row))}")
        try:
            return prompt_key(row[column])
        except TypeError as error:
            raise TypeError(f"column {column!r} cannot tell prompts apart, it is not JSON: {error}") from error
