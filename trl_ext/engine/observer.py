"""What the engine shows of a round to whoever records it: two Protocols."""

from __future__ import annotations

from typing import Protocol

from trl_ext_hooks import Round, Scored


class RoundRecord(Protocol):
    """The record of one round."""

    def after(self, by: str, state: Scored) -> None:
        """Takes the rewards of a scored round, or the advantages of a finished one, as `by` left them."""

    def finish(self, round: Round) -> None:
        """Takes the finished round. Collective."""


class Recorder(Protocol):
    """Decides which rounds of a trainer are recorded."""

    def begin(self) -> RoundRecord | None:
        """Starts the record of the round that begins, or returns None. Equal on every process."""
