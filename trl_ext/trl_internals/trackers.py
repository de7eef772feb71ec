"""The trackers to which a trainer reports: W&B, trackio and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def log_table(trainer: Any, name: str, table: Mapping[str, Sequence[Any]]) -> None:
    """Sends a table to every tracker of `report_to` that holds tables: W&B, trackio, and TensorBoard as a text.

    Called on the main process. Nothing happens for a tracker that does not run, as before training.

    Args:
        trainer: The trainer.
        name: Under what the table is found.
        table: The values by column. All columns have one length.
    """
    trackers = trainer.args.report_to or ()
    if "wandb" in trackers:
        import wandb

        if wandb.run is not None:
            wandb.log({name: wandb.Table(dataframe=_frame(table))})
    if "trackio" in trackers:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.log({name: trackio.Table(dataframe=_frame(table))})
    if "tensorboard" in trackers:
        for writer in _writers(trainer):
            writer.add_text(name, _markdown(table), trainer.state.global_step)


def _frame(table: Mapping[str, Sequence[Any]]) -> Any:
    import pandas

    return pandas.DataFrame(table)


def _writers(trainer: Any) -> list[Any]:
    """Returns the open event files of TensorBoard."""
    from transformers.integrations.integration_utils import TensorBoardCallback

    callbacks = trainer.callback_handler.callbacks
    writers = [callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback)]
    return [writer for writer in writers if writer is not None]


def _markdown(table: Mapping[str, Sequence[Any]]) -> str:
    """Returns a table as TensorBoard shows it. Whatever stands in a cell is text and no markup."""
    lines = [list(table), ["---"] * len(table), *map(list, zip(*table.values(), strict=True))]
    rule = lines[1]
    return "\n".join(f"| {' | '.join(cells if cells is rule else map(_cell, cells))} |" for cells in lines)


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
    escaped = "".join(f"&#{ord(letter)};" if letter in "\\`*_{}[]()<>#+!|~&" else letter for letter in text)
    return escaped.replace("\r", "").replace("\n", "<br>")
