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


Entry = float | list[float]
"""An entry of a memory: a number, or a list of numbers of any length."""


class PromptMemory:
    """Remembers a number or a list of numbers per task, the same on all processes, kept in checkpoints.

    A task is a row of the data: the value of `id_column`, or else all columns of the row as the data hold them. So
    equal prompts with another answer or seed are two tasks. What an environment or a plugin makes of a row afterwards
    does not matter. Every process sees the rows of all processes. So a
    group that lies on several, or two groups of one task, are merged alike everywhere.

        memory = PromptMemory(merge=min)
        keys = memory.keys(rollout)                 # (N,), collective
        before = memory.recall(keys)                # (N,), NaN where the task is new
        memory.update(rollout, keys, values)        # NaN values are left out, and evaluation changes nothing

    A merge rule forgets, or keeps lists, such as the last 16 rewards:

        PromptMemory(merge=lambda known, reward: 0.9 * known + reward, start=0.0)
        PromptMemory(merge=lambda known, reward: [*known, reward][-16:], start=[])

    Other rules set entries themselves, from gathered values, in training rounds only. In `select_rows`, where every
    process has all rows, the key of a row needs no gather:

        memory.get(memory.key(row), 0.5)            # in `select_rows`, also for rows of `trainer.data`
        memory[key] = [alpha, beta]                 # the same on every process

    Args:
        merge: Joins what is remembered with a new value. Rows are merged in their order, so that every process gets the
            same numbers even where the order matters. None where the plugin sets all entries itself.
        id_column: Column that tells tasks apart, or None.
        start: What is remembered of a new task before its first value is merged. None remembers the first value as it
            is.
    """

    def __init__(
        self,
        merge: Callable[[Any, Any], Entry] | None = None,
        id_column: str | None = None,
        start: Entry | None = None,
    ) -> None:
        self.merge = merge
        self.id_column = id_column
        self.start = start
        self._entries: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, key: int, entry: Entry) -> None:
        """Remembers an entry. Do it on every process, from values that all of them have, and not in evaluation.

        Raises:
            TypeError: The entry is neither a number nor a list of numbers.
        """
        self._entries[int(key)] = _checked(entry)

    def get(self, key: int, unknown: Any = None) -> Any:
        """Returns the entry of a key, or `unknown`."""
        return self._entries.get(int(key), unknown)

    def key(self, row: Mapping[str, Any]) -> int:
        """Returns the key of one row of the data, such as `rows[i]` in `select_rows` or `trainer.data[i]`.

        Without an `id_column` every column is hashed: make the keys of a whole data set once and keep them.
        """
        return self._key(row)

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

    def recall(self, keys: torch.Tensor, unknown: Entry | None = None) -> torch.Tensor:
        """Returns what is remembered for (N,) keys: (N,) float64, or (N, w) where entries are lists of w numbers.

        Args:
            keys: As `keys` returns them.
            unknown: Stands for tasks of which nothing is known. None stands for `start`, or else for NaN.

        Raises:
            ValueError: The entries differ in length. Read them one by one with `get`.
        """
        if unknown is None:
            unknown = math.nan if self.start is None else self.start
        entries = [self._entries.get(key, unknown) for key in keys.tolist()]
        shapes = sorted({len(entry) if isinstance(entry, list | tuple) else -1 for entry in entries})
        if len(shapes) > 1:
            kinds = ", ".join("a number" if length < 0 else f"a list of {length}" for length in shapes)
            raise ValueError(
                f"PromptMemory.recall found entries of several shapes ({kinds}), expected one. Give `unknown` the "
                f"shape of an entry, or read entries one by one with `get`."
            )
        return torch.tensor(entries, dtype=torch.float64, device=keys.device)

    def update(self, rollout: Rollout, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Merges the values of a round in the order of the rows. Does nothing in evaluation.

        Args:
            rollout: The round.
            keys: (N,) of `keys`.
            values: (N,), or (N, k) where the merge rule takes k numbers. Rows with a NaN are left out.
        """
        if self.merge is None:
            raise TypeError("PromptMemory.update needs a `merge` rule. Give one, or set entries with memory[key] = ...")
        if rollout.mode != "train":
            return
        for key, value in zip(keys.tolist(), values.tolist(), strict=True):
            if any(map(math.isnan, value if isinstance(value, list) else [value])):
                continue
            known = self._entries.get(key, self.start)
            self[key] = value if known is None else self.merge(known, value)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything remembered, for a plugin's `state_dict`."""
        entries = list(self._entries.values())
        flat = [number for entry in entries for number in (entry if isinstance(entry, list) else [entry])]
        state = {"keys": torch.tensor(list(self._entries), dtype=torch.int64)}
        state["numbers"] = torch.tensor(flat, dtype=torch.float64)
        if any(isinstance(entry, list) for entry in entries):
            # -1 stands for a number that is in no list
            sizes = [len(entry) if isinstance(entry, list) else -1 for entry in entries]
            state["lengths"] = torch.tensor(sizes, dtype=torch.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""
        keys, numbers = state["keys"].tolist(), iter(state["numbers"].tolist())
        lengths = state["lengths"].tolist() if "lengths" in state else [-1] * len(keys)
        self._entries = {
            key: next(numbers) if length < 0 else [next(numbers) for _ in range(length)]
            for key, length in zip(keys, lengths, strict=True)
        }

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


def _checked(entry: Any) -> Entry:
    """Returns an entry as plain numbers.

    Raises:
        TypeError: It is something else.
    """
    values = entry.tolist() if isinstance(entry, torch.Tensor) else entry
    numbers = values if isinstance(values, list | tuple) else [values]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError(f"PromptMemory remembers numbers and lists of numbers, got {entry!r}")
    return [float(number) for number in values] if isinstance(values, list | tuple) else float(values)


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
