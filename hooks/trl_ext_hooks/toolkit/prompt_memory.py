"""Memory of a method: one value for each task, kept from step to step."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..rollout import Rollout
from ..setup import Config, Need, Refuse, Requirement


def prompt_key(value: Any) -> int:
    """Returns a signed 64-bit number for a value of the data: a hash of its canonical form.

    It is equal in every process and run.

    Raises:
        TypeError: The value is neither JSON nor another type that data sets hold.
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=_as_json)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _as_json(value: Any) -> Any:
    """Returns times, numbers and arrays of data sets, and pictures, as JSON."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return [type(value).__name__, str(value)]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if hasattr(value, "tolist"):  # arrays and tensors
        return value.tolist()
    if hasattr(value, "tobytes"):  # pictures
        return [str(getattr(value, "size", "")), hashlib.blake2b(value.tobytes()).hexdigest()]
    raise TypeError(f"{type(value).__name__} is not JSON")


class PromptMemory:
    """Remembers one number per task, the same on all processes, kept in checkpoints and frozen in evaluation.

    A task is a row of the data: the value of `id_column`, or else all columns of the row as the data hold them. So
    equal prompts with another answer or seed are two tasks. What an environment or a plugin makes of a row afterwards
    does not matter. Every process sees the rows of all processes. So a
    group that lies on several, or two groups of one task, are merged alike everywhere.

        memory = PromptMemory(merge=min)
        keys = memory.keys(rollout)                 # (N,), collective
        before = memory.recall(keys)                # (N,), NaN where the task is new
        memory.update(rollout, keys, values)        # NaN values are left out, and evaluation changes nothing

    Args:
        merge: Joins the remembered and the new number. Rows are merged in their order, so that every process gets the
            same numbers even where the order matters.
        id_column: Column that tells tasks apart, or None.
    """

    def __init__(self, merge: Callable[[float, float], float], id_column: str | None = None) -> None:
        self.merge = merge
        self.id_column = id_column
        self._numbers: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def requirements(self, config: Config, option: str, instead: str | None = None) -> Iterator[Requirement]:
        """Yields for `configure` what refuses data that do not tell tasks apart.

        Args:
            config: As `configure` gets it.
            option: Full name of the option that holds the column, for the error.
            instead: Another option that helps, with its value, for the error.
        """
        if self.id_column is not None:
            yield Need(f"column:{self.id_column}")
            return
        other = f", or {instead}" if instead else ""
        columns = set(config.columns or ())
        if {"image", "images"} & columns:
            what = "the data has images, and the text of a prompt may belong to several of them."
            yield Refuse(what, f"Set {option}{other}.")
        elif "environment_factory" in config.tool_sources and not columns - {"environment"}:
            what = "the environment owns the data, or their columns are unknown, so no row tells tasks apart."
            yield Refuse(what, f"Give the trainer data with a column for {option}{other}.")
        elif _mixed(config):
            what = "rows of the data are equal, so what makes their tasks differ is in the environment or rollout_func."
            yield Refuse(what, f"Set {option} to a column that tells tasks apart{other}.")

    def keys(self, rollout: Rollout) -> torch.Tensor:
        """Returns the (N,) int64 key of the task of every row of all processes. Collective."""
        rows = rollout.data_rows if self.id_column is None and rollout.data_rows is not None else rollout.rows
        keys = [self._key(row) for row in rows]
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

    def _key(self, row: Mapping[str, Any]) -> int:
        """Returns the key of a row of the data."""
        column = self.id_column
        if column is not None and row.get(column) is None:
            raise KeyError(f"a row has no {column!r} to tell its task apart; it has {', '.join(sorted(row))}")
        try:
            return prompt_key(dict(row) if column is None else row[column])
        except TypeError as error:
            what = "a row of the data" if column is None else f"column {column!r}"
            raise TypeError(f"{what} cannot tell tasks apart: {error}. Name a column that can.") from error


def _mixed(config: Config) -> bool:
    """Returns whether rows of the data stand for several tasks each, as far as that can be seen.

    An environment gets the whole row, and rows that are equal then have their tasks elsewhere. A `rollout_func` gets
    the prompt alone, so two equal rows may well be one task; a task that is in no row shows in data of one row only.
    """
    sources = {"environment_factory", "rollout_func"} & set(config.tool_sources)
    if not sources:
        return False
    kept = ("prompt",) if config.args.remove_unused_columns else config.columns or ()
    rows = config.first_rows(*kept)
    different = len({prompt_key(row) for row in rows})
    return different < len(rows) if "environment_factory" in sources else different == 1 < len(rows)
