"""Tool calls of rollouts: the one place that decides what a call is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..plugin import option
from ..rollout import Rollout
from ..scoring import Scored
from ..setup import Config, Need, Refuse, Requirement
from .messages import count_tag


@dataclass(frozen=True)
class CallCounter:
    """Counts the tool calls of rollouts: executed calls, unless `tag` or `field` says otherwise.

    Executed calls are those of TRL's tool loop (`Rollout.tool_calls`), also where it took their results back. A
    `rollout_func` leaves none behind, and RLOO has no tools. There a call is a tag in the text, or a number that the
    `rollout_func` reports itself.

    Attributes:
        tag: Text that opens a call, such as `<tool_call>`. It is counted in the decoded completion, special tokens and
            inserted results included. To count executed calls only, name the text that opens a result.
        field: Name of a value per rollout: of what `rollout_func` returns, or of what a plugin annotates.
    """

    tag: str | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        if self.tag == "" or self.field == "":
            raise ValueError("call_tag and calls_field must not be empty; leave them out to count tool messages")
        if self.tag is not None and self.field is not None:
            raise ValueError("call_tag and calls_field exclude each other")

    def requirements(self, config: Config, plugin: str) -> Iterator[Requirement]:
        """Yields for `configure` what refuses a run in which nothing would ever be counted.

        Args:
            config: As `configure` gets it.
            plugin: Name of the plugin, for its options `call_tag` and `calls_field`.
        """
        if self.tag is not None or self.field is not None:
            return
        if config.kind == "rloo":
            yield Refuse("the RLOO trainer has no tool loop, so no tool message exists.", f"Set {plugin}.call_tag.")
        elif config.tool_sources == ("rollout_func",):
            yield Refuse(
                "completions of a rollout_func hold no tool messages, so no call would be counted.",
                f"Set {plugin}.calls_field to a list that it returns, or {plugin}.call_tag to the text that opens a "
                f"call.",
            )
        elif config.tool_sources:
            yield Need("tools")

    def count(self, rollout: Rollout) -> torch.Tensor:
        """Returns the (b,) int64 calls of each rollout of this process."""
        if self.field is not None:
            return torch.tensor(self._reported(rollout, self.field), dtype=torch.int64, device=rollout.trainer.device)
        if self.tag is not None:
            decode = rollout.trainer.processing_class.batch_decode
            return count_tag(decode(rollout.completion_ids), self.tag).to(rollout.trainer.device)
        return rollout.tool_calls

    def gather(self, rollout: Rollout) -> torch.Tensor:
        """Returns the (N,) int64 calls of the rollouts of all processes. Collective."""
        return rollout.trainer.gather(self.count(rollout))

    def _reported(self, rollout: Rollout, field: str) -> list[int]:
        """Returns the number in `field` of each rollout: what a plugin annotated, or else that of its row."""
        annotated = rollout.fields.get(field) if isinstance(rollout, Scored) else None
        values = [row.get(field) for row in rollout.rows] if annotated is None else list(annotated)
        counts: list[int] = []
        for row, value in enumerate(values):
            if value is None:
                known = ", ".join(sorted({*rollout.rows[row], *getattr(rollout, "fields", ())}))
                raise KeyError(f"row {row} has no field {field!r} with its number of tool calls; it has {known}")
            if int(value) != value or value < 0:
                raise ValueError(f"field {field!r} of row {row} is {value!r}, expected a whole number of tool calls")
            counts.append(int(value))
        return counts


@dataclass(frozen=True)
class CallOptions:
    """The options with which users say what a tool call is: base class of the `Options` of a plugin that counts calls.

    A subclass that has a `__post_init__` of its own calls this one.
    """

    call_tag: str | None = option(
        None, help="count this text in completions instead of executed calls, for rollouts without tool messages"
    )
    calls_field: str | None = option(None, help="take the number of calls that a rollout_func returns under this name")

    def __post_init__(self) -> None:
        CallCounter(self.call_tag, self.calls_field)  # refuses what cannot be counted

    @property
    def counter(self) -> CallCounter:
        """The counter of these options."""
        return CallCounter(self.call_tag, self.calls_field)
